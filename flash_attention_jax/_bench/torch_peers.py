"""Peers that run in PyTorch: each backend of `scaled_dot_product_attention`.

torch is no dependency of this package and is imported when a program is prepared.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from flash_attention_jax._bench.machine import cores, free_memory, load, size
from flash_attention_jax._bench.modes import MODES
from flash_attention_jax._bench.program import CannotRunError, Program, Where
from flash_attention_jax._bench.workload import Inputs, Workload

Tensor = Any

# Our names for the backends of torch.nn.attention.SDPBackend.
BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}
# Those that are there on the CPU, torch 2.13.
_ON_CPU = ("flash", "math")
# T x S matrices, float32 even for half precision, that `math` holds at once in a mode: growth of the
# resident memory of a process, torch 2.13 on a CPU, (1, 2, 8192, 64), float32 and bfloat16.
_MATRICES = {"forward": 2.3, "forward+backward": 3.1, "jvp": 5.1}


def refusal(how: str) -> Callable[[Workload, str, Where], str | None]:
    """`Peer.refuses` of a backend."""
    return functools.partial(_refuses, how)


def _refuses(how: str, workload: Workload, mode: str, where: Where) -> str | None:
    if where.platform not in ("cpu", "gpu"):
        return f"torch does not run on {where.platform}"
    if where.platform == "cpu" and how not in _ON_CPU:
        return "needs a GPU"
    if mode == "jvp" and how != "math":
        return "has no forward-mode derivative"
    return None


def preparer(how: str) -> Callable[[Workload, str, Inputs, Where], Program]:
    """`Peer.prepare` of a backend."""
    return functools.partial(_prepare, how)


def _prepare(how: str, workload: Workload, mode: str, inputs: Inputs, where: Where) -> Program:
    torch = load("torch")
    if where.platform == "gpu" and not torch.cuda.is_available():
        raise CannotRunError("this torch has no GPU")
    _check_memory(how, workload, mode, inputs, where)
    device = "cuda" if where.platform == "gpu" else "cpu"
    torch.set_num_threads(cores())
    torch.set_float32_matmul_precision("highest" if workload.precision in (None, "highest") else "high")
    put = functools.partial(_tensor, inputs, device)
    qkv = tuple(put(name, inputs.normal(name)) for name in ("q", "k", "v"))
    more = tuple(put(name, inputs.normal(name)) for name in MODES[mode].extras)
    function = functools.partial(_attention, torch, workload, _mask(workload, inputs, put))
    run = functools.partial(_RUNS[mode], torch, function, qkv)
    session = functools.partial(_session, torch, BACKENDS[how])
    with session():
        _first(run, more)

    def results(dout):
        with session():
            given = more if dout is None else (_tensor(None, device, "", dout),)
            return {name: _numpy(x) for name, x in zip(MODES[mode].outputs, run(given), strict=True)}

    on_gpu = device == "cuda"
    return Program(
        start=functools.partial(run, more),
        wait=(lambda _: torch.cuda.synchronize()) if on_gpu else lambda _: None,
        results=results,
        memory=functools.partial(_peak, torch, session, run, more) if on_gpu else lambda: None,
        session=session,
        events=functools.partial(_events, torch, run, more) if on_gpu else None,
    )


def _session(torch: Any, backend: str) -> Any:
    return load("torch.nn.attention").sdpa_kernel([getattr(torch.nn.attention.SDPBackend, backend)])


def _first(run: Callable[[Any], Any], more: tuple[Tensor, ...]) -> None:
    """The first call; where no kernel takes the problem, torch gives the reasons as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run(more)
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            reasons = [_sentence(str(w.message)) for w in caught if "(Triggered internally" in str(w.message)]
            raise CannotRunError("; ".join([_sentence(str(error)), *reasons])) from error


def _sentence(text: str) -> str:
    """A message of torch's without where it comes from."""
    return " ".join(text.partition("(Triggered internally")[0].split()).rstrip(".")


def _check_memory(how: str, w: Workload, mode: str, inputs: Inputs, where: Where) -> None:
    """Raises where matrices of T x S would not fit: running out of host memory ends the process."""
    width = 8 if w.dtype == "float64" else 4
    matrix = w.batch * w.length * w.S
    needed = int(_MATRICES[mode] * w.N * matrix * width) if how == "math" else 0
    if w.dense or (w.causal and _needs_mask(w)):
        needed += matrix
    if w.bias is not None:
        needed += 2 * width * math.prod(w.bias_shape or ()) * (1 if w.bias == "BNTS" else w.batch)
    free = free_memory(where)
    if free is not None and needed > free:
        raise CannotRunError(f"out of memory: needs {size(needed)}, {size(free)} are free")


def _needs_mask(w: Workload) -> bool:
    return w.dense or w.key_mask is not None or w.bias is not None


def _mask(w: Workload, inputs: Inputs, put: Callable[..., Tensor]) -> Tensor | None:
    """What `is_causal` alone cannot say: bool (B or 1, 1, T, S), or a bias with -inf where hidden."""
    if not _needs_mask(w):
        return None

    def make():
        seen = inputs.visible(np.arange(w.length))
        if inputs.bias is None:
            return seen
        hidden = np.array(-np.inf, inputs.bias.dtype)
        return inputs.bias if seen is None else np.where(seen, inputs.bias, hidden)

    return put("mask", make)


def _attention(torch: Any, w: Workload, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=w.causal and mask is None, enable_gqa=w.K != w.N
    )


def _forward(torch, function, qkv, more):
    with torch.no_grad():
        return (function(*qkv),)


def _forward_backward(torch, function, qkv, more):
    moved = tuple(x.detach().requires_grad_() for x in qkv)
    out = function(*moved)
    return (out.detach(), *torch.autograd.grad(out, moved, more[0]))


def _jvp(torch, function, qkv, more):
    return torch.func.jvp(function, qkv, more)


_RUNS = {"forward": _forward, "forward+backward": _forward_backward, "jvp": _jvp}


def _tensor(inputs: Inputs | None, device: str, name: str, x: Any) -> Tensor:
    """A NumPy array, or what a function makes of one, on the device; kept among the inputs."""

    def make():
        torch = load("torch")
        array = np.ascontiguousarray(x() if callable(x) else x)
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).to(device)
        return torch.from_numpy(array).to(device)

    return make() if inputs is None else inputs.keep(("torch", name), make)


def _numpy(x: Tensor) -> np.ndarray:
    import ml_dtypes

    x = x.detach().cpu().contiguous()
    if str(x.dtype) == "torch.bfloat16":
        return x.view(load("torch").uint16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def release() -> None:
    """Gives the GPU memory that torch keeps for later back, so that another framework finds it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peak(torch: Any, session: Any, run: Callable[[Any], Any], more: tuple[Tensor, ...]) -> int:
    """Most bytes allocated during a call beyond those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with session():
        run(more)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _events(torch: Any, run: Callable[[Any], Any], more: tuple[Tensor, ...], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run(more)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
