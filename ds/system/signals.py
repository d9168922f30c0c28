"""Handle the signals that ask a process to end, at once or at the next safe moment.

SIGINT is Ctrl-C. SIGTERM, SIGUSR1 and SIGHUP come from a cluster whose time is up or from a closed
terminal, and are treated alike.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
AGAIN = "interrupted; run the same command again to go on"


class Interrupted(Exception):
    """A signal stopped the work. Everything finished is saved."""

    def __init__(self, message: str, number: int = 0):
        super().__init__(message)
        self.number = number  # of the signal, or 0


class Heard(KeyboardInterrupt):
    """One of the ENDS, raised where it arrived."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Stop:
    """Call it to ask which signal has come, 0 for none. Work between two calls is not interrupted.

    A second Ctrl-C does what the first does outside.
    """

    def __init__(self):
        self.came, self._at_once = 0, False
        self._before: dict[int, Any] = {}

    def __call__(self) -> int:
        return self.came

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Heard inside the block as soon as a signal comes. The work may stop anywhere."""
        if self.came:
            raise Heard(self.came)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def install(self) -> None:
        """Install the handlers. A program's own handlers of SIGUSR1 and SIGHUP stay."""
        for number in ENDS:
            now = signal.getsignal(number)
            if number in (signal.SIGINT, signal.SIGTERM) or now in (signal.SIG_DFL, *OURS):
                self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        self.came = self.came or number
        if number == signal.SIGINT:
            before = self._before[number]
            signal.signal(number, signal.SIG_DFL if before in OURS else before)
        if self._at_once:
            self._at_once = False
            raise Heard(number)


@contextmanager
def deferred_signals() -> Iterator[Stop]:
    """Record the signals of ENDS instead of acting on them; see Stop.

    Python installs handlers in the main thread only, so elsewhere nothing is recorded.
    """
    stop = Stop()
    if threading.current_thread() is threading.main_thread():
        stop.install()
    try:
        yield stop
    finally:
        stop.restore()


def code_of(number: int) -> int:
    """Return the exit code after a signal: 2 for Ctrl-C, 0 for the others."""
    return 2 if number in (0, signal.SIGINT) else 0


def while_starting(number: int, _: Any) -> None:
    """End at once: no work has begun, and a module being imported could swallow an exception."""
    _leave(number)


def while_working(number: int, _: Any) -> None:
    """Raise Heard once. A second Ctrl-C ends the process wherever it is."""
    for other in ENDS:
        signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
    raise Heard(number)


@contextmanager
def listening(*, last: bool) -> Iterator[None]:
    """Handle signals as a command does. Afterwards ignore them if `last`, else restore handlers."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in ENDS if here}
    hook = sys.unraisablehook
    listen(while_starting)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)


OURS: tuple[Callable, ...] = (while_starting, while_working)


def listen(handler: Any) -> None:
    """Install a handler for all of ENDS, if this is the main thread.

    A SIGHUP that nohup ignores stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in ENDS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    if handler is while_working:
        sys.unraisablehook = _swallowed


def _swallowed(unraisable: Any) -> None:
    """End the process if a signal was raised where nothing can catch it, as in a destructor."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _leave(getattr(unraisable.exc_value, "number", 0))
    sys.__unraisablehook__(unraisable)


def _leave(number: int) -> None:
    try:
        os.write(2, f"dstudent: {AGAIN}\n".encode())
    finally:
        os._exit(code_of(number))
