"""Models with classes: labels drawn by index or given, through samplers in every mode."""

import pickle
from dataclasses import replace

import pytest
import torch

import ds
from ds.analytic import GaussianField, GaussianMixture
from ds.diffusion.conditions import Conditions
from ds.diffusion.grids import quadratic
from ds.diffusion.solvers import DDIM
from ds.methods.base import built
from ds.models.execution import Execution, Runner
from ds.models.teacher import Teacher
from ds.nets import MLPConfig, UNetConfig

DATA = GaussianMixture()
TEACHER = DATA.teacher(DDIM(), quadratic(10), conditional=True)
FIELD = GaussianField(size=4).teacher(DDIM(), quadratic(5))
TOLD = MLPConfig(conditions=("guidance",), classes=3)
PICTURES = UNetConfig(
    image_size=8, in_channels=1, channels=8, channel_mult=(1,), num_res_blocks=1,
    attention_resolutions=(), norm_groups=4, classes=3,
)  # fmt: skip


def student(config=PICTURES) -> ds.Student:
    """A student with random weights, all of which matter."""
    net = built(config).eval()
    with torch.no_grad():
        for w in net.parameters():
            w.add_(0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(w.numel())))
    return ds.Student(net, ds.methods.DenoisingStudent())


def points(model=TEACHER, indices=range(20), *, labels=None, batch_size=256, **options):
    sampler = ds.Sampler(model, batch_size=batch_size, **options)
    return torch.cat([*sampler.batches(5, indices, labels)])


def test_a_model_says_what_it_is_asked_for():
    assert (TEACHER.takes, TEACHER.classes) == (("label",), 3)
    assert (FIELD.takes, FIELD.classes) == ((), 0)
    assert DATA.teacher(DDIM(), quadratic(2)).takes == ()
    told = student(TOLD)
    assert (told.takes, told.classes) == (("label", "guidance"), 3)
    flow = ds.Student(MLPConfig(conditions=("h",)).build(), ds.methods.MeanFlow())
    assert flow.takes == ()  # the method tells h itself


def test_an_index_draws_its_own_class_by_default():
    label = Conditions(range(3)).draw(5, range(20))["label"]
    expected = TEACHER.sample(ds.noise(5, range(20), (2,)), cond={"label": label})
    assert torch.equal(points(), expected)
    nearest = torch.cdist(expected, torch.tensor(DATA.means)).argmin(1) // 2
    assert torch.equal(nearest, label)  # the teacher is exact: each sample is of its class
    assert label.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_a_labelled_sample_depends_on_its_seed_and_index_only(batch_size):
    picks = [9, 3, 3, 0, 2, 19]
    assert torch.equal(points(indices=picks, batch_size=batch_size), points()[picks])
    given = list(range(3)) * 7
    few = points(indices=picks, labels=[given[i] for i in picks], batch_size=batch_size)
    assert torch.equal(few, points(labels=given[:20])[picks])


def test_no_indices_have_no_labels():
    assert [*ds.Sampler(TEACHER).batches(0, [], [])] == []


def test_given_labels_take_the_place_of_drawn_ones():
    z = ds.noise(5, range(20), (2,))
    for given in (2, [2] * 20, torch.full((20,), 2)):
        two = TEACHER.sample(z, cond={"label": torch.full((20,), 2)})
        assert torch.equal(points(labels=given), two)
    assert torch.equal(points(conditions=Conditions((2,))), points(labels=2))
    nobody = DATA.teacher(DDIM(), quadratic(10)).sample(z)
    torch.testing.assert_close(points(labels=-1), nobody, rtol=0, atol=1e-5)


def test_images_of_given_noise_have_the_labels_that_are_given():
    model, z = student(), ds.noise(5, range(6), (1, 8, 8))
    sampler = ds.Sampler(model, batch_size=4, execution=Execution())
    assert torch.equal(sampler.draw(z, labels=1), sampler(5, range(6), 1))
    assert torch.equal(sampler.draw(z, [0, 1, 2, 0, 1, 2]), sampler(5, range(6), [0, 1, 2] * 2))
    drawn = Conditions(range(3)).draw(0, range(6))["label"]
    assert torch.equal(sampler.draw(z), sampler.draw(z, drawn))
    assert not torch.equal(sampler.draw(z, 0), sampler.draw(z, 1))
    assert torch.equal(sampler.sample(z, cond={"label": drawn}), sampler.sample(z))


@pytest.mark.parametrize("labels", [12, [0] * 19 + [3], torch.full((20,), -2)])
def test_a_label_that_does_not_exist_is_refused_before_any_work(labels):
    message = r"^Sampler: label (12|3|-2) does not exist; the model has classes 0 to 2; -1 is no"
    with pytest.raises(ValueError, match=message):
        ds.Sampler(TEACHER).batches(0, range(20), labels)


def test_a_label_of_a_sample_made_by_hand_is_checked_too():
    with pytest.raises(ValueError, match=r"^teacher.sample: label 12 does not exist"):
        TEACHER.sample(torch.zeros(1, 2), cond={"label": torch.tensor([12])})
    with pytest.raises(ValueError, match=r"^student.sample: \[2\] labels were given for 1"):
        student().sample(torch.zeros(1, 1, 8, 8), cond={"label": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match=r"takes the conditions label, not \(none\)"):
        student().sample(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("model", "conditions", "message"),
    [
        (TEACHER, Conditions((1, 3)), "label 3 does not exist; the model has classes 0 to 2"),
        (FIELD, Conditions((0,)), "the model has no classes"),
        (
            TEACHER,
            Conditions(guidance=2.0),
            r"teacher takes no guidance scale; leave .* \(2.0\) out",
        ),
        (TEACHER, {"classes": (1,)}, "conditions must be a ds.Conditions or None, not {'classes'"),
        (student(TOLD), None, "student is told a guidance scale; give one, or a range"),
    ],
)
def test_conditions_that_a_model_lacks_are_refused(model, conditions, message):
    with pytest.raises(ValueError, match=message):
        ds.Sampler(model, conditions=conditions)


def test_labels_of_a_model_without_classes_are_refused():
    with pytest.raises(ValueError, match="Sampler: the model has no classes, leave the labels out"):
        ds.Sampler(FIELD)(0, range(3), labels=1)


def test_a_student_is_told_a_guidance_scale():
    model, asked = student(TOLD), Conditions(guidance=(1.0, 4.0))
    drawn = Conditions(range(3), (1.0, 4.0)).draw(5, range(20))
    expected = model.sample(ds.noise(5, range(20), (2,)), cond=drawn)
    assert torch.equal(points(model, conditions=asked), expected)
    other = points(model, conditions=replace(asked, guidance=3.0))
    assert (other - expected).abs().amin(1).min() > 0


def test_a_conditional_sampler_is_pickled_with_its_conditions():
    sampler = ds.Sampler(TEACHER, batch_size=4, conditions=Conditions((0, 2)))
    again = pickle.loads(pickle.dumps(sampler))
    assert again.conditions == Conditions((0, 2))
    (a,), (b,) = sampler.batches(1, range(4)), again.batches(1, range(4))
    assert torch.equal(a, b)


def test_a_compiled_conditional_student_draws_the_same(compiler):
    model = student(replace(TOLD, width=8, depth=1))
    options = {"conditions": Conditions(guidance=2.0), "batch_size": 8, "indices": range(16)}
    compiled = points(model, execution=Execution(mode="compile"), **options)
    torch.testing.assert_close(compiled, points(model, **options), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [PICTURES, replace(PICTURES, conditions=("guidance",))])
def test_the_engine_tells_each_image_its_class_and_scale(config):
    """Alone and in a captured loop, whose buffers are of one batch; the last is not full."""
    model, z = student(config), ds.noise(5, range(10), (1, 8, 8))
    cond = Conditions(range(3), (1.0, 3.0) if config.conditions else None).draw(5, range(10))
    expected = model.sample(z, cond=cond)
    assert Execution.default(model).mode == "engine"
    for mode in ("engine", "cuda_graph"):  # without a GPU the loop runs step by step
        made, finite = Runner(model, Execution(mode=mode), 4).sample(z, cond)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
        assert finite
    moved = {**cond, "label": (cond["label"] + 1) % 3}
    assert (model.sample(z, cond=moved) - expected).abs().amax() > 1e-2


def test_a_guided_teacher_draws_the_scale_of_each_index():
    teacher = replace(TEACHER, denoiser=ds.Guided(TEACHER.denoiser, None))
    asked = Conditions(guidance=(1.0, 3.0))
    cond = Conditions(range(3), (1.0, 3.0)).draw(5, range(20))
    expected = teacher.sample(ds.noise(5, range(20), (2,)), cond=cond)
    assert torch.equal(points(teacher, conditions=asked), expected)
    assert not torch.equal(points(), expected)


def test_the_cost_of_a_conditional_sample_is_measured():
    assert ds.Sampler(TEACHER, batch_size=2).seconds_each() > 0
    told = ds.Sampler(student(TOLD), batch_size=2, conditions=Conditions(guidance=1.0))
    assert told.seconds_each() > 0


def test_a_network_of_a_users_own_says_what_it_takes():
    class Own(torch.nn.Module):
        shape, takes, classes = (2,), ("label",), 4

        def forward(self, x, t, *, label):
            return x - label[:, None]

    model = Teacher(ds.Denoiser(Own(), ds.schedule.LinearBeta(), "x0"), DDIM(), quadratic(2))
    label = Conditions(range(4)).draw(5, range(20))["label"]
    assert torch.equal(
        points(model), model.sample(ds.noise(5, range(20), (2,)), cond={"label": label})
    )
