"""Names of leaves do not depend on Flax variables around them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax_boxes import linen, nnx, unboxed

from optax_adamax._messages import leaf_label
from optax_adamax._messages import names as names_in_quotes
from optax_adamax._paths import named_leaves, path_name


class Quantity(NamedTuple):
    value: float
    unit: float


def names(tree, separator=None):
    return [name for name, _ in named_leaves(tree, separator)]


def test_nnx_variables_are_not_in_names():
    boxed = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    arrays = unboxed(boxed)
    assert names(boxed) == names(arrays) == ["['bias']", "['kernel']"]
    assert names({"layer": boxed}, "/") == ["layer/bias", "layer/kernel"]


def test_linen_partitioned_is_not_in_names():
    partitioned = linen.with_partitioning(linen.initializers.ones, (None, "model"))
    params = linen.Dense(3, kernel_init=partitioned).init(jax.random.key(0), jnp.ones((1, 2)))
    assert isinstance(params["params"]["kernel"], linen.Partitioned)
    assert names(params) == ["['params']['bias']", "['params']['kernel']"]
    assert names(params) == names(unboxed(params))


@pytest.mark.parametrize("separator", [None, "/"])
def test_trees_without_flax_have_the_names_of_jax(separator):
    tree = {"value": 1.0, "b": [2.0, {"value": 3.0}], "c": Quantity(Quantity(4.0, 5.0), 6.0)}
    simple = {} if separator is None else {"simple": True, "separator": separator}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    of_jax = [jax.tree_util.keystr(path, **simple) for path in paths]
    found = names(tree, separator)
    assert found[2] == path_name(
        paths[2][:1], separator
    )  # named as if it were a variable in a variable
    assert found[:2] + found[3:] == of_jax[:2] + of_jax[3:]
    assert len(set(found)) == len(found)


def test_a_variable_at_the_root_has_no_name():
    ((path, _),) = jax.tree_util.tree_leaves_with_path(nnx.Param(jnp.ones(2)))
    assert path_name(path) == path_name(()) == ""


@pytest.mark.parametrize("boxed", [True, False])
def test_messages_quote_a_path_once(boxed):
    params = nnx.state(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), nnx.Param)
    params = params if boxed else unboxed(params)
    (path, _), *_ = jax.tree_util.tree_leaves_with_path(params)
    assert leaf_label("gradient", path) == "gradient 'layers/0/bias'"
    assert leaf_label("gradient", ()) == "gradient"
    assert names_in_quotes(str(i) for i in range(7)) == "'0', '1', '2', '3', '4' and 2 more"
    assert names_in_quotes(str(i) for i in range(6)) == "'0', '1', '2', '3', '4' and 1 more"
