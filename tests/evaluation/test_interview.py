import pytest
import torch
from transformers import AutoTokenizer

from qlora_core.config import EvaluationConfig
from qlora_core.data.prepared import Prompt, write_prompts
from qlora_core.errors import ArtifactError
from qlora_core.evaluation.interview import open_interview
from qlora_core.evaluation.questions import read_questions
from qlora_core.ports import AskJob, Batch, Reply
from tests.evaluation.asking import answer_prompts, measure_likelihood
from tests.training.conftest import write_dataset

CPU = torch.device("cpu")
SETTINGS = EvaluationConfig(batch_size=3, max_new_tokens=5)


@pytest.fixture
def job(tmp_path, nf4_base, tokenizer, prompts) -> AskJob:
    tokenizer.save_pretrained(nf4_base / "model")
    data = write_dataset(tmp_path / "data", num_heldout=8)
    write_prompts(data, prompts)
    return AskJob(
        model=nf4_base,
        is_merged=False,
        adapter=None,
        data=data,
        evaluation=SETTINGS,
        questions=read_questions(SETTINGS, data).digest(),
        scratch=tmp_path,
    )


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


def test_other_questions_at_the_same_path_are_refused(job, prompts):
    write_prompts(job.data, [*prompts, Prompt("one more", (5, 6, 7), ("!",))])

    with pytest.raises(ArtifactError, match="are not those of this evaluation"):
        open_interview(job, CPU).__enter__()


def test_the_questions_digest_names_rows_and_prompts(job):
    assert read_questions(SETTINGS, job.data).digest() == job.questions
    fewer = SETTINGS.model_copy(update={"max_rows": 2})

    assert read_questions(fewer, job.data).digest() != job.questions
