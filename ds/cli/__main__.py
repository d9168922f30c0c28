"""The command line, `dstudent VERB`. Nothing heavy is imported until a verb needs it."""

import contextlib
import io
import os
import sys
from typing import Any

USAGE = """usage: dstudent VERB [PRESET] [OPTIONS]

Turn a slow diffusion model into a one-step generator.

  dstudent demo                     the whole chain on scanned digits, with a report, in minutes
  dstudent doctor                   what this machine has and which kernels run here

  dstudent teach PRESET             train a teacher on real images (digits only)
  dstudent pairs PRESET             run the teacher on noise and keep (noise, image) pairs
  dstudent pairs info|verify|export look at a store of pairs, check it, write it as archives
  dstudent distill PRESET           train a one-step student, after making the pairs it lacks
  dstudent sample MODEL             draw images from a teacher or a student
  dstudent evaluate MODEL           compare its images with real ones
  dstudent convert MODEL OUT        write it in another format

PRESET is one of: digits, cifar10, celeba, lsun_bedroom, lsun_church.
MODEL is a directory that teach or distill wrote, a diffusers directory, or a checkpoint file.
`dstudent VERB --help` lists a verb's options, `--dry-run` prints what it would do.
"""

VERBS = ("demo", "doctor", "teach", "pairs", "distill", "sample", "evaluate", "convert")


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0, or 2 after one line on standard error.

    Without `argv` this is all that the process does, and no signal is heard after it.
    """
    from ds.system import signals  # before whatever takes time

    with signals.listening(last=argv is None):
        try:
            if argv is None:
                _open_streams()
            return _run(sys.argv[1:] if argv is None else argv)
        except KeyboardInterrupt as error:
            _fail(signals.AGAIN)
            return signals.code_of(getattr(error, "number", 0))
        except OSError as error:
            return _fail(f"standard output: {error.strerror}")
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="", flush=True)
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
    # Read when torch is imported. Threads that sleep while they wait cost a little on free cores;
    # those that spin take the time of whatever else runs there, and of each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ds.system import signals

    try:
        from ds.cli import command
    except (ImportError, OSError) as error:
        return _broken(args[0], error)
    try:
        signals.listen(signals.while_working)
        command.run(args[0], args[1:])
    except signals.Interrupted as error:
        _fail(str(error))
        return signals.code_of(error.number)
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(str(error))
    return 0


class _Stream(io.FileIO):
    """A standard stream; once nobody reads it, what is written is dropped, and the work goes on.

    That something else is wrong, as a full disk, is told once.
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
    """Give the process standard streams that take whatever is written, closed ones among them.

    A file that is opened would else get the number of a closed one, and what is written to it.
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
    """Say what cannot be imported; the doctor needs nothing that can be missing."""
    if verb == "doctor":
        from ds.cli import environment

        print(environment.text(environment.report()))
    return _fail(f"{error}; `dstudent doctor` shows what this machine has")


def _fail(reason: str) -> int:
    from ds.system.files import redacted

    reason = redacted(" ".join(reason.split()))
    with contextlib.suppress(OSError):  # of a full disk, where it is a file
        print(f"dstudent: {reason}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
