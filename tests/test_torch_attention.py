# ruff: noqa: E501 (tables of messages)
"""Attention of PyTorch tensors: values, derivatives, transforms, compilation, export, training, errors."""

import inspect
import io

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed, so attention of tensors is not tested")

from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: E402

import flash_attention_jax  # noqa: E402
from flash_attention_jax.torch import (  # noqa: E402
    _attention,
    flash_attention,
    scaled_dot_product_attention,
)
from flash_attention_jax.torch._operator import Operation, _function, call  # noqa: E402

TORCHS = torch.nn.functional.scaled_dot_product_attention


def normal(*shape, dtype=torch.float64, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
    )


# scaled_dot_product_attention against torch's.

SHAPES = {
    "one token": ((1, 1, 1, 4), (1, 1, 1, 4), (1, 1, 1, 4), {}),
    "heads": ((2, 3, 33, 16), (2, 3, 47, 16), (2, 3, 47, 8), {}),
    "causal": ((2, 3, 33, 16), (2, 3, 33, 16), (2, 3, 33, 16), {"is_causal": True}),
    "causal, more keys": ((2, 9, 8), (2, 23, 8), (2, 23, 8), {"is_causal": True}),
    "causal, more queries": ((2, 23, 8), (2, 9, 8), (2, 9, 8), {"is_causal": True}),
    "no heads": ((21, 8), (13, 8), (13, 8), {"scale": 0.7}),
    "two batch axes": ((2, 1, 3, 5, 8), (2, 1, 3, 7, 8), (2, 1, 3, 7, 8), {"scale": -1.3}),
    "batch broadcasts": ((1, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8), {}),
    "heads broadcast": ((3, 4, 5, 8), (3, 1, 7, 8), (3, 1, 7, 8), {}),
    "fewer axes": ((3, 4, 5, 8), (4, 7, 8), (4, 7, 8), {}),
    "groups": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), {"enable_gqa": True}),
    "groups without a batch": ((6, 5, 8), (2, 7, 8), (2, 7, 8), {"enable_gqa": True, "is_causal": True}),
    "groups of two sizes": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 3, 7, 8), {"enable_gqa": True}),
    "bool mask": ((2, 3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 8), {"attn_mask": ((9, 11), bool)}),
    "bool mask of keys": ((2, 3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 8), {"attn_mask": ((2, 1, 1, 11), bool)}),
    "bias": ((2, 3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 8), {"attn_mask": ((3, 9, 11), float)}),
    "bias, query broadcasts": (
        (1, 3, 9, 8),
        (2, 3, 11, 8),
        (2, 3, 11, 8),
        {"attn_mask": ((2, 1, 9, 11), float)},
    ),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DRAWS = 4


def evaluate(function, name, dtype, draw):
    """out and the gradients for inputs that are rounded to `dtype` whatever they are computed in."""
    *shapes, options = SHAPES[name]
    options = dict(options)
    rounded = dtype[0]
    tensors = [normal(*shape, dtype=rounded, seed=10 * draw + i) for i, shape in enumerate(shapes)]
    shape, kind = options.pop("attn_mask", (None, None))
    if shape is not None:
        mask = normal(*shape, dtype=rounded, seed=10 * draw + 3)
        tensors.append(mask > -0.3 if kind is bool else mask)
        if kind is bool and len(shape) == 2:
            tensors[-1][1] = False
    moved = [x.to(dtype[1]).requires_grad_() if x.is_floating_point() else x for x in tensors]
    out = function(*moved, **options)
    cotangent = normal(*out.shape, dtype=rounded, seed=10 * draw + 4).to(dtype[1])
    wanted = [x for x in moved if x.requires_grad]
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, wanted, cotangent))]


def plain(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """The formula of torch's documentation, every step in the dtype of its arguments."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
        dead = ~attn_mask.any(-1, keepdim=True)
        return logits.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0) @ value
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ value


def largest(actual, exact):
    return (actual - exact).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_torchs_within_the_budget(name, dtype):
    exact = evaluate(TORCHS, name, (dtype, torch.float64), 0)
    actual = evaluate(scaled_dot_product_attention, name, (dtype, dtype), 0)
    draws = [
        [
            largest(x, y)
            for x, y in zip(
                evaluate(plain, name, (dtype, torch.float32 if dtype == torch.float64 else dtype), draw),
                evaluate(TORCHS, name, (dtype, torch.float64), draw),
                strict=True,
            )
        ]
        for draw in range(DRAWS)
    ]
    eps = torch.finfo(dtype).eps
    # In float64 the formula errs by what it errs by in float32, times the ratio of the roundings, and
    # so does what stands for exact.
    ratio = 2 * eps / torch.finfo(torch.float32).eps if dtype == torch.float64 else 1
    for i, (x, y) in enumerate(zip(actual, exact, strict=True)):
        assert x.shape == y.shape
        budget = 2 * ratio * max(errors[i] for errors in draws) + eps * y.abs().max().item()
        assert largest(x, y) <= budget, i


def test_the_signature_is_torchs():
    text = TORCHS.__doc__.partition(") -> Tensor")[0].partition("(")[2]
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    ours = [name if p.default is p.empty else f"{name}={p.default}" for name, p in parameters.items()]
    assert ours == [x.strip() for x in " ".join(text.split()).split(",")]


def test_autocast_is_torchs():
    q = normal(2, 5, 8, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert scaled_dot_product_attention(q, q, q).dtype == TORCHS(q, q, q).dtype == dtype


def test_autocast_takes_tensors_of_several_dtypes():
    q = normal(2, 5, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(q, q.bfloat16(), q, torch.zeros(5, 5))
        torch.testing.assert_close(out, TORCHS(q, q.bfloat16(), q, torch.zeros(5, 5)), atol=2e-2, rtol=0)


def test_rows_that_a_float_mask_hides_are_zero():
    q = normal(2, 5, 8, dtype=torch.float32, requires_grad=True)
    bias = torch.zeros(5, 5).index_fill(0, torch.tensor([2]), -torch.inf)
    out = scaled_dot_product_attention(q, q, q, bias)
    assert torch.equal(out[:, 2], torch.zeros(2, 8))
    out.sum().backward()
    assert q.grad.isfinite().all()


# flash_attention against JAX's.


def test_every_argument_reaches_jax():
    q, k, v = normal(2, 4, 9, 8), normal(2, 2, 11, 8, seed=1), normal(2, 2, 11, 6, seed=2)
    q, k, v = (x.float() for x in (q, k, v))
    arrays = {
        "key_mask": torch.rand(2, 11) > 0.2,
        "bias": normal(4, 9, 1, dtype=torch.float32, seed=3),
        "mask": normal(9, 11, seed=4) > -1,
        "segment_ids": (torch.arange(9).expand(2, 9) // 5, torch.arange(11).expand(2, 11) // 6),
        "q_offset": torch.tensor([2, 3], dtype=torch.int32),
        "scale": torch.tensor(0.4),
    }
    options = {
        "causal": True,
        "window": (4, None),
        "softcap": 5.0,
        "precision": "high",
        "implementation": "xla",
    }
    actual = flash_attention(q, k, v, **arrays, **options, return_lse=True)
    as_numpy = {
        name: tuple(y.numpy().astype(np.int32) for y in x) if isinstance(x, tuple) else x.numpy()
        for name, x in arrays.items()
    }
    expected = flash_attention_jax.flash_attention(*(x.numpy() for x in (q, k, v)), **as_numpy, **options)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    alone = flash_attention(q, k, v, **arrays, **options)
    assert torch.equal(alone, actual[0])


def test_one_segment_array_stands_for_both():
    q, ids = normal(2, 6, 8), torch.tensor([0, 0, 1, 1, 1, 2])
    both = flash_attention(q, q, q, segment_ids=(ids, ids))
    assert torch.equal(flash_attention(q, q, q, segment_ids=ids), both)
    torch.testing.assert_close(both, TORCHS(q, q, q, ids[:, None] == ids))


# Memory order.


def heads(dtype=torch.float64, length=5, count=6, **options):
    """As a projection leaves them, (B, N, T, D)."""
    return normal(2, length, count, 4, dtype=dtype, **options).transpose(1, 2)


@pytest.mark.parametrize("fused", [False, True])
def test_heads_are_attended_to_in_the_order_in_which_they_lie(fused, monkeypatch):
    if fused:
        q, k, v = normal(2, 5, 3, 6, 4).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = heads(), heads(length=7, count=2, seed=1), heads(length=7, count=2, seed=2)
    programs = []
    monkeypatch.setattr(_attention, "call", lambda *x: programs.append(x) or call(*x))
    options = {"bias": normal(6, 5, k.shape[2], seed=3), "causal": True, "return_lse": True}
    out, lse = flash_attention(q, k, v, **options)
    ((program, tensors),) = programs
    assert '"order": "BTND"' in program
    assert [x.data_ptr() for x in tensors[:3]] == [x.data_ptr() for x in (q, k, v)]
    assert fused or all(x.is_contiguous() for x in tensors)
    assert out.transpose(1, 2).is_contiguous()
    expected = flash_attention(*(x.contiguous() for x in (q, k, v)), **options)
    torch.testing.assert_close((out, lse), expected)


def test_a_query_that_sees_nothing_enters_no_gradient_of_the_scale():
    q, k, v = (torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    slopes = []
    for anything in (0.0, torch.nan):
        q[2] = anything
        scale = torch.tensor(0.5, requires_grad=True)
        flash_attention(q, k, v, mask=mask, scale=scale).sum().backward()
        slopes.append(scale.grad)
    torch.testing.assert_close(*slopes)


def test_derivatives_of_heads_in_the_order_in_which_they_lie():
    x = [heads(count=2, seed=i, length=3).detach().requires_grad_() for i in range(3)]
    scale = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def f(q, k, v, scale):
        return flash_attention(q, k, v, scale=scale, causal=True, return_lse=True)

    assert f(*x, scale)[0].transpose(1, 2).is_contiguous()
    assert torch.autograd.gradcheck(f, (*x, scale), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (*x, scale), check_fwd_over_rev=True)
    hessian = [torch.func.hessian(lambda *x: f(*x)[0].square().sum())(*y, scale) for y in (x, detached(x))]
    torch.testing.assert_close(*hessian)


def detached(tensors):
    return [x.detach().contiguous() for x in tensors]


def test_shapes_that_do_not_fit_are_shown_as_they_were_given():
    q, k = heads(), heads(length=7)
    with pytest.raises(ValueError, match=r"^k must be of q's head dim D = 4, got shape \(2, 6, 7, 3\)"):
        flash_attention(q, k[..., :3], k)
    with pytest.raises(ValueError, match=r"^k must be of a head count K that divides q's N = 6, got K = 5"):
        flash_attention(q, k[:, :5], k[:, :5])


# Derivatives.


def test_a_tangent_starts_from_the_results(monkeypatch):
    """No second forward pass."""
    specs = []
    run = Operation.run_in_jax
    monkeypatch.setattr(Operation, "run_in_jax", lambda p, x: specs.append(p.description) or run(p, x))
    q = normal(4, 8)
    with torch.autograd.forward_ad.dual_level():
        flash_attention(torch.autograd.forward_ad.make_dual(q, q), q, q)
    assert [next(x for x in ("attend", "tangents") if isinstance(d.get(x), dict)) for d in specs] == [
        "attend",
        "tangents",
    ]
    values = [*[q.numpy()] * 4, q.numpy()[:, 0], q.numpy()]
    with jax.enable_x64(True):
        jaxpr = str(jax.make_jaxpr(lambda x: _function(specs[1])(None, x))(values))
    assert "attention_tangent[" in jaxpr
    assert "attention[" not in jaxpr


def with_everything(q, k, v, bias, scale):
    return flash_attention(q, k, v, bias=bias, scale=scale, causal=True, softcap=3.0, return_lse=True)


def test_derivatives_of_both_modes_and_of_second_order():
    shapes = (2, 2, 2), (1, 3, 2), (1, 3, 1), (1, 2, 1), ()
    arguments = [normal(*shape, requires_grad=True, seed=i) for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(with_everything, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(with_everything, arguments)


def test_derivatives_of_scaled_dot_product_attention():
    arguments = [normal(3, 2, requires_grad=True, seed=i) for i in range(3)]

    def f(*x):
        return scaled_dot_product_attention(*x, is_causal=True)

    assert torch.autograd.gradcheck(f, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, arguments, check_fwd_over_rev=True)


def test_a_gradient_of_lse_alone_and_of_one_argument():
    q, k = normal(4, 8, requires_grad=True), normal(5, 8, seed=1)
    lse = flash_attention(q, k, k, return_lse=True)[1]
    (gradient,) = torch.autograd.grad(lse.sum(), q)
    (expected,) = torch.autograd.grad((q @ k.mT * 8**-0.5).logsumexp(-1).sum(), q)
    torch.testing.assert_close(gradient, expected)


def test_a_tangent_of_a_key_mask_is_zero():
    q, mask = normal(2, 5, 4), torch.ones(5, dtype=torch.float64)
    for attend in (flash_attention, lambda *x: flash_attention(*x, return_lse=True)[1]):
        out, tangent = torch.func.jvp(lambda x, attend=attend: attend(q, q, q, x), (mask,), (mask,))
        assert torch.equal(tangent, torch.zeros_like(out))


def test_no_query_and_no_key():
    for t, s in ((0, 3), (3, 0)):
        q, k = normal(2, t, 4, requires_grad=True), normal(2, s, 4, requires_grad=True)
        out = flash_attention(q, k, k)
        assert torch.equal(out, torch.zeros(2, t, 4))
        out.sum().backward()
        assert torch.equal(q.grad, torch.zeros_like(q))
        assert torch.equal(k.grad, torch.zeros_like(k))


TRANSFORMS = [
    lambda f: torch.func.vmap(f, in_dims=(1, 0, 1)),
    lambda f: lambda q, k, v: torch.func.vmap(lambda q: f(q, k[0], v[0]), in_dims=1)(q),
    lambda f: torch.func.grad(lambda *x: f(*x).square().sum(), argnums=(0, 1, 2)),
    lambda f: torch.func.vmap(torch.func.grad(lambda *x: f(*x).square().sum(), argnums=(0, 2))),
    lambda f: torch.func.hessian(lambda *x: f(*x).square().sum()),
    lambda f: torch.func.jacfwd(f, argnums=1),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform):
    tensors = [normal(3, 3, 2, seed=i) for i in range(3)]
    actual, expected = transform(flash_attention)(*tensors), transform(plain)(*tensors)
    torch.testing.assert_close(actual, expected)


ENTRIES = {
    "flash_attention": flash_attention,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "compiled": torch.compile(flash_attention, backend="aot_eager"),
}


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobians(name, strategy):
    tensors = tuple(normal(2, 3, 2, seed=i) for i in range(3))
    actual = torch.autograd.functional.jacobian(ENTRIES[name], tensors, vectorize=True, strategy=strategy)
    torch.testing.assert_close(actual, torch.autograd.functional.jacobian(plain, tensors))


@pytest.mark.filterwarnings("ignore")
def test_derivatives_in_batches():
    tensors = tuple(normal(2, 3, 2, seed=i, requires_grad=True) for i in range(3))
    modes = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(flash_attention, tensors, check_batched_grad=True, **modes)
    assert torch.autograd.gradgradcheck(flash_attention, tensors, check_batched_grad=True)


# torch.compile and torch.export.


class SelfAttention(torch.nn.Module):
    def __init__(self, attend, dim, heads):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)
        self.attend, self.heads = attend, heads

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


ATTENTIONS = {
    "flash_attention": lambda q, k, v: flash_attention(q, k, v, causal=True, window=(3, None), scale=0.3),
    "lse": lambda q, k, v: torch.mul(
        *(x.reshape(*v.shape[:3], -1) for x in flash_attention(q, k, v, return_lse=True))
    ),
    "scaled_dot_product_attention": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_compile_takes_the_whole_model(name, dynamic):
    torch._dynamo.reset()
    model = SelfAttention(ATTENTIONS[name], 8, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 7) if dynamic else (5,):
        x = normal(2, length, 8, dtype=torch.float32, seed=length)
        results = [f(x) for f in (compiled, model)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(
            *(torch.autograd.grad(y.square().sum(), model.parameters()) for y in results)
        )


SIZED = {
    "scale": lambda q: flash_attention(q, q, q, scale=q.shape[-2] ** -0.5),
    "scale of torch's": lambda q: scaled_dot_product_attention(q, q, q, scale=1 / q.shape[-1]),
    "window": lambda q: flash_attention(q, q, q, window=(q.shape[-2] // 2, None)),
    "window on both sides": lambda q: flash_attention(q, q, q, window=q.shape[-2] // 3),
    "q_offset": lambda q: flash_attention(q[:, :-2], q, q, causal=True, q_offset=q.shape[-2] - 3),
}


@pytest.mark.parametrize("name", SIZED)
def test_compile_takes_numbers_that_depend_on_sizes(name):
    torch._dynamo.reset()
    compiled = torch.compile(SIZED[name], fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (6, 7):
        q = normal(2, length, 8)
        torch.testing.assert_close(compiled(q), SIZED[name](q))


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_a_switch_that_depends_on_sizes(strict):
    class Model(torch.nn.Module):
        def forward(self, q):
            return scaled_dot_product_attention(q, q, q, is_causal=q.shape[-2] > 1)

    lengths = ({1: torch.export.Dim("length", min=2)},)
    exported = torch.export.export(Model(), (normal(2, 6, 8),), dynamic_shapes=lengths, strict=strict)
    q = normal(2, 9, 8)
    torch.testing.assert_close(exported.module()(q), TORCHS(q, q, q, is_causal=True))


def test_an_offset_from_a_size_is_exported_for_every_length():
    class Model(torch.nn.Module):
        def forward(self, q):
            return SIZED["q_offset"](q)

    lengths = ({1: torch.export.Dim("length", min=6)},)
    exported = torch.export.export(Model(), (normal(2, 6, 8),), dynamic_shapes=lengths)
    q = normal(2, 9, 8)
    torch.testing.assert_close(exported.module()(q), SIZED["q_offset"](q))


def test_an_offset_from_a_size_is_exported_from_tensors_of_another_device():
    class Model(torch.nn.Module):
        def forward(self, q, k):
            return flash_attention(q, k, k, causal=True, q_offset=k.shape[-2] - q.shape[-2])

    with FakeTensorMode(shape_env=ShapeEnv()):
        q, k = (torch.empty(2, length, 8, device="cuda") for length in (6, 9))
    lengths = tuple({1: torch.export.Dim(name, min=2, max=64)} for name in "TS")
    exported = torch.export.export(Model(), (q, k), dynamic_shapes=lengths)
    (made,) = (node for node in exported.graph.nodes if node.target is torch.ops.aten.full.default)
    assert made.meta["val"].device == q.device


def test_inductor_takes_heads_in_the_order_in_which_they_lie():
    torch._dynamo.reset()
    model = SelfAttention(lambda q, k, v: scaled_dot_product_attention(2 * q, k, v), 8, 2)
    x = normal(2, 5, 8, dtype=torch.float32)
    results = [f(x) for f in (torch.compile(model, fullgraph=True), model)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), model.parameters()) for y in results))


def test_compile_takes_vmap():
    torch._dynamo.reset()
    tensors = [normal(3, 3, 2, seed=i) for i in range(3)]
    f = torch.func.vmap(flash_attention)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), f(*tensors))


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_the_whole_model_for_every_length(strict):
    model = SelfAttention(ATTENTIONS["scaled_dot_product_attention"], 8, 2).eval()
    x = normal(2, 5, 8, dtype=torch.float32)
    lengths = ({1: torch.export.Dim("length", min=2)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=lengths, strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("flash_attention_jax.call.default") == 1
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    longer = normal(2, 9, 8, dtype=torch.float32)
    torch.testing.assert_close(torch.export.load(file).module()(longer), model(longer))


@pytest.mark.filterwarnings("ignore")
def test_the_operator_is_registered_as_torch_asks():
    from flash_attention_jax.torch._operator import ARRAYS, encode

    program = encode({"attend": {"causal": True}, "arrays": ARRAYS[:3]})
    tensors = [normal(3, 4, requires_grad=True, seed=i) for i in range(3)]
    checked = torch.library.opcheck(torch.ops.flash_attention_jax.call.default, (tensors, program))
    assert set(checked.values()) == {"SUCCESS"}


# Training.


class Block(torch.nn.Module):
    def __init__(self, attend, dim):
        super().__init__()
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(dim), torch.nn.LayerNorm(dim)])
        self.attention = SelfAttention(attend, dim, 2)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(dim, 2 * dim), torch.nn.GELU(), torch.nn.Linear(2 * dim, dim)
        )

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def losses(attend, steps=25, vocabulary=11, length=16, dim=16):
    """Of a transformer that learns to say again what it read half a sequence before."""
    torch.manual_seed(0)
    embed, position = torch.nn.Embedding(vocabulary, dim), torch.nn.Embedding(length, dim)
    blocks = torch.nn.Sequential(Block(attend, dim), Block(attend, dim))
    head = torch.nn.Linear(dim, vocabulary)
    model = torch.nn.ModuleList([embed, position, blocks, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    curve = []
    for _ in range(steps):
        half = torch.randint(vocabulary, (32, length // 2))
        tokens = torch.cat([half, half], 1)
        logits = head(blocks(embed(tokens[:, :-1]) + position(torch.arange(length - 1))))
        said = logits[:, length // 2 - 1 :].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(said, tokens[:, length // 2 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve)


def test_a_transformer_learns_as_it_does_with_torchs():
    ours = losses(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True))
    theirs = losses(lambda q, k, v: TORCHS(q, k, v, is_causal=True))
    assert theirs[-1] < theirs[0] - 0.2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


# Errors.

Q = normal(2, 3, 5, 4, dtype=torch.float32)
NESTED = torch.nested.nested_tensor([Q[0], Q[0, :2]], layout=torch.jagged)
STRIDED_NESTED = torch.nested.nested_tensor([Q[0], Q[0, :2]])
SPARSE = Q.to_sparse()
LAYOUTS = {
    "a nested one: make it dense with torch.nested.to_padded_tensor": (NESTED, STRIDED_NESTED),
    "torch.sparse_coo: make it dense with Tensor.to_dense": (SPARSE,),
    "torch.sparse_csr: make it dense with Tensor.to_dense": (Q[0, 0].to_sparse_csr(),),
}


@pytest.mark.parametrize("got", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["q", "k", "v", "bias", "mask", "key_mask", "segment_ids", "q_offset", "scale"]
)
def test_layouts_that_are_not_strided_are_refused_by_name(name, got):
    for x in LAYOUTS[got]:
        with pytest.raises(TypeError) as raised:
            flash_attention(**{"q": Q, "k": Q, "v": Q, name: x})
        assert str(raised.value) == f"{name} must be a strided tensor, got {got}"


@pytest.mark.parametrize("got", LAYOUTS)
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_scaled_dot_product_attention_refuses_layouts_by_its_own_names(name, got):
    for x in LAYOUTS[got]:
        with pytest.raises(TypeError) as raised:
            scaled_dot_product_attention(**{"query": Q, "key": Q, "value": Q, name: x})
        assert str(raised.value) == f"{name} must be a strided tensor, got {got}"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], Q, Q), TypeError, "q must be a torch.Tensor, got list"),
        ((Q, Q, None), TypeError, "v must be a torch.Tensor, got NoneType"),
        ((Q.int(), Q, Q), TypeError, "q must be of dtype float16, bfloat16, float32, float64, got int32"),
        ((Q, Q[..., :3], Q), ValueError, "k must be of q's head dim D = 4, got shape (2, 3, 5, 3)"),
        ((Q, Q, Q, {"causal": 1}), TypeError, "causal must be True or False, got 1"),
        ((Q, Q, Q, {"softcap": Q}), TypeError, "softcap must be None, a number, a string, a bool or a pair, got Tensor"),
        ((Q, Q, Q, {"mask": True}), TypeError, "mask must be a torch.Tensor, got bool"),
        ((Q, Q, Q, {"segment_ids": (Q,)}), ValueError, "segment_ids must be a tensor or a pair of tensors (of queries, of keys), got 1 items"),
        ((Q, Q, Q, {"segment_ids": (None, Q)}), TypeError, "segment_ids must be a tensor or a pair of tensors (of queries, of keys), got NoneType"),
        ((Q, Q, Q, {"segment_ids": 3}), TypeError, "segment_ids must be a tensor or a pair of tensors (of queries, of keys), got int"),
        (([1.0], Q, Q, {"segment_ids": Q}), TypeError, "q must be a torch.Tensor, got list"),
        ((Q[0, 0, 0], Q, Q, {"segment_ids": Q}), ValueError, "q must be an array of shape (*batch, [N,] T, D), got shape (4,)"),
        ((Q, Q, Q, {"scale": False}), TypeError, "scale must be a real number or a scalar array, got bool"),
        ((Q, Q, Q, {"softcap": False}), TypeError, "softcap must be None or a positive number, got bool"),
        ((Q, Q, Q, {"window": False}), TypeError, "window must be None, an int, or a pair (left, right) of ints or None, each at least 0, got False"),
        ((Q, Q, Q, {"precision": False}), TypeError, "precision must be None, 'default', 'high', 'highest' or a jax.lax.Precision, got bool"),
        ((Q, Q, Q, {"implementation": False}), TypeError, "implementation must be None or one of 'hopper', 'xla', 'reference', got False"),
        ((Q, Q, Q, {"causal": True, "q_offset": False}), TypeError, "q_offset must be an int or an array of dtype int32, got bool"),
        ((Q, Q[:, :, :4], Q[:, :, :4], {"segment_ids": Q.int()[0, 0, :, 0]}), ValueError, "segment_ids must be a pair (of queries, of keys) where T and S differ, got one tensor, T = 5 and S = 4"),
        ((Q, Q.to("meta"), Q), ValueError, "all tensors must be on one device, got cpu, meta: move them with Tensor.to"),
        ((Q, Q, Q, {"implementation": "hopper"}), flash_attention_jax.Unsupported, "implementation 'hopper' cannot run this problem: it runs on CUDA devices of compute capability 9.0, not on cpu"),
    ],
)  # fmt: skip
def test_errors(arguments, error, message):
    *tensors, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error) as raised:
        flash_attention(*tensors, **options)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q, 1.0, Q), TypeError, "key must be a torch.Tensor, got float"),
        ((Q[0, 0, 0], Q, Q), ValueError, "query must be of shape (*batch, H, length, dim) or (length, dim), got shape (4,)"),
        ((Q, Q.half(), Q), TypeError, "key must be of query's dtype torch.float32, got torch.float16"),
        ((Q, Q[..., :3], Q), ValueError, "key must be of query's head dim E = 4, got shape (2, 3, 5, 3)"),
        ((Q, Q, Q[:, :, :4]), ValueError, "value must be of key's length S = 5, got shape (2, 3, 4, 4)"),
        ((Q[..., :0], Q[..., :0], Q), ValueError, "query must be of a head dim of at least 1, got shape (2, 3, 5, 0)"),
        ((Q, Q, Q[..., :0]), ValueError, "value must be of a head dim of at least 1, got shape (2, 3, 5, 0)"),
        ((Q, Q[:, :2], Q[:, :2]), ValueError, "query, key and value must be of shapes that broadcast before the last 2 axes, got (2, 3, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)"),
        ((Q, Q[:, :2], Q[:, :2], {"enable_gqa": True}), ValueError, "key must be of a head count that divides query's 3, got shape (2, 2, 5, 4)"),
        ((Q[0, 0], Q[0, 0], Q[0, 0], {"enable_gqa": True}), ValueError, "query must be of at least 3 axes where enable_gqa is set, got shape (5, 4)"),
        ((Q, Q, Q, {"dropout_p": 0.1}), NotImplementedError, "dropout_p must be 0, for there is no dropout, got 0.1"),
        ((Q, Q, Q, {"attn_mask": Q[0, 0, :, :1] > 0, "is_causal": True}), ValueError, "attn_mask must be None where is_causal is set, got shape (5, 1)"),
        ((Q, Q, Q, {"attn_mask": Q.int()}), TypeError, "attn_mask must be of dtype bool, float16, bfloat16, float32, float64, got torch.int32"),
        ((Q, Q, Q, {"attn_mask": Q[..., :1].to(torch.float8_e5m2)}), TypeError, "attn_mask must be of dtype bool, float16, bfloat16, float32, float64, got torch.float8_e5m2"),
        ((Q.int(), Q.int(), Q.int()), TypeError, "query must be of dtype float16, bfloat16, float32, float64, got torch.int32"),
        ((Q.cfloat(), Q.cfloat(), Q.cfloat()), TypeError, "query must be of dtype float16, bfloat16, float32, float64, got torch.complex64"),
        ((Q, Q, Q, {"is_causal": 1}), TypeError, "is_causal must be True or False, got 1"),
        ((Q, Q, Q, {"is_causal": None}), TypeError, "is_causal must be True or False, got None"),
        ((Q, Q, Q, {"attn_mask": Q[..., :1], "is_causal": 0}), TypeError, "is_causal must be True or False, got 0"),
        ((Q, Q, Q, {"enable_gqa": 1}), TypeError, "enable_gqa must be True or False, got 1"),
        ((Q, Q, Q, {"attn_mask": Q}), ValueError, "attn_mask must be broadcastable to (*batch, H, L, S) = (2, 3, 5, 5), got shape (2, 3, 5, 4)"),
        ((Q, Q, Q, {"attn_mask": Q[None, ..., :1]}), ValueError, "attn_mask must be broadcastable to (*batch, H, L, S) = (2, 3, 5, 5), got shape (1, 2, 3, 5, 1)"),
    ],
)  # fmt: skip
def test_errors_of_scaled_dot_product_attention(arguments, error, message):
    *tensors, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error) as raised:
        scaled_dot_product_attention(*tensors, **options)
    assert str(raised.value) == message


@pytest.mark.parametrize("switched", [False, True])
def test_deterministic_follows_the_switch_of_torch(switched, monkeypatch):
    seen = []
    described = _attention._described

    def remember(names, options):
        seen.append(dict(options).get("deterministic", False))
        return described(names, options)

    monkeypatch.setattr(_attention, "_described", remember)
    x = torch.randn(2, 5, 4)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(switched)
    try:
        flash_attention(x, x, x)
        scaled_dot_product_attention(x, x, x)
        flash_attention(x, x, x, deterministic=False)
        flash_attention(x, x, x, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(before)
    assert seen == [switched, switched, False, True]
