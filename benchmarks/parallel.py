"""Several GPUs of one host: the MLP of examples/parallel.py and the GPT of examples/gpt.

Tensor parallel, the same rows on all devices; data parallel, the rows of each device the same; and
what collectives alone take, from which ``extrapolate`` says what larger machines would.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from benchmarks import ROOT, extrapolate, tables

Row = dict[str, Any]

NAME = "parallel"
KEYS = ("part", "problem", "rows", "devices")
REFERENCE = "bf16"
BY_NAME = True
#: Of the GPT, timed steps; and bytes of what a collective moves.
STEPS, COLLECTIVE_BYTES = 30, (1 << 26, 1 << 30)
#: (size, rows of the tensor-parallel MLP, rows of each device with FSDP, preset of the GPT)
SHAPES = {
    "smoke": ("tiny", 16, 16, "tiny"),
    "quick": ("70b", 4096, 4096, None),
    "all": ("70b", 4096, 4096, "wide"),
}


def run(shapes: str = "all") -> list[Row]:
    """Measures on one device and on all there are; ``shapes`` is a key of SHAPES.

    Returns:
      A row for each problem, number of devices and variant: ``us``, ``tokens_per_s`` of training,
      ``mb`` that the program of a device takes with its operands, ``moved`` in MB by collective and
      dtype, and how far ``off`` the results are from one device's: RMS over RMS.
    """
    size, rows, each, preset = SHAPES[shapes]
    counts = sorted({1, jax.device_count()})
    found: list[Row] = []
    steps = [_collectives(shapes), _tensor(size, rows, counts), _fsdp(size, each, counts[-1])]
    if preset is not None:
        steps.append(_gpt(preset, counts, 4 if shapes == "smoke" else STEPS))
    with tqdm(desc=NAME, unit="timing") as bar:
        for part in steps:
            for row in part:
                found.append(row)
                bar.update()
                bar.write(json.dumps(row))
    return found


def _example() -> Any:
    examples = str(ROOT / "examples")
    if examples not in sys.path:
        sys.path.insert(0, examples)
    import parallel

    return parallel


def _mesh(data: int, model: int) -> Any:
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), (AxisType.Auto,) * 2, devices=devices)


def _key(part: str, problem: str, rows: int, devices: int) -> Row:
    return {"part": part, "problem": problem, "rows": rows, "devices": devices}


def _tensor(size: str, rows: int, counts: list[int]) -> Iterator[Row]:
    """Values of the MLP: gate and up by columns, down by rows."""
    example = _example()
    whole: dict[str, Any] = {}
    for count in counts:
        weights, x = example.make(_mesh(1, count), size, rows)
        for variant in ("bf16", "rowwise", "rowwise, FP8 weights"):
            recipe = "wide" if variant == "bf16" else "rowwise"
            given = example.narrow(weights, recipe) if variant.endswith("weights") else weights
            call = functools.partial(example.mlp, recipe=recipe)
            row = {**_key("MLP, tensor parallel", size, rows, count), "variant": variant}
            yield row | _measured(example, call, (given, x), whole, variant)


def _fsdp(size: str, each: int, count: int) -> Iterator[Row]:
    """Gradients of the weights of MLPs in a row, which are divided as the rows are."""
    example = _example()
    rows = each * count
    whole: dict[str, Any] = {}
    for devices in sorted({1, count}):
        mesh = _mesh(devices, 1)
        weights, x = example.make(mesh, size, rows, fsdp=True, train=True)
        lie = example.placed(mesh, fsdp=True, train=True)
        for variant in ("bf16", "rowwise"):
            call = functools.partial(
                example.gradients, recipe="wide" if variant == "bf16" else variant
            )
            row = {**_key("MLPs, gradients, FSDP", size, rows, devices), "variant": variant}
            row["layers"] = example.LAYERS
            yield row | _measured(example, call, (weights, x), whole, variant, out_shardings=lie)


def _measured(
    example: Any, call: Any, operands: Any, whole: dict[str, Any], variant: str, **options: Any
) -> Row:
    """``whole`` has one device's results, once they are known, on the host."""
    try:
        ms, moved, mb, result = example.measure(call, *operands, **options)
    except Exception as error:
        return tables.failure(error)
    result = jax.device_get(result)
    off = None
    if variant in whole:
        distances = jax.tree.map(example.distance, result, whole[variant])
        off = max(map(float, jax.tree.leaves(distances)))
    whole.setdefault(variant, result)
    return {"us": 1e3 * ms, "mb": mb, "moved": moved, "off": off}


def _gpt(preset: str, counts: list[int], steps: int) -> Iterator[Row]:
    """Training steps of the GPT: as many times the batch as devices, and once the same batch."""
    example = _example()
    from gpt import data, train

    corpus, usual = data.load(), train.PRESETS[preset]
    first: dict[str, list[float]] = {}
    problems = [(count, count) for count in counts] + [(count, 1) for count in counts[1:]]
    for variant in ("bf16", "rowwise"):
        for count, times in problems:
            batch = usual.batch * times
            training = dataclasses.replace(usual, devices=count, batch=batch, steps=2 * steps)
            part = "GPT, data parallel" if times == count else "GPT, the same batch"
            tokens = batch * usual.config.length
            row = {**_key(part, preset, tokens, count), "variant": variant}
            try:
                timed = train.Run(training, variant, corpus)
                for _ in range(max(2, steps // training.report)):
                    timed.advance(training.report)
            except Exception as error:
                yield row | tables.failure(error)
                continue
            us, losses = 1e3 * timed.step_ms, timed.losses[:5]
            off = None
            if times == 1 and variant in first:  # Later any difference has grown.
                off = max(abs(a / b - 1) for a, b in zip(losses, first[variant], strict=False))
            first.setdefault(variant, losses)
            yield row | {
                "us": us,
                "tokens_per_s": 1e6 * tokens / us,
                "mb": timed.megabytes,
                "moved": example.moved(timed.text),
                "parameters": timed.parameters,
                "off": off,
            }
            del timed
            gc.collect()  # A model has cycles, and holds its weights until it goes.


def _collectives(shapes: str) -> Iterator[Row]:
    """What a sum and a gather over all devices take, alone."""
    count = jax.device_count()
    if count == 1:
        return
    mesh = _mesh(count, 1)
    for nbytes in (1 << 16,) if shapes == "smoke" else COLLECTIVE_BYTES:
        for variant in ("all-reduce", "all-gather"):
            us = _collective_us(mesh, variant, nbytes)
            key = _key("collective", f"{nbytes >> 20} MiB", nbytes, count)
            yield {**key, "variant": variant, "us": us, "mb": None, "moved": {}, "off": None}


def _collective_us(mesh: Any, name: str, nbytes: int) -> float:
    """Microseconds of a collective whose result has so many bytes on each device, in bf16."""
    count = mesh.shape["data"]
    spec = PartitionSpec("data")

    def one(x: jax.Array) -> jax.Array:
        if name == "all-reduce":
            return jax.lax.psum(x, "data") * jnp.bfloat16(0.5)
        gathered = jax.lax.all_gather(x, "data", tiled=True)
        return gathered[: x.shape[0]] + gathered[-x.shape[0] :]

    local = nbytes // 2 if name == "all-reduce" else nbytes // 2 // count

    def chain(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 8, lambda _, x: one(x), x)

    mapped = jax.shard_map(chain, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    jitted = jax.jit(mapped)
    x = jax.device_put(jnp.ones(local * count, jnp.bfloat16), NamedSharding(mesh, spec))
    jax.block_until_ready(jitted(x))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(jitted(x))
        times.append((time.perf_counter() - start) / 8)
    return 1e6 * statistics.median(times)


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    by_problem = tables.groups(rows, KEYS)
    lines = []
    for (part, problem, size, devices), group in by_problem.items():
        if part == "collective":
            continue
        for variant, row in group.items():
            one = extrapolate.one_device(rows, row)
            lines.append(
                [
                    f"{part}, {problem}",
                    f"{size}",
                    str(devices),
                    variant,
                    tables.number(row.get("us") and row["us"] / 1e3),
                    tables.number(tables.ratio(group, "bf16", variant), "{:.2f}"),
                    tables.number(one and speedup(one, row), "{:.2f}"),
                    tables.number(row.get("mb") and row["mb"] / 1e3),
                    tables.number(row.get("off"), "{:.1e}"),
                    ", ".join(f"{what} {mb:.3g}" for what, mb in sorted(row["moved"].items()))
                    if row.get("moved")
                    else "-",
                ]
            )
    title = (
        "Several GPUs of one host: ms by the host's clock, how many times as fast as bf16 on as"
        " many devices, how many times the rows a second of one device, GB that the program of a"
        " device takes with its operands, the RMS distance from one device's results, and MB that"
        " each device gets from collectives, those of a loop over layers once."
    )
    header = ["", "rows", "GPUs", "", "ms", "of bf16", "of one", "GB", "off", "moves, MB"]
    parts = [title, tables.markdown(header, lines)]
    collectives = [row for row in rows if row["part"] == "collective" and row.get("us")]
    if collectives:
        parts.append("Collectives alone, of what each device has in the end:")
        parts.append(
            tables.markdown(
                ["", "", "us", "GB/s"],
                [
                    [
                        row["variant"],
                        row["problem"],
                        tables.number(row["us"]),
                        tables.number(1e-3 * row["rows"] / row["us"]),
                    ]
                    for row in collectives
                ],
            )
        )
        parts += extrapolate.parts(rows)
    return tables.assemble(parts, tables.errors(rows, KEYS))


def speedup(one: Row, many: Row) -> float | None:
    """How many times the rows a second."""
    a, b = one.get("us"), many.get("us")
    return (many["rows"] / b) / (one["rows"] / a) if a and b else None
