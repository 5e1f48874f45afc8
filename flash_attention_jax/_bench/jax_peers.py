"""Peers that run in JAX: ours, `jax.nn`'s and tokamax's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._api import attention, flash_attention
from flash_attention_jax._bench.machine import free_memory, load, size
from flash_attention_jax._bench.modes import MODES, transformed
from flash_attention_jax._bench.program import CannotRunError, Program, Where
from flash_attention_jax._bench.workload import Inputs, Workload
from flash_attention_jax._dispatch import IMPLEMENTATIONS, choose, device_of

Array = Any
Order = Literal["BNTD", "BTND"]

TOKAMAX = ("mosaic", "triton", "cudnn", "xla", "xla_chunked")


@dataclasses.dataclass(frozen=True)
class Function:
    """An attention function of JAX arrays.

    Attributes:
        call: (workload, q, k, v, extras) to out, in the function's own memory order.
        order: that order.
        refuses: as for `Peer`.
        chosen: names what is behind it, where the function chooses.
    """

    call: Callable[[Workload, Array, Array, Array, dict[str, Array]], Array]
    order: Order
    refuses: Callable[[Workload, str, Where], str | None]
    chosen: Callable[[Workload], str | None] = lambda workload: None

    def prepare(self, workload: Workload, mode: str, inputs: Inputs, where: Where) -> Program:
        """Compiles it, and asks what memory it would take before any is taken."""
        return _compiled(self, workload, mode, inputs, where)


def automatic(workload: Workload) -> str:
    """The implementation of ours that runs a workload unasked."""
    return choose(workload.problem, device_of(_platform()), None).name


def _platform() -> str:
    platform = jax.local_devices()[0].client.platform
    return "cuda" if platform == "gpu" else platform


def _never(workload: Workload, mode: str, where: Where) -> None:
    return None


def _options(workload: Workload, extras: dict[str, Array]) -> dict[str, Any]:
    ids = extras.get("segment_ids")
    return {
        "key_mask": extras.get("key_mask"),
        "bias": extras.get("bias"),
        "segment_ids": None if ids is None else (ids, ids),
        "causal": workload.causal,
        "window": workload.window,
        "precision": workload.precision,
    }


def flash(implementation: str | None) -> Function:
    """`flash_attention`, by an implementation or by its own choice."""

    def call(workload, q, k, v, extras):
        return flash_attention(q, k, v, **_options(workload, extras), implementation=implementation).out

    def refuses(workload, mode, where):
        if implementation is None:
            return None
        return IMPLEMENTATIONS[implementation].refuses(workload.problem, device_of(_platform()))

    return Function(call, "BNTD", refuses, automatic if implementation is None else lambda workload: None)


PLAIN = Function(
    lambda workload, q, k, v, extras: attention(q, k, v, **_options(workload, extras)), "BNTD", _never
)


def _float32_precision(workload: Workload) -> contextlib.AbstractContextManager[Any]:
    """The precision of products for functions that have no argument for it.

    Without it, float32 means TF32 on some GPUs, which is another problem.
    """
    if workload.dtype not in ("float32", "float64"):
        return contextlib.nullcontext()
    return jax.default_matmul_precision(workload.precision or "highest")


def _foreign_masks(workload: Workload, extras: dict[str, Array]) -> dict[str, Any]:
    """Arguments of `jax.nn.dot_product_attention`, and of functions like it, for what is visible.

    Causal attention and windows are aligned at the first position there. What they cannot say, a
    dense mask says, as it would for a user; it is made within the call.
    """
    w = workload
    options: dict[str, Any] = {}
    rows, cols = jnp.arange(w.length)[:, None], jnp.arange(w.S)
    mask = None
    if w.length == w.S:
        options["is_causal"] = w.causal
        if w.window is not None:
            sides = (w.length if side is None else side for side in w.window)
            options["local_window_size"] = tuple(sides)
    else:
        distance = cols - (rows + w.S - w.length)
        left, right = w.window or (None, None)
        right = right if not w.causal else 0 if right is None else min(right, 0)
        if right is not None:
            mask = distance <= right
        if left is not None:
            mask = distance >= -left if mask is None else mask & (distance >= -left)
        mask = None if mask is None else mask[None, None]
    ids = extras.get("segment_ids")
    if ids is not None:
        same = (ids[:, :, None] == ids[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    if "kept" in extras:
        options["key_value_seq_lengths"] = extras["kept"]
    return options | {"mask": mask, "bias": extras.get("bias")}


def jax_nn(implementation: Literal["xla", "cudnn"]) -> Function:
    """`jax.nn.dot_product_attention` by an implementation of its own."""

    def call(workload, q, k, v, extras):
        options = _foreign_masks(workload, extras)
        with _float32_precision(workload):
            return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **options)

    def refuses(workload, mode, where):
        if implementation == "cudnn" and not where.nvidia:
            return "needs an NVIDIA GPU"
        return None

    return Function(call, "BTND", refuses)


def _tokamax() -> Any:
    """The module, kept from reading its options off this command's own arguments."""
    module, flags = load("tokamax"), load("absl.flags").FLAGS
    if not flags.is_parsed():
        flags(["tokamax"])
    return module


def tokamax(implementation: str) -> Function:
    """`tokamax.dot_product_attention` by an implementation of its own."""

    def call(workload, q, k, v, extras):
        options = _foreign_masks(workload, extras)
        with _float32_precision(workload):
            return _tokamax().dot_product_attention(q, k, v, **options, implementation=implementation)

    def refuses(workload, mode, where):
        needed = {"triton": ("gpu",), "cudnn": ("gpu",), "mosaic": ("gpu", "tpu")}
        if where.platform not in needed.get(implementation, (where.platform,)):
            return f"needs a {' or a '.join(p.upper() for p in needed[implementation])}"
        return None

    return Function(call, "BTND", refuses)


def _arrays(function: Function, inputs: Inputs, names: tuple[str, ...]) -> tuple[Array, ...]:
    """Inputs in a function's memory order, shared by all functions of that order."""

    def put(name):
        x = inputs.normal(name)
        return jax.device_put(x if function.order == "BNTD" else np.ascontiguousarray(x.swapaxes(1, 2)))

    return tuple(inputs.keep(("jax", function.order, n), functools.partial(put, n)) for n in names)


def _extras(inputs: Inputs) -> dict[str, Array]:
    w = inputs.workload
    found = {"bias": inputs.bias, "key_mask": inputs.key_mask, "segment_ids": inputs.segment_ids}
    if w.key_mask is not None:
        found["kept"] = np.full((w.batch,), inputs.kept_keys, np.int32)
    return {name: jax.device_put(x) for name, x in found.items() if x is not None}


def _compiled(function: Function, workload: Workload, mode: str, inputs: Inputs, where: Where) -> Program:
    def run(qkv, more, extras):
        def out_of(q, k, v):
            return function.call(workload, q, k, v, extras)

        return transformed(out_of, mode)(qkv, more)

    qkv, more = (_arrays(function, inputs, names) for names in (("q", "k", "v"), MODES[mode].extras))
    arguments = (qkv, more, inputs.keep("jax extras", lambda: _extras(inputs)))
    begun = time.perf_counter()
    compiled = jax.jit(run).lower(*arguments).compile()
    taken = time.perf_counter() - begun
    memory = _memory(compiled)
    free = free_memory(where)
    if memory is not None and free is not None and memory > free:
        raise CannotRunError(f"out of memory: needs {size(memory)}, {size(free)} are free")

    def results(dout):
        given = arguments
        if dout is not None:
            ordered = dout if function.order == "BNTD" else dout.swapaxes(1, 2)
            given = (qkv, (jax.device_put(np.ascontiguousarray(ordered)),), arguments[2])
        outputs = zip(MODES[mode].outputs, compiled(*given), strict=True)
        arrays = {name: np.asarray(x) for name, x in outputs}
        return arrays if function.order == "BNTD" else {n: x.swapaxes(1, 2) for n, x in arrays.items()}

    return Program(
        start=lambda: compiled(*arguments),
        wait=jax.block_until_ready,
        results=results,
        memory=lambda: memory,
        loop=functools.partial(_loop, run, arguments),
        compile_seconds=taken,
        note=function.chosen(workload),
    )


def _memory(compiled: Any) -> int | None:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def _loop(run: Callable[..., Any], arguments: tuple[Any, Any, Any], calls: int) -> Program:
    """So many calls in one program.

    One number of q comes from the results of the call before: that costs nothing, and without it the
    compiler makes one call of them all (an optimization barrier does not keep it from that).
    """

    def looped(qkv, more, extras):
        def again(_, carry):
            q, before = carry
            number = jnp.tanh(sum(x[0, 0, 0, 0].astype(jnp.float32) for x in before))
            q = q.at[0, 0, 0, 0].set(number.astype(q.dtype))
            return q, run((q, *qkv[1:]), more, extras)

        first = (qkv[0], run(qkv, more, extras))
        return jax.lax.fori_loop(0, calls - 1, again, first)[1]

    compiled = jax.jit(looped).lower(*arguments).compile()
    return Program(lambda: compiled(*arguments), jax.block_until_ready, lambda dout: {})
