"""What an implementation is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flash_attention_jax._problem import Operands, Problem

Array = Any


class Unsupported(NotImplementedError):
    """The implementation that was asked for by name cannot run the problem; says why."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What a computation is lowered for.

    Attributes:
        platform: as JAX names it at lowering: "cpu", "cuda", "rocm", "tpu", or "other".
        kind: the device's own name, "NVIDIA H200" say; None when no such device is present.
    """

    platform: str
    kind: str | None = None


class Forward(Protocol):
    """(problem, operands, device) to out, of q's dtype and memory order, and lse (B, N, T)."""

    def __call__(self, problem: Problem, operands: Operands, device: Device) -> tuple[Array, Array]: ...


class Backward(Protocol):
    """The gradients of the operands in `wrt`, of their shapes and dtypes.

    `wrt` is a subset of ("q", "k", "v", "bias") in that order; delta = rowsum(dout * out) - dlse.
    """

    def __call__(
        self,
        problem: Problem,
        operands: Operands,
        lse: Array,
        dout: Array,
        delta: Array,
        wrt: tuple[str, ...],
    ) -> list[Array]: ...


class Tangent(Protocol):
    """The tangents of out and lse, linear in `moved`, which holds operands' tangents by name."""

    def __call__(
        self,
        problem: Problem,
        operands: Operands,
        out: Array,
        lse: Array,
        moved: Mapping[str, Array],
    ) -> tuple[Array, Array]: ...


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute attention and its first derivatives.

    Attributes:
        name: its module's name.
        refuses: why it cannot run a problem on a device, or None if it can. Pure and cheap.
        of_kind: whether it is built for some kinds of a platform's devices. Where the kind is not known, it
            runs only when named.
        forward, backward, tangent: see the protocols. Problems with an empty axis never get here.
    """

    name: str
    refuses: Callable[[Problem, Device], str | None]
    forward: Forward
    backward: Backward
    tangent: Tangent
    of_kind: bool = False
