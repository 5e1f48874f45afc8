"""`scaled_dot_product_attention`: PyTorch's function, argument for argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flash_attention_jax._arguments import FLOATS, fail
from flash_attention_jax.torch._attention import attend, check_tensors

_FLOATS = frozenset(getattr(torch, name) for name in FLOATS)


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
    check_tensors({"query": query, "key": key, "value": value}, {"attn_mask": attn_mask})
    query, key, value, attn_mask = (_autocast(x) for x in (query, key, value, attn_mask))
    _check(query, key, value)
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool | np.bool_ | torch.SymBool):
            fail(name, "True or False", repr(flag), TypeError)
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
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    bias, mask = (None, attn_mask) if is_bool else (attn_mask, None)
    given = (query, key, value, bias, mask, None, None, None)
    return attend(given, 0 if is_causal else None, scale, {"causal": bool(is_causal)})[0]


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """What `flash_attention` would report under other names."""
    if query.dtype not in _FLOATS:
        fail("query", f"of dtype {', '.join(FLOATS)}", query.dtype, TypeError)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 2:
            fail(name, "of shape (*batch, H, length, dim) or (length, dim)", f"shape {tuple(x.shape)}")
        if x.dtype != query.dtype:
            fail(name, f"of query's dtype {query.dtype}", x.dtype, TypeError)
        if x.shape[-1] == 0:
            fail(name, "of a head dim of at least 1", f"shape {tuple(x.shape)}")
    if key.shape[-1] != query.shape[-1]:
        fail("key", f"of query's head dim E = {query.shape[-1]}", f"shape {tuple(key.shape)}")
    if value.shape[-2] != key.shape[-2]:
        fail("value", f"of key's length S = {key.shape[-2]}", f"shape {tuple(value.shape)}")


def _check_mask(attn_mask: Tensor, logits: tuple[int, ...]) -> None:
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in _FLOATS:
        fail("attn_mask", f"of dtype bool, {', '.join(FLOATS)}", attn_mask.dtype, TypeError)
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
