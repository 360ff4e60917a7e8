"""Compare all methods on glyphs100 over paired seeds, and write results/methods.json.

    make results-methods            # about half an hour on two idle cores

Each run is that of the recipe glyphs100/METHOD, on fewer fonts and for fewer epochs: the same
initial weights, data order and augmentation for all methods of a seed. Weights are the published
ones, not tuned for these data. ViTKD, which needs two transformers, is compared with cross-entropy
on a small one, both for more epochs. Runs that are complete are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scipy import stats

from softlabels.losses import METHODS
from softlabels.training.config import (
    Config,
    load_recipe,
    resolve,
)
from softlabels.training.folder import RunFolder
from softlabels.training.trainer import run

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
EPOCHS = 5
NUM_FONTS = 60
VIT = ("vit_teacher", "vit_cross_entropy", "vit_vitkd")
VIT_EPOCHS = 8
BASELINES = {"vit_vitkd": "vit_cross_entropy"}
METRICS = ("top1", "group_top1", "nll", "ece")


def names() -> list[str]:
    """What is compared: the baselines, then each method."""
    return ["cross_entropy", "label_smoothing", *(k for k in METHODS if k != "vitkd"), *VIT]


def _settings(name: str, seed: int, folder: Path) -> tuple[str, dict[str, Any]]:
    """The recipe that a run begins with, and the options over it."""
    options: dict[str, Any] = {
        "seed": seed,
        "epochs": EPOCHS,
        "threads": 1,
        "gallery": 0,
        "data.num_fonts": NUM_FONTS,
    }
    recipe = "vitkd" if name == "vit_vitkd" else name
    teacher = load_recipe(f"glyphs100/{recipe}").get("teacher", {})
    if teacher:
        options["teacher.check"] = "off"
    if teacher.get("recipe"):  # an earlier run of this comparison teaches
        earlier = teacher["recipe"].rpartition("/")[2]
        number = seed if earlier == "cross_entropy" else 0
        options["teacher.weights"] = str(RunFolder(folder / f"{earlier}-{number}").student)
    if name == "vit_teacher":
        options["epochs"] = 2 * VIT_EPOCHS
    elif name in VIT:
        options["epochs"] = VIT_EPOCHS
    recipe = f"glyphs100/{recipe}"
    return recipe, options


def configured(name: str, seed: int, folder: Path) -> Config:
    """The run of a method with a seed."""
    recipe, options = _settings(name, seed, folder)
    values = load_recipe(recipe)
    values["output"] = str(folder / f"{name}-{seed}")
    for key, value in options.items():
        section, _, last = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[last] = value
    return resolve(values)


def _folder(config: Config) -> RunFolder:
    return RunFolder(Path(config.output or ""))


def _train(name: str, seed: int, folder: Path) -> None:
    config = configured(name, seed, folder)
    if not _folder(config).is_complete():
        run(config)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Mean difference over seeds, with the half width of its 95 % t interval."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    deviation = statistics.stdev(differences)
    quantile = float(stats.t.ppf(0.975, len(differences) - 1))
    return {
        "mean": statistics.mean(differences),
        "half_width": quantile * deviation / len(differences) ** 0.5,
    }


def summarised(summaries: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Figures of each recipe over the seeds."""
    found: dict[str, Any] = {}
    for recipe, of_seeds in summaries.items():
        values = {m: [float(s["final"][m]) for s in of_seeds] for m in METRICS}
        baseline = summaries[BASELINES.get(recipe, "cross_entropy")]
        found[recipe] = {
            "runs": values,
            "top1": {
                "mean": statistics.mean(values["top1"]),
                "deviation": statistics.stdev(values["top1"]),
            },
            "nll": statistics.mean(values["nll"]),
            "ece": statistics.mean(values["ece"]),
            "against_baseline": paired(
                values["top1"], [float(s["final"]["top1"]) for s in baseline]
            ),
        }
    return found


def main() -> None:
    """Train what is missing, and write the file with all that is complete."""
    parser = argparse.ArgumentParser(description="Compare all methods on glyphs100.")
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", default="", help="what to train now, by commas; none: nothing")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else names()
    every = {
        name: [
            configured(name, seed, arguments.folder)
            for seed in (SEEDS[:1] if name == "vit_teacher" else SEEDS)
        ]
        for name in names()
    }
    runs = {name: of for name, of in every.items() if name in chosen}
    taught = {"tf_kd_self", "vit_vitkd"}  # by runs of this comparison
    begin = time.perf_counter()
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for group in (set(runs) - taught, set(runs) & taught):
            waiting = {
                pool.submit(_train, name, config.seed, arguments.folder): f"{name}-{config.seed}"
                for name in runs
                if name in group
                for config in runs[name]
            }
            for done in as_completed(waiting):
                done.result()
                print(f"{time.perf_counter() - begin:6.0f} s  {waiting[done]}", flush=True)
    complete = {n: of for n, of in every.items() if all(_folder(c).is_complete() for c in of)}
    summaries = {
        name: [json.loads(_folder(config).summary.read_text(encoding="utf-8")) for config in of]
        for name, of in complete.items()
        if len(of) > 1
    }
    environment = json.loads(_folder(every["cross_entropy"][0]).environment.read_text("utf-8"))
    environment.pop("command", None)
    content = {
        "command": "make results-methods",
        "environment": environment,
        "epochs": EPOCHS,
        "fonts": NUM_FONTS,
        "seeds": SEEDS,
        "not_run": [name for name in every if name not in complete],
        "results": summarised(summaries),
    }
    path = ROOT / "results" / "methods.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
