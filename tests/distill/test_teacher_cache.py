"""A teacher's stored answers: what is kept of them, how they are read, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from shared.small_networks import IMAGE_SHAPE, NUM_CLASSES, hard_labels, images_of, small_cnn
from softlabels import Distiller, KDLoss, NKDLoss, Teacher, TeacherCache, USKDLoss
from softlabels.distill.answers import bytes_per_view, compress, densify, unreadable
from softlabels.distill.cache_folder import VERSION, CacheFolder, Manifest
from softlabels.distill.external_inputs import external_values
from softlabels.inputs import Features, FromBatch, Logits, TeacherLogits
from softlabels.losses import Method

NUM_IMAGES, NUM_DRAWS, PER_FILE = 10, 3, 4
HALF = 2.0**-10  # of a value in half precision, relative
NO_ERROR = {"mean_kl": 0.1, "max_kl": 0.2, "top1_agreement": 1, "views": 30, "unreadable": 0}
SUMS = {"views": 4, "kl_sum": 0.4, "kl_max": 0.2, "top1_agreements": 4}


def manifest_of(**changes: Any) -> Manifest:
    values = {
        "version": VERSION,
        "num_images": NUM_IMAGES,
        "num_classes": NUM_CLASSES,
        "num_draws": NUM_DRAWS,
        "top": 3,
        "seed": 7,
        "images_per_file": PER_FILE,
        "precision": "no",
        "teacher": "small",
        "fingerprints": {"teacher": "a1", "data": "b2", "augmentation": "c3"},
        "error": NO_ERROR,
    }
    return Manifest(**{**values, **changes})


def all_logits(num_classes: int = NUM_CLASSES) -> Tensor:
    """[K, N, C], the answers that the caches of this file hold."""
    generator = torch.Generator().manual_seed(3)
    return 3 * torch.randn(NUM_DRAWS, NUM_IMAGES, num_classes, generator=generator)


def write_cache(path: Path, logits: Tensor | None = None, **changes: Any) -> CacheFolder:
    logits = all_logits() if logits is None else logits
    manifest = manifest_of(num_classes=logits.shape[2], **changes)
    folder = CacheFolder(path)
    path.mkdir(parents=True)
    for draw, chunk in manifest.files:
        images = manifest.images_of(chunk)
        of_file = compress(logits[draw, images.start : images.stop], manifest.top)
        folder.write(manifest, draw, chunk, of_file, SUMS)
    manifest.write(folder.manifest)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A cache that no test may change."""
    path = tmp_path_factory.mktemp("caches") / "written"
    write_cache(path)
    return path


@pytest.fixture
def changeable(written, tmp_path) -> CacheFolder:
    shutil.copytree(written, tmp_path / "cache")
    return CacheFolder(tmp_path / "cache")


# What is kept


rows_of_logits = st.integers(2, 9).flatmap(
    lambda classes: arrays(
        "float32", (4, classes), elements=st.floats(-300, 300, width=32, allow_subnormal=False)
    )
)


@given(rows_of_logits, st.data())
def test_the_log_sum_exp_and_the_order_of_the_kept_classes_stay(array, data):
    logits = torch.from_numpy(array)
    num_classes = logits.shape[1]
    top = data.draw(st.integers(1, num_classes))

    answers = compress(logits, top)
    dense = densify(answers, num_classes)

    tolerance = HALF * float(logits.abs().max()) + 1e-5
    torch.testing.assert_close(dense.logsumexp(1), logits.logsumexp(1), rtol=0, atol=tolerance)
    kept = answers.classes.long()
    torch.testing.assert_close(dense.gather(1, kept), logits.gather(1, kept), rtol=HALF, atol=1e-6)
    values = dense.gather(1, kept)
    assert bool((values[:, :-1] >= values[:, 1:]).all())
    others = dense.scatter(1, kept, -math.inf).amax(1)
    assert bool((others <= values[:, -1]).all())


@given(rows_of_logits)
def test_all_classes_kept_are_the_logits_in_half_precision(array):
    logits = torch.from_numpy(array)

    dense = densify(compress(logits, logits.shape[1]), logits.shape[1])

    assert torch.equal(dense, logits.half().float())


def test_what_is_not_kept_is_spread_evenly():
    logits = torch.tensor([[1.0, 4.0, 0.0, 2.0, 3.0]])

    dense = densify(compress(logits, 2), 5)

    each = torch.tensor([0.0, 1.0, 2.0]).logsumexp(0) - math.log(3)
    expected = torch.stack([each, torch.tensor(4.0), each, each, torch.tensor(3.0)])
    torch.testing.assert_close(dense, expected.unsqueeze(0))
    probabilities, kept = dense.softmax(1), [1, 4]
    torch.testing.assert_close(probabilities[:, kept], logits.softmax(1)[:, kept])


@pytest.mark.parametrize("top", [0, -1, 6])
def test_a_number_of_classes_that_there_is_not_is_refused(top):
    with pytest.raises(ValueError, match=f"top must be in 1..5, the number of classes, got {top}"):
        compress(torch.zeros(2, 5), top)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e5, -1e5])
def test_logits_beyond_half_precision_are_refused(value):
    logits = torch.zeros(2, 3)
    logits[1, 2] = value

    with pytest.raises(
        ValueError, match=f"at most 65,504 in size.*got {value:g}".replace("+", r"\+")
    ):
        compress(logits, 3)


def test_a_logit_far_below_is_part_of_the_rest():
    dense = densify(compress(torch.tensor([[0.0, -1e6, 1.0]]), 2), 3)

    torch.testing.assert_close(dense, torch.tensor([[0.0, -1e6, 1.0]]))


@pytest.mark.parametrize(
    ("num_classes", "dtype", "size"),
    [(1000, torch.int16, 44), (32_767, torch.int16, 44), (32_768, torch.int32, 64)],
)
def test_a_view_takes_as_many_bytes_as_is_said(num_classes, dtype, size):
    answers = compress(torch.randn(2, num_classes), 10)

    assert answers.classes.dtype == dtype
    assert sum(value.nbytes for value in answers) == 2 * size
    assert bytes_per_view(num_classes, 10) == size


# Reading


def test_views_of_any_files_and_draws_are_found(written):
    cache = TeacherCache(written)
    index, draw = torch.tensor([9, 0, 3, 4, 9, 0]), torch.tensor([2, 0, 1, 1, 0, 2])

    logits = cache.logits(index, draw, "cpu")

    expected = densify(compress(all_logits()[draw, index], 3), NUM_CLASSES)
    assert torch.equal(logits, expected)
    assert logits.dtype == torch.float32


def test_all_views_in_their_order_and_an_empty_batch(written):
    cache = TeacherCache(written)
    for number in range(NUM_DRAWS):
        draw = torch.full((NUM_IMAGES,), number, dtype=torch.int32)
        logits = cache.logits(torch.arange(NUM_IMAGES, dtype=torch.int32), draw, "cpu")
        assert torch.equal(logits, densify(compress(all_logits()[number], 3), NUM_CLASSES))
    empty = torch.empty(0, dtype=torch.int64)
    assert cache.logits(empty, empty, "cpu").shape == (0, NUM_CLASSES)


def test_more_classes_than_int16_holds(tmp_path):
    logits = all_logits(40_000)
    write_cache(tmp_path / "cache", logits, top=2)

    found = TeacherCache(tmp_path / "cache").logits(torch.tensor([5]), torch.tensor([1]), "cpu")

    assert torch.equal(found[0].topk(2).indices, logits[1, 5].topk(2).indices)


def test_a_cache_says_what_it_holds(written):
    cache = TeacherCache(str(written))

    assert (cache.num_images, cache.num_draws, cache.num_classes, cache.top) == (10, 3, 5, 3)
    assert cache.seed == 7
    assert cache.fingerprints == {"teacher": "a1", "data": "b2", "augmentation": "c3"}
    assert cache.error == NO_ERROR
    assert cache.num_bytes == 10 * 3 * (3 * 4 + 4)
    assert [cache.draw(epoch) for epoch in range(5)] == [(7, 0), (7, 1), (7, 2), (7, 0), (7, 1)]
    assert "10 images x 3 draws, 3 of 5 classes" in repr(cache)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["deep", "pickle"],
)
def test_a_copy_reads_the_same_files(written, copied):
    cache = TeacherCache(written)
    where = (torch.tensor([1, 8]), torch.tensor([0, 2]), "cpu")
    expected = cache.logits(*where)

    other = copied(cache)

    assert torch.equal(other.logits(*where), expected)
    # The mapped files are not part of it.
    assert len(pickle.dumps(cache)) < 1000


def test_the_files_are_mapped_and_keep_no_descriptor_open(written):
    cache = TeacherCache(written)
    before = len(list(Path("/proc/self/fd").iterdir()))
    cache.logits(torch.tensor([0, 4, 8]), torch.tensor([0, 1, 2]), "cpu")

    assert len(list(Path("/proc/self/fd").iterdir())) == before
    mapped = Path("/proc/self/maps").read_text()
    assert str(written / "draw-001" / "chunk-00001.safetensors") in mapped


@pytest.mark.parametrize(
    ("index", "draw", "error", "message"),
    [
        ([10], [0], ValueError, r"index must be in 0..9, got 10..10"),
        ([-1, 3], [0, 0], ValueError, r"index must be in 0..9, got -1..3"),
        ([0], [3], ValueError, r"draw must be in 0..2, got 3..3: the batch shows other views"),
        ([0], [-1], ValueError, r"draw must be in 0..2"),
        ([0, 1], [0], ValueError, "index and draw must be as long, got 2 and 1"),
        ([[0]], [0], ValueError, r"index must be \[B\], got \(1, 1\)"),
        ([0.0], [0], TypeError, "index must be a tensor of integers, got torch.float32"),
        ([0], [True], TypeError, "draw must be a tensor of integers, got torch.bool"),
    ],
)
def test_places_that_make_no_sense_are_refused(written, index, draw, error, message):
    with pytest.raises(error, match=message):
        TeacherCache(written).logits(torch.tensor(index), torch.tensor(draw), "cpu")


def test_places_on_another_device_or_no_tensors_are_refused(written):
    cache = TeacherCache(written)
    with pytest.raises(ValueError, match=r"index must lie on the CPU.*got meta"):
        cache.logits(torch.zeros(1, dtype=torch.int64, device="meta"), torch.tensor([0]), "cpu")
    with pytest.raises(TypeError, match="index must be a tensor of integers, got list"):
        cache.logits([0], torch.tensor([0]), "cpu")


def test_an_image_without_an_answer_is_named(tmp_path):
    folder = write_cache(tmp_path / "cache")
    manifest = folder.read_manifest()
    answers = folder.read(manifest, 1, 1)
    none = unreadable(4, NUM_CLASSES, 3)
    holed = [value.clone() for value in answers]
    for value, empty in zip(holed, none, strict=True):
        value[2] = empty[2]
    folder.write(manifest, 1, 1, type(answers)(*holed), SUMS)
    cache = TeacherCache(tmp_path / "cache")

    assert cache.logits(torch.tensor([5, 6]), torch.tensor([1, 0]), "cpu").isfinite().all()
    with pytest.raises(ValueError, match=r"no answer for the images \[6\]: they could not be read"):
        cache.logits(torch.tensor([5, 6]), torch.tensor([1, 1]), "cpu")


# What is refused


def read_all(path: Path) -> None:
    cache = TeacherCache(path)
    for number in range(NUM_DRAWS):
        draw = torch.full((NUM_IMAGES,), number)
        assert cache.logits(torch.arange(NUM_IMAGES), draw, "cpu").isfinite().all()


def test_a_folder_that_is_no_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no teacher cache, it has no manifest\.json"):
        TeacherCache(tmp_path)


def change_manifest(folder: CacheFolder, **changes: Any) -> None:
    folder.read_manifest().model_copy(update=changes).write(folder.manifest)


def test_a_cache_that_is_not_finished(changeable):
    change_manifest(changeable, error={})

    with pytest.raises(ValueError, match="is not finished: the same cache-teacher command goes on"):
        TeacherCache(changeable.path)


def test_a_file_that_is_missing_is_told_at_once(changeable):
    changeable.file(2, 1).unlink()

    with pytest.raises(ValueError, match=r"draw-002/chunk-00001.safetensors is missing"):
        TeacherCache(changeable.path)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)


@given(position=st.integers(0, 2**30), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_file_is_found_or_changes_nothing(written, position, bit):
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(shutil.copytree(written, Path(temporary) / "cache"))
        file = CacheFolder(path).file(1, 1)
        content = bytearray(file.read_bytes())
        content[position % len(content)] ^= 1 << bit
        file.write_bytes(content)
        found, told = None, ""
        try:
            index, draw = torch.arange(4, 8), torch.ones(4, dtype=torch.int64)
            found = TeacherCache(path).logits(index, draw, "cpu")
        except ValueError as error:
            told = str(error)

    expected = densify(compress(all_logits()[1, 4:8], 3), NUM_CLASSES)
    # A bit of the header's padding, or of the error that it holds, changes no answer.
    assert "chunk-00001.safetensors" in told or torch.equal(found, expected)


@pytest.mark.parametrize("part", ["values", "classes", "rest"])
def test_a_flipped_bit_of_any_tensor_is_found(changeable, part):
    file = changeable.file(1, 1)
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    flip(file, start + header[part]["data_offsets"][0])

    with pytest.raises(ValueError, match=r"draw-001/chunk-00001.safetensors is damaged"):
        read_all(changeable.path)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_file_that_is_cut_short_is_found(changeable, size):
    file = changeable.file(0, 2)
    file.write_bytes(file.read_bytes()[:size])

    with pytest.raises(ValueError, match=r"draw-000/chunk-00002.safetensors is damaged"):
        read_all(changeable.path)


def test_a_file_of_another_draw_is_found(changeable):
    shutil.copy(changeable.file(0, 1), changeable.file(1, 1))

    with pytest.raises(ValueError, match="belongs to another cache: its draw is 0, expected 1"):
        read_all(changeable.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprints": {"teacher": "z", "data": "b2", "augmentation": "c3"}}, "fingerprints"),
        ({"seed": 8}, "its seed is 7, expected 8"),
        ({"num_classes": 6}, "its num_classes is 5"),
        ({"precision": "bf16"}, "its precision is 'no'"),
        ({"top": 2}, r"its values must be \(4, 2\) of torch.float16, got \(4, 3\)"),
        ({"images_per_file": 5}, "its rows is 4, expected 5"),
    ],
)
def test_a_file_of_another_cache_is_found(changeable, changes, message):
    change_manifest(changeable, **changes)

    with pytest.raises(ValueError, match=message):
        read_all(changeable.path)


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("classes", 0, 5, r"its classes must be in -1..4"),
        ("classes", 0, -2, r"its classes must be in -1..4"),
        ("classes", (0, 1), -1, "a row has answers in part"),
        ("values", 0, math.inf, "a logit is not finite"),
        ("values", 0, math.nan, "a logit is not finite"),
        ("rest", 0, -math.inf, "the rest of a row is not finite"),
        ("rest", 0, math.nan, "the rest of a row is not finite"),
    ],
)
def test_answers_that_no_teacher_gives_are_refused(changeable, name, row, value, message):
    """A file from a stranger can be whole, with a digest that fits."""
    manifest = changeable.read_manifest()
    answers = changeable.read(manifest, 0, 0)
    changed = getattr(answers, name).clone()
    changed[row] = value
    changeable.write(manifest, 0, 0, answers._replace(**{name: changed}), SUMS)

    with pytest.raises(ValueError, match=f"draw-000/chunk-00000.safetensors is damaged: {message}"):
        read_all(changeable.path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '"text"', "[" * 100_000, "\udcff", '{"version": 2}', "9" * 5000],
    ids=str.__len__,
)
def test_a_manifest_that_is_none_is_refused(changeable, text):
    changeable.manifest.write_bytes(text.encode("utf-8", "surrogateescape"))

    with pytest.raises(ValueError, match=r"manifest\.json: "):
        TeacherCache(changeable.path)


WRONG_VALUES = {
    "num_images": [0, -1, 2.0, "10", None, True, 10**30],
    "num_classes": [1, 10**30, [5], None],
    "num_draws": [0, 10**30, None],
    "top": [0, 6, None],
    "seed": [-1, 0.5, None],
    "images_per_file": [0, 10**30, None],
    "precision": [None, 1],
    "teacher": [None, {}],
    "fingerprints": [
        None,
        {},
        [],
        {"teacher": "a"},
        {"teacher": 1, "data": "", "augmentation": ""},
    ],
    "error": [
        None,
        [],
        {"mean_kl": 1},
        {**NO_ERROR, "views": "x"},
        {**NO_ERROR, "max_kl": math.nan},
        {**NO_ERROR, "views": 10**400},
    ],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_VALUES.items() for value in values]
)
def test_a_manifest_with_a_wrong_value_is_refused(changeable, name, value):
    content = json.loads(changeable.manifest.read_text())
    content[name] = value
    changeable.manifest.write_text(json.dumps(content))

    with pytest.raises(ValueError, match=rf"manifest\.json: {name}"):
        TeacherCache(changeable.path)


# In a Distiller


class ReadsFeatures(Method):
    of_batch = True
    inputs: ClassVar = {
        "features": Features(of="teacher", stages=("last",)),
        "logits": TeacherLogits(),
    }

    def terms(self, features: list[Tensor], logits: Tensor) -> dict[str, Tensor]:
        return {"mean": features[0].mean() + logits.mean()}


class ReadsIndex(Method):
    inputs: ClassVar = {
        "logits": Logits(),
        "index": FromBatch("index"),
        "teacher_logits": TeacherLogits(),
    }

    def terms(self, logits: Tensor, index: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        return {"mean": logits.mean(1) + 0 * index + 0 * teacher_logits.mean(1)}


class Answering(nn.Module):
    """A network that answers the images of a batch as it was told."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


INDEX, DRAW = torch.tensor([1, 9, 4, 5]), torch.tensor([0, 2, 2, 1])


def distiller_of(method: nn.Module | None, teacher: Any, **settings: Any) -> Distiller:
    torch.manual_seed(0)
    return Distiller(small_cnn(), method, teacher=teacher, example_shape=IMAGE_SHAPE, **settings)


@pytest.mark.parametrize("method", [NKDLoss(temperature=2.0), KDLoss()], ids=["nkd", "kd"])
def test_a_step_is_that_with_a_teacher_of_the_same_answers(written, method):
    dense = densify(compress(all_logits()[DRAW, INDEX], 3), NUM_CLASSES)
    with_cache = distiller_of(method, TeacherCache(written))
    with_network = distiller_of(method, Answering(dense))

    steps = [
        with_cache(images_of(), hard_labels(), index=INDEX, draw=DRAW),
        with_network(images_of(), hard_labels()),
    ]
    for step in steps:
        step.loss.backward()

    assert torch.equal(steps[0].loss, steps[1].loss)
    assert steps[0].terms.keys() == steps[1].terms.keys()
    for one, other in zip(with_cache.parameters(), with_network.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_with_all_classes_a_step_is_the_teachers_to_half_precision(tmp_path):
    write_cache(tmp_path / "cache", top=NUM_CLASSES)
    steps = [
        distiller_of(NKDLoss(), teacher)(images_of(), hard_labels(), index=INDEX, draw=DRAW)
        for teacher in (TeacherCache(tmp_path / "cache"), Answering(all_logits()[DRAW, INDEX]))
    ]

    torch.testing.assert_close(steps[0].loss, steps[1].loss, rtol=2e-3, atol=0)
    assert not torch.equal(steps[0].loss, steps[1].loss)


@pytest.mark.parametrize("missing", ["index", "draw"])
def test_a_missing_place_says_how_to_call(written, missing):
    distiller = distiller_of(NKDLoss(), TeacherCache(written))
    extras = {name: value for name, value in (("index", INDEX), ("draw", DRAW)) if name != missing}

    message = rf"got no {missing}: call distiller\(images, target, index=..., draw=...\)"
    for call in (distiller, distiller.soft_labels):
        with pytest.raises(ValueError, match=message):
            call(images_of(), hard_labels(), **extras)


def test_places_of_another_number_of_images_are_refused(written):
    distiller = distiller_of(NKDLoss(), TeacherCache(written))

    with pytest.raises(ValueError, match=r"index must be \[4\] as the images, got 3"):
        distiller(images_of(), hard_labels(), index=INDEX[:3], draw=DRAW[:3])


def test_a_method_that_reads_more_than_logits_is_refused_at_once(written):
    with pytest.raises(ValueError, match=r"reads Features\(of='teacher'.*holds logits alone"):
        distiller_of(ReadsFeatures(), TeacherCache(written))


def test_another_number_of_classes_is_refused_at_once(written):
    with pytest.raises(ValueError, match="the teacher has 5 classes, the student 7"):
        Distiller(small_cnn(7), NKDLoss(), teacher=TeacherCache(written), example_shape=IMAGE_SHAPE)


def test_a_cache_has_no_layers(written):
    with pytest.raises(ValueError, match="there is no teacher's network"):
        distiller_of(NKDLoss(), TeacherCache(written), taps={"teacher.last": "stage2"})


@pytest.mark.parametrize("method", [None, USKDLoss()])
def test_a_method_without_a_teacher_needs_no_places(written, method):
    """It may be given a cache all the same, whose draws it then trains on."""
    distiller = distiller_of(method, TeacherCache(written))

    assert distiller.extras == ()
    assert distiller(images_of(), hard_labels()).loss.isfinite()


def test_the_cache_is_neither_stored_nor_trained_nor_copied(written):
    with_cache = distiller_of(NKDLoss(), TeacherCache(written))
    with_teacher = distiller_of(NKDLoss(), Teacher(small_cnn(seed=1)))

    assert with_cache.state_dict().keys() == with_teacher.state_dict().keys()
    assert len(list(with_cache.parameters())) == len(list(with_teacher.parameters()))
    copied = copy.deepcopy(with_cache)
    where = {"index": INDEX, "draw": DRAW}
    losses = [d(images_of(), hard_labels(), **where).loss for d in (with_cache, copied)]
    assert torch.equal(*losses)


def test_a_compiled_and_a_double_student_take_the_cache(written):
    where = {"index": INDEX, "draw": DRAW}
    plain = distiller_of(NKDLoss(), TeacherCache(written))
    expected = plain(images_of(), hard_labels(), **where).loss

    compiled = distiller_of(NKDLoss(), TeacherCache(written))
    compiled.trainable = torch.compile(compiled.trainable, backend="eager", fullgraph=True)
    double = distiller_of(NKDLoss(), TeacherCache(written)).double()

    torch.testing.assert_close(compiled(images_of(), hard_labels(), **where).loss, expected)
    loss = double(images_of().double(), hard_labels(), **where).loss
    torch.testing.assert_close(loss, expected.double(), rtol=1e-5, atol=1e-6)


def test_soft_labels_are_those_of_the_stored_answers(written):
    dense = densify(compress(all_logits()[DRAW, INDEX], 3), NUM_CLASSES)
    labels = [
        distiller_of(NKDLoss(), teacher).soft_labels(
            images_of(), hard_labels(), index=INDEX, draw=DRAW
        )
        for teacher in (TeacherCache(written), Answering(dense))
    ]

    for one, other in zip(*labels, strict=True):
        assert torch.equal(one, other)


def test_extras_that_a_method_reads_go_to_the_targets_device():
    target = torch.zeros(4, dtype=torch.int64, device="meta")

    values, _ = external_values({"index": FromBatch("index")}, target, {"index": INDEX}, {})

    assert values["index"].device.type == "meta"
    assert INDEX.device.type == "cpu"


def test_a_method_may_read_the_index_as_well(written):
    distiller = distiller_of(ReadsIndex(), TeacherCache(written))

    assert distiller(images_of(), hard_labels(), index=INDEX, draw=DRAW).loss.isfinite()
