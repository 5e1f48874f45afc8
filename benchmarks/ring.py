"""Attention over the devices of one machine beside one device: right? how fast? do transfers overlap?

    python benchmarks/ring.py export FOLDER --devices 2   # needs no GPU
    python benchmarks/ring.py run FOLDER                  # on a machine with so many GPUs

bfloat16, 16 heads of 128. Every way is compared with one device at 8192 tokens. A sequence of T over N is
timed beside one of T / N on one device, as `python -m flash_attention_jax bench --devices` does for other
problems. A profile says how long transfers took, and how much of that was under attention.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import json
import pathlib
import statistics
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exported import group, load, save
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from flash_attention_jax import flash_attention
from flash_attention_jax.distributed import ring_attention, shard_sequence, unshard_sequence

HEADS, DIM, SMALL = 16, 128, 8192
# Layout, strategy and whether causal, by name.
WAYS = {
    "zigzag ring, causal": ("zigzag", "ring", True),
    "contiguous ring, causal": ("contiguous", "ring", True),
    "ring, full": ("contiguous", "ring", False),
    "all_to_all, causal": ("contiguous", "all_to_all", True),
    "all_gather, causal": ("contiguous", "all_gather", True),
}
ONE = {"one device, causal": True, "one device, full": False}
FACTORS = {"forward": 1.0, "forward+backward": 3.5}
ROUNDS = 4


def mesh_of(devices: int) -> Any:
    """The devices in a row."""
    return jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def divided(mesh: Any) -> NamedSharding:
    """Of all arrays: (1, heads, T, dim) with T divided."""
    return NamedSharding(mesh, PartitionSpec(None, None, "x"))


def function(way: str, mode: str, mesh: Any) -> Any:
    """What is measured, of q, k, v and the cotangent of out."""

    def out(q, k, v):
        if way in ONE:
            return flash_attention(q, k, v, causal=ONE[way], implementation="hopper").out
        layout, strategy, causal = WAYS[way]
        how = {"mesh": mesh, "layout": layout, "strategy": strategy}
        return ring_attention(q, k, v, causal=causal, implementation="hopper", **how).out

    if mode == "forward":
        return lambda q, k, v, dout: out(q, k, v)
    return lambda q, k, v, dout: jax.vjp(out, q, k, v)[1](dout)


def shapes(way: str, length: int, mesh: Any) -> list[Any]:
    """Of the four arrays."""
    place = SingleDeviceSharding(jax.devices()[0]) if way in ONE else divided(mesh)
    return [jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.bfloat16, sharding=place)] * 4


def export(folder: pathlib.Path, devices: int, lengths: list[int]) -> None:
    """Lowers all programs."""
    mesh = mesh_of(devices)
    for whole in (SMALL, *lengths):
        for way in (*ONE, *WAYS):
            for mode in FACTORS:
                length = whole // devices if way in ONE and whole != SMALL else whole
                label = {"devices": devices, "whole": whole, "length": length, "way": way, "mode": mode}
                jitted = jax.jit(
                    function(way, mode, mesh), out_shardings=None if way in ONE else divided(mesh)
                )
                save(folder, label, jitted, *shapes(way, length, mesh))


def drawn(way: str, length: int, mesh: Any) -> tuple[Any, ...]:
    """Random arrays, where they belong."""
    place = shapes(way, length, mesh)[0].sharding

    def draw():
        keys = jax.random.split(jax.random.key(0), 4)
        return tuple(jax.random.normal(key, (1, HEADS, length, DIM), jnp.bfloat16) for key in keys)

    return jax.jit(draw, out_shardings=place)()


def compared(programs: dict[Any, Any], mesh: Any) -> dict[str, list[float]]:
    """The largest difference from one device for each result, over the largest number in it."""
    arrays, found = drawn("one device, full", SMALL, mesh), {}
    for way, (layout, _, causal) in WAYS.items():
        one = next(name for name, is_causal in ONE.items() if is_causal == causal)
        placed = [shard_sequence(x, mesh=mesh, layout=layout).array for x in arrays]
        for mode in FACTORS:
            errors = []
            for x, y in zip(
                jax.tree.leaves(programs[SMALL, way, mode](*placed)),
                jax.tree.leaves(programs[SMALL, one, mode](*arrays)),
                strict=True,
            ):
                actual = np.asarray(unshard_sequence(x, mesh=mesh, layout=layout), np.float32)
                right = np.asarray(y, np.float32)
                errors.append(float(np.abs(actual - right).max() / np.abs(right).max()))
            found[f"{way}, {mode}"] = errors
    return found


def timed(programs: dict[Any, Any], whole: int, mode: str, causal: bool, mesh: Any) -> list[dict[str, Any]]:
    """All ways of a problem in turns: milliseconds, TFLOP/s, and the share of as many single devices."""
    ways = [name for name, is_causal in ONE.items() if is_causal == causal]
    ways += [name for name, (*_, is_causal) in WAYS.items() if is_causal == causal]
    lengths = {way: whole // mesh.size if way in ONE else whole for way in ways}
    arrays = {way in ONE: drawn(way, lengths[way], mesh) for way in ways[:2]}
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way in ways[:: -1 if turn % 2 else 1]:
            samples[way].append(group(programs[whole, way, mode], arrays[way in ONE], 2 if turn else 1))
    rows = []
    for way in ways:
        length, taken = lengths[way], statistics.median(samples[way][1:])
        pairs = length * (length + 1) / 2 if causal else length**2
        rate = FACTORS[mode] * 4 * DIM * HEADS * pairs / taken / 1e12
        rows.append({"T": whole, "mode": mode, "way": way, "ms": 1e3 * taken, "tflops": rate})
    for row in rows:
        row["share"] = row["tflops"] / rows[0]["tflops"] / (1 if row["way"] in ONE else mesh.size)
    return rows


def profiled(program: Any, arrays: Any) -> dict[str, list[float]]:
    """Milliseconds by device: the whole, attention, transfers, and transfers under attention."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            group(program, arrays, 1)
        (path,) = glob.glob(f"{folder}/plugins/profile/*/*.trace.json.gz")
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    found = {}
    for number, name in names.items():
        own = [e for e in events if e.get("ph") == "X" and e["pid"] == number]
        own = [e for e in own if "Stream" in threads.get((number, e["tid"]), "")]
        if "GPU" not in name or not own:
            continue
        spans = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in own]
        work = [(a, b) for kernel, a, b in spans if "flash_attention" in kernel]
        sent = [(a, b) for kernel, a, b in spans if "nccl" in kernel.lower() or "P2P" in kernel]
        under = sum(max(0.0, min(b, d) - max(a, c)) for a, b in sent for c, d in work)
        whole = max(b for _, _, b in spans) - min(a for _, a, _ in spans)
        sums = [whole, sum(b - a for a, b in work), sum(b - a for a, b in sent), under]
        found[name] = [round(x / 1e3, 3) for x in sums]
    return found


def run(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Compiles all programs, then compares, times and profiles them."""

    def how(label):
        of = shapes(label["way"], label["length"], mesh_of(label["devices"]))
        return {"shapes": of, "out_shardings": of[0].sharding}

    kept = load(folder, how)
    mesh = mesh_of(kept[0][0]["devices"])
    programs = {(x["whole"], x["way"], x["mode"]): program for x, program in kept}
    document: dict[str, Any] = {"device": jax.devices()[0].device_kind, "devices": mesh.size, "rows": []}
    document |= {"jax": jax.__version__, "differences": compared(programs, mesh), "profiles": {}}
    print(document["differences"], flush=True)
    for whole in dict.fromkeys(x["whole"] for x, _ in kept if x["whole"] != SMALL):
        for mode in FACTORS:
            for causal in (True, False):
                rows = timed(programs, whole, mode, causal, mesh)
                print(*rows, sep="\n", flush=True)
                document["rows"] += rows
            for way in ("zigzag ring, causal", "ring, full"):
                profile = profiled(programs[whole, way, mode], drawn(way, whole, mesh))
                print(whole, mode, way, profile, flush=True)
                document["profiles"][f"{whole}, {mode}, {way}"] = profile
        out.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("export", "run"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--lengths", default="131072,262144", help="of whole sequences, for export")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("ring.json"))
    args = parser.parse_args()
    if args.what == "run":
        run(args.folder, args.out)
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    export(args.folder, args.devices, [int(x) for x in args.lengths.split(",")])


if __name__ == "__main__":
    main()
