"""What a plan looks like; what is in it is tested in tests/test_plan.py."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from transformers import LlamaConfig

from flows.planning import make_plan, show_plan
from flows.quantities import count, size
from flows.shapes import make_shape_plan, show_shape_plan
from qlora_core.config import RunConfig
from qlora_core.errors import ModelError, UserError
from qlora_core.modeling.shape import shape_of
from qlora_core.plan import RawSize, plan_run
from tests.test_plan import CPU, plan, prepared, recipe
from tests.tiny import bring_own_code


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


def test_a_plan_for_several_workers_shows_what_each_strategy_needs():
    text = shown(plan(recipe(cluster={"workers": 4})))

    assert "One of 4 workers, by cluster.strategy [GB]" in text
    assert "fsdp: base in parts" in text
    assert "by cluster.strategy" not in shown(plan())


def test_a_shape_is_planned_for_gpus_that_are_not_here_and_a_model_that_is_nowhere():
    config = recipe(cluster={"workers": 8})

    made = make_shape_plan(config, "405b", 80)
    console = Console(record=True, width=200)
    show_shape_plan(console, made)
    text = console.export_text()

    assert "406 B parameters, 126 layers" in text
    assert "80 GB on a GPU" in text
    assert "cluster.strategy would be fsdp" in text


def test_the_table_of_strategies_has_the_hosts_memory_where_the_base_lies_there():
    def text(**cluster):
        console = Console(record=True, width=200)
        show_shape_plan(console, make_shape_plan(recipe(cluster=cluster), "405b", 80))
        return console.export_text()

    (row,) = [r for r in text(workers=8, offload_base=True).splitlines() if "host's memory  " in r]
    assert row.split()[-2:] == ["0.000", "33.823"]
    assert "The worker, by cluster.strategy" in text(offload_base=True)
    assert "host's memory  " not in text(workers=8)


PAIRS = [{"prompt": f"day {n}", "completion": f"noon {n}"} for n in range(9)]


@pytest.fixture
def planned(tmp_path, tiny_llama):
    def make(
        rows=PAIRS, ending="jsonl", model=tiny_llama, cluster=None, gpu_gb=None, trusts=None,
        **dataset,
    ):  # fmt: skip
        path = tmp_path / f"rows.{ending}"
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text(
                json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows))
            )
        return make_plan(
            RunConfig.model_validate(
                {
                    "name": "r",
                    "model": {"source": str(model)} | (trusts or {}),
                    "dataset": {"source": str(path), "max_length": 128} | dataset,
                    "cluster": cluster or {},
                    "workspace": {"store": str(tmp_path / "store")},
                }
            ),
            gpu_gb,
        )

    return make


def test_a_clusters_memory_is_counted_on_gpus_of_the_size_that_is_told(planned):
    cluster = {"address": "head:6379", "workers": 4}

    here, there = planned(cluster=cluster), planned(cluster=cluster, gpu_gb=24)

    assert "with --gpu-gb it is counted on GPUs" in here.notes[-1]
    assert not any("--gpu-gb" in note for note in there.notes)
    assert (there.device.kind, there.device.memory_bytes) == ("cuda", 24_000_000_000)
    assert there.device.compute_dtype == "bfloat16"
    assert not any("--gpu-gb" in note for note in planned().notes)


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_lines_of_a_file_that_has_no_row_a_line_are_not_counted(planned, ending):
    assert planned(ending=ending).training is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_length": 257}, "257 is more than the 256 tokens"),
        ({"columns": {"prompt": "question"}}, "no column 'question'"),
        ({"rows": [*PAIRS, {"prompt": "day"}]}, "rows.jsonl:10: has no column 'completion'"),
    ],
)
def test_a_plan_finds_what_preparing_would_stumble_over(planned, wrong, said):
    with pytest.raises(UserError, match=said):
        planned(**wrong)


def test_a_plan_finds_that_the_model_has_no_chat_template(planned, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()

    with pytest.raises(ModelError, match="no chat template"):
        planned(model=tmp_path / "model")


@pytest.fixture
def own_code(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "mine")
    bring_own_code(tmp_path / "mine")
    return tmp_path / "mine"


TRUSTS = {"trust_remote_code": True, "revision": "0" * 40}


def test_a_model_with_its_own_code_is_planned_as_its_code_builds_it(planned, own_code, tiny_llama):
    made = planned(model=own_code, trusts=TRUSTS, cluster={"workers": 2})

    assert made.shape.architecture == "MineForCausalLM"
    theirs = planned(model=tiny_llama).shape.model_dump(exclude={"architecture"})
    assert made.shape.model_dump(exclude={"architecture"}) == theirs
    assert any("brings its own code" in note for note in made.notes)


def test_code_of_a_model_that_builds_nothing_without_weights_is_told(planned, own_code):
    code = own_code / "modeling_mine.py"
    code.write_text(
        code.read_text() + "    def __init__(self, config):\n        raise KeyError('weights')\n"
    )

    with pytest.raises(ModelError, match=r"(?s)cannot be counted.*KeyError.*without a plan"):
        planned(model=own_code, trusts=TRUSTS)


def test_code_that_is_not_trusted_is_not_asked_about_but_refused(planned, own_code):
    with pytest.raises(ModelError, match="trust_remote_code=true"):
        planned(model=own_code)
