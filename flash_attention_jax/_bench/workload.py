"""What is measured: problems, their arrays, the pairs that are visible and the FLOPs that count."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._arguments import fail, normalize
from flash_attention_jax._bench.modes import MODES
from flash_attention_jax._cases import numpy_dtype
from flash_attention_jax._mask import visible_pairs
from flash_attention_jax._problem import Operands, Problem

_AXES = "BNTS"


@dataclasses.dataclass(frozen=True)
class Workload:
    """One attention problem to measure; its arrays follow from its fields.

    Attributes:
        length: T, queries.
        head_dim: D, of queries, keys and values.
        heads: N; None is an array (length, head_dim) without heads or batch.
        kv_heads: K, which divides N; None is N.
        batch: B.
        kv_length: S; None is T.
        precision: of float32 products, as for `flash_attention`; None is true float32.
        window: as for `flash_attention`, a pair.
        bias: the axes that a bias has, of "BNTS", the others being 1; None is no bias.
        key_mask: which part of the keys, the first ones, is kept, as in padded batches; None is all.
        segments: how many documents of random length are packed into each row; None is no segments.
    """

    length: int
    head_dim: int
    heads: int | None = None
    kv_heads: int | None = None
    batch: int = 1
    kv_length: int | None = None
    dtype: str = "float32"
    precision: str | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    bias: str | None = None
    key_mask: float | None = None
    segments: int | None = None

    def __post_init__(self) -> None:
        if self.heads is None and (self.batch != 1 or self.kv_heads is not None):
            fail("heads", "a number where there are batch elements or key/value heads", "none")
        if self.bias is not None and (set(self.bias) - set(_AXES) or len(set(self.bias)) < len(self.bias)):
            fail("bias", f"letters of {_AXES}, each once", repr(self.bias))
        if self.key_mask is not None and not 0 < self.key_mask <= 1:
            fail("key_mask", "a part of the keys, over 0 and up to 1", self.key_mask)
        if self.segments is not None and self.length != self.S:
            fail("segments", "without a length of keys of their own", f"{self.length} and {self.S}")
        if self.segments is not None and self.segments > self.length:
            fail("segments", f"at most the length {self.length}", self.segments)
        self.problem  # noqa: B018 - the library's own rules about sizes and options.

    @property
    def S(self) -> int:
        """Keys."""
        return self.length if self.kv_length is None else self.kv_length

    @property
    def N(self) -> int:
        """Query heads."""
        return 1 if self.heads is None else self.heads

    @property
    def K(self) -> int:
        """Key/value heads."""
        return self.N if self.kv_heads is None else self.kv_heads

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """(B, N, T, D), also where the problem has no heads."""
        return self.batch, self.N, self.length, self.head_dim

    @property
    def k_shape(self) -> tuple[int, int, int, int]:
        """(B, K, S, D)."""
        return self.batch, self.K, self.S, self.head_dim

    @property
    def bias_shape(self) -> tuple[int, ...] | None:
        """Shape (1|B, 1|N, 1|T, 1|S), or None."""
        if self.bias is None:
            return None
        full = (self.batch, self.N, self.length, self.S)
        return tuple(n if axis in self.bias else 1 for axis, n in zip(_AXES, full, strict=True))

    @functools.cached_property
    def problem(self) -> Problem:
        """The library's description of it."""
        # Float64 would need jax_enable_x64, and nothing here depends on the dtype.
        kind = "float32" if self.dtype == "float64" else self.dtype

        def struct(shape, dtype=kind):
            return None if shape is None else jax.ShapeDtypeStruct(shape, dtype)

        k = struct(self.k_shape)
        keys = struct((self.batch, self.S), "bool") if self.key_mask is not None else None
        ids = struct((self.batch, self.length), "int32") if self.segments is not None else None
        operands = Operands(struct(self.q_shape), k, k, struct(self.bias_shape), None, keys)
        options = {"causal": self.causal, "window": self.window, "precision": self.precision}
        problem, _, _ = normalize(operands, ids, **options, abstract=True)
        return dataclasses.replace(problem, dtype=self.dtype)

    @functools.cached_property
    def pairs(self) -> int:
        """Visible (query, key) pairs over all batch elements and heads."""
        inputs = Inputs(self)
        masks = (None if x is None else jnp.asarray(x) for x in (inputs.key_mask, *[inputs.segment_ids] * 2))
        return visible_pairs(self.problem, Operands(None, None, None, None, None, *masks))

    def flops(self, mode: str) -> float:
        """Useful FLOPs: two products of 2 * D for each visible pair, times the mode's factor."""
        return MODES[mode].factor * 2 * self.pairs * (self.problem.D + self.problem.Dv)

    @property
    def dense(self) -> bool:
        """Whether visibility is neither full nor causal from the first position."""
        return self.segments is not None or self.window is not None or (self.causal and self.length != self.S)

    @property
    def label(self) -> str:
        """Shape and options in a line, without the dtype."""
        return ", ".join([self.shape, *self.options])

    @property
    def shape(self) -> str:
        """(B, N, T, D), with what differs for the keys."""
        if self.heads is None:
            shape = f"({self.length}, {self.head_dim})"
        else:
            shape = f"({self.batch}, {self.heads}, {self.length}, {self.head_dim})"
        extras = [f"{self.K} kv heads"] * (self.K != self.N) + [f"{self.S} keys"] * (self.length != self.S)
        return ", ".join([shape, *extras])

    @property
    def options(self) -> list[str]:
        """What is not plain about it, in words."""
        words = ["causal"] if self.causal else []
        if self.window is not None:
            words.append("window " + ",".join("none" if w is None else str(w) for w in self.window))
        if self.bias is not None:
            words.append(f"bias {self.bias or 'scalar'}")
        if self.key_mask is not None:
            words.append(f"key mask {self.key_mask:g}")
        if self.segments is not None:
            words.append(f"{self.segments} segments")
        if self.precision is not None:
            words.append(f"{self.precision} precision")
        return words


class Inputs:
    """The arrays of a workload, NumPy's, of its dtype: (B, N, T, D) and (B, K, S, D).

    Each is drawn when it is first asked for, from a seed of its own.
    """

    def __init__(self, workload: Workload, draw: int = 0):
        self.workload = workload
        self._draw_number = draw
        self._kept: dict[Any, Any] = {}

    def keep(self, key: Any, make: Any) -> Any:
        """What `make()` returned for this key the first time: copies in a framework's own arrays."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def normal(self, name: str) -> np.ndarray:
        """The array of a name: q, k, v, dout, or a tangent q', k', v'."""
        w = self.workload
        shape = w.k_shape if name[0] in "kv" else w.q_shape
        return self.keep(name, lambda: self._draw(name, shape))

    def _draw(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = self._rng(name).standard_normal(shape, dtype=np.float32)
        return values.astype(numpy_dtype(self.workload.dtype), copy=False)

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([zlib.crc32(f"{name} {self.workload}".encode()), self._draw_number])

    @functools.cached_property
    def bias(self) -> np.ndarray | None:
        """The bias, (1|B, 1|N, 1|T, 1|S)."""
        shape = self.workload.bias_shape
        return None if shape is None else self._draw("bias", shape)

    @functools.cached_property
    def kept_keys(self) -> int:
        """How many keys the key mask keeps."""
        part = self.workload.key_mask
        return self.workload.S if part is None else max(1, math.floor(part * self.workload.S))

    @functools.cached_property
    def key_mask(self) -> np.ndarray | None:
        """Bool (B, S): the first keys."""
        w = self.workload
        if w.key_mask is None:
            return None
        return np.broadcast_to(np.arange(w.S) < self.kept_keys, (w.batch, w.S)).copy()

    @functools.cached_property
    def segment_ids(self) -> np.ndarray | None:
        """Sorted int32 (B, T): documents of random length, none of them empty."""
        w = self.workload
        if w.segments is None:
            return None
        ids = np.zeros((w.batch, w.length), np.int32)
        for row in ids:
            first = self._rng("segments").choice(w.length - 1, w.segments - 1, replace=False) + 1
            row[first] = 1
        return np.cumsum(ids, axis=-1, dtype=np.int32)

    def visible(self, rows: np.ndarray) -> np.ndarray | None:
        """Which keys some queries see, bool (B or 1, 1, len(rows) or 1, S); None where all are.

        Written without anything of the library, which it is to judge.
        """
        w = self.workload
        terms = []
        distance = np.arange(w.S)[None, :] - (np.asarray(rows)[:, None] + w.S - w.length)
        if w.causal:
            terms.append(distance[None] <= 0)
        if w.window is not None:
            left, right = w.window
            terms += [] if left is None else [distance[None] >= -left]
            terms += [] if right is None else [distance[None] <= right]
        if self.key_mask is not None:
            terms.append(self.key_mask[:, None, :])
        if self.segment_ids is not None:
            terms.append(self.segment_ids[:, rows, None] == self.segment_ids[:, None, :])
        return np.logical_and.reduce(np.broadcast_arrays(*terms))[:, None] if terms else None
