"""JSON files with a schema, which the writer and the reader share; errors name the field."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from softlabels.io.files import write_json

__all__ = ["UNKNOWN_SETTING", "Record", "problem_of", "read_lines"]

UNKNOWN_SETTING = "unknown_setting"
"""The kind of error that tells of a key that is no setting: its `name`, and those that are."""

_LONGEST_NAME = 200
_LONGEST_MESSAGE = 600
_TAGS = ("tuple[", "literal[", "constrained-")  # pydantic's, of the parts of a union
_SAYS_ALL = ("value_error", "assertion_error", "json_invalid", "missing")


class Record(BaseModel):
    """A JSON object that is written and read by one schema; keys that it does not know are ignored.

    Fields that were left at their defaults are not written.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._check()
        return self

    def _check(self) -> None:
        """Raise a ValueError where fields do not fit each other."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It does not fit; the message names the file and the field.
        """
        try:
            return cls.model_validate_json(path.read_bytes(), strict=True)
        except ValidationError as error:
            raise ValueError(f"{path}: {problem_of(error)}") from error

    @classmethod
    def found(cls, path: Path) -> Self | None:
        """The same; None where there is no file, or one that does not fit."""
        try:
            return cls.read(path)
        except (OSError, ValueError):
            return None

    def dump(self) -> dict[str, Any]:
        """The object that is written."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def write(self, path: Path) -> None:
        """Write a file, whole or not at all."""
        write_json(path, self.dump())


def problem_of(error: ValidationError) -> str:
    """One line about the first thing that does not fit a schema."""
    first = error.errors(include_url=False)[0]
    path = [f"{part:.80}" for part in map(str, first["loc"]) if not part.startswith(_TAGS)]
    if first["type"] == UNKNOWN_SETTING:
        name, known = str(first["ctx"]["name"]), first["ctx"]["known"]
        near = difflib.get_close_matches(name[:_LONGEST_NAME], known, n=3)
        where = ".".join([*path, name])
        return f"unknown setting {where!r:.200}: expected {', '.join(near or known)}"
    message = first["msg"].removeprefix("Value error, ")[:_LONGEST_MESSAGE]
    got = "" if first["type"] in _SAYS_ALL else f", got {first['input']!r:.80}"
    return f"{'.'.join(path):.200}: {message}{got}" if path else f"{message}{got}"


_R = TypeVar("_R", bound=Record)


def read_lines(path: Path, schema: type[_R]) -> list[_R]:
    """The lines of a log; none where there is no file.

    A line that does not fit is left out with a warning: a power cut may have left a part of it.
    """
    lines: list[_R] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            lines.append(schema.model_validate_json(line, strict=True))
        except ValidationError:
            warnings.warn(f"{path}, line {number} is unreadable and left out", stacklevel=2)
    return lines
