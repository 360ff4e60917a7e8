"""Measure what a teacher cache loses and takes, by the number of stored classes.

The shipped teacher answers one draw of the augmentation of all glyphs100 training images. For each
k its answers are stored, read and made dense again, and compared with the full ones: no times.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import softlabels
from softlabels import NKDLoss, nkd_loss
from softlabels.data import DataSource
from softlabels.distill.answers import bytes_per_view, compress, densify
from softlabels.distill.cache_folder import VERSION, CacheFolder, Manifest
from softlabels.training.build import build_source, build_teacher
from softlabels.training.cache_teacher import answer_error
from softlabels.training.config import build_method, load_recipe, resolve
from softlabels.training.run_folder import environment

RECIPE = "glyphs100/nkd"
STORED_CLASSES = (1, 2, 5, 10, 20, 50, 100)
BATCH_SIZE = 500


def answered(
    source: DataSource, teacher: torch.nn.Module, student: torch.nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both networks for all training images as the first draw shows them, and labels."""
    parts = []
    with torch.no_grad():
        for batch in source.train_views(draw=(0, 0), batch_size=BATCH_SIZE, device="cpu"):
            parts.append((teacher(batch.images), student(batch.images), batch.target))
    of_teacher, of_student, target = zip(*parts, strict=True)
    return torch.cat(of_teacher), torch.cat(of_student), torch.cat(target)


def stored(logits: Tensor, top: int, folder: Path) -> tuple[Tensor, int]:
    """Dense logits from a file of one draw, and the file's size in bytes."""
    num_images, num_classes = logits.shape
    manifest = Manifest(
        version=VERSION,
        num_images=num_images,
        num_classes=num_classes,
        num_draws=1,
        top=top,
        seed=0,
        images_per_file=num_images,
        precision="no",
        teacher=RECIPE,
        fingerprints=dict.fromkeys(("teacher", "data", "augmentation"), 32 * "0"),
        error={},
    )
    files = CacheFolder(folder / str(top))
    nothing = {"views": 0, "kl_sum": 0, "kl_max": 0, "top1_agreements": 0}
    files.write(manifest, 0, 0, compress(logits, top), nothing)
    dense = densify(files.read(manifest, 0, 0), num_classes)
    return dense, files.file(0, 0).stat().st_size


def measured(
    logits: Tensor, of_student: Tensor, target: Tensor, top: int, method: NKDLoss
) -> dict[str, Any]:
    """Size and error of one k."""
    with tempfile.TemporaryDirectory() as folder:
        dense, size = stored(logits, top, Path(folder))
    divergence, agrees = answer_error(logits, compress(logits, top))
    cooled, got = ((x / method.temperature).double().log_softmax(1) for x in (logits, dense))
    of_full, of_stored = (
        nkd_loss(
            of_student,
            teacher_logits,
            target,
            temperature=method.temperature,
            non_target_weight=method.non_target_weight,
            reduction="none",
        )
        for teacher_logits in (logits, dense)
    )
    return {
        "top": top,
        "bytes_per_view": bytes_per_view(logits.shape[1], top),
        "file_bytes_per_view": size / len(logits),
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "top1_agreement": float(agrees.double().mean()),
        "mean_kl_at_temperature": float((cooled.exp() * (cooled - got)).sum(1).mean()),
        "nkd_relative_error": float((of_stored - of_full).abs().mean() / of_full.mean()),
    }


def main() -> None:
    """Measure each k and write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/teacher_cache.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = resolve({**load_recipe(RECIPE), "threads": 1})
    method = build_method(config)
    assert isinstance(method, NKDLoss)
    source = build_source(config)
    with tempfile.TemporaryDirectory() as folder:
        # What is lost of a loss depends on who is taught: a student after its first epoch.
        trained = softlabels.train(
            source,
            config.student.name,
            epochs=1,
            batch_size=config.batch_size,
            optimizer=config.optimizer.model_dump(),
            threads=1,
            gallery=0,
            output=str(Path(folder) / "run"),
            progress=False,
        )
    teacher = build_teacher(config.teacher, source.info)
    logits, of_student, target = answered(source, teacher, trained.student)
    results = {
        "command": "make bench-cache",
        "environment": environment(config, torch.device("cpu"), 1).dump(),
        "recipe": RECIPE,
        "images": len(logits),
        "classes": logits.shape[1],
        "temperature": method.temperature,
        "student_top1": trained.final["top1"],
        "sizes": [measured(logits, of_student, target, top, method) for top in STORED_CLASSES],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
