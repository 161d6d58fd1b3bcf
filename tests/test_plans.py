"""plans() tells what ran, and how often."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import operand, sample

import jax_fp8


@pytest.fixture(autouse=True)
def empty():
    jax_fp8.clear_plans()
    yield
    jax_fp8.clear_plans()


def platform():
    return {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]


def one_plan(**wanted):
    (plan,) = (p for p in jax_fp8.plans() if wanted.items() <= p.items())
    return plan


def test_nothing_has_run():
    assert jax_fp8.plans() == []


def test_a_quantization(handlers, rng):
    x = jnp.asarray(sample(rng, "normal", (2, 3, 40)), jnp.bfloat16)
    for _ in range(3):
        q = jax_fp8.quantize(x, granularity=(128, 128), implementation="kernel")
    jax.block_until_ready(q)
    assert jax_fp8.plans() == [
        {
            "operation": "quantize",
            "implementation": "kernel",
            "platform": platform(),
            "when": "run",
            "count": 3,
            "shape": [2, 3, 40],
            "dtypes": ["bfloat16", "float8_e4m3fn"],
            "granularity": "(128, 128)",
            "scaling": "dynamic",
        }
    ]


def test_static_and_dynamic_are_told_apart(handlers, rng):
    x = sample(rng, "normal", (3, 40))
    for scale in (None, 1.0):
        jax.block_until_ready(jax_fp8.quantize(x, scale=scale, implementation="kernel"))
    assert sorted(p["scaling"] for p in jax_fp8.plans()) == ["dynamic", "static"]


def test_a_product(handlers, rng):
    x = operand(rng, (2, 3, 40), ref.E5M2, "row")
    w = operand(rng, (5, 40), ref.E4M3, (1, 128))
    y = jax_fp8.scaled_matmul(x, w, implementation="naive", precision="highest")
    y.block_until_ready()
    assert jax_fp8.plans() == [
        {
            "operation": "scaled_matmul",
            "implementation": "naive",
            "platform": platform(),
            "when": "run",
            "count": 1,
            "shape": [1, 6, 5, 40],
            "dtypes": ["float8_e5m2", "float8_e4m3fn", "bfloat16"],
            "granularity": ["row", "(1, 128)"],
            "accumulation": "precise",
        }
    ]


def test_what_is_left_to_xla_is_marked_as_traced(rng):
    x = jnp.asarray(sample(rng, "normal", (3, 43)))
    multiply = jax.jit(lambda x, w: jax_fp8.matmul(x, w, implementation="xla"))
    w = operand(rng, (7, 43), granularity="row")
    for _ in range(3):
        multiply(x, w).block_until_ready()
    quantized = one_plan(operation="quantize")
    product = one_plan(operation="scaled_matmul")
    assert product["shape"] == (1, 3, 7, 43)
    assert product["granularity"] == ("tensor", "row")
    for plan in (quantized, product):
        assert (plan["implementation"], plan["when"], plan["count"]) == ("xla", "traced", 1)
        assert plan["platform"] == "any"


def test_the_default_on_a_cpu_is_xla(rng):
    if jax.default_backend() != "cpu":
        pytest.skip("the default on a GPU is a handler")
    x, w = operand(rng, (3, 44)), operand(rng, (7, 44))
    jax_fp8.scaled_matmul(x, w).block_until_ready()
    assert one_plan(operation="scaled_matmul")["platform"] == "cpu"
    assert one_plan(operation="scaled_matmul")["implementation"] == "xla"


def test_clear_plans(rng):
    jax_fp8.quantize(sample(rng, "normal", (3, 45)), implementation="kernel")
    jax_fp8.quantize(sample(rng, "normal", (3, 45)), implementation="xla")
    assert len(jax_fp8.plans()) == 2
    jax_fp8.clear_plans()
    assert jax_fp8.plans() == []


def test_what_is_returned_is_the_callers_own(handlers, rng):
    jax.block_until_ready(jax_fp8.quantize(np.ones((3, 46)), implementation="kernel"))
    jax_fp8.plans()[0]["count"] = 1000
    assert jax_fp8.plans()[0]["count"] == 1


def test_counts_from_two_threads(handlers, rng):
    x = jnp.asarray(sample(rng, "normal", (3, 47)))

    def work():
        for _ in range(50):
            jax.block_until_ready(jax_fp8.quantize(x, implementation="kernel"))
            jax_fp8.plans()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one_plan(operation="quantize")["count"] == 100


@pytest.mark.gpu
def test_a_plan_of_cublaslt(rng):
    x, w = operand(rng, (3, 64)), operand(rng, (32, 64))
    jax_fp8.scaled_matmul(x, w, implementation="cublaslt").block_until_ready()
    plan = one_plan(operation="scaled_matmul", implementation="cublaslt")
    assert (plan["shape"], plan["accumulation"], plan["count"]) == ([1, 3, 32, 64], "fast", 1)
    assert plan["algorithm"].startswith("id ") and "tile" in plan["algorithm"]
    assert 0 <= plan["workspace"] <= 32 << 20
    assert plan["cublaslt"].count(".") == 2
