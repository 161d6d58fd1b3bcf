"""``python examples/gpt``: what it does is in program.py."""

import pathlib
import sys

EXAMPLES = pathlib.Path(__file__).resolve().parents[1]
if pathlib.Path(sys.path[0]).resolve() == EXAMPLES / "gpt":
    sys.path[0] = str(EXAMPLES)
# Last: an installed jax_fp8, which has the extension, goes before the working tree's.
sys.path.append(str(EXAMPLES.parent))

from gpt import program  # noqa: E402

if __name__ == "__main__":
    sys.exit(program.main())
