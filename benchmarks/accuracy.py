"""The error of products by K: fast against precise accumulation, and the other implementations."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jax_fp8
from benchmarks import tables, timing

Row = dict[str, Any]

KEYS = ("k", "data")
FIGURES = ("rms_error_over_rms",)
SIZE = 256
K = {
    "smoke": (64, 128),
    "quick": (512, 4096),
    "all": (128, 512, 1024, 4096, 16384, 65536),
}
DATA = {"normal": lambda values: values, "all positive": np.abs}
#: name -> (implementation, precision)
VARIANTS_GPU = {
    "cublaslt_fast": ("cublaslt", None),
    "cublaslt_precise": ("cublaslt", "highest"),
    "decode": ("decode", None),
    "naive": ("naive", None),
}
VARIANTS_CPU = {"xla": ("xla", None), "naive": ("naive", None)}


def _error(x: jax_fp8.ScaledArray, w: jax_fp8.ScaledArray, call: tuple[str, Any]) -> Row:
    """Against float64 over the same FP8 values, with float32 output."""
    implementation, precision = call
    got = jax_fp8.scaled_matmul(
        x,
        w,
        preferred_element_type=jnp.float32,
        precision=precision,
        implementation=implementation,
    )
    wide_x, wide_w = (np.asarray(jax_fp8.dequantize(a)).astype(np.float64) for a in (x, w))
    expected = wide_x @ wide_w.T
    off = np.asarray(got).astype(np.float64) - expected
    rms = float(np.sqrt(np.mean(expected**2)))
    return {
        "rms_error_over_rms": float(np.sqrt(np.mean(off**2))) / rms,
        "max_error_over_rms": float(np.abs(off).max()) / rms,
        "mean_error_over_rms": float(off.mean()) / rms,
    }


def run(shapes: str = "all") -> list[Row]:
    """Measures the errors.

    Args:
      shapes: a key of ``K``.

    Returns:
      A row for each K, kind of data and variant: the root mean square, the largest and the mean
      error, each over the root mean square of the exact product of SIZE x SIZE elements.
    """
    variants = VARIANTS_GPU if timing.on_gpu() else VARIANTS_CPU
    generator = np.random.default_rng(0)
    rows: list[Row] = []
    with tqdm(total=len(K[shapes]) * len(DATA) * len(variants), desc="accuracy") as bar:
        for k in K[shapes]:
            for kind, shape_of in DATA.items():
                x, w = (
                    jax_fp8.quantize(
                        jnp.asarray(shape_of(generator.standard_normal((SIZE, k))), jnp.float32)
                    )
                    for _ in range(2)
                )
                for name, call in variants.items():
                    row = {"k": k, "data": kind, "variant": name}
                    try:
                        row |= _error(x, w, call)
                    except Exception as error:
                        row |= tables.failure(error)
                    rows.append(row)
                    bar.update()
    return rows


def table(results: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    names = list(dict.fromkeys(row["variant"] for row in results))

    def cell(group: tables.Group, name: str) -> str:
        error = tables.value(group, name, "rms_error_over_rms")
        mean = tables.value(group, name, "mean_error_over_rms")
        if error is None or mean is None:
            return "-"
        return f"{error:.1e} ({100 * mean:+.1f} %)" if abs(mean) > 5e-3 else f"{error:.1e}"

    lines = [
        [data, str(k), *(cell(group, name) for name in names)]
        for (data, k), group in tables.groups(results, ("data", "k")).items()
    ]
    lines.sort(key=lambda line: list(DATA).index(line[0]))
    title = (
        "RMS error over the RMS of the exact product, E4M3 operands with tensor scales, float32"
        " output; the mean error beside it where it is more than 0.5 %."
    )
    return f"{title}\n\n{tables.markdown(['data', 'K', *names], lines)}"
