import json

from qlora_core.config import (
    CustomScorer,
    DatasetConfig,
    EvaluationConfig,
    ModelConfig,
    QuantizationConfig,
    RunConfig,
)

CONFIG = RunConfig(
    name="x", model=ModelConfig(source="org/m"), dataset=DatasetConfig(source="rows.jsonl")
)


def test_where_something_lies_is_not_hashed_but_what_it_does_is():
    a = EvaluationConfig(scorers=("bleu", CustomScorer(file="/a/s.py", function="f")))
    b = EvaluationConfig(scorers=("bleu", CustomScorer(file="/b/s.py", function="f")))
    c = EvaluationConfig(scorers=("bleu", CustomScorer(file="/a/s.py", function="g")))

    assert a.hashed() == b.hashed()
    assert a.hashed() != c.hashed()
    assert "source" not in ModelConfig(source="org/m").hashed()


def test_runtime_parts_are_never_hashed():
    hashed = CONFIG.hashed()

    assert not {"workspace", "cluster", "snapshots"} & set(hashed)
    assert hashed["training"]["learning_rate"] == 2e-4


def test_what_only_buys_speed_with_memory_is_not_hashed():
    usual, off = QuantizationConfig(), QuantizationConfig(keep_dequantized="off")

    assert usual.hashed() == off.hashed()
    assert usual.hashed() != QuantizationConfig(double=False).hashed()


def test_defaults_are_hashed_so_a_new_default_is_a_new_result():
    assert "weight_decay" in CONFIG.hashed()["training"]


def test_every_field_is_documented_in_the_schema():
    schema = RunConfig.model_json_schema()

    for name, part in {"RunConfig": schema, **schema["$defs"]}.items():
        for field, entry in part.get("properties", {}).items():
            is_group = "$ref" in entry or "$ref" in json.dumps(entry.get("allOf", ""))
            assert is_group or entry.get("description"), f"{name}.{field} has no documentation"


def test_a_config_survives_json():
    assert RunConfig.model_validate_json(CONFIG.model_dump_json()) == CONFIG
