"""The Hopper kernel without a GPU: what it refuses, lowering, and its numbers under the interpreter.

On a JAX older than the kernel needs, every one of these asserts the refusal instead.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import Unsupported, explain, flash_attention
from flash_attention_jax._arguments import normalize
from flash_attention_jax._attend import Call, attend
from flash_attention_jax._dispatch import choose
from flash_attention_jax._impl.base import Device
from flash_attention_jax._impl.hopper import (
    IMPLEMENTATION,
    _backward_configs,
    _configs,
    _dq_configs,
    _refuses,
)
from flash_attention_jax._mask import Cover, Masks, block_map
from flash_attention_jax._problem import Operands, arrange

HERE = pathlib.Path(__file__).parent
NEW = tuple(int(x) for x in re.findall(r"\d+", jax.__version__)[:3]) >= _refuses.NEEDED_JAX
TOO_OLD = f"it needs JAX 0.11.2 or newer, this is {jax.__version__}"
H200 = Device("cuda", "NVIDIA H200")


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def described(q, k, v=None, *, dtype="bfloat16", order="BNTD", segments=None, **options):
    """The problem of a call and its raw operands; shapes stand for q, k and v."""
    arrays = (struct(*x, dtype=dtype) for x in (q, k, k if v is None else v))
    others = {name: options.pop(name) for name in ("bias", "mask", "key_mask", "q_offset") if name in options}
    operands = Operands(*arrays, **others)
    return normalize(operands, segments, order=order, abstract=True, **options)[:2]


PLAIN = dict(q=(2, 4, 256, 64), k=(2, 2, 256, 64))


def refusal(device=H200, **changes):
    return IMPLEMENTATION.refuses(described(**PLAIN | changes)[0], device)


# Refusals.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "it takes bfloat16 and float16, not float32"),
        (
            {"q": (1, 1, 8, 20), "k": (1, 1, 8, 20)},
            "it takes head dims that are multiples of 8 up to 256, not D = 20",
        ),
        (
            {"v": (2, 2, 256, 264)},
            "it takes head dims that are multiples of 8 up to 256, not Dv = 264",
        ),
        ({"bias": struct(256, 256)}, "it takes no bias"),
        ({"mask": struct(256, 256, dtype="bool")}, "it takes no dense mask"),
        ({}, None),
        ({"q": (2, 4, 0, 64)}, None),
    ],
)
def test_refuses_problems_with_the_reason(changes, reason):
    assert refusal(**changes) == (reason if NEW else TOO_OLD)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (Device("cpu", "cpu"), "it runs on CUDA devices of compute capability 9.0, not on cpu"),
        (Device("tpu"), "it runs on CUDA devices of compute capability 9.0, not on tpu"),
        (
            Device("cuda", "NVIDIA A100-SXM4-80GB"),
            "it runs on CUDA devices of compute capability 9.0 (H100, H200), not on NVIDIA A100-SXM4-80GB",
        ),
        (
            Device("cuda", "NVIDIA B200"),
            "it runs on CUDA devices of compute capability 9.0 (H100, H200), not on NVIDIA B200",
        ),
    ],
)
def test_refuses_other_devices(device, reason):
    assert refusal(device) == reason


@pytest.mark.parametrize("kind", [None, "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"])
def test_takes_hopper_devices(kind):
    assert refusal(Device("cuda", kind)) == (None if NEW else TOO_OLD)


def test_an_old_jax_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.11.1.dev3")
    assert refusal() == "it needs JAX 0.11.2 or newer, this is 0.11.1.dev3"
    monkeypatch.setattr(jax, "__version__", "0.12.0.1")
    assert refusal() is None


def test_is_chosen_first_where_the_device_is_known_to_be_hopper():
    problem, _ = described(**PLAIN)
    assert choose(problem, H200, None).name == ("hopper" if NEW else "xla")
    assert choose(problem, Device("cuda", "NVIDIA A100-SXM4-80GB"), None).name == "xla"
    assert choose(described(**PLAIN | {"dtype": "float32"})[0], H200, None).name == "xla"


def test_is_not_chosen_unasked_for_a_device_of_unknown_kind():
    x = struct(8, 4096, 64)
    said = explain(x, x, x, causal=True, platform="cuda")
    assert said.chosen == "xla"
    assert list(said.refusals) == ["hopper", "xla", "reference"]
    unknown = "the cuda device is not here to tell its kind: it runs only when named"
    assert said.refusals["hopper"] == (unknown if NEW else TOO_OLD)


def test_asked_for_on_a_cpu_it_says_why_not():
    x = jnp.ones((2, 16, 8), jnp.bfloat16)
    with pytest.raises(Unsupported, match=r"'hopper' cannot run this problem: it runs on CUDA devices"):
        flash_attention(x, x, x, implementation="hopper")


# Sizes.


@pytest.mark.parametrize("length", [1, 77, 4096])
@pytest.mark.parametrize("causal", [False, True])
def test_every_head_dim_fits_the_multiprocessor(length, causal):
    problem, _ = described((1, 2, length, 8), (1, 1, 4096, 8), causal=causal)
    for D in range(8, 257, 8):
        for Dv in range(8, 257, 8):
            one = dataclasses.replace(problem, D=D, Dv=Dv)
            assert _refuses.of_problem(one) is None
            for dim in (D, Dv):
                of = _configs.chunks(one, dim)
                assert dim <= of.columns < dim + 32
                assert of.width % of.tile == 0
                assert 64 % of.tile == 0


@pytest.mark.parametrize("table", [_configs.REGISTERS, _backward_configs.REGISTERS])
def test_warpgroups_share_the_registers_of_their_launch(table):
    # A thread is launched with a multiple of 8; a kernel that asks for more than those of all waits for ever.
    for consumers, (of_consumer, of_producer) in table.items():
        warpgroups = consumers + 1
        launched = min(2**16 // (128 * warpgroups) // 8 * 8, 255) * warpgroups
        assert consumers * of_consumer + of_producer <= launched
        assert of_consumer % 8 == of_producer % 8 == 0


def test_sizes_that_do_not_fit_are_told():
    problem, _ = described((1, 2, 512, 256), (1, 2, 512, 256))
    fits = _configs.choose_config(problem)
    assert _configs.too_large(problem, fits) is None
    more = _configs.too_large(problem, dataclasses.replace(fits, stages=4))
    assert more == "tiles take 346112 bytes of shared memory, a thread block has 232448"
    wider = _configs.too_large(problem, dataclasses.replace(fits, consumers=1, block_q=128))
    assert wider == "tiles take 408 registers of a thread, it has 240"


@pytest.mark.skipif(not NEW, reason="imports Pallas of a newer JAX")
@pytest.mark.parametrize("columns", [0, 64, 100, 256])
@pytest.mark.parametrize(("dim", "length"), [(256, 512), (256, 500), (80, 512), (40, 300)])
def test_queries_in_registers_and_in_shared_memory_make_all_columns(dim, length, columns):
    from flash_attention_jax._impl.hopper._consumer import parts_of_q

    problem, _ = described((1, 2, length, dim), (1, 2, length, dim))
    of = _configs.chunks(problem, dim)
    config = dataclasses.replace(_configs.choose_config(problem), q_in_registers=columns)
    parts = parts_of_q(of, config)
    taken = [part.chunk * of.width + part.first + i for part in parts for i in range(part.width)]
    assert taken == list(range(of.columns))
    held = sum(part.width for part in parts if part.held)
    assert held == min(columns // of.tile * of.tile, of.columns)
    assert all(part.width % of.tile == 0 for part in parts)


# The order of tiles and the blocks that they visit.

BANDS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (130, 70)},
    "left": {"window": (90, None), "q_offset": 60},
    "far": {"causal": True, "q_offset": -250},
    "beyond": {"window": 3, "q_offset": 5000},
}


def planned(config, blocks=1, **arguments):
    problem, operands = described(**arguments)
    if not NEW:
        assert IMPLEMENTATION.refuses(problem, H200) == TOO_OLD
        return None
    module = importlib.import_module("flash_attention_jax._impl.hopper._blocks")
    return problem, operands, module, module.Plan(problem, config, blocks)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("section", [None, 1, 4])
def test_every_tile_is_taken_once(scheduled, section):
    config = _configs.Config(section=section, persistent=scheduled)
    arguments = dict(q=(3, 2, 700, 16), k=(3, 1, 700, 16), causal=True)
    found = planned(config, blocks=5, **arguments)
    if found is None:
        return
    _, _, module, plan = found
    schedule = importlib.import_module("flash_attention_jax._impl.hopper._schedule").schedule(plan)
    assert (schedule is not None) == scheduled
    tables = module.Tables(schedule=None if schedule is None else jnp.asarray(schedule))
    taken, costs = [], []
    for block in range(5):
        rounds = int(plan.rounds(tables, jnp.int32(block)))
        tiles = jax.vmap(lambda n, block=block: plan.tile(tables, jnp.int32(block), n))(
            jnp.arange(rounds, dtype=jnp.int32)
        )
        own = list(zip(*(np.asarray(x).tolist() for x in tiles), strict=True))
        costs.append(sum(row + 1 for _, _, row in own))
        taken += own
    assert sorted(taken) == [(b, n, t) for b in range(3) for n in range(2) for t in range(plan.tiles_t)]
    if section is None:
        assert taken[0][2] == plan.tiles_t - 1
    if scheduled:
        assert min(costs) > 0.8 * max(costs)


# Batch, length, heads and head dim.
@pytest.mark.parametrize(
    "sizes", [(1, 16384, 32, 64), (4, 4096, 16, 128), (8, 2048, 16, 128), (32, 512, 16, 128)]
)
def test_thread_blocks_end_together(sizes):
    B, T, N, D = sizes
    problem, _ = described((B, N, T, D), (B, N, T, D), causal=True)
    config = dataclasses.replace(_configs.choose_config(problem), persistent=True)
    found = planned(config, blocks=132, q=(B, N, T, D), k=(B, N, T, D), causal=True)
    if found is None:
        return
    plan, schedule = found[-1], importlib.import_module("flash_attention_jax._impl.hopper._schedule").schedule
    starts, tiles = np.split(schedule(plan), [133])
    # Keys that are seen: of all tiles the last row sees the most.
    costs = [(int(plan.place(int(tile))[2]) + 1) * config.tile_q for tile in tiles]
    each = np.add.reduceat(costs, starts[:-1])
    assert each.max() < 1.04 * each.mean()


@pytest.mark.parametrize(
    ("T", "G", "options", "blocks"),
    [(512, 1, {}, 2), (300, 1, {}, 1), (300, 2, {}, 2), (512, 1, {"causal": True}, 1)],
)
def test_clusters_have_tiles_that_see_the_same_keys(T, G, options, blocks):
    problem, _ = described((1, 2 * G, T, 128), (1, 2, T, 128), **options)
    config = _configs.choose_config(problem)
    assert config.cluster == blocks
    assert config.launched(G * 2 * -(-T // 128), 5) == (4 if blocks == 2 else 5)
    # The backward pass divides keys, of each key head alone.
    assert _backward_configs.choose_backward_config(problem).cluster == (1 if T == 300 else blocks)


@pytest.mark.parametrize(("T", "stay"), [(4096, True), (8192, True), (16384, False)])
def test_long_causal_tiles_are_given_out_by_the_device(T, stay):
    problem, _ = described((1, 2, T, 128), (1, 2, T, 128), causal=True)
    assert _configs.choose_config(problem).persistent is stay


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 0)}])
def test_thread_blocks_make_room_for_transfers(options):
    problem, _ = described(**PLAIN, **options)
    choices = (
        _configs.choose_config,
        _backward_configs.choose_backward_config,
        _dq_configs.choose_dq_config,
    )
    for choose_sizes in choices:
        assert not choose_sizes(dataclasses.replace(problem, amid_transfers=True)).persistent
    assert _configs.choose_config(problem).persistent


@pytest.mark.parametrize("name", BANDS)
def test_visits_are_those_of_the_block_map(name):
    config = _configs.Config(block_kv=64, consumers=2)
    found = planned(config, q=(1, 1, 500, 16), k=(1, 1, 333, 16), **BANDS[name])
    if found is None:
        return
    problem, _, module, plan = found
    cover = np.asarray(block_map(problem, Masks(), config.tile_q, config.block_kv))[0]
    every = -(-problem.S // config.block_kv)
    # Where nothing is hidden, the map has no rows of its own.
    cover = np.broadcast_to(cover, (plan.tiles_t, every)).copy()
    short = cover[:, -1] == Cover.ALL
    cover[short, -1] = Cover.PART
    for row in range(plan.tiles_t):
        visits = plan.visits(module.Tables(), jnp.int32(0), jnp.int32(row))
        partial, seen = int(visits.partial), int(visits.seen)
        order = [int(visits.index(jnp.int32(i))) for i in range(seen)]
        assert sorted(order[:partial]) == np.flatnonzero(cover[row] == Cover.PART).tolist()
        assert sorted(order[partial:]) == np.flatnonzero(cover[row] == Cover.ALL).tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_segment_ids_keep_their_differences(dtype):
    config = _configs.Config(block_kv=64, consumers=1)
    info = np.iinfo(dtype)
    ids = np.array([info.max, 3, info.min, 7, info.max, 5], dtype)
    keys = np.array([info.max, 4, info.min, info.max - 1, 5], dtype)
    with jax.enable_x64(True):
        pair = jnp.asarray(ids)[None], jnp.asarray(keys)[None]
        given = dict(q=(1, 1, 6, 16), k=(1, 1, 5, 16), segments=pair)
        found = planned(config, **given)
        if found is None:
            return
        problem, operands, module, _ = found
        tables = module.tables(problem, operands, config)
    mine, theirs = tables.q_segments[0, :6], tables.kv_segments[0, :5]
    assert mine.dtype == theirs.dtype == jnp.int32
    np.testing.assert_array_equal(mine[:, None] == theirs[None, :], ids[:, None] == keys[None, :])


# Lowering.

LOWERED = {
    "64": dict(q=(1, 4, 512, 64), k=(1, 4, 512, 64)),
    "128-causal": dict(q=(1, 4, 512, 128), k=(1, 2, 512, 128), causal=True),
    "192-and-128": dict(q=(1, 4, 512, 192), k=(1, 2, 512, 192), v=(1, 2, 512, 128), causal=True),
    "256-causal": dict(q=(1, 4, 512, 256), k=(1, 4, 512, 256), causal=True, dtype="float16"),
    "8": dict(q=(1, 4, 77, 8), k=(1, 4, 99, 8), v=(1, 4, 99, 16)),
    "24": dict(q=(1, 4, 77, 24), k=(1, 4, 99, 24), v=(1, 4, 99, 40)),
    "80": dict(q=(1, 4, 512, 80), k=(1, 4, 512, 80), causal=True),
    "104": dict(q=(1, 4, 512, 104), k=(1, 1, 512, 104), v=(1, 1, 512, 8), dtype="float16"),
    "200": dict(q=(1, 4, 77, 200), k=(1, 2, 99, 200), v=(1, 2, 99, 248), causal=True),
    "ragged-64": dict(q=(1, 4, 509, 64), k=(1, 2, 511, 64)),
    "ragged-256": dict(q=(1, 4, 509, 256), k=(1, 2, 511, 256)),
    "one-query": dict(q=(3, 4, 1, 128), k=(3, 2, 777, 128), causal=True),
    "BTND": dict(q=(2, 512, 8, 64), k=(2, 512, 2, 64), order="BTND", causal=True),
    "BTND-ragged": dict(q=(2, 77, 8, 96), k=(2, 99, 2, 96), order="BTND", causal=True),
    "window": dict(q=(1, 4, 512, 128), k=(1, 2, 512, 128), window=(100, 20), softcap=30.0),
    "offset": dict(q=(2, 4, 512, 64), k=(2, 2, 512, 64), causal=True, q_offset=struct(2, dtype="int32")),
    "key-mask": dict(
        q=(2, 4, 512, 128), k=(2, 2, 500, 128), key_mask=struct(2, 500, dtype="bool"), scale=-1.0
    ),
    "segments": dict(
        q=(2, 4, 512, 64),
        k=(2, 2, 512, 64),
        segments=struct(2, 512, dtype="int32"),
        key_mask=struct(512, dtype="bool"),
        q_offset=struct(1, dtype="int32"),
        window=(300, 0),
    ),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    problem, operands = described(**LOWERED[name])

    def f(*arrays):
        given = arrange(problem, Operands.given(problem, arrays))
        return attend(Call(problem, "hopper"), given)

    traced = jax.jit(f).trace(*operands.present())
    if not NEW:
        with pytest.raises(Unsupported, match=re.escape(TOO_OLD)):
            traced.lower(lowering_platforms=("cuda",))
        return
    shown = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in shown
    assert "flash_attention_hopper_forward" in shown
    # Neither the lengths nor the head dims are padded, and nothing is transposed.
    assert not re.search(r"stablehlo\.(pad|transpose)[^\n]*x(bf16|f16)>", shown)


VARIANTS = {
    "one-by-one": dict(overlap=False),
    "turns": dict(pingpong=True),
    "grid": dict(persistent=False),
    "three": dict(consumers=3, block_kv=64, out_slots=1),
    "two-row-groups": dict(block_q=128, block_kv=64, consumers=2, out_slots=1),
    "lane": dict(lane=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_choice_of_sizes_lowers(name):
    problem, operands = described((1, 2, 512, 64), (1, 2, 512, 64), causal=True)
    if not NEW:
        assert IMPLEMENTATION.refuses(problem, H200) == TOO_OLD
        return
    module = importlib.import_module("flash_attention_jax._impl.hopper._forward")
    config = dataclasses.replace(_configs.choose_config(problem), **VARIANTS[name])
    assert _configs.too_large(problem, config) is None

    def f(*arrays):
        return module.forward(problem, arrange(problem, Operands(*arrays)), H200, config=config)

    traced = jax.jit(f).trace(*operands.present())
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_gradients_lower_beside_it():
    x = struct(2, 256, 64)

    def loss(q, k, v):
        out, lse = flash_attention(q, k, v, causal=True, implementation="hopper")
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x)
    if NEW:
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
        return
    with pytest.raises(Unsupported, match=re.escape(TOO_OLD)):
        traced.lower(lowering_platforms=("cuda",))


# Numbers.

INTERPRETED = [
    "plain",
    "cluster",
    "ragged",
    "three-consumers",
    "one-by-one",
    "window",
    "offsets",
    "key-mask",
    "segments",
    "hidden-nan",
]


def interpret(script, names):
    """Errors, budgets and races by case."""
    if not NEW:
        return None
    # XLA on the CPU has as many threads as this says.
    environment = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(HERE / script), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


def assert_right_and_without_races(interpreted, name, quantities):
    if interpreted is None:
        assert refusal() == TOO_OLD
        return
    assert set(interpreted[name]["verdicts"]) == quantities
    for quantity, (error, budget) in interpreted[name]["verdicts"].items():
        assert error <= budget, quantity
    assert interpreted[name]["races"] is False


@pytest.fixture(scope="module")
def interpreted():
    return interpret("hopper_interpreted.py", INTERPRETED)


@pytest.mark.parametrize("name", INTERPRETED)
def test_is_within_its_budget_and_without_races(interpreted, name):
    assert_right_and_without_races(interpreted, name, {"out", "lse"})


@pytest.mark.parametrize("name", ["key-mask", "hidden-nan"])
def test_what_is_hidden_changes_no_bit(interpreted, name):
    if interpreted is None:
        assert refusal() == TOO_OLD
        return
    assert interpreted[name]["same_bits"] is True


def test_importing_imports_no_kernel_toolchain():
    code = (
        "import sys, flash_attention_jax._impl.hopper; "
        "print([m for m in sys.modules if 'jax.experimental.pallas' in m or 'jax.experimental.mosaic' in m])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent
    )
    assert shown.stdout.strip() == "[]"
