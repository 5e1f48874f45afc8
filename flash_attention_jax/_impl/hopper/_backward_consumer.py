"""A consumer of the backward kernel: its tiles, its products, and how its results leave.

`_backward_rows` and `_backward_columns` say what it does with one block of queries.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper._backward_blocks import BackwardPlan, KeyPlace, seen_by_block
from flash_attention_jax._impl.hopper._backward_memory import BackwardMemory
from flash_attention_jax._impl.hopper._backward_out import add_dq, copy_out, write
from flash_attention_jax._impl.hopper._backward_parts import Part, within
from flash_attention_jax._impl.hopper._backward_repair import repair_keys, repair_queries
from flash_attention_jax._impl.hopper._blocks import COLUMNS, Tables, Visits, load
from flash_attention_jax._impl.hopper._slopes import Block, weights_and_slopes
from flash_attention_jax._impl.hopper._warpgroups import accumulated, over_tiles, rows_of

Array = Any
_WGMMA = plgpu.Layout.WGMMA
_LSE, _DELTA = 0, 1


@dataclasses.dataclass(frozen=True)
class BackwardArrays:
    """What lies in device memory.

    Attributes:
        q, k, v, do: in the memory order of the problem; dk, dv: as k and v.
        statistics: float32 (B, N, 2, T'), lse in log2 units, inf for queries that see nothing, and minus
            delta; T' is T rounded up to whole blocks.
        dead: int32 (B, N, blocks), whether a block has queries that see nothing; None where none can.
        dq: float32 (rows, D') that the kernel adds to, as `dq_rows` counts them; (tiles, rows, D') for the
            interpreter. None where it is not wanted.
    """

    q: Any
    k: Any
    v: Any
    do: Any
    statistics: Any
    dk: Any
    dv: Any
    tables: Tables
    dead: Any = None
    dq: Any = None


def dq_rows(plan: BackwardPlan) -> tuple[int, int]:
    """Rows of dQ, those of all heads one after the other, and with those behind that belong to no query."""
    p, c = plan.problem, plan.config
    rows = p.B * p.N * plan.length
    return rows, rows if c.columns else rows + c.block_q


def over_key_tiles(plan: BackwardPlan, arrays: BackwardArrays, body: Any) -> None:
    """Calls body(batch, head, row, visits, steps before) for every tile of this thread block."""
    over_tiles(plan.across, arrays.tables, plan.visits, plan.problem.G, body)


def over_steps(plan: BackwardPlan, visits: Visits, body: Any, carry: Any) -> Any:
    """carry = body(i, carry, masked) for every step of a tile, those visible in part first."""
    group, begin = plan.problem.G, jnp.int32(0)
    if plan.hides:
        end = visits.partial * group
        carry = lax.fori_loop(begin, end, lambda i, x: body(i, x, True), carry)
        begin = end
    return lax.fori_loop(begin, visits.seen * group, lambda i, x: body(i, x, False), carry)


class Tile(NamedTuple):
    """Where a consumer stands, the index of its tile, its visits, and the steps of tiles before."""

    place: KeyPlace
    row: Any
    visits: Visits
    count: Any


class Slots(NamedTuple):
    """Of a block of queries in the rings, and of the dS that dQ is computed from; `zero` is 0.

    Only the kernel knows that. Products find K and V by way of it: the compiler would compute the 24
    descriptors of their pieces before the loop, and keep them in registers that it does not have.
    """

    q: Any
    do: Any
    ds: Any
    zero: Any


@dataclasses.dataclass(frozen=True)
class BackwardConsumer(abc.ABC):
    """One consumer warpgroup."""

    plan: BackwardPlan
    arrays: BackwardArrays
    memory: BackwardMemory
    own: Any
    part: Part

    @abc.abstractmethod
    def sums_of(self, tile: Tile, start: Any) -> Any:
        """dK and dV of a tile, which are `start` without any step; dQ of its blocks has been sent."""

    def run(self) -> None:
        """All tiles of this thread block."""
        m, c = self.memory, self.plan.config
        # Everything is free at first.
        plgpu.barrier_arrive(m.kv_free)
        for slot in range(c.stages_q):
            plgpu.barrier_arrive(m.q_free.at[slot])
        for slot in range(c.stages_do):
            plgpu.barrier_arrive(m.do_free.at[slot])
        over_key_tiles(self.plan, self.arrays, self._tile)
        plgpu.wait_smem_to_gmem(0)

    def _tile(self, batch, head, row, visits, count):
        plan, p, c, m = self.plan, self.plan.problem, self.plan.config, self.memory
        first = row * c.tile_kv + self.part.keys.start
        place = KeyPlace(batch, head, first, plan.offset(self.arrays.tables, batch))
        plgpu.barrier_wait(m.k_full)
        plgpu.barrier_wait(m.v_full)
        if p.masked:
            repair_keys(m, c, self.own)
            if c.columns:
                self.meet()
        tile = Tile(place, row, visits, count)

        def zeros(of, chunks):
            return (plgpu.layout_cast(jnp.zeros((c.keys, of.width), jnp.float32), _WGMMA),) * len(chunks)

        start = zeros(m.q.of, self.part.of_dk), zeros(m.do.of, self.part.of_dv)
        dk, dv = self.sums_of(tile, start)
        self._give_out(tile, dk, dv)

    def meet(self) -> None:
        """Waits for all consumers."""
        plgpu.barrier_arrive(self.memory.done)
        plgpu.barrier_wait(self.memory.done)

    # One block of queries.

    def head_and_block(self, tile: Tile, at: Any) -> tuple[Any, Any]:
        """The query head and the block of queries that `BackwardPlan.step` gave."""
        return tile.place.head * self.plan.problem.G + at[0], at[1]

    def block_of_dq(self, tile: Tile, head: Any, block: Any) -> Any:
        """A block of queries, counted over all heads."""
        plan = self.plan
        return (tile.place.batch * plan.problem.N + head) * (plan.length // plan.config.block_q) + block

    def await_queries(self, tile: Tile, head: Any, block: Any, slots: Slots, masked: bool) -> None:
        """Waits for a block of Q and dO; where it has queries that see nothing, their rows become 0."""
        m, c = self.memory, self.plan.config
        plgpu.barrier_wait(m.q_full.at[slots.q])
        plgpu.barrier_wait(m.do_full.at[slots.do])
        if masked and self.arrays.dead is not None:
            dead = self.arrays.dead[tile.place.batch, head, block] != 0

            @pl.when(dead)
            def _():
                repair_queries(m, c, self.own, slots)
                self.meet()

    def seen(self, tile: Tile, block: Any, zero: Any) -> Array:
        """What is visible of a block: bool (keys, queries)."""
        start = block * self.plan.config.block_q + self.part.queries.start
        return seen_by_block(self.plan, self.arrays.tables, tile.place, start, zero)

    def statistic(self, slots: Slots, which: int) -> Array:
        """lse or minus delta of a block, for all keys: (keys, queries)."""
        c = self.plan.config
        values = load(self.memory.statistics.at[slots.q, which, self.part.queries], layout=COLUMNS)
        return lax.broadcast_in_dim(values, (c.keys, c.queries), [1])

    def weights_and_slopes(self, slots: Slots, seen: Any) -> tuple[Array, Array]:
        """P^T and dS^T in 16 bits; seen() says what is visible, and is None where everything is."""
        c, m = self.plan.config, self.memory
        block = Block(
            (c.keys, c.queries),
            lambda acc: self.issue_logits(acc, slots),
            lambda acc: self.issue_weight_gradients(acc, slots),
            m.v.of.count,
            lse=lambda: self.statistic(slots, _LSE),
            delta=self.statistic(slots, _DELTA),
            seen=seen,
        )
        return weights_and_slopes(self.plan.problem, block, interpreted=m.interpreted)

    def gradients(self, sums: Any, left: Callable[[], tuple[Any, Any]], slots: Slots, send: Any) -> Any:
        """dK and dV with those of a block.

        Args:
            left: gives P^T and dS^T of all queries of the block as left operands.
            send: takes this consumer's share of the dQ that `slots.ds` gives.
        """
        m = self.memory

        def issue(refs):
            dk, dv, dq = refs
            weights, slopes = left()
            self.issue_values(dv, weights, slots)
            if dq:
                self.issue_queries(dq, slots)
            self.issue_keys(dk, slopes, slots)
            plgpu.wgmma_wait(len(dq) + len(dk))
            plgpu.barrier_arrive(m.do_free.at[slots.do])
            values = [plgpu.wgmma_accumulator_load(x, wait_n=len(dk)) for x in dq]
            if dq:
                send([lax.optimization_barrier(x) for x in values])

        dk, dv, _ = accumulated((*sums, self.no_dq()), issue, interpreted=m.interpreted)
        return dk, dv

    def send(self, tile: Tile, block: Any, values: list[Array]) -> None:
        """Adds this consumer's share of a block of dQ, counted over all heads."""
        m, c = self.memory, self.plan.config
        if not m.interpreted:
            add_dq(m, c, self.own, self.part, values, self.arrays.dq, block * c.block_q)
            return
        # The interpreter does not add: in the rows that belong to no query, tiles would overwrite each other.
        to, blocks = self.arrays.dq.at[tile.row], dq_rows(self.plan)[0] // c.block_q
        pl.when(block < blocks)(lambda: add_dq(m, c, self.own, self.part, values, to, block * c.block_q))

    # Products.

    def issue_logits(self, acc: Any, slots: Slots) -> None:
        """Starts K Q^T."""
        m = self.memory
        wide = m.q.of.width // m.k.of.width
        for chunk in range(m.k.of.count):
            k = m.k.tiles.at[slots.zero + chunk, self.part.keys]
            # A chunk of Q may hold several of K.
            of_q, at = divmod(chunk, wide)
            columns = pl.ds(at * m.k.of.width, m.k.of.width)
            q = m.q.tiles.at[slots.q, of_q, self.part.queries, columns]
            plgpu.wgmma(acc, k, q.T)

    def issue_weight_gradients(self, acc: Any, slots: Slots) -> None:
        """Starts V dO^T."""
        m = self.memory
        for chunk in range(m.v.of.count):
            v = m.v.tiles.at[slots.zero + chunk, self.part.keys]
            plgpu.wgmma(acc, v, m.do.tiles.at[slots.do, chunk, self.part.queries].T)

    def issue_values(self, accs: Any, weights: Any, slots: Slots) -> None:
        """Starts P^T dO, this consumer's part of dV."""
        m = self.memory
        for chunk, acc in zip(self.part.of_dv, accs, strict=True):
            plgpu.wgmma(acc, weights, m.do.tiles.at[slots.do, within(chunk, m.do.of)])

    def issue_keys(self, accs: Any, slopes: Any, slots: Slots) -> None:
        """Starts dS^T Q, this consumer's part of dK."""
        m = self.memory
        for chunk, acc in zip(self.part.of_dk, accs, strict=True):
            plgpu.wgmma(acc, slopes, m.q.tiles.at[slots.q, within(chunk, m.q.of)])

    def issue_queries(self, accs: Any, slots: Slots) -> None:
        """Starts dS K, this consumer's share of dQ."""
        m = self.memory
        for acc, (group, chunk) in zip(accs, self.part.of_dq, strict=True):
            k = m.k.tiles.at[slots.zero + within(chunk, m.k.of)]
            plgpu.wgmma(acc, m.ds.at[slots.ds, group].T, k)

    def no_dq(self) -> list[Array]:
        """Zeros, as many as this consumer has pieces of a block of dQ."""
        zero = jnp.zeros((64, self.memory.k.of.width), jnp.float32)
        wanted = self.arrays.dq is not None
        return [plgpu.layout_cast(zero, _WGMMA)] * (len(self.part.of_dq) if wanted else 0)

    # Results.

    def _give_out(self, tile: Tile, dk: Any, dv: Any) -> None:
        """Writes this consumer's part of dK and dV."""
        p, m, part = self.plan.problem, self.memory, self.part
        # The others may still read K and V.
        self.meet()
        write(m.v, part, part.of_dv, dv, p.dtype)
        write(m.k, part, part.of_dk, [x * p.scale for x in dk], p.dtype)
        plgpu.commit_smem()
        of_dk = part.of_dk if self.plan.config.columns else list(range(m.k.of.count))
        for buffer, ref, chunks in ((m.v, self.arrays.dv, part.of_dv), (m.k, self.arrays.dk, of_dk)):
            to = rows_of(p, ref, tile.place.batch, tile.place.head)
            copy_out(buffer, part, chunks, to, tile.place.first)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(m.kv_free)
