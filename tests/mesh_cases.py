"""What a compiled program moves between the devices of a mesh."""

import math
import re

import jax

_INSTRUCTION = re.compile(
    r"= (\(.*?\)|\S+) ((?:ragged-)?all-[\w-]+|reduce-scatter[\w-]*|collective-[\w-]+)\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def compiled(function, *operands):
    """The program, to be called and to be read."""
    return jax.jit(function).lower(*operands).compile()


def moved(program):
    """The elements of all arrays that collectives make, ascending, by name and dtype.

    XLA may merge several collectives into one: what is counted are the arrays, of a device each.
    """
    found = {}
    for line in program.as_text().splitlines():
        match = _INSTRUCTION.search(line)
        for dtype, sizes in _ARRAY.findall(match.group(1)) if match else ():
            # A CPU gathers FP8 as float16.
            key = f"{match.group(2)} {'fp8' if dtype == 'f16' else dtype}"
            size = math.prod(int(size) for size in sizes.split(",") if size)
            found.setdefault(key, []).append(size)
    return {key: sorted(sizes) for key, sizes in found.items()}
