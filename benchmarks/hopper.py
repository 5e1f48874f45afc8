"""The Hopper kernels on a GPU: every configuration against the oracle, many variants beside cuDNN.

python benchmarks/hopper.py --out benchmarks/results/hopper.json     # one run, under 8 minutes
python benchmarks/hopper.py --backward --out benchmarks/results/hopper-backward.json

Work is done by a process of its own, which is ended and begun again without the culprit when a kernel does
not return. Results are kept as they come; a variant that fails is noted and passed over.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from typing import Any

import exported
import hopper_backward
from hopper_cases import BACKWARD_CHECKS, CHECKS, SHAPES, backward_jobs, jobs

# How often each time is taken, one job after the other; the median counts.
ROUNDS = 3

# The worker.


@dataclasses.dataclass
class Inputs:
    """A problem and its canonical operands, in the memory order of jax.nn."""

    problem: Any
    operands: Any
    causal: bool
    window: Any


def inputs(shape: tuple[Any, ...], dtype: str, abstract: bool = False) -> Inputs:
    """Random operands of a problem, or their shapes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flash_attention_jax._arguments import normalize
    from flash_attention_jax._problem import Operands, arrange

    B, T, S, N, K, D, Dv, given = shape
    options = dict(given)
    rng = np.random.default_rng(0)
    sizes = (B, T, N, D), (B, S, K, D), (B, S, K, Dv)
    if abstract:
        arrays: list[Any] = [jax.ShapeDtypeStruct(x, dtype) for x in sizes]
    else:
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = [jax.random.normal(key, x, dtype) for key, x in zip(keys, sizes, strict=True)]
    mask = options.pop("key_mask", None)
    if mask == "half":
        mask = jnp.broadcast_to(jnp.arange(S) < S // 2, (B, S))
    elif mask == "random":
        mask = jnp.asarray(rng.random((B, S)) < 0.6)
    offset = options.pop("q_offset", None)
    offset = None if offset is None else jnp.asarray(offset, jnp.int32)
    segments = options.pop("segments", None)
    if segments is not None:
        ends = np.sort(rng.integers(1, T, (B, segments - 1)))
        segments = jnp.asarray((np.arange(T)[None, :, None] >= ends[:, None, :]).sum(-1), jnp.int32)
    if options.pop("poison", False) and not abstract:
        arrays[1:] = [jnp.where(mask[:, :, None, None], x, jnp.nan).astype(dtype) for x in arrays[1:]]
    operands = Operands(*arrays, key_mask=mask, q_offset=offset)
    problem, operands, _ = normalize(operands, segments, order="BTND", abstract=abstract, **options)

    def arranged(operands):
        return arrange(problem, operands)

    operands = jax.eval_shape(arranged, operands) if abstract else arranged(operands)
    return Inputs(problem, operands, options.get("causal", False), options.get("window"))


def given_of(job: dict[str, Any], abstract: bool = False) -> Inputs:
    """The inputs of a job."""
    table = CHECKS | BACKWARD_CHECKS if job["kind"] == "check" else SHAPES
    return inputs(table[job["shape"]], job.get("dtype", "bfloat16"), abstract)


def lowered(job: dict[str, Any]) -> bytes | str:
    """A job's program, lowered for CUDA in a process that has no GPU; or why it has none."""
    import jax

    try:
        given = given_of(job, abstract=True)
        return exported.serialized(jax.jit(function(job, given)), shapes_of(job, given))
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[:600]


def visible_pairs(given: Inputs) -> int:
    """Of one head, summed over the batch."""
    import numpy as np

    p = given.problem
    rows = np.arange(p.T)
    low, high = np.zeros(p.T, np.int64), np.full(p.T, p.S)
    if p.left is not None:
        low = np.clip(rows + p.q_offset - p.left, 0, p.S)
    if p.right is not None:
        high = np.clip(rows + p.q_offset + p.right + 1, 0, p.S)
    if given.operands.q_segments is not None:
        ids = np.asarray(given.operands.q_segments)
        starts = np.stack([np.searchsorted(line, line) for line in ids])
        return int((high[None] - np.maximum(low[None], starts)).sum()) * (p.B // ids.shape[0])
    if given.operands.key_mask is not None:
        return p.B * p.T * int(np.asarray(given.operands.key_mask)[0].sum())
    return p.B * int(np.maximum(high - low, 0).sum())


def function(job: dict[str, Any], given: Inputs) -> Any:
    """What a job runs on `arrays_of` it."""
    if job.get("backward"):
        return hopper_backward.function(job, given)
    import jax

    from flash_attention_jax._impl.base import Device
    from flash_attention_jax._impl.hopper import _configs, _forward
    from flash_attention_jax._problem import Operands

    p = given.problem
    if job["kind"] == "cudnn":
        if p.key_mask or p.segments:
            raise ValueError("its mask would be dense here")
        window = None if given.window is None else given.window

        def peer(q, k, v):
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=given.causal, local_window_size=window, implementation="cudnn"
            )

        return peer
    config = dataclasses.replace(_configs.choose_config(p), **job.get("change", {}))
    reason = _configs.too_large(p, config)
    if reason is not None:
        raise ValueError(reason)
    device = Device("cuda", "NVIDIA H100")

    def ours(*arrays):
        return _forward.forward(p, Operands.given(p, arrays), device, config=config)

    return ours


def arrays_of(job: dict[str, Any], given: Inputs) -> tuple[Any, ...]:
    """What a job's function takes: the present operands, for the backward pass with cotangents."""
    return hopper_backward.arrays(given) if job.get("backward") else given.operands.present()


def shapes_of(job: dict[str, Any], given: Inputs) -> tuple[Any, ...]:
    """The shapes of `arrays_of`."""
    import jax

    def arrays(operands):
        return arrays_of(job, dataclasses.replace(given, operands=operands))

    return jax.eval_shape(arrays, given.operands)


def timed(job: dict[str, Any], given: Inputs, compiled: Any) -> dict[str, Any]:
    """Seconds, TFLOP/s of the visible pairs, and whether a second run has the same bits."""
    import numpy as np

    arrays = arrays_of(job, given)
    taken = exported.seconds(compiled, arrays)
    p = given.problem
    flops = 2 * p.N * (p.D + p.Dv) * visible_pairs(given)
    if job.get("backward"):
        flops = hopper_backward.flops(given, visible_pairs(given), job)
    result = {"ms": taken * 1e3, "tflops": flops / taken / 1e12}
    if job["kind"] == "time":
        runs = [np.asarray(compiled(*arrays)[0][:1, :512]).view(np.uint16) for _ in range(2)]
        result["same_bits"] = bool(np.array_equal(*runs))
    return result


def checked(job: dict[str, Any], given: Inputs, compiled: Any) -> dict[str, Any]:
    """Errors of out and lse and their budgets: as `flash_attention_jax.testing` has them, of one draw."""
    if job.get("backward"):
        return hopper_backward.checked(given, compiled)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flash_attention_jax._impl.reference import dense
    from flash_attention_jax._problem import Operands
    from flash_attention_jax.testing import error

    p = given.problem
    actual = compiled(*given.operands.present())
    host = [np.asarray(x) for x in given.operands.present()]
    with jax.default_device(jax.devices("cpu")[0]):
        plain = dense(p, Operands.given(p, [jnp.asarray(x) for x in host]))
        with jax.enable_x64(True):
            exact = dense(
                dataclasses.replace(p, dtype="float64"), Operands.given(p, [jnp.asarray(x) for x in host])
            )
    result: dict[str, Any] = {"within": True}
    for name, x, y, z, dtype in zip(("out", "lse"), actual, plain, exact, (p.dtype, "float32"), strict=True):
        x, y, z = (np.asarray(a, np.float64) for a in (x, y, z))
        finite = np.abs(z[np.isfinite(z)]).max(initial=0.0)
        found, budget = error(x, z), 2 * error(y, z) + float(jnp.finfo(dtype).eps) * float(finite)
        result[name] = [found if np.isfinite(found) else None, budget]
        result["within"] &= found <= budget
    return result


_SPEAKING = threading.Lock()


def without_gpu() -> None:
    """Keeps a process that only lowers off the GPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"


def say(**event: Any) -> None:
    """One line to the parent."""
    with _SPEAKING:
        print("EVENT " + json.dumps(event), flush=True)


def work(todo: list[dict[str, Any]], threads: int) -> None:
    """Compiles a batch of jobs side by side, then runs and measures one after the other."""
    import jax

    # For its side effect: it tells XLA where the library is that compiled kernels call.
    import jax.experimental.mosaic.gpu

    # Before threads do.
    import flash_attention_jax._impl.hopper._backward
    import flash_attention_jax._impl.hopper._forward
    import flash_attention_jax.testing  # noqa: F401

    shared: dict[tuple[str, str, str], Inputs] = {}
    spawn = multiprocessing.get_context("spawn")
    lowering = concurrent.futures.ProcessPoolExecutor(threads, spawn, initializer=without_gpu)
    ours = [job for job in todo if job["kind"] != "cudnn"]
    programs = {job["id"]: lowering.submit(lowered, job) for job in ours}

    def inputs_of(job):
        kind, dtype = ("check" if job["kind"] == "check" else "shape"), job.get("dtype", "bfloat16")
        key = (kind, job["shape"], dtype)
        if key not in shared:
            shared[key] = given_of(job)
        return shared[key]

    def compiled_of(job):
        try:
            if job["kind"] == "cudnn":
                given = given_of(job, abstract=True)
                return jax.jit(function(job, given)).lower(*shapes_of(job, given)).compile()
            program = programs[job["id"]].result()
            if isinstance(program, str):
                raise ValueError(program)
            return exported.compiled(program)
        except Exception as problem:
            say(failed=job["id"], why=f"{type(problem).__name__}: {problem}"[:600])
            return None

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        compiled = dict(zip((job["id"] for job in todo), pool.map(compiled_of, todo), strict=True))
    lowering.shutdown()
    found: dict[int, list[dict[str, Any]]] = {}
    for turn in range(ROUNDS):
        for job in todo:
            number, check = job["id"], job["kind"] == "check"
            if compiled[number] is None or (check and turn):
                continue
            say(began=number)
            try:
                measure = checked if check else timed
                found.setdefault(number, []).append(measure(job, inputs_of(job), compiled[number]))
            except Exception as problem:
                compiled[number] = None
                say(failed=number, why=f"{type(problem).__name__}: {problem}"[:600])
                continue
            last = check or turn == ROUNDS - 1
            say(**{"done" if last else "pause": number}, result=middle(found[number]))
            if check:
                shared.clear()


def middle(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of the round whose time is the median."""
    return sorted(results, key=lambda result: result.get("ms", 0))[len(results) // 2]


# The parent.


class Run:
    """The results so far, kept in a file."""

    def __init__(self, todo: list[dict[str, Any]], out: pathlib.Path, budget: float, patience: float):
        self.out, self.patience = out, patience
        self.begun = time.monotonic()
        self.deadline = self.begun + budget
        self.jobs = {job["id"]: job for job in todo}
        self.left = list(self.jobs)
        self.results: list[dict[str, Any]] = []
        self.machine: dict[str, Any] = {}

    def finish(self, number: int, **result: Any) -> None:
        """Notes the result of a job and keeps all of them."""
        if number not in self.left:
            return
        self.left.remove(number)
        job = self.jobs[number]
        self.results.append({**job, **result})
        print(
            f"{time.monotonic() - self.begun:5.0f} {job['kind']:6} {job['shape']:20} "
            f"{job.get('change', job.get('dtype', ''))!s:60} {result}",
            flush=True,
        )
        self.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": self.machine, "results": self.results, "not_reached": len(self.left)}
        self.out.write_text(json.dumps(document, indent=1) + "\n")

    def all(self) -> None:
        """Runs workers until nothing or no time is left."""
        suspects: list[int] = []
        while self.left and time.monotonic() < self.deadline:
            alone = bool(suspects)
            todo, before = suspects or self.left, len(self.left)
            running = self._worker([self.jobs[n] for n in todo], 1 if alone else 16)
            if alone and running:
                self.finish(running[0], error="did not return")
            suspects = [n for n in running if n in self.left] if not alone else []
            if not alone and not running and len(self.left) == before:
                print("the worker ends without a word", flush=True)
                break

    def _worker(self, todo: list[dict[str, Any]], threads: int) -> list[int]:
        """Runs one worker; the jobs that were running when it fell silent."""
        command = [sys.executable, __file__, "--worker", str(threads)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process.stdin.write(json.dumps(todo))
        process.stdin.close()
        lines: queue.Queue[str | None] = queue.Queue()

        def read():
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        running: list[int] = []
        silent = True
        while True:
            try:
                # To begin takes longer than any job.
                patience = self.patience * (3 if silent else 1)
                wait = min(patience, self.deadline - time.monotonic())
                line = lines.get(timeout=max(0.1, wait))
            except queue.Empty:
                process.kill()
                process.wait()
                return running if time.monotonic() < self.deadline else []
            if line is None:
                process.wait()
                # A worker that died takes with it what it was at.
                return running if process.returncode else []
            if not line.startswith("EVENT "):
                continue
            silent = False
            self._take(json.loads(line[6:]), running)

    def _take(self, event: dict[str, Any], running: list[int]) -> None:
        if "machine" in event:
            self.machine = event["machine"]
        if "began" in event:
            running.append(event["began"])
        for name in ("failed", "done", "pause"):
            if event.get(name) in running:
                running.remove(event[name])
        if "failed" in event:
            self.finish(event["failed"], error=event["why"])
        if "done" in event:
            self.finish(event["done"], **event["result"])


def summary(results: list[dict[str, Any]]) -> None:
    """The table: each shape's best variant over cuDNN."""
    judged = [r for r in results if r["kind"] == "check"]
    wrong = [r["shape"] for r in judged if not r.get("within")]
    print(f"\nchecks: {len(judged) - len(wrong)} of {len(judged)} within their budgets; not: {wrong}")
    for name in SHAPES:
        own = [r for r in results if r["shape"] == name and r["kind"] == "time" and "tflops" in r]
        alone = [r for r in own if r.get("alone")]
        own = [r for r in own if not r.get("alone")]
        forms = [r for r in own if r.get("form")]
        own = [r for r in own if not r.get("form")]
        peer = [r["tflops"] for r in results if r["shape"] == name and r["kind"] == "cudnn" and "tflops" in r]
        if forms:
            beside = own[0]["tflops"] if own else float("nan")
            ratio = forms[0]["tflops"] / beside
            print(f"{name:16} deterministic {forms[0]['tflops']:.1f} ({ratio:.3f} of the default)")
        if not own:
            print(f"{name:16} no figure")
            continue
        table = next((r["tflops"] for r in own if not r["change"]), float("nan"))
        best = max(own, key=lambda r: r["tflops"])
        beside = peer[0] if peer else float("nan")
        print(
            f"{name:16} table {table:6.1f} ({table / beside:.3f} of cuDNN {beside:6.1f}), "
            f"best {best['tflops']:6.1f} ({best['tflops'] / beside:.3f}) {best['change']}"
        )
        if alone:
            best = max(alone, key=lambda r: r["tflops"])
            print(f"{'':16} backward alone: best {best['tflops']:6.1f} {best['ms']:.3f} ms {best['change']}")


def tags(job: dict[str, Any]) -> set[str]:
    """What `--only` selects a job by: kind, shape, form; "table" for what is compared with cuDNN."""
    form = job.get("form", "fused") if job.get("backward") else ""
    found = {job["kind"], job["shape"], form}
    if job.get("alone"):
        found |= {"alone", f"alone-{form}"}
    elif job["kind"] != "check" and not job.get("change"):
        found.add("table")
    return found


def main() -> None:
    """Runs everything, or with `--worker` what the parent asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("hopper.json"))
    parser.add_argument("--seconds", type=float, default=450, help="stop after this time")
    parser.add_argument("--patience", type=float, default=75, help="seconds without news that mean a hang")
    parser.add_argument("--backward", action="store_true", help="the backward kernel instead of the forward")
    parser.add_argument("--unchecked", action="store_true", help="leave out the checks against the oracle")
    parser.add_argument(
        "--only", default="", help="kinds, shapes or forms of jobs by comma, or table, alone; all by default"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is None:
        only = set(filter(None, args.only.split(",")))
        todo = backward_jobs() if args.backward else jobs()
        todo = [job for job in todo if not only or only & tags(job)]
        todo = [job for job in todo if job["kind"] != "check" or not args.unchecked]
        run = Run(todo, args.out, args.seconds, args.patience)
        run.all()
        summary(run.results)
        return
    todo = json.loads(sys.stdin.read())
    import jax

    device = jax.devices()[0]
    say(machine={"device": device.device_kind, "jax": jax.__version__, "python": sys.version.split()[0]})
    work(todo, args.worker)


if __name__ == "__main__":
    main()
