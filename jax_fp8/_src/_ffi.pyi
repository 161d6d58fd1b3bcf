from typing import Any

VERSION: str
API_VERSION: tuple[int, int]

def registrations() -> dict[str, dict[str, Any]]:
    """Target -> platform -> handler capsule, or dict of capsules by stage."""

def set_cublaslt_candidates(paths: list[str]) -> None:
    """Full paths to try when no cublasLt is in the process yet."""

def cublaslt_version() -> str:
    """Loads cublasLt and gives its version; a RuntimeError names what is missing or too old."""

def compute_capability(ordinal: int) -> int:
    """As 90 for 9.0, by the CUDA runtime; a RuntimeError says why it cannot tell."""

def journal() -> list[dict[str, Any]]:
    """What the handlers ran, each distinct problem once."""

def clear_journal() -> None: ...
