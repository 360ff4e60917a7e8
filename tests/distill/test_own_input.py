"""Inputs of the user's own, with their providers: read by a method with no line of ours edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from shared.small_networks import IMAGE_SHAPE, NUM_CLASSES, hard_labels, images_of, small_cnn
from softlabels import Distiller, FeatureTap, Teacher
from softlabels.inputs import (
    BatchInput,
    Input,
    Provider,
    SecondPass,
    StudentInput,
    TeacherInput,
    Value,
)
from softlabels.losses import Method, WeightedSum
from softlabels.taps import Layout


class SpreadProvider(Provider):
    def forward(self, network: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        point = self.points[0]
        return point.as_map(features[point.key]).std((2, 3))

    def monitored(self, value: Value, logits: Tensor) -> dict[str, Tensor]:
        return {"spread": value.detach().mean()}


class ProjectedProvider(SpreadProvider):
    def __init__(self, layout: Layout, tap: str) -> None:
        point = layout.point(tap)
        super().__init__([point])
        self.fc = nn.Linear(point.channels, layout.num_classes)

    def forward(self, network: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        return self.fc(super().forward(network, logits, features))


@dataclass(frozen=True)
class Projected(StudentInput):
    tap: str = "last"

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        return ProjectedProvider(layout(), self.tap)


@dataclass(frozen=True)
class Spread(TeacherInput):
    tap: str = "last"
    teacher: int = 0

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        return SpreadProvider([layout().point(self.tap)])


@dataclass(frozen=True)
class Rank(BatchInput):
    name: str = "index"

    @property
    def extras(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, target: Tensor, extras: Mapping[str, Tensor]) -> Value:
        return extras[self.name].argsort() + 10 * target


class Reading(Method):
    inputs: ClassVar[Mapping[str, Input]] = {
        "projected": Projected(),
        "second": SecondPass(of=Projected()),
        "spread": Spread("middle"),
        "rank": Rank(),
    }

    def terms(
        self, projected: Tensor, second: Tensor, spread: Tensor, rank: Tensor
    ) -> dict[str, Tensor]:
        self.values = (projected, second, spread, rank)
        return {"size": (projected - second).square().mean(1) + spread.mean(1) + rank}


EXTRAS = {"index": torch.tensor([3, 1, 2, 0]), "second_view": -images_of()}


def spread_of(model: nn.Module, path: str, images: Tensor) -> Tensor:
    with FeatureTap(model, [path]) as tap:
        model(images)
        return tap.pop()[path].std((2, 3))


def test_own_inputs_of_student_teacher_and_batch_reach_the_method():
    student, teacher = small_cnn().eval(), small_cnn(seed=1).eval()
    distiller = Distiller(student, Reading(), teacher=teacher, example_shape=IMAGE_SHAPE)

    step = distiller(images_of(), hard_labels(), **EXTRAS)

    projected, second, spread, rank = distiller.method.values
    head = distiller.trainable.providers["projected"].fc
    torch.testing.assert_close(projected, head(spread_of(student, "stage2", images_of())))
    torch.testing.assert_close(second, head(spread_of(student, "stage2", EXTRAS["second_view"])))
    torch.testing.assert_close(spread, spread_of(teacher, "stage1", images_of()))
    assert not spread.requires_grad
    assert torch.equal(rank, torch.tensor([3, 1, 2, 0]) + 10 * hard_labels())
    torch.testing.assert_close(step.monitored["spread"], projected.detach().mean())


def test_the_learned_part_of_an_own_input_is_trained_and_stored_and_not_exported():
    distiller = Distiller(
        small_cnn(), Reading(), teacher=small_cnn(seed=1), example_shape=IMAGE_SHAPE
    )

    distiller(images_of(), hard_labels(), **EXTRAS).loss.backward()

    weight = dict(distiller.named_parameters())["trainable.providers.projected.fc.weight"]
    assert weight.shape == (NUM_CLASSES, 16)
    assert weight.grad.any()
    assert "trainable.providers.projected.fc.weight" in distiller.state_dict()
    assert distiller.export().state_dict().keys() == small_cnn().state_dict().keys()


def test_what_own_inputs_need_is_asked_for():
    with pytest.raises(ValueError, match="Reading reads from a teacher: pass teacher="):
        Distiller(small_cnn(), Reading(), example_shape=IMAGE_SHAPE)
    distiller = Distiller(
        small_cnn(), Reading(), teacher=small_cnn(seed=1), example_shape=IMAGE_SHAPE
    )
    assert distiller.extras == ("second_view", "index")
    with pytest.raises(ValueError, match="reads 'index' from the batch, got second_view: call"):
        distiller(images_of(), hard_labels(), second_view=images_of())


def test_an_own_input_is_read_from_the_teacher_that_a_sum_names():
    students, teachers = small_cnn().eval(), [small_cnn(seed=k).eval() for k in (1, 2)]
    method = WeightedSum({"a": Reading(), "b": Reading()}, teachers={"b": 1})
    distiller = Distiller(
        students, method, teacher=[Teacher(each) for each in teachers], example_shape=IMAGE_SHAPE
    )

    distiller(images_of(), hard_labels(), **EXTRAS)

    for member, teacher in zip(method.members().values(), teachers, strict=True):
        torch.testing.assert_close(member.values[2], spread_of(teacher, "stage1", images_of()))


def test_the_trained_module_with_an_own_input_compiles_to_one_graph():
    distiller = Distiller(
        small_cnn(norm="group").eval(),
        Reading(),
        teacher=small_cnn(seed=1),
        example_shape=IMAGE_SHAPE,
    )
    plain = distiller(images_of(), hard_labels(), **EXTRAS)

    torch._dynamo.reset()
    distiller.trainable = torch.compile(distiller.trainable, backend="aot_eager", fullgraph=True)

    step = distiller(images_of(), hard_labels(), **EXTRAS)
    torch.testing.assert_close(step.loss, plain.loss)
