"""How a training command is told to stop: it finishes its step, saves, and leaves."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """A list that fills with the SIGTERM, SIGINT or SIGHUP that came within the block; a second Ctrl-C
    interrupts as usual."""
    stopped: list[int] = []

    def note(number: int, frame: Any) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(stopped: list[int]) -> int:
    """128 + the signal, as shells count; that of SIGTERM where another process had the signal."""
    return 128 + (stopped or [signal.SIGTERM])[0]
