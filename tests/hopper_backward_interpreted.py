"""Judges the Hopper backward kernel as the interpreter of Mosaic GPU runs it on a CPU, and looks for races.

Run by `test_hopper_backward` in a process of its own, as `hopper_interpreted` is by `test_hopper`.
"""

import dataclasses
import json
import sys

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from hopper_interpreted import _case
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from flash_attention_jax._arguments import normalize
from flash_attention_jax._formulas import delta_of
from flash_attention_jax._impl.hopper import _backward, _dq
from flash_attention_jax._impl.hopper._backward_blocks import BackwardPlan
from flash_attention_jax._impl.hopper._backward_configs import BackwardConfig
from flash_attention_jax._impl.hopper._blocks import Plan
from flash_attention_jax._impl.hopper._dq_configs import choose_dq_config
from flash_attention_jax._impl.reference import dense
from flash_attention_jax._problem import Operands, arrange
from flash_attention_jax.testing import _cotangents, error, exact, plain_errors

_SMALL = BackwardConfig()
_ROWS = BackwardConfig(block_q=128)
_WIDE = BackwardConfig(columns=True, stages_do=1, slots_ds=2, slots_dq=1, piece=64)

CASES = {
    case.name: (case, config)
    for case, config in (
        (_case("plain", (1, 2, 128, 64), (1, 1, 192, 64), (1, 1, 192, 64)), _ROWS),
        (
            _case("cluster", (1, 2, 192, 64), (1, 1, 256, 64), (1, 1, 256, 64)),
            dataclasses.replace(_ROWS, cluster=2),
        ),
        (
            _case("cluster-ragged", (1, 1, 150, 40), (1, 1, 250, 40), (1, 1, 250, 88)),
            dataclasses.replace(_SMALL, cluster=2),
        ),
        (_case("columns", (1, 1, 128, 128), (1, 1, 128, 128), (1, 1, 128, 128), causal=True), _SMALL),
        (_case("ragged", (1, 1, 77, 40), (1, 1, 130, 40), (1, 1, 130, 88), dtype="float16"), _SMALL),
        (
            _case("three-consumers", (1, 2, 200, 72), (1, 1, 136, 72), (1, 1, 136, 72), causal=True),
            dataclasses.replace(_SMALL, consumers=3, section=1),
        ),
        (_case("persistent", causal=True), dataclasses.replace(_ROWS, persistent=True, slots_dq=1, piece=64)),
        (_case("window", window=(70, 20), causal=True, softcap=2.0, scale=-0.3), _SMALL),
        (
            _case("offsets", (2, 1, 70, 16), (2, 1, 90, 16), (2, 1, 90, 16), causal=True, q_offset=(30, -40)),
            dataclasses.replace(_SMALL, consumers=1),
        ),
        (_case("key-mask", key_mask=(170,), poison=True), _SMALL),
        (
            _case("segments", (1, 1, 170, 16), segments=3, causal=True),
            dataclasses.replace(_ROWS, stages_q=1, stages_do=1),
        ),
        (_case("hidden-nan", causal=True, q_offset=3, poison=True), _SMALL),
        (_case("wide", (1, 2, 128, 192), (1, 1, 128, 192), (1, 1, 128, 128), causal=True), _WIDE),
        (
            _case(
                "wide-ragged",
                (1, 1, 70, 40),
                (1, 1, 90, 40),
                (1, 1, 90, 16),
                q_offset=-9,
                causal=True,
                poison=True,
            ),
            dataclasses.replace(_WIDE, slots_ds=1, persistent=True, piece=32),
        ),
    )
}


def judged(case, config):
    """The verdicts of a case, by quantity: error and budget."""
    arguments = case.arguments()
    operands = Operands(**{n: arguments.pop(n) for n in Operands._fields if n in arguments})
    problem, operands, _ = normalize(operands, arguments.pop("segment_ids", None), **arguments)
    operands = arrange(problem, operands)
    out, lse = dense(problem, operands)
    dout, dlse = (jnp.asarray(x) for x in _cotangents(case, 0))
    dead = lse == -jnp.inf
    delta = delta_of(problem, out, dout, jnp.where(dead, 0, dlse))
    # Queries that see nothing may hold anything, and so may their cotangents.
    hidden = dead[..., None]
    operands = operands._replace(q=jnp.where(hidden, jnp.nan, operands.q).astype(problem.dtype))
    dout, delta = jnp.where(hidden, jnp.nan, dout).astype(problem.dtype), jnp.where(dead, jnp.nan, delta)
    tiles = BackwardPlan(problem, config, 1).across.tiles
    names = ("q", "k", "v")
    actual = _backward.backward(
        problem,
        operands,
        lse,
        dout,
        delta,
        names,
        config=config,
        # A thread block takes two tiles or more, there and back again.
        blocks=-(-tiles // 2) if config.persistent else None,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    of_dq = choose_dq_config(problem)
    tiles = Plan(problem, of_dq, 1).tiles
    alone = _dq.query_gradient(
        problem,
        operands,
        lse,
        dout,
        delta,
        blocks=-(-tiles // 2) if of_dq.persistent else None,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    truth, verdicts = exact(case), {}
    for label, x in (*zip((f"d{n}" for n in names), actual, strict=True), ("dq alone", alone)):
        name = label.split()[0]
        largest = np.abs(truth[name]).max()
        budget = 2 * plain_errors(case)[name] + float(jnp.finfo(case.dtype).eps) * largest
        found = error(np.asarray(x, np.float64).reshape(truth[name].shape), truth[name])
        verdicts[label] = [found, budget]
    return {"verdicts": verdicts, "races": gpu_callbacks.get_races().races_found}


if __name__ == "__main__":
    json.dump({name: judged(*CASES[name]) for name in sys.argv[1:] or CASES}, sys.stdout)
