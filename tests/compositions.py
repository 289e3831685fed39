"""Shared by the composition tests: compositions with optax, parameters and compiled runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree

import optax_adamax

STEPS = 20
RATE = 0.05
SHAPES = {"b": (3,), "w": (4, 3)}
WEIGHTS = {"b": False, "w": True}  # a mask that excludes the bias
DECAY = optax.exponential_decay(RATE, 5, 0.7)
RISE = optax.linear_schedule(0.5, 0.9, STEPS)


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_t(2, shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


PARAMS = jax.tree.map(lambda x: np.clip(x, -4, 4), tree(0))
GRADIENTS = [tree(step, 10.0 ** (step % 5 - 2)) for step in range(1, STEPS + 1)]


def run(tx, params=PARAMS, gradients=GRADIENTS, extra=None, state=None, compiler=jax.jit):
    """Returns the parameters after each step of a compiled run, and the last state."""
    update = compiler(tx.update)
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params) if state is None else state
    trajectory = []
    for step, gradient in enumerate(gradients):
        updates, state = update(gradient, state, params, **(extra[step] if extra else {}))
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def moments(state, name):
    """Returns the leaves of all moments with this name, at any depth of wrappers."""
    found = optax.tree.get_all_with_path(state, name)
    return [leaf for _, moment in found for leaf in jax.tree.leaves(moment)]


COMPOSITIONS = {
    "adamax": lambda o: o.adamax(RATE),
    "adamaxw": lambda o: o.adamaxw(RATE, weight_decay=0.1),
    "schedule": lambda o: o.adamax(DECAY),
    "clip_by_global_norm": lambda o: optax.chain(
        optax.clip_by_global_norm(1.0), o.scale_by_adamax(), optax.scale_by_learning_rate(RATE)
    ),
    "named_chain": lambda o: optax.named_chain(
        ("adamax", o.scale_by_adamax()), ("rate", optax.scale_by_schedule(lambda t: -DECAY(t)))
    ),
    "decay mask": lambda o: o.adamaxw(RATE, weight_decay=0.1, mask=WEIGHTS),
    "decay mask function": lambda o: o.adamaxw(
        RATE, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "add_decayed_weights": lambda o: optax.chain(
        o.scale_by_adamax(),
        optax.add_decayed_weights(0.1, mask=WEIGHTS),
        optax.scale_by_learning_rate(RATE),
    ),
    "masked": lambda o: optax.masked(o.adamax(RATE), WEIGHTS),
    "partition": lambda o: optax.partition(
        {True: o.adamax(RATE, b2=0.9), False: o.adamaxw(RATE / 5)}, WEIGHTS
    ),
    "flatten": lambda o: optax.flatten(o.adamax(RATE)),
    "MultiSteps": lambda o: optax.MultiSteps(o.adamax(RATE), 4),
    "ema": lambda o: optax.chain(o.adamax(RATE), optax.ema(0.9)),
    "inject_hyperparams": lambda o: optax.inject_hyperparams(o.adamax)(
        learning_rate=RATE, b1=0.8, b2=0.95, eps=1e-3
    ),
    "inject_hyperparams schedules": lambda o: optax.inject_hyperparams(o.adamax)(
        learning_rate=DECAY, b1=RISE, b2=RISE, eps=DECAY
    ),
    "inject_hyperparams adamaxw": lambda o: optax.inject_hyperparams(o.adamaxw)(
        DECAY, weight_decay=DECAY, mask=None
    ),
    "inject_hyperparams scale_by_adamax": lambda o: optax.chain(
        optax.inject_hyperparams(o.scale_by_adamax)(b1=RISE), optax.scale_by_learning_rate(RATE)
    ),
    "inject_hyperparams in MultiSteps": lambda o: optax.MultiSteps(
        optax.inject_hyperparams(o.adamax)(learning_rate=DECAY), 2
    ),
}


@functools.cache
def composed(name):
    """Returns the composition with this package, always the same object, so it is compiled once."""
    return COMPOSITIONS[name](optax_adamax)
