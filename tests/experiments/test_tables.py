"""What came out of a comparison, as it is written and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softlabels.experiments.comparison_record import ComparisonRecord
from softlabels.experiments.tables import csv_text, markdown

COMMITTED = sorted(Path(__file__).parents[2].glob("results/*/comparison.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_a_committed_comparison_gives_its_files_again(path, tmp_path):
    results = ComparisonRecord.read(path)
    results.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert markdown(results) == path.with_suffix(".md").read_text()
    assert csv_text(results) == path.with_suffix(".csv").read_text()


def test_a_damaged_comparison_is_an_error_that_names_file_and_field(tmp_path):
    content = json.loads(COMMITTED[0].read_text())
    content["variants"][1]["runs"][0]["top1"] = "high"
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"^{path}: variants\.1\.runs\.0\.top1: .*got 'high'$"):
        ComparisonRecord.read(path)
