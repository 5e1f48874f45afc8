"""Derivatives of an attention call from its results, which spares the forward pass (JAX alone)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flash_attention_jax._arguments import normalize
from flash_attention_jax._attend import Call, backward_p, tangent_p
from flash_attention_jax._formulas import DIFFERENTIABLE, delta_of
from flash_attention_jax._problem import Operands, Problem, arrange, scaled
from flash_attention_jax._varying import alike

Array = Any


def gradients(
    wrt: Sequence[str],
    arrays: dict[str, Array],
    results: tuple[Array, Array],
    cotangents: tuple[Array | None, Array | None],
    options: dict[str, Any],
) -> list[Array]:
    """FlashAttention-2's backward pass (arXiv 2307.08691, algorithm 2) of `flash_attention`.

    It is itself differentiable to any order in all that it takes, the results included.

    Args:
        wrt: which gradients: "q", "k", "v", "bias" or "scale".
        arrays: the array arguments of the call by name, segment ids as "q_segments" and "kv_segments".
        results: out and lse, of the caller's shapes.
        cotangents: of out and of lse; None is 0.
        options: the other arguments of the call, by name, and `order`.
    """
    call, canonical, inner = _prepared(wrt, arrays, options)
    problem = call.problem
    if problem.empty:
        return [jnp.zeros_like(arrays[name]) for name in wrt]
    _, pull, every = jax.vjp(canonical, {name: arrays[name] for name in wrt}, has_aux=True)
    out, lse = _folded(problem, results)
    dout, dlse = (
        jnp.zeros_like(x) if c is None else c.reshape(x.shape)
        for c, x in zip(cotangents, (out, lse), strict=True)
    )
    given = [*every.present(), lse, dout, delta_of(problem, out, dout, dlse)]
    found = backward_p.bind(*alike(given), call=call, wrt=inner)
    (moved,) = pull(list(found))
    return [moved[name] for name in wrt]


def tangents(
    moved: dict[str, Array], arrays: dict[str, Array], results: tuple[Array, Array], options: dict[str, Any]
) -> list[Array]:
    """The tangents of out and lse.

    Args:
        moved: tangents of array arguments, by name.
        arrays: as of `gradients`.
        results: as of `gradients`.
        options: as of `gradients`.
    """
    call, canonical, inner = _prepared(moved, arrays, options)
    if call.problem.empty or not inner:
        return [jnp.zeros_like(x) for x in results]
    primals = {name: arrays[name] for name in moved}
    _, given, every = jax.jvp(canonical, (primals,), (moved,), has_aux=True)
    found = [*every.present(), *_folded(call.problem, results), *given]
    pair = tangent_p.bind(*alike(found), call=call, wrt=inner)
    return [x.reshape(like.shape) for x, like in zip(pair, results, strict=True)]


def _prepared(
    names: Any, arrays: dict[str, Array], options: dict[str, Any]
) -> tuple[Call, Callable[[dict[str, Array]], Any], tuple[str, ...]]:
    """The call, and how its canonical operands depend on the arrays of these names.

    Returns:
        The call; the function from those arrays to (the operands that move, all operands); and the
        names of the operands that move.
    """
    options, named = dict(options), dict(arrays)
    implementation, offset = options.pop("implementation", None), options.pop("q_offset", None)
    segments = named.pop("q_segments", None), named.pop("kv_segments", None)
    scale = named.pop("scale", options.pop("scale", None))
    raw = Operands(**{"q_offset": offset, **named})
    given = None if segments[0] is None else segments
    problem, operands, scale = normalize(raw, given, scale=scale, **options)
    inner = tuple(x for x in DIFFERENTIABLE if x in names or (x == "q" and "scale" in names))

    def canonical(moved):
        q, factor = moved.get("q", operands.q), moved.get("scale", scale)
        if factor is not None:
            q = scaled(problem, q, factor)
        every = operands._replace(**{"q": q, **{x: moved[x] for x in moved if x not in ("q", "scale")}})
        every = arrange(problem, every)
        return [getattr(every, name) for name in inner], every

    return Call(problem, implementation), canonical, inner


def _folded(problem: Problem, results: tuple[Array, Array]) -> tuple[Array, Array]:
    """out and lse with the batch axes made one."""
    p = problem
    rows = (p.N, p.T) if p.order == "BNTD" else (p.T, p.N)
    return results[0].reshape(p.B, *rows, p.Dv), results[1].reshape(p.B, p.N, p.T)
