"""Which strategy a call takes, and why."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from flash_attention_jax._arguments import fail
from flash_attention_jax._distributed._layout import LAYOUTS, Plan
from flash_attention_jax._impl.base import Unsupported
from flash_attention_jax._problem import Problem

STRATEGIES = ("ring", "all_to_all", "all_gather")
# Up to so many bytes of K and V of the whole sequence one collective costs less than its hops would wait.
# A judgement, not a measurement: 4 MiB take some 10 us over a 450 GB/s link, as long as one start.
_SMALL = 2**22
# Floating-point operations of a hop for each byte that travels, over which the transfer is hidden. An H200
# multiplies bfloat16 at about 700 TFLOP/s and has 450 GB/s of NVLink each way: 1556.
_HIDDEN = 1600


@dataclasses.dataclass(frozen=True)
class Choice:
    """The answer of `explain`; `str()` of it is a readable table.

    Attributes:
        problem: the whole problem, over all devices.
        devices: among how many its sequence is divided.
        chosen: the strategy that runs when none is asked for.
        reasons: why each one is chosen, could be, or cannot be.
    """

    problem: Problem
    devices: int
    chosen: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        p = self.problem
        sizes = f"B={p.B} N={p.N} K={p.K} T={p.T} S={p.S} D={p.D} Dv={p.Dv}"
        lines = [f"{sizes} {p.dtype} over {self.devices} devices"]
        width = max(map(len, self.reasons))
        for name, reason in self.reasons.items():
            lines.append(f"  {name:<{width}}  {'chosen: ' * (name == self.chosen)}{reason}")
        return "\n".join(lines)


class _Sizes(NamedTuple):
    """What the choice looks at.

    Attributes:
        whole: bytes of K and V of the whole sequence.
        hop_intensity: forward FLOPs of a hop, half of them where a band hides some, for each byte of it.
        hops: how many there are, the first of which needs no transfer.
    """

    whole: int
    hop_intensity: float
    hops: int


def _sizes(problem: Problem, plan: Plan) -> _Sizes:
    p = problem
    whole = p.B * p.K * p.S * (p.D + p.Dv) * jnp.dtype(p.dtype).itemsize
    pairs = p.B * p.N * (p.T // plan.devices) * (p.S // plan.devices) * (0.5 if p.banded else 1)
    flops = 2 * pairs * (p.D + p.Dv)
    return _Sizes(whole, flops / max(1, whole // plan.devices), len(plan.hops))


def heads_refused(problem: Problem, devices: int) -> str | None:
    """Why heads cannot be divided over the devices, or None."""
    p = problem
    for name, count, of in (("N", p.N, "q"), ("K", p.K, "k and v")):
        if count % devices:
            return f"the head count {name} = {count} of {of} is not divided by {devices} devices"
    return None


def ring_refused(plan: Plan) -> str | None:
    """Why a ring cannot run a plan, or None."""
    if plan.implementation == "reference" and plan.devices > 1:
        return "'reference' has no derivatives for an lse of keys on other devices"
    return None


def choose(problem: Problem, plan: Plan) -> Choice:
    """The strategy for the whole problem, divided as the plan says."""
    sizes, heads, ring = _sizes(problem, plan), heads_refused(problem, plan.devices), ring_refused(plan)
    count, hops = plan.devices, sizes.hops - 1
    intensity = f"{sizes.hop_intensity:.0f} FLOP for each byte of a hop"
    reasons = {
        "ring": ring or f"{hops} of {count - 1} hops, {intensity}; memory is that of a device's own share",
        "all_to_all": heads or f"{problem.N // count} query heads on each device, for all of the sequence",
        "all_gather": f"{sizes.whole} bytes of K and V on every device",
    }
    if ring is not None:
        chosen = "all_to_all" if heads is None else "all_gather"
    elif hops == 0:
        chosen, reasons["ring"] = "ring", "no key on another device is in reach"
    elif sizes.whole <= _SMALL:
        chosen = "all_gather"
        reasons[chosen] += f", up to {_SMALL}: one collective takes less than {hops} hops in turn"
    elif heads is None and sizes.hop_intensity < _HIDDEN and hops == count - 1:
        chosen = "all_to_all"
        reasons[chosen] += f"; a ring would wait for its hops, which have {intensity}, under {_HIDDEN}"
    else:
        chosen = "ring"
    return Choice(problem, count, chosen, reasons)


def chosen(strategy: str | None, problem: Problem, plan: Plan) -> str:
    """The strategy to run.

    Raises:
        ValueError: heads that the one asked for cannot divide.
        Unsupported: the implementation cannot run in a ring.
    """
    if strategy == "all_to_all":
        reason = heads_refused(problem, plan.devices)
        if reason is not None:
            fail("strategy", "'ring' or 'all_gather' for these heads", f"'all_to_all': {reason}")
    if strategy == "ring":
        reason = ring_refused(plan)
        if reason is not None:
            raise Unsupported(f"implementation {plan.implementation!r} cannot run in a ring: {reason}")
    return choose(problem, plan).chosen if strategy is None else strategy


def check_names(strategy: object, layout: object) -> None:
    """Rejects what is no strategy or layout."""
    for name, x, known, none in (
        ("strategy", strategy, STRATEGIES, "None, "),
        ("layout", layout, LAYOUTS, ""),
    ):
        if not (isinstance(x, str) and x in known) and not (x is None and none):
            error = ValueError if isinstance(x, str) else TypeError
            fail(name, f"{none}{' or '.join(map(repr, known))}", repr(x), error)
