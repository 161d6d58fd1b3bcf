"""dot_general and its gradients: values against float64 over the same FP8 values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import training
from cases import on_gpu, pair_id, sample
from conftest import on_platforms, value_on_this_platform
from jax.test_util import check_grads

import jax_fp8

pytestmark = pytest.mark.ends

POWERS = jax_fp8.named_recipe("tensorwise", power_of_two=True)
FLAX = (((1,), (0,)), ((), ()))
LAST = (((1,), (1,)), ((), ()))


@pytest.fixture(params=on_platforms(("xla",), (None, "decode")))
def products(request):
    """Implementations that have all three products of every recipe."""
    return value_on_this_platform(request)


def operands(rng, pattern, x_dtype, w_dtype=None, kind="normal"):
    x_shape, w_shape, dims = training.PATTERNS[pattern]
    x = jnp.asarray(sample(rng, kind, x_shape)).astype(x_dtype)
    w = jnp.asarray(0.05 * sample(rng, kind, w_shape)).astype(w_dtype or x_dtype)
    y = jax.eval_shape(lambda a, b: jax.lax.dot_general(a, b, dims), *(x, w.astype(x.dtype)))
    return x, w, dims, sample(rng, kind, y.shape)


def check_all(recipe, x, w, dims, dy, implementation, **options):
    """The product and both gradients, in one program."""
    full = jax_fp8.named_recipe(recipe) if isinstance(recipe, str) else recipe
    if full.weight is None:
        options["precision"] = "highest"  # The default of a wide product on a GPU is TF32.

    @jax.jit
    def run(x, w, dy):
        y, pull = training.value_and_pullback(
            x, w, dims, recipe, implementation=implementation, **options
        )
        dy = dy.astype(y.dtype)
        return y, *pull(dy), dy

    y, dx, dw, dy = run(x, w, dy)
    wants = training.expected(full, dims, x, w, dy)
    fast = jax.default_backend() == "gpu" and implementation is None
    assert (dx.dtype, dw.dtype) == (x.dtype, w.dtype)
    training.check(y, wants[0], fast)
    training.check(dx, wants[1])
    training.check(dw, wants[2])


def recipes_and_patterns():
    """All of them on a GPU; a CPU compiles for seconds, and has every recipe and every pattern."""
    for recipe in training.RECIPES:
        for pattern in training.PATTERNS:
            on_cpu = pattern == "flax" or recipe in ("rowwise", "blockwise")
            marks = () if on_cpu else pytest.mark.gpu
            yield pytest.param(recipe, pattern, marks=marks)


@pytest.mark.parametrize("recipe, pattern", list(recipes_and_patterns()))
def test_product_and_gradients(products, rng, recipe, pattern):
    dtype = ref.BF16 if recipe == "weight_only" else ref.F32
    x, w, dims, dy = operands(rng, pattern, dtype)
    check_all(recipe, x, w, dims, dy, products)


@pytest.mark.parametrize(
    "dtypes", [(ref.BF16, ref.BF16), (ref.F16, ref.F16), (ref.BF16, ref.F32)], ids=pair_id
)
@pytest.mark.parametrize("recipe", training.RECIPES)
def test_gradients_have_the_dtypes_of_the_operands(products, rng, recipe, dtypes):
    x, w, dims, dy = operands(rng, "flax", *dtypes)
    check_all(recipe, x, w, dims, dy, products, preferred_element_type=dtypes[0])


@pytest.mark.parametrize("dtypes", [(ref.BF16, ref.BF16), (ref.BF16, ref.F32)], ids=pair_id)
@pytest.mark.parametrize("pattern", training.PATTERNS)
def test_16_bit_operands_in_every_pattern(products, rng, pattern, dtypes):
    x, w, dims, dy = operands(rng, pattern, *dtypes)
    check_all("rowwise", x, w, dims, dy, products)


OPTIONS = {
    "e5m2 gradients": ("rowwise", {"gradient_dtype": ref.E5M2}),
    "e4m3 gradients, blocks": ("blockwise", {"gradient_dtype": ref.E4M3}),
    "wide wgrad": ("rowwise", {"wide_wgrad": True}),
    "powers of two": ("rowwise", {"power_of_two": True}),
    "powers of two, blocks": ("blockwise", {"power_of_two": True}),
    "powers of two, tensor": ("tensorwise", {"power_of_two": True, "gradient_dtype": ref.E4M3}),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("pattern", ["flax", "k_last"])
def test_options_of_recipes(products, rng, option, pattern):
    name, options = OPTIONS[option]
    x, w, dims, dy = operands(rng, pattern, ref.F32)
    check_all(jax_fp8.named_recipe(name, **options), x, w, dims, dy, products)


def test_a_recipe_with_other_operands_in_each_product(products, rng):
    row, tensor = jax_fp8.Operand(granularity="row"), jax_fp8.Operand()
    gradient = jax_fp8.Operand(ref.E5M2, (1, 128))
    recipe = jax_fp8.Recipe(row, tensor, dgrad=(gradient, row), wgrad=(tensor, tensor))
    x, w, dims, dy = operands(rng, "flax", ref.F32)
    check_all(recipe, x, w, dims, dy, products)


def test_wide_dgrad_and_fp8_wgrad(products, rng):
    recipe = dataclasses.replace(jax_fp8.named_recipe("tensorwise"), dgrad=None)
    x, w, dims, dy = operands(rng, "k_last", ref.F32)
    check_all(recipe, x, w, dims, dy, products)


# --- Against the gradients without quantization ---------------------------------------------------


@pytest.mark.parametrize("kind, least", [("normal", 0.997), ("student", 0.995)])
@pytest.mark.parametrize("recipe", training.FP8_RECIPES)
def test_direction_of_the_gradients(rng, recipe, kind, least):
    def draw(*shape):
        x = rng.standard_normal(shape) if kind == "normal" else rng.standard_t(3, shape)
        return jnp.asarray(x.astype(np.float32))

    x, w, dy = draw(256, 512), draw(512, 384), draw(256, 384)
    dtype = jnp.bfloat16 if recipe == "weight_only" else jnp.float32
    if recipe != "weight_only":
        recipe = jax_fp8.named_recipe(recipe, gradient_dtype=ref.E5M2)
    y, pull = training.value_and_pullback(x.astype(dtype), w.astype(dtype), FLAX, recipe)
    dx, dw = pull(dy.astype(y.dtype))
    assert training.cosine(dx, np.asarray(dy) @ np.asarray(w).T) >= least
    assert training.cosine(dw, np.asarray(x).T @ np.asarray(dy)) >= least


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "blockwise", "static", "delayed"])
def test_direction_of_e4m3_gradients(rng, name):
    recipe = jax_fp8.named_recipe(name, gradient_dtype=ref.E4M3)
    x, w, dy = (
        rng.standard_normal(s).astype(np.float32) for s in ((256, 512), (512, 384), (256, 384))
    )
    _, pull = training.value_and_pullback(jnp.asarray(x), jnp.asarray(w), FLAX, recipe)
    dx, dw = pull(jnp.asarray(dy))
    assert training.cosine(dx, dy @ w.T) >= 0.999
    assert training.cosine(dw, x.T @ dy) >= 0.999


@pytest.mark.parametrize("pattern", training.PATTERNS)
def test_numerical_gradients_of_the_wide_path(rng, pattern):
    x, w, dims, _ = operands(rng, pattern, ref.F32)
    check_grads(
        lambda x, w: jax_fp8.dot_general(x, w, dims, recipe="wide"),
        (x, w),
        order=1,
        modes=["rev"],
        atol=2e-2,
        rtol=2e-2,
    )


# --- Operands in FP8 ------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
@pytest.mark.parametrize("pattern", ["k_last", "batch_k_last"])
def test_a_scaled_weight(products, rng, granularity, pattern):
    """Its gradient of the activation is that of the values it stands for."""
    batch = (2,) if pattern == "batch_k_last" else ()
    axes = tuple(range(len(batch)))
    dims = (((1 + len(batch),),) * 2, (axes, axes))
    x = jnp.asarray(sample(rng, "normal", (*batch, 40, 272)))
    wq = jax_fp8.quantize(
        jnp.asarray(sample(rng, "normal", (*batch, 136, 272))), granularity=granularity
    )
    dy = jnp.asarray(sample(rng, "normal", (*batch, 40, 136)))
    y, pull = jax.vjp(
        lambda x: jax_fp8.dot_general(x, wq, dims, recipe="rowwise", implementation=products), x
    )
    values = ref.values(wq)
    xq = training.quantized(x, jax_fp8.Operand(granularity="row"))
    fast = jax.default_backend() == "gpu" and products is None
    training.check(y, (*training.product(xq, values), 272, True), fast)
    # A scale of a row goes to the gradient before that is quantized; so only its size is known.
    want = np.asarray(dy).astype(np.float64) @ values
    assert training.cosine(pull(dy)[0], want) >= 0.997
    assert np.linalg.norm(pull(dy)[0]) == pytest.approx(np.linalg.norm(want), rel=0.01)


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
def test_a_scaled_activation(products, rng, granularity):
    xq = jax_fp8.quantize(jnp.asarray(sample(rng, "normal", (40, 272))), granularity=granularity)
    w = jnp.asarray(sample(rng, "normal", (272, 136)))
    dy = sample(rng, "normal", (40, 136))
    _, pull = jax.vjp(
        lambda w: jax_fp8.dot_general(
            xq,
            w,
            FLAX,
            recipe="tensorwise",
            preferred_element_type=ref.F32,
            implementation=products,
        ),
        w,
    )
    want = ref.values(xq).T @ dy.astype(np.float64)
    (dw,) = pull(jnp.asarray(dy))
    assert training.cosine(dw, want) >= 0.997
    assert np.linalg.norm(dw) == pytest.approx(np.linalg.norm(want), rel=0.01)


def test_the_default_dtype_of_two_scaled_operands():
    q = jax_fp8.quantize(jnp.ones((4, 16)))
    assert jax_fp8.dot_general(q, q, (((1,), (1,)), ((), ()))).dtype == jnp.bfloat16


# --- Around it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision", [None, "highest", jax.lax.Precision.DEFAULT, (jax.lax.Precision.HIGH,) * 2]
)
def test_precision_is_that_of_lax(precision):
    x = jnp.ones((4, 16))
    y = jax_fp8.dot_general(4 * x, 4 * x.T, FLAX, precision, recipe=POWERS)
    assert y.tolist() == [[256.0] * 4] * 4


@pytest.mark.parametrize(
    "preferred, want",
    [(None, ref.F32), (ref.BF16, ref.BF16), (ref.F16, ref.F16), (ref.F32, ref.F32)],
)
def test_dtype_of_the_result(preferred, want):
    y = jax_fp8.dot_general(jnp.ones((4, 16), ref.BF16), jnp.ones((16, 8)), FLAX, None, preferred)
    assert y.dtype == want


@pytest.mark.parametrize("empty", [(0, 32, 16), (8, 0, 16), (8, 32, 0)], ids=["M", "K", "N"])
@pytest.mark.parametrize("recipe", training.FP8_RECIPES)
def test_empty_operands(products, recipe, empty):
    m, k, n = empty
    dtype = ref.BF16 if recipe == "weight_only" else ref.F32
    y, pull = training.value_and_pullback(
        jnp.ones((m, k), dtype), jnp.ones((k, n), dtype), FLAX, recipe, implementation=products
    )
    dx, dw = pull(jnp.ones_like(y))
    assert (y.shape, dx.shape, dw.shape) == ((m, n), (m, k), (k, n))
    assert not np.any(np.asarray(y).astype(np.float32))
    assert not (np.any(np.asarray(dx)) or np.any(np.asarray(dw)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_no_bad_gradient_becomes_finite(products, recipe, bad):
    x, w = jnp.ones((4, 32)), jnp.ones((32, 8))
    _, pull = training.value_and_pullback(x, w, FLAX, recipe, implementation=products)
    dx, dw = pull(jnp.ones((4, 8)).at[1, 2].set(bad))
    assert np.isnan(np.asarray(dx)[1]).all() and np.isnan(np.asarray(dw)[:, 2]).all()


@pytest.mark.parametrize("recipe", on_gpu("tensorwise", "rowwise", "blockwise", "delayed"))
@pytest.mark.parametrize("m, n, k", [(520, 1048, 776), (1024, 4096, 2048)])
def test_large_products(rng, recipe, m, n, k):
    """As the kernels run them, in bfloat16."""
    x, w, dy = (
        jnp.asarray(sample(rng, "normal", s)).astype(ref.BF16) for s in ((m, k), (k, n), (m, n))
    )
    check_all(recipe, x, w, FLAX, np.asarray(dy), None)


# --- What is refused ------------------------------------------------------------------------------

X, W, B = jnp.ones((4, 16)), jnp.ones((16, 8)), jnp.ones(8)
STOCHASTIC = jax_fp8.named_recipe("rowwise", stochastic_rounding=True)


@pytest.mark.parametrize(
    "operands, options, error, message",
    [
        (
            (X, W),
            {"recipe": "fp8"},
            ValueError,
            "dot_general: unknown recipe 'fp8'; named ones are",
        ),
        (
            (X, W),
            {"recipe": 8},
            TypeError,
            "dot_general: recipe must be a name or a Recipe, got int",
        ),
        (
            (X, W.T),
            {},
            TypeError,
            r"dimension_numbers .* do not fit lhs an array float32\[4,? ?16\]",
        ),
        (
            (X.astype(int), W),
            {},
            TypeError,
            "dot_general: lhs must be float32, bfloat16 or float16",
        ),
        (
            (X, W.astype(ref.E4M3)),
            {},
            TypeError,
            "rhs must be .*or a ScaledArray, got an array float8",
        ),
        ((X, W), {"preferred_element_type": ref.E4M3}, TypeError, "preferred_element_type must be"),
        ((X, W), {"precision": "low"}, ValueError, "dot_general: unknown precision 'low'"),
        (
            (X, W),
            {"precision": jax.lax.DotAlgorithmPreset.F16_F16_F32},
            ValueError,
            "dot_general: unknown precision .*F16_F16_F32.* but no algorithm",
        ),
        ((X, W), {"implementation": "fast"}, ValueError, "unknown implementation 'fast'"),
        ((X, W), {"recipe": "weight_only"}, TypeError, "takes lhs of bfloat16 or float16"),
        ((X, W), {"recipe": STOCHASTIC}, ValueError, "key must be given"),
        ((X, W), {"key": jax.random.key(0)}, ValueError, "rounds nothing stochastically"),
        ((X, W), {"recipe": STOCHASTIC, "key": 3}, TypeError, "key must be a jax.random.key"),
        ((X, jax_fp8.quantize(W)), {}, ValueError, "a ScaledArray contracts its last axis"),
        (
            (X, jax_fp8.quantize(W)),
            {"recipe": "wide"},
            TypeError,
            "the recipe multiplies wide values",
        ),
    ],
)
def test_bad_input_raises(operands, options, error, message):
    with pytest.raises(error, match=message):
        jax_fp8.dot_general(*operands, FLAX, **options)


XQ, WQ = jax_fp8.quantize(X), jax_fp8.quantize(W.T)

takes_fp8 = pytest.mark.parametrize(
    "op, name, operand, product",
    [
        ("dot_general", "lhs", XQ, lambda x: jax_fp8.dot_general(x, W, FLAX)),
        ("dot_general", "rhs", WQ, lambda w: jax_fp8.dot_general(X, w, LAST)),
        ("matmul", "w", WQ, lambda w: jax_fp8.matmul(X, w)),
        ("scaled_matmul", "x", XQ, lambda x: jax_fp8.scaled_matmul(x, WQ)),
        ("scaled_matmul", "w", WQ, lambda w: jax_fp8.scaled_matmul(XQ, w)),
    ],
)


@pytest.mark.parametrize("part", ["data", "scale"])
@takes_fp8
def test_fp8_values_are_not_differentiated(op, name, operand, product, part):
    def loss(values):
        return jnp.sum(product(dataclasses.replace(operand, **{part: values})))

    with pytest.raises(TypeError, match=f"^{op}: a ScaledArray cannot be differentiated"):
        jax.grad(loss)(getattr(operand, part))


@takes_fp8
def test_a_scaled_array_is_not_differentiated(op, name, operand, product):
    with pytest.raises(TypeError, match=f"^{op}: a ScaledArray cannot be differentiated"):
        jax.grad(lambda operand: jnp.sum(product(operand)))(operand)


@takes_fp8
def test_fp8_values_without_scales_are_not_differentiated(op, name, operand, product):
    with pytest.raises(
        TypeError, match=f"^{op}: {name} must be .*ScaledArray.*, got .* float8_e4m3"
    ):
        jax.grad(lambda data: jnp.sum(product(data)))(operand.data)


@pytest.mark.parametrize("outer", [jax.jacrev, jax.jacfwd])
@pytest.mark.parametrize(
    "op, operand, product",
    [
        ("dot_general", X, lambda x: jax_fp8.dot_general(x, W, FLAX)),
        ("dot_general", W, lambda w: jax_fp8.dot_general(X, w, FLAX)),
        ("einsum", X, lambda x: jax_fp8.einsum("mk,kn->mn", x, W)),
        ("matmul", X, lambda x: jax_fp8.matmul(x, jax_fp8.quantize(W.T))),
        (
            "matmul",
            X.astype(ref.BF16),
            lambda x: jax_fp8.matmul(x, jax_fp8.quantize(W.T), recipe="weight_only"),
        ),
        ("matmul", B, lambda b: jax_fp8.matmul(X, jax_fp8.quantize(W.T), bias=b)),
        (
            "scaled_matmul",
            B,
            lambda b: jax_fp8.scaled_matmul(jax_fp8.quantize(X), jax_fp8.quantize(W.T), bias=b),
        ),
    ],
)
def test_second_derivatives_raise(outer, op, operand, product):
    """Of what has derivatives, naming the operation that was called."""
    first = jax.grad(lambda operand: jnp.sum(product(operand).astype(ref.F32) ** 2))
    assert jnp.any(first(operand))
    with pytest.raises(NotImplementedError, match=f"^{op}: FP8 products have first derivatives"):
        outer(first)(operand)


def test_stochastic_rounding_is_right_on_average(rng):
    x, w = (jnp.asarray(sample(rng, "normal", s)) for s in ((64, 32), (32, 48)))
    dy = jnp.asarray(sample(rng, "normal", (64, 48)))

    @jax.jit
    def gradients(key):
        def product(x, w):
            return jax_fp8.dot_general(x, w, FLAX, recipe=STOCHASTIC, key=key)

        return jax.vjp(product, x, w)[1](dy)

    one = gradients(jax.random.key(0))
    ref.assert_same_trees(gradients(jax.random.key(0)), one)
    many = [gradients(key) for key in jax.random.split(jax.random.key(1), 64)]
    for i, want in enumerate((dy @ w.T, x.T @ dy)):
        mean = np.mean([result[i] for result in many], 0)
        assert training.cosine(mean, want) > training.cosine(one[i], want)
        assert training.cosine(one[i], want) >= 0.99
