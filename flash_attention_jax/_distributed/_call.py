"""A call of `ring_attention`: its arguments checked, its plan made, its arrays divided."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from flash_attention_jax._api import check_implementation
from flash_attention_jax._arguments import fail, normalize
from flash_attention_jax._distributed import _choice
from flash_attention_jax._distributed._exchange import all_gather, all_to_all
from flash_attention_jax._distributed._layout import Plan, pieces_of
from flash_attention_jax._distributed._ring import ring
from flash_attention_jax._explicit import Placement, divided, placement
from flash_attention_jax._problem import Operands, Problem, arrange, scaled
from flash_attention_jax._varying import alike

Array = Any


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options of a call, as the caller gave them; `scale` None may also be an array's."""

    causal: Any = False
    window: Any = None
    scale: Any = None
    softcap: Any = None
    precision: Any = None
    deterministic: Any = False
    implementation: Any = None
    axis_name: Any = "x"
    strategy: Any = None
    layout: Any = "contiguous"

    def of_problem(self) -> dict[str, Any]:
        """Those of `normalize`, without the scale."""
        names = ("causal", "window", "softcap", "precision", "deterministic")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Rejects what no problem is needed to judge."""
        check_implementation(self.implementation)
        _choice.check_names(self.strategy, self.layout)
        if not isinstance(self.axis_name, str):
            fail("axis_name", "the name of a mesh axis", repr(self.axis_name), TypeError)


def inside(options: Options, operands: Operands, segment_ids: Any, scale: Any) -> tuple[Array, Array]:
    """A call inside `jax.shard_map`, on one device's arrays."""
    options.check()
    devices = _manual_size(options.axis_name)
    plan, whole, operands, scale = describe(options, devices, operands, segment_ids, scale)
    where = placement(plan.problem, operands)
    part = whole if where is None else where.cut(whole).of_problem()
    strategy = _choice.chosen(options.strategy, part, plan)
    return _run(plan, strategy, operands, scale, where)


def describe(options: Options, devices: int, operands: Operands, segment_ids: Any, scale: Any, **how: Any):
    """What a device's arrays are of.

    Returns:
        The plan, the problem of the whole sequence, the raw operands, and the scale if it is an array.
    """
    pairs = {"bias": operands.bias, "mask": operands.mask}
    own = operands._replace(bias=None, mask=None)
    local, own, scale = normalize(own, segment_ids, scale=scale, **options.of_problem(), **how)
    _check_pieces(options.layout, local.T, local.S)
    stretched = _stretched(own, pairs, local, devices)._replace(q_offset=operands.q_offset)
    whole, _, _ = normalize(stretched, scale=None, **options.of_problem(), abstract=True)
    given = operands.q_offset if whole.offsets is not None else None
    own = own._replace(**pairs, q_offset=given)
    problem = dataclasses.replace(
        local,
        left=whole.left,
        right=whole.right,
        q_offset=whole.q_offset,
        offsets=whole.offsets,
        bias=_canonical(whole.bias, operands.bias),
        bias_dtype=whole.bias_dtype,
        mask=_canonical(whole.mask, operands.mask),
    )
    fields = {name: getattr(local, name) for name in ("scale", "key_mask", "segments")}
    plan = Plan(options.axis_name, devices, options.layout, problem, options.implementation)
    return plan, dataclasses.replace(whole, **fields), own, scale


def _stretched(own: Operands, pairs: dict[str, Any], local: Problem, devices: int) -> Operands:
    """Stand-ins for the whole sequence's q, k, v, bias and mask."""

    def longer(x, *axes):
        shape = list(x.shape)
        for axis in axes:
            shape[axis] *= devices
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    def pair(name):
        x = pairs[name]
        if x is None or not hasattr(x, "shape") or x.ndim == 0:
            return x
        if devices > 1 and 1 in (local.T, local.S):
            fail(name, "None where a device holds a single query or key", f"shape {x.shape}")
        return longer(x, *_divided_axes(name, x.shape, own.q.shape[:-2], local, devices))

    q, k, v = (longer(x, -2) for x in own[:3])
    return Operands(q, k, v, pair("bias"), pair("mask"))


def _divided_axes(
    name: str, shape: tuple[int, ...], lead: tuple[int, ...], local: Problem, devices: int
) -> tuple[int, ...]:
    """Which axes of a device's bias or mask are part of longer ones; `lead` is q's batch and heads.

    Shapes are judged as the caller gave them, before anything is stretched.
    """
    whole = local.S * devices
    rows, columns = ((1,) + shape)[-2:]
    if rows not in (1, local.T):
        fail(name, f"of the device's own T = {local.T}, or 1, on its queries' axis", f"shape {shape}")
    of_queries = len(shape) > 1 and rows == local.T
    if of_queries and columns not in (1, whole):
        must = f"of the whole sequence's S = {whole} on its last axis, or 1, where it has queries"
        fail(name, must, f"shape {shape}")
    full = (*lead, local.T, whole if of_queries or columns == whole else local.S)
    pairs = zip(shape[::-1], full[::-1], strict=False)
    if len(shape) > len(full) or any(n not in (1, m) for n, m in pairs):
        fail(name, f"broadcastable to (*batch, N, T, S) = {full}", f"shape {shape}")
    if of_queries:
        return (-2,)
    return () if columns in (1, whole) else (-1,)


def _canonical(whole: Any, x: Any) -> Any:
    """A device's canonical shape of a bias or mask, from that of the whole."""
    if whole is None:
        return None
    given = (1,) * max(0, 4 - x.ndim) + x.shape
    return (*whole[:2], given[-2], given[-1])


def _check_pieces(layout: str, T: int, S: int) -> None:
    pieces = pieces_of(layout)
    for name, length in (("q", T), ("k", S)):
        if length % pieces:
            fail(name, "of an even length on each device in the zig-zag layout", length)


def manual_axes() -> list[str]:
    """The axes of the `jax.shard_map` around, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True) if not mesh.empty else ()
    return [name for name, kind in types if kind == AxisType.Manual]


def _manual_size(axis_name: str) -> int:
    manual = manual_axes()
    if axis_name not in manual:
        must = (
            f"of {manual}, the axes of the jax.shard_map around"
            if manual
            else ("an axis of a jax.shard_map around, or mesh be given")
        )
        fail("axis_name", must, repr(axis_name))
    return jax.sharding.get_abstract_mesh().shape[axis_name]


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _run(
    plan: Plan, strategy: str, operands: Operands, scale: Any, where: Placement | None
) -> tuple[Array, Array]:
    """The results of a device's raw operands, whose batch and heads explicit axes may divide further."""
    if where is None:
        return _of_raw(plan, strategy, operands, scale)

    def of_part(problem, operands, scale):
        return _of_raw(dataclasses.replace(plan, problem=problem), strategy, operands, scale)

    # A ring's blocks differ between its devices, whatever they are made of.
    given = iter(alike(operands.present(), frozenset({plan.axis})))
    operands = Operands(*(None if x is None else next(given) for x in operands))
    # The other strategies keep what they have gathered.
    return divided(of_part, where, plan.problem, operands, scale, keeps_more=strategy != "ring")


def _of_raw(plan: Plan, strategy: str, operands: Operands, scale: Any) -> tuple[Array, Array]:
    p, q = plan.problem, operands.q
    shapes = (*q.shape[:-1], p.Dv), q.shape[:-1]
    if p.empty:
        return jnp.zeros(shapes[0], p.dtype), jnp.full(shapes[1], -jnp.inf, p.accumulator)
    if scale is not None:
        operands = operands._replace(q=scaled(p, q, scale))
    function = {"ring": ring, "all_to_all": all_to_all, "all_gather": all_gather}[strategy]
    out, lse = function(plan, arrange(p, operands))
    return out.reshape(shapes[0]), lse.reshape(shapes[1])
