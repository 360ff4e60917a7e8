import gzip

import numpy as np
import pytest
import torch

from shared.data_files import encode, write_idx
from softlabels.data.sources.idx import holds_idx, idx, read_idx


@pytest.mark.parametrize("gz", [False, True])
def test_files_plain_or_packed_are_read(tmp_path, gz):
    source = idx(write_idx(tmp_path / "digits", gz=gz))
    assert (source.num_train, source.num_test) == (12, 5)
    assert source.info.name == "digits"
    assert source.info.class_names == ("0", "1", "2")
    assert source.info.image_size == (6, 7)
    (batch,) = source.test_batches(batch_size=5, device="cpu")
    assert batch.target.tolist() == [0, 1, 2, 0, 1]
    pixels = (batch.images * source.info.std[0] + source.info.mean[0]) * 255
    assert pixels[:, 0, 3, 3].round().tolist() == [0, 1, 2, 3, 4]


def test_names_with_a_dot_are_found(tmp_path):
    folder = write_idx(tmp_path / "digits")
    for path in list(folder.iterdir()):
        path.rename(folder / path.name.replace("-idx", ".idx"))
    assert holds_idx(folder)
    assert idx(folder).num_train == 12


def test_holds_idx_says_no_elsewhere(tmp_path):
    assert not holds_idx(tmp_path)
    assert not holds_idx(tmp_path / "nowhere")


def test_fashion_mnist_is_known_by_its_folder_or_a_setting(tmp_path):
    assert idx(write_idx(tmp_path / "fashion-mnist")).info.class_names[9] == "Ankle boot"
    folder = write_idx(tmp_path / "other")
    assert idx(folder, class_names="fashion_mnist").info.num_classes == 10
    assert idx(tmp_path / "fashion-mnist", class_names="digits").info.class_names[2] == "2"


def corner_values(source) -> torch.Tensor:
    """Whether each of many crops holds the left or the right part of its image mirrored."""
    batches = [
        next(source.train_batches(seed=0, epoch=epoch, batch_size=12, device="cpu"))
        for epoch in range(8)
    ]
    return torch.cat([batch.images for batch in batches])


def test_fashion_mnist_is_mirrored_and_digits_are_not(tmp_path):
    half = np.zeros((12, 6, 7), np.uint8)
    half[:, :, 0] = 255
    changes = {"train-images-idx3-ubyte": encode(half)}
    folder = write_idx(tmp_path / "fashion", **changes)

    def mirrored(**settings) -> int:
        images = corner_values(idx(folder, padding=0, **settings))
        return int((images[:, 0, 0, 6] > 0).sum())

    assert 30 < mirrored() < 66
    assert mirrored(class_names="digits") == 0
    assert mirrored(flip=False) == 0
    assert mirrored(class_names="digits", flip=True) > 0


def test_a_wrong_magic_number_names_file_and_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\x00\x00\x0d\x03" + bytes(100))
    with pytest.raises(ValueError, match=rf"{path} starts .* 00 00 0d 03; expected 00 00 08 03"):
        read_idx(path, 3)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"\(none\); expected 00 00 08 01"):
        read_idx(path, 1)


def test_a_short_header_and_a_wrong_length_are_told(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\x00\x00\x08\x03\x00\x00")
    with pytest.raises(ValueError, match=rf"{path} has 6 bytes; expected a header of 16"):
        read_idx(path, 3)
    whole = encode(np.zeros((2, 3, 4), np.uint8))
    for data, got in ((whole[:-1], 23), (whole + b"x", 25)):
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"{path} has {got} bytes of data; expected 24 .* \(2, 3, 4\)"
        ):
            read_idx(path, 3)


@pytest.mark.parametrize("damage", [lambda x: x[:-9], lambda x: b"no gzip", lambda x: x[:20]])
def test_a_damaged_archive_is_told(tmp_path, damage):
    path = tmp_path / "x.gz"
    path.write_bytes(damage(gzip.compress(encode(np.zeros((9, 3, 4), np.uint8)))))
    with pytest.raises(ValueError, match=rf"{path} cannot be unpacked"):
        read_idx(path, 3)


def test_files_that_do_not_fit_each_other_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"has no file t10k-labels-idx1-ubyte"):
        idx(write_idx(tmp_path / "a", **{"t10k-labels-idx1-ubyte": None}))
    labels = encode(np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte has 4 labels;\s+expected 5"):
        idx(write_idx(tmp_path / "b", **{"t10k-labels-idx1-ubyte": labels}))
    images = encode(np.zeros((5, 7, 7), np.uint8))
    with pytest.raises(ValueError, match=r"test images .* \(1, 6, 7\) .*, got \(1, 7, 7\)"):
        idx(write_idx(tmp_path / "c", **{"t10k-images-idx3-ubyte": images}))
    with pytest.raises(ValueError, match=r"class_names must be one of auto, .* got 'letters'"):
        idx(tmp_path / "a", class_names="letters")
