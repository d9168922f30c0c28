"""OpenVINO and ONNX Runtime are sides where they are installed, and named where they are not."""

import importlib.util
import sys

import pytest
import torch

from benchmarks import cold_start, harness, network, runtimes, student, teacher_loop

CPU = torch.device("cpu")
NEEDS = {name: ("diffusers", "onnx", package) for name, package in runtimes.PACKAGES.items()}


@pytest.fixture(scope="module")
def net():
    return network.random_cifar10(CPU, "tiny")


def installed() -> set[str]:
    """The runtimes that can be built here; a checkout may have none of the packages."""
    return {n for n, needs in NEEDS.items() if all(map(importlib.util.find_spec, needs))}


def checked(case, without: str) -> dict:
    """Hold the other sides of a case against float64."""
    row = next(harness.run([harness.without(case, without)], CPU, None))
    assert not row["refused"]
    return row


def test_a_runtime_is_right_and_of_the_precision_of_its_case():
    for case in network.cases(CPU, "tiny"):
        row = checked(case, "diffusers|net|ours")
        narrow = row["dtype"] == "bfloat16"
        assert row["error"].keys() == installed() - ({runtimes.ONNX_RUNTIME} if narrow else set())
        for error in row["error"].values():
            assert 1e-3 * narrow < error < (0.03 if narrow else 3e-6)


@pytest.mark.parametrize(
    ("module", "package"),
    [
        *((network, package) for package in ("openvino", "onnxruntime", "onnx", "diffusers")),
        *((module, None) for module in (network, student, teacher_loop)),
    ],
)
def test_a_runtime_is_a_side_or_missing(module, package, net, monkeypatch):
    if package:
        monkeypatch.setitem(sys.modules, package, None)
    slow = {"slow" if module is teacher_loop else "compiles": False}
    sides, missing = module.contenders(net, 2, torch.float32, CPU, **slow)
    assert NEEDS.keys() & sides.keys() == installed()
    assert NEEDS.keys() & missing.keys() == NEEDS.keys() - installed()
    for name in NEEDS:
        if package in NEEDS[name]:
            assert missing[name] == f"not installed (pip install {' '.join(NEEDS[name])})"


def test_a_gpu_has_no_runtimes(net):
    sides, missing = runtimes.runtimes(net, torch.bfloat16, torch.device("cuda"))
    assert not sides and missing.keys() == NEEDS.keys()


def test_a_runtime_starts_without_pytorch():
    (case,) = cold_start.cases(CPU, "tiny")
    assert checked(case, "diffusers|ours")["error"].keys() == installed()
    assert not any("torch" in cold_start.SCRIPTS[name] for name in NEEDS)
