import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_core.artifacts import (
    AdapterCheckpoint,
    Artifact,
    EvalReport,
    MergedModel,
    PreparedDataset,
    QuantizedBase,
)
from qlora_core.backends.memory import MemoryRegistry, MemoryTracker, RecordingProgress
from qlora_core.config import AdapterConfig, CustomScorer, EvaluationConfig
from qlora_core.data.prepared import (
    IGNORED,
    Prompt,
    TokenRow,
    read_split,
    write_prompts,
    write_split,
)
from qlora_core.errors import DataError, LaunchError, UserError
from qlora_core.evaluation import interview
from qlora_core.evaluation.interview import open_interview
from qlora_core.evaluation.records import read_records
from qlora_core.evaluation.table import side_by_side
from qlora_core.modeling.hosted import BasePlace
from qlora_core.modeling.loading import load_base
from qlora_core.modeling.lora import attach_adapter, save_adapter
from qlora_core.ports import Context, Reply, Services
from qlora_core.sources import find_source
from qlora_core.stages.evaluate import evaluate_model
from qlora_core.store import Store
from qlora_core.training.journal import LOG_FILE
from tests.tiny import bring_own_code

CONFIG = EvaluationConfig(
    scorers=("exact_match", "bleu", "chrf", "rouge_l"), max_new_tokens=6, batch_size=4,
    num_samples=2,
)  # fmt: skip


def artifact(path: Path, facts: type) -> Artifact:
    """A sealed folder; evaluation asks its facts for nothing."""
    return Artifact[facts].model_construct(
        stage="made", key="k" * 64, digest="d" * 64, path=path, facts=facts.model_construct()
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products are quicker on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory) -> dict[str, Artifact]:
    """Base, adapter, merged model and held-out rows, as their stages leave them."""
    folder = tmp_path_factory.mktemp("made")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=nf4, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    merged = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    for name, model in (("base", base), ("merged", merged)):
        model.save_pretrained(folder / name / "model")
        tokenizer.save_pretrained(folder / name / "model")
    adapted = attach_adapter(load_base(folder / "base"), AdapterConfig(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_adapter(adapted, folder / "adapter", "base", None)
    write_data(folder / "data")
    return {
        "data": artifact(folder / "data", PreparedDataset),
        "base": artifact(folder / "base", QuantizedBase),
        "adapter": artifact(folder / "adapter", AdapterCheckpoint),
        "merged": artifact(folder / "merged", MergedModel),
    }


def write_data(folder: Path, *, num_rows: int = 9, num_prompts: int = 5, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, 290, n).tolist() for n in generator.integers(8, 20, num_rows)]
    folder.mkdir()
    write_split(folder, "heldout", [TokenRow(row, [IGNORED] * 5 + row[5:]) for row in ids])
    asked = [tuple(generator.integers(3, 290, 5 + n).tolist()) for n in range(num_prompts)]
    references = [("noon", "at noon")[: 1 + n % 2] for n in range(num_prompts)]
    pairs = enumerate(zip(asked, references, strict=True))
    write_prompts(folder, [Prompt(f"when? {n}", ids, refs) for n, (ids, refs) in pairs])
    return folder


def evaluate(
    folder: Path, made, *, config=CONFIG, subject="base", data=None, scorers=(), crew=None
):
    """Run the stage on one subject and return its artefact."""
    progress = RecordingProgress()
    (folder / subject).mkdir(parents=True)
    ctx = Context(
        folder / subject, folder, MemoryTracker(), MemoryRegistry(), launcher=None,
        progress=progress, crew=crew,
    )  # fmt: skip
    facts = evaluate_model(
        ctx,
        config,
        data or made["data"],
        made["base"],
        made["adapter"] if subject == "tuned" else None,
        made["merged"] if subject == "merged" else None,
        scorers,
    )
    return Artifact[EvalReport](
        stage="evaluate", key="k", digest="d", path=folder / subject, facts=facts
    )


@pytest.mark.parametrize("subject", ["base", "tuned", "merged"])
def test_loss_is_that_of_the_subject_as_transformers_computes_it(tmp_path, made, subject):
    report = evaluate(tmp_path, made, subject=subject).facts

    model = oracle_model(made, subject)
    rows = read_split(made["data"].path, "heldout")
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for i in range(len(rows)):
            ids = torch.tensor(rows.input_ids(i).astype(np.int64))[None]
            labels = torch.tensor(rows.labels(i).astype(np.int64))[None]
            nats += float(model(input_ids=ids, labels=labels).loss) * int(rows.num_supervised[i])
            tokens += int(rows.num_supervised[i])
    assert report.subject == subject
    assert report.metrics["loss"].value == pytest.approx(nats / tokens, rel=1e-5)
    assert report.metrics["loss"].num_rows == 9
    assert report.metrics["perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def oracle_model(made, subject: str):
    from peft import PeftModel

    if subject == "merged":
        return AutoModelForCausalLM.from_pretrained(
            made["merged"].path / "model", dtype=torch.float32
        ).eval()
    base = AutoModelForCausalLM.from_pretrained(made["base"].path / "model")
    model = PeftModel.from_pretrained(base, made["adapter"].path) if subject == "tuned" else base
    return model.train()  # in eval mode bitsandbytes rounds to bfloat16 on CPUs that have it


def test_a_report_holds_all_metrics_samples_and_rows(tmp_path, made):
    report = evaluate(tmp_path, made)

    facts, records = report.facts, read_records(report.path)
    assert list(facts.metrics) == ["loss", "perplexity", "exact_match", "bleu", "chrf", "rouge_l"]
    assert facts.metrics["exact_match"].num_rows == 5
    assert [sample.prompt for sample in facts.samples] == ["when? 0", "when? 2"]
    assert len(records.losses) == 9
    assert [answer.prompt for answer in records.answers] == [f"when? {n}" for n in range(5)]
    assert records.answers[1].references == ("noon", "at noon")
    assert facts.num_truncated == sum(answer.truncated for answer in records.answers)


def test_the_same_evaluation_writes_the_same_bytes(tmp_path, made):
    first = evaluate(tmp_path / "first", made, subject="tuned").path
    second = evaluate(tmp_path / "second", made, subject="tuned").path

    names = sorted(path.name for path in first.iterdir())
    assert names == ["report.json", "rows.jsonl"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_report_json_holds_the_facts_without_the_seconds(tmp_path, made):
    report = evaluate(tmp_path, made)

    written = json.loads((report.path / "report.json").read_text())

    expected = json.loads(report.facts.model_dump_json(exclude={"seconds"}))
    assert written == expected
    assert "seconds" not in written


def test_subjects_are_compared_side_by_side_on_the_same_rows(tmp_path, made):
    base, tuned, merged = (
        evaluate(tmp_path, made, subject=subject) for subject in ("base", "tuned", "merged")
    )

    table = {row.metric: row for row in side_by_side(base, tuned, merged)}

    loss = table["loss"]
    assert loss.tuned_against_base.paired
    assert loss.tuned_against_base.difference == pytest.approx(loss.tuned.value - loss.base.value)
    assert loss.tuned_against_base.difference != 0
    assert set(table) == {"loss", "perplexity", "exact_match", "bleu", "chrf", "rouge_l"}


def test_an_own_scorer_sees_every_answer(tmp_path, made):
    path = tmp_path / "judge.py"
    path.write_text("def shortness(prediction, reference): return 1 / (1 + len(prediction))")
    scorer = CustomScorer(file=str(path), function="shortness")
    config = CONFIG.model_copy(update={"scorers": ("exact_match", scorer)})

    report = evaluate(tmp_path, made, config=config, scorers=(find_source(str(path)),))

    answers = read_records(report.path).answers
    expected = np.mean([1 / (1 + len(answer.prediction)) for answer in answers])
    assert report.facts.metrics["shortness"].value == pytest.approx(expected)


def test_an_unusable_scorer_is_found_before_any_model_is_loaded(tmp_path, made):
    path = tmp_path / "judge.py"
    path.write_text("import nothing_there")
    scorer = CustomScorer(file=str(path), function="judge")
    config = CONFIG.model_copy(update={"scorers": (scorer,)})
    no_model = made | {"base": artifact(tmp_path / "nowhere", QuantizedBase)}

    with pytest.raises(UserError, match="nothing_there"):
        evaluate(tmp_path, no_model, config=config, scorers=(find_source(str(path)),))


def test_at_most_max_rows_are_measured_evenly_spread_and_it_is_said(tmp_path, made):
    config = CONFIG.model_copy(update={"max_rows": 3})

    report = evaluate(tmp_path, made, config=config)

    records = read_records(report.path)
    assert [row.row for row in records.losses] == [0, 3, 6]
    assert [answer.prompt for answer in records.answers] == ["when? 0", "when? 1", "when? 3"]
    assert "the loss is measured on 3 of 9 rows" in report.facts.notes


def test_without_generation_only_the_loss_is_measured(tmp_path, made):
    config = CONFIG.model_copy(update={"generate": False})

    report = evaluate(tmp_path, made, config=config)

    assert list(report.facts.metrics) == ["loss", "perplexity"]
    assert report.facts.samples == ()
    assert report.facts.notes == ()


def test_plain_text_has_nothing_to_answer_and_says_so(tmp_path, made):
    data = artifact(write_data(tmp_path / "data", num_prompts=0), PreparedDataset)

    report = evaluate(tmp_path, made, data=data)

    assert list(report.facts.metrics) == ["loss", "perplexity"]
    assert report.facts.notes == ("nothing was generated: plain text has no prompts to answer",)


def test_no_held_out_row_is_an_error(tmp_path, made):
    data = artifact(write_data(tmp_path / "data", num_rows=0), PreparedDataset)

    with pytest.raises(DataError, match="None of the 0 held-out rows"):
        evaluate(tmp_path, made, data=data)


def test_the_digest_names_the_rows_that_were_measured(tmp_path, made):
    config = CONFIG.model_copy(update={"generate": False})
    copy = artifact(write_data(tmp_path / "copy"), PreparedDataset)
    (copy.path / "train.parquet").write_bytes(b"more training rows change no held-out row")
    other = artifact(write_data(tmp_path / "other", seed=1), PreparedDataset)

    digests = [
        evaluate(tmp_path / str(i), made, config=config, data=data).facts.dataset_digest
        for i, data in enumerate((made["data"], copy, other))
    ]
    fewer = evaluate(tmp_path / "3", made, config=config.model_copy(update={"max_rows": 3}))

    assert digests[0] == digests[1]
    assert len({*digests, fewer.facts.dataset_digest}) == 3


def test_progress_is_told_up_to_the_end(tmp_path, made):
    progress = RecordingProgress()
    ctx = Context(
        tmp_path, tmp_path, MemoryTracker(), MemoryRegistry(), launcher=None, progress=progress
    )

    evaluate_model(ctx, CONFIG, made["data"], made["base"], None, None, ())

    assert {stage for stage, *_ in progress.updates} == {"evaluate base"}
    assert [done for _, done, *_ in progress.updates] == [4, 8, 9, 13, 14]
    assert {total for _, _, total, _ in progress.updates} == {14}


def test_a_merged_model_that_brings_its_own_trusted_code_is_measured(tmp_path, made, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(made["merged"].path, tmp_path / "mine")
    bring_own_code(tmp_path / "mine" / "model")
    mine = made | {"merged": artifact(tmp_path / "mine", MergedModel)}

    report = evaluate(tmp_path / "a", mine, subject="merged").facts

    assert report.metrics == evaluate(tmp_path / "b", made, subject="merged").facts.metrics


class ReversedCrew:
    """Workers who reply last to what is asked first; replies travel as text."""

    def ask(self, job, on_reply):
        with open_interview(job, torch.device("cpu")) as interview:
            for batch in reversed(interview.batches):
                text = interview.reply(batch).model_dump_json()
                on_reply(Reply.model_validate_json(text))


@pytest.mark.parametrize("subject", ["base", "tuned", "merged"])
def test_who_replies_first_leaves_no_trace_in_the_report(tmp_path, made, subject):
    alone = evaluate(tmp_path / "alone", made, subject=subject).path
    crew = evaluate(tmp_path / "crew", made, subject=subject, crew=ReversedCrew()).path

    for name in ("report.json", "rows.jsonl"):
        assert (crew / name).read_bytes() == (alone / name).read_bytes()


def test_what_workers_said_of_an_evaluation_goes_with_the_run(tmp_path, made):
    class Talking(ReversedCrew):
        def ask(self, job, on_reply) -> None:
            (job.scratch / LOG_FILE).write_text("(worker) something odd\n")
            raise LaunchError("lost too often")

    tracker, used = MemoryTracker(), (made["data"], made["base"], made["adapter"], None, ())
    ctx = Context(
        tmp_path, tmp_path, tracker, MemoryRegistry(), launcher=None,
        progress=RecordingProgress(), crew=Talking(),
    )  # fmt: skip
    with pytest.raises(LaunchError):
        evaluate_model(ctx, CONFIG, *used)

    assert tracker.texts == {"logs/evaluate_tuned.log": "(worker) something odd\n"}


@pytest.mark.parametrize("crew", [None, ReversedCrew()], ids=["here", "crew"])
def test_where_the_base_lay_is_told_once_and_leaves_no_trace_in_the_files(
    tmp_path, made, monkeypatch, crew
):
    whole = evaluate(tmp_path / "whole", made, subject="tuned")
    place = BasePlace(is_hosted=True, notes=("it lies with the host",))
    monkeypatch.setattr(interview, "place_base", lambda *_: place)

    hosted = evaluate(tmp_path / "hosted", made, subject="tuned", crew=crew)

    assert hosted.facts.notes == (*whole.facts.notes, "it lies with the host")
    for name in ("report.json", "rows.jsonl"):
        assert (hosted.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.parametrize("wanted", [False, True])
def test_whether_the_base_shall_lie_with_the_host_reaches_whoever_asks(
    tmp_path, made, monkeypatch, wanted
):
    heard = []

    def place(job, *_):
        heard.append(job.offloads_base)
        return BasePlace()

    monkeypatch.setattr(interview, "place_base", place)
    services = Services(
        MemoryTracker(), MemoryRegistry(), launcher=None, progress=RecordingProgress(),
        offloads_base=wanted,
    )  # fmt: skip

    Store(tmp_path).produce(
        evaluate_model, services, CONFIG, made["data"], made["base"], None, None, ()
    )

    assert heard == [wanted]
