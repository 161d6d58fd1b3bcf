"""Real data: a digits classifier trained in FP8 is as accurate as one trained in float32.

Five folds over all 1,797 images of scikit-learn, with the layers of linen and of nnx, the same
first weights and the same batches. What runs is what a CPU has: the same values in plain JAX.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("sklearn")

import optax
from flax import linen, nnx
from jax import lax
from sklearn.datasets import load_digits

import jax_fp8.linen
import jax_fp8.nnx

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]

FOLDS, SEED = 5, 0
SIZES = (64, 128, 10)
BATCH, EPOCHS, RATE = 256, 60, 1e-2
RECIPES = ("tensorwise", "rowwise", "blockwise", "static", "delayed", "weight_only")


@functools.cache
def digits():
    """Images, labels, and the images of each fold."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(x))
    return (x / 16).astype(np.float32), y, np.array_split(order, FOLDS)


def batches(held_out):
    """(EPOCHS, steps, BATCH) of what is not held out, each epoch in an order of its own."""
    count = len(digits()[0])
    training = np.setdiff1d(np.arange(count), held_out)
    rng = np.random.default_rng(SEED)
    epochs = [rng.permutation(training)[: len(training) // BATCH * BATCH] for _ in range(EPOCHS)]
    return np.stack(epochs).reshape(EPOCHS, -1, BATCH)


def dtype_of(recipe):
    return jnp.bfloat16 if recipe == "weight_only" else jnp.float32  # It refuses float32.


def loss_of(logits, labels):
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def optimizer():
    epochs, steps, _ = batches(digits()[2][0]).shape
    return optax.adam(optax.cosine_decay_schedule(RATE, epochs * steps))


# --- The same network in linen and in nnx ---------------------------------------------------------

# Static scales are calibrated once an epoch: activations grow as a network learns.


class LinenNetwork(linen.Module):
    recipe: str

    @linen.compact
    def __call__(self, x):
        options = {"recipe": self.recipe, "dtype": dtype_of(self.recipe)}
        hidden = jax_fp8.linen.Dense(SIZES[1], name="hidden", **options)(x)
        return jax_fp8.linen.Dense(SIZES[2], name="last", **options)(linen.relu(hidden))


class NnxNetwork(nnx.Module):
    def __init__(self, dtype, weights):
        self.hidden = nnx.Linear(*SIZES[:2], dtype=dtype, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(*SIZES[1:], dtype=dtype, rngs=nnx.Rngs(0))
        for name in ("hidden", "last"):
            getattr(self, name).kernel[...] = weights[name]["kernel"]

    def __call__(self, x):
        return self.last(nnx.relu(self.hidden(x)))


def first_weights():
    x, _, _ = digits()
    return LinenNetwork("tensorwise").init(jax.random.key(SEED), x[:1])["params"]


def train_linen(recipe):
    """A function (weights, images, labels, batches) -> the logits of all images, after training."""
    network, rule = LinenNetwork(recipe), optimizer()

    def train(weights, x, y, order):
        def epoch(carry, order):
            parameters, state, moments = carry
            if recipe == "static":  # A call with the collection mutable calibrates.
                variables = {"params": parameters, **state}
                _, state = network.apply(variables, x[order[0]], mutable=["fp8"])
            return lax.scan(step, (parameters, state, moments), order)

        def step(carry, batch):
            parameters, state, moments = carry

            def loss(parameters):
                variables = {"params": parameters, **state}
                if recipe != "delayed":
                    return loss_of(network.apply(variables, x[batch]), y[batch]), state
                logits, new = network.apply(variables, x[batch], mutable=["fp8"])
                return loss_of(logits, y[batch]), new

            gradients, state = jax.grad(loss, has_aux=True)(parameters)
            updates, moments = rule.update(gradients, moments)
            return (optax.apply_updates(parameters, updates), state, moments), None

        state = {}
        if recipe in ("static", "delayed"):
            # Its kernels are those of the weights, with which the delayed scales begin.
            state = {"fp8": network.init(jax.random.key(SEED), x[:1])["fp8"]}
        start = weights, state, rule.init(weights)
        (parameters, state, _), _ = lax.scan(epoch, start, order)
        return network.apply({"params": parameters, **state}, x)

    return train


def train_nnx(recipe):
    """Likewise; with None in float32, with Flax's own layers."""

    def train(weights, x, y, order):
        model = NnxNetwork(dtype_of(recipe), weights)
        if recipe is not None:
            jax_fp8.nnx.convert(model, recipe=recipe)
        graph, state = nnx.split((model, nnx.Optimizer(model, optimizer(), wrt=nnx.Param)))

        def epoch(state, order):
            model, optimizer = nnx.merge(graph, state)
            if recipe == "static":
                jax_fp8.nnx.calibrate(model, [x[order[0]]])
            return lax.scan(step, nnx.state((model, optimizer)), order)

        def step(state, batch):
            model, optimizer = nnx.merge(graph, state)
            gradients = nnx.grad(lambda model: loss_of(model(x[batch]), y[batch]))(model)
            optimizer.update(model, gradients)
            return nnx.state((model, optimizer)), None

        model, _ = nnx.merge(graph, lax.scan(epoch, state, order)[0])
        model.eval()
        return model(x)

    return train


# --- Accuracies -----------------------------------------------------------------------------------


def cross_validate(train):
    """The logits of each image from the network that has not seen it."""
    x, y, folds = digits()
    with jax.default_device(jax.devices("cpu")[0]):
        jitted, weights = jax.jit(train), first_weights()
        logits = np.zeros((len(x), SIZES[-1]), np.float32)
        for held_out in folds:
            found = jitted(weights, x, y, batches(held_out))
            logits[held_out] = np.asarray(found, np.float32)[held_out]
    return logits


def accuracy(logits):
    """The mean over the folds."""
    _, y, folds = digits()
    right = logits.argmax(-1) == np.asarray(y)
    return np.mean([right[held_out].mean() for held_out in folds])


@functools.cache
def in_float32():
    return cross_validate(train_nnx(None))


def test_float32_learns():
    assert accuracy(in_float32()) > 0.97


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("train", [train_linen, train_nnx], ids=["linen", "nnx"])
def test_fp8_is_as_accurate_as_float32(train, recipe):
    logits = cross_validate(train(recipe))
    assert not np.array_equal(logits, in_float32()), "it did not go through FP8"
    assert abs(accuracy(logits) - accuracy(in_float32())) <= 0.005
