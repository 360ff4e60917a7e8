"""Small run folders as the trainer writes them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave

ENVIRONMENT = {
    "python": "3.11.7",
    "torch": "2.6.0",
    "commit": None,
    "system": "Linux",
    "processor": "a processor",
    "cores": 2,
    "threads": 1,
    "device": "cpu",
    "accelerator": None,
    "processes": 1,
}


def png_text() -> str:
    buffer = io.BytesIO()
    imsave(buffer, np.linspace(0, 1, 64).reshape(8, 8), format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def log(top1: float = 50.0, shares: tuple[float, float] = (0.75, 0.25), epochs: int = 2) -> str:
    """Lines of a metrics file with all that the page draws."""
    lines = [
        {
            "epoch": 0,
            "step": step,
            "train/task": 2.0,
            "train/method": 1.0,
            "train/gradient_share/task": shares[0],
            "train/gradient_share/method/weak": shares[1],
        }
        for step in range(4)
    ]
    lines += [
        {
            "epoch": epoch,
            "step": 2 * epoch,
            "eval/top1": top1 - epochs + epoch,
            "eval/nll": 2.0,
            "eval/ece": 5.0,
            "eval/zipf_r2": 0.5 + epoch / 8,
            "eval/zipf_exponent": 1.5,
        }
        for epoch in range(1, epochs + 1)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def make_gallery() -> Callable[..., dict[str, object]]:
    """Returns a function that makes the content of a gallery with one image."""

    def make(class_names: list[str] | None = None, **changes: object) -> dict[str, object]:
        image = {
            "index": 17,
            "target": 0,
            "shape": [8, 8],
            "png": png_text(),
            "target_value": 1.1337,
            "non_target": [[2, 0.5], [1, 0.25]],
            "prediction": [[2, 0.625], [0, 0.25], [1, 0.125]],
        }
        return {
            "class_names": class_names or ["ant", "bee", "cat"],
            "images": [{**image, **changes}],
            "what": "Zipf's law over the ranks.",
        }

    return make


@pytest.fixture
def make_analysis() -> Callable[..., dict[str, object]]:
    """Returns a function that makes the content of an analysis of four classes in two groups."""

    def make(class_names: list[str] | None = None, **changes: object) -> dict[str, object]:
        empty = [None] * 13
        return {
            "images": 40,
            "class_names": class_names or ["ant", "bee", "cat", "dog"],
            "groups": [0, 0, 1, 1],
            "temperature": {"value": 1.5, "nll": 1.0, "ece": 2.0},
            "zipf": {
                "mean_sorted_softmax": [0.6, 0.2, 0.15, 0.05],
                "exponent": 1.625,
                "r2": 0.9375,
                "ranks": [1, 4],
            },
            "reliability": {
                "confidence": [*empty, 0.5, 0.96],
                "accuracy": [*empty, 0.25, 0.75],
                "count": [*[0] * 13, 10, 30],
            },
            "per_class": [50.0, 60.0, 70.0, None],
            "confusion": [[0, 1, 6], [1, 2, 3], [2, 3, 1]],
            "teacher": None,
            "features": {
                "what": "first two principal components of the classifier's input",
                "class": [0, 0, 2],
                "x": [0.0, 1.0, 2.0],
                "y": [2.0, 1.0, 0.0],
                "explained": [0.5, 0.25],
            },
            **changes,
        }

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes a run folder and returns it."""

    def make(
        name: str = "uskd",
        *,
        metrics: str | None = None,
        gallery: Mapping[str, object] | None = None,
        analysis: Mapping[str, object] | None = None,
        environment: Mapping[str, object] | None = None,
        config: str = "method:\n  kind: uskd\n",
        final: Mapping[str, float] | None = None,
        **summary: object,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        final = {"top1": 61.237, "nll": 1.23456, "ece": 4.321} if final is None else final
        record = {
            "label": name.upper(),
            "method": name,
            "model": "timm:tiny",
            "data": "toy",
            "seed": 0,
            "epochs": 2,
            "final": final,
            "best": {**final, "top1": 62.5, "epoch": 1},
            "seconds": 12.5,
            "parameters": 1234,
            "complete": True,
            **summary,
        }
        (folder / "summary.json").write_text(json.dumps(record))
        if metrics is None:
            lines: list[dict[str, float]] = [
                {
                    "epoch": step // 4,
                    "step": step,
                    "train/loss": 3.5 - step / 8,
                    "train/task": 2.5 - step / 8,
                    "train/method": 1.0,
                    "train/lr": 0.1,
                }
                for step in range(8)
            ]
            lines += [
                {"epoch": epoch, "step": 4 * epoch}
                | {f"eval/{key}": value - 2 + epoch for key, value in final.items()}
                for epoch in (1, 2)
            ]
            metrics = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(metrics)
        (folder / "timings.jsonl").write_text(
            '{"epoch": 0, "seconds": 6.0, "images_per_second": 900}\n'
            '{"epoch": 1, "seconds": 6.0, "images_per_second": 1100}\n'
        )
        (folder / "config.yaml").write_text(config)
        (folder / "environment.json").write_text(json.dumps({**ENVIRONMENT, **(environment or {})}))
        if gallery is not None:
            (folder / "gallery.json").write_text(json.dumps(gallery))
        if analysis is not None:
            (folder / "analysis.json").write_text(json.dumps(analysis))
        return folder

    return make
