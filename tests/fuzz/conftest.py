"""Counts the cases of each category, makes sure that there are as many as asked, and tells them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.fuzzing import CATEGORIES, COUNTS
from shared.tiny_runs import train_arguments, write_pictures
from softlabels.cli import main

_PROPERTY = "fuzz"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A fuzz test that ran fewer cases than hypothesis was asked for has failed."""
    marker = pyfuncitem.get_closest_marker("fuzz")
    if marker is None:
        return (yield)
    category, asked = marker.args
    before = COUNTS[category]
    result = yield
    finished = COUNTS[category] - before
    pyfuncitem.user_properties.append((_PROPERTY, (category, finished, asked)))
    assert finished >= asked, f"{finished} cases of {category!r} were finished, asked for {asked}"
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of counts."""
    rows: dict[str, tuple[int, int]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if name == _PROPERTY:
                    category, finished, asked = value
                    rows[category] = (finished, asked)
    if rows:
        terminalreporter.section("fuzz cases")
        for category in CATEGORIES:
            if category in rows:
                terminalreporter.write_line("{:32}{:6} of {}".format(category, *rows[category]))
        total = sum(finished for finished, _ in rows.values())
        terminalreporter.write_line(f"{'all':32}{total:6} in {len(rows)} categories")


@pytest.fixture(scope="module", autouse=True)  # other tests of this process must not see it
def _errors_are_raised() -> Iterator[None]:
    """What the program did not foresee fails a test with its traceback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTLABELS_TRACEBACK", "1")
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of two classes."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "shades")


@pytest.fixture(scope="session")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on them."""
    output = tmp_path_factory.mktemp("runs") / "trained"
    assert main(train_arguments(pictures, output)) == 0
    return output


@pytest.fixture(scope="module", autouse=True)
def _fast_runs() -> Iterator[None]:
    """The report, the largest part of a tiny run, has cases of its own; so has git's answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softlabels.experiments.train.write_report", lambda *_a, **_k: None)
        patch.setattr("softlabels.training.run_folder._commit", lambda: None)
        yield
