import sys

import pytest

from shared.data_files import hugging_face_splits, levels, png
from softlabels.data.sources.by_name import kind_of
from softlabels.data.sources.hugging_face import HuggingFaceSource

datasets = pytest.importorskip("datasets")

PLAIN = {"augmentation": "none", "mean": (0, 0, 0), "std": (1, 1, 1), "image_size": 8, "workers": 0}
FILE = (lambda level, _: {"bytes": png(level), "path": None}, datasets.Image())
# What another library than `datasets` writes into Parquet.
BARE_FILE = (
    FILE[0],
    {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
)
CLASS = (lambda _, label: label, datasets.ClassLabel(names=["ant", "bee"]))
NUMBER = (lambda _, label: 10 - label, datasets.Value("int64"))
TEXT = (lambda _, label: ["wasp", "ant"][label], datasets.Value("string"))


def assert_reads(source, targets=(0, 1)):
    train = list(source.train_views(draw=(0, 0), batch_size=20, device="cpu"))
    test = list(source.test_batches(batch_size=20, device="cpu"))
    assert levels(train) == {index: index for index in range(14)}
    assert levels(test) == {index: 100 + index for index in range(6)}
    assert train[0].target.tolist() == [*targets] * 7
    assert test[0].target.tolist() == [*targets] * 3


def saved(tmp_path, **columns):
    hugging_face_splits(**columns).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


@pytest.mark.parametrize("inside", ["", "data"])
def test_parquet_files(tmp_path, inside):
    splits = hugging_face_splits()
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    for number in (0, 1):
        part = splits["train"].shard(2, number, contiguous=True)
        part.to_parquet(folder / f"train-0000{number}-of-00002.parquet")
    splits["test"].to_parquet(folder / "validation.parquet")
    splits["test"].select([0]).to_parquet(folder / "test.parquet")  # the hub's often lacks labels
    assert kind_of(None, str(tmp_path)) == "hf"
    source = HuggingFaceSource(tmp_path, cache=str(tmp_path / "cache"), **PLAIN)
    assert source.info.class_names == ("ant", "bee")
    assert_reads(source)
    assert list((tmp_path / "cache").rglob("*.arrow"))
    other = HuggingFaceSource(tmp_path, test_split="test", cache=str(tmp_path / "cache"))
    assert other.num_test == 1


@pytest.mark.parametrize(
    ("label", "names", "targets"),
    [(NUMBER, ("9", "10"), (1, 0)), (TEXT, ("ant", "wasp"), (1, 0))],
)
def test_parquet_of_other_libraries(tmp_path, label, names, targets):
    splits = hugging_face_splits(picture=BARE_FILE, label=label)
    for name, split in splits.items():
        table = split.with_format("arrow")[:].replace_schema_metadata()
        datasets.Dataset(table).to_parquet(tmp_path / f"{name}.parquet")
    source = HuggingFaceSource(tmp_path, cache=str(tmp_path / "cache"), **PLAIN)
    assert source.info.class_names == names
    assert_reads(source, targets)


def test_columns_can_be_named(tmp_path):
    folder = saved(tmp_path, a=FILE, b=FILE, fine=CLASS, coarse=TEXT)
    source = HuggingFaceSource(folder, image_column="b", label_column="coarse", **PLAIN)
    assert source.info.class_names == ("ant", "wasp")
    assert_reads(source, (1, 0))


def test_splits_can_be_named(tmp_path):
    splits = hugging_face_splits()
    splits = datasets.DatasetDict(small=splits["test"], large=splits["train"])
    splits.save_to_disk(str(tmp_path / "saved"))
    source = HuggingFaceSource(tmp_path / "saved", train_split="large", test_split="small", **PLAIN)
    assert_reads(source)


def test_images_may_be_files_beside_the_data(tmp_path):
    def file(level, _):
        (tmp_path / f"{level}.png").write_bytes(png(level))
        return {"bytes": None, "path": str(tmp_path / f"{level}.png")}

    splits = hugging_face_splits(image=(file, datasets.Image()), label=CLASS)
    for split in ("train", "test"):
        splits[split] = splits[split].cast_column("image", datasets.Image(decode=False))
    source = HuggingFaceSource(
        saved(tmp_path, image=(file, BARE_FILE[1]), label=CLASS), **PLAIN, in_memory=False
    )
    assert_reads(source)
    (tmp_path / "103.png").unlink()
    with pytest.raises(
        ValueError, match=r"cannot read the image .*saved \(test\) row 3 \(FileNotF"
    ):
        list(source.test_batches(batch_size=20, device="cpu"))


def test_rows_that_hold_no_image_are_unreadable_images(tmp_path):
    def file(level, _):
        return {3: None, 5: {"bytes": b"nothing", "path": None}}.get(level, FILE[0](level, 0))

    source = HuggingFaceSource(
        saved(tmp_path, image=(file, datasets.Image()), label=CLASS), bad_images="skip", **PLAIN
    )
    with pytest.warns(UserWarning, match="skipped the unreadable image"):
        (batch,) = source.train_views(draw=(0, 0), batch_size=20, device="cpu")
    assert [*{*range(14)} - {*batch.index.tolist()}] == [3, 5]


def test_fingerprints_follow_the_images(tmp_path):
    first = HuggingFaceSource(saved(tmp_path / "a")).fingerprints()["data"]
    assert HuggingFaceSource(saved(tmp_path / "b")).fingerprints()["data"] == first

    def larger(level, _):
        return {"bytes": png(level, 16 if level == 4 else 8), "path": None}

    other = saved(tmp_path / "c", image=(larger, datasets.Image()), label=CLASS)
    assert HuggingFaceSource(other).fingerprints()["data"] != first


def labels(of):
    return (lambda level, _: of(level), datasets.Value("int64"))


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (
            {"x": FILE, "y": FILE, "label": CLASS},
            {},
            "image_column must be given: by its type it could be any of x, y",
        ),
        ({"label": CLASS}, {}, "image_column must be given: by its type it is none of label"),
        (
            {"image": FILE, "fine": CLASS, "coarse": CLASS},
            {},
            "label_column must be given: by its type it could be any of fine, coarse",
        ),
        ({"image": FILE, "target": NUMBER}, {}, "label_column must .* is none of image, target"),
        (
            {"image": FILE, "label": CLASS},
            {"label_column": "class"},
            "label_column must be one of image, label, got 'class'",
        ),
        (
            {"image": FILE, "label": CLASS, "price": (lambda *_: 0.5, datasets.Value("float32"))},
            {"label_column": "price"},
            "'price' must hold a whole number or a text for each image, without gaps, got float32",
        ),
        (
            {"image": FILE, "label": CLASS, "price": NUMBER},
            {"image_column": "price"},
            r"saved \(train\): the column 'price' holds no images: ",
        ),
        (
            {"image": FILE, "label": CLASS},
            {"test_split": "dev"},
            "the data set has no split 'dev', it has train, test; test_split says which",
        ),
        (
            {"image": FILE, "label": labels(lambda level: level // 100 + level % 2)},
            {},
            "the test images have the label 2, no training image has it",
        ),
        (
            {"image": FILE, "label": (lambda level, _: -(level // 100), CLASS[1])},
            {},
            r"split 'train' of .*saved has no image of \['bee'\]",
        ),
        (
            {"image": FILE, "label": (lambda level, n: -1 if level > 99 else n, CLASS[1])},
            {},
            r"split 'test' of .*saved has the label -1; expected one of 0\.\.1",
        ),
        (
            {"image": FILE, "label": (lambda *_: 0, datasets.ClassLabel(names=["ant"]))},
            {},
            r"split 'train' of .*saved has 1 class\(es\), \['ant'\]; expected 2 or more",
        ),
        (
            {"image": FILE, "label": (lambda level, n: None if level == 3 else n, CLASS[1])},
            {},
            "'label' must hold a whole number or a text for each image, without gaps, got float",
        ),
    ],
)
def test_data_that_do_not_fit_are_told(tmp_path, columns, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        HuggingFaceSource(saved(tmp_path, **columns), **settings)
    assert "\n" not in str(caught.value)


def test_splits_with_other_columns_are_told(tmp_path):
    splits = hugging_face_splits()
    splits["test"] = splits["test"].rename_column("label", "target")
    splits.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="test images have no column 'label', the training"):
        HuggingFaceSource(tmp_path / "saved")


@pytest.mark.parametrize(
    "feature", [datasets.ClassLabel(names=["bee", "ant"]), datasets.Value("int64")]
)
def test_classes_that_differ_are_told(tmp_path, feature):
    splits = hugging_face_splits()
    other = hugging_face_splits(image=FILE, label=(CLASS[0], feature))
    both = datasets.DatasetDict(train=splits["train"], test=other["test"])
    both.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(
        ValueError, match=r"classes of 'label' for .* differ, or .*\['ant', 'bee'\]"
    ):
        HuggingFaceSource(tmp_path / "saved")


def test_an_empty_split_is_told(tmp_path):
    splits = hugging_face_splits()
    splits["train"].to_parquet(tmp_path / "train.parquet")
    splits["test"].select([]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"datasets cannot read .*: .*no data"):
        HuggingFaceSource(tmp_path, cache=str(tmp_path / "cache"))


def test_a_single_split_is_told(tmp_path):
    hugging_face_splits()["train"].save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(
        ValueError, match=r"no split val or valid .*, it has train; test_split says"
    ):
        HuggingFaceSource(tmp_path / "saved")


def test_damaged_and_missing_files_are_told(tmp_path):
    folder = saved(tmp_path)
    (folder / "train" / "data-00000-of-00001.arrow").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"datasets cannot read .*saved: "):
        HuggingFaceSource(folder)
    (folder / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"datasets cannot read .*saved: "):
        HuggingFaceSource(folder)
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"datasets cannot read .*: Parquet file size"):
        HuggingFaceSource(tmp_path, cache=str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no such data; expected a folder that save_"):
        HuggingFaceSource(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"nowhere does not exist; expected .* on the hub, OWNER/"):
        HuggingFaceSource(tmp_path / "nowhere")


def test_a_hub_that_cannot_be_reached_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"datasets cannot read nobody/nothing: .*nobody/nothing"):
        HuggingFaceSource("nobody/nothing", cache=str(tmp_path))


def test_a_missing_library_is_told(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the library datasets: pip install 'softlabels\[d"):
        HuggingFaceSource(folder)
