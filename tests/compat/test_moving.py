"""The tables of docs/guide/moving.md, and its code that needs a framework."""

import contextlib
import io
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_adamax
from optax_adamax import compat
from optax_adamax.compat import keras as compat_keras
from optax_adamax.compat import lucid as compat_lucid
from optax_adamax.compat import mlx as compat_mlx
from optax_adamax.compat import optax as compat_optax
from optax_adamax.compat import torch as compat_torch

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "moving.md").read_text("utf-8")
OURS = {
    "optax": compat_optax,
    "PyTorch": compat_torch,
    "Keras": compat_keras,
    "MLX": compat_mlx,
    "Lucid": compat_lucid,
}


@pytest.fixture(autouse=True)
def as_frameworks_compute():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def table(head):
    """Returns the rows of the table with this head, as lists of cells without backticks."""
    after = PAGE[PAGE.index(f"\n| {head}") :].strip().split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in row.strip("|").split(" | ")] for row in after]


def test_page_has_only_tested_tables():
    heads = re.findall(r"^(\|.*\|)\n\| ---", PAGE, re.M)
    assert [head.strip("| ").split(" | ")[0] for head in heads] == [
        "you wrote",
        "eps",
        "`torch.optim.lr_scheduler`",
        "`keras.optimizers.schedules`",
        "your state",
    ]


GRADIENTS = [np.array([0.5, -0.2, 1e-3], "f4"), np.array([0.1, 0.3, 0.2], "f4")] * 2
START = np.array([1.0, 2.0, 3.0], "f4")


class Torch:
    """Trains one parameter with PyTorch's optimizer."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        self.w = self.torch.nn.Parameter(self.torch.tensor(START))
        self.names = {"torch": self.torch, "model": self}

    def parameters(self):
        return [self.w]

    def train(self, optimizer):
        for g in GRADIENTS:
            self.w.grad = self.torch.tensor(g)
            optimizer.step()
        return self.w.detach().numpy()


class Keras:
    """See `Torch`."""

    def __init__(self):
        keras = pytest.importorskip("keras")
        self.w, self.names = keras.Variable(START, name="w"), {"keras": keras}

    def train(self, optimizer):
        optimizer.build([self.w])
        for g in GRADIENTS:
            optimizer.apply([jnp.asarray(g)])
        return np.asarray(self.w.value)


class Mlx:
    """See `Torch`."""

    def __init__(self):
        self.mx = pytest.importorskip("mlx.core")
        import mlx.optimizers

        self.names = {"mlx": mlx}

    def train(self, optimizer):
        params = {"w": self.mx.array(START)}
        for g in GRADIENTS:
            params = optimizer.apply_gradients({"w": self.mx.array(g)}, params)
        return np.array(params["w"])


class Optax:
    """Trains one parameter with a transformation of optax or of this package."""

    def __init__(self):
        self.names = {"optax": optax, "optax_adamax": optax_adamax, "compat": compat}

    def train(self, tx):
        params = {"w": jnp.asarray(START)}
        self.state = tx.init(params)
        for g in GRADIENTS:
            updates, self.state = tx.update({"w": jnp.asarray(g)}, self.state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params["w"])


PEERS = {"optax": Optax, "PyTorch": Torch, "Keras": Keras, "MLX": Mlx}


@pytest.mark.parametrize("row", table("| you wrote"), ids=lambda row: row[0])
def test_constructors_of_the_table_equal_their_frameworks(row):
    name, theirs, ours = row
    after = Optax().train(eval(ours, Optax().names))
    assert not np.allclose(after, START)
    if name != "Lucid":  # which cannot be installed here
        peer = PEERS[name]()
        np.testing.assert_allclose(after, peer.train(eval(theirs, peer.names)), rtol=1e-6)


@pytest.mark.parametrize("row", table("| eps"), ids=lambda row: row[0])
def test_conventions_of_the_table_hold(row):
    name, eps, bias_correction, weight_decay = row
    module, one = OURS[name], jnp.ones(1)

    def after_a_step(make=module.adamax, **options):
        tx = make(0.1, **options)
        updates, state = tx.update(one, tx.init(one), one)
        return float(updates[0]), float(optax.tree.get(state, "v")[0])

    key = "epsilon" if name == "Keras" else "eps"
    in_the_maximum = after_a_step(**{key: 1.0})[1] == 2.0
    assert eps == ("in the maximum" if in_the_maximum else "in the denominator")
    corrected = math.isclose(after_a_step()[0], -0.1, rel_tol=1e-5)
    assert bias_correction == ("yes" if corrected else "no")
    if weight_decay == "none":
        with pytest.raises(TypeError, match="weight_decay"):
            after_a_step(weight_decay=0.5)
        return
    make = getattr(module, "adamaxw", module.adamax)
    step, v = after_a_step(make, weight_decay=0.5)
    decoupled = math.isclose(step, -0.15, rel_tol=1e-5) and math.isclose(v, 1.0, rel_tol=1e-5)
    coupled = math.isclose(step, -0.1, rel_tol=1e-5) and math.isclose(v, 1.5, rel_tol=1e-5)
    assert decoupled != coupled
    assert weight_decay.startswith("decoupled" if decoupled else "added to the gradient")


@pytest.mark.parametrize("row", table("| your state"), ids=lambda row: row[0])
def test_states_of_the_table_load(row):
    name, code = row
    peer = PEERS[name]()
    constructors = {line[0]: line[1:] for line in table("| you wrote")}
    optimizer = eval(constructors[name][0], peer.names)
    after = peer.train(optimizer)
    names = {
        "optimizer": optimizer,
        "compat": compat,
        "params": {"inner": {"w": jnp.asarray(after)}} if name != "optax" else {"w": after},
        "tx": eval(constructors[name][1], Optax().names),
        "layout": {"w": "inner/w"},
        "names": ["w"],
        "source_state": getattr(peer, "state", None),
    }
    state = eval(code, names)
    assert int(optax.tree.get(state, "count")) == len(GRADIENTS)
    assert float(jnp.max(jax.tree.leaves(optax.tree.get(state, "v"))[0])) > 0.2


def blocks():
    """Returns the code of the page by caption; code without a caption is under ""."""
    plain = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    captioned = re.findall(
        r"^```{code-block} python\n:caption: (\w+)\n(.*?)^```", PAGE, re.M | re.S
    )
    return {"": "\n".join(plain), **dict(captioned)}


def run(*captions, **names):
    """Runs the code under these captions, and returns its variables."""
    code = "\n".join(blocks()[caption] for caption in ("", *captions))
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "moving.md", "exec"), names)
    return names


FILES = {"PyTorch": "model.pt", "Keras": "model.weights.h5", "MLX": "optimizer.safetensors"}
MODULES = {"PyTorch": "torch", "Keras": "keras", "MLX": "mlx.core"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", FILES)
def test_round_trip_continues_the_loss_curve(name, tmp_path):
    pytest.importorskip(MODULES[name])
    page = run(name, file=str(tmp_path / FILES[name]))
    losses = np.array(page["losses"])
    assert len(losses) == 300 and int(page["steps"]) == 300
    assert losses[-1] < 0.01 * losses[0]
    # No jump at a seam: a state that began anew would take steps of full length.
    assert np.all(losses[21:] < 1.02 * losses[20:-1])
    bytes_per_param = sum(x.nbytes for x in jax.tree.leaves(page["state"]) if x.ndim) / 15
    assert bytes_per_param == 2


def test_names_of_returns_a_list_per_group():
    pytest.importorskip("torch")
    expected = [["head.weight", "head.bias"], ["body.weight", "body.bias"]]
    assert run("groups")["names"] == expected


def test_state_of_torch_continues_in_nnx_optimizer(tmp_path):
    pytest.importorskip("torch")
    nnx = pytest.importorskip("flax.nnx")
    page = run("PyTorch", "nnx", file=str(tmp_path / "model.pt"))
    model, optimizer = page["model"], page["optimizer"]

    def loss(model):
        return jnp.mean((model(page["x"]) - page["y"]) ** 2)

    before = float(loss(model))
    assert before == pytest.approx(page["losses"][100], rel=1e-4)
    optimizer.update(model, nnx.grad(loss)(model))
    assert float(loss(model)) == pytest.approx(page["losses"][101], rel=1e-2)
    assert int(optax.tree.get(nnx.as_pure(optimizer.opt_state), "count")) == 101


def test_bfloat16_parameters_return_to_torch():
    torch = pytest.importorskip("torch")
    (code,) = re.findall(r"`to_array=(lambda x: torch\.from_numpy.*?)`", PAGE)
    to_array = eval(code, {"torch": torch, "np": np})
    params = {"w": jnp.linspace(-1, 1, 7, dtype=jnp.bfloat16)}
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
    model.load_state_dict(compat_torch.dump_params(params, to_array=to_array))
    assert model.w.dtype == torch.bfloat16
    np.testing.assert_array_equal(model.w.detach().float().numpy(), params["w"].astype("f4"))
    with pytest.raises(TypeError):
        compat_torch.dump_params(params, to_array=torch.from_numpy)
