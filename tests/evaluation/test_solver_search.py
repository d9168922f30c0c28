"""What a frontier says, held against endpoints that are known."""

import pytest
import torch

from ds import Denoiser, Teacher, analytic, noise
from ds.diffusion.grids import quadratic
from ds.diffusion.schedules import EDM, Linear
from ds.diffusion.solvers import DCW, DDIM, integrate
from ds.evaluation.solver_search import candidates, corrected, fidelity, frontier, plan_table
from ds.training.presets import SolveConfig
from tests.nets.test_unet import build

MIXTURE = analytic.GaussianMixture()
DENOISER = MIXTURE.teacher(DDIM(), (0,)).denoiser
PAPER = SolveConfig()
FEW = [
    SolveConfig(solver=solver, grid=grid, steps=steps)
    for solver in ("ddim", "dpmpp_3m", "unipc")
    for grid in ("quadratic", "log_snr")
    for steps in (12, 24)
]


def z(count=64):
    return noise(0, range(count), MIXTURE.shape, dtype=torch.float64)


@pytest.fixture(scope="module")
def found():
    return frontier(DENOISER, z(), PAPER, FEW)


def test_errors_are_distances_to_the_exact_endpoint(found):
    exact = MIXTURE.endpoint(z(), *DENOISER.schedule.at(800))
    assert found.reference_error < 1e-3
    for row in found.rows:
        solver, grid = row.solve.build(DENOISER.schedule)
        x = MIXTURE.teacher(solver, grid).sample(z())
        # both references miss the step from time 0 to the data, by some 5e-4
        assert row.error == pytest.approx((x - exact).square().mean().sqrt().item(), abs=1e-3)


@pytest.mark.parametrize("schedule", [EDM(), Linear()], ids=repr)
def test_a_schedule_in_continuous_time_has_a_frontier(schedule):
    denoiser = MIXTURE.teacher(DDIM(), (schedule.noise,), schedule).denoiser
    few = [SolveConfig(solver=solver, steps=n) for solver in ("ddim", "heun") for n in (8, 16)]
    found = frontier(denoiser, z(8), SolveConfig(steps=48), few)
    exact = MIXTURE.endpoint(schedule.prior(z(8)), *schedule.at(schedule.noise))
    solver, grid = found.asked.solve.build(schedule)
    x = MIXTURE.teacher(solver, grid, schedule).sample(z(8))
    error = (x - exact).square().mean().sqrt().item()
    assert found.asked.error == pytest.approx(error, abs=3 * found.reference_error + 1e-4)
    assert len({row.solve.grid for row in found.rows}) == 1 and candidates(schedule, grid[0])


def test_rows_are_sorted_and_the_frontier_is_what_no_cheaper_row_reaches(found):
    assert [row.nfe for row in found.rows] == sorted(row.nfe for row in found.rows)
    for row in found.rows:
        rivals = [r for r in found.rows if r.nfe <= row.nfe and r is not row]
        assert row.best == all(r.error > row.error for r in rivals)


def test_24_calls_answer_for_the_96_of_the_paper(found):
    assert found.asked.nfe == 96 and found.asked.solve == PAPER
    assert found.answer.nfe <= 24 and found.answer.error <= found.asked.error
    table = plan_table(found, seconds=0.5, count=7200).splitlines()
    assert "--solve.solver " in table[-1] and "96 calls of ddim" in table[-1]
    paper = next(line for line in table if line.split()[:4] == ["96", "ddim", "quadratic", "100"])
    assert paper.split()[5:7] == ["4.8e+04", "96"]  # 48 s an image


def test_what_nothing_beats_is_kept():
    found = frontier(DENOISER, z(4), SolveConfig(solver="unipc", steps=48), FEW[:2])
    assert found.answer is None
    assert plan_table(found, 1, 1).endswith("47 calls of unipc do: keep them.")


def test_a_grid_that_begins_elsewhere_is_refused():
    with pytest.raises(ValueError, match="begins at 980, not at 800"):
        frontier(DENOISER, z(2), PAPER, [SolveConfig(grid="uniform", steps=50)])


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(RuntimeError, match="not finite"):
        frontier(DENOISER, z(2) * torch.nan, PAPER, [])


def test_fidelity_is_of_the_precisions_that_there_are(monkeypatch):
    """fp8 where its gate is open, for the networks that can be run in it."""
    unet = Teacher(Denoiser(build(), DENOISER.schedule), DDIM(), quadratic(5))
    monkeypatch.delenv("DS_EXPERIMENTAL", raising=False)
    assert fidelity(unet, seed=0, count=8).keys() == {"bfloat16"}
    monkeypatch.setenv("DS_EXPERIMENTAL", "fp8")
    moved = fidelity(unet, seed=0, count=8)
    assert moved.keys() == {"bfloat16", "fp8"}
    assert 0 < moved["bfloat16"] < moved["fp8"]
    z = noise(0, range(8), unet.shape)
    fp8 = unet.engine(8, dtype=torch.float8_e4m3fn).sample(z)
    error = (fp8 - unet.sample(z)).square().mean().sqrt().item()
    assert moved["fp8"] == pytest.approx(error, rel=1e-3)
    points = MIXTURE.teacher(DDIM(), quadratic(5))
    assert fidelity(points, seed=0, count=8).keys() == {"bfloat16"}


def test_a_plan_fits_a_correction_and_measures_it():
    """Of a field, whose data are Gaussian, the correction gives most of the spectrum back."""
    field, schedule = analytic.GaussianField(size=8), EDM()
    denoiser = field.teacher(DDIM(), (80.0,), schedule).denoiser
    noises = noise(0, range(16), field.shape, dtype=torch.float64)
    asked = SolveConfig(grid="karras", steps=13)
    few = [SolveConfig(grid="karras", steps=8), SolveConfig(solver="unipc", grid="karras", steps=8)]
    found = corrected(frontier(denoiser, noises, asked, few), denoiser, noises)
    assert [c.plain for c in found.corrections] == [found.asked, found.rows[0]]
    for c in found.corrections:
        solver, grid = c.plain.solve.build(schedule)
        assert c.with_dcw.solve.build(schedule) == (DCW(solver, low=c.with_dcw.solve.dcw), grid)
        x = integrate(denoiser, DCW(solver, low=c.with_dcw.solve.dcw), grid, 80 * noises)
        exact = field.endpoint(80 * noises, *schedule.at(80))
        assert c.with_dcw.error == pytest.approx(
            (x - exact).square().mean().sqrt().item(), abs=1e-3
        )
        assert c.with_dcw.error < c.plain.error
    first = found.corrections[0]
    assert first.with_dcw.solve.dcw > 0.01 and first.gaussian == pytest.approx(0.03, abs=0.02)
    assert first.with_dcw.error < 0.5 * first.plain.error
    assert first.spectrum_errors[1] < 0.5 * first.spectrum_errors[0]
    shown = plan_table(found, seconds=1, count=1).splitlines()
    line = next(line for line in shown if f"{first.with_dcw.solve.dcw:.4f}" in line)
    assert line.split()[:5] == ["13", "ddim", "karras", "13", f"{first.with_dcw.solve.dcw:.4f}"]


def test_a_correction_that_makes_it_worse_is_not_offered(found):
    worse = corrected(found, DENOISER, z())
    for c in worse.corrections:
        assert c.with_dcw.error <= c.plain.error
        assert (c.with_dcw.solve.dcw == 0) == (c.with_dcw.error == c.plain.error)


def test_the_correction_of_a_corrected_row_is_fitted_anew(found):
    """A strength that was asked for is not fitted on top of."""
    asked = SolveConfig(steps=12, dcw=0.05)
    rows = [
        corrected(frontier(DENOISER, z(8), one, []), DENOISER, z(8)).corrections[0]
        for one in (asked, SolveConfig(steps=12))
    ]
    assert rows[0] == rows[1] and rows[0].plain.solve.dcw == 0


def test_one_noise_has_no_spectrum_to_fit_to(caplog):
    few = frontier(DENOISER, z(1), PAPER, [])
    assert corrected(few, DENOISER, z(1)).corrections == ()
    assert "2 or more noises" in caplog.text


def test_a_solver_that_adds_noise_is_refused():
    with pytest.raises(ValueError, match="ancestral adds fresh noise"):
        frontier(DENOISER, z(2), SolveConfig(solver="ancestral"))
