"""Flax nnx layers whose products run in FP8: DotGeneral, and what holds one."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jax_fp8._src.einsum import einsum, einsum_by
from jax_fp8._src.layers import refuse_options, scalings, with_dynamic_scales
from jax_fp8._src.nnx_kernel import FP8Kernel, multiply
from jax_fp8._src.recipe import Recipe, get_recipe
from jax_fp8._src.scaling import ScalingState, calibrate, init_scaling

STREAM = "fp8"
_FOLD = 0xF8


class ScalingVariable(nnx.Variable):
    """An amax history of a static or delayed scale: no parameter, and no gradient's business."""


class ProbeVariable(nnx.Variable):
    """A HealthProbe, while statistics are taken."""


class PreparedVariable(nnx.Variable):
    """The FP8 copies of a kernel, for the products of one step."""


class DotGeneral(nnx.Module):
    """``jax_fp8.dot_general`` as a module: for ``dot_general`` of Flax's layers.

    Static and delayed recipes keep amaxes here, in ``ScalingVariable``s, so one DotGeneral belongs
    to one layer. Of the others it has no state at all.

    A delayed recipe's amaxes are updated by each call, but not with ``use_running_average``, which
    ``Module.eval`` and ``Module.train`` of the model turn on and off, as they do for BatchNorm. A
    static recipe's are set by ``jax_fp8.nnx.calibrate``.

    Args:
      recipe: a name or a ``jax_fp8.Recipe``.
      implementation: of the products, as in ``jax_fp8.dot_general``.
      rngs: where recipes with stochastic rounding take their keys from: the stream ``"fp8"``, or a
        key of its own made of the default stream, which stays as it is.
      kernel: the weight that delayed scaling starts from; without it, from a scale of 1.
      stacked: how many leading axes of ``kernel`` ``nnx.scan`` or ``nnx.vmap`` will take away.

    Raises:
      ValueError: for an unknown recipe, and one that needs ``rngs`` without them.

    >>> import jax.numpy as jnp, jax_fp8.nnx
    >>> from flax import nnx
    >>> product = jax_fp8.nnx.DotGeneral("rowwise")
    >>> layer = nnx.Linear(16, 4, dot_general=product, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 16))).shape
    (2, 4)
    """

    def __init__(
        self,
        recipe: str | Recipe = "tensorwise",
        *,
        implementation: str | None = None,
        rngs: nnx.Rngs | None = None,
        kernel: Any = None,
        stacked: int = 0,
    ) -> None:
        op = f"nnx.{type(self).__name__}"
        self.recipe = get_recipe(op, recipe)
        self.implementation = implementation
        self.use_running_average = False
        self.calibrating = False
        stack = () if kernel is None else kernel.shape[:stacked]
        self.activation_amax: Any = nnx.data(None)
        self.weight_amax: Any = nnx.data(None)
        if self.recipe.has_state:
            state = _first_state(self.recipe, kernel, stack)
            for name in self._kept():
                setattr(self, f"{name}_amax", nnx.data(ScalingVariable(getattr(state, name))))
        self.stream: Any = nnx.data(None)
        if self.recipe.needs_key:
            self.stream = nnx.data(_stream(op, rngs, stack))
        self.probe: Any = nnx.data(None)
        self.prepared: Any = nnx.data(None)

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """``lax.dot_general`` of an activation and a weight."""

        def product(rhs: Any, **fp8: Any) -> Any:
            return multiply(
                *(lhs, rhs, dimension_numbers),
                precision=precision,
                preferred_element_type=preferred_element_type,
                out_sharding=out_sharding,
                **fp8,
            )

        return self._run(product, lhs, rhs)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What ``nnx.view`` calls, as of BatchNorm."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _run(self, product: Callable[..., Any], lhs: Any, rhs: Any) -> jax.Array:
        """``product`` with the state, the key and the probe that it needs."""
        recipe = self.recipe
        options: dict[str, Any] = {"implementation": self.implementation}
        if self.stream is not None:
            # A key is spent where state may change, and only there.
            frozen = self.use_running_average
            options["key"] = self.stream.key[...] if frozen else self.stream()
        if self.probe is not None:
            options["probe"] = self.probe.get_value()
        if self.prepared is not None:
            rhs = dataclasses.replace(self.prepared.get_value(), wide=rhs)
        if not recipe.has_state:
            return product(rhs, recipe=recipe, **options)
        state = self.state
        if self.calibrating:
            seen = None if isinstance(rhs, FP8Kernel) else rhs
            new = calibrate(recipe, state, activation=lhs, weight=seen)
            self._keep(new, "static")
            return product(rhs, recipe=with_dynamic_scales(recipe), **options)
        self._check_calibrated()
        y, new = product(rhs, recipe=recipe, state=state, **options)
        if not self.use_running_average:
            self._keep(new, "delayed")
        return y

    @property
    def state(self) -> ScalingState:
        """The amaxes as ``jax_fp8.dot_general`` takes them."""
        return ScalingState(**{name: getattr(self, f"{name}_amax")[...] for name in self._kept()})

    def _kept(self) -> list[str]:
        return [name for name, scaling in scalings(self.recipe).items() if scaling != "dynamic"]

    def _keep(self, new: ScalingState, wanted: str) -> None:
        for name, scaling in scalings(self.recipe).items():
            if scaling == wanted:
                getattr(self, f"{name}_amax")[...] = getattr(new, name)

    def _check_calibrated(self) -> None:
        """Where values are known. Where they are not, NaN as a scale makes all results NaN."""
        for name in self._kept():
            amaxes = getattr(self, f"{name}_amax")[...]
            if isinstance(amaxes, jax.core.Tracer) or not amaxes.is_fully_addressable:
                continue
            if np.isnan(np.asarray(amaxes)).any():
                raise ValueError(
                    f"nnx.{type(self).__name__}: the static scale of the {name} has not been"
                    " calibrated; call jax_fp8.nnx.calibrate(model, batches) first"
                )


class EinsumOp(DotGeneral):
    """``jax_fp8.einsum`` as a module: for ``einsum_op`` of Flax's ``Einsum``; see ``DotGeneral``.

    >>> import jax.numpy as jnp, jax_fp8.nnx
    >>> from flax import nnx
    >>> op = jax_fp8.nnx.EinsumOp("rowwise")
    >>> layer = nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), einsum_op=op, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((16, 11, 2))).shape
    (16, 11, 8, 4)
    """

    def __call__(self, spec: str, lhs: Any, rhs: Any, **options: Any) -> jax.Array:  # type: ignore[override]
        """``jnp.einsum`` of an activation and a weight."""
        if isinstance(rhs, FP8Kernel):
            product: Any = functools.partial(einsum_by, multiply)
        else:
            product = einsum
        return self._run(lambda rhs, **fp8: product(spec, lhs, rhs, **options, **fp8), lhs, rhs)


def _first_state(recipe: Recipe, kernel: Any, stack: tuple[int, ...]) -> ScalingState:
    """The state that a layer starts from; of stacked layers, stacked."""
    if not stack:
        return init_scaling(recipe, weight=kernel)
    flat = kernel.reshape(math.prod(stack), *kernel.shape[len(stack) :])
    states = lax.map(lambda kernel: init_scaling(recipe, weight=kernel), flat)
    return jax.tree.map(lambda amaxes: amaxes.reshape(*stack, *amaxes.shape[1:]), states)


def _stream(op: str, rngs: nnx.Rngs | None, stack: tuple[int, ...]) -> nnx.RngStream:
    if rngs is None:
        raise ValueError(f"{op}: the recipe rounds gradients stochastically, and needs rngs")
    source = rngs[STREAM]
    if source.tag == STREAM:
        key = source()
    else:
        # The default stream also makes parameters, and these shall be those of Flax's layers.
        key = jax.random.fold_in(jax.random.fold_in(source.key[...], source.count[...]), _FOLD)
    return nnx.RngStream(jax.random.split(key, stack) if stack else key, tag=STREAM)


class Linear(nnx.Linear):
    """``flax.nnx.Linear`` with its product in FP8.

    Args:
      in_features: as in Flax's.
      out_features: as in Flax's.
      recipe: a name or a ``jax_fp8.Recipe``.
      implementation: of the products, as in ``jax_fp8.dot_general``.
      rngs: as in Flax's; also of ``DotGeneral``.
      **options: all others of Flax's.

    Raises:
      ValueError: for an unknown recipe, and for a ``dot_general``, which is what the recipe stands
        for.

    >>> import jax.numpy as jnp, jax_fp8.nnx
    >>> from flax import nnx
    >>> layer = jax_fp8.nnx.Linear(16, 4, recipe="rowwise", rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 16))).shape, sorted(nnx.to_pure_dict(nnx.state(layer)))
    ((2, 4), ['bias', 'kernel'])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        recipe: str | Recipe = "tensorwise",
        implementation: str | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        recipe = get_recipe("nnx.Linear", recipe)
        refuse_options("nnx.Linear", options, dot_general=lax.dot_general)
        super().__init__(in_features, out_features, rngs=rngs, **options)
        set_product(self, recipe, implementation, rngs)


class LinearGeneral(nnx.LinearGeneral):
    """``flax.nnx.LinearGeneral`` with its product in FP8.

    Args:
      in_features: as in Flax's.
      out_features: as in Flax's.
      recipe: a name or a ``jax_fp8.Recipe``.
      implementation: of the products, as in ``jax_fp8.dot_general``.
      rngs: as in Flax's; also of ``DotGeneral``.
      **options: all others of Flax's.

    Raises:
      ValueError: for an unknown recipe, and for a ``dot_general`` or ``dot_general_cls``, which is
        what the recipe stands for.

    >>> import jax.numpy as jnp, jax_fp8.nnx
    >>> from flax import nnx
    >>> layer = jax_fp8.nnx.LinearGeneral((2, 3), (4, 5), axis=(1, -1), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((16, 2, 3))).shape
    (16, 4, 5)
    """

    def __init__(
        self,
        in_features: Any,
        out_features: Any,
        *,
        recipe: str | Recipe = "tensorwise",
        implementation: str | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        recipe = get_recipe("nnx.LinearGeneral", recipe)
        allowed = {"dot_general": lax.dot_general, "dot_general_cls": None}
        refuse_options("nnx.LinearGeneral", options, **allowed)
        super().__init__(in_features, out_features, rngs=rngs, **options)
        set_product(self, recipe, implementation, rngs)


class Einsum(nnx.Einsum):
    """``flax.nnx.Einsum`` with its product in FP8.

    Args:
      einsum_str: as in Flax's.
      kernel_shape: as in Flax's.
      bias_shape: as in Flax's.
      recipe: a name or a ``jax_fp8.Recipe``.
      implementation: of the products, as in ``jax_fp8.dot_general``.
      rngs: as in Flax's; also of ``DotGeneral``.
      **options: all others of Flax's.

    Raises:
      ValueError: for an unknown recipe, and for an ``einsum_op``, which is what the recipe stands
        for; at a call, for subscripts that Flax or ``jax_fp8.einsum`` refuses.

    >>> import jax.numpy as jnp, jax_fp8.nnx
    >>> from flax import nnx
    >>> layer = jax_fp8.nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((16, 11, 2))).shape
    (16, 11, 8, 4)
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Any,
        bias_shape: Any = None,
        *,
        recipe: str | Recipe = "tensorwise",
        implementation: str | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        recipe = get_recipe("nnx.Einsum", recipe)
        refuse_options("nnx.Einsum", options, einsum_op=jnp.einsum)
        super().__init__(einsum_str, kernel_shape, bias_shape, rngs=rngs, **options)
        set_product(self, recipe, implementation, rngs)


#: Flax's layers that can be switched, and the attribute that says how they multiply.
PRODUCT_OF = {nnx.Linear: "dot_general", nnx.LinearGeneral: "dot_general", nnx.Einsum: "einsum_op"}


def product_name(layer: Any) -> str | None:
    """The attribute of ``layer`` that says how it multiplies, or None."""
    return next((name for cls, name in PRODUCT_OF.items() if isinstance(layer, cls)), None)


def product_of(layer: Any) -> DotGeneral | None:
    """The FP8 product of a layer, or None."""
    product = getattr(layer, product_name(layer) or "", None)
    return product if isinstance(product, DotGeneral) else None


def set_product(
    layer: Any, recipe: Recipe, implementation: str | None, rngs: nnx.Rngs | None
) -> None:
    """Gives one of Flax's layers an FP8 product in the place of its own."""
    product = EinsumOp if isinstance(layer, nnx.Einsum) else DotGeneral
    made = product(
        recipe,
        implementation=implementation,
        rngs=rngs,
        kernel=layer.kernel[...],
        stacked=layer.kernel[...].ndim - kernel_ndim(layer),
    )
    setattr(layer, product_name(layer) or "", nnx.data(made))


def kernel_ndim(layer: Any) -> int:
    """How many axes the kernel of one layer has; if there are more, it is a stack of layers."""
    if isinstance(layer, nnx.Linear):
        return 2
    if isinstance(layer, nnx.LinearGeneral):
        return len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features)
    return len(layer.kernel_shape)
