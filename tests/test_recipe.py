import dataclasses

import jax.numpy as jnp
import pytest

from jax_fp8 import Operand, Recipe, named_recipe
from jax_fp8._src.recipe import RECIPES, get_recipe


def test_the_default_operand_is_e4m3_for_each_tensor():
    assert Operand() == Operand(jnp.float8_e4m3fn, "tensor")
    assert Recipe() == Recipe(Operand(), Operand())


@pytest.mark.parametrize("dtype", [jnp.float8_e5m2, jnp.dtype(jnp.float8_e5m2), "float8_e5m2"])
def test_spellings_of_a_dtype_are_one(dtype):
    assert Operand(dtype).dtype == jnp.dtype(jnp.float8_e5m2)
    assert hash(Operand(dtype)) == hash(Operand(jnp.float8_e5m2))


def test_a_list_is_a_granularity_too():
    assert Operand(granularity=[1, 128]) == Operand(granularity=(1, 128))


def test_recipes_are_hashable_and_fixed():
    assert len({Recipe(), Recipe(Operand()), Recipe(Operand(granularity="row"))}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().weight = Operand()


@pytest.mark.parametrize(
    "name, activation, weight",
    [
        ("tensorwise", "tensor", "tensor"),
        ("rowwise", "row", "row"),
        ("blockwise", (1, 128), (128, 128)),
    ],
)
def test_named_recipes(name, activation, weight):
    recipe = get_recipe("operation", name)
    assert (recipe.activation.granularity, recipe.weight.granularity) == (activation, weight)
    assert {recipe.activation.dtype, recipe.weight.dtype} == {jnp.dtype(jnp.float8_e4m3fn)}


def test_weight_only_leaves_the_activation_wide():
    recipe = get_recipe("operation", "weight_only")
    assert recipe.activation is None
    assert recipe.weight == Operand(jnp.float8_e4m3fn, "row")


@pytest.mark.parametrize(
    "operands, message",
    [
        (("row",), "Recipe: activation must be an Operand or None, got str"),
        ((Operand(), "row"), "Recipe: weight must be an Operand or None, got str"),
    ],
    ids=["activation", "weight"],
)
def test_operands_of_a_recipe_are_operands(operands, message):
    with pytest.raises(TypeError, match=message):
        Recipe(*operands)


def test_a_recipe_is_taken_as_it_is():
    recipe = Recipe(Operand(granularity="row"))
    assert get_recipe("operation", recipe) is recipe


def test_an_unknown_name_raises_and_lists_the_others():
    with pytest.raises(ValueError, match="operation: unknown recipe 'rows'; .*tensorwise, rowwise"):
        get_recipe("operation", "rows")
    assert "rows" not in RECIPES


def test_another_type_raises():
    with pytest.raises(TypeError, match="operation: recipe must be a name or a Recipe, got tuple"):
        get_recipe("operation", ("row", "row"))


def test_another_dtype_raises():
    with pytest.raises(TypeError, match="Operand: dtype must be float8_e4m3fn or .*got float16"):
        Operand(jnp.float16)


def test_another_granularity_raises():
    with pytest.raises(ValueError, match=r"Operand: unknown granularity \(1, 64\)"):
        Operand(granularity=(1, 64))


# --- Gradients ------------------------------------------------------------------------------------

E5M2 = jnp.dtype(jnp.float8_e5m2)


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "blockwise", "static", "delayed"])
def test_gradients_by_default(name):
    """They have dynamic scales, and E5M2's range but where each row has a scale."""
    recipe = get_recipe("operation", name)
    dtype = jnp.float8_e4m3fn if name == "rowwise" else E5M2
    for gradient, other in (recipe.dgrad, recipe.wgrad):
        assert gradient == Operand(dtype, recipe.activation.granularity)
        assert other.dtype == jnp.dtype(jnp.float8_e4m3fn)
    assert (recipe.dgrad[1], recipe.wgrad[1]) == (recipe.weight, recipe.activation)


def test_an_e5m2_operand_has_e4m3_gradients():
    recipe = Recipe(Operand(E5M2), Operand())
    assert [pair[0].dtype.name for pair in (recipe.dgrad, recipe.wgrad)] == [
        "float8_e5m2",
        "float8_e4m3fn",
    ]


def test_wide_products():
    assert get_recipe("operation", "weight_only").dgrad == (None, Operand(granularity="row"))
    assert get_recipe("operation", "weight_only").wgrad is None
    wide = get_recipe("operation", "wide")
    assert (wide.activation, wide.weight, wide.dgrad, wide.wgrad) == (None,) * 4
    assert named_recipe("rowwise", wide_wgrad=True).wgrad is None


def test_options_reach_every_operand():
    recipe = named_recipe(
        "blockwise", power_of_two=True, gradient_dtype="float8_e4m3fn", stochastic_rounding=True
    )
    operands = (recipe.activation, recipe.weight, *recipe.dgrad, *recipe.wgrad)
    assert all(operand.power_of_two for operand in operands)
    assert {recipe.dgrad[0].dtype.name, recipe.wgrad[0].dtype.name} == {"float8_e4m3fn"}
    assert recipe.dgrad[0].rounding == recipe.wgrad[0].rounding == "stochastic"
    assert recipe.needs_key and not recipe.has_state
    delayed = named_recipe("delayed", history=4, update="most_recent", margin=1)
    assert (delayed.history, delayed.update, delayed.margin) == (4, "most_recent", 1)
    assert delayed.has_state and not delayed.needs_key


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Operand(scaling="later"), ValueError, "unknown scaling 'later'"),
        (lambda: Operand(rounding="up"), ValueError, "unknown rounding 'up'"),
        (lambda: Operand(power_of_two=1), TypeError, "power_of_two must be a bool"),
        (
            lambda: Operand(granularity="row", scaling="delayed"),
            ValueError,
            "one scale for a tensor",
        ),
        (lambda: Recipe(Operand(rounding="stochastic")), ValueError, "rounding is for gradients"),
        (lambda: Recipe(Operand(E5M2), Operand(E5M2)), ValueError, "cannot both be float8_e5m2"),
        (lambda: Recipe(Operand(), None), ValueError, "weight must be an Operand where activation"),
        (lambda: Recipe(dgrad=Operand()), TypeError, r"dgrad must be None or \(gradient, weight\)"),
        (lambda: Recipe(dgrad=(Operand(), None)), TypeError, "of which the gradient may be None"),
        (lambda: Recipe(wgrad=(None, Operand())), ValueError, "wgrad with a wide gradient"),
        (
            lambda: Recipe(dgrad=(Operand(scaling="delayed"), Operand())),
            ValueError,
            "gradients have dynamic scales",
        ),
        (
            lambda: Recipe(dgrad=(Operand(E5M2), Operand(E5M2))),
            ValueError,
            "dgrad's gradient and weight cannot both be float8_e5m2",
        ),
        (
            lambda: Recipe(wgrad=(Operand(E5M2), Operand(scaling="static"))),
            ValueError,
            "wgrad's activation has static scaling, so it must be the same",
        ),
        (lambda: Recipe(history=0), ValueError, "history must be an int >= 1"),
        (lambda: Recipe(update="mean"), ValueError, "unknown update 'mean'"),
        (lambda: Recipe(margin=0.5), TypeError, "margin must be an int"),
        (lambda: Recipe(history=3), ValueError, "history and update are of delayed scaling, which"),
        (
            lambda: Recipe(Operand(scaling="static"), update="most_recent"),
            ValueError,
            "no operand has; got history 16 and update 'most_recent'",
        ),
        (lambda: Recipe(margin=3), ValueError, "margin is of static and delayed scaling, which no"),
        (
            lambda: Recipe(Operand(scaling="static"), margin=65),
            ValueError,
            "margin must be from -64 to 64, got 65",
        ),
        (lambda: named_recipe("wide", power_of_two=True), ValueError, "'wide' has no scales"),
        (lambda: named_recipe("weight_only", wide_wgrad=True), ValueError, "is wide, wide_wgrad"),
        (
            lambda: named_recipe("rowwise", history=3),
            ValueError,
            "history and update are of delayed",
        ),
        (lambda: named_recipe("rowwise", margin=1), ValueError, "margin is of static and delayed"),
        (
            lambda: named_recipe("weight_only", gradient_dtype=E5M2),
            ValueError,
            "leaves gradients wide",
        ),
        (lambda: named_recipe("fp8"), ValueError, "unknown recipe 'fp8'"),
    ],
)
def test_wrong_combinations_are_refused_when_they_are_made(make, error, message):
    with pytest.raises(error, match=message):
        make()
