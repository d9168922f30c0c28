"""The scheduler of a diffusers directory: a schedule, and what the network predicts."""

from pathlib import Path
from typing import Any

from ds.diffusion.predictions import AbstractPrediction, as_prediction
from ds.diffusion.schedules import AbstractSchedule, LinearBeta
from ds.models.convert.diffusers.fields import check, load, number, whole
from ds.models.convert.imported import naming
from ds.system.files import present

FILE = "scheduler_config.json"
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# Fields of a scheduler about sampling only: they go into the facts.
_SAMPLING = ("timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_sample")


def read(folder: Path) -> tuple[LinearBeta, Any, dict[str, Any]]:
    """Return a network's schedule, prediction and facts on sampling, from its scheduler."""
    places = (folder / FILE, folder.parent / "scheduler" / FILE)
    file = next((place for place in places if present(place)), None)
    if file is None:
        return LinearBeta(), "eps", {"schedule": f"assumed, there is no {FILE}"}
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
