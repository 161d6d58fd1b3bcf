"""The command ``jax-fp8``, also ``python -m jax_fp8``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

#: Commands with a module and an extra of their own, and what they do. Such a module has
#: ``add_arguments(parser)`` and ``run(arguments)``.
COMMANDS = {
    "quantize": (
        "jax_fp8._src.checkpoint.command",
        "checkpoint",
        "makes an FP8 checkpoint of a wide one",
    ),
    "generate": (
        "jax_fp8.decoder.command",
        "decoder",
        "writes text with a model of the Llama, Qwen or Mistral families",
    ),
}
#: What is the user's to mend, and says how: no traceback.
ERRORS = (
    FloatingPointError,
    ImportError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="jax-fp8", description="FP8 matrix products for JAX")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info", help="versions, devices, and which implementation each device gets and why"
    )
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(run=_info)
    for name, (module, extra, said) in COMMANDS.items():
        command = commands.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}.")
        if argv[:1] != [name]:  # Only the one that is called is imported.
            continue
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            parser.error(f"{name} needs `pip install 'jax-fp8[{extra}]'`: {error}")
        found.add_arguments(command)
        command.set_defaults(run=found.run)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except ERRORS as error:
        message = str(error).removeprefix(f"{arguments.command}: ")
        print(f"jax-fp8 {arguments.command}: {message}", file=sys.stderr)
        return 1


def _info(arguments: argparse.Namespace) -> int:
    # A look at the devices must not take three quarters of their memory, as JAX otherwise does.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from jax_fp8._src.info import format_info
    from jax_fp8._src.info import info as collect

    found = collect()
    print(json.dumps(found, indent=2) if arguments.json else format_info(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
