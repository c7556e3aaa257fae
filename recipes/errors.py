"""Errors in words, none of which is empty. Nothing here imports torch."""

from __future__ import annotations

import sys


def text(error: Exception) -> str:
    """What the error says; its type where it says nothing, as the EOFError of an empty file."""
    return str(error).strip() or type(error).__name__


def named(error: Exception) -> str:
    """Its type and what it says."""
    name = type(error).__name__
    return name if text(error) == name else f"{name}: {text(error)}"


def refuse(error: Exception) -> int:
    """Say why a command does nothing; its exit status."""
    print(f"error: {text(error)}", file=sys.stderr)
    return 2
