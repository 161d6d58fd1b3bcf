"""Flax linen layers whose products run in FP8.

``Dense``, ``DenseGeneral`` and ``Einsum`` are Flax's own with two more fields, ``recipe`` and
``implementation``; ``DotGeneral`` is for the ``dot_general_cls`` of any other layer. Parameters,
initializers, names and partitioning are Flax's, so checkpoints move both ways.

Recipes with static or delayed scales keep amaxes in the collection ``"fp8"``, which optimizers and
all else that works on ``"params"`` never sees. Where that collection is mutable it is updated, else
it is used as it is:

- delayed: ``apply(variables, x, mutable=["fp8"])`` in the training step, plain ``apply`` elsewhere.
- static: ``apply(variables, x, mutable=["fp8"])`` is a calibration. It takes the amaxes of this
  call's activations in, and runs with scales of these values.

Recipes with stochastic rounding draw from the stream ``"fp8"``: ``apply(..., rngs={"fp8": key})``.

>>> import jax, jax.numpy as jnp, jax_fp8.linen
>>> layer = jax_fp8.linen.Dense(4, recipe="rowwise")
>>> variables = layer.init(jax.random.key(0), jnp.ones((2, 16)))
>>> jax.tree.map(jnp.shape, variables)
{'params': {'bias': (4,), 'kernel': (16, 4)}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8._src.dot_general import dot_general
from jax_fp8._src.einsum import einsum
from jax_fp8._src.health import HealthProbe, health_probe
from jax_fp8._src.layers import (
    refuse_options,
    require_flax,
    scalings,
    summarize_all,
    with_dynamic_scales,
    without_key,
)
from jax_fp8._src.recipe import Recipe, get_recipe
from jax_fp8._src.scaling import ScalingState, calibrate, init_scaling

require_flax("jax_fp8.linen")

from flax import linen as nn  # noqa: E402
from flax import traverse_util  # noqa: E402

__all__ = ["Dense", "DenseGeneral", "DotGeneral", "Einsum", "health", "measure"]

#: The collections of amaxes and of probes, and the stream of random bits.
STATE, PROBES, STREAM = "fp8", "fp8_probes", "fp8"


def _check_recipe(op: str, recipe: str | Recipe) -> Recipe:
    recipe = get_recipe(op, recipe)
    if {"static", "delayed"} <= set(scalings(recipe).values()):
        raise ValueError(
            f"{op}: {recipe} has static and delayed scales; whether the collection {STATE!r} is"
            " mutable cannot say which of them to update"
        )
    return recipe


class DotGeneral(nn.Module):
    """``jax_fp8.dot_general`` as a module: for ``dot_general_cls`` of Flax's layers.

    Attributes:
      recipe: a name or a ``jax_fp8.Recipe``.
      implementation: of the products, as in ``jax_fp8.dot_general``.

    Raises:
      ValueError: at construction for an unknown recipe, and one with static as well as delayed
        scales; at a call without the amaxes that the recipe needs.

    >>> import functools, flax.linen as nn, jax, jax.numpy as jnp, jax_fp8.linen
    >>> product = functools.partial(jax_fp8.linen.DotGeneral, recipe="delayed")
    >>> layer = nn.Dense(4, dot_general_cls=product)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 16)))
    >>> y, state = layer.apply(variables, jnp.ones((2, 16)), mutable=["fp8"])
    >>> state["fp8"]["DotGeneral_0"]["activation_amax"][:3].tolist()
    [1.0, 0.0, 0.0]
    """

    recipe: str | Recipe = "tensorwise"
    implementation: str | None = None

    def __post_init__(self) -> None:
        _check_recipe("linen.DotGeneral", self.recipe)
        super().__post_init__()

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **options: Any,
    ) -> jax.Array:
        """``lax.dot_general`` of an activation and a weight."""

        def product(**fp8: Any) -> Any:
            return dot_general(
                lhs, rhs, dimension_numbers, precision, preferred_element_type, **options, **fp8
            )

        return self._run(product, lhs, rhs)

    def einsum(self, spec: str, lhs: Any, rhs: Any, **options: Any) -> jax.Array:
        """``jax_fp8.einsum`` of an activation and a weight."""
        return self._run(lambda **fp8: einsum(spec, lhs, rhs, **options, **fp8), lhs, rhs)

    @nn.compact
    def _run(self, product: Callable[..., Any], lhs: Any, rhs: Any) -> jax.Array:
        recipe = get_recipe("linen.DotGeneral", self.recipe)
        options: dict[str, Any] = {"implementation": self.implementation}
        if self.is_initializing():
            self._amaxes(recipe, rhs)
            return product(recipe=with_dynamic_scales(without_key(recipe)), **options)
        if recipe.needs_key:
            options["key"] = self.make_rng(STREAM)
        if self.has_variable(PROBES, "probe") or self.is_mutable_collection(PROBES):
            options["probe"] = self.variable(PROBES, "probe", health_probe).value
        if not recipe.has_state:
            return product(recipe=recipe, **options)
        amaxes = self._amaxes(recipe, rhs)
        state = ScalingState(**{name: amax.value for name, amax in amaxes.items()})
        mutable = self.is_mutable_collection(STATE)
        if mutable and "static" in scalings(recipe).values():
            new = calibrate(recipe, state, activation=lhs, weight=rhs)
            y = product(recipe=with_dynamic_scales(recipe), **options)
        else:
            self._check_calibrated(state)
            y, new = product(recipe=recipe, state=state, **options)
        if mutable:
            for name, amax in amaxes.items():
                amax.value = getattr(new, name)
        return y

    def _amaxes(self, recipe: Recipe, rhs: Any) -> dict[str, Any]:
        """The variables of the recipe's amaxes, that of the weight beginning with its own."""
        kept = [name for name, scaling in scalings(recipe).items() if scaling != "dynamic"]
        for name in kept:
            if not (self.has_variable(STATE, f"{name}_amax") or self.is_mutable_collection(STATE)):
                raise ValueError(
                    f"linen.DotGeneral: the recipe keeps amaxes, and {'/'.join(self.path)} has no"
                    f" {name}_amax in the collection {STATE!r}; take it from init, or make one with"
                    f" apply(..., mutable=[{STATE!r}])"
                )

        def variable(name: str) -> Any:
            return self.variable(
                STATE, f"{name}_amax", lambda: getattr(init_scaling(recipe, weight=rhs), name)
            )

        return {name: variable(name) for name in kept}

    def _check_calibrated(self, state: ScalingState) -> None:
        """Where values are known. Where they are not, NaN as a scale makes all results NaN."""
        for name in ("activation", "weight"):
            amaxes = getattr(state, name)
            if amaxes is None or isinstance(amaxes, jax.core.Tracer):
                continue
            if np.isnan(np.asarray(amaxes)).any():
                raise ValueError(
                    f"linen.DotGeneral: the static scale of the {name} of {'/'.join(self.path)} has"
                    f" not been calibrated; call apply(..., mutable=[{STATE!r}]) with typical"
                    " inputs and keep the collection that it returns"
                )


@dataclasses.dataclass(frozen=True)
class _Product:
    """A ``dot_general_cls``; two of one recipe are equal, and so are modules that hold them."""

    recipe: str | Recipe
    implementation: str | None

    def __call__(self) -> DotGeneral:
        return DotGeneral(self.recipe, self.implementation)


def _set_product(layer: Any, op: str) -> None:
    _check_recipe(op, layer.recipe)
    given = layer.dot_general_cls
    refuse_options(op, {"dot_general": layer.dot_general}, dot_general=None)
    if not isinstance(given, _Product):  # As a clone of this layer has it.
        refuse_options(op, {"dot_general_cls": given}, dot_general_cls=None)
    layer.dot_general_cls = _Product(layer.recipe, layer.implementation)


class Dense(nn.Dense):
    """``flax.linen.Dense`` with its product in FP8.

    Attributes:
      recipe: a name or a ``jax_fp8.Recipe``; the other fields are Flax's.
      implementation: of the products, as in ``jax_fp8.dot_general``.

    Raises:
      ValueError: for an unknown recipe, and for a ``dot_general`` or ``dot_general_cls``, which is
        what the recipe stands for.

    >>> import jax, jax.numpy as jnp, jax_fp8.linen
    >>> layer = jax_fp8.linen.Dense(4, use_bias=False, dtype=jnp.bfloat16, recipe="blockwise")
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 16)))[0].dtype
    dtype(bfloat16)
    """

    recipe: str | Recipe = "tensorwise"
    implementation: str | None = None

    def __post_init__(self) -> None:
        _set_product(self, "linen.Dense")
        super().__post_init__()


class DenseGeneral(nn.DenseGeneral):
    """``flax.linen.DenseGeneral`` with its product in FP8.

    Attributes:
      recipe: a name or a ``jax_fp8.Recipe``; the other fields are Flax's.
      implementation: of the products, as in ``jax_fp8.dot_general``.

    Raises:
      ValueError: as ``Dense``.

    >>> import jax, jax.numpy as jnp, jax_fp8.linen
    >>> layer = jax_fp8.linen.DenseGeneral((4, 5), axis=(1, -1))
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 3, 6, 7)))[0].shape
    (2, 6, 4, 5)
    """

    recipe: str | Recipe = "tensorwise"
    implementation: str | None = None

    def __post_init__(self) -> None:
        _set_product(self, "linen.DenseGeneral")
        super().__post_init__()


class Einsum(nn.Einsum):
    """``flax.linen.Einsum`` with its product in FP8.

    Attributes:
      recipe: a name or a ``jax_fp8.Recipe``; the other fields are Flax's.
      implementation: of the products, as in ``jax_fp8.dot_general``.

    Raises:
      ValueError: for an unknown recipe; at a call, for subscripts that Flax or
        ``jax_fp8.einsum`` refuses.

    >>> import jax, jax.numpy as jnp, jax_fp8.linen
    >>> layer = jax_fp8.linen.Einsum((5, 6, 7), "abc,cde->abde")
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((3, 4, 5)))[0].shape
    (3, 4, 6, 7)
    """

    recipe: str | Recipe = "tensorwise"
    implementation: str | None = None

    def __post_init__(self) -> None:
        _check_recipe("linen.Einsum", self.recipe)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Any, einsum_str: str | None = None) -> jax.Array:
        """Multiplies by the kernel and adds the bias, as Flax's, which calls ``jnp.einsum``."""
        spec = nn.merge_param("einsum_str", self.einsum_str, einsum_str).replace(" ", "")
        if "->" not in spec or spec.count(",") != 1:
            raise ValueError(
                f"linen.Einsum: einsum_str must have two operands, one comma and a '->', got {spec}"
            )
        kernel = self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
        bias = None
        if self.use_bias:
            shape, broadcast = self._get_bias_shape(spec, inputs, kernel)
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        y = DotGeneral(self.recipe, self.implementation).einsum(
            *(spec, inputs, kernel),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        return y if bias is None else y + jnp.reshape(bias, broadcast)


def measure(
    module: nn.Module,
    variables: Any,
    loss_fn: Callable[[Any], jax.Array],
    *args: Any,
    **kwargs: Any,
) -> dict[str, HealthProbe]:
    """``health`` as arrays, to be called under ``jax.jit``, in a training step.

    Args:
      module: a linen module.
      variables: what ``module.apply`` takes.
      loss_fn: makes a scalar of what ``module.apply`` returns.
      *args: the inputs of ``module.apply``.
      **kwargs: of ``module.apply``, as ``rngs`` and ``method``.

    Returns:
      By the path of each ``DotGeneral``, the gradient of its HealthProbe, which
      ``jax_fp8.summarize`` reads.

    Raises:
      ValueError: for a model without FP8 products.
    """
    _, made = jax.eval_shape(lambda: module.apply(variables, *args, mutable=[PROBES], **kwargs))
    if PROBES not in made:
        raise ValueError(f"linen.health: {type(module).__name__} has no FP8 products")
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made[PROBES])

    # By the parameters too: where nothing has a gradient, there is none to measure.
    def loss(probes: Any, params: Any) -> jax.Array:
        given = {**variables, "params": params, PROBES: probes}
        return loss_fn(module.apply(given, *args, **kwargs))

    gradients, _ = jax.grad(loss, argnums=(0, 1))(zeros, variables["params"])
    found = traverse_util.flatten_dict(gradients)
    return {"/".join(path[:-1]): stats for path, stats in found.items()}


def health(
    module: nn.Module,
    variables: Any,
    loss_fn: Callable[[Any], jax.Array],
    *args: Any,
    **kwargs: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """What quantization does to every operand of a model's FP8 products, forward and backward.

    The numbers of the model are those without it; nothing is updated. Each call compiles a program:
    for more of them, ``measure`` under a ``jax.jit`` that is kept.

    Args:
      module: a linen module.
      variables: what ``module.apply`` takes.
      loss_fn: makes a scalar of what ``module.apply`` returns.
      *args: the inputs of ``module.apply``.
      **kwargs: of ``module.apply``, as ``rngs`` and ``method``.

    Returns:
      By the path of each ``DotGeneral``, what ``jax_fp8.summarize`` tells of its operands.

    Raises:
      ValueError: for a model without FP8 products.

    >>> import jax, jax.numpy as jnp, jax_fp8.linen
    >>> layer, x = jax_fp8.linen.Dense(4), jnp.ones((2, 16))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> stats = jax_fp8.linen.health(layer, variables, jnp.sum, x)
    >>> list(stats), stats["DotGeneral_0"]["activation"]["amax"]
    (['DotGeneral_0'], 1.0)
    """
    # The inputs stay outside of jit, for flags are among them.
    found = jax.jit(lambda variables: measure(module, variables, loss_fn, *args, **kwargs))
    return summarize_all(found(variables))
