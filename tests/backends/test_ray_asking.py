"""How batches are shared among askers that fail; Ray is played by askers in this process."""

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch

from qlora_core.backends.ray_asker import Asker, AskSpec, Said
from qlora_core.backends.ray_asking import _Crew
from qlora_core.backends.replies import Replies, read_replies
from qlora_core.config import ClusterConfig, EvaluationConfig
from qlora_core.errors import (
    DeviceError,
    LaunchError,
    ModelError,
    QLoraError,
    StoreAwayError,
    from_json,
)
from qlora_core.ports import AskJob, Batch, Reply

BATCHES = tuple(Batch(kind="loss", numbers=(number,)) for number in range(4))
BROKEN = DeviceError("A GPU of node7 has failed.")
AWAY = StoreAwayError("cannot read /store/base.")


@pytest.fixture
def spec(tmp_path) -> AskSpec:
    job = AskJob(
        model=tmp_path / "base", is_merged=False, adapter=None, data=tmp_path,
        evaluation=EvaluationConfig(), questions="abc", scratch=tmp_path,
    )  # fmt: skip
    return AskSpec(job=job, log=tmp_path / "ray.log")


@dataclass
class ScriptedAsker:
    """Answers at once, as often as it has no error to tell."""

    errors: list[QLoraError | None]
    is_killed: bool = False
    asked: list[Batch] = field(default_factory=list)

    @property
    def prepare(self) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda: self._say(Said(batches=BATCHES)))

    @property
    def ask(self) -> SimpleNamespace:
        return SimpleNamespace(remote=self._reply)

    def _reply(self, batch: str) -> "Call":
        self.asked.append(Batch.model_validate_json(batch))
        return self._say(Said(reply=Reply(batch=self.asked[-1], nats=(0.5,))))

    def _say(self, said: Said) -> "Call":
        assert not self.is_killed
        error = self.errors.pop(0) if self.errors else None
        return Call((Said(error=error.to_json()) if error else said).model_dump_json())


@dataclass(eq=False)
class Call:
    """What Ray gives for a call; its answer is there."""

    answer: str


@dataclass
class Hired:
    """Askers that fail as they are told, one list of errors after the other."""

    errors: list[list[QLoraError | None]]
    askers: list[ScriptedAsker] = field(default_factory=list)

    def __call__(self) -> ScriptedAsker:
        self.askers.append(ScriptedAsker(self.errors.pop(0) if self.errors else []))
        return self.askers[-1]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    def kill(asker: ScriptedAsker, *, no_restart: bool) -> None:
        assert no_restart
        asker.is_killed = True

    monkeypatch.setattr(ray, "wait", lambda calls, num_returns: (calls[:num_returns], calls[1:]))
    monkeypatch.setattr(ray, "get", lambda call: call.answer)
    monkeypatch.setattr(ray, "kill", kill)


class Overwritten(Replies):
    """Replies among which somebody writes, when the second one comes."""

    def __init__(self, path: Path, act: Callable[[], None]) -> None:
        super().__init__(path)
        self._act = act

    def keep(self, reply: Reply) -> None:
        super().keep(reply)
        if reply.batch == BATCHES[1]:
            self._act()


def work(spec: AskSpec, hired: Hired, *, workers: int = 1, max_failures: int = 5) -> None:
    cluster = ClusterConfig(address="head:6379", workers=workers, max_failures=max_failures)
    _Crew(hired, Replies(spec.replies_file), cluster, spec).work()


@pytest.mark.parametrize("error", [BROKEN, AWAY])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_worker_whose_gpu_or_store_is_gone_is_replaced_and_its_batch_asked_again(
    error, at, spec, capsys
):
    hired = Hired([[*[None] * at, error]])

    work(spec, hired)

    assert [asker.is_killed for asker in hired.askers] == [True, False]
    assert {reply.batch for reply in read_replies(spec.replies_file)} == set(BATCHES)
    assert error.what in capsys.readouterr().out


def test_workers_are_replaced_as_often_as_any_that_are_lost(spec):
    hired = Hired([[None, BROKEN] for _ in range(3)])

    with pytest.raises(LaunchError, match="max_failures=2; the last one: DeviceError: ") as met:
        work(spec, hired, max_failures=2)

    assert met.value.is_transient
    assert len(hired.askers) == 3


def test_replies_that_another_driver_has_overwritten_are_told_and_asked_again(spec):
    def overwrite_the_first() -> None:
        first, *others = spec.replies_file.read_bytes().splitlines(keepends=True)
        spec.replies_file.write_bytes(b"".join([first.replace(b"batch", b"b"), *others]))

    hired = Hired([[]])
    replies = Overwritten(spec.replies_file, overwrite_the_first)
    cluster = ClusterConfig(address="head:6379", workers=1)

    with pytest.raises(LaunchError, match="are not there"):
        _Crew(hired, replies, cluster, spec).work()
    work(spec, hired)

    assert len(hired.askers[1].asked) == 1
    assert {reply.batch for reply in read_replies(spec.replies_file)} == set(BATCHES)


def test_what_another_worker_would_meet_as_well_ends_the_evaluation(spec):
    hired = Hired([[None, ModelError("Its numbers are not finite.")]])

    with pytest.raises(ModelError, match="not finite"):
        work(spec, hired)

    assert len(hired.askers) == 1


@pytest.mark.parametrize(
    ("met", "told"),
    [
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), DeviceError),
        (OSError(errno.ESTALE, "Stale file handle"), StoreAwayError),
        (OSError(errno.EIO, "Input/output error"), StoreAwayError),
        (RuntimeError("CUDA error: device-side assert triggered"), QLoraError),
        (RuntimeError("CUDA error: out of memory"), QLoraError),
        (ValueError("https://me:c4nary@host"), QLoraError),
    ],
)
@pytest.mark.parametrize("doing", ["prepare", "ask"])
def test_an_asker_tells_what_another_one_may_get_over_from_what_it_may_not(
    met, told, doing, spec, monkeypatch
):
    def fail(*_: object) -> None:
        raise met

    asker = Asker(spec.model_dump_json(), torch.get_num_threads(), gpus=0.0)
    asker._interview = SimpleNamespace(reply=fail)
    monkeypatch.setattr("qlora_core.evaluation.interview.open_interview", fail)

    said = asker.prepare() if doing == "prepare" else asker.ask(BATCHES[0].model_dump_json())

    error = Said.model_validate_json(said).error
    assert type(from_json(error)) is told
    assert "c4nary" not in said
