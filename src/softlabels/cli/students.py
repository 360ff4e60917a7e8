"""The commands for a trained student: `eval`, `analyze`, `predict` and `export`."""

import csv
import io
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from tyro.conf import Positional

from softlabels.cli.parsing import Count, UsageError, command, metrics_line
from softlabels.io.console import echo, printable

__all__ = ["analyze", "evaluate", "export", "predict"]

BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]


@command("eval")
def evaluate(
    student: Positional[str],
    path: str | None = None,
    source: str | None = None,
    batch_size: BatchSize = 256,
    format: Literal["text", "json"] = "text",
) -> None:
    """Measure a trained student on a test set.

    Args:
        student: A run's folder, or a student.safetensors.
        path: Folder of the data. Without path and source, the run's own data.
        source: Kind of the data: glyphs100, folder or idx.
        batch_size: Images per forward.
        format: text or json.
    """
    from softlabels.export.predict import evaluate_file

    metrics = evaluate_file(student, path=path, source=source, batch_size=batch_size)
    echo(json.dumps(metrics) if format == "json" else metrics_line(metrics))


@command("analyze")
def analyze(run: Positional[str]) -> None:
    """Write analysis.json and predictions.npz of a finished run that has none, or anew.

    Args:
        run: The run's folder.
    """
    from softlabels.experiments.analyze_run import analyze_run
    from softlabels.training.run_folder import RunFolder

    folder = RunFolder(Path(run))
    analyze_run(folder.path)
    echo(printable(f"{folder.analysis}, with {folder.predictions.name}"))


@command("predict")
def predict(
    student: Positional[str],
    images: Positional[tuple[str, ...]],
    top: Count = 3,
    batch_size: BatchSize = 64,
    format: Literal["text", "json", "csv"] = "text",
) -> None:
    """Classify images with a trained student.

    Args:
        student: A run's folder, or a student.safetensors.
        images: Images, or folders of images.
        top: How many classes are named for each image.
        batch_size: Images per forward.
        format: text, json (one object a line), or csv.
    """
    from softlabels.export.predict import find_images, load_student, predict

    if not images:
        raise UsageError("expected one or more images after the student")
    found = find_images(images)
    network, record = load_student(student)
    predictions = predict(network, record, found, top=top, batch_size=batch_size)
    if format == "csv":
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["image", "rank", "class", "probability"])
        for item in predictions:
            for rank, (name, value) in enumerate(
                zip(item.classes, item.probabilities, strict=True), 1
            ):
                writer.writerow([item.path, rank, name, f"{value:.6f}"])
        echo(table.getvalue().rstrip("\r\n"))
        return
    for item in predictions:
        pairs = zip(item.classes, item.probabilities, strict=True)
        if format == "json":
            classes = [{"class": name, "probability": value} for name, value in pairs]
            echo(json.dumps({"image": str(item.path), "classes": classes}, ensure_ascii=False))
        else:
            shares = ", ".join(f"{name} {value:.1%}" for name, value in pairs)
            echo(printable(f"{item.path}: {shares}"))


@command("export")
def export(
    run: Positional[str],
    format: Literal["safetensors", "onnx"] = "safetensors",
    output: str | None = None,
    weights: Literal["last", "best"] = "last",
    network: str | None = None,
    license: str | None = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a trained student as one file with a model card, and check it by loading it back.

    Args:
        run: A run's folder, or a student.safetensors.
        format: safetensors or onnx (which needs pip install 'softlabels[onnx]').
        output: A file or a folder. Without it: export/FORMAT in the run's folder.
        weights: Of the last epoch, or of the best one on the test set.
        network: package.module:function of a network of your own, which no file may choose.
        license: Of the weights, for the card, such as apache-2.0.
        opset: Version of ONNX's operators; torch's choice.
        overwrite: Replace an older file and card.
    """
    from softlabels.export.export import export_run

    exported = export_run(
        run,
        format=format,
        output=output,
        weights=weights,
        network=network,
        license=license,
        opset=opset,
        overwrite=overwrite,
    )
    echo(f"{exported.file}, with {exported.card.name}")
    if exported.largest_difference is None:
        echo("its tensors equal those of the run; the network was not built")
    else:
        echo(f"largest difference to the trained network: {exported.largest_difference:.2g}")
