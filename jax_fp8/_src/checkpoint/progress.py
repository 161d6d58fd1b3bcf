"""A progress bar over bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar(wanted: bool, total: int, what: str) -> Iterator[Callable[[int], Any]]:
    """A function that is told how many bytes more are done.

    Raises:
      ImportError: where a bar is wanted and tqdm is not installed.
    """
    if not wanted:
        yield lambda count: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            "the progress bar needs tqdm, which is not installed: pip install jax-fp8[checkpoint]"
        ) from None
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=what) as bar:
        yield bar.update
