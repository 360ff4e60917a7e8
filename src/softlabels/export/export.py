"""Gives a trained student away: one file that others can load, checked, and its model card."""

from __future__ import annotations

import contextlib
import copy
import filecmp
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from softlabels.export.model_card import (
    PUBLIC_FAMILIES,
    Exported,
    Format,
    Trained,
    Weights,
    render_card,
)
from softlabels.export.onnx import check_packages, onnx_classifier, write_onnx
from softlabels.export.predict import load_student
from softlabels.io.files import replace_file
from softlabels.io.weights import load_weights
from softlabels.models import build_model
from softlabels.models.record import read_record
from softlabels.training.build import try_out
from softlabels.training.config import load_recipe, parse
from softlabels.training.run_folder import RunFolder
from softlabels.training.run_records import read_run

__all__ = ["Exported", "Format", "Weights", "export_run"]

_CARD = "MODEL_CARD.md"
_TOLERANCE = 1e-4  # of the largest logit; sums in another order differ by far less in float32
_NUM_IMAGES = 5


def export_run(
    run: str | Path,
    *,
    format: Format = "safetensors",
    output: str | Path | None = None,
    weights: Weights = "last",
    network: str | nn.Module | None = None,
    license: str | None = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a trained student as one file, check the file, and write its model card beside it.

    The file is loaded back and run on random images before it appears under its name. Where
    anything fails nothing is left behind.

    Args:
        run: A run's folder, or a `student.safetensors`.
        format: `"safetensors"`: weights that `file:PATH` builds and the plain network loads;
            `"onnx"`: the network with its weights, for any number of images at a time.
        output: A file with the format's ending, or a folder, which gets `model.safetensors` or
            `model.onnx`. None: the folder `export/FORMAT` beside the student's file, or
            `export/FORMAT-best`.
        weights: Those after the last epoch, or of the epoch with the best test top-1.
        network: Builds a student of code of your own, which no file may choose: its name
            `package.module:function`, or a network, of which a copy gets the weights.
        license: Of the weights, as the card shall state it: a name of the Hugging Face hub, such
            as `apache-2.0`. None: the card says that it is unknown.
        opset: ONNX: version of the operator set. None: torch's choice.
        overwrite: Whether an older file and card are replaced.

    Returns:
        The paths, and the largest difference that the check found.

    Raises:
        FileExistsError: There is a file or a card already, and `overwrite` is False.
        FileNotFoundError: There is no trained student.
        OSError: The output cannot be written.
        ValueError: A setting or a file that does not fit, `"onnx"` without its packages, a network
            that ONNX cannot hold, or a file that answers otherwise than the network.
    """
    for name, value, choices in (
        ("format", format, get_args(Format)),
        ("weights", weights, get_args(Weights)),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.80}")
    if format == "onnx":
        check_packages()
    elif opset is not None:
        raise ValueError(f"opset goes with the format onnx, got {opset} with {format}")
    trained = _find(Path(run), weights)
    file = _output_file(trained, format, output)
    card = file.with_name(_CARD)
    for path in (file, card):
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: choose another --output, or add --overwrite")
    original = _build(trained, trained.file, network)
    if original is None and format == "onnx":
        raise ValueError(
            f"{trained.file} is for {trained.record.model!r:.200}, which is code of its own, and "
            "ONNX needs the network: name it with --network package.module:function"
        )

    with _staging(file.parent) as folder:
        staged = folder / f"model.{format}"
        difference = written_opset = None
        if format == "onnx" and original is not None:
            answers = _answers(original, trained)  # before torch's exporter has looked into it
            written_opset = write_onnx(original, trained.record, trained.image_shape, staged, opset)
            difference = _compare(answers, _answers(onnx_classifier(staged), trained))
        else:
            shutil.copyfile(trained.file, staged)
            restored = _build(trained, staged, network)
            if original is not None and restored is not None:
                difference = _compare(_answers(original, trained), _answers(restored, trained))
            elif not filecmp.cmp(trained.file, staged, shallow=False):
                raise ValueError(f"the exported file is not {trained.file}; nothing was written")
        parameters = None if original is None else sum(p.numel() for p in original.parameters())
        exported = Exported(
            file=file,
            card=card,
            format=format,
            network=network if isinstance(network, str) else trained.code_name,
            parameters=parameters,
            largest_difference=difference,
            num_images=_NUM_IMAGES,
            opset=written_opset,
            license=license,
        )
        with (
            staged.open("rb") as content,
            replace_file(file) as file_content,
            replace_file(card) as card_content,
        ):
            shutil.copyfileobj(content, file_content)
            card_content.write(render_card(trained, exported).encode())
    return exported


def _find(run: Path, weights: Weights) -> Trained:
    """Find a student's file, and read what lies around it.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It, or what lies around it, is damaged or does not say enough.
    """
    folder = RunFolder(run if run.is_dir() else run.parent)
    of_run: dict[Path, Weights] = {folder.student: "last", folder.best_student: "best"}
    file = run
    if run.is_dir():
        file = folder.best_student if weights == "best" else folder.student
        if not file.is_file():
            raise FileNotFoundError(
                f"{run} has no {file.name}: expected the folder of a run that has finished an epoch"
            )
    elif weights == "best":
        raise ValueError(f"the best weights are those of a run's folder, got the file {run}")
    record = read_record(str(file))
    if record.image_size is None:
        raise ValueError(f"the header of {file} does not say the size of the student's images")
    has_run = file in of_run
    return Trained(
        file,
        record,
        (record.in_channels, *record.image_size),
        of_run.get(file, "last"),
        read_run(folder.path) if has_run and folder.summary.is_file() else None,
        parse(load_recipe(str(folder.config))) if has_run and folder.config.is_file() else None,
    )


def _output_file(trained: Trained, format: Format, output: str | Path | None) -> Path:
    """The file to write.

    Raises:
        ValueError: Its ending is that of the other format.
    """
    name = f"model.{format}"
    if output is None:
        best = "-best" if trained.weights == "best" else ""
        return trained.file.parent / "export" / f"{format}{best}" / name
    path = Path(output)
    if path.suffix.removeprefix(".") not in get_args(Format) or path.is_dir():
        return path / name
    if path.suffix != f".{format}":
        raise ValueError(f"a file of the format {format} must end with .{format}, got {path}")
    return path


def _build(trained: Trained, file: Path, network: str | nn.Module | None) -> nn.Module | None:
    """The network with the weights of a file, in eval mode; None where nothing may build it."""
    record = trained.record
    if network is None:
        is_public = record.model.partition(":")[0] in PUBLIC_FAMILIES
        return load_student(file)[0] if is_public else None
    if isinstance(network, nn.Module):
        model = copy.deepcopy(network).cpu()
    else:
        model = build_model(
            network,
            num_classes=record.num_classes,
            in_channels=record.in_channels,
            image_size=record.image_size,
            settings=record.settings,
        )
    load_weights(model, file)
    try_out(model.eval(), "the network", trained.image_shape, record.num_classes)
    return model


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden folder where the output will be; after a failure all that was made is gone.

    Args:
        folder: That of the output; made if it is missing.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as staged:
            yield Path(staged)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # it was never made, or others write there
                path.rmdir()
        raise


def _answers(network: Callable[[Tensor], Tensor], trained: Trained) -> Tensor:
    """Logits of random images, [images, classes]; the last image is given alone once more."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_NUM_IMAGES, *trained.image_shape, generator=generator)
    with torch.inference_mode():
        return torch.cat([network(images), network(images[-1:])]).float()


def _compare(expected: Tensor, got: Tensor) -> float:
    """The largest difference between two networks' logits.

    Raises:
        ValueError: They differ by more than the tolerance, or in the likeliest class, or are not
            finite.
    """
    if not bool(expected.isfinite().all()):
        raise ValueError("the student's answers to random images are not finite")
    if got.shape != expected.shape:
        raise ValueError(
            f"the exported file gives logits of {tuple(got.shape)}, the trained network of "
            f"{tuple(expected.shape)}"
        )
    difference = float((got - expected).abs().max())
    tolerance = _TOLERANCE * float(expected.abs().max())
    if not difference <= tolerance:  # not a number is no agreement
        raise ValueError(
            f"the exported file answers otherwise than the trained network: logits differ by up "
            f"to {difference:.3g}, expected at most {tolerance:.3g}; nothing was written"
        )
    # Classes whose logits are nearly equal may change places.
    chosen = expected.gather(1, got.argmax(1, keepdim=True))
    if bool((expected.amax(1, keepdim=True) - chosen > tolerance).any()):
        raise ValueError(
            "the exported file prefers other classes than the trained network, whose logits "
            f"differ by up to {difference:.3g}; nothing was written"
        )
    return difference
