"""Strategies without a ring: each device gets the whole sequence of some heads, or all keys.

JAX differentiates the collectives; between them stands `flash_attention` on one device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from flash_attention_jax._attend import Call, attend
from flash_attention_jax._distributed._layout import Plan, from_natural, piece_numbers, to_natural
from flash_attention_jax._formulas import labels
from flash_attention_jax._problem import Operands, Problem
from flash_attention_jax._varying import alike

Array = Any


def all_to_all(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """DeepSpeed-Ulysses (arXiv 2309.14509): the sequence is gathered and the heads are divided, and back.

    Memory is that of a device's share: N / P heads of the whole sequence.
    """
    p, count = plan.problem, plan.devices

    def scatter(x, name):
        """Gives a device all of the axes t and s of an array, and its share of the heads n or k."""
        axes = labels(p, name)
        head = max(axes.find("n"), axes.find("k"))
        divided = head >= 0 and x.shape[head] == {"n": p.N, "k": p.K}[axes[head]] > 1
        along = _divided_axis(plan, name, x)
        if divided and along is not None:
            x = lax.all_to_all(x, plan.axis, head, along, tiled=True)
        elif divided:
            share = x.shape[head] // count
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(plan.axis) * share, share, head)
        elif along is not None:
            x = lax.all_gather(x, plan.axis, axis=along, tiled=True)
        return _in_natural_order(plan, name, x)

    whole = _mapped(plan, operands, scatter)
    problem = _with_shapes(p, whole, N=p.N // count, K=p.K // count, T=p.T * count, S=p.S * count)
    out, lse = attend(Call(problem, plan.implementation), whole)

    def back(x):
        x = from_natural(x, 2, plan.layout, count)
        return lax.all_to_all(x, plan.axis, 2, 1, tiled=True)

    return back(out), back(lse)


def all_gather(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """Every device gets all keys and values, and computes its own queries."""
    p, count = plan.problem, plan.devices
    kept = ("q", "q_segments", "q_offset")

    def gathered(x, name):
        if name in kept:
            return x
        along = _divided_axis(plan, name, x)
        if along is not None and labels(p, name)[along] == "s":
            x = lax.all_gather(x, plan.axis, axis=along, tiled=True)
        return _in_natural_order(plan, name, x, "s")

    whole = _mapped(plan, operands, gathered)
    if not p.banded:
        problem = _with_shapes(p, whole, S=p.S * count)
        return attend(Call(problem, plan.implementation), whole)
    results = [_of_piece(plan, whole, i) for i in range(plan.pieces)]
    out, lse = (jnp.concatenate(x, 2) for x in zip(*results, strict=True))
    return out, lse


def _of_piece(plan: Plan, whole: Operands, i: int) -> tuple[Array, Array]:
    """out and lse of a piece of a device's queries among all keys, in natural order."""
    p, (rows, _) = plan.problem, plan.lengths
    numbers = jnp.asarray(piece_numbers(plan.layout, plan.devices)[:, i], jnp.int32)
    base = jnp.full((1,), p.q_offset or 0, jnp.int32) if p.offsets is None else whole.q_offset

    def cut(x, name):
        axis = labels(p, name).find("t")
        if axis < 0 or x.shape[axis] != p.T:
            return x
        return lax.slice_in_dim(x, i * rows, (i + 1) * rows, axis=axis)

    piece = _mapped(plan, whole, cut)
    piece = piece._replace(q_offset=base + numbers[lax.axis_index(plan.axis)] * rows)
    problem = _with_shapes(p, piece, T=rows, S=p.S * plan.devices)
    return attend(Call(problem, plan.implementation), piece)


def _mapped(plan: Plan, operands: Operands, function: Callable[[Array, str], Array]) -> Operands:
    given = {name: x for name, x in operands._asdict().items() if x is not None}
    varying = alike([lax.axis_index(plan.axis), *given.values()])[1:]
    return Operands(**{name: function(x, name) for name, x in zip(given, varying, strict=True)})


def _divided_axis(plan: Plan, name: str, x: Array) -> int | None:
    """The axis of an operand that is divided over the devices: that of its queries, if it has one."""
    axes = labels(plan.problem, name)
    for label, length in (("t", plan.problem.T), ("s", plan.problem.S)):
        axis = axes.find(label)
        if axis >= 0 and x.shape[axis] == length:
            return axis
    return None


def _in_natural_order(plan: Plan, name: str, x: Array, among: str = "ts") -> Array:
    """Brings the axes that are now whole into natural order."""
    p, count = plan.problem, plan.devices
    for axis, label in enumerate(labels(p, name)):
        if label in among and x.shape[axis] == count * {"t": p.T, "s": p.S}[label]:
            x = to_natural(x, axis, plan.layout, count)
    return x


def _with_shapes(problem: Problem, operands: Operands, **sizes: int) -> Problem:
    """The problem of operands that were gathered."""
    shape = functools.partial(_shape, operands)
    segments = problem.segments and (shape("q_segments"), shape("kv_segments"))
    found: dict[str, Any] = {name: shape(name) for name in ("bias", "mask", "key_mask")}
    found |= {"offsets": shape("q_offset"), "segments": segments, **sizes}
    if found["offsets"] is not None:
        found["q_offset"] = None
    return dataclasses.replace(problem, **found)


def _shape(operands: Operands, name: str) -> Any:
    x = getattr(operands, name)
    return None if x is None else x.shape
