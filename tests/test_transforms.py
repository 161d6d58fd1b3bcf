"""The same bits under jit, checkpoint, scan and donation, and from two threads at once."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import codes, integers, must_refuse, pair_id, sample

import jax_fp8

granularities = pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)


def exactly_comparable(implementation, rng, shape, granularity="tensor"):
    """Any codes; for XLA, which may add in another order in another program, exact integers."""
    if implementation == "xla":
        return integers(rng, shape, granularity=granularity, largest=2)
    return codes(rng, shape, granularity=granularity)


def wrappers(function):
    return {
        "jit": jax.jit(function),
        "checkpoint": jax.checkpoint(function),
        "jit of checkpoint": jax.jit(jax.checkpoint(function)),
        "within a larger program": jax.jit(
            lambda *operands: jax.tree.map(
                lambda leaf: jax.lax.optimization_barrier(leaf), function(*operands)
            )
        ),
        "remade": jax.jit(lambda *operands: function(*operands)),
    }


@granularities
def test_quantize_in_every_wrapper(quantizer, rng, granularity):
    x = jnp.asarray(sample(rng, "heavy", (130, 200)))

    def quantize(x):
        return jax_fp8.quantize(
            x, granularity=granularity, return_amax=True, implementation=quantizer
        )

    want = quantize(x)
    for wrapped in wrappers(quantize).values():
        ref.assert_same_trees(wrapped(x), want)


@granularities
def test_scaled_matmul_in_every_wrapper(implementation, rng, granularity):
    x = exactly_comparable(implementation, rng, (70, 300), granularity)
    w = exactly_comparable(implementation, rng, (90, 300), granularity)
    if must_refuse(implementation, x, w):
        return

    def multiply(x, w):
        return jax_fp8.scaled_matmul(
            x, w, implementation=implementation, preferred_element_type=jnp.float32
        )

    want = multiply(x, w)
    for wrapped in wrappers(multiply).values():
        ref.assert_same_bits(wrapped(x, w), want)
    constant = jax.jit(lambda: multiply(x, w))
    ref.assert_same_bits(constant(), want)


@granularities
def test_scan_over_stacked_weights_is_a_loop(implementation, rng, granularity):
    layers = [exactly_comparable(implementation, rng, (48, 48), granularity) for _ in range(4)]
    x = jnp.asarray(rng.integers(-2, 3, (5, 48)), jnp.float32)
    if must_refuse(implementation, layers[0], layers[0]):
        return

    def layer(x, w):
        y = jax_fp8.matmul(
            x, w, granularity="row", scale=jnp.ones((5, 1)), implementation=implementation
        )
        return jnp.clip(jnp.round(y), -3, 3), y

    carry, outputs = x, []
    for w in layers:
        carry, y = layer(carry, w)
        outputs.append(y)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert stacked.shape == (4, 48, 48)
    got = jax.jit(lambda x, w: jax.lax.scan(layer, x, w))(x, stacked)
    ref.assert_same_trees(got, (carry, jnp.stack(outputs)))


def test_donated_operands(implementation, rng):
    """The result has the type and the shape of the donated operand, and may take its place."""
    x, w = (exactly_comparable(implementation, rng, (64, 64)) for _ in range(2))

    def multiply(data, scale):
        return jax_fp8.scaled_matmul(
            jax_fp8.ScaledArray(data, scale),
            w,
            implementation=implementation,
            preferred_element_type=jnp.float8_e4m3fn,
            output_scale=8.0,
        ).data

    want = np.asarray(multiply(x.data, x.scale))
    donated = jax.jit(multiply, donate_argnums=0)
    for _ in range(3):
        ref.assert_same_bits(donated(x.data + 0, x.scale), want)


def test_donated_wide_operand(quantizer, rng):
    x = sample(rng, "heavy", (64, 64))

    def quantize(x):
        q, amax = jax_fp8.quantize(x, return_amax=True, implementation=quantizer)
        return jax_fp8.dequantize(q), amax

    want = jax.tree.map(np.asarray, jax.jit(quantize)(x))
    donated = jax.jit(quantize, donate_argnums=0)
    for _ in range(3):
        ref.assert_same_trees(donated(jnp.asarray(x) + 0), want)


def test_two_threads(implementation, rng):
    """Each runs problems of its own and one that is the other's too."""
    shapes = [[(33, 64), (16, 64)], [(40, 128), (24, 128)], [(17, 272), (48, 272)]]
    problems = [[exactly_comparable(implementation, rng, s) for s in pair] for pair in shapes]

    def multiply(x, w):
        y = jax_fp8.scaled_matmul(x, w, implementation=implementation)
        return jax_fp8.quantize(y, granularity="row")

    compiled = jax.jit(multiply)
    wants = [jax.tree.map(np.asarray, compiled(*problem)) for problem in problems]
    failures = []

    def work(own):
        try:
            for _ in range(10):
                for i in (own, 2):
                    ref.assert_same_trees(compiled(*problems[i]), wants[i])
                    ref.assert_same_trees(multiply(*problems[i]), wants[i])
        except BaseException as failure:  # Raised by the test's own thread.
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


def test_one_program_rounds_as_two_do(rng, quantizer):
    """XLA may have more digits than it was asked for, but for what is named by its dtype."""
    x = jnp.asarray(rng.standard_normal((16, 256)), jnp.float32)
    w = jax_fp8.quantize(x, granularity="row", implementation="kernel")
    options = {"granularity": "row", "implementation": quantizer}
    product = "naive" if quantizer == "kernel" else quantizer
    fp8 = {"preferred_element_type": jnp.float8_e4m3fn, "output_scale": 0.1}
    for function in (
        lambda x, w: jax_fp8.quantize(x, **options),
        lambda x, w: jax_fp8.gelu_quantize(x, **options),
        lambda x, w: jax_fp8.cast_transpose(x, **options)[0],
        lambda x, w: jax_fp8.scaled_matmul(w, w, implementation=product, **fp8),
    ):
        apart = jax_fp8.dequantize(jax.jit(function)(x, w))
        together = jax.jit(lambda x, w, f=function: jax_fp8.dequantize(f(x, w)))(x, w)
        ref.assert_same_bits(together, apart)
