import shutil

import pytest

from shared.data_files import TINY_WNIDS, levels, png, write_file, write_tiny_imagenet
from softlabels.data.sources.tiny_imagenet import TinyImageNetSource

PLAIN = {"augmentation": "none", "mean": (0, 0, 0), "std": (1, 1, 1), "image_size": 8, "workers": 0}


@pytest.fixture
def folder(tmp_path):
    return write_tiny_imagenet(tmp_path / "tiny")


def test_validation_images_sorted_by_somebody_are_read_too(folder):
    for index in range(6):
        target = folder / "val" / TINY_WNIDS[index % 2] / "images" / f"val_{index}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / f"val/images/val_{index}.JPEG").rename(target)
    shutil.rmtree(folder / "val" / "images")
    source = TinyImageNetSource(folder, **PLAIN)
    (batch,) = source.test_batches(batch_size=6, device="cpu")
    assert list(levels([batch]).values()) == [100, 102, 104, 101, 103, 105]
    assert batch.target.tolist() == [0, 0, 0, 1, 1, 1]


def test_the_whole_test_image_is_kept_by_default(folder):
    info = TinyImageNetSource(folder).info
    assert (info.crop_fraction, info.image_size) == (1.0, (64, 64))
    assert TinyImageNetSource(folder, crop_fraction=0.875).info.crop_fraction == 0.875


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (None, TINY_WNIDS),
        ("n01443537\tcrane\nn01629819\tcrane\n", ("crane n01443537", "crane n01629819")),
        ("n01443537\tgoldfish\nno tab\n\n", ("goldfish", "n01629819")),
    ],
)
def test_names_are_told_apart_by_wnids(folder, words, names):
    (folder / "words.txt").unlink()
    if words is not None:
        write_file(folder / "words.txt", words)
    assert TinyImageNetSource(folder).info.class_names == names


def change_annotation(folder, line, *, number=2):
    file = folder / "val" / "val_annotations.txt"
    lines = file.read_text().splitlines()
    lines[number - 1 : number] = [] if line is None else [line]
    file.write_text("\n".join(lines))


def make_val_one_class(folder):
    file = folder / "val" / "val_annotations.txt"
    file.write_text(file.read_text().replace(TINY_WNIDS[1], TINY_WNIDS[0]))


def rename_val_class(folder):
    shutil.rmtree(folder / "val")
    for wnid in ("n00000001", TINY_WNIDS[0]):
        write_file(folder / "val" / wnid / "0.JPEG", png(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "val/val_annotations.txt").unlink(),
            r"val_annotations\.txt is missing; expected it beside images/, or val/WNID/",
        ),
        (
            lambda f: change_annotation(f, "val_1.JPEG\tn99999999\t0\t0\t1\t1"),
            r"val_annotations\.txt line 2 has the class 'n99999999', which has no folder in train/",
        ),
        (
            lambda f: change_annotation(f, "val_77.JPEG\tn01443537\t0\t0\t1\t1"),
            r"line 2 names 'val_77\.JPEG'; expected an image in val/images that no line before",
        ),
        (
            lambda f: change_annotation(f, "val_0.JPEG\tn01443537\t0\t0\t1\t1"),
            r"line 2 names 'val_0\.JPEG'; expected an image in val/images that no line before",
        ),
        (lambda f: change_annotation(f, "\xff"), r"line 2 has the class ''"),
        (lambda f: change_annotation(f, None), r"no line for '.*val_1\.JPEG' and 0 more images"),
        (make_val_one_class, r"val_annotations\.txt has no image of \['n01629819'\]"),
        (
            rename_val_class,
            r"differ; only in .*train: \['n01629819'\]; only in .*val: \['n00000001'\]",
        ),
        (
            lambda f: shutil.rmtree(f / "train" / TINY_WNIDS[0]),
            r"train has 1 class\(es\), \['n01629819'\]; expected 2 or more",
        ),
        (
            lambda f: shutil.rmtree(f / "train" / TINY_WNIDS[0] / "images"),
            r"train has no image of \['n01443537'\]",
        ),
        (
            lambda f: write_file(f / "wnids.txt", "n01443537\nn01629819\nn02000000\n"),
            r"the classes .* differ; .*only in .*wnids\.txt: \['n02000000'\]",
        ),
        (lambda f: shutil.rmtree(f / "train"), r"train is no folder; expected"),
        (lambda f: shutil.rmtree(f / "val"), r"val is no folder; expected"),
    ],
)
def test_parts_that_do_not_fit_are_told(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        TinyImageNetSource(folder)
    assert "\n" not in str(caught.value)
