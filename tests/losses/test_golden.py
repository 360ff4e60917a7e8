"""Values and gradients of the published reference codes (tests/golden), float64, to 1e-9."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from softlabels.losses import kd_loss, nkd_loss, uskd_loss, zipf_ls_loss, zipf_ls_targets

GOLDEN = Path(__file__).parents[1] / "golden"

NKD_KEYS = {
    "student_logits",
    "teacher_logits",
    "target",
    "gamma",
    "temperature",
    "loss",
    "grad_student_logits",
}
USKD_INPUTS = ("logits", "features", "weight", "bias")
USKD_KEYS = {"target", "alpha", "beta", "mu", "loss", *USKD_INPUTS} | {
    f"grad_{name}" for name in USKD_INPUTS
}
ZIPF_KEYS = {"logits", "target", "power", "non_target_distribution", "loss", "grad_logits"}

# The keys and the number of cases of each file.
SCHEMA = {
    "nkd": (NKD_KEYS, 16),
    "uskd_hard_probability": (USKD_KEYS, 8),
    "uskd_hard_log_probability": (USKD_KEYS, 8),
    "uskd_mixed_probability": (USKD_KEYS, 8),
    "uskd_mixed_log_probability": (USKD_KEYS, 8),
    "zipf_ls_dense": (ZIPF_KEYS | {"votes"}, 4),
    "zipf_ls_logits": (ZIPF_KEYS, 3),
    "kd_cross_entropy_form": (NKD_KEYS - {"target", "gamma"} | {"weight"}, 8),
}
USKD_FILES = [name for name in SCHEMA if name.startswith("uskd")]


def cases_of(name: str) -> list[dict[str, Tensor]]:
    cases: dict[int, dict[str, Tensor]] = {}
    with np.load(GOLDEN / f"{name}.npz") as stored:
        for key in stored.files:
            number, _, field = key.partition(".")
            cases.setdefault(int(number), {})[field] = torch.from_numpy(stored[key])
    return [cases[number] for number in range(len(cases))]


def numbered(*names: str) -> list[tuple[str, int]]:
    return [(name, number) for name in names for number in range(SCHEMA[name][1])]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def without_target(rows: Tensor, target: Tensor) -> Tensor:
    kept = torch.ones_like(rows, dtype=torch.bool).scatter(1, target.unsqueeze(1), False)
    return rows[kept].reshape(rows.shape[0], -1)


def test_the_folder_holds_exactly_the_files_that_are_tested_and_described():
    described = (GOLDEN / "README.md").read_text(encoding="utf-8")

    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(SCHEMA)
    assert all(f"`{name}.npz`" in described for name in SCHEMA)


@pytest.mark.parametrize("name", SCHEMA)
def test_a_file_has_the_described_keys_and_dtypes(name):
    keys, num_cases = SCHEMA[name]
    cases = cases_of(name)

    assert len(cases) == num_cases
    for case in cases:
        assert set(case) == keys
        assert all(value.dtype in (torch.float64, torch.int64) for value in case.values())
        assert all(bool(torch.isfinite(value).all()) for value in case.values())


@pytest.mark.parametrize(("name", "number"), numbered("nkd"))
def test_nkd(name, number):
    case = cases_of(name)[number]
    logits = case["student_logits"].requires_grad_()

    loss = nkd_loss(
        logits,
        case["teacher_logits"],
        case["target"],
        non_target_weight=case["gamma"].item(),
        temperature=case["temperature"].item(),
    )
    loss.backward()

    assert_close(loss, case["loss"])
    assert_close(logits.grad, case["grad_student_logits"])


@pytest.mark.parametrize(("name", "number"), numbered(*USKD_FILES))
def test_uskd(name, number):
    case = cases_of(name)[number]
    inputs = {key: case[key].requires_grad_() for key in USKD_INPUTS}

    loss = uskd_loss(
        inputs["logits"],
        functional.linear(inputs["features"], inputs["weight"], inputs["bias"]),
        case["target"],
        target_weight=case["alpha"].item(),
        non_target_weight=case["beta"].item(),
        weak_weight=case["mu"].item(),
        rank_by="log_probability" if "log" in name else "probability",
    )
    loss.backward()

    assert_close(loss, case["loss"])
    for key, tensor in inputs.items():
        assert_close(tensor.grad, case[f"grad_{key}"])


@pytest.mark.parametrize(("name", "number"), numbered("zipf_ls_dense", "zipf_ls_logits"))
def test_zipf_ls(name, number):
    case = cases_of(name)[number]
    logits, target, votes = case["logits"].requires_grad_(), case["target"], case.get("votes")
    power = case["power"].item()

    soft = zipf_ls_targets(logits, target, votes, power=power)
    loss = zipf_ls_loss(logits, target, votes, power=power)
    loss.backward()

    assert_close(without_target(soft, target), case["non_target_distribution"])
    assert_close(loss, case["loss"])
    assert_close(logits.grad, case["grad_logits"])


@pytest.mark.parametrize(("name", "number"), numbered("kd_cross_entropy_form"))
def test_kd(name, number):
    case = cases_of(name)[number]
    logits, teacher_logits = case["student_logits"].requires_grad_(), case["teacher_logits"]
    temperature, weight = case["temperature"].item(), case["weight"].item()

    loss = weight * kd_loss(logits, teacher_logits, temperature=temperature)
    loss.backward()

    # The stored value is the cross-entropy form: ours plus the teacher's entropy.
    softened = teacher_logits / temperature
    entropy = -(softened.softmax(1) * softened.log_softmax(1)).sum(1).mean()
    assert_close(logits.grad, case["grad_student_logits"])
    assert_close(loss + weight * temperature**2 * entropy, case["loss"])
