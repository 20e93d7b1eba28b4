"""Which format a file has: told from the recipe and from the names of its columns."""

import difflib
from collections.abc import Iterator, Mapping, Sequence

from qlora_core.config import DatasetConfig
from qlora_core.data.formats import Format, Layout
from qlora_core.data.templating import RowTemplate
from qlora_core.errors import ConfigError, DataError

_USUAL: Mapping[Format, Sequence[Mapping[str, str]]] = {
    "messages": ({"messages": "messages"}, {"messages": "conversations"}),
    "alpaca": ({"instruction": "instruction", "input": "input", "output": "output"},),
    "completion": (
        {"prompt": "prompt", "completion": "completion"},
        {"prompt": "prompt", "completion": "response"},
        {"prompt": "question", "completion": "answer"},
        {"prompt": "input", "completion": "output"},
    ),
    "text": ({"text": "text"},),
}
"""Names that public datasets give to the fields, the likeliest first."""

_OPTIONAL = ("input", "system")
_TEMPLATED: Mapping[Format, str] = {"completion": "prompt", "text": "text"}
"""The field that `dataset.template` makes, so that no column need hold it."""


def choose_layout(config: DatasetConfig, available: Sequence[str], file: str) -> Layout:
    """Return how to read a file whose first row has the columns ``available``.

    Raises:
        ConfigError: `dataset.columns` or `dataset.template` do not go with `dataset.format`.
        DataError: The columns do not hold what the format needs.
    """
    formats = _possible_formats(config)
    for field, column in config.columns.items():
        if column not in available:
            raise _no_column(column, field, available, file)
    for name, columns in _candidates(formats, config):
        needed = [column for field, column in columns.items() if field not in _OPTIONAL]
        if all(column in available for column in needed):
            found = {field: column for field, column in columns.items() if column in available}
            template = RowTemplate(config.template) if config.template else None
            return Layout(name, found, template, config.system)
    if len(formats) == 1:
        name, columns = next(_candidates(formats, config))
        field = next(f for f, c in columns.items() if f not in _OPTIONAL and c not in available)
        raise _no_column(columns[field], field, available, file)
    raise DataError(
        f"{file}: no known format has the columns {', '.join(available) or '(none)'}.",
        fix="Say which column holds what, e.g. dataset.columns: {prompt: "
        f"{available[0] if available else 'question'}, completion: "
        f"{available[-1] if available else 'answer'}}}; or dataset.format: text with a template.",
    )


def describe(layout: Layout) -> str:
    """Say in words which column is read as what."""
    fields = ", ".join(f"{field} from {column!r}" for field, column in layout.columns.items())
    made = _TEMPLATED.get(layout.format)
    template = f"{made} by the template" if layout.template else ""
    return f"format {layout.format}: {', '.join(part for part in (fields, template) if part)}"


def _candidates(
    formats: Sequence[Format], config: DatasetConfig
) -> Iterator[tuple[Format, dict[str, str]]]:
    for name in formats:
        for usual in _USUAL[name]:
            columns = {**usual, **config.columns}
            made = _TEMPLATED.get(name)
            if config.template and made and made not in config.columns:
                del columns[made]
            yield name, columns


def _possible_formats(config: DatasetConfig) -> list[Format]:
    fields = {name: _fields(name) for name in _USUAL}
    chosen = list(_USUAL) if config.format == "auto" else [config.format]
    possible = [name for name in chosen if set(config.columns) <= set(fields[name])]
    if not possible:
        known = "; ".join(f"{name}: {', '.join(fields[name])}" for name in chosen)
        raise ConfigError.of(
            [f"dataset.columns={config.columns} fits no format; the fields are {known}"], "recipe"
        )
    if config.template:
        possible = [name for name in possible if name in _TEMPLATED]
    if not possible:
        raise ConfigError.of(
            [
                "dataset.template is only for the formats completion and text, but "
                f"dataset.format={config.format!r} and columns={config.columns} say otherwise"
            ],
            "recipe",
        )
    return possible


def _fields(name: Format) -> list[str]:
    system = [] if name in ("messages", "text") else ["system"]
    return [*_USUAL[name][0], *system]


def _no_column(column: str, field: str, available: Sequence[str], file: str) -> DataError:
    close = difflib.get_close_matches(column, available, n=1) or list(available[:1])
    return DataError(
        f"{file} has no column {column!r}; it has {', '.join(available) or 'none'}.",
        fix=f"Name the column that holds the {field}, e.g. dataset.columns: {{{field}: {close[0]}}}"
        if close
        else "Give a file with columns.",
    )
