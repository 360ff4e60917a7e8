"""A run folder whose files somebody else has changed."""

from __future__ import annotations

import json

import pytest

from shared.run_folders import ENVIRONMENT
from softlabels.training.run_folder import RunFolder
from softlabels.training.schemas import Environment


@pytest.mark.parametrize("content", ["", "[1]", "null", '{"a": ' + "[" * 9999, "{}", "\ud800"])
def test_damaged_files_are_as_good_as_none(tmp_path, content):
    folder = RunFolder(tmp_path)
    for path in (folder.environment, folder.summary):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert not folder.is_complete()
    folder.write_environment(Environment(**ENVIRONMENT))
    assert json.loads(folder.environment.read_text())["earlier_starts"] == []


def test_only_a_true_complete_is_complete(make_run):
    for complete in (True, False, "no", None):
        run = make_run(f"run {complete}", complete=complete)
        assert RunFolder(run).is_complete() is (complete is True)


def test_earlier_starts_are_kept_in_their_order(tmp_path):
    folder = RunFolder(tmp_path)
    for version in ("1", "2", "3"):
        folder.write_environment(Environment(**{**ENVIRONMENT, "torch": version}))
    found = Environment.read(folder.environment)
    assert found.torch == "3"
    assert [start.torch for start in found.earlier_starts] == ["1", "2"]
    assert all(start.earlier_starts == () for start in found.earlier_starts)
