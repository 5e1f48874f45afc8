"""What each consumer of the backward kernel computes: of a tile of keys, of a block of queries, of dQ."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp

from flash_attention_jax._impl.hopper._backward_configs import BackwardConfig, layouts, share
from flash_attention_jax._impl.hopper._configs import Chunks
from flash_attention_jax._problem import Problem


@dataclasses.dataclass(frozen=True)
class Part:
    """What one consumer computes.

    Where consumers divide keys, it has some rows of S^T, dP^T, dK and dV. Where they divide columns, it has
    some columns of dK and dV, and of S^T and dP^T those of some queries. Chunks that are divided may lead
    beyond the end: they are read by way of `within`, and not written.

    Attributes:
        keys: the rows of its logits in K and V, and of its part of dK and dV.
        queries: the columns of its logits, among the rows of Q and dO.
        of_dk, of_dv: its chunks of dK, which lie as those of Q, and of dV.
        of_dq: row group and chunk of each of its pieces of a block of dQ.
    """

    keys: Any
    queries: Any
    of_dk: list[Any]
    of_dv: list[Any]
    of_dq: list[tuple[Any, Any]]

    @classmethod
    def of(cls, problem: Problem, config: BackwardConfig, own: Any) -> Part:
        """The part of consumer `own`."""
        c, lie, dq = config, layouts(problem, config), share(problem, config)
        groups, chunks = range(dq.groups), range(dq.chunks)
        if dq.by_rows:
            of_dq = [(own * dq.groups + g, chunk) for g in groups for chunk in chunks]
        else:
            of_dq = [(g, own * dq.chunks + chunk) for g in groups for chunk in chunks]
        if not c.columns:
            keys, queries = pl.ds(own * c.keys, c.keys), pl.ds(0, c.block_q)
            return cls(keys, queries, list(range(lie.q.count)), list(range(lie.v.count)), of_dq)

        def divided(of):
            each = -(-of.count // c.consumers)
            return [own * each + i for i in range(each)]

        queries = pl.ds(own * c.queries, c.queries)
        return cls(pl.ds(0, c.keys), queries, divided(lie.q), divided(lie.v), of_dq)


def within(chunk: Any, of: Chunks) -> Any:
    """A chunk that may be beyond the end, or then the last."""
    return chunk if isinstance(chunk, int) else jnp.minimum(chunk, of.count - 1)
