"""A network as an ONNX file, and such a file as a function."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from softlabels.models.record import METADATA_KEY, FileRecord

__all__ = ["check_packages", "onnx_classifier", "write_onnx"]

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LARGEST = 2_000_000_000  # bytes; the format ends at 2 GiB a file


def check_packages() -> None:
    """Check that there is what the format needs.

    Raises:
        ValueError: Something is missing.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the format onnx needs {', '.join(missing)}: pip install 'softlabels[onnx]'"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter tells: graphs, and tracebacks of attempts that it gave up."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write_onnx(
    network: nn.Module,
    record: FileRecord,
    image_shape: tuple[int, int, int],
    file: Path,
    opset: int | None,
) -> int:
    """Write a network as ONNX, `images` [B, C, H, W] to `logits` [B, classes].

    Args:
        network: In eval mode, on the CPU.
        record: Goes into the file's metadata, as JSON.
        image_shape: (C, H, W).
        file: The file; an older one is replaced.
        opset: Version of the operator set; None: torch's choice. What it was is returned.

    Raises:
        ValueError: The network, or the operator set, is beyond the exporter or the format.
    """
    size = sum(value.nbytes for value in network.state_dict().values())
    if size > _LARGEST:
        raise ValueError(
            f"the network takes {size:,} bytes, and a file of the format onnx at most "
            f"{_LARGEST:,}: export it as safetensors"
        )
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    example = torch.zeros(2, *image_shape)
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=opset,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = _one_line(error.__cause__ or error)
        raise ValueError(f"the network cannot be written as ONNX: {reason}") from error
    assert program is not None  # with dynamo
    written = int(program.model.opset_imports[""])
    if opset not in (None, written):
        raise ValueError(f"torch cannot write opset {opset} for this network, just {written}")
    # Each node has the lines of code that it comes from, with their paths on this machine.
    ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props[METADATA_KEY] = record.model_dump_json()
    program.save(file, external_data=False)
    return written


def _one_line(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.300}"


def onnx_classifier(file: Path) -> Callable[[Tensor], Tensor]:
    """An ONNX file as a function of images, run on the CPU.

    Raises:
        ValueError: The runtime refuses the file; the function raises it, too.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    refused = "onnxruntime cannot run the exported file"
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        raise ValueError(f"{refused}: {_one_line(error)}") from error

    def answer(images: Tensor) -> Tensor:
        try:
            (logits,) = session.run(["logits"], {"images": images.numpy()})
        except Exception as error:
            raise ValueError(f"{refused} on {len(images)} images: {_one_line(error)}") from error
        return torch.from_numpy(logits)

    return answer
