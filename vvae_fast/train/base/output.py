"""The program's output: a stream that closes, or cannot encode a character, stops no work and loses no result."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from vvae_fast.train.base.extras import require

PLAIN = "vvae_fast.plain"  # the name of the codecs' error handler
PLAIN_TEXT = {"±": "+-", "━": "-", "╸": "-", "╺": "-", "…": "..."}  # if the encoding lacks the character


class Stream:
    """A text stream or None. The error of the first failed write is kept as `error`; after it nothing is written."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, act: Callable[[TextIO], object]) -> None:
        if self.error is not None or self.stream is None:
            return
        try:
            act(self.stream)
        except OSError as error:
            self.error = error
            _send_to_nowhere(self.stream)


@contextmanager
def guarded() -> Iterator[Stream]:
    """Inside the block, sys.stdout and sys.stderr are Streams that replace characters which the encoding lacks; yields
    stdout."""
    _open_missing_descriptors()
    codecs.register_error(PLAIN, _plain)
    before = sys.stdout, sys.stderr
    handler = getattr(sys.stdout, "errors", None)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors=PLAIN)
    sys.stdout, sys.stderr = streams = [stream and Stream(stream) for stream in before]
    try:
        yield streams[0] or Stream(None)
    finally:
        for stream in filter(None, streams):
            stream.flush()
        sys.stdout, sys.stderr = before
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors=handler)


def make_console(**options: object) -> Any:
    """A rich console on sys.stdout, with that stream's encoding."""
    return require("rich.console").Console(file=sys.stdout, highlight=False, **options)


def print_lines(console: Any, table: object) -> None:
    """A rich table between two empty lines; rich itself would fill those with spaces."""
    segment = require("rich.segment")
    lines = [line for line in console.render_lines(table, pad=False) if any(part.text.strip() for part in line)]
    console.print()
    console.print(segment.Segments([part for line in lines for part in (*line, segment.Segment.line())]), end="")
    console.print()


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN_TEXT.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def _send_to_nowhere(stream: TextIO) -> None:
    """Sends the stream's buffered text to /dev/null: else writing it would fail again when Python ends."""
    with suppress(OSError, ValueError):  # a stream without a descriptor has no buffered text
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _open_missing_descriptors() -> None:
    """Opens closed standard streams: else the next file would get such a stream's number, and printed text."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
