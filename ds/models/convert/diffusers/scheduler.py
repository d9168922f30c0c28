"""The scheduler of a diffusers directory: a schedule, and what the network predicts."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ds.diffusion.predictions import AbstractPrediction, as_prediction
from ds.diffusion.schedules import AbstractSchedule, AbstractTable, LinearBeta, Table
from ds.models.convert.diffusers.fields import check, load, number, whole
from ds.models.convert.imported import Imported, naming

FILE = "scheduler_config.json"
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# Fields of a scheduler about sampling only: they go into the facts.
_SAMPLING = ("timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_sample")


def given(found: Imported, file: Path | None, betas: Tensor | None = None) -> Imported:
    """Return a network with the schedule and the prediction of a scheduler's file.

    Without one, the schedule is that of the betas beside the weights, if there are any. What then
    stays as it was is said to be assumed.
    """
    if file is not None:
        schedule, prediction, facts = read(file)
        return found._replace(schedule=schedule, prediction=prediction, facts=found.facts | facts)
    if betas is not None:
        found, what = found._replace(schedule=_table(betas)), "from the betas beside the weights"
    else:
        what = "assumed"
    facts = found.facts | {"schedule": f"{what}, there is no {FILE}"}
    sentence = (
        f"there is no scheduler beside the weights: the schedule is {what}, "
        f"{found.schedule!s:.80}, and the prediction is assumed, {found.prediction!r}; if that is "
        f"wrong, pass scheduler=FILE, or write it down with `dstudent convert SOURCE OUT "
        f"--scheduler FILE`"
    )
    return found._replace(facts=facts, assumed=(*found.assumed, sentence))


def _table(betas: Tensor) -> AbstractTable:
    """Return the schedule of betas, which files have in float32: the usual line, or a table."""
    usual, betas = LinearBeta(), betas.double()
    if betas.shape == (usual.num_steps,) and betas.allclose(usual.betas(), rtol=1e-6, atol=0):
        return usual
    return Table(tuple(betas.tolist()))


def read(file: Path) -> tuple[AbstractTable, Any, dict[str, Any]]:
    """Return a network's schedule, prediction and facts on sampling, from its scheduler's file."""
    fields = {"prediction_type": "epsilon", **load(file)}
    check(fields, "beta_schedule", ["linear"].__contains__, "'linear'", file)
    check(fields, "num_train_timesteps", whole, "a whole number", file)
    for field in ("beta_start", "beta_end"):
        check(fields, field, number, "a number", file)
    for field in ("trained_betas", "rescale_betas_zero_snr"):
        check(fields, field, lambda value: not value, "null or false", file)
    known = list(_PREDICTIONS)
    check(fields, "prediction_type", known.__contains__, " or ".join(map(repr, known)), file)
    with naming(file):
        betas = (float(fields["beta_start"]), float(fields["beta_end"]))
        schedule = LinearBeta(fields["num_train_timesteps"], *betas)
    facts = {"scheduler": fields.get("_class_name")}
    facts |= {field: fields[field] for field in _SAMPLING if field in fields}
    return schedule, _PREDICTIONS[fields["prediction_type"]], facts


def fields(
    schedule: AbstractSchedule, prediction: AbstractPrediction | str, where: Path
) -> dict[str, Any]:
    """Return the fields of a DDIMScheduler with our schedule, stepping to the data at last."""
    types = {as_prediction(ours): theirs for theirs, ours in _PREDICTIONS.items()}
    prediction = as_prediction(prediction)
    if not isinstance(schedule, LinearBeta) or prediction not in types:
        raise ValueError(
            f"{where}: cannot write {schedule} with the prediction {prediction}; accepted are "
            f"LinearBeta and {', '.join(map(str, types))}"
        )
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": types[prediction],
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }
