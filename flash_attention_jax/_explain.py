"""What each implementation says of a problem, and which is chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from flash_attention_jax._arguments import fail, normalize
from flash_attention_jax._dispatch import IMPLEMENTATIONS, choose, device_of, why_not
from flash_attention_jax._impl.base import Device
from flash_attention_jax._partition import PLATFORMS
from flash_attention_jax._problem import Operands, Problem


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; `str()` of it is a readable table.

    Attributes:
        problem: all that is static about the call.
        device: what it would be lowered for.
        refusals: for each implementation, in order of preference, why it refuses, or None.
        chosen: the implementation that runs when none is asked for.
    """

    problem: Problem
    device: Device
    refusals: dict[str, str | None]
    chosen: str

    def __str__(self) -> str:
        where = self.device.platform
        if self.device.kind is not None:
            where += f" ({self.device.kind})"
        p = self.problem
        sizes = f"B={p.B} N={p.N} K={p.K} T={p.T} S={p.S} D={p.D} Dv={p.Dv}"
        lines = [f"{sizes} {p.dtype} on {where}"]
        width = max(map(len, self.refusals))
        for name, reason in self.refusals.items():
            verdict = "chosen" if name == self.chosen else "can run it"
            lines.append(f"  {name:<{width}}  {verdict if reason is None else reason}")
        return "\n".join(lines)


def explain(
    q: Any,
    k: Any,
    v: Any,
    key_mask: Any = None,
    *,
    bias: Any = None,
    mask: Any = None,
    segment_ids: Any = None,
    causal: bool = False,
    window: Any = None,
    q_offset: Any = None,
    scale: Any = None,
    softcap: float | None = None,
    precision: Any = None,
    deterministic: bool = False,
    platform: str | None = None,
) -> Explanation:
    """What each implementation says of a call of `flash_attention`, and which is chosen.

    Args:
        q, k, v, and so on: as for `flash_attention`; a `jax.ShapeDtypeStruct` may stand for any
            array, since nothing is computed.
        platform: "cpu", "cuda", "rocm" or "tpu"; by default that of the default device.

    Raises:
        ValueError, TypeError: as `flash_attention` does.

    Example:
        >>> x = jax.ShapeDtypeStruct((8, 4096, 64), "bfloat16")
        >>> print(explain(x, x, x, causal=True, platform="cuda"))
    """
    if platform is not None and (not isinstance(platform, str) or platform not in PLATFORMS):
        error = ValueError if isinstance(platform, str) else TypeError
        fail("platform", "None, 'cpu', 'cuda', 'rocm' or 'tpu'", repr(platform), error)
    problem, _, _ = normalize(
        Operands(q, k, v, bias, mask, key_mask, q_offset=q_offset),
        segment_ids,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        precision=precision,
        deterministic=deterministic,
        abstract=True,
    )
    device = device_of(platform or _default_platform())
    refusals = {name: why_not(i, problem, device) for name, i in IMPLEMENTATIONS.items()}
    return Explanation(problem, device, refusals, choose(problem, device, None).name)


def _default_platform() -> str:
    """The platform of the default device, by the name that lowering uses."""
    device = getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0]
    platform = device if isinstance(device, str) else device.client.platform
    return "cuda" if platform == "gpu" else platform
