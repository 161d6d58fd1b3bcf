"""Programs in processes of their own that take part in a timing: a line in, a line of JSON out."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from typing import Any


class Unavailable(RuntimeError):
    """A program that cannot be had here, or has ended; the text says which and why."""


class Server:
    """A program that answers lines.

    Args:
      command: to start it.
      name: in messages.
      cwd: where it runs.
    """

    def __init__(self, command: Sequence[str], name: str, cwd: Any = None) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                bufsize=1,
                cwd=cwd,
            )
        except OSError as error:
            raise Unavailable(f"{name}: {error}") from error

    def ask(self, line: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Sends a line and returns the answer.

        Raises:
          RuntimeError: when the answer is an ``error``.
          Unavailable: when the program has ended, or does not answer in time and is ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        watchdog = threading.Timer(timeout_s, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except (OSError, ValueError):
            answer = ""
        finally:
            watchdog.cancel()
        if not answer:
            self.close()
            raise Unavailable(f"{self._name} ended at {line!r}: {self._said()}")
        found = json.loads(answer)
        if "error" in found:
            raise RuntimeError(f"{self._name}: {found['error']}")
        return found

    def _said(self) -> str:
        if self._errors.closed:
            return "it was closed"
        self._errors.seek(0)
        return self._errors.read().strip()[-1000:] or "without a word"

    def close(self) -> None:
        """Ends the program."""
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(OSError):  # What it had not read is lost with it.
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Remote:
    """Something that a server times, by turns with what this process does: a ``turns.Timed``.

    Args:
      server: that has it.
      slot: the server's name for it.
      calls: n, of the chains of n and 2n.
      opening: the line that makes it, whose answer goes into the row.
    """

    def __init__(self, server: Server, slot: int, calls: int, opening: str) -> None:
        self.calls = calls
        self._server, self._slot = server, slot
        self._facts = server.ask(opening, 120.0)

    def warm(self) -> None:
        """Two runs of each chain."""
        for _ in range(2):
            self.pair()

    def pair(self, leads: int = 1) -> tuple[float, float]:
        """Microseconds of n and of 2n calls, right behind ``leads`` times as many."""
        found = self._server.ask(f"pair {self._slot} {leads}")
        once, twice = found.pop("pair")
        self._facts |= found
        return once, twice

    def facts(self) -> dict[str, Any]:
        """What the server said when it made it, and last when it timed it."""
        return self._facts
