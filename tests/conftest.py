"""Settings of the whole suite: one thread, the order, and how hypothesis draws its examples."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

# Their fixtures train, or start processes.
LONG = {
    "test_cache_teacher.py",
    "test_demo.py",
    "test_distributed.py",
    "test_export.py",
    "test_fsdp.py",
    "test_joint_batches.py",
    "test_reproduce.py",
    "test_scale.py",
    "test_survival.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules come first.

    Test processes take tests from the end of each other's list, and a module that two of them have
    a part of trains twice.
    """
    items.sort(key=lambda item: item.path.name not in LONG)


settings.register_profile(
    "default",
    max_examples=25,
    deadline=None,
    derandomize=True,  # a run says the same twice; the nightly profile looks further
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly",
    max_examples=500,
    deadline=None,
    derandomize=False,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "fuzz",
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes where a case is a run
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
