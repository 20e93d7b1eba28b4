"""What preflight asks of nodes, against what a worker then plans for itself."""

import pytest
import torch

from qlora_core.artifacts import AdapterCheckpoint
from qlora_core.backends.errands import Needs, asking_errand, training_errand
from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.config import (
    AdapterConfig,
    ClusterConfig,
    EvaluationConfig,
    QuantizationConfig,
    SnapshotConfig,
)
from qlora_core.data.prepared import read_split
from qlora_core.evaluation.questions import read_questions
from qlora_core.evaluation.room import needs_of
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, save_adapter
from qlora_core.modeling.parts import load_in_parts
from qlora_core.ports import AskJob
from qlora_core.training import placing
from qlora_core.training.comm import Alone
from qlora_core.training.desk import SUMMARY_FILE
from tests.tiny import make_tiny_llama
from tests.training.conftest import write_base

pytestmark = pytest.mark.usefixtures("one_thread")
CLUSTER = ClusterConfig(address="head:6379")
CPU = torch.device("cpu")


def least_of_training(job) -> int | None:
    return training_errand(job, CLUSTER, cpus=1, gpus=0.0).needs().least_bytes


def test_the_least_of_a_training_is_what_a_worker_plans_for_its_smallest_pass(make_job):
    job = make_job("small", micro_batch=1, checkpointing="on")
    job = job.model_copy(update={"quantization": QuantizationConfig(keep_dequantized="off")})

    least = least_of_training(job)
    InProcessLauncher(SnapshotConfig()).train(job, lambda _: None)

    summary = AdapterCheckpoint.model_validate_json((job.scratch / SUMMARY_FILE).read_text())
    assert least == summary.predicted_peak_bytes


def test_larger_micro_batches_need_no_more_at_least_as_passes_can_be_smaller(make_job):
    one, four = (
        training_errand(make_job(str(n), micro_batch=n), CLUSTER, cpus=1, gpus=0.0)
        .needs()
        .least_bytes
        for n in (1, 4)
    )

    assert one == four


def test_a_model_that_brings_its_own_code_is_measured_by_workers_alone(make_job, tmp_path):
    job = make_job()
    (tmp_path / "base" / "model").mkdir(parents=True)
    (tmp_path / "base" / "model" / "modeling_mine.py").write_text("raise SystemExit")

    mine = job.model_copy(update={"base": tmp_path / "base"})

    assert least_of_training(mine) is None


def offloading(job, **cluster):
    cluster = ClusterConfig(address="head:6379", offload_base=True, **cluster)
    return training_errand(job, cluster, cpus=1, gpus=1.0).needs()


def test_a_training_that_offloads_its_base_needs_the_hosts_memory_for_each_workers_part(
    make_job, tmp_path
):
    deep = write_base(
        tmp_path / "deep", make_tiny_llama(tmp_path / "tiny", num_layers=8), is_nf4=True
    )
    job = make_job().model_copy(update={"base": deep})
    blocks = load_in_parts(deep, CPU, Alone(), [])[1]._blocks

    two, alone = offloading(job, strategy="fsdp", workers=2), offloading(job, strategy="fsdp")

    for needs, num in ((two, 2), (alone, 1)):
        parts = [-(-block.part_S.nbytes // num // 16) * 16 for block in blocks]
        # torch pins memory by powers of two
        assert needs.host.size_bytes == sum(2 ** (size - 1).bit_length() for size in parts)
        assert needs.host.num_dividing == num
        assert needs.host.enough_gpu_bytes is None, "no GPU is large enough to do without"


def test_with_auto_a_gpu_that_holds_the_base_needs_no_host_and_a_smaller_one_does(
    make_job, tmp_path
):
    deep = write_base(
        tmp_path / "deep", make_tiny_llama(tmp_path / "tiny", num_layers=8), is_nf4=True
    )
    job = make_job().model_copy(update={"base": deep})

    whole = training_errand(job, CLUSTER, cpus=1, gpus=1.0).needs()
    auto, ddp, fsdp = (offloading(job, strategy=name) for name in ("auto", "ddp", "fsdp"))

    assert whole.host is ddp.host is None
    assert auto.least_bytes == fsdp.least_bytes < ddp.least_bytes == whole.least_bytes
    assert auto.host.enough_gpu_bytes == pytest.approx(ddp.least_bytes / 0.9, abs=1)
    assert auto.host.size_bytes == fsdp.host.size_bytes


def test_preflight_asks_for_what_the_worker_then_chooses(make_job, monkeypatch):
    """At the memory that preflight finds enough, and at a byte less."""
    job, cluster = make_job(), ClusterConfig(address="head:6379", offload_base=True)
    enough = training_errand(job, cluster, cpus=1, gpus=1.0).needs().host.enough_gpu_bytes
    rows = read_split(job.data, "train")

    def is_offloaded(gpu_bytes):
        monkeypatch.setattr(placing, "memory_for_worker", lambda *_: gpu_bytes)
        monkeypatch.setattr(placing, "free_bytes", lambda: 10**12)
        place = placing.place_base(job, cluster, rows, Alone(), torch.device("cuda"), [])
        return place.is_offloaded

    assert not is_offloaded(enough + 1)
    assert is_offloaded(enough - 2)


def test_fsdp_on_a_worker_alone_needs_what_ddp_does_as_it_runs_as_that(make_job):
    job = make_job()

    def least(strategy):
        cluster = ClusterConfig(address="head:6379", strategy=strategy)
        return training_errand(job, cluster, cpus=1, gpus=1.0).needs()

    assert least("fsdp") == least("ddp") == least("auto")
    assert least("fsdp").least_bytes > 0


def asking(job, **parts) -> AskJob:
    return AskJob(
        model=job.base,
        is_merged=False,
        adapter=None,
        data=job.data,
        evaluation=EvaluationConfig(batch_size=2, generate=False),
        questions="",
        scratch=job.scratch,
    ).model_copy(update=parts)


def test_on_gpus_an_evaluation_needs_a_host_for_the_base_unless_a_gpu_holds_it(make_job):
    job = asking(make_job())

    found = asking_errand(job, gpus=1.0).needs()

    counted = needs_of(job, read_questions(job.evaluation, job.data))
    assert found.least_bytes == min(counted.whole.total, counted.hosted.total)
    assert found.host.size_bytes == counted.host_bytes
    assert found.host.enough_gpu_bytes == counted.enough_gpu_bytes


def test_of_a_deep_base_an_evaluation_needs_less_of_a_gpu_with_the_host_than_without(
    make_job, tmp_path
):
    deep = write_base(
        tmp_path / "deep", make_tiny_llama(tmp_path / "tiny", num_layers=8), is_nf4=True
    )
    job = asking(make_job(), model=deep)
    counted = needs_of(job, read_questions(job.evaluation, job.data))

    least = asking_errand(job, gpus=1.0).needs().least_bytes

    blocks = counted.whole.weights * 6 // 8  # of 8 blocks, two are on the GPU at a time
    assert least == pytest.approx(counted.whole.total - blocks, rel=0.03)
    wanting = job.model_copy(update={"offloads_base": True})
    found = asking_errand(wanting, gpus=1.0).needs()
    assert found.least_bytes == least
    assert found.host.enough_gpu_bytes is None, "no GPU is large enough to do without"


def test_what_no_host_can_hold_needs_a_gpu_for_all_its_weights(make_job, tmp_path):
    job = make_job()
    model = attach_adapter(load_base(job.base), AdapterConfig(dora=True), seed=0)
    save_adapter(model, tmp_path / "adapter", "base", None)

    dora = asking_errand(asking(job, adapter=tmp_path / "adapter"), gpus=1.0).needs()
    merged = asking_errand(asking(job, is_merged=True), gpus=1.0).needs()
    on_cpus = asking_errand(asking(job), gpus=0.0).needs()

    assert dora == merged == on_cpus == Needs(stored_bytes(job))


def stored_bytes(job) -> int:
    weights = [path for path in job.base.rglob("*") if path.suffix == ".safetensors"]
    return sum(len(path.read_bytes()) for path in weights)


def test_an_evaluation_reads_model_adapter_and_data_and_holds_the_weights(make_job, tmp_path):
    job = make_job()

    errand = asking_errand(asking(job, adapter=tmp_path), gpus=0.0)

    assert errand.folders == (job.base, job.data, tmp_path)
    assert errand.needs() == Needs(stored_bytes(job))
    assert stored_bytes(job) > 0
