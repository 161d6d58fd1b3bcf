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
def set_plan_choice(timed: bool, file: str) -> None:
    """Whether candidates are timed, and the file that choices are appended to (empty: none)."""

def plan_choices() -> list[tuple[str, str, str, str, int, int, str]]:
    """GPU, cublasLt, problem, algorithm, candidates, nanoseconds, origin of each choice."""

def add_plan_choices(choices: list[tuple[str, str, str, str, int, int, str]]) -> None:
    """As above; the origin is "imported" or "cached"."""

def keep_plan_choice(choice: tuple[str, str, str, str, int, int, str]) -> str:
    """For tests: what a handler does with a choice it has timed. The algorithm that stands."""

def clear_plan_choices() -> None: ...
def limit_timing_memory(bytes: int) -> None:
    """For tests: timing takes no more memory than this."""
