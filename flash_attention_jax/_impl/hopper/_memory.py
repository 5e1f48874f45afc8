"""Shared memory of the forward kernel: its buffers, its barriers, and how rows come and go."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from flash_attention_jax._impl.hopper._configs import Chunks, Config, Launch, chunks, value_chunks
from flash_attention_jax._problem import Problem

# The axis of the thread blocks of a cluster.
CLUSTER = "cluster"


def swizzled(shape: tuple[int, ...], dtype: str, of: Chunks, interpreted: bool) -> Any:
    """Rows as `wgmma` reads them. Where TMA brings plain rows, the same bytes under both names."""
    tiling, swizzle = plgpu.TilingTransform((8, of.tile)), plgpu.SwizzleTransform(of.swizzle)
    tiles = plgpu.SMEM(shape, jnp.dtype(dtype), transforms=(tiling, swizzle))
    if of.tiled or interpreted:
        return tiles
    return plgpu.RefUnion(tiles, plgpu.SMEM(shape, jnp.dtype(dtype), transforms=(swizzle,)))


def _names(ref: Any, of: Chunks, interpreted: bool) -> tuple[Any, Any]:
    """A buffer as `wgmma` and as TMA know it. The interpreter gives the two names different bytes."""
    return (ref, ref) if of.tiled or interpreted else tuple(ref)


def scratch(problem: Problem, config: Config, interpreted: bool) -> dict[str, Any]:
    """The buffers and barriers of a thread block, by name; `Memory` says what they are."""
    p, c = problem, config
    of_k, of_v = chunks(p, p.D), value_chunks(p, c)

    def buffer(of, *shape):
        return swizzled((*shape, of.width), p.dtype, of, interpreted)

    result = {
        "q": buffer(of_k, of_k.count, c.tile_q),
        "k": buffer(of_k, c.stages, of_k.count, c.block_kv),
        "v": buffer(of_v, c.stages, of_v.count, c.block_kv),
        "out": swizzled((c.consumers, c.out_slots, 64, of_v.tile), p.dtype, pieces(of_v), interpreted),
        "lse": plgpu.SMEM((c.consumers, c.block_q), jnp.float32),
        "q_full": plgpu.Barrier(num_arrivals=of_k.count),
        "k_full": plgpu.Barrier(num_arrivals=of_k.count, num_barriers=c.stages),
        "v_full": plgpu.Barrier(num_arrivals=of_v.count, num_barriers=c.stages),
        "q_free": plgpu.Barrier(num_arrivals=c.consumers),
        "k_free": freed(c, c.stages),
        "v_free": freed(c, c.stages),
        "turn": plgpu.Barrier(num_barriers=c.consumers),
    }
    if p.masked:
        # The same bytes: there are traces before there is poison.
        shapes = (c.consumers, c.block_q), (c.stages, c.block_kv)
        result["notes"] = plgpu.RefUnion(*(plgpu.SMEM(shape, jnp.float32) for shape in shapes))
        result["checked"] = plgpu.Barrier(num_arrivals=c.consumers)
        result["judged"] = plgpu.Barrier(num_arrivals=c.threads)
    if interpreted:
        result["weights"] = plgpu.SMEM((c.consumers, c.block_q, c.block_kv), jnp.dtype(p.dtype))
    return result


def freed(config: Launch, slots: int) -> Any:
    """Barriers of slots that the producers of a cluster fill: every consumer of all its blocks arrives.

    In a cluster one warp arrives for its warpgroup. The products that read a slot are those of the whole
    warpgroup; what else reads one needs the warps to meet before.
    """
    arrivals = config.consumers
    if config.cluster == 1:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)
    return plgpu.ClusterBarrier(collective_axes=(CLUSTER,), num_arrivals=arrivals, num_barriers=slots)


def pieces(of_v: Chunks) -> Chunks:
    """The layout of the pieces in which the result goes out: one tile wide."""
    return dataclasses.replace(of_v, width=of_v.tile, count=of_v.columns // of_v.tile)


def axes_of(cluster: int) -> str | None:
    """The axis along which a copy is shared by so many thread blocks."""
    return CLUSTER if cluster > 1 else None


@dataclasses.dataclass(frozen=True)
class Rows:
    """A buffer of rows of q, k, v or out.

    Attributes:
        tiles: as `wgmma` reads it, (..., chunks, rows, width).
        plain: as TMA copies it.
    """

    tiles: Any
    plain: Any
    of: Chunks

    @classmethod
    def named(cls, ref: Any, of: Chunks, interpreted: bool) -> Rows:
        """The buffer that `scratch` made."""
        return cls(*_names(ref, of, interpreted), of)

    def fetch(self, source: Any, rows: Any, barrier: Any, *slot: Any, cluster: int = 1) -> None:
        """Starts the copy of `rows` of a (length, dim) array, which arrives once for each chunk.

        Args:
            cluster: the thread blocks that fetch the same rows, each a part of them for all.
        """
        axes = axes_of(cluster)
        for c in range(self.of.count):
            # A start that is not known while tracing may lead beyond the array, where TMA fills with zeros.
            columns = pl.ds(_traced(c * self.of.width, rows), self.of.width)
            into = self.plain.at[(*slot, c)]
            plgpu.copy_gmem_to_smem(source.at[rows, columns], into, barrier, collective_axes=axes)


def _traced(value: int, rows: Any) -> Any:
    return rows.start * 0 + value


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the warpgroups of a thread block share.

    Attributes:
        q: (chunks, tile_q, width); k, v: (stages, chunks, block_kv, width).
        out: (consumers, slots, 64, tile): pieces of the result on their way out.
        lse: (consumers, block_q).
        q_full, k_full, v_full: TMA arrives, consumers wait.
        q_free, k_free, v_free: every consumer arrives, the producer waits. In a cluster the consumers of all
            its thread blocks arrive at k_free and v_free of each.
        turn: of each consumer; the one before it arrives.
        traces: (consumers, block_q), NaN where a result of such a row was NaN, else 0.
        poison: (stages, block_kv), NaN for keys whose values are not finite, else 0.
        checked: all consumers arrive and wait, once a block of V has been checked.
        judged: everyone arrives and waits, when all tiles are done, and before they are done again.
        weights: for the interpreter, whose `wgmma` takes no operand from registers.
    """

    q: Rows
    k: Rows
    v: Rows
    out: Rows
    lse: Any
    q_full: Any
    k_full: Any
    v_full: Any
    q_free: Any
    k_free: Any
    v_free: Any
    turn: Any
    traces: Any = None
    poison: Any = None
    checked: Any = None
    judged: Any = None
    weights: Any = None

    @classmethod
    def of(cls, problem: Problem, config: Config, refs: dict[str, Any], interpreted: bool) -> Memory:
        """From the references to what `scratch` named."""
        of_k, of_v = chunks(problem, problem.D), value_chunks(problem, config)
        layouts = {"q": of_k, "k": of_k, "v": of_v, "out": pieces(of_v)}
        rows = {name: Rows.named(refs[name], of, interpreted) for name, of in layouts.items()}
        others = {name: ref for name, ref in refs.items() if name not in ("notes", *rows)}
        if "notes" in refs:
            others["traces"], others["poison"] = refs["notes"]
        return cls(**rows, **others)
