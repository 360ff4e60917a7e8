"""The table of methods and what each method declares: its signals, settings and soft labels."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shared.loss_cases import CASES, LossCase, case_id
from softlabels import losses
from softlabels.inputs import Input, Logits, Target, TeacherLogits, Votes, WeakLogits
from softlabels.inputs import declared as kinds
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

    assert issubclass(method, nn.Module)
    assert method.__module__ == f"softlabels.losses.{name}"
    assert getattr(losses, method.__name__) is method


def test_label_smoothing_is_no_method_but_a_task_loss():
    assert losses.LabelSmoothingLoss not in METHODS.values()
    assert not hasattr(losses.LabelSmoothingLoss, "reads")


@every_method
def test_settings_have_annotated_types_for_the_config(name):
    # A method without settings has no constructor of its own.
    parameters = inspect.signature(METHODS[name].__init__).parameters.values()
    types = typing.get_type_hints(METHODS[name].__init__)
    allowed = (bool, int, float, int | None, float | None, tuple[str, ...])

    settings = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    rest = [p for p in parameters if p not in settings and p.name != "self"]
    assert all(p.kind in variadic for p in rest)
    for setting in settings:
        assert setting.default is not setting.empty
        hint = types[setting.name]
        assert hint in allowed or typing.get_origin(hint) is typing.Literal


@every_method
def test_what_a_paper_recommends_is_a_weight(name):
    method = METHODS[name]

    assert getattr(method, "recommended_weight", 1.0) > 0
    of_task = getattr(method, "recommended_task_weight", 1.0)
    assert of_task == "rest" or of_task >= 0
    warmup = getattr(method, "recommended_warmup", 0.0)
    assert warmup == "run" or warmup >= 0


# Signals


@every_method
def test_a_method_by_itself_reads_a_signal_for_every_tensor_that_forward_needs(name):
    module = METHODS[name]()
    parameters = inspect.signature(module.forward).parameters
    required = {name for name, p in parameters.items() if p.default is inspect.Parameter.empty}

    assert required <= set(module.inputs) <= set(parameters)
    assert all(isinstance(kind, Input) for kind in module.inputs.values())


@every_method_case
def test_a_method_reads_a_signal_for_every_tensor_that_forward_needs(case):
    module = case.module(**case.module_settings)
    parameters = inspect.signature(module.forward).parameters
    required = {name for name, p in parameters.items() if p.default is inspect.Parameter.empty}

    names = {"exits" if name.startswith("exit_logits") else name for name in case.inputs}
    assert set(module.inputs) == names
    assert required <= set(module.inputs) <= set(parameters)
    assert all(isinstance(kind, Input) for kind in module.inputs.values())


def test_the_signals_of_each_method():
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


@pytest.mark.parametrize(
    "kind", [getattr(kinds, name) for name in kinds.__all__ if name != "Input"]
)
def test_a_signal_is_a_frozen_value(kind):
    one, other = kind(), kind()

    assert issubclass(kind, Input)
    assert one == other
    assert len({one, other}) == 1
    for field in dataclasses.fields(one):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, field.name, "changed")


def test_signals_have_the_papers_places_as_defaults():
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
