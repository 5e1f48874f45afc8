"""Attention of PyTorch tensors."""

from __future__ import annotations

from typing import Any, Literal, overload

import jax
import numpy as np
import torch
from torch import Tensor

from flash_attention_jax._api import Window
from flash_attention_jax._arguments import fail
from flash_attention_jax.torch._operator import ARRAYS, call, encode

SegmentIds = Tensor | tuple[Tensor, Tensor] | None


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: SegmentIds = None,
    causal: bool = False,
    window: Window = None,
    q_offset: int | Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: SegmentIds = None,
    causal: bool = False,
    window: Window = None,
    q_offset: int | Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: SegmentIds = None,
    causal: bool = False,
    window: Window = None,
    q_offset: int | Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention_jax.flash_attention` of PyTorch tensors.

    The meaning of every argument is the same there, and so are accuracy and memory. Tensors cross
    by DLPack, without a copy where they are contiguous. Backward passes run on out and lse with no
    second forward pass; derivatives exist to every order and in both modes, and `torch.func`'s
    transforms apply. It is an operator of `torch.library`, so that `torch.compile(fullgraph=True)`
    and `torch.export` take models that contain it.

    Args:
        q: queries (*batch, [N,] T, D), float16, bfloat16, float32 or float64.
        k: keys (*batch, [K,] S, D), of q's dtype. K divides N (grouped-query attention).
        v: values (*batch, [K,] S, Dv), of q's dtype.
        key_mask: bool or 0/1, broadcastable to (*batch, S). Keys with 0 are hidden.
        bias: floating, broadcastable to (*batch, N, T, S), added to the logits.
        mask: bool, broadcastable to (*batch, N, T, S). Pairs with False are hidden.
        segment_ids: integers (*batch, T) where T = S, or a pair ((*batch, T), (*batch, S)).
        causal: whether a query sees only keys at or before its position; the last query stands at
            the last key, unless `q_offset` says otherwise.
        window: (left, right): key j is visible when -left <= j - position(i) <= right. An int w
            means (w, w), None on a side is unbounded.
        q_offset: position of the first query among the keys, an int or an integer tensor that
            broadcasts to the batch. Defaults to S - T.
        scale: of the logits, a number or a tensor of one element and no axes, which may require a
            gradient. Defaults to D ** -0.5.
        softcap: c makes the logits c * tanh(logits / c) before `bias` is added.
        precision: of float32 matrix products: "highest" (also None), "high" or "default".
        implementation: a name from `flash_attention_jax.explain`, or None for the best.
        return_lse: whether to return the log of the sum of exponentials as well.

    Returns:
        out (*batch, [N,] T, Dv) in q's dtype; with `return_lse` the pair (out, lse), lse
        (*batch, [N,] T) in float32 (float64 for float64).

    Raises:
        ValueError: a shape or a value is wrong, or the tensors are on several devices.
        TypeError: a dtype or a type is wrong.
        RuntimeError: JAX does not see the device of the tensors.
        Unsupported: `implementation` cannot run this problem. None always works.

    Example:
        >>> out = flash_attention(q, k, v, causal=True)
    """
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    if len(pair) != 2:
        fail("segment_ids", "a tensor or a pair (of queries, of keys)", f"{len(pair)} items")
    if isinstance(segment_ids, Tensor) and q.shape[-2] != k.shape[-2]:
        lengths = f"T = {q.shape[-2]} and S = {k.shape[-2]}"
        fail("segment_ids", "a pair (of queries, of keys) where T and S differ", f"one tensor, {lengths}")
    given = (q, k, v, bias, mask, key_mask, *pair)
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap}
    options |= {"precision": precision, "implementation": implementation}
    return _call(given, q_offset, scale, options, return_lse)


def _call(given: Any, q_offset: Any, scale: Any, options: dict[str, Any], return_lse: bool) -> Any:
    """Calls the operator with what was given, in the order of `ARRAYS`."""
    offset_and_scale = {"q_offset": q_offset, "scale": scale}
    options |= {name: x for name, x in offset_and_scale.items() if not isinstance(x, Tensor)}
    every = (*given, *(x if isinstance(x, Tensor) else None for x in (q_offset, scale)))
    for name, x in zip(ARRAYS, every, strict=True):
        if (x is not None and not isinstance(x, Tensor)) or (x is None and name in ("q", "k", "v")):
            shown = "segment_ids" if name.endswith("segments") else name
            fail(shown, "a torch.Tensor", type(x).__name__, TypeError)
    names = tuple(name for name, x in zip(ARRAYS, every, strict=True) if x is not None)
    set_options = tuple((name, x) for name, x in options.items() if x is not None and x is not False)
    program = _described(names, set_options)
    out, lse = call(program, [x for x in every if x is not None])
    return (out, lse) if return_lse else out


@torch.compiler.assume_constant_result
def _described(names: tuple[str, ...], options: tuple[tuple[str, Any], ...]) -> str:
    return encode({"attend": {name: _plain(name, x) for name, x in options}, "arrays": names})


def _plain(name: str, x: Any) -> Any:
    """An option as JSON has it."""
    x = x.item() if isinstance(x, np.generic) else x
    x = x.name.lower() if isinstance(x, jax.lax.Precision) else x
    if isinstance(x, tuple | list):
        return [_plain(name, side) for side in x]
    if x is not None and not isinstance(x, bool | int | float | str):
        fail(name, "None, a number, a string, a bool or a pair", type(x).__name__, TypeError)
    return x


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, argument for argument, in linear memory.

    The computation is that of `flash_attention`, also under `torch.compile` and `torch.export`.
    Logits and sums are float32 at least, and `attn_mask`, where it is large, is all that is stored
    of size L x S. A query that sees no key gets 0 and zero gradients.

    Args:
        query: (*batch, H, L, E), float16, bfloat16, float32 or float64; or (L, E).
        key: (*batch, H, S, E), of query's dtype. The axes before the last two broadcast.
        value: (*batch, H, S, Ev), of query's dtype.
        attn_mask: broadcastable to (*batch, H, L, S): bool, True where a query sees a key, or
            floating, added to the logits.
        dropout_p: must be 0.
        is_causal: whether query i sees only keys j <= i: aligned at the first position, whatever L
            and S are. (`flash_attention` is aligned at the last.) Not with `attn_mask`.
        scale: of the logits. Defaults to E ** -0.5.
        enable_gqa: whether key and value may have fewer heads than query, each a number that
            divides query's; query head n attends to key head n // (H // heads of key).

    Returns:
        out (*batch, H, L, Ev), in query's dtype.

    Raises:
        ValueError: a shape or a value is wrong, or the tensors are on several devices.
        TypeError: a dtype or a type is wrong.
        NotImplementedError: `dropout_p` is not 0.
        RuntimeError: JAX does not see the device of the tensors.

    Example:
        >>> out = scaled_dot_product_attention(query, key, value, is_causal=True)
    """
    _check(query, key, value, attn_mask)
    if dropout_p != 0:
        fail("dropout_p", "0, for there is no dropout", dropout_p, NotImplementedError)
    if attn_mask is not None and is_causal:
        fail("attn_mask", "None where is_causal is set", f"shape {tuple(attn_mask.shape)}")
    if enable_gqa:
        query, key, value = _broadcast(query, *_grouped(query, key, value))
    else:
        query, key, value = _broadcast(query, key, value, tail=2)
    if attn_mask is not None:
        _check_mask(attn_mask, (*query.shape[:-1], key.shape[-2]))
    query, key, value, attn_mask = (_autocast(x) for x in (query, key, value, attn_mask))
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    bias, mask = (None, attn_mask) if is_bool else (attn_mask, None)
    given = (query, key, value, bias, mask, None, None, None)
    return _call(given, 0 if is_causal else None, scale, {"causal": bool(is_causal)}, return_lse=False)


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    """What `flash_attention` would report under other names."""
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if (x is not None and not isinstance(x, Tensor)) or (x is None and name != "attn_mask"):
            fail(name, "a torch.Tensor", type(x).__name__, TypeError)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 2:
            fail(name, "of shape (*batch, H, length, dim) or (length, dim)", f"shape {tuple(x.shape)}")
        if x.dtype != query.dtype:
            fail(name, f"of query's dtype {query.dtype}", x.dtype, TypeError)
    if key.shape[-1] != query.shape[-1]:
        fail("key", f"of query's head dim E = {query.shape[-1]}", f"shape {tuple(key.shape)}")
    if value.shape[-2] != key.shape[-2]:
        fail("value", f"of key's length S = {key.shape[-2]}", f"shape {tuple(value.shape)}")


def _check_mask(attn_mask: Tensor, logits: tuple[int, ...]) -> None:
    if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
        fail("attn_mask", "of dtype bool or floating", attn_mask.dtype, TypeError)
    shape = tuple(attn_mask.shape)
    pairs = zip(shape[::-1], logits[::-1], strict=False)
    if len(shape) > len(logits) or any(a not in (1, b) for a, b in pairs):
        fail("attn_mask", f"broadcastable to (*batch, H, L, S) = {logits}", f"shape {shape}")


def _autocast(x: Any) -> Any:
    """What `torch.autocast` makes of an argument, as of those of torch's function."""
    if x is None:
        return None
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    if not x.dtype.is_floating_point or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with one number of heads, which divides query's."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            fail(name, "of at least 3 axes where enable_gqa is set", f"shape {tuple(x.shape)}")
    heads = query.shape[-3]
    for name, x in (("key", key), ("value", value)):
        if x.shape[-3] == 0 or heads % x.shape[-3]:
            fail(name, f"of a head count that divides query's {heads}", f"shape {tuple(x.shape)}")
    if key.shape[-3] == value.shape[-3]:
        return key, value
    key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    return key, value


def _broadcast(query: Tensor, key: Tensor, value: Tensor, tail: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors with the same axes before the last `tail`."""
    tensors = query, key, value
    try:
        lead = torch.broadcast_shapes(*(x.shape[:-tail] for x in tensors))
    except RuntimeError:
        shown = ", ".join(str(tuple(x.shape)) for x in tensors)
        fail("query, key and value", f"of shapes that broadcast before the last {tail} axes", shown)
    query, key, value = (x.expand(*lead, *x.shape[-tail:]) for x in tensors)
    return query, key, value
