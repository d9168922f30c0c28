"""From the words of a command line to a verb, and its run."""

import contextlib
import io
import json
import logging
import re
import sys
from itertools import dropwhile, takewhile
from typing import Any

import tyro

from ds.cli.convert import Convert
from ds.cli.demo import Demo
from ds.cli.distill import Distill
from ds.cli.doctor import Doctor
from ds.cli.evaluate import Evaluate
from ds.cli.options import Verb, say
from ds.cli.pairs import MakePairs, PairsExport, PairsInfo, PairsVerify
from ds.cli.sample import Sample
from ds.cli.teach import Teach
from ds.system.config import to_json
from ds.training.presets import PRESETS

log = logging.getLogger("ds")

PER_PRESET: dict[str, Any] = {"teach": Teach, "pairs": MakePairs, "distill": Distill}
OF_STORES: dict[str, Any] = {"info": PairsInfo, "verify": PairsVerify, "export": PairsExport}
PLAIN: dict[str, Any] = {
    "sample": Sample,
    "evaluate": Evaluate,
    "convert": Convert,
    "doctor": Doctor,
    "demo": Demo,
}


def run(verb: str, args: list[str]) -> None:
    """Parse the options of a verb and do what it says. Errors are ValueErrors of one line."""
    logging.raiseExceptions = False  # a standard error that nobody reads is no mistake
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("ds").setLevel(logging.INFO)
    dry = "--dry-run" in args
    args = [arg for arg in args if arg != "--dry-run"]
    task = parse(verb, args)
    if dry:
        say(json.dumps(to_json(task), indent=2))
    if given := {_option(arg) for arg in args if arg.startswith("--")}:
        task.refuse_idle(given)
    task.run(dry=dry)


def parse(verb: str, args: list[str]) -> Verb:
    """Return a verb with its options."""
    if verb == "pairs" and args and args[0] in OF_STORES:
        return _parse(OF_STORES[args[0]], args[1:], f"dstudent pairs {args[0]}")
    if verb in PER_PRESET:
        name, args = _preset_name(verb, args)
        default = PER_PRESET[verb].of(name, PRESETS[name]())
        return _parse(PER_PRESET[verb], args, f"dstudent {verb} {name}", default=default)
    return _parse(PLAIN[verb], args, f"dstudent {verb}")


def _option(arg: str) -> str:
    """Return the name of an option as Verb.idle has it: "--no-online" is "online"."""
    return arg.partition("=")[0].replace("_", "-").removeprefix("--").removeprefix("no-")


def _preset_name(verb: str, args: list[str]) -> tuple[str, list[str]]:
    known = ", ".join(PRESETS)
    if args and args[0] in PRESETS:
        return args[0], args[1:]
    if args and not args[0].startswith("-"):
        raise ValueError(f"{verb}: no preset {args[0]!r}; the presets are {known}")
    if {"-h", "--help"} & set(args):
        return "digits", args
    raise ValueError(f"{verb}: name a preset first: {known}")


def _parse(task: Any, args: list[str], prog: str, **default: Any) -> Any:
    """Read options into the dataclass; what tyro says about a mistake becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(task, prog=prog, args=args, **default)
    except SystemExit as end:
        if not end.code:
            raise
    # A title, the reason, a rule and advice, in a box where the terminal can draw one.
    lines = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]
    lines = dropwhile(_is_rule, lines)
    reason = " ".join(takewhile(lambda x: not _is_rule(x) and "full helptext" not in x, lines))
    reason = re.sub(r"^Error parsing \w+: ", "", reason)
    raise ValueError(f"{reason or said.getvalue()} (see `{prog} --help`)")


def _is_rule(line: str) -> bool:
    return not line.strip("─- ")
