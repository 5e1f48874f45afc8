"""Values that are not finite: whether the forward kernel met any, and how it then does without them.

A hidden key has weight 0, and 0 times what is not finite is NaN. To look at the values of every block that is
visible in part costs more than such a block does, so the kernel first believes that all are finite, and knows
from its sums whether that was so. Where a result is NaN, a thread block goes over its tiles once more, with
checks: then hidden keys add nothing, and what was NaN for another reason is NaN again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper._blocks import COLUMNS, ROWS, Plan, load
from flash_attention_jax._impl.hopper._configs import Config
from flash_attention_jax._impl.hopper._memory import Memory


def again(plan: Plan[Config], memory: Memory, over: Callable[[Any, bool], Any]) -> None:
    """Calls steps = over(steps before, careful) for all tiles, and carefully once more where a result is NaN.

    Every warpgroup calls this; consumers have judged their traces by the end of the first call.
    """
    steps = over(0, False)
    if not plan.problem.masked:
        return
    _meet(memory)
    failed = sum(memory.traces[own, 0] for own in range(plan.config.consumers)) != 0

    @pl.when(failed)
    def _():
        # Everyone has read what was found before it is written over.
        _meet(memory)
        over(steps, True)


def _meet(memory: Memory) -> None:
    """Waits for all warpgroups."""
    plgpu.barrier_arrive(memory.judged)
    plgpu.barrier_wait(memory.judged)


@dataclasses.dataclass(frozen=True)
class Traces:
    """Which rows of a consumer's tiles so far were NaN. Four threads have each row."""

    memory: Memory
    own: Any

    def begin(self) -> None:
        """There are none."""
        shape = self.memory.traces.shape[1:]
        self.keep(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), ROWS))
        plgpu.commit_smem()

    def read(self) -> Any:
        """Those of the tiles before."""
        return load(self.memory.traces.at[self.own], layout=ROWS)

    def keep(self, traces: Any) -> None:
        """Writes them. The threads of the warpgroup have met since they read those before."""
        self.memory.traces[self.own] = traces

    def judge(self) -> None:
        """Brings those of all rows together: then every one is NaN if one was."""
        shape = self.memory.traces.shape[1:] * 2
        plgpu.commit_smem()
        traces = load(self.memory.traces.at[self.own], layout=COLUMNS)
        plgpu.commit_smem()
        # A sum across a row stays within a warp; one down a column does not.
        self.keep(lax.broadcast_in_dim(traces, shape, [1]).sum(axis=1))


def check_values(config: Config, memory: Memory, own: Any, slot: Any) -> None:
    """Makes a block of V finite, each consumer some rows of it; `poison` tells which were not."""
    c, m = config, memory
    plgpu.barrier_wait(m.v_full.at[slot])
    for piece in range(c.block_kv // 64):
        pl.when(own == piece % c.consumers)(lambda piece=piece: _check_rows(m, slot, piece))
    plgpu.commit_smem()
    plgpu.barrier_arrive(m.checked)
    plgpu.barrier_wait(m.checked)


def _check_rows(memory: Memory, slot: Any, piece: int) -> None:
    m, rows = memory, pl.ds(piece * 64, 64)
    trace = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), ROWS)
    for chunk in range(m.v.of.count):
        # A tile at a time: the sums of the tile of queries take most of the registers.
        for left in range(0, m.v.of.width, m.v.of.tile):
            place = (slot, chunk, rows, pl.ds(left, m.v.of.tile))
            part = load(m.v.tiles.at[place], layout=plgpu.Layout.WGMMA)
            found = part.astype(jnp.float32) * 0
            m.v.tiles[place] = jnp.where(found == 0, part, jnp.zeros_like(part))
            trace = trace + found.sum(axis=1)
    m.poison[slot, rows] = trace
