"""A run that anything may happen to, beside a float64 model of it, and what must hold."""

import functools
import os
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from optax_adamax import decode_state, encode_state, scale_by_adamax
from tests.oracle.formats import (
    FORMATS,
    SOME_FORMATS,
    largest_ratio,
    m_error,
    step_bound,
    v_octaves,
    v_range,
)

SIZE = 8
POLICIES = ["propagate", "zero", "skip_step"]
BETAS = [(0.9, 0.999), (0.9, 0.99), (0.0, 1.0), (0.5, 0.999), (0.95, 0.999)]
LONG = os.environ.get("OPTAX_ADAMAX_TEST_PROFILE") == "long"
USED = FORMATS if LONG else SOME_FORMATS  # each format and policy is compiled
CYCLE = 256  # steps of a long scan

# Beyond these the float32 arithmetic itself is subnormal, or near its end.
SMALLEST, LARGEST = 1e-36, 1e38

SIZES = [1e-42, 1e-30, 1e-8, 1e-3, 0.3, 1.0, 7.0, 1e3, 1e6, 1e30, 3.4e38]
finite = st.sampled_from([0.0] + [sign * x for x in SIZES for sign in (1.0, -1.0, 0.77)])
any_number = st.one_of(finite, finite, st.sampled_from([np.nan, np.inf, -np.inf]))
vectors = st.lists(finite, min_size=SIZE, max_size=SIZE)
bad_vectors = st.lists(any_number, min_size=SIZE, max_size=SIZE)
formats = st.sampled_from(USED)
cycles = st.lists(vectors, min_size=1, max_size=5)


def core_of(state, policy):
    return state if policy == "propagate" else state.inner_state


def limits(v_dtype):
    low, high = v_range(v_dtype)
    return max(low, SMALLEST), min(high, LARGEST)


@functools.cache
def transformation(form, policy):
    """init, update and a scan of updates, with b1, b2 and eps as arguments."""

    def build(b1, b2, eps):
        m, v = form
        return scale_by_adamax(b1, b2, eps, m_dtype=m, v_dtype=v, nonfinite=policy)

    def update(g, state, hyperparameters):
        return build(*hyperparameters).update(g, state)

    def scan(gradients, state, hyperparameters):
        """`hyperparameters` has a row for each step; the updates, and m after each."""

        def body(state, x):
            g, hyperparameters = x
            u, state = update(g, state, hyperparameters)
            return state, (u, decode_state(core_of(state, policy)).m)

        state, outputs = jax.lax.scan(body, state, (gradients, hyperparameters))
        return outputs, state

    return build(0.9, 0.999, 1e-8).init, jax.jit(update), jax.jit(scan)


@functools.cache
def types(form, policy):
    """The structure of the state, and shape and dtype of each leaf."""
    state = jax.eval_shape(transformation(form, policy)[0], jnp.zeros(SIZE))
    return jax.tree.structure(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


decode = jax.jit(decode_state)
encode = jax.jit(encode_state, static_argnums=(1, 2))


@functools.cache
def split():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.NamedSharding(mesh, jax.P("x")), jax.NamedSharding(mesh, jax.P())


class Run(RuleBasedStateMachine):
    """One leaf of eight elements, one of them for each device."""

    examples = executed = 0  # of runs, and of rules in them

    @initialize(
        form=formats,
        policy=st.sampled_from(POLICIES),
        long_scans=st.sampled_from([0, 0, 0, 1] if LONG else [9]),
    )
    def start(self, form, policy, long_scans=0):
        Run.examples += 1
        self.form, self.policy = form, policy
        self.hyperparameters = tuple(np.float32([0.9, 0.999, 1e-8]))
        self.state = self.tools[0](jnp.zeros(SIZE))
        self.count = self.nonfinite = 0
        self.long_scans = long_scans  # still to come: one takes as long as all the rest
        self.constant = True  # b1, b2 and the format so far
        zeros = np.zeros(SIZE)
        self.m, self.m_error, self.v, self.v_error = zeros, zeros, zeros, 0.0
        self.poisoned = np.zeros(SIZE, bool)
        self.touched = np.zeros(SIZE, bool)
        # Where v, and m, have always been in the range of their formats.
        self.v_known, self.m_known = np.zeros(SIZE, bool), np.ones(SIZE, bool)

    @property
    def tools(self):
        return transformation(self.form, self.policy)

    @property
    def core(self):
        return core_of(self.state, self.policy)

    # What may happen.

    @rule(g=vectors)
    def update(self, g):
        self.steps([g])

    @rule(g=bad_vectors)
    def update_with_bad_gradients(self, g):
        self.steps([g])

    @rule()
    def update_with_zeros(self):
        self.steps([[0.0] * SIZE])

    @rule(g=vectors, h=bad_vectors)
    def scan(self, g, h):
        self.steps([g, h, [0.0] * SIZE], scan=True)

    @precondition(lambda self: self.long_scans > 0)
    @rule(cycle=cycles, betas=st.one_of(st.none(), st.sampled_from(BETAS)))
    def long_scan(self, cycle, betas):
        """Gradients that repeat, while b1 and b2 go to `betas` if these are given."""
        self.long_scans -= 1
        start, end = self.hyperparameters, self.hyperparameters
        if betas is not None:
            self.change_hyperparameters(betas, start[2])
            end = self.hyperparameters
            self.constant &= start == end
        fraction = np.linspace(0, 1, CYCLE)[:, None]
        rows = np.float32((1 - fraction) * np.float64(start) + fraction * np.float64(end))
        self.steps(np.resize(cycle, (CYCLE, SIZE)), scan=True, rows=rows)

    @rule(betas=st.sampled_from(BETAS), eps=st.sampled_from([0.0, 1e-8, 1e-3]))
    def change_hyperparameters(self, betas, eps):
        new = tuple(np.float32([*betas, eps]))
        self.constant &= self.count == 0 or new[:2] == self.hyperparameters[:2]
        self.hyperparameters = new

    @rule(form=formats)
    def change_format(self, form):
        v_kept = np.where(self.poisoned, 0, np.float64(decode(self.core).v))
        self.state, old, self.form = encode(self.state, *form), self.form, form
        if form[1] != old[1]:
            self.v_error += v_octaves(old[1])
        if form != old:
            self.constant = False
            size = np.abs(self.m) + self.m_error
            self.m_error = self.m_error + m_error(form[0], size, 1.1 * v_kept)
        self.look_at_ranges()

    @rule(how=st.sampled_from(["pickle", "flax", "numpy"]))
    def save_and_restore(self, how):
        before = jax.tree.map(np.asarray, self.state)
        if how == "pickle":
            self.state = pickle.loads(pickle.dumps(self.state))
        elif how == "flax":
            empty = self.tools[0](jnp.zeros(SIZE))
            data = flax.serialization.to_bytes(self.state)
            self.state = flax.serialization.from_bytes(empty, data)
        else:
            self.state = jax.tree.map(jnp.asarray, before)
        self.state = jax.tree.map(jnp.asarray, self.state)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(self.state), strict=True):
            assert x.dtype == y.dtype and x.tobytes() == np.asarray(y).tobytes()

    @precondition(lambda self: LONG)
    @rule(sharded=st.booleans())
    def reshard(self, sharded):
        over, whole = split()
        one = jax.devices()[0]
        place = (lambda x: over if x.ndim else whole) if sharded else (lambda x: one)
        self.state = jax.tree.map(lambda x: jax.device_put(x, place(x)), self.state)

    # What must come of it.

    def steps(self, gradients, scan=False, rows=None):
        gradients = np.float32(gradients)
        rows = np.tile(self.hyperparameters, (len(gradients), 1)) if rows is None else rows
        if not scan:
            for g, row in zip(gradients, rows, strict=True):
                kept_v = np.asarray(decode(self.core).v, np.float64)
                u, self.state = self.tools[1](g, self.state, tuple(row))
                self.step_of_model(g, np.asarray(u), kept_v, row)
                self.look_at_state_and_update(np.asarray(u), row)
            return
        old_m = np.asarray(decode(self.core).m, np.float64)
        outputs, self.state = self.tools[2](gradients, self.state, tuple(rows.T))
        u, m = (np.asarray(x) for x in outputs)
        v, known = [], np.ones(SIZE, bool)
        for i, row in enumerate(rows):
            self.step_of_model(gradients[i], u[i], np.full(SIZE, np.inf), row)
            v.append(self.v)
            known &= self.v_known & self.m_known
        if len(gradients) == CYCLE and known.any():
            self.look_at_mean(gradients, rows, old_m, np.float64(m), np.array(v), known)

    def step_of_model(self, g, u, kept_v, hyperparameters):
        b1, b2, eps = np.float64(hyperparameters)
        bad = ~np.isfinite(g)
        g = np.where(bad, 0, np.float64(g))
        if self.policy == "skip_step" and bad.any():
            self.nonfinite += 1
            assert not u.any()
            return
        self.count += 1
        m, v = b1 * self.m + (1 - b1) * g, np.maximum(b2 * self.v, np.abs(g) + eps)
        size = np.abs(m) + self.m_error
        error = b1 * self.m_error + m_error(self.form[0], size, 1.1 * v)
        # A gradient far above all that may have been kept puts an element right.
        old_v = np.maximum(self.v, kept_v)
        low, high = limits(self.form[1])
        set_anew = (v > 2 * old_v) & (v > low) & (v < high)
        if self.policy == "zero":
            self.nonfinite += int(bad.sum())
        else:
            self.poisoned |= bad
        self.touched |= (g != 0) | (eps > 0) | self.poisoned
        unknown = set_anew & ~self.m_known
        error = np.where(unknown, error + b1 * 10 * np.where(unknown, old_v, 0), error)
        self.m, self.v, self.m_error = m, v, error
        self.v_known, self.m_known = self.v_known | set_anew, self.m_known | set_anew
        self.look_at_ranges()
        self.look_at_updates(u, hyperparameters)

    def look_at_ranges(self):
        low, high = limits(self.form[1])
        self.v_known = self.v_known & (self.v > low) & (self.v < high)
        if self.form[0] == "int8":
            self.m_known = self.m_known & self.v_known & (np.abs(self.m) <= 5 * self.v)

    def look_at_updates(self, u, hyperparameters):
        b1, b2, _ = np.float64(hyperparameters)
        good = ~self.poisoned
        assert not np.isfinite(u[self.poisoned]).any(), "a poisoned element is silent"
        assert np.isfinite(u[good]).all()
        assert not u[~self.touched].any()
        largest = largest_ratio(self.form[0]) / (1 - b1**self.count)
        if self.constant and self.form == ("float32", "float32"):
            largest = step_bound(self.count, b1, b2)
        assert np.all(np.abs(u[good]) <= largest * (1 + 2e-5)), "beyond the bound"

    def look_at_state_and_update(self, u, hyperparameters):
        """The state explains the update."""
        kept = decode(self.core)
        m, v = np.asarray(kept.m, np.float64), np.asarray(kept.v, np.float64)
        near = ~self.poisoned & (v > SMALLEST) & (v < LARGEST) & (np.abs(m) > SMALLEST)
        if self.policy == "skip_step" and not u.any():
            return
        exact = m[near] / (v[near] * (1 - np.float64(hyperparameters[0]) ** self.count))
        np.testing.assert_allclose(u[near], exact, rtol=2e-5, atol=SMALLEST)

    def look_at_mean(self, gradients, rows, old_m, m, v, known):
        """The mean of m is that of float64, but for what fair coins would do to it."""
        near = known & ~self.poisoned & (np.abs(gradients).max(axis=0) < LARGEST)
        m, v, exact, error = m[:, near], v[:, near], old_m[near], 0.0
        for g, b1, kept in zip(np.float64(gradients)[:, near], rows[:, 0], m, strict=True):
            exact = np.float64(b1) * exact + (1 - np.float64(b1)) * g
            error = error + kept - exact
        # What one step rounds stays for 1 / (1 - b1) steps.
        rounding = m_error(self.form[0], 1.2 * np.abs(m), 1.1 * v)
        deviation = np.sqrt(np.sum(rounding**2, axis=0)) / 2 / (1 - rows[:, 0].max())
        assert np.all(np.abs(error) <= 6.5 * deviation + CYCLE * SMALLEST), "biased"

    @invariant()
    def state_is_as_it_must_be(self):
        if not hasattr(self, "state"):
            return
        Run.executed += 1
        leaves, structure = jax.tree.flatten(self.state)
        found = structure, [(x.shape, x.dtype) for x in leaves]
        assert found == types(self.form, self.policy)
        assert int(self.core.count) == self.count
        if self.policy != "propagate":
            assert int(self.state.nonfinite_count) == self.nonfinite
        kept = decode(self.core)
        m, v = np.asarray(kept.m, np.float64), np.asarray(kept.v, np.float64)
        good = ~self.poisoned
        assert np.all(v[good] >= 0) and np.all(np.isfinite(v[good]) & np.isfinite(m[good]))
        near = good & self.v_known
        octaves = np.abs(np.log2(v[near] / self.v[near]))
        assert np.all(octaves <= self.v_error + v_octaves(self.form[1])), "v has drifted"
        near = good & self.m_known & self.v_known
        off = np.abs(m - self.m) - 1.01 * self.m_error - SMALLEST
        assert np.all(off[near] <= 0), "m has drifted"
