"""Functions that raise if they are differentiated, because rounding has no useful derivative."""

from collections.abc import Callable
from typing import Any

import jax


def identity_without_derivative(message: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the identity function, which raises a TypeError with `message` if differentiated."""

    @jax.custom_jvp
    def identity(x: jax.Array) -> jax.Array:
        return x

    @identity.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        raise TypeError(message)

    return identity
