"""The forward kernel: FlashAttention-3 (arXiv 2407.08608, algorithms 1 and 2) in Pallas Mosaic GPU, sm_90a.

Who does what. A thread block has one producer warpgroup and 1 to 3 consumer warpgroups. It takes tiles of
`consumers * block_q` query rows of one head, one after the other (`Plan.tile`). The producer brings the
tile's queries and then, block by block, K and V through a ring of `stages`; it gives its registers to the
consumers. A consumer has `block_q` rows of the tile: logits by `wgmma`, softmax in
registers, weights times V by `wgmma` with the weights in registers.

Blocks that are visible in part come first, one after the other (algorithm 1). Then, with `overlap`, a
consumer issues Q K^T of a block and the weights of the block before times its V, waits for the first only,
and computes the softmax while the second runs (algorithm 2). With `pingpong` the consumers issue in turns, so
that one computes its softmax while another's products run.

Shared memory, in bytes for 16-bit numbers, with D and Dv padded as `Chunks` says: q 2 tile_q D,
k 2 stages block_kv D, v 2 stages block_kv Dv, out 128 consumers out_slots tile, lse 4 tile_q, and with masks
poison 4 stages block_kv. `_configs.shared_bytes` adds them up. The barriers are described in `Memory`.

Hidden keys may hold anything, and 0 * NaN is NaN. The logits of hidden keys are replaced. Values are checked
in blocks that are visible in part, and there alone: rows of V that are not finite become 0 in shared memory
and leave a NaN in `poison`, which joins the logits. In a block that is visible whole they reach the sums of
all its rows, as they should; at the end a row whose sums are not finite becomes NaN.

Tried and lost. TFLOP/s (bfloat16, 16384 tokens, 2048 wide, JAX 0.11.2), each beside this form in the same
run, which varies by 3 % from run to run; sizes are block_q x consumers, block_kv. On an H100:

    head dim 128 full      64 x 2, 128 with two stages: 630
                           64 x 2, 64: 487     64 x 3, 64: 562     64 x 2, 96: 556     64 x 2, 192: 378
                           64 x 2, 160 with V in tiles of 32 columns, since `wgmma` takes 64 keys at a time of
                           tiles of 64: 603, with spilled registers
                           all heads side by side instead of one after the other: 558
    head dim 64 full       64 x 3, 128: 506
                           64 x 2, 128: 418    64 x 3, 64: 421     64 x 2, 192: 419    64 x 2, 160: 419
    head dim 256 full      64 x 2, 64: 675     without `pingpong` 632, without `overlap` 615, without both 591
    causal 64, 128, 256    with a schedule 459, 578, 612
                           the nth tile to block n mod blocks, there and back again: 368, 512, 400
                           a thread block for each tile: 448, 568, 565 to 612
                           partial blocks inside the pipeline: 249, 350, not run. Where a second loop follows
                           the pipeline's, or a branch or a barrier stands between products under way, ptxas
                           serializes every `wgmma` of the kernel (C7513).

On an H200:

    head dim 128 full      queries in registers 614, in shared memory 602; causal 585 and 588
    head dim 256 full      64 columns of the queries in registers 660, none 649; in another run 647, 638, and
                           613 with 128, which spills registers; causal 594, 604, 600
    192 and 128, causal    64 x 2, 128 with two stages 570, 64 x 2, 64 with three 513
    two tiles of queries   in shared memory: causal 587 for 587 at 16384 tokens, 524 for 518 at 4096, 454 for
                           457 at 2048, 272 for 270 at 512; a window of 1024 403 for 402, a key mask 588
                           for 605
    softmax before wait    ptxas moves the exponentials behind the wait for the sums of the block before, so
                           that only the maximum runs under these. A store that needs all exponentials, which
                           ptxas does not move, keeps them before it, and costs. Full 64, 128, 256: 488 for
                           494, 591 instead of 595, 615 instead of 662; causal 430 instead of 455, 563
                           instead of 582, 594 instead of 607. The products of the other consumer run anyway.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper import _softmax
from flash_attention_jax._impl.hopper._blocks import (
    COLUMNS,
    Place,
    Plan,
    Tables,
    Visits,
    load,
    rem,
    seen_in_block,
)
from flash_attention_jax._impl.hopper._configs import REGISTERS, Chunks, Config
from flash_attention_jax._impl.hopper._memory import Memory
from flash_attention_jax._impl.hopper._results import finished, give_lse, give_rows
from flash_attention_jax._impl.hopper._softmax import Statistics, across
from flash_attention_jax._impl.hopper._values import check_values
from flash_attention_jax._impl.hopper._warpgroups import accumulated, divide, over_tiles, rows_of

Array = Any
_WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Arrays:
    """q, k, v, out and lse in device memory, and the tables."""

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    tables: Tables


def attend(plan: Plan[Config], arrays: Arrays, memory: Memory) -> None:
    """The body of the kernel, for every warpgroup."""
    divide(
        plan.config.consumers,
        REGISTERS[plan.config.consumers],
        lambda own: Consumer(plan, arrays, memory, own).run(),
        lambda: produce(plan, arrays, memory),
    )


def produce(plan: Plan[Config], arrays: Arrays, memory: Memory) -> None:
    """The producer: queries of a tile, then its blocks of keys and values."""
    p, c = plan.problem, plan.config

    def tile(batch, head, row, visits, count):
        kv_head = lax.div(head, jnp.int32(p.G))
        q, k, v = (
            rows_of(p, x, batch, h) for x, h in ((arrays.q, head), (arrays.k, kv_head), (arrays.v, kv_head))
        )
        plgpu.barrier_wait(memory.q_free)
        memory.q.fetch(q, pl.ds(row * c.tile_q, c.tile_q), memory.q_full)

        def bring(i, _):
            slot = rem(count + i, c.stages)
            rows = pl.ds(visits.index(i) * c.block_kv, c.block_kv)
            plgpu.barrier_wait(memory.k_free.at[slot])
            memory.k.fetch(k, rows, memory.k_full.at[slot], slot)
            plgpu.barrier_wait(memory.v_free.at[slot])
            memory.v.fetch(v, rows, memory.v_full.at[slot], slot)

        lax.fori_loop(jnp.int32(0), visits.seen, bring, None)

    over_tiles(plan, arrays.tables, plan.visits, 1, tile)
    # Nothing may be under way when the barriers go.
    plgpu.barrier_wait(memory.q_free)
    for slot in range(c.stages):
        plgpu.barrier_wait(memory.k_free.at[slot])
        plgpu.barrier_wait(memory.v_free.at[slot])


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns of a chunk of Q, all of them `held` in registers or all in shared memory."""

    chunk: int
    first: int
    width: int
    held: bool


def parts_of_q(of: Chunks, config: Config) -> list[Columns]:
    """Q as its products with K take it, the first `q_in_registers` columns from registers."""
    parts = []
    for chunk in range(of.count):
        held = min(max(config.q_in_registers - chunk * of.width, 0), of.width) // of.tile * of.tile
        parts += [Columns(chunk, 0, held, True), Columns(chunk, held, of.width - held, False)]
    return [part for part in parts if part.width]


@dataclasses.dataclass(frozen=True)
class State:
    """What a consumer carries from block to block.

    Attributes:
        sums: float32 (block_q, width) for each chunk of v, relative to `statistics.top`.
        weights: 16 bits (block_q, block_kv), of the block whose values have not been added yet; None without
            overlap.
    """

    sums: tuple[Array, ...]
    statistics: Statistics
    weights: Array | None = None

    def flat(self) -> tuple[Any, ...]:
        """As a loop carries it."""
        return self.sums, tuple(self.statistics), self.weights

    @classmethod
    def of(cls, flat: Any) -> State:
        """Inverse of `flat`."""
        return cls(flat[0], Statistics(*flat[1]), flat[2])


@dataclasses.dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup."""

    plan: Plan[Config]
    arrays: Arrays
    memory: Memory
    own: Any

    @property
    def _masked(self) -> bool:
        """Whether there are blocks that are visible in part."""
        return self.plan.problem.masked or self.plan.ragged

    def run(self) -> None:
        """All tiles of this thread block."""
        m, c = self.memory, self.plan.config
        # Everything is free at first, and the first consumer begins.
        plgpu.barrier_arrive(m.q_free)
        for slot in range(c.stages):
            plgpu.barrier_arrive(m.k_free.at[slot])
            plgpu.barrier_arrive(m.v_free.at[slot])
        if c.pingpong and c.consumers > 1:
            pl.when(self.own == c.consumers - 1)(lambda: plgpu.barrier_arrive(m.turn.at[0]))
        over_tiles(self.plan, self.arrays.tables, self.plan.visits, 1, self._tile)
        if c.pingpong and c.consumers > 1:
            pl.when(self.own == 0)(self._await_turn)
        plgpu.wait_smem_to_gmem(0)

    def _tile(self, batch, head, row, visits, count):
        p, c, m = self.plan.problem, self.plan.config, self.memory
        first = row * c.tile_q + self.own * c.block_q
        place = Place(batch, first, self.plan.offset(self.arrays.tables, batch))
        plgpu.barrier_wait(m.q_full)
        if m.weights is None:
            held = [load(self._queries(part), layout=_WGMMA) for part in parts_of_q(m.q.of, c) if part.held]
            place = dataclasses.replace(place, queries=held)
        if self._holds_queries:
            # Those of the next tile may come.
            plgpu.barrier_arrive(m.q_free)
        nothing = State(self._no_sums(), Statistics.start(c.block_q))
        blocks = self._overlapped if c.overlap else self._one_by_one

        def some():
            done = blocks(nothing, place, visits, count)
            return done.sums, tuple(done.statistics)

        def none():
            self._release_queries()
            return nothing.sums, tuple(nothing.statistics)

        sums, statistics = lax.cond(visits.seen > 0, some, none) if p.masked else some()
        out, lse = finished(p, sums, Statistics(*statistics))
        give_lse(c, m, self.own, lse, self.arrays.lse.at[batch, head], first, p.T)
        give_rows(c, m, self.own, out, rows_of(p, self.arrays.out, batch, head), first)

    # The loops over blocks.

    def _overlapped(self, state: State, place: Place, visits: Visits, count: Any) -> State:
        """Blocks visible in part one by one, the others by algorithm 2."""

        def whole(flat):
            return self._pipelined(State.of(flat), place, visits, count).flat()

        def none(flat):
            self._release_queries()
            return flat

        flat = state.flat()
        if self._masked:
            flat = lax.fori_loop(
                jnp.int32(0),
                visits.partial,
                lambda i, flat: self._step_alone(State.of(flat), place, visits, count, i, True).flat(),
                flat,
            )
            flat = lax.cond(visits.seen > visits.partial, whole, none, flat)
        else:
            flat = whole(flat)
        return State.of(flat)

    def _pipelined(self, state: State, place: Place, visits: Visits, count: Any) -> State:
        """Algorithm 2: the products of one block run under the softmax of the next."""
        m, dtype = self.memory, self.plan.problem.dtype
        at = self._at(count + visits.partial if self._masked else count)
        plgpu.barrier_wait(m.k_full.at[at])
        self._await_turn()
        products = self._accumulated(
            [self._zero_logits()], lambda acc: self._issue_logits(acc[0], at, place)
        )[0]
        self._pass_turn()
        plgpu.barrier_arrive(m.k_free.at[at])
        x, factor = self._masked_logits(products, place, None, at, masked=False)
        weights, statistics, decay = _softmax.update(x, factor, state.statistics, False)
        plgpu.barrier_wait(m.v_full.at[at])
        # Without partial blocks before there is nothing yet that could decay.
        sums = tuple(s * across(decay, s.shape) for s in state.sums) if self._masked else state.sums
        state = State(sums, statistics, weights.astype(dtype))
        state = State.of(
            lax.fori_loop(
                jnp.int32(1) + visits.partial if self._masked else jnp.int32(1),
                visits.seen,
                lambda i, flat: self._step(State.of(flat), place, visits, count, i).flat(),
                state.flat(),
            )
        )
        self._release_queries()
        last = self._at(count + visits.seen - 1)
        sums = self._accumulated(state.sums, lambda accs: self._issue_sums(accs, state.weights, last))
        plgpu.barrier_arrive(m.v_free.at[last])
        return State(tuple(sums), state.statistics)

    def _step(self, state: State, place: Place, visits: Visits, count: Any, i: Any) -> State:
        """One block: its logits are computed beside the sums of the block before."""
        p, m = self.plan.problem, self.memory
        at, before = self._at(count + i), self._at(count + i - 1)
        plgpu.barrier_wait(m.k_full.at[at])
        self._await_turn()

        def softmax(products):
            plgpu.barrier_arrive(m.k_free.at[at])
            x, factor = self._masked_logits(products, place, None, at, False)
            weights, statistics, decay = _softmax.update(x, factor, state.statistics, False)
            return weights.astype(p.dtype), statistics, decay

        sums, (weights, statistics, decay) = self._side_by_side(state, place, at, before, softmax)
        plgpu.barrier_arrive(m.v_free.at[before])
        plgpu.barrier_wait(m.v_full.at[at])
        return State(tuple(s * across(decay, s.shape) for s in sums), statistics, weights)

    def _one_by_one(self, state: State, place: Place, visits: Visits, count: Any) -> State:
        """Algorithm 1 for all blocks."""
        flat, begin = state.flat(), jnp.int32(0)

        def step(masked):
            return lambda i, flat: self._step_alone(State.of(flat), place, visits, count, i, masked).flat()

        if self._masked:
            flat = lax.fori_loop(begin, visits.partial, step(True), flat)
            begin = visits.partial
        flat = lax.fori_loop(begin, visits.seen, step(False), flat)
        self._release_queries()
        return State.of(flat)

    def _step_alone(
        self, state: State, place: Place, visits: Visits, count: Any, i: Any, masked: bool
    ) -> State:
        """Algorithm 1 for one block: logits, softmax and sums after each other."""
        p, m = self.plan.problem, self.memory
        at = self._at(count + i)
        if masked and p.masked:
            check_values(self.plan.config, m, self.own, at)
        plgpu.barrier_wait(m.k_full.at[at])
        self._await_turn()
        products = self._accumulated(
            [self._zero_logits()], lambda acc: self._issue_logits(acc[0], at, place)
        )[0]
        self._pass_turn()
        plgpu.barrier_arrive(m.k_free.at[at])
        x, factor = self._masked_logits(products, place, visits.index(i) if masked else None, at, masked)
        weights, statistics, decay = _softmax.update(x, factor, state.statistics, masked and p.masked)
        if not (masked and p.masked):
            plgpu.barrier_wait(m.v_full.at[at])
        weights = weights.astype(p.dtype)
        sums = tuple(s * across(decay, s.shape) for s in state.sums)
        sums = self._accumulated(sums, lambda accs: self._issue_sums(accs, weights, at))
        plgpu.barrier_arrive(m.v_free.at[at])
        return State(tuple(sums), statistics)

    # Matrix products.

    def _at(self, n: Any) -> Any:
        return rem(n, self.plan.config.stages)

    def _no_sums(self) -> tuple[Array, ...]:
        of = self.memory.v.of
        zero = jnp.zeros((self.plan.config.block_q, of.width), jnp.float32)
        return tuple(plgpu.layout_cast(zero, _WGMMA) for _ in range(of.count))

    def _zero_logits(self) -> Array:
        shape = (self.plan.config.block_q, self.plan.config.block_kv)
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _WGMMA)

    @property
    def _holds_queries(self) -> bool:
        """Whether nothing of a tile's queries is read from shared memory once they are in registers."""
        parts = parts_of_q(self.memory.q.of, self.plan.config)
        return self.memory.weights is None and all(part.held for part in parts)

    def _release_queries(self) -> None:
        """After the last product that reads queries."""
        if not self._holds_queries:
            plgpu.barrier_arrive(self.memory.q_free)

    def _queries(self, part: Columns) -> Any:
        """Columns of this consumer's queries in shared memory."""
        rows = pl.ds(self.own * self.plan.config.block_q, self.plan.config.block_q)
        return self.memory.q.tiles.at[part.chunk, rows, pl.ds(part.first, part.width)]

    def _issue_logits(self, acc: Any, slot: Any, place: Place) -> None:
        m = self.memory
        held = iter(place.queries)
        for part in parts_of_q(m.q.of, self.plan.config):
            q = next(held, None) if part.held else None
            k = m.k.tiles.at[slot, part.chunk, :, pl.ds(part.first, part.width)]
            plgpu.wgmma(acc, self._queries(part) if q is None else q, k.T)

    def _issue_sums(self, accs: Any, weights: Array, slot: Any) -> None:
        m = self.memory
        if m.weights is not None:
            m.weights[self.own] = weights
            plgpu.commit_smem()
            weights = m.weights.at[self.own]
        for chunk, acc in enumerate(accs):
            plgpu.wgmma(acc, weights, m.v.tiles.at[slot, chunk])

    def _accumulated(self, values: Any, issue: Any) -> list[Array]:
        """The values after the products that issue(accumulators) adds to them."""
        return accumulated(list(values), issue, interpreted=self.memory.weights is not None)

    def _side_by_side(
        self, state: State, place: Place, at: Any, before: Any, softmax: Any
    ) -> tuple[Any, Any]:
        """Issues logits of a block and sums of the one before; softmax(logits) runs under the latter."""
        count = self.memory.v.of.count

        def issue(acc, accs):
            self._issue_logits(acc, at, place)
            self._issue_sums(accs, state.weights, before)
            self._pass_turn()
            products = plgpu.wgmma_accumulator_load(acc, wait_n=count)
            # Nothing of the softmax may move before the wait, which the compiler cannot tell.
            return softmax(lax.optimization_barrier(products))

        if self.memory.weights is None:
            statistics = state.statistics

            def stateful(refs):
                accs, acc, *results = refs
                done = issue(acc, accs)
                for ref, x in zip(results, (done[0], *done[1], done[2]), strict=True):
                    ref[...] = x

            start = (state.weights, *statistics, statistics.norm)
            sums = [plgpu.WGMMAAccumulatorRef.init(x) for x in state.sums]
            sums, _, weights, top, norm, decay = pl.run_state(stateful)(
                (sums, plgpu.WGMMAAccumulatorRef.init(self._zero_logits()), *start)
            )
            return sums, (weights, Statistics(top, norm), decay)

        def scoped(acc, *accs):
            done = issue(acc, accs)
            return [a[...] for a in accs], (done[0], tuple(done[1]), done[2])

        c = self.plan.config
        shapes = [(c.block_q, c.block_kv), *(x.shape for x in state.sums)]
        parts, (weights, stats, decay) = pl.run_scoped(
            scoped, *(plgpu.WGMMAAccumulatorRef(shape) for shape in shapes)
        )
        sums = [x + part for x, part in zip(state.sums, parts, strict=True)]
        return sums, (weights, Statistics(*stats), decay)

    def _await_turn(self) -> None:
        c = self.plan.config
        if c.pingpong and c.consumers > 1:
            plgpu.barrier_wait(self.memory.turn.at[self.own])

    def _pass_turn(self) -> None:
        c = self.plan.config
        if c.pingpong and c.consumers > 1:
            plgpu.barrier_arrive(self.memory.turn.at[rem(self.own + 1, c.consumers)])

    # Masks.

    def _masked_logits(
        self, products: Array, place: Place, block: Any, slot: Any, masked: bool
    ) -> tuple[Array, float]:
        """Logits and their factor; hidden keys get -inf, and visible ones whose values are not finite NaN."""
        plan = self.plan
        x, factor = _softmax.logits(plan.problem, products)
        if masked:
            if plan.problem.masked:
                poison = load(self.memory.poison.at[slot], layout=COLUMNS)
                x = x + lax.broadcast_in_dim(poison, x.shape, [1])
            x = jnp.where(seen_in_block(plan, self.arrays.tables, place, block), x, -jnp.inf)
        return x, factor
