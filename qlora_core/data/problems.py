"""Problems of rows, gathered so that a person sees many at once, each with file and line."""

from typing import NamedTuple

from qlora_core.errors import DataError

_SHOWN = 20


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
        self._shown: list[str] = []
        self.count = 0

    def add(self, place: Place, text: object) -> None:
        """Note what is wrong with the row at ``place``."""
        self.count += 1
        if len(self._shown) < _SHOWN:
            self._shown.append(f"  - {place}: {text}")

    def raise_if_any(self) -> None:
        """Raise all problems as one.

        Raises:
            DataError: There are some; the first 20 are listed.
        """
        if not self.count:
            return
        rows = "1 row cannot" if self.count == 1 else f"{self.count} rows cannot"
        more = self.count - len(self._shown)
        raise DataError(
            f"{rows} be used:\n" + "\n".join(self._shown),
            why=f"... and {more} more." if more else "",
            fix="Mend or remove these rows. Nothing was left out silently, so nothing was trained.",
        )
