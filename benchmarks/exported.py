"""Programs that are lowered for CUDA on a machine without a GPU, and compiled and run on one that has one.

Lowering kernels is Python's work and takes longer than compiling them; so a run on a GPU that is dear begins
with programs that are lowered already. JAX is imported where it is used, for processes choose its platform
before.
"""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

_THREADS = 14


def serialized(function: Any, shapes: Sequence[Any]) -> bytes:
    """A jitted function, lowered for CUDA."""
    import jax

    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    return bytes(jax.export.export(function, platforms=["cuda"], disabled_checks=checks)(*shapes).serialize())


def compiled(program: bytes, shapes: Sequence[Any] | None = None, **how: Any) -> Any:
    """A serialized function, compiled; of its own shapes or, where they are divided, of those given."""
    import jax

    export = jax.export.deserialize(program)
    return jax.jit(export.call, **how).lower(*(export.in_avals if shapes is None else shapes)).compile()


def save(folder: pathlib.Path, label: dict[str, Any], function: Any, *shapes: Any) -> None:
    """Lowers a jitted function for CUDA and keeps it under its label."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.json")))
    (folder / f"{number}.gz").write_bytes(gzip.compress(serialized(function, shapes)))
    (folder / f"{number}.json").write_text(json.dumps(label))


def load(
    folder: pathlib.Path, how: Callable[[dict[str, Any]], dict[str, Any]] = lambda label: {}
) -> list[tuple[dict[str, Any], Any]]:
    """The labels of a folder's programs and these, compiled side by side; how(label) is for `compiled`."""
    # For its side effect: it tells XLA where the library is that compiled kernels call.
    import jax.experimental.mosaic.gpu  # noqa: F401

    def one(path):
        label = json.loads(path.read_text())
        return label, compiled(gzip.decompress(path.with_suffix(".gz").read_bytes()), **how(label))

    paths = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    if not paths:
        raise FileNotFoundError(f"{folder} has no exported programs")
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, paths))


def group(program: Any, arrays: Any, calls: int) -> float:
    """Seconds of a call, of several that are sent off together."""
    import jax

    begun = time.perf_counter()
    for _ in range(calls):
        result = program(*arrays)
    jax.block_until_ready(result)
    return (time.perf_counter() - begun) / calls


def seconds(program: Any, arrays: Any) -> float:
    """Median seconds of a call: groups of calls that are sent off together."""
    group(program, arrays, 2)
    calls = max(3, min(100, int(0.03 / group(program, arrays, 3))))
    return statistics.median(group(program, arrays, calls) for _ in range(7))
