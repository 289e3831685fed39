# %% [markdown]
# # Adamax with two bytes of state per parameter
#
# Adamax stores a first moment m and a decaying maximum v per parameter: 8 bytes in float32.
# `adamax(..., m_dtype="int8", v_dtype="uint8")` stores them in 2. This notebook shows
#
# 1. why rounding v to bfloat16 after each step does not work: v never decays;
# 2. how v is stored: in units of a shared scale, so the stored number does not have to decay;
# 3. the codes: 256 values for v, 255 for m, their errors, and why m is rounded stochastically;
# 4. the bytes of a compiled training step, and the loss;
# 5. how to check whether a format fits the gradients of a model.
#
# It runs for a minute on two CPU cores. `python notebooks/low_bit_state.py` does the same.

# %%
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import optax_adamax
from optax_adamax import RatioInt8, ScaleByAdamaxState, ScaledUint8, decode_state, encode_state

jax.config.update("jax_platforms", "cpu")
FOLDER = Path(globals().get("__file__", "low_bit_state.ipynb")).resolve().parent

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5B6770"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
subplots = functools.partial(plt.subplots, layout="constrained", dpi=110)

# %% [markdown]
# ## Why naive bfloat16 is stuck
#
# In a step without a large gradient, v decays by a factor of b2 = 0.999, so by 0.1 %. bfloat16 has
# 7 mantissa bits, so neighboring numbers differ by 0.4 to 0.8 %. Half of this distance is more than
# the decay. So 0.999 v rounds back to v, for every v.

# %%
numbers = np.arange(128, 256, dtype=np.float32) / 128  # each bfloat16 in [1, 2)
for b2 in (0.999, 0.998, 0.99):
    decayed = jnp.asarray(b2 * numbers).astype(jnp.bfloat16).astype(jnp.float32)
    stuck = int((decayed == numbers).sum())
    print(f"{b2} v rounds back to v for {stuck:3} of {len(numbers)} mantissas")

# %% [markdown]
# As an example, one outlier of size 1 is followed by gradients of 0.001. The exact v decays to
# 0.001, and updates reach the learning rate again. With naive rounding v remains 1, and every later
# update is a thousandth of the exact update.


# %%
def naive_bfloat16(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Rounds the moments of an optax transformation to bfloat16 after each step."""

    def store(state):
        def rounded(x):
            # A cast is not enough, because XLA may remove a cast to bfloat16 and back.
            floats = jnp.issubdtype(x.dtype, jnp.floating)
            return jax.lax.reduce_precision(x, 8, 7).astype(jnp.bfloat16) if floats else x

        return jax.tree.map(rounded, state)

    def load(state):
        return jax.tree.map(lambda x: x.astype("float32") if x.dtype == "bfloat16" else x, state)

    def update(updates, state, params=None):
        updates, state = tx.update(updates, load(state), params)
        return updates, store(state)

    return optax.GradientTransformation(lambda params: store(tx.init(params)), update)


def follow(tx: optax.GradientTransformation, gradients: np.ndarray):
    """Returns the updates of one parameter, and the state after each step."""

    def step(state, g):
        update, state = tx.update(g, state)
        return state, (update, state)

    return jax.jit(lambda: jax.lax.scan(step, tx.init(jnp.zeros(())), gradients)[1])()


outlier = np.full(9000, 0.001, np.float32)
outlier[0] = 1
steps = np.arange(1, len(outlier) + 1)
exact_v = np.maximum(0.999 ** (steps - 1.0), 0.001)
naive_updates, naive_state = follow(naive_bfloat16(optax.scale_by_adamax()), outlier)
low_bit = optax_adamax.scale_by_adamax(m_dtype="int8", v_dtype="uint8")
low_bit_updates, states = follow(low_bit, outlier)
low_bit_v = jax.vmap(lambda state: decode_state(state).v)(states)
exact_updates, _ = follow(optax.scale_by_adamax(), outlier)

fig, (left, right) = subplots(1, 2, figsize=(11, 4.2))
left.plot(steps, naive_state.nu, color=ORANGE, lw=2)
left.plot(steps, low_bit_v, color=BLUE, lw=4, alpha=0.5)
left.plot(steps, exact_v, "k--", lw=1.2)
left.set(yscale="log", xlabel="step", ylabel="v")
left.set_title("v after one outlier", loc="left")
left.text(8900, 1.12, "naive bfloat16: always 1", color=ORANGE, ha="right", va="bottom")
left.text(3900, 0.03, "uint8 with shared scale\n(dashed: exact)", color=BLUE)
left.set_ylim(6e-4, 2)
right.plot(steps, naive_updates, color=ORANGE, lw=2)
right.plot(steps, low_bit_updates, color=BLUE, lw=4, alpha=0.5)
right.plot(steps, exact_updates, "k--", lw=1.2)
right.set(yscale="log", xlabel="step", ylabel="update / learning rate", ylim=(6e-4, 2))
right.set_title("Updates", loc="left")
right.text(8900, 0.0012, "naive bfloat16: a thousandth", color=ORANGE, ha="right")
fig.savefig(FOLDER / "low_bit_state_stuck.png")
print(f"last update / learning rate: exact {exact_updates[-1]:.3f}", end=", ")
print(f"2 bytes {low_bit_updates[-1]:.3f}, naive bfloat16 {naive_updates[-1]:.4f}")

# %% [markdown]
# ## The shared scale
#
# $v_t = \max(b_2 v_{t-1}, |g_t|)$ is the largest of $b_2^{t-k} |g_k|$, and a maximum commutes with
# a common factor. So the decay is moved into a scale $s$. The stored value is $w = s v$. The scale
# grows by $1/b_2$ per step, and is halved whenever it would leave [1/2, 1):
#
# - a gradient that sets a new maximum is rounded once, when it is stored;
# - between halvings the stored number does not change, while v decays;
# - when the scale is halved, the stored number is halved, too. This is exact: its code decreases by
#   four.
#
# All parameters have the same scale. The state contains its logarithm, a 32-bit phase between 0 and
# 1 that wraps around. Here b2 is 0.99, so the scale is halved every 69 steps.

# %%
b2 = 0.99
rng = np.random.default_rng(1)
gradients = np.float32(0.02 * rng.standard_t(2, 330))
gradients[[0, 95, 240]] = 1.0, 0.8, 1.3
tx = optax_adamax.scale_by_adamax(b2=b2, m_dtype="int8", v_dtype="uint8")
_, states = follow(tx, gradients)
decoded = jax.vmap(lambda state: decode_state(state).v)(states)
exact = np.zeros(len(gradients))
for t, g in enumerate(np.abs(gradients)):
    exact[t] = max(b2 * exact[t - 1], g)
t = np.arange(1, len(gradients) + 1)
phase = states.v.phase / 2.0**32
halvings = t[1:][np.diff(phase) < 0]

fig, axes = subplots(3, 1, figsize=(10, 7.6), sharex=True, height_ratios=(3, 2, 3))
axes[0].vlines(t, 0.004, np.abs(gradients), color="#B9C0C6", lw=1.2)
axes[0].plot(t, exact, "k--", lw=1.2)
axes[0].plot(t, decoded, color=BLUE, lw=4, alpha=0.5)
axes[0].set(yscale="log", ylim=(0.01, 2.5), ylabel="v")
axes[0].text(150, 0.7, "from the stored code\n(dashed: exact)", color=BLUE)
axes[0].set_title("v decays until a larger gradient sets it (bars: |g|)", loc="left")
axes[1].plot(t, phase, color=GREEN, lw=2)
axes[1].set_title("The phase: log2 of the scale plus 1, one number for all parameters", loc="left")
axes[1].set(ylim=(0, 1.05), yticks=(0, 0.5, 1), ylabel="phase")
axes[2].step(t, states.v.scaled_uint8.astype(int), where="mid", color=BLUE, lw=2)
axes[2].set_title("The stored w = s v does not decay; it is halved with the scale", loc="left")
axes[2].set_yticks((124, 128, 132, 136), ("124: 1/8", "128: 1/4", "132: 1/2", "136: 1"))
axes[2].set(xlabel="step", xlim=(1, len(t)), ylim=(122, 137), ylabel="code: w")
for panel in axes:
    panel.vlines(halvings, 0, 1, transform=panel.get_xaxis_transform(), color=GREY, lw=0.6, ls=":")
fig.savefig(FOLDER / "low_bit_state_scale.png")
worst = np.abs(np.float64(decoded) / exact - 1).max()
print(f"{len(halvings)} halvings; largest relative error of v: {worst:.4f}, bound: {1 / 8:.4f}")

# %% [markdown]
# ## The code of v
#
# A code of w is an unsigned float with 6 exponent bits and 2 mantissa bits (E6M2), cut from the
# bits of a float32: four equally spaced values in each of 64 powers of two.
# Code 0 is the smallest value, not zero. w is rounded to the nearest code, so its error is at most
# 1/8, and it does not grow afterwards.


# %%
def state_of(m, v) -> ScaleByAdamaxState:
    return ScaleByAdamaxState(jnp.zeros((), jnp.int32), m, v)


v_codes = jnp.arange(256, dtype=jnp.uint8)
v_values = decode_state(state_of(jnp.zeros(256), ScaledUint8(v_codes, jnp.uint32(0)))).v
print(f"with phase 0, v is {v_values[0]:.2g} at code 0 and {v_values[-1]:.2g} at code 255")

v = jnp.exp2(jnp.linspace(-1, 2, 4001))
rounded = decode_state(encode_state(state_of(jnp.zeros_like(v), v), v_dtype="uint8")).v
errors_of_v = np.float64(rounded) / np.float64(v) - 1

# %% [markdown]
# ## The code of m
#
# v bounds m: |m| is at most 1.01 v for the default decay rates. So m does not need its own scale.
# Its code represents m / v: a sign, and a float with 4 exponent bits and 3 mantissa bits, equally
# spaced near zero.
#
# If all later gradients are zero, m must decay: 0.9 m, 0.81 m, ... With rounding to the nearest
# code, m stops decaying as soon as 0.9 m rounds back to m, and the updates continue. `optax_adamax`
# rounds m up or down with bits from a hash of the step count and of the gradient. This stochastic
# rounding is unbiased over the steps. It is deterministic, so a resumed run repeats it.

# %%
ratio_codes = jnp.arange(1, 128, dtype=jnp.int8)
ratios = decode_state(state_of(RatioInt8(ratio_codes), jnp.ones(127))).m

one_gradient = np.zeros(200, np.float32)
one_gradient[0] = 1
_, states = follow(optax_adamax.scale_by_adamax(m_dtype="int8"), one_gradient)
hashed = jax.vmap(lambda state: decode_state(state).m)(states)
nearest = [0.1]
for _ in one_gradient[1:]:
    state = state_of(jnp.float32(0.9 * nearest[-1]), jnp.float32(1))
    nearest.append(float(decode_state(encode_state(state, m_dtype="int8")).m))
after = np.arange(len(one_gradient))
exact_m = 0.1 * 0.9**after

fig, ((values, errors), (ratio, stall)) = subplots(2, 2, figsize=(11, 8))
values.plot(v_values, v_codes, ".", color=BLUE, markersize=4)
values.set(xscale="log", xlabel="v", ylabel="code", yticks=(0, 64, 128, 192, 255))
values.set_title("uint8 v: the codes", loc="left")
errors.plot(v, errors_of_v, color=BLUE, lw=1.2)
errors.axhline(1 / 8, color=GREY, ls=":")
errors.axhline(-1 / 8, color=GREY, ls=":")
errors.text(0.5, 0.13, "1/8", color=GREY)
errors.set_xscale("log", base=2)
errors.set_xticks((0.5, 1, 2, 4), ("1/2", "1", "2", "4"))
errors.set(xlabel="v", ylabel="relative error", ylim=(-0.17, 0.17))
errors.set_title("uint8 v: error of rounding", loc="left")
ratio.plot(ratio_codes, ratios, ".", color=BLUE, markersize=4)
ratio.set(yscale="log", xlabel="code (negative codes mirror these)", ylabel="m / v")
ratio.set(xticks=(1, 32, 64, 96, 127))
ratio.set_title("int8 m: the codes", loc="left")
stall.plot(after, nearest, color=ORANGE, lw=2)
stall.plot(after, hashed, color=BLUE, lw=2)
stall.plot(after, exact_m, "k--", lw=1.2)
stall.set_yscale("symlog", linthresh=2**-16, linscale=0.3)
stall.text(199, 2e-4, "rounded to nearest: stuck", color=ORANGE, ha="right")
stall.text(199, 4e-6, "stochastic rounding\n(dashed: exact)", color=BLUE, ha="right")
stall.set(xlabel="steps without a gradient", ylabel="m")
stall.set_title("int8 m: after the last gradient", loc="left")
fig.savefig(FOLDER / "low_bit_state_codes.png")
print(f"m after {after[-1]} steps: exact {exact_m[-1]:.1e}", end=", ")
print(f"stochastic rounding {hashed[-1]:.1e}, nearest {nearest[-1]:.1e}")

# %% [markdown]
# ## Bytes and loss
#
# The model is a perceptron for the 1,797 real digits that ship with scikit-learn. The learning rate
# is 0.002, as in the paper. All formats start from the same parameters and use the same batches.
# The bytes of state are the bytes that the compiled training step overwrites in place, without the
# parameters.

# %%
digits = load_digits()
images, labels = jnp.float32(digits.data / 16), jnp.int32(digits.target)
STEPS, SEEDS, RATE = 1500, np.arange(3), 0.002
FORMATS = {
    "float32": optax_adamax.adamax(RATE),
    "bfloat16, bfloat16": optax_adamax.adamax(RATE, m_dtype="bfloat16", v_dtype="bfloat16"),
    "int8, uint8": optax_adamax.adamax(RATE, m_dtype="int8", v_dtype="uint8"),
    "naive bfloat16": naive_bfloat16(optax.adamax(RATE)),
}


def init_params(key: jax.Array) -> dict[str, jax.Array]:
    he_normal = jax.nn.initializers.he_normal()
    first, second = jax.random.split(key)
    weights = {"w1": he_normal(first, (64, 128)), "w2": he_normal(second, (128, 10))}
    return weights | {"b1": jnp.zeros(128), "b2": jnp.zeros(10)}


def cross_entropy(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train_step(tx, params, state, key):
    batch = jax.random.randint(key, (50,), 0, len(images))
    loss, grads = jax.value_and_grad(cross_entropy)(params, images[batch], labels[batch])
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def bytes_per_parameter(tx: optax.GradientTransformation) -> float:
    """Returns the bytes of state per parameter in a compiled step that overwrites the state."""
    params = init_params(jax.random.key(0))
    step = jax.jit(functools.partial(train_step, tx), donate_argnums=(0, 1))
    memory = step.lower(params, tx.init(params), jax.random.key(0)).compile().memory_analysis()
    n = sum(p.size for p in params.values())
    return memory.alias_size_in_bytes / n - 4


def train(tx: optax.GradientTransformation, seed: jax.Array):
    """Returns the loss of each step, and the final loss on all images."""
    start, batches = jax.random.split(jax.random.key(seed))
    params = init_params(start)

    def step(carry, key):
        params, state, loss = train_step(tx, *carry, key)
        return (params, state), loss

    keys = jax.random.split(batches, STEPS)
    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
    return losses, cross_entropy(params, images, labels)


state_bytes = {name: bytes_per_parameter(tx) for name, tx in FORMATS.items()}
curves, final = {}, {}
for name, tx in tqdm(FORMATS.items()):
    curves[name], final[name] = jax.jit(jax.vmap(functools.partial(train, tx)))(SEEDS)

deviation = np.std(final["float32"], ddof=1)
print(f"{'state (m, v)':20} {'bytes per parameter':>19} {'final loss':>11}   gap to float32")
for name in FORMATS:
    gap = np.mean(final[name] - final["float32"])
    print(f"{name:20} {state_bytes[name]:19.3f} {np.mean(final[name]):11.5f}   {gap:+.5f}")
print(f"(means of {len(SEEDS)} seeds; standard deviation of the float32 loss: {deviation:.5f})")

# %%
COLORS = dict(zip(FORMATS, ("k", GREEN, BLUE, ORANGE), strict=True))
STYLES = dict(zip(FORMATS, ((0, (4, 3)), "-", "-", "-"), strict=True))
WIDTHS = dict(zip(FORMATS, (1.2, 5, 2.5, 2), strict=True))

fig, (left, right) = subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 3))
for place, name in enumerate(FORMATS):
    left.barh(-place, state_bytes[name], color=COLORS[name], height=0.6)
    left.text(state_bytes[name] + 0.1, -place, f"{state_bytes[name]:.2f}", va="center")
left.set_yticks(-np.arange(len(FORMATS)), FORMATS)
left.tick_params(left=False)
left.set(xlabel="bytes", xlim=(0, 9))
left.set_title("State per parameter", loc="left")
blocks = np.arange(1, STEPS // 50 + 1) * 50
for name in ("bfloat16, bfloat16", "int8, uint8", "naive bfloat16", "float32"):
    mean = np.mean(curves[name], 0).reshape(-1, 50).mean(1)
    style = {"color": COLORS[name], "lw": WIDTHS[name], "ls": STYLES[name]}
    right.plot(blocks, mean, alpha=0.4 if name == "bfloat16, bfloat16" else 1, label=name, **style)
right.set(yscale="log", xlabel="step", ylabel="loss")
right.legend(frameon=False)
right.set_title("Training loss, mean of three seeds", loc="left")
fig.savefig(FOLDER / "low_bit_state_loss.png")

# %% [markdown]
# `python -m benchmarks.quality` compares the formats on more tasks, with tuned learning rates, more
# seeds and held-out losses.

# %% [markdown]
# ## Does the format fit my gradients?
#
# uint8 stores v from 1.2e-10 to 9.4e8. `describe_state` shows the range of v in each leaf, and
# proposes other arguments if the format does not fit.

# %%
rng = np.random.default_rng(0)
sizes = {"tiny": 1e-12, "small": 1e-6, "usual": 1e-2, "large": 1e8, "huge": 1e12}
leaves = {name: jnp.zeros(1000) for name in sizes}
tx = optax_adamax.adamax(1e-3, eps=0.0, m_dtype="int8", v_dtype="uint8")
state = tx.init(leaves)
for _ in range(100):
    gradients = {k: jnp.asarray(x * rng.standard_t(3, 1000), jnp.float32) for k, x in sizes.items()}
    _, state = jax.jit(tx.update)(gradients, state)
description = optax_adamax.describe_state(state, eps=0.0)
print(description)

# %%
fig, (spans, shares) = subplots(1, 2, figsize=(11, 3.6), sharey=True)
by_path = {leaf.path: leaf for leaf in description.leaves}
names = list(sizes)
found = [by_path[name] for name in names]
for row, leaf in enumerate(found):
    spans.plot([leaf.v_min, leaf.v_max], [row, row], color=BLUE, lw=8, solid_capstyle="butt")
    shares.barh(row - 0.2, 100 * leaf.underflow_fraction, color=GREEN, height=0.4)
    shares.barh(row + 0.2, 100 * leaf.saturated_fraction, color=ORANGE, height=0.4)
spans.axvspan(2**-33, 1.75 * 2**29, color=GREY, alpha=0.15)
spans.text(2**-32, -0.75, "uint8 range", color=GREY, va="center")
spans.set_yticks(range(len(names)), names)
spans.set(xscale="log", xlabel="v, smallest to largest", ylim=(-1, len(names) - 0.5))
spans.set_title("v of each leaf", loc="left")
shares.text(99, 0.22, "underflow", color=GREEN, ha="right", va="bottom")
shares.text(99, len(names) - 1.22, "saturated", color=ORANGE, ha="right", va="top")
shares.set(xlabel="% of elements")
shares.set_title("Outside of the range", loc="left")
fig.savefig(FOLDER / "low_bit_state_fit.png")
