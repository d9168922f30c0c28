"""Report what the machine code of the CUDA library is like; it needs no GPU, but the library.

    python benchmarks/cuda_resources.py > benchmarks/results/cuda_resources.json

The kernels are read off ds/ops/lib/libds_cuda.so, with the tools that come with Triton. The cuts
are those of the GroupNorms of the paper's networks in bfloat16, where images have more than 1024
pixels: how many blocks make a cluster, or how many tiles an image, and the shared memory of a
block in bytes.
"""

import argparse
import ctypes
import json
import re
import sys
from pathlib import Path

import triton
from aot import NETWORKS, disassemble, norms, widths

from ds.ops import _native

LIBRARY = Path(_native.__file__).with_name("lib") / "libds_cuda.so"
TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def kernels(*only: str) -> list[dict]:
    """Return the figures of every kernel; only are arguments of cuobjdump.

    Loads and stores count instructions of global memory by width in bits, copies those from global
    to shared memory; stack is bytes a thread.
    """
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    usage = by_function(disassemble(cuobjdump, "-res-usage", *only, str(LIBRARY)))
    rows = []
    for (arch, function), text in by_function(
        disassemble(cuobjdump, "-sass", *only, str(LIBRARY))
    ).items():
        used = usage[arch, function]
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text)
        rows.append(
            {
                "kernel": short(function),
                "arch": arch,
                "registers": int(re.search(r"REG:(\d+)", used)[1]),
                "stack": int(re.search(r"STACK:(\d+)", used)[1]),
                "spills": sum(name.startswith(("LDL", "STL")) for name in instructions),
                "loads": widths(instructions, "LDG"),
                "copies": widths(instructions, "LDGSTS"),
                "stores": widths(instructions, "STG"),
                "instructions": sum(name != "NOP" for name in instructions),
            }
        )
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def by_function(text: str) -> dict[tuple[str, str], str]:
    """Cut what cuobjdump prints by architecture and function."""
    found = {}
    for machine in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        for part in re.split(r"\bFunction (?:: )?(?=_Z)", machine)[1:]:
            found[machine.split()[0], re.match(r"\w+", part)[0]] = part
    return found


def short(function: str) -> str:
    """Return the name of a kernel and its type: what ds::kernel is instantiated for."""
    length, rest = re.search(r"_cu_[0-9a-f]{8}(\d+)(\w+)", function).groups()
    name, rest = rest[: int(length)], rest[int(length) :]
    types = [name for mangled, name in TYPES.items() if rest.startswith(f"I{mangled}E")]
    return " ".join([name, *types])


def cuts() -> list[dict]:
    """Return how the large images of the paper's networks are cut."""
    cut = _native.cuda_library().ds_cuda_group_norm_silu_tiles
    rows = []
    shapes = {(norm.channels + norm.skip, norm.pixels, norm.groups) for norm in norms(NETWORKS)}
    for channels, pixels, groups in sorted(shape for shape in shapes if shape[1] > 1024):
        row = {"channels": channels, "pixels": pixels, "groups": groups}
        for name, cluster in (("cluster", True), ("two passes", False)):
            shared = ctypes.c_int64()
            tiles = cut(pixels, channels, groups, 2, cluster, ctypes.addressof(shared))
            row[name] = {"tiles": tiles, "shared": shared.value} if tiles else None
        rows.append(row)
    return rows


def main() -> None:
    """Write the report; with --arch, its kernels for one architecture only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", metavar="sm_XX", help="these kernels only, and no cuts")
    arch = parser.parse_args().arch
    lines = [f'"compiler": {json.dumps(_native.build_info("cuda")["compiler"])}']
    parts = {"kernels": kernels("-arch", arch)} if arch else {"kernels": kernels(), "cuts": cuts()}
    for name, rows in parts.items():
        lines.append(f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]")
    sys.stdout.write("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
