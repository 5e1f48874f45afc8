"""How tensors become JAX arrays and arrays tensors: by DLPack, where they lie.

Order on a GPU, where both sides queue work on streams of their own: a tensor is lent to JAX after
JAX's stream was told to wait for torch's current one (`Tensor.__dlpack__`), and an array is lent to
torch after torch's current stream was told to wait for it (`Array.__dlpack__`). So what torch
queues on that stream after a call runs after all that the call reads and writes, and memory that
either side frees is not written by the other while it is still read. On a CPU torch waits for the
results. A tensor that is used on other streams as well needs `Tensor.record_stream`, as ever.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# With `jax_enable_x64` off JAX would make 32 bits of these.
_WIDE = frozenset((torch.float64, torch.int64, torch.uint64, torch.complex128))
# Torch's stand in whole bytes and DLPack says so: JAX would take their bits for int8's.
_SUBBYTE = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))
# What both have; torch's complex32 and its quantized dtypes are its alone.
_CROSSING = frozenset(
    x
    for name, x in vars(torch).items()
    if isinstance(x, torch.dtype) and name not in _SUBBYTE and (x == torch.bool or hasattr(jnp, name))
)
_NAMES_CROSSING = frozenset(str(x).removeprefix("torch.") for x in _CROSSING)
_PLAIN_DISPATCH = torch.Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]


def is_wide(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether any tensor needs `jax_enable_x64` to keep its dtype."""
    return any(x.dtype in _WIDE for x in tensors)


def x64_is_on() -> bool:
    """Whether `jax_enable_x64` is on, in this thread."""
    return jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


def is_differentiable(x: torch.Tensor) -> bool:
    """Whether torch differentiates tensors of this dtype."""
    return x.dtype.is_floating_point or x.dtype.is_complex


def common_device(tensors: Sequence[torch.Tensor]) -> torch.device:
    """The one device of the tensors; torch's default device where there are none.

    Raises:
        ValueError: they are on several devices.
        TypeError: one is not strided (but sparse or nested, say).
    """
    if not tensors:
        return torch.get_default_device()
    device = tensors[0].device
    for x in tensors:
        if x.device != device:
            shown = ", ".join(sorted({str(x.device) for x in tensors}))
            raise ValueError(f"all tensors must be on one device, got {shown}: move them with Tensor.to")
        layout = other_layout(x)
        if layout is not None:
            raise TypeError(f"tensors must be strided, got {layout}")
    return device


def other_layout(x: torch.Tensor) -> str | None:
    """How a tensor lies that is not strided, and how it becomes so; None of one that is."""
    if x.is_nested:  # Asked first: some of these call themselves strided.
        return "a nested one: make it dense with torch.nested.to_padded_tensor"
    return None if x.layout == torch.strided else f"{x.layout}: make it dense with Tensor.to_dense"


@functools.cache
def jax_device(device: torch.device) -> Any:
    """JAX's name for a device of torch's.

    Raises:
        RuntimeError: JAX does not see the device.
    """
    platform = "rocm" if device.type == "cuda" and torch.version.hip else device.type
    if platform not in ("cpu", "cuda", "rocm"):
        raise RuntimeError(
            f"tensors must be on a CPU or GPU, which JAX can read, got {device}: move them with Tensor.to"
        )
    try:
        seen = jax.local_devices(backend=platform)
    except RuntimeError as error:
        plugin = {"cpu": "jax", "cuda": "jax[cuda13]", "rocm": "jax[rocm7-local]"}[platform]
        raise RuntimeError(
            f"the tensors are on {device}, but this JAX has no {platform} platform: "
            f"pip install '{plugin}' (and let JAX_PLATFORMS, if set, name {platform}), or move the tensors"
        ) from error
    if platform == "cpu":
        return seen[0]
    index = torch.cuda.current_device() if device.index is None else device.index
    for each in seen:
        if each.local_hardware_id == index:
            return each
    shown = ", ".join(str(each) for each in seen)
    raise RuntimeError(f"the tensors are on {device}, which JAX does not see, only {shown}: move them there")


def on_device(device: torch.device) -> Any:
    """The context in which tensors of this device are lent, for torch lends those of its current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def to_jax(x: torch.Tensor) -> jax.Array:
    """The array in a tensor's memory, which must not be written to while JAX reads it.

    What XLA does not read in place is copied first: tensors that are not contiguous, lie in pinned
    memory, or start at an address that is not aligned; and the zeros of forward mode, which lie nowhere.

    Raises:
        TypeError: JAX has no such dtype, or the tensor has no memory of its own (but is fake, say).
    """
    if type(x) is not torch.Tensor and getattr(type(x), "__torch_dispatch__") is not _PLAIN_DISPATCH:  # noqa: B009
        raise TypeError(f"tensors must have memory of their own, got {type(x).__name__}: make them plain")
    if x.dtype not in _CROSSING:
        raise TypeError(f"tensors must be of a dtype that JAX has, got {x.dtype}: convert with Tensor.to")
    x = x.detach().resolve_conj().resolve_neg().contiguous()
    if x._is_zerotensor() or (x.device.type == "cpu" and x.is_pinned()):
        x = x.clone()
    return jax.dlpack.from_dlpack(x)


def refuse_tracing() -> None:
    """Rejects calls whose operations torch records, for it would take the results for constants.

    Raises:
        RuntimeError: torch traces, exports or fakes what it runs.
    """
    modes = _get_current_dispatch_mode_stack()
    if torch._C._get_tracing_state() is not None or any(mode.is_infra_mode() for mode in modes):
        raise RuntimeError(
            "functions of jax2torch cannot be traced, exported or run on fake tensors: "
            "flash_attention_jax.torch.flash_attention can"
        )


def to_torch(x: jax.Array) -> torch.Tensor:
    """The tensor in an array's memory; the array must not be used afterwards.

    Raises:
        TypeError: torch has no such dtype.
    """
    name = "float0" if x.dtype == jax.dtypes.float0 else str(x.dtype)
    if name not in _NAMES_CROSSING:
        raise TypeError(f"results must be of a dtype that torch has, got {name}")
    return torch.from_dlpack(x)
