"""The first derivatives of attention, given `lse`, as sums over pairs of blocks.

FlashAttention-2 (arXiv 2307.08691), algorithm 2, and its forward-mode counterpart. Derivatives of
these two functions, at any order, are pair sums again (see `_pair_sum`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from flash_attention_jax._mask import Masks, visible
from flash_attention_jax._pair_sum import MapBlocks, PairSum, pair_sum
from flash_attention_jax._partition import Labelled
from flash_attention_jax._problem import Operands, Order, Problem
from flash_attention_jax._sweep import Tile

Array = Any

# Axis labels of whole arrays; in blocks the query heads n are split into (k, g).
_ARRAY_LABELS: dict[Order, dict[str, str]] = {
    "BNTD": {"q": "bntd", "k": "bksd", "v": "bkse", "out": "bnte"},
    "BTND": {"q": "btnd", "k": "bskd", "v": "bske", "out": "btne"},
}
_OTHER_LABELS = {
    "finite_keys": "bks",
    "bias": "bnts",
    "lse": "bnt",
    "delta": "bnt",
    "mask": "bnts",
    "key_mask": "bs",
    "q_segments": "bt",
    "kv_segments": "bs",
    "q_offset": "b",
}
# Gradients as `Backward` sums them, where that is not as their operand lies.
_GRADIENT_LABELS = {"k": "bkds", "v": "bkes"}
DIFFERENTIABLE = ("q", "k", "v", "bias")


def labels(problem: Problem, name: str) -> str:
    """The axis labels of an operand or result; `dx` is labelled as x."""
    base = name[1:] if name in ("dq", "dk", "dv", "dbias", "dout") else name
    return (_ARRAY_LABELS[problem.order] | _OTHER_LABELS)[base]


def blocked(problem: Problem, operands: Operands, **others: Array) -> dict[str, Array]:
    """The arrays that blocks are cut from, by name: masks first, then q, k, v, bias, then others.

    Where keys may be hidden there is also `finite_keys`, bool (B, K, S): which keys and values are
    finite, found once, since tile by tile it takes a third of the time of a product.
    """
    given = operands._asdict()
    if problem.masked:
        # x - x is 0 or NaN, and its largest is found without an array of the size of k.
        finite = jnp.max(operands.k - operands.k, -1) + jnp.max(operands.v - operands.v, -1) == 0
        others["finite_keys"] = finite if problem.order == "BNTD" else finite.swapaxes(1, 2)
    order = (*Masks._fields, *DIFFERENTIABLE)
    return {name: given[name] for name in order if given[name] is not None} | others


def grouped_blocks(problem: Problem, names: Sequence[str], blocks: Sequence[Array]) -> dict[str, Array]:
    """Blocks by name, their query heads split into (k, g); both are 1 where they broadcast."""
    result = {}
    for name, block in zip(names, blocks, strict=True):
        axis = labels(problem, name).find("n")
        if axis >= 0:
            n = block.shape[axis]
            heads = (n // problem.G, problem.G) if n % problem.G == 0 else (1, 1)
            block = block.reshape(*block.shape[:axis], *heads, *block.shape[axis + 1 :])
        result[name] = block
    return result


def ungrouped(problem: Problem, name: str, part: Array) -> Array:
    """A part of the result `name`, its heads (k, g) joined to n."""
    axis = labels(problem, name).find("n")
    if axis < 0:
        return part
    heads = part.shape[axis] * part.shape[axis + 1]
    return part.reshape(*part.shape[:axis], heads, *part.shape[axis + 2 :])


def in_block(problem: Problem, name: str) -> str:
    """The axis labels of a block, for `Grid.dot`."""
    return labels(problem, name).replace("n", "kg")


def sanitized(problem: Problem, tile: Tile, blocks: Mapping[str, Array]) -> tuple[Array, Array, Array | None]:
    """Makes hidden and stale keys harmless: k and v with 0 for what is not finite, and its trace.

    0 * NaN is NaN, so such a key must not enter a matrix product as it is. The third result is
    NaN at keys where something was replaced, else 0, to be added to the logits: a query that sees
    such a key gets NaN, as it should. Where every pair of the tile is seen here the NaN goes into k
    instead, which saves a pass over the logits.
    """
    k, v = blocks["k"], blocks["v"]
    if not problem.masked:
        if tile.fresh_cols is not None:
            k, v = (_zero_unless(tile.fresh_cols, problem, x) for x in (k, v))
        return k, v, None
    poison = jnp.where(blocks["finite_keys"], 0, jnp.nan).astype(problem.accumulator)
    clean_v = jnp.where(jnp.isfinite(v), v, 0)
    if tile.masked or tile.fresh() is not None:
        return jnp.where(jnp.isfinite(k), k, 0), clean_v, poison[:, :, None, None, :]
    if problem.order == "BTND":
        poison = poison.swapaxes(1, 2)
    return k + poison[..., None].astype(k.dtype), clean_v, None


def _zero_unless(keep: Array, problem: Problem, x: Array) -> Array:
    """A block of q, k, v or out with 0 in rows not kept; `keep` ends in their axis."""
    if problem.order == "BTND" and keep.ndim > 1:
        keep = jnp.moveaxis(keep, -1, 1)
    elif problem.order == "BTND":
        keep = keep[:, None]
    return jnp.where(keep[..., None], x, 0)


def without_dead_rows(problem: Problem, blocks: dict[str, Array]) -> dict[str, Array]:
    """Blocks in which queries that see nothing, and their cotangents, are 0 whatever they hold."""
    if not problem.masked and problem.bias is None:
        return blocks
    alive = blocks["lse"] != -jnp.inf
    rows = {
        name: _zero_unless(alive, problem, blocks[name]) for name in ("q", "dq", "dout") if name in blocks
    }
    if "delta" in blocks:
        rows["delta"] = jnp.where(alive, blocks["delta"], 0)
    return blocks | rows


def products(problem: Problem, tile: Tile, q: Array, k: Array) -> Array:
    """scale * q k^T, of shape (b, k, g, t, s)."""
    subscripts = f"{in_block(problem, 'q')},{in_block(problem, 'k')}->bkgts"
    if tile.grid.operand_dtype == problem.accumulator:
        # Nothing is lost by rounding scale * q, and a pass over the logits is saved.
        return tile.grid.dot(subscripts, q.astype(problem.accumulator) * problem.scale, k)
    return tile.grid.dot(subscripts, q, k) * problem.scale


def seen_in(problem: Problem, tile: Tile, blocks: Mapping[str, Array]) -> Array | None:
    """Which pairs no mask hides and no earlier tile has seen; None if all."""
    seen = tile.fresh()
    if tile.masked:
        masks = Masks(**{name: blocks[name] for name in Masks._fields if name in blocks})
        shown = visible(problem, masks, tile.rows, tile.cols)
        seen = shown if seen is None else shown & seen
    return seen


def if_seen(seen: Array | None, x: Array, otherwise: float = 0) -> Array:
    """x, and something else where a pair is not seen, whatever x is there.

    Hidden keys may be so large that products with them overflow, and 0 * inf is NaN: so it goes
    before a multiplication by weights, which leaves the derivatives finite as well.
    """
    return x if seen is None else jnp.where(seen, x, otherwise)


def logits(
    problem: Problem, tile: Tile, blocks: Mapping[str, Array], k: Array, poison: Array | None
) -> Array:
    """The logits of a tile (b, k, g, t, s), -inf where hidden or stale."""
    seen = seen_in(problem, tile, blocks)
    x = products(problem, tile, blocks["q"], k)
    if problem.softcap is not None:
        x = problem.softcap * jnp.tanh(if_seen(seen, x) / problem.softcap)
    if "bias" in blocks:
        x = x + blocks["bias"].astype(x.dtype)
    if poison is not None:
        x = x + poison
    return if_seen(seen, x, -jnp.inf)


def _probabilities(problem, tile, blocks, k, poison):
    """p of a tile, from lse, and which pairs are seen; 0 in rows that see nothing, with derivatives 0."""
    lse, seen = blocks["lse"], seen_in(problem, tile, blocks)
    lse = jnp.where(lse == -jnp.inf, 0, lse)[..., None]
    return if_seen(seen, jnp.exp(logits(problem, tile, blocks, k, poison) - lse)), seen


def _cap_slope(problem, tile, seen, q, k):
    """d softcap(x) / dx at the tile's logits."""
    return 1 - jnp.tanh(if_seen(seen, products(problem, tile, q, k)) / problem.softcap) ** 2


@dataclasses.dataclass(frozen=True)
class Backward:
    """Block function of the gradients in `wrt`, from `dout` and `delta`.

    Those of k and v come with their columns last, (b, k, d, s): so no product takes a transposed
    (t, s) operand, which XLA copies on a CPU at a third of a product's speed.
    """

    problem: Problem
    names: tuple[str, ...]
    wrt: tuple[str, ...]

    def __call__(self, tile, *arrays):
        p, dot = self.problem, tile.grid.dot
        blocks = grouped_blocks(p, self.names, arrays)
        at = {name: in_block(p, name) for name in ("q", "k", "v", "out")}
        k, v, poison = sanitized(p, tile, blocks)
        blocks = without_dead_rows(p, blocks)
        q, dout = blocks["q"], blocks["dout"]
        weights, seen = _probabilities(p, tile, blocks, k, poison)
        parts = {}
        if "v" in self.wrt:
            parts["v"] = dot(f"{at['out']},bkgts->{_GRADIENT_LABELS['v']}", dout, weights)
        if self.wrt != ("v",):
            dweights = dot(f"{at['out']},{at['v']}->bkgts", dout, v)
            dlogits = weights * if_seen(seen, dweights - blocks["delta"][..., None])
            if "bias" in self.wrt:
                parts["bias"] = _sum_to(dlogits, blocks["bias"].shape)
            if p.softcap is not None:
                dlogits = dlogits * _cap_slope(p, tile, seen, q, k)
            if "q" in self.wrt:
                parts["q"] = dot(f"bkgts,{at['k']}->{at['q']}", dlogits, k) * p.scale
            if "k" in self.wrt:
                parts["k"] = dot(f"{at['q']},bkgts->{_GRADIENT_LABELS['k']}", q, dlogits) * p.scale
        return [ungrouped(p, name, parts[name]) for name in self.wrt]


@dataclasses.dataclass(frozen=True)
class Tangent:
    """Block function of sum_j p dlogits v + p dv, and of dlse = sum_j p dlogits."""

    problem: Problem
    names: tuple[str, ...]

    def __call__(self, tile, *arrays):
        p, dot = self.problem, tile.grid.dot
        blocks = grouped_blocks(p, self.names, arrays)
        at = {name: in_block(p, name) for name in ("q", "k", "v", "out")}
        to_out = f"bkgts,{at['v']}->{at['out']}"
        k, v, poison = sanitized(p, tile, blocks)
        blocks = without_dead_rows(p, blocks)
        weights, seen = _probabilities(p, tile, blocks, k, poison)
        dlogits = None
        for pair in (("dq", k), (blocks["q"], "dk")):
            if all(blocks.get(x) is not None for x in pair if isinstance(x, str)):
                dx = products(p, tile, *(blocks[x] if isinstance(x, str) else x for x in pair))
                dlogits = dx if dlogits is None else dlogits + dx
        dlogits = None if dlogits is None else if_seen(seen, dlogits)
        if dlogits is not None and p.softcap is not None:
            dlogits = dlogits * _cap_slope(p, tile, seen, blocks["q"], k)
        if "dbias" in blocks:
            dbias = if_seen(seen, blocks["dbias"].astype(p.accumulator))
            dlogits = dbias if dlogits is None else dlogits + dbias
        moved, dlse = [], jnp.zeros(weights.shape[:-1], weights.dtype)
        if dlogits is not None:
            dweights = weights * dlogits
            moved, dlse = [dot(to_out, dweights, v)], dweights.sum(-1)
        if "dv" in blocks:
            moved.append(dot(to_out, weights, blocks["dv"]))
        return [ungrouped(p, "out", sum(moved[1:], moved[0])), ungrouped(p, "lse", dlse)]


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sums x over the axes that broadcast from `shape`."""
    axes = [i for i, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if n != m]
    return x.sum(axes, keepdims=True) if axes else x


def _described(problem: Problem, arrays: Mapping[str, Array]) -> tuple[Labelled, ...]:
    return tuple(Labelled(x.shape, str(x.dtype), labels(problem, n)) for n, x in arrays.items())


def _spec(problem, arrays, function, results) -> PairSum:
    masks = tuple(name for name in arrays if name in Masks._fields)
    return PairSum(
        problem,
        function,
        cover=MapBlocks(problem, masks) if problem.masked else None,
        masks=len(masks),
        operands=_described(problem, arrays),
        results=results,
    )


def backward(
    problem: Problem, operands: Operands, lse: Array, dout: Array, delta: Array, wrt: tuple[str, ...]
) -> list[Array]:
    """The gradients of the operands in `wrt`, of their shapes and dtypes.

    Args:
        lse, delta: (B, N, T); delta = rowsum(dout * out) - dlse.
        dout: of the shape of out.
        wrt: a subset of `DIFFERENTIABLE`, in that order.
    """
    arrays = blocked(problem, operands, lse=lse, dout=dout, delta=delta)
    results = tuple(_summed(problem, name, arrays[name]) for name in wrt)
    spec = _spec(problem, arrays, Backward(problem, tuple(arrays), wrt), results)
    sums = pair_sum(spec, list(arrays.values()))
    return [
        jnp.einsum(f"{result.labels}->{labels(problem, name)}", x)
        for name, result, x in zip(wrt, results, sums, strict=True)
    ]


def _summed(problem: Problem, name: str, x: Array) -> Labelled:
    """The gradient of x as `Backward` sums it."""
    there = labels(problem, name)
    here = _GRADIENT_LABELS.get(name, there)
    return Labelled(tuple(x.shape[there.index(axis)] for axis in here), str(x.dtype), here)


def tangent(
    problem: Problem, operands: Operands, out: Array, lse: Array, moved: Mapping[str, Array]
) -> tuple[Array, Array]:
    """The tangents of out and lse, from those of the operands.

    Args:
        moved: tangents by the operand's name.

    Returns:
        dout, of out's shape and dtype, and dlse (B, N, T).
    """
    p = problem
    tangents = {f"d{name}": x for name, x in moved.items()}
    arrays = blocked(problem, operands, lse=lse, **tangents)
    results = (
        Labelled(out.shape, p.accumulator, labels(p, "out")),
        Labelled(lse.shape, p.accumulator, labels(p, "lse")),
    )
    spec = _spec(p, arrays, Tangent(p, tuple(arrays)), results)
    moving, dlse = pair_sum(spec, list(arrays.values()))
    dout = moving - out.astype(p.accumulator) * beside_out(p, dlse)
    return dout.astype(out.dtype), dlse


def beside_out(problem: Problem, stats: Array) -> Array:
    """Row statistics (B, N, T) in the memory order of out, with a last axis of 1."""
    return (stats if problem.order == "BNTD" else stats.swapaxes(1, 2))[..., None]


def delta_of(problem: Problem, out: Array, dout: Array, dlse: Array) -> Array:
    """rowsum(dout * out) - dlse, of shape (B, N, T)."""
    # As a product: with JAX 0.10.2, `sum` of (1, 8, 4096, 64) in float32 takes 27 ms on 2 Zen 4 cores, this 1
    # (25 in the order BTND); with 0.12.0 both take 1.
    at = labels(problem, "out")
    dout, out = (x.astype(problem.accumulator) for x in (dout, out))
    return jnp.einsum(f"{at},{at}->bnt", dout, out, precision="highest") - dlse
