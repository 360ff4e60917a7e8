"""Values and gradients of the published reference codes (tests/golden), float64, to 1e-9."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.golden_vectors import GOLDEN, assert_close, cases_of
from softlabels.losses import kd_loss, nkd_loss, uskd_loss, zipf_ls_loss, zipf_ls_targets

DESCRIBED = (GOLDEN / "README.md").read_text(encoding="utf-8")
# A row of its tables: the file, the number of cases, and names of keys among other text.
ROWS = {
    name: (int(num_cases), re.findall(r"`(\w+)`", text))
    for name, num_cases, text in re.findall(
        r"^\| `(\w+)\.npz`.*?\| (\d+) \| (.*)$", DESCRIBED, re.M
    )
}
USKD_INPUTS = ("logits", "features", "weight", "bias")
USKD_FILES = [name for name in ROWS if name.startswith("uskd")]


def numbered(*names: str) -> list[tuple[str, int]]:
    return [(name, number) for name in names for number in range(ROWS[name][0])]


def without_target(rows: Tensor, target: Tensor) -> Tensor:
    kept = torch.ones_like(rows, dtype=torch.bool).scatter(1, target.unsqueeze(1), False)
    return rows[kept].reshape(rows.shape[0], -1)


def read_by_tests() -> set[str]:
    """Names of the files that the tests of losses open."""
    own = {"nkd", *USKD_FILES, "zipf_ls_dense", "zipf_ls_logits", "kd_cross_entropy_form"}
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    return own.union(*(re.findall(r"""cases_of\("(\w+)"\)""", source) for source in sources))


def test_the_folder_holds_exactly_the_files_that_are_tested_and_described():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == read_by_tests() == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_file_has_the_described_keys_and_dtypes(name):
    num_cases, described = ROWS[name]
    cases = cases_of(name)

    assert len(cases) == num_cases
    for case in cases:
        assert all(value.dtype in (torch.float64, torch.int64) for value in case.values())
        assert all(bool(torch.isfinite(value).all()) for value in case.values())
    keys = {key for case in cases for key in case if not key.startswith("grad_")}
    patterns = [re.sub(r"(?<=_)[ij](?=_|$)", r"\\d+", key) for key in described]
    found = {pattern: {k for k in keys if re.fullmatch(pattern, k)} for pattern in patterns}
    assert [pattern for pattern, of_pattern in found.items() if not of_pattern] == []
    assert keys == set().union(*found.values())


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
