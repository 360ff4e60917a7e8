"""A run folder whose files somebody else has changed."""

from __future__ import annotations

import json

import pytest

from softlabels.training.run_folder import RunFolder


@pytest.mark.parametrize(
    "content", ["", "[1]", "null", '{"a": ' + "[" * 100_000, '{"earlier_starts": 3}', "\ud800"]
)
def test_damaged_files_are_as_good_as_none(tmp_path, content):
    folder = RunFolder(tmp_path)
    for path in (folder.environment, folder.summary):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert not folder.is_complete()
    folder.write_environment({"torch": "2"})
    assert json.loads(folder.environment.read_text())["earlier_starts"] == []


def test_only_a_true_complete_is_complete(tmp_path):
    folder = RunFolder(tmp_path)
    for content, expected in (({"complete": True}, True), ({"complete": "no"}, False), ({}, False)):
        folder.summary.write_text(json.dumps(content))
        assert folder.is_complete() is expected


def test_earlier_environments_are_kept_whatever_their_texts_hold(tmp_path):
    folder = RunFolder(tmp_path)
    folder.environment.write_text('{"torch": "\\ud800"}')
    folder.write_environment({"torch": "3"})
    assert json.loads(folder.environment.read_text())["earlier_starts"] == [{"torch": "\ud800"}]
