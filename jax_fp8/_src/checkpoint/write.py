"""quantize: a wide checkpoint of the Hugging Face hub to an FP8 one, shard by shard."""

from __future__ import annotations

import fnmatch
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fp8._src import ffi
from jax_fp8._src.checkpoint import scheme, target
from jax_fp8._src.checkpoint.files import CONFIG, INDEX, StoredTensor, some
from jax_fp8._src.checkpoint.plan import Plan, make_plan, module_of
from jax_fp8._src.checkpoint.progress import progress_bar
from jax_fp8._src.numerics import dynamic_scale
from jax_fp8._src.quantize import quantize as quantize_array
from jax_fp8._src.recipe import E4M3
from jax_fp8._src.scaled_array import BLOCK

#: Of what vLLM makes one weight, all but the last.
FOLLOWED_IN_VLLM = ("q_proj", "k_proj", "gate_proj")
#: What is copied as it is: tokenizers, templates, licences; nothing that would be unpickled.
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "*.py", "LICENSE*")


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    format: str,
    recipe: str,
    ignore: Sequence[str] = (),
    input_amax: Mapping[str, float] | None = None,
    progress: bool = False,
) -> None:
    """Writes an FP8 checkpoint of a wide one.

    The weights of the linear layers, ``(out, in)``, become E4M3 with float32 scales, with the bits
    of ``jax_fp8.quantize``; everything else is kept as it is. Host memory holds one tensor and one
    file of the result, of which one that would have more than 5 GB becomes several. A run that was
    cut off goes on when it is started again with the same arguments; until it is complete the
    folder has no config.json.

    ==================  ==========  =======  =========  ======  ===========
    format              tensorwise  rowwise  blockwise  static  weight_only
    ==================  ==========  =======  =========  ======  ===========
    compressed-tensors  yes         yes      yes        yes     yes
    fp8                 vLLM        no       yes        vLLM    no
    ==================  ==========  =======  =========  ======  ===========

    "vLLM" is a layout that vLLM reads, but of which ``transformers`` drops the scales.

    Args:
      src: folder with config.json and model.safetensors, or its index and shards; weights are
        float32, bfloat16 or float16.
      dst: folder to write: new, empty, or of an unfinished run.
      format: ``"fp8"`` or ``"compressed-tensors"``.
      recipe: one of the table.
      ignore: patterns, as of ``fnmatch``, of modules that stay wide, besides heads, embeddings and
        what chooses experts (``DEFAULT_IGNORE``).
      input_amax: for ``"static"``, the amax of every FP8 layer's input by the layer's name.
      progress: shows a progress bar, which needs tqdm.

    Raises:
      ValueError: for a format that cannot express the recipe, a source that is quantized already
        or whose weights are not finite or not of these dtypes, a pattern that matches nothing, an
        amax that is missing or of no use.
      FileNotFoundError: when the source lacks a file.
      FileExistsError: when ``dst`` holds anything else.
    """
    plan = make_plan(src, dst, format=format, recipe=recipe, ignore=ignore)
    input_scales = _input_scales(plan, input_amax)
    _warn(plan)
    target.claim(plan.target, _state(plan, input_amax))
    total = sum(stored.nbytes for stored in plan.source.tensors.values())
    with progress_bar(progress, total, "quantize") as advance:
        for name, tensors in plan.shards.items():
            if not (plan.target / name).exists():
                with target.atomic(plan.target / name) as partial:
                    _write_shard(plan, tensors, input_scales, partial)
            advance(sum(stored.nbytes for stored in tensors))
    _copy_others(plan)
    _describe(plan)
    target.release(plan.target)


def _input_scales(plan: Plan, input_amax: Mapping[str, float] | None) -> dict[str, np.ndarray]:
    """The scale of every FP8 layer's input, by the layer's name."""
    if not plan.is_static:
        if input_amax is not None:
            raise ValueError(f"quantize: the recipe {plan.recipe!r} has no use for input_amax")
        return {}
    if input_amax is None:
        raise ValueError(f"quantize: the recipe {plan.recipe!r} needs input_amax of a calibration")
    names = sorted(plan.modules)
    missing = [name for name in names if name not in input_amax]
    if missing:
        raise ValueError(f"quantize: input_amax lacks {some(missing)}")
    amax = np.asarray([input_amax[name] for name in names], np.float32)
    wrong = [f"{n} ({a})" for n, a in zip(names, amax, strict=True) if not 0 <= a < math.inf]
    if wrong:
        raise ValueError(f"quantize: input_amax must be finite and >= 0, got {some(wrong)}")
    scales = np.asarray(dynamic_scale(jnp.asarray(amax), E4M3))
    return dict(zip(names, scales, strict=True))


def _warn(plan: Plan) -> None:
    """Of layouts that a reader takes for others without an error, or does not take."""
    if plan.weight.granularity == "tensor" and plan.format == "fp8":
        warnings.warn(
            f"quantize: transformers drops the scales of the format 'fp8' with {plan.recipe!r},"
            " which vLLM reads; 'compressed-tensors' is read by both",
            stacklevel=3,
        )
        return
    if not isinstance(plan.weight.granularity, tuple):
        return
    weights = [t for t in plan.source.tensors.values() if module_of(t.name) in plan.modules]
    partial = [t.name for t in weights if any(size % BLOCK for size in t.shape)]
    if partial and plan.format == "fp8":
        warnings.warn(
            "quantize: where transformers dequantizes the format 'fp8', it misreads or refuses"
            f" weights whose last blocks are partial: {some(partial)}; of 'compressed-tensors' it"
            " reads them",
            stacklevel=3,
        )
    followed = [
        t.name
        for t in weights
        if t.name.removesuffix(".weight").endswith(FOLLOWED_IN_VLLM) and t.shape[0] % BLOCK
    ]
    if followed:
        warnings.warn(
            "quantize: vLLM refuses blocks that are partial where it puts another weight behind"
            f" them, in q, k and v, and in gate and up: {some(followed)}; the recipe 'rowwise' has"
            " no such limit",
            stacklevel=3,
        )


def _state(plan: Plan, input_amax: Mapping[str, float] | None) -> dict[str, Any]:
    """All that the result depends on."""
    tensors = plan.source.tensors.values()
    files = [plan.source.path / CONFIG, *sorted({stored.file for stored in tensors})]
    return {
        "version": ffi.VERSION,
        "format": plan.format,
        "recipe": plan.recipe,
        "ignore": list(plan.ignore),
        "input_amax": input_amax and {n: float(input_amax[n]) for n in sorted(plan.modules)},
        "source": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
    }


def _write_shard(
    plan: Plan, tensors: list[StoredTensor], input_scales: dict[str, np.ndarray], path: Path
) -> None:
    from safetensors.numpy import save_file

    result: dict[str, np.ndarray] = {}
    for stored in tensors:
        module, names = module_of(stored.name), list(plan.sizes(stored))
        if module not in plan.modules:
            result[stored.name] = stored.map()
            continue
        quantized = quantize_array(jnp.asarray(stored.map()), granularity=plan.weight.granularity)
        scale = np.asarray(quantized.scale)
        if not np.isfinite(scale).all():
            raise ValueError(f"quantize: {plan.source.path}: {stored} holds a NaN or an infinity")
        result[names[0]] = np.ascontiguousarray(quantized.data)
        result[names[1]] = scale.reshape(scheme.stored_shape(plan.format, plan.weight, scale.shape))
        if plan.is_static:
            shape = scheme.scalar_shape(plan.format)
            result[names[2]] = np.full(shape, input_scales[module], np.float32)
    save_file(result, path, metadata={"format": "pt"})


def _copy_others(plan: Plan) -> None:
    source = plan.source.path
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        is_hidden = any(part.startswith(".") for part in inner.parts)
        is_written = path.name.endswith(".index.json") or str(inner) == CONFIG
        is_wanted = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in COPIED)
        if is_wanted and path.is_file() and not is_hidden and not is_written:
            (plan.target / inner).parent.mkdir(parents=True, exist_ok=True)
            with target.atomic(plan.target / inner) as partial:
                shutil.copyfile(path, partial)


def _describe(plan: Plan) -> None:
    """The index, and config.json last: it makes the folder a model."""
    if (plan.source.path / INDEX).exists() or len(plan.shards) > 1:
        weight_map: dict[str, str] = {}
        total = 0
        for name, tensors in plan.shards.items():
            for stored in tensors:
                sizes = plan.sizes(stored)
                weight_map |= dict.fromkeys(sizes, name)
                total += sum(sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        target.write_json(plan.target / INDEX, index)
    words = scheme.quantization_config(
        plan.format, plan.weight, plan.activation, list(plan.ignored)
    )
    target.write_json(plan.target / CONFIG, plan.source.config | {"quantization_config": words})
