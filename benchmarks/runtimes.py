"""What people run a network with on a CPU, instead of PyTorch: OpenVINO and ONNX Runtime.

Each is optional and takes diffusers' twin of a network from ONNX, at its best setting
(docs/notes/0038-peers-of-a-cpu.md).
"""

import functools
import importlib.util
import io
import warnings
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Call, diffusers_twin
from ds.nets import UNet

INPUTS, OUTPUT = ["x", "t"], "y"
BATCH = "n"  # of the exported model; a runtime is told it before it compiles
OPENVINO, ONNX_RUNTIME = "OpenVINO", "ONNX Runtime"
PACKAGES = {OPENVINO: "openvino", ONNX_RUNTIME: "onnxruntime"}


def runtimes(
    net: UNet, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the runtimes, called with float32 x and int64 t, and which are missing and why.

    They compile for a batch when it first comes, for as many threads as PyTorch has then.
    """
    build: dict[str, Callable[[UNet, torch.dtype, int], Call]]
    build = {OPENVINO: openvino, ONNX_RUNTIME: onnx_runtime}
    missing = absent(device)
    if dtype != torch.float32:
        missing.setdefault(ONNX_RUNTIME, "its CPU provider has no convolution in bfloat16")
    return {n: _by_batch(f, net, dtype) for n, f in build.items() if n not in missing}, missing


def absent(device: torch.device) -> dict[str, str]:
    """Say which runtimes cannot run here, and why."""
    if device.type != "cpu":
        return dict.fromkeys(PACKAGES, "compared on CPUs")
    return {
        name: f"not installed (pip install diffusers onnx {package})"
        for name, package in PACKAGES.items()
        if not all(map(importlib.util.find_spec, ("diffusers", "onnx", package)))
    }


def _by_batch(build: Callable[..., Call], net: UNet, dtype: torch.dtype) -> Call:
    compiled = functools.cache(functools.partial(build, net, dtype))
    return lambda x, t: compiled(len(x))(x, t)


@functools.lru_cache(maxsize=1)  # the cases of a run share the network
def onnx_model(net: UNet) -> bytes:
    """Return diffusers' twin of a network in ONNX, in float32, from x and t to y, for any batch.

    PyTorch traces it: exported by its compiler it takes eight times as long, and runs as fast.
    """
    x, t = torch.zeros(2, *net.shape), torch.zeros(2, dtype=torch.int64)
    file: Any = io.BytesIO()  # which the types of the exporter leave out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of conditions on shapes, and of an old exporter
        torch.onnx.export(
            diffusers_twin(net).float().cpu(),
            (x, t),
            file,
            input_names=INPUTS,
            output_names=[OUTPUT],
            dynamic_axes={name: {0: BATCH} for name in (*INPUTS, OUTPUT)},
            dynamo=False,
        )
    return file.getvalue()


def openvino(net: UNet, dtype: torch.dtype, images: int) -> Call:
    """Return OpenVINO's network at a batch, which must be copied before the next call."""
    import openvino as ov

    options = openvino_options(dtype, threads=torch.get_num_threads())
    compiled = ov.Core().compile_model(openvino_model(net, images), "CPU", options)
    request = compiled.create_infer_request()

    def call(x: Tensor, t: Tensor) -> Tensor:
        given = {"x": x.contiguous().numpy(), "t": t.numpy()}
        return torch.from_numpy(request.infer(given, share_inputs=True, share_outputs=True)[OUTPUT])

    return call


def openvino_model(net: UNet, images: int) -> Any:
    """Return diffusers' twin of a network as OpenVINO's model of a batch."""
    import openvino as ov

    model = ov.Core().read_model(onnx_model(net))
    model.reshape({"x": [images, *net.shape], "t": [images]})
    return model


def openvino_options(dtype: torch.dtype, *, threads: int) -> dict[str, str | int]:
    """Return the settings in which OpenVINO runs one batch at a time at its fastest."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": threads,
    }


def onnx_runtime(net: UNet, dtype: torch.dtype, images: int) -> Call:
    """Return ONNX Runtime's network at a batch, in float32."""
    import onnxruntime as ort

    assert dtype == torch.float32
    options = ort.SessionOptions()  # of which all graph optimisations are the default
    options.add_free_dimension_override_by_name(BATCH, images)
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(onnx_model(net), options, providers=["CPUExecutionProvider"])
    return lambda x, t: torch.from_numpy(
        session.run([OUTPUT], {"x": x.contiguous().numpy(), "t": t.numpy()})[0]
    )


def write(folder: Path, net: UNet, missing: Container[str]) -> None:
    """Write twin.xml for one image and twin.onnx, of the runtimes that are not missing."""
    if OPENVINO not in missing:
        import openvino as ov

        ov.save_model(openvino_model(net, 1), folder / "twin.xml", compress_to_fp16=False)
    if ONNX_RUNTIME not in missing:
        (folder / "twin.onnx").write_bytes(onnx_model(net))
