"""`dot_product_attention`: the signature and meaning of `jax.nn`'s."""

from __future__ import annotations

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flash_attention_jax._api import AttentionOutput, Window, flash
from flash_attention_jax._arguments import checked, fail
from flash_attention_jax._dispatch import IMPLEMENTATIONS
from flash_attention_jax._problem import Operands

_NAMES = {"q": "query", "k": "key", "v": "value", "causal": "is_causal", "window": "local_window_size"}


@overload
def dot_product_attention(
    query: Float[Array, "*B T N D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K Dv"],
    bias: Float[Array, "*#BNTS"] | None = None,
    mask: Bool[Array, "*#BNTS"] | None = None,
    *,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    local_window_size: Window = None,
    implementation: str | None = None,
    return_residual: Literal[False] = False,
    softcap: float | None = None,
    precision: str | jax.lax.Precision | None = None,
    deterministic: bool = False,
) -> Float[Array, "*B T N Dv"]: ...


@overload
def dot_product_attention(
    query: Float[Array, "*B T N D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K Dv"],
    bias: Float[Array, "*#BNTS"] | None = None,
    mask: Bool[Array, "*#BNTS"] | None = None,
    *,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    local_window_size: Window = None,
    implementation: str | None = None,
    return_residual: Literal[True],
    softcap: float | None = None,
    precision: str | jax.lax.Precision | None = None,
    deterministic: bool = False,
) -> tuple[Float[Array, "*B T N Dv"], Float[Array, "*B T N"]]: ...


def dot_product_attention(
    query: Float[Array, "*B T N D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K Dv"],
    bias: Float[Array, "*#BNTS"] | None = None,
    mask: Bool[Array, "*#BNTS"] | None = None,
    *,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    local_window_size: Window = None,
    implementation: str | None = None,
    return_residual: bool = False,
    softcap: float | None = None,
    precision: str | jax.lax.Precision | None = None,
    deterministic: bool = False,
) -> Float[Array, "*B T N Dv"] | tuple[Float[Array, "*B T N Dv"], Float[Array, "*B T N"]]:
    """`jax.nn.dot_product_attention`, argument for argument, without the T x S matrix.

    The algorithm, its accuracy and its derivatives are those of `flash_attention`; the arrays are
    read in the memory order in which they come. These are the differences from `jax.nn`:

    - A query that sees no key gets 0, a residual of -inf and zero gradients. `jax.nn` gives it the
      mean of `value` and a residual near -2.4e38. (Past `query_seq_lengths` both give 0.)
    - Gradients flow through the residual, which `jax.nn` stops.
    - `value` may have a head dim of its own; `softcap`, `precision` and `deterministic` are ours.
    - `implementation` names ours. `jax.nn`'s "cudnn" is refused, and "xla" is a blocked one.
    - What `jax.nn` converts is an error: an integer `bias`, a negative window, NumPy's float64
      without `jax_enable_x64`.

    Args:
        query: (B, T, N, D) or (T, N, D), float16, bfloat16, float32 or float64.
        key: (B, S, K, D) or (S, K, D), of query's dtype. K divides N (grouped-query attention).
        value: (B, S, K, Dv) or (S, K, Dv), of query's dtype.
        bias: floating, broadcastable to (B, N, T, S), added to the logits.
        mask: bool, broadcastable to (B, N, T, S). Pairs with False are hidden.
        scale: of the logits, a number or a scalar array. Defaults to D ** -0.5.
        is_causal: whether query i sees only keys j <= i: aligned at the first position, whatever
            T and S are. (`flash_attention` is aligned at the last.)
        query_seq_lengths: integers (B,). Queries at and past the length see nothing.
        key_value_seq_lengths: integers (B,). Keys at and past the length are hidden. Blocks past
            either length are skipped, also where it is traced.
        local_window_size: (left, right): key j is visible when -left <= j - i <= right. An int w
            means (w, w), None on a side is unbounded.
        implementation: a name from `explain`, or None for the best that takes the problem.
        return_residual: whether to return the log of the sum of exponentials as well.
        softcap: c makes the logits c * tanh(logits / c) before `bias` is added.
        precision: of float32 matrix products: "highest" (also None), "high" or "default".
        deterministic: as for `flash_attention`.

    Returns:
        out (B, T, N, Dv) or (T, N, Dv), in query's dtype. With `return_residual` the pair
        (out, residual): residual (B, T, N) or (T, N), natural log, in key's dtype as in `jax.nn`.

    Raises:
        ValueError: a shape or a value is wrong.
        TypeError: a dtype or a type is wrong.
        Unsupported: `implementation` cannot run this problem. None always works.

    Example:
        >>> out = dot_product_attention(query, key, value, is_causal=True)
    """
    if isinstance(implementation, str) and implementation == "cudnn":
        ours = ", ".join(map(repr, IMPLEMENTATIONS))
        fail("implementation", f"None or one of {ours}, 'cudnn' being jax.nn's alone", "'cudnn'")
    if not isinstance(return_residual, bool | np.bool_):
        fail("return_residual", "True or False", repr(return_residual), TypeError)
    lengths = query_seq_lengths, key_value_seq_lengths
    stats_shape, (q, k, v) = _batched((query, key, value), (bias, mask), lengths)
    key_mask, segment_ids = _within_lengths(q.shape, k.shape, *lengths)
    out, lse = from_first_position(
        Operands(q, k, v, bias, mask, key_mask),
        segment_ids,
        is_causal=is_causal,
        local_window_size=local_window_size,
        scale=scale,
        softcap=softcap,
        precision=precision,
        deterministic=deterministic,
        implementation=implementation,
    )
    out = out.reshape(*stats_shape, out.shape[-1])
    if not return_residual:
        return out
    return out, lse.swapaxes(-1, -2).astype(out.dtype).reshape(stats_shape)


def from_first_position(
    operands: Operands,
    segment_ids: Any = None,
    *,
    is_causal: bool,
    local_window_size: Window = None,
    **options: Any,
) -> AttentionOutput:
    """`flash` of q, k and v in memory order BTND, under `jax.nn`'s names, the first query at the first key.

    Returns:
        out (*batch, T, N, Dv) and lse (*batch, N, T).
    """
    unbanded = local_window_size is None and isinstance(is_causal, bool | np.bool_) and not is_causal
    return flash(
        operands._replace(q_offset=None if unbanded else 0),
        segment_ids,
        causal=is_causal,
        window=local_window_size,
        order="BTND",
        names=_NAMES,
        **options,
    )


def _batched(given: Any, pairs: Any, lengths: Any) -> tuple[tuple[int, ...], list[Any]]:
    """Query's shape without D, and query, key, value, checked; all with a batch axis where any needs one."""
    arrays = []
    for role, x, shape in zip("qkv", given, ("T, N, D", "S, K, D", "S, K, Dv"), strict=True):
        x = checked(role, x, shown=_NAMES[role])
        if x.ndim not in (3, 4):
            fail(_NAMES[role], f"an array of shape (B, {shape}) or ({shape})", f"shape {x.shape}")
        arrays.append(x)
    stats_shape = arrays[0].shape[:-1]
    if any(x is not None for x in lengths) or any(getattr(x, "ndim", 0) > 3 for x in (*arrays, *pairs)):
        arrays = [x[None] if x.ndim == 3 else x for x in arrays]
    return stats_shape, arrays


def _within_lengths(q_shape: Any, k_shape: Any, query_seq_lengths: Any, key_value_seq_lengths: Any):
    """The key mask or the pair of segment ids that hide what is past the lengths.

    A key mask costs least, but hides no queries. The ids do: 0 for what is within, -1 for queries
    and 1 for keys past it, so that no range of ids of a block that is past it touches another.
    """

    def within(name, lengths, shape):
        lengths = checked("lengths", lengths, shown=name)
        if lengths.shape != shape[:1]:
            fail(name, f"of shape (B,) = {shape[:1]}", f"shape {lengths.shape}")
        # What is beyond int32 would wrap around; at its end it means the same, for no axis is longer.
        lengths = jnp.asarray(lengths)
        largest = min(jnp.iinfo(lengths.dtype).max, jnp.iinfo(jnp.int32).max)
        lengths = jnp.clip(lengths, 0, largest).astype(jnp.int32)
        return jnp.arange(shape[1], dtype=jnp.int32) < lengths[:, None]

    keys = None
    if key_value_seq_lengths is not None:
        keys = within("key_value_seq_lengths", key_value_seq_lengths, k_shape)
    if query_seq_lengths is None:
        return keys, None
    of_q = within("query_seq_lengths", query_seq_lengths, q_shape).astype(jnp.int32) - 1
    of_kv = jnp.zeros(k_shape[1], jnp.int32) if keys is None else 1 - keys.astype(jnp.int32)
    return None, (of_q, of_kv)
