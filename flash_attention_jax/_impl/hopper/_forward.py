"""The forward pass: launches the kernel of `_kernel`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flash_attention_jax._impl.base import Device
from flash_attention_jax._impl.hopper._blocks import Plan, Tables, multiprocessors, tables
from flash_attention_jax._impl.hopper._configs import Config, choose_config
from flash_attention_jax._impl.hopper._consumer import Arrays
from flash_attention_jax._impl.hopper._kernel import attend
from flash_attention_jax._impl.hopper._memory import Memory, scratch
from flash_attention_jax._impl.hopper._schedule import schedule
from flash_attention_jax._impl.hopper._warpgroups import launch
from flash_attention_jax._problem import Operands, Problem


def forward(
    problem: Problem,
    operands: Operands,
    device: Device,
    *,
    config: Config | None = None,
    blocks: int | None = None,
    interpret: Any = None,
) -> tuple[Any, Any]:
    """out and lse; see `base.Forward`.

    Args:
        config: tile sizes; by default those of `choose_config`.
        blocks: thread blocks to launch; by default one for each tile, or as many as the device has
            multiprocessors for whole clusters where `config` is persistent.
        interpret: a `plgpu.InterpretGPUParams`, to run without a GPU.
    """
    p = problem
    config = choose_config(p) if config is None else config
    blocks = config.launched(Plan(p, config, 1).tiles, multiprocessors()) if blocks is None else blocks
    plan = Plan(p, config, blocks)
    given = tables(p, operands, config, schedule(plan))
    present = [name for name, x in given._asdict().items() if x is not None]
    # Plain copies of rows of numbers are cut off at the end of the array only, so each must have its room.
    length = -(-p.T // config.block_q) * config.block_q
    rows = (p.N, p.T) if p.order == "BNTD" else (p.T, p.N)

    def body(*refs, **buffers):
        q, k, v, *of_tables, out, lse = refs
        read = Tables(**dict(zip(present, of_tables, strict=True)))
        memory = Memory.of(p, config, buffers, interpret is not None)
        attend(plan, Arrays(q, k, v, out, lse, read), memory)

    out, lse = launch(
        body,
        (
            jax.ShapeDtypeStruct((p.B, *rows, p.Dv), jnp.dtype(p.dtype)),
            jax.ShapeDtypeStruct((p.B, p.N, length), jnp.float32),
        ),
        scratch(p, config, interpret is not None),
        config,
        blocks,
        "forward",
        interpret,
    )(*operands[:3], *(x for x in given if x is not None))
    return out, lse if length == p.T else lse[..., : p.T]
