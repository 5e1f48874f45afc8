"""Gradients of an attention call from its results, which spares the forward pass (JAX alone)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flash_attention_jax._arguments import normalize
from flash_attention_jax._attend import Call, backward_p
from flash_attention_jax._formulas import DIFFERENTIABLE, delta_of
from flash_attention_jax._problem import Operands, arrange
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
        options: the other arguments of the call, by name.
    """
    options, named = dict(options), dict(arrays)
    implementation, offset = options.pop("implementation", None), options.pop("q_offset", None)
    segments = named.pop("q_segments", None), named.pop("kv_segments", None)
    scale = named.pop("scale", options.pop("scale", None))
    raw = Operands(**{"q_offset": offset, **named})
    given = None if segments[0] is None else segments
    problem, operands, scale = normalize(raw, given, scale=scale, **options)
    if problem.empty:
        return [jnp.zeros_like(arrays[name]) for name in wrt]
    inner = tuple(x for x in DIFFERENTIABLE if x in wrt or (x == "q" and "scale" in wrt))

    def canonical(moved):
        q, factor = moved.get("q", operands.q), moved.get("scale", scale)
        if factor is not None:
            wide = problem.accumulator
            q = (q.astype(wide) * factor.astype(wide)).astype(q.dtype)
        every = operands._replace(**{"q": q, **{x: moved[x] for x in moved if x not in ("q", "scale")}})
        every = arrange(problem, every)
        return [getattr(every, name) for name in inner], every

    _, pull, every = jax.vjp(canonical, {name: arrays[name] for name in wrt}, has_aux=True)
    shape = (problem.B, problem.N, problem.T)
    out, lse = results[0].reshape(*shape, problem.Dv), results[1].reshape(shape)
    dout, dlse = (
        jnp.zeros_like(x) if c is None else c.reshape(x.shape)
        for c, x in zip(cotangents, (out, lse), strict=True)
    )
    given = [*every.present(), lse, dout, delta_of(problem, out, dout, dlse)]
    found = backward_p.bind(*alike(given), call=Call(problem, implementation), wrt=inner)
    (moved,) = pull(list(found))
    return [moved[name] for name in wrt]
