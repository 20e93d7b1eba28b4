"""prepare_dataset: rows become tokens and labels, split, deduplicated and counted.

Whatever is left out is counted by reason and listed in `dropped.jsonl`. Held-out rows come first:
from a file of their own, and then training rows that share their prompt with one of them are left
out; or by a hash of each row. See `qlora_core.data` for how the parts work.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationConfig

from qlora_core.artifacts import PreparedDataset
from qlora_core.config import DatasetConfig, ModelConfig
from qlora_core.data.audit import Drops, Reason, summarise
from qlora_core.data.encoding import Encoder
from qlora_core.data.layouts import describe
from qlora_core.data.pipeline import Pipeline, Row, Side
from qlora_core.data.prepared import (
    Prompt,
    TokenRow,
    read_split,
    write_prompts,
    write_split,
)
from qlora_core.data.reading import estimate_rows
from qlora_core.data.split import check_sides, draw
from qlora_core.errors import ConfigError, DataError
from qlora_core.modeling.loading import context_length, load_tokenizer
from qlora_core.ports import Context, Progress, stage
from qlora_core.sources import Source

_NAME = "prepare_dataset"
_SAMPLES = 3


@dataclass(frozen=True)
class _Sides:
    """Both sides of the split."""

    train: list[Row]
    heldout: list[Row]


@stage(_NAME, version=2, facts=PreparedDataset, packages=("transformers",))
def prepare_dataset(
    ctx: Context,
    dataset: DatasetConfig,
    model: ModelConfig,
    source: Source,
    heldout_source: Source | None,
    model_source: Source,
    template_source: Source | None,
) -> PreparedDataset:
    """Tokenise the rows by the model's chat template and split them.

    Args:
        ctx: Where to write; see `PreparedDataset` for the files.
        dataset: How rows become chats.
        model: Whose tokenizer is used.
        source: The rows.
        heldout_source: Held-out rows, if they have a file of their own.
        model_source: Where the tokenizer lies.
        template_source: A chat template to use instead of the tokenizer's own.

    Raises:
        ConfigError: `max_length` is more than the model takes, or the columns fit no format.
        DataError: Rows are malformed, or no training or held-out row is left.
        ModelError: The tokenizer has no chat template, or none that ends an answer.
    """
    encoder = _encoder(dataset, model, model_source, template_source)
    with Drops(ctx.out / "dropped.jsonl") as drops:
        pipeline = Pipeline(dataset, encoder, drops)
        sides = _read(pipeline, dataset, source, heldout_source, ctx.progress)
        pipeline.problems.raise_if_any()
        _check(sides, dataset, drops, is_own_file=heldout_source is not None)
        train = _at_most(sides.train, dataset.max_rows, drops)
    prompts = _prompts(sides.heldout)
    _write(ctx.out, _Sides(train, sides.heldout), prompts, encoder)
    return _facts(ctx, pipeline, encoder, drops, len(prompts), [*train, *sides.heldout])


def check_inputs(
    dataset: DatasetConfig,
    model: ModelConfig,
    source: Source,
    heldout_source: Source | None,
    model_source: Source,
    template_source: Source | None,
) -> None:
    """Raise what `prepare_dataset` would raise, as far as the first rows of local files tell.

    Args:
        dataset: As in `prepare_dataset`, like all others.
        model: Whose tokenizer is used.
        source: The rows.
        heldout_source: Held-out rows, if they have a file of their own.
        model_source: Where the tokenizer lies.
        template_source: A chat template to use instead of the tokenizer's own.

    Raises:
        ConfigError: `max_length` is more than the model takes, or the columns fit no format.
        DataError: Rows are malformed.
        ModelError: The tokenizer has no chat template, or none that ends an answer.
    """
    encoder = _encoder(dataset, model, model_source, template_source)
    files = [found for found in (source, heldout_source) if found and found.kind == "file"]
    with TemporaryDirectory() as folder, Drops(Path(folder) / "dropped.jsonl") as drops:
        pipeline = Pipeline(dataset, encoder, drops)
        for file in files:
            pipeline.check_first_rows(file)
        pipeline.problems.raise_if_any()


def _encoder(
    dataset: DatasetConfig, model: ModelConfig, source: Source, template: Source | None
) -> Encoder:
    _check_length(dataset, model, source)
    tokenizer = load_tokenizer(model, source, template)
    escape = dataset.special_tokens_in_text == "escape"
    return Encoder(tokenizer, _stop_tokens(tokenizer, source), escape=escape)


def _check_length(dataset: DatasetConfig, model: ModelConfig, source: Source) -> None:
    longest = context_length(model, source)
    if dataset.max_length > longest:
        problem = (
            f"dataset.max_length: {dataset.max_length} is more than the {longest} tokens that "
            f"{model.source} takes; try {longest}"
        )
        raise ConfigError.of([problem], "recipe")


def _stop_tokens(tokenizer: Any, source: Source) -> tuple[str, ...]:
    """Return the tokens at which generation ends: the tokenizer's, then the model's own."""
    place = source.hub_id if source.kind == "hub" else source.local()
    ids = []
    if source.kind != "file":
        try:
            found = GenerationConfig.from_pretrained(
                place, revision=source.revision, local_files_only=True
            ).eos_token_id
        except OSError:  # many models have none; then the tokenizer's is all there is
            found = None
        ids = found if isinstance(found, list) else [found]
    texts = [tokenizer.eos_token, *(tokenizer.convert_ids_to_tokens(i) for i in ids if i)]
    return tuple(dict.fromkeys(text for text in texts if text))


def _read(
    pipeline: Pipeline,
    dataset: DatasetConfig,
    source: Source,
    heldout_source: Source | None,
    progress: Progress,
) -> _Sides:
    total = estimate_rows(source) + (estimate_rows(heldout_source) if heldout_source else 0)

    def on_read() -> None:
        progress.update(_NAME, pipeline.num_read, max(total, pipeline.num_read))

    if heldout_source is None:
        rows = list(pipeline.rows(source, _by_hash(dataset.heldout.fraction), on_read))
        return _Sides(
            [row for row in rows if row.side == "train"],
            [row for row in rows if row.side == "heldout"],
        )
    heldout = list(pipeline.rows(heldout_source, lambda _: "heldout", on_read))
    known = {row.group for row in heldout}
    train = pipeline.rows(source, lambda group: None if group in known else "train", on_read)
    return _Sides(list(train), heldout)


def _by_hash(fraction: float) -> Callable[[bytes], Side | None]:
    return lambda group: "heldout" if draw(group) < fraction else "train"


def _check(sides: _Sides, dataset: DatasetConfig, drops: Drops, *, is_own_file: bool) -> None:
    rows = [*sides.train, *sides.heldout]
    if rows and not is_own_file:
        check_sides([draw(row.group) for row in rows], dataset.heldout.fraction, dataset.heldout.by)
    for name, side in (("training", sides.train), ("held-out", sides.heldout)):
        if not side:
            raise DataError(
                f"No {name} row is left: {drops.describe()}.",
                why="; ".join(_meanings(dataset, drops)),
                fix="Change what dropped them, or give other rows.",
            )
    if not any(row.tokens.has_stop for row in sides.train):
        raise DataError(
            "In no training row is a stop token supervised, so the model would never learn to end.",
            fix="End chats with an assistant turn, and use a chat template that ends its turns "
            "with the tokenizer's eos_token (model.chat_template).",
        )


def _meanings(dataset: DatasetConfig, drops: Drops) -> list[str]:
    """Say of each reason that occurred what it means."""
    meanings: dict[Reason, str] = {
        "empty": "the prompt or the answer is blank",
        "too_long": f"longer than dataset.max_length={dataset.max_length} tokens",
        "duplicate": "a row before says the same",
        "special_tokens": "holds text of a special token (dataset.special_tokens_in_text)",
        "in_heldout": f"a held-out row has the same {dataset.heldout.by}",
        "nothing_supervised": "the chat template marks nothing as the assistant's",
    }
    return [f"{reason}: {text}" for reason, text in meanings.items() if drops.counts[reason]]


def _at_most(rows: list[Row], max_rows: int | None, drops: Drops) -> list[Row]:
    """Keep the rows of the lowest hash, in the order of the file."""
    if max_rows is None or len(rows) <= max_rows:
        return rows
    last = sorted(row.rank for row in rows)[max_rows - 1]
    for row in rows:
        if row.rank > last:
            drops.add(row.place, "over_max_rows", row.start)
    return [row for row in rows if row.rank <= last]


def _prompts(rows: Iterable[Row]) -> list[Prompt]:
    """Join held-out rows that share a prompt: all their answers are references."""
    joined: dict[tuple[int, ...], Prompt] = {}
    for prompt in (row.prompt for row in rows if row.prompt):
        others = joined[prompt.ids].references if prompt.ids in joined else ()
        references = tuple(dict.fromkeys((*others, *prompt.references)))
        joined[prompt.ids] = Prompt(prompt.text, prompt.ids, references)
    return list(joined.values())


def _write(out: Path, sides: _Sides, prompts: list[Prompt], encoder: Encoder) -> None:
    write_split(out, "train", _token_rows(sides.train))
    write_split(out, "heldout", _token_rows(sides.heldout))
    write_prompts(out, prompts)
    samples = (encoder.sample(row.tokens) for row in sides.train[:_SAMPLES])
    (out / "sample.txt").write_text("\n\n-----\n\n".join(samples) + "\n", "utf-8")


def _token_rows(rows: list[Row]) -> Iterable[TokenRow]:
    return (TokenRow(row.tokens.ids_L, row.tokens.labels_L) for row in rows)


def _facts(
    ctx: Context,
    pipeline: Pipeline,
    encoder: Encoder,
    drops: Drops,
    num_prompts: int,
    kept: list[Row],
) -> PreparedDataset:
    if drops.counts:
        ctx.progress.say(_NAME, f"{drops.describe()} (dropped.jsonl lists them)")
    notes = _notes(pipeline, encoder)
    for note in notes:
        ctx.progress.say(_NAME, note)
    layout = pipeline.layout
    return PreparedDataset(
        num_rows_read=pipeline.num_read,
        dropped=dict(sorted(drops.counts.items())),
        train=summarise(read_split(ctx.out, "train")),
        heldout=summarise(read_split(ctx.out, "heldout")),
        num_prompts=num_prompts,
        format=layout.format if layout else "",
        num_special_escaped=sum(row.tokens.num_escaped for row in kept),
        notes=notes,
        sample=encoder.sample(kept[0].tokens),
    )


def _notes(pipeline: Pipeline, encoder: Encoder) -> tuple[str, ...]:
    notes = [describe(pipeline.layout)] if pipeline.layout else []
    if encoder.num_double_starts:
        notes.append(
            f"{encoder.num_double_starts} rows began with the beginning-of-sequence token twice; "
            "one was kept."
        )
    return (*notes, *encoder.chat_notes())
