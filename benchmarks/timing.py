"""Device time per call, from chains of calls inside one jit; host dispatch apart.

A chain of n calls is one compiled program. Each call's operands pass through an optimization
barrier together with the result before, so the calls are scheduled one after the other and none
is merged with another; one operand rotates over copies that together exceed the L2 cache. Every
result is returned, so none is dead. The time of a call is ``(t(2n) - t(n)) / n``, which leaves
out what a dispatch costs once; what it costs for each argument and result is hidden behind a
kernel that keeps the device busy before the chain starts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jax_fp8

#: Rates above those of any one GPU of today, so that a floor from them is below any time.
PEAK_BYTES_PER_S = 4.8e12
PEAK_FLOP_PER_S = {"fp8": 2.0e15, "16bit": 1.0e15, "naive": 1.0e12}

#: Together the copies of the rotated operand take this. Of 60 MB of L2 with random replacement
#: exp(-512 / 60) of it survives a round, so a call reads from memory what a cold one would.
ROTATED_BYTES = 512 << 20
CHAIN_US = 2000.0
MAX_CALLS = 64
#: About what one kernel of a head start takes.
HEAD_START_US = 500.0
#: Calls slower than this are timed one by one: their dispatch is nothing.
SLOW_US = 2e5
#: Without it two calls of one command buffer could run at once where no buffer orders them.
SERIAL = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}


def on_gpu() -> bool:
    """Whether the default backend is a GPU."""
    return jax.default_backend() == "gpu"


def floor_us(nbytes: float, flop: float = 0.0, unit: str = "16bit") -> float:
    """The least time for so many bytes and operations, by the rates above."""
    return 1e6 * max(nbytes / PEAK_BYTES_PER_S, flop / PEAK_FLOP_PER_S[unit])


def calls_for(floor: float) -> int:
    """Calls in a chain of at least CHAIN_US, up to MAX_CALLS; a few where there is no GPU."""
    most = MAX_CALLS if on_gpu() else 2
    return 1 if floor > SLOW_US else max(1, min(most, math.ceil(CHAIN_US / floor)))


def copies_for(nbytes: int, calls: int) -> int:
    """Copies of an operand that rotates: beyond the L2 cache, but no more than calls."""
    total = ROTATED_BYTES if on_gpu() else nbytes
    return max(1, min(2 * calls, 1 + total // nbytes))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call, and how they were found.

    Attributes:
      us: median over pairs of ``(t(2n) - t(n)) / n``; of ``t(2n) / 2n`` where there is no GPU,
        and so no head start that would make the difference mean something.
      us_min: of the fastest 2n and the fastest n.
      us_iqr: interquartile range of the pairs.
      wall_us: median ``t(2n) / 2n`` with nothing subtracted and no head start.
      host_us: the host's time in dispatching the chain of 2n calls.
      head_start_us: what the device was busy with meanwhile; should be more. None without a GPU.
      calls: n.
      pairs: repetitions.
      ran: the targets that the compiled chain calls; empty where XLA made kernels of its own.
    """

    us: float
    us_min: float
    us_iqr: float
    wall_us: float
    host_us: float
    head_start_us: float | None
    calls: int
    pairs: int
    ran: str


def chain(call: Callable[..., Any], calls: int) -> Callable[..., list[Any]]:
    """A function of ``(fixed, rotated)`` that makes ``calls`` calls, one after the other.

    Call i is ``call(*fixed, *rotated[i % len(rotated)])``.
    """
    call = jax.jit(call)  # Traced once, however often it is called.

    def run(fixed: tuple[Any, ...], rotated: Sequence[tuple[Any, ...]]) -> list[Any]:
        results: list[Any] = []
        for i in range(calls):
            operands = (*fixed, *rotated[i % len(rotated)])
            if results:
                operands, results[-1] = lax.optimization_barrier((operands, results[-1]))
            results.append(call(*operands))
        return results

    return run


def compile_with(lowered: Any, options: dict[str, Any]) -> Any:
    """Compiles with those of the options that this XLA knows, and warns of the others."""
    options = dict(options)
    while True:
        try:
            return lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None or options.pop(unknown.group(1), None) is None:
                raise
            warnings.warn(f"this XLA has no option {unknown.group(1)}", stacklevel=2)


@functools.cache
def head_start() -> tuple[Callable[[], Any], float]:
    """A function that keeps the GPU busy and returns at once, and for how many microseconds.

    It is the naive kernel with one result: one thread that adds for long, and draws no power.
    """
    if not on_gpu():
        return (lambda: None), 0.0
    product = jax.jit(lambda x: jax_fp8.scaled_matmul(x, x, implementation="naive"))

    def operand_and_time(k: int) -> tuple[Any, float]:
        x = jax_fp8.quantize(jnp.linspace(0.5, 1.0, k).reshape(1, k))
        product(x).block_until_ready()
        return x, statistics.median(_wall_us(lambda: product(x)) for _ in range(5))

    short = 1 << 13
    _, us = operand_and_time(short)
    x, us = operand_and_time(short * max(1, min(16, math.ceil(HEAD_START_US / us))))
    return (lambda: product(x)), us


def _wall_us(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    results = function()
    # The results of one program are ready together; to ask each one would cost the host's time.
    jax.tree.leaves(results)[-1].block_until_ready()
    return 1e6 * (time.perf_counter() - start)


class Chains:
    """The compiled chains of n and 2n calls of one function on its operands."""

    def __init__(
        self,
        call: Callable[..., Any],
        fixed: tuple[Any, ...],
        rotated: Sequence[tuple[Any, ...]],
        floor: float,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.calls = calls_for(floor)
        self.slow = floor > SLOW_US
        self._head_starts = 1
        self._operands = (fixed, rotated)
        lengths = (1,) if self.slow else (self.calls, 2 * self.calls)
        self._programs = [
            compile_with(
                jax.jit(chain(call, length)).lower(fixed, rotated), {**SERIAL, **(options or {})}
            )
            for length in lengths
        ]
        text = self._programs[-1].as_text()
        self._ran = ", ".join(sorted(set(re.findall(r'custom_call_target="([^"]+)"', text))))
        if on_gpu() and " copy(" in text:
            warnings.warn("XLA copies in the chain, and the copies are timed", stacklevel=2)

    def _run(self, which: int) -> float:
        return _wall_us(lambda: self._programs[which](*self._operands))

    def _run_behind_head_start(self, which: int) -> tuple[float, float]:
        """Microseconds until the results are there, and until the host had dispatched all."""
        busy, _ = head_start()
        start = time.perf_counter()
        for _ in range(self._head_starts):
            busy()
        results = self._programs[which](*self._operands)
        dispatched = time.perf_counter()
        jax.tree.leaves(results)[-1].block_until_ready()
        done = time.perf_counter()
        return 1e6 * (done - start), 1e6 * (dispatched - start)

    def time(self, budget_s: float = 0.15) -> Timing:
        """Times the chains by turns, for about ``budget_s`` after the warm-up."""
        if self.slow:
            self._run(0)
            walls = sorted(self._run(0) for _ in range(2))
            wall = statistics.median(walls)
            return Timing(wall, walls[0], walls[1] - walls[0], wall, 0.0, None, 1, 2, self._ran)
        # The first runs load modules, choose algorithms and record XLA's command buffers.
        for which in (0, 1, 0):
            self._run_behind_head_start(which)
        busy_us = head_start()[1]
        if on_gpu():  # Twice what the host needs, in both chains.
            host_us = min(self._run_behind_head_start(1)[1] for _ in range(2))
            self._head_starts = max(1, min(16, math.ceil(2 * host_us / busy_us)))
        walls = [self._run(1) for _ in range(5)]
        pair_s = 1e-6 * sum(self._run_behind_head_start(which)[0] for which in (0, 1))
        pairs = max(5, min(40, int(budget_s / pair_s)))
        short, long, host = [], [], []
        for _ in range(pairs):
            short.append(self._run_behind_head_start(0)[0])
            total, dispatch = self._run_behind_head_start(1)
            long.append(total)
            host.append(dispatch)
        if not on_gpu():
            short, long = [0.0] * pairs, [0.5 * total for total in long]
        differences = [(b - a) / self.calls for a, b in zip(short, long, strict=True)]
        low, middle, high = statistics.quantiles(differences, n=4)
        host_us = statistics.median(host)
        return Timing(
            us=middle,
            us_min=(min(long) - min(short)) / self.calls,
            us_iqr=high - low,
            wall_us=statistics.median(walls) / (2 * self.calls),
            host_us=host_us,
            head_start_us=self._head_starts * busy_us if on_gpu() else None,
            calls=self.calls,
            pairs=pairs,
            ran=self._ran,
        )


def prepare_all(jobs: Sequence[Callable[[], Chains]]) -> list[Chains | Exception]:
    """Compiles chains side by side; one that fails is its exception and loses no other."""

    def prepare(job: Callable[[], Chains]) -> Chains | Exception:
        try:
            return job()
        except Exception as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(prepare, jobs))


def dispatch_us(call: Callable[..., Any], operands: tuple[Any, ...], repeats: int = 200) -> float:
    """The host's time in one jitted call, until it returns: the median, device time left out."""
    function = jax.jit(call)
    jax.block_until_ready(function(*operands))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*operands)
        times.append(1e6 * (time.perf_counter() - start))
        jax.block_until_ready(result)
    return statistics.median(times)
