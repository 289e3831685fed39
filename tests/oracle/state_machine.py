"""Runs random sequences of operations next to a float64 model and checks invariants after each.

The operations are updates, scans, changes of format and hyperparameters, saving and resharding.
"""

import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.oracle.formats import largest_ratio, m_error, step_bound, v_log2_error
from tests.oracle.machine_programs import (
    BETAS,
    CYCLE,
    LARGEST,
    LONG,
    POLICIES,
    SIZE,
    SMALLEST,
    bad_vectors,
    core_of,
    cycles,
    decode,
    encode,
    formats,
    limits,
    programs,
    shardings,
    state_types,
    vectors,
)


class Run(RuleBasedStateMachine):
    """Optimizes one leaf of eight elements; resharding puts one element on each device."""

    examples = executed = 0  # numbers of runs and of executed rules

    @initialize(
        dtypes=formats,
        policy=st.sampled_from(POLICIES),
        long_scans=st.sampled_from([0, 0, 0, 1] if LONG else [9]),
    )
    def start(self, dtypes, policy, long_scans=0):
        Run.examples += 1
        self.dtypes, self.policy = dtypes, policy
        self.hyperparameters = tuple(np.float32([0.9, 0.999, 1e-8]))
        self.state = self.programs[0](jnp.zeros(SIZE))
        self.count = self.nonfinite = 0
        self.long_scans = long_scans  # number that may still run; they are slow
        self.constant = True  # b1, b2 and the format have not changed
        zeros = np.zeros(SIZE)
        self.m, self.m_error, self.v, self.v_error = zeros, zeros, zeros, 0.0
        self.nonfinite_elements = np.zeros(SIZE, bool)
        self.active = np.zeros(SIZE, bool)
        # Elements whose v or m has been in the range of its format since it was last replaced.
        self.v_in_range, self.m_in_range = np.zeros(SIZE, bool), np.ones(SIZE, bool)

    @property
    def programs(self):
        return programs(self.dtypes, self.policy)

    @property
    def core(self):
        return core_of(self.state, self.policy)

    # Operations.

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
        """Repeats gradients; b1 and b2 change linearly to `betas` unless it is None."""
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

    @rule(dtypes=formats)
    def change_format(self, dtypes):
        stored_v = np.where(self.nonfinite_elements, 0, np.float64(decode(self.core).v))
        self.state, old, self.dtypes = encode(self.state, *dtypes), self.dtypes, dtypes
        if dtypes[1] != old[1]:
            self.v_error += v_log2_error(old[1])
        if dtypes != old:
            self.constant = False
            size = np.abs(self.m) + self.m_error
            self.m_error = self.m_error + m_error(dtypes[0], size, 1.1 * stored_v)
        self.update_ranges()

    @rule(how=st.sampled_from(["pickle", "flax", "numpy"]))
    def save_and_restore(self, how):
        before = jax.tree.map(np.asarray, self.state)
        if how == "pickle":
            self.state = pickle.loads(pickle.dumps(self.state))
        elif how == "flax":
            empty = self.programs[0](jnp.zeros(SIZE))
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
        split, replicated = shardings()
        one = jax.devices()[0]
        place = (lambda x: split if x.ndim else replicated) if sharded else (lambda x: one)
        self.state = jax.tree.map(lambda x: jax.device_put(x, place(x)), self.state)

    # The model and its checks.

    def steps(self, gradients, scan=False, rows=None):
        gradients = np.float32(gradients)
        rows = np.tile(self.hyperparameters, (len(gradients), 1)) if rows is None else rows
        if not scan:
            for g, row in zip(gradients, rows, strict=True):
                stored_v = np.asarray(decode(self.core).v, np.float64)
                u, self.state = self.programs[1](g, self.state, tuple(row))
                self.step_model(g, np.asarray(u), stored_v, row)
                self.check_update_follows_from_state(np.asarray(u), row)
            return
        old_m = np.asarray(decode(self.core).m, np.float64)
        outputs, self.state = self.programs[2](gradients, self.state, tuple(rows.T))
        u, m = (np.asarray(x) for x in outputs)
        v, in_range = [], np.ones(SIZE, bool)
        for i, row in enumerate(rows):
            self.step_model(gradients[i], u[i], np.full(SIZE, np.inf), row)
            v.append(self.v)
            in_range &= self.v_in_range & self.m_in_range
        if len(gradients) == CYCLE and in_range.any():
            self.check_mean_of_m(gradients, rows, old_m, np.float64(m), np.array(v), in_range)

    def step_model(self, g, u, stored_v, hyperparameters):
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
        error = b1 * self.m_error + m_error(self.dtypes[0], size, 1.1 * v)
        # A gradient far above the stored v replaces v, and earlier errors no longer matter.
        old_v = np.maximum(self.v, stored_v)
        low, high = limits(self.dtypes[1])
        replaced = (v > 2 * old_v) & (v > low) & (v < high)
        if self.policy == "zero":
            self.nonfinite += int(bad.sum())
        else:
            self.nonfinite_elements |= bad
        self.active |= (g != 0) | (eps > 0) | self.nonfinite_elements
        returning = replaced & ~self.m_in_range
        error = np.where(returning, error + b1 * 10 * np.where(returning, old_v, 0), error)
        self.m, self.v, self.m_error = m, v, error
        self.v_in_range, self.m_in_range = self.v_in_range | replaced, self.m_in_range | replaced
        self.update_ranges()
        self.check_updates(u, hyperparameters)

    def update_ranges(self):
        low, high = limits(self.dtypes[1])
        self.v_in_range = self.v_in_range & (self.v > low) & (self.v < high)
        if self.dtypes[0] == "int8":
            self.m_in_range = self.m_in_range & self.v_in_range & (np.abs(self.m) <= 5 * self.v)

    def check_updates(self, u, hyperparameters):
        b1, b2, _ = np.float64(hyperparameters)
        finite = ~self.nonfinite_elements
        assert not np.isfinite(u[self.nonfinite_elements]).any(), "a non-finite gradient was lost"
        assert np.isfinite(u[finite]).all()
        assert not u[~self.active].any()
        largest = largest_ratio(self.dtypes[0]) / (1 - b1**self.count)
        if self.constant and self.dtypes == ("float32", "float32"):
            largest = step_bound(self.count, b1, b2)
        assert np.all(np.abs(u[finite]) <= largest * (1 + 2e-5)), "update exceeds bound"

    def check_update_follows_from_state(self, u, hyperparameters):
        """Checks that the update can be computed from the stored state alone."""
        decoded = decode(self.core)
        m, v = np.asarray(decoded.m, np.float64), np.asarray(decoded.v, np.float64)
        comparable = (
            ~self.nonfinite_elements & (v > SMALLEST) & (v < LARGEST) & (np.abs(m) > SMALLEST)
        )
        if self.policy == "skip_step" and not u.any():
            return
        exact = m[comparable] / (v[comparable] * (1 - np.float64(hyperparameters[0]) ** self.count))
        np.testing.assert_allclose(u[comparable], exact, rtol=2e-5, atol=SMALLEST)

    def check_mean_of_m(self, gradients, rows, old_m, m, v, in_range):
        """Checks that m is unbiased: its summed error is within 6.5 deviations of fair rounding."""
        comparable = in_range & ~self.nonfinite_elements & (np.abs(gradients).max(axis=0) < LARGEST)
        m, v, exact, error = m[:, comparable], v[:, comparable], old_m[comparable], 0.0
        for g, b1, decoded in zip(np.float64(gradients)[:, comparable], rows[:, 0], m, strict=True):
            exact = np.float64(b1) * exact + (1 - np.float64(b1)) * g
            error = error + decoded - exact
        # The rounding error of one step persists for about 1 / (1 - b1) steps.
        rounding = m_error(self.dtypes[0], 1.2 * np.abs(m), 1.1 * v)
        deviation = np.sqrt(np.sum(rounding**2, axis=0)) / 2 / (1 - rows[:, 0].max())
        assert np.all(np.abs(error) <= 6.5 * deviation + CYCLE * SMALLEST), "biased"

    @invariant()
    def state_is_valid(self):
        if not hasattr(self, "state"):
            return
        Run.executed += 1
        leaves, structure = jax.tree.flatten(self.state)
        found = structure, [(x.shape, x.dtype) for x in leaves]
        assert found == state_types(self.dtypes, self.policy)
        assert int(self.core.count) == self.count
        if self.policy != "propagate":
            assert int(self.state.nonfinite_count) == self.nonfinite
        decoded = decode(self.core)
        m, v = np.asarray(decoded.m, np.float64), np.asarray(decoded.v, np.float64)
        finite = ~self.nonfinite_elements
        assert np.all(v[finite] >= 0) and np.all(np.isfinite(v[finite]) & np.isfinite(m[finite]))
        comparable = finite & self.v_in_range
        log2_error = np.abs(np.log2(v[comparable] / self.v[comparable]))
        assert np.all(log2_error <= self.v_error + v_log2_error(self.dtypes[1])), "v has drifted"
        comparable = finite & self.m_in_range & self.v_in_range
        off = np.abs(m - self.m) - 1.01 * self.m_error - SMALLEST
        assert np.all(off[comparable] <= 0), "m has drifted"
