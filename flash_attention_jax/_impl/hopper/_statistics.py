"""What the backward kernels read of lse and delta."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

Array = Any
_LOG2E = math.log2(math.e)


def statistics(lse: Array, delta: Array, length: int) -> Array:
    """float32 (B, N, 2, length): lse in log2 units, and minus delta.

    Queries that see nothing, and those beyond the end, have lse = inf, so that their weights are 0.

    Args:
        lse, delta: float32 (B, N, T).
        length: T or more.
    """
    # A kernel of its own for the sum that delta is: XLA would put it into the one that stacks, in which a
    # thread reads a row alone. On an H200, (8, 2048, 16, 128) causal: 274 us, and 38 with a barrier between,
    # where a forward and backward take 1315 and 1078.
    delta = lax.optimization_barrier(delta)
    dead = lse == -jnp.inf
    scaled = jnp.where(dead, jnp.inf, lse * _LOG2E)
    negative = jnp.where(dead, 0, -delta)
    padding = ((0, 0), (0, 0), (0, length - lse.shape[-1]))
    scaled = jnp.pad(scaled, padding, constant_values=jnp.inf)
    return jnp.stack([scaled, jnp.pad(negative, padding)], axis=2).astype(jnp.float32)
