"""Text and tokens, by the `tokenizers` library."""

from __future__ import annotations

import pathlib
from typing import Any


def read_tokenizer(folder: str | pathlib.Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a model's folder.

    Raises:
      FileNotFoundError: when it has no tokenizer.json.
      ImportError: without the `tokenizers` library.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("text needs `pip install 'jax-fp8[decoder]'`") from error
    path = pathlib.Path(folder) / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there, and no other tokenizer is read")
    return Tokenizer.from_file(str(path))


class TextStream:
    """A text that comes token by token: what is printed never has half a character."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that is now complete, often with a token or two behind."""
        return self._stream.step(self._tokenizer, token) or ""
