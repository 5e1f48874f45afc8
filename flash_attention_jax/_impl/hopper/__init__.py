"""The forward and the backward pass on Hopper GPUs; forward mode is the pair sum of `_formulas`.

Importing this imports no Pallas: the kernels are imported where they are lowered.
"""

from __future__ import annotations

from typing import Any

from flash_attention_jax import _formulas
from flash_attention_jax._impl.base import Device, Implementation
from flash_attention_jax._impl.hopper._backward_configs import faster_apart, refuses_backward
from flash_attention_jax._impl.hopper._refuses import refuses
from flash_attention_jax._problem import Operands, Problem


def forward(problem: Problem, operands: Operands, device: Device) -> tuple[Any, Any]:
    """See `base.Forward`."""
    from flash_attention_jax._impl.hopper import _forward

    return _forward.forward(problem, operands, device)


def backward(
    problem: Problem, operands: Operands, lse: Any, dout: Any, delta: Any, wrt: tuple[str, ...]
) -> list[Any]:
    """See `base.Backward`. Sizes that `refuses_backward` names are computed by `_formulas`.

    One kernel computes all gradients, in which those of q are added up in any order. Where their bits must be
    the same on every run, nothing else is wanted, or it is faster, they have a kernel of their own.
    """
    if refuses_backward(problem) is not None:
        return _formulas.backward(problem, operands, lse, dout, delta, wrt)
    from flash_attention_jax._impl.hopper import _backward, _dq

    given = problem, operands, lse, dout, delta
    others = tuple(name for name in wrt if name != "q")
    if "q" not in wrt or (others and not (problem.deterministic or faster_apart(problem))):
        return _backward.backward(*given, wrt)
    rest = _backward.backward(*given, others) if others else []
    return [_dq.query_gradient(*given), *rest]


IMPLEMENTATION = Implementation(
    name="hopper",
    refuses=refuses,
    forward=forward,
    backward=backward,
    tangent=_formulas.tangent,
    of_kind=True,
)
