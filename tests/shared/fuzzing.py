"""What the fuzz tests share: the categories, a case with its time limit, and the program."""

from __future__ import annotations

import contextlib
import io
import json
import math
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from torch import Tensor

from softlabels.cli import main

CATEGORIES = (
    "recipe text",
    "recipe structure",
    "command-line options",
    "label tensors",
    "logits, teacher logits, votes",
    "image files",
    "folder layouts",
    "idx files",
    "weight files",
    "training steps",
    "run folders",
    "models, taps and settings",
    "checkpoints",
    "teacher caches",
    "WebDataset shards",
)

COUNTS: Counter[str] = Counter()
"""Finished cases of each category, in this process."""

SECONDS = 30  # for a case that takes a fraction of one; the machine may be busy


class HangError(BaseException):
    """A case took longer than its limit. No `except Exception` catches it."""


Test = TypeVar("Test", bound=Callable[..., object])


def fuzz(category: str, cost: int = 1) -> Callable[[Test], Test]:
    """Marks the test of a category; it must run as many cases as the profile of hypothesis asks.

    Args:
        category: One of `CATEGORIES`.
        cost: In the ordinary suite a test of costly cases runs the cost'th part of them.
    """
    asked = settings.default.max_examples
    if settings.get_current_profile_name() == "default":
        asked //= cost

    def marked(test: Test) -> Test:
        return pytest.mark.fuzz(category, asked)(settings(max_examples=asked)(test))

    return marked


@contextlib.contextmanager
def case(category: str) -> Iterator[None]:
    """Runs the body of a generated case within its time limit, and counts it at the end.

    Raises:
        AssertionError: It took too long.
    """
    assert category in CATEGORIES

    def stop(_number: int, frame: FrameType | None) -> None:
        raise HangError("".join(traceback.format_stack(frame)))

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    place = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is told as a warning is no error
            yield
    except HangError as error:
        place = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not place, f"a case of {category!r} ran for more than {SECONDS} s, here:\n{place}"
    COUNTS[category] += 1


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: Its exit status.
        output: What it wrote to the standard output.
        line: Its complaint, empty if there is none.
    """

    status: int
    output: str
    line: str


def command(arguments: Sequence[str], statuses: Sequence[int] = (0, 2)) -> Outcome:
    """Runs the program as its users do: it succeeds, or complains in one printable line.

    An error that the program did not foresee is raised as it is (`SOFTLABELS_TRACEBACK`).
    """
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(arguments)
    text = errors.getvalue()
    complaints = [line for line in text.split("\n") if line.startswith("softlabels ")]
    event(f"status {status}")  # for --hypothesis-show-statistics
    assert status in statuses, (status, text)
    assert "Traceback" not in text
    assert len(complaints) == (status != 0), text
    line = complaints[0] if complaints else ""
    assert line.isprintable()
    assert len(line) < 2500
    assert ": " in line or status == 0
    return Outcome(status, output.getvalue(), line)


def check_refusal(error: Exception, *suspects: str) -> None:
    """An error of the library from Python tells something, in bounds, and names one of these."""
    event("refused")
    assert 10 < len(str(error)) < 2000, error
    assert not suspects or any(name in str(error) for name in suspects), error


def as_yaml(value: object) -> str:
    """Flow YAML of plain values. JSON's NaN and halves of surrogate pairs are none."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_yaml(k)}: {as_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    return json.dumps(value)


def assert_finite(tensors: Mapping[str, Tensor]) -> None:
    """No NaN and nothing infinite among the numbers of a network."""
    for name, value in tensors.items():
        assert bool(value.isfinite().all()), name


def mutated(content: bytes, most: int = 6) -> st.SearchStrategy[bytes]:
    """Valid content with some bytes changed, cut, doubled, or put in."""
    size = len(content)
    places = st.one_of(st.integers(0, min(64, size)), st.integers(0, size))  # headers above all
    edits = st.lists(
        st.one_of(
            st.tuples(st.just("set"), places, st.binary(min_size=1, max_size=8)),
            st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=8)),
            st.tuples(st.just("cut"), places, st.integers(1, max(1, size // 4))),
            st.tuples(st.just("double"), places, st.integers(1, 64)),
            st.tuples(st.just("end"), places, st.just(0)),
        ),
        min_size=1,
        max_size=most,
    )

    def edited(steps: list[tuple[str, int, int | bytes]]) -> bytes:
        result = bytearray(content)
        for kind, place, value in steps:
            if isinstance(value, bytes):
                result[place : place + (len(value) if kind == "set" else 0)] = value
            elif kind == "cut":
                del result[place : place + value]
            elif kind == "double":
                result[place:place] = result[place : place + value]
            else:
                del result[place:]
        return bytes(result)

    return edits.map(edited)


HOSTILE_TEXTS = (
    "", " ", "\0", "\n", "\x1b[2J", "\u202e", "\ud800", "../../x", "/etc/passwd", "~", "-", "--",
    "<script>alert(1)</script>", "]]>", "javascript:alert(1)", "%s%n", "{0}", "${HOME}", "$(true)",
    "nan", "-inf", "1e400", "0x10", "None", "null", "a" * 500, "os:system", "file:x", "package:..",
    "timm:resnet8", "resnet8", "pipe:true", "http://localhost:1/x", "a\tb", '"', "'", "\\", "CON",
)  # fmt: skip

NUMBERS = (
    0, 1, -1, 2, 3, 8, 255, 256, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63),
    0.0, -0.0, 0.5, 1.5, 1e-320, 1e-45, 1e30, 1e300, 1.7e308, float("inf"), float("-inf"),
    float("nan"),
)  # fmt: skip

texts = st.one_of(st.sampled_from(HOSTILE_TEXTS), st.text(max_size=20))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 20), st.sampled_from(NUMBERS), st.floats(), texts
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
"""Anything that JSON and YAML can say."""
