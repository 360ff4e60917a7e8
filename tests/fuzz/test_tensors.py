"""Tensors that nobody should give to a loss or a Distiller."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.fuzzing import case, check_refusal, fuzz
from softlabels import Distiller, LabelSmoothingLoss, Teacher
from softlabels.losses import METHODS

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int8, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))

shapes = st.one_of(
    st.tuples(st.sampled_from([4, 4, 4, 1, 0, 3]), st.sampled_from([3, 3, 3, 1, 0, 2, 7])),
    st.tuples(st.sampled_from([4, 4, 4, 1, 0, 3])),
    st.sampled_from([(), (4, 3, 1), (2, 4, 3), (1, 4)]),
)


@st.composite
def tensors(draw, usual: Callable[[torch.Generator], Tensor], any_shapes=shapes) -> Tensor:
    """The usual tensor half of the time; else of another shape or type, or with odd values."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    change = draw(st.sampled_from(["none", "none", "shape", "dtype", "value", "scale", "view"]))
    tensor = usual(generator)
    if change == "shape":
        shape = draw(any_shapes)
        tensor = torch.zeros(shape, dtype=tensor.dtype) + draw(st.integers(-1, 3))
    elif change == "dtype":
        tensor = tensor.to(draw(st.sampled_from(DTYPES)))
    elif change == "value" and tensor.numel():
        odd = (*NOT_FINITE, 1e38, -1e38, 2.5) if tensor.is_floating_point() else (-1, 3, 2**62)
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from(odd))
    elif change == "scale":
        factor = draw(st.sampled_from([0, -1, 100, 1e4] if tensor.is_floating_point() else [0, -1]))
        tensor = tensor * factor
    elif change == "view" and tensor.dim() == 2:
        tensor = tensor.t().contiguous().t()
    return tensor


def logits(generator: torch.Generator) -> Tensor:
    return torch.randn(4, 3, generator=generator)


def classes(generator: torch.Generator) -> Tensor:
    return torch.randint(3, (4,), generator=generator)


def probabilities(generator: torch.Generator) -> Tensor:
    return torch.rand(4, 3, generator=generator).softmax(1)


def two_labels(generator: torch.Generator) -> Tensor:
    """As mixup makes them."""
    one, other = (torch.eye(3)[classes(generator)] for _ in range(2))
    share = torch.rand(4, 1, generator=generator)
    return share * one + (1 - share) * other


def votes(generator: torch.Generator) -> Tensor:
    return torch.randint(3, (4, 9), generator=generator)


targets = st.one_of(tensors(classes), tensors(probabilities), tensors(two_labels))
vote_tensors = tensors(votes, st.one_of(shapes, st.just((4, 0)), st.just((4, 9, 1))))
losses = {**METHODS, "label_smoothing": LabelSmoothingLoss}
SETTINGS: dict[str, list[dict[str, object]]] = {
    "kd": [{}, {"temperature": 1.0}],
    "dkd": [{}, {"mixed_target": "all"}, {"ignore_index": 1}],
    "wsld": [{}],
    "dist": [{}],
    "tf_kd": [{}],
    "tf_nkd": [{}],
    "ban": [{}],
    "nkd": [{}, {"mixed_target": "all"}, {"ignore_index": 1}, {"target_term": "both"}],
    "uskd": [{}, {"rank_from": "final"}, {"ignore_index": -100}, {"squared": False}],
    "zipf_ls": [
        {},
        {"rank_from": "logits"},
        {"distribution": "random_gaussian"},
        {"correct_only": True},
    ],
    "label_smoothing": [{"smoothing": 0.1}, {"smoothing": 1.0, "smooth_over": "non_target"}],
}


def moderate(*given_tensors: Tensor) -> bool:
    """Whether all numbers are such as networks give, so that a loss has no excuse."""
    return all(bool((t.double().abs() < 1e4).all()) for t in given_tensors if not t.is_complex())


def call(kind: str, settings: dict[str, object], read: dict[str, Tensor]) -> None:
    """A loss and its gradient: a clear error, or finite wherever the numbers are moderate."""
    own = read["logits"]
    if own.is_floating_point():
        read = {**read, "logits": own.clone().requires_grad_()}
    names = [name for name in read if name in losses[kind].forward.__code__.co_varnames]
    if settings.get("rank_from") in ("logits", "final"):
        names = [name for name in names if name not in ("votes", "weak_logits")]
    module = losses[kind](**settings)
    try:
        loss = module(**{name: read[name] for name in names})
    except (TypeError, ValueError) as error:
        check_refusal(error)
        return
    event("answered")
    assert loss.shape == ()
    used = [read[name] for name in names]
    if moderate(*used):
        assert bool(loss.isfinite()), loss
        loss.backward()
        if own.dtype != torch.float16:  # whose gradients may be beyond its range
            assert bool(read["logits"].grad.isfinite().all())


choices = st.sampled_from(
    [(kind, setting) for kind, all_of in SETTINGS.items() for setting in all_of]
)


@fuzz("label tensors")
@given(choice=choices, target=targets, wired=st.booleans(), seed=st.integers(0, 9))
def test_label_tensors(choice, target, wired, seed):
    kind, settings = choice
    generator = torch.Generator().manual_seed(seed)
    with case("label tensors"):
        if wired and kind != "label_smoothing":
            step_with_labels(kind, settings, target)
            return
        read = {name: logits(generator) for name in ("logits", "teacher_logits", "weak_logits")}
        call(kind, settings, {**read, "target": target, "votes": votes(generator)})


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


def step_with_labels(kind: str, settings: dict[str, object], target: Tensor) -> None:
    """A training step of a Distiller, and no NaN in the weights after it."""
    method = METHODS[kind](**settings)
    teacher = (
        Teacher(network()) if any(kind.reads_teacher for kind in method.inputs.values()) else None
    )
    distiller = Distiller(network(), method, teacher=teacher, example_shape=(1, 8, 8))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    try:
        loss = distiller(torch.randn(4, 1, 8, 8), target).loss
    except (TypeError, ValueError) as error:
        check_refusal(error)
        return
    event("answered")
    loss.backward()
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in distiller.parameters())


@fuzz("logits, teacher logits, votes")
@given(
    choice=choices,
    own=tensors(logits),
    of_teacher=tensors(logits),
    weak=tensors(logits),
    voted=vote_tensors,
    target=st.sampled_from([classes, probabilities, two_labels]),
)
def test_logits_and_votes(choice, own, of_teacher, weak, voted, target):
    kind, settings = choice
    with case("logits, teacher logits, votes"):
        label = target(torch.Generator().manual_seed(0))
        read = {"logits": own, "teacher_logits": of_teacher, "weak_logits": weak, "votes": voted}
        call(kind, settings, {**read, "target": label})
