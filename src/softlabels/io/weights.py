"""Reading and writing a model's weights: all of them or none, and never any code."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from softlabels.io.files import replace_file

__all__ = [
    "UNREADABLE",
    "count_stored",
    "load_weights",
    "not_finite",
    "read_metadata",
    "read_plain",
    "save_weights",
]

_SUFFIX = ".safetensors"
_WRAPPED_UNDER = ("state_dict", "model_state_dict", "model", "net", "student")
# What all names begin with: DistributedDataParallel and torch.compile add the first two; "model."
# and "net." are what others call a network within a larger module; and MMClassification parts each
# of its classifiers into the last two.
_PREFIXES = (("module.",), ("_orig_mod.",), ("model.",), ("net.",), ("backbone.", "head."))
_SHOWN = 5
_LONGEST_NAME = 120

# What a damaged pickle may raise, whose bytes are instructions, or a network from wrong settings.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Load a file of weights into a model, or leave the model as it was.

    Reads `.safetensors` files, and torch files that hold nothing but tensors and plain values: a
    state dict, alone or under the key `state_dict`, `model_state_dict`, `model`, `net` or
    `student`. What wrappers add to all names is taken off: `module.` (DistributedDataParallel),
    `_orig_mod.` (`torch.compile`), `model.`, `net.`, and `backbone.` with `head.`.

    Args:
        model: Receives the weights, on its own device and in its own dtype.
        path: The file.
        strict: Whether every tensor of the model must be in the file and the other way round. If
            not, what differs is left out with a warning; at least one name must agree. Shapes
            must agree in both cases.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, holds code or other objects or numbers that are
            not finite, or does not fit.
    """
    path = _existing_file(path)
    expected = model.state_dict(keep_vars=True)
    given = _without_prefixes(_read_tensors(path), expected)

    # Of tensors that the model shares between names, a file may hold just one.
    given_ids = {id(expected[name]) for name in given if name in expected}
    missing = [n for n, value in expected.items() if n not in given and id(value) not in given_ids]
    # Counters come first in a file, and tell least.
    unexpected = sorted(
        (name for name in given if name not in expected),
        key=lambda name: name.endswith("num_batches_tracked"),
    )
    reshaped = [
        f"{name}: got {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
        for name, value in given.items()
        if isinstance(value, Tensor)
        and isinstance(expected.get(name), Tensor)
        and value.shape != expected[name].shape
    ]

    found = {"missing ": missing, "unexpected ": unexpected, "other shapes: ": reshaped}
    differences = [f"{what}{_some(names)}" for what, names in found.items() if names]
    described = f"{path} does not fit {type(model).__name__}: {'; '.join(differences)}"
    if reshaped or (strict and differences) or (expected and len(unexpected) == len(given)):
        raise ValueError(described)
    if differences:
        warnings.warn(f"{described} (left out)", stacklevel=2)
    _check_numbers(given, expected, path)
    model.load_state_dict(given, strict=False)


def save_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model's weights to a `.safetensors` file, which appears complete or not at all.

    Tensors that the model shares between names are written once for each name, so that the file
    loads anywhere.

    Args:
        model: The model. Its tensors may lie on any device.
        path: The file, in an existing folder; an older one is replaced.
        metadata: Texts for the file's header.

    Raises:
        TypeError: If `metadata` holds anything but texts, or the model's state anything but
            tensors.
        ValueError: If the name does not end with `.safetensors`.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.suffix != _SUFFIX:
        raise ValueError(f"path must end with {_SUFFIX}, got {str(path)!r}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map str to str, got {key!r}: {value!r}")
    tensors = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"only tensors can be saved, got {type(value).__name__} for {name!r}")
        # The format refuses shared memory, hence the copy.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    with replace_file(path) as file:
        file.write(save(tensors, metadata=dict(metadata) if metadata else None))


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A `.safetensors` file, whose tensors are not read before they are asked for."""
    from safetensors import SafetensorError, safe_open

    path = _existing_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the texts in the header of a `.safetensors` file: the `metadata` of `save_weights`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def count_stored(path: str | os.PathLike[str]) -> int:
    """Count the numbers that the tensors of a `.safetensors` file hold, without reading them.

    Raises as `read_metadata`.
    """
    with _opened(path) as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # no mapping


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """Names of the tensors with a number that is NaN or infinite, with one wait for their device.

    Anything in a state but tensors is left out.
    """
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    if not tensors:
        return []
    fine = torch.stack([value.detach().isfinite().all() for value in tensors.values()]).tolist()
    return [name for name, is_fine in zip(tensors, fine, strict=True) if not is_fine]


def read_plain(file: BinaryIO) -> object:
    """Read an open torch file of nothing but tensors, which go to the CPU, and plain values.

    Raises:
        ValueError: It holds code or other objects, of which nothing is run, or it is damaged; the
            message goes on after the file's name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file is reported below, once
            _check_archive(file)
            content: object = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        # torch's text runs on with advice to load the file unsafely: just the finding is kept.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"holds more than tensors and plain values: {refused[1]:.120}. Loading that could "
                "run code, so nothing was loaded or run. If you trust its origin, write its state "
                "dict alone to a new file"
            ) from error
        reason = str(error).partition("WeightsUnpickler error: ")[2].strip() or str(error)
        first_line = (reason.splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"is not a readable torch file: {first_line.partition(' In PyTorch')[0]:.300}"
        ) from error
    return content


def _check_archive(file: BinaryIO) -> None:
    """Check that a torch file, if it is a zip archive, holds no more than its own size.

    A few kB of packed zeros can fill the memory. `torch.save` packs nothing.
    """
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError, struct.error):
        entries = []  # no archive, or none that can be read: torch says so
    finally:
        file.seek(start)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its parts are packed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its parts are larger than the whole file")


def _existing_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such weights file: {path}")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "something else"
        raise ValueError(f"expected a weights file, got {what}: {path}")
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == _SUFFIX:
        with _opened(path) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # no mapping
    try:
        with path.open("rb") as file:
            content = read_plain(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} {error}") from error
    return _state_dict_in(content, path)


def _state_dict_in(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in _WRAPPED_UNDER:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict")
    others = [
        key if isinstance(key, str) else f"a name of type {type(key).__name__}"
        for key, value in content.items()
        if not isinstance(key, str) or not (_is_plain(value) or key.endswith("_extra_state"))
    ]
    if others or not content:
        raise ValueError(
            f"{path} holds no state dict, neither alone nor under {', '.join(_WRAPPED_UNDER)}; "
            f"got entries that are no named tensors: {_some(others) or 'an empty dict'}"
        )
    return dict(content)


def _is_plain(value: object) -> bool:
    """Whether this is a tensor of numbers, one after another: not sparse, quantized, or empty."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def _check_numbers(given: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    """Refuse what would make the model answer NaN; infinite may be what the model's own is."""
    bad = []
    for name, value in given.items():
        own = expected.get(name)
        if isinstance(value, Tensor) and isinstance(own, Tensor) and own.is_floating_point():
            numbers = value.detach().to(own.dtype)
            as_before = numbers == own.detach().cpu() if numbers.shape == own.shape else False
            if not bool((numbers.isfinite() | as_before).all()):
                bad.append(name)
    if bad:
        raise ValueError(f"{path} holds numbers that are not finite, in {_some(bad)}")


def _without_prefixes(given: dict[str, Tensor], expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take off prefixes that all names have, until some name is one of the model's."""
    while given and not given.keys() & expected.keys():
        for prefixes in _PREFIXES:
            if all(name.startswith(prefixes) for name in given):
                given = {name.partition(".")[2]: value for name, value in given.items()}
                break
        else:
            break
    return given


def _some(items: Iterable[object]) -> str:
    texts = [f"{item!s:.{_LONGEST_NAME}}" for item in items]
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
