"""How benchmarks/ times: chains, stamps, turns, and programs in processes of their own."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fp8

pytest.importorskip("tqdm")
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import (
    heuristic,
    hlo,
    nvcc,
    peers,
    server,
    stamp,
    timing,
    turns,
)


def naive(x, w):
    return jax_fp8.scaled_matmul(x, w, implementation="naive")


# --- Timing ---------------------------------------------------------------------------------------


def test_chain_is_serial_in_the_compiled_program():
    x = jax_fp8.quantize(jnp.ones((2, 16)))
    # A copy for each call: XLA's CPU compiler may drop the barriers, and then merge equal calls.
    rotated = [(jax_fp8.quantize(jnp.full((3, 16), 1.0 + i)),) for i in range(5)]
    lowered = jax.jit(timing.chain(naive, 5)).lower((x,), rotated)
    # Between each call and the one before there is a barrier ...
    assert lowered.as_text("hlo").count("opt-barrier(") == 4
    compiled = lowered.compile()
    text = compiled.as_text()
    # ... and nothing but the calls is in between.
    assert text.count("custom-call(") == 5
    assert "is_scheduled=true" in text and " copy(" not in text and " call(" not in text
    assert [float(y[0, 0]) for y in compiled((x,), rotated)[1]] == [16.0, 32.0, 48.0, 64.0, 80.0]


def test_each_call_of_a_chain_waits_for_the_one_before():
    jaxpr = jax.make_jaxpr(timing.chain(lambda x, w: x * w, 4))((1.0,), [(2.0,), (3.0,)])
    made, barriers = None, 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "optimization_barrier":
            barriers += 1
            assert made in equation.invars
            behind = set(equation.outvars)
        else:
            assert barriers == 0 or behind.issuperset(equation.invars)
            (made,) = equation.outvars
    assert barriers == 3


def test_a_fed_chain_gives_its_first_and_its_last_state():
    made = timing.fed_chain(lambda x, w: (x * w,), 3)((1.0,), [(2.0,), (5.0,)])
    assert made == ([], [(2.0,), (20.0,)])


SCHEDULED = """
%fused (p: f32[]) -> f32[] {
  ROOT %inside = f32[] fusion(%p), kind=kLoop
}
ENTRY %main {
  %x = f32[8]{0} parameter(0)
  %early.1 = f32[8]{0} fusion(%x), kind=kLoop
  %stamp = u32[2]{0} custom-call(%x), custom_call_target="benchmarks_stamp"
  %y = f32[8]{0} fusion(%early.1), kind=kLoop
  %stamp.1 = u32[2]{0} custom-call(%y), custom_call_target="benchmarks_stamp"
  ROOT %late = f32[8]{0} copy(%y)
}
"""


def test_what_runs_before_between_and_after_stamps():
    assert stamp.kernels(SCHEDULED) == [["early.1"], ["y"], ["late"]]
    assert len(stamp.kernels(SCHEDULED.replace("benchmarks_stamp", "other"))) == 1
    nanoseconds = np.array([5_000_000_000, 5_000_001_500], np.uint64)
    assert stamp.between(*nanoseconds.reshape(2, 1).view(np.uint32)) == 1.5


@pytest.mark.gpu
def test_stamps_enclose_a_chain():
    if not stamp.available():
        pytest.skip("no nvcc")
    x = jnp.ones((2048, 2048))
    for make in (timing.chain, timing.fed_chain):
        run = jax.jit(make(lambda x, w: (x @ w,), 6, (0, 2, 6)))
        compiled = run.lower((x,), [(x,)]).compile()
        before, one, two, after = map(len, stamp.kernels(compiled.as_text()))
        assert (before, after) == (0, 0) and two == 2 * one
        (a, b, c), results = compiled((x,), [(x,)])
        assert len(results) == (6 if make is timing.chain else 2)
        # 17 GFLOP a call at less than 1 PFLOP/s, and at more than 1 TFLOP/s.
        assert 2 * 17 < stamp.between(a, b) < 2 * 17e3
        assert 4 * 17 < stamp.between(b, c) < 4 * 17e3


@pytest.mark.parametrize("make", [timing.chain, timing.fed_chain])
def test_stamps_stand_between_the_calls(make, monkeypatch):
    monkeypatch.setattr(stamp, "stamp", jnp.cos)
    run = make(lambda x, w: (jnp.sin(x) + w,), 3, (0, 1, 3))
    jaxpr = jax.make_jaxpr(run)((1.0,), [(2.0,)])
    assert len(jax.tree.leaves(jax.eval_shape(run, (1.0,), [(2.0,)])[0])) == 3
    done = []  # In the order in which they must run, for each waits for the one before.
    waits = set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "optimization_barrier":
            assert not done or waits.intersection(equation.invars)
            waits = set(equation.outvars)
        elif name in ("cos", "jit", "pjit", "sin"):
            done.append("stamp" if name == "cos" else "call")
            assert len(done) == 1 or waits.intersection(equation.invars)
            waits = set(equation.outvars)
        else:
            waits |= set(equation.outvars)
    assert done == ["stamp", "call", "stamp", "call", "call", "stamp"]


@pytest.mark.parametrize("make", [timing.chain, timing.fed_chain])
def test_stamps_wait_for_all_results(make, monkeypatch):
    monkeypatch.setattr(stamp, "stamp", jnp.cos)
    run = make(lambda x, y: (x + 1, y + 1), 1, (0, 1))
    made = {}  # Which equation made a variable.
    for equation in jax.make_jaxpr(run)((1.0, 2.0), [()]).eqns:
        made |= dict.fromkeys(equation.outvars, equation)
        if equation.primitive.name == "cos":
            barrier = made[equation.invars[0]]
            assert barrier.primitive.name == "optimization_barrier" and len(barrier.invars) == 2


def clock(after):
    """In place of a stamp: as many microseconds as what it waits for says."""
    return jnp.stack([(1000 * after[0]).astype(jnp.uint32), jnp.uint32(0)])


@pytest.mark.parametrize("feed, us", [(True, 1.0), (False, 4.0)])
def test_chains_read_their_stamps(feed, us, monkeypatch):
    monkeypatch.setattr(stamp, "available", lambda: True)
    monkeypatch.setattr(stamp, "stamp", clock)
    monkeypatch.setattr(stamp, "kernels", lambda text: [[], ["a"], ["a", "b"], []])
    # Fed, the sum is 0, 2 and 6 at the stamps. Else each call gives its own: 6 is the last operand
    # before the first of them, then 2 and 6, and (t(2n) - t(n)) / n is (4 - -4) / 2.
    rotated = [(jnp.full(1, 1.0 if feed else i + 1.0),) for i in range(6)]
    chains = timing.Chains(lambda x, w: (x + w,), (jnp.zeros(1),), rotated, 600.0, feed=feed)
    (found,) = turns.by_turns([chains])
    assert (found["us"], found["us_iqr"], found["calls"]) == (us, 0.0, 2)
    assert found["stamped"] and found["kernels"] == [0, 1, 2, 0] and found["leads"] == 1
    runs = []
    (program,) = chains._programs
    monkeypatch.setattr(chains, "_programs", [lambda *a: runs.append(program(*a)) or runs[-1]])
    chains.pair(leads=3)
    assert len(runs) == 4
    assert chains.first()[0] == 1.0


@pytest.mark.parametrize("kernels", [[1, 4, 8, 0], [0, 4, 8, 1], [0, 4, 4, 0]])
def test_what_the_stamps_do_not_enclose_is_told(kernels, monkeypatch):
    monkeypatch.setattr(stamp, "available", lambda: True)
    monkeypatch.setattr(stamp, "stamp", clock)
    monkeypatch.setattr(stamp, "kernels", lambda text: [["k"] * count for count in kernels])
    with pytest.warns(UserWarning, match="kernels between the stamps"):
        timing.Chains(lambda x: x + 1, (), [(jnp.ones(8),)], 600.0)


def test_calls_and_copies():
    assert timing.calls_for(timing.CHAIN_US) == 1
    assert timing.calls_for(1e-3) >= 2
    assert timing.copies_for(1 << 40, 8) == 1 + (not timing.on_gpu())
    assert timing.copies_for(1, 8) <= 16


def test_options_that_xla_does_not_know_are_dropped():
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    with pytest.warns(UserWarning, match="no option xla_of_another_time"):
        compiled = timing.compile_with(lowered, {"xla_of_another_time": True, **timing.SERIAL})
    assert compiled(1.0) == 2.0


class Made:
    """Pairs that are known, in the order in which they were asked for."""

    def __init__(self, name, each, log, calls=10, fails_at=None):
        self.name, self.each, self.calls, self.log = name, each, calls, log
        self.fails_at, self.count = fails_at, 0

    def warm(self):
        self.log.append(f"warm {self.name}")

    def pair(self, leads=1):
        self.log.append(self.name)
        self.leads = leads
        self.count += 1
        if self.count == self.fails_at:
            raise RuntimeError("no such luck")
        return 7.0, 7.0 + self.calls * self.each(self.count)

    def facts(self):
        return {"called": self.name}


def test_by_turns_takes_pairs_of_each_until_they_agree():
    log = []
    steady = Made("a", lambda count: 3.0, log)
    noisy = Made("b", lambda count: 5.0 + count % 3, log)
    gone = ValueError("gone")
    a, lost, b = turns.by_turns([steady, gone, noisy], budget_s=60)
    assert log[:2] == ["warm a", "warm b"]
    rounds = [log[i : i + 2] for i in range(2, 2 + 2 * turns.LEAST_PAIRS, 2)]
    assert {tuple(each) for each in rounds} == {("a", "b"), ("b", "a")}
    assert set(log[12:]) == {"b"} and noisy.count == turns.MOST_PAIRS
    assert lost is gone
    assert (a["us"], a["us_iqr"], a["pairs"], a["called"]) == (3.0, 0.0, turns.LEAST_PAIRS, "a")
    assert b["us"] == 6.0 and b["us_min"] == 5.0 and b["pairs"] == turns.MOST_PAIRS


def test_what_heats_the_card_runs_for_a_while_before_each_pair():
    log = []
    slow, fast = (
        Made(name, lambda count: 200.0, log, calls) for name, calls in (("a", 10), ("b", 1))
    )
    found = turns.by_turns([slow, fast], budget_s=60, lead_s=0.05)
    assert [row["pairs"] for row in found] == [turns.LEAST_PAIRS] * 2
    # A pair is 7 and 2007 us of the one, 7 and 207 of the other. One more says how long it takes.
    assert [row["leads"] for row in found] == [slow.leads, fast.leads] == [25, 234]
    assert slow.count == fast.count == 1 + turns.LEAST_PAIRS
    # Much arithmetic for its bytes, that of one row, and little of both.
    assert timing.lead_s(1e8, 1e12) == turns.LEAD_S
    assert timing.lead_s(1e8, 2e8) == timing.lead_s(1e6, 1e10) == 0.0


def test_by_turns_keeps_within_its_budget_and_loses_only_what_fails():
    log = []
    noisy = Made("a", lambda count: 5.0 + count % 3, log)
    failing = Made("b", lambda count: 1.0, log, fails_at=2)
    a, b = turns.by_turns([noisy, failing], budget_s=0.0)
    assert a["pairs"] == turns.LEAST_PAIRS
    assert isinstance(b, RuntimeError) and failing.count == 2


# --- What ran -------------------------------------------------------------------------------------

# Lines of what XLA made of jax.numpy on an H200, with jax 0.11.2.
CUBLASLT_F8 = """
  %loop_convert_fusion = f8e4m3fn[2048,4096]{1,0} fusion(%x.1, %a), kind=kLoop, calls=%fused_convert
  %wq.1 = f8e4m3fn[4096,4096]{1,0} parameter(1), metadata={op_name="wq"}
  %fusion.6 = f32[] fusion(%b), kind=kLoop, calls=%fused_computation.3
  %constant_13 = f32[] constant(1)
  %cublas-gemm.1 = (f32[2048,4096]{1,0}, s8[33554432]{0}) custom-call(%loop_convert_fusion, %wq.1, \
%fusion.6, %constant_13), custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(raw)"}
"""
TRITON_F8 = """
%gemm_fusion_dot_general.1_computation (parameter_0: f8e4m3fn[2048,4096], ...) -> bf16[2048,4096] {
  %parameter_0 = f8e4m3fn[2048,4096]{1,0} parameter(0), metadata={scheduling_name="parameter_0"}
  %parameter_1 = f8e4m3fn[4096,4096]{1,0} parameter(1), metadata={scheduling_name="parameter_1"}
  %dot_general.0 = bf16[2048,4096]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}
  %parameter_2 = bf16[] parameter(2), metadata={scheduling_name="parameter_2"}
}
%other_computation {
  %parameter_0 = bf16[2048,4096]{1,0} parameter(0)
}
  ROOT %gemm_fusion_dot_general.1 = bf16[2048,4096]{1,0} fusion(%loop_convert_fusion, %wq.1), \
kind=kCustom, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
"""
CUBLASLT_BF16 = """
  %wrapped_multiply = bf16[1,2048,4096]{2,1,0} fusion(%wrapped_convert, %bitcast.5.0), kind=kLoop
  %wrapped_multiply.1 = bf16[1,4096,4096]{2,1,0} fusion(%wrapped_convert.2, %b), kind=kLoop
  %custom-call.1 = (bf16[1,2048,4096]{2,1,0}, s8[33554432]{0}) custom-call(%wrapped_multiply, \
%wrapped_multiply.1), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(nnsm)"}
"""
OURS = """
  %x = f8e4m3fn[1,16,64]{2,1,0} parameter(0)
  %s = f32[1,1,1]{2,1,0} parameter(1)
  %w = f8e4m3fn[1,32,64]{2,1,0} parameter(2)
  %quantized = (f8e4m3fn[1,16,64]{2,1,0}, f32[1]{0}) custom-call(%a), \
custom_call_target="jax_fp8_quantize"
  %y = (bf16[1,16,32]{2,1,0}, f32[0]{0}) custom-call(%x, %s, %w, %s), \
custom_call_target="jax_fp8_scaled_matmul"
"""


@pytest.mark.parametrize(
    "text, found, fp8",
    [
        (CUBLASLT_F8, ["f8 by cublasLt"], True),
        (TRITON_F8, ["f8 by Triton"], True),
        (TRITON_F8.replace("f8e4m3fn[4096", "bf16[4096"), ["bf16 by Triton"], False),
        (TRITON_F8.replace("__triton", "__other"), ["f8 by XLA"], True),
        (CUBLASLT_BF16, ["bf16 by cublasLt"], False),
        (CUBLASLT_BF16.replace("bf16", "f32"), ["f32 by cublasLt"], False),
        (CUBLASLT_F8 + CUBLASLT_BF16, ["f8 by cublasLt", "bf16 by cublasLt"], False),
        (OURS, ["f8 by jax_fp8"], True),
        ("  %c = f32[2]{0} add(%a, %b)", [], False),
    ],
)
def test_what_multiplies_is_read_off_the_program(text, found, fp8):
    assert hlo.products(text) == found
    assert hlo.ran_fp8(found) is fp8


def test_what_multiplies_here():
    program = jax.jit(lambda x, w: x @ w.T).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile()
    if not timing.on_gpu():
        assert hlo.products(program.as_text()) == ["f32 by XLA"]
    q = jax_fp8.quantize(jnp.ones((16, 32)))
    assert hlo.products(jax.jit(naive).lower(q, q).compile().as_text()) == ["f8 by jax_fp8"]


# --- Programs in processes of their own -----------------------------------------------------------

ECHO = """
import json, sys
for line in sys.stdin:
    if line.startswith("die"):
        sys.exit("as told")
    if line.startswith("sleep"):
        import time; time.sleep(60)
    verb, *rest = line.split()
    leads = int(rest[-1]) if verb == "pair" else 0
    pair = {"pair": [1.5, 1.5 + 3 * leads], "leads_last": leads}
    answers = {"pair": pair, "open": {"said": rest}}
    print(json.dumps(answers.get(verb, {"error": f"no {verb}"})), flush=True)
"""


@pytest.fixture
def echo():
    made = server.Server([sys.executable, "-c", ECHO], "echo")
    yield made
    made.close()


def test_a_server_takes_part_in_a_timing(echo):
    remote = server.Remote(echo, 0, 3, "open 0 16 32")
    assert remote.pair(5) == (1.5, 16.5)  # It is told the leads.
    (found,) = turns.by_turns([remote])
    assert found["us"] == 1.0 and found["calls"] == 3 and found["said"] == ["0", "16", "32"]
    assert found["leads_last"] == 1  # What it says behind a pair is kept.


def test_what_a_server_refuses_and_how_it_ends(echo):
    with pytest.raises(RuntimeError, match="echo: no such"):
        echo.ask("such thing")
    with pytest.raises(server.Unavailable, match="ended at 'die': as told"):
        echo.ask("die")
    with pytest.raises(server.Unavailable, match="it was closed|as told"):
        echo.ask("open")


def test_a_server_that_does_not_answer_is_ended(echo):
    with pytest.raises(server.Unavailable, match="ended at 'sleep'"):
        echo.ask("sleep", timeout_s=0.2)


def test_native_program_that_cannot_be_built_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "no-nvcc"))
    with pytest.raises(server.Unavailable, match="no-nvcc"):
        heuristic.start.__wrapped__()


@pytest.mark.gpu
def test_cublaslt_from_cpp():
    try:
        nvcc.find_nvcc()
    except server.Unavailable as error:
        pytest.skip(str(error))
    started = heuristic.start()
    for row in (False, True):
        best = heuristic.best(started, 0, (16, 256, 512), row, 10.0)
        (found,) = turns.by_turns([best])
        assert found["us"] > 0 and found["index"] < found["candidates"]
    assert started.ask(f"copy {1 << 26}")["gb_per_s"] > 0
    with pytest.raises(RuntimeError, match="not a problem"):
        started.ask("open 0 1 2")
    started.ask("close")
    with pytest.raises(RuntimeError, match="not understood: pair 0 1"):
        started.ask("pair 0 1")


@pytest.mark.gpu
def test_torch_multiplies_what_it_was_captured_with():
    started = peers._start_torch()
    if started is None:
        pytest.skip("torch is not installed")
    try:
        line = "16 256 512 2 2 100.0"
        first = server.Remote(started, 0, 2, f"open 0 torch_row {line}")
        second = server.Remote(started, 1, 2, f"open 1 torch_tensor {line}")
        for found in turns.by_turns([first, second], lead_s=1e-3):  # What one let go, one has.
            assert found["us"] > 0 and 0.02 < found["rms_error"] < 0.05
    finally:
        started.close()
