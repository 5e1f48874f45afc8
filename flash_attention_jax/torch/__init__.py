"""PyTorch: JAX functions as PyTorch functions, and attention of tensors.

The only part of the package that imports torch, and nothing else of the package imports it. Tensors
cross by DLPack, without a copy.
"""

import importlib.util

if importlib.util.find_spec("torch") is None:
    raise ImportError(
        "flash_attention_jax.torch needs PyTorch, which is not installed: pip install torch", name="torch"
    )

from flash_attention_jax.torch._attention import flash_attention
from flash_attention_jax.torch._jax2torch import jax2torch
from flash_attention_jax.torch._scaled_dot_product import scaled_dot_product_attention

__all__ = ["flash_attention", "jax2torch", "scaled_dot_product_attention"]
