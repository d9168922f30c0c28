"""Report what this machine has. The report always prints, whatever is missing or broken."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ds
from ds.system import apex


def report() -> dict[str, Any]:
    """Probe the machine. A probe that fails reports the reason instead of an answer."""
    return {name: _guarded(probe) for name, probe in _PROBES.items()}


def text(found: dict[str, Any]) -> str:
    """Format a report for people."""
    lines = []
    for name, value in found.items():
        if name == "ops" and isinstance(value, list):
            lines += ["", f"{'op':32}{'device':8}{'backend':12}status"]
            lines += [_op_line(**row) for row in value]
        else:
            lines.append(f"{name:14}{value}")
    return "\n".join(lines)


def commit() -> str:
    """Return the commit of the checkout that ds runs from, or "unknown"."""
    root = Path(ds.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _op_line(op: str, device: str, backend: str, status: str, reason: str) -> str:
    return f"{op:32}{device:8}{backend:12}{status}{f': {reason}' if reason else ''}"


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:  # a broken machine needs the report most
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}, " + (
        f"{torch.get_num_threads()} threads"
    )


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    p = torch.cuda.get_device_properties(0)
    return f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"


def _dali() -> str:
    found = [d for d in importlib.metadata.distributions() if _is_dali(d.metadata["Name"])]
    return ", ".join(f"{d.metadata['Name']} {d.version}" for d in found) or (
        "not installed: pip install 'denoising-student[dali]', of CUDA 12 '[dali-cuda12]'"
    )


def _is_dali(name: str | None) -> bool:
    return (name or "").startswith("nvidia-dali-cuda")


def _extension() -> str:
    return f"CPU: {_built('cpu')}; CUDA: {_built('cuda')}"


def _built(library: str) -> str:
    from ds import ops

    info = ops.build_info(library)
    return (
        f"built with {info['compiler']}, {info['flags']}" if info["built"] else str(info["reason"])
    )


def _ops() -> list[dict[str, str]]:
    from ds import ops

    return [row._asdict() for row in ops.table()]


_PROBES: dict[str, Callable[[], Any]] = {
    "version": lambda: ds.__version__,
    "commit": commit,
    "python": lambda: f"{sys.version.split()[0]} on {platform.platform()}",
    "cpu": lambda: f"{os.cpu_count()} cores, {platform.machine()}",
    "torch": _torch,
    "gpu": _gpu,
    "triton": lambda: _version("triton"),
    "dali": _dali,
    "apex": apex.status,
    "numpy": lambda: _version("numpy"),
    "variables": lambda: {k: v for k, v in os.environ.items() if k.startswith("DS_")} or "none set",
    "extension": _extension,
    "ops": _ops,
}
