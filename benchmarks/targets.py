"""What the figures must reach on an H200, and whether a file of results does.

Where that is a share of the memory's speed, a file of another card is held to its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks import (
    compile,
    dense_layers,
    fused,
    gemm,
    gpt,
    parallel,
    peers,
    quantize,
    tables,
    training,
)

Row = dict[str, Any]
Problems = dict[tuple[Any, ...], tables.Group]

MemoryUs = Callable[[float], float | None]

#: Card -> the fastest large copy seen on it, read and written: what "the memory's speed" is here.
COPY_BYTES_PER_S = {"NVIDIA H200": 4.255e12, "NVIDIA H100 80GB HBM3": 2.973e12}


def memory_us(nbytes: float, card: str = "NVIDIA H200") -> float | None:
    """What so many bytes take at the memory's speed, or None for a card that was not measured."""
    rate = COPY_BYTES_PER_S.get(card)
    return 1e6 * nbytes / rate if rate else None


def _over(us: float | None, least: float | None) -> float | None:
    return us / least if us and least else None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One line of the check: a figure against what it may be at most, or must be at least."""

    what: str
    figure: float | None
    bound: float
    at_most: bool = True

    @property
    def passed(self) -> bool:
        """A figure that is missing is a miss."""
        if self.figure is None:
            return False
        return self.figure <= self.bound if self.at_most else self.figure >= self.bound

    def __str__(self) -> str:
        figure = "no figure" if self.figure is None else f"{self.figure:.3f}"
        side = "at most" if self.at_most else "at least"
        return f"{'PASS' if self.passed else 'MISS'}  {self.what}: {figure} ({side} {self.bound:g})"


def _all(problems: Problems, shapes: Iterable[tuple[Any, ...]]) -> Problems:
    """With empty groups for those of ``shapes`` that are not there, which count as misses."""
    return {**{shape: {} for shape in shapes}, **problems}


def _size(key: tuple[Any, ...]) -> str:
    return " x ".join(map(str, key))


def _gemm(problems: Problems, _: MemoryUs) -> Iterator[Verdict]:
    for key, group in _all(problems, gemm.SHAPES["all"]).items():
        if "naive" in group:  # What is there for GPUs without FP8 tensor cores.
            over = tables.ratio(group, "naive", "decode")
            yield Verdict(f"gemm {_size(key)}, naive over decode", over, 20.0, at_most=False)
        over = tables.ratio(group, "fp8", "cpp_best")
        yield Verdict(f"gemm {_size(key)}, tensor scales over cublasLt's best", over, 1.03)
        if key[0] <= 64:
            over = tables.ratio(group, "fp8_row", "fp8")
            yield Verdict(f"gemm {_size(key)}, row scales over tensor scales", over, 1.2)
        else:
            over = tables.ratio(group, "fp8_row", "cpp_row_best")
            yield Verdict(f"gemm {_size(key)}, row scales over cublasLt's best", over, 1.03)


def _quantize(problems: Problems, _: MemoryUs) -> Iterator[Verdict]:
    for key, group in _all(problems, quantize.SHAPES["all"]).items():
        elements = key[0] * key[1]
        if elements <= 1 << 16:
            us = tables.value(group, "tensor")
            yield Verdict(f"quantize {_size(key)}, tensor, us", us, 3.0)
        if elements < 8e6:
            continue
        over = tables.ratio(group, "row", "tensor_static")
        yield Verdict(f"quantize {_size(key)}, row over a known scale", over, 1.1)
        over = tables.ratio(group, "tensor", "tensor_static")
        bound = 1.4 if elements <= 40e6 else 1.62
        yield Verdict(f"quantize {_size(key)}, tensor over a known scale", over, bound)


#: (M, N, K) -> the product with its quantization over the product alone.
_OVER_BARE = {(8192, 28672, 4096): 1.04, (8192, 4096, 14336): 1.16, (2048, 4096, 4096): 1.22}


def _peers(problems: Problems, memory_us: MemoryUs) -> Iterator[Verdict]:
    for key, bound in _OVER_BARE.items():
        group = problems.get(key, {})
        over = tables.ratio(group, "row", "bare_row")
        yield Verdict(f"matmul {_size(key)}, rowwise over its product", over, bound)
        us, bare = tables.value(group, "tensor"), tables.value(group, "bare_tensor")
        second_read_us = memory_us(2.0 * key[0] * key[2])
        over = _over(us - second_read_us, bare) if us and second_read_us else None
        what = f"matmul {_size(key)}, tensorwise less the second read over its product"
        yield Verdict(what, over, bound)
    for key, group in _all(problems, peers.SHAPES["all"]).items():
        times = {name: us for name in ("bf16", *peers.OTHERS) if (us := tables.value(group, name))}
        best = min(times, key=lambda name: times[name], default=None)
        over = tables.ratio(group, "row", best) if best else None
        yield Verdict(f"matmul {_size(key)}, rowwise over the best peer ({best})", over, 1.0)


#: M -> how many times as fast as bf16 the block with recipe rowwise is.
_BLOCK_SPEEDUPS = {8192: 1.82, 1024: 1.7, 128: 1.8, 16: 1.9, 1: 1.9}


def _mlp(problems: Problems, memory_us: MemoryUs) -> Iterator[Verdict]:
    for m, bound in _BLOCK_SPEEDUPS.items():
        group = problems.get((m,), {})
        bounds = {"rowwise": bound} | ({"static": 1.87} if m == 8192 else {})
        for recipe, least in bounds.items():
            # Many rows and few have a way of their own, of which a benchmark may be too old.
            two = f"{recipe}_around" in group
            over = tables.ratio(group, "bf16", f"{recipe}_around" if two else recipe)
            said = f"{recipe}{', all in its two products' if two else ''}"
            yield Verdict(f"MLP block, M = {m}, bf16 over {said}", over, least, at_most=False)
        if m <= 16:
            name = "rowwise_around" if "rowwise_around" in group else "rowwise"
            us, nbytes = (tables.value(group, name, key) for key in ("us", "weights_bytes"))
            over = _over(us, memory_us(nbytes)) if nbytes else None
            yield Verdict(f"MLP block, M = {m}, rowwise over reading the weights", over, 1.4)


_ONE_ROW = {(1, 28672, 4096): 1.15, (1, 4096, 4096): 1.7}


def _weight_only(problems: Problems, memory_us: MemoryUs) -> Iterator[Verdict]:
    for key, bound in _ONE_ROW.items():
        us = tables.value(problems.get(key, {}), "weight_only")
        over = _over(us, memory_us(key[1] * key[2]))
        yield Verdict(f"weight_only {_size(key)}, over reading the weights", over, bound)


def _host(problems: Problems, _: MemoryUs) -> Iterator[Verdict]:
    for (n,), group in problems.items():
        bf16 = tables.value(group, "bf16", "host_us")
        for name in ("tensorwise", "rowwise", "weight_only"):
            entered = tables.value(group, name, "handler_calls")
            yield Verdict(f"host, {name}: handlers entered in {n} captured calls", entered, 0)
            us = tables.value(group, name, "host_us")
            more = us - bf16 if us is not None and bf16 is not None else None
            # 5 us is what a call costs that is not captured.
            yield Verdict(f"host, {name}: us of a captured call more than bf16's", more, 0.5)


def _fused(problems: Problems, memory_us: MemoryUs) -> Iterator[Verdict]:
    for (producer, rows, columns), group in _all(problems, fused.SHAPES["all"]).items():
        elements = rows * columns
        if elements < 8e6:
            continue
        for name in ("row", "1x128", "tensor", "tensor_static"):
            us, rate = (tables.value(group, name, key) for key in ("us", "gb_per_s"))
            over = None
            if us and rate:
                nbytes = 1e3 * rate * us
                if name == "tensor":  # It computes what it quantizes twice.
                    nbytes += elements * (4 if producer == "swiglu" else 2)
                over = _over(us - 2.0, memory_us(nbytes))
            moved = "its bytes, the input twice" if name == "tensor" else "its bytes"
            what = f"{producer} {rows} x {columns}, {name}, less 2 us over moving {moved}"
            yield Verdict(what, over, 1.15)


def _compile(problems: Problems, _: MemoryUs) -> Iterator[Verdict]:
    for key, group in _all(problems, compile.SHAPES["all"]).items():
        bf16 = tables.value(group, "bf16", "until_first_ms")
        for name in ("matmul", "quantize_matmul"):
            ours = tables.value(group, name, "until_first_ms")
            more = ours - bf16 if ours is not None and bf16 is not None else None
            what = f"compile {_size(key)}, {name}: ms until the first result more than bf16"
            yield Verdict(what, more, 500)


#: (M, N, K) -> recipe -> how many times as fast as bf16 value and gradients of the layer are.
_STEP_SPEEDUPS = {
    (8192, 14336, 4096): {"tensorwise": 1.75, "rowwise": 1.75, "delayed": 1.8},
    (4096, 4096, 4096): {"tensorwise": 1.4, "rowwise": 1.4, "delayed": 1.4},
}


def _training(problems: Problems, _: MemoryUs) -> Iterator[Verdict]:
    for key, bounds in _STEP_SPEEDUPS.items():
        group = problems.get((training.STEP, *key), {})
        for name, bound in bounds.items():
            over = tables.ratio(group, "bf16", name)
            what = f"training {_size(key)}, bf16 over {name}"
            yield Verdict(what, over, bound, at_most=False)
        for name in (*bounds, "blockwise"):
            over = tables.ratio(group, name, "flax_direct")
            yield Verdict(f"training {_size(key)}, {name} over flax's direct", over, 1.0)
    group = problems.get((training.STEP, *next(iter(_STEP_SPEEDUPS))), {})
    for name in dense_layers.NARROW:
        ours, wide = (tables.value(group, v, "activation_bytes") for v in (name, "bf16"))
        share = ours / wide if ours and wide else None
        yield Verdict(f"training, {name}: what is kept of x over bf16's", share, 0.6)


#: Recipe -> how much more than bf16's, in %, the GPT's last loss may be.
_LOSSES = {"rowwise": 0.5, "tensorwise": 1.0}
#: Preset of the GPT -> how many times as fast as bf16's its step is.
_GPT_SPEEDUPS = {"100m": 1.0, "wide": 1.5}


def _gpt(problems: Problems, _: MemoryUs) -> Iterator[Verdict]:
    for preset, bound in _GPT_SPEEDUPS.items():
        found = [group for key, group in problems.items() if key[0] == preset]
        for group in found or [{}]:
            said = f"GPT {preset}"
            if group:
                one = next(iter(group.values()))
                said += f", {one['steps']} steps, seed {one['seed']}"
            for name, most in _LOSSES.items():
                row = group.get(name, {})
                over = gpt.speedup(row)
                yield Verdict(f"{said}, bf16 over {name}", over, bound, at_most=False)
                over = gpt.step_ratio(group, name, "flax_direct")
                yield Verdict(f"{said}, {name} over flax's direct", over, 1.0)
                if preset != "100m":
                    continue
                for figure in ("training_loss", "validation_loss"):
                    off = gpt.off_percent(group, name, figure)
                    what = f"{said}, {name}: {figure.replace('_', ' ')} over bf16's, %"
                    yield Verdict(what, off, most)
            if preset != "100m":
                continue
            for name in gpt.recipes(preset):
                steps = group.get(name, {}).get("steps")
                yield Verdict(f"{said}, {name}: steps", steps, 1000, at_most=False)


#: (phase, batch) -> how many times as fast as bf16 the decoder with recipe rowwise is.
_DECODER_SPEEDUPS = {("decode", 1): 1.7, ("decode", 16): 1.6, ("prefill", 1): 1.5}


def _decoder(problems: Problems, memory_us: MemoryUs) -> Iterator[Verdict]:
    for place, bound in _DECODER_SPEEDUPS.items():
        group = next((found for key, found in problems.items() if key[1:3] == place), {})
        said = f"decoder, {place[0]} of a batch of {place[1]}"
        over = tables.ratio(group, "bf16", "rowwise")
        yield Verdict(f"{said}, bf16 over rowwise", over, bound, at_most=False)
        if place[0] == "prefill":
            continue
        us, nbytes = (tables.value(group, "bf16", key) for key in ("us", "read_bytes"))
        over = _over(us, memory_us(nbytes)) if nbytes else None
        yield Verdict(f"{said}, bf16 over reading its weights", over, 1.3)
        ours, wide = (tables.value(group, v, "weight_bytes") for v in ("rowwise", "bf16"))
        share = ours / wide if ours and wide else None
        yield Verdict(f"{said}, weights over bf16's", share, 0.57)


def _parallel(problems: Problems, _: MemoryUs) -> Iterator[Verdict]:
    def pair(part: str, variant: str) -> tuple[Row, Row]:
        """On one GPU, and on the most there are."""
        found = {
            key[3]: g[variant] for key, g in problems.items() if key[0] == part and variant in g
        }
        return found.get(1, {}), found.get(max(found, default=1), {})

    for variant in ("rowwise", "rowwise, FP8 weights"):
        one, two = pair("MLP, tensor parallel", variant)
        what = f"MLP 70b over 2 GPUs, {variant}, over one"
        yield Verdict(what, parallel.speedup(one, two), 1.7, at_most=False)
        # bf16 results, of sums in another order.
        yield Verdict(f"MLP 70b over 2 GPUs, {variant}, off", two.get("off"), 5e-3)
    one, two = pair("GPT, data parallel", "rowwise")
    what = "GPT wide, rowwise, tokens a second of 2 GPUs over one's"
    yield Verdict(what, parallel.speedup(one, two), 1.85, at_most=False)
    gathered = []
    for variant in ("rowwise", "bf16"):
        _, two = pair("MLPs, gradients, FSDP", variant)
        moved = two.get("moved") or {}
        gathered.append(sum(mb for what, mb in moved.items() if what.startswith("all-gather")))
    share = gathered[0] / gathered[1] if all(gathered) else None
    # FP8 over bf16, with a scale a row.
    yield Verdict("MLP, FSDP, bytes gathered over bf16's", share, 0.51)


CHECKS: dict[str, Callable[[Problems, MemoryUs], Iterator[Verdict]]] = {
    "gemm": _gemm,
    "quantize": _quantize,
    "peers": _peers,
    "mlp": _mlp,
    "weight_only": _weight_only,
    "host": _host,
    "fused": _fused,
    "compile": _compile,
    "training": _training,
    "gpt": _gpt,
    "decoder": _decoder,
    "parallel": _parallel,
}


def check(results: dict[str, Any], keys: tuple[str, ...]) -> list[Verdict]:
    """The verdicts on results as ``results.read`` gives them; none where there are no targets.

    Args:
      results: of one benchmark.
      keys: what tells its problems apart, the benchmark's KEYS.
    """
    checks = CHECKS.get(results["name"])
    card = results.get("environment", {}).get("device", "NVIDIA H200")
    of_card = functools.partial(memory_us, card=card)
    return list(checks(tables.groups(results["rows"], keys), of_card)) if checks else []


def missed(verdicts: dict[str, list[Verdict]]) -> str:
    """How many targets are met, and a table of the others, as Markdown.

    Args:
      verdicts: by card.
    """
    every = [verdict for some in verdicts.values() for verdict in some]
    met = sum(verdict.passed for verdict in every)
    lines = [
        [
            card.removeprefix("NVIDIA "),
            verdict.what,
            tables.number(verdict.figure, "{:.3f}"),
            f"{'at most' if verdict.at_most else 'at least'} {verdict.bound:g}",
        ]
        for card, some in verdicts.items()
        for verdict in some
        if not verdict.passed
    ]
    title = f"{met} of {len(every)} targets are met; these are not."
    return f"{title}\n\n{tables.markdown(['card', 'target', 'figure', 'bound'], lines)}"
