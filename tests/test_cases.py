"""Every implementation over the table of cases, against the oracle and its error budget."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import Unsupported, flash_attention
from flash_attention_jax._api import attention_and_lse
from flash_attention_jax._arguments import normalize
from flash_attention_jax._dispatch import IMPLEMENTATIONS, device_of
from flash_attention_jax._problem import Operands
from flash_attention_jax.testing import CASES, error, exact, judge, judge_implementation


def refusal(implementation, case):
    with jax.enable_x64(case.dtype == "float64"):
        arguments = case.arguments()
        operands = Operands(**{n: arguments.pop(n) for n in Operands._fields if n in arguments})
        problem, _, _ = normalize(operands, arguments.pop("segment_ids", None), **arguments)
        return IMPLEMENTATIONS[implementation].refuses(problem, device_of("cpu"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_implementation_is_within_its_budget(case):
    for implementation in IMPLEMENTATIONS:
        reason = refusal(implementation, case)
        if reason is not None:
            arguments = case.arguments()
            with jax.enable_x64(case.dtype == "float64"), pytest.raises(Unsupported, match=reason):
                flash_attention(**arguments, implementation=implementation)
            continue
        over = [v for v in judge_implementation(implementation, case) if not v.within]
        assert not over, (implementation, over)


def test_names_of_cases_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("name", ["causal-dead-rows", "mask", "offset-out-of-reach", "key-mask-all-hidden"])
def test_cases_hold_dead_rows_and_these_mean_zero(name):
    case = next(case for case in CASES if case.name == name)
    truth = exact(case)
    dead = np.isneginf(truth["lse"])
    assert dead.any()
    assert not truth["out"][dead].any()
    assert not truth["dq"][dead].any()


def test_poisoned_cases_hold_nan_and_their_results_none():
    poisoned = [case for case in CASES if case.poison]
    assert len(poisoned) >= 3
    for case in poisoned:
        arguments = case.arguments()
        assert np.isnan(arguments["k"]).any()
        assert np.isnan(arguments["v"]).any()
        assert all(np.isfinite(x).all() or name == "lse" for name, x in exact(case).items())


@pytest.mark.parametrize(
    ("quantity", "wrong"),
    [
        ("out", lambda out, lse: (out * (1 + 1e-5), lse)),
        ("lse", lambda out, lse: (out, lse + 1e-5)),
        ("dlse", lambda out, lse: (out, jax.lax.stop_gradient(lse))),
        ("nan", lambda out, lse: (out.at[0].set(jnp.nan), lse)),
    ],
)
def test_the_budget_catches_small_mistakes(quantity, wrong):
    case = next(case for case in CASES if case.name == "causal")

    def mistaken(*arguments, **options):
        return wrong(*attention_and_lse(*arguments, **options))

    assert any(not verdict.within for verdict in judge(mistaken, case))
    assert all(verdict.within for verdict in judge(attention_and_lse, case))


def test_error_demands_the_same_places_for_what_is_not_finite():
    values = np.array([1.0, np.inf, np.nan])
    assert error(values, values) == 0
    assert error(np.array([1.0, -np.inf, np.nan]), values) == np.inf
    assert error(np.array([1.0, np.inf, 2.0]), values) == np.inf
    assert error(np.array([1.5, np.inf, np.nan]), values) == 0.5


def test_cases_draw_the_same_values_in_every_dtype():
    case = dataclasses.replace(CASES[0], dtype="bfloat16")
    assert np.array_equal(case.arguments()["q"].astype(np.float64), case.arguments("float64")["q"])


def test_a_visible_key_that_is_not_finite_is_seen():
    q = jnp.ones((3, 4))
    k = jnp.ones((5, 4))
    v = jnp.ones((5, 4)).at[2, 1].set(jnp.nan)
    for implementation in ("xla", "reference"):
        out, lse = flash_attention(q, k, v, causal=True, q_offset=0, implementation=implementation)
        assert np.isfinite(out[:2]).all()
        assert np.isfinite(lse[:2]).all()
        assert np.isnan(out[2]).all()


def test_results_are_bit_equal_from_run_to_run():
    case = next(case for case in CASES if case.name == "long-causal")
    arguments = case.arguments()
    results = [flash_attention(**arguments) for _ in range(2)]
    assert np.array_equal(results[0].out, results[1].out)
    assert np.array_equal(results[0].lse, results[1].lse)
