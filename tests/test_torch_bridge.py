"""`jax2torch`: crossing without a copy, structure, derivatives, compilation, errors."""

import copy
import functools
import gc
import operator
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed, so nothing of the bridge is tested")

from torch._subclasses import FakeTensorMode  # noqa: E402
from torch._vmap_internals import _vmap  # noqa: E402
from torch.autograd.functional import hessian, jacobian  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import flash_attention_jax  # noqa: E402
from flash_attention_jax.torch import jax2torch  # noqa: E402
from flash_attention_jax.torch._crossing import jax_device, to_jax, to_torch  # noqa: E402

REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint64]
OTHERS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128]


def normal(*shape, dtype=torch.float64, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)


def smooth(x, y):
    """Every derivative is there, and the second result reads only one argument."""
    return {"both": jnp.sin(x[:, None] * y), "one": (jnp.exp(x), None)}


# Crossing.


@pytest.mark.parametrize("dtype", REAL + INTEGERS + OTHERS, ids=str)
def test_every_dtype_crosses_as_it_is_and_where_it_lies(dtype):
    x = torch.arange(64).reshape(4, 16).to(dtype)
    with jax.enable_x64(True):
        array = to_jax(x)
        assert str(array.dtype) == str(dtype).removeprefix("torch.")
        assert array.unsafe_buffer_pointer() == x.data_ptr()
        back = to_torch(array)
    assert back.dtype == dtype
    assert back.data_ptr() == x.data_ptr()
    result = jax2torch(lambda x: jnp.concatenate([x, x]))(x)
    assert result.dtype == dtype
    assert torch.equal(result.to(torch.complex128), torch.cat([x.to(torch.complex128)] * 2))


def test_results_lie_where_jax_wrote_them():
    pointers = []
    add = jax.jit(lambda x: x + 1)
    array = add(np.ones(1000, np.float32))
    pointers.append(array.unsafe_buffer_pointer())
    assert to_torch(array).data_ptr() == pointers[0]


def test_results_may_be_written_to():
    x = torch.ones(1000)
    first = jax2torch(lambda x: x)(x)
    first.zero_()
    assert torch.equal(x, torch.ones(1000))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[1:, 3:],
        lambda x: x.flatten()[1:],
        lambda x: x[:1].expand(5, 6),
        lambda x: x[:0],
        lambda x: x[0, 0],
        lambda x: torch.complex(x, x).conj(),
        lambda x: torch.complex(x, x).conj().imag,
    ],
)
def test_tensors_that_are_not_contiguous(view):
    x = view(normal(4, 6, dtype=torch.float32))
    assert torch.equal(jax2torch(lambda x: 2 * x)(x), 2 * x)


def test_a_tensor_of_64_bits_is_no_reason_to_narrow_or_widen_another():
    wide, narrow = torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.float32)
    first, second = jax2torch(lambda x, y: (x, y))(wide, narrow)
    assert (first.dtype, second.dtype) == (torch.int64, torch.float32)
    assert jnp.ones(1, float).dtype == jnp.float32


def test_the_zeros_of_forward_mode_which_have_no_memory():
    x, tangent = normal(3, 3) + 4 * torch.eye(3), normal(3, 3, seed=1)
    zeros = torch._efficientzerotensor((3,), dtype=torch.complex64)
    for each in (zeros, zeros.conj(), zeros.real):
        assert each._is_zerotensor()
        assert torch.equal(jax2torch(lambda x: x + 1)(each), torch.ones(3, dtype=each.dtype))
    found = []
    for f in (jax2torch(lambda sign, x: sign * jnp.exp(x)), lambda sign, x: sign * x.exp()):
        with torch.autograd.forward_ad.dual_level():
            results = torch.linalg.slogdet(torch.autograd.forward_ad.make_dual(x, tangent))
            assert torch.autograd.forward_ad.unpack_dual(results[0]).tangent._is_zerotensor()
            found.append(torch.autograd.forward_ad.unpack_dual(f(*results)).tangent)
    torch.testing.assert_close(*found)


# Structure.


class Pair(NamedTuple):
    first: object
    second: object


def test_results_keep_the_structure_and_arguments_may_have_any():
    def f(x, nested, *, key=None, flag, pair):
        assert flag == "static"
        assert key is None
        return Pair({"a": [x + nested["b"][0]], "none": None}, (pair.second,))

    x, y, z = (normal(3, seed=i) for i in range(3))
    result = jax2torch(f)(x, {"b": (y, None)}, flag="static", pair=Pair(2, z))
    assert isinstance(result, Pair)
    assert result.first["none"] is None
    assert torch.equal(result.first["a"][0], x + y)
    assert torch.equal(result.second[0], z)


def test_both_forms_of_flash_attention():
    f = jax2torch(flash_attention_jax.flash_attention)
    q, k, v = (normal(2, 3, 5, 4, dtype=torch.float32, seed=i) for i in range(3))
    mask = normal(5, 5) > 0
    out, lse = f(q, k, v, mask=mask, causal=True)
    assert f(q, k, v).shape == (2, 3, 5, 4)
    assert f(q, k, v).dtype == torch.float32
    assert lse.shape == (2, 3, 5)
    expected = flash_attention_jax.flash_attention(*map(to_jax, (q, k, v)), mask=to_jax(mask), causal=True)
    assert np.array_equal(out, expected.out)


def test_static_values_that_are_equal_are_told_apart():
    f = jax2torch(lambda x, a: x if a is True else x * (1 if isinstance(a, int) else np.copysign(2.0, a)))
    x = torch.ones(1)
    assert [f(x, a).item() for a in (1.0, 1, True, -0.0, 0.0)] == [2, 1, 1, -2, 2]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, jnp.bfloat16.dtype.type])
def test_static_zeros_of_either_sign_are_told_apart(kind):
    f, x = jax2torch(lambda x, a: x * np.copysign(2.0, np.float32(a))), torch.ones(1)
    assert [f(x, kind(a)).item() for a in (0.0, -0.0)] == [2, -2]


def test_arguments_may_have_any_name():
    f, x = jax2torch(lambda x, self, args: x * self + args), normal(3)
    torch.testing.assert_close(f(x, self=x, args=x), x * x + x)


def test_without_tensors_it_runs_on_the_default_device():
    result = jax2torch(lambda n: jnp.arange(n))(3)
    assert torch.equal(result, torch.arange(3, dtype=torch.int32))
    assert result.device == torch.get_default_device()


def test_results_may_be_numbers():
    x = normal(3, requires_grad=True)
    result, number, whole = jax2torch(lambda x: (x * 2, 1.5, 3))(x)
    assert (number.item(), whole.item(), whole.dtype.is_floating_point) == (1.5, 3, False)
    (result.sum() * number).backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


def of_module(x):
    return jnp.sin(x)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.f = jax2torch(of_module)

    def forward(self, x):
        return self.f(x)

    @jax2torch
    def method(self, x):
        return x + 1


@jax2torch
def decorated(x):
    return jnp.sin(x)


def test_a_decorated_function_is_pickled_by_its_name():
    assert pickle.loads(pickle.dumps(decorated)) is decorated


def test_what_has_no_name_is_pickled_by_its_function():
    x, double = normal(3), jax2torch(functools.partial(operator.mul, 2))
    torch.testing.assert_close(pickle.loads(pickle.dumps(double))(x), 2 * x)


def test_it_is_copied_pickled_and_bound_as_functions_are():
    x, model = normal(3), Model()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), x.sin())
    for copied in (copy.copy(model.f), copy.deepcopy(model).f):
        assert copied is model.f
    torch.testing.assert_close(model.method(x), x + 1)
    assert model.f.__name__ == "of_module"
    assert repr(model.f).startswith("jax2torch(<function of_module")


# The example of the package that this one grew from, its import changed.

EXAMPLE = """
import torch
from flash_attention_jax.torch import jax2torch
from flash_attention_jax import flash_attention

q = torch.randn(131072, 512).cuda()
k = torch.randn(131072, 512).cuda()
v = torch.randn(131072, 512).cuda()

key_mask = torch.ones((131072,)).cuda()

torch_flash_attention = jax2torch(flash_attention)

out = torch_flash_attention(q, k, v, key_mask)
"""


def test_the_older_packages_example(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    names = {}
    exec(EXAMPLE.replace("131072", "1024"), names)
    assert names["out"].shape == (1024, 512)
    q, k, v = names["q"], names["k"], names["v"]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(names["out"].out, expected)


# Derivatives.


def flat(f):
    converted = jax2torch(f)

    def of_tensors(*args):
        result = converted(*args)
        return result["both"], result["one"][0]

    return of_tensors


def test_derivatives_of_both_modes_and_of_second_order():
    arguments = normal(3, requires_grad=True), normal(2, requires_grad=True, seed=1)
    f = flat(smooth)
    assert torch.autograd.gradcheck(f, arguments, check_forward_ad=True, check_undefined_grad=True)
    assert torch.autograd.gradgradcheck(f, arguments, check_fwd_over_rev=True)


def test_complex_derivatives_follow_torchs_convention():
    x = normal(3, dtype=torch.complex128, requires_grad=True)
    f = jax2torch(lambda x: (x * x + 2j * x, jnp.abs(x), jnp.sin(x).real))
    assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x,))


def test_third_order():
    f = jax2torch(lambda x: jnp.sin(x))
    x = normal(4, requires_grad=True)
    y = f(x)
    for _ in range(3):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(y, -x.cos())


def test_only_gradients_that_are_needed_are_computed():
    asked = []

    @jax.custom_vjp
    def f(x, y):
        return x * y

    def backward(residuals, cotangent):
        asked.append(True)
        return cotangent * residuals[1], cotangent * residuals[0]

    f.defvjp(lambda x, y: (x * y, (x, y)), backward)
    x, y = normal(3), normal(3, seed=1)
    jax2torch(f)(x, y)
    assert not asked
    needed = x.clone().requires_grad_()
    jax2torch(f)(needed, y).sum().backward()
    assert asked
    torch.testing.assert_close(needed.grad, y)
    assert y.grad is None


def test_integers_bools_and_their_results_have_no_gradients():
    x, index, mask = normal(4, requires_grad=True), torch.tensor([2, 0]), torch.tensor([True, False])
    f = jax2torch(lambda x, index, mask: (jnp.where(mask, x[index], 0), index + 1, ~mask))
    taken, shifted, inverse = f(x, index, mask)
    assert taken.requires_grad
    assert not shifted.requires_grad
    assert not inverse.requires_grad
    taken.sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 0, 1, 0], dtype=torch.float64))


def test_a_result_that_nothing_reads_has_a_gradient_of_zero():
    x = normal(3, requires_grad=True)
    y = jax2torch(lambda x: (jnp.sin(x), jnp.exp(x)))(x)[0]
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(first, x.cos())
    torch.testing.assert_close(second, x.cos())


def test_writing_to_an_argument_before_the_backward_pass_is_found():
    x = normal(3, requires_grad=True)
    y = x * 1
    result = jax2torch(jnp.sin)(y)
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_a_tangent_passes_a_backward_pass_that_is_not_recorded():
    x, tangent = normal(3, requires_grad=True), normal(3, seed=1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        (gradient,) = torch.autograd.grad(jax2torch(jnp.sin)(dual).sum(), dual)
        found = torch.autograd.forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(found, -x.detach().sin() * tangent)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(lambda x: f(x).sum()),
        torch.func.vmap,
        lambda f: torch.func.vmap(torch.func.grad(f)),
        torch.func.jacfwd,
        torch.func.jacrev,
        lambda f: torch.func.hessian(lambda x: f(x).sum()),
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
        lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum()),
    ],
)
def test_transforms(transform):
    x = normal(5)
    actual, expected = transform(jax2torch(jnp.sin))(x), transform(torch.sin)(x)
    torch.testing.assert_close(actual, expected)


NESTED = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(5, 1, dtype=x.dtype))[0],
    "grad of grad": lambda f, x: torch.func.grad(
        lambda x: torch.func.grad(lambda x: f(x).sum())(x).square().sum()
    )(x),
    "value": lambda f, x: torch.func.grad_and_value(lambda x: f(x).sum())(x)[1],
}


@pytest.mark.parametrize("name", NESTED)
def test_a_backward_pass_of_what_a_transform_gave_reaches_parameters(name):
    parameter, x = normal(3, 1, requires_grad=True), normal(5, 3, seed=1)
    found = []
    for net in (jax2torch(lambda p, x: jnp.tanh(x @ p)), lambda p, x: torch.tanh(x @ p)):
        result = NESTED[name](lambda x, net=net: net(parameter, x), x)
        found.append(torch.autograd.grad(result.square().sum(), parameter))
    torch.testing.assert_close(*found)


def test_vmap_over_some_arguments():
    f = jax2torch(lambda x, y: (x @ y, x.sum()))
    x, y = normal(3, 4), normal(4, 5, 2)
    product, total = torch.func.vmap(f, in_dims=(None, 2))(x, y)
    torch.testing.assert_close(product, torch.einsum("ij,jkb->bik", x, y))
    torch.testing.assert_close(total, x.sum().expand(2))


VECTORIZED = [
    {"vectorize": True},
    {"vectorize": True, "create_graph": True},
    {"vectorize": True, "strategy": "forward-mode"},
]


@pytest.mark.parametrize("options", VECTORIZED, ids=str)
def test_vectorized_jacobians_and_hessians(options):
    arguments = normal(3), normal(2, seed=1)
    f = flat(smooth)
    torch.testing.assert_close(jacobian(f, arguments, **options), jacobian(f, arguments))
    options = {"outer_jacobian_strategy" if name == "strategy" else name: x for name, x in options.items()}

    def loss(*tensors):
        return sum(x.square().sum() for x in f(*tensors))

    torch.testing.assert_close(hessian(loss, arguments, **options), hessian(loss, arguments))


def test_gradients_of_gradients_in_batches():
    found = []
    for f in (jax2torch(lambda x, y: jnp.sin(x) * y), lambda x, y: x.sin() * y):
        x, y = normal(3, requires_grad=True), normal(3, seed=1, requires_grad=True)
        cotangents = normal(4, 3, seed=2, requires_grad=True)
        batch = torch.autograd.grad(f(x, y), (x, y), cotangents, is_grads_batched=True, create_graph=True)
        of_batch = torch.autograd.grad(sum(z.square().sum() for z in batch), (x, y, cotangents))
        found.append((batch, of_batch))
    torch.testing.assert_close(*found)


def test_a_batch_is_found_in_any_thread_and_nested_ones_are_refused():
    f, x = jax2torch(jnp.sin), normal(2, 3)

    def in_a_thread(x):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(f, x).result()

    torch.testing.assert_close(_vmap(in_a_thread)(x), x.sin())
    with pytest.raises(RuntimeError, match=r"must not be nested here: use torch\.func\.vmap"):
        _vmap(_vmap(f))(x)
    with pytest.raises(RuntimeError, match=r"must not be nested here: use torch\.func\.vmap"):
        _vmap(lambda x: _vmap(lambda y: jax2torch(jnp.add)(x, y))(torch.ones(2)))(x)


# Memory of what is kept for the backward pass.


def eight(x):
    for _ in range(8):
        x = jnp.sin(x) * jnp.cos(x)
    return x


def kept_bytes(call):
    """Of JAX's arrays that a result keeps alive."""
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    result = call()
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays()) - before, result


def in_a_checkpoint(f):
    return lambda x: checkpoint(f, x, use_reentrant=False)


def saved_on_cpu(f):
    def of_tensor(x):
        with torch.autograd.graph.save_on_cpu():
            return f(x)

    return of_tensor


@pytest.mark.parametrize(
    "around",
    [in_a_checkpoint, saved_on_cpu, lambda f: in_a_checkpoint(lambda x: 2 * in_a_checkpoint(f)(f(x)))],
    ids=["checkpoint", "save_on_cpu", "nested"],
)
def test_what_hooks_save_is_all_that_is_kept(around):
    f, x = jax2torch(eight), normal(1000, requires_grad=True)
    size = x.nbytes
    assert kept_bytes(lambda: f(x))[0] > 8 * size
    kept, y = kept_bytes(lambda: around(f)(x))
    assert kept <= 2 * size

    def plain(x):
        for _ in range(8):
            x = x.sin() * x.cos()
        return x

    found = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(around(plain)(x).sum(), x))
    if around is not in_a_checkpoint:
        return
    expected = torch.autograd.grad(plain(x).sum(), x, create_graph=True)
    torch.testing.assert_close(*(torch.autograd.grad(g.square().sum(), x) for (g,) in (found, expected)))


# Compilation.


def test_one_trace_for_each_signature_and_derivative():
    traces = []

    def f(x, factor):
        traces.append(x.shape)
        return jnp.sin(x) * factor

    g = jax2torch(f)
    for _ in range(3):
        g(normal(3), 2.0)
    assert len(traces) == 1
    g(normal(4), 2.0)
    g(normal(4), 3.0)
    assert len(traces) == 3
    for _ in range(3):
        g(normal(4, requires_grad=True), 3.0).sum().backward()
    assert len(traces) == 4


def test_the_overhead_of_a_call_is_small():
    """Generous, for machines that are busy: 200 us were measured on an idle one (see the module)."""
    f = jax.jit(lambda x, y, z: x + y * z)
    g = jax2torch(f)
    tensors = [normal(8, 8, dtype=torch.float32, seed=i) for i in range(3)]
    arrays = [to_jax(x) for x in tensors]

    def least(call):
        times = []
        for _ in range(300):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    assert least(lambda: g(*tensors)) - least(lambda: f(*arrays).block_until_ready()) < 1e-3


def test_torch_compile_breaks_the_graph_and_is_right():
    f = jax2torch(lambda x: {"a": jnp.sin(x)})

    def g(x):
        return f(x + 1)["a"] * 2

    x = normal(4, requires_grad=True)
    y = torch.compile(g, backend="aot_eager")(x)
    torch.testing.assert_close(y, 2 * (x + 1).sin())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, 2 * (x + 1).cos())


# Errors.


def test_errors_of_calls():
    f = jax2torch(lambda x, y=None: x)
    x = torch.ones(2)
    with pytest.raises(TypeError, match=r"^f must be callable, got int$"):
        jax2torch(3)
    with pytest.raises(TypeError, match=r"static, got ndarray: make a tensor of it$"):
        f(x, np.ones(2))
    with pytest.raises(ValueError, match=r"^all tensors must be on one device, got cpu, meta: "):
        f(x, torch.ones(2, device="meta"))
    with pytest.raises(RuntimeError, match=r"^tensors must be on a CPU or GPU, .* got meta: move them"):
        f(torch.ones(2, device="meta"))
    with pytest.raises(
        TypeError, match=r"^tensors must be strided, got torch.sparse_coo: make it dense with"
    ):
        f(x.to_sparse())
    for layout in (torch.strided, torch.jagged):
        with pytest.raises(
            TypeError, match=r"^tensors must be strided, got a nested one: make it dense with"
        ):
            f(torch.nested.nested_tensor([x, x[:1]], layout=layout))
    with pytest.raises(TypeError, match=r"^results must be arrays or numbers, got str"):
        jax2torch(lambda x: "text")(x)
    with pytest.raises(TypeError, match=r"^results must be arrays or numbers, got Tensor"):
        jax2torch(lambda x: torch.ones(2))(x)
    with pytest.raises(TypeError, match=r"^containers of tensors must be pytrees, got max: make a tuple of"):
        f(torch.max(torch.ones(2, 2), 1))
    with pytest.raises(TypeError, match=r"^tensors must be of a dtype that JAX has, got torch.complex32: "):
        f(torch.empty(2, dtype=torch.complex32))


@pytest.mark.parametrize("name", ["int1", "int2", "int4", "int7", "uint1", "uint2", "uint4", "uint7"])
def test_tensors_of_parts_of_bytes_are_refused(name):
    message = rf"^tensors must be of a dtype that JAX has, got torch\.{name}: convert with Tensor.to$"
    with pytest.raises(TypeError, match=message):
        jax2torch(jnp.negative)(torch.empty(2, dtype=getattr(torch, name)))


FOREIGN = [
    "float8_e4m3",
    "float8_e3m4",
    "float8_e4m3b11fnuz",
    "float4_e2m1fn",
    "int4",
    "uint4",
    "int2",
    "uint2",
]


@pytest.mark.parametrize("name", [*FOREIGN, "float0", "key<fry>"])
def test_results_of_a_dtype_that_torch_lacks_are_refused(name):
    def f(x):
        match name:
            case "float0":
                return jax.grad(lambda x: 1.5 * x.astype(float), allow_int=True)(x[0])
            case "key<fry>":
                return jax.random.key(0)
        return x.astype(name)

    with pytest.raises(TypeError, match=rf"^results must be of a dtype that torch has, got {name}$"):
        jax2torch(f)(torch.ones(2, dtype=torch.int32))


def test_what_torch_traces_is_refused_and_never_a_constant():
    f, x = jax2torch(jnp.sin), torch.ones(3)
    fake = FakeTensorMode()
    with fake:
        y = torch.ones(3)
        with pytest.raises(RuntimeError, match="cannot be traced, exported or run on fake tensors"):
            f(y)
    with pytest.raises(TypeError, match=r"^tensors must have memory of their own, got FakeTensor: "):
        f(y)
    for trace in (make_fx(f), lambda x: torch.func.linearize(f, x), lambda x: torch.jit.trace(f, (x,))):
        with pytest.raises(RuntimeError, match="cannot be traced, exported or run on fake tensors"):
            trace(x)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(f(x), x.sin())


class FakeDevice(NamedTuple):
    local_hardware_id: int

    def __str__(self):
        return f"cuda:{self.local_hardware_id}"


def test_errors_of_devices(monkeypatch):
    jax_device.cache_clear()

    def missing(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", missing)
    with pytest.raises(RuntimeError, match=r"this JAX has no cuda platform: pip install 'jax\[cuda13\]'"):
        jax_device(torch.device("cuda:0"))
    monkeypatch.setattr(jax, "local_devices", lambda backend: [FakeDevice(0), FakeDevice(1)])
    assert jax_device(torch.device("cuda:1")).local_hardware_id == 1
    with pytest.raises(RuntimeError, match=r"on cuda:3, which JAX does not see, only cuda:0, cuda:1"):
        jax_device(torch.device("cuda:3"))
    jax_device.cache_clear()


def test_a_missing_torch_is_one_sentence():
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "try:\n    import flash_attention_jax.torch\nexcept ImportError as error:\n    print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip().endswith("needs PyTorch, which is not installed: pip install torch")
