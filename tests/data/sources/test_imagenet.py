import shutil

import pytest

from shared.data_files import png, write_file, write_imagenet
from softlabels.data.sources.imagenet import ImageNetSource


def test_another_number_of_classes_is_told(tmp_path):
    write_imagenet(tmp_path, 5)
    with pytest.raises(ValueError, match="has 5 classes, ImageNet has 1000; the data source 'fol"):
        ImageNetSource(tmp_path)


def test_a_flat_folder_is_told_how_to_sort_it(tmp_path):
    write_imagenet(tmp_path, 3)
    shutil.rmtree(tmp_path / "val")
    for index in range(3):
        write_file(tmp_path / "val" / f"ILSVRC2012_val_{index:08}.JPEG", png(0))
    with pytest.raises(ValueError, match=r"val has no subfolders; .*torchvision\.datasets\.ImageN"):
        ImageNetSource(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_folder_is_told(tmp_path, split):
    shutil.rmtree(write_imagenet(tmp_path, 3) / split)
    with pytest.raises(ValueError, match=rf"{split} is no folder; expected"):
        ImageNetSource(tmp_path)


def test_many_classes_that_differ_are_told_in_one_short_line(tmp_path):
    write_imagenet(tmp_path, 40)
    for index in range(30):
        shutil.rmtree(tmp_path / "val" / f"n{index:08}")
    with pytest.raises(
        ValueError, match=r"'n00000009'\] and 20 more; only in .*val: \[\]"
    ) as caught:
        ImageNetSource(tmp_path)
    assert len(str(caught.value)) < 600
