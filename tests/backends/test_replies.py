import pytest

from qlora_core.backends.replies import Replies, read_replies
from qlora_core.ports import Answer, Batch, Reply

LOSS = Reply(batch=Batch(kind="loss", numbers=(3, 1)), nats=(0.1 + 0.2, 1e-17))
ANSWERS = Reply(
    batch=Batch(kind="answers", numbers=(3, 1)),
    answers=(
        Answer(text="a\n\u2028b", num_tokens=2, truncated=False),
        Answer(text="", num_tokens=0, truncated=True),
    ),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "replies.jsonl"


def test_replies_come_back_bit_for_bit(path):
    replies = Replies(path)

    replies.keep(LOSS)
    replies.keep(ANSWERS)

    assert list(read_replies(path)) == [LOSS, ANSWERS]
    assert path.read_bytes().count(b"\n") == 2


def test_a_batch_is_known_by_its_kind_and_numbers(path):
    Replies(path).keep(LOSS)

    known = Replies(path)

    assert LOSS.batch in known
    assert ANSWERS.batch not in known
    assert Batch(kind="loss", numbers=(1, 3)) not in known


def test_what_a_killed_process_left_unfinished_is_dropped_and_written_anew(path):
    Replies(path).keep(LOSS)
    with path.open("a") as file:
        file.write(ANSWERS.model_dump_json()[:-5])

    again = Replies(path)
    assert ANSWERS.batch not in again
    again.keep(ANSWERS)

    assert list(read_replies(path)) == [LOSS, ANSWERS]


def test_there_are_none_without_a_file(path):
    assert list(read_replies(path)) == []
