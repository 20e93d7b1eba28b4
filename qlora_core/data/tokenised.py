"""A text's tokens, and which of them stand for given characters of it."""

from bisect import bisect_left, bisect_right
from typing import Any

from qlora_core.data.chat import Span

Offsets = list[tuple[int, int]]
"""Where each token begins and ends [characters]; they ascend."""


class Tokenised:
    """A text's tokens; where they stand is asked of the core, as far as it can say.

    A list of all places costs more than tokens and labels together.
    """

    def __init__(self, ids: list[int], offsets: Offsets | None, core: Any = None) -> None:
        self.ids, self._offsets, self._core = ids, offsets, core

    @property
    def offsets(self) -> Offsets:
        """Where each token begins and ends; they ascend."""
        if self._offsets is None:
            self._offsets = self._core.offsets
        return self._offsets

    def within(self, span: Span) -> tuple[int, int]:
        """Return (first, past) of the tokens that share a character with ``span``."""
        if self._offsets is None and span.start < span.end:
            first = self._core.char_to_token(span.start)
            past = self._core.char_to_token(span.end - 1)
            if first is not None and past is not None:  # else white space that no token holds
                while past < len(self.ids) and self._core.token_to_chars(past)[0] < span.end:
                    past += 1  # a letter may be several tokens
                return first, past
        first = bisect_right(self.offsets, span.start, key=lambda place: place[1])
        past = bisect_left(self.offsets, span.end, key=lambda place: place[0])
        return first, max(first, past)
