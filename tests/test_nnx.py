"""jax_fp8.nnx's layers, side by side with Flax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref
import training
from flax import nnx
from flax_cases import (
    DTYPES,
    assert_product,
    assert_same_structure,
    dtypes_id,
    samples,
)
from flax_models import paths

import jax_fp8
import jax_fp8.nnx as fp8

STOCHASTIC = jax_fp8.named_recipe("rowwise", stochastic_rounding=True)

#: By name: the layer, its arguments and options, the shape of its input, and its product.
LAYERS = {
    "linear": ("Linear", (32, 24), {}, (6, 32), "mk,kn->mn"),
    "linear of a vector": ("Linear", (32, 24), {}, (32,), "k,kn->n"),
    "linear of batches": ("Linear", (32, 24), {}, (2, 3, 5, 32), "abmk,kn->abmn"),
    "general": ("LinearGeneral", (32, 24), {}, (6, 32), "mk,kn->mn"),
    "general of tuples": (
        *("LinearGeneral", ((8, 16), (4, 6)), {"axis": (1, -1)}),
        *((3, 8, 5, 16), "abcd,bdef->acef"),
    ),
    "general of batches": (
        *("LinearGeneral", (32, (8, 3)), {"batch_axis": {0: 3}}),
        *((3, 5, 32), "bmk,bkne->bmne"),
    ),
    "einsum": (
        *("Einsum", ("abc,ecd->abed", (5, 16, 7), (5, 7)), {}),
        *((3, 4, 16), "abc,ecd->abed"),
    ),
    "einsum of anything": (
        *("Einsum", ("...d, dhe -> ...he", (16, 2, 12), (2, 12)), {}),
        *((2, 3, 16), "...d,dhe->...he"),
    ),
    "einsum of batches": (
        *("Einsum", ("mnk,nkh->nmh", (3, 32, 8)), {}),
        *((5, 3, 32), "mnk,nkh->nmh"),
    ),
}


def both(name, recipe="tensorwise", **more):
    """Flax's layer and this library's, with the shape of an input and the product."""
    kind, arguments, options, shape, spec = LAYERS[name]
    options = {**options, **more}
    flaxs = getattr(nnx, kind)(*arguments, **options, rngs=nnx.Rngs(0))
    ours = getattr(fp8, kind)(*arguments, **options, recipe=recipe, rngs=nnx.Rngs(0))
    assert isinstance(ours, type(flaxs))
    return flaxs, ours, shape, spec


def shape_of_result(layer, x):
    return jax.eval_shape(lambda x: layer(x), x)


@pytest.mark.parametrize(
    "name, recipe",
    [*((name, "rowwise") for name in LAYERS), ("linear", "tensorwise"), ("einsum", "tensorwise")],
)
def test_layers(name, recipe):
    flaxs, ours, shape, spec = both(name, recipe)
    x = samples(shape)
    assert_same_structure(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(flaxs)))
    ref.assert_same_trees(nnx.state(ours), nnx.state(flaxs))
    assert paths(nnx.state(ours)) == paths(nnx.state(flaxs))
    y = ours(x)
    assert_same_structure(y, shape_of_result(flaxs, x))
    assert_product(y, spec, x, ours.kernel[...], recipe)
    ref.assert_same_bits(nnx.jit(lambda layer, x: layer(x))(ours, x), y)


@pytest.mark.parametrize(
    "name, dtypes",
    [("linear", dtypes) for dtypes in DTYPES]
    + [(name, dtypes) for name in ("general", "einsum") for dtypes in DTYPES[1:4]],
    ids=lambda value: value if isinstance(value, str) else dtypes_id(value),
)
def test_dtypes(name, dtypes):
    of_input, dtype, param_dtype = dtypes
    flaxs, ours, shape, spec = both(name, dtype=dtype, param_dtype=param_dtype)
    x = samples(shape, of_input)
    ref.assert_same_trees(nnx.state(ours), nnx.state(flaxs))
    y = ours(x)
    assert_same_structure(y, shape_of_result(flaxs, x))
    assert_product(y, spec, x.astype(y.dtype), ours.kernel[...].astype(y.dtype))


@pytest.mark.parametrize("name", ["linear", "general of batches", "einsum"])
def test_bias(name):
    flaxs, ours, shape, _ = both(name, bias_init=nnx.initializers.normal(1.0))
    x = samples(shape)
    ref.assert_same_bits(ours.bias[...], flaxs.bias[...])
    y = ours(x)
    flaxs.kernel[...] *= 0
    ours.bias[...] *= 0
    ref.assert_same_bits(y, ours(x) + flaxs(x))


def test_no_bias():
    for flaxs, ours in (
        (nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(0)), fp8.Linear),
        (nnx.LinearGeneral(32, 8, use_bias=False, rngs=nnx.Rngs(0)), fp8.LinearGeneral),
    ):
        ours = ours(32, 8, use_bias=False, rngs=nnx.Rngs(0))
        assert ours.bias is None and flaxs.bias is None
        ref.assert_same_trees(nnx.state(ours), nnx.state(flaxs))
        assert ours(samples((6, 32))).shape == (6, 8)


def test_other_options():
    x = samples((6, 32), jnp.bfloat16)
    options = {"rngs": nnx.Rngs(0), "precision": "highest", "preferred_element_type": jnp.float32}
    for layer in (
        fp8.Linear(32, 8, dtype=jnp.bfloat16, use_bias=False, **options),
        fp8.LinearGeneral(32, 8, dtype=jnp.bfloat16, use_bias=False, **options),
        fp8.Einsum("ab,bc->ac", (32, 8), dtype=jnp.bfloat16, **options),
    ):
        y = layer(x)
        assert y.dtype == jnp.float32
        assert_product(y, "mk,kn->mn", x, layer.kernel[...].astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="unknown precision"):
        fp8.Linear(32, 8, precision="no such", rngs=nnx.Rngs(0))(x)

    def halve(args, dtype=None):
        return tuple(None if arg is None else arg.astype(jnp.bfloat16) / 2 for arg in args)

    layer = fp8.Linear(32, 8, promote_dtype=halve, rngs=nnx.Rngs(0))
    kernel = layer.kernel[...].astype(jnp.bfloat16) / 2
    assert_product(layer(x), "mk,kn->mn", x / 2, kernel)


def test_einsum_str_of_the_call():
    layer = fp8.Einsum("ab,bc->ac", (16, 3), rngs=nnx.Rngs(0))
    assert layer(samples((6, 16)), "ab,bc->ca").shape == (3, 6)


def test_metadata():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("a", "b"))
    options = {"kernel_init": init, "bias_metadata": {"out_sharding": ("b",), "mark": 1}}
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        for kind, *arguments in (
            ("Linear", 32, 8),
            ("LinearGeneral", 32, 8),
            ("Einsum", "ab,bc->ac", (32, 8), (8,)),
        ):
            ours, flaxs = (
                getattr(module, kind)(*arguments, **options, rngs=nnx.Rngs(0))
                for module in (fp8, nnx)
            )
            for name in ("kernel", "bias"):
                one, other = getattr(ours, name), getattr(flaxs, name)
                assert one.get_metadata() == other.get_metadata()
            states = [nnx.get_partition_spec(nnx.state(layer)) for layer in (ours, flaxs)]
            assert jax.tree.leaves(states[0]) == jax.tree.leaves(states[1])


def test_parameters_of_a_model_do_not_depend_on_the_recipe():
    """A key of its own, where the stream of the parameters is the only one, is no draw from it."""
    for rngs in ({"default": 0}, {"params": 0, "fp8": 1}):

        def layers(module, rngs=rngs, **options):
            rngs = nnx.Rngs(**rngs)
            return [module.Linear(16, 16, rngs=rngs, **options) for _ in range(3)]

        ours = layers(fp8, recipe=STOCHASTIC)
        params = [nnx.state(layer, nnx.Param) for layer in ours]
        ref.assert_same_trees(params, [nnx.state(layer) for layer in layers(nnx)])
        keys = {jax.random.key_data(layer.dot_general.stream.key[...]).tobytes() for layer in ours}
        assert len(keys) == 3


# --- State ----------------------------------------------------------------------------------------


def test_delayed_amaxes():
    layer, x = fp8.Linear(32, 24, recipe="delayed", rngs=nnx.Rngs(0)), samples((6, 32))
    product = layer.dot_general
    largest = float(jnp.max(jnp.abs(layer.kernel[...])))
    assert product.activation_amax[...].tolist() == [0.0] * 16
    assert product.weight_amax[...].tolist() == [largest] + [0.0] * 15
    layer(x)
    amax = float(jnp.max(jnp.abs(x)))
    assert product.activation_amax[:2].tolist() == [amax, 0.0]
    assert product.weight_amax[:3].tolist() == [largest, largest, 0.0]
    layer.eval()
    y = layer(8 * x)  # Saturates: the scale is of the step before.
    assert_product(y, "mk,kn->mn", 8 * x, layer.kernel[...], amaxes=(amax, largest))
    assert product.activation_amax[:2].tolist() == [amax, 0.0]
    layer.train()
    layer(8 * x)
    assert product.activation_amax[:3].tolist() == [8 * amax, amax, 0.0]
    frozen = nnx.view(layer, use_running_average=True)
    assert frozen.dot_general.use_running_average and not product.use_running_average


def test_training_sees_flaxs_parameters_alone():
    layer, x = fp8.Linear(32, 24, recipe="delayed", rngs=nnx.Rngs(0)), samples((6, 32))
    flaxs = nnx.Linear(32, 24, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
    plain = nnx.Optimizer(flaxs, optax.adam(1e-2), wrt=nnx.Param)
    assert_same_structure(
        nnx.to_pure_dict(nnx.state(optimizer)), nnx.to_pure_dict(nnx.state(plain))
    )

    @nnx.jit
    def step(layer, optimizer, x):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.square(m(x) - 1).mean())(layer)
        optimizer.update(layer, gradients)
        return loss, gradients

    losses = []
    for _ in range(5):
        loss, gradients = step(layer, optimizer, x)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert paths(gradients) == paths(nnx.state(flaxs))
    assert np.count_nonzero(layer.dot_general.activation_amax) == 5
    assert np.count_nonzero(layer.dot_general.weight_amax) == 6


def test_gradients_are_those_of_dot_general():
    layer, x = fp8.Linear(32, 24, recipe="rowwise", rngs=nnx.Rngs(0)), samples((6, 32))
    got = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)["kernel"][...]

    def product(kernel):
        return jax_fp8.dot_general(x, kernel, (((1,), (0,)), ((), ())), recipe="rowwise")

    want = jax.grad(lambda kernel: jnp.sum(product(kernel) ** 2))(layer.kernel[...])
    ref.assert_same_bits(got, want)


def test_stochastic_rounding():
    layer, x = fp8.Linear(32, 24, recipe=STOCHASTIC, rngs=nnx.Rngs(0)), samples((6, 32))

    @nnx.jit
    def gradient(layer):
        return nnx.grad(lambda layer: jnp.square(layer(x)).sum())(layer)["kernel"][...]

    one, other = gradient(layer), gradient(layer)
    assert jnp.any(one != other)
    assert layer.dot_general.stream.count[...] == 2
    layer.eval()
    ref.assert_same_bits(gradient(layer), gradient(layer))
    assert layer.dot_general.stream.count[...] == 2
    with pytest.raises(ValueError, match="stochastically, and needs rngs"):
        fp8.DotGeneral(STOCHASTIC)


# --- Errors ---------------------------------------------------------------------------------------


def test_recipes_are_checked_at_construction():
    rngs = nnx.Rngs(0)
    for make in (
        lambda **options: fp8.Linear(32, 8, rngs=rngs, **options),
        lambda **options: fp8.LinearGeneral(32, 8, rngs=rngs, **options),
        lambda **options: fp8.Einsum("ab,bc->ac", (32, 8), rngs=rngs, **options),
        fp8.DotGeneral,
        fp8.EinsumOp,
    ):
        with pytest.raises(ValueError, match="unknown recipe 'rowise'; named ones are"):
            make(recipe="rowise")
        with pytest.raises(TypeError, match="recipe must be a name or a Recipe, got int"):
            make(recipe=8)


def test_a_product_besides_the_recipe():
    rngs, other = nnx.Rngs(0), fp8.DotGeneral()
    for message, make in (
        ("dot_general", lambda: fp8.Linear(32, 8, dot_general=other, rngs=rngs)),
        ("dot_general", lambda: fp8.LinearGeneral(32, 8, dot_general=other, rngs=rngs)),
        ("dot_general_cls", lambda: fp8.LinearGeneral(32, 8, dot_general_cls=object, rngs=rngs)),
        ("einsum_op", lambda: fp8.Einsum("ab,bc->ac", (32, 8), einsum_op=other, rngs=rngs)),
    ):
        with pytest.raises(ValueError, match=f"{message} and recipe both say how to multiply"):
            make()


def test_errors_are_of_flaxs_types():
    x, rngs = samples((6, 32)), nnx.Rngs(0)
    scalar, codes = jnp.float32(1), x.astype(jnp.float8_e4m3fn)
    promotion = jax.dtypes.TypePromotionError

    def einsum(spec, *shape, inputs=x, **options):
        return lambda m: m.Einsum(spec, shape, **options, rngs=rngs)(inputs)

    def general(*sizes, inputs=x, **options):
        return lambda m: m.LinearGeneral(*sizes, **options, rngs=rngs)(inputs)

    def linear(*sizes, inputs=x, **options):
        return lambda m: m.Linear(*sizes, **options, rngs=rngs)(inputs)

    for error, attempt in (
        (ValueError, lambda m: m.LinearGeneral((32, 8), 8, rngs=rngs)),
        (ValueError, lambda m: m.LinearGeneral(32, 8, batch_axis={1: 6}, rngs=rngs)),
        (ValueError, lambda m: m.Einsum("ab,bc", (32, 8), rngs=rngs)),
        (ValueError, lambda m: m.Einsum("ab,bc,cd->ad", (32, 8), rngs=rngs)),
        (TypeError, lambda m: m.Linear(32, 8)),
        (TypeError, lambda m: m.Linear(32, 8, no_such=1, rngs=rngs)),
        (ValueError, linear(32, 8, dtype=jnp.int32)),
        (ValueError, general(32, 8, dtype=jnp.int32)),
        (ValueError, einsum("ab,bc->ac", 32, 8, dtype=jnp.int32)),
        # Kernels of other shapes.
        (TypeError, linear(16, 8)),
        (TypeError, linear(1, 8)),
        (TypeError, general(16, 8)),
        (TypeError, general((6, 16), 8, axis=(0, 1))),
        (TypeError, general(32, 8, batch_axis={0: 5})),
        (ValueError, einsum("ab,bc->ac", 16, 8)),
        (ValueError, einsum("ab,acb->ac", 5, 4, 32)),
        # Axes and indices.
        (TypeError, general((32, 32), 8, axis=(1, 1))),
        (TypeError, general((32, 32), 8, axis=(1, -1))),
        (TypeError, general(32, 8, axis=2)),
        (TypeError, general(32, 8, axis=-3)),
        (ValueError, general(32, 8, batch_axis={3: 5})),
        (ValueError, einsum("ab,bc->ad", 32, 8)),
        (ValueError, einsum("aa,ac->ac", 6, 8)),
        (ValueError, einsum("ab,bc->aac", 32, 8)),
        # Ranks.
        (ValueError, einsum("ab,bc->ac", 32, 8, 2)),
        (ValueError, einsum("abc,cd->abd", 32, 8)),
        (ValueError, einsum("ab,bc->ac", 32, 8, inputs=scalar)),
        (TypeError, linear(32, 8, inputs=scalar)),
        (TypeError, general(32, 8, inputs=scalar)),
        # FP8, which nothing is promoted with.
        (promotion, linear(32, 8, inputs=codes)),
        (promotion, general(32, 8, inputs=codes)),
        (promotion, einsum("ab,bc->ac", 32, 8, inputs=codes)),
        (promotion, linear(32, 8, param_dtype=codes.dtype)),
    ):
        for module in (nnx, fp8):
            with pytest.raises(error):
                attempt(module)
    with pytest.raises(TypeError, match="bfloat16 or float16, got"):
        fp8.Linear(32, 4, recipe="weight_only", rngs=rngs)(x)
    # What Flax multiplies and this library refuses.
    for error, message, attempt in (
        (TypeError, "lhs must be .*float8_e4m3fn", linear(32, 8, dtype=codes.dtype)),
        (TypeError, "lhs must be .*float8_e4m3fn", general(32, 8, dtype=codes.dtype)),
        (TypeError, "lhs must be .*complex64", linear(32, 8, inputs=x + 1j)),
        (ValueError, "of rhs twice", einsum("ab,bb->ab", 32, 32)),
    ):
        assert len(attempt(nnx)) == 6
        with pytest.raises(error, match=message):
            attempt(fp8)
    # What is cast first is a value like others.
    for attempt in (linear(32, 8, inputs=codes, dtype=jnp.bfloat16), general(32, 8, inputs=x > 0)):
        assert_same_structure(attempt(fp8), attempt(nnx))


def test_a_state_that_does_not_fit():
    layer = fp8.Linear(32, 24, recipe="delayed", rngs=nnx.Rngs(0))
    layer.dot_general.weight_amax = fp8.ScalingVariable(jnp.zeros(4))
    with pytest.raises(ValueError, match=r"state.weight does not fit the recipe"):
        layer(samples((6, 32)))


def test_a_kernel_that_stays_float32_has_a_float32_gradient():
    """As docs/training.md says; with Flax's own promote_dtype it comes back through bfloat16."""

    def narrow(arrays, *, dtype):
        x, kernel, bias = arrays
        x, bias = jax.tree.map(lambda array: array.astype(dtype), (x, bias))
        return x, kernel, bias

    def gradient(**options):
        layer = fp8.Linear(64, 32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **options)
        x = samples((40, 64))
        assert layer(x).dtype == jnp.bfloat16
        kernel = nnx.grad(lambda layer: jnp.square(layer(x)).sum())(layer)["kernel"][...]
        assert kernel.dtype == jnp.float32
        return np.asarray(kernel)

    wide = gradient(promote_dtype=narrow, preferred_element_type=jnp.bfloat16)
    rounded = gradient()
    assert (rounded == rounded.astype(jnp.bfloat16)).all()
    assert (wide != wide.astype(jnp.bfloat16)).mean() > 0.9
    assert training.cosine(wide, rounded) > 0.999
