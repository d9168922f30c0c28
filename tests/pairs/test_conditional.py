"""Stores of class-conditional pairs: labels without a column, and sources that hand them on."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ds
from ds.analytic import Gaussian, GaussianMixture
from ds.diffusion.conditions import Conditions
from ds.diffusion.grids import quadratic
from ds.diffusion.solvers import DDIM
from ds.pairs import archives
from ds.pairs import generate as pairs
from ds.pairs.manifest import Manifest
from ds.pairs.sources import Generated, Noise, Pairs
from ds.pairs.storage import place
from ds.pairs.store import info
from ds.system.files import sealed
from ds.training.batches import Batches
from tests.pairs.test_archives import members
from tests.pairs.test_store import COUNT, GAUSSIAN, all_images, contents, make
from tests.processes import Started

DATA = GaussianMixture()
TEACHER = DATA.teacher(DDIM(), quadratic(10), conditional=True)
EVERY = Conditions(range(3))


def modes(x: torch.Tensor) -> torch.Tensor:
    """Return the classes of points, as the mixture's posterior has them."""
    return torch.cdist(x, torch.tensor(DATA.means)).argmin(1) // 2


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ds.PairStore:
    return make(tmp_path_factory.mktemp("labelled") / "s", TEACHER)


def test_each_pair_is_of_the_class_that_its_index_draws(store):
    label = store.labels(range(COUNT))
    assert torch.equal(label, EVERY.draw(3, range(COUNT))["label"])
    assert torch.equal(modes(store.targets(range(COUNT))), label)
    assert store.labels([7, 0, 7]).tolist() == label[[7, 0, 7]].tolist()
    assert store.conditions == EVERY and info(store.path)["conditions"]["classes"] == [0, 1, 2]


def test_labels_take_no_room(store, tmp_path):
    plain = make(tmp_path / "s", DATA.teacher(DDIM(), quadratic(10)))
    assert all_images(store).shape == all_images(plain).shape
    assert contents(store.path).keys() == contents(plain.path).keys()


@pytest.mark.parametrize("change", [{"batch_size": 7}, {"conditions": EVERY}])
def test_a_conditional_store_is_the_same_from_every_way_of_making_it(store, tmp_path, change):
    assert contents(make(tmp_path / "s", TEACHER, **change).path) == contents(store.path)


def test_a_conditional_store_that_was_interrupted_goes_on_to_the_same_bytes(
    store, tmp_path, monkeypatch
):
    def stopped(manifest, sampler, shard, shown, make=pairs._make):
        if shard == 1:
            raise KeyboardInterrupt
        return make(manifest, sampler, shard, shown)

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "_make", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "s", TEACHER)
    assert contents(make(tmp_path / "s", TEACHER).path) == contents(store.path)


def write(out: Path) -> int:
    torch.set_num_threads(1)
    make(out, TEACHER, 1600)
    return 0


@pytest.mark.slow
def test_processes_that_come_and_are_killed_make_the_store_that_one_makes(tmp_path):
    out = tmp_path / "s"
    first, second = Started(write, out), Started(write, out)
    while not [*out.glob("images-*.npy")]:
        time.sleep(0.01)
    first.kill()
    third = Started(write, out)
    for writer in (second, third):
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said
    first.communicate(timeout=60)
    alone = make(tmp_path / "alone", TEACHER, 1600)
    assert contents(out) == contents(alone.path)


def test_a_conditional_store_grows(store, tmp_path):
    make(tmp_path / "s", TEACHER, 20)
    grown = make(tmp_path / "s", TEACHER)
    assert torch.equal(all_images(grown), all_images(store))
    assert torch.equal(grown.labels(range(COUNT)), store.labels(range(COUNT)))


@pytest.mark.parametrize(
    ("conditions", "named"),
    [
        (Conditions((0, 2)), r"conditions\.classes: \[0, 1, 2\], not \[0, 2\]"),
        (Conditions((-1,)), r"conditions\.classes: \[0, 1, 2\], not \[-1\]"),
    ],
)
def test_another_set_of_classes_is_another_store(store, conditions, named):
    before = contents(store.path)
    with pytest.raises(ValueError, match=f"holds a store made otherwise \\({named}\\)"):
        make(store.path, TEACHER, conditions=conditions)
    assert contents(store.path) == before


def test_a_store_without_classes_says_nothing_of_them(tmp_path):
    """So manifests that were written before there were any read as none, and keep their hashes."""
    store = make(tmp_path / "s")
    assert "conditions" not in store.manifest.json and "conditions" not in info(store.path)
    assert store.conditions == Conditions()
    with pytest.raises(ValueError, match="its pairs have no classes"):
        store.labels([0])
    assert Pairs(store).batch([0, 1]).cond == {}
    with pytest.raises(ValueError, match="the model has no classes"):
        make(tmp_path / "t", GAUSSIAN, conditions=Conditions((0,)))
    assert not (tmp_path / "t").exists()


def test_a_manifest_with_conditions_that_cannot_be_is_refused(store):
    written = store.manifest.json
    for wrong, message in (
        ({"classes": [0.5]}, r"conditions.classes\[0\] must be a whole number"),
        ({"classes": [-7]}, r"conditions.classes\[0\] must be at least -1"),
        ({"colours": [1]}, "conditions.'colours' is no field of it"),
        ({"guidance": [4.0, 1.0]}, "s/manifest.json: .*from the lower scale to the higher"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read({**written, "conditions": wrong})
        assert "\n" not in str(error.value)
    assert read(written) == store.manifest


def read(data) -> Manifest:
    class Written(type(place("s"))):
        def read_json(self, name):
            return sealed(data)

    return Manifest.read(Written(place("s").path))


def test_a_guided_pair_keeps_its_scale(tmp_path):
    asked = Conditions((1, 2), (1.0, 4.0))
    manifest = Manifest.of(
        TEACHER,
        ds.Execution(),
        conditions=asked,
        seed=1,
        count=2,
        quantizer="float32",
        shard_size=2,
    )
    assert manifest.json["conditions"] == {"classes": [1, 2], "guidance": [1.0, 4.0]}
    assert read(manifest.json).conditions == asked


def test_verify_makes_pairs_of_their_classes_again(store):
    store.verify(TEACHER)
    other = ds.PairStore(store.path)
    object.__setattr__(other.manifest, "conditions", Conditions((1,)))
    with pytest.raises(ValueError, match="is not what this teacher makes of its noise"):
        other.verify(TEACHER)


@pytest.mark.parametrize("rows", [None, range(3, 23, 4)])
def test_the_rows_of_a_store_bring_their_labels(store, rows):
    source = Pairs(store, rows)
    batch = source.batch([2, 0, 1], [7, 8, 9])
    assert batch.cond.keys() == {"label"} and source.conditions == EVERY
    assert torch.equal(batch.cond["label"], modes(batch.x0))


def test_generated_pairs_have_the_labels_of_the_teachers_store(tmp_path):
    source = Generated(TEACHER, 15, seed=9, first=2, batch_size=4, conditions=Conditions((0, 2)))
    store = make(tmp_path / "s", TEACHER, 32, seed=9, conditions=Conditions((0, 2)))
    batches = Batches(source, 5, seed=0)
    for step in (0, 5, 1):  # of pools 0, 1 and 0 again
        found = batches.at(step)
        assert torch.equal(found.cond["label"], store.labels(found.index))
        assert torch.equal(found.cond["label"], modes(found.x0))


def test_each_draw_of_noise_alone_has_its_own_conditions():
    asked = Conditions(range(10), (1.0, 4.0))
    source = Noise(64, (2,), seed=4, conditions=asked)
    first, again = source.batch(range(64)), source.batch(range(64), range(64, 128))
    assert torch.equal(first.cond["label"], asked.draw(4, range(64))["label"])
    assert torch.equal(again.cond["guidance"], asked.draw(4, range(64, 128))["guidance"])
    assert not torch.equal(first.cond["label"], again.cond["label"])


def test_a_fingerprint_covers_conditions_and_is_as_before_without(store):
    few = {"seed": 9, "batch_size": 4}
    said = {
        Generated(TEACHER, 8, **few).fingerprint(),
        Generated(TEACHER, 8, conditions=Conditions((1,)), **few).fingerprint(),
        Noise(4, (2,)).fingerprint(),
        Noise(4, (2,), conditions=EVERY).fingerprint(),
    }
    assert len(said) == 4
    assert Noise(4, (2,)).fingerprint() == "noise [2], 4 rows, seed 0"
    plain = Gaussian(shape=(1, 2, 2)).teacher(DDIM(), quadratic(5))
    about = Generated(plain, 8, **few).fingerprint()
    assert "Conditions" not in about


@pytest.mark.parametrize("form", ["webdataset", "fastgen"])
def test_archives_hold_the_classes_and_the_scales(tmp_path, form):
    start = ds.Teacher(ds.Guided(TEACHER.denoiser, None), DDIM(), quadratic(3))
    store = make(tmp_path / "s", start, conditions=Conditions((0, 2), (1.0, 3.0)))
    found = members(archives.export(store, tmp_path / "a", form))
    told = store.cond(range(COUNT))
    assert len(found) == 4 * COUNT
    for i in range(COUNT):
        if form == "webdataset":
            label = int(found[f"{i:09d}.cls"])
            scale = np.load(io.BytesIO(found[f"{i:09d}.guidance.npy"]))
        else:
            label, scale = (
                torch.load(io.BytesIO(found[f"{i:09d}.{name}.pth"]), weights_only=True)
                for name in ("label", "guidance")
            )
        assert (label, scale) == (told["label"][i], told["guidance"][i])


def test_the_pairs_of_a_guided_teacher_are_drawn_with_the_scales_of_their_indices(tmp_path):
    start = ds.Teacher(ds.Guided(TEACHER.denoiser, None), DDIM(), quadratic(5))
    store = make(tmp_path / "s", start, conditions=Conditions(guidance=(1.0, 3.0)))
    z, cond = ds.noise(3, range(COUNT), (2,)), store.cond(range(COUNT))
    assert store.conditions == Conditions(range(3), (1.0, 3.0))
    assert torch.equal(store.targets(range(COUNT)), start.sample(z, cond=cond))
    assert cond["guidance"].unique().numel() == COUNT
    with pytest.raises(ValueError, match="is told a guidance scale; give one, or a range"):
        make(tmp_path / "t", start)
    with pytest.raises(ValueError, match=r"conditions\.guidance: \[1.0, 3.0\], not 2.0"):
        make(tmp_path / "s", start, conditions=Conditions(guidance=2.0))
