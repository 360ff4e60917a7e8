"""JSON and text files of unknown origin, read with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

MOST_BYTES = 256 << 20
"""Size of the largest file of a run that is read."""

_LARGEST_INT = 2**63
_T = TypeVar("_T")


class Fields:
    """A JSON object whose values are checked as they are read; errors name the file."""

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        self.path = path
        self.values = values

    def get(self, key: str, kind: type[_T]) -> _T:
        """The value of a key, of this type; integers have at most 64 bits."""
        value = self.values.get(key)
        # In Python a bool is an int; in a record it is a mistake.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            got = f"{value!r:.80}" if key in self.values else "nothing"
            raise ValueError(f"{self.path}: {key!r} is {got}, expected {kind.__name__}")
        if isinstance(value, int) and not -_LARGEST_INT <= value < _LARGEST_INT:
            raise ValueError(f"{self.path}: {key!r} has {value.bit_length()} bits, expected 64")
        return value

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        """The same; None where the key is missing or null."""
        return None if self.values.get(key) is None else self.get(key, kind)

    def number(self, key: str) -> float:
        """The value of a key, a number."""
        return number_of(self.values.get(key), f"{self.path}: {key!r}")


def number_of(value: object, what: str) -> float:
    """The value as a float; an error says what it was to be.

    Raises:
        ValueError: It is no number, or too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is {value!r:.80}, expected a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{what} has hundreds of digits, expected a number") from error


def read_text(path: Path, errors: str = "replace") -> str:
    """A file's text.

    Raises:
        ValueError: It has more than `MOST_BYTES`, or is no UTF-8 and `errors` is `"strict"`.
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} is larger than {MOST_BYTES >> 20} MiB, which no run writes")
    return content.decode("utf-8", errors)


def _writable(value: object) -> object:
    """The same without halves of surrogate pairs, which JSON can name and no file can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if isinstance(value, list):
        return [_writable(item) for item in value]
    if isinstance(value, dict):
        return {_writable(key): _writable(item) for key, item in value.items()}
    return value


def read_object(path: Path) -> Fields:
    """The JSON object that a file holds.

    Raises:
        ValueError: The file is damaged, or holds something else.
    """
    try:
        values = _writable(json.loads(read_text(path, "strict")))
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return Fields(path, values)
