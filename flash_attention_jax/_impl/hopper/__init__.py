"""The forward and the backward pass on Hopper GPUs; forward mode is the pair sum of `_formulas`.

Importing this imports no Pallas: the kernels are imported where they are lowered.
"""

from __future__ import annotations

from typing import Any

from flash_attention_jax import _formulas
from flash_attention_jax._impl.base import Device, Implementation
from flash_attention_jax._impl.hopper._backward_configs import refuses_backward
from flash_attention_jax._impl.hopper._refuses import refuses
from flash_attention_jax._problem import Operands, Problem


def forward(problem: Problem, operands: Operands, device: Device) -> tuple[Any, Any]:
    """See `base.Forward`."""
    from flash_attention_jax._impl.hopper import _forward

    return _forward.forward(problem, operands, device)


def backward(
    problem: Problem, operands: Operands, lse: Any, dout: Any, delta: Any, wrt: tuple[str, ...]
) -> list[Any]:
    """See `base.Backward`. Sizes that `refuses_backward` names are computed by `_formulas`."""
    if refuses_backward(problem) is not None:
        return _formulas.backward(problem, operands, lse, dout, delta, wrt)
    from flash_attention_jax._impl.hopper import _backward

    return _backward.backward(problem, operands, lse, dout, delta, wrt)


IMPLEMENTATION = Implementation(
    name="hopper",
    refuses=refuses,
    forward=forward,
    backward=backward,
    tangent=_formulas.tangent,
    of_kind=True,
)
