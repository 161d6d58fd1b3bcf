"""convert: Flax nnx models switched to FP8; calibrate: their static scales."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from jax_fp8._src.layers import scalings
from jax_fp8._src.nnx_kernel import FP8Kernel
from jax_fp8._src.nnx_layers import STREAM, DotGeneral, product_name, product_of, set_product
from jax_fp8._src.recipe import Recipe, get_recipe

Path = tuple[Any, ...]
Where = Callable[[Path, Any], bool]
Rules = Sequence[tuple[str, str | Recipe | None]]

_ENDING = "(_?(dense|layer|proj|projection))?"
#: Names of layers that stay wide where nothing else is said: embeddings and output heads.
_WIDE = re.compile(rf"\w*(embed|classifier)\w*|(\w+_)?(head|heads|logits?){_ENDING}", re.I)
#: Likewise, where no module holds the layer: attention's projection may have this name too.
_WIDE_ON_TOP = re.compile(f"output{_ENDING}", re.I)


def path_name(path: Path) -> str:
    """A path as the rules and the statistics have it."""
    return "/".join(map(str, path))


def layers_of(model: Any) -> list[tuple[Path, Any]]:
    """The layers that can be switched and have a wide kernel, each once, by their first paths."""
    found: dict[int, tuple[Path, Any]] = {}
    for path, node in nnx.iter_graph(model):
        if product_name(node) and not isinstance(node.kernel, FP8Kernel):
            found.setdefault(id(node), (path, node))
    return list(found.values())


def products_of(model: Any) -> list[tuple[Path, DotGeneral]]:
    """All FP8 products, each once."""
    found: dict[int, tuple[Path, DotGeneral]] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, DotGeneral):
            found.setdefault(id(node), (path, node))
    return list(found.values())


def is_inner(path: Path, layer: Any) -> bool:
    """Whether a layer is neither an embedding nor an output head, by its name."""
    names = [part for part in path if isinstance(part, str)]
    on_top = len(names) == 1 and _WIDE_ON_TOP.fullmatch(names[0])
    return not (on_top or (names and _WIDE.fullmatch(names[-1])))


def select(
    op: str, model: Any, where: Where | None, recipe: str | Recipe | Rules | None
) -> list[tuple[Path, Any, Recipe | None]]:
    """The layers that ``where`` and ``recipe`` pick, with the recipe of each."""
    if isinstance(recipe, list | tuple):
        rules = [_rule(op, rule) for rule in recipe]
    else:
        where = where or is_inner
        rules = [_rule(op, ("", recipe))]
    layers = layers_of(model)
    picked = []
    for path, layer in layers:
        own = [own for pattern, own in rules if pattern.search(path_name(path))]
        if own and (where is None or where(path, layer)):
            picked.append((path, layer, own[0]))
    if not picked:
        names = ", ".join(path_name(path) or "the model itself" for path, _ in layers)
        raise ValueError(
            f"{op}: no layer was picked; those of Linear, LinearGeneral and Einsum with a wide"
            f" kernel are: {names or 'none'}"
        )
    return picked


def _rule(op: str, rule: Any) -> tuple[re.Pattern[str], Recipe | None]:
    if not (isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[0], str)):
        raise TypeError(f"{op}: a rule is (pattern of paths, recipe or None), got {rule!r}")
    try:
        pattern = re.compile(rule[0])
    except re.error as error:
        raise ValueError(f"{op}: {rule[0]!r} is no regular expression: {error}") from error
    return pattern, None if rule[1] is None else get_recipe(op, rule[1])


def convert(
    model: Any,
    where: Where | None = None,
    recipe: str | Recipe | Rules | None = "tensorwise",
    *,
    implementation: str | None = None,
    rngs: nnx.Rngs | None = None,
) -> Any:
    """Switches a model to FP8, in place: its ``Linear``, ``LinearGeneral`` and ``Einsum`` layers.

    A layer stays what it is, with the parameters it has; what it multiplies with is exchanged for a
    ``DotGeneral``. To convert again changes the recipe, and starts the amaxes of static and delayed
    scales anew: do it after a checkpoint of another recipe is loaded, since delayed scaling begins
    with the kernels at hand.

    Args:
      model: an nnx Module, or a tree of them.
      where: ``(path, layer) -> bool``, with paths as ``nnx.iter_graph`` has them; it alone decides.
        None takes all but embeddings and output heads, which are told by the last name of the path:
        one with ``embed`` or ``classifier`` in it, or ``head`` or ``logits``, also as in
        ``lm_head`` and ``logits_dense``; or ``output``, of a layer of the model's own and not of
        a module in it. Models that number their layers have no such names.
      recipe: a name, a ``jax_fp8.Recipe``, or None, which makes FP8 layers wide again. Or rules: a
        list of (regular expression, recipe or None), of which the first that is found anywhere in
        the path, as in ``"blocks/0/attention/query"``, decides. Layers that no rule is for are left
        as they are. Rules decide alone, over embeddings and heads too, but where ``where`` is given
        as well: put ``("head$", None)`` before a pattern that is found in all paths.
      implementation: of the products, as in ``jax_fp8.dot_general``.
      rngs: for recipes with stochastic rounding, as in ``DotGeneral``.

    Returns:
      ``model``.

    Raises:
      ValueError: for an unknown recipe, if no layer is picked, for one that already has a product
        other than Flax's default, and without the rngs that a recipe needs.

    >>> import jax_fp8.nnx
    >>> from flax import nnx
    >>> model = nnx.MultiHeadAttention(num_heads=4, in_features=64, decode=False, rngs=nnx.Rngs(0))
    >>> model = jax_fp8.nnx.convert(model, recipe=[("out", None), ("", "rowwise")])
    >>> type(model.query.dot_general).__name__, model.out.dot_general is None
    ('DotGeneral', True)
    """
    op = "nnx.convert"
    picked = select(op, model, where, recipe)
    for path, layer, _ in picked:
        check_replaceable(op, path, layer)
    if any(own is not None and own.needs_key for _, _, own in picked):
        if rngs is None:
            raise ValueError(f"{op}: the recipe rounds gradients stochastically, and needs rngs")
        rngs = nnx.Rngs(**{STREAM: rngs[STREAM]()})
    for _, layer, own in picked:
        if own is not None:
            set_product(layer, own, implementation, rngs)
        elif product_of(layer) is not None:
            default = {nnx.Einsum: jnp.einsum, nnx.Linear: lax.dot_general}
            kind = next((kind for kind in default if isinstance(layer, kind)), None)
            setattr(layer, product_name(layer) or "", nnx.static(default[kind] if kind else None))
    return model


def check_replaceable(op: str, path: Path, layer: Any) -> None:
    """Raises a ValueError if a layer has been told to multiply in some other way."""
    given = getattr(layer, product_name(layer) or "")
    other = getattr(layer, "dot_general_cls", None)
    is_default = given is None or given in (lax.dot_general, jnp.einsum)
    if other is not None or not (is_default or isinstance(given, DotGeneral)):
        raise ValueError(
            f"{op}: {path_name(path) or 'the model'} has a product of its own,"
            f" {given if other is None else other}; leave it out with where, or None in a rule"
            " before it"
        )


def calibrate(
    model: Any,
    batches: Iterable[Any],
    forward: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
) -> Any:
    """Sets the static scales of a model, in place, to the largest amaxes of some batches.

    While it runs the products take the scales of the values at hand. Amaxes that calibrations
    before have found are kept, where they are larger.

    Args:
      model: a converted model with recipes of static scales.
      batches: typical inputs.
      forward: ``(model, batch)``: runs the model; for speed, under ``nnx.jit``.

    Returns:
      ``model``.

    Raises:
      ValueError: for a model without static scales, and without any batch.

    >>> import jax.numpy as jnp, jax_fp8.nnx
    >>> from flax import nnx
    >>> model = jax_fp8.nnx.Linear(16, 4, recipe="static", rngs=nnx.Rngs(0))
    >>> model = jax_fp8.nnx.calibrate(model, [jnp.ones((2, 16)), -3 * jnp.ones((2, 16))])
    >>> model.dot_general.activation_amax[...].tolist()
    [3.0]
    """
    op = "nnx.calibrate"
    products = [p for _, p in products_of(model) if "static" in scalings(p.recipe).values()]
    if not products:
        raise ValueError(f"{op}: the model has no static scales; convert it with such a recipe")
    count = 0
    try:
        for product in products:
            product.calibrating = True
        for count, batch in enumerate(batches, 1):  # noqa: B007
            forward(model, batch)
    finally:
        for product in products:
            product.calibrating = False
    if not count:
        raise ValueError(f"{op}: there were no batches")
    return model
