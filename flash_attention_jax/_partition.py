"""How the primitives are lowered: on one device, inside `jax.shard_map`, and divided over devices by jit.

Attention is independent between batch elements and between key/value heads with their group of query
heads. A program for several devices must know, since blocks are cut from these axes at dynamic places,
which the partitioner can only gather. So a primitive that meets such a program is handed to the
partitioner as one operation with a rule: batch and heads may be divided, everything else is whole on
each device, and each device binds the primitive again on its part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flash_attention_jax._problem import Problem

Array = Any
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Labelled(NamedTuple):
    """Shape, dtype and axis labels (see `_sweep`) of an operand or a result."""

    shape: tuple[int, ...]
    dtype: str
    labels: str


class Description(NamedTuple):
    """What a bound primitive is, to the partitioner."""

    problem: Problem
    operands: tuple[Labelled, ...]
    results: tuple[Labelled, ...]


class Cut(NamedTuple):
    """Into how many parts a problem is divided along batch and heads."""

    problem: Problem
    batch: int
    heads: int

    def parts(self, size: int, label: str) -> int:
        """Parts of an axis of this size with this label; 1 where it broadcasts or stays whole."""
        p = self.problem
        count, full = {"b": (self.batch, p.B), "n": (self.heads, p.N), "k": (self.heads, p.K)}.get(
            label, (1, 1)
        )
        return count if size == full and full % count == 0 else 1

    def shape(self, shape: Sequence[int], labels: str) -> tuple[int, ...]:
        """The shape of one part of an array."""
        return tuple(n // self.parts(n, label) for n, label in zip(shape, labels, strict=True))

    def of_problem(self) -> Problem:
        """The problem of one part."""
        p = self.problem
        segments = p.segments and (self.shape(p.segments[0], "bt"), self.shape(p.segments[1], "bs"))
        (B, N, K) = self.shape((p.B, p.N, p.K), "bnk")
        optional = {"bias": "bnts", "mask": "bnts", "key_mask": "bs", "offsets": "b"}
        shapes = {name: getattr(p, name) for name in optional}
        cut = {name: x and self.shape(x, optional[name]) for name, x in shapes.items()}
        return dataclasses.replace(p, B=B, N=N, K=K, segments=segments, **cut)

    def of(self, x: Any) -> Any:
        """A static description with every problem and shape in it cut."""
        if x == self.problem and isinstance(x, Problem):
            return self.of_problem()
        if isinstance(x, Labelled):
            return x._replace(shape=self.shape(x.shape, x.labels))
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            fields = {f.name: self.of(getattr(x, f.name)) for f in dataclasses.fields(x)}
            return dataclasses.replace(x, **fields)
        return tuple(self.of(y) for y in x) if isinstance(x, tuple) else x


@functools.lru_cache(maxsize=1)
def _mark() -> Any:
    """A traced program that holds a partitioned operation.

    A primitive that has it among its parameters is lowered with the devices known, which the
    partitioned operation needs, though it only appears at lowering.
    """
    identity = custom_partitioning(lambda x: x)
    identity.def_partition(lambda *x: None, lambda *x: None, sharding_rule="i -> i")
    return jax.make_jaxpr(identity)(jax.ShapeDtypeStruct((1,), "float32"))


class Partitionable(Primitive):
    """A primitive with several results whose programs may be divided over devices."""

    multiple_results = True

    def bind(self, *arrays, **params):
        """Binds it, marked as one that must know the devices."""
        return super().bind(*arrays, **{"devices": _mark(), **params})


def unmarked(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule of a `Partitionable` primitive, without the mark."""

    def of_others(*args, devices, **params):
        return rule(*args, **params)

    return of_others


def register_lowering(
    primitive: Partitionable,
    run: Callable[..., Any],
    describe: Callable[..., Description],
) -> None:
    """Says how a primitive is lowered, on every platform.

    Args:
        run: (platform, arrays, params) to the results.
        describe: (avals, params) to what the primitive is.
    """

    def lower(platform, ctx, *values, devices, **params):
        # What each device does involves no other: to it, no value varies and none is divided.
        avals = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
        local = functools.partial(run, platform, **params)
        if _is_divided(ctx):
            local = _partitioned(primitive, describe(avals, **params), params)
        return mlir.lower_fun(local, multiple_results=True)(ctx.replace(avals_in=avals), *values)

    for platform in (None, *PLATFORMS):
        mlir.register_lowering(primitive, functools.partial(lower, platform or "other"), platform=platform)


def _is_divided(ctx: Any) -> bool:
    """Whether a program is lowered for several devices by the partitioner.

    Where every axis of the mesh is explicit or manual the division has been made (see `_explicit`). An
    exported program cannot hold the callback that divides; there XLA does what it can.
    """
    context, mesh = ctx.module_context, jax.sharding.get_abstract_mesh()
    if not mesh.empty and AxisType.Auto not in mesh.axis_types:
        return False
    devices = getattr(context.axis_context, "device_assignment", None)
    return devices is not None and len(devices) > 1 and not context.lowering_parameters.for_export


def _partitioned(primitive: Primitive, what: Description, params: Mapping[str, Any]) -> Callable[..., Any]:
    """The primitive as an operation that the partitioner divides."""

    def whole(*arrays):
        return tuple(primitive.bind(*arrays, **params))

    def partition(mesh, arguments, results):
        division = Division.of(what, mesh, arguments, results)
        local = {name: division.cut.of(x) for name, x in params.items()}

        def part(*arrays):
            # A part is one device's: XLA does not know the divisions that explicit axes around would note.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                sums = primitive.bind(*arrays, **local)
                return tuple(division.summed(x, r) for x, r in zip(sums, what.results, strict=True))

        shardings = [tuple(map(division.sharding, xs)) for xs in (what.results, what.operands)]
        return division.mesh, part, *shardings

    def infer(mesh, arguments, results):
        division = Division.of(what, mesh, arguments, ())
        return tuple(map(division.sharding, what.results))

    rule, whole_factors = _rule(what)
    operation = custom_partitioning(whole)
    operation.def_partition(
        partition,
        infer,
        decode_shardings=False,
        sharding_rule=rule,
        need_replication_factors=whole_factors,
    )
    return operation


def _rule(what: Description) -> tuple[str, tuple[str, ...]]:
    """The rule as Shardy reads it, and its factors that must be whole on each device.

    Key/value heads are a factor of their own where they are fewer than the query heads: a common
    one would let them be divided in ways that the groups do not allow.
    """
    p = what.problem
    full = {"b": p.B, "n": p.N, "k": p.K}
    count, whole = 0, []

    def factor(size, label):
        nonlocal count
        if label in full and size == full[label] and size > 1:
            return "n" if label == "k" and p.G == 1 else label
        count += 1
        whole.append(f"w{count}")
        return whole[-1]

    def side(described):
        axes = (zip(x.shape, x.labels, strict=True) for x in described)
        return ", ".join(" ".join(factor(*axis) for axis in x) for x in axes)

    return f"{side(what.operands)} -> {side(what.results)}", tuple(whole)


@dataclasses.dataclass(frozen=True)
class Division:
    """How the partitioner's devices share a problem.

    Attributes:
        mesh: all devices, its axes of prime sizes, so that every division is by whole axes.
        batch, heads: the axes of the mesh that divide batch elements and heads.
        cut: the parts.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    cut: Cut

    @classmethod
    def of(cls, what: Description, mesh: Mesh, arguments: Sequence[Any], results: Sequence[Any]) -> Division:
        """The division that the first operand which is divided has; if none is, that of the results."""
        p = what.problem
        fine = _refined(mesh, arguments[0].sharding, arguments[0].shape)
        found: dict[str, tuple[str, ...]] = {}
        described = zip((*what.operands, *what.results), (*arguments, *results), strict=False)
        for (shape, _, labels), x in described:
            for axis, names in enumerate(_divided_by(fine, x.sharding, shape)):
                label = {"k": "n"}.get(labels[axis], labels[axis])
                taken = {name for other, names in found.items() if other != label for name in names}
                if names and label in "bn" and not taken & set(names):
                    found.setdefault(label, names)

        def fit(names, *sizes):
            count = int(np.prod([fine.shape[x] for x in names]))
            return names if all(n % count == 0 for n in sizes) else ()

        batch = fit(found.get("b", ()), p.B)
        heads = fit(found.get("n", ()), p.N, *((p.K,) if p.K > 1 else ()))
        counts = (int(np.prod([fine.shape[x] for x in names])) for names in (batch, heads))
        return cls(fine, batch, heads, Cut(p, *counts))

    def axes(self, x: Labelled) -> list[tuple[str, ...]]:
        """The axes of the mesh that divide each axis of an array."""
        by_label = {"b": self.batch, "n": self.heads, "k": self.heads}
        pairs = zip(x.shape, x.labels, strict=True)
        return [by_label[label] if self.cut.parts(n, label) > 1 else () for n, label in pairs]

    def sharding(self, x: Labelled) -> NamedSharding:
        """Where the parts of an array lie."""
        return NamedSharding(self.mesh, PartitionSpec(*(names or None for names in self.axes(x))))

    def summed(self, part: Array, x: Labelled) -> Array:
        """Sums what every device adds to a result that is not divided like the problem."""
        mine = {name for names in self.axes(x) for name in names}
        others = tuple(name for name in (*self.batch, *self.heads) if name not in mine)
        return jax.lax.psum(part, others) if others else part


def _refined(mesh: Mesh, sharding: Any, shape: Sequence[int]) -> Mesh:
    """The mesh with each axis split into axes of prime sizes."""
    if mesh.empty:
        mesh = Mesh(np.array(list(sharding.devices_indices_map(tuple(shape)))), ("all",))
    sizes = {f"{axis}/{i}": p for axis, n in mesh.shape.items() for i, p in enumerate(_primes(n))}
    return Mesh(mesh.devices.reshape(tuple(sizes.values())), tuple(sizes))


def _primes(n: int) -> list[int]:
    factors, p = [], 2
    while n > 1:
        while n % p == 0:
            factors.append(p)
            n //= p
        p += 1
    return factors


def _divided_by(mesh: Mesh, sharding: Any, shape: Sequence[int]) -> list[tuple[str, ...]]:
    """For each axis of an array, the mesh axes that divide it evenly, major first."""
    if sharding is None or not shape:
        return [() for _ in shape]
    places = sharding.devices_indices_map(tuple(shape))
    result = []
    for axis, size in enumerate(shape):
        starts = np.array([places[d][axis].start or 0 for d in mesh.devices.flat]).reshape(mesh.devices.shape)
        strides = {}
        for i, name in enumerate(mesh.axis_names):
            along = np.moveaxis(starts, i, 0).reshape(mesh.devices.shape[i], -1)[:, 0]
            if along[1] > along[0]:
                strides[name] = int(along[1])
        names = tuple(sorted(strides, key=lambda name: -strides[name]))
        count = int(np.prod([mesh.shape[name] for name in names]))
        result.append(names if size % count == 0 else ())
    return result
