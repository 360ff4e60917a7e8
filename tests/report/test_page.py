"""The page, seen from its HTML."""

from __future__ import annotations

import json
import re

import matplotlib as mpl
import pytest

from shared.parsed_page import Page
from softlabels.report import write_report


@pytest.fixture
def write(tmp_path):
    """Writes a report and returns the parsed page."""

    def write(*folders, title="A title", **options):
        output = tmp_path / "new" / "folder" / "report.html"
        assert write_report(folders, output, title=title, **options) == output
        return Page(output)

    return write


def test_report_of_one_run_shows_all_its_parts(make_run, write, make_gallery):
    run = make_run(gallery=make_gallery(), environment={"torch": "2.7.1"})
    page = write(run, title="Some title", command="softlabels train x.yaml", notes=["A note."])
    for part in (
        "Some title",
        "One run of timm:tiny on toy, 2 epochs.",
        "softlabels train x.yaml",
        "A note.",
        "Seed 0.",
        "One seed is no evidence",
        "Zipf's law over the ranks.",
        "kind: uskd",
    ):
        assert part in page.text
    assert page.row("parameters") == ["parameters", "1,234"]
    assert page.row("images per second") == ["images per second", "1,000"]
    assert page.row("torch") == ["torch", "2.7.1"]
    assert page.row("cores") == ["cores", "2"]
    assert page.row("best test top-1") == ["best test top-1", "62.50 % (epoch 1)"]


def test_table_numbers_equal_those_of_the_summary(make_run, write):
    finals = {
        "base": {"top1": 60.123456, "top5": 91.5, "nll": 1.5, "ece": 7.25, "group_top1": 90.0},
        "uskd": {"top1": 61.987654, "top5": 92.5, "nll": 1.25, "ece": 3.5, "group_top1": 91.0},
    }
    folders = [make_run(name, final=final) for name, final in finals.items()]
    page = write(*folders)
    values = [float(element["value"]) for element in page.all("data")]
    order = ("top1", "top5", "group_top1", "nll", "ece")
    assert values == [final[key] for final in finals.values() for key in order]
    assert page.row("BASE") == ["BASE", "60.12", "91.50", "90.00", "1.5000", "7.25"]
    heading = " ".join(page.rows[0])
    assert re.search(r"NLL \(nats\)\s*lower is better", heading)
    assert re.search(r"ECE \(%\)\s*lower is better", heading)
    assert re.search(r"top-1 \(%\)\s*higher is better", heading)


def test_runs_with_different_scores_share_one_table(make_run, write):
    base = make_run("base", final={"top1": 50.0, "nll": 2.0}, method=None)
    uskd = make_run("uskd", final={"top1": 60.0, "group_top1": 80.0})
    page = write(base, uskd)
    assert page.row("BASE") == ["BASE", "50.00", "\u2013", "2.0000"]
    assert page.row("USKD") == ["USKD", "60.00", "80.00", "\u2013"]
    charts = {svg["aria-label"].split(" over ")[0]: svg["aria-label"] for svg in page.all("svg")}
    assert "BASE 50.00; USKD 60.00" in charts["Line chart of top-1 (%)"]
    assert "USKD" not in charts["Line chart of NLL (nats)"]
    assert "lower is better; no values: USKD" in page.text
    assert not any("ECE" in label for label in charts)
    assert page.row("method") == ["method", "none", "uskd"]


def test_facts_shared_by_all_runs_are_told_once(make_run, write):
    page = write(make_run("a"), make_run("b", epochs=3))
    assert page.row("model") == ["model", "timm:tiny"]
    assert page.row("epochs") == ["epochs", "2", "3"]
    assert "2 runs of timm:tiny on toy, 2, 3 epochs." in page.text


def test_further_columns_follow_the_order_of_the_runs(make_run, write):
    table = [{"step time (ratio)": 1.0}, {"step time (ratio)": 1.0349, "teacher": "<none>"}]
    page = write(make_run("base"), make_run("uskd"), table=table)
    assert page.rows[0][-2:] == ["step time (ratio)", "teacher"]
    assert page.row("BASE")[-2:] == ["1.000", "\u2013"]
    assert page.row("USKD")[-2:] == ["1.035", "<none>"]


def test_runs_of_one_label_are_told_apart_by_seed(make_run, write):
    folders = [make_run(f"run{seed}", label="USKD", seed=seed) for seed in (3, 5)]
    page = write(*folders)
    assert page.row("USKD, seed 3")[1] == page.row("USKD, seed 5")[1] == "61.24"
    assert "Seeds 3, 5." in page.text
    assert "One seed is no evidence" not in page.text
    assert "within the spread over seeds is no evidence" in page.text


def test_test_images_and_incomplete_runs_are_named(make_run, write):
    page = write(make_run(complete=False, test_images=8000))
    assert "8,000 test images." in page.text
    assert "USKD (incomplete)" in page.text
    assert "Incomplete runs" in page.text
    assert "test images." not in write(make_run("b")).text


def test_page_fetches_nothing_and_runs_no_script(make_run, write, make_gallery):
    page = write(make_run(gallery=make_gallery()), make_run("other", gallery=make_gallery()))
    assert not {"script", "link", "iframe", "object", "base", "form"} & {
        t for t, _ in page.elements
    }
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
                assert value.startswith(("data:image/png;base64,", "#"))
            assert not name.startswith("on")
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?(.)", page.source))
    assert "http" not in page.source.replace("http-equiv", "")
    assert "@import" not in page.source
    assert len(page.all("style")) == 1  # a chart's own would act on the whole page
    policy = next(meta for meta in page.all("meta") if "http-equiv" in meta)
    assert policy["content"].startswith("default-src 'none'")


def test_text_of_all_files_is_escaped(make_run, write, make_gallery):
    bad = "<script>alert(1)</script>"
    run = make_run(
        label=bad,
        model=bad,
        data=bad,
        method=bad,
        config=bad,
        environment={"system": bad, "command": bad},
        gallery={**make_gallery([bad, bad, '"onload="']), "what": bad},
    )
    page = write(run, title=bad, notes=[bad], command=bad, table=[{bad: bad}])
    assert bad not in page.source
    assert not page.all("script")
    assert page.text.count(bad) > 10
    assert page.all("img")[0]["alt"] == f"Test image 17, class {bad}"


@pytest.mark.parametrize(
    "bad",
    [
        "]]><script>alert(1)</script>",
        "</style></svg></title><img src=x onerror=alert(1)>",
        "javascript:alert(1)",
        "\"'`onload=alert(1) x=",
        "&lt;script&gt;{{ 7 * 7 }}{% endfor %}",
        "\x00\x1b[31m\u202e\uffff",
        "x" * 100_000,
    ],
)
@pytest.mark.filterwarnings("ignore:Glyph.*missing from")
def test_page_stays_inert_and_complete(make_run, write, make_gallery, bad):
    def page_of(name: str, text: str):
        run = make_run(
            name,
            label=text,
            model=text,
            data=text,
            config=text.encode("utf-8", "replace").decode(),
            environment={"system": text, "command": text},
            gallery={**make_gallery([text, text, text]), "what": text},
        )
        return write(run, title="t", notes=[run.name])

    page, plain = page_of("bad", bad), page_of("plain", "plain")
    assert [tag for tag, _ in page.texts] == [tag for tag, _ in plain.texts]
    elements = {tag for tag in ("script", "iframe", "object", "a", "link") if page.all(tag)}
    assert not elements
    for tag in ("img", "svg", "h3", "li", "td", "text"):
        assert len(page.all(tag)) == len(plain.all(tag)), tag
        for attributes in page.all(tag):
            assert not any(name.startswith("on") for name in attributes)
            assert "javascript" not in attributes.get("src", "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e308])
def test_numbers_that_are_not_finite_still_have_a_page(make_run, write, make_gallery, value):
    metrics = "".join(
        json.dumps({"epoch": n, "step": n, "eval/top1": v, "train/task": v}) + "\n"
        for n, v in enumerate((1.0, value, -value))
    )
    run = make_run(
        final={"top1": value, "nll": value},
        seconds=value,
        metrics=metrics,
        gallery=make_gallery(target_value=value, non_target=[[1, value], [2, value]]),
    )
    page = write(run)
    assert page.all("table")
    assert page.all("img")


def test_label_with_dollar_signs_is_no_formula(make_run, write):
    page = write(make_run(label=r"$\alpha$ & b"))
    assert any(r"$\alpha$ & b 61.24" in text for tag, text in page.texts if tag == "text")


def test_every_picture_says_in_words_what_it_shows(make_run, write, make_gallery):
    page = write(make_run(gallery=make_gallery()), make_run("base", method=None))
    assert page.all("img")
    assert all(image["alt"].strip() for image in page.all("img"))
    charts = page.all("svg")
    assert len(charts) == 5
    assert all(chart["role"] == "img" for chart in charts)
    assert charts[0]["aria-label"] == (
        "Line chart of top-1 (%) over finished epochs, 1 to 2. Last values: USKD 61.24; BASE 61.24."
    )


def test_identifiers_are_unique_and_references_resolve(make_run, write):
    page = write(make_run("a"), make_run("b"))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    used = re.findall(r"url\(#([^)]+)\)", page.source)
    used += [attributes["href"][1:] for attributes in page.all("use")]
    assert used
    assert set(used) <= set(names)
    assert len(names) == len(set(names))


def test_lines_take_the_colors_of_the_page(make_run, write):
    page = write(make_run("a"), make_run("b"))
    styles = " ".join(attributes.get("style", "") for _, attributes in page.elements)
    assert "stroke: var(--run-0)" in styles
    assert "stroke: var(--run-1)" in styles
    assert "fill: currentColor" in styles
    assert page.source.count("--run-1: #") == 2  # light and dark
    dashes = re.findall(r"stroke-dasharray: ([\d., ]+)[^\"]*stroke: var\(--run-1\)", styles)
    assert dashes


def test_gallery_shows_label_and_answer_of_each_run(make_run, write, make_gallery):
    right = make_gallery(target_value=-0.25, prediction=[[0, 0.75]], non_target=[])
    page = write(make_run("a", gallery=make_gallery()), make_run("b", gallery=right))
    assert len(page.all("img")) == 1
    assert "Target 1.134" in page.text
    assert "Target -0.250" in page.text
    assert "Wrong: predicts cat 62.5 %, ant 25.0 %, bee 12.5 %" in page.text
    assert "Right: predicts ant 75.0 %" in page.text
    assert "nothing for wrong classes" in page.text
    assert "cat50.0 %" in page.text
    assert "bee25.0 %" in page.text
    widths = [style for e in page.all("span") if (style := e.get("style", "")).startswith("width")]
    assert [style.split(";")[0] for style in widths] == ["width: 100.0%", "width: 50.0%"]


def test_images_of_different_data_are_not_merged(make_run, write, make_gallery):
    page = write(
        make_run("a", data="x", gallery=make_gallery()),
        make_run("b", data="y", gallery=make_gallery(["dog", "elk", "fox"])),
    )
    assert [image["alt"] for image in page.all("img")] == [
        "Test image 17, class ant",
        "Test image 17, class dog",
    ]


def test_label_without_weight_on_wrong_classes_has_empty_bars(make_run, write, make_gallery):
    page = write(make_run(gallery=make_gallery(non_target=[[1, 0.0], [2, 0.0]])))
    assert "bee0.0 %" in page.text
    assert page.source.count("width: 0.0%") == 2


def test_missing_gallery_is_named_beside_others_and_left_out_alone(make_run, write, make_gallery):
    page = write(make_run("a", gallery=make_gallery()), make_run("b"))
    assert "saved no soft labels" in page.text
    assert "Soft labels" not in write(make_run("c")).text


def test_run_with_nothing_but_a_summary_still_has_a_page(make_run, write):
    run = make_run()
    for file in run.iterdir():
        if file.name != "summary.json":
            file.unlink()
    page = write(run)
    assert page.row("USKD")[1] == "61.24"
    assert not page.all("svg")
    assert "Environment" not in page.text


def test_truncated_last_line_of_the_metrics_is_left_out_with_a_warning(make_run, write):
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "step": 12, "eval/top')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 11 is unreadable"):
        page = write(run)
    assert "1 to 2. Last values: USKD 61.24." in page.all("svg")[0]["aria-label"]


def test_same_input_gives_the_same_file(make_run, tmp_path, make_gallery):
    folders = [make_run("a", gallery=make_gallery()), make_run("b")]
    first = write_report(folders, tmp_path / "1.html", title="x").read_bytes()
    assert write_report(folders, tmp_path / "2.html", title="x").read_bytes() == first


def test_style_of_the_caller_leaves_the_page_alone(make_run, tmp_path):
    run = make_run()
    first = write_report([run], tmp_path / "1.html", title="x").read_bytes()
    with mpl.rc_context({"axes.linewidth": 9, "axes.labelsize": 30, "font.size": 30}):
        assert write_report([run], tmp_path / "2.html", title="x").read_bytes() == first
        assert mpl.rcParams["font.size"] == 30


def test_page_of_four_long_runs_is_small(make_run, write, make_gallery):
    lines = [{"epoch": s // 100, "step": s, "train/task": s % 7} for s in range(20_000)]
    lines += [{"epoch": e, "step": 100 * e, "eval/top1": e / 3} for e in range(1, 201)]
    metrics = "\n".join(map(json.dumps, lines))
    page = write(*[make_run(f"r{i}", metrics=metrics, gallery=make_gallery()) for i in range(4)])
    assert len(page.source) < 150_000


def test_no_run_or_a_table_of_another_length_is_an_error(make_run, tmp_path):
    with pytest.raises(ValueError, match="no run folder, expected at least one"):
        write_report([], tmp_path / "r.html", title="x")
    with pytest.raises(ValueError, match="table has 2 entries, expected one for each of 1 runs"):
        write_report([make_run()], tmp_path / "r.html", title="x", table=[{}, {}])
