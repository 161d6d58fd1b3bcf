"""jax_fp8.linen, side by side with Flax's own layers."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from flax_cases import (
    DTYPES,
    assert_product,
    assert_same_structure,
    dtypes_id,
    samples,
)

import jax_fp8
import jax_fp8.linen as fp8

KEY = jax.random.key(0)

#: By name: the layer, its fields, the shape of its input, and its product.
LAYERS = {
    "dense": ("Dense", {"features": 24}, (6, 32), "mk,kn->mn"),
    "dense of a vector": ("Dense", {"features": 24}, (32,), "k,kn->n"),
    "dense of batches": ("Dense", {"features": 24}, (2, 3, 5, 32), "abmk,kn->abmn"),
    "general": ("DenseGeneral", {"features": 24}, (6, 32), "mk,kn->mn"),
    "general of tuples": (
        *("DenseGeneral", {"features": (4, 6), "axis": (1, -1)}),
        *((3, 8, 5, 16), "abcd,bdef->acef"),
    ),
    "general of batches": (
        *("DenseGeneral", {"features": (8, 3), "axis": -1, "batch_dims": (0,)}),
        *((3, 5, 32), "bmk,bkne->bmne"),
    ),
    "einsum": (
        *("Einsum", {"shape": (5, 16, 7), "einsum_str": "abc,ecd->abed"}),
        *((3, 4, 16), "abc,ecd->abed"),
    ),
    "einsum of anything": (
        *("Einsum", {"shape": (16, 2, 12), "einsum_str": "...d, dhe -> ...he"}),
        *((2, 3, 16), "...d,dhe->...he"),
    ),
    "einsum of batches": (
        *("Einsum", {"shape": (3, 32, 8), "einsum_str": "mnk,nkh->nmh"}),
        *((5, 3, 32), "mnk,nkh->nmh"),
    ),
}  # fmt: skip


def pair(name, **more):
    """Flax's layer and this library's, with an input and the product."""
    kind, fields, shape, spec = LAYERS[name]
    return getattr(nn, kind)(**fields, **more), getattr(fp8, kind)(**fields, **more), shape, spec


def params_of(layer, *inputs):
    return layer.init(KEY, *inputs)["params"]


@pytest.mark.parametrize(
    "name, recipe",
    [*((name, "rowwise") for name in LAYERS), ("dense", "tensorwise"), ("einsum", "tensorwise")],
)
def test_layers(name, recipe):
    kind, fields, shape, spec = LAYERS[name]
    flaxs, ours = getattr(nn, kind)(**fields), getattr(fp8, kind)(**fields, recipe=recipe)
    x = samples(shape)
    y, variables = ours.init_with_output(KEY, x)
    assert list(variables) == ["params"]
    params = params_of(flaxs, x)
    assert_same_structure(variables["params"], params)
    ref.assert_same_trees(variables["params"], params)
    assert_same_structure(y, jax.eval_shape(flaxs.apply, variables, x))
    ref.assert_same_bits(ours.apply(variables, x), y)
    assert_product(y, spec, x, variables["params"]["kernel"], recipe)


@pytest.mark.parametrize(
    "name, dtypes",
    [("dense", dtypes) for dtypes in DTYPES]
    + [(name, dtypes) for name in ("general", "einsum") for dtypes in DTYPES[1:4]],
    ids=lambda value: value if isinstance(value, str) else dtypes_id(value),
)
def test_dtypes(name, dtypes):
    of_input, dtype, param_dtype = dtypes
    flaxs, ours, shape, spec = pair(name, dtype=dtype, param_dtype=param_dtype)
    x = samples(shape, of_input)
    y, variables = ours.init_with_output(KEY, x)
    ref.assert_same_trees(variables["params"], params_of(flaxs, x))
    assert_same_structure(y, jax.eval_shape(flaxs.apply, variables, x))
    of_product = y.dtype  # Which is what both operands are cast to.
    operands = x.astype(of_product), variables["params"]["kernel"].astype(of_product)
    assert_product(y, spec, *operands)


@pytest.mark.parametrize("name", ["dense", "general of batches", "einsum"])
def test_bias(name):
    bias_init = nn.initializers.normal(1.0)
    flaxs, ours, shape, _ = pair(name, bias_init=bias_init)
    x = samples(shape)
    params = params_of(ours, x)
    ref.assert_same_trees(params, params_of(flaxs, x))
    _, without, _, _ = pair(name, use_bias=False)
    assert list(params_of(without, x)) == ["kernel"]
    plain = without.apply({"params": {"kernel": params["kernel"]}}, x)
    wide = flaxs.apply({"params": {**params, "kernel": 0 * params["kernel"]}}, x)
    ref.assert_same_bits(ours.apply({"params": params}, x), plain + wide)


def test_positional_fields_are_flaxs():
    x = samples((6, 32))
    assert_same_structure(params_of(fp8.Dense(24, False), x), params_of(nn.Dense(24, False), x))
    ours, flaxs = (kind((16, 3), "ab,bc->ac", False) for kind in (fp8.Einsum, nn.Einsum))
    x = samples((6, 16))
    assert_same_structure(ours.init(KEY, x), flaxs.init(KEY, x))


def test_einsum_str_of_the_call():
    x = samples((6, 16))
    ours, flaxs = (kind((16, 3)) for kind in (fp8.Einsum, nn.Einsum))
    variables = ours.init(KEY, x, "ab,bc->ca")
    assert_same_structure(variables, flaxs.init(KEY, x, "ab,bc->ca"))
    assert ours.apply(variables, x, "ab,bc->ca").shape == (3, 6)


def test_precision_and_preferred_element_type(monkeypatch):
    x = samples((6, 32), jnp.bfloat16)
    for ours in (
        fp8.Dense(8, precision="highest"),
        fp8.Dense(8, precision=jax.lax.Precision.HIGH),
        fp8.Einsum((32, 8), "ab,bc->ac", preferred_element_type=jnp.float32, precision="highest"),
    ):
        variables = ours.init(KEY, x)
        assert ours.apply(variables, x).dtype == jnp.float32
    with pytest.raises(ValueError, match="precision"):
        fp8.Dense(8, precision="no such").init(KEY, x)


def test_promote_dtype():
    def halve(*args, dtype=None):
        return [None if arg is None else arg.astype(jnp.bfloat16) / 2 for arg in args]

    x = samples((6, 32))
    ours, flaxs = (kind(8, promote_dtype=halve) for kind in (fp8.Dense, nn.Dense))
    variables = ours.init(KEY, x)
    y = ours.apply(variables, x)
    assert_same_structure(y, flaxs.apply(variables, x))
    kernel = variables["params"]["kernel"].astype(jnp.bfloat16) / 2
    assert_product(y, "mk,kn->mn", x.astype(jnp.bfloat16) / 2, kernel)


def test_partitioning_metadata():
    x = samples((6, 32))
    for init in (
        nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b")),
        nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp")),
    ):
        for kind, *arguments in (
            ("Dense", 24),
            ("DenseGeneral", 24),
            ("Einsum", (32, 24), "ab,bc->ac"),
        ):
            ours, flaxs = (getattr(m, kind)(*arguments, kernel_init=init) for m in (fp8, nn))
            ours, flaxs = ours.init(KEY, x), flaxs.init(KEY, x)
            assert jax.tree.structure(ours) == jax.tree.structure(flaxs)
            assert nn.get_partition_spec(ours) == nn.get_partition_spec(flaxs)
            ref.assert_same_trees(ours, flaxs)


def test_blockwise_and_weight_only():
    x = samples((6, 272), jnp.bfloat16)
    for recipe, of_x, of_w in (
        ("blockwise", (1, 128), (128, 128)),
        ("weight_only", None, "row"),
    ):
        layer = fp8.Dense(24, use_bias=False, dtype=jnp.bfloat16, recipe=recipe)
        y, variables = layer.init_with_output(KEY, x)
        kernel = variables["params"]["kernel"].astype(jnp.bfloat16)
        w = jax_fp8.ScaledArray(*ref.quantize(kernel.T, ref.E4M3, of_w), of_w)
        left = jax_fp8.ScaledArray(x, np.ones((1, 1), np.float32))
        if of_x:
            left = jax_fp8.ScaledArray(*ref.quantize(x, ref.E4M3, of_x), of_x)
        want, magnitudes = ref.product(left, w)
        ref.assert_close(y, want, ref.random_error(magnitudes, 272, of_x is not None))


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    fp8.DotGeneral, functools.partial(fp8.Dense, 4), functools.partial(fp8.DenseGeneral, 4),
    functools.partial(fp8.Einsum, (3, 4)),
], ids=["DotGeneral", "Dense", "DenseGeneral", "Einsum"])  # fmt: skip
def test_recipes_are_checked_at_construction(make):
    with pytest.raises(ValueError, match="unknown recipe 'rowise'; named ones are"):
        make(recipe="rowise")
    with pytest.raises(TypeError, match="recipe must be a name or a Recipe, got int"):
        make(recipe=8)
    mixed = jax_fp8.Recipe(jax_fp8.Operand(scaling="static"), jax_fp8.Operand(scaling="delayed"))
    with pytest.raises(ValueError, match="static and delayed scales"):
        make(recipe=mixed)


def test_a_product_besides_the_recipe():
    for field, value in (("dot_general", jax.lax.dot_general), ("dot_general_cls", nn.Dense)):
        for kind in (fp8.Dense, fp8.DenseGeneral):
            with pytest.raises(ValueError, match=f"{field} and recipe both say how to multiply"):
                kind(4, **{field: value})


def both_raise(error, make_ours, make_flaxs, *args):
    for make in (make_ours, make_flaxs):
        with pytest.raises(error):
            make(*args)


def test_errors_are_of_flaxs_types():
    x = samples((6, 32))
    scalar, codes = jnp.float32(1), x.astype(jnp.float8_e4m3fn)
    promotion = jax.dtypes.TypePromotionError

    def init(kind, *args, inputs=(x,), **fields):
        return lambda module: getattr(module, kind)(*args, **fields).init_with_output(KEY, *inputs)

    def apply_to(inputs, kind, *args, **fields):
        def attempt(module):
            layer = getattr(module, kind)(*args, **fields)
            return layer.apply(layer.init(KEY, x), inputs)

        return attempt

    for error, attempt in (
        (ValueError, init("DenseGeneral", 4, batch_dims=(1,))),
        (ValueError, init("Einsum", (32, 4), "ab,bc")),
        (ValueError, init("Einsum", (32, 4), "ab,bc,cd->ad")),
        (ValueError, init("Einsum", (32, 4))),
        (ValueError, init("Einsum", (32, 4), "ab,bc->ac", inputs=(x, "ab,bc->ac"))),
        (TypeError, init("Dense", "four")),
        (TypeError, init("Dense", -1)),
        (ValueError, init("Dense", 4, dtype=jnp.int32)),
        (ValueError, init("DenseGeneral", 4, dtype=jnp.int32)),
        (ValueError, init("Einsum", (32, 4), "ab,bc->ac", dtype=jnp.int32)),
        # Kernels of other shapes.
        (flax.errors.ScopeParamShapeError, apply_to(x[:, :16], "Dense", 4)),
        (flax.errors.ScopeParamShapeError, apply_to(x[:, :16], "DenseGeneral", 4)),
        (ValueError, init("Einsum", (16, 4), "ab,bc->ac")),
        (ValueError, apply_to(x[:, :16], "Einsum", (32, 4), "ab,bc->ac")),
        (ValueError, init("Einsum", (5, 4, 32), "ab,acb->ac")),
        # Axes and indices.
        (TypeError, init("DenseGeneral", 4, axis=(1, 1))),
        (TypeError, init("DenseGeneral", 4, axis=(1, -1))),
        (IndexError, init("DenseGeneral", 4, axis=2)),
        (TypeError, init("DenseGeneral", 4, axis=-3)),
        (TypeError, init("DenseGeneral", 4, axis=0, batch_dims=(0,))),
        (TypeError, init("DenseGeneral", 4, batch_dims=(0, 0))),
        (ValueError, init("DenseGeneral", 4, batch_dims=(5,))),
        (ValueError, init("Einsum", (32, 4), "ab,bc->ad")),
        (ValueError, init("Einsum", (6, 4), "aa,ac->ac")),
        (ValueError, init("Einsum", (32, 4), "ab,bc->aac")),
        # Ranks.
        (AssertionError, init("Einsum", (32, 4, 2), "ab,bc->ac")),
        (ValueError, init("Einsum", (32, 4), "abc,cd->abd")),
        (ValueError, init("Einsum", (32, 4), "ab,bc->ac", inputs=(scalar,))),
        (IndexError, init("Dense", 4, inputs=(scalar,))),
        (IndexError, apply_to(scalar, "Dense", 4)),
        (IndexError, init("DenseGeneral", 4, inputs=(scalar,))),
        (IndexError, apply_to(x[0], "DenseGeneral", 4, axis=(0, 1))),
        # FP8, which nothing is promoted with.
        (promotion, init("Dense", 4, inputs=(codes,))),
        (promotion, init("DenseGeneral", 4, inputs=(codes,))),
        (promotion, init("Einsum", (32, 4), "ab,bc->ac", inputs=(codes,))),
        (promotion, init("Dense", 4, param_dtype=codes.dtype)),
    ):
        both_raise(error, lambda attempt=attempt: attempt(fp8), lambda attempt=attempt: attempt(nn))
    for layer in (fp8.Dense(4), nn.Dense(4)):
        with pytest.raises(flax.errors.ScopeCollectionNotFound):
            layer.apply({}, x)
    with pytest.raises(TypeError, match="weight_only|16 bits|bfloat16 or float16"):
        fp8.Dense(4, recipe="weight_only").init(KEY, x)
    # What Flax multiplies and this library refuses.
    for error, message, attempt in (
        (TypeError, "lhs must be .*float8_e4m3fn", init("Dense", 4, dtype=codes.dtype)),
        (TypeError, "lhs must be .*complex64", init("Dense", 4, inputs=(x + 1j,))),
        (ValueError, "of rhs twice", init("Einsum", (32, 32), "ab,bb->ab", use_bias=False)),
    ):
        assert len(attempt(nn)[0]) == 6
        with pytest.raises(error, match=message):
            attempt(fp8)
    # What is cast first is a value like others.
    cast = init("Dense", 4, inputs=(codes,), dtype=jnp.bfloat16)
    assert_same_structure(cast(fp8), cast(nn))


def test_modules_are_values():
    """Equal fields make equal modules, which jax.jit and Flax's transforms count on."""
    assert fp8.Dense(4, recipe="rowwise") == fp8.Dense(4, recipe="rowwise")
    assert hash(fp8.Dense(4)) == hash(fp8.Dense(4))
    assert fp8.Dense(4) != fp8.Dense(4, recipe="rowwise")
    changed = fp8.Dense(4).clone(recipe="delayed")
    assert list(changed.init(KEY, samples((6, 32)))) == ["params", "fp8"]


def test_import_error_names_the_extra(monkeypatch):
    from jax_fp8._src import layers

    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"jax_fp8.nnx needs Flax.*jax-fp8\[flax\]"):
        layers.require_flax("jax_fp8.nnx")
