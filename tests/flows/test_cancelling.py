"""A run that is cancelled in Prefect, in a process that no worker of Prefect's owns."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Cancelling, Running

from flows.cancelling import CancelledInPrefect, ended_when
from flows.lifecycle import set_state, sigterm_interrupts
from flows.records import load_record, open_record
from qlora_core.backends.in_process import InProcessLauncher
from qlora_core.config import RunConfig
from tests.flows.scenes import Children, Watcher, child_run_in_process, tiny_recipe, write_rows

SOON_S = 0.02


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended_in_main_thread(asked: Callable[[], bool]) -> AbstractContextManager[None]:
    def not_this_way() -> None:
        raise AssertionError("the main thread is interrupted, not asked to stop")

    return ended_when(asked, not_this_way, SOON_S)


def test_what_waits_in_the_main_thread_is_woken_when_the_run_is_cancelled():
    cancelled = pytest.raises(CancelledInPrefect, match=r"Cancelled in Prefect\.")

    with sigterm_interrupts(), cancelled, ended_in_main_thread(lambda: True):
        threading.Event().wait(30)


def test_a_server_that_is_away_ends_nothing_and_is_asked_again():
    answers = iter([ConnectionError("away"), TimeoutError("slow"), False, True])

    def asked() -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with sigterm_interrupts(), pytest.raises(CancelledInPrefect), ended_in_main_thread(asked):
        threading.Event().wait(30)

    assert list(answers) == []


def test_nobody_is_interrupted_who_has_left_already():
    is_asked, may_answer = threading.Event(), threading.Event()
    asking = []

    def asked() -> bool:
        asking.append(threading.current_thread())
        is_asked.set()
        return may_answer.wait(30)

    def hear(*_: object) -> None:
        heard.append("a signal")

    heard: list[str] = []
    before = signal.signal(signal.SIGTERM, hear)
    try:
        with ended_in_main_thread(asked):
            assert is_asked.wait(30)
        may_answer.set()
        asking[0].join(30)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert heard == []


def test_what_ends_by_itself_keeps_its_own_error():
    with pytest.raises(ZeroDivisionError), ended_in_main_thread(lambda: False):
        1 / 0  # noqa: B018


def test_in_another_thread_whatever_stopping_brings_about_counts_as_cancelled():
    stopped, met = threading.Event(), []

    def work() -> None:
        try:
            with ended_when(lambda: True, stopped.set, SOON_S):
                assert stopped.wait(30)
                raise ValueError("a stage was stopped before it was done")
        except BaseException as error:
            met.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)

    assert [type(error) for error in met] == [CancelledInPrefect]


@pytest.fixture(scope="module")
def children() -> Children:
    return Children()


def long_recipe(model: Path, folder: Path) -> RunConfig:
    """It would train for many minutes, in steps of some milliseconds."""
    return tiny_recipe(
        folder / "store",
        model,
        write_rows(folder),
        training__epochs=100_000,
        training__max_steps=200_000,
        training__heldout_every=None,
        evaluation__generate=False,
        snapshots__every_steps=100_000,
    )


def flow_run(store: Path):
    (attempt,) = load_record(store).attempts
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(attempt.prefect_flow_run_id))


@pytest.mark.prefect
def test_cancelling_a_called_run_in_prefect_ends_it_like_ctrl_c(
    connection, tiny_llama, children, tmp_path
):
    recipe, store = long_recipe(tiny_llama, tmp_path), tmp_path / "store"
    environment = {"QLORAFLOW_HOME": os.environ["QLORAFLOW_HOME"], **connection.environment()}
    stepping = children.event()
    process = children.start(child_run_in_process, recipe, environment, stepping)
    assert stepping.wait(120)

    with get_client(sync_client=True) as client:  # as `prefect flow-run cancel` does it
        accepted = client.set_flow_run_state(flow_run(store).id, Cancelling())
    wait_until(lambda: load_record(store).state == "cancelled", 30)

    process.join(30)
    assert accepted.state.is_cancelling()
    assert process.exitcode == 130
    assert load_record(store).error == "Cancelled in Prefect."
    state = flow_run(store).state
    assert (state.name, state.message) == ("Cancelled", "Cancelled in Prefect.")


@pytest.mark.prefect
def test_a_run_in_another_thread_that_is_forced_to_cancelled_ends_too(
    connection, tiny_llama, tmp_path
):
    from flows.finetune import run_recipe
    from tasks.wiring import Surroundings

    recipe, store, met = long_recipe(tiny_llama, tmp_path), tmp_path / "store", []
    stepping = threading.Event()

    class Teller(Watcher):
        def update(self, stage: str, done: float, total: float, note: str = "") -> None:
            if stage == "train_adapter" and done >= 3:
                stepping.set()

    def work() -> None:
        try:
            run_recipe(recipe, Surroundings(Teller(), InProcessLauncher(recipe.snapshots)))
        except BaseException as error:
            met.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert stepping.wait(120)

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run(store).id, Cancelled(), force=True)
    thread.join(30)

    assert [type(error) for error in met] == [CancelledInPrefect]
    assert load_record(store).state == "cancelled"
    assert flow_run(store).state.message == "Cancelled in Prefect."


@dataclass(frozen=True)
class Interrupted(InProcessLauncher):
    """Ctrl-C comes when a run on the same store, of somebody else, has begun after this one."""

    store: Path = Path()
    other: RunConfig | None = None
    other_flow_run_id: str = ""

    @contextmanager
    def awake(self):
        open_record(self.store, self.other, self.other_flow_run_id)
        raise KeyboardInterrupt
        yield


@pytest.mark.prefect
def test_ctrl_c_marks_its_own_run_and_not_the_newest_on_the_store(connection, tiny_llama, tmp_path):
    from flows.finetune import finetune, run_recipe
    from tasks.wiring import Surroundings

    recipe, store = long_recipe(tiny_llama, tmp_path), tmp_path / "store"
    other = recipe.model_copy(update={"name": "other"})
    with get_client(sync_client=True) as client:
        others = client.create_flow_run(finetune, state=Running())
    launcher = Interrupted(recipe.snapshots, store, other, str(others.id))

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, Surroundings(Watcher(), launcher))

    assert load_record(store).run_id.startswith("other"), "the newest is the other's"
    (mine,) = load_record(store, "tiny").attempts
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(UUID(mine.prefect_flow_run_id)).state.is_cancelled()
        assert client.read_flow_run(others.id).state.is_running()


def test_a_run_that_cannot_be_marked_because_prefect_is_away_is_told_and_no_error(caplog):
    nobody = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}

    with temporary_settings(nobody):
        set_state("00000000-0000-0000-0000-000000000001", Cancelled())

    assert "cannot be marked" in caplog.text
