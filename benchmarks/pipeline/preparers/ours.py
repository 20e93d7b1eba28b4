"""Our own preparation: the stage `prepare_dataset`, as a run calls it, and the plan of all steps.

The stage does more than tokenise: it opens the tokenizer, splits, drops what is twice, empty or too
long, and writes Parquet that it reads again to count. Rows are laid end to end only while training;
what takes the place of packing beforehand is the batch plan, which is made here too.
"""

import json
from pathlib import Path

from benchmarks.pipeline.preparers.order import Order, Prepared, fulfil
from benchmarks.stage_context import stage_context
from qlora_core.config import DatasetConfig, HeldoutConfig, ModelConfig
from qlora_core.data.encoding import Encoder
from qlora_core.data.formats import Turn
from qlora_core.data.prepared import read_split
from qlora_core.modeling.loading import load_tokenizer
from qlora_core.sources import find_source
from qlora_core.stages.prepare import prepare_dataset
from qlora_core.training.batching import make_plan

_BATCH = 512  # rows at a call, as in `qlora_core.data.pipeline`
_GLOBAL_BATCH = 8


def prepare(order: Order, found: Prepared, folder: Path) -> None:
    """Prepare the rows."""
    with found.timed("stage"):
        _run_stage(order, folder)
        rows = read_split(folder, "train")
        plan = make_plan(seed=0, num_rows=len(rows), global_batch=_GLOBAL_BATCH, epochs=1.0)
        for step in range(1, plan.num_steps + 1):
            plan.rows(step)
    _tokenise(order, found)


def _run_stage(order: Order, folder: Path) -> None:
    dataset = DatasetConfig(
        source=str(order.rows),
        columns={"prompt": "question", "completion": "answer"},
        max_length=order.max_length,
        heldout=HeldoutConfig(fraction=0.01),
    )
    model, source = ModelConfig(source=str(order.model)), find_source(str(order.model))
    rows = find_source(str(order.rows))
    prepare_dataset(stage_context(folder), dataset, model, rows, None, source, None)


def _tokenise(order: Order, found: Prepared) -> None:
    model = ModelConfig(source=str(order.model))
    tokenizer = load_tokenizer(model, find_source(str(order.model)), None)
    rows = [json.loads(line) for line in order.rows.read_text("utf-8").splitlines()]
    with found.timed("tokenise"):
        encoder = Encoder(tokenizer, (tokenizer.eos_token,), escape=True)
        encoded = []
        for first in range(0, len(rows), _BATCH):
            rendered = [
                encoder.render((Turn("user", row["question"]), Turn("assistant", row["answer"])))
                for row in rows[first : first + _BATCH]
            ]
            encoded += [row for row in encoder.encode(rendered, as_chat=True) if row is not None]
    found.num_rows = len(encoded)
    found.num_tokens = sum(len(row.ids_L) for row in encoded)
    found.num_supervised = sum(int((row.labels_L >= 0).sum()) for row in encoded)


if __name__ == "__main__":
    fulfil(prepare)
