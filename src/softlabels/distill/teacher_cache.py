"""A teacher's stored answers in place of the teacher."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from softlabels.distill.answers import Answers, bytes_per_view, densify, unreadable

__all__ = ["TeacherCache"]


class TeacherCache:
    """A teacher's answers to K draws of the augmentation, in place of the teacher itself.

    `Distiller(student, method, teacher=cache)` reads them by `index` and `draw` of the batch. The
    training views must be those that were answered: `source.train_batches(...,
    draw=cache.draw(epoch))`. Epoch K shows the views of epoch 0 again.

    Each file is checked when it is first read, and mapped from then on. Any number of processes
    may open the same cache. Needs `softlabels[train]`.

    Args:
        path: The folder that `softlabels cache-teacher` filled.

    Attributes:
        path: The folder.
        num_images: Images of the training set, N.
        num_classes: C.
        num_draws: K.
        top: Stored classes of each answer, k.
        seed: That the draws belong to.
        fingerprints: Of the `"teacher"`, the `"data"` and the `"augmentation"`.
        error: Against the full logits, over all readable views: `"mean_kl"` and `"max_kl"`, nats,
            of KL(full || cached) at temperature 1; `"top1_agreement"`, 0..1; `"views"` and
            `"unreadable"`, how many there were.

    Raises:
        FileNotFoundError: There is no cache.
        ValueError: It is unfinished or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from softlabels.distill.cache_folder import CacheFolder  # needs an extra

        self._folder = CacheFolder(path)
        manifest = self._manifest = self._folder.read_manifest()
        self._stored: dict[int, Answers] = {}
        self.path = self._folder.path
        self.num_images = manifest.num_images
        self.num_classes = manifest.num_classes
        self.num_draws = manifest.num_draws
        self.top = manifest.top
        self.seed = manifest.seed
        self.fingerprints: Mapping[str, str] = {**manifest.fingerprints}
        self.error: Mapping[str, float] = {**manifest.error}
        if not self.error:
            raise ValueError(
                f"{self.path} is not finished: the same cache-teacher command goes on with it"
            )
        for file in (self._folder.file(*place) for place in manifest.files):
            if not file.is_file():
                raise ValueError(
                    f"{file} is missing: the same cache-teacher command makes it again"
                )

    def __reduce__(self) -> tuple[type[TeacherCache], tuple[str]]:
        # A copy, in this process or in another one, maps the files again.
        return TeacherCache, (str(self.path),)

    def __repr__(self) -> str:
        return (
            f"TeacherCache({str(self.path)!r}: {self.num_images} images x {self.num_draws} draws, "
            f"{self.top} of {self.num_classes} classes)"
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all answers, without headers."""
        views = self.num_images * self.num_draws
        return views * bytes_per_view(self.num_classes, self.top)

    def draw(self, epoch: int) -> tuple[int, int]:
        """The draw that an epoch, from 0, shows, (seed, number), for `DataSource.train_batches`."""
        return self.seed, epoch % self.num_draws

    def logits(self, index: Tensor, draw: Tensor, device: torch.device | str) -> Tensor:
        """The teacher's logits for some views.

        Rows are picked on the CPU; what is stored of them goes to the device and becomes dense
        there.

        Args:
            index: [B] integers on the CPU, the images, 0..N-1.
            draw: [B] integers on the CPU, the number of the draw that each shows, 0..K-1.
            device: Where the logits shall lie.

        Returns:
            [B, C] float32.

        Raises:
            TypeError: No integers.
            ValueError: Of other shapes, on another device, out of range, an image that could not
                be read when the cache was made, or a damaged file.
        """
        index = _checked("index", index, self.num_images)
        draw = _checked("draw", draw, self.num_draws)
        if len(index) != len(draw):
            raise ValueError(f"index and draw must be as long, got {len(index)} and {len(draw)}")
        per_file = self._manifest.images_per_file
        numbers = draw * self._manifest.files_per_draw + index // per_file
        of_file = index % per_file
        files = numbers.unique().tolist()
        if len(files) == 1:  # small data, or one draw of consecutive images
            answers = Answers(*(stored[of_file] for stored in self._file(files[0])))
        else:
            answers = unreadable(len(index), self.num_classes, self.top)
            for number in files:
                rows = (numbers == number).nonzero().squeeze(1)
                for picked, stored in zip(answers, self._file(number), strict=True):
                    picked[rows] = stored[of_file[rows]]
        missing = answers.classes[:, 0] < 0
        if bool(missing.any()):
            raise ValueError(
                f"{self.path} has no answer for the images {index[missing].tolist()[:5]}: they "
                "could not be read when it was made"
            )
        there = Answers(*(value.to(device, non_blocking=True) for value in answers))
        return densify(there, self.num_classes)

    def _file(self, number: int) -> Answers:
        if number not in self._stored:
            draw, chunk = divmod(number, self._manifest.files_per_draw)
            self._stored[number] = self._folder.read(self._manifest, draw, chunk)
        return self._stored[number]


def _checked(name: str, value: Tensor, size: int) -> Tensor:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {kind}")
    if value.dim() != 1:
        raise ValueError(f"{name} must be [B], got {tuple(value.shape)}")
    if value.device.type != "cpu":
        raise ValueError(
            f"{name} must lie on the CPU, where the answers are looked up, got {value.device}"
        )
    if len(value) and not 0 <= int(value.min()) <= int(value.max()) < size:
        raise ValueError(
            f"{name} must be in 0..{size - 1}, got {int(value.min())}..{int(value.max())}: the "
            "batch shows other views than the cache answers"
        )
    return value.long()
