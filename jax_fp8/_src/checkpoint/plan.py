"""What a quantization will write, settled before anything is written."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from jax_fp8._src.checkpoint import modelopt, scheme
from jax_fp8._src.checkpoint.files import CONFIG, Folder, StoredTensor, open_folder, some
from jax_fp8._src.recipe import Operand
from jax_fp8._src.scaled_array import scale_shape

#: Modules that stay wide: heads, embeddings, and what chooses experts.
DEFAULT_IGNORE = (
    *("lm_head", "*.lm_head", "*embed*", "shared", "wte", "wpe", "*.wte", "*.wpe"),
    *("*.gate", "*router*", "*.shared_expert_gate", "*.relative_attention_bias"),
)
#: Models whose linear layers store (in, out), which no FP8 format has words for.
TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_WIDE = ("F32", "BF16", "F16")
#: Of a file to write, which the host holds: what the hub's tools take too. One tensor may be more.
MOST_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will write; made without writing anything.

    Attributes:
      source: the wide checkpoint.
      target: the folder to write.
      format: of the FP8 checkpoint.
      recipe: by name.
      ignore: patterns of modules to leave wide, besides DEFAULT_IGNORE.
      weight: how weights are quantized.
      activation: how the checkpoint says that their inputs are; None leaves them wide.
      modules: the linear layers that become FP8.
      ignored: the linear layers that stay wide.
    """

    source: Folder
    target: Path
    format: str
    recipe: str
    ignore: tuple[str, ...]
    weight: Operand
    activation: Operand | None
    modules: frozenset[str]
    ignored: tuple[str, ...]

    @property
    def is_static(self) -> bool:
        """Whether inputs have scales of a calibration."""
        return self.activation is not None and self.activation.scaling == "static"

    @property
    def shards(self) -> dict[str, list[StoredTensor]]:
        """The source's tensors by the file to write: the source's own, unless one is too large."""
        found: list[tuple[Path, list[StoredTensor]]] = []
        size = 0
        for stored in self.source.tensors.values():
            more = sum(self.sizes(stored).values())
            if not found or found[-1][0] != stored.file or size + more > MOST_BYTES:
                found.append((stored.file, []))
                size = 0
            found[-1][1].append(stored)
            size += more
        names = [file.name for file, _ in found]
        if len(set(names)) < len(names):
            names = [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
        return {name: tensors for name, (_, tensors) in zip(names, found, strict=True)}

    def sizes(self, stored: StoredTensor) -> dict[str, int]:
        """Names and bytes of what a tensor of the source becomes: data, scale, input's scale."""
        module = module_of(stored.name)
        if module not in self.modules:
            return {stored.name: stored.nbytes}
        scales = math.prod(scale_shape(stored.shape, self.weight.granularity))
        name = scheme.scale_name(self.format, self.weight)
        sizes = {stored.name: math.prod(stored.shape), f"{module}.{name}": 4 * scales}
        return sizes | ({f"{module}.input_scale": 4} if self.is_static else {})


def make_plan(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    format: str,
    recipe: str,
    ignore: Sequence[str] = (),
) -> Plan:
    """Refuses, before anything is written, what cannot be done; arguments as of ``quantize``."""
    if isinstance(ignore, str):
        raise TypeError(f"quantize: ignore must be a sequence of patterns, got {ignore!r}")
    weight, activation = scheme.operands(format, recipe)
    source, destination = Path(src).resolve(), Path(dst).resolve()
    if destination == source or source in destination.parents or destination in source.parents:
        raise ValueError(f"quantize: {src} and {dst} must be folders outside of each other")
    folder = open_folder(source)
    for key in ("quantization_config", "compression_config"):
        if folder.config.get(key) is not None:
            raise ValueError(f"quantize: {source} is quantized already: its {CONFIG} has a {key}")
    if (source / modelopt.FILE).exists():
        raise ValueError(f"quantize: {source} is quantized already: it has {modelopt.FILE}")
    model_type = folder.config.get("model_type")
    if model_type in TRANSPOSED_MODELS:
        raise ValueError(
            f"quantize: {source}: weights of the model_type {model_type!r} are stored (in, out),"
            " and FP8 formats store (out, in)"
        )
    modules, ignored = _choose(folder, tuple(ignore))
    return Plan(
        *(folder, destination, format, recipe, tuple(ignore), weight, activation),
        modules=frozenset(modules),
        ignored=tuple(sorted(ignored)),
    )


def module_of(name: str) -> str | None:
    """The module whose weight has that name."""
    module = name.removesuffix(".weight")
    return None if module == name else module


def _matches(module: str, patterns: Iterable[str]) -> bool:
    names = (module, f"{module}.weight")
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _choose(source: Folder, ignore: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """(linear layers to quantize, linear layers that stay wide)."""
    modules = set()
    ignored = {"lm_head"}  # A tied head is a linear layer without a tensor.
    unused = set(ignore) - set(DEFAULT_IGNORE)
    for stored in source.tensors.values():
        stored.numpy_dtype()  # Raises for one that could not be copied either.
        if stored.dtype.startswith("F8"):
            raise ValueError(f"quantize: {source.path} is quantized already: tensor {stored}")
        is_stack = len(stored.shape) > 2 and ".experts." in f".{stored.name}."
        module = stored.name.rpartition(".")[0] if is_stack else module_of(stored.name)
        if module is None or not (is_stack or len(stored.shape) == 2):
            continue
        unused -= {pattern for pattern in unused if _matches(module, [pattern])}
        if _matches(module, (*DEFAULT_IGNORE, *ignore)):
            ignored.add(module)
        elif is_stack:
            raise ValueError(
                f"quantize: {source.path}: tensor {stored} stacks experts, which is not supported:"
                f" ignore {module!r}, or save one weight for each expert"
            )
        elif stored.dtype not in _WIDE:
            raise ValueError(
                f"quantize: {source.path}: weight {stored} must be {', '.join(_WIDE)}, or ignored"
            )
        else:
            modules.add(module)
    if unused:
        raise ValueError(f"quantize: {source.path}: no linear layer matches {some(sorted(unused))}")
    if not modules:
        raise ValueError(f"quantize: {source.path} has no linear layer to quantize")
    return modules, ignored
