"""Which implementation runs a problem: decided where the computation is lowered, by its platform."""

from __future__ import annotations

import jax

from flash_attention_jax._impl import hopper, reference, xla
from flash_attention_jax._impl.base import Device, Implementation, Unsupported
from flash_attention_jax._problem import Problem

# In order of preference; `xla` refuses nothing, so nothing behind it is chosen unasked.
IMPLEMENTATIONS: dict[str, Implementation] = {
    module.IMPLEMENTATION.name: module.IMPLEMENTATION for module in (hopper, xla, reference)
}


def choose(problem: Problem, device: Device, requested: str | None) -> Implementation:
    """The implementation for a problem on a device.

    Args:
        requested: a name, or None for the first that does not refuse.

    Raises:
        Unsupported: if the one requested refuses.
    """
    if requested is not None:
        implementation = IMPLEMENTATIONS[requested]
        reason = implementation.refuses(problem, device)
        if reason is not None:
            raise Unsupported(f"implementation {requested!r} cannot run this problem: {reason}")
        return implementation
    return next(i for i in IMPLEMENTATIONS.values() if why_not(i, problem, device) is None)


def why_not(implementation: Implementation, problem: Problem, device: Device) -> str | None:
    """Why an implementation cannot be chosen unasked, or None if it can."""
    reason = implementation.refuses(problem, device)
    if reason is None and implementation.of_kind and device.kind is None:
        return f"the {device.platform} device is not here to tell its kind: it runs only when named"
    return reason


def device_of(platform: str) -> Device:
    """The device that a computation lowered for `platform` will run on, as far as can be known."""
    try:
        return Device(platform, jax.local_devices(backend=platform)[0].device_kind)
    except RuntimeError:
        return Device(platform)
