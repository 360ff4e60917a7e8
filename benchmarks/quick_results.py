"""Repeat a small part of the committed results, and say whether it comes out the same.

    make results-quick            # under 10 minutes on two cores

The baseline and two self-distillations of results/full_fonts, with all of its seeds. For each the
paired mean must lie inside the committed 95 % interval; the status is 1 where one does not.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from benchmarks.comparison_tables import RESULTS, read_comparison
from softlabels.experiments.compare import compare
from softlabels.experiments.comparison import read_comparison as read_request

NAME = "full_fonts"
VARIANTS = ("Zipf's LS", "USKD, ImageNet's weights")
OUTPUT = Path("runs/results-quick")


def main() -> int:
    committed = read_comparison(NAME)
    request = read_request(str(RESULTS / NAME / "comparison.yaml"))
    if committed is None or request is None:
        print(f"results/{NAME} is incomplete: make results NAME={NAME}", file=sys.stderr)
        return 2
    baseline = committed["baseline"]
    kept = {name: request.variants[name] for name in (baseline, *VARIANTS)}
    found = compare(
        request.model_copy(update={"variants": kept}),
        output=OUTPUT,
        jobs=2,
        threads=1,
        command="make results-quick",
        console=Console(stderr=True),
    ).dump()
    before = {v["name"]: v["against_baseline"] for v in committed["variants"]}
    variants = found["variants"]
    now = {v["name"]: v["against_baseline"] for v in variants}
    outside = 0
    for name in VARIANTS:
        low, high = before[name]["top1"]["t"]
        mean = now[name]["top1"]["mean"]
        is_inside = low <= mean <= high
        outside += not is_inside
        print(
            f"{name}: top-1 {mean:+.2f} over {baseline}, {'inside' if is_inside else 'OUTSIDE'} "
            f"the committed 95 % interval {low:+.2f} to {high:+.2f} "
            f"(mean {before[name]['top1']['mean']:+.2f})"
        )
    print(f"report: {OUTPUT / 'report.html'}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
