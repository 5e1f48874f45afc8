"""The backward kernel: FlashAttention-3 (arXiv 2407.08608, algorithm 3) in Pallas Mosaic GPU, sm_90a.

Five products for each pair of blocks, in one kernel. With the keys of a tile as rows,

    S^T = K Q^T        P^T = exp2(S^T - lse)      dP^T = V dO^T       dS^T = P^T (dP^T - delta)
    dV += P^T dO       dK += dS^T Q               dQ += dS K

Who does what. A thread block has one producer warpgroup and 1 to 3 consumer warpgroups. It takes tiles of
`consumers * keys` keys of one key head (`BackwardPlan`). The producer brings K and V of the tile and then,
block by block, Q, dO and their statistics through rings, for all heads of the group. A consumer has `keys`
rows of the tile: its S^T, dP^T, dK and dV stay in registers from beginning to end, P^T and dS^T are left
operands from registers. dQ needs the keys of all consumers: dS^T goes to shared memory, and each consumer
computes a share of the block of dQ, which TMA adds to a float32 array in device memory. These sums arrive in
any order, so dQ differs from run to run by its rounding.

Where a warpgroup cannot hold dK and dV of 64 keys (head dims above 128, `BackwardConfig.columns`), the tile
has 64 keys in all. A consumer computes the columns of S^T and dP^T that belong to its queries, puts P^T and
dS^T into shared memory, and has a share of the columns of dK, dV and dQ. `Part` says who has what.

The accumulator of dP^T starts at minus delta, which saves a subtraction. The softmax runs under the product
V dO^T; while one consumer computes, the products of the others run.

Shared memory, in bytes for 16-bit numbers, with D and Dv padded as `Chunks` says: k 2 tile_kv D, v 2 tile_kv
Dv, q 2 stages_q block_q D, do 2 stages_do block_q Dv, ds 2 slots_ds tile_kv block_q, p as ds where columns
are divided, dq 256 consumers slots_dq piece, statistics 8 stages_q block_q. `shared_bytes` adds them up. The
barriers are described in `BackwardMemory`.

What is hidden may hold anything, and 0 * NaN is NaN. With masks, keys that are not finite become 0 in shared
memory once for each tile. The weights of hidden pairs are replaced, and gradients of logits whose weight
is 0. Queries that see no key stand in blocks that are visible in part: where there are such, their rows of Q
and dO become 0 in shared memory. Rows beyond the last query have lse = inf.

Tried and lost: TFLOP/s of the backward pass alone, 2.5 times the forward's FLOPs, on an H100 (bfloat16, 16384
tokens, 2048 wide, JAX 0.11.2), each beside this form in the same run, which varies by 3 % from run to run:

    head dim 64 full       489     blocks of 64 queries 352, four heads side by side 460
                                   all tiles beginning with the same queries 398
    head dim 64 causal     457     a thread block for each tile 423, blocks of 64 queries 352
    head dim 128 full      526     one slot for dS 505, 120 bytes of each thread spilled 494
    head dim 128 causal    529     a thread block for each tile 516, two heads side by side 507
    4 x 4096 of 128 full   497     all heads side by side 347
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper._backward_blocks import BackwardPlan, KeyPlace, seen_by_block
from flash_attention_jax._impl.hopper._backward_configs import REGISTERS
from flash_attention_jax._impl.hopper._backward_memory import BackwardMemory
from flash_attention_jax._impl.hopper._backward_out import add_dq, copy_out, write
from flash_attention_jax._impl.hopper._backward_parts import Part, within
from flash_attention_jax._impl.hopper._backward_repair import repair_keys, repair_queries
from flash_attention_jax._impl.hopper._blocks import COLUMNS, Tables, Visits, load, rem
from flash_attention_jax._impl.hopper._slopes import Block, weights_and_slopes
from flash_attention_jax._impl.hopper._warpgroups import divide, over_tiles, rows_of

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
        dq: float32 (B N T', D') that the kernel adds to; (tiles, B N T', D') for the interpreter. None where
            it is not wanted.
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


def differentiate(plan: BackwardPlan, arrays: BackwardArrays, memory: BackwardMemory) -> None:
    """The body of the kernel, for every warpgroup."""

    def consume(own):
        part = Part.of(plan.problem, plan.config, own)
        BackwardConsumer(plan, arrays, memory, own, part).run()

    consumers = plan.config.consumers
    divide(consumers, REGISTERS[consumers], consume, lambda: produce(plan, arrays, memory))


def _over_tiles(plan: BackwardPlan, arrays: BackwardArrays, body: Any) -> None:
    """Calls body(batch, head, row, visits, steps before) for every tile of this thread block."""
    over_tiles(plan.across, arrays.tables, plan.visits, plan.problem.G, body)


def _over_steps(plan: BackwardPlan, visits: Visits, body: Any, carry: Any) -> Any:
    """carry = body(i, carry, masked) for every step of a tile, those visible in part first."""
    group, begin = plan.problem.G, jnp.int32(0)
    if plan.hides:
        end = visits.partial * group
        carry = lax.fori_loop(begin, end, lambda i, x: body(i, x, True), carry)
        begin = end
    return lax.fori_loop(begin, visits.seen * group, lambda i, x: body(i, x, False), carry)


def produce(plan: BackwardPlan, arrays: BackwardArrays, memory: BackwardMemory) -> None:
    """The producer: K and V of a tile, then its blocks of Q, of the statistics and of dO."""
    p, c, m = plan.problem, plan.config, memory

    def tile(batch, head, row, visits, count):
        keys = pl.ds(row * c.tile_kv, c.tile_kv)
        plgpu.barrier_wait(m.kv_free)
        m.k.fetch(rows_of(p, arrays.k, batch, head), keys, m.k_full)
        m.v.fetch(rows_of(p, arrays.v, batch, head), keys, m.v_full)

        def bring(i, _, masked):
            of_group, block = plan.step(visits, i, masked)
            n = head * p.G + of_group
            rows = pl.ds(block * c.block_q, c.block_q)
            slot = rem(count + i, c.stages_q)
            plgpu.barrier_wait(m.q_free.at[slot])
            m.q.fetch(rows_of(p, arrays.q, batch, n), rows, m.q_full.at[slot], slot)
            both = arrays.statistics.at[batch, n, :, rows]
            plgpu.copy_gmem_to_smem(both, m.statistics.at[slot], m.q_full.at[slot])
            slot = rem(count + i, c.stages_do)
            plgpu.barrier_wait(m.do_free.at[slot])
            m.do.fetch(rows_of(p, arrays.do, batch, n), rows, m.do_full.at[slot], slot)

        _over_steps(plan, visits, bring, None)

    _over_tiles(plan, arrays, tile)
    # Nothing may be under way when the barriers go.
    plgpu.barrier_wait(m.kv_free)
    for slot in range(c.stages_q):
        plgpu.barrier_wait(m.q_free.at[slot])
    for slot in range(c.stages_do):
        plgpu.barrier_wait(m.do_free.at[slot])


class Tile(NamedTuple):
    """Where a consumer stands, and the index of its tile."""

    place: KeyPlace
    row: Any


class Slots(NamedTuple):
    """Of a block of queries in the rings, and of its dS; `zero` is 0.

    Only the kernel knows that. Products find K and V by way of it: the compiler would compute the 24
    descriptors of their pieces before the loop, and keep them in registers that it does not have.
    """

    q: Any
    do: Any
    ds: Any
    zero: Any


@dataclasses.dataclass(frozen=True)
class BackwardConsumer:
    """One consumer warpgroup."""

    plan: BackwardPlan
    arrays: BackwardArrays
    memory: BackwardMemory
    own: Any
    part: Part

    def run(self) -> None:
        """All tiles of this thread block."""
        m, c = self.memory, self.plan.config
        # Everything is free at first.
        plgpu.barrier_arrive(m.kv_free)
        for slot in range(c.stages_q):
            plgpu.barrier_arrive(m.q_free.at[slot])
        for slot in range(c.stages_do):
            plgpu.barrier_arrive(m.do_free.at[slot])
        _over_tiles(self.plan, self.arrays, self._tile)
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
                self._meet()
        tile = Tile(place, row)

        def step(i, carry, masked):
            return self._step(carry, tile, plan.step(visits, i, masked), count, i, masked)

        def zeros(of, chunks):
            return (plgpu.layout_cast(jnp.zeros((c.keys, of.width), jnp.float32), _WGMMA),) * len(chunks)

        start = zeros(m.q.of, self.part.of_dk), zeros(m.do.of, self.part.of_dv)
        (dk, dv), before = _over_steps(plan, visits, step, (start, self._nowhere()))
        if self._late:
            steps = visits.seen * p.G

            def last():
                self._last_query_gradients(tile, count + steps, before)

            pl.when(steps > 0)(last) if p.masked else last()
        self._give_out(tile, dk, dv)

    @property
    def _late(self) -> bool:
        """Whether dQ of a block is computed in the step after."""
        return self.plan.config.late_dq and self.arrays.dq is not None

    def _nowhere(self) -> Any:
        """The block of dQ that belongs to no query: what is added there counts for nothing."""
        plan = self.plan
        return jnp.int32(plan.problem.B * plan.problem.N * (plan.length // plan.config.block_q))

    def _meet(self) -> None:
        """Waits for all consumers."""
        plgpu.barrier_arrive(self.memory.done)
        plgpu.barrier_wait(self.memory.done)

    # One block of queries.

    def _step(self, carry: Any, tile: Tile, at: Any, count: Any, i: Any, masked: bool) -> Any:
        """Step i of a tile: dK and dV with those of a block, and which block of dQ is its."""
        plan, c, m = self.plan, self.plan.config, self.memory
        head, block = tile.place.head * plan.problem.G + at[0], at[1]
        zero = lax.optimization_barrier(jnp.int32(0))
        (sums, before), n = carry, count + i
        of_ds = n + c.slots_ds - 1 if self._late else n
        slots = Slots(rem(n, c.stages_q), rem(n, c.stages_do), rem(of_ds, c.slots_ds), zero)
        plgpu.barrier_wait(m.q_full.at[slots.q])
        plgpu.barrier_wait(m.do_full.at[slots.do])
        if masked and self.arrays.dead is not None:
            dead = self.arrays.dead[tile.place.batch, head, block] != 0

            @pl.when(dead)
            def _():
                repair_queries(m, c, self.own, slots)
                self._meet()

        def seen():
            start = block * c.block_q + self.part.queries.start
            return seen_by_block(plan, self.arrays.tables, tile.place, start, zero)

        weights, slopes = self._weights_and_slopes(slots, seen if masked else None)
        if self._late:
            self._share_late(slopes, rem(n, c.slots_ds), slots.ds, i)
        elif self.arrays.dq is not None or c.columns:
            self._share(weights, slopes, slots.ds)
        here = (tile.place.batch * plan.problem.N + head) * (plan.length // c.block_q) + block
        send = functools.partial(self._send, tile, before if self._late else here)
        sums = self._gradients(sums, weights, slopes, slots, send)
        plgpu.barrier_arrive(m.q_free.at[slots.q])
        return sums, here

    def _send(self, tile: Tile, block: Any, values: list[Array]) -> None:
        """Adds this consumer's share of a block of dQ, counted over all heads."""
        to = self.arrays.dq.at[tile.row] if self.memory.interpreted else self.arrays.dq
        add_dq(
            self.memory, self.plan.config, self.own, self.part, values, to, block * self.plan.config.block_q
        )

    def _weights_and_slopes(self, slots: Slots, seen: Any) -> tuple[Array, Array]:
        """P^T and dS^T in 16 bits; seen() says what is visible, and is None where everything is."""
        c, m = self.plan.config, self.memory
        shape = (c.keys, c.queries)

        def statistic(i):
            values = load(m.statistics.at[slots.q, i, self.part.queries], layout=COLUMNS)
            return lax.broadcast_in_dim(values, shape, [1])

        block = Block(
            shape,
            lambda acc: self._issue_logits(acc, slots),
            lambda acc: self._issue_weight_gradients(acc, slots),
            m.v.of.count,
            lse=lambda: statistic(_LSE),
            early_lse=c.early_lse,
            delta=statistic(_DELTA),
            seen=seen,
        )
        return weights_and_slopes(self.plan.problem, block, interpreted=m.interpreted)

    def _share(self, weights: Array, slopes: Array, slot: Any) -> None:
        """Writes this consumer's part of dS^T, and of P^T, for the others, and waits for theirs."""
        c, m, part = self.plan.config, self.memory, self.part
        if c.slots_ds == 1:
            # All must have read the block before.
            self._meet()
        if c.columns:
            m.p[slot, 0, :, part.queries] = weights
            m.ds[slot, 0, :, part.queries] = slopes
        else:
            for group in range(c.block_q // 64):
                m.ds[slot, group, part.keys] = slopes[:, group * 64 : (group + 1) * 64]
        plgpu.commit_smem()
        plgpu.barrier_arrive(m.ds_full.at[slot])
        # Not between products: where there is a branch while some are under way, ptxas serializes every
        # `wgmma` of the kernel (C7513).
        plgpu.barrier_wait(m.ds_full.at[slot])

    def _share_late(self, slopes: Array, slot: Any, before: Any, i: Any) -> None:
        """Writes this consumer's rows of dS^T for the next step; those of the step before are complete then.

        Whoever has given its dS of a block has left the product before behind: of three slots, the one that
        is written is not read by anybody.
        """
        c, m = self.plan.config, self.memory
        pl.when(i > 0)(lambda: plgpu.barrier_wait(m.ds_full.at[before]))
        for group in range(c.block_q // 64):
            m.ds[slot, group, self.part.keys] = slopes[:, group * 64 : (group + 1) * 64]
        plgpu.commit_smem()
        plgpu.barrier_arrive(m.ds_full.at[slot])

    def _left(self, weights: Array, slopes: Array, slot: Any) -> tuple[Any, Any]:
        """P^T and dS^T as left operands: of this consumer's keys and all queries of the block."""
        m = self.memory
        if self.plan.config.columns:
            return m.p.at[slot, 0], m.ds.at[slot, 0]
        if not m.interpreted:
            return weights, slopes
        return m.weights.at[self.own, 0], m.weights.at[self.own, 1]

    def _gradients(self, sums: Any, weights: Array, slopes: Array, slots: Slots, send: Any) -> Any:
        """dK and dV with those of this block added; send(values) has this consumer's share of dQ."""
        m, part, wanted = self.memory, self.part, self.arrays.dq is not None
        count = len(part.of_dq) if wanted else 0
        if m.weights is not None:
            for i, x in enumerate((weights, slopes)):
                m.weights[self.own, i] = x
            plgpu.commit_smem()

        def issue(dk, dv, dq):
            of_dv, of_dk = self._left(weights, slopes, slots.ds)
            for chunk, acc in zip(part.of_dv, dv, strict=True):
                plgpu.wgmma(acc, of_dv, m.do.tiles.at[slots.do, within(chunk, m.do.of)])
            if wanted:
                self._issue_query_gradients(dq, slots)
            for chunk, acc in zip(part.of_dk, dk, strict=True):
                plgpu.wgmma(acc, of_dk, m.q.tiles.at[slots.q, within(chunk, m.q.of)])
            plgpu.wgmma_wait(len(dq) + len(dk))
            plgpu.barrier_arrive(m.do_free.at[slots.do])
            values = [plgpu.wgmma_accumulator_load(x, wait_n=len(dk)) for x in dq]
            if wanted:
                send([lax.optimization_barrier(x) for x in values])

        shape = (64, m.k.of.width)
        if not m.interpreted:
            zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _WGMMA)
            starts = (*sums, [zero] * count)
            accs = [[plgpu.WGMMAAccumulatorRef.init(x) for x in values] for values in starts]
            dk, dv, _ = pl.run_state(lambda refs: issue(*refs))(accs)
            return tuple(dk), tuple(dv)
        kinds = [[plgpu.WGMMAAccumulatorRef(x.shape) for x in values] for values in sums]
        kinds.append([plgpu.WGMMAAccumulatorRef(shape)] * count)

        def scoped(*accs):
            n, both = len(sums[0]), len(sums[0]) + len(sums[1])
            issue(accs[:n], accs[n:both], accs[both:])
            return [acc[...] for acc in accs[:both]]

        parts = pl.run_scoped(scoped, *(kind for row in kinds for kind in row))
        dk, dv = parts[: len(sums[0])], parts[len(sums[0]) :]
        return tuple(tuple(map(jnp.add, *pair)) for pair in zip(sums, (dk, dv), strict=True))

    def _last_query_gradients(self, tile: Tile, n: Any, block: Any) -> None:
        """This consumer's share of dQ of the last block of a tile."""
        m, c = self.memory, self.plan.config
        slots = Slots(None, None, rem(n - 1, c.slots_ds), lax.optimization_barrier(jnp.int32(0)))
        plgpu.barrier_wait(m.ds_full.at[slots.ds])
        shape, count = (64, m.k.of.width), len(self.part.of_dq)
        if m.interpreted:

            def scoped(*accs):
                self._issue_query_gradients(accs, slots)
                return [acc[...] for acc in accs]

            values = pl.run_scoped(scoped, *[plgpu.WGMMAAccumulatorRef(shape)] * count)
        else:
            zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _WGMMA)
            accs = [plgpu.WGMMAAccumulatorRef.init(zero)] * count
            values = pl.run_state(lambda refs: self._issue_query_gradients(refs, slots))(accs)
        self._send(tile, block, list(values))

    # Products.

    def _issue_logits(self, acc: Any, slots: Slots) -> None:
        m = self.memory
        wide = m.q.of.width // m.k.of.width
        for chunk in range(m.k.of.count):
            k = m.k.tiles.at[slots.zero + chunk, self.part.keys]
            # A chunk of Q may hold several of K.
            of_q, at = divmod(chunk, wide)
            columns = pl.ds(at * m.k.of.width, m.k.of.width)
            q = m.q.tiles.at[slots.q, of_q, self.part.queries, columns]
            plgpu.wgmma(acc, k, q.T)

    def _issue_weight_gradients(self, acc: Any, slots: Slots) -> None:
        m = self.memory
        for chunk in range(m.v.of.count):
            v = m.v.tiles.at[slots.zero + chunk, self.part.keys]
            plgpu.wgmma(acc, v, m.do.tiles.at[slots.do, chunk, self.part.queries].T)

    def _issue_query_gradients(self, accs: Any, slots: Slots) -> None:
        """This consumer's share of dS K."""
        m = self.memory
        for acc, (group, chunk) in zip(accs, self.part.of_dq, strict=True):
            k = m.k.tiles.at[slots.zero + within(chunk, m.k.of)]
            plgpu.wgmma(acc, m.ds.at[slots.ds, group].T, k)

    # Results.

    def _give_out(self, tile: Tile, dk: Any, dv: Any) -> None:
        """Writes this consumer's part of dK and dV."""
        p, m, part = self.plan.problem, self.memory, self.part
        # The others may still read K and V.
        self._meet()
        write(m.v, part, part.of_dv, dv, p.dtype)
        write(m.k, part, part.of_dk, [x * p.scale for x in dk], p.dtype)
        plgpu.commit_smem()
        of_dk = part.of_dk if self.plan.config.columns else list(range(m.k.of.count))
        for buffer, ref, chunks in ((m.v, self.arrays.dv, part.of_dv), (m.k, self.arrays.dk, of_dk)):
            to = rows_of(p, ref, tile.place.batch, tile.place.head)
            copy_out(buffer, part, chunks, to, tile.place.first)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(m.kv_free)
