"""Write the figures in README and docs from the files in results/: `make docs`."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import ablation_tables, comparison_tables, method_tables

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/contributing/imagenet_plan.md",
    *(f"docs/tables/{page.name}" for page in sorted((ROOT / "docs" / "tables").glob("*.md"))),
)
COMPARISONS = ("full_fonts", "few_fonts", "fashion_mnist", "small_vit", "vit_patch4", "tuned")
NAMES = {
    "cross_entropy": "cross-entropy",
    "zipf_ls": "Zipf's LS",
    "uskd": "USKD",
    "nkd": "NKD (with the teacher)",
    "kd": "KD",
}


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))
    return content


def _where(environment: Mapping[str, Any], threads: str = "one thread a run") -> str:
    return (
        f"{environment['processor']}, {environment['cores']} cores, {threads}, "
        f"torch {environment['torch']}, commit {environment['commit']}"
    )


def _demo_rows(demo: Mapping[str, Any]) -> list[str]:
    rows = [
        "| labels | top-1 % | group % | NLL nats | ECE % | step time / cross-entropy |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, values in demo["results"].items():
        cells = (
            f"{values['top1']:.1f}",
            f"{values['group_top1']:.1f}",
            f"{values['nll']:.3f}",
            f"{values['ece']:.1f}",
            f"{values['step_time_ratio']:.2f}",
        )
        rows.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return rows


def demo_table() -> str:
    """The demo's table, with the command that makes it."""
    demo = _read("demo.json")
    lines = _demo_rows(demo)
    seed = demo["environment"]["seed"]
    lines += ["", f"`{demo['command']}`, seed {seed}, 8,000 test images, last epoch."]
    return "\n".join(lines)


def demo_details() -> str:
    """The demo's table with what it was run on."""
    demo = _read("demo.json")
    spread = [
        f"{NAMES[name]} {v['step_time_ratio_low']:.2f} to {v['step_time_ratio_high']:.2f}"
        for name, v in demo["results"].items()
        if name != "cross_entropy"
    ]
    times = _read("teacher/summary.json")["parameters"] / demo["parameters"]
    return "\n".join(
        [
            *_demo_rows(demo),
            "",
            f"`{demo['command']}` on {_where(demo['environment'])}. One seed: no evidence of a "
            "difference between methods. glyphs100 is rendered text, not natural images.",
            "",
            "Step times are medians over rounds in turn; their middle halves: "
            f"{'; '.join(spread)}. NKD's includes the forward of a teacher with "
            f"{times:.0f} times the student's parameters.",
        ]
    )


def teacher() -> str:
    """What the shipped teacher reached."""
    summary = _read("teacher/summary.json")
    environment = _read("teacher/environment.json")
    final = summary["final"]
    return (
        f"`{summary['model']}`, {summary['parameters']:,} parameters, {summary['epochs']} epochs, "
        f"seed {summary['seed']}: top-1 {final['top1']:.2f} %, group {final['group_top1']:.2f} %, "
        f"NLL {final['nll']:.3f} nats, ECE {final['ece']:.2f} %. `make teacher` trains it again "
        f"(torch {environment['torch']})."
    )


def benchmarks() -> str:
    """Overheads and start-up times."""
    results = _read("benchmarks.json")
    lines = [
        "| student | batch | method | over | median | middle half | rounds |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for part in results["overhead"]:
        for name, value in part["ratio"].items():
            label = NAMES[name].partition(" (")[0]
            over = value["over"].replace("_", "-")
            spread = f"{value['low']:.3f} to {value['high']:.3f}"
            lines.append(
                f"| {part['student']} | {part['batch_size']} | {label} | {over} "
                f"| {value['median']:.3f} | {spread} | {part['rounds']} |"
            )
    lines += [
        "",
        "Step times as ratios of steps in turn, one thread.",
        "",
        "| student | batch | speed from the in-memory source / on one fixed batch | middle half |",
        "| --- | ---: | ---: | ---: |",
    ]
    for part in results["pipeline"]:
        value = part["speed_ratio"]
        spread = f"{value['low']:.3f} to {value['high']:.3f}"
        lines.append(
            f"| {part['student']} | {part['batch_size']} | {value['median']:.3f} | {spread} |"
        )
    start = results["start_up"]
    lines += [
        "",
        f"Importing all of `softlabels` takes {start['import everything beyond torch']:.2f} s "
        "beyond torch's own import; `softlabels --help` takes "
        f"{start['seconds']['softlabels --help']:.2f} s as a whole process.",
        "",
        f"`{results['command']}` on {_where(results['environment'])}.",
    ]
    return "\n".join(lines)


PROVIDERS = ("eager", "compiled", "transcription")


def _loss(name: str) -> str:
    name, _, num_votes = name.partition("_ls_")
    return f"Zipf's LS, K = {num_votes}" if num_votes else NAMES[name].partition(" (")[0]


def _bound_rows(results: Mapping[str, Any]) -> list[str]:
    rows = [
        "| what | provider | figure | B x C | measured | middle half | bound | held |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for bound in results["bounds"]:
        name = "making the votes" if bound["name"] == "votes" else _loss(bound["name"])
        figure = bound["figure"].replace("_", "-").replace("/ sort", "/ `torch.sort`")
        spread = f"{bound['low']:.2f} to {bound['high']:.2f}" if "low" in bound else ""
        rows.append(
            f"| {name} | {bound['provider']} | {figure} | {bound['size']} "
            f"| {bound['measured']:.2f} | {spread} | {bound['at_most']:g} "
            f"| {'yes' if bound['held'] else '**no**'} |"
        )
    return rows


def _three(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _size_rows(part: Mapping[str, Any]) -> list[str]:
    times, memory = part["milliseconds"], part["extra_memory"]

    def row(label: str, provider: str, name: str) -> str:
        time = times[name]
        return (
            f"| {part['size']} | {label} | {provider} | {_three(time['median'])} "
            f"| {_three(time['low'])} to {_three(time['high'])} "
            f"| {part['over_cross_entropy'][name]['median']:.2f} "
            f"| {part['over_sort'][name]['median']:.2f} | {memory[name]:.1f} |"
        )

    losses = dict.fromkeys(name.partition("/")[0] for name in times if "/" in name)
    return [
        row("cross-entropy", "torch", "cross_entropy"),
        row("`torch.sort`", "torch", "sort"),
        *(row(_loss(loss), p, f"{loss}/{p}") for loss in losses for p in PROVIDERS),
    ]


def losses() -> str:
    """Time and memory of the losses beside their bounds, and what the votes cost in a step."""
    results = _read("losses.json")
    lines = [
        *_bound_rows(results),
        "",
        "| B x C | loss | provider | ms | middle half | / cross-entropy | / `torch.sort` "
        "| extra memory |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part in results["sizes"]:
        lines += _size_rows(part)
    rounds = ", ".join(f"{count} at {size}" for size, count in results["rounds"].items())
    lines += [
        "",
        f"Rounds: {rounds}. Extra memory in B x C floats.",
        "",
        "| student | classes | pixels | batch | K | step ms | votes ms | votes / step % "
        "| middle half | extra MB | steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for step in results["votes"]:
        share = step["share"]
        lines.append(
            f"| {step['student']} | {step['num_classes']} | {step['image_size']} "
            f"| {step['batch_size']} | {step['votes']} | {step['step_milliseconds']['median']:.0f} "
            f"| {step['votes_milliseconds']['median']:.1f} | {100 * share['median']:.2f} "
            f"| {100 * share['low']:.2f} to {100 * share['high']:.2f} "
            f"| {step['extra_megabytes']:.1f} | {step['rounds']} |"
        )
    threads = f"{results['environment']['threads']} threads"
    lines += ["", f"`{results['command']}` on {_where(results['environment'], threads)}."]
    return "\n".join(lines)


def teacher_cache() -> str:
    """What a teacher cache takes and loses, by the number of stored classes."""
    results = _read("teacher_cache.json")
    temperature = f"{results['temperature']:g}"
    lines = [
        f"| k | MB per million images and draw | mean KL | largest KL | mean KL, T = {temperature} "
        "| same first class % | NKD loss, error % |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in results["sizes"]:
        cells = (
            f"{size['bytes_per_view']}",
            f"{size['mean_kl']:.2g}",
            f"{size['max_kl']:.2g}",
            f"{size['mean_kl_at_temperature']:.2g}",
            f"{100 * size['top1_agreement']:.2f}",
            f"{100 * size['nkd_relative_error']:.2g}",
        )
        lines.append(f"| {size['top']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{results['images']:,} images, {results['classes']} classes. The first class differs "
        "where two logits are equal in half precision. "
        f"`{results['command']}` on {_where(results['environment'])}.",
    ]
    return "\n".join(lines)


def precision() -> str:
    """How fast each network's step is in each precision and memory format, and the choice."""
    results = _read("precision.json")
    ways = ["channels last", "bfloat16", "both"]
    lines = [
        f"| network | pixels | float32, ms | {' | '.join(ways)} | auto |",
        f"| --- | ---: | ---: | {'---: | ' * len(ways)}--- |",
    ]
    for row in results["networks"]:
        cells = [
            f"{s['median']:.2f} ({s['low']:.2f} to {s['high']:.2f})" if s else ""
            for s in map(row["speed"].get, ways)
        ]
        name = f"{row['network'].removeprefix('timm:')}, batch {row['batch_size']}"
        first = (name, str(row["pixels"]), f"{row['milliseconds']:.0f}")
        lines.append(f"| {' | '.join((*first, *cells, row['chosen']))} |")
    lines += [
        "",
        f"Median and middle half of {results['rounds']} rounds. `{results['command']}` on "
        f"{_where(results['environment'])}.",
    ]
    return "\n".join(lines)


def reading() -> str:
    """How fast photographs are read in several ways, and how far their pixels are from Pillow's."""
    results = _read("reading.json")
    lines = [
        "| way | images/s | softlabels is so many times as fast | middle half |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, way in results["ways"].items():
        speed = statistics.median(way["images_per_second"])
        low, middle, high = statistics.quantiles(way["softlabels_over_this"], n=4)
        lines.append(f"| {name} | {speed:.0f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    far = results["difference_from_pillow"]
    return "\n".join(
        [
            *lines,
            "",
            f"{results['images']} photographs, {results['size']} pixels, {results['rounds']} "
            "rounds. Test images, resized and cropped, are at most "
            f"{far['largest']:.0f} of 255 levels from Pillow's, {far['mean']:.4f} in the mean. "
            f"`{results['command']}` on {_where(results['environment'], 'one core')}.",
        ]
    )


def scaling() -> str:
    """What running for long and on several processes costs, beside the bounds."""
    results = _read("scaling.json")
    lines = [
        "| figure | measured | middle half | bound | held | rounds |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for bound in results["bounds"]:
        sign = "at least" if bound["at_least"] else "at most"
        lines.append(
            f"| {bound['figure']} | {bound['median']:.3f} "
            f"| {bound['low']:.3f} to {bound['high']:.3f} | {sign} {bound['bound']:g} "
            f"| {'yes' if bound['held'] else '**no**'} | {bound['rounds']} |"
        )
    lines += [
        "",
        "| memory of a run: source | epochs | MB after a quarter of them | MB at the end "
        "| growth kB an epoch |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {run['source']} | {run['epochs']} | {run['megabytes_first']:.1f} "
        f"| {run['megabytes_last']:.1f} | {run['kilobytes_an_epoch']:.1f} |"
        for run in results["memory"]
    ]
    return "\n".join([*lines, "", f"`{results['command']}` on {_where(results['environment'])}."])


def plan_decoding() -> str:
    """How fast one core of this machine reads training images."""
    results = _read("scaling.json")
    part = results["decoding"]
    speed = part["images_per_second"]
    return (
        f"{1e3 / speed['median']:.1f} ms: {speed['median']:.0f} images/s (middle half "
        f"{speed['low']:.0f} to {speed['high']:.0f}; synthetic files of {part['kilobytes']:.0f} "
        f"kB; {_where(results['environment'], 'one thread')})."
    )


def _plan(name: str) -> str:
    from benchmarks.plan import sections

    return sections(_read("scaling.json")["decoding"]["images_per_second"]["median"])[name]


def _comparison(name: str, *, pairs: bool = True) -> str:
    results = comparison_tables.read_comparison(name)
    table = comparison_tables.comparison(name)
    if results is None:
        return "\n".join(table)
    seeds = f"{len(results['seeds'])} paired seeds; mean ± standard deviation."
    made = f"{seeds} {comparison_tables.where(results, name)}"
    others = ["", *comparison_tables.between(results)] if pairs else []
    return "\n".join([*table, *others, "", made])


def published_rows() -> str:
    """All rows of both papers' tables: recipe, published figure, ours."""
    from softlabels.experiments.reproduce import recipes_of, tables
    from softlabels.training.config import load_recipe, resolve

    lines: list[str] = []
    for table in tables():
        configs = {name: resolve(load_recipe(name)) for name in recipes_of(table)}
        titles = {config.paper.table for config in configs.values()} - {None}
        if not titles:
            continue
        lines += [
            f"### {titles.pop()}: `{table}`",
            "",
            "| recipe | row | paper, top-1 % | ours |",
            "| --- | --- | ---: | --- |",
        ]
        ours = _reproduced(table)
        for name, config in configs.items():
            paper = config.paper
            figure = "unknown" if paper.top1 is None else f"{paper.top1:.2f}"
            if paper.top1_std is not None:
                figure += f" ± {paper.top1_std:.2f}"
            if paper.top1 is None and paper.gain is not None:
                figure = f"{paper.gain:+.2f} over its baseline"
            needs = _NEEDED[str(config.data.source)]
            cell = ours.get(name, f"not run here (needs {needs})")
            lines.append(f"| `{name}` | {paper.row} | {figure} | {cell} |")
        lines.append("")
    return "\n".join(lines).rstrip()


_NEEDED = {
    "cifar100": "CIFAR-100 and a GPU",
    "tiny_imagenet": "TinyImageNet and a GPU",
    "imagenet": "ImageNet and GPUs",
    "inat21": "iNat21 and GPUs",
}


def _reproduced(table: str) -> dict[str, str]:
    """Our figures of a table's recipes, from what `softlabels reproduce` left in results/."""
    file = ROOT / "results" / "reproduce" / f"{table}.json"
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return {
        row["recipe"]: ", ".join(f"{top1:.2f}" for top1 in row["top1"]) for row in content["rows"]
    }


SECTIONS: dict[str, Callable[[], str]] = {
    "published-rows": published_rows,
    "methods-cost": method_tables.cost,
    "methods-compare": method_tables.comparison,
    "gpu-cost": method_tables.gpu_cost,
    "evidence-ablations": ablation_tables.ablations,
    **{f"evidence-{name}": partial(_comparison, name) for name in COMPARISONS},
    "over-seeds": partial(_comparison, "full_fonts", pairs=False),
    "scaling": scaling,
    "plan-decoding": plan_decoding,
    **{
        name: partial(_plan, name)
        for name in (
            "plan-images",
            "plan-network",
            "plan-memory",
            "plan-teachers",
            "plan-caches",
        )
    },
    "demo-table": demo_table,
    "demo-details": demo_details,
    "teacher": teacher,
    "benchmarks": benchmarks,
    "losses": losses,
    "teacher-cache": teacher_cache,
    "precision": precision,
    "reading": reading,
}


def rendered(text: str) -> str:
    """A page's text with every generated section filled in."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name}:begin -->\n{SECTIONS[name]()}\n<!-- {name}:end -->"

    return re.sub(r"<!-- ([\w-]+):begin -->\n.*?<!-- \1:end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the pages."""
    ablation_tables.draw_sensitivity(ROOT / "docs" / "sensitivity.svg")
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        path.write_text(after, encoding="utf-8")
        print(f"{page}: {'changed' if after != before else 'as it was'}")


if __name__ == "__main__":
    main()
