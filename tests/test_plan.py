import pytest
from transformers import LlamaConfig

from qlora_core.artifacts import PreparedDataset, SplitFacts
from qlora_core.config import AdapterConfig, ClusterConfig, RunConfig
from qlora_core.modeling.shape import published_config, shape_of
from qlora_core.plan import (
    Device,
    Plan,
    RawSize,
    ShapePlan,
    plan_run,
    plan_shape,
    plan_stages,
    training_size,
)

CPU = Device(kind="cpu", name="2 cores", memory_bytes=24 * 10**9, compute_dtype="float32")
H100 = Device(kind="cuda", name="H100", memory_bytes=80 * 10**9, compute_dtype="bfloat16")
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip
ALL = ["data", "base", "base_report", "adapter", "tuned_report", "merged", "merged_report",
       "registered"]  # fmt: skip


def recipe(**parts: object) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "r", "model": {"source": "org/m"}, "dataset": {"source": "org/d"}} | parts
    )


def prepared(num_rows=1000, num_tokens=50_000, supervised=20_000, longest=120) -> PreparedDataset:
    split = SplitFacts(
        num_rows=num_rows, num_tokens=num_tokens, num_supervised_tokens=supervised,
        length_quantiles={"max": longest},
    )  # fmt: skip
    return PreparedDataset(
        num_rows_read=num_rows, dropped={}, train=split, heldout=split, num_prompts=1,
        format="messages", sample="",
    )  # fmt: skip


def plan(config=None, device=H100, data=None, cached=None, raw=None) -> Plan:
    config = config or recipe()
    return plan_run(
        config,
        shape=shape_of(LLAMA_8B, config.quantization, config.adapter),
        device=device,
        is_cached=lambda role: role in (cached or ()),
        prepared=data,
        raw=raw,
    )


def states(config: RunConfig, cached) -> dict[str, str]:
    return {stage.role: stage.state for stage in plan_stages(config, lambda role: role in cached)}


def test_with_an_empty_store_the_first_stages_run_and_the_others_wait_for_them():
    found = states(recipe(), [])

    assert list(found) == ALL
    assert found["data"] == found["base"] == "to run"
    assert {found[role] for role in ALL[2:]} == {"unknown"}


def test_with_a_full_store_everything_is_cached():
    assert set(states(recipe(), ALL).values()) == {"cached"}


def test_a_changed_learning_rate_reruns_training_and_nothing_before_it():
    found = states(recipe(), ["data", "base", "base_report"])

    assert [found[role] for role in ALL[:4]] == ["cached", "cached", "cached", "to run"]
    assert {found[role] for role in ALL[4:]} == {"unknown"}


def test_an_unknown_stage_says_what_it_waits_for():
    stages = {s.role: s for s in plan_stages(recipe(), lambda role: role in ["data"])}

    assert stages["base_report"].why == "known once quantize base has run"
    assert stages["merged"].why == "known once quantize base, train adapter has run"


def test_a_lookup_that_cannot_tell_leaves_the_stage_unknown_and_is_not_asked_about_later_ones():
    asked = []

    def cannot_tell(role: str) -> bool | None:
        asked.append(role)
        return None

    stages = plan_stages(recipe(), cannot_tell)

    assert {stage.state for stage in stages} == {"unknown"}
    assert asked == ["data", "base"]


def test_stages_that_are_switched_off_are_not_planned():
    config = recipe(merge={"enabled": False}, registry={"enabled": False})

    assert list(states(config, [])) == ALL[:5]
    without_merge = states(recipe(merge={"enabled": False}), ALL)
    assert without_merge["registered"] == "cached"


def test_steps_and_tokens_of_a_prepared_dataset_are_exact():
    config = recipe(training={"epochs": 2, "global_batch": 16})

    size = training_size(config, prepared(), None)

    assert size.is_exact
    assert (size.num_steps, size.num_tokens) == (125, 100_000)
    assert size.longest_row == 120
    assert size.supervised_share == 0.4


def test_a_part_of_an_epoch_is_a_mean_and_says_so():
    config = recipe(training={"max_steps": 10, "global_batch": 16})

    size = training_size(config, prepared(), None)

    assert (size.num_steps, size.num_tokens, size.is_exact) == (10, 8000, False)
    assert any("estimated" in note for note in plan(config, data=prepared()).notes)


def test_without_a_prepared_dataset_tokens_come_from_the_files_size():
    config = recipe(
        dataset={"source": "org/d", "max_length": 300, "heldout": {"fraction": 0.2}},
        training={"global_batch": 16},
    )

    size = training_size(config, None, RawSize(num_bytes=400_000, num_lines=1000))

    assert not size.is_exact
    assert (size.num_rows, size.num_steps, size.num_tokens) == (800, 50, 80_000)
    assert size.longest_row == 300
    assert size.supervised_share is None


def test_max_rows_and_a_heldout_file_are_respected():
    config = recipe(dataset={"source": "org/d", "max_rows": 100, "heldout": {"source": "org/h"}})

    size = training_size(config, None, RawSize(num_bytes=400_000, num_lines=1000))

    assert (size.num_rows, size.num_tokens) == (100, 10_000)


def test_where_nothing_is_known_of_the_rows_the_plan_says_so_and_still_counts_memory():
    made = plan()

    assert made.training is None
    assert any("Nothing is known" in note for note in made.notes)
    assert made.workload.num_tokens == made.workload.num_supervised == 4 * 1024
    assert all(estimate.total > 0 for estimate in made.memory)


def test_memory_is_shown_by_component_against_lora_and_full_fine_tuning():
    made = plan(data=prepared())

    rows = dict(made.rows())
    assert [estimate.strategy for estimate in made.memory] == ["qlora", "lora", "full"]
    assert list(rows)[-1] == "total"
    for column, estimate in enumerate(made.memory):
        parts = [values[column] for name, values in rows.items() if name != "total"]
        assert sum(parts) == rows["total"][column] == estimate.total
    qlora, lora, full = rows["total"]
    assert qlora - made.memory[0].dense < lora < full


def test_an_8b_model_fits_an_80_gb_gpu_with_qlora_but_not_with_full_fine_tuning():
    made = plan(data=prepared())

    assert [made.fits(estimate) for estimate in made.memory] == [True, True, False]


def test_workers_share_the_memory_of_a_cpu_but_have_a_gpu_each():
    config = recipe(cluster={"workers": 3})
    on_cpu, on_gpu = plan(config, device=CPU), plan(config, device=H100)

    assert (on_cpu.workers_on_device, on_gpu.workers_on_device) == (3, 1)
    need = on_cpu.memory[0].total
    roomy = CPU.model_copy(update={"memory_bytes": int(need * 3 / 0.9) + 10})
    tight = CPU.model_copy(update={"memory_bytes": int(need * 2.9 / 0.9)})
    assert on_cpu.model_copy(update={"device": roomy}).fits(on_cpu.memory[0])
    assert not on_cpu.model_copy(update={"device": tight}).fits(on_cpu.memory[0])


@pytest.mark.parametrize(
    ("device", "memory_gb", "choice", "recompute", "num_tokens"),
    [
        (H100, 80, "auto", "nothing", 4096),
        (H100, 18, "auto", "nothing", 2048),  # a pass of half the rows
        (H100, 12, "auto", "layers", 4096),
        (H100, 7.5, "auto", "layers, inputs offloaded", 1024),
        (H100, 80, "on", "layers", 4096),
        (H100, 80, "offload", "layers, inputs offloaded", 4096),
        (H100, 10, "off", "nothing", 1024),
        (CPU, 80, "auto", "nothing", 4096),
        (CPU, 24, "auto", "nothing", 1024),
    ],
)
def test_a_micro_batch_is_computed_in_the_first_way_that_fits(
    device, memory_gb, choice, recompute, num_tokens
):
    sized = device.model_copy(update={"memory_bytes": int(memory_gb * 10**9)})

    made = plan(recipe(training={"checkpointing": choice}), device=sized)

    assert (made.workload.recompute, made.workload.num_tokens) == (recompute, num_tokens)
    assert any("rows would not fit" in note for note in made.notes) is (num_tokens < 4096)
    is_chosen = choice == "auto" and recompute != "nothing"
    assert any("computes layers again" in note for note in made.notes) is is_chosen


def test_a_model_that_cannot_fit_is_told_before_anything_runs():
    tiny = H100.model_copy(update={"memory_bytes": 4 * 10**9})

    made = plan(device=tiny)

    assert any("Memory may be too little" in note for note in made.notes)
    assert not made.fits(made.memory[0])


@pytest.mark.parametrize(
    ("device", "keep", "dense_gb"),
    [
        (H100, "auto", 13.96),  # all 7 billion, in 16 bits
        (H100, "off", 0),
        (H100, 3_000_000_000, 3),
        (CPU, "auto", 2),
        (CPU, 5_000_000_000, 5),
    ],
)
def test_weights_are_kept_dequantised_as_the_recipe_says_and_memory_allows(device, keep, dense_gb):
    sized = device.model_copy(update={"memory_bytes": 80 * 10**9})

    made = plan(recipe(quantization={"keep_dequantized": keep}), device=sized)

    assert made.memory[0].dense / 1e9 == pytest.approx(dense_gb, abs=0.01)


def test_a_plan_says_what_each_strategy_needs_on_the_recipes_workers():
    config = recipe(cluster={"workers": 4})

    ddp, fsdp = plan(config).strategies

    assert (ddp.strategy, fsdp.strategy, fsdp.num_workers) == ("ddp", "fsdp", 4)
    assert ddp.estimate.dense == fsdp.estimate.dense == 0
    whole = ddp.estimate.weights + ddp.estimate.constants
    # the 8B base's linear layers by hand, half a byte and 1/64 a weight
    assert fsdp.estimate.weights == pytest.approx(6_979_321_856 * (1 / 2 + 1 / 64) / 4, rel=1e-5)
    assert fsdp.estimate.gathered == pytest.approx(2 * 112_459_776, rel=1e-5)
    assert 4 * fsdp.estimate.weights == pytest.approx(whole, rel=0.001)


@pytest.mark.parametrize("parts", [{}, {"quantization": {"method": "int8"}},
                                   {"adapter": {"dora": True}}])  # fmt: skip
def test_one_worker_or_a_base_that_cannot_be_divided_has_one_strategy(parts):
    cluster = {"workers": 4} if parts else {"workers": 1}

    made = plan(recipe(cluster=cluster, **parts))

    assert [need.strategy for need in made.strategies] == ["ddp"]


@pytest.mark.parametrize(
    ("strategy", "memory_gb", "is_sharded"),
    [("auto", 80, False), ("auto", 6.3, True), ("fsdp", 80, True), ("ddp", 6.3, False)],
)
def test_the_plans_memory_is_of_the_strategy_that_workers_will_choose(
    strategy, memory_gb, is_sharded
):
    small = H100.model_copy(update={"memory_bytes": int(memory_gb * 10**9)})

    made = plan(recipe(cluster={"workers": 4, "strategy": strategy}), device=small)

    assert bool(made.memory[0].gathered) is is_sharded
    assert any("in 4 parts" in note for note in made.notes) is is_sharded
    if is_sharded:
        assert made.memory[0].dense == 0


@pytest.mark.parametrize(
    ("size", "workers", "ddp_fits", "fsdp_fits", "chosen"),
    [
        ("8b", 8, True, True, "ddp"),
        ("70b", 8, True, True, "ddp"),
        ("405b", 8, False, True, "fsdp"),
        ("405b", 4, False, False, "fsdp"),
    ],
)
def test_a_published_size_is_planned_without_a_model(size, workers, ddp_fits, fsdp_fits, chosen):
    config = recipe(cluster={"workers": workers})
    shape = shape_of(published_config(size), config.quantization, config.adapter)

    made = plan_shape(config, model=size, shape=shape, device=H100)

    assert [need.fits for need in made.strategies] == [ddp_fits, fsdp_fits]
    assert made.chosen == chosen
    assert ShapePlan.model_validate_json(made.model_dump_json()) == made


def test_parts_in_the_hosts_memory_let_a_70b_model_fit_two_small_gpus():
    shape = shape_of(published_config("70b"), recipe().quantization, recipe().adapter)
    small = H100.model_copy(update={"memory_bytes": 24 * 10**9})

    def fits(**cluster: object) -> bool:
        config = recipe(cluster={"workers": 2, **cluster})
        return plan_shape(config, model="70b", shape=shape, device=small).strategies[1].fits

    assert not fits()
    assert fits(offload_base=True)


def test_what_fits_nowhere_is_told_what_would_make_it_fit():
    def hints(**cluster: object) -> int:
        return sum("cluster.offload_base=true" in n for n in shape_plan("70b", 24, **cluster).notes)

    assert hints(workers=1) == 1
    assert hints(workers=1, strategy="ddp") == 0
    assert hints(workers=8) == 0, "it fits"


def shape_plan(size: str, gpu_gb: float, **cluster: object) -> ShapePlan:
    config = recipe(cluster=cluster, merge={"enabled": False})
    shape = shape_of(published_config(size), config.quantization, config.adapter)
    gpu = H100.model_copy(update={"memory_bytes": int(gpu_gb * 10**9)})
    return plan_shape(config, model=size, shape=shape, device=gpu)


@pytest.mark.parametrize(
    ("strategy", "chosen"), [("auto", "fsdp"), ("fsdp", "fsdp"), ("ddp", "ddp")]
)
def test_a_worker_alone_whose_gpu_is_too_small_leaves_the_base_with_its_host(strategy, chosen):
    made = shape_plan("70b", 24, workers=1, strategy=strategy, offload_base=True)

    ddp, fsdp = made.strategies
    assert (ddp.fits, fsdp.fits) == (False, True)
    assert made.chosen == chosen
    left_out = [note for note in made.notes if "left out in training" in note]
    assert len(left_out) == (chosen == "ddp")


def test_a_plan_says_where_offloading_a_base_has_no_effect():
    def said(device=H100, **parts) -> str:
        made = plan(recipe(cluster={"workers": 2, "offload_base": True} | parts), device=device)
        return " ".join(note for note in made.notes if "left out in training" in note)

    assert "lies whole on each GPU" in said()
    assert "a CPU has no host" in said(device=CPU)
    assert said(strategy="fsdp") == ""
    made = plan(recipe(cluster={"offload_base": True, "strategy": "fsdp"}))
    assert "The base lies in the host's memory (cluster.strategy)." in made.notes
    assert made.memory[0].weights == 0


def test_the_hosts_memory_of_an_offloaded_base_is_counted_as_torch_pins_it():
    ddp, fsdp = shape_plan("405b", 80, workers=8, strategy="fsdp", offload_base=True).strategies
    kept = shape_plan("405b", 80, workers=8).strategies[1]

    part = kept.estimate.weights / 126  # of each block
    assert fsdp.host_bytes == 126 * 2**28 > kept.estimate.weights > 126 * 2**27
    assert ddp.host_bytes == kept.host_bytes == 0
    # a worker's part is on the GPU before it is sent to the others
    assert fsdp.estimate.gathered - kept.estimate.gathered == part
    alone = shape_plan("405b", 80, workers=1, strategy="fsdp", offload_base=True).strategies[1]
    assert alone.estimate.gathered == pytest.approx(kept.estimate.gathered, rel=1e-6)


def test_a_plan_says_what_evaluation_takes_of_a_node_with_all_workers():
    (eight,), (_, one) = (shape_plan("405b", 80, workers=n).notes for n in (8, 1))

    assert f"{8 * 126 * 2**31 / 1e9:.2f} GB if all 8 share a node" in eight
    assert "share a node" not in one
    assert f"{126 * 2**31 / 1e9:.2f} GB" in one


def test_of_a_model_that_brings_its_own_code_auto_leaves_the_base_whole_and_the_plan_says_so():
    small = H100.model_copy(update={"memory_bytes": int(6.3 * 10**9)})

    def made(strategy: str) -> Plan:
        config = recipe(cluster={"workers": 4, "strategy": strategy})
        shape = shape_of(LLAMA_8B, config.quantization, config.adapter)
        return plan_run(
            config, shape=shape, device=small, is_cached=lambda role: False, brings_code=True
        )

    assert not made("auto").memory[0].gathered
    assert any("fsdp divides it" in note for note in made("auto").notes)
    assert made("fsdp").memory[0].gathered
    assert not any("own code" in note for note in made("fsdp").notes)


@pytest.mark.parametrize(
    ("size", "gpu_gb", "said"),
    [
        ("8b", 80, []),
        ("405b", 80, ["lies in the host's memory (270.58 GB)", "merge.enabled=false"]),
        ("70b", 80, ["merge.enabled=false"]),
        (
            "8b",
            5,
            ["does not fit", "in the host's memory", "evaluation.batch_size", "merge.enabled"],
        ),
    ],
)
def test_a_shape_too_large_for_the_gpu_is_told_where_evaluation_keeps_its_base(size, gpu_gb, said):
    gpu = H100.model_copy(update={"memory_bytes": gpu_gb * 10**9})
    config = recipe(cluster={"workers": 8})
    shape = shape_of(published_config(size), config.quantization, config.adapter)

    made = plan_shape(config, model=size, shape=shape, device=gpu)

    assert len(made.notes) == len(said)
    assert all(part in note for part, note in zip(said, made.notes, strict=True))


def test_a_recipe_too_large_for_the_gpu_is_told_where_evaluation_keeps_its_base():
    small = H100.model_copy(update={"memory_bytes": 6 * 10**9})

    def told(config: RunConfig, device=small) -> list[str]:
        notes = plan(config, device=device, data=prepared()).notes
        return [note for note in notes if "valuation" in note or "merge.enabled" in note]

    unmerged = recipe(merge={"enabled": False}, evaluation={"batch_size": 1})
    hosted, merging = told(recipe(evaluation={"batch_size": 1}))
    assert "whole it takes a GPU with" in hosted
    assert "merge.enabled=false" in merging
    assert told(unmerged) == [hosted]
    (needs_whole,) = told(unmerged.model_copy(update={"adapter": AdapterConfig(dora=True)}))
    assert "adapter.dora=true" in needs_whole
    wanting = unmerged.model_copy(update={"cluster": ClusterConfig(offload_base=True)})
    assert "cluster.offload_base asks for it" in told(wanting, device=H100)[0]
    assert told(recipe(), device=CPU) == []


def test_a_plan_is_plain_data():
    made = plan(data=prepared(), cached=["data"])

    assert Plan.model_validate_json(made.model_dump_json()) == made
