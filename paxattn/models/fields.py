"""Typed reading of JSON objects, with errors that name file and field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: says which file, field or tensor, and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


class Fields:
    """The fields of a JSON object.

    Args:
        fields: the object.
        where: what to call it in errors.
    """

    def __init__(self, fields: Mapping[str, Any], where: str):
        self.fields, self.where = fields, where

    def fail(self, message: str) -> CheckpointError:
        """An error about this object, to be raised."""
        return CheckpointError(f"{self.where}: {message}")

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; ``default`` where it is absent or null."""
        value = self.fields.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(f"{key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.fail(f"{key}={short(value)} must be a positive integer below 2**31")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; ``default`` where it is absent or null."""
        value = self.fields.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(f"{key!r} is missing")
        # Python's JSON reads NaN and Infinity; neither is below the bound.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.fail(f"{key}={short(value)} must be a positive number")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        """A positive number, or None where it is absent or null."""
        return None if self.fields.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean; ``default`` where it is absent or null."""
        value = self.fields.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(f"{key}={short(value)} must be true or false")
        return value

    def object(self, key: str) -> Mapping[str, Any]:
        """An object; an empty one where it is absent or null."""
        value = self.fields.get(key) or {}
        if not isinstance(value, Mapping):
            raise self.fail(f"{key}={short(value)} must be an object")
        return value


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}..."
