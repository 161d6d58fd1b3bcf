"""fused_matmul: a product by FP8 weights, and what stands around it in a transformer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8._src import scaled_matmul as products
from jax_fp8._src.fused import check_eps, check_wide
from jax_fp8._src.fused_matmul_operation import AroundConfig, kernel_refusal, operation
from jax_fp8._src.quantize import IMPLEMENTATIONS, static_scale
from jax_fp8._src.scaled_array import ScaledArray, check_scaled_array

ACTIVATIONS = (None, "swiglu")
RECIPES = ("weight_only", "rowwise", "static")


def fused_matmul(
    x: Any,
    w: ScaledArray,
    *,
    norm: Any = None,
    eps: float = 1e-6,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    recipe: str = "weight_only",
    scale: Any = None,
    implementation: str | None = None,
) -> Any:
    """``residual + activation(rms_norm(x) @ w.T + bias)``, in one call.

    As ``matmul`` between an RMSNorm, a SwiGLU and an addition, each where it is asked for. On
    Hopper, for what ``implementation`` says below, few rows take little longer than reading ``w``:
    with ``"weight_only"`` it is one kernel, and so is one row of up to 14336 values in FP8; else it
    is a quantization, beside which the product already reads weights, and that product with the
    rest in it. Many rows take little longer than their quantization and the bare product, which
    does the rest while it multiplies; with fewer than some 2,000 separate calls may be as fast.
    Elsewhere it is a norm, the product and the rest, one after the other.

    With ``"weight_only"`` the activations stay in 16 bits. The norm's values are those of
    ``rms_norm_quantize``, rounded to ``x``'s dtype; the one kernel rounds ``x * norm`` in their
    place, and divides the sums by the RMS. With ``"rowwise"`` they, or ``x``, go to E4M3 with a
    scale of each row, as ``rms_norm_quantize`` and ``quantize`` do it, and with ``"static"`` with
    the scale that is given. After the product all is float32 until the result; but that bfloat16 of
    more than sixteen rows in E4M3 is accumulated fast, and the sums are rounded to it as well (the
    kernel does so before it multiplies them by their scales, which must leave them in the range of
    float32).

    Args:
      x: ``(..., K)``; bfloat16 or float16.
      w: a ScaledArray of ``(N, K)``, of any granularity.
      norm: the weight of an RMSNorm of ``x``, ``(K,)`` float32, bfloat16 or float16; None: there
        is no norm. The one kernel takes bfloat16.
      eps: of the norm: a number that is known when the program is traced; finite, not negative.
      bias: ``(N,)`` float32, bfloat16 or float16, or None.
      activation: None, or ``"swiglu"``: ``silu(gate) * up``, the first half of the columns being
        the gates and the second half what goes with them.
      residual: None, or an array of the result's shape and dtype.
      recipe: ``"weight_only"``; ``"rowwise"``: activations in E4M3, each row with its scale; or
        ``"static"``: with one scale that is given.
      scale: of ``"static"``, a float32 scalar; None with other recipes.
      implementation: ``"kernel"`` (bfloat16, E4M3 weights with ``"tensor"`` or ``"row"`` scales, K
        in steps of 16; with ``"weight_only"`` up to eight rows, which with a norm fit into 96 KiB;
        with other recipes and more than sixteen rows columns of the result in steps of 8),
        ``"xla"`` (plain JAX), or None for the best that the device and the shapes support.

    Returns:
      ``(..., N)``, or ``(..., N / 2)`` with ``"swiglu"``; of ``x``'s dtype.

    Raises:
      TypeError: for a ``w`` that is no ScaledArray, other dtypes than the above, or an ``eps`` that
        is no plain number.
      ValueError: for shapes that do not fit, an ``eps`` that is negative or not finite, an unknown
        activation, recipe or implementation, or a scale that the recipe does not take or lacks.
      NotImplementedError: for what ``"kernel"`` cannot do on any device, and under
        differentiation.
      jax.errors.JaxRuntimeError: for what ``"kernel"`` cannot do on this device.

    >>> import jax.numpy as jnp, jax_fp8
    >>> x, w = jnp.array([[3, -3]], jnp.bfloat16), jax_fp8.quantize(jnp.array([[1.0, 0], [0, 4.0]]))
    >>> norm = jnp.ones(2, jnp.bfloat16)
    >>> jax_fp8.fused_matmul(x, w, norm=norm, eps=0.0, residual=x).tolist()
    [[4.0, -7.0]]
    """
    op = "fused_matmul"
    x = check_x(op, x)
    config, operands = link_of(
        op,
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        *(w, norm, eps, bias, activation),
        residual=residual,
        scale=scale,
        recipe=recipe,
        implementation=implementation,
    )
    return operation(config)(x, *operands)[0]


def check_x(op: str, x: Any) -> jax.Array:
    """``x`` as an array of 16 bits.

    Raises:
      TypeError: for another dtype.
    """
    x = check_wide(op, "x", x)
    if x.dtype == jnp.float32:
        raise TypeError(f"{op}: x must be bfloat16 or float16, got {x.dtype}{x.shape}")
    return x


def link_of(
    op: str,
    x: jax.ShapeDtypeStruct,
    w: Any,
    norm: Any,
    eps: Any,
    bias: Any,
    activation: str | None,
    *,
    residual: Any,
    scale: Any,
    recipe: str,
    implementation: str | None,
    added: jax.ShapeDtypeStruct | None = None,
) -> tuple[AroundConfig, tuple[jax.Array, ...]]:
    """The configuration of a product, and its operands but for x.

    Where there is no residual, ``added`` says what one is like that is not there yet.

    Raises:
      As fused_matmul does, in the name of ``op``.
    """
    check_scaled_array(op, "w", w)
    if len(x.shape) < 1 or w.ndim != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"{op}: multiplies x of (..., K) by w of (N, K), got {x.shape} and {w.shape}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}; accepted are {ACTIVATIONS}")
    if recipe not in RECIPES:
        raise ValueError(f"{op}: unknown recipe {recipe!r}; accepted are {RECIPES}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; accepted are {IMPLEMENTATIONS}"
        )
    n = w.shape[0]
    if activation == "swiglu" and n % 2:
        raise ValueError(f"{op}: w holds gates and as many values for swiglu, got {w.shape}")
    vectors = {"norm": (norm, x.shape[-1]), "bias": (bias, n)}
    given: dict[str, Any] = {}
    for name, (vector, size) in vectors.items():
        given[name] = jnp.zeros((1,), jnp.float32)  # So that there is one signature to partition.
        if vector is not None:
            given[name] = check_wide(op, name, vector)
            if given[name].shape != (size,):
                raise ValueError(
                    f"{op}: {name} must be of shape ({size},) for x {x.shape} and w {w.shape}, got"
                    f" {given[name].shape}"
                )
    total = jnp.zeros((), jnp.float32)
    like: Any = added
    if residual is not None:
        like = total = check_wide(op, "residual", residual)
    if like is not None:
        shape = (*x.shape[:-1], n // 2 if activation else n)
        if like.shape != shape or like.dtype != x.dtype:
            raise (TypeError if like.shape == shape else ValueError)(
                f"{op}: residual must have shape and dtype of the result, {x.dtype}{shape}, got"
                f" {like.dtype}{like.shape}"
            )
    if (scale is not None) != (recipe == "static"):
        raise ValueError(
            f"{op}: a scale goes with the recipe 'static' and with no other; got {recipe!r} and"
            f" {'no scale' if scale is None else 'a scale'}"
        )
    of_x = jnp.zeros((), jnp.float32)
    if scale is not None:
        of_x = static_scale(op, scale, (1,), "tensor").reshape(())
    config = AroundConfig(
        granularity=w.granularity,
        eps=check_eps(op, eps),
        has_norm=norm is not None,
        has_bias=bias is not None,
        activation=activation,
        has_residual=like is not None,
        quantizes=recipe != "weight_only",
        static=scale is not None,
        implementation=implementation,
        capability=products._forced_capability,
    )
    if implementation == "kernel":
        reason = kernel_refusal(config, x, w, given["norm"])
        if reason:
            raise NotImplementedError(
                f"{op}: implementation 'kernel' cannot multiply x {x.dtype.name}{x.shape} by w"
                f" {w.dtype.name}{w.shape} with granularity {w.granularity!r}: {reason}"
            )
    return config, (w.data, w.scale, given["bias"], given["norm"], total, of_x)
