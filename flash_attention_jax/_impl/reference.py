"""Plain attention: the definition. Dense, on any platform, in memory quadratic in the lengths.

Written as DESIGN section 2 writes it and differentiated by JAX. It shares with the other
implementations the predicate `visible` and nothing else.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flash_attention_jax._impl.base import Implementation
from flash_attention_jax._mask import Masks, grouped, visible
from flash_attention_jax._problem import Operands, Problem

Array = Any


def dense(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """out, of q's dtype and memory order, and lse (B, N, T)."""
    p = problem
    acc = p.accumulator
    q, k, v = (x.astype(acc) for x in operands[:3])
    if p.order == "BTND":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q = q.reshape(p.B, p.K, p.G, p.T, p.D)
    seen: Any = None
    poison: Any = None
    if p.masked:
        rows, cols = (jnp.arange(n, dtype=jnp.int32) for n in (p.T, p.S))
        seen = visible(p, Masks.of(p, operands), rows, cols)
        # A query that sees nothing and a hidden key may hold anything; a visible key that is not
        # finite poisons the queries that see it.
        q = jnp.where(seen.any(-1)[..., None], q, 0)
        good_k, good_v = jnp.isfinite(k), jnp.isfinite(v)
        poison = jnp.where(good_k.all(-1) & good_v.all(-1), 0, jnp.nan).astype(acc)
        k, v = jnp.where(good_k, k, 0), jnp.where(good_v, v, 0)
    x = p.scale * jnp.einsum("bkgtd,bksd->bkgts", q, k, precision=p.precision)
    if p.masked:
        # Products with what is hidden may overflow, and 0 * inf is NaN in their derivatives.
        x = jnp.where(seen, x, 0)
    if p.softcap is not None:
        x = p.softcap * jnp.tanh(x / p.softcap)
    if operands.bias is not None:
        x = x + grouped(p, operands.bias).astype(acc)
    if p.masked:
        x = jnp.where(seen, x + poison[:, :, None, None, :], -jnp.inf)
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(x - top)
    norm = weights.sum(-1, keepdims=True)
    dead = norm == 0
    norm = jnp.where(dead, 1, norm)
    weights = weights / norm
    if p.masked:
        weights = jnp.where(seen, weights, 0)
    out = jnp.einsum("bkgts,bksd->bkgtd", weights, v, precision=p.precision)
    out = jnp.where(dead, 0, out)
    lse = jnp.where(dead, -jnp.inf, top + jnp.log(norm))
    out = out.reshape(p.B, p.N, p.T, p.Dv).astype(p.dtype)
    return out if p.order == "BNTD" else out.swapaxes(1, 2), lse.reshape(p.B, p.N, p.T)


def _of(problem: Problem, operands: Operands, names: tuple[str, ...]):
    """`dense` as a function of the named operands, and their values."""

    def function(*values):
        return dense(problem, operands._replace(**dict(zip(names, values, strict=True))))

    return function, [getattr(operands, name) for name in names]


def forward(problem, operands, device):
    """See `base.Forward`."""
    return dense(problem, operands)


def backward(problem, operands, lse, dout, delta, wrt):
    """See `base.Backward`. The cotangent of lse is recovered from delta."""
    function, values = _of(problem, operands, wrt)
    (out, _), pull = jax.vjp(function, *values)
    rows = jnp.sum(dout.astype(lse.dtype) * out.astype(lse.dtype), axis=-1)
    rows = rows if problem.order == "BNTD" else rows.swapaxes(1, 2)
    return list(pull((dout, rows - delta)))


def tangent(problem, operands, out, lse, moved):
    """See `base.Tangent`."""
    function, values = _of(problem, operands, tuple(moved))
    return jax.jvp(function, values, list(moved.values()))[1]


IMPLEMENTATION = Implementation(
    name="reference",
    refuses=lambda problem, device: None,
    forward=forward,
    backward=backward,
    tangent=tangent,
)
