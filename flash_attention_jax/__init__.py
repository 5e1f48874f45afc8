"""FlashAttention in JAX: exact softmax attention that never stores the T x S matrix."""

from flash_attention_jax._api import AttentionOutput, attention, flash_attention
from flash_attention_jax._difference import value_and_grad_difference
from flash_attention_jax._dot_product import dot_product_attention
from flash_attention_jax._explain import Explanation, explain
from flash_attention_jax._impl.base import Unsupported
from flash_attention_jax._older import (
    causal_attention,
    causal_flash_attention,
    cosine_sim_attention,
    cosine_sim_flash_attention,
    plain_attention,
    rabe_attention,
)

__all__ = [
    "AttentionOutput",
    "Explanation",
    "Unsupported",
    "attention",
    "causal_attention",
    "causal_flash_attention",
    "cosine_sim_attention",
    "cosine_sim_flash_attention",
    "dot_product_attention",
    "explain",
    "flash_attention",
    "plain_attention",
    "rabe_attention",
    "value_and_grad_difference",
]
__version__ = "0.1.0"
