"""The backward kernel: FlashAttention-3 (arXiv 2407.08608, algorithm 3) in Pallas Mosaic GPU, sm_90a.

Five products for each pair of blocks, in one kernel. With the keys of a tile as rows,

    S^T = K Q^T        P^T = exp2(S^T - lse)      dP^T = V dO^T       dS^T = P^T (dP^T - delta)
    dV += P^T dO       dK += dS^T Q               dQ += dS K

Who does what. A thread block has one producer warpgroup and 1 to 3 consumer warpgroups. It takes tiles of
`consumers * keys` keys of one key head (`BackwardPlan`). The producer brings K and V of the tile and then,
block by block, Q, dO and their statistics through rings, for all heads of the group. A consumer has `keys`
rows of the tile: its S^T, dP^T, dK and dV stay in registers from beginning to end, P^T and dS^T are left
operands from registers. dQ needs the keys of all consumers: dS^T goes to shared memory, and in the next step
each consumer computes a share of the block of dQ (`_backward_rows`), which TMA adds to a float32 array in
device memory. These sums arrive in any order, so dQ differs from run to run by its rounding; `_dq_kernel`
computes it in one order.

Without masks the thread blocks of a `cluster` take neighboring tiles and begin with the same queries: each
producer brings a part of a block of Q, dO and statistics to all of them by multicast.

Where a warpgroup cannot hold dK and dV of 64 keys (head dims above 128, `BackwardConfig.columns`), the tile
has 64 keys in all. A consumer computes the columns of S^T and dP^T that belong to its queries, puts P^T and
dS^T into shared memory, and has a share of the columns of dK, dV and dQ (`_backward_columns`). `Part` says
who has what.

The accumulator of dP^T starts at minus delta, which saves a subtraction. The softmax runs under the product
V dO^T; while one consumer computes, the products of the others run.

Shared memory, in bytes for 16-bit numbers, with D and Dv padded as `Chunks` says: k 2 tile_kv D, v 2 tile_kv
Dv, q 2 stages_q block_q D, do 2 stages_do block_q Dv, ds 2 slots_ds tile_kv block_q, p as ds where columns
are divided, dq 256 consumers slots_dq piece, statistics 8 stages_q block_q. `shared_bytes` adds them up. The
barriers are described in `BackwardMemory`.

What is hidden may hold anything, and 0 * NaN is NaN. With masks, keys that are not finite become 0 in shared
memory once for each tile. The weights of hidden pairs are replaced, and gradients of logits whose weight
is 0. Queries that see no key stand in blocks that are visible in part: where there are such, their rows of Q
and dO become 0 in shared memory. Rows beyond the last query have lse = inf.

Tried and lost: TFLOP/s of the backward pass alone, 2.5 times the forward's FLOPs (bfloat16, 16384 tokens,
2048 wide, JAX 0.11.2), each beside this form in the same run; runs differ by 3 %, and small weights, as
lse = 10 gives here, take less power than those of a forward pass. On an H200, at head dims 64 and 128, full
and causal:

    this form                     526  505  566  552
    dQ in its own step            386  462  539  513  consumers wait for each other's dS; they compute at the
                                                      same time, and multiply at the same time
    one sequence of products      490  485  518  533  dS of the step before waited for at the start; dV issued
                                                      before dS is computed, everything else under a product
    delta subtracted              485  481  527  522  instead of dP starting at minus delta
    one piece of 64 columns       513  -    562  -    of dQ on its way, not two of 32
    three blocks of Q             -    -    557  -
    two kernels, of dK and dV     577  571  672  629  4 products
                and of dQ         599  573  729  693  3 products, which is `deterministic`

Clusters of two, forward and backward together, full, with and without: head dim 64 513 and 516, 128 590 and
585 (at 4096 tokens 557 and 555, 32 heads in groups of 4 at 8192 583 and 579), 256 431 and 441.

Of the form with dQ in its own step, on an H100:

    head dim 64 full        489      blocks of 64 queries 352, four heads side by side 460
                                     all tiles beginning with the same queries 398
    head dim 128 full       526      one slot for dS 505, 120 bytes of each thread spilled 494
    4 x 4096 of 128 full    497      all heads side by side 347
"""

from __future__ import annotations

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from flash_attention_jax._impl.hopper._backward_blocks import BackwardPlan
from flash_attention_jax._impl.hopper._backward_columns import ColumnsConsumer
from flash_attention_jax._impl.hopper._backward_configs import REGISTERS
from flash_attention_jax._impl.hopper._backward_consumer import BackwardArrays, over_key_tiles, over_steps
from flash_attention_jax._impl.hopper._backward_memory import BackwardMemory
from flash_attention_jax._impl.hopper._backward_parts import Part
from flash_attention_jax._impl.hopper._backward_rows import RowsConsumer
from flash_attention_jax._impl.hopper._blocks import rem
from flash_attention_jax._impl.hopper._memory import axes_of
from flash_attention_jax._impl.hopper._warpgroups import divide, rows_of


def differentiate(plan: BackwardPlan, arrays: BackwardArrays, memory: BackwardMemory) -> None:
    """The body of the kernel, for every warpgroup."""
    kind = ColumnsConsumer if plan.config.columns else RowsConsumer

    def consume(own):
        kind(plan, arrays, memory, own, Part.of(plan.problem, plan.config, own)).run()

    consumers = plan.config.consumers
    divide(consumers, REGISTERS[consumers], consume, lambda: produce(plan, arrays, memory))


def produce(plan: BackwardPlan, arrays: BackwardArrays, memory: BackwardMemory) -> None:
    """The producer: K and V of a tile, then its blocks of Q, of the statistics and of dO."""
    p, c, m = plan.problem, plan.config, memory

    def tile(batch, head, row, visits, count):
        keys = pl.ds(row * c.tile_kv, c.tile_kv)
        plgpu.barrier_wait(m.kv_free)
        m.k.fetch(rows_of(p, arrays.k, batch, head), keys, m.k_full)
        m.v.fetch(rows_of(p, arrays.v, batch, head), keys, m.v_full)

        def bring(i, _, masked):
            of_group, block = plan.step(visits, i, masked)
            n = head * p.G + of_group
            rows = pl.ds(block * c.block_q, c.block_q)
            slot = rem(count + i, c.stages_q)
            plgpu.barrier_wait(m.q_free.at[slot])
            m.q.fetch(rows_of(p, arrays.q, batch, n), rows, m.q_full.at[slot], slot, cluster=c.cluster)
            both = arrays.statistics.at[batch, n, :, rows]
            into = m.statistics.at[slot]
            plgpu.copy_gmem_to_smem(both, into, m.q_full.at[slot], collective_axes=axes_of(c.cluster))
            slot = rem(count + i, c.stages_do)
            plgpu.barrier_wait(m.do_free.at[slot])
            m.do.fetch(rows_of(p, arrays.do, batch, n), rows, m.do_full.at[slot], slot, cluster=c.cluster)

        over_steps(plan, visits, bring, None)

    over_key_tiles(plan, arrays, tile)
    # Nothing may be under way when the barriers go.
    plgpu.barrier_wait(m.kv_free)
    for slot in range(c.stages_q):
        plgpu.barrier_wait(m.q_free.at[slot])
    for slot in range(c.stages_do):
        plgpu.barrier_wait(m.do_free.at[slot])
