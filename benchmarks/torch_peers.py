"""torch's ``_scaled_mm`` in a process of its own, which ``peers.py`` asks line by line.

It imports nothing of JAX. ``open SLOT NAME M N K CALLS COPIES HEAD_START_US`` compiles, and
captures CUDA graphs of CALLS and of 2 CALLS calls; ``pair SLOT LEADS`` times both, behind as many
runs of both, and compares a result with what is expected. Each answer is a line of JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
COMPARED = 64


def _cast(x: Any, scale: Any) -> Any:
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3)


def _row(x: Any, w: Any, w_scale: Any) -> Any:
    scale = (x.abs().amax(-1, keepdim=True).float() / LARGEST).clamp(min=1e-12)
    return _multiply(_cast(x, scale), w, scale, w_scale.t())


def _tensor(x: Any, w: Any, w_scale: Any) -> Any:
    scale = (x.abs().amax().float() / LARGEST).clamp(min=1e-12)
    return _multiply(_cast(x, scale), w, scale, w_scale)


def _multiply(x: Any, w: Any, scale: Any, w_scale: Any) -> Any:
    return torch._scaled_mm(
        x,
        w.t(),
        scale_a=scale,
        scale_b=w_scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


class Chains:
    """The captured chains of n and 2n calls; every result is kept, as in ``timing.chain``.

    A graph reads its operands where they were when it was captured: they are held as long.
    """

    def __init__(
        self, name: str, m: int, n: int, k: int, calls: int, copies: int, head_start_us: float
    ) -> None:
        def normal(seed: int, *shape: int) -> Any:
            generator = torch.Generator("cuda").manual_seed(seed)
            return torch.randn(shape, generator=generator, device="cuda").bfloat16()

        self._cycles = int(2e3 * head_start_us)  # At about 2 GHz.
        row = name == "torch_row"
        self._x = x = normal(0, m, k)
        wide = normal(1, n, k)
        self._rotated = []
        for seed in range(copies):
            w = wide if seed == 0 else normal(1 + seed, n, k)
            scale = (w.abs().amax(-1, keepdim=True) if row else w.abs().amax()).float() / LARGEST
            self._rotated.append((_cast(w, scale), scale))
        call, self.how = self._compile(_row if row else _tensor, x)
        self._stream = torch.cuda.Stream()
        self._graphs = [self._capture(call, x, length) for length in (calls, 2 * calls)]
        self._expected = x[:COMPARED].float() @ wide.float().t()

    def _compile(self, function: Any, x: Any) -> tuple[Any, str]:
        try:
            compiled = torch.compile(function, dynamic=False)
            compiled(x, *self._rotated[0])
            return compiled, "torch.compile"
        except Exception as error:  # It needs Triton, and a compiler of C.
            print(f"torch.compile: {error}", file=sys.stderr)
            return function, "eager"

    def _capture(self, call: Any, x: Any, calls: int) -> Any:
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                call(x, *self._rotated[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            results = [call(x, *self._rotated[i % len(self._rotated)]) for i in range(calls)]
        return graph, results

    def pair(self, leads: int) -> list[float]:
        """Microseconds of n and of 2n calls, behind as many ``leads`` times: ``timing.Chains``."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        (short, _), (long, _) = self._graphs
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(self._cycles)
            for _ in range(leads):
                short.replay()
                long.replay()
            marks[0].record()
            for graph, mark in zip((short, long), marks[1:], strict=True):
                graph.replay()
                mark.record()
        marks[-1].synchronize()
        return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    def rms_error(self) -> float:
        """Of the first result of the last run, over the RMS of what is expected."""
        result = self._graphs[0][1][0]
        off = result[:COMPARED].float() - self._expected
        return float((off.square().mean() / self._expected.square().mean()).sqrt())


def _answer(line: str, slots: dict[str, Chains]) -> dict[str, Any]:
    verb, slot, *rest = line.split()
    if verb == "pair":
        return {"pair": slots[slot].pair(int(rest[0])), "rms_error": slots[slot].rms_error()}
    if verb != "open":
        raise ValueError(f"not understood: {line}")
    name, *sizes, head_start_us = rest
    m, n, k, calls, copies = map(int, sizes)
    slots[slot] = chains = Chains(name, m, n, k, calls, copies, float(head_start_us))
    return {"fp8": True, "version": f"torch {torch.__version__}, {chains.how}"}


def main() -> None:
    """Answers lines until there are no more."""
    slots: dict[str, Chains] = {}
    for line in sys.stdin:
        try:
            answer = _answer(line, slots)
        except Exception as error:  # The next line may fare better.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
