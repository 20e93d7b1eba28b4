"""Special tokens inside the text of rows, and how they are made harmless.

A tokenizer looks for its special tokens in the *rendered* chat, so a row that quotes `<|im_end|>`
would end its own turn, and a stranger's row could open a system turn. To read such text as ordinary
characters, a break (a noncharacter) is put after its first character before rendering, and the
tokens of the break are taken out after tokenising. Everything around it is tokenised as usual.
"""

import re
from typing import Any

from qlora_core.data.formats import BREAK, Content, Turn


class SpecialTokens:
    """The special tokens of one tokenizer, as text."""

    def __init__(self, tokenizer: Any) -> None:
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        longest_first = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def count(self, text: str) -> int:
        """Return how many special tokens the tokenizer would see in ``text``."""
        return sum(1 for _ in self._pattern.finditer(text))

    def count_in(self, content: Content) -> int:
        """Return how many special tokens the text of a row would smuggle in."""
        texts = [content] if isinstance(content, str) else [turn.content for turn in content]
        return sum(self.count(text) for text in texts)

    def match(self, text: str, at: int) -> str | None:
        """Return the special token that stands in ``text`` at ``at``, if any."""
        found = self._pattern.match(text, at)
        return found.group() if found else None

    def contained_in(self, text: str) -> bool:
        """Say whether there is one in ``text``."""
        return self._pattern.search(text) is not None

    def broken(self, content: Content) -> Content:
        """Return ``content`` with every special token broken, so that none is one."""
        if isinstance(content, str):
            return self._break(content)
        return tuple(Turn(turn.role, self._break(turn.content)) for turn in content)

    def _break(self, text: str) -> str:
        while self.contained_in(text):  # breaking one can uncover another that overlapped it
            text = self._pattern.sub(lambda m: m.group()[0] + BREAK + m.group()[1:], text)
            if any(len(m.group()) == 1 for m in self._pattern.finditer(text)):
                return text  # a single character cannot be broken; `encoding` notices
        return text
