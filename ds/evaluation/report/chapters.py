"""The page of a run: what it is, its samples, its losses, its distances, and how it was set."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ds.evaluation import by_class
from ds.evaluation.evaluate import CLASSES, SECONDS, way
from ds.evaluation.report import page
from ds.evaluation.report.axes import number
from ds.evaluation.report.charts import Line, chart
from ds.evaluation.report.markup import Markup, Part, tag
from ds.evaluation.report.runs import Preview, Run, is_number, part
from ds.evaluation.report.tables import Row
from ds.system.cost import duration
from ds.system.files import read_bytes, redacted

SHOWN = 6  # previews in a row
MOST_PREVIEW = 32 << 20  # bytes of one


class Figure(NamedTuple):
    """A figure of an evaluation: its name for people, its format, and which values are better."""

    name: str
    form: str = ".4g"
    better: str = ""  # "lower" or "higher"

    def text(self, value: Any) -> str:
        """Return a value as text; "" for none."""
        return format(value, self.form) if is_number(value) else ""


FIGURES = {
    "fid": Figure("FID", ".2f", "lower"),
    "frechet_distance": Figure("Frechet distance", ".2f", "lower"),
    "kernel_distance": Figure("kernel distance (KID)", ".4g", "lower"),
    "class_kernel_distance": Figure("kernel distance within a class", ".4g", "lower"),
    "precision": Figure("precision", ".3f", "higher"),
    "recall": Figure("recall", ".3f", "higher"),
    "inception_score": Figure("Inception score", ".2f", "higher"),
    "inception_score_std": Figure("its standard deviation", ".2f"),
    "classifier_agreement": Figure("agreement of the classifier", ".3f", "higher"),
    "reference_agreement": Figure("its agreement with real images", ".3f"),
    "pair_rms": Figure("distance to the teacher (RMS)", ".4f", "lower"),
    "pair_r2": Figure("share of the teacher explained (R2)", ".4f", "higher"),
    "straightness": Figure("straightness (0 is straight)", ".4g", "lower"),
    SECONDS: Figure("s / 1,000 images", ".2f", "lower"),
}


def figure(name: str) -> Figure:
    """Return how to show a figure, also one that a method of somebody's makes."""
    return FIGURES.get(name) or Figure(name.replace("_", " "))


def title(run: Run) -> str:
    """Return the name of a run on a page."""
    return redacted(run.name)


def page_of(run: Run) -> list[Part]:
    """Return the parts of the page of a run, and of its later stages."""
    parts: list[Part] = [*chapter(run, page.opening(run.kind, title(run), run.said))]
    for k, stage in enumerate(run.stages, 2):
        parts += chapter(stage, tag("h2", f"Stage {k} of {len(run.stages) + 1}"))
    return parts


def chapter(run: Run, head: Markup) -> Iterator[Part]:
    """Yield the parts that tell of a run, below a heading."""
    remarks: list[str] = [*run.notes]
    sheets = _previews(run, remarks)
    left = tag("div", page.facts(about(run)), page.notes([*remarks, *_remarks(run)]))
    yield head
    yield tag("div", left, sheets[-1] if sheets else None, class_=f"opening{' two' * bool(sheets)}")
    yield page.group("charts wide", losses(run))
    yield page.group("charts", *_curves(run))
    if sheets[1:]:
        yield tag("h3", "Samples on the way, always from the same noise")
        yield page.group("strip", *sheets)
    yield from _judged(run)
    yield from _folded(run)


def about(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what a run is, in names and values."""
    yield "method", run.method.replace("_", " ")
    yield from _of_model(run)
    yield from _of_steps(run)
    for name in ("fid", "frechet_distance"):
        if text := figure(name).text(run.figures.get(name)):
            yield figure(name).name, text
        elif on_the_way := run.points(name):
            step, value = on_the_way[-1]
            yield figure(name).name, f"{figure(name).text(value)} at step {number(step)}"
    if device := part(part(run.figures, "protocol"), "device").get("name"):
        yield "measured on", str(device)
    if version := run.model.get("version"):
        commit = str(part(run.model, "provenance").get("commit", "unknown"))
        known = f", commit {commit[:10]}" if commit != "unknown" else ""
        yield "made by", f"version {version}{known}"


def _of_model(run: Run) -> Iterator[tuple[str, str]]:
    if net := part(run.model, "net"):
        yield "network", " ".join(filter(None, (str(net.get("type", "")), _side(net))))
    if run.weights:
        yield "weights", f"{run.weights:,}"
    if is_number(nfe := run.model.get("nfe") or part(run.figures, "protocol").get("nfe")):
        yield "network calls a sample", f"{nfe:,}"


def _of_steps(run: Run) -> Iterator[tuple[str, str]]:
    if data := _data(run):
        yield "trained on", data
    if run.stages:
        yield "stage", f"1 of {len(run.stages) + 1}, the others are below"
    if run.step:
        yield "steps", f"{run.step:,}"
    if is_number(size := part(run.about, "train").get("batch_size")):
        yield "batch", f"{size:,} rows"
    if (seconds := run.seconds()) is not None:
        yield "training time", duration(seconds)
    if best := run.best():
        yield "held-out loss", f"{number(best[1])} at step {number(best[0])}"


def _side(net: dict[str, Any]) -> str:
    side = net.get("image_size")
    return f"for {side} x {side}" if is_number(side) else ""


def _data(run: Run) -> str:
    """Return in a few words what a run was trained on, if it is known."""
    known, source = part(run.model, "provenance"), str(run.about.get("source", ""))
    pairs, nfe = known.get("pairs"), known.get("teacher_nfe")
    if is_number(pairs) and is_number(nfe):
        return f"{pairs:,} pairs of {nfe} calls"
    if found := re.fullmatch(r"[0-9a-f]{64} range\((\d+), (\d+)\)", source):
        return f"{int(found[2]) - int(found[1]):,} pairs"
    found = re.match(r"(\d+) (images|pairs)\b", source)
    return f"{int(found[1]):,} {found[2]}" if found else source.partition(",")[0][:40]


def _remarks(run: Run) -> Iterator[str]:
    """Yield what a reader should know of a run."""
    made = part(run.model, "provenance").get("steps")
    if run.folder is None:
        yield "The directory of its run is not beside it, so no losses are shown."
    elif not run.lines:
        yield "Nothing is logged yet."
    elif not run.model and not run.folder.name.startswith("stage-"):
        yield f"The run goes on, or broke off, after step {run.step:,}: it has made no model yet."
    elif is_number(made) and not run.stages and made < run.step:
        yield f"The model is that of step {made:,}; its run has gone on since."
    if run.model and not run.figures and not run.judged():
        yield "Its images were not compared with real ones yet: dstudent evaluate does that."
    best = run.best()
    if best and best[0] < run.points("held_out_loss")[-1][0]:
        yield f"The average of step {number(best[0])} is kept: held out, later ones are worse."


def losses(run: Run) -> Markup | None:
    """Return the chart of a run's losses, those of other turns too; None without any."""
    found = [
        ("held out, average", run.points("held_out_loss")),
        ("training", run.points("loss")),
        *((n[:-5].replace("_", " "), run.points(n)) for n in _turns(run)),
    ]
    lines = [Line(name, points, i) for i, (name, points) in enumerate(found) if points]
    return chart("Loss by step", lines, log=True) if lines else None


def _turns(run: Run) -> list[str]:
    names = dict.fromkeys(name for line in run.lines for name in line)
    return [n for n in names if n.endswith("_loss") and n != "held_out_loss"]


def _curves(run: Run) -> Iterator[Markup]:
    """Yield a chart of each figure that was measured on the way, and of how fast it went."""
    for name in run.judged():
        if points := run.points(name):
            yield curve(name, [Line(figure(name).name, points)])
    for name, words in (("lr", "Learning rate"), ("images_per_second", "Images / s")):
        if points := run.points(name):
            yield chart(words, [Line(words, points, 1)])


def curve(name: str, lines: list[Line]) -> Markup:
    """Return the chart of a figure by step."""
    shown = figure(name)
    note = f"{shown.better} is better" if shown.better else ""
    return chart(shown.name[0].upper() + shown.name[1:], lines, note=note)


def _previews(run: Run, remarks: list[str]) -> list[Markup]:
    """Return a few previews of a run, from the first to the last, and remark what is damaged."""
    many, found = len(run.previews), []
    chosen = {round(i * (many - 1) / (SHOWN - 1)) for i in range(SHOWN)} if many else set()
    for preview in (run.previews[i] for i in sorted(chosen)):
        if shown := sheet(preview, remarks):
            found.append(shown)
    return found


def sheet(preview: Preview, remarks: list[str], caption: str = "") -> Markup | None:
    """Return a preview as a figure; None, and a remark, if it is damaged."""
    words = caption or f"step {preview.step:,}"
    return shown(preview.file, f"Samples, {words}", words, remarks)


def shown(file: Path, alt: str, caption: str, remarks: list[str]) -> Markup | None:
    """Return a PNG as a figure; None, and a remark, if it is damaged."""
    try:
        return page.picture(read_bytes(file, MOST_PREVIEW), alt, caption, where=file.name)
    except (ValueError, RuntimeError, OSError) as error:
        remarks.append(str(error))
        return None


def _judged(run: Run) -> Iterator[Part]:
    """Yield the figures of an evaluation, and those of each class."""
    rows = [
        Row(figure(name).name, (figure(name).text(value), figure(name).better))
        for name in dict.fromkeys([*FIGURES, *run.figures])
        if is_number(value := run.figures.get(name))
    ]
    if not rows:
        return
    yield tag("h3", "Compared with real images")
    yield page.table(("", "better"), rows)
    if said := how(run.figures):
        yield page.notes([said])
    if classes := part(run.figures, CLASSES):
        yield tag("h3", "By class")
        yield _by_class(classes, part(run.model, "provenance").get("classes"))


def _by_class(classes: dict[str, Any], names: Any) -> Markup | None:
    try:
        rows = by_class.rows(classes, tuple(names or ()))
    except (TypeError, ValueError):
        return page.notes(["They are damaged, and left out."])
    return page.table(by_class.COLUMNS, rows)


def how(figures: dict[str, Any]) -> str:
    """Return how figures were obtained, in a line; "" where that is not told."""
    try:
        return way(figures)
    except (KeyError, TypeError, ValueError):
        return ""


def _folded(run: Run) -> Iterator[Part]:
    folded = {
        "Protocol of the evaluation": part(run.figures, "protocol"),
        "Configuration of the run": {k: v for k, v in run.about.items() if k != "checksum"},
        "Configuration of the model": {k: v for k, v in run.model.items() if k != "checksum"},
    }
    for name, values in folded.items():
        if values:
            yield page.folded(name, flat(values))


def flat(value: Any, at: str = "") -> dict[str, str]:
    """Return the values inside of nested fields, as text, by their path: "train.lr"."""
    if isinstance(value, dict) and value:
        inside = (flat(v, f"{at}.{k}" if at else str(k)) for k, v in value.items())
        return {name: text for found in inside for name, text in found.items()}
    if isinstance(value, list):
        return {at: ", ".join(map(_text, value))}
    return {at: _text(value)}


def _text(value: Any) -> str:
    words = {None: "none", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else redacted(value)
