"""The public functions of attention."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flash_attention_jax._arguments import fail, normalize
from flash_attention_jax._attend import Call, attend
from flash_attention_jax._dispatch import IMPLEMENTATIONS
from flash_attention_jax._explicit import Placement, divided, placement
from flash_attention_jax._impl.reference import dense
from flash_attention_jax._problem import Operands, Problem, arrange, scaled

Window = int | tuple[int | None, int | None] | None
SegmentIds = Int[Array, "*batch T"] | tuple[Int[Array, "*batch T"], Int[Array, "*batch S"]] | None


class AttentionOutput(NamedTuple):
    """The result of attention.

    Attributes:
        out: (*batch, [N,] T, Dv), in q's dtype.
        lse: (*batch, [N,] T), natural log of the sum of exponentials of the visible logits, float32
            (float64 for float64 inputs); -inf for a query that sees no key.
    """

    out: Float[Array, "*batch T Dv"]
    lse: Float[Array, "*batch T"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `out`."""
        return self.out.shape

    @property
    def dtype(self) -> Any:
        """The dtype of `out`."""
        return self.out.dtype


def flash_attention(
    q: Float[Array, "*batch T D"],
    k: Float[Array, "*batch S D"],
    v: Float[Array, "*batch S Dv"],
    key_mask: Bool[Array, "*#batch S"] | None = None,
    *,
    bias: Float[Array, "*#batch T S"] | None = None,
    mask: Bool[Array, "*#batch T S"] | None = None,
    segment_ids: SegmentIds = None,
    causal: bool = False,
    window: Window = None,
    q_offset: int | Int[Array, "*#batch"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    precision: str | jax.lax.Precision | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
) -> AttentionOutput:
    """Exact softmax attention that never stores the T x S matrix.

    For query i and key j, with `position(i) = i + q_offset`::

        logits[i, j] = softcap(scale * q[i] . k[j]) + bias[i, j]
        lse[i] = log(sum over visible j of exp(logits[i, j]))
        out[i] = sum over visible j of exp(logits[i, j] - lse[i]) * v[j]

    Key j is visible to query i when every mask given says so. A query that sees no key gets
    `out = 0`, `lse = -inf` and zero gradients. A hidden key may hold anything, NaN and inf
    included, without effect; a visible key that holds a value that is not finite makes the
    queries that see it NaN wherever any mask is given.

    Logits, softmax and sums are float32 (float64 for float64 inputs). Every derivative, of any
    order and in both modes, is exact and takes memory linear in T and S; `lse` is as differentiable
    as `out`. Algorithms: FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2), online softmax
    (arXiv 1805.02867).

    Under `jit` with q, k and v divided over batch, heads or both by `NamedSharding`, on meshes with
    automatic or explicit axes, each device computes its own part and nothing is gathered; but of several
    batch axes, automatic mesh axes may divide the leading one alone, or what they divide is gathered.
    Key/value heads are divided with the query heads; one alone is shared, and a count that the devices do
    not divide makes each device compute all heads. A divided sequence is right, but every device then
    gathers the whole of q, k and v and repeats the work of the others, which
    `flash_attention_jax.distributed.ring_attention` does without. Inside `jax.shard_map` a call is local.

    Args:
        q: queries (*batch, [N,] T, D), float16, bfloat16, float32 or float64. With two axes there
            are no heads and no batch.
        k: keys (*batch, [K,] S, D), of q's dtype. K divides N: query head n attends to key/value
            head n // (N // K) (grouped-query attention, arXiv 2305.13245).
        v: values (*batch, [K,] S, Dv), of q's dtype.
        key_mask: bool or 0/1, broadcastable to (*batch, S). Keys with 0 are hidden.
        bias: floating, broadcastable to (*batch, N, T, S), added to the logits. Its gradient has
            its own shape, and no T x S array is made for it unless it has both axes itself.
        mask: bool, broadcastable to (*batch, N, T, S). Pairs with False are hidden.
        segment_ids: integers (*batch, T) where T = S, or a pair ((*batch, T), (*batch, S)). A query
            sees the keys of its own segment.
        causal: whether a query sees only keys at or before its position.
        window: (left, right): key j is visible when -left <= j - position(i) <= right. An int w
            means (w, w), None on a side is unbounded.
        q_offset: position of the first query among the keys, an int or an int32 array that
            broadcasts to the batch, of a magnitude below 2**30. Defaults to S - T: the last query
            stands at the last key. Only with `causal` or `window`.
        scale: of the logits, a number or a scalar array, which may be traced and differentiated
            and is multiplied into q, rounded to its dtype. Defaults to D ** -0.5.
        softcap: c from 1e-30 to 1e30 makes softcap(x) = c * tanh(x / c); None is the identity.
        precision: of float32 matrix products: "highest" (also None) is true float32 on every
            device, "high" and "default" let a backend use faster approximate modes (TF32, say).
        deterministic: whether gradients must have the same bits on every run. By default "hopper" adds
            the contributions to the gradient of q in the order in which they come, so that its rounding
            differs from run to run; every other result of a compiled program, and every one of the
            other implementations, has the same bits anyway. True takes a second kernel there, and up
            to a third more time.
        implementation: a name from `explain`, or None for the best that takes the problem, chosen
            when the computation is lowered, for the platform it is lowered for.

    Returns:
        `AttentionOutput(out, lse)`: out (*batch, [N,] T, Dv) in q's dtype, lse (*batch, [N,] T).

    Raises:
        ValueError: a shape or a value is wrong.
        TypeError: a dtype or a type is wrong.
        Unsupported: `implementation` cannot run this problem. None always works.

    Example:
        >>> out, lse = flash_attention(q, k, v, causal=True)
    """
    return flash(
        Operands(q, k, v, bias, mask, key_mask, q_offset=q_offset),
        segment_ids,
        implementation=implementation,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        precision=precision,
        deterministic=deterministic,
    )


def attention(
    q: Float[Array, "*batch T D"],
    k: Float[Array, "*batch S D"],
    v: Float[Array, "*batch S Dv"],
    key_mask: Bool[Array, "*#batch S"] | None = None,
    *,
    bias: Float[Array, "*#batch T S"] | None = None,
    mask: Bool[Array, "*#batch T S"] | None = None,
    segment_ids: SegmentIds = None,
    causal: bool = False,
    window: Window = None,
    q_offset: int | Int[Array, "*#batch"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    precision: str | jax.lax.Precision | None = None,
    deterministic: bool = False,
) -> Float[Array, "*batch T Dv"]:
    """Plain attention: the textbook formula, which stores the T x S matrix.

    The meaning of every argument, the dtypes and the errors are those of `flash_attention`; it
    always runs the same formula, so it takes no `implementation`, and `deterministic` changes nothing.

    Returns:
        out (*batch, [N,] T, Dv), in q's dtype.

    Raises:
        ValueError: a shape or a value is wrong.
        TypeError: a dtype or a type is wrong.

    Example:
        >>> out = attention(q, k, v, causal=True)
    """
    return attention_and_lse(
        q,
        k,
        v,
        key_mask,
        bias=bias,
        mask=mask,
        segment_ids=segment_ids,
        causal=causal,
        window=window,
        q_offset=q_offset,
        scale=scale,
        softcap=softcap,
        precision=precision,
        deterministic=deterministic,
    ).out


def flash(operands: Operands, segment_ids: Any = None, *, implementation: Any = None, **options: Any):
    """What every form of `flash_attention` comes down to; options are those of `normalize`."""
    check_implementation(implementation)
    problem, operands, scale = normalize(operands, segment_ids, **options)
    where = placement(problem, operands)
    return AttentionOutput(*_flash(Call(problem, implementation), operands, scale, where))


def attention_and_lse(q, k, v, key_mask=None, *, bias=None, mask=None, q_offset=None, **options):
    """`attention` with its lse, as an `AttentionOutput`: what the oracle differentiates."""
    operands = Operands(q, k, v, bias, mask, key_mask, q_offset=q_offset)
    problem, operands, scale = normalize(operands, options.pop("segment_ids", None), **options)
    return AttentionOutput(*_plain(problem, operands, scale))


def check_implementation(implementation: Any) -> None:
    """Rejects what is no implementation's name."""
    if implementation is None or (isinstance(implementation, str) and implementation in IMPLEMENTATIONS):
        return
    must = f"None or one of {', '.join(map(repr, IMPLEMENTATIONS))}"
    error = ValueError if isinstance(implementation, str) else TypeError
    fail("implementation", must, repr(implementation), error)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _flash(call: Call, operands: Operands, scale: Any, where: Placement | None = None) -> tuple[Array, Array]:
    def of_part(problem, operands, scale):
        local = Call(problem, call.implementation)
        return _between_shapes(functools.partial(attend, local), problem, operands, scale)

    if where is None:
        return of_part(call.problem, operands, scale)
    return divided(of_part, where, call.problem, operands, scale)


@functools.partial(jax.jit, static_argnums=0)
def _plain(problem: Problem, operands: Operands, scale: Any) -> tuple[Array, Array]:
    return _between_shapes(functools.partial(dense, problem), problem, operands, scale)


def _between_shapes(function, problem: Problem, operands: Operands, scale: Any):
    """Applies a function of canonical operands to raw ones; out and lse get the caller's shapes."""
    q, p = operands.q, problem
    out_shape = (*q.shape[:-1], p.Dv)
    lse_shape = q.shape[:-1] if p.order == "BNTD" else (*q.shape[:-3], p.N, p.T)
    if p.empty:
        return jnp.zeros(out_shape, p.dtype), jnp.full(lse_shape, -jnp.inf, p.accumulator)
    if scale is not None:
        operands = operands._replace(q=scaled(p, q, scale))
    out, lse = function(arrange(p, operands))
    return out.reshape(out_shape), lse.reshape(lse_shape)
