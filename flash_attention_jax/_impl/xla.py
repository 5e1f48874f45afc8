"""FlashAttention-2 (arXiv 2307.08691, algorithm 1) in plain JAX: blocks, on any platform.

Memory is linear in T and S. One batched matrix product handles all heads of a tile; the loop over
tiles is `_sweep`, the derivatives are the pair sums of `_formulas`.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from flash_attention_jax import _formulas
from flash_attention_jax._impl.base import Device, Implementation
from flash_attention_jax._mask import Masks, block_map
from flash_attention_jax._problem import Operands, Problem
from flash_attention_jax._sweep import Grid, sweep


def forward(problem: Problem, operands: Operands, device: Device):
    """Attention by online softmax (arXiv 1805.02867) over blocks of keys."""
    p = problem
    arrays = _formulas.blocked(p, operands)
    masks = Masks.of(p, operands)
    per_batch = any(m is not None and m.shape[0] > 1 for m in masks)
    grid = Grid.of(p, device.platform, one_batch=per_batch)
    cover = functools.partial(block_map, p, masks, grid.tile.t, grid.tile.s) if p.masked else None
    out_shape = (*operands.q.shape[:-1], p.Dv)
    acc = p.accumulator

    def start(tile):
        stats = (grid.tile.b, grid.tile.k, p.G, grid.tile.t)
        sums = jnp.zeros((*stats, p.Dv), acc)
        return jnp.full(stats, -jnp.inf, acc), jnp.zeros(stats, acc), sums

    def step(tile, blocks, carry, buffers):
        top, norm, sums = carry
        blocks = _formulas.grouped_blocks(p, tuple(arrays), blocks)
        k, v, poison = _formulas.sanitized(p, tile, blocks)
        x = _formulas.logits(p, tile, blocks, k, poison)
        new_top = jnp.maximum(top, x.max(-1))
        # Where nothing was seen yet the maximum is -inf, and -inf - -inf would be NaN.
        finite_top = jnp.where(new_top == -jnp.inf, 0, new_top)
        weights = jnp.exp(x - finite_top[..., None])
        decay = jnp.exp(top - finite_top)
        moved = grid.dot(f"bkgts,{_formulas.labels(p, 'v')}->bkgte", weights, v)
        norm = norm * decay + weights.sum(-1)
        return (new_top, norm, sums * decay[..., None] + moved), buffers

    def finish(tile, carry, buffers):
        top, norm, sums = carry
        dead = norm == 0
        out = jnp.where(dead[..., None], 0, sums / jnp.where(dead, 1, norm)[..., None])
        lse = jnp.where(dead, -jnp.inf, top + jnp.log(jnp.where(dead, 1, norm)))
        if tile.fresh_rows is not None:
            out = jnp.where(tile.fresh_rows[:, None], out, 0)
            lse = jnp.where(tile.fresh_rows, lse, 0)
        out = jnp.einsum(f"bkgte->{_formulas.in_block(p, 'out')}", out)
        return tuple(
            tile.add(buffer, _formulas.labels(p, name), _formulas.ungrouped(p, name, part))
            for buffer, name, part in zip(buffers, ("out", "lse"), (out, lse), strict=True)
        )

    buffers = jnp.zeros(out_shape, p.dtype), jnp.zeros((p.B, p.N, p.T), acc)
    labelled = [(x, _formulas.labels(p, name)) for name, x in arrays.items()]
    return sweep(grid, cover, labelled, buffers, start=start, step=step, finish=finish)


IMPLEMENTATION = Implementation(
    name="xla",
    refuses=lambda problem, device: None,
    forward=forward,
    backward=_formulas.backward,
    tangent=_formulas.tangent,
)
