"""The most likely mistakes of a new user, and the table of their messages in the documentation.

``python tests/common_mistakes.py`` runs each mistake and writes the table to the page.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "guide" / "troubleshooting.md"
MARKS = ("<!-- common mistakes: begin -->", "<!-- common mistakes: end -->")

SETUP = """
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from optax_adamax import adamax, adamaxw

params = {"w": jnp.ones(3), "b": jnp.zeros(2)}
loss = lambda params: sum(jnp.sum(jnp.square(x)) for x in params.values())
gradients = jax.grad(loss)(params)
tx = adamax(1e-3)
state = tx.init(params)
half = {"w": jnp.ones(3, jnp.bfloat16)}
schedule = optax.cosine_decay_schedule(1e-3, 100)
"""

MISTAKES = [
    "adamax(lr=1e-3)",
    "adamax(1e-3, weight_decay=0.01)",
    'adamax(1e-3, m_dtype="bf16")',
    "tx.init(nn.Dense(3))",
    "tx.update(gradients, params, state)",
    "tx.update(jax.value_and_grad(loss)(params), state)",
    "adamax(1e-3).update(gradients, optax.adamax(1e-3).init(params))",
    "adamax(schedule).update(gradients, state)",
    'adamax(1e-3, m_dtype="int8", v_dtype="uint8").update(gradients, state)',
    "optax.inject_hyperparams(adamax)(1e-3).init(half)",
]


def names() -> dict[str, Any]:
    """Returns the names that a mistake uses."""
    found: dict[str, Any] = {}
    exec(SETUP, found)
    return found


def message(mistake: str, given: dict[str, Any]) -> tuple[str, str]:
    """Runs a mistake; returns the name of its exception and the message."""
    try:
        exec(mistake, given)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError(f"{mistake} raises nothing")


def table() -> str:
    """Returns the table as Markdown."""
    given = names()
    rows = ["| You write | It raises |", "| --- | --- |"]
    for mistake in MISTAKES:
        error, words = message(mistake, given)
        words = re.sub(r"([|*_<>\[\]])", r"\\\1", words)
        rows.append(f"| `{mistake}` | `{error}`: {words} |")
    return "\n".join(rows)


def with_table(page: str) -> str:
    """Returns the page with the table between its marks."""
    begin, end = MARKS
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    setup = textwrap.indent(SETUP.strip(), "")
    return f"{before}{begin}\n```python\n{setup}\n```\n\n{table()}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
