"""Passes that are tried by several workers, as threads; over gloo in test_sharding.py."""

import pytest
import torch

from qlora_core.data.prepared import read_split
from qlora_core.errors import CollectiveError
from qlora_core.training.objective import LossFunction
from qlora_core.training.trying import FailedTryError, Trial
from tests.tiny import small_model
from tests.training.fakes import run_on_threads


def verdicts(passes) -> list[tuple[int, str]]:
    """How many passes each of two workers computed, and what it concluded, by rank."""
    found = {}

    def work(comm):
        trial, computed, failure = Trial(comm), [], None
        try:
            for compute in passes[comm.rank]:
                trial.run(compute)
                computed.append(compute)
        except FailedTryError as error:
            failure = error
        verdict = trial.conclude(failure)
        found[comm.rank] = len(computed), verdict.why if verdict else ""

    run_on_threads(2, work)
    return [found[0], found[1]]


def well() -> int:
    return 1


def fails() -> int:
    raise ValueError("no")


def test_a_trial_in_which_all_goes_well_has_no_complaint():
    assert verdicts([[well, well], [well, well]]) == [(2, ""), (2, "")]


def test_all_stop_at_the_first_failure_of_one_and_say_the_same():
    said = "on worker 1, ValueError: no"

    assert verdicts([[well, well, well], [well, fails, well]]) == [(2, said), (1, said)]


def test_a_failure_of_the_last_pass_is_heard_at_the_end():
    said = "on worker 0, ValueError: no"

    assert verdicts([[well, fails], [well, well]]) == [(1, said), (2, said)]


def test_what_fails_on_all_is_not_told_of_one():
    assert verdicts([[fails], [fails]]) == [(0, "ValueError: no")] * 2


def test_only_want_of_memory_is_worth_another_try_with_less():
    def verdict(*failures) -> FailedTryError | None:
        found = {}
        work = lambda comm: found.update({comm.rank: Trial(comm).conclude(failures[comm.rank])})  # noqa: E731
        run_on_threads(2, work)
        assert len({each and each.why for each in found.values()}) == 1
        return found[0]

    memory, other = FailedTryError("a", lacks_memory=True), FailedTryError("b")
    assert verdict(memory, None).lacks_memory
    assert not verdict(memory, other).lacks_memory
    assert verdict(None, None) is None


def test_other_workers_that_are_gone_are_no_reason_to_pad_rows(dataset, monkeypatch):
    model = small_model("Llama")
    loss = LossFunction(model)

    def lost(*_, **__):
        raise CollectiveError("worker 0 lost the others")

    monkeypatch.setattr(model.model.layers[1], "forward", lost)
    with pytest.raises(CollectiveError, match="lost the others"):
        loss.try_out(read_split(dataset, "train"), torch.device("cpu"))

    assert not loss.notes
