"""A teacher's answers as they are stored: the largest logits, and what the others sum to.

A cache is a folder of safetensors files, one for each draw of the augmentation and some ten
thousand images, beside a manifest that says what they answer. Files are mapped into memory: a
batch reads the pages of its rows alone, and all processes of a machine share them.

Shapes: B samples, C classes, k stored classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softlabels.io.files import replace_file

__all__ = [
    "ERRORS",
    "ERROR_SUMS",
    "FINGERPRINTS",
    "Answers",
    "CacheFolder",
    "Manifest",
    "bytes_per_view",
    "compress",
    "densify",
    "unreadable",
]

FINGERPRINTS = ("teacher", "data", "augmentation")
ERRORS = ("mean_kl", "max_kl", "top1_agreement", "views", "unreadable")
ERROR_SUMS = ("views", "kl_sum", "kl_max", "top1_agreements")
_VERSION = 1
_LARGEST_NUMBER = 1e30
_HEADER = "softlabels_teacher_cache"
_MOST = {
    "num_images": 2**40,
    "num_classes": 2**31 - 1,
    "num_draws": 2**20,
    "images_per_file": 2**31 - 1,
}


class Answers(NamedTuple):
    """What is stored of a teacher's logits.

    Attributes:
        values: [B, k] float16, the largest logits, in falling order.
        classes: [B, k] int16, or int32 above 32,767 classes: whose they are; -1 throughout the row
            of an image that could not be read.
        rest: [B] float32, the log-sum-exp of all other logits; -inf if there are none.
    """

    values: Tensor
    classes: Tensor
    rest: Tensor


def compress(logits: Tensor, top: int) -> Answers:
    """Keep the largest logits of each row, and the log-sum-exp of the others.

    Args:
        logits: [B, C], finite.
        top: How many are kept, k, 1..C.

    Returns:
        The answers, on the device of the logits.

    Raises:
        ValueError: `top` is out of range, or a logit is not finite or beyond half precision.
    """
    num_classes = logits.shape[1]
    if not 1 <= top <= num_classes:
        raise ValueError(f"top must be in 1..{num_classes}, the number of classes, got {top}")
    logits = logits.detach().float()
    values, classes = logits.topk(top, dim=1)
    bad = torch.cat([logits[~logits.isfinite()], values[~values.half().isfinite()]])
    if len(bad):
        raise ValueError(
            "the teacher's logits must be finite and at most 65,504 in size, where half precision "
            f"ends, got {float(bad[0]):g}"
        )
    rest = logits.scatter(1, classes, -math.inf).logsumexp(1)
    return Answers(values.half(), classes.to(_class_type(num_classes)), rest)


def densify(answers: Answers, num_classes: int) -> Tensor:
    """Logits of all classes: those that are stored, and the rest spread evenly.

    Each other class gets `rest - log(C - k)`, so that softmax gives the stored classes the
    probabilities that the full logits gave them, to half precision.

    Args:
        answers: As `compress` gave them, without rows of unreadable images.
        num_classes: C.

    Returns:
        [B, C] float32, on the device of the answers.
    """
    values = answers.values.float()
    others = answers.rest
    if values.shape[1] < num_classes:
        # Rounding must not lift the others above a class that is stored.
        spread = answers.rest - math.log(num_classes - values.shape[1])
        others = torch.minimum(spread, values[:, -1])
    dense = others.unsqueeze(1).expand(-1, num_classes).contiguous()
    return dense.scatter_(1, answers.classes.long(), values)


def unreadable(num_rows: int, num_classes: int, top: int) -> Answers:
    """Rows that say that there is no answer, [num_rows] of them, to be filled in."""
    return Answers(
        torch.zeros(num_rows, top, dtype=torch.float16),
        torch.full((num_rows, top), -1, dtype=_class_type(num_classes)),
        torch.zeros(num_rows),
    )


def bytes_per_view(num_classes: int, top: int) -> int:
    """Bytes that one view of one image takes: k (2 + 2) + 4, or k (2 + 4) + 4 above 32,767 classes.

    Args:
        num_classes: C.
        top: k.
    """
    return top * (2 + _class_type(num_classes).itemsize) + 4


def _class_type(num_classes: int) -> torch.dtype:
    return torch.int16 if num_classes <= torch.iinfo(torch.int16).max else torch.int32


@dataclass(frozen=True)
class Manifest:
    """What a cache answers.

    Attributes:
        num_images: Images of the training set, N.
        num_classes: C.
        num_draws: Draws of the augmentation for each image, K.
        top: Stored classes, k.
        seed: That the draws belong to: they are (seed, 0), ..., (seed, K - 1).
        images_per_file: Consecutive images whose answers share a file.
        precision: Of the teacher's forward: `"no"`, `"bf16"` or `"fp16"`.
        teacher: What the teacher is called.
        fingerprints: Of `"teacher"`, `"data"` and `"augmentation"`.
        error: What is lost against the full logits, see
            `softlabels.TeacherCache`; empty until all files are
            there.
    """

    num_images: int
    num_classes: int
    num_draws: int
    top: int
    seed: int
    images_per_file: int
    precision: str
    teacher: str
    fingerprints: dict[str, str]
    error: dict[str, float]

    @property
    def files_per_draw(self) -> int:
        """How many files hold the answers for one draw."""
        return math.ceil(self.num_images / self.images_per_file)

    def images_of(self, chunk: int) -> range:
        """The images whose answers are in the files of this number."""
        start = chunk * self.images_per_file
        return range(start, min(start + self.images_per_file, self.num_images))


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
        try:
            content = json.loads(self.manifest.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.manifest} is damaged: {error}") from error
        try:
            return _manifest_of(content)
        except ValueError as error:
            raise ValueError(f"{self.manifest} is damaged: {error}") from error

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest, whole or not at all."""
        text = json.dumps({"version": _VERSION, **asdict(manifest)}, indent=1) + "\n"
        with replace_file(self.manifest) as file:
            file.write(text.encode())

    def write(
        self,
        manifest: Manifest,
        draw: int,
        chunk: int,
        answers: Answers,
        error: Mapping[str, float],
    ) -> None:
        """Write the answers for one draw of some images, whole or not at all.

        Args:
            manifest: What the cache answers.
            draw: Number of the draw.
            chunk: Number of the images.
            answers: One row for each of them, on the CPU.
            error: What is lost over the images that could be read, see `ERROR_SUMS`.
        """
        from safetensors.torch import save

        header = {
            **_identity(manifest, draw, chunk),
            "digest": _digest(answers),
            "error": dict(error),
        }
        path = self.file(draw, chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        # One entry: the format writes several in another order each time.
        content = save(
            {name: value.contiguous() for name, value in answers._asdict().items()},
            metadata={_HEADER: json.dumps(header, sort_keys=True)},
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
        if _digest(answers) != header.get("digest"):
            raise ValueError(f"{path} is damaged: its content is not what was written")
        problem = _problem_of(answers, manifest)
        if problem:
            raise ValueError(f"{path} is damaged: {problem}")
        return answers

    def read_error(self, manifest: Manifest, draw: int, chunk: int) -> dict[str, float]:
        """What a file says is lost; see `write`.

        Raises:
            ValueError: As `read`, as far as the header tells.
        """
        error: dict[str, float] = self._open(manifest, draw, chunk)[0]["error"]
        return error

    def _open(self, manifest: Manifest, draw: int, chunk: int) -> tuple[dict[str, Any], Answers]:
        from safetensors import SafetensorError, safe_open

        path = self.file(draw, chunk)
        if not path.is_file():
            raise ValueError(f"{path} is missing: the same cache-teacher command makes it again")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
                names = set(file.keys())
                tensors = {name: file.get_tensor(name) for name in Answers._fields if name in names}
        except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if not isinstance(header, dict) or not _are_numbers(header.get("error"), ERROR_SUMS):
            raise ValueError(f"{path} is damaged: its header is not that of a teacher cache")
        for name, expected in _identity(manifest, draw, chunk).items():
            if header.get(name) != expected:
                raise ValueError(
                    f"{path} belongs to another cache: its {name} is {header.get(name)!r:.80}, "
                    f"expected {expected!r}"
                )
        rows = len(manifest.images_of(chunk))
        for name, like in unreadable(0, manifest.num_classes, manifest.top)._asdict().items():
            got, shape = tensors.get(name), (rows, *like.shape[1:])
            if got is None or tuple(got.shape) != shape or got.dtype != like.dtype:
                found = "nothing" if got is None else f"{tuple(got.shape)} of {got.dtype}"
                raise ValueError(
                    f"{path} is damaged: its {name} must be {shape} of {like.dtype}, got {found}"
                )
        return header, Answers(**tensors)


def _identity(manifest: Manifest, draw: int, chunk: int) -> dict[str, Any]:
    """What a file says about itself."""
    images = manifest.images_of(chunk)
    return {
        "version": _VERSION,
        "seed": manifest.seed,
        "draw": draw,
        "first_image": images.start,
        "rows": len(images),
        "num_classes": manifest.num_classes,
        "precision": manifest.precision,
        "fingerprints": manifest.fingerprints,
    }


def _digest(answers: Answers) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for value in answers:
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()


def _problem_of(answers: Answers, manifest: Manifest) -> str | None:
    """What no builder writes."""
    none = answers.classes < 0
    if int(answers.classes.min()) < -1 or int(answers.classes.max()) >= manifest.num_classes:
        return f"its classes must be in -1..{manifest.num_classes - 1}"
    if not bool((none.any(1) == none.all(1)).all()):
        return "a row has answers in part"
    if not bool(answers.values.isfinite().all()):
        return "a logit is not finite"
    has_rest = answers.rest.isfinite() | none[:, 0]
    if manifest.top < manifest.num_classes and not bool(has_rest.all()):
        return "the rest of a row is not finite"
    return None


def _manifest_of(content: object) -> Manifest:
    """Check what a manifest's JSON holds.

    Raises:
        ValueError: It does not fit.
    """
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping, got {type(content).__name__}")
    if content.get("version") != _VERSION:
        raise ValueError(f"its version must be {_VERSION}, got {content.get('version')!r:.80}")
    values: dict[str, Any] = {field.name: content.get(field.name) for field in fields(Manifest)}
    for name, most in {**_MOST, "top": values["num_classes"], "seed": math.inf}.items():
        least = {"seed": 0, "num_classes": 2}.get(name, 1)
        if type(values[name]) is not int or not least <= values[name] <= most:
            raise ValueError(
                f"{name} must be an integer in {least}..{most}, got {values[name]!r:.80}"
            )
    for name in ("precision", "teacher"):
        if not isinstance(values[name], str):
            raise ValueError(f"{name} must be a text, got {values[name]!r:.80}")
    prints, error = values["fingerprints"], values["error"]
    if (
        not isinstance(prints, dict)
        or set(prints) != set(FINGERPRINTS)
        or not all(isinstance(value, str) for value in prints.values())
    ):
        raise ValueError(
            f"fingerprints must be texts for {', '.join(FINGERPRINTS)}, got {prints!r:.80}"
        )
    if error != {} and not _are_numbers(error, ERRORS):
        raise ValueError(f"error must be numbers for {', '.join(ERRORS)}, got {error!r:.80}")
    return Manifest(**values)


def _are_numbers(values: object, names: Sequence[str]) -> bool:
    """Whether JSON held a mapping of these names to numbers of a size that can be."""
    return (
        isinstance(values, dict)
        and set(values) == set(names)
        and all(type(v) in (int, float) and abs(v) < _LARGEST_NUMBER for v in values.values())
    )
