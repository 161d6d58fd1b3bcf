"""The configuration of compressed-tensors: groups of modules, each with a scheme."""

from __future__ import annotations

import re
from collections.abc import Callable

from jax_fp8._src.checkpoint.storage import (
    PER_BLOCK,
    PER_TENSOR,
    PER_TOKEN,
    STATIC,
    WIDE,
    Activation,
    Format,
    Scheme,
    Stored,
    module_of,
    unsupported,
)
from jax_fp8._src.checkpoint.strict_json import Section
from jax_fp8._src.scaled_array import BLOCK

_FORMATS = ("float-quantized", "naive-quantized")
_REGEX = "re:"

#: The class of the modules whose weights are matrices, so the only one a name does not tell.
_LINEAR = "Linear"

Matcher = Callable[[str], bool]


def from_config(config: Section) -> Format:
    """The format that such a ``quantization_config`` describes.

    Raises:
      ValueError: for a configuration that is broken.
      NotImplementedError: for anything but FP8 weights that are stored as such.
    """
    _check_format(config)
    for key in ("sparsity_config", "transform_config"):
        section = config.section(key) if key in config else None
        if section and section.fields and section.fields.get("format") != "dense":
            raise unsupported(config.where, key, section.fields, ({},))
    groups = []
    named = config.section("config_groups")
    for name in named.fields:
        group = named.section(name)
        _check_format(group)
        groups.append((group.where, group.strings("targets"), _scheme(group)))
    ignored = [_matcher(config.where, each) for each in config.strings("ignore")]
    return Format("compressed-tensors", _Schemes(groups, ignored))


class _Schemes:
    """The scheme of a module: of the group that names it most closely."""

    def __init__(
        self, groups: list[tuple[str, list[str], Scheme | None]], ignored: list[Matcher]
    ) -> None:
        self.ignored = ignored
        # A name says more than a pattern, and a pattern more than a class.
        self.tiers: tuple[list[tuple[str, Matcher, Scheme | None]], ...] = ([], [], [])
        for where, targets, scheme in groups:
            for target in targets:
                tier = 2 if target == _LINEAR else 1 if target.startswith(_REGEX) else 0
                self.tiers[tier].append((where, _matcher(where, target), scheme))

    def __call__(self, name: str, shape: tuple[int, ...]) -> Scheme | None:
        module = module_of(name)
        if any(matches(module) for matches in self.ignored):
            return None
        for tier in self.tiers:
            found = [(where, scheme) for where, matches, scheme in tier if matches(module)]
            for where, scheme in found:
                if scheme != found[0][1]:
                    raise ValueError(f"module {module!r} is in {found[0][0]} and in {where}")
            if found:
                return found[0][1]
        return None


def _matcher(where: str, target: str) -> Matcher:
    """Whether a module is meant: by its name, by ``re:`` and a pattern, or by its class."""
    if not target.startswith(_REGEX):
        return lambda module: target in (module, _LINEAR)
    # RE2 takes time linear in the name, Python's own engine as long as the pattern makes it: a file
    # from anywhere must not be able to make it take forever.
    try:
        import re2
    except ImportError:
        raise ImportError(
            f"{where}: for the pattern {target!r} jax_fp8.checkpoint needs google-re2, which is not"
            " installed: pip install jax-fp8[checkpoint]"
        ) from None
    options = re2.Options()
    options.log_errors = False
    pattern = target.removeprefix(_REGEX)
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            raise ValueError(f"{where}: {target!r} is no regular expression: {error}") from None
        raise NotImplementedError(
            f"{where}: the pattern {target!r} is not supported, as RE2 has none of what needs"
            f" backtracking: {error}"
        ) from None
    return lambda module: compiled.match(module) is not None


def _check_format(section: Section) -> None:
    name = section.get("format", str, _FORMATS[0])
    if name not in _FORMATS:
        raise unsupported(section.where, "format", name, _FORMATS)


def _scheme(group: Section) -> Scheme | None:
    if "output_activations" in group:
        raise unsupported(group.where, "output_activations", "given", (None,))
    if "weights" not in group:
        return None
    weights = group.section("weights")
    strategy = _strategy(weights)
    weight: Stored
    if strategy == "block":
        weight = _block_structure(weights)
    elif strategy in ("tensor", "channel"):
        weight = "tensor" if strategy == "tensor" else "row"
    else:
        raise unsupported(weights.where, "strategy", strategy, ("tensor", "channel", "block"))
    if weights.get("dynamic", bool, False):
        raise unsupported(weights.where, "dynamic", True, (False,))
    return Scheme(weight, _activation(group))


def _activation(group: Section) -> Activation:
    if "input_activations" not in group:
        return WIDE
    inputs = group.section("input_activations")
    strategy, dynamic = _strategy(inputs), inputs.get("dynamic", bool, False)
    if strategy == "tensor":
        return PER_TENSOR if dynamic else STATIC
    if strategy == "token" and dynamic:
        return PER_TOKEN
    if strategy == "group" and dynamic and inputs.get("group_size", int) == BLOCK:
        return PER_BLOCK
    raise unsupported(
        inputs.where,
        "strategy, dynamic, group_size",
        (strategy, dynamic, inputs.get("group_size", int, None)),
        (("tensor", True), ("tensor", False), ("token", True), ("group", True, BLOCK)),
    )


def _strategy(args: Section) -> str:
    """The strategy of one operand, whose values must be FP8."""
    kind, bits = args.get("type", str, "int").lower(), args.get("num_bits", int, 8)
    if (kind, bits) != ("float", 8):
        raise unsupported(args.where, "type of so many bits", (kind, bits), (("float", 8),))
    if not args.get("symmetric", bool, True):
        raise unsupported(args.where, "symmetric", False, (True,))
    if "strategy" in args:
        strategy: str = args.get("strategy", str).lower()
        return strategy
    size = args.get("group_size", int, None)
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _block_structure(weights: Section) -> tuple[int, int]:
    text = weights.fields.get("block_structure")
    if isinstance(text, str) and re.fullmatch(r"[1-9][0-9]{0,8}x[1-9][0-9]{0,8}", text):
        rows, _, columns = text.partition("x")
        return int(rows), int(columns)
    return weights.pair("block_structure")
