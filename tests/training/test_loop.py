import math
import threading

import pytest
import torch
from torch.testing import assert_close

from qlora_core.artifacts import AdapterCheckpoint
from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.config import (
    AdapterConfig,
    QuantizationConfig,
    SnapshotConfig,
    TrainingConfig,
)
from qlora_core.data.prepared import IGNORED, read_split
from qlora_core.errors import ResourceError, TrainingError
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, trainable_parameters
from qlora_core.modeling.memory import USABLE
from qlora_core.ports import StepMetrics, TrainJob
from qlora_core.training import loop, worker
from qlora_core.training.batching import make_plan
from qlora_core.training.comm import Alone
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.loop import Position, Run, keep_best, train
from qlora_core.training.objective import LossFunction
from qlora_core.training.optimizer import FlatGradients, make_optimizer
from qlora_core.training.room import Room, find_room
from qlora_core.training.schedule import learning_rate
from qlora_core.training.worker import run_worker
from tests.training.conftest import SMALL
from tests.training.fakes import run_on_threads

CPU = torch.device("cpu")
RARELY = SnapshotConfig(every_s=1e9)


def curve(job: TrainJob, world_size: int = 1) -> list[StepMetrics]:
    steps: list[StepMetrics] = []
    if world_size == 1:
        InProcessLauncher(RARELY).train(job, steps.append)
    else:
        run_on_threads(
            world_size,
            lambda comm: run_worker(job, comm, RARELY, "0001", CPU, steps.append),
        )
    return steps


def losses(steps: list[StepMetrics]) -> list[float]:
    return [step.loss for step in steps]


def heldout(steps: list[StepMetrics]) -> list[float]:
    return [step.heldout_loss for step in steps if step.heldout_loss is not None]


def test_training_equals_a_plain_loop_with_peft_and_torch(nf4_base, dataset, make_job):
    job = make_job(weight_decay=0.1, max_grad_norm=0.5, micro_batch=2)
    ours = curve(job)

    config, rows = job.training, read_split(dataset, "train")
    model = attach_adapter(load_base(nf4_base), AdapterConfig(rank=4), job.seed).train()
    parameters = list(trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1, foreach=False)
    plan = make_plan(seed=job.seed, num_rows=len(rows), global_batch=8, epochs=2.0)
    for step in range(1, plan.num_steps + 1):
        chosen = plan.rows(step)
        width = int(rows.lengths[chosen].max())
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        labels = torch.full((len(chosen), width), IGNORED)
        for place, row in enumerate(chosen):
            ids[place, : rows.lengths[row]] = torch.tensor(rows.input_ids(row))
            labels[place, : rows.lengths[row]] = torch.tensor(rows.labels(row))
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate(step, plan.num_steps, config)
        optimizer.step()
        assert ours[step - 1].loss == pytest.approx(loss.item(), rel=1e-5)
        assert ours[step - 1].grad_norm == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 8), (1, 2), (1, 1), (2, 4), (2, 1), (4, 2), (3, 4)]
)
def test_neither_micro_batch_nor_number_of_workers_changes_the_curve(
    world_size, micro_batch, make_job
):
    reference = curve(make_job("reference"))

    steps = curve(make_job("split", micro_batch=micro_batch), world_size)

    assert losses(steps) == pytest.approx(losses(reference), rel=1e-5)
    assert heldout(steps) == pytest.approx(heldout(reference), rel=1e-5)


@pytest.mark.parametrize("num_threads", [2, 3, 16])
def test_lanes_change_the_curve_by_no_more_than_rounding_and_are_repeatable(num_threads, make_job):
    reference = curve(make_job("reference"))
    torch.set_num_threads(num_threads)  # the fixture puts it back

    steps, again = curve(make_job("lanes")), curve(make_job("again"))

    assert losses(steps) == pytest.approx(losses(reference), rel=1e-5)
    assert heldout(steps) == pytest.approx(heldout(reference), rel=1e-5)
    assert losses(steps) == losses(again)
    assert (make_job("lanes").out / "adapter_model.safetensors").read_bytes() == (
        make_job("again").out / "adapter_model.safetensors"
    ).read_bytes()


def test_lanes_leave_the_number_of_threads_as_it_was_for_later_threads_too(make_job):
    torch.set_num_threads(2)
    curve(make_job())
    found = []

    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()

    assert found == [2]


def test_packing_that_has_no_memory_for_the_longest_rows_is_tried_on_the_shortest(
    make_job, monkeypatch
):
    real, tried = LossFunction._difference, []

    def short_of_memory(self, rows, chunk, device, trial):
        tried.append(int(rows.lengths[chunk].max()))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("too long")
        return real(self, rows, chunk, device, trial)

    monkeypatch.setattr(LossFunction, "_difference", short_of_memory)
    job = make_job()

    curve(job)

    assert tried[1] < tried[0]
    assert not any("padded" in note for note in facts_of(job).notes)


def test_an_error_in_a_lane_is_the_trainings_error(broken_base, make_job):
    torch.set_num_threads(2)

    with pytest.raises(TrainingError, match="at step"):
        curve(make_job().model_copy(update={"base": broken_base}))


def test_tokens_computed_are_counted_over_all_workers_and_lanes(make_job):
    steps = curve(make_job("packed"))
    torch.set_num_threads(2)
    lanes = curve(make_job("lanes"), world_size=2)

    for step, spread in zip(steps, lanes, strict=True):
        assert step.num_computed_tokens == step.num_tokens  # packed, and nothing to share
        assert spread.num_computed_tokens == step.num_tokens


def test_in_float16_the_division_by_all_tokens_comes_after_the_gradients(make_job, monkeypatch):
    reference = curve(make_job("reference"))
    monkeypatch.setattr(loop, "_is_float16", lambda _: True)
    weights = []
    differentiate = loop._differentiate
    monkeypatch.setattr(
        loop, "_differentiate", lambda *given: weights.append(given[1]) or differentiate(*given)
    )

    steps = curve(make_job("late"), world_size=2)

    assert set(weights) == {1 / 16}
    assert losses(steps) == pytest.approx(losses(reference), rel=1e-5)
    assert [s.grad_norm for s in steps] == pytest.approx([s.grad_norm for s in reference], rel=1e-4)


def test_what_another_worker_had_to_do_is_told_with_its_number(make_job, monkeypatch):
    assemble = worker.assemble

    def short_of_memory(*given):
        run = assemble(*given)
        if run.comm.rank == 1:
            run.loss.notes.append("Passes have one row.")
            run.room.num_rows = 1
        return run

    monkeypatch.setattr(worker, "assemble", short_of_memory)
    job = make_job("two")

    curve(job, world_size=2)

    assert "Worker 1: Passes have one row." in facts_of(job).notes
    assert facts_of(job).num_rows_per_pass == 1


def test_more_workers_than_rows_of_a_step_work(make_job):
    reference = curve(make_job("reference", global_batch=2, micro_batch=1, max_steps=3))

    steps = curve(make_job("many", global_batch=2, micro_batch=1, max_steps=3), world_size=5)

    assert losses(steps) == pytest.approx(losses(reference), rel=1e-5)


def test_training_learns_something(make_job):
    steps = curve(make_job(epochs=40, learning_rate=2e-2, heldout_every=None))

    assert steps[-1].loss < 0.92 * steps[0].loss


def test_dropout_depends_on_seed_and_step_and_leaves_the_callers_random_state_alone(make_job):
    torch.manual_seed(7)
    first = curve(make_job("first", dropout=0.5))
    drawn = torch.rand(3)
    torch.manual_seed(8)
    again = curve(make_job("again", dropout=0.5))
    torch.manual_seed(7)

    assert losses(first) == losses(again)
    assert_close(drawn, torch.rand(3))
    assert losses(first) != losses(curve(make_job("none", dropout=0.0)))


@pytest.fixture(scope="module")
def dropped(nf4_base, dataset, tmp_path_factory) -> list[float]:
    """The losses of a training with dropout, by one worker, four rows in a pass."""
    folder = tmp_path_factory.mktemp("dropped")
    for name in ("out", "scratch"):
        (folder / name).mkdir()
    job = TrainJob(
        base=nf4_base,
        data=dataset,
        out=folder / "out",
        scratch=folder / "scratch",
        quantization=QuantizationConfig(),
        adapter=AdapterConfig(rank=4, dropout=0.1),
        training=TrainingConfig(**SMALL),
        seed=3,
    )
    return losses(curve(job))


@pytest.mark.parametrize(
    ("world_size", "training"),
    [
        (2, {}),
        (3, {}),
        (1, {"micro_batch": 1}),
        (1, {"micro_batch": 8}),
        (1, {"checkpointing": "on"}),
        (2, {"checkpointing": "on", "micro_batch": 2}),
    ],
)
def test_with_dropout_the_curve_is_the_same_however_rows_are_divided(
    world_size, training, dropped, make_job
):
    steps = curve(make_job("split", dropout=0.1, **training), world_size)

    assert losses(steps) == pytest.approx(dropped, rel=1e-5)


def test_with_dropout_padded_rows_give_the_curve_of_packed_ones(dropped, make_job, monkeypatch):
    monkeypatch.setattr(LossFunction, "_difference", lambda *_: "padding is to be tried")
    job = make_job("padded", dropout=0.1)

    steps = curve(job)

    assert losses(steps) == pytest.approx(dropped, rel=1e-5)
    assert "padding is to be tried" in " ".join(facts_of(job).notes)


def test_with_dropout_a_pass_that_is_halved_changes_nothing(dropped, make_job, monkeypatch):
    out_of_memory_above(monkeypatch, 1)
    job = make_job("tight", dropout=0.1)

    steps = curve(job)

    assert losses(steps) == pytest.approx(dropped, rel=1e-5)
    assert facts_of(job).num_rows_per_pass == 1
    assert not any("depends on" in note for note in facts_of(job).notes)


def test_where_a_model_draws_for_a_whole_pass_it_is_said_that_the_division_matters(
    dropped, make_job, monkeypatch
):
    """An attention that drops: its function is given a rate, and no module can be replaced."""
    load = worker.load_base

    def load_dropping(*given):
        model = load(*given)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        return model

    monkeypatch.setattr(worker, "load_base", load_dropping)
    job = make_job("dropping", dropout=0.1)

    steps = curve(job)

    assert losses(steps) != pytest.approx(dropped, rel=1e-5)
    assert sum("depends on the number of workers" in note for note in facts_of(job).notes) == 1


def test_recomputing_activations_gives_the_same_numbers(make_job):
    kept = curve(make_job("off", checkpointing="off", dropout=0.1))

    recomputed = curve(make_job("on", checkpointing="on", dropout=0.1))

    assert losses(recomputed) == pytest.approx(losses(kept), rel=1e-6)


def test_on_a_cpu_offloading_is_recomputing_and_it_is_said(make_job):
    job = make_job("offload", checkpointing="offload")

    found = curve(job)

    assert losses(found) == losses(curve(make_job("on", checkpointing="on")))
    assert facts_of(job).notes == (
        "training.checkpointing=offload ran as on: a CPU has no host beside it.",
    )


def out_of_memory_above(monkeypatch, num_rows: int) -> list[int]:
    """Let passes of more rows fail as on a GPU; return the rows of those that do not."""
    real, done = LossFunction.batch, []

    def batch(self, rows, chunk, device):
        if len(chunk) > num_rows:
            raise torch.OutOfMemoryError(f"{len(chunk)} rows are too many")
        done.append(len(chunk))
        return real(self, rows, chunk, device)

    monkeypatch.setattr(LossFunction, "batch", batch)
    return done


def facts_of(job: TrainJob) -> AdapterCheckpoint:
    return AdapterCheckpoint.model_validate_json((job.scratch / SUMMARY_FILE).read_text())


def test_a_pass_that_runs_out_of_memory_is_halved_and_the_curve_stays(make_job, monkeypatch):
    expected = curve(make_job("roomy", micro_batch=8))
    done = out_of_memory_above(monkeypatch, 3)
    job = make_job("tight", micro_batch=8)

    found = curve(job)

    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert heldout(found) == pytest.approx(heldout(expected), rel=1e-5)
    assert max(done) == facts_of(job).num_rows_per_pass == 2  # after 8 and 4, tried once each
    assert sum("ran out of memory" in note for note in facts_of(job).notes) == 2
    met = [(incident.kind, incident.step) for incident in facts_of(job).incidents]
    assert met == [("halved", 0)] * 2, "before the first step was done"


def test_a_single_row_that_does_not_fit_ends_training_with_a_way_out(make_job, monkeypatch):
    out_of_memory_above(monkeypatch, 0)

    with pytest.raises(ResourceError) as caught:
        curve(make_job())

    assert "single row" in caught.value.what
    assert "training.checkpointing=on" in caught.value.fix


def test_other_failures_are_not_taken_for_want_of_memory(make_job, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(LossFunction, "batch", fail)

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        curve(make_job())


def test_a_micro_batch_that_would_not_fit_is_divided_before_training(make_job, monkeypatch):
    expected = curve(make_job("roomy", micro_batch=8))

    def too_small_for_8(demand, _):
        needs = (demand.estimate(demand.workload(rows, "nothing")).total for rows in (4, 8))
        return find_room(demand, int(sum(needs) / 2 / USABLE))

    monkeypatch.setattr(worker, "find_room", too_small_for_8)
    job = make_job("tight", micro_batch=8)

    found = curve(job)

    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert facts_of(job).num_rows_per_pass == 4
    assert "would not fit" in facts_of(job).notes[0]


@pytest.mark.parametrize("keep", ["off", 10_000])
def test_weights_kept_dequantised_or_not_change_no_bit(keep, make_job):
    expected, job = curve(make_job("auto")), make_job("other")
    quantization = QuantizationConfig(keep_dequantized=keep)

    found = curve(job.model_copy(update={"quantization": quantization}))

    assert losses(found) == losses(expected)


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_remedy(broken_base, make_job):
    job = make_job().model_copy(update={"base": broken_base})

    with pytest.raises(TrainingError) as caught:
        curve(job)

    assert "at step" in caught.value.what
    assert "learning rate" in caught.value.what
    assert "training.learning_rate" in caught.value.fix


def test_8_bit_moments_follow_the_exact_ones_closely(make_job):
    exact = curve(make_job("exact", rank=64, learning_rate=1e-3))

    rough = curve(make_job("rough", rank=64, optimizer="adamw_8bit", learning_rate=1e-3))

    assert losses(rough) == pytest.approx(losses(exact), rel=1e-2)


def make_run(base, dataset, **training) -> Run:
    config = TrainingConfig(**(SMALL | training))
    model = attach_adapter(load_base(base), AdapterConfig(rank=4), seed=0)
    parameters, rows = trainable_parameters(model), read_split(dataset, "train")
    plan = make_plan(seed=0, num_rows=len(rows), global_batch=8, epochs=config.epochs)
    return Run(
        model=model,
        parameters=parameters,
        optimizer=make_optimizer(parameters, config, CPU, []),
        plan=plan,
        train=rows,
        heldout=read_split(dataset, "heldout"),
        config=config,
        comm=Alone(),
        device=CPU,
        seed=0,
        loss=LossFunction(model),
        gradients=FlatGradients(parameters),
        room=Room(config.micro_batch, "nothing", workload=None, estimate=None, fits=True),
    )


def test_early_stopping_keeps_the_best_adapter(float_base, dataset):
    settings = {"epochs": 40, "learning_rate": 0.3, "heldout_every": 1, "early_stopping": 3}
    run = make_run(float_base, dataset, **settings)
    position, seen, weights = Position(), [], []

    for metrics in train(run, position):
        seen.append(metrics.heldout_loss)
        weights.append({name: p.detach().clone() for name, p in run.parameters.items()})

    best = min(range(len(seen)), key=seen.__getitem__)
    assert position.stopped_early
    assert len(seen) == best + 1 + 3 < run.plan.num_steps
    assert keep_best(run, position) == best + 1
    for name, parameter in run.parameters.items():
        assert torch.equal(parameter, weights[best][name])


def test_without_early_stopping_the_best_adapter_is_remembered_and_the_last_one_kept(
    float_base, dataset
):
    run = make_run(float_base, dataset, epochs=40, learning_rate=0.3, heldout_every=1)
    position, seen, weights = Position(), [], []

    for metrics in train(run, position):
        seen.append(metrics.heldout_loss)
        weights.append({name: p.detach().clone() for name, p in run.parameters.items()})

    best = min(range(len(seen)), key=seen.__getitem__)
    assert len(seen) == run.plan.num_steps > best + 1
    assert keep_best(run, position) == run.plan.num_steps
    for name, parameter in run.parameters.items():
        assert torch.equal(position.best_adapter[name], weights[best][name])
        assert torch.equal(parameter, weights[-1][name])


def test_without_early_stopping_the_last_adapter_is_kept(float_base, dataset):
    run = make_run(float_base, dataset)
    position = Position()
    steps = list(train(run, position))

    assert keep_best(run, position) == run.plan.num_steps
    assert math.isfinite(steps[-1].heldout_loss)
    assert steps[0].heldout_loss is None
