"""The command ``jax-fp8``, also ``python -m jax_fp8``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="jax-fp8", description="FP8 matrix products for JAX")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info", help="versions, devices, and which implementation each device gets and why"
    )
    info.add_argument("--json", action="store_true", help="print it as JSON")
    arguments = parser.parse_args(argv)

    # A look at the devices must not take three quarters of their memory, as JAX otherwise does.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from jax_fp8._src.info import format_info
    from jax_fp8._src.info import info as collect

    found = collect()
    print(json.dumps(found, indent=2) if arguments.json else format_info(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
