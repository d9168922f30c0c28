"""From nothing to the first image, in a process of its own: imports, reading weights, one call.

The CIFAR-10 network with random weights as a student on the disk, which the page cache holds, in
float32, on GPUs in bfloat16. Ours makes its plan while loading. OpenVINO and ONNX Runtime, on CPUs,
read diffusers' network in the format of each and start without PyTorch. The compiled peer starts
with an empty cache. Wall-clock seconds.
"""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import ROOT, Case, Side, Size
from benchmarks.network import about, exact_levels, random_cifar10
from benchmarks.peers import SLOW, write_diffusers
from benchmarks.runtimes import BATCH, ONNX_RUNTIME, OPENVINO, absent, openvino_options
from benchmarks.runtimes import write as write_runtimes
from ds.diffusion.noise import noise
from ds.methods import DenoisingStudent
from ds.models.student import Student

METHOD = DenoisingStudent()
PHASES = "import", "load", "first image"
FRAME = """
import sys, time
folder, device, precision, marks = *sys.argv[1:], []
mark = lambda: marks.append(time.time())
import numpy as np
{imports}
mark()
z = np.load(folder + "/z.npy")
{load}
mark()
np.save(folder + "/images.npy", {draw})
mark()
print(marks)
"""
TORCH = """
torch.set_num_threads(1)
torch.set_grad_enabled(False)
z = torch.from_numpy(z).to(device)
"""
TWIN = f"""{TORCH}
net = UNet2DModel.from_pretrained(folder + "/diffusers/unet", low_cpu_mem_usage=False)
dtype = getattr(torch, precision)
net = net.to(device, dtype, memory_format=torch.channels_last).eval()
"""
LEVELS = (
    "(127.5 * (z - net(z.to(dtype), 999).sample).clamp(-1, 1) + 127.5).round().byte()"
    ".movedim(1, -1).cpu().numpy()"
)
# Without PyTorch, which they do not need.
RUNTIME_LEVELS = (
    "(127.5 * (z - net(z, np.array([999]))).clip(-1, 1) + 127.5).round().astype(np.uint8)"
    ".transpose(0, 2, 3, 1)"
)
DIFFUSERS = "import torch\nfrom diffusers import UNet2DModel"
SCRIPTS = {
    "diffusers": FRAME.format(imports=DIFFUSERS, load=TWIN, draw=LEVELS),
    "diffusers, compiled": FRAME.format(
        imports=DIFFUSERS,
        load=TWIN + "options = {'freezing': True} if device == 'cpu' else {}\n"
        "net = torch.compile(net, dynamic=False, options=options)",
        draw=LEVELS,
    ),
    OPENVINO: FRAME.format(
        imports="import openvino",
        load=f"options = {openvino_options(torch.float32, threads=1)}\n"
        'made = openvino.Core().compile_model(folder + "/twin.xml", "CPU", options)\n'
        "net = lambda z, t: made([z, t])[0]",
        draw=RUNTIME_LEVELS,
    ),
    ONNX_RUNTIME: FRAME.format(
        imports="import onnxruntime",
        load="options = onnxruntime.SessionOptions()\n"
        "options.intra_op_num_threads = 1\n"
        f'options.add_free_dimension_override_by_name("{BATCH}", 1)\n'
        'made = onnxruntime.InferenceSession(folder + "/twin.onnx", options)\n'
        'net = lambda z, t: made.run(None, {"x": z, "t": t})[0]',
        draw=RUNTIME_LEVELS,
    ),
    "ours": FRAME.format(
        imports="import torch\nimport ds; ds.Sampler",
        load=f"{TORCH}"
        'student = ds.load_student(folder + "/student", device=device)\n'
        "execution = ds.Execution.default(student, precision=precision)\n"
        "sampler = ds.Sampler(student, batch_size=1, execution=execution)",
        draw="sampler.draw(z).cpu().numpy()",
    ),
}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield the case."""
    net = random_cifar10(device, size)
    z = noise(0, [0], net.shape, device=device)
    folder, phases = Path(tempfile.mkdtemp()), {}
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    np.save(folder / "z.npy", z.cpu().numpy())
    Student(net, METHOD).save_pretrained(folder / "student")
    missing = absent(device)
    write_runtimes(folder, net, missing)
    if size != "full":
        missing |= SLOW
    try:
        import diffusers  # noqa: F401

        write_diffusers(folder / "diffusers", net)
    except ImportError as error:
        missing |= dict.fromkeys(("diffusers", "diffusers, compiled"), str(error))
    names = [name for name in SCRIPTS if name not in missing]
    yield Case(
        f"cold start {about(net, 1)}",
        {name: Side(functools.partial(_start, name, folder, device, phases)) for name in names},
        functools.partial(exact_levels, net, METHOD.sample, z),
        images=1,
        dtype=getattr(torch, _precision(device)),
        missing=missing,
        wall=True,
        phases=phases,
    )


def _start(
    name: str,
    folder: Path,
    device: torch.device,
    phases: dict[str, dict[str, list[float]]],
    _: Any,
) -> Tensor:
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    begin = time.time()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPTS[name], str(folder), str(device), _precision(device)],
        cwd=ROOT,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    marks = [begin, *json.loads(done.stdout.splitlines()[-1])]
    for phase, before, after in zip(PHASES, marks, marks[1:], strict=False):
        phases.setdefault(name, {}).setdefault(phase, []).append(after - before)
    return torch.from_numpy(np.load(folder / "images.npy"))


def _precision(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"
