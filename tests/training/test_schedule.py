"""The learning rate at the steps that matter, against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from softlabels.training.config import ConfigError, resolve
from softlabels.training.optim import build_schedule
from softlabels.training.settings import ScheduleSettings


def rates(
    steps: list[int], *, lr: float, epochs: int, steps_per_epoch: int, **settings
) -> list[float]:
    """The rate of each of these steps, set by a schedule that was built for it alone."""
    found = []
    for step in steps:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        schedule = build_schedule(
            ScheduleSettings(**settings), optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch
        )
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_shufflenet_starts_constant_and_then_falls_linearly():
    # 1,281,167 images in batches of 1024: 1251 steps an epoch.
    run = {"lr": 0.5, "epochs": 300, "steps_per_epoch": 1251}
    settings = {
        "name": "linear",
        "warmup": "constant",
        "warmup_steps": 5000,
        "warmup_lr": 0.05,
    }
    assert rates([0, 1, 2500, 4999], **run, **settings) == [0.05] * 4
    # 0.5 * (1 - 5000 / 375300): it goes on, and does not start at the end of the warm-up.
    expected = [0.5 * 370_300 / 375_300, 0.5 / 2, 0.5 / 375_300, 0.0]
    assert rates([5000, 187_650, 375_299, 375_300], **run, **settings) == pytest.approx(expected)


def test_linear_fall_ends_at_the_lowest_rate():
    settings = {"name": "linear", "min_lr": 0.02}
    assert rates(
        [0, 1, 5, 9, 10], lr=0.1, epochs=5, steps_per_epoch=2, **settings
    ) == pytest.approx([0.1, 0.092, 0.06, 0.028, 0.02])


def test_mobilenet_v2_loses_two_hundredths_every_epoch():
    run = {"lr": 0.045, "epochs": 300, "steps_per_epoch": 5004}
    settings = {"name": "step", "decay_epochs": (1,), "decay_rate": 0.98}
    steps = [0, 5003, 5004, 10_008, 299 * 5004]
    expected = [0.045, 0.045, 0.0441, 0.043218, 0.045 * 0.98**299]
    assert rates(steps, **run, **settings) == pytest.approx(expected)


@pytest.mark.parametrize("order", [(1.5, 2.25), (2.25, 1.5)])
def test_drops_within_an_epoch_come_at_the_nearest_step(order):
    settings = {"name": "multistep", "decay_epochs": order, "decay_rate": 0.1}
    # Seven steps an epoch: the drops are at 10.5, which rounds to the even 10, and at 15.75.
    found = rates([9, 10, 15, 16, 27], lr=1.0, epochs=4, steps_per_epoch=7, **settings)
    assert found == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


def test_drops_before_a_step_leave_a_step_between_them():
    settings = {"name": "step", "decay_epochs": (0.1,), "decay_rate": 0.5}
    found = rates([0, 1, 2], lr=1.0, epochs=2, steps_per_epoch=3, **settings)
    assert found == pytest.approx([1, 0.5, 0.25])


def test_a_drop_at_the_start_holds_from_the_first_step():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    settings = ScheduleSettings(name="multistep", decay_epochs=(0, 1))
    build_schedule(settings, optimizer, epochs=2, steps_per_epoch=3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_zipfs_runs_drop_one_epoch_late():
    settings = {"name": "multistep", "decay_epochs": (31, 61, 91)}
    steps = [31 * 5004 - 1, 31 * 5004, 61 * 5004, 91 * 5004]
    found = rates(steps, lr=0.1, epochs=100, steps_per_epoch=5004, **settings)
    assert found == pytest.approx([0.1, 0.01, 0.001, 0.0001])


def test_deit_warms_up_to_the_peak_and_follows_a_cosine_that_began_at_the_start():
    run = {"lr": 1e-3, "epochs": 300, "steps_per_epoch": 1251}
    settings = {"name": "cosine", "warmup_epochs": 20, "warmup_lr": 1e-6, "min_lr": 1e-5}
    warm = 20 * 1251
    rising = [1e-6, 1e-6 + 0.999e-3 / 2, 1e-6 + 0.999e-3 * (warm - 1) / warm]
    assert rates([0, warm // 2, warm - 1], **run, **settings) == pytest.approx(rising)
    falling = [
        1e-5 + 0.99e-3 * (1 + math.cos(math.pi / 15)) / 2,  # epoch 20 of 300
        1e-5 + 0.99e-3 / 2,
        1e-5,
    ]
    assert rates([warm, 150 * 1251, 300 * 1251], **run, **settings) == pytest.approx(falling)


def test_regnetx_warms_up_for_five_epochs_from_a_tenth():
    run = {"lr": 0.8, "epochs": 100, "steps_per_epoch": 1251}
    settings = {"name": "cosine", "warmup_epochs": 5, "warmup_lr": 0.08}
    steps = [0, 1251, 5 * 1251, 50 * 1251, 100 * 1251]
    expected = [0.08, 0.08 + 0.72 / 5, 0.4 * (1 + math.cos(math.pi / 20)), 0.4, 0.0]
    assert rates(steps, **run, **settings) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "linear", "step", "multistep", "constant"])
@pytest.mark.parametrize("warmup", ["linear", "constant"])
def test_each_group_starts_from_its_own_rate_whatever_the_form(name, warmup):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 2.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    settings = ScheduleSettings(
        name=name, warmup=warmup, warmup_steps=4, warmup_lr=0.5, decay_epochs=(1.5,)
    )
    schedule = build_schedule(settings, optimizer, epochs=2, steps_per_epoch=10)
    seen = []
    for step in (0, 2, 4):
        schedule.step_update(step)
        seen.append([group["lr"] for group in optimizer.param_groups])
    middle = [0.75, 1.25] if warmup == "linear" else [0.5, 0.5]
    assert seen[:2] == [[0.5, 0.5], middle]
    assert seen[2][1] == pytest.approx(2 * seen[2][0])
    assert seen[2][0] > 0.7


def test_a_warm_up_has_epochs_or_steps():
    with pytest.raises(ConfigError, match="exclude each other, got 2 and 30"):
        resolve({"schedule": {"warmup_epochs": 2, "warmup_steps": 30}})
