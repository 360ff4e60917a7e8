"""The page of a comparison, seen from its HTML."""

from __future__ import annotations

import json
import re
import time

import pytest

from shared.parsed_page import Page
from shared.run_folders import log
from softlabels.report import Variant, write_comparison, write_report
from softlabels.report.canvas import RUN_COLOURS

SECTIONS = [
    "Results",
    "Curves",
    "Paired differences",
    "Zipf's law",
    "Reliability",
    "Change by class",
    "Confusion",
    "Parts of the loss",
    "Features",
    "Soft labels",
    "What was run",
]


@pytest.fixture
def make_variant(make_run, make_analysis, make_gallery):
    """Makes a variant of which each seed has a top-1."""

    def make(name, top1=(50.0, 52.0), *, per_class=None, whole=True, **options):
        options = {"metrics": None, "analysis": None, "gallery": None, **options}
        folders = []
        for seed, value in enumerate(top1):
            changes = dict(options)
            if whole:
                changes["metrics"] = options["metrics"] or log(value)
                classes = per_class or (50.0, 60.0 + ord(name[0]) % 20, 70.0, None)
                changes["analysis"] = options["analysis"] or make_analysis(per_class=list(classes))
                changes["gallery"] = options["gallery"] or make_gallery()
            final = {"top1": value, "nll": 2.0 - seed, "ece": 5.0}
            folders.append(
                make_run(f"{len(name)}{name[:9]}-{seed}", seed=seed, final=final, **changes)
            )
        return Variant(name, tuple(folders))

    return make


@pytest.fixture
def compare(tmp_path):
    """Writes a comparison and returns the parsed page."""

    def write(*variants, table=None, title="A title", **options):
        table = table or [{"top-1 (%)": variant.name.upper()} for variant in variants]
        output = tmp_path / "new" / "comparison.html"
        assert write_comparison(variants, output, title=title, table=table, **options) == output
        return Page(output)

    return write


def headings(page):
    return [text for tag, text in page.texts if tag == "h2"]


def chart(page, start):
    """The description of the chart that starts so."""
    (found,) = [svg["aria-label"] for svg in page.all("svg") if svg["aria-label"].startswith(start)]
    return found


def test_page_has_all_sections_in_their_order(make_variant, compare):
    page = compare(
        make_variant("base", method=None),
        make_variant("uskd", (51.0, 55.0)),
        notes=["A note."],
        command="softlabels compare --seeds 2",
    )
    assert headings(page) == SECTIONS
    assert "4 runs: 2 variants with seeds 0, 1, of timm:tiny on toy, 2 epochs." in page.text
    assert "Differences are to base." in page.text
    assert "A note." in page.text
    assert "To repeat it: softlabels compare --seeds 2" in page.text
    assert page.row("uskd") == ["uskd", "USKD"]
    assert page.row("seeds") == ["seeds", "0, 1"]
    anchors = [a["href"] for a in page.all("a")]
    assert all(target.startswith("#") for target in anchors)
    assert {t[1:] for t in anchors} == {s["id"] for s in page.all("section") if "id" in s}


def test_curves_are_means_over_seeds_with_a_band(make_variant, compare):
    page = compare(make_variant("base", (50.0, 52.0)), make_variant("uskd", (51.0, 56.0)))
    assert chart(page, "Line chart of top-1").endswith("Last values: base 51.00; uskd 53.50.")
    assert chart(page, "Line chart of R\u00b2").endswith("Last values: base 0.750; uskd 0.750.")
    assert "band: smallest to largest" in page.text
    bands = [e for tag, e in page.elements if "fill-opacity: 0.16" in e.get("style", "")]
    assert len(bands) >= 2
    alone = compare(make_variant("alone", (50.0,)))
    assert "band" not in alone.text
    assert "fill-opacity: 0.16" not in alone.source


def test_differences_are_paired_by_seed(make_variant, compare):
    page = compare(make_variant("base", (50.0, 52.0)), make_variant("uskd", (51.5, 51.75)))
    assert chart(page, "Dot plot of difference of top-1") == (
        "Dot plot of difference of top-1 (percentage points). "
        "Means: uskd +0.62 (seeds +1.50, \u22120.25)."
    )
    assert chart(page, "Dot plot of difference of NLL").endswith("uskd 0.000 (seeds 0.000, 0.000).")


def test_charts_of_the_analysis_say_its_numbers(make_variant, compare):
    page = compare(
        make_variant("base", per_class=(50.0, 60.0, 70.0, None)),
        make_variant("uskd", per_class=(40.0, 75.0, 70.0, None)),
    )
    assert chart(page, "Log-log chart of the mean probability of uskd").endswith(
        "0.6 to 0.05; straight line through ranks 1 to 4: exponent 1.62, R\u00b2 0.938."
    )
    assert chart(page, "Reliability diagram of uskd") == (
        "Reliability diagram of uskd: "
        "25 % right at 50 %, 75 % right at 96 % confidence. ECE 5.00 %."
    )
    assert chart(page, "Bar chart of") == (
        "Bar chart of change of top-1 (points), uskd: bee +15.0, ant \u221210.0."
    )
    assert chart(page, "Stacked areas of share of the gradient over steps, uskd").endswith(
        "At the end: task 75 %, weak 25 %."
    )
    assert chart(page, "Scatter plot of 3 test images of uskd").endswith("classes ant, cat.")


def test_errors_within_groups_and_pairs_are_counted(make_variant, compare, make_analysis):
    confusion = [[0, 2, 6], [1, 0, 2], [3, 0, 4]]
    page = compare(
        make_variant("base"), make_variant("uskd", analysis=make_analysis(confusion=confusion))
    )
    assert page.row("all classes") == ["all classes", "70.0 %", "16.7 %"]
    assert page.row("ant bee") == ["ant bee", "66.7 %", "25.0 %"]
    assert page.row("cat dog") == ["cat dog", "100.0 %", "0.0 %"]
    assert page.row("ant \u2192 bee") == ["ant \u2192 bee", "6.0", "0.0"]
    assert page.row("dog \u2192 ant") == ["dog \u2192 ant", "0.0", "4.0"]


def test_without_groups_only_pairs_are_shown(make_variant, compare, make_analysis):
    page = compare(make_variant("base", analysis=make_analysis(groups=None)))
    assert "Errors within groups" not in page.text
    assert page.row("ant \u2192 bee")[1] == "6.0"


def test_settings_that_differ_are_told_and_others_not(make_variant, compare):
    page = compare(
        make_variant("base", whole=False, config="seed: 0\nmethod: {kind: none}\nepochs: 2\n"),
        make_variant(
            "uskd", whole=False, config="seed: 1\nmethod: {kind: uskd, w: [1]}\nepochs: 2"
        ),
        make_variant("broken", whole=False, config="{{ not yaml"),
    )
    assert page.row("method.kind") == ["method.kind", "none", "uskd", "\u2013"]
    assert page.row("method.w") == ["method.w", "\u2013", "[1]", "\u2013"]
    assert not any(row[0] == "seed" for row in page.rows)


def test_what_no_run_has_is_left_out(make_variant, compare):
    page = compare(make_variant("base", whole=False), make_variant("uskd", whole=False))
    assert headings(page) == ["Results", "Curves", "Paired differences", "What was run"]


def test_variant_without_an_analysis_is_named(make_variant, compare):
    page = compare(make_variant("base"), make_variant("old", whole=False), make_variant("uskd"))
    assert headings(page) == SECTIONS
    assert page.text.count("no values: old") >= 5
    assert "saved no soft labels" in page.text


def test_baseline_without_an_analysis_leaves_the_others(make_variant, compare):
    page = compare(
        make_variant("old", whole=False), make_variant("uskd", per_class=(50.0, 60.0, 70.0, None))
    )
    assert "Hardest classes" in headings(page)
    assert chart(page, "Bar chart of top-1 (%), uskd").endswith("ant 50.0, bee 60.0, cat 70.0.")


def test_one_variant_with_one_seed_has_a_page(make_variant, compare):
    page = compare(make_variant("base", (50.0,)))
    assert "One run: one variant with seed 0" in page.text
    assert "One seed is no evidence" in page.text
    assert "Paired differences" not in page.text
    assert "Hardest classes" in headings(page)


def test_twelve_variants_have_a_curve_each_beside_the_baseline(make_variant, compare):
    variants = [
        make_variant(
            f"m{i}",
            (50.0 + i,),
            whole=False,
            metrics=f'{{"epoch": 1, "step": 9, "eval/top1": {50 + i}}}',
        )
        for i in range(12)
    ]
    page = compare(*variants)
    labels = [svg["aria-label"] for svg in page.all("svg")]
    charts = [label for label in labels if label.startswith("Line chart of top-1")]
    assert len(charts) == 12
    assert charts[11].endswith("Last values: m0 50.00; m11 61.00.")
    assert "Gray: m0." in page.text
    assert len(labels) == len(set(labels))
    marks = {(s["class"], s["style"]) for s in page.all("span") if "swatch" in s.get("class", "")}
    assert len(marks) >= 8


def test_numbers_of_a_run_that_went_wrong_still_have_a_page(make_variant, compare, make_analysis):
    wrong = make_analysis(
        zipf={"mean_sorted_softmax": [None] * 4, "exponent": None, "r2": None, "ranks": [1, 4]},
        reliability={"confidence": [None] * 15, "accuracy": [None] * 15, "count": [0] * 15},
        per_class=[None] * 4,
        confusion=[],
        features={"class": [0], "x": [None], "y": [1.0], "explained": [0, 0]},
    )
    page = compare(make_variant("base"), make_variant("nan", (float("nan"), 1e300), analysis=wrong))
    assert "Reliability diagram of nan: no images" in page.source


@pytest.mark.parametrize(
    "bad",
    [
        "</style></svg><script>alert(1)</script>\"'`onload=alert(1) x= {{ 7 * 7 }} $\\alpha$",
        "x" * 10_000,
        "\u6f22\u5b57\u202e\ufffd",
    ],
)
def test_hostile_texts_stay_texts(make_variant, compare, make_analysis, make_gallery, bad):
    def page_of(text):
        classes = [text, text, "cat", "dog"]
        known = json.dumps({"a": text}).encode("utf-8", "replace").decode()
        options = {"analysis": make_analysis(classes), "config": known, "label": text}
        # The name of a folder is not its content's affair.
        first = make_variant("base", (50.0,), environment={"system": text}, **options)
        second = make_variant("other", (51.0,), **options)
        variants = [
            Variant(text + end, v.folders) for end, v in zip("ab", (first, second), strict=True)
        ]
        page = compare(*variants, title=text, notes=[text], command=text, table=[{text: text}] * 2)
        for folder in first.folders + second.folders:
            folder.rename(folder.with_name(f"{folder.name}-{len(text)}"))
        return page

    page, plain = page_of(bad), page_of("plain")
    for tag in ("svg", "text", "td", "th", "li", "section", "script", "style", "img"):
        assert len(page.all(tag)) == len(plain.all(tag)), tag
    assert not any(key.startswith("on") for _, element in page.elements for key in element)


def test_same_input_gives_the_same_file(make_variant, tmp_path):
    variants = [make_variant("base", (50.0,)), make_variant("uskd", (51.0,))]
    table = [{"a": "1"}, {"a": "2"}]
    one, two = (
        write_comparison(variants, tmp_path / f"{n}.html", title="x", table=table) for n in "12"
    )
    assert one.read_bytes() == two.read_bytes()
    page = Page(one)
    names = [element["id"] for _, element in page.elements if "id" in element]
    assert len(names) == len(set(names))
    assert "http" not in page.source.replace("http-equiv", "")


def test_page_of_one_run_has_the_charts_of_its_analysis(make_run, make_analysis, tmp_path):
    run = make_run(analysis=make_analysis(), metrics=log())
    page = Page(write_report([run], tmp_path / "r.html", title="x"))
    assert headings(page) == [
        name
        for name in [*SECTIONS[:5], "Hardest classes", *SECTIONS[6:]]
        if name not in ("Paired differences", "Soft labels")
    ]
    assert page.row("ant \u2192 bee") == ["ant \u2192 bee", "6"]


def test_wrong_arguments_are_errors(make_variant, tmp_path):
    base, other = make_variant("base", whole=False), make_variant("one", (50.0,), whole=False)
    shifted = Variant("shifted", base.folders[::-1])

    def write(*variants, rows=None):
        table = [{}] * (len(variants) if rows is None else rows)
        write_comparison(variants, tmp_path / "c.html", title="x", table=table)

    with pytest.raises(ValueError, match="no variant, expected at least one"):
        write()
    with pytest.raises(ValueError, match="2 variants are named 'base', expected one"):
        write(base, base)
    with pytest.raises(ValueError, match=r"'one' has 1 runs with the seeds \[0\], expected 2 with"):
        write(base, other)
    with pytest.raises(
        ValueError, match=r"variant 'none' has 0 runs with the seeds .*, expected 1"
    ):
        write(Variant("none", ()))
    with pytest.raises(ValueError, match=r"'shifted' has 2 .* seeds \[1, 0\], .* \[0, 1\] in this"):
        write(base, shifted)
    with pytest.raises(ValueError, match="table has 3 rows, expected one for each of 1 variants"):
        write(base, rows=3)
    with pytest.raises(ValueError, match=r"summary\.json"):
        write(Variant("gone", (tmp_path / "gone",)))
    assert not (tmp_path / "c.html").exists()


@pytest.mark.slow
def test_page_of_eight_variants_and_six_seeds_is_small_and_quick(
    make_variant, compare, make_analysis
):
    classes = [chr(0x100 + i) for i in range(100)]
    analysis = make_analysis(
        classes,
        groups=[i // 5 for i in range(100)],
        per_class=[float(i) for i in range(100)],
        confusion=[[i % 100, (i + 1 + i // 100) % 100, 60 - i // 100] for i in range(5000)],
        features={
            "class": [i % 10 for i in range(400)],
            "x": [i % 17 / 3 for i in range(400)],
            "y": [i % 23 / 5 for i in range(400)],
            "explained": [0.5, 0.25],
        },
    )
    variants = [
        make_variant(
            f"method {i}",
            tuple(map(float, range(50, 56))),
            analysis=analysis,
            metrics=log(epochs=300),
        )
        for i in range(8)
    ]
    start = time.perf_counter()
    page = compare(*variants)
    assert time.perf_counter() - start < 30
    assert len(page.source) < 2_000_000


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("number", "page"), [(0, "#fcfcfb"), (1, "#1c1f23")])
def test_every_color_can_be_read_as_text(number, page):
    for pair in RUN_COLOURS:
        light, dark = sorted((luminance(pair[number]), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair
    assert len({pair[number] for pair in RUN_COLOURS}) == 8


def test_page_defines_each_color_for_both_schemes(make_variant, compare):
    page = compare(make_variant("base", whole=False))
    for number in range(len(RUN_COLOURS)):
        assert len(re.findall(rf"--run-{number}: #", page.source)) == 2
