"""Derivatives of every op: right by finite differences, or refused in one line."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from ds import ops
from ds.ops.dispatch import op as dispatch

OPS = {op.name: op for op in dispatch._ops}
Function = Callable[..., Tensor]
Tensors = tuple[Tensor, ...]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


ADDENDS = {
    "shift": drawn(2, 4, seed=7),
    "residual": drawn(2, 4, 2, 2, seed=8),
    "skip": drawn(2, 2, 2, 2, seed=9),
}


def norm(silu: bool, keep: bool, **addends: Tensor) -> tuple:
    """Return arguments of group_norm_silu."""
    channels = 4 + (2 if "skip" in addends else 0)
    x, weight, bias = drawn(2, 4, 2, 2), drawn(channels, seed=1), drawn(channels, seed=2)
    return x, weight, bias, 2, 1e-2, silu, keep, *map(addends.get, ADDENDS)


def with_rows(arguments: tuple) -> tuple:
    """Return arguments of a norm with a weight and a bias of each image, in the same place."""
    i = next(i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.dim() == 1)
    rows = (drawn(2, len(arguments[i]), seed=seed) for seed in (11, 12))
    return *arguments[:i], *rows, *arguments[i + 2 :]


def norm_backward(**addends: Tensor) -> tuple:
    """Return arguments of group_norm_silu_backward, whose x was not kept."""
    x, weight, bias, *_, shift, residual, skip = norm(True, False, **addends)
    mean, rstd = drawn(2, 2, seed=4), drawn(2, 2, seed=5).exp()
    dy = drawn(2, len(weight), 2, 2, seed=3)
    return dy, x, weight, bias, mean, rstd, 2, True, 4, None, shift, residual, skip


X, WEIGHT, BIAS = drawn(2, 3, 4, 4), drawn(2, 3, 3, 3, seed=1), drawn(2, seed=2)
PAIRS, WORTH = ops.winograd_int16_weight(WEIGHT[:, :2])
HEADS = drawn(3, 2, 1, 4, 3).unbind()
INDICES = torch.tensor([2, 0, 3, 2])
PARAMS, GRADS, AVERAGES, SQUARES = ([drawn(3, seed=seed).square()] for seed in range(4))
KEPT = norm_backward(shift=ADDENDS["shift"])
KEPT = (*KEPT[:8], 3, drawn(2, 4, 2, 2, seed=6), drawn(2, 3), None, None)

# Arguments of an op, under a name that begins with the op's.
ARGUMENTS = {
    "group_norm_silu": norm(True, False),
    "group_norm_silu, kept": norm(True, True, **ADDENDS),
    "group_norm_silu, added": norm(False, False, **ADDENDS),
    "group_norm_silu, by image": with_rows(norm(True, True, **ADDENDS)),
    "group_norm_silu_backward, by image": with_rows(norm_backward(shift=ADDENDS["shift"])),
    "group_norm_silu_backward": norm_backward(shift=ADDENDS["shift"]),
    "group_norm_silu_backward, kept": KEPT,
    "group_norm_silu_float8": (*norm(True, True)[:5], True, None, None, None),
    "conv": (X, WEIGHT, BIAS, drawn(2, 2, 4, 4), 1),
    "conv, stride 2": (X, WEIGHT, drawn(2, 2), None, 2),
    "conv_group_norm_silu": (X, WEIGHT, BIAS, None, 1, BIAS + 1, BIAS, 1, 1e-2, True, True),
    "conv3x3": (X, WEIGHT, BIAS),
    "conv3x3_backward": (drawn(2, 2, 4, 4), X, WEIGHT, [True, True]),
    "winograd_conv": (X[:1], ops.winograd_weight(WEIGHT), BIAS, None, False),
    "winograd_int16_conv": (X[:1, :2], PAIRS, WORTH.double(), BIAS, None, False),
    "attention": HEADS,
    "attention_residual": (*HEADS, drawn(2, 3), BIAS, drawn(2, 4, 2)),
    "gather_rows": (INDICES, [drawn(3, 2), drawn(0, 2), drawn(2, 2)]),
    "quantize": (X, False),
    "noise": (INDICES, 5, 3, torch.float64),
    "prepare_batch": (X.mul(50).byte(), INDICES[:2], 5, torch.float64),
    "solver_update": (drawn(2, 3), [drawn(2, 3)], drawn(4, 2), torch.tensor(1), None),
    "adam_step": (
        *(torch.tensor(1.0), torch.tensor(0.1), PARAMS, GRADS, AVERAGES, SQUARES, [], []),
        *(0.9, 0.99, 1e-8, 0.0, False, 0.0, 1.0),
    ),
}
NONE = "needs a derivative, and there is none because"
REFUSED = {
    "group_norm_silu_float8": f"x {NONE} the result is float8",
    "quantize": f"x {NONE} the result is uint8",
    "solver_update": f"x {NONE} the op writes its arguments",
    "adam_step": f"step {NONE} the op writes its arguments",
}
# In float32 the library's kernels take part. Those of conv3x3 need 16 channels.
TILES = drawn(1, 16, 4, 4), drawn(16, 16, 3, 3, seed=1) / 10
KERNELS = {
    "conv3x3": (*TILES, drawn(16, seed=2)),
    "conv3x3_backward": (drawn(1, 16, 4, 4, seed=3), *TILES, [True, True]),
}


def tensors_of(name: str, *, floating: bool = True) -> list[int]:
    """Return the places of an op's tensors among the leaves of its arguments."""
    leaves, _ = tree_flatten(ARGUMENTS[name])
    return [
        i
        for i, x in enumerate(leaves)
        if isinstance(x, Tensor) and (x.is_floating_point() or not floating)
    ]


def function_of(name: str, arguments: tuple, places: list[int]) -> tuple[Function, Tensors]:
    """Return an op as a function of some of its tensors to all of its results, and those."""
    leaves, spec = tree_flatten(arguments)

    def f(*xs):
        filled = leaves.copy()
        for place, x in zip(places, xs, strict=True):
            filled[place] = x
        results = OPS[name.partition(",")[0]](*tree_unflatten(filled, spec))
        results = results if isinstance(results, tuple) else (results,)
        return torch.cat([y.flatten().to(torch.float64) for y in results])

    return f, tuple(leaves[i] for i in places)


# Each returns the derivative of f along vs, multiplied by u: a number.


def by_jvp(f, xs, vs, u):
    return u @ jvp(f, xs, vs)[1]


def by_jvp_of_one_at_a_time(f, xs, vs, u):
    total = 0
    for i, (x, v) in enumerate(zip(xs, vs, strict=True)):
        total += by_jvp(lambda x, i=i: f(*xs[:i], x, *xs[i + 1 :]), (x,), (v,), u)
    return total


def by_dual_numbers(f, xs, vs, u):
    with forward_ad.dual_level():
        y = f(*map(forward_ad.make_dual, xs, vs))
        return u @ forward_ad.unpack_dual(y).tangent


def by_vjp(f, xs, vs, u):
    return along(vjp(f, *xs)[1](u), vs)


def by_grad(f, xs, vs, u):
    return along(grad(lambda xs: u @ f(*xs))(xs), vs)


def by_jacfwd(f, xs, vs, u):
    jacobians = jacfwd(f, argnums=tuple(range(len(xs))))(*xs)
    return along([(u @ j.flatten(1)).view_as(x) for j, x in zip(jacobians, xs, strict=True)], vs)


def by_backward(f, xs, vs, u):
    return along(gradients(f, xs, u)[1], vs)


def by_backward_and_dual_numbers(f, xs, vs, u):
    """Return the derivative, in the graph of whose dual primal the gradient agrees with it."""
    xs = [x.detach().requires_grad_() for x in xs]
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, xs, vs)))
        found = u @ tangent
    grads = torch.autograd.grad(u @ primal, xs, retain_graph=True, allow_unused=True)
    torch.testing.assert_close(along(grads, vs), found, rtol=1e-3, atol=1e-3, check_dtype=False)
    return found


FIRST = {
    name: value for name, value in globals().items() if name.startswith("by_") and callable(value)
}


def by_create_graph(f, xs, vs, u):
    xs, first = gradients(f, xs, u, create_graph=True)
    return derivative_along(along(first, vs), xs, vs)


def by_jvp_of_grad(f, xs, vs, u):
    return jvp(lambda *xs: along(grad(lambda xs: u @ f(*xs))(xs), vs), xs, vs)[1]


def by_gradient_of_tangent(f, xs, vs, u):
    xs = tuple(x.detach().requires_grad_() for x in xs)
    return derivative_along(u @ jvp(f, xs, vs)[1], xs, vs)


SECOND = {f.__name__: f for f in (by_create_graph, by_jvp_of_grad, by_gradient_of_tangent)}


def gradients(f, xs, u, **options):
    xs = [x.detach().requires_grad_() for x in xs]
    return xs, torch.autograd.grad(u @ f(*xs), xs, allow_unused=True, **options)


def derivative_along(y, xs, vs):
    if not y.requires_grad:  # a linear op
        return y * 0
    return along(torch.autograd.grad(y, xs, allow_unused=True), vs)


def along(grads, vs):
    return sum((g * v).sum() for g, v in zip(grads, vs, strict=True) if g is not None)


def differences(f: Function, xs: Tensors, vs: Tensors, u: Tensor, order: int) -> Tensor:
    """Return the derivative along vs of this order, multiplied by u, by central differences."""
    h = 3e-3
    a, b, c, d, e = (
        u @ f(*(x + i * h * v for x, v in zip(xs, vs, strict=True))) for i in range(-2, 3)
    )
    if order == 1:
        return (a - 8 * b + 8 * d - e) / (12 * h)
    return (-a + 16 * b - 30 * c + 16 * d - e) / (12 * h**2)


def case(name: str, dtype: torch.dtype, order: int) -> tuple[Function, Tensors, ...]:
    """Return f, xs and vs of a dtype, u, and the derivative by differences in float64."""
    arguments = KERNELS.get(name, ARGUMENTS[name]) if dtype == torch.float32 else ARGUMENTS[name]
    f, xs = function_of(name, arguments, tensors_of(name))
    vs = tuple(drawn(*x.shape, seed=50 + i) for i, x in enumerate(xs))
    u = drawn(len(f(*xs)), seed=99)
    exact = differences(f, xs, vs, u, order)
    return f, tuple(x.to(dtype) for x in xs), tuple(v.to(dtype) for v in vs), u, exact


RIGHT = [name for name in ARGUMENTS if tensors_of(name) and name not in REFUSED]
every_derivative = pytest.mark.parametrize("derivative", FIRST | SECOND)


def test_every_op_has_its_rows():
    assert {name.partition(",")[0] for name in ARGUMENTS} == {op.name for op in dispatch._ops}


@every_derivative
@pytest.mark.parametrize("name", RIGHT)
def test_it_is_right(name, derivative):
    *arguments, exact = case(name, torch.float64, 1 if derivative in FIRST else 2)
    found = (FIRST | SECOND)[derivative](*arguments)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "derivative",
    [
        "by_jvp",
        "by_backward",
        "by_backward_and_dual_numbers",
        "by_create_graph",
        "by_gradient_of_tangent",
    ],
)
@pytest.mark.parametrize("name", RIGHT)
def test_it_is_right_in_the_kernels(name, derivative):
    *arguments, exact = case(name, torch.float32, 1 if derivative in FIRST else 2)
    found = (FIRST | SECOND)[derivative](*arguments)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3, check_dtype=False)


@every_derivative
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name, derivative):
    f, xs = function_of(name, ARGUMENTS[name], tensors_of(name))
    with pytest.raises(ValueError, match=f"^{name}: {REFUSED[name]}; detach it, or call"):
        (FIRST | SECOND)[derivative](f, tuple(x.clone() for x in xs), xs, torch.ones(1))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_vmap_is_a_loop(name):
    """Over all tensors together, and over each of them alone."""
    places = tensors_of(name, floating=name.startswith("gather_rows"))
    f, xs = function_of(name, ARGUMENTS[name], places)
    both = [torch.stack([x, x.flip(0)]) for x in xs]
    ways = [
        [0] * len(xs),
        *([0 if i == j else None for i in range(len(xs))] for j in range(len(xs))),
    ]
    if name in ("solver_update", "adam_step"):
        with pytest.raises(ValueError, match=f"{name}: does not run under torch.func transforms"):
            vmap(f)(*both)
        return
    for dims in ways:
        args = [x if dim is None else pair for x, pair, dim in zip(xs, both, dims, strict=True)]
        rows = [
            [x if dim is None else x[i] for x, dim in zip(args, dims, strict=True)] for i in (0, 1)
        ]
        expected = torch.stack([f(*row) for row in rows])
        torch.testing.assert_close(vmap(f, tuple(dims))(*args), expected)
