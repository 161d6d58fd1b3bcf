"""What multiplies in a compiled program, read off its HLO: whether XLA really ran FP8."""

from __future__ import annotations

import re

#: A definition: name, element type of its (first) result, operation, operands and attributes.
_DEFINITION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[[^=]*?\s([\w\-]+)\((.*)$")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
#: The start of a call's target -> who multiplies.
_WHO = {
    "__cublas$lt$matmul": "cublasLt",
    "__cublas$gemm": "cuBLAS",
    "__cudnn$": "cuDNN",
    "jax_fp8_scaled_matmul": "jax_fp8",
    "jax_fp8_fused_matmul": "jax_fp8",
}


def _who(rest: str, operation: str, text: str) -> str | None:
    """Who runs a product, None for what is none."""
    if operation in ("dot", "scaled-dot"):
        return "Triton" if "__triton" in text else "XLA"
    target = _TARGET.search(rest) if operation == "custom-call" else None
    if target is None:
        return None
    return next((who for start, who in _WHO.items() if target.group(1).startswith(start)), None)


def _bits(element: str) -> int:
    return int((re.findall(r"\d+", element) or [0])[0])


def products(text: str) -> list[str]:
    """What multiplies matrices, as ``"f8 by cublasLt"`` or ``"bf16 by Triton"``, each once.

    Args:
      text: of a compiled program, ``compiled.as_text()``.

    Returns:
      For each kind of product the type that is multiplied (``f8`` if both operands are, else the
      wider one) and who does it: cublasLt, cuBLAS or cuDNN called by XLA, a handler of this
      library, Triton (of a dot in a program that has Triton's fusions), or XLA's own code.
    """
    types: dict[str, str] = {}  # Names recur in each computation: the latest is the right one.
    found: dict[str, None] = {}
    for line in text.splitlines():
        definition = _DEFINITION.match(line)
        if definition is None:
            continue
        name, element, operation, rest = definition.groups()
        types[name] = element
        if (who := _who(rest, operation, text)) is None:
            continue
        names = re.findall(r"%?([\w.\-]+)(?:, |$)", rest.partition(")")[0])
        wide = [types[name] for name in names if name in types]
        if who == "jax_fp8":  # Operands are x, its scale, w and more.
            wide = wide[0:3:2]
        is_fp8 = "$f8" in rest or all(t.startswith("f8") for t in wide[:2])
        multiplied = "f8" if wide and is_fp8 else max(wide[:2] or [element], key=_bits)
        found[f"{multiplied} by {who}"] = None
    return list(found)


def ran_fp8(found: list[str]) -> bool:
    """Whether there are products, and all of them in FP8."""
    return bool(found) and all(product.startswith("f8") for product in found)
