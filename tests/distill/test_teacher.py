"""A teacher stays frozen, takes the student's images, and answers in the student's classes."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shared.small_networks import NUM_CLASSES, hard_labels, images_of, small_cnn
from softlabels import Distiller, NKDLoss, Teacher

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)
STUDENT_MEAN, STUDENT_STD = (0.1, 0.2, 0.3), (0.6, 0.5, 0.4)


def per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def raw_images(channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(4, channels, 16, 16, generator=generator)


def with_dropout() -> nn.Module:
    return small_cnn(dropout=0.5, seed=1)


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


# Images and classes


def test_a_teacher_with_defaults_gives_its_models_logits():
    model = small_cnn().eval()
    expected = model(images_of())

    logits = Teacher(model)(images_of())

    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_the_images_are_decoded_from_the_student_and_encoded_for_the_teacher():
    model = small_cnn()
    teacher = Teacher(
        model, normalization=(MEAN, STD), student_normalization=(STUDENT_MEAN, STUDENT_STD)
    )
    raw = raw_images()
    for_student = (raw - per_channel(STUDENT_MEAN)) / per_channel(STUDENT_STD)
    for_teacher = (raw - per_channel(MEAN)) / per_channel(STD)

    torch.testing.assert_close(teacher.prepared(for_student), for_teacher)
    torch.testing.assert_close(teacher(for_student), model(for_teacher))


def test_the_same_normalization_changes_nothing():
    same = (MEAN, STD)
    teacher = Teacher(small_cnn(), normalization=same, student_normalization=same)

    torch.testing.assert_close(teacher.prepared(images_of()), images_of())


def test_grey_images_reach_a_teacher_of_colors():
    teacher = Teacher(
        small_cnn(), normalization=(MEAN, STD), student_normalization=((0.3,), (0.2,))
    )
    raw = raw_images(channels=1)

    prepared = teacher.prepared((raw - 0.3) / 0.2)

    torch.testing.assert_close(prepared, (raw - per_channel(MEAN)) / per_channel(STD))
    assert teacher((raw - 0.3) / 0.2).shape == (4, NUM_CLASSES)


@pytest.mark.parametrize(("size", "shape"), [(32, (32, 32)), ((8, 24), (8, 24)), (16, (16, 16))])
def test_the_images_are_resized_to_the_teachers_input(size, shape):
    teacher = Teacher(small_cnn(), input_size=size)
    images = images_of()

    prepared = teacher.prepared(images)

    assert tuple(prepared.shape) == (4, 3, *shape)
    expected = nn.functional.interpolate(
        images, shape, mode="bilinear", align_corners=False, antialias=True
    )
    torch.testing.assert_close(prepared, expected)
    assert (prepared is images) == (shape == (16, 16))


def test_the_images_may_be_of_another_size_than_the_teachers_only_with_input_size():
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, NUM_CLASSES))

    assert Teacher(fixed, input_size=8)(images_of()).shape == (4, NUM_CLASSES)
    with pytest.raises(RuntimeError):
        Teacher(fixed)(images_of())


@pytest.mark.parametrize("class_map", [[4, 0, 6], range(2, 5), (6, 6, 6)])
def test_a_class_map_picks_the_students_classes_in_its_order(class_map):
    model = small_cnn(7).eval()

    logits = Teacher(model, class_map=class_map)(images_of())

    expected = model(images_of())
    assert logits.shape == (4, 3)
    for column, of_teacher in enumerate(class_map):
        torch.testing.assert_close(logits[:, column], expected[:, of_teacher])


def test_a_teacher_of_more_classes_needs_a_class_map():
    student = small_cnn(NUM_CLASSES)
    distiller = Distiller(student, NKDLoss(), teacher=Teacher(small_cnn(7)))

    message = r"teacher has 7 classes, the student 5: pass Teacher\(model, class_map=\[\.\.\.\]\)"
    with pytest.raises(ValueError, match=message):
        distiller(images_of(), hard_labels())
    for class_map, fits in (([6, 5, 4, 3, 2], True), ([6, 5, 4], False)):
        teacher = Teacher(small_cnn(7), class_map=class_map)
        distiller = Distiller(small_cnn(NUM_CLASSES), NKDLoss(), teacher=teacher)
        if fits:
            assert distiller(images_of(), hard_labels()).loss.isfinite()
        else:
            with pytest.raises(ValueError, match="teacher has 3 classes, the student 5"):
                distiller(images_of(), hard_labels())


# Frozen


def test_nothing_of_a_teacher_takes_a_gradient():
    teacher = Teacher(small_cnn())
    images = images_of().requires_grad_()

    logits = teacher(images)

    assert not logits.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    # An inference tensor could not be saved for the student's backward.
    assert not logits.is_inference()


@pytest.mark.parametrize(
    "undo",
    [
        lambda teacher: teacher.train(),
        lambda teacher: teacher.train(True).train(),
        lambda teacher: nn.Sequential(teacher).train(),
        lambda teacher: nn.ModuleDict({"teacher": nn.Sequential(teacher)}).train(),
        lambda teacher: teacher.model.train(),
        lambda teacher: nn.Sequential(teacher.model).train(),
        lambda teacher: teacher.model.stem.train(),
        lambda teacher: [module.train() for module in teacher.modules()],
        lambda teacher: Distiller(small_cnn(), NKDLoss(), teacher=teacher).train(),
    ],
)
def test_a_teacher_leaves_eval_mode_by_no_way_around(undo):
    model = with_dropout()
    teacher = Teacher(model.train())
    expected = copy.deepcopy(model).eval()(images_of())
    before = buffers_of(model)

    undo(teacher)
    logits = teacher(images_of())

    torch.testing.assert_close(logits, expected)
    assert not any(module.training for module in teacher.modules())
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


def test_a_distillers_steps_leave_the_teacher_as_it_was():
    teacher = Teacher(with_dropout())
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(small_cnn(), NKDLoss(), teacher=teacher).train()
    optimizer = torch.optim.SGD(distiller.parameters(), 0.5)

    for _ in range(2):
        distiller(images_of(), hard_labels()).loss.backward()
        optimizer.step()

    assert all(p.grad is None for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_train_mode_is_an_explicit_switch():
    model = with_dropout()
    before = buffers_of(model)
    teacher = Teacher(model, mode="train")

    first, second = teacher(images_of()), teacher(images_of())

    assert teacher.training
    assert model.dropout.training
    assert not torch.equal(first, second)  # dropout
    assert not first.requires_grad
    for name, value in model.named_buffers():
        assert not torch.equal(value, before[name]), name  # batch statistics
    assert model.stem[1].num_batches_tracked == 2


def test_train_mode_survives_the_distillers_eval():
    teacher = Teacher(with_dropout(), mode="train")
    distiller = Distiller(small_cnn(), NKDLoss(), teacher=teacher)

    distiller.eval()

    assert teacher.training
    assert not teacher.eval().training  # of its own, it can be switched


def test_the_distillers_dry_run_changes_no_statistics_of_a_teacher_in_train_mode():
    teacher = Teacher(with_dropout(), mode="train")
    before = buffers_of(teacher)
    random_state = torch.get_rng_state()

    Distiller(small_cnn(), NKDLoss(), teacher=teacher, example_shape=(3, 16, 16))

    for name, value in teacher.named_buffers():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in teacher.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


# Weights by file


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_file(tmp_path, suffix):
    trained = small_cnn(seed=3).eval()
    path = tmp_path / f"teacher{suffix}"
    if suffix == ".pth":
        torch.save(trained.state_dict(), path)
    else:
        save_file(trained.state_dict(), path)

    for given in (path, str(path)):
        teacher = Teacher(small_cnn(seed=4), weights=given)

        torch.testing.assert_close(teacher(images_of()), trained(images_of()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc.bias"), r"missing fc\.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda state: state.update({"fc.bias": torch.zeros(9)}), r"fc\.bias: got \(9,\)"),
    ],
)
def test_weights_of_another_network_are_an_error(tmp_path, change, message):
    state = small_cnn(seed=3).state_dict()
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    model = small_cnn(seed=4)

    with pytest.raises(ValueError, match=message):
        Teacher(model, weights=tmp_path / "other.safetensors")

    torch.testing.assert_close(model.fc.weight, small_cnn(seed=4).fc.weight, rtol=0, atol=0)


def test_weights_of_other_class_counts_are_an_error(tmp_path):
    save_file(small_cnn(7).state_dict(), tmp_path / "seven.safetensors")

    with pytest.raises(ValueError, match=r"fc\.weight: got \(7, 16\), expected \(5, 16\)"):
        Teacher(small_cnn(NUM_CLASSES), weights=tmp_path / "seven.safetensors")


def test_a_missing_file_of_weights_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        Teacher(small_cnn(), weights=tmp_path / "none.safetensors")


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "frozen"}, "mode must be 'eval' or 'train', got 'frozen'"),
        ({"normalization": (MEAN, STD)}, "student_normalization is missing"),
        ({"student_normalization": (MEAN, STD)}, "^normalization is missing"),
        (
            {"normalization": (MEAN, (0.1, 0.0, 0.1)), "student_normalization": (MEAN, STD)},
            "must be above 0",
        ),
        (
            {"normalization": (MEAN, STD), "student_normalization": (MEAN, (0.1, -1, 0.1))},
            "must be above 0",
        ),
        (
            {"normalization": (MEAN, STD), "student_normalization": ((0.1, 0.1), (0.2, 0.2))},
            r"agree in their channels, got \[2, 3\]",
        ),
        ({"input_size": 0}, "input_size must be positive, got 0"),
        ({"input_size": (16, -1)}, "input_size must be positive"),
        ({"class_map": []}, "two or more class indices"),
        ({"class_map": [3]}, "two or more class indices"),
        ({"class_map": [0, -1]}, "two or more class indices"),
    ],
)
def test_a_setting_out_of_range_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        Teacher(small_cnn(), **settings)


def test_a_teacher_must_be_a_module():
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        Teacher("resnet34")


def test_a_class_map_beyond_the_teachers_classes_is_an_error():
    teacher = Teacher(small_cnn(NUM_CLASSES), class_map=[0, 5])

    with pytest.raises(ValueError, match="class_map names class 5, the teacher has 5 classes"):
        teacher(images_of())


def test_images_of_other_channels_than_the_normalization_are_an_error():
    teacher = Teacher(
        small_cnn(), normalization=(MEAN, STD), student_normalization=(STUDENT_MEAN, STUDENT_STD)
    )

    with pytest.raises(ValueError, match=r"for 3 channels, got images \(2, 4, 8, 8\)"):
        teacher(torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("tail", "error", "message"),
    [
        (nn.GRU(NUM_CLASSES, 3), TypeError, "must return a tensor, got tuple"),
        (nn.Unflatten(1, (NUM_CLASSES, 1)), ValueError, r"must return \[B, C\], got \(4, 5, 1\)"),
    ],
)
def test_a_network_that_gives_no_logits_is_an_error(tail, error, message):
    with pytest.raises(error, match=message):
        Teacher(nn.Sequential(small_cnn(), tail))(images_of())


# Moved and stored


def test_a_teacher_moves_with_its_normalization():
    teacher = Teacher(
        small_cnn(),
        normalization=(MEAN, STD),
        student_normalization=(STUDENT_MEAN, STUDENT_STD),
        class_map=[1, 0, 4],
    ).double()

    assert teacher.scale.dtype == torch.float64
    assert teacher.class_index.dtype == torch.int64
    assert teacher(images_of().double()).dtype == torch.float64


def test_a_teachers_state_is_its_models_alone():
    teacher = Teacher(small_cnn(), normalization=(MEAN, STD), student_normalization=(MEAN, STD))

    assert set(teacher.state_dict()) == {f"model.{name}" for name in small_cnn().state_dict()}
