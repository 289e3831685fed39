"""Parts of error messages: descriptions of values, trees, and objects of other packages.

A message names the error, the value received, and a correction. It does not print the elements of
an array.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from optax_adamax._paths import path_name

# Advice for an object of another package, by the package that defines its class.
CONVERSIONS = {
    "flax.linen": 'Pass the parameters that its init returns, model.init(key, x)["params"].',
    "flax.nnx": "Call nnx.Optimizer.update, or pass the tree of nnx.state(model, nnx.Param).",
    "jax.experimental.sparse": "Pass x.todense(): moments are dense.",
    "keras": "Pass [v.value for v in model.trainable_variables].",
    "torch": "Pass a tree of JAX arrays, such as jnp.asarray(tensor.detach().numpy()).",
    "mlx": "Pass a tree of JAX arrays, such as jnp.asarray(numpy.asarray(array)).",
}
# Packages whose name is put before the name of a class, which may be as short as "array".
PACKAGES = ("flax", "keras", "torch", "mlx")
MAX_NAMES = 5
# Sentences for the state that `update` receives.
ORDER = "The arguments are update(gradients, state, params), in this order."
CONTINUE = "To continue a run without {}, write init(params)._replace(inner_state=state)."


def describe_value(x: Any) -> str:
    """Describes a value in a few words, without the elements of an array.

    >>> import numpy as np
    >>> print(describe_value(np.ones(3)), "|", describe_value({"w": 1}), "|", describe_value("x"))
    an array of shape (3,) and dtype float64 | a dict with the keys 'w' | 'x'
    """
    if x is None or isinstance(x, (bool, int, float, complex)):
        return repr(x)
    if isinstance(x, str):
        return repr(x if len(x) <= 40 else x[:40] + "...")
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return f"an array of shape {np.shape(x)} and dtype {x.dtype}"
    if callable(x) and hasattr(x, "__name__"):  # also jax.jit and jax.custom_jvp
        return f"the {'class' if isinstance(x, type) else 'function'} {x.__name__}"
    package = type(x).__module__.partition(".")[0]
    name = f"{package} {type(x).__name__}" if package in PACKAGES else type(x).__name__
    name = with_article(name)
    return f"{name} with the keys {names(map(str, x))}" if isinstance(x, Mapping) and x else name


def describe_dtype(dtype: Any, name: str) -> str:
    """Describes an argument that JAX reads as the dtype `name`.

    >>> import numpy as np
    >>> print(describe_dtype("i8", "int64"), "|", describe_dtype(np.int16, "int16"))
    'i8', which is int64, | int16
    """
    written = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", name)
    return name if written == name else f"{written!r}, which is {name},"


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun."""
    is_vowel = noun.lower().startswith(("a", "e", "i", "o", "u", "mlx"))
    return f"{'an' if is_vowel else 'a'} {noun}"


def wrong_state(wanted: type, state: Any, *advice: str) -> str:
    """Returns the message for a state that is not an instance of the class `wanted`."""
    received = f"The state must be a {wanted.__name__}, but {describe_value(state)} was given."
    return " ".join([received, ORDER, *advice])


def arrays_summary(tree: Any) -> str:
    """Returns the number and the dtypes of the arrays in a tree, for `repr`.

    >>> import numpy as np
    >>> print(arrays_summary({"b": np.ones(3, np.float32), "w": np.ones(2, np.float32)}))
    <2 float32 arrays>
    """
    leaves = jax.tree.leaves(tree)
    dtypes = sorted({str(getattr(x, "dtype", type(x).__name__)) for x in leaves})
    return f"<{' '.join([str(len(leaves)), *filter(None, ['/'.join(dtypes)]), 'arrays'])}>"


def count_summary(count: Any) -> str:
    """Formats a step count, or its dtype if this process cannot read its value."""
    (leaf, *others) = jax.tree.leaves(count) or [None]
    is_known = isinstance(leaf, (Tracer, np.ndarray, int)) or (
        isinstance(leaf, jax.Array) and leaf.is_fully_replicated and not leaf.is_deleted()
    )
    return str(leaf) if is_known and not others else str(getattr(leaf, "dtype", leaf))


def names(found: Iterable[str]) -> str:
    """Lists names in quotes, at most `MAX_NAMES` of them.

    >>> print(names(["a", "layer/w"]), "|", names("abcdefg"))
    'a', 'layer/w' | 'a', 'b', 'c', 'd', 'e' and 2 more
    """
    return key_paths(map(repr, found))


def key_paths(found: Iterable[str]) -> str:
    """Lists paths such as ``['layer']['w']`` without more quotes, at most `MAX_NAMES` of them."""
    shown = [path or "(a single array)" for path in found]
    more = len(shown) - MAX_NAMES
    return ", ".join(shown[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def leaf_label(kind: str, path: tuple[Any, ...]) -> str:
    """Names a leaf: ``gradient 'layer/w'``, or ``gradient`` if the tree consists of this leaf."""
    name = path_name(path, "/")
    return f"{kind} {name!r}" if name else kind


def conversion_advice(x: Any) -> str | None:
    """Returns advice for bfloat16 from a NumPy file and for `CONVERSIONS`; None for others."""
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype == np.dtype("V2"):
        return "Write x.view(jnp.bfloat16), because NumPy files do not store the name of bfloat16."
    modules = [base.__module__ for base in type(x).__mro__]
    found = (
        advice
        for package, advice in CONVERSIONS.items()
        if any(module == package or module.startswith(f"{package}.") for module in modules)
    )
    return next(found, None)


def first_difference(
    given: Any, wanted: Any, path: tuple[Any, ...] = ()
) -> tuple[tuple[Any, ...], Any, Any] | None:
    """Returns the path of the first node in which two trees differ, and both nodes, or None."""
    (children, treedef), (others, other_treedef) = map(_one_level, (given, wanted))
    if treedef != other_treedef:
        return path, given, wanted
    pairs = zip(children, others, strict=True)
    found = (first_difference(x, y, (*path, *key)) for (key, x), (_, y) in pairs if key)
    return next(filter(None, found), None)


def describe_difference(kind: str, given: Any, wanted: Any) -> str:
    """Describes the first difference between two trees.

    Args:
      kind: the noun for a leaf, such as "gradient".
      given: the tree received.
      wanted: the tree expected, of another structure.
    """
    found = first_difference(given, wanted)
    assert found is not None
    path, x, y = found
    label = leaf_label(kind, path)
    if y is None:
        return f"there is a {label}, but the parameter was None when init was called"
    keys, known = ([path_name((*path, *key), "/") for key, _ in _one_level(z)[0]] for z in (x, y))
    if type(x) is type(y) and set(keys) != set(known):
        missing = [key for key in known if key not in keys]
        surplus = [key for key in keys if key not in known]
        said = [f"there is no {kind} for {names(missing)}"] if missing else []
        return " and ".join([*said, *([f"{names(surplus)} is unknown"] if surplus else [])])
    if x is None:
        leaves = [path_name(path + key, "/") for key, _ in jax.tree_util.tree_leaves_with_path(y)]
        return f"there is no {kind} for {names(leaves)}" if any(leaves) else f"the {kind} is None"
    if type(x) is type(y):
        return f"the {label} is {describe_value(x)}, but with other metadata than in init"
    return f"the {label} is {describe_value(x)} instead of {describe_value(y)}"


def advice_for_tree(given: Any, wanted: Any, otherwise: str) -> str:
    """Returns advice for the first difference of two trees, or `otherwise` for a common one."""
    found = first_difference(given, wanted)
    assert found is not None
    _, x, y = found
    if type(x) is tuple and type(y) is not tuple:
        return "Pass the gradients alone, without the value or the aux that JAX returns with them."
    if _is_container(x) and _is_container(y) and type(x) is not type(y):
        return "Use the same containers as the parameters given to init, or call init again."
    return (conversion_advice(x) if jax.tree.leaves(x) else None) or otherwise


def _is_container(x: Any) -> bool:
    (path, _), *_ = _one_level(x)[0] or [((), None)]
    return path != ()


def _one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Returns the children of a node with their paths, and its treedef; a leaf is its own child."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
