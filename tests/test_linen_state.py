"""jax_fp8.linen in training: amaxes, random bits, transforms, checkpoints and statistics."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref
from flax_cases import assert_product, assert_same_structure, samples

import jax_fp8
import jax_fp8.linen as fp8

KEY = jax.random.key(0)
STOCHASTIC = jax_fp8.named_recipe("rowwise", stochastic_rounding=True)


class Network(nn.Module):
    """Two dense layers of ``module``."""

    module: object
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        options = dict(self.options)
        x = nn.relu(self.module.Dense(24, **options)(x))
        return self.module.DenseGeneral((2, 4), **options)(x)


def network(recipe):
    return Network(fp8, (("recipe", recipe),))


def loss_of(model, variables, x, **options):
    found = model.apply(variables, x, **options)
    y, state = found if "mutable" in options else (found, None)
    return jnp.square(y - 1).mean(), state


def kernel_of(variables, name="Dense_0"):
    return variables["params"][name]["kernel"]


def amaxes_of(state, name="Dense_0"):
    return state["fp8"][name]["DotGeneral_0"]


# --- Delayed --------------------------------------------------------------------------------------


def test_delayed_amaxes():
    model, x = network("delayed"), samples((6, 32))
    variables = model.init(KEY, x)
    assert set(variables) == {"params", "fp8"}
    assert_same_structure(variables["params"], Network(nn).init(KEY, x)["params"])
    first, largest = amaxes_of(variables), float(jnp.max(jnp.abs(kernel_of(variables))))
    # What init is called with need not be data.
    assert first["activation_amax"].tolist() == [0.0] * 16
    assert first["weight_amax"].tolist() == [largest] + [0.0] * 15

    y, state = model.apply(variables, x, mutable=["fp8"])
    after = amaxes_of(state)
    assert after["activation_amax"][:2].tolist() == [float(jnp.max(jnp.abs(x))), 0.0]
    assert after["weight_amax"][:3].tolist() == [largest, largest, 0.0]
    ref.assert_same_bits(model.apply(variables, x), y)

    layer = fp8.Dense(24, use_bias=False, recipe="delayed")
    own = {"params": {"kernel": kernel_of(variables)}, "fp8": {"DotGeneral_0": after}}
    amaxes = after["activation_amax"][0], largest
    louder = 8 * x  # Saturates: the scale is of the steps before.
    assert_product(
        layer.apply(own, louder), "mk,kn->mn", louder, own["params"]["kernel"], amaxes=amaxes
    )


def test_training_sees_flaxs_parameters_alone():
    model, x = network("delayed"), samples((6, 32))
    variables = model.init(KEY, x)
    params, state = variables["params"], {"fp8": variables["fp8"]}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    moments = optimizer.init(params)

    @jax.jit
    def step(params, state, moments):
        def loss(params):
            return loss_of(model, {"params": params, **state}, x, mutable=["fp8"])

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), state, moments, value, gradients

    values = []
    for _ in range(5):
        params, state, moments, value, gradients = step(params, state, moments)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    assert_same_structure(gradients, Network(nn).init(KEY, x)["params"])
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients))
    amaxes = amaxes_of(state)
    assert np.count_nonzero(amaxes["activation_amax"]) == 5
    assert np.count_nonzero(amaxes["weight_amax"]) == 6  # That of init is among them.


def test_gradients_are_those_of_dot_general():
    layer, x = fp8.Dense(24, use_bias=False, recipe="rowwise"), samples((6, 32))
    variables = layer.init(KEY, x)
    got = jax.grad(lambda v: jnp.sum(layer.apply(v, x) ** 2))(variables)["params"]["kernel"]

    def product(kernel):
        return jax_fp8.dot_general(x, kernel, (((1,), (0,)), ((), ())), recipe="rowwise")

    want = jax.grad(lambda kernel: jnp.sum(product(kernel) ** 2))(variables["params"]["kernel"])
    ref.assert_same_bits(got, want)


def test_amaxes_that_are_missing():
    model, x = network("delayed"), samples((6, 32))
    params = {"params": Network(nn).init(KEY, x)["params"]}  # Flax's checkpoint.
    with pytest.raises(ValueError, match=r"Dense_0/DotGeneral_0 has no activation_amax in the"):
        model.apply(params, x)
    y, state = model.apply(params, x, mutable=["fp8"])
    started = model.init(KEY, x)
    ref.assert_same_trees((y, state), model.apply(started, x, mutable=["fp8"]))
    wrong = jax.tree.map(lambda leaf: leaf[:4], started["fp8"])
    with pytest.raises(ValueError, match="state.activation does not fit the recipe"):
        model.apply({**params, "fp8": wrong}, x)


# --- Static ---------------------------------------------------------------------------------------


def test_static_scales():
    layer, x = fp8.Dense(24, use_bias=False, recipe="static"), samples((6, 32))
    variables = layer.init(KEY, x)
    kernel = variables["params"]["kernel"]
    with pytest.raises(ValueError, match="static scale of the activation of DotGeneral_0 has not"):
        layer.apply(variables, x)
    assert jnp.isnan(jax.jit(layer.apply)(variables, x)).all()  # There, no one can know.

    calibrated = variables
    for factor in (1.0, 2.0, 0.5):
        y, state = layer.apply(calibrated, factor * x, mutable=["fp8"])
        assert_product(y, "mk,kn->mn", factor * x, kernel)  # Dynamic, while it calibrates.
        calibrated = {**variables, **state}
    largest = 2 * float(jnp.max(jnp.abs(x)))
    assert state["fp8"]["DotGeneral_0"]["activation_amax"].tolist() == [largest]
    y = layer.apply(calibrated, x)
    assert_product(y, "mk,kn->mn", x, kernel, amaxes=(largest, None))
    gradient = jax.grad(lambda v: layer.apply(v, x).sum())(calibrated)
    assert jnp.any(gradient["params"]["kernel"] != 0)
    assert not jnp.any(gradient["fp8"]["DotGeneral_0"]["activation_amax"])


@pytest.mark.parametrize(
    "name, options", [("static", {}), ("delayed", {"history": 4, "update": "most_recent"})]
)
def test_scales_with_a_margin_and_a_history(name, options):
    recipe = jax_fp8.named_recipe(name, margin=1, **options)
    layer, x = fp8.Dense(24, use_bias=False, recipe=recipe), samples((6, 32))
    variables = layer.init(KEY, x)
    kernel = variables["params"]["kernel"]
    _, state = layer.apply(variables, x, mutable=["fp8"])
    found = layer.apply({**variables, **state}, x)
    largest = [2 * float(jnp.max(jnp.abs(a))) for a in (x, kernel)]  # By the margin.
    amaxes = (largest[0], largest[1] if name == "delayed" else None)
    assert_product(found, "mk,kn->mn", x, kernel, amaxes=amaxes)


# --- Stochastic rounding --------------------------------------------------------------------------


def test_stochastic_rounding():
    model, x = network(STOCHASTIC), samples((6, 32))
    variables = model.init(KEY, x)
    assert list(variables) == ["params"]
    with pytest.raises(flax.errors.InvalidRngError, match="fp8"):
        model.apply(variables, x)

    @jax.jit
    def gradient(key):
        return jax.grad(lambda v: loss_of(model, v, x, rngs={"fp8": key})[0])(variables)

    one, again, other = (gradient(jax.random.key(seed)) for seed in (1, 1, 2))
    ref.assert_same_trees(one, again)
    assert jnp.any(kernel_of(one) != kernel_of(other))
    values = [loss_of(model, variables, x, rngs={"fp8": jax.random.key(s)})[0] for s in (1, 2)]
    assert values[0] == values[1]


# --- Transforms -----------------------------------------------------------------------------------


class Block(nn.Module):
    recipe: object

    @nn.compact
    def __call__(self, x, _):
        return x + fp8.Dense(32, recipe=self.recipe)(nn.tanh(x)), None


RECIPES = {"delayed": "delayed", "stochastic": STOCHASTIC}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_scan_and_remat(recipe):
    """A scan over layers is the layers one by one."""
    stack = nn.scan(
        nn.remat(Block), variable_axes={"params": 0, "fp8": 0},
        split_rngs={"params": True, "fp8": True}, length=3,
    )(recipe)  # fmt: skip
    x = samples((6, 32))
    variables = stack.init(KEY, x, None)
    assert kernel_of(variables).shape == (3, 32, 32)
    rngs = {"fp8": jax.random.key(1)} if recipe is STOCHASTIC else {}

    @jax.jit
    def run(variables):
        (y, _), state = stack.apply(variables, x, None, mutable=["fp8"], rngs=rngs)
        return jnp.square(y).sum(), state

    (value, state), gradients = jax.value_and_grad(run, has_aux=True, allow_int=True)(variables)
    assert jnp.all(jnp.any(kernel_of(gradients) != 0, axis=(1, 2)))
    y, states = x, []
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        (y, _), own = Block(recipe).apply(one, y, None, mutable=["fp8"], rngs=rngs)
        states.append(own)
    np.testing.assert_allclose(value, jnp.square(y).sum(), rtol=1e-5)
    if recipe == "delayed":
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        first = lambda state: amaxes_of(state)["activation_amax"][:, 0]  # noqa: E731
        np.testing.assert_allclose(first(state), first(stacked), rtol=1e-5)


@pytest.mark.parametrize("recipe", ["rowwise", "delayed"])
def test_accumulation(recipe):
    """The gradients of micro-batches add up as those of any layer, and amaxes come one by one."""
    model, xs = network(recipe), samples((3, 6, 32))
    state = model.init(KEY, xs[0])
    params = state.pop("params")

    @jax.jit
    def gradient(state, x):
        def loss(params):
            return loss_of(model, {"params": params, **state}, x, mutable=["fp8"])

        return jax.grad(loss, has_aux=True)(params)

    def accumulate(carry, x):
        total, state = carry
        new, state = gradient(state, x)
        return (jax.tree.map(jnp.add, total, new), state), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    (total, after), _ = jax.lax.scan(accumulate, (zeros, state), xs)
    one_by_one = zeros
    for x in xs:
        new, state = gradient(state, x)
        one_by_one = jax.tree.map(jnp.add, one_by_one, new)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (total, after), (one_by_one, state))
    if recipe == "delayed":
        amaxes, largest = amaxes_of(after), jnp.max(jnp.abs(kernel_of({"params": params})))
        of_activations = [*jnp.max(jnp.abs(xs), axis=(1, 2))[::-1], *[0.0] * 13]
        ref.assert_same_bits(amaxes["activation_amax"], jnp.asarray(of_activations))
        ref.assert_same_bits(amaxes["weight_amax"], jnp.asarray([largest] * 4 + [0.0] * 12))


def test_dot_general_cls_of_attention():
    product = functools.partial(fp8.DotGeneral, recipe="delayed")
    options = {"num_heads": 2, "qkv_features": 32}
    flaxs = nn.MultiHeadDotProductAttention(**options)
    ours = nn.MultiHeadDotProductAttention(
        **options, qkv_dot_general_cls=product, out_dot_general_cls=product
    )
    x = samples((2, 5, 32))
    variables = ours.init(KEY, x)
    ref.assert_same_trees(variables["params"], flaxs.init(KEY, x)["params"])
    assert set(variables["fp8"]) == {"query", "key", "value", "out"}
    y, state = ours.apply(variables, x, mutable=["fp8"])
    assert_same_structure(y, flaxs.apply({"params": variables["params"]}, x))
    assert amaxes_of(state, "query")["activation_amax"][0] == jnp.max(jnp.abs(x))


# --- Checkpoints ----------------------------------------------------------------------------------


def test_checkpoints_move_both_ways(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    x = samples((6, 32))
    ours, flaxs = network("rowwise").init(KEY, x), Network(nn).init(jax.random.key(1), x)
    for source, target in ((ours, flaxs), (flaxs, ours)):
        data = flax.serialization.to_bytes(source)
        ref.assert_same_trees(flax.serialization.from_bytes(target, data), source)
    with ocp.StandardCheckpointer() as checkpointer:
        for name, source, target in (("ours", ours, flaxs), ("flaxs", flaxs, ours)):
            checkpointer.save(tmp_path / name, source)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / name, target)
            assert jax.tree.structure(restored) == jax.tree.structure(source)
            ref.assert_same_trees(restored, source)


@pytest.mark.parametrize("recipe", ["delayed", "static"])
def test_amaxes_are_not_of_flaxs_checkpoints(tmp_path, recipe):
    ocp = pytest.importorskip("orbax.checkpoint")
    x, model = samples((6, 32)), network(recipe)
    ours, flaxs = model.init(KEY, x), Network(nn).init(jax.random.key(1), x)
    assert list(flaxs) == ["params"]
    with ocp.StandardCheckpointer() as checkpointer:

        def carry(source, target, name):
            checkpointer.save(tmp_path / name, {"params": source["params"]})
            checkpointer.wait_until_finished()
            target = {"params": target["params"]}
            data = flax.serialization.to_bytes({"params": source["params"]})
            restored = checkpointer.restore(tmp_path / name, target)
            ref.assert_same_trees(restored, flax.serialization.from_bytes(target, data))
            return restored

        restored = carry(flaxs, ours, "flaxs")
        ref.assert_same_trees(restored, flaxs)
        with pytest.raises(ValueError, match="do not match"):
            checkpointer.restore(tmp_path / "flaxs", ours)
        _, state = model.apply(restored, x, mutable=["fp8"])  # Makes the amaxes, or calibrates.
        trained = {**restored, **state}
        ref.assert_same_trees(carry(trained, flaxs, "ours"), flaxs)
    assert_same_structure(trained, ours)
    if recipe == "delayed":
        assert amaxes_of(state)["weight_amax"][0] == jnp.max(jnp.abs(kernel_of(flaxs)))
    assert jnp.max(jnp.abs(model.apply(trained, x) - Network(nn).apply(flaxs, x))) < 0.3


# --- Statistics -----------------------------------------------------------------------------------


def test_health():
    layer, x = fp8.Dense(24, recipe="delayed"), samples((6, 32))
    variables = layer.init(KEY, x)
    assert "fp8_probes" not in variables
    _, state = layer.apply(variables, x, mutable=["fp8"])
    stats = fp8.health(layer, {**variables, **state}, lambda y: jnp.square(y - 1).sum(), 8 * x)
    assert list(stats) == ["DotGeneral_0"]
    numbers = stats["DotGeneral_0"]
    assert list(numbers) == ["activation", "weight", "gradient"]
    largest = jnp.max(jnp.abs(x))
    assert numbers["activation"]["amax"] == 8 * largest
    # The scale is of the step before, when the input was an eighth as large.
    beyond = float(jnp.mean(jnp.abs(8 * x) > 464 / 448 * largest))
    assert numbers["activation"]["saturated"] == pytest.approx(beyond, abs=1e-6)
    assert numbers["weight"]["amax"] == jnp.max(jnp.abs(variables["params"]["kernel"]))
    for name in ("weight", "gradient"):
        assert numbers[name]["saturated"] == 0 and 15 < numbers[name]["snr_db"] < 45


def test_health_of_scanned_layers_and_of_none():
    x = samples((6, 32))
    stack = nn.scan(
        Block, variable_axes={"params": 0, "fp8_probes": 0}, split_rngs={"params": True}, length=2
    )("tensorwise")
    stats = fp8.health(stack, stack.init(KEY, x, None), lambda y: y[0].sum(), x, None)
    assert list(stats) == ["Dense_0/DotGeneral_0[0]", "Dense_0/DotGeneral_0[1]"]
    with pytest.raises(ValueError, match="Dense has no FP8 products"):
        fp8.health(nn.Dense(4), nn.Dense(4).init(KEY, x), jnp.sum, x)


def test_measuring_in_a_jitted_step_changes_no_number():
    layer, x = fp8.Dense(24, recipe="rowwise"), samples((6, 32))
    variables = layer.init(KEY, x)

    def loss(y):
        return jnp.square(y - 1).sum()

    def gradients(variables):
        return jax.grad(lambda variables: loss(layer.apply(variables, x)))(variables)

    @jax.jit
    def step(variables):
        return fp8.measure(layer, variables, loss, x), gradients(variables)

    measured, found = step(variables)
    assert list(measured) == ["DotGeneral_0"]
    stats = {path: jax_fp8.summarize(probe) for path, probe in measured.items()}
    assert stats == fp8.health(layer, variables, loss, x)
    ref.assert_same_trees(found, jax.jit(gradients)(variables))
