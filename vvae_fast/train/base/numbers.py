"""Reads numbers as people write them, on the command line and in YAML files, where PyYAML reads 1e-3 as a string."""

from __future__ import annotations

from typing import Any

MOST = 10**7  # this bound keeps a typing error from filling the memory
MOST_SEED = 2**32 - 1
MOST_LR = 1e3


class TooLarge(ValueError):
    """A number is above its bound."""


def as_int(value: object, least: int, most: int = MOST) -> int:
    """A whole number from an int, a float such as 3.0, or a text of either, such as "1e3".

    Raises ValueError, or TooLarge if the number is above `most`; the message says what was expected.
    """
    number = _number(value)
    if number is None or (isinstance(number, float) and not number.is_integer()):  # nan and inf are not integers
        raise ValueError("a whole number")
    if number < least:
        raise ValueError(f"at least {least}")
    if number > most:
        raise TooLarge(f"at most {most}")
    return int(number)


def as_positive_float(value: object, most: float = MOST_LR) -> float:
    """A positive number from an int, a float or a text of either. Raises as `as_int` does."""
    number = _number(value)
    if number is None or not number > 0:  # false for nan too
        raise ValueError(f"a positive number up to {most:g}")
    if number > most:
        raise TooLarge(f"a positive number up to {most:g}")
    return float(number)


def as_ints(value: object, least: int, most: int = MOST) -> list[int]:
    """A list of at least one whole number. Raises as `as_int` does."""
    if not isinstance(value, list) or not value:
        raise ValueError("a list")
    return [as_int(item, least, most) for item in value]


def _number(value: Any) -> int | float | None:
    """The number, or None if the value is not one; True and False are not numbers."""
    if type(value) in (int, float):
        return value
    if not isinstance(value, str):
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return None
