"""Choose the settings of every method on held-out training fonts, with equal budgets.

    make results-sweeps           # half an hour on two idle cores; after NAME=few_fonts

For each variant of results/few_fonts so many trials of half its epochs, judged on the last 48 of
the training fonts; the test fonts are never read. Learning rate and weight decay are chosen for
cross-entropy and kept for all others, which then have their own settings chosen. The searches go to
results/sweeps, what they chose to results/tuned/comparison.yaml.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks.comparison_tables import RESULTS
from softlabels.experiments.comparison import Comparison, planned, read_comparison
from softlabels.experiments.search_space import nested, with_values
from softlabels.experiments.sweep import run_sweep
from softlabels.experiments.sweep_record import SweepOptions
from softlabels.training.recipes import merged

NAME = "few_fonts"
TRIALS = 8
EPOCHS = 15
# One search for two sets of published weights, from the first; what it finds has its own name.
LEFT_OUT = ("USKD, CIFAR's weights",)
RENAMED = {"USKD, ImageNet's weights": "USKD"}
OUTPUT = Path("runs/sweeps")
HEAD = """# results/few_fonts with the settings that the searches in results/sweeps chose.
# Written by make results-sweeps.
#   make results NAME=tuned
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose the settings of every method.")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    options = parser.parse_args()
    request = read_comparison(str(RESULTS / NAME / "comparison.yaml"))
    if request is None:
        raise ValueError(f"results/{NAME}/comparison.yaml holds no comparison")
    console = Console(stderr=True)
    variants, _ = planned(request, Path("runs/results/runs"))
    settings = request.settings
    tuned: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for number, variant in enumerate(variants):
        if variant.name in LEFT_OUT:
            continue
        config = variant.runs[0].config.model_copy(
            update={"output": None, "epochs": EPOCHS, "eval_every": EPOCHS}
        )
        config = with_values(config, shared)
        folder = variant.config.label if number else "cross_entropy"
        result = run_sweep(
            config,
            SweepOptions(trials=TRIALS, jobs=options.jobs),
            output=OUTPUT / folder,
            threads=1,
            console=console,
        )
        best = dict(result.best.values)
        kept = RESULTS / "sweeps" / folder
        kept.mkdir(parents=True, exist_ok=True)
        for name in ("sweep.json", "sweep.md"):
            shutil.copy(result.folder / name, kept / name)
        if number == 0:
            shared = best
            settings = merged(settings, nested(shared))
            tuned[variant.name] = "cross_entropy"
            continue
        given, kind = request.variants[variant.name], config.method.kind
        own = {} if kind == "none" else {"method": {"kind": kind}}
        name = RENAMED.get(variant.name, variant.name)
        tuned[name] = merged(own if isinstance(given, str) else given, nested(best))
    comparison = Comparison(
        title="glyphs100, few fonts, settings chosen on held-out training fonts",
        settings=settings,
        seeds=request.seeds,
        variants=tuned,
    )
    path = RESULTS / "tuned" / "comparison.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEAD + comparison.dump(), encoding="utf-8")
    print(yaml.safe_dump(tuned))


if __name__ == "__main__":
    main()
