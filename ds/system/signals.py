"""Signals that ask for an end: heard at once, or at the next moment that is safe.

SIGINT is Ctrl-C. SIGTERM, SIGUSR1 and SIGHUP are how a scheduler says that time is up, or a
terminal that it is closed: all three mean one thing.
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
    """A signal asked the work to stop; what was finished is saved."""

    def __init__(self, message: str, number: int = 0):
        super().__init__(message)
        self.number = number  # of the signal, where that makes a difference


class Heard(KeyboardInterrupt):
    """A signal of ENDS, raised where it came."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Stop:
    """Which signal came, 0 for none: call it to ask. Work between two questions is not cut in half.

    A second Ctrl-C does what the first does elsewhere.
    """

    def __init__(self):
        self.came, self._at_once = 0, False
        self._before: dict[int, Any] = {}

    def __call__(self) -> int:
        return self.came

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Heard within, as soon as a signal comes, for work that may be cut anywhere."""
        if self.came:
            raise Heard(self.came)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def install(self) -> None:
        """Begin to listen; SIGUSR1 and SIGHUP are left to a program that has a use for them."""
        for number in ENDS:
            now = signal.getsignal(number)
            if number in (signal.SIGINT, signal.SIGTERM) or now in (signal.SIG_DFL, *OURS):
                self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Give back what listened before."""
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
    """Turn the signals of ENDS into a question; see Stop.

    Outside the main thread, where Python installs no handlers, the answer is always 0.
    """
    stop = Stop()
    if threading.current_thread() is threading.main_thread():
        stop.install()
    try:
        yield stop
    finally:
        stop.restore()


def code_of(number: int) -> int:
    """Return the exit code after a signal: a scheduler got what it asked for, a person did not."""
    return 2 if number in (0, signal.SIGINT) else 0


def while_starting(number: int, _: Any) -> None:
    """End at once: nothing is begun, and what is being imported may swallow an exception."""
    _leave(number)


def while_working(number: int, _: Any) -> None:
    """Raise Heard once. A second Ctrl-C ends the process, whatever it is in the middle of."""
    for other in ENDS:
        signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
    raise Heard(number)


@contextmanager
def listening(*, last: bool) -> Iterator[None]:
    """Listen as a command does; afterwards to nothing, if it is the last, or as before."""
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
    """Install a handler of this process for all of ENDS, where that can be done.

    What nohup has made deaf to SIGHUP stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in ENDS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    if handler is while_working:
        sys.unraisablehook = _swallowed


def _swallowed(unraisable: Any) -> None:
    """End if a signal was heard where nobody can catch it, as in a destructor."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _leave(getattr(unraisable.exc_value, "number", 0))
    sys.__unraisablehook__(unraisable)


def _leave(number: int) -> None:
    try:
        os.write(2, f"dstudent: {AGAIN}\n".encode())
    finally:
        os._exit(code_of(number))
