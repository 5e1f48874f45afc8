"""The functions of flash-attention-jax 0.3.1 by their names, on top of the two here.

What its code and its README promised, without what went wrong there.
As with `flash_attention` and `attention`, functions with "flash" in their name return
`AttentionOutput(out, lse)`, the others out alone. Each takes every shape and dtype that
`flash_attention` takes, and raises what it raises.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flash_attention_jax._api import AttentionOutput, attention, flash_attention
from flash_attention_jax._arguments import checked

COSINE_SIM_SCALE = 10

plain_attention = attention


def causal_attention(
    q: Float[Array, "*batch T D"], k: Float[Array, "*batch S D"], v: Float[Array, "*batch S Dv"]
) -> Float[Array, "*batch T Dv"]:
    """`attention(q, k, v, causal=True)`: the last query stands at the last key.

    Args:
        q: queries (*batch, [N,] T, D), float16, bfloat16, float32 or float64.
        k: keys (*batch, [K,] S, D), of q's dtype.
        v: values (*batch, [K,] S, Dv), of q's dtype.

    Returns:
        out (*batch, [N,] T, Dv), in q's dtype.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype or a type is wrong.

    Example:
        >>> out = causal_attention(q, k, v)
    """
    return attention(q, k, v, causal=True)


def causal_flash_attention(
    q: Float[Array, "*batch T D"], k: Float[Array, "*batch S D"], v: Float[Array, "*batch S Dv"]
) -> AttentionOutput:
    """`flash_attention(q, k, v, causal=True)`: the last query stands at the last key.

    Args:
        q: queries (*batch, [N,] T, D), float16, bfloat16, float32 or float64.
        k: keys (*batch, [K,] S, D), of q's dtype.
        v: values (*batch, [K,] S, Dv), of q's dtype.

    Returns:
        `AttentionOutput(out, lse)`: out (*batch, [N,] T, Dv) in q's dtype, lse (*batch, [N,] T).

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype or a type is wrong.

    Example:
        >>> out, _ = causal_flash_attention(q, k, v)
    """
    return flash_attention(q, k, v, causal=True)


def cosine_sim_attention(
    q: Float[Array, "*batch T D"],
    k: Float[Array, "*batch S D"],
    v: Float[Array, "*batch S Dv"],
    key_mask: Bool[Array, "*#batch S"] | None = None,
) -> Float[Array, "*batch T Dv"]:
    """Plain attention whose logits are 10 times the cosine of the angle of query and key.

    Each query and key is divided by its l2 norm (query-key normalization, arXiv 2010.04245).
    A vector of zeros stays 0 and has a gradient of 0.

    Args:
        q: queries (*batch, [N,] T, D), float16, bfloat16, float32 or float64.
        k: keys (*batch, [K,] S, D), of q's dtype.
        v: values (*batch, [K,] S, Dv), of q's dtype.
        key_mask: bool or 0/1, broadcastable to (*batch, S). Keys with 0 are hidden.

    Returns:
        out (*batch, [N,] T, Dv), in q's dtype.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype or a type is wrong.

    Example:
        >>> out = cosine_sim_attention(q, k, v, key_mask)
    """
    return attention(_unit("q", q), _unit("k", k), v, key_mask, scale=COSINE_SIM_SCALE)


def cosine_sim_flash_attention(
    q: Float[Array, "*batch T D"],
    k: Float[Array, "*batch S D"],
    v: Float[Array, "*batch S Dv"],
    key_mask: Bool[Array, "*#batch S"] | None = None,
) -> AttentionOutput:
    """`cosine_sim_attention` that never stores the T x S matrix.

    Args:
        q: queries (*batch, [N,] T, D), float16, bfloat16, float32 or float64.
        k: keys (*batch, [K,] S, D), of q's dtype.
        v: values (*batch, [K,] S, Dv), of q's dtype.
        key_mask: bool or 0/1, broadcastable to (*batch, S). Keys with 0 are hidden.

    Returns:
        `AttentionOutput(out, lse)`: out (*batch, [N,] T, Dv) in q's dtype, lse (*batch, [N,] T).

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype or a type is wrong.

    Example:
        >>> out, _ = cosine_sim_flash_attention(q, k, v, key_mask)
    """
    return flash_attention(_unit("q", q), _unit("k", k), v, key_mask, scale=COSINE_SIM_SCALE)


def rabe_attention(
    q: Float[Array, "*batch T D"], k: Float[Array, "*batch S D"], v: Float[Array, "*batch S Dv"]
) -> Float[Array, "*batch T Dv"]:
    """Attention in memory linear in T and S, as Rabe & Staats asked for (arXiv 2112.05682).

    The blocks are those of `flash_attention`, so there are no chunk sizes to choose.

    Args:
        q: queries (*batch, [N,] T, D), float16, bfloat16, float32 or float64.
        k: keys (*batch, [K,] S, D), of q's dtype.
        v: values (*batch, [K,] S, Dv), of q's dtype.

    Returns:
        out (*batch, [N,] T, Dv), in q's dtype.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype or a type is wrong.

    Example:
        >>> out = rabe_attention(q, k, v)
    """
    return flash_attention(q, k, v).out


def _unit(name: str, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """x, checked, with each vector of its last axis divided by its l2 norm."""
    return _divided_by_norms(checked(name, x))


@jax.jit
def _divided_by_norms(x: Array) -> Array:
    """Computed in float32 at least.

    A vector that holds a value that is not finite becomes NaN, with a gradient of 0 rather than
    NaN, for a key that is hidden may hold anything.
    """
    # `jnp.promote_types` raises where `jax_numpy_dtype_promotion` is strict.
    wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    finite = jnp.isfinite(wide).all(-1, keepdims=True)
    wide = jnp.where(finite, wide, 0)
    # The result does not depend on this divisor; without it large squares would overflow.
    largest = jax.lax.stop_gradient(jnp.abs(wide).max(-1, keepdims=True, initial=0))
    wide = wide / jnp.where(largest == 0, 1, largest)
    squares = jnp.sum(wide**2, -1, keepdims=True)
    unit = jnp.where(squares == 0, 0, wide / jnp.sqrt(jnp.where(squares == 0, 1, squares)))
    return jnp.where(finite, unit, jnp.nan).astype(x.dtype)
