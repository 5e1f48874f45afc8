"""Attention on sequences that are divided over devices.

`ring_attention` is `flash_attention` for q, k and v whose length is divided over an axis of a mesh, inside
`jax.shard_map` or, with `mesh=`, on whole arrays. `shard_sequence` and `unshard_sequence` bring arrays into
the layout that gives every device the same work under causal masking.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flash_attention_jax._api import AttentionOutput
from flash_attention_jax._arguments import fail
from flash_attention_jax._distributed import _choice
from flash_attention_jax._distributed._call import Options, describe, inside
from flash_attention_jax._distributed._choice import Choice
from flash_attention_jax._distributed._layout import from_natural, pieces_of, to_natural
from flash_attention_jax._distributed._mesh import on_mesh
from flash_attention_jax._problem import Operands

__all__ = ["Choice", "ShardedSequence", "explain", "ring_attention", "shard_sequence", "unshard_sequence"]

Array = Any


def ring_attention(
    q: Array,
    k: Array,
    v: Array,
    key_mask: Array | None = None,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    segment_ids: Any = None,
    causal: bool = False,
    window: Any = None,
    q_offset: Any = None,
    scale: Any = None,
    softcap: float | None = None,
    precision: Any = None,
    deterministic: bool = False,
    implementation: str | None = None,
    axis_name: str = "x",
    mesh: Any = None,
    spec: PartitionSpec | None = None,
    strategy: str | None = None,
    layout: str = "contiguous",
) -> AttentionOutput:
    """`flash_attention` where the sequence is divided over a mesh axis of P devices.

    Inside `jax.shard_map` every array is the device's own part, whose batch and heads other mesh axes may
    divide. With `mesh`, arrays are whole, are divided here, and may have lengths that P does not divide (in
    the contiguous layout); call it under `jax.jit` or directly.

    Strategies:

    - "ring": blocks of K and V travel around the devices, each sent on while the one before is computed;
      partial results are merged by `lse`. Every derivative is a ring again, in which the gradients of K
      and V travel along with them. Memory is linear in a device's own share, at every order. Hops that the
      band of `causal` and `window` hides from all devices are left out. Ring Attention, arXiv 2310.01889.
    - "all_to_all": the sequence is exchanged for heads, so that each device has the whole sequence of
      N / P heads. P must divide N and K. DeepSpeed-Ulysses, arXiv 2309.14509.
    - "all_gather": every device gets all of K and V, and keeps them for the gradients.

    A visible key that is not finite gives its queries what the plain formula gives, where `flash_attention`
    under a mask gives NaN.

    Args:
        q, k, v: as for `flash_attention`, with T / P queries and S / P keys inside `jax.shard_map`.
        key_mask: broadcastable to (*batch, S), its last axis divided like the keys.
        bias: broadcastable to (*batch, N, T, S). Inside `jax.shard_map`, where it has the queries' axis
            (of T / P), its last axis is the whole sequence's S, or 1; where it has not, its last axis is
            the device's own S / P, or 1.
        mask: bool, divided as `bias` is.
        segment_ids: integers (*batch, T), or a pair of (*batch, T) and (*batch, S), divided alike.
        causal, window, q_offset: of positions in the whole sequence. `q_offset` defaults to S - T.
        scale, softcap, precision, deterministic, implementation: as for `flash_attention`. "reference"
            cannot run in a ring.
        axis_name: the mesh axis over which the sequence is divided.
        mesh: the mesh, where the call is outside `jax.shard_map` (over `axis_name`).
        spec: with `mesh`, how q's axes are divided, k's and v's alike, such as
            `P("data", "heads", "x", None)`. By default as q lies, where that can be seen (an array
            outside `jax.jit`, or a mesh of explicit axes), else over `axis_name` alone. Automatic mesh
            axes that are not named so divide q, k and v as they did: a ring gathers nothing of that, but
            the collectives of the other strategies do.
        strategy: one of those above, or None for the choice that `explain` explains.
        layout: "contiguous": device r holds piece r of P. "zigzag": the arrays are as `shard_sequence`
            gives them, device r holding pieces r and 2P - 1 - r of 2P. The results lie as q does.

    Returns:
        `AttentionOutput(out, lse)`, divided as q is. On a mesh of explicit axes, as `jax.make_mesh` makes
        them, results of a length that P does not divide are not divided over `axis_name`.

    Raises:
        ValueError: a shape or a value is wrong; "all_to_all" with heads that P does not divide; no such
            mesh axis.
        TypeError: a dtype or a type is wrong.
        Unsupported: `implementation` cannot run this problem.

    Example:
        >>> mesh = jax.make_mesh((8,), ("x",))
        >>> out, lse = ring_attention(q, k, v, causal=True, mesh=mesh)
    """
    options = Options(
        causal, window, None, softcap, precision, deterministic, implementation, axis_name, strategy, layout
    )
    operands = Operands(q, k, v, bias, mask, key_mask, q_offset=q_offset)
    if mesh is not None:
        return AttentionOutput(*on_mesh(options, mesh, spec, operands, segment_ids, scale))
    if spec is not None:
        fail("spec", "None without mesh", spec)
    return AttentionOutput(*inside(options, operands, segment_ids, scale))


def explain(
    q: Any,
    k: Any,
    v: Any,
    key_mask: Any = None,
    *,
    devices: int,
    bias: Any = None,
    mask: Any = None,
    segment_ids: Any = None,
    causal: bool = False,
    window: Any = None,
    q_offset: Any = None,
    scale: Any = None,
    softcap: float | None = None,
    precision: Any = None,
    deterministic: bool = False,
    implementation: str | None = None,
    layout: str = "contiguous",
) -> Choice:
    """Which strategy `ring_attention` takes inside `jax.shard_map`, and why.

    Args:
        q, k, v, and so on: one device's arrays, for which a `jax.ShapeDtypeStruct` may stand.
        devices: P, among how many devices the sequence is divided.

    Raises:
        ValueError, TypeError: as `ring_attention` does.

    Example:
        >>> x = jax.ShapeDtypeStruct((16, 32768, 128), "bfloat16")
        >>> print(explain(x, x, x, causal=True, devices=4))
    """
    if not isinstance(devices, int) or isinstance(devices, bool):
        fail("devices", "a positive int", repr(devices), TypeError)
    if devices < 1:
        fail("devices", "a positive int", devices)
    options = Options(
        causal, window, None, softcap, precision, deterministic, implementation, "x", None, layout
    )
    options.check()
    operands = Operands(q, k, v, bias, mask, key_mask, q_offset=q_offset)
    plan, whole, _, _ = describe(options, devices, operands, segment_ids, scale, abstract=True)
    return _choice.choose(whole, plan)


class ShardedSequence(NamedTuple):
    """What `shard_sequence` gives.

    Attributes:
        array: in the layout's order, divided over the mesh axis.
        positions: int32 (length,), the natural position of each token, divided alike: for rotary
            embeddings, position embeddings, or to shift labels.
    """

    array: Array
    positions: Array


def shard_sequence(
    x: Array, axis: int = -2, *, mesh: Any, axis_name: str = "x", layout: str = "zigzag"
) -> ShardedSequence:
    """Divides an array in natural order over a mesh axis, in a layout.

    Labels that are shifted by a token must be shifted before.

    Args:
        x: any array with an axis of tokens, whose length 2P divides (P, in the contiguous layout).
        axis: which one; -2 is that of q, k and v, -1 that of token ids.
        mesh, axis_name: over what it is divided. Other axes of x are left whole.
        layout: as for `ring_attention`, which must be told the same.

    Raises:
        ValueError: the length is not divided, or there is no such axis.
        TypeError: x, axis or mesh is of a wrong type.

    Example:
        >>> tokens, positions = shard_sequence(tokens, -1, mesh=mesh)
        >>> out = ring_attention(q, k, v, causal=True, mesh=mesh, layout="zigzag").out
        >>> out = unshard_sequence(out, mesh=mesh)
    """
    devices, axis = _checked(x, axis, mesh, axis_name, layout)
    positions = from_natural(np.arange(x.shape[axis], dtype=np.int32), 0, layout, devices)
    # Arrays of the host stay there, so that each process sends its own devices' part alone.
    stored = from_natural(x if layout == "contiguous" else _whole(x, mesh), axis, layout, devices)
    place = [PartitionSpec(*(None,) * n, axis_name) for n in (axis, 0)]
    placed = [
        jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((stored, positions), place, strict=True)
    ]
    return ShardedSequence(*placed)


def unshard_sequence(
    x: Array, axis: int = -2, *, mesh: Any, axis_name: str = "x", layout: str = "zigzag"
) -> Array:
    """Inverse of `shard_sequence`: the array in natural order, still divided over the mesh axis.

    Args:
        x, axis, mesh, axis_name, layout: as there.

    Raises:
        ValueError, TypeError: as there.
    """
    devices, axis = _checked(x, axis, mesh, axis_name, layout)
    place = NamedSharding(mesh, PartitionSpec(*(None,) * axis, axis_name))
    return jax.device_put(to_natural(x, axis, layout, devices), place)


def _whole(x: Array, mesh: Any) -> Array:
    """x, divided over no explicit axis of the mesh, which would not let its pieces be taken apart."""
    here = not isinstance(x, jax.Array) or (not isinstance(x, Tracer) and x.sharding.is_fully_replicated)
    if here or AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))


def _checked(x: Any, axis: int, mesh: Any, axis_name: str, layout: str) -> tuple[int, int]:
    """The number of devices, and the axis counted from the first."""
    _choice.check_names(None, layout)
    if not isinstance(mesh, Mesh | AbstractMesh):
        fail("mesh", "a jax.sharding.Mesh", type(mesh).__name__, TypeError)
    if axis_name not in mesh.axis_names:
        fail("axis_name", f"of the mesh's axes {mesh.axis_names}", repr(axis_name))
    if not isinstance(x, jax.Array | np.ndarray):
        fail("x", "a JAX or NumPy array", type(x).__name__, TypeError)
    if not isinstance(axis, int | np.integer) or isinstance(axis, bool):
        fail("axis", "an int", repr(axis), TypeError)
    if not -x.ndim <= axis < x.ndim:
        fail("axis", f"an axis of x, which has {x.ndim}", axis)
    devices = mesh.shape[axis_name]
    unit = devices * pieces_of(layout)
    if x.shape[axis] % unit:
        fail("x", f"of a length that {unit} divides", x.shape[axis])
    return devices, axis % x.ndim
