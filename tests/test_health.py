"""Statistics of quantized operands: what they count, and that counting changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import training
from cases import pair_id, sample

import jax_fp8

FLAX = (((1,), (0,)), ((), ()))


def stats_in_numpy(x, operand):
    x = np.asarray(x).astype(np.float64)
    q = training.quantized(x, operand)
    return {
        "amax": np.abs(x).max(),
        "saturated": 0.0,
        "flushed": np.mean((x != 0) & (q == 0)),
        "snr_db": 10 * np.log10(np.sum(x**2) / np.sum((x - q) ** 2)),
    }


RECIPES = {name: jax_fp8.named_recipe(name) for name in training.FP8_RECIPES} | {
    "wide_wgrad": jax_fp8.named_recipe("rowwise", wide_wgrad=True)
}
#: The operands that have statistics: those in FP8, and copies with codes of their own.
ONE_SCALE = ["activation", "weight", "gradient"]
LISTED = {
    "tensorwise": ONE_SCALE,
    "rowwise": [*ONE_SCALE, "wgrad_activation", "dgrad_weight", "wgrad_gradient"],
    "blockwise": [*ONE_SCALE, "wgrad_activation", "wgrad_gradient"],
    "static": ONE_SCALE,
    "delayed": ONE_SCALE,
    "weight_only": ["weight", "dgrad_weight"],
    "wide_wgrad": [*ONE_SCALE, "dgrad_weight"],
}


def operands_for(rng, name, kind, *shapes):
    """Wide operands; what is multiplied by FP8 weights has 16 bits."""
    x, *others = (jnp.asarray(sample(rng, kind, shape)) for shape in shapes)
    return x.astype(jnp.bfloat16) if name == "weight_only" else x, *others


def multiply(recipe, state, x, w, probe, dims=FLAX, prepared=False):
    if prepared:
        w = jax_fp8.prepare_weight(w, recipe, state=state)
    found = jax_fp8.dot_general(x, w, dims, recipe=recipe, state=state, probe=probe)
    return found if state is None else found[0]


@pytest.mark.parametrize(
    "recipe, rows",
    [*((name, (40,)) for name in RECIPES), *((name, (5, 8)) for name in list(RECIPES)[:3])],
    ids=str,
)
def test_statistics_of_all_operands(rng, recipe, rows):
    x, w, dy = operands_for(rng, recipe, "heavy", (40, 272), (272, 136), (40, 136))
    dims = (((len(rows),), (0,)), ((), ()))
    full = RECIPES[recipe]
    state = training.state_for(full, x, w)

    def loss(x, w, probe):
        y = multiply(full, state, x, w, probe, dims)
        return jnp.sum(y * dy.reshape(y.shape))

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    _, _, probe = gradients(x.reshape(*rows, -1), w, jax_fp8.health_probe())
    found = jax_fp8.summarize(probe)
    wgrad = full.wgrad or (None, None)
    expected = {
        "activation": (x, full.activation),
        "weight": (w.T, full.weight),
        "gradient": (dy, full.dgrad[0]),
        "wgrad_activation": (x.T, wgrad[1]),
        "dgrad_weight": (w, full.dgrad[1]),
        "wgrad_gradient": (dy.T, wgrad[0]),
    }
    assert list(found) == LISTED[recipe]
    for name, numbers in found.items():
        want = stats_in_numpy(*expected[name])
        assert numbers == pytest.approx(want, rel=1e-4), name


def test_stochastic_copies_have_the_same_codes(rng):
    """Of one scale both layouts are one rounding."""
    x, w = (jnp.asarray(sample(rng, "normal", s)) for s in ((40, 64), (64, 32)))
    recipe = jax_fp8.named_recipe("tensorwise", stochastic_rounding=True)

    def loss(x, w, probe):
        options = {"recipe": recipe, "key": jax.random.key(0), "probe": probe}
        return jnp.sum(jax_fp8.dot_general(x, w, FLAX, **options) ** 2)

    probe = jax.grad(loss, (0, 1, 2))(x, w, jax_fp8.health_probe())[2]
    assert list(jax_fp8.summarize(probe)) == ["activation", "weight", "gradient"]


def test_of_one_gradient_alone(rng):
    """Copies that no gradient takes are not made, and the gradient is that of one product."""
    x, w = (jnp.asarray(sample(rng, "normal", s)) for s in ((40, 64), (64, 32)))

    def loss(x, w, probe):
        return jnp.sum(jax_fp8.dot_general(x, w, FLAX, recipe="rowwise", probe=probe) ** 2)

    first = ["activation", "weight", "gradient"]
    for argument, name in ((0, "dgrad_weight"), (1, "wgrad_activation")):
        probe = jax.grad(loss, (argument, 2))(x, w, jax_fp8.health_probe())[1]
        assert list(jax_fp8.summarize(probe)) == [*first, name]


@pytest.mark.parametrize("name", RECIPES)
def test_counting_changes_no_number(rng, name):
    x, w = operands_for(rng, name, "normal", (40, 64), (64, 32))
    recipe = RECIPES[name]
    # What a static or delayed scale is too small for saturates.
    state = training.state_for(recipe, x / 2, w / 2)

    def run(probe, prepared, of=(0, 1)):
        def loss(x, w, probe):
            return jnp.sum(multiply(recipe, state, x, w, probe, prepared=prepared) ** 2)

        return jax.jit(jax.value_and_grad(loss, of))(x, w, probe)

    without = run(None, False)
    probes = []
    for prepared in (False, True):
        value, (*gradients, probe) = run(jax_fp8.health_probe(), prepared, (0, 1, 2))
        ref.assert_same_trees((value, gradients), without)
        assert list(jax_fp8.summarize(probe)) == LISTED[name]
        probes.append(probe)
    ref.assert_same_trees(*probes)


@pytest.mark.parametrize("scaling, prepared", [("static", True), ("delayed", False)])
def test_scales_that_are_too_small_for_both_operands(rng, scaling, prepared):
    """A gradient has the scale of its own values, and none of these saturates."""
    x, w = (jnp.asarray(sample(rng, "normal", s)) for s in ((40, 64), (64, 32)))
    operand = jax_fp8.Operand(scaling=scaling)
    recipe = jax_fp8.Recipe(operand, operand)
    state = training.state_for(recipe, x / 2, w / 4)

    def loss(x, w, probe):
        return 1e6 * jnp.sum(multiply(recipe, state, x, w, probe, prepared=prepared) ** 2)

    probe = jax.jit(jax.grad(loss, (0, 1, 2)))(x, w, jax_fp8.health_probe())[2]
    found = jax_fp8.summarize(probe)
    assert list(found) == ONE_SCALE
    for name, values, factor in (("activation", x, 2), ("weight", w, 4)):
        magnitudes = np.abs(values)
        beyond = np.mean(magnitudes > np.float32(464 / 448 / factor) * magnitudes.max())
        assert found[name]["saturated"] == pytest.approx(beyond) and beyond > 0.01
    assert found["gradient"]["saturated"] == 0 and found["gradient"]["amax"] > 1e6


@pytest.mark.parametrize("dtype", ref.FP8, ids=pair_id)
def test_saturated_and_flushed_values_are_counted(dtype):
    """With a static scale of one: what rounds to the largest value has not saturated."""
    largest = float(ref.fp8_max(dtype))
    smallest = float(ref.ml_dtypes.finfo(dtype).smallest_subnormal)
    x = jnp.asarray([[largest, 1.03 * largest, 1.2 * largest, -2 * largest, 0.4 * smallest, 0.0]])
    recipe = jax_fp8.Recipe(
        jax_fp8.Operand(dtype, scaling="static"), jax_fp8.Operand(), dgrad=None, wgrad=None
    )
    state = jax_fp8.ScalingState(jnp.asarray([largest], jnp.float32))

    def loss(x, probe):
        y, _ = jax_fp8.dot_general(
            x, jnp.ones((6, 4)), FLAX, recipe=recipe, state=state, probe=probe
        )
        return jnp.sum(y)

    stats = jax.grad(loss, 1)(x, jax_fp8.health_probe()).activation
    assert (float(stats.size), float(stats.saturated), float(stats.flushed)) == (6, 2, 1)


def test_calls_add_up(rng):
    x, w = (jnp.asarray(sample(rng, "normal", s)) for s in ((40, 64), (64, 64)))

    def loss(w, probe):
        y = jax_fp8.dot_general(x, w, FLAX, probe=probe)
        return jnp.sum(jax_fp8.dot_general(y, w, FLAX, probe=probe))

    stats = jax.grad(loss, 1)(w, jax_fp8.health_probe())
    assert float(stats.weight.calls) == 2 and float(stats.weight.size) == 2 * w.size
    assert jax_fp8.summarize(stats)["weight"]["amax"] == pytest.approx(float(jnp.abs(w).max()))


def test_operands_that_stay_wide_have_none():
    def loss(x, probe):
        recipe = jax_fp8.named_recipe("weight_only")
        return jnp.sum(jax_fp8.dot_general(x, x.T, FLAX, recipe=recipe, probe=probe))

    stats = jax.grad(loss, 1)(jnp.ones((4, 16), jnp.bfloat16), jax_fp8.health_probe())
    assert jax_fp8.summarize(stats).keys() == {"weight"}


def test_a_probe_is_a_health_probe():
    with pytest.raises(TypeError, match="probe must be a HealthProbe or None, got an array"):
        jax_fp8.dot_general(jnp.ones((4, 16)), jnp.ones((16, 8)), FLAX, probe=jnp.zeros(3))


def test_the_plot_has_every_layer_and_operand(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
    )
    numbers = {"amax": 1.0, "saturated": 0.0, "flushed": 0.1, "snr_db": 30.0}
    stats = {"up": {"activation": numbers, "weight": numbers}, "down": {"gradient": numbers}}
    path = jax_fp8.plot_health(stats, tmp_path / "health.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    panels = drawn[0].axes
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == ["up", "down"]
    for panel in panels:
        assert [line.get_label() for line in panel.lines] == ["activation", "weight", "gradient"]
    with pytest.raises(ValueError, match="plot_health: there are no statistics"):
        jax_fp8.plot_health({}, path)
