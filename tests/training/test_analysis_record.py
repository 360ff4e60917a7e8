"""Damaged and unusual analyses."""

from __future__ import annotations

import json
import math

import pytest

from softlabels.training.run_records import read_run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "many"}, "'images' is 'many', expected int"),
        ({"groups": [0, 1]}, "'groups' has 2 entries, expected 4"),
        ({"zipf": None}, "'zipf' is None, expected dict"),
        ({"zipf": {}}, "'mean_sorted_softmax' is nothing, expected list"),
        (
            {"zipf": {"mean_sorted_softmax": [0.5, 1.5], "ranks": [1, 2]}},
            "'mean_sorted_softmax' holds 1.5, expected numbers from 0 to 1",
        ),
        (
            {"zipf": {"mean_sorted_softmax": [0.5], "ranks": [1, 2]}},
            "'ranks' holds 2, expected a whole number below 2",
        ),
        ({"zipf": {"mean_sorted_softmax": [0.5], "ranks": 3}}, "'ranks' is 3, expected list"),
        (
            {"reliability": {"confidence": [0.5], "accuracy": [0.5, 1], "count": [3]}},
            "'accuracy' has 2 entries, expected 1",
        ),
        (
            {"reliability": {"confidence": [0.5], "accuracy": [0.5], "count": [-1]}},
            "'count' holds something else than numbers of images",
        ),
        ({"per_class": [1.0]}, "'per_class' has 1 entries, expected 4"),
        ({"per_class": [1, 2, 3, "x"]}, "'per_class' is 'x', expected a number"),
        ({"confusion": [[0, 1]]}, r"'confusion' holds \[0, 1\], expected \[true, pred"),
        ({"confusion": [[0, 4, 1]]}, "'confusion' holds 4, expected a whole number below 4"),
        ({"confusion": [[0, True, 1]]}, "'confusion' holds True, expected a whole number"),
        ({"confusion": [[0, 1, 10**30]]}, "'confusion' holds 1000.*, expected a whole number"),
        ({"teacher": {"agreement": "all"}}, "'agreement' is 'all', expected a number"),
        ({"features": {"class": [0] * 401}}, "'class' has 401 entries, expected at most 400"),
        ({"features": {"class": [-1]}}, "'class' holds -1, expected a whole number below 4"),
        (
            {"features": {"class": [0], "x": [1], "y": [], "explained": [0, 0]}},
            "'y' has 0 entries, expected 1",
        ),
    ],
)
def test_damaged_analysis_is_an_error_that_names_it(make_run, make_analysis, changes, message):
    run = make_run(analysis=make_analysis(**changes))
    with pytest.raises(ValueError, match=rf"analysis\.json: {message}"):
        read_run(run)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is damaged"), ("[]", "holds a list, expected a JSON object")]
)
def test_analysis_that_is_no_object_is_an_error(make_run, content, message):
    run = make_run()
    (run / "analysis.json").write_text(content)
    with pytest.raises(ValueError, match=rf"analysis\.json {message}"):
        read_run(run)


def test_analysis_is_read_as_it_was_written(make_run, make_analysis):
    content = make_analysis(teacher={"name": "t", "top1": 80.0, "agreement": 75.5}, novel=[1])
    analysis = read_run(make_run(analysis=content)).analysis
    assert analysis.images == 40
    assert analysis.class_names == ("ant", "bee", "cat", "dog")
    assert analysis.groups == ("0", "0", "1", "1")
    assert analysis.agreement == 75.5
    assert analysis.zipf.probabilities.tolist() == [0.6, 0.2, 0.15, 0.05]
    assert (analysis.zipf.exponent, analysis.zipf.r2, analysis.zipf.ranks) == (
        1.625,
        0.9375,
        (1, 4),
    )
    assert math.isnan(analysis.per_class[3])
    assert analysis.confusion.tolist() == content["confusion"]
    assert math.isnan(analysis.reliability.accuracy[0])
    assert analysis.features.explained == (0.5, 0.25)


def test_numbers_of_a_run_that_went_wrong_are_no_error(make_run, make_analysis):
    zipf = {"mean_sorted_softmax": [None, 0], "exponent": None, "r2": math.nan, "ranks": [1, 2]}
    run = make_run(analysis=make_analysis(zipf=zipf, features=None, groups=None))
    assert "NaN" in (run / "analysis.json").read_text()
    analysis = read_run(run).analysis
    assert math.isnan(analysis.zipf.exponent)
    assert all(map(math.isnan, analysis.zipf.probabilities))
    assert analysis.features is None
    assert json.loads((run / "summary.json").read_text())
