"""Runs of every method, unasked: killed at three moments, shared out, sharded, and compiled."""

import signal
from pathlib import Path

import pytest
import torch

from tests.compiled import figures
from tests.kill import files, same
from tests.methods.runs import MOMENTS, RUNS, SHARDED, die, finish, start, while_saving
from tests.processes import Started, Two
from tests.training.runs import lines

pytestmark = pytest.mark.slow
every_run = pytest.mark.parametrize("name", RUNS)


def steps(home: Path) -> dict[str, int]:
    """The steps of the checkpoints of all runs that were killed."""
    paths = {name: home / "killed" / name / "checkpoint.pt" for name in RUNS}
    return {name: torch.load(path, weights_only=True)["step"] for name, path in paths.items()}


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> dict[int, Path]:
    """For 1 process and for 2, where every run was killed three times and then ended."""
    homes = {count: tmp_path_factory.mktemp(f"of-{count}") for count in (1, 2)}
    for count, start_all in ((1, Started), (2, Two)):
        for moment, step in MOMENTS.items():
            process = start_all(die, homes[count] / "killed", moment)
            _, said = process.communicate(timeout=120)
            assert abs(process.returncode) == signal.SIGKILL, said
            assert steps(homes[count]) == dict.fromkeys(RUNS, step), moment.__name__
            cut = [*(homes[count] / "killed").glob("*/.ds-*.tmp/new")]
            assert len(cut) == len(RUNS) * (moment is while_saving), "checkpoints half written"
        process = start_all(finish, homes[count])
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    return homes


@every_run
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_three_times_ends_with_the_same_bits(homes, name, processes):
    whole = files(homes[processes] / "whole" / name)
    assert same(name, f"killed/{name}", homes[processes], whole)


def losses(run: Path) -> dict[str, float]:
    """The mean losses of a run, by turn."""
    (line,) = (line for line in lines(run) if "loss" in line)
    return {name: value for name, value in line.items() if name.endswith("loss")}


def weights(run: Path) -> torch.Tensor:
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    return torch.cat([w.flatten() for w in saved["modules"].values()])


def moved(name: str, run: Path) -> torch.Tensor:
    """How far the weights of a run went."""
    modules = RUNS[name].on(teacher := start()).init(teacher)
    first = torch.cat([w.flatten() for w in modules.state_dict().values()])
    return (weights(run) - first).norm()


@every_run
def test_two_processes_learn_what_one_does(homes, name):
    one, two = (homes[count] / "whole" / name for count in (1, 2))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert (weights(two) - weights(one)).norm() < 1e-3 * moved(name, one)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_networks_learn_what_whole_ones_do(homes, name):
    whole, sharded = (homes[2] / kind / name for kind in ("whole", "sharded"))
    assert losses(sharded) == pytest.approx(losses(whole), rel=1e-5)


@every_run
def test_a_compiled_loss_has_the_gradients_of_the_eager_one(name):
    """By its own derivatives; `python -m tests.compiled` goes on to machine code."""
    for ours, theirs in zip(*figures(name, "aot_eager"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
