"""Made-up chats, for machines without GSM8K: nonsense, but as long as real ones.

A question and an answer are words drawn from a short list of common ones, each about one token for
any tokenizer. With the template around them chats have 50 to 390 tokens, 38 % of them in answers.
"""

import random
from collections.abc import Iterator

_TEXT = """
the of and to in is that it for was on are with as at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about
out many then them these so some her would make like him into time has look two more write go see
number no way could people my than first water been call who its now find long down day did get
"""
WORDS = _TEXT.split()
NUM_TEMPLATE_TOKENS = 37
SHORTEST, LONGEST = 50, 390
SHARE_OF_ANSWER = 0.38


def made_up_chats(num_rows: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield chats as GSM8K has them: a question and an answer."""
    source = random.Random(f"chats {seed}")
    for _ in range(num_rows):
        # the mean lies below the middle, as in real data: short chats are more
        length = source.triangular(SHORTEST, LONGEST, 170)
        num_answer = max(3, round(SHARE_OF_ANSWER * length))
        num_question = max(3, round(length - num_answer - NUM_TEMPLATE_TOKENS))
        yield {"question": _words(source, num_question), "answer": _words(source, num_answer)}


def _words(source: random.Random, number: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(number))
