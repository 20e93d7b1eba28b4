"""Problems of rows, gathered so that a person sees many at once, each with file and line."""

from collections import Counter
from typing import NamedTuple

from qlora_core.errors import DataError

_LINES = 20
_PLACES = 3


class Place(NamedTuple):
    """Where a row was read."""

    file: str
    """As the recipe says it."""
    number: int
    """Counted from 1."""
    unit: str = "line"
    """`line`, or `row` where a file has no lines."""

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.number}"
            if self.unit == "line"
            else f"{self.file} row {self.number}"
        )


class BadRow(ValueError):  # noqa: N818  # never leaves this package: it becomes one of the Problems
    """A row cannot be used; the text says why. Whoever knows the row's place catches it."""


class Problems:
    """Rows that make the data unusable. Rows that are merely left out are `audit.Drops`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[Place]] = {}
        self.count = 0

    def add(self, place: Place, text: object) -> None:
        """Note what is wrong with the row at ``place``."""
        self.count += 1
        told = str(text)
        if told in self._counts or len(self._counts) < _LINES:
            self._counts[told] += 1
            if self._counts[told] <= _PLACES:
                self._places.setdefault(told, []).append(place)

    def raise_if_any(self) -> None:
        """Raise all problems as one.

        Raises:
            DataError: There are some; rows with the same problem share a line, and the first 20
                lines are given.
        """
        if not self.count:
            return
        rows = "1 row cannot" if self.count == 1 else f"{self.count} rows cannot"
        more = self.count - self._counts.total()
        raise DataError(
            f"{rows} be used:\n" + "\n".join(map(self._line, self._counts)),
            why=f"... and {more} more." if more else "",
            fix="Mend or remove these rows. Nothing was left out silently, so nothing was trained.",
        )

    def _line(self, text: str) -> str:
        first, *others = self._places[text]
        named = [str(o.number) if o.file == first.file else str(o) for o in others]
        if (more := self._counts[text] - _PLACES) > 0:
            named.append(f"{more} more")
        return f"  - {first}: {text}" + (f" (also {', '.join(named)})" if named else "")
