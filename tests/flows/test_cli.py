"""The command line as a person meets it: a process, its output and its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def qlora(tmp_path):
    def call(*arguments: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "QLORAFLOW_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }
        return subprocess.run(
            [sys.executable, "-m", "flows", *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return call


def test_help_names_every_command_and_imports_nothing_heavy(qlora):
    program = (
        "import atexit, sys; sys.argv = ['qlora', '--help']\n"
        "from flows.__main__ import main\n"
        "heavy = {'torch', 'transformers', 'ray', 'mlflow', 'prefect', 'pydantic', 'numpy'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    for command in (
        "run",
        "plan",
        "show",
        "ui",
        "chat",
        "doctor",
        "schema",
        "deploy",
        "work",
        "sync",
    ):
        assert command in done.stdout
    assert "HEAVY []" in done.stdout


def test_a_bad_recipe_exits_with_2_lists_everything_and_leaves_nothing(qlora, tmp_path):
    (tmp_path / "r.yaml").write_text("name: x\nmodle: 1\ntraining: {epochs: many}\n")

    done = qlora("run", "r.yaml")

    assert done.returncode == 2
    for field in ("modle", "model", "dataset", "training.epochs"):
        assert field in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "home").exists()


def test_a_missing_recipe_exits_with_2(qlora):
    done = qlora("run", "nowhere.yaml")

    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr


def test_a_shape_is_planned_without_a_recipe_and_nothing_else_is(qlora):
    done = qlora("plan", "--shape", "8b", "--gpu-gb", "24", "--set", "adapter.rank=64")

    assert done.returncode == 0
    assert "Llama 3.1 8B: 8.03 B parameters" in done.stdout

    assert "no such field" in qlora("plan", "--shape", "8b", "--set", "adapter.rnk=64").stderr
    without = qlora("plan")
    assert without.returncode == 2
    assert "Give a recipe" in without.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("run", "r.yaml", "--cluster", ""),  # an unset variable
        ("plan", "--shape", "8b", "--gpu-gb", "0"),
        ("plan", "--shape", "8b", "--workers", "0"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(qlora, words):
    done = qlora(*words)

    assert done.returncode == 2
    assert words[-2] in done.stderr


def test_an_error_shows_its_traceback_only_when_asked(qlora):
    assert "Traceback" in qlora("--debug", "run", "nowhere.yaml").stderr
    assert "Traceback" not in qlora("run", "nowhere.yaml").stderr


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path):
    program = (
        "import sys; sys.argv = ['qlora', 'plan', 'r.yaml']\n"
        "from flows import __main__ as cli\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "cli._load = interrupted\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 130
    assert "the same command goes on from here" in done.stderr


def test_show_without_any_run_says_how_to_start_one(qlora):
    done = qlora("show")

    assert done.returncode == 2
    assert "qlora run" in done.stderr


def test_the_schema_accepts_the_examples_and_refuses_a_wrong_field(qlora):
    schema = json.loads(qlora("schema").stdout)
    recipes = sorted((ROOT / "examples").glob("*/recipe.yaml"))

    assert recipes
    for recipe in recipes:
        jsonschema.validate(yaml.safe_load(recipe.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "x", "modle": {}}, schema)


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").glob("*/recipe.yaml")), ids=str)
def test_an_example_recipe_has_no_problem_but_data_that_is_not_made_yet(recipe):
    from qlora_core.errors import ConfigError
    from qlora_core.recipe import load_config

    problems = []
    try:
        load_config(recipe)
    except ConfigError as error:
        problems = str(error).splitlines()[1:]

    assert [problem for problem in problems if "does not exist" not in problem] == []
