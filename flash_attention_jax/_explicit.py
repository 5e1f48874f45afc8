"""Arrays whose types say how they are divided: meshes with explicit axes.

There the division is known when the call is traced, so that each device is given its part by
`jax.shard_map`, and everything below sees parts alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from flash_attention_jax._partition import Cut
from flash_attention_jax._problem import Operands, Problem

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


def divided(function: Callable[..., Any], where: Placement, problem: Problem, operands: Operands, scale: Any):
    """Applies a function of (problem, raw operands, scale) to the parts of a call.

    Returns:
        out and lse, divided as q is.
    """
    full = {"n": problem.N, "k": problem.K}
    q_axes, k_axes = ("ntd", "ksd") if problem.order == "BNTD" else ("tnd", "skd")
    labels = Operands(q_axes, k_axes, k_axes, "nts", "nts", "s", "t", "s", "")
    specs = Operands(
        *(
            None if x is None else where.spec(x.shape, label, full)
            for x, label in zip(operands, labels, strict=True)
        )
    )
    if operands.q.ndim == 2:
        specs = jax.tree.map(lambda _: PartitionSpec(), operands)
    local = where.cut(problem).of_problem()
    parts = jax.shard_map(
        lambda operands, scale: function(local, operands, scale),
        mesh=where.mesh,
        in_specs=(specs, None if scale is None else PartitionSpec()),
        out_specs=_of_results(problem, specs.q, ()),
    )
    place = jax.sharding.reshard
    operands = jax.tree.map(lambda x, s: place(x, NamedSharding(where.mesh, s)), operands, specs)
    whole = parts(operands, scale)
    if not where.rows:
        return whole
    again = _of_results(problem, specs.q, where.rows)
    return tuple(place(x, NamedSharding(where.mesh, s)) for x, s in zip(whole, again, strict=True))


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
