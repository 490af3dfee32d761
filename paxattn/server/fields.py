"""Reading the fields of a JSON body, each with an error that names it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from paxattn.server.errors import ApiError


class Fields:
    """A body's fields; null is as good as absent."""

    def __init__(self, body: Any, known: Collection[str], within: str = "") -> None:
        """Take a body.

        Args:
            body: from JSON.
            known: all the fields that it may have.
            within: what the names of its fields begin with, if it is a field itself.

        Raises:
            ApiError: it is no object, or has a field that nobody knows.
        """
        if not isinstance(body, dict):
            raise ApiError("the body must be a JSON object")
        self._body: Mapping[str, Any] = body
        self._within = within
        for name in body:
            if name not in known:
                unknown = within + name[:80]
                raise ApiError(
                    f"unknown field {unknown!r}: this server has none of that name; leave it out",
                    param=unknown,
                    code="unknown_field",
                )

    def get(self, name: str) -> Any:
        """Whatever it is, or None."""
        return self._body.get(name)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from ``low`` to ``high``."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, "a number")
        if not low <= value <= high:  # NaN too
            raise self.refuse(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false, the default."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return bool(value)

    def text(self, name: str) -> str:
        """A string that must be there."""
        value = self.get(name)
        if not isinstance(value, str):
            raise self.refuse(name, "a string")
        return value

    def texts(self, name: str, most: int) -> list[str]:
        """A string or a list of them, none empty."""
        value = self.get(name)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not _all(values, str) or not all(values):
            raise self.refuse(name, "a string that is not empty, or a list of them")
        if len(values) > most:
            raise self.refuse(name, f"at most {most} strings")
        return values

    def tokens(self, name: str) -> list[int]:
        """A list of token ids."""
        values = [] if self.get(name) is None else self.get(name)
        if not is_tokens(values):
            raise self.refuse(name, "a list of token ids")
        return values

    def mapping(self, name: str) -> dict[str, Any]:
        """An object."""
        value = {} if self.get(name) is None else self.get(name)
        if not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return value

    def only(self, name: str, values: Collection[Any], why: str) -> None:
        """Refuse a field that asks for what this server cannot do."""
        value = self.get(name)
        if value is not None and not any(value == one for one in values):
            name = self._within + name
            raise ApiError(f"{name}: {why}; leave it out", param=name, code="unsupported")

    def refuse(self, name: str, wanted: str) -> ApiError:
        """The error that the field is not what is wanted."""
        found = repr(self.get(name)) if name in self._body else "missing"
        found = found if len(found) < 100 else f"{found[:100]}..."
        name = self._within + name
        return ApiError(f"{name} is {found}: must be {wanted}", param=name)


@contextlib.contextmanager
def naming(param: str) -> Iterator[None]:
    """Whatever is wrong with a value inside is the fault of this field."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ApiError(str(error), param=param) from None


def is_tokens(values: Any) -> bool:
    """Whether these are token ids."""
    return _all(values, int) and not any(isinstance(value, bool) for value in values)


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
