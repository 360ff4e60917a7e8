import hashlib
import io
import os
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from shared.data_files import cifar_pickles, write_cifar, write_file, write_images
from softlabels.data import open_source
from softlabels.data.sources.cifar import CIFAR10Source, CIFAR100Source

NAMES = ["apple", "baby", "pear"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return write_cifar(tmp_path / "data", CIFAR100, monkeypatch, NAMES)


class Stranger:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_images_labels_and_normalization(folder):
    source = CIFAR100Source(folder, mean=(0, 0, 0), std=(1, 1, 1))
    (batch,) = source.test_batches(batch_size=6, device="cpu")
    # The files have all red values of an image, then all green ones, row by row.
    labels = dict(
        zip((batch.images[:, 0, 0, 0] * 255).round().tolist(), batch.target.tolist(), strict=True)
    )
    assert labels == {101 + number: number % 3 for number in range(6)}
    assert batch.images[:, 0, 0, 1].tolist() == [0] * 6
    assert (batch.images[:, 1:] == 1).all()
    set_by_hand = CIFAR100Source(folder, mean=(0.5, 0.25, 0), std=(0.5, 0.25, 1))
    (other,) = set_by_hand.test_batches(batch_size=6, device="cpu")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.25, 0), (0.5, 0.25, 1)))
    torch.testing.assert_close(other.images, (batch.images - mean) / std)


def test_the_statistics_are_those_of_the_training_images_by_default(folder):
    info = CIFAR100Source(folder).info
    assert info.mean[0] == pytest.approx((255 * 1022 + 7.5) / 1024 / 255)
    assert info.mean[1:] == pytest.approx((1, 1))


def test_training_images_are_cut_out_of_a_border_of_4_and_mirrored(folder):
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    still = CIFAR100Source(folder, padding=0, flip=False, **plain)
    moved = CIFAR100Source(folder, **plain)
    seen = set()
    for epoch in range(40):
        (batch,) = moved.train_views(draw=(0, epoch), batch_size=14, device="cpu")
        border = (batch.images[:, 1] == 0).float()
        rows, columns = border.all(dim=2).sum(dim=1), border.all(dim=1).sum(dim=1)
        seen |= {*rows.tolist(), *columns.tolist()}
    assert seen == {0, 1, 2, 3, 4}
    (batch,) = still.train_views(draw=(0, 0), batch_size=14, device="cpu")
    assert sorted((batch.images[:, 0, 0, 0] * 255).round().tolist()) == list(range(1, 15))


def test_the_superclasses_are_groups(folder, tmp_path, monkeypatch):
    groups = CIFAR100Source(folder).info.groups
    assert groups[0] == groups[2] != groups[1]  # apples and pears
    other = write_cifar(tmp_path / "other", CIFAR10, monkeypatch, ["cat", "ship"])
    assert CIFAR10Source(other).info.groups is None


def test_the_published_names_make_twenty_groups_of_five(tmp_path, monkeypatch):
    from softlabels.data.sources.cifar import _SUPERCLASSES

    names = sorted(_SUPERCLASSES.split())
    assert len({*names}) == 100
    groups = CIFAR100Source(write_cifar(tmp_path, CIFAR100, monkeypatch, names)).info.groups
    assert sorted(groups) == [group for group in range(20) for _ in range(5)]


def test_the_folder_of_the_files_itself_is_read_too(folder):
    assert open_source(path=str(folder / "cifar-100-python")).info.name == "cifar100"


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_pickle_of_a_stranger_is_refused_and_not_run(folder, tmp_path, name):
    mark = tmp_path / "was here"
    bad = pickle.dumps(Stranger(mark))
    pickle.loads(bad)
    assert mark.is_dir()  # so it would be seen
    mark.rmdir()
    (folder / "cifar-100-python" / name).write_bytes(bad)
    with pytest.raises(
        ValueError, match=r"is no CIFAR100 in Python's format: expected the files m"
    ):
        CIFAR100Source(folder)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_missing_and_damaged_files_are_told(folder, name):
    file = folder / "cifar-100-python" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cifar-100-python is no CIFAR100 .* published digests"):
        CIFAR100Source(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"meta, train, test of cifar-100-python\.tar\.gz"):
        CIFAR100Source(folder)


@pytest.fixture
def server(tmp_path):
    """Address of a server of the files in a folder."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = partial(Handler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_it_is_downloaded_only_if_asked(folder, tmp_path, monkeypatch, server):
    archive = tmp_path / CIFAR100.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "url", f"{server}/{archive.name}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="download=True fetches them"):
        CIFAR100Source(tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
    assert CIFAR100Source(tmp_path / "fresh", download=True).num_train == 14
    monkeypatch.setattr(CIFAR100, "url", f"{server}/nowhere")
    with pytest.raises(
        ValueError, match=r"100-python\.tar\.gz cannot be downloaded to .*: HTTP Err"
    ):
        CIFAR100Source(tmp_path / "another", download=True)


CIFAR10_NAMES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


@pytest.fixture
def forms(tmp_path, monkeypatch):
    """The same forty and twenty images as pickles, as Parquet of two kinds, and in folders."""
    counts = (40, 20)
    pickles = write_cifar(tmp_path / "pickles", CIFAR10, monkeypatch, CIFAR10_NAMES, counts)
    contents = cifar_pickles("labels", "label_names", CIFAR10_NAMES, counts)
    named, numbered = datasets.ClassLabel(names=CIFAR10_NAMES), datasets.Value("int64")
    for split in ("train", "test"):
        part = pickle.loads(contents[split])
        pixels = part["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        rows = []
        for number, (image, label) in enumerate(zip(pixels, part["labels"], strict=True)):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            place = tmp_path / "folders" / split / CIFAR10_NAMES[label]
            write_file(place / f"{number}.png", file.getvalue())
            rows.append((file.getvalue(), label))
        for name, kind in (("named", named), ("numbered", numbered)):
            features = datasets.Features({"img": datasets.Image(), "label": kind})
            mixed = rows[7:] + rows[:7]
            table = {
                "img": [{"bytes": content, "path": None} for content, _ in mixed],
                "label": [label for _, label in mixed],
            }
            (tmp_path / name).mkdir(exist_ok=True)
            datasets.Dataset.from_dict(table, features=features).to_parquet(
                str(tmp_path / name / f"{split}-00000-of-00001.parquet")
            )
    paths = {name: tmp_path / name for name in ("named", "numbered", "folders")}
    return {"pickles": pickles, **paths}


def test_every_form_gives_the_same_data(forms):
    """Facts, images, their order, labels, and so whatever is drawn for them."""
    first, *others = (CIFAR10Source(path) for path in forms.values())
    for other in others:
        assert other.info == first.info
        assert other.fingerprints() == first.fingerprints()
        batches = [s.test_batches(batch_size=20, device="cpu") for s in (first, other)]
        for a, b in zip(*batches, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.target, b.target)


def test_the_superclasses_are_groups_in_folders_too(tmp_path):
    from softlabels.data.sources.cifar import _SUPERCLASSES

    for split in ("train", "val"):
        for name in _SUPERCLASSES.split():
            write_images(tmp_path / split / name, 1, size=(32, 32))
    groups = CIFAR100Source(tmp_path).info.groups
    assert sorted(groups) == [group for group in range(20) for _ in range(5)]


def test_other_columns_classes_and_sizes_are_told(forms, tmp_path):
    with pytest.raises(
        ValueError, match="label_column must be one of img, label, got 'fine_label'"
    ):
        CIFAR100Source(forms["named"])
    with pytest.raises(
        ValueError, match=r"has 10 classes, which are not the 100 of CIFAR100: 'air"
    ):
        CIFAR100Source(forms["folders"])
    write_images(forms["folders"] / "train" / "cat", 1, size=(32, 40))
    with pytest.raises(ValueError, match=r"is no CIFAR10: .*0\.png has 40 x 32 pixels"):
        CIFAR10Source(forms["folders"])
    write_file(forms["folders"] / "train" / "cat" / "0.png", "no image")
    with pytest.raises(ValueError, match=r"is no CIFAR10: cannot read the image .*0\.png"):
        CIFAR10Source(forms["folders"])
