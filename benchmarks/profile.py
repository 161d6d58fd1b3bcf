"""Where the time goes: kernels of MLP blocks, a product, a decoder's step, a layer's training.

The durations are the profiler's, which sees each kernel of XLA's command buffers. What passes
between kernels is not among them: the profiler would make it longer. The other benchmarks have it.
"""

from __future__ import annotations

import dataclasses
import glob
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import decoder, dense_layers, mlp, operands, peers, tables, targets, timing

Row = dict[str, Any]
#: A kernel's name and how many microseconds it ran.
Event = tuple[str, float]

NAME = "profile"
KEYS = ("work",)
REFERENCE = "bf16"
BY_NAME = True
#: Runs before the profile and in it.
WARM, PROFILED = 3, 3
#: In the table: kernels that take less than this share are one line.
LEAST_SHARE = 0.01


@dataclasses.dataclass(frozen=True)
class Work:
    """A program that does something ``units`` times over, and the bytes of weights in each."""

    run: Callable[[], Any]
    units: int
    weight_bytes: float | None = None


# --- What is profiled -----------------------------------------------------------------------------


def _blocks(m: int, variant: str, size: tuple[int, int], units: int) -> Work:
    """MLP blocks, one after the other."""
    _, prepare, block = mlp.VARIANTS[variant]
    weights = [mlp.block_weights(seed, size, prepare) for seed in range(mlp.LEAST_COPIES)]
    state = mlp.start(m, variant, size)
    chain = jax.jit(timing.fed_chain(block, units))
    nbytes = mlp.weights_bytes(size) * (2 if variant == "bf16" else 1)
    return Work(lambda: chain(state, weights), units, nbytes)


def _products(problem: peers.Problem, variant: str, units: int, chains: int) -> Work:
    """A layer with the quantization of its activations, in chains without a pause between them."""
    m, n, k = problem
    (peer,) = (peer for peer in peers.PEERS if peer.name == variant)
    weights = operands.Weights(n, k).get(peer.prepare, units)
    x = operands.normal(0, (m, k))
    chain = jax.jit(timing.chain(peer.call, units))

    def run() -> Any:
        for _ in range(chains - 1):
            chain((x,), weights)
        return chain((x,), weights)

    return Work(run, chains * units)


def _steps(model: Any, batch: int, steps: int) -> Work:
    """A decoder's steps, each a program of its own, and the zeros that their cache starts from."""
    step = decoder.stepper(model, batch, steps)
    read = decoder.read_bytes(model)
    return Work(lambda: step()[0], steps, read)


def _training(problem: dense_layers.Problem, variant: str, units: int) -> Work:
    """Values and gradients of a dense layer."""
    m, n, k = problem
    layer = dense_layers.LAYERS[variant]
    x, w, dy = (operands.normal(i, s) for i, s in enumerate(((m, k), (k, n), (m, n))))
    state = jax.jit(layer.start)(x, w)

    @jax.jit
    def chain(state: Any, x: jax.Array, dy: jax.Array, w: jax.Array) -> Any:
        results = []
        for _ in range(units):
            y, dx, dw, state = layer.step(state, x, dy, w)
            results.append((y, dx, dw))
            # Or all but one would be found to be the same.
            (x, dy, w), _ = jax.lax.optimization_barrier(((x, dy, w), results[-1]))
        return results

    return Work(lambda: chain(state, x, dy, w), units)


def _works(shapes: str) -> Iterator[tuple[str, str, Callable[[], Work]]]:
    """(what, variant, how it is made)."""
    small = shapes == "smoke"
    size, units = mlp.SIZES[shapes], 2 if small else 32
    few = "bf16", "rowwise", "around", "rowwise_around"
    many = "bf16", "rowwise", "rowwise_around", "static_around"
    for m, variants in [(2, few)] if small else [(1, few), (16, few), (128, few), (8192, many)]:
        for variant in variants:
            if variant not in mlp.variants(m):
                continue
            said = f"MLP block, M = {m}"
            yield said, variant, lambda m=m, v=variant: _blocks(m, v, size, units)
    product = peers.SHAPES[shapes][0]
    for variant in ("bf16", "row", "tensor", "xla_raw_narrow"):
        said = f"{' x '.join(map(str, product))}, with quantization"
        chains = 2 if small else 16  # A fifth of a second, after which the card is hot.
        yield said, variant, lambda v=variant, c=chains: _products(product, v, peers.MOST_CALLS, c)
    problem = (32, 64, 48) if small else (8192, 14336, 4096)
    for variant in ("bf16", "tensorwise", "rowwise"):
        said = f"training of a dense layer, {' x '.join(map(str, problem))}"
        yield said, variant, lambda v=variant: _training(problem, v, 2)
    from jax_fp8 import decoder as library

    config = library.read_config(decoder.TINY if small else decoder.LLAMA_3_8B)
    for variant in ("bf16", "rowwise"):
        models: list[Any] = []  # Made once for both batches, and let go of behind them.

        def model(variant: str = variant, models: list[Any] = models) -> Any:
            if not models:
                models.append(library.random(config, recipe=None if variant == "bf16" else variant))
            return models[0]

        for batch in (2,) if small else (1, 16):
            said = f"decoder's step, batch {batch}"
            yield said, variant, lambda b=batch, model=model: _steps(model(), b, 2 if small else 32)


# --- Measuring ------------------------------------------------------------------------------------


def run(shapes: str = "all") -> list[Row]:
    """Profiles; ``shapes`` is a key of ``mlp.SIZES``.

    Returns:
      A row for each work and variant: ``us`` of a unit's kernels together, ``reading_us``, what
      its weights take at the speed of a large copy, or None, and ``kernels``: ``name``, ``calls``
      and ``us`` of a unit, the longest first. Where there is no GPU there are no kernels, and
      ``us`` is the host's.
    """
    rows = []
    jobs = list(_works(shapes))
    card = jax.devices()[0].device_kind
    for said, variant, make in tqdm(jobs, desc=NAME, unit="timing"):
        row: Row = {"work": said, "variant": variant}
        try:
            work = make()
            nbytes = work.weight_bytes
            reading = None if nbytes is None else targets.memory_us(nbytes, card)
            row |= {"reading_us": reading, **_measure(work)}
        except Exception as error:
            row |= tables.failure(error)
        rows.append(row)
    return rows


def _measure(work: Work) -> Row:
    for _ in range(WARM):
        start = time.perf_counter()
        jax.block_until_ready(work.run())
        host_us = 1e6 * (time.perf_counter() - start)
    if not timing.on_gpu():
        return {"us": host_us / work.units, "kernels": []}
    found = kernels(profiled(work.run), work.units)
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return {"us": sum(kernel["us"] for kernel in found), "kernels": found}


def profiled(run: Callable[[], Any]) -> list[Event]:
    """All that ran on the GPU in PROFILED runs."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                jax.block_until_ready(run())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = jax.profiler.ProfileData.from_file(path).planes
        return [
            (event.name, event.duration_ns * 1e-3)
            for plane in planes
            if "GPU" in plane.name
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]


def kernels(events: Iterable[Event], units: int) -> list[Row]:
    """Events by the short names of their kernels, for each unit of a run; the longest first."""
    calls, us = Counter[str](), Counter[str]()
    for name, duration in events:
        calls[short_name(name)] += 1
        us[short_name(name)] += duration
    all_units = PROFILED * units
    return [
        {"name": name, "calls": calls[name] / all_units, "us": total / all_units}
        for name, total in us.most_common()
    ]


def short_name(name: str) -> str:
    """A kernel's name without its result, namespaces, template's and own arguments."""
    name = re.sub(r"\(anonymous namespace\)::|^void ", "", name)
    return re.split(r"[<(]", name)[0].split("::")[-1].strip() or name


# --- The table ------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    lines = []
    for (work,), group in tables.groups(rows, KEYS).items():
        for variant, row in group.items():
            if row.get("us") is not None:
                lines += _lines(work, variant, row)
    title = (
        "Where the time goes, in us of an MLP block of Llama 3 8B, of a product, of a step of a"
        " decoder of its shape, or of a dense layer's value and gradients: by kernels, of which"
        " those that take less than 1 % are `others`. `all` is their sum, which is more than what"
        " passes where some start before those in front of them have ended: each counts from its"
        " start. `reading` is what the weights would take at the speed of a large copy."
    )
    header = ["", "", "kernel", "calls", "us", "share"]
    return tables.assemble([title, tables.markdown(header, lines)], tables.errors(rows, KEYS))


def _lines(work: str, variant: str, row: Row) -> Iterator[list[str]]:
    us, reading = row["us"], row["reading_us"]

    def line(name: str, calls: str, of: float) -> list[str]:
        return [work, variant, name, calls, tables.number(of), f"{100 * of / us:.0f} %"]

    yield line("all", "-", us)
    if reading is not None:
        yield line("reading", "-", reading)
    large = [kernel for kernel in row["kernels"] if kernel["us"] >= LEAST_SHARE * us]
    for kernel in large:
        yield line(f"`{kernel['name']}`", f"{kernel['calls']:.3g}", kernel["us"])
    if len(large) < len(row["kernels"]):
        yield line("others", "-", us - sum(kernel["us"] for kernel in large))
