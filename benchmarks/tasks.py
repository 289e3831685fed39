"""Defines four small training tasks on data from scikit-learn and from Python's sources.

The loss of a task draws its batch and its noise from a random key. Runs with the same keys use the
same batches.
"""

import hashlib
import itertools
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

Params = dict[str, jax.Array]

he_normal = jax.nn.initializers.he_normal()
lecun_normal = jax.nn.initializers.lecun_normal()


class Task(NamedTuple):
    """A training problem; `train_loss` and `held_out_loss` evaluate fixed examples."""

    description: str
    steps: int
    seeds: int
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, jax.Array], jax.Array]
    train_loss: Callable[[Params], jax.Array]
    held_out_loss: Callable[[Params], jax.Array]
    b1: float = 0.9


# --- Digits: 1,797 images of 8 x 8 pixels from scikit-learn.


@cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns pixels in [0, 1] and labels of the training set and of the held-out set."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels, labels = np.float32(data.data / 16)[order], np.int32(data.target)[order]
    return pixels[:1297], labels[:1297], pixels[1297:], labels[1297:]


def classifier() -> Task:
    """Returns a task that classifies digits with a perceptron of two hidden layers."""
    x, y, held_out_x, held_out_y = digits()
    sizes = (64, 128, 64, 10)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 3)
        shapes = enumerate(itertools.pairwise(sizes))
        weights = {f"w{i}": he_normal(keys[i], shape) for i, shape in shapes}
        return weights | {f"b{i}": jnp.zeros(n) for i, n in enumerate(sizes[1:])}

    def cross_entropy(x: jax.Array, y: jax.Array, params: Params) -> jax.Array:
        for i in range(3):
            x = jax.nn.relu(x) if i else x
            x = x @ params[f"w{i}"] + params[f"b{i}"]
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    def loss(params: Params, key: jax.Array) -> jax.Array:
        batch = jax.random.randint(key, (50,), 0, len(x))
        return cross_entropy(jnp.asarray(x)[batch], jnp.asarray(y)[batch], params)

    return Task(
        description="digits, perceptron 64-128-64-10, batch 50: cross-entropy",
        steps=1500,
        seeds=20,
        init=init,
        loss=loss,
        train_loss=partial(cross_entropy, x, y),
        held_out_loss=partial(cross_entropy, held_out_x, held_out_y),
    )


def autoencoder() -> Task:
    """Returns a task that trains a variational autoencoder with Bernoulli pixels on digits."""
    x, _, held_out_x, _ = digits()
    latent = 8
    layers = {"in": (64, 128), "latent": (128, 2 * latent), "hidden": (latent, 128)}
    layers |= {"out": (128, 64)}

    def init(key: jax.Array) -> Params:
        keys = dict(zip(layers, jax.random.split(key, len(layers)), strict=True))
        weights = {f"{k}_w": lecun_normal(keys[k], shape) for k, shape in layers.items()}
        return weights | {f"{k}_b": jnp.zeros(shape[1]) for k, shape in layers.items()}

    def layer(params: Params, name: str, x: jax.Array) -> jax.Array:
        return x @ params[f"{name}_w"] + params[f"{name}_b"]

    def negative_elbo(x: jax.Array, key: jax.Array, params: Params) -> jax.Array:
        code = layer(params, "latent", jax.nn.relu(layer(params, "in", x)))
        mean, log_deviation = code[:, :latent], code[:, latent:]
        z = mean + jnp.exp(log_deviation) * jax.random.normal(key, mean.shape)
        logits = layer(params, "out", jax.nn.relu(layer(params, "hidden", z)))
        reconstruction = optax.sigmoid_binary_cross_entropy(logits, x).sum(1)
        divergence = 0.5 * (mean**2 + jnp.exp(2 * log_deviation) - 1) - log_deviation
        return (reconstruction + divergence.sum(1)).mean()

    def loss(params: Params, key: jax.Array) -> jax.Array:
        key, noise = jax.random.split(key)
        batch = jax.random.randint(key, (100,), 0, len(x))
        return negative_elbo(jnp.asarray(x)[batch], noise, params)

    def mean_loss(x: np.ndarray, params: Params) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), 16)
        return jax.lax.map(lambda key: negative_elbo(jnp.asarray(x), key, params), keys).mean()

    return Task(
        description="digits, variational autoencoder 64-128-8-128-64, batch 100: negative ELBO",
        steps=1500,
        seeds=20,
        init=init,
        loss=loss,
        train_loss=partial(mean_loss, x),
        held_out_loss=partial(mean_loss, held_out_x),
    )


# --- Text: the sources of Python's standard library.


@cache
def sources() -> tuple[str, str]:
    """Returns the text of top-level modules of the standard library; every tenth is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    # This module contains the build settings of Python, which depend on the machine.
    files = [file for file in files if not file.name.startswith("_sysconfigdata")]
    texts = [file.read_text("utf-8") for file in files]
    held_out = "".join(texts[::10])
    return "".join(text for i, text in enumerate(texts) if i % 10), held_out


def text_fingerprint() -> dict[str, int | str]:
    """Returns sizes and hash of the text, which depends on the release of Python."""
    train, held_out = sources()
    digest = hashlib.sha256((train + held_out).encode()).hexdigest()
    return {"characters": len(train), "held_out_characters": len(held_out), "sha256": digest}


def transformer() -> Task:
    """Returns a task that trains a character transformer of two layers, width 64 and context 64."""
    # Characters outside ASCII are mapped to symbol 127, which no source contains.
    text, held_out = (
        np.minimum(np.frombuffer(t.encode("utf-32-le"), np.uint32), 127).astype(np.int32)
        for t in sources()
    )
    depth, width, heads, context, batch = 2, 64, 4, 64, 8

    def init(key: jax.Array) -> Params:
        keys = iter(jax.random.split(key, 3 + 4 * depth))
        shapes = {"qkv": (width, 3 * width), "mix": (width, width)}
        shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
        params = {
            "tokens": 0.02 * jax.random.normal(next(keys), (128, width)),
            "positions": 0.02 * jax.random.normal(next(keys), (context, width)),
            "head": lecun_normal(next(keys), (width, 128)),
        }
        for i in range(depth):
            params |= {f"{name}{i}": lecun_normal(next(keys), s) for name, s in shapes.items()}
            params |= {f"scale_{half}{i}": jnp.ones(width) for half in ("mix", "mlp")}
        return params | {"scale": jnp.ones(width)}

    def normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def cross_entropy(params: Params, tokens: jax.Array) -> jax.Array:
        """Returns the cross-entropy of the last `context` characters of each row."""
        x = params["tokens"][tokens[:, :-1]] + params["positions"]
        for i in range(depth):
            qkv = normalize(x, params[f"scale_mix{i}"]) @ params[f"qkv{i}"]
            q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], heads, -1), 3, -1)
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + mixed.reshape(x.shape) @ params[f"mix{i}"]
            hidden = normalize(x, params[f"scale_mlp{i}"]) @ params[f"up{i}"]
            x = x + jax.nn.gelu(hidden) @ params[f"down{i}"]
        logits = normalize(x, params["scale"]) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def loss(params: Params, key: jax.Array) -> jax.Array:
        starts = jax.random.randint(key, (batch,), 0, len(text) - context)
        return cross_entropy(params, jnp.asarray(text)[starts[:, None] + np.arange(context + 1)])

    def mean_loss(text: np.ndarray, params: Params) -> jax.Array:
        """Returns the mean over 1,024 equally spaced windows."""
        starts = np.linspace(0, len(text) - context - 1, 1024).astype(np.int32).reshape(16, 64)
        windows = jnp.asarray(text[starts[:, :, None] + np.arange(context + 1)])
        return jax.lax.map(partial(cross_entropy, params), windows).mean()

    return Task(
        description="characters of Python's standard library, transformer of two layers and "
        "width 64, batch 8 x 64: cross-entropy",
        steps=1000,
        seeds=6,
        init=init,
        loss=loss,
        train_loss=partial(mean_loss, text),
        held_out_loss=partial(mean_loss, held_out),
    )


def embedding() -> Task:
    """Returns a task that trains skip-gram word vectors; most rows have zero gradients."""
    size, width, batch, negatives, reach = 4096, 32, 64, 5, 2
    words, held_out_words = (re.findall(r"\w+|[^\w\s]", text) for text in sources())
    counts = Counter(words).most_common(size)
    index = {word: i for i, (word, _) in enumerate(counts)}
    corpus, held_out = (
        np.array([index[w] for w in text if w in index], np.int32)
        for text in (words, held_out_words)
    )
    frequency = np.array([n for _, n in counts], np.float64) ** 0.75
    cumulative = np.float32(np.cumsum(frequency / frequency.sum()))

    def init(key: jax.Array) -> Params:
        vectors = jax.random.uniform(key, (size, width), minval=-0.5, maxval=0.5) / width
        return {"vectors": vectors, "contexts": jnp.zeros((size, width))}

    def sampled_loss(corpus: np.ndarray, n: int, params: Params, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        at = jax.random.randint(keys[0], (n,), reach, len(corpus) - reach)
        offsets = jnp.array([k for k in range(-reach, reach + 1) if k])
        near = at + jax.random.choice(keys[1], offsets, (n,))
        far = jnp.searchsorted(jnp.asarray(cumulative), jax.random.uniform(keys[2], (n, negatives)))
        center, corpus = params["vectors"][jnp.asarray(corpus)[at]], jnp.asarray(corpus)
        of_near = (center * params["contexts"][corpus[near]]).sum(-1)
        of_far = jnp.einsum("bw,bnw->bn", center, params["contexts"][far])
        return (jax.nn.softplus(-of_near) + jax.nn.softplus(of_far).sum(-1)).mean()

    def mean_loss(corpus: np.ndarray, params: Params) -> jax.Array:
        """Returns the mean over 2**17 fixed pairs."""
        keys = jax.random.split(jax.random.key(0), 32)
        return jax.lax.map(partial(sampled_loss, corpus, 4096, params), keys).mean()

    return Task(
        description=f"words of Python's standard library, skip-gram with {negatives} negative "
        f"samples, {size} words in {width} dimensions, batch {batch}; in a step, at most {batch} "
        f"of {size} rows of one table and {batch * (1 + negatives)} of the other have a nonzero "
        "gradient: logistic loss",
        steps=2000,
        seeds=20,
        init=init,
        loss=partial(sampled_loss, corpus, batch),
        train_loss=partial(mean_loss, corpus),
        held_out_loss=partial(mean_loss, held_out),
    )


TASKS = {
    "digits classifier": classifier,
    "character transformer": transformer,
    "variational autoencoder": autoencoder,
    "sparse embedding": embedding,
}
