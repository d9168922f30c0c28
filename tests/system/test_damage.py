"""What time and bad luck do to files of ours: noticed in one line that names the file, or harmless.

Harmless is what leaves the same result, to the bit. `python -m tests.system.test_damage` prints
how many flipped bits of each kind of file were noticed, and how many were harmless.
"""

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import ds
from ds.analytic import Gaussian
from ds.models.convert import read
from ds.nets import UNetConfig
from ds.pairs import archives
from ds.pairs.sources import Pairs
from ds.training import checkpoint
from ds.training.checkpoint import FOLDER, Checkpoint
from ds.training.log import read_metrics
from ds.training.trainer import Trainer
from tests.system.test_reading import NO_FILES
from tests.training.test_checkpoint import CPU, Run, flat

FLIPS = 50
TINY = UNetConfig(
    image_size=4, in_channels=1, channels=4, channel_mult=(1,), num_res_blocks=1,
    attention_resolutions=(), norm_groups=2,
)  # fmt: skip
FOREIGN = UNetConfig(
    image_size=8, channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=()
)
TEACHER = Gaussian(shape=(1, 4, 4)).teacher(ds.solvers.DDIM(), ds.grids.quadratic(3))
TRAIN = ds.TrainConfig(batch_size=4, epochs=1, warmup_steps=0, snapshot_every=1)


class Scale(torch.nn.Module):
    """Few weights, of many numbers each, so that most flipped bits are in a number."""

    shape = (1, 4, 4)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 1024).reshape(64, 1, 4, 4))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * self.weight.mean(0)


class Kind(NamedTuple):
    """A file, how it is read, and one of the same kind that is of something else, if it matters."""

    file: Path
    use: Callable[[], Any]
    other: bytes | None


def net(seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TINY.build()


def store(path: Path | str, seed: int = 0) -> ds.PairStore:
    return ds.generate_pairs(TEACHER, path, 16, seed=seed, shard_size=8)


def trainer(folder: Path, seed: int = 0) -> Trainer:
    start = TEACHER.using(Scale())
    pairs = ds.PairStore(folder / "store")
    rows = Pairs(pairs, range(8, 16)), Pairs(pairs, range(8))
    config = replace(TRAIN, seed=seed)
    return Trainer(ds.methods.DenoisingStudent(), start, *rows, folder / "run", config)


def images(path: Path | str) -> torch.Tensor:
    return ds.PairStore(path).images(range(16))


def resumed(run: Trainer) -> dict[str, Any]:
    """Go on from a checkpoint with a trainer that knows nothing any more."""
    run.state.step = -1
    for module in (run.state.modules, run.averages.ema, run.averages.best, run.averages.tracked):
        for w in module.parameters():
            w.data.zero_()
    run.run.claim()
    run.checkpoint.load(run)
    leaves = checkpoint._named(run.state_dict())
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in leaves.items()}


def weights(path: Path) -> dict[str, Any]:
    student = ds.load_student(path)
    return {**student.net.state_dict(), "method": student.method}


def noted(folder: Path) -> None:
    """A damaged line is left out, and moves nothing else."""
    read_metrics(folder)


@contextmanager
def alone() -> Iterator[None]:
    """A group of one process, which is enough to have shards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(folder: Path, value: float) -> Path:
    checkpoint = Checkpoint(folder, CPU, sharded=True)
    checkpoint.save(Run(sharded=True, value=value, step=5).state_dict())
    checkpoint.close()
    return folder / FOLDER


def read_shards(folder: Path) -> dict[str, Any]:
    with alone():
        run = Run(sharded=True)
        Checkpoint(folder, CPU, sharded=True).load(run)
        return flat(run)


def foreign(path: Path) -> dict[str, torch.Tensor]:
    return read(path, image_size=8).weights


def all_kinds(root: Path, cache: Path) -> dict[str, Kind]:
    """Make one file of every kind, and what reads it."""
    a, b = root / "a", root / "b"
    for number, folder in enumerate((a, b)):
        made = store(folder / "store", number)
        archives.export(made, folder / "archives")
        trainer(folder, number).fit()
        ds.Student(net(number), ds.methods.DenoisingStudent(t=number)).save_pretrained(folder / "s")
        with alone():
            sharded(folder / "shards", float(number + 1))
    torch.save(FOREIGN.build().state_dict(), a / "foreign.pt")
    run = trainer(a)
    url = f"memory://damage/{next(itertools.count())}"
    kept = store(url)
    cached = cache / f"{kept.manifest.sha256[1]}.npy"
    (shard,) = (a / "shards" / FOLDER).glob("*.safetensors")

    def kind(name: str, use: Callable[[], Any]) -> Kind:
        return Kind(a / name, use, (b / name).read_bytes())

    def exported() -> None:
        archives.export(ds.PairStore(a / "store"), a / "archives")

    def averaged() -> dict[str, torch.Tensor]:
        return ds.post_hoc_ema(a / "run", 0.1)

    step = "run/snapshots/step-0000001.safetensors"
    return {
        "manifest": kind("store/manifest.json", lambda: images(a / "store")),
        "shard": kind("store/images-00001.npy", lambda: images(a / "store")),
        "configuration": kind("s/config.json", lambda: weights(a / "s")),
        "weights": kind("s/model.safetensors", lambda: weights(a / "s")),
        "run": kind("run/run.json", run.run.claim),
        "checkpoint": kind("run/checkpoint.pt", lambda: resumed(run)),
        "numbers": kind("shards/checkpoint/numbers.json", lambda: read_shards(a / "shards")),
        "sharded checkpoint": kind(str(shard.relative_to(a)), lambda: read_shards(a / "shards")),
        "snapshot": kind(step, averaged),
        "source of archives": kind("archives/source.json", exported),
        "metrics": Kind(a / "run" / "metrics.jsonl", lambda: noted(a / "run"), None),
        "checkpoint of others": Kind(a / "foreign.pt", lambda: foreign(a / "foreign.pt"), None),
        "cache of a bucket": Kind(
            cached, lambda: images(url), (b / "store/manifest.json").read_bytes()
        ),
    }


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Iterator[dict[str, Kind]]:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_CACHE", str(cache))
        yield all_kinds(tmp_path_factory.mktemp("kinds"), cache)


NAMES = [
    "manifest", "shard", "configuration", "weights", "run", "checkpoint", "numbers",
    "sharded checkpoint", "snapshot", "source of archives", "metrics", "checkpoint of others",
    "cache of a bucket",
]  # fmt: skip
every_kind = pytest.mark.parametrize("name", NAMES)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def noticed(kind: Kind, damage: Callable[[Path], Any]) -> bool:
    """Say whether damage is noticed; if it is not, it must be harmless."""
    whole, expected = kind.file.read_bytes(), kind.use()
    try:
        kind.file.unlink()
        damage(kind.file)
        found = kind.use()
    except ValueError as error:
        line = str(error)
        assert "\n" not in line
        names = (kind.file.name, str(kind.file.parent))
        assert any(name in line for name in names), line
        return True
    finally:
        if kind.file.is_dir() and not kind.file.is_symlink():
            kind.file.rmdir()
        else:
            kind.file.unlink(missing_ok=True)
        kind.file.write_bytes(whole)
    assert same(found, expected), "other bits, and nothing was said"
    return False


def flips(content: bytes, count: int) -> Iterator[bytes]:
    draw = random.Random(0)
    for bit in draw.sample(range(8 * len(content)), count):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def count_noticed(kind: Kind, contents: Iterator[bytes]) -> int:
    return sum(noticed(kind, lambda path, c=content: path.write_bytes(c)) for content in contents)


@every_kind
def test_a_flipped_bit_is_noticed_or_harmless(kinds, name):
    kind = kinds[name]
    found = count_noticed(kind, flips(kind.file.read_bytes(), FLIPS))
    least = {"metrics": 0, "cache of a bucket": 0, "checkpoint": 20, "checkpoint of others": 20}
    assert found >= least.get(name, FLIPS - 5), f"{found} of {FLIPS} were noticed"


@every_kind
def test_what_is_left_of_a_file_is_no_file(kinds, name):
    kind = kinds[name]
    content = kind.file.read_bytes()
    cut = [content[:n] for n in (0, 1, len(content) // 3, len(content) - 1)]
    cut += [content + b"\0", bytes(len(content)), b"\xef\xbb\xbf" + content]
    found = count_noticed(kind, iter(cut))
    harmless = {"metrics": 7, "cache of a bucket": 7}
    assert found >= len(cut) - harmless.get(name, 2)


@every_kind
def test_a_file_of_something_else_is_noticed(kinds, name):
    kind = kinds[name]
    if kind.other is not None:
        assert kind.other != kind.file.read_bytes()
        assert noticed(kind, lambda path: path.write_bytes(kind.other)) == (
            name != "cache of a bucket"
        )


@every_kind
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_is_noticed(kinds, name, what):
    if (name, what) != ("cache of a bucket", "a link to nothing"):  # which is fetched again
        assert noticed(kinds[name], NO_FILES[what])


if __name__ == "__main__":
    import os
    import tempfile

    os.environ["DS_CACHE"] = tempfile.mkdtemp()
    many = int(sys.argv[1]) if sys.argv[1:] else FLIPS
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in all_kinds(Path(folder), Path(os.environ["DS_CACHE"])).items():
            count = min(many, 8 * kind.file.stat().st_size)
            found = count_noticed(kind, flips(kind.file.read_bytes(), count))
            print(f"| {name} | {count} | {found} | {count - found} |")
