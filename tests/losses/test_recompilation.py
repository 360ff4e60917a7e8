"""How often a loss is compiled: once more at most for other batch sizes, never again if dynamic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from shared.loss_cases import BY_NAME, PLAIN_CASES, case_id

NUM_CLASSES = 10
BATCH_SIZES = (128, 96, 64, 33)
OTHERS = ("nkd_both_unnormalized", "zipf_ls_exits")

# Compiling takes long: all of them with `make test-slow`.
DAILY = ("kd", "nkd", "label_smoothing")


def cases(names: Iterable[str], daily: tuple[str, ...]) -> list[object]:
    slow = pytest.mark.slow
    return [pytest.param(BY_NAME[n], marks=() if n in daily else slow) for n in names]


every_loss = pytest.mark.parametrize(
    "case", cases([case.name for case in PLAIN_CASES], ("nkd",)), ids=case_id
)
every_loss_and_others = pytest.mark.parametrize(
    "case", cases([*(case.name for case in PLAIN_CASES), *OTHERS], DAILY), ids=case_id
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compilations(case, dynamic: bool | None) -> list[int]:
    """How often the module was compiled after each batch size; its values are checked."""
    module = case.module(**case.module_settings)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for batch_size in BATCH_SIZES:
        inputs = case.make(case.target_kinds[0], batch_size, NUM_CLASSES)
        leaves = [inputs[name].requires_grad_() for name in case.trained]
        arguments = case.module_arguments(inputs)

        value = compiled(*arguments)

        expected = module(*arguments)
        torch.testing.assert_close(value, expected)
        for found, wanted in zip(
            torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(found, wanted)
        counts.append(counter.frame_count)
    return counts


@every_loss
def test_other_batch_sizes_take_one_recompilation_at_most(case):
    assert 1 <= compilations(case, None)[-1] <= 2


@every_loss_and_others
def test_a_dynamic_loss_is_never_compiled_again(case):
    # One compilation calls its backend twice where it starts anew to fix a float setting.
    first, *later = compilations(case, True)

    assert first in (1, 2)
    assert later == [first] * 3
