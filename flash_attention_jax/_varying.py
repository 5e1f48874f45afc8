"""Which axes of a mesh a value varies over inside `jax.shard_map`, and making values agree on it.

`jax.shard_map` gives every value a type that says over which mesh axes it may differ between devices.
The primitives of this package want their operands alike: one that is the same everywhere (a bias, say)
is cast, and the transpose of the cast sums its gradient over the devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec

Array = Any


def varying(arrays: Iterable[Any]) -> frozenset[str]:
    """The mesh axes over which any of the arrays, or of abstract values, varies."""
    return frozenset().union(*(_type(x).manual_axis_type.varying for x in arrays))


def _type(x: Any) -> Any:
    return x if isinstance(x, ShapedArray) else jax.typeof(x)


def alike(arrays: Sequence[Array], axes: frozenset[str] = frozenset()) -> list[Array]:
    """The arrays, cast to vary over every axis that one of them varies over, and over `axes`."""
    axes = axes | varying(arrays)
    return [_cast(x, axes) for x in arrays]


def _cast(x: Array, axes: frozenset[str]) -> Array:
    missing = axes - varying([x])
    return jax.lax.pcast(x, tuple(sorted(missing, key=str)), to="varying") if missing else x


def abstract(shape: Sequence[int], dtype: Any, arrays: Sequence[Any]) -> ShapedArray:
    """An abstract value that varies over every axis that one of the arrays varies over."""
    return ShapedArray(tuple(shape), jnp.dtype(dtype), **_placed(len(shape), arrays))


def struct(shape: Sequence[int], dtype: Any, arrays: Sequence[Any]) -> jax.ShapeDtypeStruct:
    """The same for `jax.eval_shape` and `jax.linear_transpose`."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, **_placed(len(shape), arrays))


def _placed(rank: int, arrays: Sequence[Any]) -> dict[str, Any]:
    mesh = next((x.sharding.mesh for x in map(_type, arrays) if not x.sharding.mesh.empty), None)
    if mesh is None:
        return {}
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * rank))
    return {"sharding": sharding, "manual_axis_type": ManualAxisType(varying=varying(arrays))}
