"""From nothing to the first image, in a process of its own: imports, reading weights, one call.

The CIFAR-10 network with random weights as a student on the disk, which the page cache holds, in
float32, on GPUs in bfloat16. Ours makes its plan while loading. The compiled peer starts with an
empty cache. Wall-clock seconds.
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
import torch
{imports}
mark()
torch.set_num_threads(1)
z = torch.from_numpy(np.load(folder + "/z.npy")).to(device)
{load}
mark()
with torch.no_grad():
    images = {draw}
np.save(folder + "/images.npy", images.cpu().numpy())
mark()
print(marks)
"""
TWIN = """
net = UNet2DModel.from_pretrained(folder + "/diffusers/unet", low_cpu_mem_usage=False)
dtype = getattr(torch, precision)
net = net.to(device, dtype, memory_format=torch.channels_last).eval()
"""
LEVELS = (
    "(127.5 * (z - net(z.to(dtype), 999).sample).clamp(-1, 1) + 127.5).round().byte()"
    ".movedim(1, -1)"
)
SCRIPTS = {
    "diffusers": FRAME.format(imports="from diffusers import UNet2DModel", load=TWIN, draw=LEVELS),
    "diffusers, compiled": FRAME.format(
        imports="from diffusers import UNet2DModel",
        load=TWIN + "options = {'freezing': True} if device == 'cpu' else {}\n"
        "net = torch.compile(net, dynamic=False, options=options)",
        draw=LEVELS,
    ),
    "ours": FRAME.format(
        imports="import ds; ds.Sampler",
        load='student = ds.load_student(folder + "/student", device=device)\n'
        "execution = ds.Execution.default(student, precision=precision)\n"
        "sampler = ds.Sampler(student, batch_size=1, execution=execution)",
        draw="sampler.draw(z)",
    ),
}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield the case."""
    net = random_cifar10(device, size)
    z = noise(0, [0], net.shape, device=device)
    folder, phases, missing = Path(tempfile.mkdtemp()), {}, {}
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    np.save(folder / "z.npy", z.cpu().numpy())
    Student(net, METHOD).save_pretrained(folder / "student")
    names = [*SCRIPTS]
    try:
        import diffusers  # noqa: F401

        write_diffusers(folder / "diffusers", net)
        if size != "full":
            missing |= SLOW
            names.remove("diffusers, compiled")
    except ImportError as error:
        missing["diffusers"] = str(error)
        names = ["ours"]
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
