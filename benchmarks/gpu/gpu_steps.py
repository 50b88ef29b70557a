"""The steps of `make gpu`, one line for each; their clock and their commands."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 525  # seconds for a target
GRACE = 8  # seconds between a command's interrupt, after which pytest says what failed, and its end


class Missing(Exception):
    """The step needs something that this machine lacks; the message names it."""


class Failed(Exception):
    """The step failed. The message says how; `lines` are the last that a command printed."""

    def __init__(self, message: str, lines: list[str] | None = None) -> None:
        super().__init__(message)
        self.lines = lines or []


class Steps:
    """Runs steps one after the other, even if earlier ones failed, and records their outcomes."""

    def __init__(self, log: TextIO, seconds: float = TOTAL) -> None:
        self.log, self.ends = log, time.monotonic() + seconds
        self.outcomes: dict[str, str] = {}  # PASS, FAIL or "missing: ..."

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()

    def say(self, text: str) -> None:
        """Prints to the log and the terminal at once, so that nothing is lost if the machine goes away."""
        print(text, file=self.log, flush=True)
        print(text, flush=True)

    def step(self, name: str, action: Callable[[], str | None]) -> None:
        """Runs one step and prints its line: outcome, seconds, and the action's note."""
        start = time.monotonic()
        try:
            outcome, note = "PASS", action()
        except Missing as missing:
            outcome, note = f"missing: {missing}", None
        except Failed as failed:
            outcome, note = "FAIL", str(failed)
        except Exception as error:
            outcome, note = "FAIL", f"{type(error).__name__}: {error}"
        self.outcomes[name] = outcome
        self.say(f"{name}: {outcome} ({time.monotonic() - start:.1f} s){f', {note}' if note else ''}")

    def command(self, arguments: list[str], limit: float, kept: int = 20, **environment: str) -> list[str]:
        """The last lines that the command printed; raises Failed if its exit code is not 0 or it takes longer."""
        limit = max(min(limit, self.left), 0)
        env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        lines = []
        # A new session, so that the workers of a late command end with it.
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=env, start_new_session=True, preexec_fn=heed_interrupts, **pipes
        )
        with process, ending(process, limit) as late:
            for line in process.stdout:
                self.say(line.rstrip("\n"))
                lines = [*lines[-kept:], line.rstrip("\n")]
            code = process.wait()
        if code or late.is_set():
            status = f"exit status {code}: {lines[-1] if lines else ''}"
            raise Failed(f"not done in {limit:.0f} s" if late.is_set() else status, lines)
        return lines

    @property
    def exit_status(self) -> int:
        return int("FAIL" in self.outcomes.values())


def heed_interrupts() -> None:
    """In a new process. Its parent may ignore them, as what a shell script starts with & does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def ending(process: subprocess.Popen, limit: float) -> Iterator[threading.Event]:
    """Interrupts the process after `limit` seconds, and ends it with its workers GRACE later, or at the end of the
    block.
    The event says that it was late."""
    late = threading.Event()

    def interrupt() -> None:
        late.set()
        process.send_signal(signal.SIGINT)

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timers = [threading.Timer(limit, interrupt), threading.Timer(limit + GRACE, end)]
    for timer in timers:
        timer.start()
    try:
        yield late
    finally:
        for timer in timers:
            timer.cancel()
        if process.poll() is None:
            end()


def end_with_what_runs() -> None:
    """If `timeout` or a closing terminal ends this process, it also ends the command that it runs."""

    def leave(number: int, _) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, leave)


def toolkit(program: str) -> str | None:
    """The path of a program of CUDA's toolkit, which is not always in PATH."""
    home = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    return shutil.which(program) or shutil.which(program, path=f"{home / 'bin'}:{home / 'compute-sanitizer'}")
