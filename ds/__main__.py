"""The command line, `dstudent VERB`. Nothing heavy is imported until a verb needs it."""

import os
import signal
import sys

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
    """Run one command; return the exit code: 0, or 2 after one line on standard error."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if args[0] == "--version":
        import ds

        print(f"dstudent {ds.__version__}")
        return 0
    if args[0] not in VERBS:
        return _fail(f"no verb {args[0]!r}; the verbs are {', '.join(VERBS)}")
    # Read when torch is imported. Threads that sleep while they wait cost a little on free cores;
    # those that spin take the time of whatever else runs there, and of each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from ds import verbs
        from ds.files import Interrupted
    except (ImportError, OSError) as error:
        return _broken(args[0], error)
    try:
        verbs.run(args[0], args[1:])
    except Interrupted as error:
        code = _fail(str(error))
        return 0 if error.number == signal.SIGTERM else code  # a scheduler got what it asked for
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on")
    return 0


def _broken(verb: str, error: Exception) -> int:
    """Say what cannot be imported; the doctor needs nothing that can be missing."""
    if verb == "doctor":
        from ds import doctor

        print(doctor.text(doctor.report()))
    return _fail(f"{error}; `dstudent doctor` shows what this machine has")


def _fail(reason: str) -> int:
    from ds.files import redacted

    print(f"dstudent: {redacted(' '.join(reason.split()))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
