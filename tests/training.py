"""A product and its gradients in numpy: what each recipe quantizes, and float64 sums over that."""

import math

import jax
import numpy as np
import references as ref

import jax_fp8

RECIPES = ("tensorwise", "rowwise", "blockwise", "static", "delayed", "weight_only", "wide")
FP8_RECIPES = RECIPES[:-1]

# Shapes of lhs and rhs, and their dimension numbers.
PATTERNS = {
    "flax": ((40, 272), (272, 136), (((1,), (0,)), ((), ()))),
    "k_last": ((40, 272), (136, 272), (((1,), (1,)), ((), ()))),
    "k_first": ((272, 40), (272, 136), (((0,), (0,)), ((), ()))),
    "ragged": ((7, 33), (33, 5), (((1,), (0,)), ((), ()))),
    "leading": ((3, 10, 48), (48, 4, 6), (((2,), (0,)), ((), ()))),
    "two_contracted": ((10, 4, 6), (6, 4, 20), (((1, 2), (1, 0)), ((), ()))),
    "batch": ((3, 20, 48), (3, 48, 24), (((2,), (1,)), ((0,), (0,)))),
    "batch_inside": ((20, 3, 48), (24, 48, 3), (((2,), (1,)), ((1,), (2,)))),
    "batch_turned": ((2, 3, 20, 48), (3, 48, 2, 24), (((3,), (1,)), ((1, 0), (0, 2)))),
    "no_free": ((3, 48), (3, 48, 8), (((1,), (1,)), ((0,), (0,)))),
    "no_free_rhs": ((40, 272), (272,), (((1,), (0,)), ((), ()))),
    "scalar": ((12, 40), (40, 12), (((0, 1), (1, 0)), ((), ()))),
    "outer": ((20,), (24,), (((), ()), ((), ()))),
}


def orders(shape, contract, batch):
    """The axes in the order batch, free, contracted, and the sizes of the three."""
    free = [axis for axis in range(len(shape)) if axis not in (*contract, *batch)]
    order = [*batch, *free, *contract]
    sizes = [math.prod(shape[axis] for axis in axes) for axes in (batch, free, contract)]
    return order, sizes


def as_three(x, contract, batch):
    order, sizes = orders(x.shape, contract, batch)
    return np.transpose(np.asarray(x), order).reshape(sizes)


def from_three(x3, shape, contract, batch):
    order, _ = orders(shape, contract, batch)
    return np.transpose(x3.reshape([shape[axis] for axis in order]), np.argsort(order))


def quantized(x, operand):
    """The float64 values of ``x`` as the operand says; of None, those that it has."""
    x = np.asarray(x)
    if operand is None:
        return x.astype(np.float64)
    scale = ref.dynamic_scale(ref.amax(x, operand.granularity), operand.dtype)
    if operand.power_of_two:
        scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
    data, scale = ref.quantize(x, operand.dtype, operand.granularity, scale)
    return ref.values(jax_fp8.ScaledArray(data, scale, operand.granularity))


def product(a, b):
    """a @ b.T and the sums of the magnitudes."""
    b = np.swapaxes(b, -1, -2)
    return a @ b, np.abs(a) @ np.abs(b)


def expected(recipe, dims, x, w, dy):
    """((value, magnitudes, K, whether FP8 ran) of y, dx, dw), in the axes of these."""
    (contract_x, contract_w), (batch_x, batch_w) = dims
    x3, w3 = as_three(x, contract_x, batch_x), as_three(w, contract_w, batch_w)
    dy3 = np.asarray(dy).reshape(x3.shape[0], x3.shape[1], w3.shape[1])
    turned = [np.swapaxes(a, -1, -2) for a in (x3, w3, dy3)]
    dgrad, wgrad = (pair or (None, None) for pair in (recipe.dgrad, recipe.wgrad))
    y = product(quantized(x3, recipe.activation), quantized(w3, recipe.weight))
    dx = product(quantized(dy3, dgrad[0]), quantized(turned[1], dgrad[1]))
    dw = product(quantized(turned[2], wgrad[0]), quantized(turned[0], wgrad[1]))
    sizes = (x3.shape[2], w3.shape[1], x3.shape[1])
    return (
        [part.reshape(dy.shape) for part in y] + [sizes[0], recipe.weight is not None],
        [from_three(part, x.shape, contract_x, batch_x) for part in dx]
        + [sizes[1], dgrad[1] is not None],
        [from_three(part, w.shape, contract_w, batch_w) for part in dw]
        + [sizes[2], wgrad[1] is not None],
    )


def check(got, want, fast=False):
    """Holds a result to the bound of its kind."""
    value, magnitudes, k, is_fp8 = want
    error = ref.random_error(magnitudes, k, fast) if is_fp8 else ref.sum_error(magnitudes, k)
    ref.assert_close(got, value, error)


def state_for(recipe, x, w):
    """A state that knows these values, so that its scales are those of dynamic scaling."""
    recipe = jax_fp8.named_recipe(recipe) if isinstance(recipe, str) else recipe
    return jax_fp8.init_scaling(recipe, activation=x, weight=w) if recipe.has_state else None


def value_and_pullback(x, w, dims, recipe, **options):
    """y and the function from its cotangent to those of x and w."""
    state = state_for(recipe, x, w)

    def call(x, w):
        found = jax_fp8.dot_general(x, w, dims, recipe=recipe, state=state, **options)
        return found if state is None else found[0]

    return jax.vjp(call, x, w)


def cosine(a, b):
    a, b = (np.asarray(x).astype(np.float64).ravel() for x in (a, b))
    return a @ b / np.sqrt((a @ a) * (b @ b))
