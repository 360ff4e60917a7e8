import os
from pathlib import Path

import pytest

from shared.data_files import write_images
from softlabels.data.listing import list_images


def paths(images, root: Path) -> list[str]:
    return [Path(images.name(i)).relative_to(root).as_posix() for i in range(len(images))]


def test_the_folders_of_imagenet(image_folder):
    names, train, test = list_images(image_folder, 0.1)
    assert names == ("ant", "bee", "cow")
    assert train.targets.tolist() == [0] * 8 + [1] * 8 + [2] * 7
    assert test.targets.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert paths(test, image_folder)[3] == "val/bee/0.png"


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Val"])
def test_other_names_of_the_test_folder(tmp_path, name):
    for split, count in (("train", 2), (name, 1)):
        for label in "ab":
            write_images(tmp_path / split / label, count)
    _, train, test = list_images(tmp_path, 0.1)
    assert (len(train), len(test)) == (4, 2)
    assert paths(test, tmp_path) == [f"{name}/a/0.png", f"{name}/b/0.png"]


@pytest.mark.parametrize("inside", ["", "train"])
def test_without_a_test_folder_a_share_of_each_class_is_held_out(tmp_path, inside):
    for label, count in (("a", 20), ("b", 10), ("c", 2), ("d", 1)):
        write_images(tmp_path / inside / label, count, size=(2, 2))
    _, train, test = list_images(tmp_path, 0.2)
    assert test.targets.tolist() == [0] * 4 + [1] * 2 + [2]
    assert train.targets.tolist() == [0] * 16 + [1] * 8 + [2, 3]
    held_out, kept = paths(test, tmp_path), paths(train, tmp_path)
    assert not set(held_out) & set(kept)
    assert paths(list_images(tmp_path, 0.2)[2], tmp_path) == held_out
    # Not simply the first or the last files of a class.
    first = [f"{inside}/a/{i}.png".lstrip("/") for i in (0, 1, 10, 11)]
    assert held_out[:4] != first
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    os.rename(tmp_path, moved)
    assert paths(list_images(moved, 0.2)[2], moved) == held_out


def test_hidden_and_other_files_are_left_out(tmp_path):
    for label in "ab":
        write_images(tmp_path / label, 3)
        (tmp_path / label / "notes.txt").write_text("x")
        (tmp_path / label / "._0.png").write_text("x")
    write_images(tmp_path / ".cache", 1)
    write_images(tmp_path / "__MACOSX", 1)
    write_images(tmp_path / "a" / "deeper", 1)
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "0.PNG")
    names, train, test = list_images(tmp_path, 0.3)
    assert names == ("a", "b")
    found = sorted(paths(train, tmp_path) + paths(test, tmp_path))
    expected = ["a/0.PNG", "a/1.png", "a/2.png", "a/deeper/0.png", "b/0.png", "b/1.png", "b/2.png"]
    assert found == expected


def test_file_names_beyond_ascii(tmp_path):
    for label in ("\u00e4", "b"):
        write_images(tmp_path / label, 3)
    _, train, _ = list_images(tmp_path, 0.3)
    assert all(Path(train.name(i)).is_file() for i in range(len(train)))


def make(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if not file.endswith("/"):
            (root / file).write_bytes(b"")
        else:
            (root / file).mkdir(exist_ok=True)
    return root


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"{root} has no subfolders; expected a folder with one subfolder of images"),
        (["0.png"], r"{root} has no subfolders; expected"),
        (["a/", "b/"], r"{root} holds no images in its 2 subfolders; expected"),
        (["a/0.png", "b/"], r"{root} has no image of \['b'\]"),
        (["a/0.png", "a/1.png"], r"{root} has 1 class\(es\), \['a'\]; expected 2 or more"),
        (["a/0.png", "b/0.png"], r"{root} has one image a class; none can be held out"),
        (["val/a/0.png", "test/a/0.png"], r"{root} has val/ but no train/; expected"),
        (["train/", "val/"], r"{root}/train has no subfolders; expected"),
        (
            ["train/a/0.png", "train/b/0.png", "val/a/0.png", "val/c/0.png"],
            r"differ; only in {root}/train: \['b'\]; only in {root}/val: \['c'\]",
        ),
    ],
)
def test_folders_of_another_shape_are_told(tmp_path, files, message):
    with pytest.raises(ValueError, match=message.format(root=tmp_path)):
        list_images(make(tmp_path, *files), 0.1)


def test_paths_that_are_no_folder_are_told(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/nowhere does not exist; expected a folder"):
        list_images(tmp_path / "nowhere", 0.1)
    with pytest.raises(ValueError, match=rf"{tmp_path}/file is a file; expected a folder"):
        list_images(make(tmp_path, "file") / "file", 0.1)
    with pytest.raises(ValueError, match=r"validation_fraction must be between 0 and 1, got 1"):
        list_images(tmp_path, 1)


def test_links_that_lead_round_are_entered_once(tmp_path):
    for label in "ab":
        write_images(tmp_path / label, 2)
    write_images(tmp_path / "elsewhere" / "more", 1)
    for name in ("x", "y", "z"):  # three of them would give 3^40 paths
        (tmp_path / "a" / name).symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "b" / "up").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "b" / "more").symlink_to(tmp_path / "elsewhere" / "more", target_is_directory=True)
    names, train, test = list_images(tmp_path, 0.3)
    assert names == ("a", "b", "elsewhere")
    found = sorted([*paths(train, tmp_path), *paths(test, tmp_path)])
    images = ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/more/0.png", "elsewhere/more/0.png"]
    assert found == images
