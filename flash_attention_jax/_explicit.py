"""Arrays whose types say how they are divided: meshes with explicit axes.

There the division is known when the call is traced, so that each device is given its part by
`jax.shard_map`, and everything below sees parts alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flash_attention_jax._partition import Cut
from flash_attention_jax._problem import Operands, Problem, scaled

Array = Any
Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a call is divided.

    Attributes:
        mesh: the abstract mesh.
        batch: for each batch axis of q, the mesh axes that divide it.
        heads: the mesh axes that divide the heads.
        rows: the mesh axes that divide q's length, over which its results are divided again.
    """

    mesh: Any
    batch: tuple[Names, ...]
    heads: Names
    rows: Names

    @property
    def names(self) -> frozenset[str]:
        """The mesh axes that divide the batch or the heads."""
        return frozenset(name for names in (*self.batch, self.heads) for name in names)

    def cut(self, problem: Problem) -> Cut:
        """The parts of a problem."""
        batch = [name for names in self.batch for name in names]
        return Cut(problem, *(math.prod(self.mesh.shape[x] for x in names) for names in (batch, self.heads)))

    def spec(self, shape: Sequence[int], labels: str, full: dict[str, int]) -> PartitionSpec:
        """For an array whose last axes have these labels, after those of the batch.

        An axis that broadcasts is whole on each device.
        """
        lead = len(shape) - len(labels)
        batch = self.batch[len(self.batch) - lead :] if lead > 0 else ()
        entries = [names if n > 1 else () for n, names in zip(shape[: max(lead, 0)], batch, strict=True)]
        for n, label in zip(shape[max(lead, 0) :], labels[max(-lead, 0) :], strict=True):
            entries.append(self.heads if label in "nk" and n == full[label] > 1 else ())
        return PartitionSpec(*(names or None for names in entries))


def placement(problem: Problem, operands: Operands) -> Placement | None:
    """How the types of the operands divide a call; None where they say nothing."""
    if not any(_entries(x) for x in operands if x is not None):
        return None
    q = operands.q
    mesh = next(jax.typeof(x).sharding.mesh for x in operands if x is not None and _entries(x))
    entries = _entries(q) or [()] * q.ndim
    at_heads, at_rows = (-3, -2) if problem.order == "BNTD" else (-2, -3)
    heads, rows = (entries[at_heads], entries[at_rows]) if q.ndim > 2 else ((), entries[-2])
    count = math.prod(mesh.shape[name] for name in heads)
    if problem.K > 1 and problem.K % count:
        heads = ()
    return Placement(mesh, tuple(entries[:-3]), heads, rows)


def divided(
    function: Callable[..., Any],
    where: Placement,
    problem: Problem,
    operands: Operands,
    scale: Any,
    keeps_more: bool = False,
):
    """Applies a function of (problem, raw operands, scale) to the parts of a call.

    Args:
        keeps_more: whether the function keeps more for its gradients than canonical operands and results.

    Returns:
        out and lse, divided as q is.
    """
    if scale is not None:
        operands = operands._replace(q=scaled(problem, operands.q, scale))
    specs = _specs(where, problem, operands)
    parts = functools.partial(function, where.cut(problem).of_problem(), scale=None)
    if AxisType.Manual in where.mesh.axis_types and (keeps_more or not _canonical(where, operands, specs)):
        # JAX 0.11.2 finds no division for what a jax.shard_map within another keeps for its gradients, other
        # than its arguments and results.
        parts = jax.checkpoint(parts)
    if where.names or AxisType.Auto not in where.mesh.axis_types:
        parts = jax.shard_map(
            parts,
            mesh=where.mesh,
            in_specs=(specs,),
            out_specs=_of_results(problem, specs.q, ()),
            axis_names=_taken(where.mesh, where.names),
        )
    place = jax.sharding.reshard
    whole = parts(jax.tree.map(lambda x, s: place(x, NamedSharding(where.mesh, s)), operands, specs))
    if not where.rows:
        return whole
    again = _of_results(problem, specs.q, where.rows)
    return tuple(place(x, NamedSharding(where.mesh, s)) for x, s in zip(whole, again, strict=True))


def along(arrays: Sequence[Array], dims: Sequence[int | None]) -> Along | None:
    """What divides an axis, one in `dims` for each array; None where nothing does."""
    for x, d in zip(arrays, dims, strict=True):
        names = _entries(x)[d] if d is not None and _entries(x) else ()
        if names:
            return Along(jax.typeof(x).sharding.mesh, names)
    return None


class Along(NamedTuple):
    """The explicit axes of an abstract mesh that divide the leading axis of arrays."""

    mesh: Any
    names: Names

    @property
    def parts(self) -> int:
        """How many there are."""
        return math.prod(self.mesh.shape[name] for name in self.names)

    def apply(self, function: Callable[..., Any], arrays: Sequence[Array], length: int) -> Any:
        """Applies a function to the parts of arrays whose leading axis has this length, and to all of others.

        Its results have the axis as well.
        """
        divided = PartitionSpec(self.names)
        specs = tuple(divided if x.shape[0] == length else PartitionSpec() for x in arrays)
        parts = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=specs,
            out_specs=divided,
            axis_names=_taken(self.mesh, frozenset(self.names)),
        )
        place = jax.sharding.reshard
        return parts(*(place(x, NamedSharding(self.mesh, s)) for x, s in zip(arrays, specs, strict=True)))


def _taken(mesh: Any, names: frozenset[str]) -> frozenset[str]:
    """The `axis_names` for a `jax.shard_map` of what these divide.

    What automatic axes divide is left to the partitioner. Among explicit axes alone all are taken, which is
    what naming none says, so that it finds nothing left to divide.
    """
    return names if AxisType.Auto in mesh.axis_types else frozenset()


def _canonical(where: Placement, operands: Operands, specs: Operands) -> bool:
    """Whether raw operands are canonical as they are, and every device's part of each is another."""
    divisions = [{name for e in spec for name in e or ()} for spec in specs[:3]]
    others = any(x is not None for x in operands[3:])
    return operands.q.ndim == 4 and not others and all(names == where.names for names in divisions)


def _specs(where: Placement, problem: Problem, operands: Operands) -> Operands:
    """How the operands of a call are divided."""
    if operands.q.ndim == 2:
        return jax.tree.map(lambda _: PartitionSpec(), operands)
    full = {"n": problem.N, "k": problem.K}
    q_axes, k_axes = ("ntd", "ksd") if problem.order == "BNTD" else ("tnd", "skd")
    labels = Operands(q_axes, k_axes, k_axes, "nts", "nts", "s", "t", "s", "")
    given = zip(operands, labels, strict=True)
    return Operands(*(None if x is None else where.spec(x.shape, label, full) for x, label in given))


def _of_results(problem: Problem, q: PartitionSpec, rows: Names) -> tuple[PartitionSpec, PartitionSpec]:
    """Of out and lse, from that of q, with the length divided by `rows`."""
    t = rows or None
    if len(q) < 3:
        return PartitionSpec(t, None), PartitionSpec(t)
    if problem.order == "BNTD":
        *batch, n, _, _ = q
        return PartitionSpec(*batch, n, t, None), PartitionSpec(*batch, n, t)
    *batch, _, n, _ = q
    return PartitionSpec(*batch, t, n, None), PartitionSpec(*batch, n, t)


def _entries(x: Any) -> list[Names]:
    """For each axis of an array the explicit mesh axes that divide it; empty where none does."""
    spec = jax.typeof(x).sharding.spec
    entries = [
        () if names is None else (names,) if isinstance(names, str) else tuple(names) for names in spec
    ]
    return entries if any(entries) else []
