"""What computes: the device, the versions, the threads, and the memory that is free."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys
from typing import Any

import jax

import flash_attention_jax
from flash_attention_jax._bench.program import Where

_PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "torch",
    "tokamax",
    "triton",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def load(module: str) -> Any:
    """A module of a framework that is no dependency of this package."""
    return importlib.import_module(module)


def share_the_gpu() -> None:
    """Lets JAX take memory of a GPU as it needs it, so that another framework finds some there.

    Has an effect before JAX has begun to use a GPU.
    """
    if any(installed(f"jax_cuda{n}_plugin") for n in (12, 13)):
        jax.config.update("jax_pjrt_client_create_options", {"preallocate": False})


def make_cpu_devices(count: int) -> None:
    """Makes so many devices of the CPU, which share its cores, where JAX has not begun to use it."""
    # Afterwards the devices are what they are; who needs more of them says so.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def here() -> Where:
    """The first local device."""
    device = jax.local_devices()[0]
    return Where(device.platform, device.device_kind)


def processor() -> str:
    """The CPU's name and how many of its cores this process may use."""
    return f"{_processor_name()}, {cores()} core{'s' * (cores() != 1)}"


def _processor_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads() -> dict[str, int | None]:
    """Threads that compute on the CPU; None where it cannot be told, or for a framework not in use.

    JAX's pool is counted by the names that its threads have on Linux, once it has computed something.
    """
    tasks = pathlib.Path("/proc/self/task")
    names = [path.read_text() for path in tasks.glob("*/comm")] if tasks.exists() else []
    pool = sum(name.startswith("tf_XLAEigen") for name in names)
    torch = sys.modules.get("torch")
    return {"jax": pool or None, "torch": None if torch is None else torch.get_num_threads()}


def describe(where: Where) -> dict[str, Any]:
    """Device and versions, for a result that is to be read elsewhere."""
    found = {name: _version(name) for name in _PACKAGES}
    versions = {name: version for name, version in found.items() if version is not None}
    if where.nvidia and "torch" in sys.modules:
        versions["cudnn of torch"] = str(sys.modules["torch"].backends.cudnn.version())
    device = jax.local_devices()[0]
    return {
        "platform": where.platform,
        "device": processor() if where.platform == "cpu" else where.kind,
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "flash_attention_jax": flash_attention_jax.__version__,
        "versions": versions,
        "backend": " ".join(str(device.client.platform_version).split()),
        "memory_stats": device.memory_stats(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_memory(where: Where) -> int | None:
    """Bytes that a program could still take; None where it cannot be told."""
    if where.platform == "cpu":
        return _free_host_memory()
    stats = jax.local_devices()[0].memory_stats() or {}
    limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
    return None if limit is None else limit - used


def _free_host_memory() -> int | None:
    info = pathlib.Path("/proc/meminfo")
    if not info.exists():
        return None
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def size(count: int) -> str:
    """Bytes in words."""
    unit = min(4, max(0, count.bit_length() - 1) // 10)
    return f"{count / 1024**unit:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
