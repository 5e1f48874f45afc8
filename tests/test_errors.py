"""Every error of the public functions, and what must not be one."""

import ast
import dataclasses
import fractions
import functools
import inspect
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import (
    Unsupported,
    _api,
    _arguments,
    _explain,
    _problem,
    attention,
    explain,
    flash_attention,
)
from flash_attention_jax._api import attention_and_lse
from flash_attention_jax._dispatch import IMPLEMENTATIONS

RNG = np.random.default_rng(0)
FUNCTIONS = {"flash_attention": flash_attention, "attention": attention, "explain": explain}
# Two axes of which no two have one size: batch 2, N = 6, K = 3, T = 5, S = 7, D = 4, Dv = 8.
GOOD = {
    "q": RNG.standard_normal((2, 6, 5, 4)).astype(np.float32),
    "k": RNG.standard_normal((2, 3, 7, 4)).astype(np.float32),
    "v": RNG.standard_normal((2, 3, 7, 8)).astype(np.float32),
}
SHORT = {name: x[0, 0] for name, x in GOOD.items()}
SQUARE = {"q": GOOD["q"][:, :3], "k": GOOD["k"][:, :, :5], "v": GOOD["v"][:, :, :5]}


def f32(*shape):
    return np.ones(shape, np.float32)


def i32(*shape):
    return np.zeros(shape, np.int32)


class Torchlike:
    """What duck typing takes for an array: shape, dtype, ndim and conversion to NumPy."""

    shape, ndim, dtype = (2, 6, 5, 4), 4, "torch.float32"

    def __array__(self, dtype=None, copy=None):
        return f32(*self.shape)


class Convertible:
    """An object that JAX knows how to turn into an array."""

    def __init__(self, x):
        self.x = x

    def __jax_array__(self):
        return jnp.asarray(self.x)


TORCHLIKE = f"{Torchlike.__module__}.Torchlike"
FLOATS = "of dtype float16, bfloat16, float32, float64"
ARRAY = "a JAX or NumPy array"
WINDOW = "None, an int, or a pair (left, right) of ints or None, each at least 0"
OFFSET = "an int or an array of dtype int32"
SCALE = "a real number or a scalar array"
SOFTCAP = "None or a positive number"
PRECISION = "None, 'default', 'high', 'highest' or a jax.lax.Precision"
X32 = "float32 or smaller unless jax_enable_x64 is on"
PAIR = "broadcastable to (*batch, N, T, S) = (2, 6, 5, 7)"


@dataclasses.dataclass(frozen=True)
class Bad:
    """One bad argument, or more, beside good ones: the error and its whole text."""

    name: str
    arguments: dict
    error: type
    text: str


def bad(name, error, must, was, argument=None, **arguments):
    """A bad call, whose error names `argument`, by default the first word of `name`."""
    argument = argument or name.split()[0]
    return Bad(name, arguments, error, f"{argument} must be {must}, got {was}")


def shared_rows():
    """What is said of arguments that are no arrays, or too wide ones."""
    for name in ("q", "k", "v", "bias", "mask", "key_mask"):
        for what, x, was in (
            ("list", [[1.0]], "builtins.list"),
            ("string", "abc", "builtins.str"),
            ("number", 1.0, "builtins.float"),
            ("object", object(), "builtins.object"),
            ("torch-like", Torchlike(), TORCHLIKE),
        ):
            yield bad(f"{name} {what}", TypeError, ARRAY, was, **{name: x})
    for name in ("q", "k", "v"):
        yield bad(f"{name} None", TypeError, ARRAY, "builtins.NoneType", **{name: None})
    for name in ("q", "k", "v"):
        wide = GOOD[name].astype(np.float64)
        yield bad(f"{name} float64 without x64", TypeError, X32, "float64", **{name: wide})


BAD = [
    *shared_rows(),
    # q, k, v: shapes
    *(
        bad(
            f"q of {len(shape)} axes",
            ValueError,
            "an array of shape (*batch, [N,] T, D)",
            f"shape {shape}",
            q=f32(*shape),
        )
        for shape in ((), (4,))
    ),
    bad("k of fewer axes", ValueError, "an array with as many axes as q (4)", "shape (7, 4)", k=f32(7, 4)),
    bad(
        "v of fewer axes",
        ValueError,
        "an array with as many axes as q (4)",
        "shape (3, 7, 8)",
        v=f32(3, 7, 8),
    ),
    bad(
        "v of more axes",
        ValueError,
        "an array with as many axes as q (4)",
        "shape (1, 2, 3, 7, 8)",
        v=f32(1, 2, 3, 7, 8),
    ),
    bad("k of another batch", ValueError, "of q's batch shape (2,)", "shape (3, 3, 7, 4)", k=f32(3, 3, 7, 4)),
    bad("k of batch 1", ValueError, "of q's batch shape (2,)", "shape (1, 3, 7, 4)", k=f32(1, 3, 7, 4)),
    bad("v of another batch", ValueError, "of q's batch shape (2,)", "shape (4, 3, 7, 8)", v=f32(4, 3, 7, 8)),
    bad("k of another D", ValueError, "of q's head dim D = 4", "shape (2, 3, 7, 5)", k=f32(2, 3, 7, 5)),
    bad(
        "v of other heads",
        ValueError,
        "of k's heads and length (K, S) = (3, 7)",
        "shape (2, 1, 7, 8)",
        v=f32(2, 1, 7, 8),
    ),
    bad(
        "v of another length",
        ValueError,
        "of k's heads and length (K, S) = (3, 7)",
        "shape (2, 3, 6, 8)",
        v=f32(2, 3, 6, 8),
    ),
    *(
        bad(
            f"k of {heads} heads",
            ValueError,
            "of a head count K that divides q's N = 6",
            f"K = {heads}",
            k=f32(2, heads, 7, 4),
            v=f32(2, heads, 7, 8),
        )
        for heads in (0, 4, 12)
    ),
    bad(
        "q of head dim 0",
        ValueError,
        "of a head dim of at least 1",
        "shape (2, 6, 5, 0)",
        q=f32(2, 6, 5, 0),
        k=f32(2, 3, 7, 0),
    ),
    bad(
        "v of head dim 0", ValueError, "of a head dim of at least 1", "shape (2, 3, 7, 0)", v=f32(2, 3, 7, 0)
    ),
    # dtypes of the arrays
    *(
        bad(f"q {dtype}", TypeError, FLOATS, dtype, q=jnp.ones((2, 6, 5, 4), dtype))
        for dtype in ("int32", "bool", "complex64", "float8_e4m3fn")
    ),
    *(
        bad(f"q NumPy {np.dtype(dtype)}", TypeError, FLOATS, np.dtype(dtype), q=np.ones((2, 6, 5, 4), dtype))
        for dtype in (np.int64, np.complex128, object, ">f4", np.longdouble)
    ),
    bad("k float16", TypeError, "of q's dtype float32", "float16", k=GOOD["k"].astype(np.float16)),
    bad("v bfloat16", TypeError, "of q's dtype float32", "bfloat16", v=jnp.asarray(GOOD["v"], jnp.bfloat16)),
    bad(
        "v int32",
        TypeError,
        "of dtype float16, bfloat16, float32, float64",
        "int32",
        v=GOOD["v"].astype(np.int32),
    ),
    bad("bias int32", TypeError, FLOATS, "int32", bias=i32(5, 7)),
    bad("bias bool", TypeError, FLOATS, "bool", bias=np.ones((5, 7), bool)),
    bad("bias complex64", TypeError, FLOATS, "complex64", bias=np.ones((5, 7), np.complex64)),
    bad("bias float64 without x64", TypeError, X32, "float64", bias=np.ones((5, 7))),
    bad("bias int64 beyond int32", TypeError, FLOATS, "int64", bias=np.full((5, 7), 2**40)),
    bad("mask int32", TypeError, "of dtype bool", "int32", mask=i32(5, 7)),
    bad("mask float32", TypeError, "of dtype bool", "float32", mask=f32(5, 7)),
    # Neither x64 nor int32's range is what is wrong here.
    bad("mask float64", TypeError, "of dtype bool", "float64", mask=np.ones((5, 7))),
    bad("mask int64 beyond int32", TypeError, "of dtype bool", "int64", mask=np.full((5, 7), 2**40)),
    bad("key_mask complex64", TypeError, "bool or 0/1", "complex64", key_mask=np.ones(7, np.complex64)),
    # bias, mask, key_mask: shapes
    *(
        bad(f"{name} {shape}", ValueError, PAIR, f"shape {shape}", **{name: np.ones(shape, dtype)})
        for name, dtype in (("bias", np.float32), ("mask", bool))
        for shape in ((7, 5), (6,), (3, 5, 7), (3, 1, 5, 7), (2, 6, 5, 0), (1, 2, 6, 5, 7), (2, 7))
    ),
    *(
        bad(
            f"key_mask {shape}",
            ValueError,
            "broadcastable to (*batch, S) = (2, 7)",
            f"shape {shape}",
            key_mask=np.ones(shape, bool),
        )
        for shape in ((5,), (2,), (3, 7), (0,), (1, 2, 7))
    ),
    # segment_ids
    *(
        bad(
            f"segment_ids of {count} items",
            ValueError,
            "an array or a pair (of queries, of keys)",
            f"{count} items",
            segment_ids=kind([i32(2, 5)] * count),
        )
        for count, kind in ((0, tuple), (1, list), (3, tuple))
    ),
    bad(
        "segment_ids one where T and S differ",
        ValueError,
        "a pair (of queries, of keys) where T and S differ",
        "one array, T = 5 and S = 7",
        segment_ids=i32(2, 5),
    ),
    bad("segment_ids string", TypeError, ARRAY, "builtins.str", **SQUARE, segment_ids="abcde"),
    bad("segment_ids lists", TypeError, ARRAY, "builtins.list", segment_ids=([0] * 5, [0] * 7)),
    bad("segment_ids and None", TypeError, ARRAY, "builtins.NoneType", segment_ids=(i32(2, 5), None)),
    bad("segment_ids torch-like", TypeError, ARRAY, TORCHLIKE, **SQUARE, segment_ids=Torchlike()),
    bad(
        "segment_ids bool",
        TypeError,
        "of an integer dtype",
        "bool",
        **SQUARE,
        segment_ids=np.ones((2, 5), bool),
    ),
    bad(
        "segment_ids float32", TypeError, "of an integer dtype", "float32", segment_ids=(i32(2, 5), f32(2, 7))
    ),
    bad(
        "segment_ids float64",
        TypeError,
        "of an integer dtype",
        "float64",
        **SQUARE,
        segment_ids=np.ones((2, 5)),
    ),
    *(
        bad(
            f"segment_ids beyond int32 {far}",
            ValueError,
            "within the range of int32",
            f"values from {min(far, 0)} to {max(far, 0)}",
            **SQUARE,
            segment_ids=np.array([0, 0, 0, 0, far]),
        )
        for far in (2**31, -(2**31) - 1)
    ),
    *(
        bad(
            f"segment_ids of queries {shape}",
            ValueError,
            "of shape (*batch, T) = (2, 5)",
            f"shape {shape}",
            segment_ids=(i32(*shape), i32(2, 7)),
        )
        for shape in ((), (1,), (2, 1), (2, 7))
    ),
    bad(
        "segment_ids of keys (2, 5)",
        ValueError,
        "of shape (*batch, S) = (2, 7)",
        "shape (2, 5)",
        segment_ids=(i32(2, 5), i32(2, 5)),
    ),
    bad(
        "segment_ids of queries of another batch",
        ValueError,
        "broadcastable to (*batch, T) = (2, 5)",
        "shape (3, 5)",
        segment_ids=(i32(3, 5), i32(2, 7)),
    ),
    bad(
        "segment_ids of keys of another batch",
        ValueError,
        "broadcastable to (*batch, S) = (2, 7)",
        "shape (4, 7)",
        segment_ids=(i32(2, 5), i32(4, 7)),
    ),
    # causal, window, q_offset
    *(
        bad(f"causal {x!r}", TypeError, "True or False", repr(x), causal=x)
        for x in (1, 0, None, "yes", np.array(True), jnp.bool_(True))
    ),
    *(
        bad(f"window {x!r}", TypeError, WINDOW, repr(x), window=x)
        for x in (True, np.True_, 1.5, (1.0, 2), (True, 1), (None, False), "ab", {1, 2}, np.array([1, 2]))
    ),
    *(
        bad(f"window {x!r}", ValueError, WINDOW, repr(x), window=x)
        for x in (-1, np.int64(-3), (-1, None), (2, -2), (1, 2, 3), (1,), (), [None])
    ),
    # "got one" would say of 3 that it was 1.
    bad("q_offset unused", ValueError, "None without causal or window, which alone use it", "3", q_offset=3),
    *(
        bad(f"q_offset {x}", ValueError, "of a magnitude below 2**30", x, causal=True, q_offset=x)
        for x in (2**30, -(2**30), 10**30)
    ),
    *(
        bad(f"q_offset {type(x).__name__}", TypeError, OFFSET, type(x).__name__, causal=True, q_offset=x)
        for x in (1.0, np.float32(1), True, np.True_, "1", [1, 2], (1, 2), 1j, Torchlike())
    ),
    *(
        bad(f"q_offset of {dtype}", TypeError, OFFSET, dtype, window=2, q_offset=np.ones(2, dtype))
        for dtype in ("float32", "float64", "bool", "complex64", "object")
    ),
    *(
        bad(
            f"q_offset {shape}",
            ValueError,
            "broadcastable to the batch shape (2,)",
            f"shape {shape}",
            causal=True,
            q_offset=i32(*shape),
        )
        for shape in ((3,), (1, 2), (2, 1), (0,))
    ),
    bad(
        "q_offset int64 beyond int32",
        ValueError,
        "within the range of int32",
        "values from 1 to 1099511627776",
        causal=True,
        q_offset=np.array([1, 2**40]),
    ),
    bad(
        "q_offset array far away",
        ValueError,
        "of a magnitude below 2**30",
        f"values from 1 to {2**30}",
        causal=True,
        q_offset=np.array([1, 2**30]),
    ),
    # scale, softcap, precision
    bad("scale beyond float", ValueError, "finite", 10**400, scale=10**400),
    bad("scale beyond float32", ValueError, "of at most 3.4e+38", 1e39, scale=1e39),
    *(
        bad(f"scale {x}", ValueError, "finite", x, scale=x)
        for x in (np.nan, np.inf, -np.inf, np.float32("nan"))
    ),
    *(
        bad(f"scale {type(x).__name__}", TypeError, SCALE, type(x).__name__, scale=x)
        for x in (1j, "1", [1.0], True, object(), Torchlike())
    ),
    *(
        bad(
            f"scale of {np.dtype(x)}",
            TypeError,
            f"{SCALE} of a floating dtype",
            np.dtype(x),
            scale=np.ones((), x),
        )
        for x in ("int32", "bool", "complex64", "object")
    ),
    bad("scale np.True_", TypeError, f"{SCALE} of a floating dtype", "bool", scale=np.True_),
    *(bad(f"scale {s}", ValueError, SCALE, f"shape {s}", scale=f32(*s)) for s in ((1,), (2, 1), (0,))),
    *(
        bad(f"softcap {x}", ValueError, SOFTCAP, x, softcap=x)
        for x in (0, 0.0, -1, -0.5, np.nan, np.inf, -np.inf, np.float32(0))
    ),
    *(
        bad(f"softcap {type(x).__name__}", TypeError, SOFTCAP, type(x).__name__, softcap=x)
        for x in (True, "1", 1j, np.array(1.0), [1.0], np.True_)
    ),
    *(
        bad(f"softcap {x}", ValueError, "None or from 1e-30 to 1e+30", x, softcap=x)
        for x in (1e300, 1e31, 1e-31)
    ),
    *(
        bad(f"deterministic {x!r}", TypeError, "True or False", repr(x), deterministic=x)
        for x in (None, 1, "yes")
    ),
    *(bad(f"precision {x!r}", ValueError, PRECISION, repr(x), precision=x) for x in ("fast", "HIGHEST", "")),
    *(
        bad(f"precision {type(x).__name__}", TypeError, PRECISION, type(x).__name__, precision=x)
        for x in (3, True, ("high", "high"), np.float32, jax.lax.DotAlgorithmPreset.DEFAULT)
    ),
]
IMPLEMENTATION = "None or one of 'hopper', 'xla', 'reference'"
ELSEWHERE = "it runs on CUDA devices of compute capability 9.0, not on cpu"
BAD_IMPLEMENTATION = [
    *(
        bad(f"implementation {x!r}", ValueError, IMPLEMENTATION, repr(x), implementation=x)
        for x in ("x", "", "XLA", "xla ")
    ),
    *(
        bad(f"implementation {x!r}", TypeError, IMPLEMENTATION, repr(x), implementation=x)
        for x in (1, True, ["xla"], {"xla": 1})
    ),
]
PLATFORM = "None, 'cpu', 'cuda', 'rocm' or 'tpu'"
BAD_PLATFORM = [
    *(bad(f"platform {x!r}", ValueError, PLATFORM, repr(x), platform=x) for x in ("gpu", "", "CPU", "x")),
    *(bad(f"platform {x!r}", TypeError, PLATFORM, repr(x), platform=x) for x in (1, ["cpu"])),
]
EVERY = [(name, row) for row in BAD for name in FUNCTIONS]
EVERY += [("flash_attention", row) for row in BAD_IMPLEMENTATION]
EVERY += [("explain", row) for row in BAD_PLATFORM]
EVERY_ID = [f"{name}-{row.name}" for name, row in EVERY]


def assert_fails(row, function, *arguments, **named):
    """Asserts that a call raises the row's error: its very type, its whole text."""
    # JAX adds notes to errors that pass through it, which `match` reads and `str` does not.
    with pytest.raises(row.error, match=f"^{re.escape(row.text)}") as info:
        function(*arguments, **named)
    assert (type(info.value), str(info.value)) == (row.error, row.text)


@pytest.fixture
def no_work(monkeypatch):
    """Makes any work that follows the checks an error of its own."""

    def work(*arguments):
        pytest.fail("work began before the error")

    monkeypatch.setattr(_api, "_flash", work)
    monkeypatch.setattr(_api, "_plain", work)
    monkeypatch.setattr(_explain, "choose", work)
    monkeypatch.setattr(_explain, "device_of", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("name", "row"), EVERY, ids=EVERY_ID)
def test_bad_arguments(name, row):
    assert_fails(row, FUNCTIONS[name], **GOOD | row.arguments)


TRACED = ("float32", "float16", "int32", "bool", "complex64")


def traceable(x):
    """Whether tracing x changes nothing about it but that its values are unknown."""
    return isinstance(x, jax.Array) or (isinstance(x, np.ndarray) and str(x.dtype) in TRACED)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("name", "trace"),
    [("flash_attention", lambda f, x: jax.jit(f)(x)), ("attention", jax.eval_shape)],
    ids=["flash_attention-jit", "attention-eval_shape"],
)
@pytest.mark.parametrize("row", [x for x in BAD if not x.name.startswith("causal")], ids=lambda row: row.name)
def test_bad_arguments_while_tracing(row, name, trace):
    arguments = GOOD | row.arguments
    traced = {n: x for n, x in arguments.items() if traceable(x)}
    rest = {n: x for n, x in arguments.items() if n not in traced}
    assert_fails(row, trace, lambda x: FUNCTIONS[name](**x, **rest), traced)


@pytest.mark.parametrize("name", ["flash_attention", "attention"])
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad], ids=["jit", "vmap", "grad"])
def test_bad_arguments_in_transformations(name, transform):
    row = bad("softcap -1", ValueError, SOFTCAP, -1)
    assert_fails(row, transform(lambda q, k, v: FUNCTIONS[name](q, k, v, softcap=-1)), *GOOD.values())


@pytest.mark.parametrize("name", ["flash_attention", "attention"])
@pytest.mark.parametrize(
    ("argument", "value", "must"),
    [
        ("causal", True, "True or False"),
        ("softcap", 1.0, SOFTCAP),
        ("window", 3, WINDOW),
        ("precision", 1, PRECISION),
    ],
)
def test_static_arguments_refuse_tracers(name, argument, value, must):
    def call(value):
        return FUNCTIONS[name](**GOOD, **{argument: value})

    with pytest.raises(TypeError, match=f"^{argument} must be {re.escape(must)}, got .*Trace"):
        jax.jit(call)(value)


def call_sites():
    """(module, line) of every call of `fail`."""
    for module in (_arguments, _api, _explain):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "fail":
                yield module.__name__, node.lineno


def test_every_call_of_fail_is_in_the_tables(monkeypatch):
    reached = set()

    def record(*arguments):
        frame = sys._getframe(1)
        reached.add((frame.f_globals["__name__"], frame.f_lineno))
        raise ValueError("reached")

    for module in (_arguments, _api, _explain):
        monkeypatch.setattr(module, "fail", record)
    for name, row in EVERY:
        with pytest.raises(Exception, match=r"."):
            FUNCTIONS[name](**GOOD | row.arguments)
    assert len(set(call_sites())) > 30
    assert sorted(set(call_sites()) - reached) == []


# Errors whose text has a part that is left open here.


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "x",
    [
        np.ones(7, object),
        np.full(7, "a"),
        np.zeros(7, "datetime64[s]"),
        np.ones(7, np.longdouble),
        np.ones(7, ">i4"),
        np.ones(7, ">f4"),
        jax.random.split(jax.random.key(0), 7),
    ],
    ids=lambda x: str(x.dtype),
)
def test_key_mask_of_a_dtype_that_is_no_number(name, x):
    with pytest.raises(TypeError, match=f"^key_mask must be .*, got {re.escape(str(x.dtype))}$"):
        FUNCTIONS[name](**GOOD, key_mask=x)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("argument", ["segment_ids", "scale"])
def test_dtypes_that_jax_lacks(name, argument):
    x = np.zeros((2, 5), ">i4") if argument == "segment_ids" else np.array(0.5, np.longdouble)
    with pytest.raises(TypeError, match=f"^{argument} must be .*, got {x.dtype}$"):
        FUNCTIONS[name](**SQUARE, **{argument: x})


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("argument", ["scale", "softcap"])
def test_numbers_beyond_float(name, argument):
    with pytest.raises(ValueError, match=f"^{argument} must be .*, got 10*$"):
        FUNCTIONS[name](**GOOD, **{argument: 10**400})


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("far", [2**31 - 1, 2**30, -(2**30), -(2**31)])
def test_offsets_in_a_numpy_array_are_as_near_as_an_int(name, far):
    with pytest.raises(ValueError, match=rf"^q_offset must be .*2\*\*30.*, got .*{far}"):
        FUNCTIONS[name](**GOOD, causal=True, q_offset=np.array([0, far], np.int32))


def test_stand_ins_for_arrays_are_for_explain_alone():
    x = jax.ShapeDtypeStruct((5, 4), "float32")
    assert explain(x, x, x).problem.T == 5
    for name in ("flash_attention", "attention"):
        row = bad("q stand-in", TypeError, ARRAY, "jax.ShapeDtypeStruct")
        assert_fails(row, FUNCTIONS[name], x, x, x)


# Implementations that refuse.


@pytest.fixture
def refusing(replaced_implementation):
    """Makes `xla` refuse; returns the names of the implementations that ran."""
    ran = []

    def spied(name, role):
        original = getattr(IMPLEMENTATIONS[name], role)

        def function(*arguments):
            ran.append(f"{name}.{role}")
            return original(*arguments)

        return function

    for name in tuple(IMPLEMENTATIONS):
        replaced_implementation(name, **{r: spied(name, r) for r in ("forward", "backward", "tangent")})
    replaced_implementation("xla", refuses=lambda p, device: f"head dim {p.D} on {device.platform} (of 3?)")
    return ran


REFUSAL = "implementation 'xla' cannot run this problem: head dim 4 on cpu (of 3?)"
TRANSFORMED = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(lambda *x: f(*x).out.sum()),
    "vmap": jax.vmap,
    "jvp": lambda f: lambda *x: jax.jvp(f, x, x),
    "lower": lambda f: lambda *x: jax.jit(f).lower(*x),
    "checkpoint": lambda f: jax.grad(lambda *x: jax.checkpoint(f)(*x).out.sum()),
}


@pytest.mark.parametrize("how", TRANSFORMED)
def test_an_implementation_that_refuses_raises_unsupported_and_nothing_runs(refusing, how):
    row = Bad(how, {}, Unsupported, REFUSAL)
    assert_fails(
        row, TRANSFORMED[how](functools.partial(flash_attention, implementation="xla")), *GOOD.values()
    )
    assert issubclass(Unsupported, NotImplementedError)
    assert refusing == []


def test_unsupported_again_when_asked_again(refusing):
    for _ in range(3):
        assert_fails(Bad("", {}, Unsupported, REFUSAL), flash_attention, **GOOD, implementation="xla")
    assert refusing == []


@pytest.mark.parametrize("requested", [None, "reference"])
def test_what_does_not_refuse_runs_forward_and_backward(refusing, requested):
    out, lse = flash_attention(**GOOD, implementation=requested)
    expected = attention_and_lse(**GOOD)
    np.testing.assert_allclose(out, expected.out, atol=1e-6)
    np.testing.assert_allclose(lse, expected.lse, atol=1e-6)
    jax.grad(lambda q: flash_attention(**GOOD | {"q": q}, implementation=requested).out.sum())(GOOD["q"])
    assert {"reference.forward", "reference.backward"} <= set(refusing)
    assert not any(x.startswith("xla") for x in refusing)


@pytest.mark.usefixtures("refusing")
def test_explain_tells_the_refusal_and_the_next():
    said = explain(**GOOD, platform="cpu")
    assert said.chosen == "reference"
    refusals = {"xla": "head dim 4 on cpu (of 3?)", "reference": None, "hopper": ELSEWHERE}
    assert said.refusals == refusals
    assert "head dim 4 on cpu (of 3?)" in str(said)


def test_on_a_cpu_kernels_refuse_and_nothing_else_does():
    said = explain(**GOOD, platform="cpu")
    assert said.chosen == "xla"
    assert said.refusals == {"xla": None, "reference": None, "hopper": ELSEWHERE}


# What is accepted.


def assert_same(arguments, expected):
    """Both functions take the arguments, and mean by them what `expected` are."""
    truth = attention_and_lse(**GOOD | expected)
    flash = flash_attention(**GOOD | arguments)
    np.testing.assert_allclose(flash.out, truth.out, atol=2e-6)
    np.testing.assert_allclose(flash.lse, truth.lse, atol=2e-6)
    np.testing.assert_allclose(attention(**GOOD | arguments), truth.out, atol=2e-6)
    assert explain(**GOOD | arguments).chosen == "xla"


SEGMENTS = (np.array([[0, 0, 1, 1, 2]] * 2, np.int32), np.array([[0, 0, 0, 1, 1, 2, 2]] * 2, np.int32))
OFFSETS = np.array([1, 2], np.int32)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        *(({"scale": x}, {"scale": 0.5}) for x in (np.float32(0.5), np.float16(0.5), np.float64(0.5))),
        *(
            ({"scale": x}, {"scale": 0.5})
            for x in (fractions.Fraction(1, 2), np.array(0.5), jnp.bfloat16(0.5))
        ),
        *(({"scale": x}, {"scale": 2.0}) for x in (2, np.int64(2), np.uint8(2))),
        ({"scale": 0}, {"scale": 0.0}),
        ({"scale": -1}, {"scale": -1.0}),
        *(({"softcap": x}, {"softcap": 2.0}) for x in (2, np.float32(2), np.int64(2))),
        *(
            ({"causal": True, "q_offset": x}, {"causal": True, "q_offset": 3})
            for x in (
                np.int64(3),
                np.int8(3),
                np.uint64(3),
                np.array(3),
                jnp.int32(3),
                i32(2) + 3,
                i32(1) + 3,
            )
        ),
        ({"causal": np.True_}, {"causal": True}),
        ({"causal": np.False_}, {}),
        *(({"window": x}, {"window": (2, 2)}) for x in (2, np.int64(2), [2, 2], (np.int8(2), 2))),
        *(({"window": x}, {}) for x in ((None, None), 2**31, 2**40, (10**30, None))),
        # A window was given, so that an offset has a meaning, if no effect.
        ({"window": 2**31, "q_offset": 3}, {}),
        ({"window": (None, 2**40), "q_offset": OFFSETS}, {}),
        ({"window": (None, None), "q_offset": 3}, {}),
        ({"window": 100, "q_offset": 3}, {}),
        *(
            ({"precision": x}, {})
            for x in ("highest", jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGH, "default")
        ),
        ({"bias": np.float32(1)}, {"bias": f32(6, 5, 7)}),
        ({"bias": np.ones((5, 7), np.float16)}, {"bias": f32(5, 7)}),
        ({"mask": np.True_}, {}),
        ({"segment_ids": list(SEGMENTS)}, {"segment_ids": SEGMENTS}),
        ({"segment_ids": tuple(x.astype(np.int64) for x in SEGMENTS)}, {"segment_ids": SEGMENTS}),
        ({"segment_ids": (SEGMENTS[0].astype(np.uint8), SEGMENTS[1])}, {"segment_ids": SEGMENTS}),
        ({"segment_ids": (SEGMENTS[0][0], SEGMENTS[1][:1])}, {"segment_ids": SEGMENTS}),
        ({"segment_ids": tuple(np.int64(x) + 2**31 - 5 for x in SEGMENTS)}, {"segment_ids": SEGMENTS}),
        ({"segment_ids": tuple(np.int64(x) - 2**31 for x in SEGMENTS)}, {"segment_ids": SEGMENTS}),
    ],
    ids=lambda x: " ".join(f"{name}={value}" for name, value in x.items()).replace("\n", "")[:60],
)
def test_accepted(arguments, expected):
    assert_same(arguments, expected)


KEY_MASK_DTYPES = ("int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64")


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (1, 7), (2, 1), (2, 7)], ids=str)
def test_key_mask_of_every_shape(shape):
    keep = RNG.random(shape) < 0.6
    full = np.broadcast_to(keep, (2, 7))[:, None, None, :]
    assert_same({"key_mask": keep}, {"mask": full})
    for dtype in ("int32", "float32"):
        problem, operands, _ = _arguments.normalize(_problem.Operands(**GOOD, key_mask=keep.astype(dtype)))
        canonical = _problem.arrange(problem, operands).key_mask
        assert canonical.dtype == np.bool_
        assert np.array_equal(np.broadcast_to(canonical, (2, 7)), full[:, 0, 0])


@pytest.mark.parametrize("dtype", KEY_MASK_DTYPES)
def test_key_mask_of_every_dtype(dtype):
    keep = np.array([1, 0, 1, 1, 0, 0, 1])
    seen = flash_attention(**SHORT, key_mask=keep.astype(jnp.dtype(dtype))).out
    np.testing.assert_allclose(seen, attention(**SHORT, mask=keep[None, :] != 0), atol=2e-6)


@pytest.mark.parametrize(
    ("name", "x", "rest"),
    [
        *((name, GOOD[name], {}) for name in GOOD),
        ("key_mask", np.array([1, 0, 1, 1, 0, 0, 1]), {}),
        ("bias", RNG.standard_normal((5, 7)).astype(np.float32), {}),
        ("mask", RNG.random((5, 7)) < 0.5, {}),
        ("q_offset", OFFSETS, {"causal": True}),
        ("scale", np.float32(0.5), {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_objects_that_convert_to_a_jax_array(name, x, rest):
    assert_same(rest | {name: Convertible(x)}, rest | {name: x})


def test_segment_ids_that_convert_to_a_jax_array():
    assert_same({"segment_ids": tuple(map(Convertible, SEGMENTS))}, {"segment_ids": SEGMENTS})


def test_a_convertible_object_is_checked_as_what_it_becomes():
    row = bad("mask", TypeError, "of dtype bool", "float32", mask=Convertible(f32(5, 7)))
    for function in FUNCTIONS.values():
        assert_fails(row, function, **GOOD | row.arguments)


@pytest.mark.parametrize("softcap", [1e30, 1e-30])
def test_extreme_softcaps_keep_their_meaning(softcap):
    # So wide a cap is no cap, and under so tight a one every logit is 0.
    zeros = {"q": GOOD["q"] * np.array([1, 0, 1, 0, 1], np.float32)[:, None]}
    assert_same(zeros | {"softcap": softcap}, zeros | ({} if softcap > 1 else {"scale": 0.0}))


def test_float64_is_accepted_with_x64():
    with jax.enable_x64(True):
        wide = {name: x.astype(np.float64) for name, x in GOOD.items()}
        out, lse = flash_attention(**wide, bias=np.zeros((5, 7)), key_mask=np.ones(7))
        assert (out.dtype, lse.dtype) == (np.float64, np.float64)
        np.testing.assert_allclose(out, attention(**wide), atol=1e-14)


# Empty axes.

EMPTY = {
    "B": ((0, 6, 5, 4), (0, 3, 7, 4), (0, 3, 7, 8)),
    "N": ((2, 0, 5, 4), (2, 3, 7, 4), (2, 3, 7, 8)),
    "N and K": ((2, 0, 5, 4), (2, 0, 7, 4), (2, 0, 7, 8)),
    "T": ((2, 6, 0, 4), (2, 3, 7, 4), (2, 3, 7, 8)),
    "S": ((2, 6, 5, 4), (2, 3, 0, 4), (2, 3, 0, 8)),
    "S of two axes": ((5, 4), (0, 4), (0, 8)),
    "T of two axes": ((0, 4), (7, 4), (7, 8)),
    "T and S": ((6, 0, 4), (3, 0, 4), (3, 0, 8)),
}
OPTIONS = {
    "nothing": lambda batch, T, S: {},
    "causal": lambda batch, T, S: {"causal": True, "q_offset": i32(*batch)},
    "masks": lambda batch, T, S: {
        "mask": np.ones((T, S), bool),
        "key_mask": np.ones((*batch, S), bool),
        "segment_ids": (i32(*batch, T), i32(*batch, S)),
        "window": (1, None),
        "softcap": 2.0,
    },
}


@pytest.mark.parametrize(("options", "dtype"), [*((x, "float32") for x in OPTIONS), ("nothing", "bfloat16")])
@pytest.mark.parametrize("shapes", EMPTY)
@pytest.mark.parametrize("function", [flash_attention, attention_and_lse], ids=["flash", "plain"])
def test_empty_axes(function, shapes, options, dtype):
    q, k, v = (jnp.ones(shape, dtype) for shape in EMPTY[shapes])
    T, S = q.shape[-2], k.shape[-2]
    rest = OPTIONS[options](q.shape[:-3], T, S)
    given = (q, k, v, jnp.ones((T, S), dtype), jnp.float32(0.5))

    def call(q, k, v, bias, scale):
        return tuple(function(q, k, v, bias=bias, scale=scale, **rest))

    (out, lse), pull = jax.vjp(call, *given)
    assert (out.shape, out.dtype) == ((*q.shape[:-1], 8), dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:-1], np.float32)
    assert not out.any()
    assert np.isneginf(lse).all()
    for gradient, x in zip(pull((jnp.ones_like(out), jnp.ones_like(lse))), given, strict=True):
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
        assert not gradient.any()


@pytest.mark.parametrize("shapes", EMPTY)
def test_empty_axes_are_explained_and_checked(shapes):
    q, k, v = (f32(*shape) for shape in EMPTY[shapes])
    assert explain(q, k, v).problem.empty
    row = bad("softcap -1", ValueError, SOFTCAP, -1)
    for function in FUNCTIONS.values():
        assert_fails(row, function, q, k, v, softcap=-1)
