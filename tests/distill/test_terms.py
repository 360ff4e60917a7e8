"""A detailed step: the terms of the loss, and each one's share of the gradient on the logits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import softlabels
from shared.small_networks import IMAGE_SHAPE, hard_labels, images_of, small_cnn, small_vit
from shared.toy_method import ToyLoss
from softlabels import Distiller, KDLoss, NKDLoss, Teacher, USKDLoss, ZipfLSLoss
from softlabels.data import DataInfo
from softlabels.data.in_memory import InMemorySource, Split
from softlabels.losses import LabelSmoothingLoss

METHODS = {
    "nkd": (lambda: NKDLoss(target_term="both"), ["target", "rest", "non_target"]),
    "uskd": (lambda: USKDLoss(weak_weight=0.5), ["target", "non_target", "weak"]),
    "zipf_ls": (ZipfLSLoss, ["non_target"]),
    "exits": (lambda: ZipfLSLoss(exit_taps=("middle",), exit_weight=0.5), ["non_target", "exits"]),
    "kd": (KDLoss, ["divergence"]),
}


def distiller_of(method: nn.Module | None, **settings: object) -> Distiller:
    teacher = None
    if method is not None and "teacher_logits" in method.inputs:
        teacher = Teacher(small_cnn(seed=1))
    torch.manual_seed(0)
    return Distiller(
        small_cnn(norm="group"),
        method,
        teacher=teacher,
        task_weight=0.7,
        method_weight=0.3,
        example_shape=IMAGE_SHAPE,
        **settings,
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_terms_of_a_detailed_step_add_up_to_its_loss(name):
    make, parts = METHODS[name]
    distiller = distiller_of(make())
    plain = distiller(images_of(6), hard_labels(6))
    distiller.detailed = True

    step = distiller(images_of(6), hard_labels(6))

    assert list(plain.terms) == ["task", "method"]
    assert list(step.terms) == ["task", *(f"method/{part}" for part in parts)]
    for each in (plain, step):
        torch.testing.assert_close(torch.stack(list(each.terms.values())).sum(), plain.loss)
    torch.testing.assert_close(step.loss, plain.loss, rtol=0, atol=0)
    torch.testing.assert_close(step.terms["task"], plain.terms["task"])


@pytest.mark.parametrize("name", METHODS)
def test_a_detailed_step_has_the_same_gradients_to_the_last_bit(name):
    found = []
    for detailed in (False, True):
        distiller = distiller_of(METHODS[name][0]())
        distiller.detailed = detailed
        step = distiller(images_of(6), hard_labels(6))
        if detailed:
            step.gradient_shares()
        step.loss.backward()
        found.append([parameter.grad for parameter in distiller.parameters()])

    for plain, detailed_one in zip(*found, strict=True):
        assert torch.equal(plain, detailed_one)


def test_shares_are_the_norms_of_the_terms_gradients_on_all_logits():
    distiller = distiller_of(USKDLoss(weak_weight=0.5))
    distiller.detailed = True
    step = distiller(images_of(6), hard_labels(6))
    logits, weak_logits = step.heads

    norms = {}
    for name, term in step.terms.items():
        heads = [weak_logits] if name == "method/weak" else [logits]
        gradients = torch.autograd.grad(term, heads, retain_graph=True)
        norms[name] = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    shares = step.gradient_shares()

    assert shares.keys() == step.terms.keys()
    for name, share in shares.items():
        torch.testing.assert_close(share, norms[name] / sum(norms.values()))
        assert not share.requires_grad
    # Cross-entropy's norm is known: 0.7 (S - V) / 6.
    of_task = 0.7 / 6 * (logits.softmax(1) - functional.one_hot(hard_labels(6), 5)).norm()
    torch.testing.assert_close(norms["task"], of_task)


def test_terms_that_pull_at_nothing_have_no_share():
    distiller = distiller_of(NKDLoss(), task_loss=lambda logits, target: logits.detach().sum())
    distiller.detailed = True

    shares = distiller(images_of(6), hard_labels(6)).gradient_shares()

    assert float(shares["task"]) == 0
    torch.testing.assert_close(sum(shares.values()), torch.tensor(1.0))
    frozen = distiller_of(None, task_loss=lambda logits, target: 0 * logits.sum())
    assert float(frozen(images_of(6), hard_labels(6)).gradient_shares()["task"]) == 0


def test_a_term_of_features_does_not_pull_at_logits():
    distiller = distiller_of(ToyLoss())
    distiller.detailed = True

    step = distiller(images_of(6), hard_labels(6), index=torch.arange(6))

    assert list(step.terms) == ["task", "method/distance"]
    assert float(step.gradient_shares()["method/distance"]) == 0


# Ignored samples


@pytest.mark.parametrize("name", ["nkd", "uskd", "zipf_ls"])
def test_the_task_leaves_out_what_the_method_ignores(name):
    method = {"nkd": NKDLoss, "uskd": USKDLoss, "zipf_ls": ZipfLSLoss}[name]
    kept = distiller_of(method())(images_of(6)[:4], hard_labels(6)[:4])
    distiller = distiller_of(method(ignore_index=-1))
    target = torch.cat((hard_labels(6)[:4], torch.tensor([-1, -1])))

    step = distiller(images_of(6), target)
    nothing = distiller(images_of(6), torch.full((6,), -1))
    nothing.loss.backward()

    torch.testing.assert_close(step.terms, kept.terms)
    assert float(nothing.loss.detach()) == 0
    assert not any(p.grad is not None and p.grad.any() for p in distiller.parameters())
    with pytest.raises(ValueError, match=r"target must lie in \[0, 5\), got values from -1"):
        distiller_of(method())(images_of(6), target)


def test_label_smoothing_as_a_task_may_ignore_too():
    distiller = distiller_of(None, task_loss=LabelSmoothingLoss(ignore_index=-1))
    target = torch.cat((hard_labels(6)[:4], torch.tensor([-1, -1])))

    step = distiller(images_of(6), target)

    kept = distiller_of(None, task_loss=LabelSmoothingLoss())(images_of(6)[:4], target[:4])
    torch.testing.assert_close(step.loss, kept.loss)


# Heads at inner places


@pytest.mark.parametrize(
    ("student", "positions", "width"), [("cnn", 64, 12), ("vit", 16, 24)], ids=["cnn", "vit"]
)
def test_exits_are_linear_heads_whose_votes_join_those_of_the_last_map(student, positions, width):
    network = {"cnn": small_cnn, "vit": small_vit}[student]()
    distiller = Distiller(
        network, ZipfLSLoss(exit_taps=("middle",), exit_weight=0.5), example_shape=IMAGE_SHAPE
    ).eval()
    provider = distiller.trainable.providers["exits"]
    features = {}
    path = provider.points[0].path
    network.get_submodule(path).register_forward_hook(
        lambda module, args, output: features.update(middle=output.detach())
    )

    logits, votes = distiller.trainable(images_of(3)).read["exits"]

    maps = provider.points[0].as_map(features["middle"])
    dense = torch.einsum("bdhw,cd->bhwc", maps, provider.fcs[0].weight) + provider.fcs[0].bias
    assert provider.fcs[0].weight.shape == (5, width)
    assert votes.shape == (3, positions)
    assert torch.equal(votes, dense.flatten(1, 2).argmax(2))
    pooled = provider.points[0].pooled(features["middle"])
    torch.testing.assert_close(logits, provider.fcs[0](pooled))


def test_the_cross_entropy_of_an_exit_trains_its_head_and_the_network_below_alone():
    distiller = distiller_of(ZipfLSLoss(exit_taps=("middle",), exit_weight=0.5))
    distiller.detailed = True
    step = distiller(images_of(6), hard_labels(6))

    step.terms["method/exits"].backward()

    assert distiller.trainable.providers["exits"].fcs[0].weight.grad.any()
    assert distiller.student.stage1[0].weight.grad.any()
    assert distiller.student.stage2[0].weight.grad is None
    logits = step.heads[1]
    expected = 0.3 * 0.5 * functional.cross_entropy(logits, hard_labels(6))
    torch.testing.assert_close(step.terms["method/exits"], expected)


def test_settings_without_use_for_a_head_or_a_teacher_have_none():
    alone = USKDLoss(squared=False, non_target_weight=0, weak_weight=0)
    taught = USKDLoss(target_from="teacher", rank_from="final", weak_weight=0)

    assert list(distiller_of(alone).trainable.providers) == ["logits"]
    assert list(distiller_of(taught).trainable.providers) == ["logits"]
    step = distiller_of(taught)(images_of(6), hard_labels(6))
    assert bool(torch.isfinite(step.loss))
    with pytest.raises(ValueError, match="reads from a teacher"):
        Distiller(small_cnn(), USKDLoss(target_from="teacher"), example_shape=IMAGE_SHAPE)


# The trainer's log


@pytest.mark.parametrize("grad_accum_steps", [1, 3])
def test_the_trainer_logs_terms_and_gradient_shares(tmp_path, grad_accum_steps):
    generator = np.random.default_rng(0)
    train, test = (
        Split.from_arrays(
            generator.integers(0, 256, (count, 16, 16), dtype=np.uint8), np.arange(count) % 4
        )
        for count in (84, 4)
    )
    info = DataInfo("noise", ("a", "b", "c", "d"), 1, (16, 16), (0.5,), (0.3,))
    softlabels.train(
        InMemorySource(train, test, info),
        method="uskd",
        student="timm:resnet8_glyphs",
        output=str(tmp_path / "run"),
        epochs=1,
        batch_size=12,
        grad_accum_steps=grad_accum_steps,
        log_every=3,
        gallery=0,
        report=False,
    )

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    logged = [line for line in lines if "train/loss" in line]
    names = ["task", "method/target", "method/non_target", "method/weak"]
    assert len(logged) == 3  # steps 3, 6 and the last, 7
    for line in logged:
        shares = [line[f"train/gradient_share/{name}"] for name in names]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert all(0 < share < 1 for share in shares)
        assert all(f"train/term/{name}" in line for name in names)
