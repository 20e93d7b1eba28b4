"""The command line: ``qlora``.

Only Typer and Rich are imported here, so ``qlora --help`` answers at once; each command imports
what it needs when it is called. Errors that a person can mend end with exit code 2 and a text that
says what to change; all others with 1. A traceback is shown for ``--debug`` alone, but never lost:
what was not foreseen is written to a file that the message names.
"""

import atexit
import json
import logging
import os
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from flows.chat import Conversation
    from qlora_core.config import RunConfig

app = typer.Typer(
    name="qlora",
    help="From one YAML to a verified fine-tuned model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_INTERRUPTED = 130  # Typer's exit code for Ctrl-C
_PIPE_COLUMNS = 120  # Rich takes 80 where there is no terminal, too narrow for a comparison


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_COLUMNS
    return console


out = _console()
err = _console(stderr=True)

Recipe = Annotated[Path, typer.Argument(metavar="FILE", help="The recipe, a YAML file.")]
Run = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="A run's id or how it begins; none: the newest run."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Change a field of the recipe: --set training.learning_rate=1e-4. Repeatable.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if debug:
        os.environ["QLORAFLOW_DEBUG"] = "1"


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Address of a running Ray to train on, or of its Jobs endpoint."),
    ] = None,
) -> None:
    """Do everything: prepare, quantise, train, evaluate, merge, register.

    Called again, it continues where it was killed, and reuses what is there already.
    """
    if cluster == "":
        raise typer.BadParameter("--cluster is empty; leave it out to train on this machine.")
    given = [*(overrides or []), *([f"cluster.address={cluster}"] if cluster else [])]
    config = _load(recipe, given)
    _quiet_prefect()
    from flows.ahead import started_ahead

    with started_ahead(config) as ahead:
        from flows.run import run_and_report

        run_and_report(config, out, ahead)


@app.command()
def plan(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="The recipe, a YAML file; --shape needs none."),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Plan for so many workers.")] = None,
    shape: Annotated[
        Literal["8b", "70b", "405b"] | None,
        typer.Option(help="Plan the memory of a Llama 3.1 of this size; nothing is downloaded."),
    ] = None,
    gpu_gb: Annotated[
        float | None,
        typer.Option(min=1.0, help="Each worker has a GPU of so many GB; none: what is here."),
    ] = None,
) -> None:
    """Say what a run would do: what is cached, steps, tokens, memory per device."""
    if recipe is None and shape is None:
        raise typer.BadParameter("Give a recipe, as in: qlora plan examples/cron/recipe.yaml")
    given = [*(overrides or []), *([f"cluster.workers={workers}"] if workers else [])]
    from flows.planning import make_plan, show_plan
    from flows.shapes import bare_config, make_shape_plan, show_shape_plan
    from qlora_core.plan import ShapePlan

    config = _load(recipe, given) if recipe else bare_config(given)
    made = make_shape_plan(config, shape, gpu_gb) if shape else make_plan(config, gpu_gb)
    if as_json:
        print(made.model_dump_json(indent=1))  # noqa: T201  # for programs: no wrapping, no colour
    elif isinstance(made, ShapePlan):
        show_shape_plan(out, made)
    else:
        show_plan(out, made)


@app.command()
def show(
    run: Run = None,
    as_json: AsJson = False,
    store: Annotated[Path | None, typer.Option(help="Folder of the store.")] = None,
    all_runs: Annotated[bool, typer.Option("--all", help="List all runs.")] = False,
) -> None:
    """Show what a run built and how base, tuned and merged model compare."""
    from flows.records import load_record, records
    from flows.report import runs_table, show_record

    root = store or _home()
    if all_runs:
        found = records(root)
        if as_json:
            print(json.dumps([r.model_dump(mode="json") for r in found], indent=1))  # noqa: T201
        else:
            out.print(runs_table(found))
        return
    record = load_record(root, run)
    if as_json:
        print(record.model_dump_json(indent=1))  # noqa: T201
    else:
        show_record(out, record)


@app.command()
def ui(
    stop: Annotated[bool, typer.Option("--stop", help="End both servers instead.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --stop: even under a run, which then fails.")
    ] = False,
    store: Annotated[Path | None, typer.Option(help="Folder of the store.")] = None,
) -> None:
    """Start the Prefect and MLflow UIs on this machine's stores, and say where they are."""
    from flows.server import ensure_mlflow_ui, ensure_server, stop_mlflow_ui, stop_server
    from tasks.places import default_tracking_uri

    home = _home()
    if stop:
        ended = {"Prefect": stop_server(home, force=force), "MLflow": stop_mlflow_ui(home)}
        names = ", ".join(name for name, was_running in ended.items() if was_running)
        out.print(f"ended: {names or 'nothing was running'}")
        return
    prefect = ensure_server(home)
    mlflow = ensure_mlflow_ui(home, default_tracking_uri(store or home))
    out.print(f"[bold]Prefect[/]  {prefect.ui_url}", highlight=False)
    if prefect.auth:
        out.print(f"         it asks for a password: {escape(prefect.auth)}", highlight=False)
    out.print(f"[bold]MLflow[/]   {mlflow}", highlight=False)
    out.print("Both go on until `qlora ui --stop`.")


@app.command()
def chat(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="A run's id or how it begins; none: the newest with a model to talk to.",
        ),
    ] = None,
    subject: Annotated[
        Literal["merged", "tuned", "base"] | None,
        typer.Option(help="Which model; none: merged if there is one, else tuned."),
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Answer this and end.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.0,
    keep: Annotated[
        bool, typer.Option(help="Keep the conversation; without, each message stands alone.")
    ] = False,
    store: Annotated[Path | None, typer.Option(help="Folder of the store.")] = None,
) -> None:
    """Talk to the model that a run made."""
    from flows.chat import can_talk, open_conversation
    from flows.records import load_record

    record = load_record(store or _home(), run, lambda found: can_talk(found, subject))
    conversation = open_conversation(record, subject, max_new_tokens, lambda x: err.print(x))
    if message is not None:
        _say(conversation, message, temperature)
        return
    err.print("[dim]An empty line ends it; /new forgets the conversation.[/]")
    while text := _ask():
        if text == "/new" or not keep:
            conversation.forget()
        if text != "/new":
            _try_to_say(conversation, text, temperature)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Try out device, bitsandbytes, Ray, Prefect and MLflow, and say what to change."""
    _quiet_prefect()
    from flows.doctor import check_all

    checks = []
    for check in check_all(_home()):
        checks.append(check)
        if not as_json:
            mark = "[green]✓[/]" if check.ok else "[red]✗[/]"
            out.print(f"{mark} [bold]{check.part:<13}[/] {escape(check.found)}", highlight=False)
            if check.fix:
                out.print(f"  {'':<13} {escape(check.fix)}", highlight=False)
    if as_json:
        print(json.dumps([c.model_dump() for c in checks], indent=1))  # noqa: T201
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, with which editors complete and check them."""
    from qlora_core.config import RunConfig

    made = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    print(json.dumps(made | RunConfig.model_json_schema(), indent=1))  # noqa: T201


@app.command()
def deploy(
    recipe: Recipe,
    cron: Annotated[
        str | None, typer.Option(help='When to run, as in "0 2 * * *"; none: when asked.')
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Register a recipe with Prefect, to run on a schedule."""
    config = _load(recipe, overrides)
    from flows.deploy import deploy as register

    out.print(register(config, cron))


@app.command()
def worker(
    limit: Annotated[int | None, typer.Option(min=1, help="Runs at the same time.")] = None,
) -> None:
    """Carry out scheduled runs on this machine, until Ctrl-C."""
    from flows.deploy import work as carry_out

    carry_out(limit)


@app.command()
def sync(store: Annotated[Path | None, typer.Option(help="Folder of the store.")] = None) -> None:
    """Send to MLflow what could not be sent while it was away."""
    from flows.run import sync_runs

    sync_runs(store or _home(), out)


def main() -> None:
    """Run the command line, and turn errors into a text and an exit code."""
    # Before torch is loaded: threads that wait actively take the cores of training beside them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # bitsandbytes would have a compiler write its CPU functions: seconds to import, and other bits
    # where there is none. On a GPU models may need torch's compiler.
    if sys.platform == "linux" and not any(Path(driver).exists() for driver in _GPU_DRIVERS):
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Says on import that a kernel cannot be fetched from a hub, which we never want it to.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app(standalone_mode=True)
    except SystemExit as leaving:
        if leaving.code == _INTERRUPTED:
            err.print("stopped; the same command goes on from here")
        _leave(leaving.code)
    except Exception as error:  # whatever it is, a person gets a sentence, not a traceback
        if os.environ.get("QLORAFLOW_DEBUG"):
            err.print_exception()
        _leave(_explain(error))


def _leave(code: object) -> NoReturn:
    """End the process as Python does, but for taking apart, for seconds, all that was imported."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _explain(error: Exception) -> int:
    """Say what went wrong and what to do; return the exit code."""
    from qlora_core.errors import QLoraError

    if isinstance(error, QLoraError):
        _tell(error.what, error.why, error.fix)
        return error.exit_code
    with tempfile.NamedTemporaryFile(
        "w", prefix="qlora-error-", suffix=".txt", delete=False
    ) as file:
        traceback.print_exception(error, file=file)
    _tell(
        f"{type(error).__name__}: {error}",
        "This was not foreseen: it is an error of qloraflow.",
        f"The details are in {file.name}; the same command with --debug shows them.",
    )
    return 1


def _load(recipe: Path, overrides: list[str] | None) -> "RunConfig":
    from qlora_core.recipe import load_config

    return load_config(recipe, overrides or [])


def _quiet_prefect() -> None:
    """Keep Prefect's log off this terminal, which has bars and errors of its own; the UI has it."""
    if not os.environ.get("QLORAFLOW_DEBUG"):
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


def _home() -> Path:
    given = os.environ.get("QLORAFLOW_HOME")
    return Path(given).expanduser().resolve() if given else Path.home() / ".qloraflow"


def _ask() -> str:
    try:
        return err.input("[bold]> [/]").strip()
    except EOFError:
        return ""


def _say(conversation: "Conversation", text: str, temperature: float) -> None:
    for piece in conversation.answer(text, temperature):
        print(piece, end="", flush=True)  # noqa: T201  # token by token
    print()  # noqa: T201


def _try_to_say(conversation: "Conversation", text: str, temperature: float) -> None:
    from qlora_core.errors import UserError

    try:
        _say(conversation, text, temperature)
    except UserError as error:  # too long, say: the next message may be shorter
        _explain(error)


def _tell(what: str, why: str, fix: str) -> None:
    err.print(f"[bold red]error:[/] {escape(what)}", highlight=False, soft_wrap=True)
    for part in (why, fix):
        if part:
            err.print(f"  {escape(part)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
