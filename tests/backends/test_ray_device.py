"""Workers compute on what was booked for them, whatever they see."""
# ruff: noqa: F811  # fixtures of another module

import pytest
import torch

from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.backends.ray_asker import Asker, AskSpec, Said
from qlora_core.backends.ray_device import booked_device
from qlora_core.backends.ray_judge import SnapshotJudge
from qlora_core.config import EvaluationConfig, SnapshotConfig
from qlora_core.errors import ResourceError
from qlora_core.evaluation.questions import read_questions
from qlora_core.ports import AskJob
from qlora_core.training.journal import Validation
from qlora_core.training.snapshot import FOLDER, snapshots_in
from tests.stages.test_evaluate import made, one_thread  # noqa: F401


@pytest.fixture
def ask_spec(made, tmp_path) -> str:
    """Questions to a tiny base: its held-out loss."""
    base, data, evaluation = made["base"].path, made["data"].path, EvaluationConfig(generate=False)
    job = AskJob(
        model=base, is_merged=False, adapter=None, data=data, evaluation=evaluation,
        questions=read_questions(evaluation, data).digest(), scratch=tmp_path,
    )  # fmt: skip
    return AskSpec(job=job, log=tmp_path / "log").model_dump_json()


def let_torch_see(gpus: bool, monkeypatch) -> None:
    """Have torch say that there are GPUs, or none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)


@pytest.mark.parametrize("gpus", [0.5, 1.0, 2.0])
def test_gpus_that_were_booked_are_used(gpus, monkeypatch):
    let_torch_see(True, monkeypatch)

    assert booked_device(gpus) == torch.device("cuda")


@pytest.mark.parametrize("sees_gpus", [True, False])
def test_what_has_booked_no_gpu_stays_off_those_it_sees(sees_gpus, monkeypatch):
    let_torch_see(sees_gpus, monkeypatch)

    assert booked_device(0.0) == torch.device("cpu")


def test_a_judge_that_has_booked_no_gpu_measures_on_the_cpu(make_job, monkeypatch):
    job, told = make_job(heldout_every=1), []
    InProcessLauncher(SnapshotConfig(every_steps=1, keep=1)).train(job, told.append)
    let_torch_see(True, monkeypatch)
    judge = SnapshotJudge(job.model_dump_json(), num_threads=1, gpus=0.0, offloads_base=False)

    (folder,) = snapshots_in(job.scratch / FOLDER)
    found = Validation.model_validate_json(judge.measure(str(folder)))

    assert found.heldout_loss == told[-1].heldout_loss


def test_an_asker_that_has_booked_no_gpu_answers_on_the_cpu(ask_spec, monkeypatch):
    let_torch_see(True, monkeypatch)
    asker = Asker(ask_spec, num_threads=1, gpus=0.0)

    batches = Said.model_validate_json(asker.prepare()).batches
    said = [Said.model_validate_json(asker.ask(batch.model_dump_json())) for batch in batches]

    assert sum(len(one.reply.nats) for one in said) == 9


def test_a_judge_and_an_asker_without_the_gpu_they_have_booked_say_so(
    make_job, ask_spec, monkeypatch
):
    let_torch_see(False, monkeypatch)
    job = make_job().model_dump_json()
    judge = SnapshotJudge(job, num_threads=1, gpus=1.0, offloads_base=False)

    said = Said.model_validate_json(Asker(ask_spec, num_threads=1, gpus=1.0).prepare())

    assert said.error["type"] == "ResourceError"
    assert "cluster.gpus_per_worker=0" in said.error["fix"]
    with pytest.raises(ResourceError, match="booked 1 GPU"):
        judge.measure("a snapshot")
