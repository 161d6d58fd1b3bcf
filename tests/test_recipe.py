import dataclasses

import jax.numpy as jnp
import pytest

from jax_fp8 import Operand, Recipe
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
        ((Operand(), None), "Recipe: weight must be an Operand, got NoneType"),
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
