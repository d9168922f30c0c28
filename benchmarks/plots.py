"""Draw docs/plots/*.png from the JSON of results/ alone; a plot without its JSON is left out.

    python -m benchmarks.plots [MACHINE]

MACHINE is a folder of results/; by default the one with the most cases.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.harness import RESULTS
from benchmarks.methods import Spent
from benchmarks.methods_entries import CALLS, ENTRIES, LEADERS
from benchmarks.tables import PLOTS

# Okabe & Ito's colours, which differ for every kind of eye.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, BLACK, GREY = "#56B4E9", "#D55E00", "#222222", "#8A8A8A"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "xtick.color": BLACK,
    "ytick.color": BLACK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 130,
}
Saved = dict[str, Any]
Label = tuple[str, str, float, float]  # a name, its colour, and the point that it belongs to


def main(*machine: str) -> None:
    """Draw what there is JSON for."""
    folders = [RESULTS / machine[0]] if machine else [p for p in RESULTS.glob("*") if p.is_dir()]
    if not folders:
        sys.exit(f"{RESULTS} has no results: run python -m benchmarks")
    folder = max(folders, key=lambda p: len(list(p.glob("*.json"))))
    PLOTS.mkdir(exist_ok=True)
    for case, (name, draw) in DRAWN.items():
        for path in sorted(folder.glob(f"{case}.json"))[:1]:
            with plt.rc_context(STYLE):
                _draw(json.loads(path.read_text()), draw, PLOTS / f"{name}.png")
    if (path := RESULTS / "methods.json").exists():
        with plt.rc_context(STYLE):
            methods(json.loads(path.read_text()), PLOTS / "methods.png")


def _draw(saved: Saved, draw: Callable[[Axes, Saved], None], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.4, 4.4))
    draw(axes, saved)
    e = saved["environment"]
    threads = "" if "cuda" in e["timing"].lower() else f", {e['threads']} thread"
    figure.supxlabel(
        f"{e['device']}{threads}, torch {e['torch']}, {e['date']}",
        x=0.99,
        ha="right",
        fontsize=8,
        color=GREY,
    )
    figure.savefig(path)
    plt.close(figure)


def roofline(axes: Axes, saved: Saved) -> None:
    """FLOP/s against FLOPs a byte, a point a layer."""
    calibration, rows = saved["calibration"], saved["cases"]
    copy = calibration["copy_gbs"]
    peak = 1e3 * calibration[f"matmul_tflops_{rows[0]['dtype']}"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["flops"]:
            kind = row["case"].rpartition(",")[0].split(" ")
            name = " ".join(kind[:2]) if kind[0] in ("conv", "phases") else kind[0]
            us = row["us"]["engine"]["median"]
            point = row["flops"] / row["bytes"], row["flops"] / 1e3 / us
            points.setdefault(name, []).append(point)
    spans = [x for found in points.values() for x, _ in found]
    low, high = min(*spans, peak / copy) / 3, max(*spans, peak / copy) * 2
    axes.plot([low, peak / copy, high], [low * copy, peak, peak], color=BLACK, linewidth=1.8)
    for (name, found), color, marker in zip(points.items(), COLORS * 2, MARKERS * 2, strict=False):
        axes.scatter(
            *zip(*found, strict=True),
            s=44,
            color=color,
            marker=marker,
            label=name,
            edgecolor="white",
            linewidth=0.7,
            zorder=3,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        title="Layers under the roof",
        xlabel="FLOPs a byte",
        ylabel="GFLOP/s",
    )
    axes.set_ylim(top=2 * peak)
    _plain_ticks(axes, "x", "y")
    axes.annotate(
        f"matrix product, {peak:,.0f} GFLOP/s",
        (high, peak),
        (-4, 5),
        ha="right",
        textcoords="offset points",
        fontsize=9,
    )
    axes.annotate(
        f"copy, {copy:,.0f} GB/s",
        (low, low * copy),
        (12, 2),
        ha="left",
        textcoords="offset points",
        fontsize=9,
    )
    axes.legend(loc="lower right")


def stacked(axes: Axes, saved: Saved, title: str, unit: float, label: str) -> None:
    """One bar a side, its phases side by side."""
    row = saved["cases"][0]
    sides = list(row["phases"])[::-1]
    phases = list(dict.fromkeys(p for side in sides[::-1] for p in row["phases"][side]))
    totals = {side: sum(row["phases"][side].values()) for side in sides}
    order = sorted(phases, key=lambda p: -row["phases"][sides[-1]].get(p, 0))
    order = phases if label == "seconds" else order
    left = dict.fromkeys(sides, 0.0)
    for phase, color in zip(order, COLORS, strict=False):
        widths = [unit * row["phases"][side].get(phase, 0.0) for side in sides]
        axes.barh(
            sides,
            widths,
            left=[left[s] for s in sides],
            color=color,
            label=phase,
            height=0.55,
            edgecolor="white",
            linewidth=1.2,
        )
        for side, width in zip(sides, widths, strict=True):
            left[side] += width
    for side in sides:
        total = unit * totals[side]
        note = f"{total:,.0f}" if total >= 100 else f"{total:.3g}"
        axes.annotate(
            note,
            (left[side], side),
            (5, 0),
            va="center",
            textcoords="offset points",
            fontweight="bold",
        )
    axes.set(title=title, xlabel=label, xlim=(0, 1.12 * max(left.values())))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, columnspacing=1.4)


def _plain_ticks(axes: Axes, *which: str) -> None:
    """Label logarithmic axes with numbers, 1, 2 and 5 of each power of ten."""
    for name in which:
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_locator(NullLocator())


def where(axes: Axes, saved: Saved) -> None:
    """Seconds of a call by kind of layer."""
    title = "Where a call's time goes: " + saved["cases"][0]["case"].removeprefix("where, ")
    stacked(axes, saved, title, 1e3, "milliseconds")


def chain(axes: Axes, saved: Saved) -> None:
    """Seconds of the chain by phase."""
    stacked(axes, saved, saved["cases"][0]["case"], 1.0, "seconds")


def throughput(axes: Axes, saved: Saved) -> None:
    """Images a second of every side."""
    rows = sorted(saved["cases"], key=lambda row: row["images"])
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    for name, color, marker in zip(names[::-1], COLORS, MARKERS, strict=False):
        found = [
            (row["images"], 1e6 * row["images"] / row["us"][name]["median"])
            for row in rows
            if name in row["us"]
        ]
        axes.plot(
            *zip(*found, strict=True),
            color=color,
            marker=marker,
            label=name,
            markersize=7,
            linewidth=2.4 if name == names[-1] else 1.5,
        )
    counts = [row["images"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(c) for c in counts])
    axes.minorticks_off()
    axes.set(title="A one-step student", xlabel="images at a time", ylabel="images a second")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(loc="upper left", ncols=2)


def frontier(axes: Axes, saved: Saved) -> None:
    """Error against time, a line a solver, hollow in bfloat16."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in saved["cases"]:
        lines.setdefault(row["case"].split()[0], []).append(row)
    for (solver, rows), color, marker in zip(lines.items(), COLORS, MARKERS, strict=False):
        for side, face in (("engine", color), ("engine, bfloat16", "white")):
            found = sorted(
                (row["us"][side]["median"] / row["images"] / 1e3, row["error"][side])
                for row in rows
            )
            axes.plot(
                *zip(*found, strict=True),
                color=color,
                marker=marker,
                markersize=7,
                markerfacecolor=face,
                linestyle="-" if side == "engine" else ":",
                label=solver if side == "engine" else None,
            )
    axes.plot(
        [],
        [],
        color=GREY,
        marker="o",
        markerfacecolor="white",
        linestyle=":",
        label="the same in bfloat16",
    )
    axes.set(
        xscale="log",
        yscale="log",
        title="Fidelity against speed, scanned digits",
        xlabel="milliseconds an image",
        ylabel="distance to the ODE's end",
    )
    _plain_ticks(axes, "x")
    axes.legend()


def training(axes: Axes, saved: Saved) -> None:
    """A training step of each network and side by its parts, as a share of the first side's."""
    labels, notes, totals, parts = [], [], [], []
    for row in saved["cases"][::-1]:
        network = {"cifar10": "CIFAR-10"}.get(name := row["case"].split()[2], name)
        baseline = next(iter(row["us"].values()))["median"]
        for side, taken in reversed(row["us"].items()):
            labels.append(f"{network}, {side}")
            totals.append(taken["median"] / baseline)
            parts.append(row["phases"].get(side) or {"step": 1.0})
            notes.append(f"{taken['median'] / row['images'] / 1e3:,.3g} ms an image")
    left = [0.0] * len(labels)
    for part, color in zip(
        dict.fromkeys(p for split in parts for p in split), COLORS, strict=False
    ):
        widths = [
            total * split.get(part, 0.0) / sum(split.values())
            for total, split in zip(totals, parts, strict=True)
        ]
        axes.barh(
            labels,
            widths,
            left=left,
            color=color,
            label=part,
            height=0.6,
            edgecolor="white",
            linewidth=1.2,
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for label, total, note in zip(labels, totals, notes, strict=True):
        axes.annotate(note, (total, label), (5, 0), va="center", textcoords="offset points")
    axes.set(
        title="A training step",
        xlabel="time, relative to the same network in plain modules",
        xlim=(0, 1.45 * max(totals)),
    )
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=3)


# Of the methods on digits: the colour of a family, and the short name of each beside its line.
FAMILIES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "a teacher's pairs": (BLACK, {"denoising_student": "Denoising Student"}),
    "flows": (
        BLUE,
        {
            "rectified_flow": "rectified flow",
            "reflow": "reflow",
            "distil": "reflow, distilled",
            "mix_flow": "MixFlow",
            "shortcut": "shortcut",
        },
    ),
    "mean flows": (
        RED,
        {
            "mean_flow": "MeanFlow",
            "discrete_mean_flow": "discrete MeanFlow",
            "posterior_mean_flow": "posterior MeanFlow",
        },
    ),
    "consistency": (
        GREEN,
        {
            "consistency_distillation": "CD",
            "consistency_training": "CT",
            "improved_consistency_training": "iCT",
            "easy_consistency_tuning": "ECT",
            "scd": "sCD",
            "sct": "sCT",
            "regularized_consistency_model": "rCM",
        },
    ),
    "others": (PURPLE, {"progressive_distillation": "progressive", "drifting": "drifting"}),
    "not distilled": (GREY, {"teacher": "the teacher itself"}),
}


def methods(saved: Saved, path: Path) -> None:
    """Frechet distance of methods on digits, against calls and against what the training cost."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 6.4), sharey=True)
    beside: dict[str, list[Label]] = {"many": [], "one": [], "cost": []}
    for family, (color, names) in FAMILIES.items():
        left.plot([], [], color=color, marker="o", label=family)
        for name, short in names.items():
            points = _by_calls(saved, name)
            if not points:
                continue
            style = {"color": color, "marker": "o", "markersize": 5}
            left.plot(*zip(*points, strict=True), **style)
            beside["one" if len(points) == 1 else "many"].append((short, color, *points[-1]))
            if ENTRIES[name].control:
                continue
            spent = _by_cost(saved, name)
            right.plot(*zip(*spent, strict=True), **style)
            if name in LEADERS:
                beside["cost"].append((short, color, *spent[0]))
    real = saved["floor"]["digits"]["frechet_distance"]
    for axes, title, label in (
        (left, "More calls", "network calls a sample"),
        (right, "More training", "thousands of passes to train; a backward pass counts two"),
    ):
        axes.set(xscale="log", yscale="log", title=title, xlabel=label, ylim=(10, 2000))
        axes.axhline(real, color=BLACK, linestyle=":", linewidth=1.2)
    left.set(xlim=(0.28, 14), ylabel="Frechet distance to real digits")
    right.set_xlim(22, 420)
    _plain_ticks(right, "x", "y")
    left.set_xticks(CALLS, [str(nfe) for nfe in CALLS])
    left.minorticks_off()
    left.annotate("real digits beside others", (0.3, real * 0.93), va="top", fontsize=9)
    _name(left, beside["many"], 1.25, "left")
    _name(left, beside["one"], 0.8, "right")
    _name(right, beside["cost"], 0.9, "right")
    left.legend(loc="upper right", fontsize=9.5)
    figure.savefig(path)
    plt.close(figure)


def _by_calls(saved: Saved, name: str) -> list[tuple[float, float]]:
    """Return numbers of calls, and the mean distances over seeds."""
    rows = [row["figures"] for row in saved["rows"] if row["method"] == name]
    return [
        (nfe, statistics.mean(row[str(nfe)]["frechet_distance"] for row in rows))
        for nfe in CALLS
        if rows and str(nfe) in rows[0]
    ]


def _by_cost(saved: Saved, name: str) -> list[tuple[float, float]]:
    """Return thousands of passes, and the mean distances in one call, for every budget."""
    budgets: dict[str, list[dict[str, Any]]] = {}
    for row in saved["rows"]:
        if re.fullmatch(rf"{name}(_\d+k)?", row["method"]):
            budgets.setdefault(row["method"], []).append(row)
    return sorted(
        (
            statistics.mean(Spent(r["evaluations"], r["backward"]).passes for r in rows) / 1000,
            statistics.mean(r["figures"]["1"]["frechet_distance"] for r in rows),
        )
        for rows in budgets.values()
    )


def _name(axes: Axes, labels: list[Label], reach: float, side: str) -> None:
    """Write names beside their points, pushed apart where they would touch."""
    labels, gap = sorted(labels, key=lambda label: label[3]), 0.05  # of a logarithm
    heights = [math.log10(y) for *_, y in labels]
    for _ in range(200):
        for i, (low, high) in enumerate(pairwise(heights)):
            push = max(0.0, gap - (high - low)) / 2
            heights[i], heights[i + 1] = low - push, high + push
    for (name, color, x, y), height in zip(labels, heights, strict=True):
        edge = (0.0 if side == "left" else 1.0, 0.5)  # of the text, where its line ends
        to = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "relpos": edge}
        place = x * reach, 10**height
        axes.annotate(
            name, (x, y), place, va="center", ha=side, fontsize=9, color=color, arrowprops=to
        )


DRAWN: dict[str, tuple[str, Callable[[Axes, Saved], None]]] = {
    "roofline": ("roofline", roofline),
    "where": ("where", where),
    "student": ("throughput", throughput),
    "frontier": ("frontier", frontier),
    "train_step": ("training", training),
    "chain_*": ("chain", chain),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
