"""The Triton kernels of attention against float64, through the call that ds.ops makes for a GPU.

The interpreter cuts float32 off to bfloat16 where a GPU rounds, and multiplies float32 as it is
where a GPU takes three products of TF32.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")

from ds import ops
from ds.nets.blocks import Attention
from ds.ops.attention import residual_op
from ds.ops.dispatch.op import Unsupported
from ds.ops.kernels import attention as kernels
from tests.nets.test_unet import TINY
from tests.ops.test_attention import inputs, plain_residual, residual_inputs
from tests.oracle import assert_close, poison

# NumPy's, with which the interpreter computes: a GPU says nothing of an infinity.
pytestmark = [
    pytest.mark.each_value,
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("products_of_bfloat16"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
narrow = pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
# N, heads, T, D, and C of the weight; 0 is none
SHAPES = [
    (2, 1, 16, 256, 256),
    (1, 1, 64, 512, 512),
    (1, 1, 256, 256, 256),
    (1, 1, 256, 512, 0),
    (2, 4, 64, 64, 256),
    (1, 1, 256, 64, 0),
    (2, 3, 17, 5, 7),
    (1, 2, 1, 1, 1),
    (2, 2, 100, 33, 0),
]
NAMES = ["q", "k", "v", "weight", "bias", "residual"]
SMALL = [(2, 1, 20, 24, 24), (2, 2, 20, 24, 0)]
small = pytest.mark.parametrize("shape", SMALL, ids=["projected", "heads"])


def values(shape, dtype, seed=0) -> list[Tensor | None]:
    return [x if x is None else x.to(DEVICE) for x in residual_inputs(shape, dtype, seed)]


def run(*arguments: Tensor | None) -> Tensor:
    return torch.ops.ds.attention_residual_triton(*arguments)


def check(*arguments: Tensor | None) -> None:
    assert kernels.refusal(arguments[0], arguments[3]) is None
    exact = plain_residual(*(x if x is None else x.double() for x in arguments))
    y = run(*arguments)
    assert y.shape == exact.shape
    assert_close("y", exact, y, plain_residual(*arguments))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@narrow
def test_it_is_as_exact_as_pytorch(shape, dtype):
    check(*values(shape, dtype))


# With fewer columns: the interpreter takes its time for tiles of float32, which are small.
@pytest.mark.parametrize("shape", [(1, 1, 256, 33, 17), (1, 2, 33, 40, 0), *SHAPES[-3:-1]], ids=str)
def test_it_is_as_exact_as_pytorch_in_float32(shape):
    check(*values(shape, torch.float32))


@settings(max_examples=10, deadline=None)
@given(
    images=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 15, 16, 17, 31, 64, 65, 129]),
    width=st.integers(1, 70),
    channels=st.integers(0, 70),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    layout=st.sampled_from(["heads outside", "heads inside", "one projection", "transposed"]),
)
def test_any_shape_and_strides(images, heads, tokens, width, channels, dtype, layout):
    shape = images, heads, tokens, width
    *_, weight, bias, residual = values((*shape, channels), dtype)
    q, k, v = {
        "heads outside": lambda: inputs(shape, dtype),
        "heads inside": lambda: [
            x.transpose(1, 2) for x in inputs((images, tokens, heads, width), dtype)
        ],
        "one projection": lambda: (
            inputs((images, tokens, heads, 3 * width), dtype)[0].transpose(1, 2).chunk(3, -1)
        ),
        "transposed": lambda: [x.mT for x in inputs((images, heads, width, tokens), dtype)],
    }[layout]()
    weight = weight if weight is None else weight.T.contiguous().T
    check(*(x.to(DEVICE) for x in (q, k, v)), weight, bias, residual.mT.contiguous().mT)


@small
def test_no_images(shape):
    q, *rest = values(shape, torch.float32)
    k, v, weight, bias, residual = rest
    y = run(q[:0], k[:0], v[:0], weight, bias, residual[:0])
    assert y.shape == residual[:0].shape


@small
@every_dtype
def test_scores_of_ten_thousand(shape, dtype):
    """exp would overflow at 89; a softmax so sharp picks the key of the largest score."""
    q, k, v, weight, bias, residual = values(shape, dtype)
    factor = 1e4 / (q.float() @ k.float().mT).abs().max()
    q = (q.float() * factor * q.shape[-1] ** 0.5).to(dtype)
    assert (q.float() @ k.float().mT / q.shape[-1] ** 0.5).abs().max() > 9e3
    # The largest score of a query leads by more than rounding, or the exact answer is a coin toss.
    k = torch.eye(k.shape[2], k.shape[3], device=DEVICE).expand_as(k).to(dtype)
    scores = (q.double() @ k.double().mT) / q.shape[-1] ** 0.5
    first, second = scores.topk(2, -1).values.unbind(-1)
    clear = (first - second > 30).all(1)[..., None]
    exact = plain_residual(
        *(x if x is None else x.double() for x in (q, k, v, weight, bias, residual))
    )
    y, plain = (f(q, k, v, weight, bias, residual) for f in (run, plain_residual))
    assert clear.any()
    assert y.isfinite().all()
    assert_close("y", exact * clear, y * clear, plain * clear)


@small
@narrow
def test_equal_keys_average_the_values(shape, dtype):
    q, k, v, weight, bias, residual = values(shape, dtype)
    check(q, torch.full_like(k, 0.5), v, weight, bias, residual)
    check(torch.zeros_like(q), k, v, weight, bias, residual)


@small
@narrow
def test_one_dominating_key_gives_its_value(shape, dtype):
    q, k, v, weight, bias, residual = values(shape, dtype)
    q, k = q.abs(), k * 0
    k[:, :, 13] = 100
    check(q + 1, k, v, weight, bias, residual)
    alone = v[:, :, 13:14].expand_as(v)
    expected = run(torch.zeros_like(q), k, alone, weight, bias, residual)
    close = {torch.float16: 1e-2, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(
        run(q + 1, k, v, weight, bias, residual), expected, rtol=close, atol=close
    )


@small
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "residual"])
def test_nan_and_infinity_propagate_as_in_pytorch(shape, bad, where):
    arguments = dict(zip(NAMES, values(shape, torch.float32), strict=True))
    spoilt = arguments[where]
    spoilt[(1, 0, 3, 5) if spoilt.dim() == 4 else (1, 3, 5)] = bad
    y, expected = (f(*arguments.values()) for f in (run, plain_residual))
    assert not expected.isfinite().all()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())


@small
def test_every_element_is_written_with_the_same_bits_twice(shape, monkeypatch):
    arguments = values(shape, torch.float32)
    before = run(*arguments)
    poison(monkeypatch)
    assert torch.equal(run(*arguments), before)
    assert not before.isnan().any()


@small
@narrow
def test_bits_do_not_depend_on_the_batch(shape, dtype):
    q, k, v, weight, bias, residual = values(shape, dtype)
    y = run(q, k, v, weight, bias, residual)
    for i in range(len(q)):
        one = slice(i, i + 1)
        assert torch.equal(run(q[one], k[one], v[one], weight, bias, residual[one]), y[one])


def test_a_program_writes_its_own_queries_and_nothing_else():
    """The interpreter runs programs in turn and would hide that one writes into the next one's."""
    q, k, v, _, bias, residual = values((1, 2, 40, 8, 0), torch.float32)
    y = torch.full_like(residual, float("nan"))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    kernels._heads_kernel[(1,)](
        q,
        k,
        v,
        bias,
        residual,
        y,
        *strides,
        1.0,
        TOKENS=40,
        HEADS=2,
        WIDTH=8,
        PRECISION="tf32x3",
        BLOCK_M=16,
        BLOCK_T=64,
        BLOCK_D=16,
    )
    assert not y[:, :16, :8].isnan().any()
    assert y[:, 16:].isnan().all()
    assert y[:, :, 8:].isnan().all()


@pytest.mark.compiles
def test_opcheck():
    arguments = tuple(values(SMALL[0], torch.bfloat16))
    torch.library.opcheck(torch.ops.ds.attention_residual_triton.default, arguments)


def launch(*arguments: Tensor | None) -> Tensor:
    """Call the backend as the op does on a GPU."""
    return residual_op._load("cuda", "triton")(*arguments)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 1, 257, 8, 0), torch.float32, "1 to 256 tokens, not 257"),
        ((1, 1, 0, 8, 0), torch.float32, "1 to 256 tokens, not 0"),
        ((1, 1, 4, 8, 8), torch.float64, "float32, float16 or bfloat16, not torch.float64"),
        ((1, 1, 4, 8, 513), torch.float16, "512 channels or less, not 513"),
        ((1, 1, 4, 8, 257), torch.float32, "256 channels or less in float32.* not 257"),
        ((1, 2, 65, 8, 257), torch.float16, "256 channels or less .* not 257"),
    ],
    ids=str,
)
def test_what_it_does_not_take_it_leaves_to_others(shape, dtype, reason):
    with pytest.raises(Unsupported, match=reason):
        launch(*values(shape, dtype))


def test_it_leaves_gradients_to_others():
    q, *rest = values(SMALL[0], torch.float32)
    with pytest.raises(Unsupported, match="it has no gradient"):
        launch(q.requires_grad_(), *rest)
    with torch.no_grad():
        assert torch.equal(launch(q, *rest), run(q, *rest))


def test_the_weight_may_be_of_another_dtype():
    q, k, v, weight, bias, residual = values(SMALL[0], torch.float16)
    y = launch(q, k, v, weight.float(), bias.double(), residual)
    assert torch.equal(y, run(q, k, v, weight, bias, residual))


@pytest.mark.compiles
def test_a_compiled_layer_uses_it_without_a_gradient_only(monkeypatch):
    """As on a GPU: the op's choices there, in its graphs of inference and of training."""
    chain = [("triton", launch), ("sdpa", residual_op._load("cuda", "sdpa"))]
    monkeypatch.setitem(residual_op._chains, (DEVICE, None), chain)
    layer = Attention(TINY, 8).to(DEVICE)
    torch.nn.init.ones_(layer.proj_out.weight)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = layer(x).detach()
    calls, attend = [], kernels.attention_residual
    monkeypatch.setattr(kernels, "attention_residual", lambda *a: calls.append(a) or attend(*a))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    assert len(calls) == 1
    y = compiled(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.q.weight.grad.any()
    assert len(calls) == 1


@pytest.mark.gpu
def test_the_op_runs_them_on_a_gpu():
    arguments = values((2, 1, 64, 64, 64), torch.bfloat16)
    assert torch.equal(ops.attention_residual(*arguments), run(*arguments))
