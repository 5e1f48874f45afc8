"""The attention function for Flax: `nnx.MultiHeadAttention` and `linen.MultiHeadDotProductAttention`.

It needs nothing of Flax, which therefore need not be installed to import this module.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flash_attention_jax._arguments import fail
from flash_attention_jax._dot_product import from_first_position
from flash_attention_jax._problem import Operands

__all__ = ["attention_fn"]


def attention_fn(
    query: Float[Array, "*batch T N D"],
    key: Float[Array, "*batch S K D"],
    value: Float[Array, "*batch S K Dv"],
    bias: Float[Array, "*#batch N T S"] | None = None,
    mask: Bool[Array, "*#batch N T S"] | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: str | jax.lax.Precision | None = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    is_causal: bool = False,
    input_positions: Any = None,
    *,
    promote_dtype: Any = None,
) -> Float[Array, "*batch T N Dv"]:
    """Attention in linear memory with the signature of Flax's `dot_product_attention`.

    Pass it as `attention_fn` to `flax.nnx.MultiHeadAttention` or to
    `flax.linen.MultiHeadDotProductAttention`. The algorithm, its accuracy and its derivatives are
    those of `flash_attention`; the arrays are read in the memory order in which they come. Logits,
    softmax and sums are always float32 at least. A query that sees no key gets 0, where Flax gives
    the mean of `value`. `precision=None` is true float32, where Flax leaves it to the backend.

    What cannot be done without the T x S matrix, or without dropout, is refused by name.

    Args:
        query: (*batch, T, N, D), floating.
        key: (*batch, S, K, D). K divides N (grouped-query attention).
        value: (*batch, S, K, Dv).
        bias: floating, broadcastable to (*batch, N, T, S), added to the logits.
        mask: bool or 0/1, broadcastable to (*batch, N, T, S). Pairs with 0 are hidden.
        broadcast_dropout: has no meaning without dropout.
        dropout_rng: has no meaning without dropout.
        dropout_rate: must be 0 unless `deterministic`.
        deterministic: whether dropout is off.
        dtype: what query, key and value are converted to; None is the dtype that they promote to.
        precision: of float32 matrix products: "highest" (also None), "high" or "default".
        module: must be None: there are no weights to sow.
        force_fp32_for_softmax: whatever it is, the softmax is float32 at least.
        einsum_dot_general: must be None, as the two below: products are not einsums here.
        qk_attn_weights_einsum: must be None.
        attn_weights_value_einsum: must be None.
        is_causal: whether query i sees only keys j <= i: aligned at the first position.
        input_positions: must be None.
        promote_dtype: must be None: `dtype` says it. (By name alone, for Flax's two functions
            have different parameters in its place.)

    Returns:
        out (*batch, T, N, Dv), in the dtype that query, key and value were converted to.

    Raises:
        NotImplementedError: an argument that must be None is not, or there is dropout.
        ValueError: a shape or a value is wrong.
        TypeError: a dtype or a type is wrong.

    Example:
        >>> layer = nnx.MultiHeadAttention(8, 256, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
    """
    refused = {
        "module": (module, "None (sow_weights=False), for attention weights are never stored"),
        "einsum_dot_general": (einsum_dot_general, "None, for products are not einsums"),
        "qk_attn_weights_einsum": (qk_attn_weights_einsum, "None, for products are not einsums"),
        "attn_weights_value_einsum": (attn_weights_value_einsum, "None, for products are not einsums"),
        "input_positions": (input_positions, "None, for positions are the places in the arrays"),
        "promote_dtype": (promote_dtype, "None, for `dtype` says what arrays are converted to"),
    }
    for name, (given, must) in refused.items():
        if given is not None:
            fail(name, must, type(given).__name__, NotImplementedError)
    if dropout_rate and not deterministic:
        must = "0 unless deterministic, for there is no dropout"
        fail("dropout_rate", must, dropout_rate, NotImplementedError)
    if dtype is None:
        dtype = jnp.result_type(query, key, value)
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    return from_first_position(
        Operands(query, key, value, bias, None if mask is None else jnp.asarray(mask) != 0),
        is_causal=is_causal,
        precision=precision,
    ).out
