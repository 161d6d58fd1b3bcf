"""Device time per call, from chains of calls inside one jit.

A chain of calls is one compiled program. Each call's operands pass through an optimization
barrier together with the result before, so the calls are scheduled one after the other and none
is merged with another; one operand rotates over copies that together exceed the L2 cache. Every
result is returned, so none is dead. Stamps of the device's clock (``stamp.py``) stand before the
first call, after n and after 3n: the time of a call is ``(t(2n) - t(n)) / n``, which leaves out
what the stamps themselves cost. A chain runs right before it is timed, once or as often as
``turns.py`` wants. What the host takes for each argument and result is hidden behind a kernel that
keeps the device busy before that.
"""

from __future__ import annotations

import functools
import math
import os
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
from benchmarks import hlo, stamp, turns

#: Rates above those of any one GPU of today, so that a floor from them is below any time.
PEAK_BYTES_PER_S = 4.8e12
PEAK_FLOP_PER_S = {"fp8": 2.0e15, "16bit": 1.0e15, "naive": 1.0e12}

#: Together the copies of the rotated operand take this. Of 60 MB of L2 with random replacement
#: exp(-512 / 60) of it survives a round, so a call reads from memory what a cold one would.
ROTATED_BYTES = 512 << 20
CHAIN_US = 1000.0
MAX_CALLS = 32
#: About what one kernel of a head start takes.
HEAD_START_US = 500.0
#: Arithmetic that takes less heats nothing.
HEATING_US = 10.0
#: Without it two calls of one command buffer could run at once where no buffer orders them.
SERIAL = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}


def on_gpu() -> bool:
    """Whether the default backend is a GPU."""
    return jax.default_backend() == "gpu"


def floor_us(nbytes: float, flop: float = 0.0, unit: str = "16bit") -> float:
    """The least time for so many bytes and operations, by the rates above."""
    return 1e6 * max(nbytes / PEAK_BYTES_PER_S, flop / PEAK_FLOP_PER_S[unit])


def lead_s(nbytes: float, flop: float) -> float:
    """``turns.LEAD_S`` where arithmetic takes longer than memory, in FP8 at their peak rates.

    Not of a call so short that the host could not keep the device busy with chains of it.
    """
    least = floor_us(0.0, flop, "fp8")
    return turns.LEAD_S if least > max(HEATING_US, floor_us(nbytes)) else 0.0


def calls_for(floor: float) -> int:
    """n: calls that take at least CHAIN_US, up to MAX_CALLS; a few where there is no GPU."""
    most = MAX_CALLS if on_gpu() else 2
    return max(1, min(most, math.ceil(CHAIN_US / floor)))


def copies_for(nbytes: int, calls: int) -> int:
    """Copies of an operand that rotates: beyond the L2 cache, but no more than calls."""
    total = ROTATED_BYTES if on_gpu() else nbytes
    return max(1, min(3 * calls, 1 + total // nbytes))


def chain(call: Callable[..., Any], calls: int, marks: Sequence[int] = ()) -> Callable[..., Any]:
    """A function of ``(fixed, rotated)`` that makes ``calls`` calls, one after the other.

    Call i is ``call(*fixed, *rotated[i % len(rotated)])``. The results are the stamps, one before
    each call that ``marks`` names (``calls`` is behind the last), and all that the calls give.
    """
    call = jax.jit(call)  # Traced once, however often it is called.

    def run(fixed: tuple[Any, ...], rotated: Sequence[tuple[Any, ...]]) -> Any:
        stamps: list[Any] = []
        results: list[Any] = []
        before: list[Any] = []  # Its last is what the next call waits for.
        for i in range(calls + 1):
            if i in marks:
                before = stamps
                stamps.append(_stamp(results[-1] if results else (fixed, rotated)))
            if i == calls:
                break
            operands = (*fixed, *rotated[i % len(rotated)])
            if before:
                operands, before[-1] = lax.optimization_barrier((operands, before[-1]))
            results.append(call(*operands))
            before = results
        return stamps, results

    return run


def fed_chain(
    call: Callable[..., Any], calls: int, marks: Sequence[int] = ()
) -> Callable[..., Any]:
    """A function of ``(state, rotated)`` in which each call takes the state of the one before.

    Call i is ``state = call(*state, *rotated[i % len(rotated)])``. What the compiler can do
    between one call and the next it may do, as in the layers of a model. The results are the
    stamps, as in ``chain``, and the first and the last state.
    """

    def run(state: tuple[Any, ...], rotated: Sequence[tuple[Any, ...]]) -> Any:
        stamps: list[Any] = []
        states: list[Any] = []
        for i in range(calls + 1):
            if i in marks:
                state, at = lax.optimization_barrier((state, _stamp(state)))
                stamps.append(at)
            if i == calls:
                return stamps, [*states, state]
            state = call(*state, *rotated[i % len(rotated)])
            states = states or [state]

    return run


def _stamp(after: Any) -> jax.Array:
    # Behind all of it: what a stamp does not wait for may run after it.
    return stamp.stamp(jax.tree.leaves(lax.optimization_barrier(after))[-1])


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


def _wait(results: Any) -> None:
    # The results of one program are ready together; to ask each one would cost the host's time.
    jax.tree.leaves(results)[-1].block_until_ready()


def _wall_us(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    _wait(function())
    return 1e6 * (time.perf_counter() - start)


class Chains:
    """The compiled chain of n and, behind them, 2n calls of one function on its operands.

    It is timed right behind a first run of it: what comes first after a pause, or after another
    process, takes another time than what follows. Without stamps there are two programs, and the
    host's clock times both.

    Args:
      call: what is timed.
      fixed: its first operands, the same for each call; with ``feed`` the state that goes in.
      rotated: its further operands, by turns.
      floor: microseconds that a call takes at least, which sets n.
      options: for XLA's compiler.
      feed: whether each call takes the result of the one before.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        fixed: tuple[Any, ...],
        rotated: Sequence[tuple[Any, ...]],
        floor: float,
        options: dict[str, Any] | None = None,
        feed: bool = False,
    ) -> None:
        self.calls = calls_for(floor)
        self._head_starts = 1
        self._host_us = 0.0
        self._operands = (fixed, rotated)
        self._stamped = stamp.available()
        marks = (0, self.calls, 3 * self.calls) if self._stamped else ()
        make = fed_chain if feed else chain
        start = time.perf_counter()
        self._programs = [
            compile_with(
                jax.jit(make(call, length, marks)).lower(fixed, rotated),
                {**SERIAL, **(options or {})},
            )
            for length in ((3 * self.calls,) if self._stamped else (self.calls, 2 * self.calls))
        ]
        self._prepare_s = time.perf_counter() - start
        self._plans: list[str] = []
        text = self._programs[-1].as_text()
        targets = set(re.findall(r'custom_call_target="([^"]+)"', text)) - {stamp.TARGET}
        self._ran = ", ".join(sorted(targets))
        self._multiplied = hlo.products(text)
        self._kernels = [len(names) for names in stamp.kernels(text)]
        if self._stamped:
            before, short, long, after = self._kernels
            # A few more or less where the compiler fuses calls with one another.
            if before or after or abs(long - 2 * short) > short / 4:
                warnings.warn(f"kernels between the stamps: {self._kernels}", stacklevel=2)

    def first(self) -> Any:
        """The result of the first call."""
        return self._programs[0](*self._operands)[1][0]

    def facts(self) -> dict[str, Any]:
        """What it ran and how.

        Returns:
          ``ran``: the targets that the compiled chain calls, empty where XLA made kernels of its
          own; ``multiplied``: what ``hlo.products`` says of it; ``plans``: the implementations and
          algorithms that ``jax_fp8.plans`` says it ran; ``stamped``: whether the clock is the
          device's; ``kernels``: how many XLA runs before the first stamp, between each two, and
          after the last; ``prepare_s``: seconds until the chain was compiled, beside others;
          ``host_us``: the host's time in dispatching it; ``head_start_us``: what the device was
          busy with meanwhile, which should be more, None where there was none.
        """
        return {
            "ran": self._ran,
            "multiplied": self._multiplied,
            "plans": self._plans,
            "stamped": self._stamped,
            "kernels": self._kernels,
            "prepare_s": self._prepare_s,
            "host_us": self._host_us,
            "head_start_us": self._head_starts * head_start()[1] if on_gpu() else None,
        }

    def _run(self, which: int = 0, leads: int = 1) -> tuple[float, list[Any]]:
        """The host's microseconds until a program's results are there, and its stamps."""
        busy, _ = head_start()
        start = time.perf_counter()
        for _ in range(self._head_starts):
            busy()
        for _ in range(leads if self._stamped else 0):
            self._programs[which](*self._operands)
        stamps, results = self._programs[which](*self._operands)
        if leads == 1:  # More are hidden behind each other.
            self._host_us = 1e6 * (time.perf_counter() - start)
        _wait((stamps, results))
        return 1e6 * (time.perf_counter() - start), stamps

    def warm(self) -> None:
        """The first runs load modules, choose algorithms and record XLA's command buffers."""
        head_start()
        jax_fp8.clear_plans()
        _wait(self._programs[0](*self._operands))
        self._plans = sorted(
            {
                " ".join(filter(None, (plan["implementation"], plan.get("algorithm"))))
                for plan in jax_fp8.plans()
                if plan["when"] == "run" and plan["operation"] in ("scaled_matmul", "fused_matmul")
            }
        )
        host_us = []
        for _ in range(3):
            for which in range(len(self._programs)):
                self._run(which)
            host_us.append(self._host_us)
        if on_gpu():  # Twice what the host needs.
            self._head_starts = max(1, min(16, math.ceil(2 * min(host_us) / head_start()[1])))

    def pair(self, leads: int = 1) -> tuple[float, float]:
        """Microseconds of n and of 2n calls, behind 3n ``leads`` times; on a CPU of none and n."""
        if self._stamped:
            _, (a, b, c) = self._run(leads=leads)
            return stamp.between(a, b), stamp.between(b, c)
        if not on_gpu():  # There is no head start that would make the difference mean something.
            return 0.0, 0.5 * self._run(1)[0]
        return self._run(0)[0], self._run(1)[0]


def prepare_all(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Compiles chains side by side; one that fails is its exception and loses no other."""

    def prepare(job: Callable[[], Any]) -> Any:
        try:
            return job()
        except Exception as error:
            return error

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(prepare, jobs))


def dispatch_us(
    call: Callable[..., Any],
    operands: tuple[Any, ...],
    repeats: int = 200,
    warm: int = 5,
    moving: bool = False,
) -> float:
    """The host's time in one jitted call, until it returns: the median, device time left out.

    The calls of the warm-up are those in which XLA records its command buffers. With ``moving`` the
    last result is held during a call, so that the next one lies elsewhere and XLA writes the
    command buffers anew.
    """
    function = jax.jit(call)  # Of the same call it is the same: turns compile once.
    times, held = [], []
    for _ in range(warm + repeats):
        start = time.perf_counter()
        result = function(*operands)
        times.append(1e6 * (time.perf_counter() - start))
        jax.block_until_ready(result)
        held[:] = [result] if moving else []
        del result
    return statistics.median(times[warm:])
