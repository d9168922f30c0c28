"""The comparison of methods spends what it says, and as much for each method."""

import inspect
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from benchmarks import methods, tables
from ds.engine import Engine
from ds.nets.blocks import AbstractUNet
from ds.pairs import generate
from ds.pairs.sources import Images, digits
from ds.training import presets
from ds.training.trainer import Trainer


class Spy:
    """Counts the rows that networks are called on, twice where they carry a derivative."""

    def __init__(self, monkeypatch):
        self.evaluations, self._on = 0, False
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
        if self._on and isinstance(module, (AbstractUNet, Engine)):
            x = args[0]
            dual = not isinstance(module, Engine) and forward_ad.unpack_dual(x).tangent is not None
            self.evaluations += len(x) * (1 + dual)


@pytest.mark.parametrize("name", [n for n in methods.ENTRIES if not n.endswith("_demo")])
def test_a_run_spends_the_evaluations_that_its_networks_do(name, monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "HELD_OUT", 4)
    entry, rows = methods.ENTRIES[name], 8
    net: Any = entry.net
    entry = replace(
        entry,
        net=replace(net, channels=8, norm_groups=4, channel_mult=(1,), attention_resolutions=()),
        train=replace(entry.train, batch_size=8),
        teach=entry.teach and replace(entry.teach, batch_size=8, epochs=1),
        pairs=rows,
    )
    least = methods.spends(entry, Images(digits()[0][:rows])) + 160 * bool(entry.teach)
    spy = Spy(monkeypatch)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(spy)
    with hook:
        _, spent = methods.trained(entry, tmp_path, 0, least + 104, rows)
    assert spent == spy.evaluations > 0


def test_the_second_budget_is_what_the_demo_spends():
    demo, images = presets.digits(), len(digits()[0])
    taught, learnt = (
        train.epochs * (rows // train.batch_size) * train.batch_size
        for train, rows in ((demo.teach, images), (demo.train, demo.pairs.count))
    )
    calls = len(demo.solve.build(demo.denoising.schedule)[1])
    pairs = calls * (demo.pairs.count + demo.pairs.held_out)
    assert taught + pairs + learnt == methods.DEMO_BUDGET


@pytest.mark.parametrize(
    ("changed", "old", "new", "anew"),
    [
        ("ds.methods.flow.mean_flow", '"""', '"""So: ', False),
        ("ds.methods.flow.mean_flow", "self.guidance", "self.kappa", True),
        # of what it uses of other files, and of what it does not
        ("ds.methods.flow.path", "x - (t - r) * u", "x + (t - r) * u", True),
        ("ds.methods.flow.path", "v = eps - x0", "v = x0 - eps", False),
    ],
)
def test_a_run_is_made_anew_when_its_method_changes_and_not_for_words(
    changed, old, new, anew, monkeypatch
):
    entry, read = methods.ENTRIES["mean_flow"], inspect.getsource
    before = methods.made_of(entry)
    assert old in read(sys.modules[changed])

    def altered(module):
        source = read(module)
        return source.replace(old, new, 1) if module.__name__ == changed else source

    monkeypatch.setattr(inspect, "getsource", altered)
    assert (methods.made_of(entry) != before) is anew


def test_a_row_of_a_later_seed_is_written_beside_the_times_that_were_measured(
    monkeypatch, tmp_path
):
    path, seconds = tmp_path / "methods.json", {"mean_flow": {"1": 0.1}}
    path.write_text(json.dumps({"rows": [], "seconds": seconds}))
    monkeypatch.setattr(methods, "PATH", path)
    monkeypatch.setattr(methods, "split_floor", lambda *_, **__: 8.0)
    (tmp_path / "mean_flow-0").mkdir()
    rows = {("mean_flow", seed): {"method": "mean_flow", "seed": seed} for seed in (1, 0)}
    methods.write(rows, tmp_path)
    written = json.loads(path.read_text())
    assert [row["seed"] for row in written["rows"]] == [0, 1]
    assert written["seconds"] == seconds


def test_the_table_of_methods_has_means_of_seeds_and_dashes_for_calls_that_none_makes(
    monkeypatch, tmp_path
):
    figures = {"frechet_distance": 30.0, "recall": 0.5}
    rows = [
        {"method": name, "figures": {nfe: {**figures, "recall": recall} for nfe in calls}}
        for name, calls in (("mean_flow", "124"), ("denoising_student", "1"))
        for recall in (0.25, 0.75)
    ]
    seconds = {"mean_flow": {"1": 0.1, "2": 0.2, "4": 0.4}}
    about = {"real": 8.0, "environment": {"device": "a CPU", "timing": "its time"}}
    saved = {"rows": rows, "seconds": seconds, **about}
    (tmp_path / "methods.json").write_text(json.dumps(saved))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    table = tables.methods()
    distances, recalls = " | ".join(["30.0 ± 0.0"] * 3), " | ".join(["0.50 ± 0.35"] * 3)
    assert f"| MeanFlow | {distances} | {recalls} | 0.100 | 0.200 | 0.400 |" in table
    assert "| Denoising Student | 30.0 ± 0.0 | - | - | 0.50 ± 0.35 | - | - | - | - | - |" in table
    assert "8.0 from other real ones. a CPU, its time." in table
