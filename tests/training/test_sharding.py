"""A base in parts, on two real processes over gloo, beside the same training with it whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import nn

from qlora_core.artifacts import AdapterCheckpoint
from qlora_core.config import (
    AdapterConfig,
    ClusterConfig,
    QuantizationConfig,
    SnapshotConfig,
    TrainingConfig,
)
from qlora_core.data.prepared import IGNORED, TokenRow, read_split, write_split
from qlora_core.errors import ConfigError, ModelError, ResourceError
from qlora_core.modeling.parts import load_in_parts
from qlora_core.modeling.sharding import ShardedBase, blocks_of
from qlora_core.ports import TrainJob
from qlora_core.training import placing, worker
from qlora_core.training.batching import deal
from qlora_core.training.comm import Alone
from qlora_core.training.desk import SUMMARY_FILE
from qlora_core.training.journal import CURVE_FILE
from qlora_core.training.placing import Placement, place_base
from qlora_core.training.together import cut_alike
from qlora_core.training.worker import run_worker
from tests.tiny import bring_own_code, make_tiny_llama, small_model
from tests.training.conftest import SMALL, make_rows, write_base
from tests.training.fakes import run_on_threads
from tests.training.two_workers import Scene, Seen, play, seen

CPU = torch.device("cpu")
NUM_LAYERS = 5
RAGGED: dict[str, Any] = SMALL | {"epochs": 17 / 22, "heldout_rows": 1, "heldout_every": 1}
"""Steps of 8, 8 and 1 rows, and one held-out row: now and then worker 1 has none."""


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    tiny = make_tiny_llama(folder / "tiny", num_layers=NUM_LAYERS)
    return write_base(folder / "nf4", tiny, is_nf4=True)


@pytest.fixture(scope="module")
def ragged_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which every fifth has nothing to learn from, so it takes no pass."""
    folder = tmp_path_factory.mktemp("ragged")
    rows = make_rows(22, seed=1)
    for place in range(0, len(rows), 5):
        tokens = rows[place].input_ids
        rows[place] = TokenRow(tokens, [IGNORED] * len(tokens))
    write_split(folder, "train", rows)
    write_split(folder, "heldout", make_rows(6, seed=2))
    return folder


FSDP, DDP = ClusterConfig(strategy="fsdp"), ClusterConfig(strategy="ddp")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"checkpointing": "on"},
    "row by row": {"micro_batch": 1},
    "with dropout": {"dropout": 0.1},
    "recomputed with dropout": {"dropout": 0.1, "checkpointing": "on"},
}
PACKING_FAULTS = ("packing at once", "packing halfway")
FAULTS = (
    "memory forward",
    "memory backward",
    "memory always",
    *PACKING_FAULTS,
    "packing for memory",
    "death",
)


@pytest.fixture(scope="module")
def stage(deep_base: Path, ragged_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> "Stage":
    """All trainings of this file, run on one pair of processes: most of the time is their start."""
    folder = tmp_path_factory.mktemp("stage")

    def job(name: str, dropout: float = 0.0, **training: Any) -> TrainJob:
        place = folder / name
        (place / "out").mkdir(parents=True)
        (place / "scratch").mkdir()
        return TrainJob(
            base=deep_base,
            data=ragged_rows,
            out=place / "out",
            scratch=place / "scratch",
            quantization=QuantizationConfig(),
            adapter=AdapterConfig(rank=4, dropout=dropout),
            training=TrainingConfig(**(RAGGED | training)),
            seed=3,
        )

    scenes = []
    for name, settings in SETTINGS.items():
        for kind, cluster in (("whole", DDP), ("parts", FSDP)):
            title = f"{kind} {name}"
            scenes.append(Scene(name=title, job=job(title, **settings), cluster=cluster))
    for fault in FAULTS:
        scenes.append(Scene(name=fault, job=job(fault), cluster=FSDP, fault=fault))
    play(scenes, folder)
    return Stage(folder)


class Stage:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seen(self, name: str, rank: int = 0) -> Seen:
        return seen(self.folder, name, rank)

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        assert not self.seen(name).error
        return load_file(self.folder / f"{name}.safetensors")

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "out" / "adapter_model.safetensors")

    def curve(self, name: str) -> list[dict[str, float]]:
        text = (self.folder / name / "out" / CURVE_FILE).read_text()
        return [json.loads(line) for line in text.splitlines()]

    def facts(self, name: str) -> AdapterCheckpoint:
        text = (self.folder / name / "scratch" / SUMMARY_FILE).read_text()
        return AdapterCheckpoint.model_validate_json(text)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_base_in_parts_trains_bit_for_bit_like_a_whole_one(stage, name):
    whole, parts = f"whole {name}", f"parts {name}"

    gradients, expected = stage.gradients(parts), stage.gradients(whole)

    assert len(gradients) == 3
    assert all(torch.equal(gradients[step], expected[step]) for step in expected)
    assert stage.curve(parts) == stage.curve(whole)
    for key, tensor in stage.adapter(whole).items():
        assert torch.equal(stage.adapter(parts)[key], tensor), key


def test_each_of_two_workers_holds_half_of_the_packed_base(stage):
    whole = stage.seen("whole plain").held_bytes

    for rank in (0, 1):
        assert stage.seen("parts plain", rank).held_bytes == pytest.approx(whole / 2, rel=0.01)


@pytest.mark.parametrize("name", ["plain", "recomputed"])
def test_no_more_than_two_blocks_are_whole_at_a_time(stage, name):
    for rank in (0, 1):
        found = stage.seen(f"parts {name}", rank)
        assert found.most_present_bytes == 2 * found.block_bytes


def test_recomputing_layers_gathers_nothing_more(stage):
    plain, recomputed = stage.seen("parts plain"), stage.seen("parts recomputed")

    assert recomputed.num_gathered_bytes == plain.num_gathered_bytes > 0
    assert plain.num_gathered_bytes == stage.seen("parts plain", 1).num_gathered_bytes


def test_that_the_base_lies_in_parts_is_said(stage):
    assert any("in 2 parts" in note for note in stage.facts("parts plain").notes)
    assert not any("parts" in note for note in stage.facts("whole plain").notes)


@pytest.mark.parametrize("fault", ["memory forward", "memory backward"])
def test_a_worker_short_of_memory_makes_all_halve_their_passes_and_changes_no_result(stage, fault):
    for rank in (0, 1):
        assert stage.seen(fault, rank).error == ""
    (incident,) = stage.facts(fault).incidents
    assert (incident.kind, incident.step) == ("halved", 1)
    assert "at most 2 rows" in incident.remedy
    found, expected = stage.gradients(fault), stage.gradients("whole plain")
    for step, gradient in expected.items():
        torch.testing.assert_close(found[step], gradient, rtol=1e-4, atol=1e-6)
    losses = [point["loss"] for point in stage.curve("whole plain")]
    assert [point["loss"] for point in stage.curve(fault)] == pytest.approx(losses, rel=1e-6)


def test_a_worker_without_memory_for_a_single_row_ends_the_run_on_all(stage):
    for rank in (0, 1):
        assert "ResourceError" in stage.seen("memory always", rank).error
        assert "single row" in stage.seen("memory always", rank).error


@pytest.mark.parametrize("fault", PACKING_FAULTS)
def test_if_one_worker_cannot_pack_rows_no_worker_does_and_none_waits_for_ever(stage, fault):
    for rank in (0, 1):
        found = stage.seen(fault, rank)
        assert not found.error  # one that waited has a CollectiveError after a minute
        (said,) = [note for note in found.notes if "padded, not packed" in note]
        assert "on worker 1, ValueError: packing is beyond me" in said
    losses = [point["loss"] for point in stage.curve("whole plain")]
    assert [point["loss"] for point in stage.curve(fault)] == pytest.approx(losses, rel=1e-4)


def test_if_one_worker_has_no_memory_to_try_packing_all_try_it_with_less(stage):
    fault = "packing for memory"

    for rank in (0, 1):
        assert not stage.seen(fault, rank).error
        assert not any("padded" in note for note in stage.seen(fault, rank).notes)
    assert stage.curve(fault) == stage.curve("whole plain")


def test_a_worker_that_dies_within_a_pass_is_reported_by_the_other(stage):
    assert "CollectiveError" in stage.seen("death").error


def test_all_workers_make_the_same_number_of_passes_whatever_rows_they_have():
    lengths = np.arange(1, 12)
    for num_rows in (1, 2, 3):
        shares = deal(np.arange(11), lengths, world_size=4, micro_batch=3)

        passes = [cut_alike(shares, rank, num_rows) for rank in range(4)]

        assert len({len(own) for own in passes}) == 1
        assert max(len(part) for own in passes for part in own) <= num_rows
        dealt = np.concatenate([part for own in passes for part in own])
        assert sorted(dealt) == list(range(11))


class _Layered(nn.Module):
    """Adds what its 4-bit layers make of a vector, in some order."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [Linear4bit(64, 64, bias=False, quant_type="nf4") for _ in range(3)]
        self.layers, self.order = nn.ModuleList(layers).to("cpu"), order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place in self.order:
            x = x + self.layers[place](x)
        return x


def _divided(order: tuple[int, ...]) -> tuple[_Layered, ShardedBase]:
    model, base = _Layered(order), ShardedBase(Alone())
    for block in blocks_of(model):
        base.take(block)
    return model, base


def test_a_forward_pass_that_nobody_announced_finds_its_blocks_and_leaves_none():
    x = torch.randn(2, 64)
    expected = _Layered((0, 1, 2))(x)
    model, base = _divided((0, 1, 2))

    for _ in range(2):
        assert torch.equal(model(x), expected)
        assert base.present_bytes == 0


@pytest.mark.parametrize("order", [(0, 2, 1), (0, 1, 2, 1), (1, 2)])
def test_blocks_that_compute_in_another_order_than_listed_are_refused(order):
    model, base = _divided(order)
    base.begin_pass(goes_back=True)

    with pytest.raises(ModelError, match=r"(?s)computes when.*strategy=ddp"):
        model(torch.randn(2, 64))


def test_a_model_without_blocks_of_4_bit_layers_is_refused():
    with pytest.raises(ModelError, match="cannot be divided") as refused:
        blocks_of(nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])))

    assert "cluster.strategy=ddp" in str(refused.value)


def test_a_block_whose_bytes_three_workers_cannot_share_evenly_trains_the_same(make_job):
    def losses(name: str, cluster: ClusterConfig) -> list[float]:
        job, steps = make_job(name, max_steps=2), []
        run_on_threads(
            3,
            lambda comm: run_worker(
                job, comm, SnapshotConfig(), "0001", CPU, steps.append, cluster=cluster
            ),
        )
        return [step.loss for step in steps]

    assert losses("parts", FSDP) == pytest.approx(losses("whole", DDP), rel=1e-6)


def place(
    make_job, cluster, monkeypatch=None, memory=10**12, world=2, device="cpu", host=None, **parts
) -> tuple[Placement, list[str]]:
    """Where the base would lie on a device, of which only its free memory is asked."""

    class Several(Alone):
        world_size = world

        def gather(self, value: Any) -> list[Any]:
            return [value] * world

    job = make_job().model_copy(update=parts)
    notes: list[str] = []
    if monkeypatch:
        monkeypatch.setattr(placing, "memory_for_worker", lambda *_: memory)
        monkeypatch.setattr(placing, "free_bytes", lambda: 10**12 if host is None else host)
    rows = read_split(job.data, "train")
    return place_base(job, cluster, rows, Several(), torch.device(device), notes), notes


def placed(*given, **options) -> tuple[bool, list[str]]:
    found, notes = place(*given, **options)
    return found.is_sharded, notes


def test_auto_divides_a_base_that_does_not_fit_and_no_other(make_job, monkeypatch):
    auto = ClusterConfig(strategy="auto", workers=2)

    assert placed(make_job, auto, monkeypatch, memory=10**12) == (False, [])
    is_sharded, notes = placed(make_job, auto, monkeypatch, memory=10**6)
    assert is_sharded
    assert "does not fit whole" in notes[0]
    assert placed(make_job, auto, monkeypatch, memory=10**6, world=1) == (False, [])


def test_one_worker_keeps_its_base_whole_and_says_so(make_job):
    is_sharded, notes = placed(make_job, FSDP, world=1)

    assert not is_sharded
    assert "ran as ddp" in notes[0]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"adapter": AdapterConfig(dora=True)}, "adapter.dora"),
        ({"quantization": QuantizationConfig(method="int8")}, "method=int8"),
    ],
)
def test_what_cannot_be_divided_is_refused_or_with_auto_left_whole(
    make_job, monkeypatch, parts, said
):
    with pytest.raises(ConfigError, match=said):
        placed(make_job, FSDP, **parts)

    auto = ClusterConfig(workers=2)
    assert placed(make_job, auto, monkeypatch, memory=10**6, **parts) == (False, [])


@pytest.fixture
def own_code_base(make_job, tmp_path):
    shutil.copytree(make_job().base, tmp_path / "mine")
    bring_own_code(tmp_path / "mine" / "model")
    return tmp_path / "mine"


def test_auto_leaves_a_base_with_its_own_code_whole_without_asking_anybody_and_says_so(
    make_job, monkeypatch, own_code_base
):
    auto = ClusterConfig(workers=2)

    is_sharded, (note,) = placed(make_job, auto, monkeypatch, memory=10**6, base=own_code_base)

    assert not is_sharded
    assert "brings its own code" in note
    assert "cluster.strategy=fsdp divides it" in note
    assert placed(make_job, FSDP, monkeypatch, base=own_code_base)[0]


WITH_HOST = ClusterConfig(offload_base=True)


@pytest.mark.parametrize("world", [1, 2])
def test_auto_leaves_a_base_that_does_not_fit_with_its_host_and_one_that_fits_on_the_gpu(
    make_job, monkeypatch, world
):
    def found(memory):
        return place(make_job, WITH_HOST, monkeypatch, memory, world, "cuda")

    tight, notes = found(10**5)
    roomy, (left_out,) = found(10**12)

    assert (tight.is_sharded, tight.is_offloaded) == (True, True)
    assert "memory (cluster.strategy=auto: it does not fit whole)" in notes[0]
    assert roomy == Placement()
    assert "offload_base is left out in training: the base lies whole" in left_out


def test_a_worker_alone_offloads_its_base_if_fsdp_asks_for_it(make_job, monkeypatch):
    cluster = ClusterConfig(strategy="fsdp", offload_base=True)

    found, (note,) = place(make_job, cluster, monkeypatch, world=1, device="cuda")

    assert (found.is_sharded, found.is_offloaded) == (True, True)
    assert note == "The base lies in the host's memory (cluster.strategy=fsdp)."


@pytest.mark.parametrize(
    ("device", "parts", "strategy", "said"),
    [
        ("cuda", {}, "ddp", "cluster.strategy=ddp keeps the base whole"),
        ("cuda", {"quantization": QuantizationConfig(method="int8")}, "auto", "method=int8"),
        ("cpu", {}, "fsdp", "a CPU has no host"),
        ("cpu", {}, "auto", "a CPU has no host"),
    ],
)
def test_where_offloading_has_no_effect_that_is_said(
    make_job, monkeypatch, device, parts, strategy, said
):
    cluster = ClusterConfig(strategy=strategy, offload_base=True)

    found, notes = place(make_job, cluster, monkeypatch, 10**6, device=device, **parts)

    assert not found.is_offloaded
    assert said in notes[-1]
    assert "cluster.offload_base is left out in training" in notes[-1]


def test_a_host_without_room_for_parts_is_found_before_a_weight_is_loaded(
    make_job, monkeypatch, own_code_base
):
    cluster = ClusterConfig(strategy="fsdp", offload_base=True)

    def found(host, **parts):
        return place(make_job, cluster, monkeypatch, device="cuda", host=host, **parts)[0]

    blocks = load_in_parts(make_job().base, CPU, Alone(), [])[1]._blocks
    halves = [-(-block.part_S.nbytes // 2 // 16) * 16 for block in blocks]
    pinned = sum(2 ** (size - 1).bit_length() for size in halves)  # torch pins powers of two
    assert found(pinned).is_offloaded
    with pytest.raises(ResourceError, match=r"(?s)host's memory.*offload_base=false"):
        found(pinned - 1)
    assert found(0, base=own_code_base).is_offloaded, "what nobody can count is tried"


@pytest.mark.parametrize("settings", [{}, {"checkpointing": "on"}])
def test_a_worker_alone_trains_over_a_base_with_its_host_as_over_a_whole_one(
    make_job, monkeypatch, settings
):
    """On a CPU the host is the device, so what is pinned and copied on a GPU is here a copy."""
    bases = []

    def loading(*given, **options):
        model, base = load_in_parts(*given, **options)
        bases.append(base)
        return model, base

    def train(name) -> tuple[list[float], dict[str, torch.Tensor]]:
        job, steps = make_job(name, **settings), []
        run_worker(job, Alone(), SnapshotConfig(), "0001", CPU, steps.append)
        adapter = load_file(job.out / "adapter_model.safetensors")
        return [step.loss for step in steps], adapter

    losses, adapter = train("whole")
    offloaded = Placement(is_sharded=True, is_offloaded=True)
    monkeypatch.setattr(worker, "place_base", lambda *_: offloaded)
    monkeypatch.setattr(worker, "load_in_parts", loading)
    found_losses, found_adapter = train("with its host")

    (base,) = bases
    assert base.is_offloaded
    assert base.num_gathered_bytes > base.part_bytes
    assert base.present_bytes == 0
    assert found_losses == losses
    assert all(torch.equal(found_adapter[name], tensor) for name, tensor in adapter.items())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Granite", {"logits_scaling": 7.0}),
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 16, "sliding_window": 8}),
    ],
)
def test_models_that_do_more_to_their_logits_train_over_a_base_in_parts(
    kind, settings, make_job, tmp_path, monkeypatch
):
    """Over a whole base that is found out in a pass that is made again; here each is made once."""
    small_model(kind, intermediate_size=128, **settings).save_pretrained(tmp_path / kind)
    base = write_base(tmp_path / "nf4", tmp_path / kind, is_nf4=True)

    def train(name) -> tuple[list[float], list[str]]:
        job, steps = make_job(name).model_copy(update={"base": base}), []
        run_worker(job, Alone(), SnapshotConfig(), "0001", CPU, steps.append)
        summary = AdapterCheckpoint.model_validate_json((job.scratch / SUMMARY_FILE).read_text())
        return [step.loss for step in steps], list(summary.notes)

    losses, _ = train("whole")
    offloaded = Placement(is_sharded=True, is_offloaded=True)
    monkeypatch.setattr(worker, "place_base", lambda *_: offloaded)
    found_losses, notes = train("with its host")

    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert sum("does more to its logits" in note for note in notes) == 1


def test_a_checkpoint_with_its_own_code_is_loaded_whole_and_says_so(deep_base, tmp_path):
    shutil.copytree(deep_base, tmp_path / "base")
    bring_own_code(tmp_path / "base" / "model")
    notes: list[str] = []

    model, base = load_in_parts(tmp_path / "base", CPU, Alone(), notes)

    assert len(blocks_of(model)) == NUM_LAYERS
    assert base.part_bytes > 0
    assert "loaded whole" in notes[0]
