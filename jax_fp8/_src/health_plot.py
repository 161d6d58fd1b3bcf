"""plot_health: the statistics of quantized operands as a picture, layer by layer."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from jax_fp8._src.health import OPERANDS

PANELS = {
    "amax": ("largest magnitude", "log"),
    "saturated": ("share that saturated", "linear"),
    "flushed": ("share that became zero", "linear"),
    "snr_db": ("signal to noise, dB", "linear"),
}


def plot_health(
    stats: Mapping[str, Mapping[str, Mapping[str, float]]], path: str | pathlib.Path
) -> pathlib.Path:
    """Draws what ``jax_fp8.nnx.health`` or ``jax_fp8.linen.health`` found.

    Args:
      stats: by layer and operand, what ``summarize`` tells.
      path: of the picture; its ending says the format.

    Returns:
      The path.

    Raises:
      ValueError: where there are no statistics.
      ImportError: without matplotlib.
    """
    if not stats:
        raise ValueError("plot_health: there are no statistics to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_health needs matplotlib: pip install matplotlib") from error
    layers = list(stats)
    operands = [name for name in OPERANDS if any(name in found for found in stats.values())]
    figure = Figure(figsize=(4 + 0.25 * len(layers), 9), layout="constrained")
    for axes, (key, (said, scale)) in zip(
        figure.subplots(len(PANELS), 1, sharex=True), PANELS.items(), strict=True
    ):
        for name in operands:
            places = [i for i, layer in enumerate(layers) if name in stats[layer]]
            axes.plot(places, [stats[layers[i]][name][key] for i in places], "o-", label=name)
        axes.set(ylabel=said, yscale=scale)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    figure.axes[0].legend(fontsize=8)
    path = pathlib.Path(path)
    figure.savefig(path, dpi=110)
    return path
