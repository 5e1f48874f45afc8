"""The table of cases: named, small, odd problems that cover the meaning of every argument."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: shapes and options; its arrays follow from its name.

    Attributes:
        q, k, v: shapes.
        options: arguments of `flash_attention` that are not arrays.
        bias, mask, key_mask: shapes. Masks are random and hide a third.
        segments: how many segments, of random sorted ids, for queries and keys each.
        q_offset: per batch element.
        traced_scale: whether the scale is an array, with a gradient.
        dead: whether the first query's row of `mask` hides all keys.
        poison: whether keys that no query sees hold NaN.
    """

    name: str
    q: Shape
    k: Shape
    v: Shape
    dtype: str = "float32"
    options: tuple[tuple[str, Any], ...] = ()
    bias: Shape | None = None
    mask: Shape | None = None
    key_mask: Shape | None = None
    segments: int | None = None
    q_offset: tuple[int, ...] | None = None
    traced_scale: bool = False
    dead: bool = False
    poison: bool = False

    def arguments(self, dtype: str | None = None, draw: int = 0) -> dict[str, Any]:
        """The arguments of `flash_attention`, arrays being NumPy's, of `dtype` or the case's."""
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), draw])
        result: dict[str, Any] = dict(self.options)
        kind = numpy_dtype(dtype or self.dtype)
        for name in ("q", "k", "v", "bias"):
            shape = getattr(self, name)
            if shape is not None:
                # Rounded to the case's own dtype first, so that every dtype sees the same values.
                value = rng.standard_normal(shape).astype(numpy_dtype(self.dtype))
                result[name] = value.astype(kind)
        if self.mask is not None:
            result["mask"] = rng.random(self.mask) < 0.67
            if self.dead:
                result["mask"][..., 0, :] = False
        if self.key_mask is not None:
            result["key_mask"] = rng.random(self.key_mask) < 0.67
        if self.segments is not None:
            batch, lengths = self.q[:-3], (self.q[-2], self.k[-2])
            ids = [np.sort(rng.integers(0, self.segments, (*batch, n)).astype(np.int32)) for n in lengths]
            result["segment_ids"] = tuple(ids)
        if self.q_offset is not None:
            result["q_offset"] = np.array(self.q_offset, np.int32)
        if self.traced_scale:
            result["scale"] = np.array(0.3, kind)
        if self.poison:
            hidden = self._hidden_keys(result)
            result["k"][hidden] = np.nan
            result["v"][hidden] = np.nan
        return result

    def _hidden_keys(self, arguments: Mapping[str, Any]) -> np.ndarray:
        """Keys that no query sees by key mask or causality, indexing k and v."""
        hidden = np.zeros(self.k[:-1], bool)
        if self.key_mask is not None:
            keep = np.broadcast_to(arguments["key_mask"], (*self.k[:-3], self.k[-2]))
            hidden |= ~keep[..., None, :]
        if arguments.get("causal"):
            offset = np.asarray(arguments.get("q_offset", self.k[-2] - self.q[-2]))
            last = self.q[-2] - 1 + offset.reshape((*offset.shape, 1, 1))
            hidden |= np.arange(self.k[-2]) > last
        return hidden

    def differentiable(self) -> tuple[str, ...]:
        """Names of the arguments that have a gradient."""
        scale = ("scale",) if self.traced_scale else ()
        return ("q", "k", "v") + (("bias",) if self.bias is not None else ()) + scale


def _case(name, q, k=None, v=None, **fields) -> Case:
    options = {n: fields.pop(n) for n in tuple(fields) if n not in Case.__dataclass_fields__}
    k = q if k is None else k
    return Case(name, q, k, k if v is None else v, options=tuple(sorted(options.items())), **fields)


_Q, _K, _V = (2, 6, 37, 16), (2, 3, 53, 16), (2, 3, 53, 24)
# Longer than a tile of any platform's small problems, and a multiple of nothing.
_LONG = ((1, 2, 1031, 16), (1, 1, 1543, 16), (1, 1, 1543, 16))

CASES: tuple[Case, ...] = (
    _case("two-axes", (40, 32), (56, 32), (56, 8)),
    _case("seed", (64, 512), (96, 512)),
    _case("no-batch", (3, 21, 8), (3, 34, 8)),
    _case("many-batch-axes", (2, 1, 3, 4, 9, 8), (2, 1, 3, 2, 11, 8)),
    _case("grouped-heads", _Q, _K, _V),
    _case("one-kv-head", (2, 5, 19, 16), (2, 1, 23, 16)),
    _case("one-token", (1, 1, 1, 1)),
    _case("decoding", (3, 4, 1, 32), (3, 2, 77, 32), causal=True),
    _case("one-key", (2, 2, 13, 8), (2, 2, 1, 8)),
    _case("head-dim-1", (1, 2, 17, 1), (1, 2, 29, 1)),
    _case("head-dim-80", (1, 2, 33, 80), (1, 2, 45, 80), (1, 2, 45, 96)),
    _case("head-dim-513", (1, 1, 18, 513), (1, 1, 26, 513)),
    _case("long", *_LONG),
    _case("long-causal", *_LONG, causal=True),
    _case("long-window", *_LONG, window=(100, 30)),
    _case("long-key-mask", *_LONG, key_mask=(1, 1543)),
    _case("long-segments", *_LONG, segments=5, causal=True),
    _case("long-bias", *_LONG, bias=(1, 2, 1031, 1543)),
    _case("causal", _Q, _K, _V, causal=True),
    _case("causal-dead-rows", (2, 2, 50, 16), (2, 2, 31, 16), causal=True),
    _case("window", _Q, _K, _V, window=7),
    _case("window-left", _Q, _K, _V, window=(9, None)),
    _case("window-causal", _Q, _K, _V, window=(9, 4), causal=True),
    _case("offset", _Q, _K, _V, causal=True, q_offset=5),
    _case("offset-negative", _Q, _K, _V, causal=True, q_offset=-20),
    _case("offset-out-of-reach", _Q, _K, _V, window=3, q_offset=500),
    _case("offset-per-batch", _Q, _K, _V, causal=True, q_offset=(3, -9)),
    _case("offset-array", _Q, _K, _V, window=(6, 2), q_offset=(8,)),
    _case("key-mask", _Q, _K, _V, key_mask=(2, 53)),
    _case("key-mask-shared", _Q, _K, _V, key_mask=(53,)),
    _case("key-mask-all-hidden", _Q, _K, _V, key_mask=(53,), window=0, q_offset=200),
    _case("mask", _Q, _K, _V, mask=(2, 6, 37, 53), dead=True),
    _case("mask-of-heads", _Q, _K, _V, mask=(6, 1, 53)),
    _case("mask-of-queries", _Q, _K, _V, mask=(2, 1, 37, 1)),
    _case("segments", _Q, _K, _V, segments=4),
    _case("segments-causal", (2, 2, 44, 16), segments=3, causal=True),
    _case("bias", _Q, _K, _V, bias=(2, 6, 37, 53)),
    _case("bias-of-pairs", _Q, _K, _V, bias=(37, 53), causal=True),
    _case("bias-of-heads", _Q, _K, _V, bias=(6, 1, 1)),
    _case("bias-of-keys", _Q, _K, _V, bias=(2, 1, 1, 53), key_mask=(2, 53)),
    _case("bias-of-queries", _Q, _K, _V, bias=(1, 6, 37, 1)),
    _case("bias-scalar", _Q, _K, _V, bias=()),
    _case("softcap", _Q, _K, _V, softcap=1.5),
    _case("softcap-causal-bias", _Q, _K, _V, softcap=1.5, causal=True, bias=(6, 37, 53)),
    _case("scale", _Q, _K, _V, scale=0.7),
    _case("scale-traced", _Q, _K, _V, traced_scale=True, causal=True),
    _case(
        "everything",
        _Q,
        _K,
        _V,
        causal=True,
        window=(30, 9),
        q_offset=(20, 4),
        key_mask=(2, 53),
        mask=(1, 6, 37, 53),
        segments=3,
        bias=(2, 1, 37, 53),
        softcap=4.0,
    ),
    _case("hidden-nan", _Q, _K, _V, key_mask=(2, 53), poison=True),
    _case("hidden-nan-causal", _Q, _K, _V, causal=True, q_offset=(3, 11), poison=True),
    _case("hidden-nan-long", *_LONG, key_mask=(1543,), causal=True, q_offset=200, poison=True),
    *(
        case
        for dtype in ("float16", "bfloat16", "float64")
        for case in (
            _case(f"{dtype}", _Q, _K, _V, dtype=dtype),
            _case(f"{dtype}-causal-bias", _Q, _K, _V, dtype=dtype, causal=True, bias=(2, 6, 37, 53)),
            _case(f"{dtype}-long", *_LONG, dtype=dtype, causal=True),
            _case(f"{dtype}-deterministic", _Q, _K, _V, dtype=dtype, window=(20, 3), deterministic=True),
        )
    ),
)
