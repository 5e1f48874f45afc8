"""What the kernels have in common: who does what, and which tiles a thread block takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper._blocks import Plan, Tables, Visits
from flash_attention_jax._impl.hopper._configs import Launch
from flash_attention_jax._impl.hopper._memory import CLUSTER
from flash_attention_jax._problem import Problem


def divide(
    consumers: int, registers: tuple[int, int], consume: Callable[[Any], None], produce: Callable[[], None]
) -> None:
    """Calls consume(warpgroup) in the first `consumers` warpgroups and produce() in the one behind them.

    Args:
        registers: of a thread of a consumer and of the producer.
    """
    warpgroup = lax.axis_index("warpgroup")
    for_consumers, for_producer = registers

    @pl.when(warpgroup < consumers)
    def _():
        if consumers > 1:
            plgpu.set_max_registers(for_consumers, action="increase")
        consume(warpgroup)

    @pl.when(warpgroup == consumers)
    def _():
        if consumers > 1:
            plgpu.set_max_registers(for_producer, action="decrease")
        produce()


def block_of(config: Launch) -> Any:
    """The number of this thread block; those of a cluster follow each other."""
    block = lax.axis_index("block")
    return block if config.cluster == 1 else block * config.cluster + lax.axis_index(CLUSTER)


def over_tiles(
    plan: Plan,
    tables: Tables,
    visits_of: Callable[[Tables, Any, Any], Visits],
    steps: int,
    body: Any,
    before: Any = 0,
) -> Any:
    """Calls body(batch, head, row, visits, steps before) for every tile of this thread block.

    Args:
        visits_of: the visits of a tile, of (tables, batch, row).
        steps: of a visit.
        before: steps before the first tile.

    Returns:
        The steps after the last one.
    """
    block = block_of(plan.config)

    def tile(n, count):
        batch, head, row = plan.tile(tables, block, n)
        visits = visits_of(tables, batch, row)
        body(batch, head, row, visits, count)
        return count + visits.seen * steps

    return lax.fori_loop(jnp.int32(0), plan.rounds(tables, block), tile, jnp.asarray(before, jnp.int32))


def rows_of(problem: Problem, ref: Any, batch: Any, head: Any) -> Any:
    """The (length, dim) array of one head, where it lies."""
    if problem.order == "BNTD":
        return ref.at[batch, head]
    return ref.at[batch, :, head]


def accumulated(values: Any, issue: Callable[[Any], None], *, interpreted: bool) -> Any:
    """The values, a tree of arrays, after the products that issue(accumulators) adds to them."""
    if not interpreted:
        return pl.run_state(issue)(jax.tree.map(plgpu.WGMMAAccumulatorRef.init, values))
    leaves, tree = jax.tree.flatten(values)

    def products(*accs):
        issue(jax.tree.unflatten(tree, accs))
        return [acc[...] for acc in accs]

    # The interpreter's accumulators start at 0.
    parts = pl.run_scoped(products, *(plgpu.WGMMAAccumulatorRef(x.shape) for x in leaves))
    return jax.tree.unflatten(tree, [x + part for x, part in zip(leaves, parts, strict=True)])


def launch(
    body: Any, results: Any, buffers: dict[str, Any], config: Any, blocks: int, name: str, interpret: Any
) -> Callable[..., Any]:
    """A kernel, of the arrays that body(*arrays, *results, **buffers) takes to the results.

    Args:
        results: `jax.ShapeDtypeStruct`s.
        buffers: what `scratch` made.
        config: its `threads`, its `cluster` and its `lane`.
        blocks: thread blocks, a multiple of `cluster`.
        interpret: a `plgpu.InterpretGPUParams`, or None on a GPU.
    """
    if blocks % config.cluster:
        raise ValueError(f"blocks must be a multiple of cluster = {config.cluster}, was {blocks}")
    semantics = plgpu.LoweringSemantics
    clusters: Any = {}
    if config.cluster > 1:
        clusters = {"cluster": (config.cluster,), "cluster_names": (CLUSTER,)}
    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=buffers,
        grid=(blocks // config.cluster,),
        grid_names=("block",),
        **clusters,
        num_threads=config.threads,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # The barriers in the kernel order all that needs order.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=semantics.Lane if config.lane else semantics.Warpgroup,
        ),
        kernel_name=f"flash_attention_hopper_{name}",
        interpret=interpret,
    )
