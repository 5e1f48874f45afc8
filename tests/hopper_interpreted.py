"""Judges the Hopper kernel as the interpreter of Mosaic GPU runs it on a CPU, and looks for races.

Run by `test_hopper` in a process of its own: every warpgroup is a thread that waits for others, which takes
more threads than a small machine gives to XLA unasked.
"""

import dataclasses
import json
import sys

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from flash_attention_jax._arguments import normalize
from flash_attention_jax._impl.base import Device
from flash_attention_jax._impl.hopper import _forward
from flash_attention_jax._impl.hopper._blocks import Plan
from flash_attention_jax._impl.hopper._configs import Config
from flash_attention_jax._problem import Operands, arrange
from flash_attention_jax.testing import Case, error, exact, plain_errors

_SMALL = Config(block_q=64, block_kv=64, stages=2, consumers=2, pingpong=True)
_Q, _K, _V = (1, 2, 150, 16), (1, 1, 170, 16), (1, 1, 170, 24)


def _case(name, q=_Q, k=_K, v=_V, dtype="bfloat16", **fields):
    options = {n: fields.pop(n) for n in tuple(fields) if n not in Case.__dataclass_fields__}
    return Case(name, q, k, v, dtype, options=tuple(sorted(options.items())), **fields)


CASES = {
    case.name: (case, config)
    for case, config in (
        (_case("plain", (1, 2, 64, 64), (1, 1, 192, 64), (1, 1, 192, 64)), _SMALL),
        (
            _case("cluster", (1, 1, 512, 64), (1, 1, 192, 64), (1, 1, 192, 64)),
            dataclasses.replace(_SMALL, cluster=2, pingpong=False),
        ),
        (_case("ragged", (1, 1, 77, 40), (1, 1, 130, 40), (1, 1, 130, 88), dtype="float16"), _SMALL),
        (
            _case("three-consumers", (1, 1, 200, 128), (1, 1, 136, 128), (1, 1, 136, 128), causal=True),
            dataclasses.replace(_SMALL, consumers=3, section=1),
        ),
        (_case("one-by-one", causal=True), dataclasses.replace(_SMALL, overlap=False, persistent=False)),
        (_case("window", window=(70, 20), causal=True, softcap=2.0, scale=-0.3), _SMALL),
        (
            _case("offsets", (2, 1, 70, 16), (2, 1, 90, 16), (2, 1, 90, 16), causal=True, q_offset=(30, -40)),
            dataclasses.replace(_SMALL, consumers=1, pingpong=False),
        ),
        (_case("key-mask", key_mask=(170,), poison=True), _SMALL),
        (_case("segments", (1, 1, 170, 16), segments=3, causal=True), _SMALL),
        (_case("hidden-nan", causal=True, q_offset=3, poison=True), dataclasses.replace(_SMALL, stages=3)),
    )
}


def run(case, config):
    """out and lse of a case."""
    arguments = case.arguments()
    operands = Operands(**{n: arguments.pop(n) for n in Operands._fields if n in arguments})
    problem, operands, _ = normalize(operands, arguments.pop("segment_ids", None), **arguments)
    return _forward.forward(
        problem,
        arrange(problem, operands),
        Device("cuda"),
        config=config,
        # A thread block takes two tiles or more, there and back again.
        blocks=-(-Plan(problem, config, 1).tiles // 2) if config.persistent else None,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )


def judged(case, config):
    """The verdicts of a case, by quantity: error and budget. What is hidden changes no bit of a result."""
    actual = run(case, config)
    truth, verdicts = exact(case), {}
    for name, x, dtype in zip(("out", "lse"), actual, (case.dtype, "float32"), strict=True):
        finite = np.abs(truth[name][np.isfinite(truth[name])])
        budget = 2 * plain_errors(case)[name] + float(jnp.finfo(dtype).eps) * finite.max(initial=0)
        found = error(np.asarray(x, np.float64).reshape(truth[name].shape), truth[name])
        verdicts[name] = [found, budget]
    result = {"verdicts": verdicts, "races": gpu_callbacks.get_races().races_found}
    if case.poison:
        clean = run(dataclasses.replace(case, poison=False), config)
        bits = zip(actual, clean, strict=True)
        result["same_bits"] = all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in bits)
    return result


if __name__ == "__main__":
    json.dump({name: judged(*CASES[name]) for name in sys.argv[1:] or CASES}, sys.stdout)
