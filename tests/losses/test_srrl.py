"""SRRL: the vectors of the published code, the head, by hand, and corner cases."""

from __future__ import annotations

import pytest
import torch

from shared.golden_vectors import assert_close, cases_of
from shared.terms import loss_and_terms
from softlabels.losses.srrl import SRRLLoss


def inputs(batch_size=3, dtype=torch.float64, student_size=(2, 3), teacher_size=(4, 4)):
    """Aligned student map, teacher map, weight, bias, logits: 5 channels, 4 classes."""
    generator = torch.Generator().manual_seed(0)
    shapes = (batch_size, 5, *student_size), (batch_size, 5, *teacher_size), (4, 5), (4,)
    return [
        torch.randn(shape, generator=generator).to(dtype) for shape in (*shapes, (batch_size, 4))
    ]


def value_of(tensors):
    student, teacher, weight, bias, logits = tensors
    return SRRLLoss()([student], [teacher], [weight, bias], logits)


def test_values_and_gradients_of_the_published_code():
    cases = cases_of("srrl")
    assert len(cases) == 3
    for case in cases:
        module = SRRLLoss(feature_weight=float(case["alpha"]), logit_weight=float(case["beta"]))
        student_map = case["student_map"].requires_grad_()
        values = {
            "student_map": [student_map],
            "teacher_map": [case["teacher_map"].requires_grad_()],
            "classifier": [case["classifier_weight"], case["classifier_bias"]],
            "teacher_logits": case["teacher_logits"],
        }
        shapes = {
            "student_map": [tuple(student_map.shape)],
            "teacher_map": [tuple(case["teacher_map"].shape)],
        }
        heads = module.build_adapters(shapes).double()
        convolution, norm, _ = heads.levels[0]
        with torch.no_grad():
            convolution.weight.copy_(case["conv_weight"])
            norm.weight.copy_(case["bn_weight"])
            norm.bias.copy_(case["bn_bias"])
        assert len(list(heads.parameters())) == 3

        added = heads(values)
        (aligned,) = added["student_map"]
        aligned.retain_grad()
        output = loss_and_terms(module, **{**values, **added})
        output.loss.backward()

        assert_close(aligned, case["aligned_map"])
        assert_close(output.loss, case["loss"])
        assert_close(output.terms["feature"], case["alpha"] * case["feature_term"])
        assert_close(output.terms["logit"], case["beta"] * case["logit_term"])
        assert_close(aligned.grad, case["grad_aligned_map"])
        assert_close(student_map.grad, case["grad_student_map"])
        assert_close(convolution.weight.grad, case["grad_conv_weight"])
        assert_close(norm.weight.grad, case["grad_bn_weight"])
        assert_close(norm.bias.grad, case["grad_bn_bias"])
        assert case["teacher_map"].grad is None


def test_one_sample_by_hand():
    # Means over positions: student (2, 1), teacher (0, 1). Feature: (4 + 0) / 2 = 2.
    # The classifier gives 2 - 1 + 0.5 = 1.5, 2 * 1 = 2 and 0: against (1, 0, 3) the squares are
    # 0.25, 4, 9, whose mean is 13.25 / 3.
    student = torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]])
    teacher = torch.tensor([[[[0.0]], [[1.0]]]])
    weight, bias = torch.tensor([[1.0, -1.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([0.5, 0, 0])
    logits = torch.tensor([[1.0, 0.0, 3.0]])

    output = loss_and_terms(
        SRRLLoss(logit_weight=3.0), [student], [teacher], [weight, bias], logits
    )

    assert float(output.terms["feature"]) == pytest.approx(2)
    assert float(output.terms["logit"]) == pytest.approx(13.25)
    assert float(output.loss) == pytest.approx(15.25)


def test_a_loop_over_samples():
    student, teacher, weight, bias, logits = inputs()
    expected = 0.0
    for sample in range(3):
        pooled = torch.stack([channel.sum() / 6 for channel in student[sample]])
        wanted = torch.stack([channel.sum() / 16 for channel in teacher[sample]])
        read = torch.stack([(row * pooled).sum() for row in weight]) + bias
        expected += 0.5 * float(((pooled - wanted) ** 2).sum()) / (3 * 5)
        expected += 5.0 * float(((read - logits[sample]) ** 2).sum()) / (3 * 4)

    value = SRRLLoss(feature_weight=0.5, logit_weight=5.0)(
        [student], [teacher], [weight, bias], logits
    )

    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_the_students_own_teacher_leaves_nothing_to_learn():
    student, _, weight, bias, _ = inputs()
    logits = student.mean((2, 3)) @ weight.t() + bias
    student.requires_grad_()

    loss = SRRLLoss()([student], [student.detach()], [weight, bias], logits)
    loss.backward()

    assert float(loss.detach()) < 1e-24
    assert float(student.grad.abs().max()) < 1e-12


def test_the_student_alone_gets_a_gradient():
    tensors = [tensor.requires_grad_() for tensor in inputs()]

    value_of(tensors).backward()

    assert bool(tensors[0].grad.any())
    assert all(tensor.grad is None for tensor in tensors[1:])


def test_half_precision_and_autocast_are_computed_in_float32():
    half = inputs(dtype=torch.bfloat16)
    expected = value_of([tensor.float() for tensor in half])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_of(half)
        again = value_of([tensor.float() for tensor in half])

    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)


def test_the_head_widens_to_the_teacher_and_keeps_the_students_size():
    module = SRRLLoss()
    heads = module.build_adapters({"student_map": [(2, 3, 8, 8)], "teacher_map": [(2, 7, 4, 4)]})

    (aligned,) = heads({"student_map": [torch.randn(2, 3, 8, 8)]})["student_map"]

    assert aligned.shape == (2, 7, 8, 8)
    assert float(aligned.detach().min()) == 0


@pytest.mark.parametrize("name", ["feature_weight", "logit_weight"])
def test_wrong_settings_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be finite, 0 or more"):
        SRRLLoss(**{name: -1.0})
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        SRRLLoss(**{name: True})


def test_wrong_inputs_are_refused():
    student, teacher, weight, bias, logits = inputs()
    with pytest.raises(ValueError, match="must have the same number of channels"):
        SRRLLoss()([student[:, :4]], [teacher], [weight, bias], logits)
    with pytest.raises(ValueError, match="must be of one batch"):
        SRRLLoss()([student], [teacher[:2]], [weight, bias], logits)
    with pytest.raises(ValueError, match="teacher_logits must hold 3 samples as student_map"):
        SRRLLoss()([student], [teacher], [weight, bias], logits[:2])
    with pytest.raises(ValueError, match=r"weight of \(4, 5\) and a bias of \(4,\)"):
        SRRLLoss()([student], [teacher], [weight.t(), bias], logits)
    with pytest.raises(TypeError, match=r"student_map\[0\] must be a floating-point tensor"):
        SRRLLoss()([student.long()], [teacher], [weight, bias], logits)
