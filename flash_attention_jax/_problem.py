"""Every rule about the meaning of an attention call, applied once.

`normalize` checks the arguments and splits them into a `Problem`, which is all that is static,
and the raw `Operands`. `arrange` gives the arrays their canonical shapes. Nothing below this module
validates again.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

Order = Literal["BNTD", "BTND"]

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
PRECISIONS = ("default", "high", "highest")
_INT32 = np.iinfo(np.int32)
# A window this wide hides nothing that int32 positions can express.
_UNBOUNDED = 2**30


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static about one attention call: the cache key and what `refuses` reads.

    The letters are those of `DESIGN.md`. Optional operands are described by their canonical shape
    (1 where they broadcast), or None when they are absent.

    Attributes:
        order: memory order of q, k, v and out. `lse` is (B, N, T) in both.
        left, right: key j is visible to the query at position p when -left <= j - p <= right;
            None is unbounded. Causal attention is `right=0`.
        q_offset: position of the first query; None when it comes as an array or has no effect.
        precision: of the matrix products on float32, "default", "high" or "highest".
        bias, mask: canonical shape (1|B, 1|N, 1|T, 1|S).
        key_mask: canonical shape (1|B, S).
        segments: canonical shapes (1|B, T) and (1|B, S).
        offsets: canonical shape (1|B,) of `q_offset` when it is an array.
    """

    B: int
    N: int
    K: int
    T: int
    S: int
    D: int
    Dv: int
    dtype: str
    order: Order
    scale: float
    softcap: float | None = None
    left: int | None = None
    right: int | None = None
    q_offset: int | None = None
    precision: str = "highest"
    bias: tuple[int, int, int, int] | None = None
    bias_dtype: str | None = None
    mask: tuple[int, int, int, int] | None = None
    key_mask: tuple[int, int] | None = None
    segments: tuple[tuple[int, int], tuple[int, int]] | None = None
    offsets: tuple[int] | None = None

    @property
    def G(self) -> int:
        """Query heads for each key/value head."""
        return self.N // self.K

    @property
    def accumulator(self) -> str:
        """Dtype of logits, softmax, sums and `lse`."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def banded(self) -> bool:
        """Whether visibility depends on the distance between query and key."""
        return self.left is not None or self.right is not None

    @property
    def masked(self) -> bool:
        """Whether any key may be hidden from any query."""
        return self.banded or any(term is not None for term in (self.mask, self.key_mask, self.segments))

    @property
    def empty(self) -> bool:
        """Whether some output is empty or no query has a key to look at."""
        return 0 in (self.B, self.N, self.T, self.S)


class Operands(NamedTuple):
    """The arrays of a call: raw, as the caller gave them, or canonical, as `Problem` describes."""

    q: Any
    k: Any
    v: Any
    bias: Any = None
    mask: Any = None
    key_mask: Any = None
    q_segments: Any = None
    kv_segments: Any = None
    q_offset: Any = None

    def present(self) -> tuple[Any, ...]:
        """The operands that were given, in order."""
        return tuple(x for x in self if x is not None)

    @classmethod
    def given(cls, problem: Problem, arrays: Any) -> Operands:
        """Inverse of `present` for the operands that `problem` has."""
        has = (True, True, True, problem.bias, problem.mask, problem.key_mask)
        has += (problem.segments, problem.segments, problem.offsets)
        remaining = iter(arrays)
        return cls(*(next(remaining) if term is not None else None for term in has))


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
    order: Order = "BNTD",
    abstract: bool = False,
) -> tuple[Problem, Operands, Any]:
    """Checks a call and describes it.

    Args:
        operands: q, k, v, bias, mask, key_mask and q_offset as the caller gave them.
        segment_ids: None, one array or a pair.
        order: memory order of q, k and v.
        abstract: whether `jax.ShapeDtypeStruct`s stand for arrays.

    Returns:
        The problem, the raw arrays, and the scale when it is an array (else None).

    Raises:
        ValueError: for a wrong shape or value.
        TypeError: for a wrong dtype or type.
    """
    ops = operands._replace(
        **{
            name: _array(name, x, abstract)
            for name, x in operands._asdict().items()
            if x is not None and name != "q_offset"
        }
    )
    sizes, batch = _sizes(ops, order)
    _dtypes(ops)
    if not isinstance(causal, bool | np.bool_):
        fail("causal", "True or False", repr(causal), TypeError)
    left, right = _window(window)
    if causal:
        right = 0 if right is None else min(right, 0)
    segments, ops = _segments(segment_ids, ops, sizes, batch, abstract)
    pair = (sizes["N"], sizes["T"], sizes["S"])
    static_offset, offsets, ops = _offset(ops, sizes, batch, left, right, abstract)
    left, right = _useful_band(left, right, static_offset, offsets, sizes)
    static_scale, array_scale = _scale(scale, sizes["D"], abstract)
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
    )
    if problem.offsets is None:
        ops = ops._replace(q_offset=None)
    return problem, ops, array_scale


def arrange(problem: Problem, ops: Operands) -> Operands:
    """Gives raw arrays the canonical shapes of `problem`: reshapes, no transpose, no copy of q, k, v."""
    p = problem
    batch = ops.q.shape[:-3]
    rows, cols = ((p.N, p.T), (p.K, p.S)) if p.order == "BNTD" else ((p.T, p.N), (p.S, p.K))

    def batched(x, shape, tail):
        """Flattens the leading axes of x, which broadcast to the batch, to the one of `shape`."""
        if shape is None:
            return None
        lead = x.shape[: max(0, x.ndim - tail)]
        lead = (1,) * (len(batch) - len(lead)) + lead
        full = lead + (1,) * (tail - x.ndim) + x.shape[max(0, x.ndim - tail) :]
        x = x.reshape(full)
        if shape[0] != math.prod(lead):
            x = jnp.broadcast_to(x, batch + x.shape[len(batch) :])
        return x.reshape(shape[:1] + x.shape[len(batch) :])

    key_mask = batched(ops.key_mask, p.key_mask, 1)
    if key_mask is not None:
        key_mask = jnp.broadcast_to(key_mask != 0, p.key_mask)
    segments = p.segments or (None, None)
    offsets = batched(ops.q_offset, p.offsets, 0)
    return Operands(
        q=ops.q.reshape((p.B, *rows, p.D)),
        k=ops.k.reshape((p.B, *cols, p.D)),
        v=ops.v.reshape((p.B, *cols, p.Dv)),
        bias=batched(ops.bias, p.bias, 3),
        mask=batched(ops.mask, p.mask, 3),
        key_mask=key_mask,
        q_segments=batched(ops.q_segments, segments[0], 1),
        kv_segments=batched(ops.kv_segments, segments[1], 1),
        q_offset=None if offsets is None else offsets.astype(jnp.int32),
    )


def _array(name: str, x: Any, abstract: bool) -> Any:
    if not isinstance(x, jax.Array | jax.ShapeDtypeStruct) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    kinds = jax.Array | np.ndarray | np.generic
    if not isinstance(x, kinds | jax.ShapeDtypeStruct if abstract else kinds):
        fail(name, "a JAX or NumPy array", f"{type(x).__module__}.{type(x).__qualname__}", TypeError)
    if x.dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        fail(name, "float32 or smaller unless jax_enable_x64 is on", "float64", TypeError)
    if isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "iu" and x.size:
        low, high = int(np.min(x)), int(np.max(x))
        if not _INT32.min <= low <= high <= _INT32.max:
            fail(name, "within the range of int32", f"values from {low} to {high}")
    return x


def _sizes(ops: Operands, order: Order) -> tuple[dict[str, int], tuple[int, ...]]:
    least = 2 if order == "BNTD" else 3
    layout = "(*batch, [N,] T, D)" if order == "BNTD" else "(*batch, T, N, D)"
    q, k, v = ops.q, ops.k, ops.v
    if q.ndim < least:
        fail("q", f"an array of shape {layout}", f"shape {q.shape}")
    for name, x in (("k", k), ("v", v)):
        if x.ndim != q.ndim:
            fail(name, f"an array with as many axes as q ({q.ndim})", f"shape {x.shape}")
        if x.shape[:-3] != q.shape[:-3]:
            fail(name, f"of q's batch shape {q.shape[:-3]}", f"shape {x.shape}")

    def heads_and_length(x):
        if x.ndim == 2:
            return 1, x.shape[0]
        return x.shape[-3:-1] if order == "BNTD" else x.shape[-3:-1][::-1]

    (N, T), (K, S) = heads_and_length(q), heads_and_length(k)
    if k.shape[-1] != q.shape[-1]:
        fail("k", f"of q's head dim D = {q.shape[-1]}", f"shape {k.shape}")
    if heads_and_length(v) != (K, S):
        fail("v", f"of k's heads and length (K, S) = {(K, S)}", f"shape {v.shape}")
    if (K == 0 and N) or (K and N % K):
        fail("k", f"of a head count K that divides q's N = {N}", f"K = {K}")
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] == 0:
            fail(name, "of a head dim of at least 1", f"shape {x.shape}")
    batch = q.shape[:-3]
    sizes = dict(B=math.prod(batch), N=N, K=K, T=T, S=S, D=q.shape[-1], Dv=v.shape[-1])
    return sizes, batch


def _dtypes(ops: Operands) -> None:
    if str(ops.q.dtype) not in FLOAT_DTYPES:
        fail("q", f"of dtype {', '.join(FLOAT_DTYPES)}", ops.q.dtype, TypeError)
    for name, x in (("k", ops.k), ("v", ops.v)):
        if x.dtype != ops.q.dtype:
            fail(name, f"of q's dtype {ops.q.dtype}", x.dtype, TypeError)
    if ops.bias is not None and str(ops.bias.dtype) not in FLOAT_DTYPES:
        fail("bias", f"of dtype {', '.join(FLOAT_DTYPES)}", ops.bias.dtype, TypeError)
    if ops.mask is not None and ops.mask.dtype != np.bool_:
        fail("mask", "of dtype bool", ops.mask.dtype, TypeError)
    if ops.key_mask is not None and jnp.issubdtype(ops.key_mask.dtype, jnp.complexfloating):
        fail("key_mask", "bool or 0/1", ops.key_mask.dtype, TypeError)


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
        axis = "T" if name == "q_segments" else "S"
        shown = "segment_ids" if name.endswith("segments") else name
        fail(shown, f"broadcastable to (*batch, {axis}) = {full}", f"shape {x.shape}")
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
    of_q, of_kv = (_array("segment_ids", x, abstract) for x in (segment_ids if pair else (segment_ids,) * 2))
    for x in (of_q, of_kv):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            fail("segment_ids", "of an integer dtype", x.dtype, TypeError)
    shapes = (
        _exact_vector("q_segments", of_q, batch, sizes["T"]),
        _exact_vector("kv_segments", of_kv, batch, sizes["S"]),
    )
    return shapes, ops._replace(q_segments=of_q, kv_segments=of_kv)


def _exact_vector(name, x, batch, length):
    """Like `_vector_shape`, for an operand whose last axis must not broadcast."""
    if x.ndim == 0 or x.shape[-1] != length:
        axis = "T" if name == "q_segments" else "S"
        fail("segment_ids", f"of shape (*batch, {axis}) = {(*batch, length)}", f"shape {x.shape}")
    return _vector_shape(name, x, batch, length)


def _is_int(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool | np.bool_)


def _window(window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    sides = (window, window) if _is_int(window) else window
    what = "None, an int, or a pair (left, right) of ints or None, each at least 0"
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        fail("window", what, repr(window), TypeError)
    for side in sides:
        if side is not None and not _is_int(side):
            fail("window", what, repr(window), TypeError)
        if side is not None and side < 0:
            fail("window", what, repr(window))
    left, right = (None if w is None or w >= _UNBOUNDED else int(w) for w in sides)
    return left, right


def _offset(ops: Operands, sizes, batch, left, right, abstract):
    """The static offset, the canonical shape of an array one, and the operands with the latter."""
    x = ops.q_offset
    if x is None:
        return sizes["S"] - sizes["T"], None, ops
    if left is None and right is None:
        fail("q_offset", "None without causal or window, which alone use it", "one")
    if _is_int(x):
        if not -_UNBOUNDED < x < _UNBOUNDED:
            fail("q_offset", "of a magnitude below 2**30", x)
        return int(x), None, ops._replace(q_offset=None)
    if not isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        fail("q_offset", "an int or an array of dtype int32", type(x).__name__, TypeError)
    x = _array("q_offset", x, abstract)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        fail("q_offset", "an int or an array of dtype int32", x.dtype, TypeError)
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


def _scale(scale: Any, head_dim: int, abstract: bool) -> tuple[float, Any]:
    if scale is None:
        return head_dim**-0.5, None
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        if not math.isfinite(scale):
            fail("scale", "finite", scale)
        return float(scale), None
    if not (isinstance(scale, jax.Array | np.ndarray) or (abstract and hasattr(scale, "dtype"))):
        fail("scale", "a real number or a scalar array", type(scale).__name__, TypeError)
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        fail("scale", "a real number or a scalar array of a floating dtype", scale.dtype, TypeError)
    if scale.ndim:
        fail("scale", "a real number or a scalar array", f"shape {scale.shape}")
    return 1.0, scale


def _softcap(softcap: Any) -> float | None:
    if softcap is None:
        return None
    if not isinstance(softcap, numbers.Real) or isinstance(softcap, bool):
        fail("softcap", "None or a positive number", type(softcap).__name__, TypeError)
    cap = float(softcap)
    if not (math.isfinite(cap) and cap > 0):
        fail("softcap", "None or a positive number", softcap)
    return cap


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
