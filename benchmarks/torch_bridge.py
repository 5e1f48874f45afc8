"""What calling from PyTorch costs: overhead of a call, memory, and time beside the same call from JAX.

    python benchmarks/torch_bridge.py [--device cuda] [--length 131072] [--dim 512] [--dtype bfloat16]

On a CPU the overhead is that of a small call: the time of `jax2torch(f)` or `flash_attention` less
that of the compiled JAX function. On a GPU there are besides: the memory that a call adds beyond
its results, as the driver counts it, and times of forward and of forward and backward at (length, dim).
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import torch

import flash_attention_jax
from flash_attention_jax.torch import flash_attention, jax2torch


def seconds(call, count):
    """Median and least time of a call that ends when its result is there."""
    for _ in range(3):
        call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times)


def overhead(device):
    """Of a small call, forward."""
    tensors = [torch.randn(2, 8, 4, device=device) for _ in range(3)]
    arrays = [jax.dlpack.from_dlpack(x) for x in tensors]
    compiled = jax.jit(flash_attention_jax.flash_attention)
    bridged = jax2torch(flash_attention_jax.flash_attention)
    _, base = seconds(lambda: jax.block_until_ready(compiled(*arrays)), 1000)
    for name, call in (("jax2torch", bridged), ("flash_attention", flash_attention)):

        def run(call=call):
            call(*tensors)
            if device == "cuda":
                torch.cuda.synchronize()

        median, least = seconds(run, 1000)
        over, base_us, median_us = (1e6 * x for x in (least - base, base, median))
        print(f"{name}: {over:.0f} us over JAX's {base_us:.0f} us (median of all {median_us:.0f} us)")


def large(length, dim, dtype):
    """Memory and time at (length, dim) on a GPU."""
    tensors = [torch.randn(length, dim, device="cuda", dtype=dtype) for _ in range(3)]
    arrays = [jax.dlpack.from_dlpack(x) for x in tensors]
    size = tensors[0].nbytes
    pointers = [a.unsafe_buffer_pointer() == x.data_ptr() for a, x in zip(arrays, tensors, strict=True)]
    print(f"arrays in the memory of the tensors: {all(pointers)}; a tensor has {size / 2**20:.0f} MiB")
    before = jax.local_devices()[0].memory_stats()["bytes_in_use"], torch.cuda.memory_allocated()
    out = flash_attention(*tensors)
    torch.cuda.synchronize()
    after = jax.local_devices()[0].memory_stats()["bytes_in_use"], torch.cuda.memory_allocated()
    added = [b - a for a, b in zip(before, after, strict=True)]
    print(f"a call adds {added[0]} bytes in JAX, {added[1]} in torch; its result has {out.nbytes}")

    def loss(q, k, v):
        return flash_attention_jax.flash_attention(q, k, v).out.astype("float32").sum()

    def with_backward():
        moved = [x.detach().requires_grad_() for x in tensors]
        torch.autograd.grad(flash_attention(*moved).float().sum(), moved)
        torch.cuda.synchronize()

    def forward():
        flash_attention(*tensors)
        torch.cuda.synchronize()

    compiled, gradient = jax.jit(flash_attention_jax.flash_attention), jax.jit(jax.grad(loss, (0, 1, 2)))
    for name, ours, theirs in (
        ("forward", forward, compiled),
        ("forward and backward", with_backward, gradient),
    ):
        here, _ = seconds(ours, 5)
        there, _ = seconds(lambda f=theirs: jax.block_until_ready(f(*arrays)), 5)
        print(f"{name}: {here:.4f} s from torch, {there:.4f} s from JAX, ratio {here / there:.3f}")


def main():
    """Parses the command line and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    print(f"JAX {jax.__version__}, torch {torch.__version__}, {args.device}")
    overhead(args.device)
    if args.device == "cuda":
        large(args.length, args.dim, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
