"""Read a recipe: YAML that means what it looks like, checked once, all problems told at once.

YAML 1.1, which PyYAML speaks, reads ``no`` as false, ``1:30`` as 90, ``012`` as ten and ``1e-4`` as
text. Here a scalar is what YAML 1.2's core schema says: null, true/false, a number as everybody
writes it, else text. Aliases and duplicate keys are refused (an alias bomb of a few lines unfolds
into gigabytes), and so is a file of more than 256 KiB.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_core.config import (
    Config,
    RunConfig,
    absolute,
    config_types,
    is_hub_id,
    locators,
    resolve_paths,
)
from qlora_core.errors import ConfigError

MAX_BYTES = 256 * 1024
_ROUNDS = 6  # a wrong value, its absence, what a stand-in lacks, fields of a group, the whole
_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_INT = re.compile(r"^[-+]?\d+$")
_WANTED = {
    "string_type": "should be text",
    "string_too_short": "should not be empty",
    "tuple_type": "should be a list",
    "model_type": "should be a group of fields (name: value)",
    "model_attributes_type": "should be a group of fields (name: value)",
    "dict_type": "should be a group of fields (name: value)",
}
"""What pydantic calls a valid string, array or object."""
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a recipe.

    Args:
        path: The YAML file. Relative paths in it start at its folder.
        overrides: ``dotted.name=value`` pairs that win over the file; the value is YAML, and a
            relative path in it starts at the working folder, where it was typed.

    Raises:
        ConfigError: With every problem there is: field path, what was given, what would do.
    """
    path = Path(path)
    return parse_config(_read(path), str(path), path.resolve().parent, overrides)


def parse_config(text: str, name: str, folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Check a recipe's text, as `load_config` does; its relative paths start at ``folder``.

    Raises:
        ConfigError: See `load_config`; ``name`` is what its text is called there.
    """
    data, lines = parse_yaml(text, name)
    overridden = [name for text in overrides for name in _apply_override(data, text)]

    def base_of(field: str) -> Path:
        typed = any(field == o or field.startswith(f"{o}.") for o in overridden)
        return Path.cwd() if typed else folder

    config, problems = _validated(data)
    problems += _missing_files(data, base_of)
    if config is None or problems:
        located = [_with_line(p, lines) for p in problems]
        raise ConfigError.of(located, name)
    return resolve_paths(config, base_of)


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the document as plain data, and the line of each dotted field name.

    Raises:
        ConfigError: Not YAML, not a mapping, an alias or a tag, or a key given twice.
    """
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(text, Loader=_PlainLoader)
        value = _value(node, "", lines) if node else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: this is not readable YAML: {error.problem}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name}: this is not readable YAML: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{name}: a recipe is a mapping of fields, but this is {_kind(value)}.",
            fix="Begin with `name: my-run`, `model:` and `dataset:`.",
        )
    return value, lines


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        problem = None
        if isinstance(event, yaml.events.AliasEvent):
            problem = "aliases (*name) are not allowed in a recipe; write the value out"
        elif event.tag is not None:
            problem = "tags (!name) are not allowed in a recipe; write the value without"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: the recipe cannot be read: {error.strerror}.",
            fix="Give the path of a YAML file, e.g. examples/cron/recipe.yaml.",
        ) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes; a recipe has at most {MAX_BYTES}.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}).") from error


def _value(node: yaml.Node, path: str, lines: dict[str, int]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, f"{path}.{i}", lines) for i, item in enumerate(node.value)]
    made: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, mark = key_node.value, key_node.start_mark
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem="a field's name must be text", problem_mark=mark)
        if key in made:
            raise yaml.MarkedYAMLError(problem=f"{key!r} is given twice", problem_mark=mark)
        inner = f"{path}.{key}".lstrip(".")
        lines[inner] = key_node.start_mark.line + 1
        made[key] = _value(value_node, inner, lines)
    return made


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    if node.style is not None:
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.match(text):
        return int(text) if len(text) < 30 else text
    return float(text) if _FLOAT.match(text) else text


def _apply_override(data: dict[str, Any], text: str) -> list[str]:
    """Put the value into ``data``; return the dotted names of what was given."""
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise ConfigError(
            f"--set {text!r} is not of the form name=value.",
            fix="For instance: --set training.learning_rate=1e-4",
        )
    name = name.strip()
    try:
        node = yaml.compose(value, Loader=_PlainLoader)
        given = _value(node, name, {}) if node else None
    except (yaml.YAMLError, RecursionError) as error:
        why = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"--set {text!r}: the value is not readable YAML: {why}.") from error
    return [_put(data, leaf, value, text) for leaf, value in _leaves(name, given)]


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    """Take a group of fields apart, so that those which are not given stay as they are."""
    if not isinstance(value, dict) or _model_at(name) is None:
        return [(name, value)]
    return [leaf for key, part in value.items() for leaf in _leaves(f"{name}.{key}", part)]


def _put(data: dict[str, Any], name: str, value: Any, text: str) -> str:
    *parents, last = name.split(".")
    place: Any = data
    for depth, step in enumerate(parents, start=1):
        if isinstance(place, dict):
            place.setdefault(step, {})
        key = _key(place, step, text)
        if not isinstance(place[key], dict | list) and _may_be_plain(".".join(parents[:depth])):
            place[key] = {}  # a range of workers instead of a number
        place = place[key]
    place[_key(place, last, text)] = value
    return name


def _may_be_plain(name: str) -> bool:
    """Say whether a field takes a group of fields, or something else instead."""
    parent, _, last = name.rpartition(".")
    model = _model_at(parent)
    field = model.model_fields.get(last) if model else None
    is_one_of = field is not None and not isinstance(field.annotation, type)
    return is_one_of and _model_at(name) is not None


def _key(place: Any, step: str, text: str) -> str | int:
    """Return what ``step`` of a dotted name is in ``place``: a field, or an index of a list."""
    if isinstance(place, list):
        if step.isdigit() and int(step) < len(place):
            return int(step)
        raise ConfigError(
            f"--set {text!r}: {step!r} is no item of a list of {len(place)}, counted from 0.",
            fix="Give the whole list, e.g. --set 'evaluation.scorers=[bleu, chrf]'.",
        )
    if step.isdigit():
        raise ConfigError(
            f"--set {text!r}: {step!r} is an item of a list, but the recipe has no list there.",
            fix="Give the whole list, e.g. --set 'evaluation.scorers=[bleu, chrf]'.",
        )
    if not isinstance(place, dict):
        raise ConfigError(f"--set {text!r}: what {step!r} belongs to is no group of fields.")
    return step


def _validated(data: Mapping[str, Any]) -> tuple[RunConfig | None, list[tuple[str, str]]]:
    """Return the recipe and all that is wrong with it; where something is, there is no recipe.

    pydantic checks how fields go together only where each of them is right by itself. So what is
    wrong is replaced by what would do, and the rest checked again, until nothing new turns up.
    """
    told: dict[str, str] = {}
    rest: dict[str, Any] = json.loads(json.dumps(data))
    for _ in range(_ROUNDS):
        try:
            # JSON: pydantic's strict mode then takes lists for tuples but no text for numbers.
            config = RunConfig.model_validate_json(json.dumps(rest), strict=True)
            return (None if told else config), list(told.items())
        except ValidationError as error:
            found = _validation_problems(error, rest)
        known = list(told)
        told |= {name: why for name, why in found if not _follows(name, why, known)}
        for name, _ in found:
            _replace(rest, name)
    return None, list(told.items())


def _follows(name: str, why: str, known: Sequence[str]) -> bool:
    """Say whether a problem may come from what `_replace` put in the place of a known one."""
    words = set(re.findall(r"\w+", why))
    return any(
        name == other or name.startswith(f"{other}.") or _field(other) in words for other in known
    )


def _replace(data: dict[str, Any], name: str) -> None:
    """Take a wrong value out, so that its default holds; put one where one is required."""
    *parents, last = name.split(".")
    place = data
    for step in parents:
        inner = place.get(step)
        if isinstance(inner, list):  # an item of it: the whole list goes
            del place[step]
        if not isinstance(inner, dict):
            return
        place = inner
    if last in place:
        del place[last]
    elif last:
        place[last] = {} if _model_at(name) else "x"


def _field(name: str) -> str:
    """Return the name of the field itself, also for an item of a list."""
    return re.sub(r"(\.\d+)+$", "", name).rpartition(".")[2]


def _missing_files(
    data: Mapping[str, Any], base_of: Callable[[str], Path]
) -> list[tuple[str, str]]:
    problems = []
    for name, uri in locators(data):
        found = absolute(base_of(name), uri)
        is_hub = is_hub_id(uri) and name.endswith(".source") and found == uri
        if not (is_hub or found.startswith("package:") or "://" in found):
            path = Path(found)
            if not path.exists():
                looked = f" (looked at {path})" if str(path) != uri else ""
                problems.append((name, f"got {uri!r}, which does not exist{looked}"))
            elif path.is_file() and path.stat().st_size == 0:
                problems.append((name, f"got {uri!r}, which is an empty file"))
    return problems


def _validation_problems(error: ValidationError, data: Mapping[str, Any]) -> list[tuple[str, str]]:
    details = [(_dotted(detail["loc"], data), detail) for detail in error.errors()]
    told: dict[str, list[str]] = {}
    for name, detail in details:
        is_of_a_group = any(other.startswith(f"{name}.") for other, _ in details)
        if detail["type"] == "literal_error" and is_of_a_group:
            continue  # a branch of a union that was plainly not meant
        told.setdefault(name, []).append(_message(detail, name))
    return [(name, _joined(list(dict.fromkeys(texts)))) for name, texts in told.items()]


def _joined(texts: list[str]) -> str:
    """Say what was given once, then all that would do."""
    given = texts[0].partition("; ")[0] + "; "
    return "; or ".join([texts[0], *(text.removeprefix(given) for text in texts[1:])])


def _dotted(loc: tuple[int | str, ...], data: Any) -> str:
    """Keep the steps that exist in the data, or name a field: pydantic adds union branches."""
    steps: list[str] = []
    for index, step in enumerate(loc):
        is_last = index == len(loc) - 1
        names_branch = "[" in str(step)
        if isinstance(data, Mapping) and (step in data or (is_last and not names_branch)):
            steps.append(str(step))
            data = data.get(str(step))
        elif isinstance(data, list) and isinstance(step, int):
            steps.append(str(step))
            data = data[step] if step < len(data) else None
    return ".".join(steps)


def _message(detail: ErrorDetails, name: str) -> str:
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"there is no such field{_did_you_mean(name)}"
    if kind == "missing":
        return f"is missing{_documentation(name)}"
    if kind == "value_error":
        return str(context.get("error", detail["msg"]))
    if kind == "literal_error":
        return f"got {_short(given)}; choose {context['expected']}"
    if kind == "string_pattern_mismatch":
        return f"got {_short(given)}; use letters, digits, '.', '_' and '-' only, e.g. \"my-run\""
    wanted = _WANTED.get(kind) or detail["msg"].removeprefix("Input ")
    if kind == "string_type" and isinstance(given, int | float):
        wanted += ": put it in quotes"
    return f"got {_short(given)}; {wanted}{_example(name)}"


def _did_you_mean(name: str) -> str:
    parent, _, last = name.rpartition(".")
    model = _model_at(parent)
    if model is None:
        return ""
    names = list(model.model_fields)
    close = difflib.get_close_matches(last, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; fields here are {', '.join(names)}"


def _documentation(name: str) -> str:
    parent, _, last = name.rpartition(".")
    model = _model_at(parent)
    field = model.model_fields.get(last) if model else None
    text = " ".join((field.description or "").split()) if field else ""
    return f": {text}" if text else ""


def _example(name: str) -> str:
    """Return a valid value of a field, or of the list that an item is in."""
    parent, _, last = re.sub(r"(\.\d+)+$", "", name).rpartition(".")
    model = _model_at(parent)
    field = model.model_fields.get(last) if model else None
    if field is None or field.is_required():
        return ""
    values = [field.default, *(field.examples or ())]
    plain = [v for v in values if v and isinstance(v, str | int | float | list | tuple | dict)]
    return f", e.g. {' or '.join(map(json.dumps, plain))}" if plain else ""


def _model_at(path: str) -> type[Config] | None:
    model: type[Config] = RunConfig
    for step in path.split(".") if path else []:
        if step.isdigit():  # an item of a list: its type was found at the list
            continue
        field = model.model_fields.get(step)
        found = next(config_types(field.annotation), None) if field else None
        if found is None:
            return None
        model = found
    return model


def _with_line(problem: tuple[str, str], lines: Mapping[str, int]) -> str:
    name, text = problem
    line = lines.get(name)
    where = f"{name} (line {line})" if line else name
    return f"{where}: {text}" if name else text


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: object) -> str:
    return {list: "a list", str: "text", type(None): "empty"}.get(type(value), "a single value")
