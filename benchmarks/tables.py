"""Write the tables of README.md, docs/ and ds/models/sampler.py from results/.

    python -m benchmarks.tables

What stands between <!-- table: NAME --> and <!-- end --> is made anew: for each machine the results
of the case of that name, or "classes", "methods", "methods_demo", "methods_plane", "peers" (the
README's), "plots", "projection", "sampler" (of its docstring), "seeds" or "starts". A test fails
when a page is not what the JSON says.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.harness import RESULTS, ROOT, floor
from benchmarks.methods import Spent
from benchmarks.methods_entries import BUDGET, CALLS, DEMO_BUDGET, ENTRIES, PLANE_BUDGET
from benchmarks.printed import OURS
from ds.engine import Plan, Target
from ds.training import presets

PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "how-it-works.md",
    ROOT / "docs" / "methods.md",
    ROOT / "docs" / "own-images.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "training.md",
    ROOT / "ds" / "models" / "sampler.py",
)
PLOTS = ROOT / "docs" / "plots"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?( *<!-- end -->)", re.DOTALL)
# Of the README: the case, the part of a row's name, what it is called, and the peers worth naming.
PEERS = (
    ("teacher_loop", "DDIM float32", "teacher, two network calls, float32"),
    ("teacher_loop", "DDIM bfloat16", "teacher, two network calls, bfloat16"),
    ("student", "student", "student, one call"),
    ("pairs", "pairs", "pairs, end to end"),
    ("train_step", "cifar10", "training step, CIFAR-10"),
    ("train_step", "digits", "training step, digits"),
    ("cold_start", "cold", "start to first image"),
)
# Tables in which the error of a side stands beside its time.
EXACTNESS = "network", "teacher_loop"
DATASETS = ("cifar10", "celeba", "lsun_bedroom", "lsun_church")

CAPTIONS = {
    "roofline": "Layers of the CIFAR-10 network in the engine, under what a copy and a matrix "
    "product reach on the same machine. A point on the roof leaves nothing to gain.",
    "where": "Where the time of one call of the network goes, diffusers beside the engine.",
    "throughput": "Images a second of a one-step student against the batch size.",
    "frontier": "Distance to the ODE's endpoint against the time of an image: solvers, numbers of "
    "network calls, precision. Below and to the left is better.",
    "training": "A training step of the student by its parts: our network, and the same in plain "
    "modules.",
    "chain": "The whole chain by phase.",
}

Saved = dict[str, Any]
# Of a figure its words, its places, and the numbers of calls whose figures are in the table.
Columns = Mapping[str, tuple[str, int, Sequence[int | str]]]
DIGITS_FIGURES: Columns = {
    "frechet_distance": ("Frechet distance", 1, CALLS),
    "recall": ("recall", 2, CALLS),
}
PLANE_FIGURES: Columns = {
    "distance": ("distance", 3, CALLS),
    "modes": ("modes", 2, CALLS),
    "map": ("error of the map", 3, CALLS[:1]),
}


def filled(page: str) -> str:
    """Return a page with every table made anew."""
    return MARKED.sub(lambda m: m[1] + _made(m[2]) + m[3], page)


def _made(name: str) -> str:
    special = {
        "classes": classes,
        "methods": methods,
        "methods_demo": partial(methods, DEMO_BUDGET),
        "methods_plane": partial(methods, PLANE_BUDGET),
        "peers": peers,
        "projection": projection,
        "plots": plots,
        "sampler": sampler,
        "seeds": seeds,
        "starts": starts,
    }
    if name in special:
        return special[name]()
    tables = [table(saved, errors=name in EXACTNESS) for saved in found(name)]
    command = {"chain_digits": "chain --preset digits"}.get(name, name)
    return "\n".join(tables) or f"Not measured yet: `python -m benchmarks {command}`.\n"


def found(case: str) -> list[Saved]:
    """Return what is saved of a case, a machine after the other."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{case}.json"))]


def sound(saved: Saved) -> list[dict[str, Any]]:
    """Return the rows in which no side was refused."""
    return [row for row in saved["cases"] if not row.get("refused")]


def _is_gpu(saved: Saved) -> bool:
    return "CUDA" in saved["environment"]["timing"]


def table(saved: Saved, *, errors: bool = False) -> str:
    """Return a table: a row a case, a column a side, with its error or not, and what was used.

    A row in which a side was refused is below the table, with the reason.
    """
    calibration = saved["calibration"]
    notes = [
        f"Refused in {row['case']}: {name} ({why.splitlines()[0]})."
        for row in saved["cases"]
        for name, why in row.get("refused", {}).items()
    ]
    rows = sound(saved)
    if not rows:
        return "\n".join([_about(saved), "", *notes]) + "\n"
    *_, last = rows[0]["us"]  # ours, in every row
    names = dict.fromkeys(side for row in rows for side in row["us"])
    names = [*(name for name in names if name != last), last]
    columns = [*names, *[f"{other} / {names[-1]}" for other in names[:-1]]]
    floors = any(floor(row, calibration) for row in rows)
    columns += ["floor", "attained"] if floors else []
    lines = [_about(saved), "", *_head("us (error)" if errors else "us", columns)]
    for row in rows:
        off = {name: f" ({error:.1e})" * errors for name, error in row["error"].items()}
        times = {name: row["us"][name]["median"] for name in row["us"]}
        ours = times[names[-1]]
        cells = [f"{times[name]:,.0f}{off[name]}" if name in times else "" for name in names]
        cells += [f"{times[name] / ours:.2f}" if name in times else "" for name in names[:-1]]
        if floors:
            least = floor(row, calibration)
            cells += [f"{least:,.0f}", f"{least / ours:.0%}"] if least else ["", ""]
        other = f" (commit {row['commit'][:10]})" if "commit" in row else ""
        lines.append(f"| {row['case']}{other} | {' | '.join(cells)} |")
    missing = {name: why for row in rows for name, why in row["missing"].items()}
    lines += ["", *(f"Missing in some rows: {n} ({why})." for n, why in missing.items()), *notes]
    return "\n".join(lines).rstrip() + "\n"


def _head(first: str, columns: list[str]) -> list[str]:
    return [f"| {first} | {' | '.join(columns)} |", "| --- " + "| ---: " * len(columns) + "|"]


def _about(saved: Saved) -> str:
    e, calibration = saved["environment"], saved["calibration"]
    products = ", ".join(
        f"{rate * 1e3:,.0f} in {name.rpartition('_')[2]}"
        for name, rate in calibration.items()
        if "matmul" in name
    )
    return (
        f"{e['device']}, {e['cores']} cores{_threads(saved)}, "
        f"torch {e['torch']}, {e['timing']}, {e['date']}, commit {e['commit'][:10]}. Medians. In "
        f"the same run a copy made {calibration['copy_gbs']:.1f} GB/s and matrix products, in "
        f"GFLOP/s, {products}."
    )


def _threads(saved: Saved) -> str:
    threads = saved["environment"]["threads"]
    return "" if _is_gpu(saved) else f", {threads} thread{'s' * (threads > 1)}"


def _machine(saved: Saved) -> str:
    return saved["environment"]["device"] + _threads(saved)


def peers() -> str:
    """Return the README's table: how many times as long the fastest and the usual peer take."""
    lines = []
    for case, part, label in PEERS:
        for saved in found(case):
            for row in sound(saved):
                if part in row["case"]:
                    lines.append(_peers_row(label, row, _machine(saved)))
    if not lines:
        return "Not measured yet: `make bench`.\n"
    head = ["images", "ours, ms", "usual peer", "times as long", "best peer", "times as long", "on"]
    return "\n".join([*_head("", head), *lines]) + "\n"


def _peers_row(label: str, row: dict[str, Any], machine: str) -> str:
    times = {name: t["median"] for name, t in row["us"].items()}
    ours = times.get("ours") or times["engine"]
    times = {name: t for name, t in times.items() if name not in OURS}
    if not times:
        return f"| {label} | {row['images']} | {ours / 1e3:,.1f} | none here | | | | |"
    usual, best = next(iter(times)), min(times, key=times.get)
    cells = [row["images"], f"{ours / 1e3:,.1f}"]
    cells += [usual, f"{times[usual] / ours:.2f}", best, f"{times[best] / ours:.2f}"]
    return f"| {label} | {' | '.join(map(str, cells))} | {machine} |"


def sampler() -> str:
    """Return the lines of Sampler's docstring: images a second in one call, and in DDIM's 96."""
    lines = []
    students = {_machine(saved): saved for saved in found("student")}
    for loop in found("teacher_loop"):
        lines += ["", f"{(here := _machine(loop))}:"]
        one = students.get(here, {"cases": []})
        lines += [_rate("one call", row, 1) for row in sound(one)]
        for row in sound(loop):
            lines.append(_rate(f"96 calls, {row['dtype']}", row, 2 / 96))  # two were timed
    return "".join(f"        {line}".rstrip() + "\n" for line in [*lines, ""])


def _rate(label: str, row: dict[str, Any], share: float) -> str:
    rate = 1e6 * row["images"] / _ours(row) * share
    return f"    {label:20}  {row['images']:3} at a time  {rate:8.3g} images/s"


def seeds() -> str:
    """Return the Frechet distances of students of several seeds, plain and fast."""
    found = json.loads((RESULTS / "seeds.json").read_text())["frechet_distance"]
    lines = _head("", [*(f"seed {i}" for i in range(len(found["plain"]))), "mean", "deviation"])
    for name, distances in found.items():
        figures = [*distances, statistics.mean(distances), statistics.stdev(distances)]
        lines.append(f"| {name} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    return "\n".join(lines) + "\n"


def classes() -> str:
    """Return how often digits are found in the class they were drawn for, teacher and student."""
    found = json.loads((RESULTS / "classes.json").read_text())["seeds"]
    words = ["agreement, teacher", "student", "class kernel distance, teacher", "student"]
    lines = _head("seed", words)
    for row in found:
        sides = [row["teacher"], row["student"]]
        cells = [f"{side['classifier_agreement']:.1%}" for side in sides]
        cells += [f"{side['class_kernel_distance']:.0f}" for side in sides]
        lines.append(f"| {row['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def methods(budget: int = BUDGET) -> str:
    """Return what the methods give in few calls for a budget, means over seeds, and controls."""
    path, plane = RESULTS / "methods.json", budget == PLANE_BUDGET
    found: Saved = json.loads(path.read_text()) if path.exists() else {"rows": []}
    names = dict.fromkeys(row["method"] for row in found["rows"])
    names = [name for name in names if ENTRIES[name].budget == budget]
    if not names:
        return "Not measured yet: `python -m benchmarks methods`.\n"
    columns = PLANE_FIGURES if plane else DIGITS_FIGURES
    heads = [
        f"{words}, {nfe}" if nfe == 1 else str(nfe)
        for words, _, calls in columns.values()
        for nfe in calls
    ]
    lines, notes = _head("network calls", [*heads, "passes, thousands"]), []
    for name in names:
        entry, rows = ENTRIES[name], [row for row in found["rows"] if row["method"] == name]
        cells = _cells(rows, columns)
        passes = statistics.mean(Spent(row["evaluations"], row["backward"]).passes for row in rows)
        words = f"*{entry.words}*" if entry.control else entry.words
        lines.append(f"| {words} | {' | '.join(cells)} | {passes / 1000:,.0f} |")
        if more := [nfe for nfe in rows[0]["figures"] if int(nfe) not in CALLS]:
            full = {figure: (words, places, more) for figure, (words, places, _) in columns.items()}
            said = zip((words for words, *_ in full.values()), _cells(rows, full), strict=True)
            notes.append(f"The teacher in {more[0]} calls: {', '.join(map(' '.join, said))}.")
    floor = found["floor"]["plane" if plane else "digits"]
    real = [f"{columns[name][0]} {value:.{columns[name][1]}f}" for name, value in floor.items()]
    notes.append(f"Real data beside other real data: {', '.join(real)}.")
    return "\n".join([*lines, "", *notes]) + "\n"


def _cells(rows: list[dict[str, Any]], columns: Columns) -> list[str]:
    """Return means and deviations of figures over rows, a cell for each number of calls."""
    return [
        _spread([f[str(nfe)][name] for row in rows if str(nfe) in (f := row["figures"])], places)
        for name, (_, places, calls) in columns.items()
        for nfe in calls
    ]


def starts() -> str:
    """Return where students of teachers of each prediction start, and what they reach."""
    rows = json.loads((RESULTS / "starts.json").read_text())["starts"]
    lines = _head("teacher predicts", ["student", "error at the start", "held-out loss"])
    words = {"eps": "z - net", "x0": "net", "v": "-net"}
    for prediction in dict.fromkeys(row["prediction"] for row in rows):
        alike = [row for row in rows if row["prediction"] == prediction]
        for form in reversed(alike[0]["rms"]):
            figures = (_spread([row[what][form] for row in alike]) for what in ("rms", "loss"))
            name = words["eps"] if form == "paper" else words[prediction]
            lines.append(f"| {prediction} | {name} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _spread(figures: list[float], places: int = 4) -> str:
    """Return the mean and the deviation of figures; of none, a dash."""
    if not figures:
        return "-"
    spread = f" ± {statistics.stdev(figures):.{places}f}" if len(figures) > 1 else ""
    return f"{statistics.mean(figures):.{places}f}{spread}"


def projection() -> str:
    """Return the hours that the paper's runs would take, from the rates of teacher and training.

    Those of CIFAR-10 are measured; the others are scaled by the FLOPs of a call.
    """
    steps = {_machine(saved): saved for saved in found("train_step")}
    lines = []
    for loop in found("teacher_loop"):
        if (step := steps.get(_machine(loop))) is None:
            continue
        cuda = _is_gpu(loop)
        call = _per_image(loop, "DDIM") / 2  # of two steps
        train = _per_image(step, "cifar10")
        if not (call and train):
            continue
        base = _flops("cifar10")
        for name in DATASETS if cuda else DATASETS[:1]:
            p, scale = presets.PRESETS[name](), _flops(name) / base
            solver, grid = p.solve.build(p.denoising.schedule)
            calls = solver.nfe(grid)
            pairs = (p.pairs.count + p.pairs.held_out) * calls * call * scale / 3.6e9
            fit = p.pairs.count * p.train.epochs * train * scale / 3.6e9
            for count in (1, 8) if cuda else (1,):
                where = f"{count} x " * cuda + _machine(loop)
                cells = f"{calls} | {pairs / count:,.0f} | {fit / count:,.0f}"
                lines.append(f"| {name} | {where} | {cells} | {(pairs + fit) / count:,.0f} |")
    gpu = any("| 8 x " in line for line in lines)
    note = "" if gpu else "On GPUs: not measured yet, `make gpu-bench`.\n"
    if not lines:
        return note
    head = ["on", "calls a pair", "hours of pairs", "hours of training", "both"]
    return "\n".join([*_head("dataset", head), *lines]) + f"\n\n{note}"


def _per_image(saved: Saved, part: str) -> float:
    """Return the microseconds of ours for an image, the least of a case's rows."""
    rows = [row for row in sound(saved) if part in row["case"] and "32 channels" not in row["case"]]
    return min((_ours(row) / row["images"] for row in rows), default=0.0)


def _ours(row: dict[str, Any]) -> float:
    return list(row["us"].values())[-1]["median"]


def _flops(name: str) -> int:
    """Return the FLOPs of a preset's network for an image, as the plan counts them."""
    with torch.device("meta"):
        net = presets.PRESETS[name]().net.build()
    plan = Plan.of(net, Target(torch.device("meta"), torch.float32, 1))
    return sum(plan.flops(step) for step in plan.steps)


def plots() -> str:
    """Return the plots that there are, with what they show."""
    there = [name for name in CAPTIONS if (PLOTS / f"{name}.png").exists()]
    lines = [f"![{CAPTIONS[name]}](plots/{name}.png)\n\n{CAPTIONS[name]}\n" for name in there]
    return "\n".join(lines) or "No plots yet: `python -m benchmarks.plots`.\n"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
