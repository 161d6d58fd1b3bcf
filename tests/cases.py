"""Operands for products, and what a named implementation must refuse."""

import itertools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref

import jax_fp8

PAIRS = list(itertools.product(ref.FP8, ref.FP8))


def pair_id(value):
    """Readable test ids for dtypes and what is made of them."""
    if isinstance(value, np.dtype):
        return value.name.removeprefix("float8_")
    if isinstance(value, tuple) and value and isinstance(value[0], np.dtype):
        return "x".join(map(pair_id, value))
    return str(value).replace(" ", "")


def on_gpu(*values):
    """Parameters that are tried on a GPU alone."""
    return [pytest.param(value, marks=pytest.mark.gpu) for value in values]


def sample(rng, kind, shape):
    """Wide data: near-normal, with heavy tails, or of one sign."""
    if kind == "heavy":
        return rng.standard_t(2, shape).astype(np.float32)
    x = rng.standard_normal(shape).astype(np.float32)
    return np.abs(x) if kind == "positive" else x


def scaled(data, scale, granularity="tensor"):
    return jax_fp8.ScaledArray(jnp.asarray(data), jnp.asarray(scale), granularity)


def operand(rng, shape, dtype=ref.E4M3, granularity="tensor", kind="normal"):
    """A ScaledArray of random values, quantized by the reference and not by the library."""
    return scaled(*ref.quantize(sample(rng, kind, shape), dtype, granularity), granularity)


def integers(rng, shape, dtype=ref.E4M3, granularity="tensor", largest=3):
    """Small integers with scales that are powers of two, so that their sums are exact."""
    data = rng.integers(-largest, largest + 1, shape).astype(np.float32).astype(dtype)
    scale = 2.0 ** rng.integers(-3, 4, ref.scale_shape(shape, granularity))
    return scaled(data, scale.astype(np.float32), granularity)


def codes(rng, shape, dtype=ref.E4M3, granularity="tensor"):
    """Any finite codes, with scales of any size around one."""
    scale = np.exp(rng.standard_normal(ref.scale_shape(shape, granularity)))
    return scaled(ref.random_codes(rng, shape, dtype), scale.astype(np.float32), granularity)


def is_fast(implementation, precision=None):
    """Whether this product runs in the tensor cores' own accumulator."""
    on_gpu = jax.default_backend() == "gpu"
    return precision is None and on_gpu and implementation in (None, "cublaslt")


def must_refuse(implementation, x, w):
    """Whether cublasLt was named for what it has not; if so, holds it to saying that."""
    pair = x.dtype == w.dtype == ref.E5M2
    blocks = isinstance(x.granularity, tuple) or isinstance(w.granularity, tuple)
    if blocks and not pair:  # Of these the device decides, and only if there is something to do.
        hopper = str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")
        blocks = not hopper and 0 not in (*x.shape, *w.shape)
    if implementation != "cublaslt" or not (pair or blocks):
        return False
    error = NotImplementedError if pair else jax.errors.JaxRuntimeError
    with pytest.raises(error, match="implementation 'cublaslt' cannot multiply"):
        jax.block_until_ready(jax_fp8.scaled_matmul(x, w, implementation=implementation))
    return True


def with_flags(*flags):
    """XLA's flags for a process: those of the tests, and these."""
    return " ".join([os.environ["XLA_FLAGS"], *flags])


def run_script(script, *, timeout=300, **environment):
    """Runs Python code in a process of its own and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
