"""A way to compute a workload, made ready: the one thing that checking and timing know."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Where:
    """What computes.

    Attributes:
        platform: as JAX names it: "cpu", "gpu" or "tpu".
        kind: the device's own name.
    """

    platform: str
    kind: str

    @property
    def nvidia(self) -> bool:
        """Whether it is a GPU of NVIDIA's."""
        return self.platform == "gpu" and "nvidia" in self.kind.lower()


class CannotRunError(Exception):
    """A peer cannot run a workload; says why."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A peer prepared for one workload and mode; nothing is left to compile.

    Attributes:
        start: begins one call and returns what it computes, which may not be there yet.
        wait: blocks until what `start` returned is there.
        results: the outputs by name for a cotangent of `out` (where the mode has one), as NumPy
            arrays of the workload's dtype in the order (B, N, T, D).
        memory: bytes that a call takes beside its inputs: temporary and outputs; None where the
            framework does not say.
        session: entered around calls.
        events: seconds that the device takes for so many calls, by its own clock; None where it
            has none.
        loop: a program of so many calls in one, to judge what starting a call costs; None where
            there is none.
        compile_seconds: tracing and compiling; None where nothing is compiled.
        note: what was chosen, where the peer chooses.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], None]
    results: Callable[[np.ndarray | None], dict[str, np.ndarray]]
    memory: Callable[[], int | None] = lambda: None
    session: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    events: Callable[[int], float] | None = None
    loop: Callable[[int], Program] | None = None
    compile_seconds: float | None = None
    note: str | None = None
