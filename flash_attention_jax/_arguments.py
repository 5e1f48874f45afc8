"""Every rule about the arguments of an attention call, applied once: nothing below validates again."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from flash_attention_jax._problem import Operands, Order, Problem

FLOATS = ("float16", "bfloat16", "float32", "float64")
PRECISIONS = ("default", "high", "highest")

_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_ARRAY = "a JAX or NumPy array"
# What each array's dtype must be, in words, and the dtypes that are.
_DTYPES: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("q", "k", "v", "bias"), (f"of dtype {', '.join(FLOATS)}", FLOATS)),
    "scale": ("a real number or a scalar array of a floating dtype", FLOATS),
    "mask": ("of dtype bool", ("bool",)),
    "key_mask": ("bool or 0/1", ("bool", *_INTEGERS, *FLOATS)),
    **dict.fromkeys(("segment_ids", "lengths"), ("of an integer dtype", _INTEGERS)),
    "q_offset": ("an int or an array of dtype int32", _INTEGERS),
}
# Positions are int32, so that their differences must be.
_FARTHEST = 2**30
_UNBOUNDED = 2**31 - 1
_INT32 = np.iinfo(np.int32)
_LARGEST = float(np.finfo(np.float32).max)
# Within these, x / softcap neither overflows nor vanishes for logits of float32.
_SOFTCAPS = (1e-30, 1e30)


def fail(name: str, must: str, was: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raises the one form that every argument error has."""
    raise error(f"{name} must be {must}, got {was}")


def normalize(
    operands: Operands,
    segment_ids: Any = None,
    *,
    causal: bool = False,
    window: Any = None,
    scale: Any = None,
    softcap: Any = None,
    precision: Any = None,
    deterministic: bool = False,
    order: Order = "BNTD",
    abstract: bool = False,
    names: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Problem, Operands, Any]:
    """Checks a call and describes it.

    Args:
        operands: q, k, v, bias, mask, key_mask and q_offset as the caller gave them.
        segment_ids: None, one array or a pair.
        order: memory order of q, k and v.
        abstract: whether `jax.ShapeDtypeStruct`s stand for arrays.
        names: what the caller calls q, k, v, causal and window, where it is not that.

    Returns:
        The problem, the raw arrays, and the scale when it is an array (else None).

    Raises:
        ValueError: for a wrong shape or value.
        TypeError: for a wrong dtype or type.
    """
    ops = operands._replace(
        **{
            name: checked(name, x, abstract, shown=names.get(name))
            for name, x in operands._asdict().items()
            if (x is not None or name in ("q", "k", "v")) and name != "q_offset"
        }
    )
    shown = _Names(*(names.get(name, name) for name in _Names._fields))
    sizes, batch = _sizes(ops, order, shown)
    for name, x in ((shown.k, ops.k), (shown.v, ops.v)):
        if x.dtype != ops.q.dtype:
            fail(name, f"of {shown.q}'s dtype {ops.q.dtype}", x.dtype, TypeError)
    for name, flag in ((shown.causal, causal), ("deterministic", deterministic)):
        if not isinstance(flag, bool | np.bool_):
            fail(name, "True or False", repr(flag), TypeError)
    left, right = _window(window, shown.window)
    if causal:
        right = 0 if right is None else min(right, 0)
    segments, ops = _segments(segment_ids, ops, sizes, batch, abstract)
    pair = (sizes["N"], sizes["T"], sizes["S"])
    static_offset, offsets, ops = _offset(ops, sizes, batch, causal or window is not None, abstract)
    left, right = _useful_band(left, right, static_offset, offsets, sizes)
    static_scale, array_scale = _scale(scale, sizes["D"], str(ops.q.dtype), abstract)
    problem = Problem(
        **sizes,
        dtype=str(ops.q.dtype),
        order=order,
        scale=static_scale,
        softcap=_softcap(softcap),
        left=left,
        right=right,
        q_offset=static_offset if (left, right) != (None, None) else None,
        precision=_precision(precision),
        bias=_pair_shape("bias", ops.bias, batch, pair),
        bias_dtype=None if ops.bias is None else str(ops.bias.dtype),
        mask=_pair_shape("mask", ops.mask, batch, pair),
        key_mask=None if ops.key_mask is None else _vector_shape("key_mask", ops.key_mask, batch, sizes["S"]),
        segments=segments,
        offsets=offsets if (left, right) != (None, None) else None,
        deterministic=bool(deterministic),
        amid_transfers=False,
    )
    if problem.offsets is None:
        ops = ops._replace(q_offset=None)
    return problem, ops, array_scale


class _Names(NamedTuple):
    """What the caller calls its arguments."""

    q: str
    k: str
    v: str
    causal: str
    window: str


def checked(role: str, x: Any, abstract: bool = False, what: str = _ARRAY, shown: str | None = None) -> Any:
    """Checks type and dtype, and that a concrete array keeps its values on the way into JAX.

    Args:
        role: which argument it is; errors call it `shown`, if given.
    """
    (must, dtypes), name = _DTYPES[role], shown or role
    if not isinstance(x, jax.Array | jax.ShapeDtypeStruct) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    kinds = jax.Array | np.ndarray | np.generic
    if not isinstance(x, kinds | jax.ShapeDtypeStruct if abstract else kinds):
        kind = type(x)
        full = f"{kind.__module__}.{kind.__qualname__}"
        fail(name, what, full if what == _ARRAY else kind.__name__, TypeError)
    if str(x.dtype) not in dtypes:
        fail(name, must, x.dtype, TypeError)
    numpy = isinstance(x, np.ndarray | np.generic)
    if role == "key_mask":
        return np.not_equal(x, 0) if numpy else x
    if x.dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        fail(name, "float32 or smaller unless jax_enable_x64 is on", "float64", TypeError)
    if numpy and x.dtype.kind in "iu" and x.size:
        low, high = int(np.min(x)), int(np.max(x))
        if not _INT32.min <= low <= high <= _INT32.max:
            fail(name, "within the range of int32", f"values from {low} to {high}")
        if role == "q_offset" and not -_FARTHEST < low <= high < _FARTHEST:
            fail(name, "of a magnitude below 2**30", f"values from {low} to {high}")
    return x


def _sizes(ops: Operands, order: Order, names: _Names) -> tuple[dict[str, int], tuple[int, ...]]:
    least = 2 if order == "BNTD" else 3
    layout = "(*batch, [N,] T, D)" if order == "BNTD" else "(*batch, T, N, D)"
    q, k, v = ops.q, ops.k, ops.v
    if q.ndim < least:
        fail(names.q, f"an array of shape {layout}", f"shape {q.shape}")
    for name, x in ((names.k, k), (names.v, v)):
        if x.ndim != q.ndim:
            fail(name, f"an array with as many axes as {names.q} ({q.ndim})", f"shape {x.shape}")
        if x.shape[:-3] != q.shape[:-3]:
            fail(name, f"of {names.q}'s batch shape {q.shape[:-3]}", f"shape {x.shape}")

    def heads_and_length(x):
        if x.ndim == 2:
            return 1, x.shape[0]
        return x.shape[-3:-1] if order == "BNTD" else x.shape[-3:-1][::-1]

    (N, T), (K, S) = heads_and_length(q), heads_and_length(k)
    if k.shape[-1] != q.shape[-1]:
        fail(names.k, f"of {names.q}'s head dim D = {q.shape[-1]}", f"shape {k.shape}")
    if heads_and_length(v) != (K, S):
        fail(names.v, f"of {names.k}'s heads and length (K, S) = {(K, S)}", f"shape {v.shape}")
    if (K == 0 and N) or (K and N % K):
        fail(names.k, f"of a head count K that divides {names.q}'s N = {N}", f"K = {K}")
    for name, x in ((names.q, q), (names.v, v)):
        if x.shape[-1] == 0:
            fail(name, "of a head dim of at least 1", f"shape {x.shape}")
    batch = q.shape[:-3]
    sizes = dict(B=math.prod(batch), N=N, K=K, T=T, S=S, D=q.shape[-1], Dv=v.shape[-1])
    return sizes, batch


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    tail = full[len(full) - len(shape) :]
    return len(shape) <= len(full) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))


def _lead(shape: tuple[int, ...], batch: tuple[int, ...]) -> int:
    """The canonical size of the batch axis of an operand with this batch shape."""
    return 1 if math.prod(shape) == 1 else math.prod(batch)


def _pair_shape(name, x, batch, pair) -> tuple[int, int, int, int] | None:
    if x is None:
        return None
    full = (*batch, *pair)
    if not _broadcasts(x.shape, full):
        fail(name, f"broadcastable to (*batch, N, T, S) = {full}", f"shape {x.shape}")
    padded = (1,) * (len(full) - x.ndim) + x.shape
    return (_lead(padded[:-3], batch), *padded[-3:])


def _vector_shape(name, x, batch, length) -> tuple[int, int]:
    full = (*batch, length)
    if not _broadcasts(x.shape, full):
        fail(name, f"broadcastable to (*batch, S) = {full}", f"shape {x.shape}")
    return _lead(x.shape[:-1], batch), length


def _segment_shape(axis, x, batch, length) -> tuple[int, int]:
    """Like `_vector_shape`, but the last axis must not broadcast."""
    full = (*batch, length)
    if x.ndim == 0 or x.shape[-1] != length:
        fail("segment_ids", f"of shape (*batch, {axis}) = {full}", f"shape {x.shape}")
    if not _broadcasts(x.shape, full):
        fail("segment_ids", f"broadcastable to (*batch, {axis}) = {full}", f"shape {x.shape}")
    return _lead(x.shape[:-1], batch), length


def _segments(segment_ids, ops: Operands, sizes, batch, abstract):
    if segment_ids is None:
        return None, ops
    pair = isinstance(segment_ids, tuple | list)
    if pair and len(segment_ids) != 2:
        fail("segment_ids", "an array or a pair (of queries, of keys)", f"{len(segment_ids)} items")
    if not pair and sizes["T"] != sizes["S"]:
        lengths = f"T = {sizes['T']} and S = {sizes['S']}"
        fail("segment_ids", "a pair (of queries, of keys) where T and S differ", f"one array, {lengths}")
    given = segment_ids if pair else (segment_ids, segment_ids)
    of_q, of_kv = (checked("segment_ids", x, abstract) for x in given)
    shapes = (
        _segment_shape("T", of_q, batch, sizes["T"]),
        _segment_shape("S", of_kv, batch, sizes["S"]),
    )
    return shapes, ops._replace(q_segments=of_q, kv_segments=of_kv)


def _is_int(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool | np.bool_)


def _window(window: Any, name: str) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    sides = (window, window) if _is_int(window) else window
    what = "None, an int, or a pair (left, right) of ints or None, each at least 0"
    if not isinstance(sides, tuple | list):
        fail(name, what, repr(window), TypeError)
    if any(side is not None and not _is_int(side) for side in sides):
        fail(name, what, repr(window), TypeError)
    if len(sides) != 2 or any(side is not None and side < 0 for side in sides):
        fail(name, what, repr(window))
    left, right = (None if w is None or w >= _UNBOUNDED else int(w) for w in sides)
    return left, right


def _offset(ops: Operands, sizes, batch, used: bool, abstract: bool):
    """The static offset, the canonical shape of an array one, and the operands with the latter."""
    x = ops.q_offset
    if x is None:
        return sizes["S"] - sizes["T"], None, ops
    if not used:
        shown = f"shape {x.shape}" if hasattr(x, "shape") else x
        fail("q_offset", "None without causal or window, which alone use it", shown)
    if _is_int(x):
        if not -_FARTHEST < x < _FARTHEST:
            fail("q_offset", "of a magnitude below 2**30", x)
        return int(x), None, ops._replace(q_offset=None)
    x = checked("q_offset", x, abstract, "an int or an array of dtype int32")
    if not _broadcasts(x.shape, batch):
        fail("q_offset", f"broadcastable to the batch shape {batch}", f"shape {x.shape}")
    return None, (_lead(x.shape, batch),), ops._replace(q_offset=x)


def _useful_band(left, right, offset, offsets, sizes):
    """Drops a side of the band that hides nothing, so that such a problem counts as unmasked."""
    if offsets is None:
        if right is not None and sizes["S"] - 1 <= offset + right:
            right = None
        if left is not None and sizes["T"] - 1 + offset <= left:
            left = None
    return left, right


def _scale(scale: Any, head_dim: int, dtype: str, abstract: bool) -> tuple[float, Any]:
    if scale is None:
        return head_dim**-0.5, None
    if isinstance(scale, np.ndarray) and not scale.ndim and str(scale.dtype) in FLOATS:
        scale = scale.item()
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        number = _finite("scale", "finite", scale)
        if dtype != "float64" and abs(number) > _LARGEST:
            fail("scale", f"of at most {_LARGEST:.3g}", scale)
        return number, None
    scale = checked("scale", scale, abstract, "a real number or a scalar array")
    if scale.ndim:
        fail("scale", "a real number or a scalar array", f"shape {scale.shape}")
    return 1.0, scale


def _softcap(softcap: Any) -> float | None:
    if softcap is None:
        return None
    what = "None or a positive number"
    if not isinstance(softcap, numbers.Real) or isinstance(softcap, bool):
        fail("softcap", what, type(softcap).__name__, TypeError)
    cap = _finite("softcap", what, softcap)
    if cap <= 0:
        fail("softcap", what, softcap)
    if not _SOFTCAPS[0] <= cap <= _SOFTCAPS[1]:
        fail("softcap", f"None or from {_SOFTCAPS[0]} to {_SOFTCAPS[1]}", softcap)
    return cap


def _finite(name: str, what: str, x: Any) -> float:
    try:
        result = float(x)
    except OverflowError:
        fail(name, what, x)
    if not math.isfinite(result):
        fail(name, what, x)
    return result


def _precision(precision: Any) -> str:
    what = f"None, {', '.join(map(repr, PRECISIONS))} or a jax.lax.Precision"
    if precision is None:
        return "highest"
    if isinstance(precision, jax.lax.Precision):
        return precision.name.lower()
    if not isinstance(precision, str):
        fail("precision", what, type(precision).__name__, TypeError)
    if precision not in PRECISIONS:
        fail("precision", what, repr(precision))
    return precision
