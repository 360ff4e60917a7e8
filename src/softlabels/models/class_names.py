"""Which class of a teacher is which class of the data, by their names."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

__all__ = ["map_by_names", "read_class_names"]

_MOST_BYTES = 1 << 26
_NEAR = 3
_SHOWN = 3


def map_by_names(names: Sequence[str], teacher_names: Sequence[str], teacher: str) -> list[int]:
    """Find the classes of the data among a teacher's.

    Args:
        names: Of the classes of the data, in the order of the indices.
        teacher_names: Likewise, of the teacher's.
        teacher: What an error calls the teacher.

    Returns:
        For each class of the data, the index of the same class in the teacher's logits.

    Raises:
        ValueError: The teacher lacks a class of the data, or two of its classes have that name.
    """
    index = {name: number for number, name in enumerate(teacher_names)}
    missing = [name for name in names if name not in index]
    if missing:
        near = difflib.get_close_matches(missing[0], index, n=_NEAR)
        shown = ", ".join(f"{name!r:.80}" for name in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        hint = f"its classes are like {', '.join(map(repr, teacher_names[:_SHOWN]))}"
        if near:
            hint = f"near {missing[0]!r:.80}: {', '.join(near)}"
        raise ValueError(f"{teacher} has no class {shown}{more} of the data; {hint:.400}")
    times = Counter(teacher_names)
    twice = next((name for name in names if times[name] > 1), None)
    if twice is not None:
        raise ValueError(
            f"{teacher} has {times[twice]} classes of the name {twice!r:.80}: give "
            "teacher.class_map as a list of indices"
        )
    return [index[name] for name in names]


def read_class_names(path: str) -> list[str]:
    """Read the names of classes from a file.

    Args:
        path: A text file in UTF-8 with one name a line, or with a JSON list of names. Blank lines
            and spaces around a name are left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no such file of class names: {path}")
    if not file.is_file() or file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} is no file of class names, or larger than {_MOST_BYTES} bytes")
    try:
        text = file.read_text(encoding="utf-8-sig")
        is_json = text.lstrip().startswith("[")
        names = json.loads(text) if is_json else [line.strip() for line in text.splitlines()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no class names: {error!s:.200}") from error
    if not all(isinstance(name, str) for name in names):
        other = next(name for name in names if not isinstance(name, str))
        raise ValueError(f"{path} must hold a list of names, got {other!r:.80} in it")
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2:
        raise ValueError(f"{path} must hold the names of two or more classes, got {len(names)}")
    return names
