"""FlashAttention in JAX: exact softmax attention that never stores the T x S matrix."""

from flash_attention_jax._api import AttentionOutput, attention, flash_attention
from flash_attention_jax._difference import value_and_grad_difference
from flash_attention_jax._explain import Explanation, explain
from flash_attention_jax._impl.base import Unsupported

__all__ = [
    "AttentionOutput",
    "Explanation",
    "Unsupported",
    "attention",
    "explain",
    "flash_attention",
    "value_and_grad_difference",
]
__version__ = "0.1.0"
