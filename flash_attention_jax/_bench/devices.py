"""Peers over several devices, and the one device that they are compared with.

A sequence of T over N devices is compared with a sequence of T / N on one: what each device of N would
reach with work of its own size and nobody to wait for.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flash_attention_jax._arguments import fail
from flash_attention_jax._bench.modes import MODES, transformed
from flash_attention_jax._bench.peers import AUTO, Peer
from flash_attention_jax._bench.peers import everyone as everyone_alone
from flash_attention_jax._bench.program import Program, Where
from flash_attention_jax._bench.workload import Inputs, Workload
from flash_attention_jax._distributed._choice import heads_refused
from flash_attention_jax._distributed._layout import from_natural, to_natural
from flash_attention_jax.distributed import ring_attention

Array = Any

# Strategy and layout by the name of the peer.
_WAYS = {
    "ring:zigzag": ("ring", "zigzag"),
    "ring:contiguous": ("ring", "contiguous"),
    "all_to_all": ("all_to_all", "contiguous"),
    "all_gather": ("all_gather", "contiguous"),
}
NAMES = tuple(_WAYS)


def everyone(devices: int) -> dict[str, Peer]:
    """All peers over so many devices, by name."""
    return {
        name: Peer(
            name,
            functools.partial(_refuses, devices, how[0]),
            functools.partial(_prepare, devices, *how),
            ours=True,
        )
        for name, how in _WAYS.items()
    }


def alone() -> Peer:
    """The peer on one device."""
    return everyone_alone()[AUTO]


def of_one(workload: Workload, devices: int) -> Workload:
    """The workload of one device that is compared with a workload of several."""
    return dataclasses.replace(workload, length=workload.length // devices)


def check(workloads: tuple[Workload, ...], devices: int) -> None:
    """Rejects what cannot be measured over several devices.

    Raises:
        ValueError: there are not so many devices, the lengths are not divided, or there are other operands
            than q, k and v.
    """
    if devices > jax.device_count():
        fail("--devices", f"at most the devices there are, {jax.device_count()}", devices)
    for w in workloads:
        if w.length % (2 * devices):
            fail("--lengths", f"multiples of twice the number of devices, {2 * devices}", w.length)
        if (w.kv_length, w.bias, w.key_mask, w.segments) != (None,) * 4 or w.heads is None:
            must = "without --devices, or heads, a causal mask and a window be all there is beside q, k and v"
            fail("--kv-length, --bias, --key-mask and --segments", must, w.label)


def _refuses(devices: int, strategy: str, workload: Workload, mode: str, where: Where) -> str | None:
    return heads_refused(workload.problem, devices) if strategy == "all_to_all" else None


@dataclasses.dataclass(frozen=True)
class _Way:
    """A strategy and a layout over the devices of a mesh."""

    mesh: Any
    strategy: str
    layout: str

    @property
    def place(self) -> NamedSharding:
        """Of all arrays: (B, N, T, D) with T divided."""
        return NamedSharding(self.mesh, PartitionSpec(None, None, "x"))

    def put(self, x: np.ndarray) -> Array:
        """An array of the host, divided."""
        return jax.device_put(from_natural(x, 2, self.layout, self.mesh.size), self.place)

    def get(self, x: Array) -> np.ndarray:
        """Inverse of `put`."""
        return to_natural(np.asarray(x), 2, self.layout, self.mesh.size)

    def attention(self, workload: Workload, q: Array, k: Array, v: Array) -> Array:
        """out of arrays that were put."""
        options = {name: getattr(workload, name) for name in ("causal", "window", "precision")}
        how = {name: getattr(self, name) for name in ("mesh", "strategy", "layout")}
        return ring_attention(q, k, v, **options, **how).out


def _prepare(
    devices: int, strategy: str, layout: str, workload: Workload, mode: str, inputs: Inputs, where: Where
) -> Program:
    """The compiled program and its arrays."""
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    way = _Way(mesh, strategy, layout)

    def kept(name):
        return inputs.keep(("devices", devices, layout, name), lambda: way.put(inputs.normal(name)))

    qkv, more = (tuple(map(kept, names)) for names in (("q", "k", "v"), MODES[mode].extras))
    begun = time.perf_counter()
    function = transformed(functools.partial(way.attention, workload), mode)
    outputs = (way.place,) * len(MODES[mode].outputs)
    compiled = jax.jit(function, out_shardings=outputs).lower(qkv, more).compile()
    taken = time.perf_counter() - begun
    memory = compiled.memory_analysis()

    def results(dout):
        given = more if dout is None else (way.put(dout),)
        found = zip(MODES[mode].outputs, compiled(qkv, given), strict=True)
        return {name: way.get(x) for name, x in found}

    def beside_inputs():
        if memory is None:
            return None
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    return Program(
        start=lambda: compiled(qkv, more),
        wait=jax.block_until_ready,
        results=results,
        memory=beside_inputs,
        compile_seconds=taken,
    )
