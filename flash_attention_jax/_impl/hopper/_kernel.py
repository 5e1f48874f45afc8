"""The forward kernel: FlashAttention-3 (arXiv 2407.08608, algorithms 1 and 2) in Pallas Mosaic GPU, sm_90a.

Who does what. A thread block has one producer warpgroup and 1 to 3 consumer warpgroups. It takes tiles of
`consumers * block_q` query rows of one head, one after the other (`Plan.tile`). The producer brings the
tile's queries and then, block by block, K and V through a ring of `stages`; it gives its registers to the
consumers. A consumer has `block_q` rows of the tile: logits by `wgmma`, softmax in
registers, weights times V by `wgmma` with the weights in registers. Without masks the thread blocks of a
`cluster` take neighboring tiles, which see the same K and V: each producer brings a part of a block to all
of them by multicast, once the consumers of all have freed its place.

Blocks that are visible in part come first, one after the other (algorithm 1). Then, with `overlap`, a
consumer issues Q K^T of a block and the weights of the block before times its V, waits for the first only,
and computes the softmax while the second runs (algorithm 2). With `pingpong` the consumers issue in turns, so
that one computes its softmax while another's products run.

Shared memory, in bytes for 16-bit numbers, with D and Dv padded as `Chunks` says: q 2 tile_q D,
k 2 stages block_kv D, v 2 stages block_kv Dv, out 128 consumers out_slots tile, lse 4 tile_q, and with masks
traces 4 tile_q and poison 4 stages block_kv in one place. `_configs.shared_bytes` adds them up. `Memory`
describes the barriers.

Hidden keys may hold anything, and 0 * NaN is NaN. The logits of hidden keys are replaced, and their values
are believed to be finite. Where a result is NaN all the same, the thread block goes over its tiles once
more, by algorithm 1 and with checks (`_values`): in blocks that are visible in part, rows of V that are not
finite become 0 in shared memory and leave a NaN in `poison`, which joins the logits. In a block that is
visible whole they reach the sums of all its rows, as they should; at the end a row whose sums are not finite
becomes NaN.

Tried and lost. TFLOP/s (bfloat16, 16384 tokens, 2048 wide, JAX 0.11.2), each beside this form in the same
run, which varies by 3 % from run to run; sizes are block_q x consumers, block_kv. On an H100:

    head dim 128 full      64 x 2, 128 with two stages: 630
                           64 x 2, 64: 487     64 x 3, 64: 562     64 x 2, 96: 556     64 x 2, 192: 378
                           64 x 2, 160 with V in tiles of 32 columns, since `wgmma` takes 64 keys at a time of
                           tiles of 64: 603, with spilled registers
                           all heads side by side instead of one after the other: 558
    head dim 64 full       64 x 3, 128: 506
                           64 x 2, 128: 418    64 x 3, 64: 421     64 x 2, 192: 419    64 x 2, 160: 419
    head dim 256 full      64 x 2, 64: 675     without `pingpong` 632, without `overlap` 615, without both 591
    causal 64, 128, 256    with turns, which causal heads no longer take; with a schedule 459, 578, 612
                           the nth tile to block n mod blocks, there and back again: 368, 512, 400
                           a thread block for each tile, as it is without turns: 448, 568, 565 to 612
                           partial blocks inside the pipeline: 249, 350, not run. Where a second loop follows
                           the pipeline's, or a branch or a barrier stands between products under way, ptxas
                           serializes every `wgmma` of the kernel (C7513).

On an H200:

    head dim 128 full      queries in registers 614, in shared memory 602; causal 585 and 588
    head dim 256 full      64 columns of the queries in registers 660, none 649; in another run 647, 638, and
                           613 with 128, which spills registers; causal 594, 604, 600
    192 and 128, causal    64 x 2, 128 with two stages 570, 64 x 2, 64 with three 513
    two tiles of queries   in shared memory: causal 587 for 587 at 16384 tokens, 524 for 518 at 4096, 454 for
                           457 at 2048, 272 for 270 at 512; a window of 1024 403 for 402, a key mask 588
                           for 605; these with checks at once
    checks at once         of every block that is visible in part, by its consumers: 512 tokens 252 for 296,
                           1024 351 for 400, 2048 430 for 471, 4096 509 for 532, 16384 582 for 583, a window
                           of 1024 402 for 485, documents 367 for 398, heads of 192 and 128 584 for 597. What
                           the second pass costs where a NaN is hidden: causal 16384 2.9 times the first, a
                           window 2.8, a key mask 1.5, documents 1.2.
    partial blocks inside  the pipeline, which is not serialized where the first whole block waits for all of
                           its products: 512 tokens 299 for 296, 2048 477 for 471, 4096 539 for 532, 16384
                           587 for 583, documents 404 for 398; but a window 459 for 485, a key mask 577 for
                           597, heads of 192 and 128 588 for 597. With queries in registers a window 413.
    turns (`pingpong`)     full 64, 128, 256: 494, 598, 647 for 500, 606, 637 without; causal 454, 578, 595
                           for 453, 585, 622. Where the turn is passed on before the sums are issued 497, 600,
                           648 instead of 497, 606, 643, between their halves 499, 606, not run; causal 457,
                           580, 589 and 443, 582 instead of 460, 579, 594
    clusters of two        full 64, 128, 256: 493, 623, 634 for 496, 606, 637; at 4096 and 2048 tokens 600 and
                           584 for 594 and 571; heads of 192 and 128 655 for 643. Of four, at 128: 386
    softmax before wait    ptxas moves the exponentials behind the wait for the sums of the block before, so
                           that only the maximum runs under these. A store that needs all exponentials, which
                           ptxas does not move, keeps them before it, and costs. Full 64, 128, 256: 488 for
                           494, 591 instead of 595, 615 instead of 662; causal 430 instead of 455, 563
                           instead of 582, 594 instead of 607. The products of the other consumer run anyway.
"""

from __future__ import annotations

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper._blocks import Plan, rem
from flash_attention_jax._impl.hopper._configs import REGISTERS, Config
from flash_attention_jax._impl.hopper._consumer import Arrays, Consumer
from flash_attention_jax._impl.hopper._memory import Memory
from flash_attention_jax._impl.hopper._values import again
from flash_attention_jax._impl.hopper._warpgroups import divide, over_tiles, rows_of


def attend(plan: Plan[Config], arrays: Arrays, memory: Memory) -> None:
    """The body of the kernel, for every warpgroup."""
    divide(
        plan.config.consumers,
        REGISTERS[plan.config.consumers],
        lambda own: Consumer(plan, arrays, memory, own).run(),
        lambda: produce(plan, arrays, memory),
    )


def produce(plan: Plan[Config], arrays: Arrays, memory: Memory) -> None:
    """The producer: queries of a tile, then its blocks of keys and values."""
    p, c = plan.problem, plan.config

    def tile(batch, head, row, visits, count):
        kv_head = lax.div(head, jnp.int32(p.G))
        q, k, v = (
            rows_of(p, x, batch, h) for x, h in ((arrays.q, head), (arrays.k, kv_head), (arrays.v, kv_head))
        )
        plgpu.barrier_wait(memory.q_free)
        memory.q.fetch(q, pl.ds(row * c.tile_q, c.tile_q), memory.q_full)

        def bring(i, _):
            slot = rem(count + i, c.stages)
            rows = pl.ds(visits.index(i) * c.block_kv, c.block_kv)
            plgpu.barrier_wait(memory.k_free.at[slot])
            memory.k.fetch(k, rows, memory.k_full.at[slot], slot, cluster=c.cluster)
            plgpu.barrier_wait(memory.v_free.at[slot])
            memory.v.fetch(v, rows, memory.v_full.at[slot], slot, cluster=c.cluster)

        lax.fori_loop(jnp.int32(0), visits.seen, bring, None)

    again(plan, memory, lambda before, careful: over_tiles(plan, arrays.tables, plan.visits, 1, tile, before))
    # Nothing may be under way when the barriers go.
    plgpu.barrier_wait(memory.q_free)
    for slot in range(c.stages):
        plgpu.barrier_wait(memory.k_free.at[slot])
        plgpu.barrier_wait(memory.v_free.at[slot])
