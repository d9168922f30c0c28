"""The scheduler of a diffusers directory: a schedule, what the network predicts, and a solver.

What a scheduler says about steps is followed where it changes what DDIM draws. The rest is said to
be left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ds.diffusion import grids
from ds.diffusion.grids import Grid
from ds.diffusion.predictions import AbstractPrediction, LearnedVariance, Velocity, as_prediction
from ds.diffusion.schedules import (
    AbstractSchedule,
    AbstractTable,
    Cosine,
    Linear,
    LinearBeta,
    ScaledLinear,
    Sigmoid,
    Table,
    zero_terminal_snr,
)
from ds.diffusion.solvers import DDIM, AbstractSolver, Clipped, DDIMToFirst, bare
from ds.models.convert.diffusers.fields import check, list_of, load, number, one_of, whole
from ds.models.convert.imported import Imported, naming

FILE = "scheduler_config.json"
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_SPACINGS = ("leading", "trailing", "linspace")
# What a field is that a file leaves out, for most classes: of schedules and networks, and of steps.
_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
}
_STEPS: dict[str, Any] = {
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
_LEADING = {"timestep_spacing": "leading"}
_CLIPPING = {**_LEADING, "clip_sample": True}
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
_CONSISTENCY = {**_LEADING, **_LATENT, "beta_schedule": "scaled_linear"}
# The classes whose schedule is a table of betas, with the defaults of their own.
_CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _CLIPPING,
    "DDIMInverseScheduler": _CLIPPING,
    "DDIMParallelScheduler": _CLIPPING,
    "DDPMScheduler": _CLIPPING,
    "DDPMParallelScheduler": _CLIPPING,
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverSDEScheduler": _LATENT,
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _LATENT,
    "KDPM2AncestralDiscreteScheduler": _LATENT,
    "KDPM2DiscreteScheduler": _LATENT,
    "LCMScheduler": _CONSISTENCY,
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {**_LEADING, "set_alpha_to_one": False},
    "RePaintScheduler": _CLIPPING,
    "SASolverScheduler": {},
    "TCDScheduler": _CONSISTENCY,
    "UniPCMultistepScheduler": {},
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True},
}
# These leave some signal at the last index of a rescaled table: alpha-bar is 2**-24.
_FINITE = (
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
_CM = "CMStochasticIterativeScheduler"
_CM_DEFAULTS = {
    "num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5,
    "s_noise": 1.0, "rho": 7.0, "clip_denoised": True,
}  # fmt: skip
FLOW = "FlowMatchEulerDiscreteScheduler"
_FLOW_STEPS = 50  # where the file does not tell how many
# What moves its times or its steps in ways that are not read.
_FLOW_OFF = (
    "use_dynamic_shifting",
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)
_FLOW_DEFAULTS = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    **dict.fromkeys(_FLOW_OFF, False),
}
# Fields that would change what the network is fed, and the values that do not.
_FIXED = {"use_flow_sigmas": [False], "timestep_type": ["discrete"]}


class Sampling(NamedTuple):
    """What a scheduler says of its network, and sentences about what is done with it.

    `grid` is None where the times of diffusers are those that we take by default.
    """

    schedule: AbstractSchedule
    prediction: Any  # "eps", "x0", "v" or a Velocity
    solver: AbstractSolver
    grid: Grid | None
    facts: dict[str, Any]
    said: tuple[str, ...]


def given(found: Imported, file: Path | None, betas: Tensor | None = None) -> Imported:
    """Return a network with what a scheduler's file says of it.

    Without one, the schedule is that of the betas beside the weights, if there are any. What then
    stays as it was is said to be assumed.
    """
    learned = found.config.outputs != found.config.in_channels
    if file is not None:
        s = read(file)
        mean = as_prediction(s.prediction)
        return found._replace(
            schedule=s.schedule,
            prediction=LearnedVariance(mean) if learned else s.prediction,
            solver=s.solver,
            grid=s.grid,
            facts=found.facts | s.facts,
            said=(*found.said, *s.said),
        )
    if betas is not None:
        found, what = found._replace(schedule=_found(betas)), "from the betas beside the weights"
    else:
        what = "assumed"
    if learned:
        found = found._replace(prediction=LearnedVariance())
    facts = found.facts | {"schedule": f"{what}, there is no {FILE}"}
    sentence = (
        f"there is no scheduler beside the weights: the schedule is {what}, "
        f"{found.schedule!s:.80}, and the prediction is assumed, {found.prediction!r}; if that is "
        f"wrong, pass scheduler=FILE, or write it down with `dstudent convert SOURCE OUT "
        f"--scheduler FILE`"
    )
    return found._replace(facts=facts, assumed=(*found.assumed, sentence))


def _found(betas: Tensor) -> AbstractTable:
    """Return the schedule of betas, which files have in float32: the usual line, or a table."""
    usual, betas = LinearBeta(), betas.double()
    if betas.shape == (usual.num_steps,) and betas.allclose(usual.betas(), rtol=1e-6, atol=0):
        return usual
    return Table(tuple(betas.tolist()))


def read(file: Path) -> Sampling:
    """Read a scheduler's file. Raise ValueError, naming it, for a path that is not ours."""
    there = load(file, finite=False)  # lambda_min_clipped is -Infinity in many files
    name = there.get("_class_name", "DDIMScheduler")
    if name == FLOW:
        return _flow(there, file)
    if not isinstance(name, str) or name not in _CLASSES:
        tables = ", ".join(c.removesuffix("Scheduler") for c in _CLASSES)
        raise ValueError(
            f"{file}: _class_name is {name!r}, whose schedule is not read; accepted are {FLOW} and "
            f"those with a table of betas: {tables}"
        )
    fields = {**_SCHEDULE, **_STEPS, **_CLASSES[name], **there}
    _check(fields, file)
    with naming(file):
        schedule = _schedule(fields, name)
        grid = _grid(fields, schedule)
        solver, said = _solver(fields)
    if grid is not None:
        said.append(
            f"its own grid has {len(grid)} times from {grid[0]:g} to {grid[-1]:g}, "
            f"{fields['timestep_spacing']}; --solve and grid= choose others"
        )
    used = {*_SCHEDULE, *_STEPS, *_FIXED}
    rest = {k: v for k, v in there.items() if k not in used and not k.startswith("_")}
    if left := ", ".join(f"{k} {v!r}" for k, v in rest.items() if v not in (None, False, [])):
        said.append(f"the solver is DDIM, so these fields of {name} are left out: {left}")
    facts = {"scheduler": there.get("_class_name")}
    facts |= {field: there[field] for field in _STEPS if field in there}
    lines = tuple(f"{file}: {line}" for line in said)
    return Sampling(schedule, _PREDICTIONS[fields["prediction_type"]], solver, grid, facts, lines)


def _flow(there: dict[str, Any], file: Path) -> Sampling:
    """Return what the scheduler of a flow on the straight path says: even steps, then shifted."""
    fields = {**_FLOW_DEFAULTS, **there}
    check(fields, "num_train_timesteps", whole, "a whole number", file)
    check(fields, "shift", lambda value: number(value) and value > 0, "a number above 0", file)
    last = fields["shift_terminal"]
    check(
        fields,
        "shift_terminal",
        lambda value: value is None or (number(value) and 0 < value < 1),
        "null or a number between 0 and 1",
        file,
    )
    for field in _FLOW_OFF:
        check(fields, field, one_of([False, None]), "false", file)
    even = 1 / last if last else 0.0  # the steps that `calls` writes so
    told = fields["shift"] == 1 and even > 1.5 and abs(even - round(even)) < 1e-6
    n = round(even) if told else _FLOW_STEPS
    grid = _flow_grid(n, fields["num_train_timesteps"], fields["shift"], last)
    said = (
        f"{file}: its grid has {n} times from {grid[0]:g} to {grid[-1]:g}, which the file "
        f"{'implies' if told else 'does not tell'}; --solve and grid= choose others"
    )
    facts = {"scheduler": FLOW}
    velocity = Velocity(float(fields["num_train_timesteps"]))
    return Sampling(Linear(), velocity, DDIM(), grid, facts, (said,))


def _flow_grid(n: int, count: int, shift: float, last: float | None) -> Grid:
    """Return the n times of diffusers, which end at `last`, else near 1 / count."""

    def shifted(t: Any) -> Any:
        return shift * t / (1 + (shift - 1) * t)

    times = shifted(np.linspace(1, shifted(1 / count), n))
    if last:
        times = 1 - (1 - times) * (1 - last) / (1 - times[-1])
    return (1.0, *times[1:].tolist())


def is_of_consistency(file: Path) -> bool:
    """Return whether a file is the scheduler of a consistency model, which draws in few calls."""
    return load(file, finite=False).get("_class_name") == _CM


def levels(file: Path) -> dict[str, Any]:
    """Return the fields of ds.methods.ConsistencyDistillation that a consistency model's file has.

    Raises ValueError, naming it, for a field with another value than every known model has.
    """
    fields = {**_CM_DEFAULTS, **load(file)}
    check(fields, "num_train_timesteps", whole, "a whole number", file)
    for field in ("sigma_min", "sigma_max", "sigma_data"):
        check(fields, field, number, "a number", file)
    check(fields, "clip_denoised", lambda value: type(value) is bool, "true or false", file)
    for field, value in (("s_noise", 1), ("rho", 7)):
        check(fields, field, one_of([value]), str(value), file)
    ours = {"num_train_timesteps": "num_levels", "clip_denoised": "clip"}
    names = ("num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "clip_denoised")
    return {ours.get(name, name): fields[name] for name in names}


def _check(fields: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError for the first field with a value that is not accepted."""
    count = fields["num_train_timesteps"]
    check(fields, "num_train_timesteps", whole, "a whole number", file)
    if fields["trained_betas"] is None:
        names = [*_TABLES]
        check(fields, "beta_schedule", names.__contains__, " or ".join(map(repr, names)), file)
    else:
        check(fields, "trained_betas", list_of(number), "a list of numbers", file)
        if len(fields["trained_betas"]) != count:
            raise ValueError(
                f"{file}: trained_betas has {len(fields['trained_betas'])} numbers; accepted are "
                f"{count}, its num_train_timesteps"
            )
    for field in ("rescale_betas_zero_snr", "clip_sample", "thresholding", "set_alpha_to_one"):
        check(fields, field, lambda value: type(value) is bool, "true or false", file)
    if fields["trained_betas"] is None and fields["beta_schedule"] != "squaredcos_cap_v2":
        for field in ("beta_start", "beta_end"):
            check(fields, field, number, "a number", file)
    for field in ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"):
        check(fields, field, lambda value: number(value) and value > 0, "a number above 0", file)
    check(fields, "steps_offset", lambda v: v == 0 or whole(v), "a whole number", file)
    for field, known in (("prediction_type", [*_PREDICTIONS]), ("timestep_spacing", _SPACINGS)):
        check(fields, field, known.__contains__, " or ".join(map(repr, known)), file)
    for field, known in _FIXED.items():
        if field in fields:
            check(fields, field, known.__contains__, " or ".join(map(repr, known)), file)


_TABLES = {
    "linear": LinearBeta,
    "scaled_linear": ScaledLinear,
    "squaredcos_cap_v2": Cosine,
    "sigmoid": Sigmoid,
}


def _schedule(fields: Mapping[str, Any], name: str) -> AbstractTable:
    kind, count = _TABLES.get(fields["beta_schedule"]), fields["num_train_timesteps"]
    schedule: AbstractTable
    if (betas := fields["trained_betas"]) is not None:
        schedule = Table(tuple(betas))
    elif kind is Cosine:
        schedule = Cosine(count)
    else:
        assert kind is not None
        schedule = kind(count, float(fields["beta_start"]), float(fields["beta_end"]))
    if not fields["rescale_betas_zero_snr"]:
        return schedule
    schedule = zero_terminal_snr(schedule)
    if name in _FINITE:
        before = schedule.alphas_bar()[-2].item()
        schedule = Table((*schedule.values[:-1], 1 - 2**-24 / before))
    return schedule


def _grid(fields: dict[str, Any], schedule: AbstractTable) -> Grid | None:
    """Return the times of a scheduler; None for leading ones from 0. It may change the spacing."""
    spacing, offset = fields["timestep_spacing"], fields["steps_offset"]
    if fields["rescale_betas_zero_snr"] and spacing == "leading":
        spacing = fields["timestep_spacing"] = "trailing"  # or the end without signal is unused
    if spacing != "leading":
        return grids.uniform(min(50, schedule.num_steps), schedule, spacing=spacing)
    if not offset:
        return None
    n = max(1, min(50, schedule.num_steps - offset))
    return grids.uniform(n, schedule, offset=offset)


def _solver(fields: Mapping[str, Any]) -> tuple[AbstractSolver, list[str]]:
    """Return DDIM as a scheduler has it, and a sentence for each way in which it is not ours."""
    solver: AbstractSolver = DDIM()
    said, off = [], "pass solver=ds.solvers.DDIM() or --solve.clip none to leave that out"
    if not fields["set_alpha_to_one"]:
        solver = DDIMToFirst()
        said.append(f"set_alpha_to_one is false: the last step ends at index 0's noise; {off}")
    if fields["thresholding"]:
        quantile, most = fields["dynamic_thresholding_ratio"], fields["sample_max_value"]
        solver = Clipped(solver, quantile=quantile, most=most)
        said.append(f"each predicted image is clipped to its {quantile:g} quantile; {off}")
    elif fields["clip_sample"]:
        limit = fields["clip_sample_range"]
        solver = Clipped(solver, limit)
        said.append(f"each predicted image is clipped to [-{limit:g}, {limit:g}]; {off}")
    return solver, said


def fields(
    schedule: AbstractSchedule,
    prediction: AbstractPrediction | str,
    where: Path,
    solver: AbstractSolver | None = None,
    grid: Grid | None = None,
) -> dict[str, Any]:
    """Return the fields of a DDIMScheduler with our schedule, and the clipping of our solver.

    With a learned variance it is a DDPMScheduler. Its spacing is that of the grid, if diffusers has
    such a one, else leading.
    """
    types = {as_prediction(ours): theirs for theirs, ours in _PREDICTIONS.items()}
    prediction = as_prediction(prediction)
    learned = isinstance(prediction, LearnedVariance)
    prediction = prediction.prediction if learned else prediction
    if not isinstance(schedule, AbstractTable) or prediction not in types:
        raise ValueError(
            f"{where}: cannot write {schedule} with the prediction {prediction}; accepted are "
            f"tables such as LinearBeta() and {', '.join(map(str, types))}"
        )
    clipped = solver if isinstance(solver, Clipped) else None
    static = clipped is not None and clipped.quantile is None
    spacing, offset = _spaced(schedule, grid or ())
    # Of diffusers' steps only DDPM's take a network with a learned variance.
    steps = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    if not learned:
        last = (clipped.solver if clipped else solver) != DDIMToFirst()
        steps = {"_class_name": "DDIMScheduler", "set_alpha_to_one": last}
    return {
        **steps,
        **_betas(schedule),
        "prediction_type": types[prediction],
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "set_alpha_to_one": bare(solver) != DDIMToFirst(),
        "clip_sample": static,
        "clip_sample_range": clipped.limit if clipped and static else 1.0,
        "thresholding": clipped is not None and not static,
        "dynamic_thresholding_ratio": clipped.quantile if clipped and not static else 0.995,
        "sample_max_value": clipped.most if clipped else 1.0,
        "rescale_betas_zero_snr": False,
    }


def _betas(schedule: AbstractTable) -> dict[str, Any]:
    """Return the fields of a schedule: a name where DDIMScheduler has one, else its betas."""
    found = {
        "num_train_timesteps": schedule.num_steps,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
    }
    if isinstance(schedule, LinearBeta | ScaledLinear):
        name = "linear" if isinstance(schedule, LinearBeta) else "scaled_linear"
        ends = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
        return found | ends | {"beta_schedule": name}
    if schedule == Cosine(schedule.num_steps):
        return found | {"beta_schedule": "squaredcos_cap_v2"}
    return found | {"trained_betas": schedule.betas().tolist()}


def _spaced(schedule: AbstractTable, grid: Grid) -> tuple[str, int]:
    """Return the spacing and the offset of diffusers that give a grid, or ("leading", 0)."""
    for spacing in _SPACINGS if len(grid) <= schedule.num_steps and grid else ():
        offset = int(grid[-1]) if spacing == "leading" else 0
        try:
            same = grids.uniform(len(grid), schedule, spacing=spacing, offset=offset) == grid
        except ValueError:  # the offset of a grid that is not a leading one
            continue
        if same:
            return spacing, offset
    return "leading", 0
