"""Trains a small causal language model on bytes, the sequence divided over all devices.

Each device holds two pieces of every sequence, one early and one late (the zig-zag layout), and all of the
parameters; only attention needs what is on other devices. On one machine, CPU or GPUs::

    python examples/ring_language_model.py

On several processes, one command for each (or --distributed alone where the cluster says who they are)::

    python examples/ring_language_model.py --coordinator localhost:1234 --processes 2 --process 0
    python examples/ring_language_model.py --coordinator localhost:1234 --processes 2 --process 1

The text is seven sonnets of Shakespeare's, `sonnets.txt` beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flash_attention_jax.distributed import ring_attention, shard_sequence

TEXT = pathlib.Path(__file__).with_name("sonnets.txt")


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes: layers of `dim`, `heads` query heads and `kv_heads` key/value heads of `head_dim`."""

    layers: int = 2
    dim: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16

    def parameters(self, seed: int) -> dict[str, Any]:
        """Normal weights, of a variance that keeps the size of what passes through."""
        rng = np.random.default_rng(seed)

        def weight(*shape):
            return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)

        def layer():
            return {
                "q": weight(self.dim, self.heads, self.head_dim),
                "k": weight(self.dim, self.kv_heads, self.head_dim),
                "v": weight(self.dim, self.kv_heads, self.head_dim),
                "out": weight(self.heads * self.head_dim, self.dim),
                "up": weight(self.dim, 4 * self.dim),
                "down": weight(4 * self.dim, self.dim),
            }

        return {
            "bytes": weight(256, self.dim) * 16,
            "layers": [layer() for _ in range(self.layers)],
            "logits": weight(self.dim, 256),
        }


def rotated(x, positions):
    """Rotary embedding (arXiv 2104.09864) of x (B, N, T, D) at positions (T,)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 1000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def normalized(x):
    """x over the root of its mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def logits_of(parameters, tokens, positions):
    """Logits (B, T, 256) of the next bytes; T is what one device holds."""
    x = parameters["bytes"][tokens]
    for layer in parameters["layers"]:
        y = normalized(x)
        q, k, v = (jnp.einsum("btd,dnh->bnth", y, layer[name]) for name in "qkv")
        q, k = rotated(q, positions), rotated(k, positions)
        out = ring_attention(q, k, v, causal=True, axis_name="sequence", layout="zigzag").out
        x = x + jnp.einsum("bnth->btnh", out).reshape(*x.shape[:2], -1) @ layer["out"]
        x = x + jax.nn.gelu(normalized(x) @ layer["up"]) @ layer["down"]
    return normalized(x) @ parameters["logits"]


def loss_of(parameters, tokens, labels, positions):
    """The mean over all devices of -log p(next byte)."""
    log_p = jax.nn.log_softmax(logits_of(parameters, tokens, positions))
    chosen = jnp.take_along_axis(log_p, labels[..., None], axis=-1)
    return -jax.lax.pmean(jnp.mean(chosen), "sequence")


def adam(parameters, gradients, moments, step, rate=3e-3):
    """One step of Adam (arXiv 1412.6980)."""
    tree = jax.tree.map
    first = tree(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradients)
    second = tree(lambda m, g: 0.99 * m + 0.01 * g * g, moments[1], gradients)

    def moved(p, m, s):
        return p - rate * (m / (1 - 0.9**step)) / (jnp.sqrt(s / (1 - 0.99**step)) + 1e-8)

    return tree(moved, parameters, first, second), (first, second)


def train(args: argparse.Namespace) -> list[float]:
    """Trains on all devices of all processes, and returns the loss of each step."""
    mesh = jax.make_mesh((jax.device_count(),), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    on_mesh = functools.partial(shard_sequence, mesh=mesh, axis_name="sequence")
    text = np.frombuffer(TEXT.read_bytes(), np.uint8).astype(np.int32)
    whole, divided = P(), P(None, "sequence")
    value_and_gradient = jax.shard_map(
        jax.value_and_grad(loss_of),
        mesh=mesh,
        in_specs=(whole, divided, divided, P("sequence")),
        out_specs=(whole, whole),
    )

    @jax.jit
    def step(number, parameters, moments, tokens, labels, positions):
        loss, gradients = value_and_gradient(parameters, tokens, labels, positions)
        return loss, *adam(parameters, gradients, moments, number)

    parameters = jax.device_put(Model().parameters(args.seed), NamedSharding(mesh, whole))
    moments = (jax.tree.map(jnp.zeros_like, parameters),) * 2
    rng, losses = np.random.default_rng(args.seed), []
    for number in range(1, args.steps + 1):
        starts = rng.integers(0, len(text) - args.length, args.batch)
        batch = np.stack([text[s : s + args.length + 1] for s in starts])
        # The label of a token is the token after it, so that both are cut before they are divided.
        tokens, positions = on_mesh(batch[:, :-1], -1)
        labels, _ = on_mesh(batch[:, 1:], -1)
        loss, parameters, moments = step(float(number), parameters, moments, tokens, labels, positions)
        losses.append(float(loss))
        if jax.process_index() == 0 and (number % 10 == 0 or number in (1, args.steps)):
            print(f"step {number}: {losses[-1]:.4f} nats a byte", flush=True)
    return losses


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--length", type=int, default=512, help="bytes; twice the number of devices divides it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses", help="a file for the loss of each step, as JSON")
    parser.add_argument("--distributed", action="store_true", help="several processes, of a known cluster")
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of several processes: where the first one is"
    )
    parser.add_argument("--processes", type=int, metavar="N")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this is")
    args = parser.parse_args()
    if args.distributed or args.coordinator is not None:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    losses = train(args)
    if args.losses is not None and jax.process_index() == 0:
        pathlib.Path(args.losses).write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
