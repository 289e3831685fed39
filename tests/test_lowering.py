"""The update lowers for CPU, CUDA and TPU, as elementwise arithmetic in float32 or float64.

`jax.export` lowers for all platforms without their hardware.
"""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adamax import scale_by_adamax

PLATFORMS = ("cpu", "cuda", "tpu")

# Options of the transformation, and the parameter dtypes that they support.
REAL = ("float32", "bfloat16", "float16", "float64")
COMPLEX = ("complex64", "complex128")
OPTIONS = {
    "default": ({}, REAL + COMPLEX),
    "denominator": ({"eps_placement": "denominator"}, REAL + COMPLEX),
    "no bias correction": ({"bias_correction": False}, REAL + COMPLEX),
    "nesterov": ({"nesterov": True}, REAL + COMPLEX),
    "float32": ({"m_dtype": "float32", "v_dtype": "float32"}, REAL + COMPLEX),
    "float64": ({"m_dtype": "float64", "v_dtype": "float64"}, ("float64", "complex128")),
    "bfloat16": ({"m_dtype": "bfloat16", "v_dtype": "bfloat16"}, REAL),
    "8 bits": ({"m_dtype": "int8", "v_dtype": "uint8"}, REAL),
    "8 bits, nesterov": ({"m_dtype": "int8", "v_dtype": "uint8", "nesterov": True}, REAL),
    "8 bits of v": ({"v_dtype": "uint8"}, REAL),
}

# Operations on single elements or on scalars.
ARITHMETIC = {"abs", "add", "divide", "maximum", "minimum", "multiply", "negate", "subtract"}
ARITHMETIC |= {"exponential", "exponential_minus_one", "log_plus_one", "sqrt"}
ELEMENTWISE = ARITHMETIC | {"bitcast_convert", "broadcast_in_dim", "compare", "complex", "constant"}
ELEMENTWISE |= {"convert", "floor", "imag", "is_finite", "or", "real", "reduce_precision", "select"}
ELEMENTWISE |= {"round_nearest_even", "shift_left", "shift_right_arithmetic", "shift_right_logical"}
ELEMENTWISE |= {"and", "xor"}  # used by the check for finite numbers and the hash of the count
ELEMENTWISE |= {"case", "return"}  # these two select the platform at compile time


def case(option, dtype):
    """Returns a test parameter; half precision and complex128 are slow for most options."""
    few = dtype in ("float32", "float64", "complex64") or option in ("default", "8 bits")
    return pytest.param(option, dtype, marks=() if few else pytest.mark.slow)


every_case = pytest.mark.parametrize(
    ("option", "dtype"),
    [case(option, dtype) for option, (_, dtypes) in OPTIONS.items() for dtype in dtypes],
)


def is_64_bit(dtype):
    return dtype in ("float64", "complex128")


@functools.cache
def exported(option, dtype, x64=None):
    """Returns the update for parameters of this dtype, lowered for all platforms."""
    with jax.enable_x64(is_64_bit(dtype) if x64 is None else x64):
        tx = scale_by_adamax(**OPTIONS[option][0])
        gradient = jax.ShapeDtypeStruct((4, 3), dtype)
        state = jax.eval_shape(tx.init, gradient)
        return jax.export.export(jax.jit(tx.update), platforms=PLATFORMS)(gradient, state)


def lines_of(lowered):
    """Returns the operations of the program, without their source locations."""
    lines = re.sub(r" loc\(.*", "", lowered.mlir_module()).splitlines()
    return [line for line in lines if re.search(r"\b(stablehlo|chlo)\.", line)]


@every_case
def test_update_lowers_for_every_platform(option, dtype):
    lowered = exported(option, dtype)
    assert lowered.platforms == PLATFORMS
    assert lowered.out_avals == lowered.in_avals


@every_case
def test_every_operation_is_elementwise(option, dtype):
    """Elementwise programs can be sharded, batched and fused without communication."""
    program = "\n".join(lines_of(exported(option, dtype)))
    names = set(re.findall(r"\b(?:stablehlo|chlo)\.(\w+)", program))
    assert {"divide", "maximum", "multiply"} <= names <= ELEMENTWISE


@every_case
def test_arithmetic_is_in_float32_except_for_64_bit_parameters(option, dtype):
    program = lines_of(exported(option, dtype, x64=True))
    arithmetic = [line for line in program if set(re.findall(r"\w+", line)) & ARITHMETIC]
    floats = set(re.findall(r"[x<](b?f\d+)>", " ".join(arithmetic)))
    assert floats <= {"f32", "f64"} if is_64_bit(dtype) else floats == {"f32"}


# The other options export the same operations.
EXPORTED = ("default", "float64", "bfloat16", "8 bits")


@pytest.mark.parametrize(
    "option", [pytest.param(x, marks=() if x in EXPORTED else pytest.mark.slow) for x in OPTIONS]
)
def test_exported_program_gives_the_result_of_jit(option):
    options, dtypes = OPTIONS[option]
    with jax.enable_x64(is_64_bit(dtypes[0])):
        tx, lowered = scale_by_adamax(**options), exported(option, dtypes[0])
        gradient = np.linspace(-1, 1, 12).reshape(4, 3).astype(dtypes[0])
        state, update, call = tx.init(gradient), jax.jit(tx.update), jax.jit(lowered.call)
        for _ in range(2):
            updates, expected = update(gradient, state)
            actual, state = call(gradient, state)
            # The two programs can round the scalar bound C_t differently.
            np.testing.assert_allclose(actual, updates, rtol=2 * jnp.finfo(dtypes[0]).eps)
            jax.tree.map(np.testing.assert_array_equal, state, expected)
