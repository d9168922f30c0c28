"""What an op takes: a line for each argument, and the check that is made of them (docs/notes/0022).

    x [N, C, ...] floating              a size is given its value where it has none; ... is the rest
    residual [N, C, ...] of x           of the dtype of x; `wide of x` and `result of x`: see below
    weight [C + S] floating             a size may be an expression; those of an absent tensor are 0
    bias [O] or [N, O] floating         either shape
    step int32 or int64                 any shape
    parts [_, ...] of parts             each of a list; _ is any size
    grads like params floating          a list as long as another, and shape for shape;
    moments like params of params       dtype for dtype as well;
    copies like first params floating   or shorter
    O = R // 4 if K == 2 else R         a size that follows from others
    C % groups == 0 : C ({C}) must be a multiple of groups ({groups})   what must hold, or the error

Lines are checked in order. All tensors must be dense, on the device of the first, and have the
memory that their strides reach. An argument that the schema marks as written must not overlap
itself or, outside of lists, another argument.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

PLAIN = frozenset({Tensor, Parameter})
_NAMED = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)
DTYPES = {
    "floating": {torch.float16, torch.bfloat16, torch.float32, torch.float64},
    "float8": {torch.float8_e4m3fn},
    **{str(dtype)[6:]: {dtype} for dtype in _NAMED},
}
# Of a scalar of the schema: what it is called, and whether it is that.
_SCALARS = {
    "int": ("an int of 64 bits", "isinstance({0}, int) and -(2**63) <= {0} < 2**63"),
    "float": ("a float", "isinstance({0}, float) or isinstance({0}, int) and abs({0}) < 2**53"),
    "bool": ("a bool", "isinstance({0}, bool)"),
    "List[bool]": ("a list", "isinstance({0}, list)"),
    "ScalarType": ("a torch.dtype", "isinstance({0}, torch.dtype)"),
}
# Whether a glance will do: it is dense and its memory is there, and its numbers are what is in it.
_USUAL = (
    "{0}.__class__ not in PLAIN"
    " or {0}.nbytes + {0}.storage_offset() * {0}.itemsize <= {0}.untyped_storage().nbytes()"
    " and ({0}.is_contiguous() or {0}.is_contiguous(memory_format=torch.channels_last))"
    " and not ({0}.is_neg() or {0}._is_zerotensor())"
)


def make_check(schema: torch._C.FunctionSchema, takes: str, *, fake: bool) -> Callable[..., None]:
    """Return the function that raises for arguments of the schema that do not fit.

    It raises TypeError for an argument of the wrong kind, and ValueError for any other misfit. With
    `fake`, for tensors whose sizes may be symbols, it checks neither scalars nor memory.
    """
    writer = _Writer(schema, fake)
    lines = [f"    {line}\n" for line in writer.lines(takes)]
    parameters = (
        f"{a.name}={a.default_value!r}" if a.has_default_value() else a.name
        for a in schema.arguments
    )
    exec(f"def {writer.op}({', '.join(parameters)}):\n{''.join(lines)}", writer.space)
    return writer.space[writer.op]


class _Writer:
    """Writes the lines of a check. `label` is the code of what errors call a tensor."""

    def __init__(self, schema: torch._C.FunctionSchema, fake: bool):
        self.op, self.fake = schema.name.removeprefix("ds::"), fake
        self.kinds = {a.name: str(a.real_type) for a in schema.arguments}
        self.written = {a.name for a in schema.arguments if a.alias_info is not None}
        self.space = dict(globals())  # of names in the check
        self.sizes: set[str] = set()  # that have a value
        self.leader = ""  # the first tensor
        self.in_list = False

    def lines(self, takes: str) -> Iterator[str]:
        for name, kind in self.kinds.items():
            if kind in _SCALARS and not self.fake:
                called, fits = _SCALARS[kind]
                yield self._fail(f"not ({fits.format(name)})", "kind", name, repr(called))
        for line in filter(None, map(str.strip, takes.splitlines())):
            rule, _, complaint = line.partition(" : ")
            if complaint:
                yield f"if not ({rule}): raise ValueError(f{f'{self.op}: {complaint}'!r})"
            elif " = " in rule:
                yield rule
                self.sizes.add(rule.partition(" = ")[0])
            else:
                yield from self._argument(*rule.split(" ", 1))
        written = [name for name in self.kinds if name in self.written and not self._listed(name)]
        if written and not self.fake:
            tensors = ", ".join(f"{n!r}: {n}" for n, k in self.kinds.items() if "Tensor" in k)
            yield f"check_apart({self.op!r}, {{{tensors}}}, {written})"

    def _fail(self, condition: str, error: str, x: str, *details: str, label: str = "") -> str:
        arguments = ", ".join([repr(self.op), label or repr(x), x, *details])
        return f"if {condition}: raise_{error}({arguments})"

    def _listed(self, name: str) -> bool:
        return "List" in self.kinds[name]

    def _argument(self, name: str, rule: str) -> Iterator[str]:
        self.in_list = self._listed(name)
        if self.in_list:
            yield from self._list(name, rule)
        elif "Optional" in self.kinds[name]:
            before = self.sizes.copy()
            yield f"if {name} is not None:"
            yield from _indented(self._tensor(name, repr(name), rule, name in self.written))
            if new := sorted(self.sizes - before):
                yield f"else: {' = '.join(new)} = 0"
        else:
            yield from self._tensor(name, repr(name), rule, name in self.written)

    def _list(self, name: str, rule: str) -> Iterator[str]:
        x, label = f"{name}_i", f"f'{name}[{{i}}]'"
        yield self._fail(f"not isinstance({name}, (list, tuple))", "kind", name, "'a list'")
        like = re.match(r"like (first )?(\w+) ", rule)
        if like is None:
            yield f"for i, {x} in enumerate({name}):"
            yield from _indented(self._tensor(x, label, rule, name in self.written))
            return
        other = like[2]
        more = f"len({name}) {'>' if like[1] else '!='} len({other})"
        yield self._fail(more, "count", name, repr(other), other)
        yield f"for i, ({x}, {other}_i) in enumerate(zip({name}, {other})):"
        wanted = f"f'{{list({other}_i.shape)}} as {other}[{{i}}] is'"
        yield from _indented(self._tensor(x, label, rule[like.end() :], name in self.written))
        differs = f"{x}.shape != {other}_i.shape"
        yield "    " + self._fail(differs, "shape", x, wanted, label=label)

    def _tensor(self, x: str, label: str, rule: str, written: bool) -> Iterator[str]:
        yield self._fail(f"not isinstance({x}, Tensor)", "kind", x, "'a tensor'", label=label)
        if not self.leader:
            self.leader = x
            yield f"device = {x}.device"
        elif x != self.leader:
            leader = repr(self.leader)
            yield self._fail(f"{x}.device != device", "device", x, "device", leader, label=label)
        yield self._fail(f"{x}.layout is not torch.strided", "layout", x, label=label)
        *_, dtype = re.split(r"\] ", rule)
        yield from self._dtype(x, label, dtype)
        if shapes := re.findall(r"\[(.*?)\]", rule):
            yield from self._shape(x, label, shapes)
        if not self.fake:
            yield self._fail(f"not ({_USUAL.format(x)})", "if_unfit", x, str(written), label=label)

    def _dtype(self, x: str, label: str, rule: str) -> Iterator[str]:
        kind, of, other = rule.rpartition("of ")
        if not of:
            accepted = set().union(*(DTYPES[word] for word in rule.split(" or ")))
            self.space[f"of_{x}"] = frozenset(accepted)
            words = repr(rule.replace("floating", "floating point of 16 bits or more"))
            yield f"{x}_dtype = {x}.dtype"
            yield self._fail(f"{x}_dtype not in of_{x}", "dtype", x, words, label=label)
            return
        wanted = f"{other}_dtype"
        if x != f"{other}_i" and self.in_list and self._listed(other):
            wanted, words = f"{other}_i.dtype", f"f'{{{other}_i.dtype}} as {other}[{{i}}] is'"
        elif x == f"{other}_i":
            yield f"if i == 0: {wanted} = {x}.dtype"
            words = f"f'{{{wanted}}} as {other}[0] is'"
        elif kind := kind.strip():
            words = f"f'{{{kind}({wanted})}} for {other} of {{{wanted}}}'"
            wanted = f"{kind}({wanted})"
        else:
            words = f"f'{{{wanted}}} as {other} is'"
        yield self._fail(f"{x}.dtype is not {wanted}", "dtype", x, words, label=label)

    def _shape(self, x: str, label: str, shapes: list[str]) -> Iterator[str]:
        either = [shape.split(", ") if shape else [] for shape in shapes]
        fail = functools.partial(self._fail, label=label)
        described = f"described({shapes!r}, locals())"
        if all(self._has_value(size) for sizes in either for size in sizes):
            tuples = ["".join(f"{_in_tuple(size)}, " for size in sizes) for sizes in either]
            accepted = ", ".join(f"({sizes})" for sizes in tuples)
            yield fail(f"{x}.shape not in ({accepted},)", "shape", x, described)
            return
        (sizes,) = either
        open_ended = sizes[-1] == "..."
        count = f"< {len(sizes) - 1}" if open_ended else f"!= {len(sizes)}"
        yield fail(f"{x}.dim() {count}", "shape", x, described)
        targets, after = [], []
        for i, size in enumerate(sizes):
            name, star = ("rest", "*") if size == "..." else (size, "")
            known = self._has_value(size)
            if known or (self.in_list and size != "_"):
                targets.append(f"{star}_{i}")
                after += [] if known else [f"if i == 0: {name} = _{i}"]
                after.append(fail(f"_{i} != {name}", "shape", x, described))
            else:
                targets.append(star + name)
            if not known:
                self.sizes.add(size)
        yield f"{', '.join(targets)}{',' * (len(targets) == 1)} = {x}.shape"
        yield from after

    def _has_value(self, size: str) -> bool:
        """Return whether a size is a number, an expression or a name that has a value by now."""
        if size == "_":
            return False
        return (
            size in self.sizes or size in self.kinds or not (size.isidentifier() or size == "...")
        )


def _in_tuple(size: str) -> str:
    return "*rest" if size == "..." else size


def _indented(lines: Iterator[str]) -> Iterator[str]:
    return (f"    {line}" for line in lines)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of computation."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def result(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what is made of tensors of a dtype that nothing is added in."""
    return torch.bfloat16 if dtype in DTYPES["float8"] else dtype


def described(shapes: list[str], values: dict[str, Any]) -> str:
    """Return shapes for an error: numbers for sizes that have values, names for the others."""

    def said(size: str) -> str:
        if size == "...":
            return ", ".join(map(str, values["rest"])) if "rest" in values else size
        try:
            return size if size in ("", "_") else str(eval(size, {}, values))
        except NameError:
            return size

    texts = [", ".join(filter(None, map(said, shape.split(", ")))) for shape in shapes]
    return " or ".join(f"[{text}]" for text in texts)


def raise_kind(op: str, name: str, value: Any, kind: str) -> NoReturn:
    found = repr(value) if isinstance(value, (int, float)) else type(value).__name__
    raise TypeError(f"{op}: {name} must be {kind}, not {found}")


def raise_count(op: str, name: str, tensors: list, other: str, others: list) -> NoReturn:
    raise ValueError(f"{op}: {len(tensors)} {name} for {len(others)} {other}")


def raise_device(op: str, name: str, x: Tensor, device: torch.device, first: str) -> NoReturn:
    raise ValueError(f"{op}: {name} must be on {device} as {first} is, not on {x.device}")


def raise_layout(op: str, name: str, x: Tensor) -> NoReturn:
    raise ValueError(f"{op}: {name} must be a dense tensor, not of {x.layout}")


def raise_dtype(op: str, name: str, x: Tensor, accepted: str) -> NoReturn:
    raise ValueError(f"{op}: {name} must be {accepted}, not {x.dtype}")


def raise_shape(op: str, name: str, x: Tensor, accepted: str) -> NoReturn:
    raise ValueError(f"{op}: {name} must be {accepted}, not of shape {list(x.shape)}")


def raise_if_unfit(op: str, name: str, x: Tensor, written: bool) -> None:
    """Raise if a tensor that is not plainly dense does not fit."""
    if x.is_neg() or x._is_zerotensor():
        raise ValueError(f"{op}: {name} is not what is in its memory; give its clone()")
    held, needed = x.untyped_storage().nbytes(), _reach(x)
    if needed > held:
        raise ValueError(
            f"{op}: {name} of shape {list(x.shape)} needs {needed} bytes of memory, and its"
            f" storage has {held}"
        )
    reached = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)) if written else ():
        if size > 1 and stride <= reached:
            raise ValueError(
                f"{op}: {name} is written, so none of its elements may share memory, as those of "
                f"shape {list(x.shape)} with strides {list(x.stride())} do"
            )
        reached += (size - 1) * stride


def check_places(op: str, **tensors: Tensor | None) -> None:
    """Raise for tensors on several devices or without memory, which PyTorch does not check."""
    plain = {
        name: x
        for name, x in tensors.items()
        if type(x) in PLAIN and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    }
    for name, x in plain.items():
        first = next(iter(plain))
        if x.device != plain[first].device:
            raise_device(op, name, x, plain[first].device, first)
        if x.layout is torch.strided:
            raise_if_unfit(op, name, x, written=False)


def _reach(x: Tensor) -> int:
    """Return how many bytes of its storage a tensor needs."""
    if not x.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (x.storage_offset() + last + 1) * x.itemsize


def check_apart(op: str, arguments: dict[str, Any], written: list[str]) -> None:
    """Raise if an argument that is written shares memory with another."""
    spans = []  # of memory: whether it is written, first byte, end
    for name, value in arguments.items():
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if type(x) in PLAIN:
                first = x.data_ptr()
                spans.append((name in written, first, first + x.nbytes, name, x))
    for i, (a_written, start, end, a, x) in enumerate(spans):
        for b_written, other_start, other_end, b, y in spans[:i]:
            overlap = start < other_end and other_start < end
            if overlap and (a_written or b_written) and _is_dense(x) and _is_dense(y):
                raise ValueError(f"{op}: {b} and {a} must not share memory")


def _is_dense(x: Tensor) -> bool:
    """Return whether a tensor has memory, and leaves no gaps in what it reaches."""
    return not x.is_meta and _reach(x) - x.storage_offset() * x.itemsize == x.nbytes
