"""``jax-fp8 quantize``: a wide checkpoint to an FP8 one."""

from __future__ import annotations

import argparse
from pathlib import Path

from jax_fp8._src.checkpoint.scheme import EXPRESSIBLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    recipes = dict.fromkeys(recipe for known in EXPRESSIBLE.values() for recipe in known)
    parser.add_argument("src", metavar="SRC", help="folder of the wide checkpoint (safetensors)")
    parser.add_argument(
        "dst", metavar="DST", help="folder to write; that of a run that was cut off is gone on with"
    )
    parser.add_argument("--format", required=True, choices=EXPRESSIBLE)
    parser.add_argument("--recipe", required=True, choices=recipes)
    parser.add_argument(
        "--ignore",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="modules that stay wide besides heads, embeddings and routers, such as '*.down_proj'",
    )
    parser.add_argument(
        "--calibrate",
        metavar="TEXT_FILE",
        help="text over which the scales of --recipe static are measured",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    from jax_fp8._src.checkpoint.plan import make_plan
    from jax_fp8._src.checkpoint.write import quantize

    how = {key: getattr(arguments, key) for key in ("format", "recipe", "ignore")}
    plan = make_plan(arguments.src, arguments.dst, **how)
    if plan.is_static != (arguments.calibrate is not None):
        raise ValueError("quantize: --calibrate goes with --recipe static and with no other")
    amax = None
    if arguments.calibrate:
        text = Path(arguments.calibrate).read_text(encoding="utf-8")
        from jax_fp8.decoder import calibrate

        amax = calibrate(plan.source.path, text, progress=True)
    quantize(arguments.src, arguments.dst, **how, input_amax=amax, progress=True)
    tensors = plan.source.tensors.values()
    before = sum(stored.nbytes for stored in tensors) / 1e6
    after = sum(sum(plan.sizes(stored).values()) for stored in tensors) / 1e6
    print(f"{plan.target}: {len(plan.modules)} FP8 layers, {before:.1f} MB -> {after:.1f} MB")
    return 0
