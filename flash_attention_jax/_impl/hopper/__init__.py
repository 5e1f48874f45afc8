"""The forward pass on Hopper GPUs; the derivatives are the pair sums of `_formulas`.

Importing this imports no Pallas: the kernel is imported where it is lowered.
"""

from __future__ import annotations

from typing import Any

from flash_attention_jax import _formulas
from flash_attention_jax._impl.base import Device, Implementation
from flash_attention_jax._impl.hopper._refuses import refuses
from flash_attention_jax._problem import Operands, Problem


def forward(problem: Problem, operands: Operands, device: Device) -> tuple[Any, Any]:
    """See `base.Forward`."""
    from flash_attention_jax._impl.hopper import _forward

    return _forward.forward(problem, operands, device)


IMPLEMENTATION = Implementation(
    name="hopper",
    refuses=refuses,
    forward=forward,
    backward=_formulas.backward,
    tangent=_formulas.tangent,
)
