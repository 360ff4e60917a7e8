"""Teachers of other families, sizes, normalizations and classes than the student's."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.data import Batch, DataInfo
from softlabels.data.sources.folder import FolderSource
from softlabels.io.weights import save_weights
from softlabels.models import FileRecord, build_model, model_metadata
from softlabels.models.class_names import map_by_names, read_class_names
from softlabels.training.build import build_distiller, build_teacher, with_defaults
from softlabels.training.config import ConfigError, resolve
from softlabels.training.settings import TeacherSettings

DATA = ("bars", "checks", "columns", "dots", "plain", "ramp")
MORE = ("stripes", "dots", "ramp", "plain", "zigzag", "checks", "columns", "bars", "none")
TO_DATA = [7, 5, 6, 1, 3, 2]  # of MORE
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)


@pytest.fixture(scope="module")
def folder_source(image_folder: Path) -> FolderSource:
    return FolderSource(image_folder, image_size=32, workers=0, augmentation="none")


@pytest.fixture
def batch(folder_source: FolderSource) -> Batch:
    return next(folder_source.test_batches(batch_size=8, device="cpu"))


def network(name: str, *, classes: int, size: int = 32, **settings: Any) -> nn.Module:
    torch.manual_seed(7)
    return build_model(name, num_classes=classes, image_size=size, settings=settings).eval()


def as_run(folder: Path, model: nn.Module, name: str, size: int, **settings: Any) -> Path:
    """The student of an earlier run, on images of other sizes, statistics and classes."""
    folder.mkdir()
    record = FileRecord(
        model=name, num_classes=len(MORE), in_channels=3, image_size=(size, size),
        settings=settings, mean=MEAN, std=STD, class_names=MORE,
    )  # fmt: skip
    save_weights(model, folder / "student.safetensors", metadata=model_metadata(record))
    return folder


def wrapped_vit(tmp_path: Path) -> tuple[nn.Module, dict[str, Any], int]:
    """A ViT for 64 pixels, as DistributedDataParallel and a trainer stored it."""
    model = network("timm:vit_mini_patch4_32", classes=len(DATA), size=64, depth=2)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "vit.pth")
    settings = {
        "name": "timm:vit_mini_patch4_32",
        "settings": {"depth": 2},
        "weights": str(tmp_path / "vit.pth"),
        "input_size": 64,
        "mean": MEAN,
        "std": STD,
    }
    return model, settings, 64


def torchvision_of_more_classes(tmp_path: Path) -> tuple[nn.Module, dict[str, Any], int]:
    model = network("torchvision:shufflenet_v2_x0_5", classes=len(MORE))
    torch.save({"model": model.state_dict()}, tmp_path / "shufflenet.pt")
    (tmp_path / "names.txt").write_text("\n".join(MORE) + "\n")
    settings = {
        "name": "torchvision:shufflenet_v2_x0_5",
        "weights": str(tmp_path / "shufflenet.pt"),
        "num_classes": len(MORE),
        "class_map": "names",
        "class_names": str(tmp_path / "names.txt"),
        "input_size": 48,
        "mean": MEAN,
        "std": STD,
    }
    return model, settings, 48


def file_of_a_run(tmp_path: Path) -> tuple[nn.Module, dict[str, Any], int]:
    model = network("timm:vit_mini_patch4_32", classes=len(MORE), size=24, depth=2)
    run = as_run(tmp_path / "run", model, "timm:vit_mini_patch4_32", 24, depth=2)
    return model, {"name": f"file:{run}/student.safetensors", "class_map": "names"}, 24


def folder_of_a_run(tmp_path: Path) -> tuple[nn.Module, dict[str, Any], int]:
    model = network("timm:resnet8", classes=len(MORE))
    run = as_run(tmp_path / "run", model, "timm:resnet8", 40)
    return model, {"name": f"file:{run}", "class_map": TO_DATA}, 40


def weights_of_a_run(tmp_path: Path) -> tuple[nn.Module, dict[str, Any], int]:
    """Named by its network; its file still says what it was trained on."""
    model = network("timm:resnet8", classes=len(MORE))
    file = as_run(tmp_path / "run", model, "timm:resnet8", 32) / "student.safetensors"
    return model, {"name": "timm:resnet8", "weights": str(file), "class_map": "names"}, 32


def function_of_a_module(tmp_path: Path) -> tuple[nn.Module, dict[str, Any], int]:
    (tmp_path / "my_teachers.py").write_text(
        "from torch import nn\n"
        "def pooled(num_classes=9):\n"
        "    pooled = nn.AdaptiveAvgPool2d(4)\n"
        "    return nn.Sequential(pooled, nn.Flatten(), nn.Linear(48, num_classes))\n"
    )
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, len(MORE)))
    save_weights(model, tmp_path / "pooled.safetensors")
    settings = {
        "name": "my_teachers:pooled",
        "weights": str(tmp_path / "pooled.safetensors"),
        "class_map": TO_DATA,
        "mean": MEAN,
        "std": STD,
    }
    return model, settings, 32


TEACHERS = (
    wrapped_vit,
    torchvision_of_more_classes,
    file_of_a_run,
    folder_of_a_run,
    weights_of_a_run,
    function_of_a_module,
)


def seen_by(images: Tensor, info: DataInfo, size: int) -> Tensor:
    """The student's images as the teacher was trained to see them."""
    mean, std, own_mean, own_std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (info.mean, info.std, MEAN, STD)
    )
    images = (images * std + mean - own_mean) / own_std
    if size == images.shape[-1]:
        return images
    return functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


@pytest.mark.parametrize("make", TEACHERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("method", ["nkd", "kd"])
def test_any_teacher_teaches_a_small_cnn(folder_source, batch, tmp_path, monkeypatch, make, method):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_teachers", raising=False)
    torch.manual_seed(7)
    model, settings, size = make(tmp_path)
    info = folder_source.info
    config = resolve({"student": {"name": "timm:resnet8"}, "method": method, "teacher": settings})
    distiller = build_distiller(with_defaults(config, info), info)

    with torch.no_grad():
        expected = model.eval()(seen_by(batch.images, info, size))
    if expected.shape[1] == len(MORE):
        expected = torch.stack([expected[:, MORE.index(name)] for name in info.class_names], dim=1)
    torch.testing.assert_close(distiller.teacher(batch.images), expected, rtol=1e-4, atol=1e-4)
    step = distiller(batch.images, batch.target)
    step.loss.backward()
    assert step.loss.isfinite()
    sys.modules.pop("my_teachers", None)


def test_a_color_teacher_teaches_on_gray_images(source, tmp_path):
    model = network("timm:resnet8", classes=len(MORE))
    run = as_run(tmp_path / "run", model, "timm:resnet8", 16)
    settings = TeacherSettings(name=f"file:{run}", class_map="names")
    teacher = build_teacher(settings, source.info)
    images = next(source.test_batches(batch_size=4, device="cpu")).images
    expected = model(seen_by(images.expand(-1, 3, -1, -1), source.info, 16))
    of_data = [MORE.index(name) for name in source.info.class_names]
    torch.testing.assert_close(teacher(images), expected[:, of_data])


def test_images_of_the_teachers_own_kind_are_not_converted(source, tmp_path):
    info = source.info
    record = FileRecord(
        model="timm:resnet8", num_classes=6, in_channels=1, image_size=(16, 16), mean=info.mean,
        std=info.std,
    )  # fmt: skip
    model = build_model("timm:resnet8", num_classes=6, in_channels=1)
    save_weights(model, tmp_path / "same.safetensors", metadata=model_metadata(record))
    teacher = build_teacher(TeacherSettings(name=f"file:{tmp_path}/same.safetensors"), info)
    images = torch.randn(2, 1, 16, 16)
    assert teacher.prepared(images) is images


def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's networks as if their weights had been fetched."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: create(name, **more))


def imagenet_of(*synsets: str) -> DataInfo:
    return DataInfo("some of ImageNet", synsets, 3, (64, 64), (0.5,) * 3, (0.2,) * 3)


def test_published_weights_know_imagenets_classes_size_and_statistics(monkeypatch):
    published(monkeypatch)
    settings = TeacherSettings(name="timm:resnet18", pretrained=True, class_map="names")
    teacher = build_teacher(settings, imagenet_of("n02102040", "n01440764", "n15075141"))
    assert teacher.class_index.tolist() == [217, 0, 999]
    assert teacher.prepared(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 224, 224)
    gray = torch.tensor((0.485 - 0.5, 0.456 - 0.5, 0.406 - 0.5)) / 0.2
    zero = teacher.prepared(gray.view(1, 3, 1, 1).expand(1, 3, 64, 64))
    torch.testing.assert_close(zero, torch.zeros_like(zero), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_map": "names"}, "nothing says the names of the classes of 'timm:resnet8'"),
        ({"class_map": [0, 1]}, "index for each of the 6 classes of patterns[0-9]+, got 2"),
        (
            {"num_classes": 9, "class_map": [0, 1, 2, 3, 4, 9]},
            "class_map names class 9, the teacher has 9 classes",
        ),
        (
            {"num_classes": 9},
            r"'timm:resnet8' must give \[B, 6\], got \(1, 9\) for one image: teacher.class_map",
        ),
    ],
)
def test_classes_that_do_not_fit_are_an_error(folder_source, settings, message):
    values = {"teacher": {"name": "timm:resnet8", **settings}, "method": "nkd"}
    config = with_defaults(resolve(values), folder_source.info)
    with pytest.raises(ValueError, match=message):
        build_distiller(config, folder_source.info)


def test_class_names_of_another_teacher_are_an_error(folder_source, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join([*DATA, "more"]))
    values: Mapping[str, Any] = {
        "name": "timm:resnet8",
        "class_map": "names",
        "class_names": str(tmp_path / "names.txt"),
        "num_classes": 8,
    }
    with pytest.raises(ValueError, match=r"names.txt must give \[B, 7\], got \(1, 8\)"):
        build_teacher(TeacherSettings(**values), folder_source.info)


def test_class_names_without_their_use_are_an_error():
    with pytest.raises(ConfigError, match=r"is read for teacher\.class_map names, got None"):
        resolve({"teacher": {"class_names": "names.txt"}})


# --- names


def test_names_are_found_in_any_order():
    assert map_by_names(DATA, MORE, "the teacher") == TO_DATA


@pytest.mark.parametrize(
    ("names", "of_teacher", "message"),
    [
        (("dogs", "cat"), ("dog", "cat"), "the teacher has no class 'dogs' of the data; near 'dogs'"
         ": dog"),
        (("x", "cat"), ("dog", "cat"), "no class 'x' of the data; its .* like 'dog', 'cat'"),
        (tuple("abcdef"), ("dog", "cat"), "no class 'a', 'b', 'c' and 3 more of the data"),
        (("dog", "cat"), ("cat", "dog", "cat"), "2 classes of the name 'cat'"),
    ],
)  # fmt: skip
def test_a_name_that_the_teacher_lacks_or_has_twice_is_an_error(names, of_teacher, message):
    with pytest.raises(ValueError, match=message):
        map_by_names(names, of_teacher, "the teacher")


def test_a_name_that_the_teacher_has_twice_may_be_one_that_nobody_asks_for():
    assert map_by_names(("dog",), ("crane", "crane", "dog"), "the teacher") == [2]


@pytest.mark.parametrize(
    "content",
    [
        b"great auk\nimg [1]\n",
        b"\xef\xbb\xbfgreat auk\r\n\r\n  img [1]  ",
        b'["great auk", "img [1]"]',
        b'\n [\n"great auk",\n"img [1]"]\n',
    ],
)
def test_class_names_are_read_from_lines_or_json(tmp_path, content):
    (tmp_path / "names").write_bytes(content)
    assert read_class_names(str(tmp_path / "names")) == ["great auk", "img [1]"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "two or more classes, got 0"),
        (b"one\n", "two or more classes, got 1"),
        (b'["a", 3]', "must hold a list of names, got 3"),
        (b'["a", ', "holds no class names"),
        (b"[" * 100_000, "holds no class names"),
        (b"\xff\xfe\x00", "holds no class names"),
    ],
)
def test_files_without_class_names_are_an_error(tmp_path, content, message):
    path = tmp_path / "names"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as found:
        read_class_names(str(path))
    assert str(path) in str(found.value)


def test_missing_files_and_folders_of_class_names_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file of class names: .*gone"):
        read_class_names(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="is no file of class names"):
        read_class_names(str(tmp_path))
