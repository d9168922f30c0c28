"""Sharded training: what DistributedDataParallel learns, from a part of the weights a process.

The processes are started once for each stage; each job is a run of its own in a folder that names
it, sharded and not.
"""

import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import ds
from ds.methods import Denoising, DenoisingStudent
from ds.pairs.sources import Images, Pairs, digits
from ds.system import distributed
from ds.system.signals import Interrupted
from ds.training import checkpoint
from ds.training.config import RuntimeConfig
from ds.training.parallel import blocks, local, whole
from ds.training.trainer import Trainer
from tests.processes import Two
from tests.training.runs import HELD_OUT, SHORT, TEACHER, lines, steady, unet
from tests.training.test_trainer_ranks import Telling, curve
from tests.training.test_turns import Contest

pytestmark = pytest.mark.slow
# At a rate where a rounding stays one for six steps.
QUIET = replace(SHORT, lr=1e-3, epochs=6 / 8, check_every=3)


@dataclass(frozen=True)
class Followed(DenoisingStudent):
    """A student that a slow copy follows and pulls back, which is sharded as well."""

    def init(self, teacher):
        modules = super().init(teacher)
        modules["target"] = steady().net.requires_grad_(False)
        return modules

    def loss(self, modules, batch, progress):
        away = modules["student"](batch.noise, t := torch.full((len(batch.x0),), 999))
        away = (away - modules["target"](batch.noise, t)).square().mean()
        return super().loss(modules, batch, progress) + away

    @torch.no_grad()
    def after_step(self, modules, progress):
        for slow, w in zip(*(modules[n].parameters() for n in ("target", "student")), strict=True):
            slow.lerp_(w, 0.25)


JOBS = {
    "whole": (DenoisingStudent(), QUIET, RuntimeConfig()),
    "followed": (Followed(), replace(QUIET, grad_clip_norm=0.05), RuntimeConfig(accumulate=2)),
    "kept": (
        DenoisingStudent(),
        replace(QUIET, optimizer="adamw", weight_decay=0.1, snapshot_every=3, recompute_norms=True),
        RuntimeConfig(evaluate_every=3),
    ),
    "turns": (Contest(), replace(QUIET, epochs=3 * QUIET.epochs), RuntimeConfig()),
    "labelled": (Denoising(), QUIET, RuntimeConfig()),
    "bfloat16": (DenoisingStudent(), replace(QUIET, precision="bfloat16"), RuntimeConfig()),
    "float16": (DenoisingStudent(), replace(QUIET, precision="float16"), RuntimeConfig()),
}


def make(home: Path, out: Path, name: str, *, sharded: bool, **options) -> Trainer:
    """A run of 6 steps, whose 3 held-out batches are not as many for every process."""
    method, config, runtime = JOBS[name]
    store, told = ds.PairStore(home / "store"), name == "labelled"
    rows = Pairs(store, range(HELD_OUT, HELD_OUT + 256)), Pairs(store, range(96))
    if told:
        images, labels = digits()
        rows = Images(images[:256], labels[:256]), Images(images[256:352], labels[256:352])
    return Trainer(
        method,
        steady(classes=10 if told else 0),
        *rows,
        out,
        config,
        runtime=replace(runtime, shard=sharded, **options),
        evaluate=lambda net: {"first": next(net.parameters()).sum().item()},
    )


def folder(home: Path, name: str, sharded: bool) -> Path:
    return home / f"{name}-{'sharded' if sharded else 'replicated'}"


def finish(run: Trainer) -> None:
    """Train to the end; leave what was learnt, whole, and how much of it this process has."""
    best = run.fit()
    assert {type(w) for w in best.parameters()} == {nn.Parameter}
    nets = {"now": run.state.modules["student"], "ema": run.averages.ema}
    learnt = {name: whole(net).state_dict() for name, net in nets.items()}
    moments = [w for s in run.state.optimizers["student"].state.values() for w in s.values()]
    kept = run.state.modules, run.averages.ema, run.averages.best
    tensors = [*(w for module in kept for w in module.parameters()), *moments]
    share = sum(w.numel() for w in local(tensors)) / sum(w.numel() for w in tensors)
    learnt |= {"best": best.state_dict(), "share": share}
    torch.save(learnt, run.out / f"learnt-{distributed.rank()}.pt")


def stop(run: Trainer) -> None:
    """Tell one process to stop while step 4 is taken."""
    run.method = Telling(run, 4)
    with pytest.raises(Interrupted, match="interrupted at step 4 of 6, which is saved"):
        run.fit()


def die_at_the_second_checkpoint(run: Trainer) -> None:
    """Kill the first process when all have written their shards, before they get their name."""
    ends, end = [], checkpoint._Writer.finish

    def kill(self, **written):
        ends.append(written)
        if len(ends) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        end(self, **written)

    checkpoint._Writer.finish = kill
    run.fit()


def work(home: Path, stage: str) -> None:
    if stage == "train":
        for name in JOBS:
            for sharded in (False, True):
                finish(make(home, folder(home, name, sharded), name, sharded=sharded))
        finish(make(home, home / "compiled", "whole", sharded=True, compile="yes"))
        for sharded in (False, True):
            stop(make(home, folder(home, "cut", sharded), "whole", sharded=sharded))
        for kind in ("apex_adam", "radam"):
            JOBS[kind] = DenoisingStudent(), replace(QUIET, optimizer=kind), RuntimeConfig()
            with pytest.raises(ValueError, match=f"optimizer {kind}: takes no sharded weights"):
                make(home, home / kind, kind, sharded=True)
    elif stage == "die":
        die_at_the_second_checkpoint(make(home, home / "killed", "whole", sharded=True))
    else:
        finish(make(home, home / "killed", "whole", sharded=True))
        finish(make(home, home / "replicated-then-sharded", "whole", sharded=True))
        finish(make(home, home / "sharded-then-replicated", "whole", sharded=False))


def launch(home: Path, stage: str) -> str:
    """Let two processes do a stage; return what they say of a failure, nothing if there is none."""
    two = Two(stage_of, home, stage)
    _, said = two.communicate(timeout=240)
    return said if two.returncode else ""


def stage_of(home: Path, stage: str) -> None:
    torch.set_num_threads(1)
    with distributed.joined():
        work(home, stage)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder where two processes have done every job."""
    home = tmp_path_factory.mktemp("sharded")
    ds.generate_pairs(TEACHER, home / "store", 512 + HELD_OUT, batch_size=1024)
    assert not (failure := launch(home, "train")), failure
    return home


@pytest.fixture(scope="module")
def resumed(home) -> Path:
    """The same folder, where a run was killed, and has gone on as have others that were cut."""
    assert launch(home, "die")
    assert [*(home / "killed").rglob(".ds-*")], "it was killed while writing"
    shutil.copytree(home / "killed", home / "dead")
    shutil.copytree(folder(home, "cut", False), home / "replicated-then-sharded")
    shutil.copytree(folder(home, "cut", True), home / "sharded-then-replicated")
    assert not (failure := launch(home, "go on")), failure
    return home


def learnt(out: Path, number: int = 0) -> dict:
    return torch.load(out / f"learnt-{number}.pt", weights_only=True)


def away(ours: dict, theirs: dict) -> float:
    """How far weights are from others, as a share of how far those went."""

    def flat(weights: dict) -> torch.Tensor:
        return torch.cat([w.flatten() for w in weights.values()])

    assert ours.keys() == theirs.keys()
    start = unet(classes=10 if "temb.label.weight" in ours else 0).net.state_dict()
    start, ours, theirs = map(flat, (start, ours, theirs))
    return ((ours - theirs).norm() / (theirs - start).norm()).item()


def assert_close(ours: Path, theirs: Path, *, low: bool = False) -> None:
    """Two runs are alike but for roundings; those of low precision are enlarged by Adam."""
    assert curve(ours) == pytest.approx(curve(theirs), rel=5e-4 if low else 1e-6)
    for kind in ("now", "ema", "best"):
        assert away(learnt(ours)[kind], learnt(theirs)[kind]) < (0.1 if low else 1e-3), kind


@pytest.mark.parametrize("name", JOBS)
def test_shards_learn_what_whole_weights_do(home, name):
    low = name in ("bfloat16", "float16")
    assert_close(folder(home, name, True), folder(home, name, False), low=low)


def test_compiled_blocks_learn_what_others_do(home):
    assert_close(home / "compiled", folder(home, "whole", False))


def test_every_process_has_its_part_and_gets_the_whole(home):
    first, second = (learnt(folder(home, "whole", True), number) for number in (0, 1))
    assert first["share"] + second["share"] == pytest.approx(1)
    assert second["share"] > 0.45
    for kind in ("now", "ema", "best"):
        assert all(torch.equal(w, second[kind][name]) for name, w in first[kind].items())


def test_snapshots_and_evaluations_are_of_whole_averages(home):
    outs = [folder(home, "kept", sharded) for sharded in (False, True)]
    ours, theirs = (ds.post_hoc_ema(out, 0.15) for out in reversed(outs))
    assert away(ours, theirs) < 2e-3
    found = [[m["first"] for m in lines(out) if "first" in m] for out in outs]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert len(found[1]) == 2


def test_a_kill_while_shards_are_written_leaves_the_last_checkpoint(resumed):
    """Which is that of step 3; the run goes on from it to the bits of an undisturbed one."""
    assert '"step": 3,' in (resumed / "dead" / "checkpoint" / checkpoint.NUMBERS).read_text()
    assert not [*(resumed / "killed").rglob(".ds-*")]
    assert '"step": 6,' in (resumed / "killed" / "checkpoint" / checkpoint.NUMBERS).read_text()
    killed, undisturbed = learnt(resumed / "killed"), learnt(folder(resumed, "whole", True))
    for kind in ("now", "ema", "best"):
        assert all(torch.equal(w, undisturbed[kind][name]) for name, w in killed[kind].items())


@pytest.mark.parametrize(
    ("name", "left"),
    [("replicated-then-sharded", "checkpoint"), ("sharded-then-replicated", "checkpoint.pt")],
)
def test_a_run_goes_on_with_shards_or_without(resumed, name, left):
    assert_close(resumed / name, folder(resumed, "whole", False))
    assert [path.name for path in (resumed / name).glob("checkpoint*")] == [left]


def test_a_sharded_run_goes_on_in_one_process(home, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(folder(home, "cut", True), out)
    run = make(home, out, "whole", sharded=False)
    run.fit()
    assert curve(out) == pytest.approx(curve(folder(home, "whole", False)), rel=1e-6)


def test_the_blocks_of_a_network_are_its_residual_blocks():
    assert len(blocks(unet().net)) == 2 + 2 + 4


def test_one_process_has_nothing_to_share_out(home, tmp_path):
    with pytest.raises(ValueError, match=r"runtime\.shard needs more than one process"):
        make(home, tmp_path, "whole", sharded=True)


def test_cuda_graphs_are_refused_with_shards():
    with pytest.raises(ValueError, match=r"must be no or yes with runtime\.shard, not cuda_graphs"):
        RuntimeConfig(shard=True, compile="cuda_graphs")
