"""What `hopper.py` checks and times: problems, variants and their order."""

from __future__ import annotations

from typing import Any

# B, T, S, N, K, D, Dv, options: the table that the kernel is held to, in the memory order of jax.nn.
SHAPES: dict[str, tuple[Any, ...]] = {
    "d64": (1, 16384, 16384, 32, 32, 64, 64, {}),
    "d64-causal": (1, 16384, 16384, 32, 32, 64, 64, {"causal": True}),
    "d128": (1, 16384, 16384, 16, 16, 128, 128, {}),
    "d128-causal": (1, 16384, 16384, 16, 16, 128, 128, {"causal": True}),
    "d256": (1, 16384, 16384, 8, 8, 256, 256, {}),
    "d256-causal": (1, 16384, 16384, 8, 8, 256, 256, {"causal": True}),
    "4k": (4, 4096, 4096, 16, 16, 128, 128, {}),
    "4k-causal": (4, 4096, 4096, 16, 16, 128, 128, {"causal": True}),
    "2k": (8, 2048, 2048, 16, 16, 128, 128, {}),
    "2k-causal": (8, 2048, 2048, 16, 16, 128, 128, {"causal": True}),
    "1k": (16, 1024, 1024, 16, 16, 128, 128, {}),
    "1k-causal": (16, 1024, 1024, 16, 16, 128, 128, {"causal": True}),
    "512": (32, 512, 512, 16, 16, 128, 128, {}),
    "512-causal": (32, 512, 512, 16, 16, 128, 128, {"causal": True}),
    "gqa-causal": (2, 8192, 8192, 32, 8, 128, 128, {"causal": True}),
    "window": (1, 32768, 32768, 16, 16, 128, 128, {"causal": True, "window": (1023, 0)}),
    "half-key-mask": (1, 16384, 16384, 16, 16, 128, 128, {"key_mask": "half"}),
    "documents": (1, 16384, 16384, 16, 16, 128, 128, {"causal": True, "segments": 8}),
    "mla-causal": (1, 8192, 8192, 16, 16, 192, 128, {"causal": True}),
}

# Every head dim; the first of each kind of layout in shared memory.
_DIMS = (8, 24, 40, 64, 80, 104, 128, 136, 168, 192, 200, 232, 256)
_OTHER_DIMS = tuple(d for d in range(8, 257, 8) if d not in _DIMS)

# Small odd problems of the check, forward only.
CHECKS: dict[str, tuple[Any, ...]] = {
    **{f"d{d}": (2, 300, 333, 4, 2, d, d, {}) for d in (*_DIMS, *_OTHER_DIMS)},
    **{f"d{d}-tiled-causal": (2, 512, 768, 4, 2, d, d, {"causal": True}) for d in (64, 128, 192, 256)},
    "dv": (2, 256, 256, 4, 2, 192, 128, {"causal": True}),
    "dv-odd": (2, 200, 333, 4, 1, 24, 88, {"causal": True}),
    "one-query": (3, 1, 777, 4, 2, 128, 128, {"causal": True}),
    "one-key": (3, 333, 1, 4, 2, 64, 64, {}),
    "dead-rows": (2, 400, 200, 4, 2, 64, 64, {"causal": True}),
    "window": (2, 700, 900, 4, 2, 128, 128, {"window": (100, 20)}),
    "window-left": (2, 700, 900, 4, 2, 64, 64, {"window": (150, None)}),
    "window-causal-cap": (2, 700, 900, 4, 2, 64, 64, {"window": (200, 50), "causal": True, "softcap": 2.0}),
    "offsets": (2, 500, 600, 4, 2, 128, 128, {"causal": True, "q_offset": [37, -250]}),
    "key-mask": (2, 500, 600, 4, 2, 128, 128, {"key_mask": "random"}),
    "key-mask-causal": (2, 512, 512, 4, 2, 64, 64, {"key_mask": "random", "causal": True}),
    "segments": (2, 600, 600, 4, 2, 128, 128, {"segments": 5, "causal": True}),
    "everything": (
        2,
        600,
        600,
        4,
        2,
        64,
        64,
        {"segments": 3, "causal": True, "key_mask": "random", "window": (300, 0), "softcap": 4.0},
    ),
    "hidden-nan": (2, 512, 600, 4, 2, 128, 128, {"causal": True, "key_mask": "random", "poison": True}),
    "negative-scale": (1, 300, 300, 4, 4, 64, 64, {"scale": -0.4, "causal": True}),
}

# What is varied: fields of `Config`, beside the table's choice.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "d128": [{"q_in_registers": 0}, {"pingpong": True}, {"cluster": 1}],
    "d128-causal": [{"q_in_registers": 128}, {"persistent": True}],
    "d64": [{"pingpong": True}, {"consumers": 2}],
    "d256": [{"pingpong": False}],
    "4k": [{"q_in_registers": 0}],
    "window": [{"persistent": False}, {"section": 1}],
}


def jobs() -> list[dict[str, Any]]:
    """Everything there is to do, the most important first."""
    others = {f"d{d}" for d in _OTHER_DIMS}
    checks = [{"kind": "check", "shape": name, "dtype": "bfloat16"} for name in CHECKS if name not in others]
    last = [{"kind": "check", "shape": name, "dtype": "bfloat16"} for name in CHECKS if name in others]
    last += [{"kind": "check", "shape": name, "dtype": "float16"} for name in ("d128", "d80", "everything")]
    peers = [{"kind": "cudnn", "shape": name} for name in SHAPES]
    ours = [{"kind": "time", "shape": name, "change": {}} for name in SHAPES]
    side_by_side = [job for pair in zip(peers, ours, strict=True) for job in pair]
    queues = [
        [{"kind": "time", "shape": name, "change": change} for change in changes]
        for name, changes in VARIANTS.items()
    ]
    tuned = []
    for at in range(max(map(len, queues))):
        tuned += [q[at] for q in queues if at < len(q)]
    # A few checks first: what is wrong everywhere shows at once.
    first = [
        c for c in checks if c["shape"] in ("d64", "d128", "d256", "d80", "d128-tiled-causal", "key-mask")
    ]
    rest = [c for c in checks if c not in first]
    everything = first + side_by_side + rest + tuned[: len(tuned) // 2] + last + tuned[len(tuned) // 2 :]
    return [{"id": i, **job} for i, job in enumerate(everything)]


# Small odd problems of the check of gradients, beside `CHECKS`.
BACKWARD_CHECKS: dict[str, tuple[Any, ...]] = {
    "d64-rows": (1, 128, 128, 1, 1, 64, 64, {}),
    "d128-columns": (1, 64, 128, 1, 1, 128, 128, {}),
    "d64-long-causal": (1, 1024, 1024, 2, 2, 64, 64, {"causal": True}),
    "d128-long-causal": (1, 1024, 1024, 2, 2, 128, 128, {"causal": True}),
    "d128-group": (2, 320, 448, 8, 2, 128, 128, {"causal": True}),
    # Several tiles for each multiprocessor, in a thread block that stays and in several.
    "many-windows": (2, 1200, 1200, 16, 16, 64, 64, {"window": (100, 20)}),
    "many": (2, 1200, 1200, 16, 8, 128, 128, {}),
    "dead-and-masked": (2, 400, 264, 4, 2, 64, 64, {"causal": True, "key_mask": "random", "poison": True}),
}

_STAYS = {"persistent": True}
BACKWARD_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "d128": [{"stages_q": 3}, {"rotate": False}],
    "d128-causal": [_STAYS, {"section": 1}],
    "d64": [{"piece": 64, "slots_dq": 1}],
    "d64-causal": [_STAYS],
    "4k-causal": [_STAYS, {"section": 4}],
    "2k-causal": [_STAYS, {"section": 4}],
    "gqa-causal": [_STAYS, {"section": 1}],
    "window": [{"persistent": False}],
}
# Of the kernel of dK and dV alone.
DKV_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "d128": [{}, {"stages_q": 3, "stages_do": 3, "slots_dq": 1}],
    "d64": [{}, {"block_q": 64, "stages_q": 3, "stages_do": 3}],
    "d256": [{}],
}
# Of the kernel of dQ alone: fields of `DqConfig`.
DQ_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "d128": [{}, {"block_kv": 64}, {"block_kv": 64, "consumers": 3}],
    "d64": [{}, {"block_kv": 64, "consumers": 3}],
    "d256": [{}],
}
_DQ_CHECKS = (
    "d64",
    "d128",
    "d256",
    "d80",
    "dv-odd",
    "window",
    "offsets",
    "everything",
    "hidden-nan",
    "one-query",
    "segments",
    "dead-and-masked",
    "many-windows",
    "many",
)
_BACKWARD_SHAPES = (
    "d128",
    "d128-causal",
    "d64",
    "d64-causal",
    "4k",
    "4k-causal",
    "2k",
    "2k-causal",
    "gqa-causal",
    "1k",
    "1k-causal",
    "512",
    "512-causal",
    "window",
    "half-key-mask",
    "documents",
    "d256",
    "d256-causal",
    "mla-causal",
)


def backward_jobs() -> list[dict[str, Any]]:
    """Everything there is to do for the backward kernel, the most important first."""

    def job(kind, shape, **more):
        return {"backward": True, "kind": kind, "shape": shape, **more}

    def check(shape, dtype="bfloat16"):
        return job("check", shape, dtype=dtype)

    def time(shape, change=None, **more):
        return job("time", shape, change=change or {}, **more)

    names = [*BACKWARD_CHECKS, *CHECKS]
    others = {f"d{d}" for d in _OTHER_DIMS}
    # What is wrong everywhere shows at once.
    first = [check(name) for name in ("d64-rows", "d128-columns", "d64", "d128", "d80", "d128-long-causal")]
    important = ("d128", "d128-causal", "d64", "d64-causal")
    result = first + [time(name, alone=True) for name in important]
    result += [x for name in important for x in (job("cudnn", name), time(name))]
    seen = {x["shape"] for x in first}
    result += [check(name) for name in names if name not in others and name not in seen]
    queues = [[time(name, x, alone=True) for x in changes] for name, changes in BACKWARD_VARIANTS.items()]
    tuned = [q[at] for at in range(max(map(len, queues))) for q in queues if at < len(q)]
    result += tuned[: len(tuned) // 2]
    rest = [name for name in _BACKWARD_SHAPES if name not in important]
    result += [x for name in rest for x in (job("cudnn", name), time(name))]
    result += tuned[len(tuned) // 2 :]
    result += [check(name, "float16") for name in ("d128", "d80", "everything")]
    result += [check(name) for name in names if name in others]
    result += [check(name) | {"form": "deterministic"} for name in _DQ_CHECKS]
    result += [time(name, form="deterministic") for name in (*important, *rest)]
    for form, variants in (("dq", DQ_VARIANTS), ("dkv", DKV_VARIANTS)):
        result += [
            time(name, x, alone=True, form=form) for name, changes in variants.items() for x in changes
        ]
    return [{"id": i, **x} for i, x in enumerate(result)]
