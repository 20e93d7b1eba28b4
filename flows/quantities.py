"""Numbers for people: with the unit in which they have one to three digits before the point."""

_BYTES = ("B", "kB", "MB", "GB", "TB")
_COUNTS = ("", " k", " M", " B")


def size(num_bytes: float) -> str:
    """Return bytes as in ``538 MB``; a kB is 1000 bytes."""
    power = _power(num_bytes, len(_BYTES))
    return f"{_digits(num_bytes / 1000**power)} {_BYTES[power]}"


def count(number: float) -> str:
    """Return a count as in ``135 M``."""
    power = _power(number, len(_COUNTS))
    return f"{_digits(number / 1000**power)}{_COUNTS[power]}"


def unit_of(num_bytes: float) -> tuple[str, int]:
    """Return the unit in which to show a whole table, and its bytes."""
    power = _power(num_bytes, len(_BYTES))
    return _BYTES[power], 1000**power


def _power(number: float, count: int) -> int:
    """Return how often 1000 divides a number, as it will be rounded."""
    power = 0
    while number >= 999.5 and power < count - 1:
        number, power = number / 1000, power + 1
    return power


def _digits(number: float) -> str:
    """Return three digits, without zeros behind a point."""
    return f"{number:.0f}" if number >= 99.95 else f"{number:.3g}"
