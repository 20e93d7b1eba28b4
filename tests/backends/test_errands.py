"""What preflight asks of nodes, against what a worker then plans for itself."""

import pytest

from qlora_core.artifacts import AdapterCheckpoint
from qlora_core.backends.errands import asking_errand, training_errand
from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.config import ClusterConfig, EvaluationConfig, QuantizationConfig, SnapshotConfig
from qlora_core.ports import AskJob
from qlora_core.training.desk import SUMMARY_FILE

pytestmark = pytest.mark.usefixtures("one_thread")
CLUSTER = ClusterConfig(address="head:6379")


def test_the_least_of_a_training_is_what_a_worker_plans_for_its_smallest_pass(make_job):
    job = make_job("small", micro_batch=1, checkpointing="on")
    job = job.model_copy(update={"quantization": QuantizationConfig(keep_dequantized="off")})

    least = training_errand(job, CLUSTER, cpus=1, gpus=0.0).needs().least_bytes
    InProcessLauncher(SnapshotConfig()).train(job, lambda _: None)

    summary = AdapterCheckpoint.model_validate_json((job.scratch / SUMMARY_FILE).read_text())
    assert least == summary.predicted_peak_bytes


def test_larger_micro_batches_need_no_more_at_least_as_passes_can_be_smaller(make_job):
    one, four = (
        training_errand(make_job(str(n), micro_batch=n), CLUSTER, cpus=1, gpus=0.0).needs().least_bytes
        for n in (1, 4)
    )

    assert one == four


def test_a_model_that_brings_its_own_code_is_measured_by_workers_alone(make_job, tmp_path):
    job = make_job()
    (tmp_path / "base" / "model").mkdir(parents=True)
    (tmp_path / "base" / "model" / "modeling_mine.py").write_text("raise SystemExit")

    mine = job.model_copy(update={"base": tmp_path / "base"})

    assert training_errand(mine, CLUSTER, cpus=1, gpus=0.0).needs().least_bytes is None


def test_an_evaluation_reads_model_adapter_and_data_and_holds_the_weights(make_job, tmp_path):
    job = make_job()
    asked = AskJob(
        model=job.base,
        is_merged=False,
        adapter=tmp_path,
        data=job.data,
        evaluation=EvaluationConfig(),
        questions="",
        scratch=job.scratch,
    )

    errand = asking_errand(asked, gpus=0.0)

    assert errand.folders == (job.base, job.data, tmp_path)
    weights = [path for path in job.base.rglob("*") if path.suffix == ".safetensors"]
    assert errand.needs().least_bytes == sum(len(path.read_bytes()) for path in weights) > 0
