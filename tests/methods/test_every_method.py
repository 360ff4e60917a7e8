"""Each method takes a few steps on tiny networks of three families."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.method_runs import (
    STUDENT,
    TINY_CNN,
    TINY_NHWC,
    TINY_VIT,
    UNABLE,
    Family,
    assert_plain,
    built,
    gradient_problems,
    noise,
    num_hooks,
    output_of,
    pair_name,
    pairs,
    without_gradient,
)
from softlabels.losses import METHODS

IN_HALF_PRECISION = (False, False, True)  # each step: under autocast to bfloat16 or not
SIZE = 6
NUM_SAMPLES = len(IN_HALF_PRECISION) * SIZE
FAMILIES = {family.name: family for family in (TINY_CNN, TINY_VIT, TINY_NHWC)}


@pytest.mark.parametrize(("kind", "family"), pairs(*FAMILIES.values()), ids=pair_name)
def test_three_steps_reach_every_part_and_leave_a_plain_student(kind: str, family: Family):
    distiller = built(kind, family, num_samples=NUM_SAMPLES)
    optimizer = torch.optim.SGD(distiller.parameters(), 0.01)

    for number, half in enumerate(IN_HALF_PRECISION):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            output = output_of(distiller, noise(family, SIZE, number))
        if number == 1:
            # The method's own term pulls at the student, and trains all that is learned beside it.
            output.terms["method"].backward(retain_graph=True)
            untouched = without_gradient(distiller)
            assert [name for name in untouched if not name.startswith(STUDENT)] == []
            assert untouched < {name for name, _ in distiller.named_parameters()}
            optimizer.zero_grad()
        output.loss.backward()

        assert output.loss.dtype == torch.float32
        assert bool(output.loss.isfinite())
        assert gradient_problems(distiller) == []
        optimizer.step()
        optimizer.zero_grad()
        distiller.after_step()
        distiller.after_epoch()  # from here on OLS has labels of its own

    assert_plain(distiller.export(), family.student(5))


@pytest.mark.parametrize(("kind", "name"), UNABLE)
def test_an_architecture_that_lacks_what_a_method_needs_is_refused(kind, name):
    with pytest.raises(ValueError, match=UNABLE[kind, name]):
        built(kind, FAMILIES[name], num_samples=NUM_SAMPLES)


def test_every_method_runs_on_some_architecture():
    assert {kind for kind, _ in pairs(*FAMILIES.values())} == {*METHODS}


def test_the_checks_see_a_part_that_is_not_trained_and_a_student_that_is_not_plain():
    """So that passing them means something."""
    distiller = built("fitnet", TINY_CNN, num_samples=NUM_SAMPLES)
    distiller.trainable.adapters.extra = nn.Linear(2, 2)
    output_of(distiller, noise(TINY_CNN, SIZE)).loss.backward()

    assert gradient_problems(distiller) == [
        f"trainable.adapters.extra.{name}: none" for name in ("weight", "bias")
    ]
    assert num_hooks(distiller.student) > 0
    with pytest.raises(AssertionError):
        assert_plain(distiller.student, TINY_CNN.student(5))
