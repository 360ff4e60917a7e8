"""The files of a teacher cache, with a schema of each for the writer and for the reader.

A cache is a folder of safetensors files, one for each draw of the augmentation and some ten
thousand images, beside a manifest that says what they answer. Files are mapped into memory: a
batch reads the pages of its rows alone, and all processes of a machine share them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from softlabels.distill.answers import Answers, unreadable
from softlabels.io.files import replace_file
from softlabels.io.records import Record, problem_of

__all__ = ["VERSION", "CacheFolder", "Manifest"]

VERSION = 1
_HEADER = "softlabels_teacher_cache"

_Number = Annotated[int | float, Field(gt=-1e30, lt=1e30)]
_Fingerprint = Annotated[str, Field(pattern="^(teacher|data|augmentation)$")]
_Error = Annotated[str, Field(pattern="^(mean_kl|max_kl|top1_agreement|views|unreadable)$")]
_Sum = Annotated[str, Field(pattern="^(views|kl_sum|kl_max|top1_agreements)$")]


class Manifest(Record):
    """`manifest.json`: what a cache answers.

    Attributes:
        version: Of the format.
        num_images: Images of the training set, N.
        num_classes: C.
        num_draws: Draws of the augmentation for each image, K.
        top: Stored classes, k.
        seed: That the draws belong to: they are (seed, 0), ..., (seed, K - 1).
        images_per_file: Consecutive images whose answers share a file.
        precision: Of the teacher's forward: `"no"`, `"bf16"` or `"fp16"`.
        teacher: What the teacher is called.
        fingerprints: Of `"teacher"`, `"data"` and `"augmentation"`.
        error: What is lost against the full logits, see `softlabels.TeacherCache`; empty until all
            files are there.
    """

    version: Literal[1]
    num_images: int = Field(ge=1, le=2**40)
    num_classes: int = Field(ge=2, le=2**31 - 1)
    num_draws: int = Field(ge=1, le=2**20)
    top: int = Field(ge=1)
    seed: int = Field(ge=0)
    images_per_file: int = Field(ge=1, le=2**31 - 1)
    precision: str
    teacher: str
    fingerprints: dict[_Fingerprint, str] = Field(min_length=3)
    error: dict[_Error, _Number]

    def _check(self) -> None:
        if self.top > self.num_classes:
            raise ValueError(f"top must be in 1..{self.num_classes}, got {self.top}")
        if len(self.error) not in (0, 5):
            raise ValueError(f"error must have all numbers or none, got {', '.join(self.error)}")

    @property
    def files_per_draw(self) -> int:
        """How many files hold the answers for one draw."""
        return math.ceil(self.num_images / self.images_per_file)

    @property
    def files(self) -> list[tuple[int, int]]:
        """Draw and number of images of every file."""
        return [*product(range(self.num_draws), range(self.files_per_draw))]

    def images_of(self, chunk: int) -> range:
        """The images whose answers are in the files of this number."""
        start = chunk * self.images_per_file
        return range(start, min(start + self.images_per_file, self.num_images))


class _Header(Record):
    """What a file of answers says about itself, beside its `_identity`."""

    model_config = ConfigDict(extra="allow")

    digest: str
    error: dict[_Sum, _Number] = Field(min_length=4)


class CacheFolder:
    """The files of a cache. Their names are made here: none is taken from a file's content.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest = self.path / "manifest.json"

    def file(self, draw: int, chunk: int) -> Path:
        """The file of a draw and a number of images."""
        return self.path / f"draw-{draw:03d}" / f"chunk-{chunk:05d}.safetensors"

    def read_manifest(self) -> Manifest:
        """Read and check the manifest.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged.
        """
        if not self.manifest.is_file():
            raise FileNotFoundError(
                f"{self.path} is no teacher cache, it has no {self.manifest.name}: "
                "`softlabels cache-teacher` makes one"
            )
        return Manifest.read(self.manifest)

    def write(
        self,
        manifest: Manifest,
        draw: int,
        chunk: int,
        answers: Answers,
        error: Mapping[str, float],
    ) -> None:
        """Write the answers for one draw of some images, a row each, whole or not at all.

        `error` says what is lost over the images that could be read: `"views"`, how many they are,
        `"kl_sum"`, `"kl_max"` and `"top1_agreements"`.
        """
        header = _Header(
            **_identity(manifest, draw, chunk), digest=answers.digest(), error=dict(error)
        )
        path = self.file(draw, chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        # One entry: the format writes several in another order each time.
        content = save(
            {name: value.contiguous() for name, value in answers._asdict().items()},
            metadata={_HEADER: json.dumps(header.dump(), sort_keys=True)},
        )
        with replace_file(path) as file:
            file.write(content)

    def read(self, manifest: Manifest, draw: int, chunk: int) -> Answers:
        """Map the answers for one draw of some images into memory, after a check of every byte.

        Raises:
            ValueError: The file is missing, damaged, or belongs to another cache.
        """
        path = self.file(draw, chunk)
        header, answers = self._open(manifest, draw, chunk)
        if answers.digest() != header.digest:
            raise ValueError(f"{path} is damaged: its content is not what was written")
        problem = answers.problem(manifest.num_classes)
        if problem:
            raise ValueError(f"{path} is damaged: {problem}")
        return answers

    def read_error(self, manifest: Manifest, draw: int, chunk: int) -> dict[str, int | float]:
        """What a file says is lost; see `write`.

        Raises:
            ValueError: As `read`, as far as the header tells.
        """
        return self._open(manifest, draw, chunk)[0].error

    def _open(self, manifest: Manifest, draw: int, chunk: int) -> tuple[_Header, Answers]:
        path = self.file(draw, chunk)
        if not path.is_file():
            raise ValueError(f"{path} is missing: the same cache-teacher command makes it again")
        try:
            with safe_open(path, framework="pt") as file:
                header = _Header.model_validate_json(
                    (file.metadata() or {}).get(_HEADER, "{}"), strict=True
                )
                names = set(file.keys())
                tensors = {name: file.get_tensor(name) for name in Answers._fields if name in names}
        except ValidationError as error:
            raise ValueError(f"{path} is damaged: its header: {problem_of(error)}") from error
        except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for name, expected in _identity(manifest, draw, chunk).items():
            got = (header.model_extra or {}).get(name)
            if got != expected:
                raise ValueError(
                    f"{path} belongs to another cache: its {name} is {got!r:.80}, expected "
                    f"{expected!r}"
                )
        rows = len(manifest.images_of(chunk))
        for name, like in unreadable(0, manifest.num_classes, manifest.top)._asdict().items():
            tensor, shape = tensors.get(name), (rows, *like.shape[1:])
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != like.dtype:
                found = "nothing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
                raise ValueError(
                    f"{path} is damaged: its {name} must be {shape} of {like.dtype}, got {found}"
                )
        return header, Answers(**tensors)


def _identity(manifest: Manifest, draw: int, chunk: int) -> dict[str, Any]:
    """What tells a file from those of other caches, draws and images."""
    images = manifest.images_of(chunk)
    same = ("version", "seed", "num_classes", "precision", "fingerprints")
    return {
        **{name: getattr(manifest, name) for name in same},
        "draw": draw,
        "first_image": images.start,
        "rows": len(images),
    }
