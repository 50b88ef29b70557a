"""Mean and standard deviation of data with a Gaussian likelihood, which scale them to the size that networks expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vvae_fast.train.base.extras import require
from vvae_fast.train.data.idx import DataError

if TYPE_CHECKING:
    import numpy as np

CHUNK = 2**22  # numbers converted to float64 at a time
WITHIN = 1e30  # bounds values, and its inverse bounds standard deviations: squares and quotients stay in float32
RESOLUTION = 0.01  # standard deviations: float32 must tell values apart at this distance
NAMED = 5  # columns named in a message


def statistics(train: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) of the training rows [N, *shape], float64: see docs/math.md (50).

    In a table [N, P] each column has both: [P]. In arrays of rank 3 or more, such as images, all values are of one
    kind and share them: [].

    Raises:
        DataError: if float32 cannot compute with the values or standard deviations: constant, too large, too small, or
            too close together for their distance from 0. The message names the columns.
    """
    np = require("numpy")
    axis = 0 if train.ndim == 2 else None
    mean = train.mean(axis, dtype=np.float64)
    rows = max(1, CHUNK // train[0].size)
    squares = sum(
        np.square(train[first : first + rows].astype(np.float64) - mean).sum(axis)
        for first in range(0, len(train), rows)
    )
    std = np.sqrt(squares / (len(train) if axis == 0 else train.size))
    top = np.maximum(np.abs(train.max(axis).astype(np.float64)), np.abs(train.min(axis).astype(np.float64)))
    _refuse(
        train.max(axis) == train.min(axis),
        where,
        "values that vary in the training rows",
        "one value only",
        "leave it out (numpy.delete(x, COLUMNS, axis=1)), or save rows that are images as [N, H, W]: one scale for all",
    )
    _refuse(
        (top > WITHIN) | (std < 1 / WITHIN),
        where,
        f"values up to {WITHIN:g} with standard deviations from {1 / WITHIN:g}",
        "values or differences beyond",
        "scale it",
    )
    spacing = np.spacing(top.astype(np.float32)).astype(np.float64)
    _refuse(
        spacing > RESOLUTION * std,
        where,
        "values that float32 can tell apart",
        "a standard deviation too small for the size of the values",
        "subtract its mean before you save it",
    )
    return mean, std


def _refuse(bad: np.ndarray, where: str, wanted: str, came: str, remedy: str) -> None:
    """Raises DataError if a column, or the whole array, is bad."""
    if not bad.any():
        return
    columns = [int(column) for column in bad.nonzero()[0]] if bad.ndim else []
    more = f" and {len(columns) - NAMED} more" if len(columns) > NAMED else ""
    place = f" in column {', '.join(map(str, columns[:NAMED]))}{more}, counted from 0" if columns else ""
    raise DataError(f"{where}: wanted {wanted} for a Gaussian likelihood, got {came}{place}; {remedy}")
