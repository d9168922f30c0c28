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
from ds.evaluation.evaluate import evaluate, record, split_floor, way
from ds.evaluation.features import AveragedPixels, Digits, Pixels
from ds.evaluation.references import Moments, read_reference
from ds.evaluation.statistics import Statistics
from ds.models.images import to_float
from ds.pairs.sources import Pairs, digits
from ds.system.machine import device_name

DATA = analytic.GaussianField(size=4, std=0.4)
TEACHER = DATA.teacher(DDIM(), grids.quadratic(5))
REFERENCE = ds.Sampler(DATA.teacher(DDIM(), grids.quadratic(20)))(seed=9, indices=range(50))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    store = ds.generate_pairs(TEACHER, tmp_path_factory.mktemp("pairs") / "store", 20)
    return Pairs(store, range(5, 20))


def tiny(dtype=torch.float32):
    config = ds.nets.UNetConfig(
        image_size=4, in_channels=1, channels=4, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), norm_groups=2,
    )  # fmt: skip
    return ds.Student(config.build().to(dtype), ds.methods.DenoisingStudent())


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


@pytest.mark.parametrize("std", [1e-6, 0.4, 2.0])
def test_the_straightness_of_a_teacher_on_the_straight_path_is_its_integral(std):
    """Of normal data, x_t is z times the standard deviation there: paths of points are straight."""
    data = analytic.Gaussian(0.2, std, (1, 4, 4))
    teacher = data.teacher(DDIM(), grids.uniform(5, ds.schedule.Linear()), ds.schedule.Linear())
    found, parts = (
        evaluate(teacher, REFERENCE, Pixels(), n=10, batch_size=size)["straightness"]
        for size in (128, 50)
    )
    t = torch.linspace(1, 0, 33, dtype=torch.float64)
    velocity = ((1 - t) ** 2 * std**2 + t**2).sqrt().diff() * 32
    assert found == pytest.approx(16 * velocity.var(correction=0).item(), rel=0.15, abs=1e-6)
    assert parts == pytest.approx(found, rel=1e-5, abs=1e-9)


def test_there_is_no_straightness_on_other_paths(pairs):
    assert "straightness" not in evaluate(TEACHER, REFERENCE, Pixels(), n=10)


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
        "dtype": "float32",
        "device": {"type": "cpu", "name": device_name("cpu")},
        "solver": {"type": "ddim", "eta": 0.0},
        "grid": list(TEACHER.grid),
        "held_out": {"n": 15, "fingerprint": pairs.fingerprint()},
        "pairwise": {"n": 8, "reference": 50},
        "n": 8,
        "reference": {
            "n": 50,
            "sha256": hashlib.sha256(REFERENCE.numpy().tobytes()).hexdigest(),
        },
        "extractor": {"name": "pixels", "sha256": "", "dim": 16},
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_network_of_another_dtype_is_not_recorded_as_float32(dtype):
    protocol = evaluate(tiny(getattr(torch, dtype)), REFERENCE, Pixels(), n=4)["protocol"]
    assert protocol["dtype"] == protocol["execution"]["precision"] == dtype
    assert protocol["method"]["type"] == "denoising_student"


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


class Undrawn(torch.nn.Module):
    """A network that must not be called."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x, t):
        raise AssertionError("an image was drawn")


def undrawn(*shape):
    return ds.Student(Undrawn(*shape), ds.methods.DenoisingStudent())


class Narrow(Pixels):
    """An extractor of the caller's that takes RGB images only, and says so by failing."""

    name = "narrow"

    def batch(self, images):
        return torch.nn.functional.conv2d(to_float(images), torch.zeros(2, 3, 1, 1)).flatten(1)


def images(n, *shape):
    return torch.zeros(n, *shape, dtype=torch.uint8)


def moments(width):
    return Moments(torch.zeros(width).double(), torch.eye(width).double(), "")


@pytest.mark.parametrize(
    ("reference", "extractor", "n", "message"),
    [
        (images(9, 8, 8, 3), Pixels(), 9, r"images are \[32, 32, 3\], the reference is \[8, 8, 3"),
        (images(9, 32, 32, 1), Pixels(), 9, r"images are \[32, 32, 3\], the reference is .* 1\]"),
        (images(9, 32, 32, 3).float(), Pixels(), 9, "reference must be uint8"),
        (images(2, 32, 32, 3), Pixels(), 9, "reference must be at least 4, not 2"),
        (images(9, 32, 32, 3), Pixels(), 3, "n must be at least 4, not 3"),
        (images(9, 32, 32, 3), Pixels(), 10**12, "n must be at most 10000000"),
        (images(9, 32, 32, 3), "digits", 9, "digits-classifier takes grey images of 8 x 8, and th"),
        (images(9, 32, 32, 1), Narrow(), 9, r"narrow takes images of any size, .* \[32, 32, 1\]"),
        (moments(2048), Pixels(), 9, r"2,048 features, .* pixels makes 3,072; .*--inception-weigh"),
        (moments(64), AveragedPixels(), 9, "64 features, .* pixels-averaged-to-16 makes 768"),
        (images(9, 512, 512, 3), Pixels(), 9, "786,432 features an image, of pixels, needs .* TB"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_an_image_is_drawn(
    reference, extractor, n, message
):
    large, grey = "786,432" in message, isinstance(extractor, Narrow)
    h, w, c = (512, 512, 3) if large else (32, 32, 1) if grey else (32, 32, 3)
    extractor = object.__new__(Digits) if extractor == "digits" else extractor  # not trained
    with pytest.raises(ValueError, match=message) as found:
        evaluate(undrawn(c, h, w), reference, extractor, n=n)
    assert "\n" not in str(found.value) and "groups" not in str(found.value)


@pytest.mark.parametrize("shape", [(4, 8, 8), (2,)])
def test_samples_that_are_no_pictures_are_refused_before_one_is_drawn(shape):
    with pytest.raises(ValueError, match=r"evaluate: samples of shape .* are no images"):
        evaluate(undrawn(*shape), images(9, 8, 8, 1), Pixels())


def test_held_out_pairs_without_a_model_are_refused(pairs):
    with pytest.raises(ValueError, match="held_out pairs need a model"):
        evaluate(REFERENCE, REFERENCE, Pixels(), held_out=pairs)


def test_a_single_held_out_pair_explains_nothing_and_is_refused_before_the_work(pairs):
    with pytest.raises(ValueError, match="held_out needs 2 pairs or more, not 1"):
        evaluate(
            TEACHER.using(Undrawn(*DATA.shape)),
            REFERENCE,
            Pixels(),
            held_out=Pairs(pairs.store, range(1)),
        )


# Memory.


def test_images_that_are_drawn_are_not_kept(monkeypatch, pairs):
    """No image that an extractor sees is a part of more of them than a batch."""
    seen = []

    class Watching(Pixels):
        def batch(self, images):
            seen.append(images.untyped_storage().nbytes())
            return super().batch(images)

    monkeypatch.setattr("ds.evaluation.statistics.BLOCK", 8)
    monkeypatch.setattr("ds.evaluation.evaluate.PAIRWISE", 12)
    kept = []
    monkeypatch.setattr(
        "ds.evaluation.evaluate.kernel_distance", lambda *sets: kept.extend(sets) or 0.0
    )
    result = evaluate(TEACHER, REFERENCE, Watching(), n=40, batch_size=4, held_out=pairs)
    drawn = seen[1 : 1 + 40 // 4]  # after the probe, and before the reference
    assert drawn == [4 * 16] * 10
    assert [len(features) for features in kept] == [12, 12]
    assert all(features.untyped_storage().nbytes() == 12 * 16 * 8 for features in kept)
    assert result["protocol"]["pairwise"] == {"n": 12, "reference": 12}


def test_distances_of_pairs_are_those_of_the_first_images(monkeypatch):
    monkeypatch.setattr("ds.evaluation.evaluate.PAIRWISE", 20)
    made = ds.Sampler(TEACHER)(seed=4, indices=range(30))
    result, first = evaluate(made, REFERENCE, Pixels()), (pixels(made[:20]), pixels(REFERENCE[:20]))
    assert result["kernel_distance"] == metrics.kernel_distance(*first)
    assert result["precision"] == metrics.precision_recall(first[1], first[0]).precision
    whole = metrics.frechet_distance(pixels(made), pixels(REFERENCE))
    assert result["frechet_distance"] == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("parts", [[50], [1] * 50, [7, 0, 30, 13]])
def test_statistics_have_the_same_bits_in_whatever_parts_rows_come(monkeypatch, parts):
    monkeypatch.setattr("ds.evaluation.statistics.BLOCK", 16)
    features = pixels(REFERENCE) + 1e3

    def found(parts):
        statistics = Statistics(50, 16, lambda x: x, 20)
        for part in features.split(parts):
            statistics.add(part)
        statistics.finish()
        return (
            *statistics.moments,
            statistics.first,
            torch.tensor(statistics.score, dtype=torch.float64),
        )

    mean, covariance, first, score = found(parts)
    assert all(map(torch.equal, found(parts), found([16, 16, 18])))
    assert torch.allclose(mean, features.mean(0), rtol=1e-12)
    assert torch.allclose(covariance, features.T.cov(), rtol=1e-9)
    assert torch.equal(first, features[:20])
    assert score.tolist() == pytest.approx(metrics.inception_score(features), rel=1e-9)


def test_features_that_are_not_finite_name_their_image():
    statistics = Statistics(8, 2, lambda x: None, 0)
    statistics.add(torch.zeros(5, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="the features of image 6 are not finite"):
        statistics.add(torch.tensor([[0.0, 0], [0, math.nan], [0, 0]], dtype=torch.float64))


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
    assert all(map(torch.equal, read_reference("digits")[:2], digits()))


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
    assert torch.equal(read_reference(saved(tmp_path / named, save)).images, REFERENCE)


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
    student = tiny()
    student.save_pretrained(tmp_path / "student", pairs=12)
    (tmp_path / "student" / "notes.txt").write_text("mine")
    result = evaluate(student, REFERENCE, Pixels(), n=20)
    record(tmp_path / "student", ds.load_student(tmp_path / "student"), result)
    noted = ds.load_student(tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    assert noted.provenance["pairs"] == 12 and "| pairs | 12 |" in card
    assert float(noted.provenance["precision"]) == pytest.approx(result["precision"], rel=1e-3)
    assert f"| frechet_distance | {result['frechet_distance']:.4g} |" in card
    assert f"| measured_on | {way(result)} |" in card
    assert way(result).startswith("float32, mode engine, on cpu (")
    assert way(result).endswith("), pixels features of 20 images")
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
