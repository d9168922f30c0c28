"""The comparison of methods spends what it says, and as much for each method."""

import inspect
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from benchmarks import methods, methods_problems, plots, tables
from benchmarks.methods_entries import CONTROLS, DEMO_BUDGET, ENTRIES
from benchmarks.methods_problems import problem
from ds.analytic import ExactNet
from ds.engine import Engine
from ds.nets import MLP
from ds.nets.blocks import AbstractUNet
from ds.pairs import generate
from ds.pairs.sources import Images, digits
from ds.training import presets
from ds.training.trainer import Trainer


class Spy:
    """Counts the rows that networks are called on, twice where they carry a derivative.

    Beside them it counts the rows of calls whose gradient is asked for.
    """

    def __init__(self, monkeypatch):
        self.spent, self._on = methods.Spent(), False
        self._while(monkeypatch, Trainer, "_take")
        self._while(monkeypatch, generate, "_write_missing")

    def _while(self, monkeypatch, owner, name):
        """Count during a function, and not in checks and where speed is measured."""
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            self._on = True
            try:
                return function(*args, **kwargs)
            finally:
                self._on = False

        monkeypatch.setattr(owner, name, counted)

    def __call__(self, module, args):
        if self._on and isinstance(module, (AbstractUNet, MLP, ExactNet, Engine)):
            x, weights = args[0], [*module.parameters()] if isinstance(module, nn.Module) else []
            dual = not isinstance(module, Engine) and forward_ad.unpack_dual(x).tangent is not None
            learns = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
            self.spent += methods.Spent(len(x) * (1 + dual), len(x) * learns)


@pytest.mark.parametrize("name", [n for n in ENTRIES if not n.endswith(("_demo", "k", *CONTROLS))])
def test_a_run_spends_what_its_networks_do(name, monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "HELD_OUT", 4)
    monkeypatch.setattr(methods_problems, "HELD_OUT", 4)
    entry, rows = ENTRIES[name], 8
    net: Any = entry.net
    small = (
        replace(net, width=8, depth=1)
        if entry.in_plane
        else replace(net, channels=8, norm_groups=4, channel_mult=(1,), attention_resolutions=())
    )
    entry = replace(
        entry,
        net=small,
        train=replace(entry.train, batch_size=8),
        teach=entry.teach and replace(entry.teach, batch_size=8, epochs=1),
        pairs=rows,
    )
    least = methods.spends(entry, Images(digits()[0][:rows])).evaluations
    least += 160 * bool(entry.teach) + 240 * (entry.in_plane and entry.method.feeds == "pairs")
    spy = Spy(monkeypatch)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(spy)
    with hook:
        _, spent = methods.trained(
            entry, tmp_path, 0, least + (480 if entry.in_plane else 104), rows
        )
    assert spent == spy.spent
    assert spent.evaluations >= spent.backward > 0


def test_the_second_budget_is_what_the_demo_spends():
    demo, images = presets.digits(), len(digits()[0])
    taught, learnt = (
        train.epochs * (rows // train.batch_size) * train.batch_size
        for train, rows in ((demo.teach, images), (demo.train, demo.pairs.count))
    )
    calls = len(demo.solve.build(demo.denoising.schedule)[1])
    pairs = calls * (demo.pairs.count + demo.pairs.held_out)
    assert taught + pairs + learnt == DEMO_BUDGET


@pytest.mark.parametrize(
    ("changed", "old", "new", "anew"),
    [
        ("ds.methods.flow.mean_flow", '"""', '"""So: ', False),
        ("ds.methods.flow.mean_flow", "self.guidance", "self.kappa", True),
        ("ds.methods.flow.mean_flow", "agreement=0.93", "agreement=0.5", False),
    ],
)
def test_a_run_is_made_anew_when_its_method_changes_and_not_for_words(
    changed, old, new, anew, monkeypatch
):
    entry, read = ENTRIES["mean_flow"], inspect.getsource
    before = methods.made_of(entry)
    assert old in read(sys.modules[changed])

    def altered(module):
        source = read(module)
        return source.replace(old, new, 1) if module.__name__ == changed else source

    monkeypatch.setattr(inspect, "getsource", altered)
    assert (methods.made_of(entry) != before) is anew


@pytest.mark.parametrize("name", ["teacher", "plane_teacher"])
def test_the_control_of_a_teacher_is_asked_for_few_calls_and_for_its_own(name, tmp_path):
    entry = ENTRIES[name]
    entry = replace(entry, teach=entry.teach and replace(entry.teach, epochs=0.05))
    made, _ = methods.trained(entry, tmp_path, 0)
    own = 20 if entry.in_plane else 12
    assert {nfe: model.nfe for nfe, model in made.items()} == {n: n for n in (1, 2, 4, own)}


def test_the_control_of_shuffled_pairs_has_no_noise_beside_its_own_image(tmp_path):
    entry = replace(ENTRIES["plane_denoising_student"], pairs=9)
    teacher, _ = problem(entry).teacher(entry, tmp_path, 0, problem(entry).sources(0, 8))
    store = generate.generate_pairs(teacher, tmp_path / "pairs", 9)
    right, wrong = (kind(store).batch(range(9)) for kind in (methods.Pairs, methods.Shuffled))
    assert torch.equal(right.noise, wrong.noise)
    assert not (right.x0 == wrong.x0).all(1).any()
    assert torch.equal(right.x0.sort(0).values, wrong.x0.sort(0).values)


def test_figures_in_the_plane_tell_data_from_half_of_its_modes_and_from_a_wrong_map():
    exact = methods_problems._exact(0)
    data, shuffled = (methods_problems._judged(x) for x in (exact, exact.roll(1, 0)))
    assert data["distance"] < 0.02 and data["modes"] > 0.99 and data["map"] == 0
    assert shuffled["map"] > 1 and shuffled["distance"] == data["distance"]
    half = methods_problems._judged(exact[exact[:, 0] > 0].repeat(3, 1)[: len(exact)])
    assert half["modes"] == pytest.approx(0.5, abs=0.02) and half["distance"] > 0.5


def test_rows_are_written_in_the_order_of_entries_and_keep_the_floor(monkeypatch, tmp_path):
    path = tmp_path / "methods.json"
    path.write_text(json.dumps({"rows": [], "floor": {"digits": {"frechet_distance": 8.0}}}))
    monkeypatch.setattr(methods, "PATH", path)
    rows = {("mean_flow", seed): {"method": "mean_flow", "seed": seed} for seed in (1, 0)}
    methods.write(rows)
    written = json.loads(path.read_text())
    assert [row["seed"] for row in written["rows"]] == [0, 1]
    assert written["floor"] == {"digits": {"frechet_distance": 8.0}}


def test_the_table_of_methods_has_means_of_seeds_and_dashes_for_calls_that_none_makes(
    monkeypatch, tmp_path
):
    figures = {"frechet_distance": 30.0, "recall": 0.5}
    rows = [
        {
            "method": name,
            **{"evaluations": 5000, "backward": 2000},
            "figures": {nfe: {**figures, "recall": recall} for nfe in calls},
        }
        for name, calls in (
            ("mean_flow", ("1", "2", "4")),
            ("denoising_student", ("1",)),
            ("teacher", ("1", "2", "4", "12")),
        )
        for recall in (0.25, 0.75)
    ]
    saved = {"rows": rows, "floor": {"digits": {"frechet_distance": 8.0}}}
    (tmp_path / "methods.json").write_text(json.dumps(saved))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    table = tables.methods()
    distances, recalls = " | ".join(["30.0 ± 0.0"] * 3), " | ".join(["0.50 ± 0.35"] * 3)
    assert f"| MeanFlow | {distances} | {recalls} | 9 |" in table
    assert "| Denoising Student | 30.0 ± 0.0 | - | - | 0.50 ± 0.35 | - | - | 9 |" in table
    assert f"| *the teacher itself* | {distances} | {recalls} | 9 |" in table
    assert "teacher in 12 calls: Frechet distance 30.0 ± 0.0, recall 0.50 ± 0.35." in table
    assert "Real data beside other real data: Frechet distance 8.0." in table


def test_the_plot_of_methods_has_means_by_calls_and_a_point_for_each_budget(tmp_path):
    def row(name, evaluations, **distances):
        figures = {nfe: {"frechet_distance": far} for nfe, far in distances.items()}
        spent = {"evaluations": evaluations, "backward": evaluations / 2}
        return {"method": name, **spent, "figures": figures}

    rows = [
        row("mean_flow", 100_000, **{"1": 30.0, "2": 20.0, "4": 10.0}),
        row("mean_flow", 100_000, **{"1": 50.0, "2": 40.0, "4": 10.0}),
        row("mean_flow_25k", 25_000, **{"1": 90.0, "2": 80.0, "4": 70.0}),
        row("mean_flow_demo", 311_296, **{"1": 20.0, "2": 13.0, "4": 11.0}),
        row("denoising_student", 100_000, **{"1": 80.0}),
    ]
    saved = {"rows": rows, "floor": {"digits": {"frechet_distance": 13.0}}}
    assert plots._by_calls(saved, "mean_flow") == [(1, 40.0), (2, 30.0), (4, 10.0)]
    assert plots._by_calls(saved, "denoising_student") == [(1, 80.0)]
    assert plots._by_cost(saved, "mean_flow") == [(50.0, 90.0), (200.0, 40.0)]
    plots.methods(saved, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size


def test_every_method_of_digits_has_a_colour_in_the_plot():
    drawn = [name for _, names in plots.FAMILIES.values() for name in names]
    digits_alone = [n for n, e in ENTRIES.items() if e.budget == 100_000 and not e.control]
    assert sorted(drawn) == sorted([*digits_alone, "teacher"])
