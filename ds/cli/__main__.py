"""The command line, `dstudent VERB`. Nothing heavy is imported until a verb needs it."""

import contextlib
import gc
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from ds.cli import VERBS

USAGE = "\n".join(
    [
        "usage: dstudent VERB [PRESET] [OPTIONS]",
        "",
        "Turn a slow diffusion model into a one-step generator.",
        "",
        *(f"  {f'dstudent {verb} {words}':33} {does}" for verb, (_, words, does) in VERBS.items()),
        "",
        "PRESET is one of: digits, cifar10, celeba, lsun_bedroom, lsun_church. Without one, give",
        "`teach --images FOLDER`, `pairs --teacher DIR` and `distill --teacher DIR` your own.",
        "MODEL is what teach or distill wrote, a diffusers directory, a checkpoint file, or one of",
        "these on the Hugging Face hub: hf://owner/name, or owner/name.",
        "`dstudent VERB --help` lists a verb's options; `--dry-run` checks them and does nothing.",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Return the exit code: 0, or 2 after one line on standard error.

    Without `argv` the process does nothing else, and signals are ignored once it is done.
    """
    from ds.system import signals  # first, since signals must be handled while the rest is imported

    with signals.listening(last=argv is None):
        try:
            if argv is None:
                _open_streams()
            return _run(sys.argv[1:] if argv is None else argv, alone=argv is None)
        except KeyboardInterrupt as error:
            _fail(signals.AGAIN)
            return signals.code_of(getattr(error, "number", 0))
        except OSError as error:
            return _fail(f"standard output: {error.strerror}")
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()


def _run(args: list[str], alone: bool) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, flush=True)
        return 0
    if args[0] == "--version":
        import ds

        print(f"dstudent {ds.__version__}", flush=True)
        return 0
    if args[0] not in VERBS:
        return _fail(f"no verb {args[0]!r}; the verbs are {', '.join(VERBS)}")
    try:
        os.getcwd()
    except OSError as error:  # MKL ends a process that has none
        return _fail(f"the working directory is gone ({error.strerror}); change to another one")
    # OpenMP reads this when torch is imported. Waiting threads that sleep cost a little on idle
    # cores; threads that spin take time from other processes and from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ds.system import signals

    try:
        with _kept() if alone else contextlib.nullcontext():
            from ds.cli import verb
    except (ImportError, OSError) as error:
        return _broken(args[0], error)
    try:
        signals.listen(signals.while_working)
        verb.run(args[0], args[1:])
    except signals.Interrupted as error:
        _fail(str(error))
        return signals.code_of(error.number)
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(str(error))
    return 0


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Import what stays until the process ends, and is never looked through for garbage.

    Looking through the 170,000 objects of PyTorch takes 0.1 s, again and again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _Stream(io.FileIO):
    """A standard stream that drops its output once its reader is gone, so that the work goes on.

    Any other error, such as a full disk, is raised once.
    """

    lost = False

    def write(self, data: Any) -> int:
        try:
            return len(data) if self.lost else super().write(data)
        except OSError as error:
            self.lost = True
            if not isinstance(error, BrokenPipeError):
                raise
            return len(data)


def _open_streams() -> None:
    """Give the process standard streams that accept any output, even where one was closed.

    Otherwise the next file to be opened would get the number of a closed stream, and its output.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
    os.close(null)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        raw = _Stream(number, "w", closefd=False)
        lines = raw.isatty() or number == 2
        text = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines
        )
        setattr(sys, name, text)


def _broken(verb: str, error: Exception) -> int:
    """Report what cannot be imported. The doctor's report needs nothing that can be missing."""
    if verb == "doctor":
        from ds.evaluation import environment

        print(environment.text(environment.report()))
    return _fail(f"{error}; `dstudent doctor` shows what this machine has")


def _fail(reason: str) -> int:
    from ds.system.files import redacted

    reason = redacted(" ".join(reason.split()))
    with contextlib.suppress(OSError):  # standard error may be a file on a full disk
        print(f"dstudent: {reason}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
