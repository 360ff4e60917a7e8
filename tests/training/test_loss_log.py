from __future__ import annotations

import math

import pytest
import torch

from softlabels.training.errors import NonFiniteLossError
from softlabels.training.loss_log import GRADIENT, LossLog


def log_of(*, eager: bool = False, most_skipped: int = 0, others: tuple = ()) -> LossLog:
    return LossLog(eager=eager, most_skipped=most_skipped, gather=lambda value: [value, *others])


def add(log: LossLog, step: int, task: float, gradient: float = 1.0, bad: tuple = ()) -> bool:
    index = torch.arange(4) + 10 * step
    finite = torch.tensor([i not in bad for i in range(4)])
    loss = torch.tensor(task)
    parts = {"loss": 2 * loss, "task": loss, GRADIENT: torch.tensor(gradient)}
    return log.add(step, parts, index=index, finite=finite)


@pytest.mark.parametrize("eager", [False, True])
def test_means_are_of_the_steps_since_the_last_call(eager):
    log = log_of(eager=eager)
    assert log.means() == {}
    assert add(log, 0, 1.0)
    assert add(log, 1, 4.0)
    assert log.means() == {"loss": 5.0, "task": 2.5}
    add(log, 2, 7.0)
    assert log.means() == {"loss": 14.0, "task": 7.0}
    assert log.means() == {}


def test_a_lazy_log_finds_the_bad_step_when_it_is_read():
    log = log_of()
    add(log, 0, 1.0)
    assert add(log, 1, math.nan, bad=(2,))
    assert add(log, 2, 1.0)
    with pytest.raises(
        NonFiniteLossError, match=r"not finite at step 1, from its part 'task'"
    ) as e:
        log.means()
    assert e.value.images == (12,)
    assert e.value.step == 1


def test_a_state_is_not_given_after_a_bad_step():
    log = log_of()
    add(log, 0, math.inf)
    with pytest.raises(NonFiniteLossError):
        log.state_dict()


def test_an_eager_log_stops_before_the_update():
    log = log_of(eager=True)
    add(log, 0, 1.0)
    with pytest.raises(NonFiniteLossError, match="step 1"):
        add(log, 1, math.nan)


def test_images_of_all_processes_are_named():
    log = log_of(eager=True, others=(([7, 3], [3, 5, 7, 9]),))
    with pytest.raises(NonFiniteLossError, match="by index: 3, 7; try"):
        add(log, 0, math.nan)


def test_the_whole_batch_is_named_where_no_image_stands_out():
    log = log_of(eager=True, others=(([], list(range(20, 30))),))
    with pytest.raises(NonFiniteLossError, match=r"the gradient is not finite.*batch.*6 more") as e:
        add(log, 0, 1.0, gradient=math.inf)
    assert e.value.images == (0, 1, 2, 3, *range(20, 30))
    assert e.value.parts == (GRADIENT,)


def test_skipped_steps_are_counted_and_no_part_of_the_means():
    log = log_of(eager=True, most_skipped=2)
    assert [add(log, 0, 1.0), add(log, 1, math.nan), add(log, 2, 3.0)] == [True, False, True]
    assert not add(log, 3, 1.0, gradient=math.nan)
    assert log.means() == {"loss": 4.0, "task": 2.0}
    assert log.skipped == 2
    assert not add(log, 4, math.nan)
    with pytest.raises(NonFiniteLossError, match="at step 5 after 2 skipped steps"):
        add(log, 5, math.nan)


def test_the_state_goes_on_where_it_was_taken():
    log = log_of(eager=True, most_skipped=2)
    for step, task in enumerate((1.0, math.nan, math.nan)):
        add(log, step, task)
    other = log_of(eager=True, most_skipped=2)
    other.load_state_dict(log.state_dict())
    assert other.skipped == 2
    with pytest.raises(NonFiniteLossError, match="after 2 skipped steps"):
        add(other, 3, math.nan)

    again = log_of(eager=True, most_skipped=2)
    again.load_state_dict(log.state_dict())
    add(again, 3, 3.0)
    assert again.means() == {"loss": 4.0, "task": 2.0}
