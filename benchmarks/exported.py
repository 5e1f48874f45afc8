"""Programs that are lowered for CUDA on a machine without a GPU, and compiled and run on one that has one.

Lowering kernels is Python's work and takes longer than compiling them; so a run on a GPU that is dear begins
with programs that are lowered already.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import statistics
import time
from typing import Any

import jax


def save(folder: pathlib.Path, label: dict[str, Any], function: Any, *shapes: Any) -> None:
    """Lowers a jitted function for CUDA and keeps it under its label."""
    folder.mkdir(parents=True, exist_ok=True)
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    program = jax.export.export(function, platforms=["cuda"], disabled_checks=checks)(*shapes)
    number = len(list(folder.glob("*.json")))
    (folder / f"{number}.gz").write_bytes(gzip.compress(bytes(program.serialize())))
    (folder / f"{number}.json").write_text(json.dumps(label))


def labels(folder: pathlib.Path) -> list[tuple[dict[str, Any], pathlib.Path]]:
    """The programs of a folder, in the order in which they were kept."""
    found = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    if not found:
        raise FileNotFoundError(f"{folder} has no exported programs")
    return [(json.loads(path.read_text()), path.with_suffix(".gz")) for path in found]


def load(path: pathlib.Path, shapes: Any = None, **how: Any) -> Any:
    """A program, compiled; of its own shapes or, where they are divided over devices, of those given."""
    # For its side effect: it tells XLA where the library is that compiled kernels call.
    import jax.experimental.mosaic.gpu

    program = jax.export.deserialize(gzip.decompress(path.read_bytes()))
    return jax.jit(program.call, **how).lower(*(program.in_avals if shapes is None else shapes)).compile()


def group(program: Any, arrays: Any, calls: int) -> float:
    """Seconds of a call, of several that are sent off together."""
    begun = time.perf_counter()
    for _ in range(calls):
        result = program(*arrays)
    jax.block_until_ready(result)
    return (time.perf_counter() - begun) / calls


def seconds(program: Any, arrays: Any, fill: float = 0.025, groups: int = 5) -> float:
    """The median over groups of calls that take `fill` seconds each."""
    calls = max(3, int(fill / group(program, arrays, 3)))
    return statistics.median(group(program, arrays, calls) for _ in range(groups))
