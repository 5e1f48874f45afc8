"""The kernel of dQ alone, whose sums have an order (FlashAttention-2, arXiv 2307.08691, section 3.1).

Three products for each pair of blocks. With the queries of a tile as rows,

    S = Q K^T        P = exp2(S - lse)      dP = dO V^T       dS = P (dP - delta)
    dQ += dS K

Who does what. A thread block has one producer warpgroup and 1 to 3 consumer warpgroups. It takes tiles of
`consumers * block_q` query rows of one head, as the forward kernel does (`Plan`). The producer brings Q and
dO of the tile and then, block by block, K and V through rings. A consumer has `block_q` rows of the tile: S,
dP and dQ stay in registers, dS is a left operand from registers. While one consumer computes, the products of
the others run. Every row is summed by one warpgroup in one order, so that repeated runs give the same bits.

Shared memory, in bytes for 16-bit numbers, with D and Dv padded as `Chunks` says: q 2 tile_q D (dQ on its way
out), do 2 tile_q Dv, k 2 stages_k block_kv D, v 2 stages_v block_kv Dv. `shared_bytes` adds them up. The
barriers are described in `DqMemory`.

What is hidden may hold anything, and 0 * NaN is NaN. The weights of hidden pairs are replaced, and gradients
of logits whose weight is 0. In blocks that are visible in part, keys that are not finite become 0 in shared
memory. Nothing of a query reaches another one, and those that see no key have dS = 0.

Tried, TFLOP/s of its three products on an H200 (bfloat16, 16384 tokens, 2048 wide, JAX 0.11.2), sizes being
block_q x consumers, block_kv; runs differ by 3 %:

    head dim 128 full      64 x 2, 128: 729    64 x 2, 64: 715 to 731    64 x 3, 64: 727 to 733
                           64 x 2, 64 with three stages: 682 to 689
    head dim 128 causal    64 x 2, 128: 689    64 x 2, 64: 665 to 703    64 x 3, 64: 686 to 703
    head dim 64 full       64 x 2, 128: 599    64 x 3, 64: 600 to 607
                           64 x 2, 128 with three stages: 562 to 572
    head dim 64 causal     64 x 2, 128: 573    64 x 3, 64: 563 to 578
    head dim 256           64 x 2, 64: 704 full, 733 causal
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper._backward_repair import make_finite
from flash_attention_jax._impl.hopper._blocks import (
    ROWS,
    Place,
    Plan,
    Tables,
    Visits,
    load,
    rem,
    seen_in_block,
)
from flash_attention_jax._impl.hopper._configs import REGISTERS, chunks
from flash_attention_jax._impl.hopper._dq_configs import DqConfig
from flash_attention_jax._impl.hopper._memory import Rows, swizzled
from flash_attention_jax._impl.hopper._slopes import Block, weights_and_slopes
from flash_attention_jax._impl.hopper._softmax import across
from flash_attention_jax._impl.hopper._warpgroups import accumulated, divide, over_tiles, rows_of
from flash_attention_jax._problem import Problem

Array = Any
_WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class DqArrays:
    """What lies in device memory: q, k, v, do and dq in the memory order of the problem.

    Attributes:
        statistics: float32 (B, N, 2, T'), lse in log2 units, inf for queries that see nothing, and minus
            delta; T' is T rounded up to whole tiles.
    """

    q: Any
    k: Any
    v: Any
    do: Any
    statistics: Any
    dq: Any
    tables: Tables


def scratch(problem: Problem, config: DqConfig, interpreted: bool) -> dict[str, Any]:
    """The buffers and barriers of a thread block, by name; `DqMemory` says what they are."""
    p, c = problem, config
    of_k, of_v = chunks(p, p.D), chunks(p, p.Dv)

    def buffer(of, *shape):
        return swizzled((*shape, of.width), p.dtype, of, interpreted)

    result = {
        "q": buffer(of_k, of_k.count, c.tile_q),
        "do": buffer(of_v, of_v.count, c.tile_q),
        "k": buffer(of_k, c.stages_k, of_k.count, c.block_kv),
        "v": buffer(of_v, c.stages_v, of_v.count, c.block_kv),
        "q_full": plgpu.Barrier(num_arrivals=of_k.count + of_v.count),
        "k_full": plgpu.Barrier(num_arrivals=of_k.count, num_barriers=c.stages_k),
        "v_full": plgpu.Barrier(num_arrivals=of_v.count, num_barriers=c.stages_v),
        "q_free": plgpu.Barrier(num_arrivals=c.consumers),
        "k_free": plgpu.Barrier(num_arrivals=c.consumers, num_barriers=c.stages_k),
        "v_free": plgpu.Barrier(num_arrivals=c.consumers, num_barriers=c.stages_v),
    }
    if p.masked:
        result["repaired"] = plgpu.Barrier(num_arrivals=c.consumers)
    if interpreted:
        result["slopes"] = plgpu.SMEM((c.consumers, c.block_q, c.block_kv), jnp.dtype(p.dtype))
    return result


@dataclasses.dataclass(frozen=True)
class DqMemory:
    """What the warpgroups of a thread block share.

    Attributes:
        q, do: (chunks, tile_q, width); at the end of a tile q holds dQ on its way out.
        k, v: (stages, chunks, block_kv, width).
        q_full, k_full, v_full: TMA arrives, consumers wait; q_full is for dO as well.
        q_free, k_free, v_free: every consumer arrives, the producer waits.
        repaired: all consumers arrive and wait, once the keys of a block are finite.
        slopes: for the interpreter, whose `wgmma` takes no operand from registers.
    """

    q: Rows
    do: Rows
    k: Rows
    v: Rows
    q_full: Any
    k_full: Any
    v_full: Any
    q_free: Any
    k_free: Any
    v_free: Any
    repaired: Any = None
    slopes: Any = None

    @classmethod
    def of(cls, problem: Problem, refs: dict[str, Any], interpreted: bool) -> DqMemory:
        """From the references to what `scratch` named."""
        of_k, of_v = chunks(problem, problem.D), chunks(problem, problem.Dv)
        layouts = {"q": of_k, "do": of_v, "k": of_k, "v": of_v}
        rows = {name: Rows.named(refs[name], of, interpreted) for name, of in layouts.items()}
        return cls(**refs | rows)


def differentiate_queries(plan: Plan[DqConfig], arrays: DqArrays, memory: DqMemory) -> None:
    """The body of the kernel, for every warpgroup."""
    divide(
        plan.config.consumers,
        REGISTERS[plan.config.consumers],
        lambda own: DqConsumer(plan, arrays, memory, own).run(),
        lambda: produce(plan, arrays, memory),
    )


def produce(plan: Plan[DqConfig], arrays: DqArrays, memory: DqMemory) -> None:
    """The producer: Q and dO of a tile, then its blocks of keys and values."""
    p, c, m = plan.problem, plan.config, memory

    def tile(batch, head, row, visits, count):
        kv_head = lax.div(head, jnp.int32(p.G))
        k, v = (rows_of(p, x, batch, kv_head) for x in (arrays.k, arrays.v))
        rows = pl.ds(row * c.tile_q, c.tile_q)
        plgpu.barrier_wait(m.q_free)
        m.q.fetch(rows_of(p, arrays.q, batch, head), rows, m.q_full)
        m.do.fetch(rows_of(p, arrays.do, batch, head), rows, m.q_full)

        def bring(i, _):
            keys = pl.ds(visits.index(i) * c.block_kv, c.block_kv)
            for source, buffer, stages, full, free in (
                (k, m.k, c.stages_k, m.k_full, m.k_free),
                (v, m.v, c.stages_v, m.v_full, m.v_free),
            ):
                slot = rem(count + i, stages)
                plgpu.barrier_wait(free.at[slot])
                buffer.fetch(source, keys, full.at[slot], slot)

        lax.fori_loop(jnp.int32(0), visits.seen, bring, None)

    over_tiles(plan, arrays.tables, plan.visits, 1, tile)
    # Nothing may be under way when the barriers go.
    plgpu.barrier_wait(m.q_free)
    for slot in range(c.stages_k):
        plgpu.barrier_wait(m.k_free.at[slot])
    for slot in range(c.stages_v):
        plgpu.barrier_wait(m.v_free.at[slot])


class Tile(NamedTuple):
    """Where a consumer stands, its blocks, and lse and minus delta of its rows."""

    place: Place
    visits: Visits
    count: Any
    lse: Array
    delta: Array


@dataclasses.dataclass(frozen=True)
class DqConsumer:
    """One consumer warpgroup."""

    plan: Plan[DqConfig]
    arrays: DqArrays
    memory: DqMemory
    own: Any

    @property
    def _rows(self) -> Any:
        """Its rows of the tile."""
        size = self.plan.config.block_q
        return pl.ds(self.own * size, size)

    def run(self) -> None:
        """All tiles of this thread block."""
        m, c = self.memory, self.plan.config
        # Everything is free at first.
        plgpu.barrier_arrive(m.q_free)
        for slot in range(c.stages_k):
            plgpu.barrier_arrive(m.k_free.at[slot])
        for slot in range(c.stages_v):
            plgpu.barrier_arrive(m.v_free.at[slot])
        over_tiles(self.plan, self.arrays.tables, self.plan.visits, 1, self._tile)
        plgpu.wait_smem_to_gmem(0)

    def _tile(self, batch, head, row, visits, count):
        plan, c, m = self.plan, self.plan.config, self.memory
        first = row * c.tile_q + self.own * c.block_q
        rows = pl.ds(first, c.block_q)
        lse, delta = (
            load(self.arrays.statistics.at[batch, head, i, rows], layout=ROWS, optimized=False)
            for i in (0, 1)
        )
        place = Place(batch, first, plan.offset(self.arrays.tables, batch))
        tile = Tile(place, visits, count, lse, delta)
        plgpu.barrier_wait(m.q_full)

        def step(masked):
            return lambda i, sums: self._step(sums, tile, i, masked)

        zero = plgpu.layout_cast(jnp.zeros((c.block_q, m.q.of.width), jnp.float32), _WGMMA)
        sums, begin = (zero,) * m.q.of.count, jnp.int32(0)
        if plan.problem.masked or plan.ragged:
            sums = lax.fori_loop(begin, visits.partial, step(True), sums)
            begin = visits.partial
        sums = lax.fori_loop(begin, visits.seen, step(False), sums)
        self._give_out(sums, rows_of(plan.problem, self.arrays.dq, batch, head), first)

    def _step(self, sums: Any, tile: Tile, i: Any, masked: bool) -> Any:
        """One block of keys."""
        plan, c, m = self.plan, self.plan.config, self.memory
        at_k, at_v = rem(tile.count + i, c.stages_k), rem(tile.count + i, c.stages_v)
        plgpu.barrier_wait(m.k_full.at[at_k])
        plgpu.barrier_wait(m.v_full.at[at_v])
        if masked and plan.problem.masked:
            self._repair(at_k)
        shape = (c.block_q, c.block_kv)
        # 0, which only the kernel knows. Products find Q and dO by way of it: the compiler would compute the
        # descriptors of their pieces before the loop, and keep them in registers that it does not have.
        zero = lax.optimization_barrier(jnp.int32(0))

        def seen():
            return seen_in_block(plan, self.arrays.tables, tile.place, tile.visits.index(i), zero)

        block = Block(
            shape,
            lambda acc: self._issue_logits(acc, at_k, zero),
            lambda acc: self._issue_weight_gradients(acc, at_v, zero),
            m.v.of.count,
            lse=lambda: across(tile.lse, shape),
            delta=across(tile.delta, shape),
            seen=seen if masked else None,
        )
        _, slopes = weights_and_slopes(plan.problem, block, interpreted=m.slopes is not None)
        plgpu.barrier_arrive(m.v_free.at[at_v])
        sums = self._added(sums, slopes, at_k)
        plgpu.barrier_arrive(m.k_free.at[at_k])
        return sums

    def _repair(self, slot: Any) -> None:
        """Makes a block of K finite, each consumer some rows of it; no visible key may be otherwise."""
        c, m = self.plan.config, self.memory
        for piece in range(c.block_kv // 64):
            rows = pl.ds(piece * 64, 64)

            def repair(rows=rows):
                for chunk in range(m.k.of.count):
                    # A tile at a time: dQ takes most of the registers.
                    for left in range(0, m.k.of.width, m.k.of.tile):
                        place = (slot, chunk, rows, pl.ds(left, m.k.of.tile))
                        make_finite(m.k, place)

            pl.when(self.own == piece % c.consumers)(repair)
        plgpu.commit_smem()
        plgpu.barrier_arrive(m.repaired)
        plgpu.barrier_wait(m.repaired)

    # Products.

    def _issue_logits(self, acc: Any, slot: Any, zero: Any) -> None:
        m = self.memory
        for chunk in range(m.k.of.count):
            plgpu.wgmma(acc, m.q.tiles.at[zero + chunk, self._rows], m.k.tiles.at[slot, chunk].T)

    def _issue_weight_gradients(self, acc: Any, slot: Any, zero: Any) -> None:
        m = self.memory
        for chunk in range(m.v.of.count):
            plgpu.wgmma(acc, m.do.tiles.at[zero + chunk, self._rows], m.v.tiles.at[slot, chunk].T)

    def _added(self, sums: Any, slopes: Array, slot: Any) -> Any:
        """dQ with dS K of a block."""
        m = self.memory

        if m.slopes is not None:
            m.slopes[self.own] = slopes
            plgpu.commit_smem()

        def issue(accs):
            left = slopes if m.slopes is None else m.slopes.at[self.own]
            for chunk, acc in enumerate(accs):
                plgpu.wgmma(acc, left, m.k.tiles.at[slot, chunk])

        return accumulated(sums, issue, interpreted=m.slopes is not None)

    # Results.

    def _give_out(self, sums: Any, dq: Any, first: Any) -> None:
        """Sends a consumer's rows to those of `dq` that begin with `first`; TMA leaves out what is beyond."""
        p, c, m = self.plan.problem, self.plan.config, self.memory
        for chunk, x in enumerate(sums):
            m.q.tiles[chunk, self._rows] = (x * p.scale).astype(p.dtype)
        plgpu.commit_smem()
        for chunk in range(m.q.of.count):
            into = dq.at[pl.ds(first, c.block_q), pl.ds(first * 0 + chunk * m.q.of.width, m.q.of.width)]
            plgpu.copy_smem_to_gmem(m.q.plain.at[chunk, self._rows], into)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(m.q_free)
