"""Calls of every op with arguments that fit what it declares, and with some that do not.

    python -m tests.fuzz --seconds 60 --seed 0

A call may raise ValueError, RuntimeError, TypeError, IndexError or NotImplementedError; what it
returns and writes is what the reference does. A call depends on the seed and its number alone, so
that `--first N --calls 1` is the one that `--log` names last, should the process have died of it.
"""

import argparse
import faulthandler
import functools
import math
import os
import random
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ds import ops
from ds.ops import _native
from ds.ops.dispatch import op as dispatch
from ds.ops.dispatch import takes as declared
from ds.ops.dispatch.op import Op
from ds.ops.group_norm_silu import reference as reference_of_norm

if "DS_SANITIZED" in os.environ:
    from tests import sanitized  # noqa: F401

OPS = [*dispatch._ops]
LEARNING = {"group_norm_silu", "attention", "attention_residual", "conv3x3"}
REFUSALS = ValueError, RuntimeError, TypeError, IndexError, NotImplementedError
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPES = [
    *FLOATS, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8, torch.uint8, torch.int16,
    torch.int32, torch.int64,
]  # fmt: skip
SIZES = [0, 1, 1, 2, 3, 4, 5, 7, 8, 16, 16, 17, 32, 48]
# Sizes and scalars that few others than these fit, or that are to be small.
VALUES = {
    "N": [0, 1, 1, 2, 3], "H": [0, 1, 2, 3, 4, 6, 9, 16], "W": [0, 1, 2, 3, 5, 8, 16],
    "heads": [1, 1, 2], "K": [1, 2, 3], "L": [1, 2, 3], "I": SIZES, "steps": [0, 1, 4],
    "groups": [1, 1, 2, 3, 4, 8], "stride": [1, 1, 2], "size": [0, 1, 3, 4, 5, 1023, 1024, 1030],
    "P": [16, 16, 3], "T": [0, 1, 5, 17],
    "seed": [0, 1, -1, 2**63 - 1, -(2**63)],
    "split": [*range(9), 16, 17, 32], "eps": [1e-3, 0.1], "max_norm": [math.inf, 0.5],
    "weight_decay": [0.0, 0.1],
}  # fmt: skip
SAME = {"I": "C", "L": "K"}  # sizes that are to be as another
ODD = [None, 2.0, "2", [], 0, -1, -5, 2**50, 2**62, 2**63, 2**70, True, math.nan]
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3}  # else of narrower types
LARGEST = 60_000  # elements of a tensor

# Of a norm's backward: with one of them changed, the statistics are not those of x, and a kernel
# may measure again what the reference takes as it is.
NORMALIZED = {"x", "mean", "rstd", "groups", "shift", "residual", "skip"}


class Call:
    """An op and its arguments by name, as its declaration allows; drawn from a generator."""

    def __init__(self, op: Op, draw: random.Random):
        self.op, self.draw = op, draw
        self.schema = op.schema.arguments
        self.generator = torch.Generator().manual_seed(draw.getrandbits(60))
        self.compared = True  # with the reference: not where roundings decide
        while not self._fits():
            pass
        self.arguments = {name: self._filled(name, value) for name, value in self.made.items()}
        self._mend()

    def _fits(self) -> bool:
        """Draw sizes, dtypes and scalars, with tensors of meta for real ones; say if they fit."""
        draw = self.draw
        self.made: dict[str, Any] = {}
        for argument in self.schema:
            self.made[argument.name] = self._scalar(argument.name, str(argument.real_type))
        sizes: dict[str, Any] = {
            "rest": [draw.choice([1, 2, 3, 5, 8]) for _ in range(draw.randrange(3))]
        }
        for line in filter(None, map(str.strip, self.op.takes.splitlines())):
            rule, _, complaint = line.partition(" : ")
            if complaint:
                if not self._value(rule, sizes):
                    return False
            elif " = " in rule:
                name, _, value = rule.partition(" = ")
                sizes[name] = self._value(value, sizes)
            elif not self._tensor(*rule.split(" ", 1), sizes):
                return False
        return True

    def _value(self, expression: str, sizes: dict[str, Any]):
        return eval(_compiled(expression), vars(declared) | self.made | sizes)

    def _scalar(self, name: str, kind: str):
        draw = self.draw
        drawn = {
            "int": lambda: draw.choice(SIZES), "float": draw.random,
            "bool": lambda: draw.random() < 0.5, "ScalarType": lambda: draw.choice(FLOATS),
            "List[bool]": lambda: [draw.random() < 0.7 for _ in range(2)],
        }  # fmt: skip
        return draw.choice(VALUES[name]) if name in VALUES else drawn.get(kind, lambda: None)()

    def _tensor(self, name: str, rule: str, sizes: dict[str, Any]) -> bool:
        draw, kind = self.draw, next(str(a.real_type) for a in self.schema if a.name == name)
        like = re.match(r"like (first )?(\w+) ", rule)
        *shapes, dtype = re.split(r"\] (?:or \[)?", rule.removeprefix(like[0] if like else ""))
        if "Optional" in kind and draw.random() < 0.4:
            for size in re.findall(r"\w+", "".join(shapes)):
                sizes.setdefault(size, 0)
            return True
        shape = draw.choice(shapes).strip("[").split(", ") if shapes else None
        if like:
            of = self.made[like[2]]
            of = of[: draw.randrange(len(of) + 1)] if like[1] and draw.random() < 0.7 else of
            dtypes = [x.dtype if "of" in dtype else self._dtype(dtype) for x in of]
            self.made[name] = [
                torch.empty(x.shape, dtype=d, device="meta")
                for x, d in zip(of, dtypes, strict=True)
            ]
        elif "List" in kind:
            first = self._dtype(dtype.replace(f"of {name}", "any"))
            count = draw.choice([0, 1, 1, 2, 3]) if draw.random() < 0.8 else 5
            self.made[name] = [
                self._meta(shape, first if "of" in dtype else self._dtype(dtype), sizes)
                for _ in range(count)
            ]
        else:
            self.made[name] = self._meta(shape, self._dtype(dtype), sizes)
        made = self.made[name]
        return all(x.numel() <= LARGEST for x in (made if isinstance(made, list) else [made]))

    def _meta(self, shape: list[str] | None, dtype: torch.dtype, sizes: dict[str, Any]) -> Tensor:
        if shape is None:
            shape = self.draw.choice([[], ["1"], ["_"]])
        lengths: list[int] = []
        for size in filter(None, shape):
            if size == "...":
                lengths += sizes["rest"]
                continue
            if size == "_":
                lengths.append(self.draw.choice(VALUES["N"]))
                continue
            if size.isidentifier() and size not in sizes and size not in self.made:
                other = sizes.get(SAME.get(size))
                sizes[size] = self.draw.choice(
                    VALUES.get(size, SIZES) if other is None else [other]
                )
                if size == "C" and "split" in self.made and self.draw.random() < 0.8:
                    self.made["split"] = sizes["C"]
            lengths.append(int(self._value(size, sizes)))
        if math.prod(lengths) > LARGEST or min(lengths, default=0) < 0:
            lengths = [LARGEST + 1]
        return torch.empty(lengths, dtype=dtype, device="meta")

    def _dtype(self, rule: str) -> torch.dtype:
        kind, of, other = rule.rpartition("of ")
        if rule == "any":
            return self.draw.choice(DTYPES)
        if of:
            convert = getattr(declared, kind.strip()) if kind else lambda dtype: dtype
            return convert(self.made[other].dtype)
        words = rule.split(" or ")
        if "floating" in words and self.draw.random() < 0.7:
            return self.draw.choice(FLOATS[:2])
        return self.draw.choice(sorted(set().union(*(declared.DTYPES[w] for w in words)), key=str))

    def _filled(self, name: str, value):
        if isinstance(value, list):
            return [self._filled(name, x) for x in value]
        if not isinstance(value, Tensor):
            return value
        x = torch.randn(value.shape, generator=self.generator, dtype=torch.float32)
        if not value.is_floating_point():
            x = x * 1000
        x = self._spread(x.abs() if name == "exp_avg_sqs" else x, name in _written(self.op))
        return _converted(x, value.dtype)

    def _spread(self, x: Tensor, written: bool) -> Tensor:
        """Return the values with other strides, or elsewhere in a storage."""
        kind = self.draw.choice(["dense", "dense", "last", "order", "gaps", "offset", "one"])
        if kind == "last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if kind == "order":
            order = self.draw.sample(range(x.dim()), x.dim())
            back = [order.index(i) for i in range(x.dim())]
            return x.permute(order).contiguous().permute(back)
        if kind == "gaps" and x.dim():
            return x.repeat_interleave(2, -1)[..., ::2]
        if kind == "offset":
            flat = torch.cat([x.new_zeros(3), x.flatten()])
            return flat[3:].view(x.shape)
        if kind == "one" and not written and x.dim() and len(x):
            return x[:1].expand(x.shape)
        return x

    def _mend(self) -> None:
        """Give values that are to agree with others."""
        given = self.arguments
        if self.op.name == "gather_rows":
            count, indices = sum(map(len, given["parts"])), given["indices"]
            given["indices"] = indices % count if count else indices[:0]
        if self.op.name == "solver_update":
            given["step"] = given["step"].remainder(self.draw.choice([1, 3, 6]))
        if self.op.name == "group_norm_silu_backward":  # whose statistics are those of x
            parts = [given[name] for name in ("shift", "residual", "skip")]
            _, given["mean"], given["rstd"], _ = reference_of_norm(
                given["x"], given["weight"], given["bias"], given["groups"], 0.1, True, False,
                *(parts if given["grad_merged"] is None else []),
            )  # fmt: skip

    def spoil(self) -> None:
        """Change something about one argument, or a few."""
        names = list(self.arguments)
        count = self.draw.choice([1, 1, 1, 2, 3])
        # Without its memory a tensor is the only thing wrong: PyTorch's errors print all arguments.
        self.broken = self.draw.random() < 0.25
        for name in self.draw.sample(names, 1 if self.broken else min(count, len(names))):
            value = self.arguments[name]
            if self.op.name == "group_norm_silu_backward" and name in NORMALIZED:
                self.compared = False
            if isinstance(value, list) and value and self.draw.random() < 0.7:
                i = self.draw.randrange(len(value))
                self.arguments[name] = [*value[:i], self._spoilt(name, value[i]), *value[i + 1 :]]
            elif isinstance(value, list):
                other = self.draw.choice(
                    [[], value[1:], value * 2, None, tuple(value), [*value, None]]
                )
                self.arguments[name] = other
            else:
                self.arguments[name] = self._spoilt(name, value)

    def _spoilt(self, name: str, value):
        draw = self.draw
        if isinstance(
            value, torch.dtype
        ):  # PyTorch looks numbers up in a table, also beyond its end
            return draw.choice([None, "2", [], *DTYPES])
        if not isinstance(value, Tensor) or (draw.random() < 0.05 and not self.broken):
            others = [x for x in self.arguments.values() if isinstance(x, Tensor)]
            self.compared = False
            return draw.choice([*ODD, *DTYPES[:6], *others])
        x, d = value, draw.randrange(max(value.dim(), 1))
        changes = {
            "shorter": lambda: x.narrow(d, 0, max(x.shape[d] - 1, 0)),
            "longer": lambda: torch.cat([x, x.narrow(d, 0, 1)], d),
            "one": lambda: x.narrow(d, 0, 1),
            "none": lambda: x.narrow(d, 0, 0),
            "turned": lambda: x.transpose(d, draw.randrange(x.dim())),
            "flat": lambda: x.flatten(),
            "more": lambda: x[None],
            "fewer": lambda: x.select(d, 0),
            "number": lambda: x.new_zeros(()),
            "dtype": lambda: x.to(draw.choice(DTYPES)),
            "meta": lambda: x.to("meta"),
            "sparse": lambda: x.to_sparse(),
            "quantized": lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
            "freed": lambda: _resized(x, 0),
            "truncated": lambda: _resized(x, max(x.untyped_storage().nbytes() - x.itemsize, 0)),
            "expanded": lambda: x.narrow(d, 0, 1).expand(x.shape),
            "overlapping": lambda: torch.as_strided(x.clone(), x.shape, [1] * x.dim()),
            "negated": lambda: torch._neg_view(x),
            "zero": lambda: torch._efficientzerotensor(x.shape, dtype=x.dtype),
            "far": lambda: x + draw.choice([-1, 1, 5, 10**9, 2**62]),
            "shared": lambda: draw.choice(
                [t for t in self.arguments.values() if isinstance(t, Tensor)]
            ),
            "gradient": lambda: x.detach().clone().requires_grad_(),
            "inference": lambda: _in_inference_mode(x),
            "nan": lambda: torch.full_like(x, math.nan),
            "huge": lambda: torch.full_like(x, 3e38),
        }
        broken = ["freed", "truncated", "zero"]
        change = draw.choice(broken if self.broken else [c for c in changes if c not in broken])
        # Our kernels write into tensors of inference mode outside of it, which PyTorch does not.
        if change in ("nan", "huge", "far", "shared", "inference"):
            self.compared = False
        try:
            return changes[change]()
        except (*REFUSALS, AttributeError):  # what PyTorch cannot make
            return value


def _resized(x: Tensor, size: int) -> Tensor:
    y = x.clone()
    y.untyped_storage().resize_(size)
    return y


@torch.inference_mode()
def _in_inference_mode(x: Tensor) -> Tensor:
    return x.clone()


@functools.cache
def _compiled(expression: str):
    return compile(expression, "<what an op takes>", "eval")


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert, with the strides kept also where they are those of views."""
    if x.dtype == dtype:
        return x
    storage = x.new_empty(0).set_(x.untyped_storage()).to(dtype)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def public(op: Op, given: dict[str, Any]) -> Callable[[], Any] | None:
    """Return the call of the public function that makes this one of the op, if there is one."""
    a = SimpleNamespace(**given)
    seed = a.seed % 2**64 if isinstance(getattr(a, "seed", None), int) else None
    if op.name == "group_norm_silu":
        parts = {"shift": a.shift, "residual": a.residual, "skip": a.skip}
        norm = a.x, a.weight, a.bias, a.groups, a.eps
        if any(part is not None for part in parts.values()) and (a.keep or a.silu is not True):
            return lambda: ops.fused_add_group_norm_silu(*norm, **parts, silu=a.silu)
        if a.silu:
            return lambda: ops.group_norm_silu(*norm, **parts)
        return lambda: ops.group_norm(*norm)
    calls = {
        "attention": lambda: ops.attention(a.q, a.k, a.v),
        "attention_residual": lambda: ops.attention_residual(*given.values()),
        "conv": lambda: ops.conv(
            a.x, a.weight, a.bias, a.residual, stride=a.stride, scale=a.scale
        ),
        "conv_group_norm_silu": lambda: ops.conv_group_norm_silu(
            a.x, a.weight, a.norm_weight, a.norm_bias, a.groups, a.eps, bias=a.bias,
            residual=a.residual, stride=a.stride, silu=a.silu, keep=a.keep,
        ),
        "conv3x3": lambda: ops.conv3x3(a.x, a.weight, a.bias),
        "winograd_conv": lambda: ops.winograd_conv(
            a.x, a.weight, a.bias, a.residual, doubled=a.doubled
        ),
        "winograd_int16_conv": lambda: ops.winograd_int16_conv(
            a.x, a.weight, a.scale, a.bias, a.residual, doubled=a.doubled
        ),
        "noise": lambda: ops.noise(seed, a.indices, (a.size,), a.dtype),
        "prepare_batch": lambda: ops.prepare_batch(a.images, a.indices, seed, a.dtype),
        "quantize": lambda: ops.quantize(a.x, "floor" if a.floor else "round"),
        "gather_rows": lambda: ops.gather_rows(a.indices, a.parts),
        "solver_update": lambda: ops.solver_update(a.x, a.terms, a.table, a.step, a.copy),
        "adam_step": lambda: ops.adam_step(
            a.params, a.grads, a.exp_avgs, a.exp_avg_sqs, step=a.step, lr=a.lr,
            betas=(a.beta1, a.beta2), eps=a.eps, weight_decay=a.weight_decay,
            decoupled=a.decoupled, averages=a.averages, ema_decay=a.ema_decay, copies=a.copies,
            max_norm=a.max_norm,
        ),
    }  # fmt: skip
    return calls.get(op.name)


def learn(call: Callable, given: dict[str, Any]) -> list[Tensor]:
    """Call with a gradient, and return the gradients of all that can have one."""
    leaves = [x.requires_grad_() for x in given.values() if _learns(x)]
    outputs = [y for y in _tensors(call()) if y.requires_grad and y.numel()]
    if not (outputs and leaves):
        return []
    ones = [torch.ones_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, ones, allow_unused=True)
    return [x for x in gradients if x is not None]


def _learns(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.is_leaf and not x.is_inference()


def _tensors(value) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [x for x in values if isinstance(x, Tensor)]


def run(way: str, op: Op, given: dict[str, Any]) -> list[Tensor]:
    """Return what a call returned, or its gradients, and what it wrote."""
    raw = getattr(torch.ops.ds, op.name)
    call = {
        "direct": lambda: op(*given.values()),
        "raw": lambda: raw(*given.values()),
        "public": public(op, given) or (lambda: raw(*given.values())),
    }[way.removeprefix("learning ")]
    with torch.set_grad_enabled("learning" in way):
        returned = learn(call, given) if "learning" in way else _tensors(call())
    written = [given[name] for name in _written(op)]
    return [*returned, *(x for value in written for x in _tensors(value))]


def _written(op: Op) -> list[str]:
    return [a.name for a in op.schema.arguments if a.alias_info is not None]


def twin(x):
    """Return a copy of an argument, of the same strides, with memory of its own."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(twin, x))
    if type(x) is not Tensor or x.layout is not torch.strided or x.device.type != "cpu":
        return x
    if x.is_quantized or x.is_neg() or x._is_zerotensor():
        return x
    if declared._reach(x) > x.untyped_storage().nbytes():
        return x
    with torch.inference_mode(x.is_inference()):
        storage = x.new_empty(0).set_(x.untyped_storage().clone())
        copy = storage.as_strided(x.shape, x.stride(), x.storage_offset())
        return copy.requires_grad_(x.requires_grad)


def _compare(found: Tensor, expected: Tensor, off: float) -> None:
    """Raise AssertionError for another kind of result, or numbers further `off`, of the largest."""
    kinds = [(x.shape, x.dtype, x.device) for x in (found, expected)]
    assert kinds[0] == kinds[1], kinds
    if found.is_meta:
        return
    a, b = found.double(), expected.double()
    most = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    off = off if found.is_floating_point() else 0.0
    torch.testing.assert_close(a, b, rtol=off, atol=off * max(most, 1.0), equal_nan=True)


def _said(x) -> str:
    if isinstance(x, list):
        return f"[{', '.join(map(_said, x))}]"
    if not isinstance(x, Tensor):
        return repr(x)
    if x.layout is not torch.strided:
        return f"<{x.layout} {x.dtype} {[*x.shape]}>"
    return f"<{x.dtype} {[*x.shape]} {x.stride()} {x.device}>"


def every_instruction(limit: int = 3) -> None:
    """Let the C++ kernels use the instructions that there are, up to a level of csrc/cpu/simd.h."""
    if _native.build_info()["built"]:
        _native.cpu_library().ds_limit_simd(limit)


def attempt(number: int, seed: int, log: Path | None = None) -> str:
    """Make one call and hold it to the reference; return what came of it.

    Raises:
        AssertionError: it returned or wrote something else, or raised what no call may raise.
    """
    draw = random.Random(f"{seed} {number}")
    op = OPS[number % len(OPS)]
    call = Call(op, draw)
    fits = draw.random() < 0.4
    if not fits:
        call.spoil()
    ways = ["direct", "raw", "public"] + (
        ["learning direct", "learning raw"] if op.name in LEARNING else []
    )
    way, given = draw.choice(ways), call.arguments
    text = f"{number}: {way} {op.name}({', '.join(f'{k}={_said(v)}' for k, v in given.items())})"
    if log is not None:
        log.write_text(text + "\n")
    again = {name: twin(value) for name, value in given.items()}
    every_instruction(draw.randrange(4))
    try:
        found = run(way, op, given)
    except REFUSALS as error:
        assert not fits, f"{text}: {error!r}"
        return f"{type(error).__name__}"
    except Exception as error:
        raise AssertionError(f"{text}: {error!r}") from error
    if not call.compared:
        return "made"
    with ops.use_backend("reference"):
        expected = run(way, op, again)
    try:
        dtypes = {x.dtype for value in given.values() for x in _tensors(value)}
        dtypes |= {value for value in given.values() if isinstance(value, torch.dtype)}
        off = max(
            [TOLERANCES.get(dtype, 0.1) for dtype in dtypes if dtype.is_floating_point] or [1e-5]
        )
        for a, b in zip(found, expected, strict=True):
            _compare(a, b, off)
    except (AssertionError, ValueError) as error:
        raise AssertionError(f"{text}: {error}") from error
    return "as the reference"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--calls", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--log", type=Path, help="a file for the call that is being made")
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    end, outcomes, number = time.monotonic() + options.seconds, Counter(), options.first
    while time.monotonic() < end and number < options.first + options.calls:
        outcomes[attempt(number, options.seed, options.log)] += 1
        number += 1
    print(f"{number - options.first} calls, seed {options.seed}:", dict(outcomes.most_common()))


if __name__ == "__main__":
    main()
