"""Figures as SVG files: the same figure gives the same bytes on every machine."""

import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from vvae_fast.train.base.files import replacing

_HASHED = re.compile(r"\b[a-z][0-9a-f]{10}\b")
_LONG = re.compile(r"scale\([^)]*\)|-?\d+\.\d{4,}")  # scales of glyphs multiply coordinates, and stay


def save(figure: Figure, path: Path, **rc: object) -> None:
    """Writes the figure; `rc` are further settings of matplotlib, with _ for the dot."""
    settings = {"svg.hashsalt": "vvae_fast", **{name.replace("_", ".", 1): value for name, value in rc.items()}}
    with matplotlib.rc_context(settings), replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
        temporary.write_text(with_rounded_coordinates(with_numbered_ids(temporary.read_text())))


def with_numbered_ids(text: str) -> str:
    """Numbers the ids in their order. matplotlib makes ids from hashes of coordinates in full precision, whose last
    bits differ between processors.
    """
    named = {f'id="{name}"': name for name in _HASHED.findall(text)}
    hashed = dict.fromkeys(name for key, name in named.items() if key in text)
    numbers = {name: f"id{i}" for i, name in enumerate(hashed)}
    return _HASHED.sub(lambda match: numbers.get(match[0], match[0]), text)


def with_rounded_coordinates(text: str) -> str:
    """Rounds to thousandths of a point. matplotlib writes six digits, and the last differs between processors."""

    def rounded(match: re.Match[str]) -> str:
        number = match[0]
        return number if number.startswith("scale") else f"{float(number):.3f}"

    return _LONG.sub(rounded, text)
