"""The tables that the README quotes: which problems, which modes, against whom."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

from flash_attention_jax._bench.workload import Workload


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named benchmark.

    Attributes:
        summary: for `--help`.
        workloads: by platform as JAX names it; "" stands for all others.
        peers: in the order of the columns; those that are not installed are left out. None is everyone.
        baseline: the peer that ratios are over.
    """

    summary: str
    workloads: Mapping[str, tuple[Workload, ...]]
    modes: tuple[str, ...]
    peers: tuple[str, ...] | None = None
    baseline: str | None = None

    def on(self, platform: str) -> tuple[Workload, ...]:
        """The problems for a platform."""
        return self.workloads.get(platform) or self.workloads[""]


_HOPPER_PEERS = ("flash_attention", "jax.nn:cudnn", "torch:flash", "torch:cudnn", "tokamax:mosaic")
_TOKENS = 16384


def _bf16(batch: int, length: int, heads: int, head_dim: int, **options) -> Workload:
    return Workload(length, head_dim, heads, batch=batch, dtype="bfloat16", **options)


def _full_and_causal(shapes: Iterable[tuple[int, int, int, int]]) -> tuple[Workload, ...]:
    """bfloat16 of (batch, length, heads, head dim), each without and with causal."""
    return tuple(_bf16(*shape, causal=causal) for shape in shapes for causal in (False, True))


_BARS = _full_and_causal(
    (
        (1, 16384, 32, 64),
        (1, 16384, 16, 128),
        (1, 16384, 8, 256),
        (4, 4096, 16, 128),
        (8, 2048, 16, 128),
    )
)
_GROUPED = _bf16(2, 8192, 32, 128, kv_heads=8, causal=True)
_CPU_PEERS = ("torch:flash", "jax.nn:xla", "attention", "flash_attention")

PRESETS: dict[str, Preset] = {
    "cpu": Preset(
        "five float32 problems, forward and with gradients",
        {
            "": (
                Workload(4096, 64, 8),
                Workload(4096, 128, 2),
                Workload(8192, 512, 1),
                Workload(4096, 64, 8, causal=True),
                Workload(512, 64, 8, batch=8),
            )
        },
        ("forward", "forward+backward"),
        _CPU_PEERS,
        "torch:flash",
    ),
    "cpu-lengths": Preset(
        "float32, 8 heads of 64, lengths 512 to 8192, for the plot",
        {"": tuple(Workload(length, 64, 8) for length in (512, 1024, 2048, 4096, 8192))},
        ("forward", "forward+backward"),
        _CPU_PEERS,
        "torch:flash",
    ),
    "hopper": Preset(
        "FlashAttention-3's table (arXiv 2407.08608, figures 5 and 6): bfloat16, 16k tokens, 2048 wide",
        {
            "": tuple(
                _bf16(_TOKENS // length, length, 2048 // dim, dim, causal=causal)
                for dim, causal, length in itertools.product(
                    (64, 128, 256), (False, True), (512, 1024, 2048, 4096, 8192, 16384)
                )
            )
        },
        ("forward", "forward+backward"),
        _HOPPER_PEERS,
        "jax.nn:cudnn",
    ),
    "hopper-forward": Preset(
        "bfloat16, forward: long, short, grouped, windowed, packed and padded",
        {
            "": (
                *_BARS,
                *_full_and_causal([(32, 512, 16, 128)]),
                _GROUPED,
                _bf16(1, 32768, 16, 128, causal=True, window=(1024, 0)),
                _bf16(1, 16384, 16, 128, causal=True, segments=8),
                _bf16(1, 16384, 16, 128, key_mask=0.5),
            )
        },
        ("forward",),
        _HOPPER_PEERS,
        "jax.nn:cudnn",
    ),
    "hopper-backward": Preset(
        "bfloat16, forward and gradients: long, short and grouped",
        {"": (*_BARS, _GROUPED)},
        ("forward+backward",),
        _HOPPER_PEERS,
        "jax.nn:cudnn",
    ),
    "seed": Preset(
        "131072 queries and keys of 512 without heads",
        {
            "": (Workload(131072, 512),),
            "gpu": (
                Workload(131072, 512, dtype="bfloat16"),
                Workload(131072, 512, precision="default"),
                Workload(131072, 512),
            ),
        },
        ("forward", "forward+backward"),
        baseline="flash_attention",
    ),
}
