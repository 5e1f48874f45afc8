"""What the kernel does not run, and why."""

from __future__ import annotations

import re

import jax

from flash_attention_jax._impl.base import Device
from flash_attention_jax._impl.hopper._configs import choose_config, too_large
from flash_attention_jax._problem import Problem

# The first whose Mosaic GPU has all that the kernel uses.
NEEDED_JAX = (0, 11, 2)
_DTYPES = ("bfloat16", "float16")
_LARGEST_HEAD = 256
_HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")


def refuses(problem: Problem, device: Device) -> str | None:
    """See `base.Implementation`."""
    return _of_device(device) or _of_jax() or of_problem(problem)


def _of_device(device: Device) -> str | None:
    if device.platform != "cuda":
        return f"it runs on CUDA devices of compute capability 9.0, not on {device.platform}"
    # Without a device (lowering for another machine) the kind is unknown: it is built for Hopper.
    if device.kind is not None and not _HOPPER.search(device.kind):
        return f"it runs on CUDA devices of compute capability 9.0 (H100, H200), not on {device.kind}"
    return None


def _of_jax() -> str | None:
    version = tuple(int(n) for n in re.findall(r"\d+", jax.__version__)[:3])
    if version < NEEDED_JAX:
        needed = ".".join(map(str, NEEDED_JAX))
        return f"it needs JAX {needed} or newer, this is {jax.__version__}"
    return None


def of_problem(problem: Problem) -> str | None:
    """Why no device runs a problem, or None."""
    p = problem
    if p.dtype not in _DTYPES:
        return f"it takes {' and '.join(_DTYPES)}, not {p.dtype}"
    for name, dim in (("D", p.D), ("Dv", p.Dv)):
        if dim % 8 or dim > _LARGEST_HEAD:
            return f"it takes head dims that are multiples of 8 up to {_LARGEST_HEAD}, not {name} = {dim}"
    if p.bias is not None:
        return "it takes no bias"
    if p.mask is not None:
        return "it takes no dense mask"
    # Of an empty problem nothing is launched.
    return None if p.empty else too_large(p, choose_config(p))
