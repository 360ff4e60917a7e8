"""Each method takes a few steps on tiny networks of three families."""

from __future__ import annotations

import pytest
import torch
from methods.method_runs import (
    TINY_CNN,
    TINY_NHWC,
    TINY_VIT,
    UNABLE,
    Family,
    assert_plain,
    built,
    gradient_problems,
    learned_parts,
    noise,
    num_hooks,
    pair_name,
    pairs,
    read_extras,
    step,
)
from torch import nn

from softlabels.losses import METHODS

NUM_STEPS = 3
SIZE = 6
NUM_SAMPLES = NUM_STEPS * SIZE
FAMILIES = {family.name: family for family in (TINY_CNN, TINY_VIT, TINY_NHWC)}

every_pair = pytest.mark.parametrize(("kind", "family"), pairs(*FAMILIES.values()), ids=pair_name)


@every_pair
def test_three_steps_train_every_part_and_leave_a_plain_student(kind: str, family: Family):
    distiller = built(kind, family, num_samples=NUM_SAMPLES)
    optimizer = torch.optim.SGD(distiller.parameters(), 0.01)
    before = {name: p.detach().clone() for name, p in distiller.named_parameters()}

    for number in range(NUM_STEPS):
        loss = step(distiller, noise(family, SIZE, number))
        loss.backward()

        assert bool(loss.isfinite())
        assert gradient_problems(distiller) == []
        optimizer.step()
        optimizer.zero_grad()
        distiller.after_step()
    distiller.after_epoch()

    unchanged = [name for name, p in distiller.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []
    assert_plain(distiller.export(), family.student(5))


@every_pair
def test_the_methods_own_term_reaches_the_student_and_every_learned_part(kind, family):
    distiller = built(kind, family, num_samples=NUM_SAMPLES)
    with torch.no_grad():
        step(distiller, noise(family, SIZE))
    distiller.after_epoch()  # from here on OLS has labels of its own
    batch = noise(family, SIZE, 1)

    output = distiller(batch.images, batch.target, **read_extras(distiller, batch))
    output.terms["method"].backward()

    assert bool(output.terms["method"].isfinite())
    of_student = [p.grad for p in distiller.student.parameters() if p.grad is not None]
    assert any(bool(gradient.any()) for gradient in of_student)
    untouched = [
        name for name, p in learned_parts(distiller).items() if p.grad is None or not p.grad.any()
    ]
    assert untouched == []


@every_pair
def test_nothing_is_nan_in_bfloat16(kind, family):
    distiller = built(kind, family, num_samples=NUM_SAMPLES)

    for number in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step(distiller, noise(family, SIZE, number))
        loss.backward()

        assert loss.dtype == torch.float32
        assert bool(loss.isfinite())
        assert gradient_problems(distiller) == []
        distiller.after_step()
    assert all(bool(value.isfinite().all()) for value in distiller.state_dict().values())


@pytest.mark.parametrize(("kind", "name"), UNABLE)
def test_an_architecture_that_lacks_what_a_method_needs_is_refused(kind, name):
    with pytest.raises(ValueError, match=UNABLE[kind, name]):
        built(kind, FAMILIES[name], num_samples=NUM_SAMPLES)


def test_every_method_runs_on_some_architecture():
    assert {kind for kind, _ in pairs(*FAMILIES.values())} == {*METHODS}


def test_the_checks_see_a_part_that_is_not_trained_and_a_student_that_is_not_plain():
    """So that passing them means something."""
    distiller = built("fitnet", TINY_CNN, num_samples=NUM_SAMPLES)
    distiller.trainable.heads.extra = nn.Linear(2, 2)
    step(distiller, noise(TINY_CNN, SIZE)).backward()

    assert gradient_problems(distiller) == [
        f"trainable.heads.extra.{name}: none" for name in ("weight", "bias")
    ]
    assert num_hooks(distiller.student) > 0
    with pytest.raises(AssertionError):
        assert_plain(distiller.student, TINY_CNN.student(5))
