"""Models for programs without this library: diffusers, torch.export and ONNX."""

import io
import logging
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.diffusion.schedules import AbstractTable
from ds.models.convert import to_diffusers as write_table
from ds.models.convert.diffusers import calls
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.ops.group_norm_silu import Addends
from ds.system import targets
from ds.system.staging import replacing

log = logging.getLogger("ds")
BATCH = torch.export.Dim("batch", min=1, max=65536)


def to_diffusers(model: Teacher | Student, path: str | Path, *, force: bool = False) -> None:
    """Write a directory from which a stock pipeline of diffusers draws what a model draws.

    A teacher on a table of betas becomes a DDIMPipeline. Students, and teachers on other paths, are
    drawn in as many calls as they make, which the log tells. Raises ValueError for guidance, for
    steps and networks that diffusers does not have, and if the path cannot be written to or,
    without `force`, exists.
    """
    check_diffusers(model, path)
    if _in_calls(model):
        calls.write(path, model, force=force)
        return
    teacher = cast(Teacher, model)
    denoiser, config = teacher.denoiser, cast(Any, teacher.net.config)
    write_table(
        path, config, teacher.net.state_dict(), denoiser.schedule, denoiser.prediction,
        solver=teacher.solver, grid=teacher.grid,
        decoder=teacher.decoder and teacher.decoder.files(),
        force=force,
    )  # fmt: skip


def check_diffusers(model: Teacher | Student, path: str | Path) -> None:
    """Raise ValueError, naming a path, for what diffusers cannot draw, as far as it shows at once.

    That is guidance, and calls that no pipeline makes.
    """
    if isinstance(model, Teacher) and model.denoiser.guidance is not None:
        raise ValueError(f"{path}: diffusers keeps no guidance; write the teacher without it")
    if _in_calls(model):
        calls.drawing(model, Path(path))


def _in_calls(model: Teacher | Student) -> bool:
    """Return whether diffusers is to draw a model in its own calls, and not by a table of betas."""
    return isinstance(model, Student) or not isinstance(model.denoiser.schedule, AbstractTable)


def to_program(student: Student, path: str | Path, *, force: bool = False) -> None:
    """Write a torch.export program (.pt2): noise [N, *shape], float32, to samples, for any N.

    Its operations are PyTorch's own, so `torch.export.load(path).module()` needs nothing else. What
    the student takes is passed by name, module(noise, label=label): label, int64 [N], and guidance,
    float32 [N]. A label that does not exist gives NaN. Latents are not decoded, which is logged.
    Raises ValueError if the path cannot be written to or, without `force`, exists.
    """
    where = targets.file(path, force=force)
    content = io.BytesIO()  # PyTorch's writer ends the process where a disk is full
    torch.export.save(_exported(student), content)
    with replacing(where, force=force) as temporary:
        temporary.write_bytes(content.getbuffer())


def to_onnx(student: Student, path: str | Path, *, force: bool = False) -> None:
    """Write an ONNX model of the same function, with the input "noise" and the output "samples".

    Further inputs are "label" and "guidance", if the student takes them.

    Raises RuntimeError if packages are missing, and ValueError if the path cannot be written to or,
    without `force`, exists.
    """
    where = targets.file(path, force=force)
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise RuntimeError(
            "ONNX needs onnx and onnxscript: pip install 'denoising-student[onnx]'"
        ) from None
    program = torch.onnx.export(
        _exported(student),
        input_names=["noise", *student.takes],
        output_names=["samples"],
        verbose=False,
    )
    assert program is not None
    with replacing(where, force=force) as temporary:
        program.save(temporary)


class _Sampling(nn.Module):
    def __init__(self, student: Student):
        super().__init__()
        self.net, self.method, self.nfe = student.net, student.method, student.nfe

    def forward(
        self, noise: Tensor, label: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        told = {"label": label, "guidance": guidance}
        cond = {name: value for name, value in told.items() if value is not None}
        return self.method.sample(self.net, noise, nfe=self.nfe, cond=cond)


@torch.no_grad()
def _exported(student: Student) -> torch.export.ExportedProgram:
    if student.decoder:
        log.warning(
            "export: the program returns latents %s; decode them with the autoencoder in decoder/, "
            "by its scaling_factor",
            list(student.shape),
        )
    z = torch.zeros(
        2, *student.shape, dtype=torch.float32, device=next(student.net.parameters()).device
    )
    module, cond = _Sampling(student).eval(), student.plain(z)
    module(z, **cond)  # fills caches, which tracing would fill with tensors that have no values
    sizes = {name: {0: BATCH} for name in ("noise", *cond)}
    program = torch.export.export(module, (z,), cond, dynamic_shapes=sizes)
    return program.run_decompositions(
        {
            torch.ops.ds.group_norm_silu.default: _group_norm_silu,
            torch.ops.ds.attention.default: F.scaled_dot_product_attention,
            torch.ops.ds.attention_residual.default: _attention_residual,
        }
    )


def _group_norm_silu(x, weight, bias, groups, eps, silu, keep=False, *addends):
    merged = Addends(*addends).merge(x)
    images, channels, height, width = merged.shape
    by_image = weight.dim() == 2
    affine = (None, None) if by_image else (weight, bias)
    y, mean, rstd = torch.ops.aten.native_group_norm(
        merged, *affine, images, channels, height * width, groups, eps
    )
    if by_image:
        y = y * weight[..., None, None] + bias[..., None, None]
    return F.silu(y) if silu else y, mean, rstd, merged if keep else x.new_empty(0)


def _attention_residual(q, k, v, weight, bias, residual):
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return (heads + bias if weight is None else F.linear(heads, weight, bias)) + residual
