"""Put a recipe on a schedule: a deployment of the finetune flow on the server in use.

A deployment is a name, the recipe as parameters (Prefect shows them as a form made from the config
model, and checks what is typed there), a schedule, and a work pool. A worker of that pool, on any
machine with this project installed, starts a process for each run. Runs of one deployment never
overlap: the next one waits.

The entry point is a module path, not a file, so a worker finds the flow wherever the project is.
"""

import os
import sys
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectAlreadyExists
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from flows.finetune import finetune
from flows.lifecycle import refuse_secrets
from flows.server import Connection, ensure_server
from qlora_core.config import RunConfig, WorkspaceConfig
from qlora_core.errors import UserError
from tasks import places

WORK_POOL = "qloraflow"
ENTRYPOINT = "flows.finetune.finetune"
_ROOT = Path(__file__).resolve().parents[1]


def deploy(config: RunConfig, cron: str | None = None) -> str:
    """Register a recipe with Prefect and say what to do next.

    Args:
        config: The recipe, its paths absolute. Its store is written down, so that a worker
            started from anywhere uses this one.
        cron: When to run, five fields, in this machine's time zone; none: when asked.

    Raises:
        UserError: ``cron`` is no cron expression.
        ConfigError: The recipe holds a password.
        LaunchError: No Prefect server answers.
    """
    refuse_secrets(config)
    schedule = _schedule(cron)
    connection = ensure_server(places.home())
    with connection.in_use(), get_client(sync_client=True) as client:
        _ensure_pool(client)
        _register(client, _with_store(config), schedule)
    return _next_steps(config, schedule, connection)


def work(limit: int | None = None) -> None:
    """Become a worker of our pool, on the server in use, until interrupted."""
    connection = ensure_server(places.home())
    environment = dict(os.environ) | connection.environment()
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", WORK_POOL]
    command += ["--type", "process"] + (["--limit", str(limit)] if limit else [])
    os.execve(sys.executable, command, environment)  # noqa: S606  # we become it, shell or no shell


def _schedule(cron: str | None) -> CronSchedule | None:
    if cron is None:
        return None
    try:
        return CronSchedule(cron=cron, timezone=local_zone())
    except ValidationError as error:
        raise UserError(
            f"--cron {cron!r} is no cron expression.",
            why="It takes minute, hour, day of month, month and day of week.",
            fix='For example --cron "0 2 * * *": every night at two.',
        ) from error


def local_zone() -> str:
    """Return the IANA name of this machine's time zone; UTC where it has none."""
    link = Path("/etc/localtime")
    linked = str(link.resolve()).rpartition("zoneinfo/")[2] if link.is_symlink() else ""
    for name in filter(None, (os.environ.get("TZ", "").removeprefix(":"), linked)):
        try:
            return ZoneInfo(name).key
        except (ValueError, OSError):
            continue
    return "UTC"


def _ensure_pool(client: SyncPrefectClient) -> None:
    template = ProcessWorker.get_default_base_job_template()
    pool = WorkPoolCreate(name=WORK_POOL, type="process", base_job_template=template)
    try:
        client.create_work_pool(pool)
    except ObjectAlreadyExists:
        return


def _register(client: SyncPrefectClient, config: RunConfig, schedule: CronSchedule | None) -> None:
    schedules = [DeploymentScheduleCreate(schedule=schedule, active=True)] if schedule else []
    one_at_a_time = ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
    client.create_deployment(
        flow_id=client.create_flow_from_name(finetune.name),
        name=config.name,
        schedules=schedules,
        concurrency_limit=1,
        concurrency_options=one_at_a_time,
        parameters={"config": config.model_dump(mode="json")},
        parameter_openapi_schema=parameter_schema(finetune).model_dump(),
        enforce_parameter_schema=True,
        description=finetune.description,
        work_pool_name=WORK_POOL,
        entrypoint=ENTRYPOINT,
        job_variables=_job_variables(),
    )


def _job_variables() -> dict[str, Any]:
    """Let a worker import this project: from here, where it is a checkout and not installed."""
    return {"working_dir": str(_ROOT)} if (_ROOT / "pyproject.toml").exists() else {}


def _with_store(config: RunConfig) -> RunConfig:
    kept: WorkspaceConfig = config.workspace.model_copy(
        update={"store": str(places.store_root(config))}
    )
    return config.model_copy(update={"workspace": kept})


def _next_steps(config: RunConfig, schedule: CronSchedule | None, connection: Connection) -> str:
    name = f"{finetune.name}/{config.name}"
    when = f"runs at {schedule.cron} ({schedule.timezone})" if schedule else "runs when asked"
    return "\n".join(
        [
            f"{name} {when}; it is at {connection.ui_url}/deployments",
            "It needs a worker on a machine with this project, which goes on until it is stopped:",
            "  qlora worker",
        ]
    )
