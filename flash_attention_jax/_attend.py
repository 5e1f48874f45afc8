"""The three primitives of attention and their rules (DESIGN section 5).

`attend` gives (out, lse); its jvp calls `tangent`, linear in the operands' tangents; the transpose
of `tangent` calls `backward`. All three are lowered to the implementation that is chosen for the
platform. What is beyond the first order is a pair sum, whichever implementation ran.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from flash_attention_jax import _formulas
from flash_attention_jax._dispatch import choose, device_of
from flash_attention_jax._explicit import Along, along
from flash_attention_jax._formulas import DIFFERENTIABLE
from flash_attention_jax._partition import (
    Cut,
    Description,
    Labelled,
    Partitionable,
    register_lowering,
    unmarked,
)
from flash_attention_jax._problem import Operands, Problem
from flash_attention_jax._varying import abstract, alike, struct

Array = Any


@dataclasses.dataclass(frozen=True)
class Call:
    """The static side of a primitive: the problem and the implementation asked for, if any."""

    problem: Problem
    implementation: str | None


def attend(call: Call, operands: Operands) -> tuple[Array, Array]:
    """out, of q's dtype and memory order, and lse (B, N, T), of canonical operands.

    No axis of the problem may be empty.
    """
    out, lse = attend_p.bind(*alike(operands.present()), call=call)
    return out, lse


# The arguments of the primitives, after the operands that are present:
#   tangent:  out, lse, then the tangents of the operands in `wrt`
#   backward: lse, dout, delta


def _split(call: Call, arrays: Sequence[Any], extra: int) -> tuple[Operands, Sequence[Any]]:
    count = len(arrays) - extra
    return Operands.given(call.problem, arrays[:count]), arrays[count:]


def _out_avals(call: Call, arrays: Sequence[Any]) -> list[Any]:
    p = call.problem
    rows = (p.N, p.T) if p.order == "BNTD" else (p.T, p.N)
    out = abstract((p.B, *rows, p.Dv), p.dtype, arrays)
    return [out, abstract((p.B, p.N, p.T), p.accumulator, arrays)]


def _attend_run(platform, *arrays, call):
    device = device_of(platform)
    implementation = choose(call.problem, device, call.implementation)
    return implementation.forward(call.problem, Operands.given(call.problem, arrays), device)


def _tangent_run(platform, *arrays, call, wrt):
    operands, (out, lse, *tangents) = _split(call, arrays, 2 + len(wrt))
    implementation = choose(call.problem, device_of(platform), call.implementation)
    moved = dict(zip(wrt, tangents, strict=True))
    return implementation.tangent(call.problem, operands, out, lse, moved)


def _backward_run(platform, *arrays, call, wrt):
    operands, (lse, dout, delta) = _split(call, arrays, 3)
    implementation = choose(call.problem, device_of(platform), call.implementation)
    return implementation.backward(call.problem, operands, lse, dout, delta, wrt)


def _attend_jvp(primals, tangents, *, call):
    operands = Operands.given(call.problem, primals)
    moved = Operands.given(call.problem, tangents)
    out, lse = attend(call, operands)
    wrt = tuple(n for n in DIFFERENTIABLE if not isinstance(getattr(moved, n), ad.Zero | None))
    given = [getattr(moved, name) for name in wrt]
    primals = [*alike(primals), out, lse]
    return [out, lse], tangent_p.bind(*alike([*primals, *given]), call=call, wrt=wrt)


def _tangent_transpose(cotangents, *arrays, call, wrt):
    operands, (out, lse, *_) = _split(call, arrays, 2 + len(wrt))
    dout, dlse = (ad.instantiate_zeros(c) for c in cotangents)
    delta = _formulas.delta_of(call.problem, out, dout, dlse)
    given = alike([*operands.present(), lse, dout, delta])
    gradients = backward_p.bind(*given, call=call, wrt=wrt)
    return [None] * (len(arrays) - len(wrt)) + list(gradients)


def _derivative_jvp(primitive, formula, linear_count, primals, tangents, *, call, wrt):
    """The jvp of `tangent` and `backward`, whose last `linear_count(wrt)` arguments are linear.

    Where only linear arguments move it is the primitive itself; else the jvp of its pair sum.
    """
    primals_out = primitive.bind(*primals, call=call, wrt=wrt)
    moved = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    first_linear = len(primals) - linear_count(wrt)
    if all(i >= first_linear for i in moved):
        linear = [ad.instantiate_zeros(t) for t in tangents[first_linear:]]
        tangents_out = primitive.bind(*alike([*primals[:first_linear], *linear]), call=call, wrt=wrt)
        return primals_out, tangents_out

    def of_moved(*values):
        arrays = list(primals)
        for i, value in zip(moved, values, strict=True):
            arrays[i] = value
        return formula(call, wrt, arrays)

    _, tangents_out = jax.jvp(of_moved, [primals[i] for i in moved], [tangents[i] for i in moved])
    return primals_out, tangents_out


def _tangent_formula(call, wrt, arrays):
    operands, (out, lse, *tangents) = _split(call, arrays, 2 + len(wrt))
    moved = dict(zip(wrt, tangents, strict=True))
    return list(_formulas.tangent(call.problem, operands, out, lse, moved))


def _backward_formula(call, wrt, arrays):
    operands, (lse, dout, delta) = _split(call, arrays, 3)
    return _formulas.backward(call.problem, operands, lse, dout, delta, wrt)


def _backward_transpose(cotangents, *arrays, call, wrt):
    """Of `backward` in dout and delta, which is linear in both."""
    linear = [i for i, x in enumerate(arrays) if ad.is_undefined_primal(x)]
    avals = [arrays[i].aval for i in linear]
    structs = [struct(x.shape, x.dtype, [x]) for x in avals]

    def of_linear(*values):
        full = list(arrays)
        for i, value in zip(linear, values, strict=True):
            full[i] = value
        return _backward_formula(call, wrt, full)

    pulled = jax.linear_transpose(of_linear, *structs)([ad.instantiate_zeros(c) for c in cotangents])
    results: list[Any] = [None] * len(arrays)
    for i, value in zip(linear, pulled, strict=True):
        results[i] = value
    return results


# Batching folds the new axis into B.


def _fold(call: Call, names: Sequence[str], arrays, dims):
    """Arrays with the batched axis folded into B, the folded call and the axis' size.

    Args:
        names: of the arrays; masks and bias may stay broadcast over B.
    """
    p = call.problem
    size = next(x.shape[d] for x, d in zip(arrays, dims, strict=True) if d is not None)
    lasting = {"bias", "dbias", "mask", "key_mask", "q_segments", "kv_segments", "q_offset"}
    spread = {name for name, d in zip(names, dims, strict=True) if d is not None}
    # A tangent and a gradient have the shape of their operand.
    spread |= {"bias"} & {n.removeprefix("d") for n in spread}
    folded = []
    for name, x, d in zip(names, arrays, dims, strict=True):
        x = x[None] if d is None else jnp.moveaxis(x, d, 0)
        if name in lasting and x.shape[1] == 1 and name.removeprefix("d") not in spread:
            folded.append(x[0])
        else:
            full = jnp.broadcast_to(x, (size, p.B, *x.shape[2:]))
            folded.append(full.reshape(size * p.B, *x.shape[2:]))
    operands = Operands.given(p, folded)
    problem = dataclasses.replace(
        p,
        B=size * p.B,
        bias=_shape(operands.bias),
        mask=_shape(operands.mask),
        key_mask=_shape(operands.key_mask),
        segments=p.segments and (_shape(operands.q_segments), _shape(operands.kv_segments)),
        offsets=_shape(operands.q_offset),
    )
    return folded, dataclasses.replace(call, problem=problem), size


def _shape(x):
    return None if x is None else x.shape


def _operand_names(problem: Problem) -> list[str]:
    every = Operands.given(problem, [True] * len(Operands._fields))
    return [name for name, x in every._asdict().items() if x is not None]


def _batch(primitive, extra_names, arrays, dims, *, call, wrt=()):
    p = call.problem
    names = _operand_names(p) + extra_names(wrt)
    if any(d is not None and x.shape[d] == 0 for x, d in zip(arrays, dims, strict=True)):
        avals = _avals_like(call, wrt, arrays, dims) if primitive is backward_p else _out_avals(call, arrays)
        return [jnp.zeros((0, *x.shape), x.dtype) for x in avals], [0] * len(avals)
    if primitive is backward_p and "bias" in wrt:
        # A gradient for each element of the new axis: the bias must have that axis.
        at = names.index("bias")
        if dims[at] is None:
            size = next(x.shape[d] for x, d in zip(arrays, dims, strict=True) if d is not None)
            arrays, dims = list(arrays), list(dims)
            arrays[at], dims[at] = jnp.broadcast_to(arrays[at], (size, *arrays[at].shape)), 0
    folded, call, size = _fold(call, names, arrays, dims)
    params = {} if primitive is attend_p else {"wrt": wrt}
    sums = _in_parts(functools.partial(primitive.bind, **params), call, folded, along(arrays, dims))
    results = [x.reshape(size, p.B, *x.shape[1:]) for x in sums]
    if primitive is backward_p and "bias" in wrt and p.bias[0] == 1:
        results[-1] = results[-1].sum(1, keepdims=True)
    return results, [0] * len(results)


def _in_parts(bind, call: Call, folded, where: Along | None):
    """Binds a primitive, on each device's part of B where explicit mesh axes divide the batched axis."""
    if where is None:
        return bind(*folded, call=call)
    local = Cut(call.problem, where.parts, 1).of(call)
    return where.apply(functools.partial(bind, call=local), folded, call.problem.B)


def _avals_like(call, wrt, arrays, dims=None):
    """Of the operands in `wrt`; without the axis in `dims` where they are batched."""
    names = _operand_names(call.problem)
    avals = []
    for i in (names.index(name) for name in wrt):
        shape = list(arrays[i].shape)
        if dims is not None and dims[i] is not None:
            del shape[dims[i]]
        avals.append(abstract(shape, arrays[i].dtype, arrays))
    return avals


def _describe(extra_names, results, arrays, *, call, wrt=()):
    """What a primitive is to the partitioner: the labels of its operands and results."""
    p = call.problem

    def labelled(name, x):
        return Labelled(tuple(x.shape), str(x.dtype), _formulas.labels(p, name))

    operands = [labelled(*x) for x in zip(_operand_names(p) + extra_names(wrt), arrays, strict=True)]
    avals = _avals_like(call, wrt, arrays) if results is None else _out_avals(call, arrays)
    names = wrt if results is None else results
    return Description(p, tuple(operands), tuple(labelled(*x) for x in zip(names, avals, strict=True)))


def _define(name, run, abstract, jvp, transpose, extra_names) -> Partitionable:
    primitive = Partitionable(name)
    primitive.def_abstract_eval(unmarked(abstract))

    @functools.lru_cache(maxsize=256)
    def jitted(**params):
        return jax.jit(lambda *arrays: primitive.bind(*arrays, **params))

    def evaluate(*arrays, **params):
        # Under `jax.disable_jit` the jitted bind would come back here.
        with jax.disable_jit(False):
            return jitted(**params)(*arrays)

    primitive.def_impl(unmarked(evaluate))
    ad.primitive_jvps[primitive] = unmarked(jvp)
    if transpose is not None:
        ad.primitive_transposes[primitive] = unmarked(transpose)
    batching.primitive_batchers[primitive] = unmarked(functools.partial(_batch, primitive, extra_names))
    results = None if transpose is _backward_transpose else ("out", "lse")
    register_lowering(primitive, run, functools.partial(_describe, extra_names, results))
    return primitive


attend_p = _define(
    "attention",
    _attend_run,
    lambda *arrays, call: _out_avals(call, arrays),
    _attend_jvp,
    None,
    lambda wrt: [],
)
tangent_p = _define(
    "attention_tangent",
    _tangent_run,
    lambda *arrays, call, wrt: _out_avals(call, arrays),
    lambda primals, tangents, **params: _derivative_jvp(
        tangent_p, _tangent_formula, len, primals, tangents, **params
    ),
    _tangent_transpose,
    lambda wrt: ["out", "lse", *(f"d{name}" for name in wrt)],
)
backward_p = _define(
    "attention_backward",
    _backward_run,
    lambda *arrays, call, wrt: _avals_like(call, wrt, arrays),
    lambda primals, tangents, **params: _derivative_jvp(
        backward_p, _backward_formula, lambda wrt: 2, primals, tangents, **params
    ),
    _backward_transpose,
    lambda wrt: ["lse", "dout", "delta"],
)
