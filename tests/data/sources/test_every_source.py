"""What holds for every source: the same draws whoever reads, and what is on the disk."""

import pickle

import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from shared.data_files import (
    SPECIES,
    TINY_WNIDS,
    hugging_face_splits,
    levels,
    write_cifar,
    write_imagenet,
    write_inat21,
    write_shards,
    write_tiny_imagenet,
)
from softlabels.data import open_source
from softlabels.data.sources.by_name import SOURCES, kind_of

RANDOM = {"image_size": 16, "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5}
PLAIN = {"augmentation": "none", "mean": (0, 0, 0), "std": (1, 1, 1), "image_size": 8}
NAMES = {
    "tiny_imagenet": ("goldfish, Carassius auratus", "European fire salamander"),
    "imagenet": tuple(f"n{index:08}" for index in range(1000)),
    "inat21": SPECIES,
    "hf": ("ant", "bee"),
    "webdataset": ("0", "1"),
    "cifar10": ("airplane", "automobile"),
    "cifar100": ("apple", "baby", "pear"),
}
FILES = (
    "tiny_imagenet",
    "imagenet",
    "inat21",
    "hf",
    "webdataset",
)  # sources that read images one by one
MEMORY = ("cifar10", "cifar100")
FURTHER = ("second_view", "partner")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder for each source."""
    root = tmp_path_factory.mktemp("sources")
    hugging_face_splits().save_to_disk(str(root / "hf"))
    with pytest.MonkeyPatch.context() as patch:
        yield {
            "tiny_imagenet": write_tiny_imagenet(root / "tiny"),
            "imagenet": write_imagenet(root / "imagenet"),
            "inat21": write_inat21(root / "inat"),
            "hf": root / "hf",
            "webdataset": write_shards(root / "shards"),
            "cifar10": write_cifar(root / "c10", CIFAR10, patch, list(NAMES["cifar10"])),
            "cifar100": write_cifar(root / "c100", CIFAR100, patch, list(NAMES["cifar100"])),
        }


def read(source, **changes):
    settings = {"seed": 3, "epoch": 1, "batch_size": 4, "extras": FURTHER, "device": "cpu"}
    return list(source.train_batches(**{**settings, **changes}))


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.target, b.target)
        assert torch.equal(a.index, b.index)
        assert a.extras.keys() == b.extras.keys()
        assert all(torch.equal(x, b.extras[name]) for name, x in a.extras.items())


# ImageNet's thousand images take long to read and are files as those of TinyImageNet.
@pytest.fixture(params=["tiny_imagenet", "inat21", "hf", "webdataset", *MEMORY, "noise"])
def source(request, places):
    kind = request.param
    if kind == "noise":
        opened = open_source("noise", num_classes=5, num_train=14, num_test=6, image_size=16)
    elif kind in MEMORY:
        opened = open_source(kind, str(places[kind]))
    else:
        opened = open_source(kind, str(places[kind]), workers=0, **RANDOM)
    yield opened
    opened.close()


@pytest.mark.parametrize("kind", [*FILES, *MEMORY])
def test_facts(places, kind):
    source = open_source(kind, str(places[kind]))
    assert source.info.class_names == NAMES[kind]
    assert source.info.in_channels == 3
    many = kind == "imagenet"
    assert (source.num_train, source.num_test) == ((1000, 1000) if many else (14, 6))
    size = SOURCES[kind].image_size or 8  # that of the files
    assert source.info.image_size == (size, size)


@pytest.mark.parametrize("kind", ["tiny_imagenet", "inat21", "hf", "webdataset"])
def test_every_image_is_read_with_its_own_label(places, kind):
    source = open_source(kind, str(places[kind]), workers=0, **PLAIN)
    train, test = (
        list(source.train_views(draw=(0, 0), batch_size=50, device="cpu")),
        list(source.test_batches(batch_size=50, device="cpu")),
    )
    assert levels(train) == {index: index for index in range(14)}
    assert levels(test) == {index: 100 + index for index in range(6)}
    targets = [torch.cat([batch.target for batch in part]).tolist() for part in (train, test)]
    halves = [[0] * 7 + [1] * 7, [0] * 3 + [1] * 3]
    expected = {
        "tiny_imagenet": [halves[0], [0, 1] * 3],
        "inat21": halves,
        "hf": [[0, 1] * 7, [0, 1] * 3],
        "webdataset": [[0, 1] * 7, [0, 1] * 3],
    }
    assert targets == expected[kind]


@pytest.mark.parametrize("kind", FILES)
def test_workers_do_not_change_what_is_read(places, kind):
    results = []
    for workers in (0, 1, 2):
        source = open_source(kind, str(places[kind]), workers=workers, lighting=0.1, **RANDOM)
        extras = FURTHER if kind != "imagenet" else FURTHER[:1]  # it has one image a class
        steps = source.train_batches(seed=3, epoch=1, batch_size=4, extras=extras, device="cpu")
        results.append([next(steps) for _ in range(3)])
        source.close()
    for other in results[1:]:
        assert_equal(results[0], other)


def test_an_image_is_seen_anew_in_each_epoch(source):
    epochs = [
        torch.cat([b.images for b in source.train_views(draw=(3, n), batch_size=9, device="cpu")])
        for n in (0, 1, 0)
    ]
    assert torch.equal(epochs[0], epochs[2])
    assert (epochs[0] != epochs[1]).flatten(1).any(dim=1).float().mean() > 0.7


def test_a_resume_reads_the_steps_that_were_left(source):
    assert_equal(read(source, start_step=1), read(source)[1:])


def test_two_processes_read_what_one_reads(source):
    whole = read(source)
    first, second = (read(source, world_size=2, rank=rank) for rank in (0, 1))
    for w, a, b in zip(whole, first, second, strict=True):
        assert torch.equal(torch.cat((a.images[:1], b.images, a.images[1:])), w.images)
        assert torch.equal(torch.cat((a.target[:1], b.target, a.target[1:])), w.target)
        for name in FURTHER:
            x, y = a.extras[name], b.extras[name]
            assert torch.equal(torch.cat((x[:1], y, x[1:])), w.extras[name])


def test_further_images_leave_the_images_as_they_are(source):
    for plain, full in zip(read(source, extras=()), read(source), strict=True):
        assert plain.extras == {}
        assert torch.equal(plain.images, full.images)


def test_a_second_view_is_another_draw_of_the_same_images(source):
    ours = torch.cat([batch.images for batch in read(source)])
    second = torch.cat([batch.extras["second_view"] for batch in read(source)])
    assert second.shape == ours.shape
    assert (second != ours).flatten(1).any(dim=1).float().mean() > 0.7


@pytest.mark.parametrize("kind", ["tiny_imagenet", "inat21", "hf", "webdataset"])
def test_partners_are_other_images_of_the_class(places, kind):
    source = open_source(kind, str(places[kind]), workers=0, **PLAIN)
    (views,) = source.train_views(draw=(0, 0), batch_size=50, device="cpu")
    for epoch in range(3):
        (batch,) = read(source, batch_size=14, epoch=epoch)
        assert torch.equal(batch.extras["second_view"], batch.images)  # no draw is made
        partners = (batch.extras["partner"].amin(dim=(1, 2, 3)) * 255).round().long()
        assert torch.equal(views.target[partners], batch.target)
        assert (partners != batch.index).all()


@pytest.mark.parametrize("kind", ["imagenet", "noise"])
def test_a_class_with_one_image_has_no_partners(places, kind):
    path, settings = str(places["imagenet"]), {}
    if kind == "noise":
        path, settings = None, {"num_train": 9, "num_classes": 9}  # in pairs, and one is left
    source = open_source(kind, path, **settings)
    name = "n00000000" if kind == "imagenet" else "4"
    others = ", and so have" if kind == "imagenet" else "$"
    message = rf"needs two training images of each class, class '{name}' has 1{others}"
    with pytest.raises(ValueError, match=message):
        source.train_batches(
            seed=0, epoch=0, batch_size=4, extras=["partner"], device="cpu"
        )  # the call, not the first batch


def test_unknown_further_images_are_told(source):
    with pytest.raises(ValueError, match=r"further images 'third_view', .* second_view, partner"):
        source.train_batches(seed=0, epoch=0, batch_size=4, extras=["third_view"], device="cpu")


def test_the_test_set_is_read_once(source):
    batches = list(source.test_batches(batch_size=4, device="cpu"))
    assert torch.equal(torch.cat([b.index for b in batches]), torch.arange(source.num_test))
    assert_equal(batches, source.test_batches(batch_size=4, device="cpu"))


def test_a_source_can_be_pickled(source):
    """What workers get is pickled where they are started by spawning, as on macOS."""
    assert_equal(read(pickle.loads(pickle.dumps(source))), read(source))


@pytest.mark.parametrize("kind", FILES)
def test_fingerprints_follow_the_images_and_the_settings(places, kind):
    first, again, other = (
        open_source(kind, str(places[kind]), lighting=lighting).fingerprints()
        for lighting in (0.1, 0.1, 0.2)
    )
    assert first == again
    assert other["data"] == first["data"]
    assert other["augmentation"] != first["augmentation"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(kind, "folder" if kind == "imagenet" else kind) for kind in (*FILES, *MEMORY)],
)
def test_what_a_folder_holds_is_found_out(places, kind, expected):
    assert kind_of(None, str(places[kind])) == expected


def test_a_folder_of_two_data_sets_is_not_guessed(places, tmp_path):
    for kind, name in (("cifar10", CIFAR10.base_folder), ("cifar100", CIFAR100.base_folder)):
        (tmp_path / name).symlink_to(places[kind] / name, target_is_directory=True)
    with pytest.raises(ValueError, match="both CIFAR-10 and CIFAR-100; expected source to say"):
        open_source(path=str(tmp_path))


@pytest.mark.parametrize("path", ["nowhere", "nul\0byte", "/dev/null", ""])
def test_what_is_no_folder_is_left_to_the_folder_source(path):
    assert kind_of(None, path) == "folder"


def test_the_table_of_facts_is_about_every_source(places):
    for kind in FILES:
        source = open_source(kind, str(places[kind]))
        assert SOURCES[kind].image_size in (None, source.info.image_size[0])
        assert SOURCES[kind].in_channels == source.info.in_channels
    assert open_source("glyphs100").info.num_classes == SOURCES["glyphs100"].num_classes


def test_the_wnids_of_tiny_imagenet_are_sorted():
    assert sorted(TINY_WNIDS) == list(TINY_WNIDS)  # what the order of NAMES above relies on
