"""A recipe on a schedule, run by a real worker of a real Prefect server."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from flows.records import records
from qlora_core.errors import UserError
from tests.flows.scenes import tiny_recipe, write_rows

pytestmark = pytest.mark.prefect

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def worker(connection, home) -> Iterator[psutil.Process]:
    """A worker of our pool, started from a folder that is not the project's."""
    environment = (
        dict(os.environ) | connection.environment() | {"PREFECT_WORKER_QUERY_SECONDS": "2"}
    )
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "qloraflow"]
    log = (home / "worker.log").open("wb")
    process = subprocess.Popen(
        [*command, "--type", "process"], env=environment, cwd=home, stdout=log, stderr=log
    )
    yield psutil.Process(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):  # Prefect takes its time on a busy machine
        process.wait(30)
    process.kill()
    process.wait()
    log.close()


@pytest.fixture
def small(tmp_path, tiny_llama):
    return tiny_recipe(
        tmp_path / "store",
        tiny_llama,
        write_rows(tmp_path),
        training__max_steps=2,
        merge__enabled=False,
        registry__enabled=False,
    )


def client():
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


def runs_of(name: str):
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    with client() as asked:
        return asked.read_flow_runs(
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[name]))
        )


def wait_for(what, timeout_s=240.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.5)
    raise AssertionError(
        f"waited {timeout_s} s in vain: {[(r.name, r.state) for r in runs_of('tiny')]}"
    )


@pytest.mark.ray
def test_a_scheduled_recipe_is_run_to_its_end_by_a_worker(connection, worker, small, tmp_path):
    from flows.deploy import deploy

    told = deploy(small, cron="* * * * *")

    def begun():
        return [run for run in runs_of("tiny") if not run.state.is_scheduled()]

    def ended():
        return [run for run in runs_of("tiny") if run.id == first.id and run.state.is_final()]

    (first,) = wait_for(begun)
    deploy(small)  # without the schedule: the next minute's run would disturb the next test
    (run,) = wait_for(ended)
    with client() as asked:
        asked.delete_deployment(run.deployment_id)
    assert "qlora worker" in told
    assert run.auto_scheduled
    assert run.state.name == "Completed"
    record = records(tmp_path / "store")[-1]
    assert record.state == "completed"
    assert record.artifacts["adapter"].facts["num_steps_run"] == 2


@pytest.mark.ray
def test_cancelling_a_deployed_run_ends_it_and_all_that_it_started(
    connection, worker, small, tmp_path
):
    from prefect.states import Cancelling

    from flows.deploy import deploy

    training = small.training.model_copy(update={"max_steps": 5000})
    deploy(small.model_copy(update={"name": "long", "training": training}))
    with client() as asked:
        deployment = asked.read_deployment_by_name("finetune/long")
        run = asked.create_flow_run_from_deployment(deployment.id)
    wait_for(lambda: list((tmp_path / "store").glob("train_adapter/.*.scratch/journal.jsonl")))
    family = worker.children(recursive=True)

    with client() as asked:
        asked.set_flow_run_state(run.id, Cancelling())

    def ended():
        with client() as asked:
            return asked.read_flow_run(run.id).state.is_final()

    wait_for(ended, 60)
    _, alive = psutil.wait_procs(family, timeout=30)
    with client() as asked:
        assert asked.read_flow_run(run.id).state.name == "Cancelled"
        asked.delete_deployment(deployment.id)
    assert alive == []
    assert records(tmp_path / "store")[0].state == "cancelled"


def test_a_recipe_deployed_again_has_the_new_schedule_and_no_other(connection, small):
    from flows.deploy import deploy

    again = small.model_copy(update={"name": "nightly"})
    deploy(again, cron="0 2 * * *")
    deploy(again, cron="0 3 * * *")

    with client() as asked:
        found = asked.read_deployment_by_name("finetune/nightly")
    assert [s.schedule.cron for s in found.schedules] == ["0 3 * * *"]
    assert found.parameters["config"]["name"] == "nightly"
    assert found.concurrency_options.collision_strategy == "ENQUEUE"

    deploy(again)

    with client() as asked:
        assert asked.read_deployment_by_name("finetune/nightly").schedules == []


@pytest.mark.parametrize("cron", ["every night", "61 2 * * *", ""])
def test_a_cron_that_is_none_is_told_with_one_that_would_do(small, cron):
    from flows.deploy import deploy

    with pytest.raises(UserError, match="0 2"):
        deploy(small, cron=cron)


def test_prefects_own_command_applies_the_file_in_infra(connection, small):
    from flows.deploy import deploy

    deploy(small.model_copy(update={"name": "for-the-pool"}))
    command = ["--no-prompt", "deploy", "--all", "--prefect-file", "infra/prefect/prefect.yaml"]

    done = subprocess.run(
        [sys.executable, "-m", "prefect", *command],
        env=dict(os.environ) | connection.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    with client() as asked:
        found = asked.read_deployment_by_name("finetune/finetune")
    assert found.entrypoint == "flows.finetune.finetune"
    assert "RunConfig" in found.parameter_openapi_schema["definitions"]
