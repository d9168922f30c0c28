"""Run a module, a script or a command on the emulated GPU, with python's own arguments."""

import runpy
import sys

from tests import emulated


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or (arguments[0] in ("-m", "-c") and len(arguments) < 2):
        sys.exit("python -m tests.emulated [-m module | -c command | script] arguments...")
    emulated.install()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")


main()
