"""Ring attention: partial results of each hop, merged by `lse`, and their derivatives.

Every product is computed by the primitives of `_attend`, and so by whichever implementation takes the pair
of pieces. Given the `lse` of the whole sequence, the tangents and gradients of a pair of pieces are those
of one device, and the whole is their sum: `_ring_sum`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from flash_attention_jax import _formulas
from flash_attention_jax._attend import Call, attend, tangent_p
from flash_attention_jax._distributed._circulation import Hop, circulate
from flash_attention_jax._distributed._layout import Plan, Way, ways, within
from flash_attention_jax._distributed._ring_sum import Described, RingSum, ring_sum
from flash_attention_jax._formulas import DIFFERENTIABLE
from flash_attention_jax._mask import Cover
from flash_attention_jax._problem import Operands, Problem
from flash_attention_jax._varying import alike

Array = Any
Arrays = Mapping[str, Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def ring(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """out, of q's dtype, and lse (B, N, T), of one device's canonical operands.

    Only inside `jax.shard_map`.
    """
    return _forward(plan, operands)


@functools.partial(ring.defjvp, symbolic_zeros=True)
def _ring_jvp(plan, primals, tangents):
    operands = Operands(*primals[0])
    moved = {
        name: getattr(tangents[0], name)
        for name in DIFFERENTIABLE
        if not isinstance(getattr(tangents[0], name), SymbolicZero | None)
    }
    out, lse = ring(plan, operands)
    arrays = _named(operands) | {"out": out, "lse": lse} | {f"d{name}": x for name, x in moved.items()}
    acc = plan.problem.accumulator
    spec = RingSum(
        plan,
        HopTangent(plan, tuple(arrays), tuple(moved)),
        operands=tuple(Described(x.shape, str(x.dtype), _travels(plan, n, x)) for n, x in arrays.items()),
        results=(Described(out.shape, acc, travels=False), Described(lse.shape, acc, travels=False)),
    )
    dout, dlse = ring_sum(spec, list(arrays.values()))
    return (out, lse), (dout.astype(out.dtype), dlse)


def _named(operands: Operands) -> dict[str, Array]:
    return {name: x for name, x in operands._asdict().items() if x is not None}


def _travels(plan: Plan, name: str, x: Array) -> bool:
    """Whether an operand belongs to the keys: without an axis of queries of its own, and with one of keys."""
    axes = dict(zip(_formulas.labels(plan.problem, name), x.shape, strict=True))
    return "s" in axes and axes["s"] == plan.problem.S and axes.get("t", 1) == 1


def _forward(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    p, (rows, _) = plan.problem, plan.lengths
    arrays = _named(operands)
    anchor = lax.axis_index(plan.axis)
    arrays = dict(zip(arrays, alike([anchor, *arrays.values()])[1:], strict=True))
    moving = [name for name, x in arrays.items() if _travels(plan, name, x)]

    def body(hop, blocks, state):
        here = arrays | dict(zip(moving, blocks, strict=True))
        for pair in _pairs(plan):
            state[pair[0]] = _merged(plan, hop, pair, here, state[pair[0]])
        return state, []

    stats = (p.B, p.N, rows)
    acc = p.accumulator
    empty = jnp.full(stats, -jnp.inf, acc), jnp.zeros(stats, acc), jnp.zeros((*stats, p.Dv), acc)
    empty = tuple(alike([*empty, arrays["q"]])[:3])
    blocks = [arrays[name] for name in moving]
    state, _ = circulate(plan.axis, plan.devices, plan.hops, blocks, [], [empty] * plan.pieces, body)
    out, lse = (jnp.concatenate(x, 2) for x in zip(*map(_finished, state), strict=True))
    return out.astype(p.dtype), lse


def _merged(plan: Plan, hop: Hop, pair, arrays: Arrays, state):
    """The state of a piece of queries with what it sees of a piece of keys.

    As in online softmax (arXiv 1805.02867): the largest lse of a part, the sum of the parts' weights
    relative to it, and the sum of their outs by weight. Merging (out, lse) pairwise would round the weight of
    an early part at every hop.
    """

    def see(problem, operands):
        top, norm, sums = state
        out, lse = attend(Call(problem, plan.implementation), operands)
        new_top = jnp.maximum(top, lse)
        # Where nothing was seen yet all are -inf, and -inf - -inf would be NaN.
        finite = jnp.where(new_top == -jnp.inf, 0, new_top)
        decay, weight = jnp.exp(top - finite), jnp.exp(lse - finite)
        sums = sums * decay[..., None] + out.astype(sums.dtype) * weight[..., None]
        return new_top, norm * decay + weight, sums

    return _visit(plan, hop, pair, arrays, see, lambda: state)


def _finished(state) -> tuple[Array, Array]:
    """out and lse of a piece of queries; 0 and -inf where it has seen nothing."""
    top, norm, sums = state
    norm = jnp.where(norm == 0, 1, norm)
    return sums / norm[..., None], top + jnp.log(norm)


@dataclasses.dataclass(frozen=True)
class HopTangent:
    """What a hop adds to the tangents of out and lse; linear in the tangents of the operands `wrt`."""

    plan: Plan
    names: tuple[str, ...]
    wrt: tuple[str, ...]

    def __call__(self, hop, *arrays):
        plan, p = self.plan, self.plan.problem
        named = dict(zip(self.names, arrays, strict=True))
        acc = p.accumulator
        extra = ("out", "lse", *(f"d{name}" for name in self.wrt))

        def of_pair(pair):
            def see(problem, operands, *others):
                given = alike([*operands.present(), *others])
                call = Call(problem, plan.implementation)
                return [x.astype(acc) for x in tangent_p.bind(*given, call=call, wrt=self.wrt)]

            def nothing():
                stats = (p.B, p.N, plan.lengths[0])
                return alike([jnp.zeros((*stats, p.Dv), acc), jnp.zeros(stats, acc), *arrays])[:2]

            return _visit(plan, hop, pair, named, see, nothing, extra)

        parts: list[Any] = [None] * plan.pieces
        for pair in _pairs(plan):
            part, before = of_pair(pair), parts[pair[0]]
            parts[pair[0]] = part if before is None else [x + y for x, y in zip(before, part, strict=True)]
        return [jnp.concatenate(x, 2) for x in zip(*parts, strict=True)]


def _pairs(plan: Plan) -> list[tuple[int, int]]:
    return [(i, j) for i in range(plan.pieces) for j in range(plan.pieces)]


def _visit(
    plan: Plan,
    hop: Hop,
    pair: tuple[int, int],
    arrays: Arrays,
    see: Callable[..., Any],
    nothing: Callable[[], Any],
    extra: tuple[str, ...] = (),
) -> Any:
    """What a pair of pieces gives at a hop: nothing where no key is in reach, and no band where all are.

    The pieces are cut before the choice among the ways: the transpose of a conditional makes a gradient of
    all that its branches read, which then is the piece and not the device's whole share.

    Args:
        arrays: of the device, by name.
        see: (problem, operands, arrays of the names `extra`) of the pair.
    """
    pieces = {name: _cut(plan, hop, pair, name, x) for name, x in arrays.items()}

    def in_way(way: Way) -> Callable[[], Any]:
        def seen():
            problem, operands = _of_pair(plan, hop, pair, way, pieces)
            return see(problem, operands, *(pieces[name] for name in extra))

        return nothing if way.cover == Cover.NONE else seen

    found, index = ways(plan, pair, hop.among)
    branches = [in_way(way) for way in found]
    if len(branches) > 1:
        return lax.switch(hop.look_up(index), branches)
    if plan.problem.offsets is None:
        return branches[0]()
    offsets = arrays["q_offset"] + hop.look_up(plan.distances(pair))
    some, _ = within(plan.problem, offsets.min(), offsets.max(), plan.lengths)
    return lax.cond(_in_any(some), branches[0], nothing)


@jax.custom_batching.custom_vmap
def _in_any(some: Array) -> Array:
    """A condition that under `vmap` holds where it does for any element.

    A conditional on a condition of each element would become a select, which computes both branches and
    whose transpose is wanting. A pair of which an element sees nothing is right all the same.
    """
    return some


@_in_any.def_vmap
def _(size, batched, some):
    return _in_any(some.any(0) if batched[0] else some), False


def _of_pair(plan: Plan, hop: Hop, pair, way: Way, pieces: Arrays) -> tuple[Problem, Operands]:
    """The problem of a pair of pieces, computed while others travel if there are hops, and its operands."""
    p, (rows, cols) = plan.problem, plan.lengths
    cut = {name: x for name, x in pieces.items() if name in Operands._fields}
    left, right, offset = p.left, p.right, way.offset
    if way.cover == Cover.ALL:
        left = right = offset = None
        cut.pop("q_offset", None)
    elif offset is None:
        base = cut.get("q_offset", jnp.full((1,), p.q_offset or 0, jnp.int32))
        cut["q_offset"] = base + hop.look_up(plan.distances(pair))
    else:
        # A side of the band that hides nothing here is none.
        left = None if left is not None and rows - 1 + offset <= left else left
        right = None if right is not None and cols - 1 <= offset + right else right
    operands = Operands(**cut)
    shapes = {name: x.shape for name, x in cut.items()}
    segments = p.segments and (shapes["q_segments"], shapes["kv_segments"])
    problem = dataclasses.replace(
        p,
        T=rows,
        S=cols,
        left=left,
        right=right,
        q_offset=offset,
        offsets=shapes.get("q_offset"),
        bias=shapes.get("bias"),
        mask=shapes.get("mask"),
        key_mask=shapes.get("key_mask"),
        segments=segments,
        amid_transfers=len(plan.hops) > 1,
    )
    return problem, operands


def _cut(plan: Plan, hop: Hop, pair: tuple[int, int], name: str, x: Array) -> Array:
    """The part of a device's array that belongs to a pair of pieces."""
    p, labels = plan.problem, _formulas.labels(plan.problem, name)
    for label, piece, length, whole in zip("ts", pair, plan.lengths, (p.T, p.S), strict=True):
        axis = labels.find(label)
        if axis < 0 or x.shape[axis] == 1 != whole:
            continue
        start: Any = piece * length
        if label == "s" and x.shape[axis] == plan.devices * p.S:
            start = start + (hop.device - hop.number) % plan.devices * p.S
        if length != x.shape[axis]:
            x = lax.dynamic_slice_in_dim(x, start, length, axis)
    return x
