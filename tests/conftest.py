"""What the tests run on: implementations by platform, and GPUs that are skipped or demanded."""

import functools
import importlib.metadata
import os

# Tests in processes of their own need GPU memory too; and the products that XLA itself makes there,
# which are compared and not tested, need no timing of candidates.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_gpu_autotune_level=0"
    # Where XLA has its older emitters for CPUs, they take half of the time for a small program.
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)
# No test takes an algorithm that another one has left in the user's cache.
os.environ["JAX_FP8_CACHE_DIR"] = ""

import jax
import numpy as np
import pytest


@functools.cache
def cuda_devices() -> tuple[int, str]:
    """How many there are, and, where none, why."""
    try:
        return len(jax.devices("cuda")), ""
    except RuntimeError as error:
        return 0, f": {error}"


def pytest_configure(config):
    # pyproject.toml declares these; once more for a run without it.
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "multigpu: needs two GPUs or more")
    config.addinivalue_line("markers", "slow: many numbers, or trains for long")
    config.addinivalue_line("markers", "ends: many programs")
    # Thousands of problems, few of which are about the choice of cublasLt's algorithm.
    import jax_fp8

    jax_fp8.set_plan_choice("heuristic")
    # Programs are many here, and small: on a CPU, XLA's optimizations take longer than they save.
    if jax.default_backend() == "cpu" and "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # Processes of their own, too.
        jax.config.update("jax_disable_most_optimizations", True)


def pytest_runtest_setup(item):
    needed = 2 if item.get_closest_marker("multigpu") else 1
    if needed == 1 and not item.get_closest_marker("gpu"):
        return
    found, reason = cuda_devices()
    if found < needed:
        message = f"needs {needed} CUDA device(s), found {found}{reason}"
        if os.environ.get("JAX_FP8_REQUIRE_GPU") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


@pytest.fixture(scope="module")
def optimized():
    """With XLA's optimizations: for what is compared to the last bit, and what runs long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def on_platforms(cpu, gpu):
    """Parameters (platform, value); those of the GPU carry its mark."""
    return [pytest.param(("cpu", value), id=f"cpu-{value or 'default'}") for value in cpu] + [
        pytest.param(("gpu", value), id=f"gpu-{value or 'default'}", marks=pytest.mark.gpu)
        for value in gpu
    ]


def value_on_this_platform(request):
    platform, value = request.param
    if platform != jax.default_backend():
        pytest.skip(f"runs where the default backend is {platform}")
    return value


@pytest.fixture(params=on_platforms(("naive", "xla"), ("cublaslt", "decode", "naive", "xla", None)))
def implementation(request):
    """Of a product."""
    return value_on_this_platform(request)


@pytest.fixture(params=on_platforms(("kernel", "xla"), ("kernel", "xla", None)))
def quantizer(request):
    """The implementation of quantize."""
    return value_on_this_platform(request)


@pytest.fixture(params=on_platforms(("kernel", "xla"), ("kernel",)))
def fuser(request):
    """The implementation of a fused producer."""
    return value_on_this_platform(request)


@pytest.fixture(params=on_platforms(("handlers",), ("handlers",)))
def handlers(request):
    """For what the handlers of both platforms share."""
    return value_on_this_platform(request)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def forced_capability(monkeypatch):
    """A function that makes products take the branch of another GPU."""
    from jax_fp8._src import scaled_matmul

    return lambda capability: monkeypatch.setattr(scaled_matmul, "_forced_capability", capability)
