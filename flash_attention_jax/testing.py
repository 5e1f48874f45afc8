"""How this package is judged, for its own tests, its `check` command and its users.

- `CASES`: a table of small, odd problems that cover the meaning of every argument.
- `exact`: the oracle, plain attention in float64, differentiated by JAX.
- `judge`: the error budget. A result may err by twice what the plain formula errs by in the same
  dtype, plus one rounding of the largest exact value::

      err(actual, exact) <= 2 * err(plain, exact) + eps * max |exact|

  with err the largest absolute difference, for out, lse and every gradient, with random cotangents
  on both outputs. Values that are not finite must stand at the same places. One draw of inputs
  says little about the rounding of a formula, of a scalar's gradient least of all, so err(plain)
  is its largest over a few draws.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._api import attention_and_lse, flash_attention
from flash_attention_jax._cases import CASES, Case, numpy_dtype

__all__ = [
    "CASES",
    "Case",
    "Verdict",
    "error",
    "evaluate",
    "exact",
    "judge",
    "judge_implementation",
    "plain_errors",
    "select",
]

Results = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one result compares with its budget.

    Attributes:
        quantity: "out", "lse", or "dx" for the gradient of argument x.
        error: err(actual, exact); infinite where values that are not finite stand elsewhere.
        budget: what it may be.
    """

    quantity: str
    error: float
    budget: float

    @property
    def within(self) -> bool:
        """Whether the error is within its budget."""
        return self.error <= self.budget and math.isfinite(self.error)


def evaluate(function: Callable[..., Any], case: Case, dtype: str | None = None, draw: int = 0) -> Results:
    """Values and gradients of an attention function on a case.

    Args:
        function: takes the arguments of `flash_attention` by name, returns (out, lse).
        dtype: to compute in, instead of the case's.
        draw: which random inputs.

    Returns:
        NumPy arrays by quantity: "out", "lse", and the gradient "dx" of every argument x that has
        one, for random cotangents of both outputs.
    """
    with jax.enable_x64("float64" in (dtype, case.dtype)):
        arguments = case.arguments(dtype, draw)
        moved = {name: arguments.pop(name) for name in case.differentiable()}
        fixed = {name: arguments.pop(name) for name in _FIXED if _is_array(arguments.get(name))}
        run = _runner(function, tuple(arguments.items()))
        out, lse, gradients = run(moved, fixed, _cotangents(case, draw))
        results = {"out": out, "lse": lse} | {f"d{name}": x for name, x in gradients.items()}
        return {name: np.asarray(x, np.float64) for name, x in results.items()}


_FIXED = ("mask", "key_mask", "segment_ids", "q_offset")


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray | tuple) and not isinstance(x, int)


@functools.lru_cache(maxsize=8)
def _runner(function: Callable[..., Any], options: tuple[tuple[str, Any], ...]):
    """Compiled values and gradients, kept for the few draws of one case."""

    @jax.jit
    def run(moved, fixed, cotangents):
        def of_moved(moved):
            out, lse = function(**moved, **fixed, **dict(options))
            # No finite change moves a lse of -inf, so that no cotangent belongs there.
            return (out, jnp.where(jnp.isneginf(lse), 0, lse)), lse

        out, pull, lse = jax.vjp(of_moved, moved, has_aux=True)
        given = tuple(c.astype(x.dtype) for c, x in zip(cotangents, out, strict=True))
        return out[0], lse, pull(given)[0]

    return run


def _cotangents(case: Case, draw: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), draw, 1])
    dout, dlse = (rng.standard_normal(s) for s in ((*case.q[:-1], case.v[-1]), case.q[:-1]))
    return dout.astype(numpy_dtype(case.dtype)), dlse.astype(np.float32)


_DRAWS = 8


@functools.cache
def exact(case: Case, draw: int = 0) -> Results:
    """The oracle: plain attention in float64, differentiated by JAX."""
    return evaluate(attention_and_lse, case, "float64", draw)


@functools.cache
def plain_errors(case: Case) -> dict[str, float]:
    """err(plain, exact) in the case's dtype, by quantity: the largest of a few draws.

    In float64, where the plain formula is the oracle, it is the error in float32 times the ratio
    of the two roundings.
    """
    if case.dtype == "float64":
        single = dataclasses.replace(case, dtype="float32")
        ratio = np.finfo(np.float64).eps / np.finfo(np.float32).eps
        return {name: float(error * ratio) for name, error in plain_errors(single).items()}
    errors = dict.fromkeys(exact(case), 0.0)
    for draw in range(_DRAWS):
        plain, truth = evaluate(attention_and_lse, case, draw=draw), exact(case, draw)
        for name in truth:
            drawn = error(plain[name], truth[name])
            if math.isfinite(drawn):  # An overflow of the plain formula excuses nothing.
                errors[name] = max(errors[name], drawn)
    return errors


def error(actual: np.ndarray, exact: np.ndarray) -> float:
    """The largest absolute difference; infinite where values that are not finite differ."""
    finite = np.isfinite(exact)
    if actual.shape != exact.shape or not np.array_equal(finite, np.isfinite(actual)):
        return float("inf")
    if not np.array_equal(actual[~finite], exact[~finite], equal_nan=True):
        return float("inf")
    return float(np.abs(actual[finite] - exact[finite]).max(initial=0.0))


def judge(function: Callable[..., Any], case: Case) -> list[Verdict]:
    """Compares every result of an attention function on a case with its error budget.

    Args:
        function: takes the arguments of `flash_attention` by name, returns (out, lse).

    Example:
        >>> assert all(v.within for v in judge(flash_attention, CASES[0]))
    """
    actual, verdicts = evaluate(function, case), []
    for name, truth in exact(case).items():
        eps = _eps(case, name)
        largest = np.abs(truth[np.isfinite(truth)]).max(initial=0.0)
        # Where the oracle rounds as the judged does, its own error is between them as well.
        allowed = 3 if case.dtype == "float64" else 2
        budget = allowed * plain_errors(case)[name] + eps * float(largest)
        verdicts.append(Verdict(name, error(actual[name], truth), budget))
    return verdicts


def judge_implementation(implementation: str, case: Case) -> list[Verdict]:
    """`judge` for `flash_attention` with an implementation by name."""
    return judge(functools.partial(flash_attention, implementation=implementation), case)


def select(pattern: str) -> Iterable[Case]:
    """The cases whose name contains the pattern."""
    return (case for case in CASES if pattern in case.name)


def _eps(case: Case, quantity: str) -> float:
    if quantity == "lse":
        return float(np.finfo(np.float64 if case.dtype == "float64" else np.float32).eps)
    return float(jnp.finfo(case.dtype).eps)
