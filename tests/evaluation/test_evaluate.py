"""evaluate: its figures are those of ds.metrics, and the protocol says how they were obtained."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch

import ds
from ds import analytic
from ds.diffusion import grids
from ds.diffusion.solvers import DDIM
from ds.evaluation import metrics
from ds.evaluation.evaluate import evaluate, record, split_floor
from ds.evaluation.features import Pixels
from ds.evaluation.references import read_reference
from ds.models.images import to_float
from ds.pairs.sources import Pairs, digits

DATA = analytic.GaussianField(size=4, std=0.4)
TEACHER = DATA.teacher(DDIM(), grids.quadratic(5))
REFERENCE = ds.Sampler(DATA.teacher(DDIM(), grids.quadratic(20)))(seed=9, indices=range(50))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    store = ds.generate_pairs(TEACHER, tmp_path_factory.mktemp("pairs") / "store", 20)
    return Pairs(store, range(5, 20))


def pixels(images):
    return to_float(images).double().flatten(1)


def test_the_figures_are_those_of_the_metrics():
    images = ds.Sampler(TEACHER)(seed=4, indices=range(60))
    result = evaluate(images, REFERENCE, Pixels())
    made, real = pixels(images), pixels(REFERENCE)
    precision, recall = metrics.precision_recall(real, made)
    assert result["frechet_distance"] == metrics.frechet_distance(made, real)
    assert result["kernel_distance"] == metrics.kernel_distance(made, real)
    assert (result["precision"], result["recall"]) == (precision, recall)


def test_a_model_is_judged_by_the_images_it_draws():
    result = evaluate(TEACHER, REFERENCE, Pixels(), n=60, seed=4)
    drawn = evaluate(ds.Sampler(TEACHER)(seed=4, indices=range(60)), REFERENCE, Pixels())
    assert result["frechet_distance"] == drawn["frechet_distance"]


def test_the_batch_size_changes_no_figure(pairs):
    def figures(batch_size):
        result = evaluate(TEACHER, REFERENCE, Pixels(), n=30, batch_size=batch_size, held_out=pairs)
        return {k: v for k, v in result.items() if k not in ("protocol", "seconds_per_1000_images")}

    # The pair error is a mean over float32 images, which an FFT may round by batch.
    assert figures(7) == pytest.approx(figures(30), rel=1e-6)


def test_the_pair_error_is_the_distance_to_what_is_stored(pairs):
    result = evaluate(TEACHER, REFERENCE, Pixels(), n=4, held_out=pairs)
    made = TEACHER.sample(ds.noise(0, range(5, 20), DATA.shape)).double()
    stored = to_float(pairs.store.images(range(5, 20))).double()
    assert result["pair_rms"] == pytest.approx(math.sqrt((made - stored).square().mean()), rel=1e-6)
    assert result["pair_r2"] == pytest.approx(metrics.r2(made, stored), rel=1e-6)


def test_the_protocol_says_how_the_figures_were_obtained(pairs):
    result = evaluate(
        TEACHER, REFERENCE, Pixels(), n=8, seed=3, batch_size=5, rounding="floor", held_out=pairs,
        execution=ds.Execution("bfloat16"),
    )  # fmt: skip
    assert result["protocol"] == {
        "version": ds.__version__,
        "quantizer": "floor",
        "nfe": 5,
        "seed": 3,
        "batch_size": 5,
        "execution": {"precision": "bfloat16", "mode": "eager", "tune": False, "winograd": True},
        "device": "cpu",
        "held_out": pairs.fingerprint(),
        "n": 8,
        "reference": {
            "n": 50,
            "sha256": hashlib.sha256(REFERENCE.numpy().tobytes()).hexdigest(),
        },
        "extractor": {"name": "pixels", "sha256": "", "dim": 16},
    }


def test_images_without_a_model_have_no_seed_to_report():
    protocol = evaluate(REFERENCE[:9], REFERENCE, Pixels())["protocol"]
    assert protocol["n"] == 9 and protocol.keys().isdisjoint({"seed", "nfe", "batch_size"})


def test_the_result_is_written_as_json(tmp_path):
    out = tmp_path / "new" / "metrics.json"
    result = evaluate(REFERENCE[:9], REFERENCE, Pixels(), out=out)
    assert json.loads(out.read_text()) == result


@pytest.mark.parametrize(
    ("images", "reference", "message"),
    [
        (REFERENCE.float(), REFERENCE, "images must be uint8"),
        (REFERENCE[0], REFERENCE, "images must be uint8"),
        (REFERENCE, REFERENCE.float(), "reference must be uint8"),
        (REFERENCE[:, :2], REFERENCE, "images are .2, 4, 1., the reference is .4, 4, 1."),
        (TEACHER, REFERENCE[:, :2], "the reference is .2, 4, 1."),
    ],
)
def test_images_that_cannot_be_compared_are_refused(images, reference, message):
    with pytest.raises(ValueError, match=message):
        evaluate(images, reference, Pixels())


@pytest.mark.parametrize("n", [-1, 0, 1])
def test_too_few_images_to_draw_are_refused(n):
    with pytest.raises(ValueError, match=f"n must be at least 4, not {n}"):
        evaluate(TEACHER, REFERENCE, Pixels(), n=n)


def test_held_out_pairs_without_a_model_are_refused(pairs):
    with pytest.raises(ValueError, match="held_out pairs need a model"):
        evaluate(REFERENCE, REFERENCE, Pixels(), held_out=pairs)


@pytest.mark.parametrize("where", ["drawn", "held out"])
def test_float16_that_overflows_has_no_frechet_distance(where, pairs):
    class Loud(torch.nn.Module):
        shape = DATA.shape

        def forward(self, x, t):
            return x * (math.inf if where == "drawn" or len(x) == 15 else 1)

    with pytest.raises(RuntimeError, match="are not finite"):
        evaluate(TEACHER.using(Loud()), REFERENCE, Pixels(), n=8, held_out=pairs)


def test_the_floor_compares_random_parts_of_the_real_images():
    def distance(seed):
        order = np.random.default_rng(seed).permutation(50)
        features = pixels(REFERENCE)
        return metrics.frechet_distance(features[order[:30]], features[order[30:]])

    found = split_floor(REFERENCE, Pixels(), first=30, splits=3)
    assert found == pytest.approx((distance(0) + distance(1) + distance(2)) / 3, rel=1e-12)


def test_the_reference_named_digits_is_all_of_them():
    assert torch.equal(read_reference("digits"), digits()[0])


def saved(path, save):
    with open(path, "wb") as file:
        save(file)
    return str(path)


ARRAY = REFERENCE.numpy()


@pytest.mark.parametrize(
    ("save", "named"),
    [
        (lambda file: np.save(file, ARRAY), "a.npy"),
        (lambda file: np.savez(file, ARRAY), "a.npz"),
        (lambda file: np.savez(file, images=ARRAY, labels=np.zeros(3)), "b.npz"),
    ],
    ids=["npy", "npz of one", "npz with images"],
)
def test_a_reference_is_read_from_a_file(tmp_path, save, named):
    assert torch.equal(read_reference(saved(tmp_path / named, save)), REFERENCE)


@pytest.mark.parametrize(
    "save",
    [
        lambda file: file.write(b"PK\x03\x04 and then nothing"),
        lambda file: file.write(b"\x93NUMPY"),
        lambda file: file.write(b""),
        lambda file: np.save(file, np.array([{"a": 1}]), allow_pickle=True),
        lambda file: np.save(file, np.array(["text"])),
        lambda file: np.save(file, ARRAY.astype(np.float32)),
        lambda file: np.savez(file, ARRAY, ARRAY),
    ],
    ids=["broken npz", "broken npy", "empty", "pickle", "text", "floats", "two arrays"],
)
def test_a_file_that_is_no_reference_is_named(tmp_path, save):
    path = saved(tmp_path / "reference.npz", save)
    with pytest.raises(ValueError, match=r"reference\.npz"):
        read_reference(path)


def test_a_reference_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.npy: no reference"):
        read_reference(str(tmp_path / "nowhere.npy"))


def test_the_figures_are_noted_in_the_card_and_nothing_else_is_touched(tmp_path):
    config = ds.nets.UNetConfig(
        image_size=4, in_channels=1, channels=4, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), norm_groups=2,
    )  # fmt: skip
    student = ds.Student(config.build(), ds.methods.DenoisingStudent())
    student.save_pretrained(tmp_path / "student", pairs=12)
    (tmp_path / "student" / "notes.txt").write_text("mine")
    result = evaluate(student, REFERENCE, Pixels(), n=20)
    record(tmp_path / "student", ds.load_student(tmp_path / "student"), result)
    noted = ds.load_student(tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    assert noted.provenance["pairs"] == 12 and "| pairs | 12 |" in card
    assert float(noted.provenance["precision"]) == pytest.approx(result["precision"], rel=1e-3)
    assert f"| frechet_distance | {result['frechet_distance']:.4g} |" in card
    assert "| measured_on | 20 images, pixels |" in card
    assert json.loads((tmp_path / "student" / "metrics.json").read_text()) == result
    assert (tmp_path / "student" / "notes.txt").read_text() == "mine"


def test_figures_that_cannot_be_written_are_said(monkeypatch, tmp_path, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ds.evaluation.evaluate.write_json", full)
    images = digits()[0][:64]
    with pytest.raises(OSError, match="No space left"):
        evaluate(images, images, Pixels(), out=tmp_path / "figures.json")
    assert '"frechet_distance": ' in caplog.text
