"""Shared memory of the backward kernel: its buffers and its barriers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from flash_attention_jax._impl.hopper._backward_configs import BackwardConfig, layouts, piece_of_dq
from flash_attention_jax._impl.hopper._memory import Rows, freed, swizzled
from flash_attention_jax._problem import Problem


def scratch(problem: Problem, config: BackwardConfig, interpreted: bool) -> dict[str, Any]:
    """The buffers and barriers of a thread block, by name; `BackwardMemory` says what they are."""
    p, c = problem, config
    of = layouts(p, c)

    def buffer(of, *shape):
        return swizzled((*shape, of.width), p.dtype, of, interpreted)

    def block(of):
        transforms = plgpu.TilingTransform((8, of.tile)), plgpu.SwizzleTransform(of.swizzle)
        shape = (c.slots_ds, c.block_q // 64, c.tile_kv, 64)
        return plgpu.SMEM(shape, jnp.dtype(p.dtype), transforms=transforms)

    across = min(32, of.k.tile)
    of_dq = plgpu.TilingTransform((8, across)), plgpu.SwizzleTransform(4 * across)
    piece = piece_of_dq(of.k, c)
    result = {
        "k": buffer(of.k, of.k.count, c.tile_kv),
        "v": buffer(of.v, of.v.count, c.tile_kv),
        "q": buffer(of.q, c.stages_q, of.q.count, c.block_q),
        "do": buffer(of.do, c.stages_do, of.do.count, c.block_q),
        "ds": block(of.k),
        "dq": plgpu.SMEM((c.consumers, c.slots_dq, 64, piece), jnp.float32, transforms=of_dq),
        "statistics": plgpu.SMEM((c.stages_q, 2, c.block_q), jnp.float32),
        "k_full": plgpu.Barrier(num_arrivals=of.k.count),
        "v_full": plgpu.Barrier(num_arrivals=of.v.count),
        "kv_free": plgpu.Barrier(num_arrivals=c.consumers),
        "q_full": plgpu.Barrier(num_arrivals=of.q.count + 1, num_barriers=c.stages_q),
        "q_free": freed(c, c.stages_q),
        "do_full": plgpu.Barrier(num_arrivals=of.do.count, num_barriers=c.stages_do),
        "do_free": freed(c, c.stages_do),
        "ds_full": plgpu.Barrier(num_arrivals=c.consumers, num_barriers=c.slots_ds),
        "done": plgpu.Barrier(num_arrivals=c.consumers),
    }
    if c.columns:
        result["p"] = block(of.v)
    elif interpreted:
        result["weights"] = plgpu.SMEM((c.consumers, 2, c.keys, c.block_q), jnp.dtype(p.dtype))
    return result


@dataclasses.dataclass(frozen=True)
class BackwardMemory:
    """What the warpgroups of a thread block share.

    Attributes:
        k, v: (chunks, tile_kv, width); at the end of a tile they hold dK and dV on their way out.
        q, do: (stages, chunks, block_q, width).
        ds: (slots, block_q / 64, tile_kv, 64), transposed, the keys of all consumers.
        p: as ds, where consumers divide the columns; otherwise P stays in registers.
        dq: (consumers, slots, 64, piece), float32 pieces on their way out.
        statistics: (stages, 2, block_q), lse in log2 units and minus delta.
        k_full, v_full, q_full, do_full: TMA arrives, consumers wait; q_full is for the statistics as well.
        kv_free, q_free, do_free: every consumer arrives, the producer waits. In a cluster the consumers of
            all its thread blocks arrive at q_free and do_free of each.
        ds_full: all consumers arrive and wait, once a block of dS is complete.
        done: all consumers arrive and wait: before dS is written again where it has one slot, before K is
            overwritten, and around the repair of rows.
        interpreted: whether the interpreter runs this.
        weights: for the interpreter, whose `wgmma` takes no operand from registers.
    """

    k: Rows
    v: Rows
    q: Rows
    do: Rows
    ds: Any
    dq: Any
    statistics: Any
    k_full: Any
    v_full: Any
    kv_free: Any
    q_full: Any
    q_free: Any
    do_full: Any
    do_free: Any
    ds_full: Any
    done: Any
    interpreted: bool
    p: Any = None
    weights: Any = None

    @classmethod
    def of(
        cls, problem: Problem, config: BackwardConfig, refs: dict[str, Any], interpreted: bool
    ) -> BackwardMemory:
        """From the references to what `scratch` named."""
        of = layouts(problem, config)
        rows = {
            name: Rows.named(refs[name], getattr(of, name), interpreted) for name in ("k", "v", "q", "do")
        }
        return cls(**refs | rows, interpreted=interpreted)
