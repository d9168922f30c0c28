"""Ctrl-C, a scheduler's signals, and streams that are closed: heard at once, and no traceback."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import ds
from ds.cli.__main__ import main
from ds.pairs import shards
from ds.system import signals
from ds.system.signals import ENDS, Heard, Interrupted, deferred_signals

ROOT = Path(__file__).parents[2]
DATA = ds.analytic.Gaussian()
TEACHER = DATA.teacher(ds.solvers.DDIM(), ds.grids.quadratic(4))
every_end = pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def heard(monkeypatch) -> Callable:
    """Take a command's handlers as they are while it works, and give the test's own back."""
    with signals.listening(last=False):
        signals.listen(signals.while_working)
        yield


# In the middle of the work of every verb: where a verb calls this, a signal comes.

PLACES = {
    "demo": ("ds.cli.demo.demo", ["demo", "--out", "new"]),
    "doctor": ("ds.evaluation.environment.report", ["doctor"]),
    "teach, its images": ("ds.cli.teach.digits", ["teach", "digits", "--out", "new"]),
    "pairs, its teacher": ("ds.cli.pairs.load_teacher", ["pairs", "digits"]),
    "info": ("ds.cli.pairs.info", ["pairs", "info", "x"]),
    "verify, its store": ("ds.cli.pairs.PairStore", ["pairs", "verify", "x"]),
    "export": ("ds.cli.pairs.PairStore", ["pairs", "export", "x", "new"]),
    "distill, its teacher": ("ds.cli.distill.load_teacher", ["distill", "digits"]),
    "sample": ("ds.cli.sample.loaded", ["sample", "x"]),
    "evaluate": ("ds.cli.evaluate.loaded", ["evaluate", "x"]),
    "report": ("ds.evaluation.report.pages.read_run", ["report", "x"]),
    "convert": ("ds.cli.convert.load", ["convert", "x", "new"]),
}


@every_end
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_ends_every_verb_with_one_line(place, number, capsys, tmp_path, monkeypatch):
    name, command = PLACES[place]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(name, lambda *_, **__: send(number))
    assert main(command) == (2 if number == signal.SIGINT else 0)
    assert capsys.readouterr().err == f"dstudent: {signals.AGAIN}\n"
    assert not [*tmp_path.iterdir()]


def test_a_command_gives_the_handlers_back_that_were_there():
    before = [signal.getsignal(number) for number in ENDS], sys.unraisablehook
    main(["--version"])
    main(["sample", "nowhere"])
    assert ([signal.getsignal(number) for number in ENDS], sys.unraisablehook) == before


# Pairs: inside a long batch.


@every_end
def test_a_signal_is_heard_between_two_calls_of_the_network(number, tmp_path, monkeypatch):
    calls, step = [], ds.solvers.DDIM.step

    def counted(self, *args):
        calls.append(1)
        if len(calls) == 12:
            send(number)
        return step(self, *args)

    monkeypatch.setattr(ds.solvers.DDIM, "step", counted)
    monkeypatch.setattr("ds.pairs.generate.estimate", lambda *_: ("", 0))
    with pytest.raises(Interrupted, match="2 of 4 shards are safe; run the same") as found:
        ds.generate_pairs(TEACHER, tmp_path, 32, shard_size=8)
    assert found.value.number == number
    assert len(calls) == 12, "the batch went on"
    monkeypatch.setattr(ds.solvers.DDIM, "step", step)
    assert len(ds.generate_pairs(TEACHER, tmp_path, 32, shard_size=8)) == 32


def test_a_shard_that_is_being_written_is_written(tmp_path, monkeypatch):
    write = shards.write

    def interrupted(*args):
        send(signal.SIGINT)
        write(*args)

    monkeypatch.setattr(shards, "write", interrupted)
    with pytest.raises(Interrupted, match="1 of 4 shards are safe"):
        ds.generate_pairs(TEACHER, tmp_path, 32, shard_size=8)


def test_python_that_draws_gets_its_own_keyboard_interrupt():
    class Interrupts(ds.solvers.DDIM):
        def step(self, *args):
            send(signal.SIGINT)
            return super().step(*args)

    teacher = DATA.teacher(Interrupts(), ds.grids.quadratic(4))
    with pytest.raises(KeyboardInterrupt) as found:
        ds.Sampler(teacher)(0, range(4))
    assert type(found.value) is KeyboardInterrupt


# The mechanism.


@every_end
def test_a_signal_waits_for_a_question_and_not_where_work_may_be_cut(number):
    with deferred_signals() as stop:
        assert stop() == 0
        send(number)
        assert stop() == number
        with pytest.raises(Heard), stop.at_once():
            pytest.fail("what may be cut is not begun after a signal")
    with deferred_signals() as stop, pytest.raises(Heard) as found, stop.at_once():
        send(number)
    assert found.value.number == number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_is_one_of_the_program_around():
    with deferred_signals():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_second_ctrl_c_ends_a_command_whatever_it_does(heard):
    with pytest.raises(Heard):
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_second_ctrl_c_ends_a_command_that_saves(heard):
    with deferred_signals():
        send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_a_signal_that_a_destructor_swallows_ends_the_command(heard, monkeypatch):
    left = []
    monkeypatch.setattr(signals, "_leave", left.append)
    monkeypatch.setattr(sys, "__unraisablehook__", lambda _: None)

    class Destroyed:
        def __del__(self):
            send(signal.SIGTERM)

    Destroyed()
    assert left == [signal.SIGTERM]


def test_handlers_of_the_program_and_of_nohup_are_left_alone():
    def own(*_):
        pass

    before = signal.signal(signal.SIGUSR1, own), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_signals():
            assert signal.getsignal(signal.SIGUSR1) is own
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with signals.listening(last=False):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGHUP, before[1])


def test_other_threads_install_nothing():
    answers = []

    def work():
        with deferred_signals() as stop, stop.at_once():
            answers.append(stop())
        with signals.listening(last=False):
            answers.append(main(["--version"]))

    before = [signal.getsignal(number) for number in ENDS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [0, 0]
    assert [signal.getsignal(number) for number in ENDS] == before


# Processes: what no call in this one can show.

WAITS = (
    "import os, sys, types, time;"
    "sys.modules['ds.cli.verb'] = verbs = types.ModuleType('ds.cli.verb');"
    "verbs.run = lambda verb, args: (print('working', flush=True), {work});"
    "sys.argv[1:] = ['doctor'];"
    "from ds.cli.__main__ import main; sys.exit(main())"
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 2), (signal.SIGHUP, 0)])
@pytest.mark.parametrize("moment", ["importing", "working"])
def test_a_process_that_is_interrupted_says_one_line(tmp_path, moment, number, code):
    waiting = "print('working', flush=True); import time; time.sleep(60)"
    script = WAITS.format(work="time.sleep(60)")
    if moment == "importing":  # where an exception would be taken for a broken package
        (tmp_path / "tyro.py").write_text(f"try:\n  {waiting}\nexcept BaseException: pass\n")
        script = "import sys; sys.argv[1:] = ['doctor']; from ds.cli.__main__ import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, f"dstudent: {signals.AGAIN}\n")


@pytest.mark.parametrize(
    ("streams", "encoding"),
    [
        (">&-", ""),
        ("2>&-", ""),
        (">&- 2>&- <&-", ""),
        ("| true", ""),
        ("2>&1 | true", ""),
        (">/dev/null", "ascii"),
    ],
)
@pytest.mark.parametrize("code", [0, 2], ids=["works", "fails"])
def test_the_exit_code_is_that_of_the_work_whatever_the_streams_are(streams, encoding, code):
    """The work that fails does so with letters that no encoding has."""
    fails = "int('\\udcff\\u00e9')" if code else "print('\\u00e9')"
    script = WAITS.format(work=f"time.sleep(0.1), print('x' * 10**5, flush=True), {fails}")
    shell = f"set -o pipefail; {shlex.join([sys.executable, '-c', script])} {streams}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        ["bash", "-c", shell], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


def test_a_full_disk_behind_standard_output_is_one_line():
    script = f"{shlex.join([sys.executable, '-m', 'ds.cli', '--help'])} > /dev/full"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    said = "dstudent: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_a_working_directory_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["doctor"]) == 2
    line = "dstudent: the working directory is gone (No such file or directory); change to another"
    assert capsys.readouterr().err == f"{line} one\n"
