"""The operator `flash_attention_jax::call` of torch.library, through which tensors are attended to.

    call(Tensor[] tensors, str program) -> Tensor[]

`program` says in JSON which program is called; nothing else is needed to run it, in this process or
in another that loads what `torch.export` saved:

    {"attend": options, "arrays": names}             flash_attention -> [out, lse]
    {"gradients": attend, "wrt": ..., "given": ...}  of [*arrays, out, lse, *cotangents]
    {"tangents": attend, "moved": ...}               of [*arrays, out, lse, *tangents]
    {"vjp": program, "wrt": ..., "given": ...}       the derivations of `_program`
    {"jvp": program, "moved": ...}
    {"vmap": program, "dims": ...}

So the operator is closed under differentiation and batching: each is a call of another program,
which `torch.compile` and `torch.export` see as one node of their graphs. Outside of those its
programs are called by `_function.apply`, which alone works with the transforms of `torch.func`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import torch

from flash_attention_jax._api import AttentionOutput, flash
from flash_attention_jax._problem import Operands
from flash_attention_jax.torch._crossing import common_device
from flash_attention_jax.torch._function import apply
from flash_attention_jax.torch._gradients import gradients, tangents
from flash_attention_jax.torch._program import Frame, Function, Indices, Program, jvp_of, vjp_of, vmap_of

Tensors = Sequence[torch.Tensor]
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
# Array arguments of `flash_attention`, in the order in which the operator takes those that are given.
ARRAYS = (*Operands._fields, "scale")


class Operation(Program):
    """A program that is called through the operator.

    Attributes:
        description: what it is.
        spec: the same in JSON, as the operator takes it.
    """

    def __init__(self, description: dict[str, Any], spec: str):
        self.description, self.spec = description, spec
        self.reads_results = "attend" in description
        super().__init__(_function(description))

    def run(self, frame: Frame, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        """Calls the operator below autograd; where nothing records it, what it does (30 us less)."""
        recorded = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None
        if not recorded and all(type(x) in _PLAIN for x in tensors):
            return tuple(self.run_in_jax(tensors))
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_CALL(list(tensors), self.spec))

    def run_in_jax(self, tensors: Tensors) -> list[torch.Tensor]:
        """What the operator does on a device."""
        return list(super().run(Frame(), tensors))

    def vjp(self, wrt: Indices, given: Indices) -> Program:
        """Of an attention call it starts from the results, with no second forward pass."""
        kind = "gradients" if self.reads_results else "vjp"
        return operation(encode({kind: self.description, "wrt": wrt, "given": given}))

    def jvp(self, moved: Indices) -> Program:
        """Of an attention call it starts from the results as well."""
        kind = "tangents" if self.reads_results else "jvp"
        return operation(encode({kind: self.description, "moved": moved}))

    def vmap(self, dims: tuple[int | None, ...]) -> Program:
        """As of any program."""
        return operation(encode({"vmap": self.description, "dims": dims}))


def call(program: str, tensors: Tensors) -> Sequence[torch.Tensor]:
    """Calls a program so that torch can differentiate, transform, compile and export it."""
    common_device(tensors)
    if torch.compiler.is_compiling():
        return _CALL(list(tensors), program)
    return apply(operation(program), Frame(), tensors)


def encode(description: dict[str, Any]) -> str:
    """A description as the operator takes it."""
    return _ENCODER.encode(description)


_ENCODER = json.JSONEncoder(sort_keys=True)


@functools.cache
def operation(spec: str) -> Operation:
    """The operation that a description in JSON describes."""
    return Operation(json.loads(spec), spec)


def _function(description: dict[str, Any]) -> Function:
    """The JAX function of a description."""
    match description:
        case {"attend": options, "arrays": names}:
            return lambda bound, arrays: list(_attend(dict(zip(names, arrays, strict=True)), dict(options)))
        case {"gradients": attend, "wrt": wrt, "given": given}:
            return functools.partial(_gradients, attend, wrt, given)
        case {"tangents": attend, "moved": moved}:
            return functools.partial(_tangents, attend, moved)
        case {"vjp": of, "wrt": wrt, "given": given}:
            return vjp_of(_function(of), tuple(wrt), tuple(given))
        case {"jvp": of, "moved": moved}:
            return jvp_of(_function(of), tuple(moved))
        case {"vmap": of, "dims": dims}:
            return vmap_of(_function(of), tuple(dims))
    raise ValueError(f"program must be what `_operator` describes, got {encode(description)}")


def _attend(named: dict[str, jax.Array], options: dict[str, Any]) -> AttentionOutput:
    scale = named.pop("scale", options.pop("scale", None))
    offset = named.pop("q_offset", options.pop("q_offset", None))
    segments = named.pop("q_segments", None), named.pop("kv_segments", None)
    given = None if segments[0] is None else segments
    return flash(Operands(**named, q_offset=offset), given, scale=scale, **options)


def _gradients(
    attend: dict[str, Any], wrt: list[int], given: list[int], bound: Any, values: list[Any]
) -> Any:
    names = attend["arrays"]
    arrays, (out, lse, *cotangents) = dict(zip(names, values, strict=False)), values[len(names) :]
    of_results: list[Any] = [None, None]
    for i, x in zip(given, cotangents, strict=True):
        of_results[i] = x
    wanted = [names[i] for i in wrt]
    return gradients(wanted, arrays, (out, lse), tuple(of_results), attend["attend"])


def _tangents(attend: dict[str, Any], moved: list[int], bound: Any, values: list[Any]) -> Any:
    names = attend["arrays"]
    arrays, (out, lse, *given) = dict(zip(names, values, strict=False)), values[len(names) :]
    named = {names[i]: x for i, x in zip(moved, given, strict=True)}
    return tangents(named, arrays, (out, lse), attend["attend"])


def _like(description: dict[str, Any], tensors: Tensors) -> list[torch.Tensor]:
    """Empty tensors like the results; sizes may be symbols, so JAX cannot be asked."""
    match description:
        case {"attend": options, "arrays": names}:
            q, v = tensors[names.index("q")], tensors[names.index("v")]
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            rows = q.shape[:-1]
            if options.get("order") == "BTND":
                rows = (*q.shape[:-3], q.shape[-2], q.shape[-3])
            return [q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(rows, dtype=wide)]
        case {"tangents": of, "moved": _}:
            return _like(of, tensors[: len(of["arrays"])])
        case {"gradients": _, "wrt": wrt} | {"vjp": _, "wrt": wrt}:
            return [tensors[i].new_empty(tensors[i].shape) for i in wrt]
        case {"jvp": of, "moved": moved}:
            return _like(of, tensors[: len(tensors) - len(moved)])
        case {"vmap": of, "dims": dims}:
            pairs = list(zip(tensors, dims, strict=True))
            size = next(x.shape[dim] for x, dim in pairs if dim is not None)
            inner = _like(of, [x if dim is None else x.select(dim, 0) for x, dim in pairs])
            return [x.new_empty((size, *x.shape)) for x in inner]
    raise AssertionError


_LIBRARY = torch.library.Library("flash_attention_jax", "DEF")
_LIBRARY.define("call(Tensor[] tensors, str program) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))

_CALL = torch.ops.flash_attention_jax.call.default


@torch.library.impl(_LIBRARY, "call", "CompositeExplicitAutograd")
def _on_device(tensors: Tensors, program: str) -> list[torch.Tensor]:
    return operation(program).run_in_jax(tensors)


@torch.library.impl(_LIBRARY, "call", "Autograd")
@torch.library.impl(_LIBRARY, "call", "Batched")
def _autograd(tensors: Tensors, program: str) -> list[torch.Tensor]:
    return list(apply(operation(program), Frame(), tensors))


def _fake(tensors: Tensors, program: str) -> list[torch.Tensor]:
    return _like(operation(program).description, tensors)


def _batched(info: Any, in_dims: Any, tensors: Tensors, program: str) -> Any:
    derived = encode({"vmap": operation(program).description, "dims": in_dims[0]})
    results = _CALL(list(tensors), derived)
    return results, [0] * len(results)


torch.library.register_fake("flash_attention_jax::call", _fake, lib=_LIBRARY)
torch.library.register_vmap("flash_attention_jax::call", _batched, lib=_LIBRARY)
