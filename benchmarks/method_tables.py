"""Tables of all methods: what they cost, and what they gave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.comparison_tables import comparison as table
from benchmarks.comparison_tables import read_comparison, where

__all__ = ["comparison", "cost", "gpu_cost"]

RESULTS = Path(__file__).parents[1] / "results"
_SHOWN = {
    "cross_entropy": "cross-entropy",
    "label_smoothing": "label smoothing",
}


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _where(results: Mapping[str, Any]) -> str:
    environment = results["environment"]
    return (
        f"{environment['processor']}, {environment['cores']} cores, one thread a run, torch "
        f"{environment['torch']}, commit {environment['commit']}; `{results['command']}`"
    )


def _link(kind: str) -> str:
    return _SHOWN.get(kind, f"[{kind}](../methods/{kind}.md)")


def _spread(value: Mapping[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def _cost_rows(part: Mapping[str, Any]) -> list[str]:
    rows = [
        "| method | seconds an epoch | time / cross-entropy | memory MB | memory / cross-entropy "
        "| learned besides the student | remembered MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    methods = part["methods"].items()
    for kind, values in sorted(methods, key=lambda item: item[1]["time"]["median"]):
        cells = (
            f"{values['seconds_per_epoch']['median']:.0f}",
            _spread(values["time"], 2),
            f"{values['megabytes']:.0f}",
            f"{values['memory']:.2f}",
            f"{values['learned_parameters']:,}",
            f"{values['remembered_megabytes']:.1f}",
        )
        taught = " (T)" if values["reads_teacher"] else ""
        rows.append(f"| {_link(kind)}{taught} | {' | '.join(cells)} |")
    return rows


def _title(part: Mapping[str, Any]) -> str:
    size = part["image_size"]
    return (
        f"Student `{part['student']}`, teacher `{part['teacher']}`, {size}x{size} pixels, batch "
        f"{part['batch_size']}, {part['rounds']} rounds:"
    )


def cost() -> str:
    """What each method costs over cross-entropy."""
    results = _read("methods_cost.json")
    if results is None:
        return "Not measured yet: `make bench-methods`."
    own = results["own_parts"]
    lines = [
        f"Training steps side by side in one run, median and middle half of the ratios; an epoch "
        f"is {results['epoch_images']:,} images, without reading them. (T): the teacher's forward "
        "is in it, and costs the most. Memory: the largest live sum in a step, with weights, "
        "momentum, teacher and what the method remembers.",
        "",
        _title(results["cnn"]),
        "",
        *_cost_rows(results["cnn"]),
        "",
        _title(results["vit"]),
        "",
        *_cost_rows(results["vit"]),
        "",
        f"The method's own part (its heads and its loss, forward and backward, by itself) over a "
        f"training step of `{own['student']}` at {own['image_size']} pixels, batch "
        f"{own['batch_size']} ({own['step_seconds']['median']:.1f} s a step); the bound is "
        f"{100 * own['bound']:.1f} %. The ratio of whole steps beside it moves by more than that "
        "by itself:",
        "",
        "| method | own part, % of a step | whole step / cross-entropy's | within the bound |",
        "| --- | ---: | ---: | --- |",
    ]
    for kind, values in own["methods"].items():
        part = {name: 100 * value for name, value in values["own_part"].items()}
        held = "yes" if values["held"] else "no"
        lines.append(
            f"| {_link(kind)} | {_spread(part, 2)} | {_spread(values['whole_step'], 3)} | {held} |"
        )
    return "\n".join([*lines, "", f"{_where(results)}."])


def gpu_cost() -> str:
    """What the main methods cost on an accelerator."""
    results = _read("gpu_cost.json")
    if results is None:
        return "Not measured yet: `make bench-gpu`."
    lines = [
        "| student | teacher | method | over | milliseconds | step time | memory MB | memory |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for pair in results["pairs"]:
        for kind, value in pair["ratio"].items():
            teacher = pair["teacher"] if "teacher" in value["over"] else ""
            over = value["over"].replace("_", "-")
            lines.append(
                f"| {pair['student']} | {teacher} | {_link(kind)} | {over}, "
                f"{pair['milliseconds'][value['over']]:.1f} ms | {pair['milliseconds'][kind]:.1f} "
                f"| {_spread(value, 3)} | {pair['megabytes'][kind]:.0f} | {value['memory']:.3f} |"
            )
    environment = results["environment"]
    sizes = {pair["batch_size"] for pair in results["pairs"]}
    rounds = {pair["rounds"] for pair in results["pairs"]}
    return "\n".join(
        [
            *lines,
            "",
            f"224x224 pixels, 1,000 classes, batch {', '.join(map(str, sizes))}, "
            f"{results['precision']}, channels last, SGD, {', '.join(map(str, rounds))} rounds; "
            "median and middle half of the ratios of steps in turn, the images on the device "
            f"already. `{results['command']}` on {environment['accelerator']}, torch "
            f"{environment['torch']}, commit {environment['commit']}.",
        ]
    )


def comparison() -> str:
    """All methods on glyphs100."""
    results = read_comparison("methods")
    if results is None:
        return "Not run yet: `make results NAME=methods`."
    seeds = len(results["seeds"])
    return "\n".join(
        [
            f"glyphs100 with 40 of its 239 training fonts, 5 epochs, {seeds} paired seeds, "
            "`resnet8_glyphs` taught by the shipped `resnet14x4_glyphs`; published weights, not "
            "tuned for these data, and a schedule so short that what learns fast is ahead. "
            "Nothing is called better or worse where an interval of the difference to "
            "cross-entropy holds 0.",
            "",
            *table("methods", named=_link, best_first=True),
            "",
            where(results, "methods"),
            "",
            "ViTKD needs two transformers (`make results NAME=vitkd`):",
            "",
            *table("vitkd"),
        ]
    )
