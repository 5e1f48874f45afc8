"""P and dS of a block in registers, from its two products: what the backward kernels have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper import _softmax
from flash_attention_jax._problem import Problem

Array = Any


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of pairs, or its transposed.

    Attributes:
        shape: of the block.
        issue_logits, issue_weight_gradients: start the products Q K^T and dO V^T into an accumulator.
        groups: products that `issue_weight_gradients` starts.
        lse: gives lse in log2 units, for every pair of the block.
        delta: minus delta, for every pair.
        seen: gives what is visible, for every pair; None where everything is.
    """

    shape: tuple[int, int]
    issue_logits: Callable[[Any], None]
    issue_weight_gradients: Callable[[Any], None]
    groups: int
    lse: Callable[[], Array]
    delta: Array
    seen: Callable[[], Array] | None


def weights_and_slopes(problem: Problem, block: Block, *, interpreted: bool) -> tuple[Array, Array]:
    """P and dS = P (dP - delta) of a block, in 16 bits; the softmax runs under the product dO V^T."""
    p, b = problem, block

    def issue(products, gradients):
        b.issue_logits(products)
        b.issue_weight_gradients(gradients)
        x = plgpu.wgmma_accumulator_load(products, wait_n=b.groups)
        # Nothing of the softmax may move before the wait, which the compiler cannot tell.
        x = lax.optimization_barrier(x)
        return _softmax_of(p, x, b.lse(), b.seen)

    if interpreted:

        def scoped(products, gradients):
            return issue(products, gradients), gradients[...]

        acc = plgpu.WGMMAAccumulatorRef(b.shape)
        found, gradients = pl.run_scoped(scoped, acc, acc)
        # The interpreter's accumulators start at 0.
        gradients = gradients + b.delta
    else:

        def stateful(refs):
            products, gradients, results = refs
            for ref, x in zip(results, issue(products, gradients), strict=True):
                ref[...] = x

        zero = plgpu.layout_cast(jnp.zeros(b.shape, jnp.float32), plgpu.Layout.WGMMA)
        starts = (zero, plgpu.layout_cast(b.delta, plgpu.Layout.WGMMA))
        accs = (plgpu.WGMMAAccumulatorRef.init(x) for x in starts)
        results = [zero] if p.softcap is None else [zero, zero.astype(p.dtype)]
        _, gradients, found = pl.run_state(stateful)((*accs, results))
    slope, weights = (*found, found[0])[:2]
    slopes = slope * gradients
    if b.seen is not None:
        slopes = jnp.where(slope == 0, 0.0, slopes)
    return weights.astype(p.dtype), slopes.astype(p.dtype)


def _softmax_of(problem: Problem, x: Array, lse: Array, seen: Any) -> list[Array]:
    """P times the slope of the softcap, float32; where there is one, P in 16 bits too."""
    p = problem
    x, factor = _softmax.logits(p, x)
    weights = jnp.exp2(x * factor - lse)
    slope = weights if p.softcap is None else weights * (1 - x * x)
    if seen is not None:
        kept = seen()
        weights, slope = (jnp.where(kept, y, 0.0) for y in (weights, slope))
    return [slope] if p.softcap is None else [slope, weights.astype(p.dtype)]
