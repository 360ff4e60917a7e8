"""The table of methods and what each method declares: its inputs, settings and soft labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shared.loss_cases import CASES, LossCase, case_id
from softlabels import inputs as kinds
from softlabels import losses
from softlabels.inputs import Input, Logits, Target, TeacherLogits, Votes, WeakLogits
from softlabels.losses import METHODS, KDLoss, NKDLoss, SoftLabels, USKDLoss, ZipfLSLoss

LABELS = torch.tensor([0, 5, 1, 2])
METHOD_CASES = [case for case in CASES if case.module in METHODS.values()]

every_method = pytest.mark.parametrize("name", METHODS)
every_method_case = pytest.mark.parametrize("case", METHOD_CASES, ids=case_id)


def arguments_of(
    case: LossCase,
    target: Tensor = LABELS,
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> tuple[object, ...]:
    """Arguments of `soft_labels`: what `forward` takes, and the labels in any case."""
    inputs = case.make(case.target_kinds[0], dtype=torch.float64)
    changed = {name: change(tensor) for name, tensor in {**inputs, "target": target}.items()}
    if case.module is KDLoss:
        return tuple(changed.values())
    return case.module_arguments(changed)


# The table


@every_method
def test_a_method_lies_in_the_file_of_its_name(name):
    method = METHODS[name]

    assert issubclass(method, losses.Method)
    assert method.__module__ == f"softlabels.losses.{name}"
    assert getattr(losses, method.__name__) is method


def test_label_smoothing_is_no_method_but_a_task_loss():
    assert losses.LabelSmoothingLoss not in METHODS.values()


@every_method
def test_what_a_paper_uses_is_a_weight(name):
    defaults = METHODS[name].defaults

    assert defaults.weight > 0
    assert defaults.task_weight == "rest" or defaults.task_weight >= 0
    assert defaults.warmup == "run" or defaults.warmup >= 0


# Inputs


@every_method
def test_a_method_reads_what_its_terms_take_or_its_adapters_give(name):
    method = METHODS[name]()

    assert not method.unknown_inputs()
    read = [*method.inputs.values(), *method.adapter_inputs.values()]
    assert all(isinstance(kind, Input) for kind in read)
    given_by_adapters = set(method.argument_names()) - set(method.inputs)
    assert not given_by_adapters or method.has_adapters() or name in ("uskd", "zipf_ls", "ban")


@every_method_case
def test_a_method_reads_every_tensor_that_its_settings_need(case):
    method = case.module(**case.module_settings)

    names = {"exits" if name.startswith("exit_logits") else name for name in case.inputs}
    assert set(method.inputs) == names


def test_the_inputs_of_each_method():
    student = {"logits": Logits(), "target": Target()}

    assert dict(NKDLoss().inputs) == {**student, "teacher_logits": TeacherLogits()}
    assert dict(USKDLoss().inputs) == {**student, "weak_logits": WeakLogits(tap="middle")}
    assert dict(losses.KDLoss().inputs) == {
        "logits": Logits(),
        "teacher_logits": TeacherLogits(),
    }
    assert dict(ZipfLSLoss().inputs) == {**student, "votes": Votes(upsample=1)}


def test_zipf_ls_reads_votes_only_if_they_rank():
    assert ZipfLSLoss(vote_upsample=2).inputs["votes"] == Votes(upsample=2)
    assert "votes" not in ZipfLSLoss(rank_from="logits").inputs


NAMED = [getattr(kinds, name) for name in kinds.__all__]


@pytest.mark.parametrize(
    "kind", [k for k in NAMED if isinstance(k, type) and issubclass(k, Input) and k is not Input]
)
def test_an_input_is_a_frozen_value(kind):
    one, other = kind(), kind()

    assert one == other
    assert len({one, other}) == 1
    for field in dataclasses.fields(one):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, field.name, "changed")


def test_inputs_have_the_papers_places_as_defaults():
    assert WeakLogits() == WeakLogits(tap="middle")
    assert Votes() == Votes(upsample=1)
    assert kinds.Features() == kinds.Features(of="student", stages=("last",))
    assert kinds.FromBatch() == kinds.FromBatch(name="index")


# Soft labels


@every_method_case
def test_soft_labels_lie_where_they_belong_and_carry_no_gradient(case):
    module = case.module(**case.module_settings)
    arguments = arguments_of(
        case, change=lambda t: t.requires_grad_() if t.is_floating_point() else t
    )
    at_target = nn.functional.one_hot(LABELS, 6).bool()

    soft = module.soft_labels(*arguments)

    assert isinstance(soft, SoftLabels)
    for part in soft:
        assert part.shape == (4, 6)
        assert part.dtype == torch.float64
        assert not part.requires_grad
    assert not soft.target[~at_target].any()
    assert not soft.non_target[at_target].any()
    torch.testing.assert_close(soft.non_target.sum(1), torch.ones(4, dtype=torch.float64))


@every_method_case
def test_soft_labels_take_mixed_labels(case):
    if "mixed_target" in case.settings or case.module in (losses.KDLoss, USKDLoss):
        labeled_classes = 2
    else:
        labeled_classes = 1
    labels = torch.tensor([[0.6, 0.4, 0, 0, 0, 0], [0, 0, 0, 0.3, 0, 0.7]]).double().repeat(2, 1)

    soft = case.module(**case.module_settings).soft_labels(*arguments_of(case, labels))

    assert bool(((soft.target != 0).sum(1) == labeled_classes).all())
    assert bool(((soft.non_target != 0).sum(1) == 6 - labeled_classes).all())


@every_method_case
def test_soft_labels_of_half_precision_are_float32(case):
    arguments = arguments_of(case, change=lambda t: t.half() if t.is_floating_point() else t)

    soft = case.module(**case.module_settings).soft_labels(*arguments)

    assert soft.target.dtype == soft.non_target.dtype == torch.float32


def test_zipf_ls_module_takes_votes_exactly_if_they_rank():
    logits, target, votes = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([[0], [2]])
    with pytest.raises(ValueError, match="rank_from='votes' decides whether votes rank, got none"):
        ZipfLSLoss()(logits, target)
    with pytest.raises(ValueError, match="rank_from='logits' decides whether votes rank, got some"):
        ZipfLSLoss(rank_from="logits")(logits, target, votes)
    with pytest.raises(ValueError, match="got none"):
        ZipfLSLoss().soft_labels(logits, target)


@pytest.mark.parametrize("method", [NKDLoss(), KDLoss()])
def test_soft_labels_of_a_class_out_of_range_are_refused(method):
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="got values from 0 to 77"):
        method.soft_labels(logits, logits, torch.tensor([0, 77]))


def test_fake_tensors_have_no_values_to_check():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        loss = ZipfLSLoss(rank_from="logits")(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    assert loss.shape == ()
