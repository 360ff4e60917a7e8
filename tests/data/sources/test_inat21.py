import json
import shutil

import pytest

from shared.data_files import SPECIES, levels, png, species_folder, write_file, write_inat21
from softlabels.data.sources.inat21 import INat21Source

PLAIN = {"augmentation": "none", "mean": (0, 0, 0), "std": (1, 1, 1), "image_size": 8, "workers": 0}


@pytest.fixture
def folder(tmp_path):
    return write_inat21(tmp_path / "inat")


def test_without_lists_the_folders_say_the_same_by_other_names(tmp_path, folder):
    plain = write_inat21(tmp_path / "plain", lists=False)
    with_lists, without = (INat21Source(place, **PLAIN) for place in (folder, plain))
    assert without.info.class_names == tuple(species_folder(label) for label in (0, 1))
    assert with_lists.info.class_names == SPECIES
    ours, theirs = (
        list(source.train_views(draw=(0, 0), batch_size=20, device="cpu"))
        for source in (with_lists, without)
    )
    assert levels(ours) == levels(theirs)
    assert ours[0].target.tolist() == theirs[0].target.tolist() == [0] * 7 + [1] * 7


def test_the_full_training_set_is_taken_if_asked_or_alone(tmp_path):
    write_inat21(tmp_path, train="train", lists=False)
    assert INat21Source(tmp_path).num_train == 14
    for label in (0, 1):
        write_file(tmp_path / "train_mini" / species_folder(label) / "0.jpg", png(0))
    assert INat21Source(tmp_path).num_train == 2
    assert INat21Source(tmp_path, train_split="train").num_train == 14
    with pytest.raises(ValueError, match="train_split must be one of train_mini, train, got 'al"):
        INat21Source(tmp_path, train_split="all")


def test_a_list_of_fewer_images_than_there_are_files_is_a_choice(folder):
    edit(folder, "train_mini", lambda content: content["annotations"].pop())
    assert INat21Source(folder).num_train == 13


def edit(folder, split, change):
    file = folder / f"{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def one_class(content):
    content["categories"] = [c for c in content["categories"] if c["id"] == 0]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 0]


def set_in(part, **values):
    return lambda content: content[part][3].update(values)


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("val", one_class, r"val\.json has 1 class\(es\), \['Lumbricus terrestris'\]; expected 2"),
        (
            "train_mini",
            lambda content: content["annotations"].__delitem__(slice(7, None)),
            r"train_mini\.json has no image of \['Sabella spallanzanii'\]",
        ),
        (
            "val",
            lambda content: content["categories"][0].update(name="Sabella crassicornis"),
            r"differ; only in .*train_mini\.json: \['Sabella spall.*val\.json: \['Sabella crass",
        ),
        ("val", set_in("annotations", category_id=7), r"the label 7, which is no category"),
        ("val", set_in("annotations", image_id=7), r"a label for image 7 \(None\); expected the f"),
        (
            "val",
            set_in("images", file_name="val/../train_mini/x.jpg"),
            r"a label for image 53 \(val/\.\./train_mini/x\.jpg\); expected the file of each in",
        ),
        ("val", lambda content: content.pop("images"), r"val\.json: images: Field required; exp"),
        ("val", set_in("annotations", category_id="x"), r"annotations\.3\.category_id: .*integer"),
        ("val", lambda c: c["categories"][0].update(id=0), r"has two categories with one id"),
    ],
)
def test_lists_that_do_not_fit_are_told(folder, split, change, message):
    edit(folder, split, change)
    with pytest.raises(ValueError, match=message) as caught:
        INat21Source(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: next((f / "val" / species_folder(0)).iterdir()).unlink(),
            r"val\.json has a label for image 5\d \(val/.*jpg\); expected the file of each",
        ),
        (lambda f: (f / "val.json").unlink(), r"val\.json is missing; expected the lists of both"),
        (lambda f: write_file(f / "val.json", "[1"), r"val\.json: Invalid JSON"),
        (
            lambda f: shutil.rmtree(f / "train_mini"),
            r"train_mini is no folder; expected images in it",
        ),
    ],
)
def test_files_that_are_missing_or_damaged_are_told(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        INat21Source(folder)


def test_folders_that_differ_are_told(tmp_path):
    write_inat21(tmp_path, lists=False)
    shutil.rmtree(tmp_path / "val" / species_folder(1))
    with pytest.raises(ValueError, match=r"val has 1 class\(es\), \['00000_Animalia"):
        INat21Source(tmp_path)
