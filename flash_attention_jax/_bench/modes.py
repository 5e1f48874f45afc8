"""What is computed of an attention function: its output alone, or with derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Mode:
    """One mode.

    Attributes:
        factor: useful FLOPs over those of the forward pass, which has two matrix products, q k^T and
            p v. The backward pass has five (arXiv 2307.08691, section 3.2): q k^T again, dout v^T,
            p^T dout, ds k, ds^T q. A jvp has, beside the forward's, both tangents of each of them.
        outputs: names of the results.
        extras: names of the further inputs: the cotangent of out, or the tangents of q, k and v.
    """

    factor: float
    outputs: tuple[str, ...]
    extras: tuple[str, ...] = ()


MODES: dict[str, Mode] = {
    "forward": Mode(1.0, ("out",)),
    "forward+backward": Mode(3.5, ("out", "dq", "dk", "dv"), ("dout",)),
    "jvp": Mode(3.0, ("out", "tangent"), ("q'", "k'", "v'")),
}


def transformed(function: Callable[..., Any], mode: str) -> Callable[..., tuple[Any, ...]]:
    """The JAX function ((q, k, v), extras) to the mode's outputs.

    Args:
        function: (q, k, v) to out.
    """

    def run(qkv, extras):
        if mode == "forward":
            return (function(*qkv),)
        if mode == "jvp":
            return jax.jvp(function, tuple(qkv), tuple(extras))
        out, pull = jax.vjp(function, *qkv)
        return (out, *pull(*extras))

    return run
