"""Sums around a ring: the form that every derivative of ring attention has, at every order.

Given `lse` of the whole sequence, a derivative of attention is a sum over pairs (queries of a device, keys
of a device) of a function `f(rows, blocks) -> (row parts, block parts)`: rows stay where they are, blocks
travel, and so do the sums that belong to them. As for the pair sums of one device (`_pair_sum`) the form is
closed:

- its jvp is a ring sum of f's jvp, tangents travelling like their primals,
- its transpose is a ring sum of f's transpose, the cotangents of rows staying and those of blocks travelling,
- its batching is a ring sum of the vmapped f.

So one primitive gives every derivative as a ring again. Nothing differentiates through the loop over
hops, which would keep the blocks of every hop, the whole sequence, for the way back: here the way back sends
them once more, and a device holds two blocks at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flash_attention_jax._distributed._circulation import Hop, circulate
from flash_attention_jax._distributed._layout import Plan
from flash_attention_jax._pair_sum import Vmap, jvp_of, transpose_of
from flash_attention_jax._varying import abstract, alike, struct

Array = Any


class HopFunction(Protocol):
    """A hashable function of a hop and the operands to the results' parts."""

    def __call__(self, hop: Hop, *operands: Array) -> Sequence[Array]: ...


class Described(NamedTuple):
    """An operand or a result of a device: shape, dtype and whether it travels."""

    shape: tuple[int, ...]
    dtype: str
    travels: bool


@dataclasses.dataclass(frozen=True)
class RingSum:
    """All that is static about a ring sum.

    Attributes:
        function: what is summed.
        operands: floating ones may be differentiated.
        results: each is summed in the problem's accumulator and then converted.
    """

    plan: Plan
    function: HopFunction
    operands: tuple[Described, ...]
    results: tuple[Described, ...]


@dataclasses.dataclass(frozen=True)
class Transpose:
    """The transpose of a hop function in the operands `linear`.

    Its operands are the others, then the cotangents of the results `given`.
    """

    function: HopFunction
    operands: tuple[Described, ...]
    linear: tuple[int, ...]
    given: tuple[int, ...]

    def __call__(self, hop, *arrays):
        count = len(self.operands) - len(self.linear)
        others, cotangents = iter(arrays[:count]), arrays[count:]
        template = [None if i in self.linear else next(others) for i in range(len(self.operands))]

        def of_linear(*moved):
            remaining = iter(moved)
            full = [next(remaining) if i in self.linear else x for i, x in enumerate(template)]
            parts = self.function(hop, *full)
            return tuple(parts[i] for i in self.given)

        structs = [struct(x.shape, x.dtype, arrays) for x in (self.operands[i] for i in self.linear)]
        parts = jax.eval_shape(of_linear, *structs)
        cotangents = tuple(c.astype(p.dtype) for c, p in zip(cotangents, parts, strict=True))
        return jax.linear_transpose(of_linear, *structs)(cotangents)


def ring_sum(spec: RingSum, operands: Sequence[Array]) -> list[Array]:
    """Sums `spec.function` over the hops of the ring. Only inside `jax.shard_map`."""
    return ring_sum_p.bind(*alike(operands), spec=spec)


def _run(*operands: Array, spec: RingSum) -> list[Array]:
    plan, acc = spec.plan, spec.plan.problem.accumulator
    travelling = [x.travels for x in spec.operands]
    zeros = alike([*(jnp.zeros(x.shape, acc) for x in spec.results), *operands])[: len(spec.results)]

    def body(hop, blocks, sums):
        moving = iter(blocks)
        given = [next(moving) if moves else x for x, moves in zip(operands, travelling, strict=True)]
        parts = spec.function(hop, *given)
        split = list(zip(parts, spec.results, strict=True))
        staying = [part for part, x in split if not x.travels]
        sums = [x + part.astype(acc) for x, part in zip(sums, staying, strict=True)]
        return sums, [part for part, x in split if x.travels]

    staying, sent = circulate(
        plan.axis,
        plan.devices,
        plan.hops,
        [x for x, moves in zip(operands, travelling, strict=True) if moves],
        [x for x, result in zip(zeros, spec.results, strict=True) if result.travels],
        [x for x, result in zip(zeros, spec.results, strict=True) if not result.travels],
        body,
    )
    here, there = iter(staying), iter(sent)
    return [next(there if x.travels else here).astype(x.dtype) for x in spec.results]


def _jvp(primals, tangents, *, spec):
    return jvp_of(ring_sum, primals, tangents, spec)


def _transpose(cotangents, *operands, spec):
    return transpose_of(ring_sum, Transpose, cotangents, operands, spec)


def _batch(operands, dims, *, spec):
    mapped = tuple(d is not None for d in dims)
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    if size == 0:
        return [jnp.zeros((0, *x.shape), x.dtype) for x in spec.results], [0] * len(spec.results)
    operands = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)]

    def lead(x: Described) -> Described:
        return x._replace(shape=(size, *x.shape))

    derived = dataclasses.replace(
        spec,
        function=Vmap(spec.function, mapped, size),
        operands=tuple(lead(x) if m else x for x, m in zip(spec.operands, mapped, strict=True)),
        results=tuple(lead(x) for x in spec.results),
    )
    return ring_sum(derived, operands), [0] * len(spec.results)


ring_sum_p = Primitive("attention_ring_sum")
ring_sum_p.multiple_results = True
ring_sum_p.def_abstract_eval(lambda *x, spec: [abstract(r.shape, r.dtype, x) for r in spec.results])
ad.primitive_jvps[ring_sum_p] = _jvp
ad.primitive_transposes[ring_sum_p] = _transpose
batching.primitive_batchers[ring_sum_p] = _batch
mlir.register_lowering(ring_sum_p, mlir.lower_fun(_run, multiple_results=True))
