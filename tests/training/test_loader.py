"""Loaders: whatever brings the rows to the device, they are those of Batches, from any step on."""

import itertools
import platform
import sys
import threading
from contextlib import closing
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

import ds
from ds.analytic import Gaussian
from ds.pairs.sources import Images, Pairs, digits
from ds.system.distributed import share
from ds.training import loader
from ds.training.batches import Batches
from ds.training.loader import LoaderKind, load
from tests.combinations import slow

CPU = torch.device("cpu")
ROWS, BATCH = 103, 12
# Where there is a wheel of DALI, it is installed with what the slow tests need.
HAS_DALI = (platform.system(), platform.machine()) == ("Linux", "x86_64")
KINDS = [kind for kind in get_args(LoaderKind) if kind != "dali"] + [slow("dali")] * HAS_DALI
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    def store(quantizer: str) -> Pairs:
        folder = tmp_path_factory.mktemp(quantizer)
        options = {"shard_size": 31, "quantizer": quantizer}
        return Pairs(ds.generate_pairs(teacher, folder, ROWS + 4, **options), range(4, ROWS + 4))

    teacher = Gaussian(shape=(3, 4, 2)).teacher(ds.solvers.DDIM(), ds.grids.quadratic(3))
    return {quantizer: store(quantizer) for quantizer in ("round", "float16", "float32")}


@pytest.fixture(params=["round", "float16", "float32", "images", "labelled images"])
def source(request, stores):
    images, labels = (x[:ROWS] for x in digits())
    labelled = labels if request.param == "labelled images" else None
    return stores.get(request.param) or Images(images, labelled, seed=3)


def taken(batches: Batches, kind: LoaderKind, start: int, count: int, prefetch: int = 2) -> list:
    with closing(load(batches, start, CPU, kind, prefetch)) as steps:
        return list(itertools.islice(steps, count))


def assert_equal(found, expected):
    for pair, other in zip(found, expected, strict=True):
        for x, y in zip(pair, other, strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y)


@every_kind
@pytest.mark.parametrize("world", [1, 2, 4])
def test_two_epochs_are_those_of_the_batches_in_any_world(source, kind, world, monkeypatch):
    whole = Batches(source, BATCH, seed=1)
    steps = 2 * whole.per_epoch
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(taken(Batches(source, BATCH, seed=1, part=share(BATCH)), kind, 0, steps))
    together = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert_equal(together, [whole.read(step) for step in range(steps)])


@every_kind
@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_a_loader_starts_at_any_step(stores, kind, prefetch):
    """Step 6 is in the middle of the first epoch, 11 goes into the second."""
    batches = Batches(stores["round"], BATCH, seed=1)
    for start in (6, 11):
        expected = [batches.read(step) for step in range(start, start + 4)]
        assert_equal(taken(batches, kind, start, 4, prefetch), expected)


@every_kind
def test_what_was_yielded_is_not_overwritten(stores, kind):
    """DALI uses its buffers again."""
    batches = Batches(stores["round"], BATCH, seed=1)
    kept = taken(batches, kind, 0, 12)
    assert_equal(kept, [batches.read(step) for step in range(12)])
    assert len({x.data_ptr() for images, _ in kept for x in [images]}) == 12


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "resident"])
def test_what_goes_wrong_while_reading_is_said(stores, kind):
    class Broken(Pairs):
        def read(self, rows):
            raise OSError("the disk is gone")

    batches = Batches(Broken(stores["round"].store), BATCH, seed=1)
    with pytest.raises(OSError, match="the disk is gone"):
        taken(batches, kind, 0, 1)


def test_a_closed_loader_leaves_no_thread(stores):
    taken(Batches(stores["round"], BATCH, seed=1), "memory_map", 0, 3)
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_dali_that_cannot_be_imported_is_named(stores, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"loader dali: .*denoising-student\[dali\]"):
        load(Batches(stores["round"], BATCH, seed=1), 0, CPU, "dali")


@pytest.mark.parametrize(
    ("free", "dali", "expected"),
    [
        (4 * ROWS * 24, True, "resident"),
        (4 * ROWS * 24 - 1, True, "dali"),
        (0, False, "memory_map"),
    ],
)
def test_the_choice_on_a_gpu_is_said(stores, monkeypatch, caplog, free, dali, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(loader, "find_spec", lambda name: dali or None)
    caplog.set_level("INFO", "ds")
    batches = Batches(stores["round"], BATCH, seed=1)
    assert loader._choose(batches, SimpleNamespace(type="cuda")) == expected
    assert caplog.messages[0].startswith(f"loader: {expected}")


def test_only_small_things_travel(stores):
    """The images in uint8 and eight bytes of index: the rest is made where it is needed."""
    images, indices = taken(Batches(stores["round"], BATCH, seed=1), "auto", 0, 1)[0]
    assert (images.dtype, images.nbytes) == (torch.uint8, BATCH * 24)
    assert indices.nbytes == 8 * BATCH
    assert np.all(indices.numpy() >= 4)
