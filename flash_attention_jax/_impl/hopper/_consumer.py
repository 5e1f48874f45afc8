"""What a consumer warpgroup of the forward kernel does; `_kernel` has the whole."""

from __future__ import annotations

import dataclasses
import functools
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
from flash_attention_jax._impl.hopper._configs import Chunks, Config
from flash_attention_jax._impl.hopper._memory import Memory
from flash_attention_jax._impl.hopper._results import finished, give_lse, give_rows
from flash_attention_jax._impl.hopper._softmax import Statistics, across
from flash_attention_jax._impl.hopper._values import Traces, again, check_values
from flash_attention_jax._impl.hopper._warpgroups import accumulated, over_tiles, rows_of

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
        if self.plan.problem.masked:
            Traces(m, self.own).begin()
        again(self.plan, m, self._over_tiles)
        if c.pingpong and c.consumers > 1:
            pl.when(self.own == 0)(self._await_turn)
        plgpu.wait_smem_to_gmem(0)

    def _over_tiles(self, before: Any, careful: bool) -> Any:
        if careful:
            # What is written once more must have been written.
            plgpu.wait_smem_to_gmem(0)
        body = functools.partial(self._tile, careful)
        steps = over_tiles(self.plan, self.arrays.tables, self.plan.visits, 1, body, before)
        if self.plan.problem.masked and not careful:
            Traces(self.memory, self.own).judge()
        return steps

    def _tile(self, careful, batch, head, row, visits, count):
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

        def some():
            if c.overlap and not careful:
                done = self._overlapped(nothing, place, visits, count)
            else:
                done = self._one_by_one(nothing, place, visits, count, careful)
            return done.sums, tuple(done.statistics)

        def none():
            self._release_queries()
            return nothing.sums, tuple(nothing.statistics)

        sums, statistics = lax.cond(visits.seen > 0, some, none) if p.masked else some()
        out, lse, trace = finished(p, sums, Statistics(*statistics))
        traces = None if careful or not p.masked else Traces(m, self.own)
        before = None if traces is None else traces.read()
        give_lse(c, m, self.own, lse, self.arrays.lse.at[batch, head], first, p.T)
        if traces is not None:
            traces.keep(before + trace)
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
                lambda i, flat: self._step_alone(State.of(flat), place, visits, count, i, masked=True).flat(),
                flat,
            )
            flat = lax.cond(visits.seen > visits.partial, whole, none, flat)
        else:
            flat = whole(flat)
        return State.of(flat)

    def _pipelined(self, state: State, place: Place, visits: Visits, count: Any) -> State:
        """Algorithm 2: the products of one block run under the softmax of the next."""
        m = self.memory
        at = self._at(count + visits.partial if self._masked else count)
        products = self._products(at, place)
        weights, statistics, decay = self._softmax(products, state.statistics, place)
        plgpu.barrier_wait(m.v_full.at[at])
        # Without partial blocks before there is nothing yet that could decay.
        sums = tuple(s * across(decay, s.shape) for s in state.sums) if self._masked else state.sums
        state = State(sums, statistics, weights)
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
        m = self.memory
        at, before = self._at(count + i), self._at(count + i - 1)
        plgpu.barrier_wait(m.k_full.at[at])
        self._await_turn()

        def softmax(products):
            plgpu.barrier_arrive(m.k_free.at[at])
            return self._softmax(products, state.statistics, place)

        sums, (weights, statistics, decay) = self._side_by_side(state, place, at, before, softmax)
        plgpu.barrier_arrive(m.v_free.at[before])
        plgpu.barrier_wait(m.v_full.at[at])
        return State(tuple(s * across(decay, s.shape) for s in sums), statistics, weights)

    def _one_by_one(self, state: State, place: Place, visits: Visits, count: Any, careful: bool) -> State:
        """Algorithm 1 for all blocks."""
        flat, begin = state.flat(), jnp.int32(0)

        def step(masked, careful=False):
            return lambda i, flat: self._step_alone(
                State.of(flat), place, visits, count, i, masked, careful
            ).flat()

        if self._masked:
            flat = lax.fori_loop(begin, visits.partial, step(True, careful), flat)
            begin = visits.partial
        flat = lax.fori_loop(begin, visits.seen, step(False), flat)
        self._release_queries()
        return State.of(flat)

    def _step_alone(
        self,
        state: State,
        place: Place,
        visits: Visits,
        count: Any,
        i: Any,
        masked: bool,
        careful: bool = False,
    ) -> State:
        """Algorithm 1 for one block: logits, softmax and sums after each other."""
        m = self.memory
        at = self._at(count + i)
        if careful:
            check_values(self.plan.config, m, self.own, at)
        products = self._products(at, place)
        weights, statistics, decay = self._softmax(
            products, state.statistics, place, visits.index(i) if masked else None, at if careful else None
        )
        if not careful:
            plgpu.barrier_wait(m.v_full.at[at])
        sums = tuple(s * across(decay, s.shape) for s in state.sums)
        sums = self._accumulated(sums, lambda accs: self._issue_sums(accs, weights, at))
        plgpu.barrier_arrive(m.v_free.at[at])
        return State(tuple(sums), statistics)

    # Matrix products.

    def _products(self, slot: Any, place: Place) -> Array:
        """Q K^T of a block, alone."""
        plgpu.barrier_wait(self.memory.k_full.at[slot])
        self._await_turn()
        products = self._accumulated(
            [self._zero_logits()], lambda acc: self._issue_logits(acc[0], slot, place)
        )[0]
        self._pass_turn()
        plgpu.barrier_arrive(self.memory.k_free.at[slot])
        return products

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

    # Softmax and masks.

    def _softmax(
        self, products: Array, before: Statistics, place: Place, block: Any = None, slot: Any = None
    ) -> tuple[Array, Statistics, Array]:
        """Weights of a block, statistics with it, and what sums so far decay by.

        Args:
            block: its index if it is visible in part; hidden keys get the logit -inf.
            slot: where its values have been checked; visible ones that are not finite get the logit NaN.
        """
        plan = self.plan
        x, factor = _softmax.logits(plan.problem, products)
        if slot is not None:
            poison = load(self.memory.poison.at[slot], layout=COLUMNS)
            x = x + lax.broadcast_in_dim(poison, x.shape, [1])
        if block is not None:
            x = jnp.where(seen_in_block(plan, self.arrays.tables, place, block), x, -jnp.inf)
        may_be_dead = plan.problem.masked and block is not None
        weights, statistics, decay = _softmax.update(x, factor, before, may_be_dead)
        return weights.astype(plan.problem.dtype), statistics, decay
