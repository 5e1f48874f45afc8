"""How far two attention functions differ, in value and in gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def value_and_grad_difference(
    f: Callable[..., Any],
    g: Callable[..., Any],
    seed: int = 42,
    q_seq_len: int = 1024,
    k_seq_len: int = 8192,
    dim: int = 512,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """The largest absolute differences of two attention functions and of their gradients.

    Both are called on the same float32 q (q_seq_len, dim), k and v (k_seq_len, dim), drawn from a
    standard normal distribution; the gradients are those of `sum(out)`.

    Args:
        f, g: functions of (q, k, v) that return an array, or a tuple (out, ...).
        seed: of the random inputs.

    Returns:
        (difference of out, (of dq, of dk, of dv)), float32 scalars.

    Example:
        >>> diff, (dq, dk, dv) = value_and_grad_difference(attention, flash_attention)
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    lengths = (q_seq_len, k_seq_len, k_seq_len)
    arguments = [jax.random.normal(x, (n, dim), jnp.float32) for x, n in zip(keys, lengths, strict=True)]

    def summed(function):
        def of_arguments(*arguments):
            result = function(*arguments)
            out = result[0] if isinstance(result, tuple) else result
            return out.sum(), out

        return jax.value_and_grad(of_arguments, argnums=(0, 1, 2), has_aux=True)

    ((_, out), grads), ((_, other_out), other_grads) = (summed(x)(*arguments) for x in (f, g))

    def largest(x, y):
        return jnp.max(jnp.abs(x - y))

    dq, dk, dv = (largest(x, y) for x, y in zip(grads, other_grads, strict=True))
    return largest(out, other_out), (dq, dk, dv)
