"""What a plan looks like; what is in it is tested in tests/test_plan.py."""

import json

import pytest
from rich.console import Console
from transformers import LlamaConfig

from flows.planning import make_plan, show_plan
from flows.quantities import count, size
from qlora_core.config import RunConfig
from qlora_core.modeling.memory import shape_of
from qlora_core.plan import RawSize, plan_run
from tests.test_plan import CPU, plan, prepared, recipe


def shown(made) -> str:
    console = Console(record=True, width=200)
    show_plan(console, made)
    return console.export_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [(0, "0 B"), (999, "999 B"), (351_000, "351 kB"), (5_432_100, "5.43 MB"), (24e9, "24 GB"),
     (999_700, "1 MB"), (5e15, "5000 TB")],
)  # fmt: skip
def test_a_size_has_the_unit_that_fits_it(given, said):
    assert size(given) == said


def test_a_count_has_the_unit_that_fits_it():
    assert [count(n) for n in (7, 115_264, 134_515_008, 8.03e9)] == [
        "7",
        "115 k",
        "135 M",
        "8.03 B",
    ]


def test_what_is_not_known_before_the_rows_are_prepared_is_not_claimed():
    text = shown(plan(raw=RawSize(num_bytes=400_000, num_lines=1000)))

    assert "longest row at most 1024 tokens" in text
    assert "supervised share known once prepared" in text
    assert "%" not in text
    assert "40% supervised), longest row 120 tokens" in shown(plan(data=prepared()))


def test_memory_of_a_small_model_is_not_shown_as_zero():
    small = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    config = recipe()
    shape = shape_of(small, config.quantization, config.adapter)

    made = plan_run(config, shape=shape, device=CPU, is_cached=lambda role: False)

    assert "Memory of one worker [MB]" in shown(made)
    assert "Memory of one worker [GB]" in shown(plan())


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_lines_of_a_file_that_has_no_row_a_line_are_not_counted(tmp_path, tiny_llama, ending):
    path = tmp_path / f"rows.{ending}"
    path.write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 50))
    config = RunConfig.model_validate(
        {
            "name": "r",
            "model": {"source": str(tiny_llama)},
            "dataset": {"source": str(path)},
            "workspace": {"store": str(tmp_path / "store")},
        }
    )

    assert make_plan(config).training is None
