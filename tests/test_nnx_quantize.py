"""quantize, prepare, health: FP8 weights for inference and for a step, statistics, checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from flax import nnx
from flax_cases import assert_product, assert_same_structure, samples
from flax_models import (
    Model,
    loss_of,
    nbytes,
    paths,
    some_tokens,
    stacked_linear,
    through_stack,
)

import jax_fp8
import jax_fp8.nnx as fp8

STOCHASTIC = jax_fp8.named_recipe("rowwise", stochastic_rounding=True)


def linear(recipe=None, size=(32, 24), **options):
    layer = nnx.Linear(*size, rngs=nnx.Rngs(0), **options)
    return layer if recipe is None else fp8.convert(layer, recipe=recipe)


# --- quantize -------------------------------------------------------------------------------------


def test_memory_is_halved():
    layers = nnx.List(linear(size=(512, 512), param_dtype=jnp.bfloat16) for _ in range(3))
    for recipe, scales in (("tensorwise", 1), ("rowwise", 512), ("blockwise", 16)):
        model = nnx.clone(layers)
        before = nbytes(nnx.state(model))
        assert fp8.quantize(model, recipe=recipe) is model
        kernels = nbytes(nnx.state(model, fp8.KernelVariable))
        assert kernels == 3 * (512 * 512 + 4 * scales)
        assert before - nbytes(nnx.state(model)) == 3 * (512 * 512 - 4 * scales)
        assert nbytes(nnx.state(model)) < 0.51 * before
        # What training sees of it: biases.
        assert paths(nnx.state(model, nnx.Param)) == [(i, "bias") for i in range(3)]


LAYERS = {
    "linear": (lambda: linear(), (6, 32), "mk,kn->mn"),
    "general of tuples": (
        lambda: nnx.LinearGeneral((8, 16), (4, 6), axis=(1, -1), rngs=nnx.Rngs(0)),
        *((3, 8, 5, 16), "abcd,bdef->acef"),
    ),
    "general of batches": (
        lambda: nnx.LinearGeneral(32, (8, 3), batch_axis={0: 3}, rngs=nnx.Rngs(0)),
        *((3, 5, 32), "bmk,bkne->bmne"),
    ),
    "einsum": (
        lambda: nnx.Einsum("abc,ecd->abed", (5, 16, 7), (5, 7), rngs=nnx.Rngs(0)),
        *((3, 4, 16), "abc,ecd->abed"),
    ),
    "einsum of batches": (
        lambda: nnx.Einsum("...mnk,nkh->...nmh", (3, 32, 8), rngs=nnx.Rngs(0)),
        *((2, 5, 3, 32), "amnk,nkh->anmh"),
    ),
    "einsum that sums its input": (
        lambda: nnx.Einsum("abc,cd->da", (16, 7), rngs=nnx.Rngs(0)),
        *((3, 2, 16), "ac,cd->da"),
    ),
}


@pytest.mark.parametrize(
    "name, recipe", [*((name, "rowwise") for name in LAYERS), ("linear", "tensorwise")]
)
def test_quantized_layers(name, recipe):
    make, shape, spec = LAYERS[name]
    flaxs, layer, x = make(), fp8.quantize(make(), recipe=recipe), samples(shape)
    if flaxs.bias is not None:
        ref.assert_same_bits(layer.bias[...], flaxs.bias[...])
    assert layer.kernel.shape == flaxs.kernel.shape and layer.kernel.dtype == jnp.float32
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert_same_structure(y, jax.eval_shape(lambda x: flaxs(x), x))
    summed = x.sum(1) if "sums" in name else x
    assert_product(y, spec, summed, flaxs.kernel[...], recipe)


def test_it_multiplies_as_the_converted_layer():
    x = samples((6, 32), jnp.bfloat16)
    for recipe in ("weight_only", jax_fp8.named_recipe("blockwise", power_of_two=True)):
        layer = linear(recipe, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        want = layer(x)
        fp8.quantize(layer)  # With the recipe that it has.
        ref.assert_same_bits(layer(x), want)


def test_dtypes_are_those_of_the_wide_kernel():
    for of_input, dtype, param_dtype in (
        (jnp.bfloat16, None, jnp.float32),
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.float32),
    ):
        layer = linear(dtype=dtype, param_dtype=param_dtype)
        x = samples((6, 32), of_input)
        want = jax.eval_shape(lambda x, layer=layer: layer(x), x)
        fp8.quantize(layer)
        assert_same_structure(jax.eval_shape(lambda x, layer=layer: layer(x), x), want)


def test_static_and_delayed_scales_are_kept():
    x = samples((6, 32))
    largest = float(jnp.max(jnp.abs(x)))
    layer = fp8.calibrate(linear("static"), [2 * x])
    kernel = layer.kernel[...]
    fp8.quantize(layer)
    assert layer.dot_general.activation_amax[...].tolist() == [2 * largest]
    assert_product(layer(x), "mk,kn->mn", x, kernel, amaxes=(2 * largest, None))

    layer = linear("delayed")
    layer(4 * x)
    layer.eval()
    fp8.quantize(layer)
    assert layer.dot_general.weight_amax is None
    assert_product(layer(x), "mk,kn->mn", x, kernel, amaxes=(4 * largest, None))
    assert layer.dot_general.activation_amax[:2].tolist() == [4 * largest, 0.0]

    layer = fp8.quantize(linear(), recipe="static")  # To be calibrated as it is.
    with pytest.raises(ValueError, match="has not been calibrated"):
        layer(x)
    fp8.calibrate(layer, [2 * x])
    assert_product(layer(x), "mk,kn->mn", x, kernel, amaxes=(2 * largest, None))


def test_scales_with_a_margin_and_a_history():
    """Of which products without such scales, while one calibrates or after it, have none."""
    x = samples((6, 32))
    static = fp8.calibrate(linear(jax_fp8.named_recipe("static", margin=1)), [x])
    recipe = jax_fp8.named_recipe("delayed", history=4, update="most_recent", margin=1)
    delayed = linear(recipe)
    delayed(x)
    delayed.eval()
    largest = 2 * float(jnp.max(jnp.abs(x)))  # By the margin.
    for layer in (static, delayed):
        kernel = layer.kernel[...]
        fp8.quantize(layer)
        assert_product(layer(x), "mk,kn->mn", x, kernel, amaxes=(largest, None))


def test_a_history_of_the_weight_alone():
    """Its own is gone with the wide weight; the activation has none, and keeps its amax."""
    operands = jax_fp8.Operand(scaling="static"), jax_fp8.Operand(scaling="delayed")
    layer, x = linear(jax_fp8.Recipe(*operands, history=4)), samples((6, 32))
    fp8.calibrate(layer, [2 * x])
    kernel = layer.kernel[...]
    fp8.quantize(layer)
    largest = 2 * float(jnp.max(jnp.abs(x)))
    assert_product(layer(x), "mk,kn->mn", x, kernel, amaxes=(largest, None))


def test_a_model():
    model, tokens = Model(2, scanned=True), some_tokens()
    want = nnx.jit(loss_of)(model, tokens)
    before = set(paths(nnx.state(model, nnx.Param)))
    fp8.quantize(model, recipe=[("mlp/up", "rowwise"), ("mlp/down", None), ("head", "rowwise")])
    kernels = {("lm_head", "kernel"), ("blocks", "mlp", "up", "kernel")}
    assert before - set(paths(nnx.state(model, nnx.Param))) == kernels
    loss, gradients = nnx.jit(nnx.value_and_grad(loss_of))(model, tokens)
    assert loss != want and abs(loss - want) < 0.02 * want
    # What comes before a quantized layer still has a gradient.
    assert jnp.any(gradients["embed"]["embedding"][...] != 0)


def test_layers_are_quantized_once():
    model = fp8.quantize(Model(2))  # Its last block is its first again.
    assert len(paths(nnx.state(model, fp8.KernelVariable))) == 2 * 4
    with pytest.raises(ValueError, match="no layer was picked"):
        fp8.quantize(model, where=lambda path, layer: path[-1] == "up")
    with pytest.raises(ValueError, match="with a wide kernel are: lm_head"):
        fp8.convert(model)
    fp8.quantize(model, where=lambda path, layer: path[-1] == "lm_head")
    with pytest.raises(ValueError, match="with a wide kernel are: none"):
        fp8.convert(model)


def test_quantize_errors():
    wide = jax_fp8.Recipe(None, None)
    with pytest.raises(ValueError, match="leaves weights wide"):
        fp8.quantize(linear(), recipe=wide)
    with pytest.raises(ValueError, match="unknown recipe"):
        fp8.quantize(linear(), recipe="rowise")
    layer = fp8.quantize(nnx.Einsum("ab,bc->ac", (32, 8), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"contracting its axes \(0,\).*not \(1,\)"):
        layer(samples((6, 8)), "ac,bc->ab")
    with pytest.raises(IndexError, match=r"only \[...\] is there"):
        layer.kernel[0]
    with pytest.raises(TypeError, match="bfloat16 or float16"):
        fp8.quantize(linear(), recipe="weight_only")(samples((6, 32)))


# --- prepare --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["rowwise", "delayed"])
def test_prepare(recipe):
    """The same numbers as without."""
    model, other = (fp8.convert(stacked_linear(2, 32), recipe=recipe) for _ in range(2))
    x = samples((6, 32))
    prepared = fp8.prepare(model)
    assert prepared.kernel is model.kernel
    value_and_gradient = nnx.jit(nnx.value_and_grad(through_stack))
    got, want = value_and_gradient(prepared, x), value_and_gradient(other, x)
    assert paths(got[1]) == paths(want[1])
    ref.assert_same_trees(got, want)
    ref.assert_same_trees(nnx.state(model), nnx.state(other))  # With amaxes of this step.


def test_prepare_einsum():
    layer = fp8.Einsum("...mnk,nkh->...nmh", (3, 32, 8), recipe="rowwise", rngs=nnx.Rngs(0))
    x = samples((2, 5, 3, 32))
    gradient = nnx.jit(nnx.grad(lambda layer, x: jnp.square(layer(x)).sum()))
    ref.assert_same_trees(gradient(fp8.prepare(layer), x), gradient(layer, x))


def fp8_conversions(jaxpr, shape):
    """How often values of ``shape`` become FP8, in all that a program is made of."""
    count = 0
    for equation in jaxpr.eqns:
        (*_, out) = equation.outvars
        if equation.primitive.name == "convert_element_type" and out.aval.shape == shape:
            count += out.aval.dtype == jnp.float8_e4m3fn
        for leaf in jax.tree.leaves(list(equation.params.values())):
            leaf = getattr(leaf, "jaxpr", leaf)
            count += fp8_conversions(leaf, shape) if hasattr(leaf, "eqns") else 0
    return count


def test_prepare_quantizes_once_for_all_micro_batches():
    graphdef, state = nnx.split(linear("tensorwise", dtype=jnp.bfloat16))

    def count(micro_batches, prepare):
        def step(state, xs):
            layer = nnx.merge(graphdef, state)
            layer = fp8.prepare(layer) if prepare else layer
            return [nnx.grad(lambda layer, x: layer(x).sum())(layer, x) for x in xs]

        jaxpr = jax.make_jaxpr(step)(state, samples((micro_batches, 6, 32)))
        return fp8_conversions(jaxpr.jaxpr, (1, 24, 32))

    once = count(1, prepare=True)
    assert count(3, prepare=True) == once > 0
    assert count(3, prepare=False) == 3 * count(1, prepare=False) > 0
    with pytest.raises(ValueError, match="the model has no FP8 products"):
        fp8.prepare(linear())


# --- Checkpoints ----------------------------------------------------------------------------------


def test_checkpoints_move_both_ways(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:

        def carry(source, target, name):
            checkpointer.save(tmp_path / name, nnx.state(source))
            checkpointer.wait_until_finished()
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(target))
            nnx.update(target, checkpointer.restore(tmp_path / name, abstract))
            ref.assert_same_trees(nnx.state(target), nnx.state(source))

        def changed(model):
            nnx.update(model, jax.tree.map(lambda leaf: leaf + 1, nnx.state(model, nnx.Param)))
            return model

        def ours(recipe="rowwise"):
            return fp8.convert(Model(), recipe=recipe)

        carry(changed(ours()), Model(), "ours")
        carry(changed(Model()), ours(), "flaxs")
        carry(changed(ours("delayed")), ours("delayed"), "delayed")
        quantized = fp8.quantize(changed(Model()), recipe="rowwise")
        carry(quantized, fp8.quantize(Model(), recipe="rowwise"), "quantized")


@pytest.mark.parametrize("recipe", ["delayed", "static"])
def test_amaxes_are_not_of_flaxs_checkpoints(tmp_path, recipe):
    ocp = pytest.importorskip("orbax.checkpoint")

    def flaxs(seed):
        norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))  # Has more than parameters.
        return nnx.Dict(layer=nnx.Linear(32, 24, rngs=nnx.Rngs(seed)), norm=norm)

    def shared(model):
        return nnx.state(model, nnx.Not(fp8.ScalingVariable))

    ours, plain, x = fp8.convert(flaxs(0), recipe=recipe), flaxs(1), samples((6, 32))
    with ocp.StandardCheckpointer() as checkpointer:
        for name, source, target in (("flaxs", plain, ours), ("ours", ours, flaxs(2))):
            checkpointer.save(tmp_path / name, shared(source))
            checkpointer.wait_until_finished()
            nnx.update(target, checkpointer.restore(tmp_path / name, shared(target)))
            ref.assert_same_trees(shared(target), nnx.state(plain))
        with pytest.raises(ValueError, match="do not match"):
            checkpointer.restore(tmp_path / "flaxs", nnx.state(ours))
    product = fp8.convert(ours, recipe=recipe)["layer"].dot_general
    if recipe == "static":
        fp8.calibrate(ours, [x], lambda model, x: model["layer"](x))
    else:
        assert product.weight_amax[0] == jnp.max(jnp.abs(plain["layer"].kernel[...]))
    assert jnp.max(jnp.abs(ours["layer"](x) - plain["layer"](x))) < 0.3


def test_pure_dicts_move_both_ways():
    ours, flaxs = linear("rowwise"), nnx.Linear(32, 24, rngs=nnx.Rngs(1))
    state = nnx.state(ours)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(flaxs)))
    nnx.update(ours, state)
    ref.assert_same_trees(nnx.state(ours), nnx.state(flaxs))


# --- health ---------------------------------------------------------------------------------------


def test_health():
    x = samples((6, 32))
    layer = linear("delayed")
    layer(x)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))

    def loss(layer, x):
        return jnp.square(layer(x) - 1).sum(), "something else"

    stats = fp8.health(layer, loss, 8 * x)
    assert list(stats) == [""]
    numbers = stats[""]
    assert list(numbers) == ["activation", "weight", "gradient"]
    largest = jnp.max(jnp.abs(x))
    assert numbers["activation"]["amax"] == 8 * largest
    # The scale is of the step before, when the input was an eighth as large.
    beyond = float(jnp.mean(jnp.abs(8 * x) > 464 / 448 * largest))
    assert numbers["activation"]["saturated"] == pytest.approx(beyond, abs=1e-6)
    assert numbers["weight"]["amax"] == jnp.max(jnp.abs(layer.kernel[...]))
    for name in ("weight", "gradient"):
        assert numbers[name]["saturated"] == 0 and 15 < numbers[name]["snr_db"] < 45
    ref.assert_same_trees(nnx.to_pure_dict(nnx.state(layer)), before)
    assert layer.dot_general.probe is None


def test_statistics_of_stacked_layers_change_no_number():
    layers, x = fp8.convert(stacked_linear(2, 32)), samples((6, 32))
    stats = fp8.health(layers, through_stack, x)
    assert list(stats) == ["[0]", "[1]"]
    for i, numbers in enumerate(stats.values()):
        assert numbers["weight"]["amax"] == jnp.max(jnp.abs(layers.kernel[i]))
        assert numbers["gradient"]["amax"] > 0
    assert stats["[0]"]["activation"]["amax"] == jnp.max(jnp.abs(x))

    @nnx.jit
    def step(layers, x):
        return fp8.measure(layers, through_stack, x), nnx.grad(through_stack)(layers, x)

    probes, gradients = step(layers, x)
    amaxes = [numbers["weight"]["amax"] for numbers in stats.values()]
    assert probes[""].weight.amax.tolist() == amaxes
    ref.assert_same_trees(gradients, nnx.jit(nnx.grad(through_stack))(layers, x))
    with pytest.raises(ValueError, match="the model has no FP8 products"):
        fp8.health(linear(), lambda layer: layer(x).sum())
