"""`probe_gradients` reports correct numbers in the requested steps, in all kinds of programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax import adamax
from optax_adamax._v_formats import V_FORMATS
from optax_adamax.wrappers.probe import GradientRange, probe_gradients

# 8 finite, nonzero elements: 2 are below the range of uint8 and 1 is above it.
GRADIENTS = {
    "a": np.float32([0, 1e-12, -3e-11, 0.5, np.nan]),
    "b": [np.float32([[-2, 1e10, 0]]), np.ones(3, jnp.bfloat16), None],
}


def probe(**options):
    reports = []
    return probe_gradients("uint8", reports.append, eps=0.0, **options), reports


def test_report_matches_numpy():
    tx, reports = probe()
    updates, _ = jax.jit(tx.update)(GRADIENTS, tx.init(GRADIENTS))
    jax.effects_barrier()
    jax.tree.map(np.testing.assert_array_equal, updates, GRADIENTS)
    (found,) = reports
    assert found == GradientRange(
        step=1,
        smallest=float(np.float32(1e-12)),
        largest=1e10,
        underflow_fraction=0.25,
        saturated_fraction=0.125,
        nonfinite_count=1,
        v_dtype="uint8",
        range=V_FORMATS["uint8"].range,
    )
    assert str(found) == (
        "step 1: |g| 1e-12 to 1e+10; uint8 v 1.2e-10 to 9.4e+08: "
        "25.00% below, 12.50% above; 1 not finite"
    )


def test_float64_gradients_are_reported_in_their_range():
    with jax.enable_x64(True):
        tx, reports = probe()
        grads = [np.array([1e-300, 1e300]), np.ones(2, np.float32)]
        tx.update(grads, tx.init(grads))
        jax.effects_barrier()
    assert (reports[0].smallest, reports[0].largest) == (1e-300, 1e300)
    assert (reports[0].underflow_fraction, reports[0].saturated_fraction) == (0.25, 0.25)


def test_eps_is_added_as_in_the_optimizer():
    """eps=1e-8 is in the range of uint8, so the sum of eps and |g| is never below it."""
    reports = []
    tx = probe_gradients("uint8", reports.append)
    tx.update(GRADIENTS, tx.init(GRADIENTS))
    jax.effects_barrier()
    assert reports[0].underflow_fraction == 0 and reports[0].saturated_fraction == 0.125


def test_full_precision_has_its_name_in_the_report():
    reports = []
    tx = probe_gradients(None, reports.append)
    tx.update(GRADIENTS, tx.init(GRADIENTS))
    jax.effects_barrier()
    assert reports[0].underflow_fraction == reports[0].saturated_fraction == 0
    assert "; full-precision v 0 to inf: " in str(reports[0])


def test_fractions_agree_with_the_state():
    """An element below the range has code 0 in v, and an element above it the last code."""
    g = np.float32([1e-12, 0.5, 1e10, 3.0])
    tx, reports = probe()
    chain = optax.chain(tx, adamax(0.1, eps=0.0, v_dtype="uint8"))
    codes = np.asarray(chain.update(g, chain.init(g))[1][1][0].v.scaled_uint8)
    jax.effects_barrier()
    assert np.mean(codes == 0) == reports[0].underflow_fraction
    assert np.mean(codes == 255) == reports[0].saturated_fraction


@pytest.mark.parametrize("run", ["eager", "jit", "scan"])
def test_every_nth_step_is_reported(run):
    tx, reports = probe(every=3)
    g = np.ones(2, np.float32)
    if run == "scan":
        step = lambda state, _: (tx.update(g, state)[1], None)  # noqa: E731
        jax.lax.scan(step, tx.init(g), length=7)
    else:
        state, update = tx.init(g), tx.update if run == "eager" else jax.jit(tx.update)
        for _ in range(7):
            _, state = update(g, state)
    jax.effects_barrier()
    assert [r.step for r in reports] == [1, 4, 7]


def test_state_may_be_discarded():
    """The compiled program returns only parameters, so XLA might remove the report."""
    tx, reports = probe(every=2)
    chain = optax.chain(tx, adamax(0.1))
    start = np.ones(2, np.float32)

    @jax.jit
    def fit(params):
        def body(_, carry):
            params, state = carry
            updates, state = chain.update(params, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 4, body, (params, chain.init(params)))[0]

    jax.block_until_ready(fit(start))
    jax.effects_barrier()
    assert [r.step for r in reports] == [1, 3]
    assert reports[1].largest < reports[0].largest == 1


@pytest.mark.parametrize("g", [(), {"a": None}, np.zeros((0, 3), np.float32)])
def test_empty_gradients_are_not_reported(g):
    tx, reports = probe()
    tx.update(g, tx.init(g))
    jax.effects_barrier()
    assert not reports


def test_empty_leaf_among_the_gradients_is_ignored():
    tx, reports = probe()
    g = {"a": np.zeros((0, 3), np.float32), "b": np.float32([0.5, 2.0])}
    tx.update(g, tx.init(g))
    jax.effects_barrier()
    assert (reports[0].smallest, reports[0].largest) == (0.5, 2.0)


def test_zero_gradients_have_no_smallest_element():
    tx, reports = probe()
    g = np.zeros(3, np.float32)
    tx.update(g, tx.init(g))
    jax.effects_barrier()
    assert reports[0].smallest == np.inf and reports[0].largest == 0


def test_infinite_gradient_is_counted_but_not_the_largest():
    tx, reports = probe()
    g = np.float32([np.inf, 2.0, -np.inf, 0.5])
    tx.update(g, tx.init(g))
    jax.effects_barrier()
    assert (reports[0].smallest, reports[0].largest) == (0.5, 2.0)
    assert reports[0].nonfinite_count == 2 and reports[0].saturated_fraction == 0


def test_count_saturates():
    tx, _ = probe(every=2**31 - 1)
    g = np.ones(2, np.float32)
    state = tx.init(g)._replace(count=jnp.int32(2**31 - 1))
    assert int(tx.update(g, state)[1].count) == 2**31 - 1


@pytest.mark.parametrize(
    "make, error, words",
    [
        (functools.partial(probe_gradients, "int3"), TypeError, "v_dtype must be"),
        (functools.partial(probe_gradients, "int8"), ValueError, "v_dtype must be"),
        (functools.partial(probe, every=0), ValueError, "every must be an integer >= 1, but 0 was"),
        (functools.partial(probe, every=2.0), ValueError, "every must be an integer"),
        (lambda: probe_gradients("uint8", eps=-1.0), ValueError, "eps must be in"),
        (lambda: probe_gradients("uint8", "print"), TypeError, "Write report=print"),
    ],
)
def test_bad_argument_raises(make, error, words):
    with pytest.raises(error, match=words):
        make()
