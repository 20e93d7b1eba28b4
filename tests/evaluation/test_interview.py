import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoTokenizer

from qlora_core.data.prepared import Prompt, write_prompts
from qlora_core.errors import ArtifactError
from qlora_core.evaluation import interview as interview_module
from qlora_core.evaluation.interview import open_interview
from qlora_core.evaluation.questions import read_questions
from qlora_core.modeling.hosted import BasePlace
from qlora_core.ports import Batch, Reply
from tests.evaluation.asking import adapted, answer_prompts, measure_likelihood

CPU = torch.device("cpu")


def test_batches_of_two_interviews_in_any_order_are_those_of_one(job):
    with open_interview(job, CPU) as alone:
        expected = {batch: alone.reply(batch) for batch in alone.batches}

    found: dict[Batch, Reply] = {}
    with open_interview(job, CPU) as first, open_interview(job, CPU) as second:
        assert first.batches == second.batches == tuple(expected)
        for n, batch in enumerate(reversed(first.batches)):
            said = (first, second)[n % 2].reply(Batch.model_validate_json(batch.model_dump_json()))
            found[batch] = Reply.model_validate_json(said.model_dump_json())

    assert found == expected
    assert {batch.kind for batch in found} == {"loss", "answers"}


def test_an_interview_says_what_measuring_in_one_go_says(job, prompts):
    with open_interview(job, CPU) as interview:
        replies = [interview.reply(batch) for batch in interview.batches]
        rows, model = interview.questions.rows, interview.model
        losses = measure_likelihood(model, rows, range(len(rows)), batch_size=3)
        tokenizer = AutoTokenizer.from_pretrained(job.model / "model")
        answers = answer_prompts(model, tokenizer, prompts, max_new_tokens=5, batch_size=3)

    nats = {n: x for r in replies for n, x in zip(r.batch.numbers, r.nats, strict=False)}
    said = {n: x for r in replies for n, x in zip(r.batch.numbers, r.answers, strict=False)}
    assert [round(nats[row.row], 6) for row in losses] == [row.nll for row in losses]
    assert [said[n] for n in range(len(prompts))] == list(answers)


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_base_that_lies_with_the_host_gives_the_replies_of_the_whole_one_and_says_where_it_lies(
    job, has_adapter, monkeypatch
):
    asked = adapted(job) if has_adapter else job
    with open_interview(asked, CPU) as interview:
        expected = [interview.reply(batch) for batch in interview.batches]

    place = BasePlace(is_hosted=True, notes=("it lies with the host",))
    monkeypatch.setattr(interview_module, "place_base", lambda *_: place)
    with open_interview(asked, CPU) as interview:
        layers = [m for m in interview.model.modules() if isinstance(m, Linear4bit)]
        assert not any(m.weight.untyped_storage().nbytes() for m in layers), "all are away"
        found = [interview.reply(batch) for batch in interview.batches]

    assert [reply.model_copy(update={"notes": ()}) for reply in found] == expected
    assert {reply.notes for reply in found} == {("it lies with the host",)}
    assert not any(reply.notes for reply in expected)
    assert {reply.batch.kind for reply in found} == {"loss", "answers"}


@pytest.mark.parametrize(("is_hosted", "num_expected"), [(False, 14), (True, 0)])
def test_a_cpu_keeps_weights_dequantised_unless_none_are_here(
    job, is_hosted, num_expected, monkeypatch
):
    place = BasePlace(is_hosted=is_hosted)
    monkeypatch.setattr(interview_module, "place_base", lambda *_: place)

    with open_interview(job, CPU) as interview:
        layers = [m for m in interview.model.modules() if isinstance(m, Linear4bit)]

        assert sum("forward" in vars(layer) for layer in layers) == num_expected


def test_other_questions_at_the_same_path_are_refused(job, prompts):
    write_prompts(job.data, [*prompts, Prompt("one more", (5, 6, 7), ("!",))])

    with pytest.raises(ArtifactError, match="are not those of this evaluation"):
        open_interview(job, CPU).__enter__()


def test_the_questions_digest_names_rows_and_prompts(job):
    assert read_questions(job.evaluation, job.data).digest() == job.questions
    fewer = job.evaluation.model_copy(update={"max_rows": 2})

    assert read_questions(fewer, job.data).digest() != job.questions
