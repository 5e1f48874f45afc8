"""A call of `ring_attention` outside `jax.shard_map`: arrays of the whole sequence, divided over a mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flash_attention_jax._arguments import fail, normalize
from flash_attention_jax._distributed._call import Options, inside, manual_axes
from flash_attention_jax._distributed._layout import pieces_of
from flash_attention_jax._problem import Operands, Problem

Array = Any


@dataclasses.dataclass(frozen=True)
class Division:
    """The static side of a call on a mesh.

    Attributes:
        problem: the whole problem.
        offset: `q_offset` where it is known and has an effect.
        spec: how q is divided, with an entry for each of its axes.
    """

    options: Options
    problem: Problem
    offset: int | None
    mesh: Any
    spec: PartitionSpec

    @property
    def taken(self) -> frozenset[str]:
        """The mesh axes that `jax.shard_map` takes; none means all.

        What other automatic axes divide is left to the partitioner, which need not gather it then.
        """
        if AxisType.Auto not in self.mesh.axis_types:
            return frozenset()
        return frozenset(name for e in self.spec for name in _names(e))

    @property
    def unit(self) -> int:
        """What divides the lengths, padded if need be: pieces over all devices."""
        return self.mesh.shape[self.options.axis_name] * pieces_of(self.options.layout)

    @property
    def lengths(self) -> tuple[int, int]:
        """T and S with their padding.

        With a bias or a mask each device has two queries and keys at least: one could be taken for an axis
        that broadcasts.
        """
        paired = self.problem.bias is not None or self.problem.mask is not None
        least = 2 * self.mesh.shape[self.options.axis_name] if paired else 0
        T, S = (max(least, -(-n // self.unit) * self.unit) for n in (self.problem.T, self.problem.S))
        return T, S

    def specs(self, operands: Operands) -> Operands:
        """How each operand is divided."""
        pair = {name: self._pair_labels(getattr(operands, name)) for name in ("bias", "mask")}
        vectors = {"key_mask": "s", "q_segments": "t", "kv_segments": "s", "q_offset": ""}
        n = "n" if operands.q.ndim > 2 else ""
        labels = {"q": f"{n}t.", "k": f"{n}s.", "v": f"{n}s."} | pair | vectors
        given = operands._asdict().items()
        return Operands(**{name: None if x is None else self._spec(x, labels[name]) for name, x in given})

    def _pair_labels(self, x: Any) -> str:
        """Of a bias or mask: its queries are divided, its keys only where it has no queries."""
        if x is None or x.ndim < 2 or x.shape[-2] == 1:
            return "n.s"
        return "nt."

    def _spec(self, x: Any, labels: str) -> PartitionSpec:
        """For an array whose last axes have these labels, after those of the batch.

        An axis of 1 is whole where several devices would share it: there it broadcasts.
        """
        q = list(self.spec)
        batch, heads = (q[:-3], q[-3]) if len(q) > 2 else ([], None)
        lead = x.ndim - len(labels)
        entries = batch[len(batch) - lead :] if lead > 0 else []
        by_label = {"n": heads, "t": self.options.axis_name, "s": self.options.axis_name}
        entries = entries + [by_label.get(label) for label in labels[max(0, -lead) :]]
        pairs = zip(x.shape, entries, strict=True)
        return PartitionSpec(*(None if n == 1 < _size(self.mesh, e) else e for n, e in pairs))


def on_mesh(
    options: Options, mesh: Any, spec: Any, operands: Operands, segment_ids: Any, scale: Any
) -> tuple[Array, Array]:
    """A call on arrays of the whole sequence, which need not be divided yet."""
    options.check()
    if not isinstance(mesh, Mesh | AbstractMesh):
        fail("mesh", "None or a jax.sharding.Mesh", type(mesh).__name__, TypeError)
    if options.axis_name in manual_axes():
        fail("mesh", f"None inside jax.shard_map over {options.axis_name!r}", mesh)
    if options.axis_name not in mesh.axis_names:
        fail("axis_name", f"of the mesh's axes {mesh.axis_names}", repr(options.axis_name))
    offset = operands.q_offset
    problem, operands, scale = normalize(operands, segment_ids, scale=scale, **options.of_problem())
    if operands.q_offset is not None or not (options.causal or options.window is not None):
        offset = None
    elif not problem.offsets:
        offset = problem.S - problem.T if offset is None else int(offset)
    options = dataclasses.replace(options, scale=problem.scale)
    if spec is None:
        entries = _as_it_lies(mesh, operands.q, options.axis_name, problem)
    else:
        entries = _as_said(mesh, spec, operands.q, options.axis_name, problem)
    division = Division(options, problem, offset, mesh, entries)
    _check(division)
    return _divided(division, operands, scale)


def _as_it_lies(mesh: Any, q: Any, axis_name: str, problem: Problem) -> PartitionSpec:
    """How q is divided where that can be seen, its length over the axis of the ring."""
    kind: Any = jax.typeof(q).sharding if isinstance(q, Tracer) else getattr(q, "sharding", None)
    known = isinstance(kind, NamedSharding) and kind.mesh.axis_names == mesh.axis_names
    entries = list(kind.spec)[: q.ndim - 2] if known else []
    entries = [None if axis_name in _names(e) else e for e in entries]
    entries += [None] * (q.ndim - 2 - len(entries))
    if entries and not _divide_heads(mesh, entries[-1], problem):
        entries[-1] = None
    return PartitionSpec(*entries, axis_name, None)


def _as_said(mesh: Any, spec: Any, q: Any, axis_name: str, problem: Problem) -> PartitionSpec:
    if not isinstance(spec, PartitionSpec):
        fail("spec", "None or a jax.sharding.PartitionSpec", type(spec).__name__, TypeError)
    entries = list(spec) + [None] * (q.ndim - len(spec))
    if not all(e is None or isinstance(e, str | tuple) for e in entries):
        fail("spec", "of None, names of mesh axes, and tuples of names", spec)
    names = [name for e in entries for name in _names(e)]
    if not set(names) <= set(mesh.axis_names):
        fail("spec", f"of the mesh's axes {mesh.axis_names}", spec)
    if len(entries) != q.ndim or _names(entries[-2]) != (axis_name,) or _names(entries[-1]):
        fail("spec", f"of {q.ndim} axes, the length over {axis_name!r} and the head dim whole", spec)
    if any(axis_name in _names(e) for e in entries[:-2]):
        fail("spec", f"with {axis_name!r} for the length alone", spec)
    if len(set(names)) < len(names):
        fail("spec", "with each mesh axis once", spec)
    if any(n % _size(mesh, e) for n, e in zip(q.shape[:-3], entries, strict=False)):
        fail("spec", f"of mesh axes that divide the batch shape {q.shape[:-3]}", spec)
    if q.ndim > 2 and not _divide_heads(mesh, entries[-3], problem):
        counts = f"N = {problem.N} and K = {problem.K}"
        fail("spec", f"of mesh axes that divide the head counts {counts}", spec)
    return PartitionSpec(*entries)


def _divide_heads(mesh: Any, entry: Any, problem: Problem) -> bool:
    """Whether mesh axes divide the heads; one key/value head is whole on each device."""
    count = _size(mesh, entry)
    return problem.N % count == 0 and (problem.K == 1 or problem.K % count == 0)


def _size(mesh: Any, entry: Any) -> int:
    """Among how many devices an entry of a spec divides an axis."""
    return math.prod(mesh.shape[name] for name in _names(entry))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _check(division: Division) -> None:
    p = division.problem
    if division.options.layout != "contiguous":
        for name, length in (("q", p.T), ("k", p.S)):
            if length % division.unit:
                fail(name, f"of a length that {division.unit} divides, in the zig-zag layout", length)


@functools.partial(jax.jit, static_argnums=0)
def _divided(division: Division, operands: Operands, scale: Any) -> tuple[Array, Array]:
    p, mesh, options = division.problem, division.mesh, division.options
    operands = jax.tree.map(jnp.asarray, operands)
    if division.lengths != (p.T, p.S):
        operands = _laid(mesh, operands, division.specs(operands), but=options.axis_name)
        operands = _padded(division, operands)
    specs = division.specs(operands)

    def local(operands, scale):
        ids = None if p.segments is None else (operands.q_segments, operands.kv_segments)
        own = operands._replace(q_segments=None, kv_segments=None)
        if division.offset is not None:
            own = own._replace(q_offset=division.offset)
        return inside(options, own, ids, options.scale if scale is None else scale)

    of_results = specs.q, PartitionSpec(*specs.q[:-1])
    function = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, None if scale is None else PartitionSpec()),
        out_specs=of_results,
        axis_names=division.taken,
    )
    out, lse = function(_laid(mesh, operands, specs), scale)
    if division.lengths[0] == p.T:
        return out, lse
    # A length that the devices do not divide cannot be divided in the types of arrays.
    out, lse = _laid(mesh, (out, lse), of_results, but=options.axis_name)
    return lax.slice_in_dim(out, 0, p.T, axis=-2), lax.slice_in_dim(lse, 0, p.T, axis=-1)


def _laid(mesh: Any, arrays: Any, specs: Any, but: str | None = None) -> Any:
    """Arrays divided as specs say over the mesh's explicit axes, which are in their types.

    Args:
        but: an axis over which they shall be whole, to be padded or cut.
    """
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = {name for name, kind in types if kind == AxisType.Explicit}
    if not explicit:
        return arrays
    if but is not None:
        # JAX 0.12.0 finds no gradient of a slice where an axis of 1 is divided over a mesh axis of 1.
        explicit = {name for name in explicit - {but} if mesh.shape[name] > 1}

    def lay(x, spec):
        entries = (tuple(name for name in _names(e) if name in explicit) for e in spec)
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*(e or None for e in entries))))

    return jax.tree.map(lay, arrays, specs)


def _padded(division: Division, operands: Operands) -> Operands:
    """The operands with lengths that the devices divide: added keys are hidden, added queries dropped.

    The cotangents of an added query are 0, but 0 * NaN is NaN. So it sees no key that the last query does
    not see: what it adds to a gradient is then NaN only where that one has made it so. It has the last
    query's segment, and a row of False in a mask; `_shown_keys` takes care of the band.
    """
    p, (T, S) = division.problem, division.lengths
    operands = operands._replace(key_mask=_shown_keys(division, operands))
    ends = {"q": {-2: T}, "k": {-2: S}, "v": {-2: S}, "key_mask": {-1: S}, "q_offset": {}}
    ends |= {"q_segments": {-1: T}, "kv_segments": {-1: S}}
    ends |= {name: {-2: T, -1: S} for name in ("bias", "mask")}
    # Without a mask a key may be infinite, which a q of 0 would make NaN where the others get -inf.
    repeated = ("q_segments",) if p.masked else ("q",)
    added = {}
    for name, x in operands._asdict().items():
        if x is None:
            continue
        for axis, length in ends[name].items():
            shown = {-2: p.T, -1: p.S}[axis] if name in ("bias", "mask") else None
            if -axis > x.ndim or (shown is not None and x.shape[axis] != shown) or (shown == 1 != length):
                continue
            x = _ended(x, axis, length, repeat=name in repeated)
        added[name] = x
    return operands._replace(**added)


def _shown_keys(division: Division, operands: Operands) -> Array | None:
    """The key mask of a padded problem: (..., S), still without the added keys, or None.

    A band moves on with the queries, and added ones would see keys that no other sees. On its left it only
    loses keys; those past the last query's reach are hidden here.
    """
    p, (T, S) = division.problem, division.lengths
    first: Any = p.q_offset if p.offsets is None else operands.q_offset[..., None].astype(jnp.int32)
    reach = None if p.right is None or p.q_offset is None else p.T - 1 + p.q_offset + p.right
    shown = operands.key_mask
    if shown is not None:
        shown = jnp.broadcast_to(shown != 0, (*shown.shape[:-1], p.S))
    elif S > p.S and (reach is None or reach >= p.S):
        shown = jnp.ones((p.S,), bool)
    if T > p.T and p.right is not None and (reach is None or reach < p.S - 1):
        near = jnp.arange(1 - p.T, p.S - p.T + 1, dtype=jnp.int32) - first <= p.right
        shown = near if shown is None else shown & near
    return shown


def _ended(x: Array, axis: int, length: int, repeat: bool) -> Array:
    """x with an axis of this length, ending in 0 or in repetitions of what it ended in."""
    n, widths = x.shape[axis], [(0, 0)] * x.ndim
    widths[axis] = (0, length - n)
    padded = jnp.pad(x, widths)
    if not repeat or n == 0:
        return padded
    # `jnp.pad(mode="edge")` loses on the way what explicit axes divide.
    given = jnp.arange(length).reshape(-1, *(1,) * (-1 - axis)) < n
    return jnp.where(given, padded, lax.slice_in_dim(x, n - 1, n, axis=axis))
