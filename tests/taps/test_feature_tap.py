"""Hooks that collect inner outputs: what they record, what they refuse, what they leave alone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.small_networks import images_of, num_hooks, small_cnn
from softlabels import FeatureTap


class Holder(nn.Module):
    """A model and its tap in one module, as a distiller holds them."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self.model = model
        self.tap = FeatureTap(model, [path])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images)
        (feature,) = self.tap.pop().values()
        return logits, feature


def size_of(module: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(module, file)
    return file.tell()


# What is recorded


@pytest.mark.parametrize("training", [False, True])
def test_a_tap_leaves_the_output_as_it_was(training):
    plain, tapped = small_cnn().train(training), small_cnn().train(training)
    tap = FeatureTap(tapped, ["stage1", "stage2", "fc"])

    torch.testing.assert_close(tapped(images_of()), plain(images_of()), rtol=0, atol=0)
    assert set(tap.pop()) == {"stage1", "stage2", "fc"}


def test_the_feature_is_the_modules_output_with_its_gradient():
    model = small_cnn(norm="group")
    tap = FeatureTap(model, ["stage1"])

    logits = model(images_of())
    feature = tap.pop()["stage1"]

    torch.testing.assert_close(feature, model.stage1(model.stem(images_of())))
    feature.sum().backward(retain_graph=True)
    assert model.stage1[0].weight.grad.any()
    assert model.stage2[0].weight.grad is None
    logits.sum().backward()
    assert model.stage2[0].weight.grad.any()


def test_features_come_by_path_whatever_the_order_of_the_paths():
    model = small_cnn()
    tap = FeatureTap(model, ["fc", "stem.0"])

    logits = model(images_of())
    features = tap.pop()

    assert tap.paths == ("fc", "stem.0")
    assert features["fc"] is logits
    assert features["stem.0"].shape == (4, 8, 16, 16)


def test_one_path_may_be_given_as_a_string():
    model = small_cnn()
    tap = FeatureTap(model, "stage1")

    model(images_of())

    assert list(tap.pop()) == ["stage1"]


def test_two_taps_on_one_module_do_not_disturb_each_other():
    model = small_cnn()
    first, second = FeatureTap(model, ["stage1"]), FeatureTap(model, ["stage1"])
    second.enabled = False

    model(images_of())

    first.pop()
    with pytest.raises(RuntimeError, match="did not run"):
        second.pop()


def test_a_tap_that_is_not_enabled_records_nothing():
    model = small_cnn()
    tap = FeatureTap(model, ["stage1"])
    tap.enabled = False

    model(images_of())
    model(images_of())

    with pytest.raises(RuntimeError, match="'stage1' did not run"):
        tap.pop()


# What is refused


@pytest.mark.parametrize(
    ("path", "near"),
    [("stagel", "stage1"), ("stage1.conv", "stage1.0"), ("stage3", "stage2"), ("classifier", "fc")],
)
def test_a_wrong_path_is_an_error_that_lists_near_names(path, near):
    with pytest.raises(ValueError, match=f"SmallCNN has no module '{path}'; near names: .*{near}"):
        FeatureTap(small_cnn(), [path])


def test_a_wrong_path_leaves_no_hook_behind():
    model = small_cnn()

    with pytest.raises(ValueError, match="near names"):
        FeatureTap(model, ["stage1", "stagel"])

    assert num_hooks(model) == 0


def test_a_second_forward_before_pop_is_an_error():
    model = small_cnn()
    tap = FeatureTap(model, ["stage1"])
    model(images_of())

    with pytest.raises(RuntimeError, match=r"'stage1' ran again before .* call pop\(\)"):
        model(images_of())

    tap.clear()
    model(images_of())
    tap.pop()
    model(images_of())
    tap.pop()


def test_a_module_that_runs_twice_in_one_forward_is_an_error():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)
    tap = FeatureTap(model, ["1"])

    with pytest.raises(RuntimeError, match="'1' ran again"):
        model(torch.ones(2, 4))

    assert tap.paths == ("1",)


def test_pop_without_a_forward_is_an_error():
    tap = FeatureTap(small_cnn(), ["stage1"])

    with pytest.raises(RuntimeError, match="module 'stage1' did not run in the last forward"):
        tap.pop()


def test_pop_gives_a_feature_once():
    model = small_cnn()
    tap = FeatureTap(model, ["stage1"])
    model(images_of())
    tap.pop()

    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()


def test_a_module_without_a_tensor_to_give_is_an_error():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x)[0]

    model = Recurrent()
    tap = FeatureTap(model, ["cell"])

    with pytest.raises(TypeError, match="'cell' returns tuple, only a tensor can be tapped"):
        model(torch.ones(2, 4))
    tap.remove()
    assert model(torch.ones(2, 4)).shape == (2, 3)


# What is left alone


def test_remove_takes_the_hooks_off():
    model = small_cnn()
    handle = model.stage1.register_forward_hook(lambda module, args, output: None)
    tap = FeatureTap(model, ["stage1", "stage2"])
    assert num_hooks(model) == 3

    tap.remove()

    assert num_hooks(model) == 1  # somebody else's
    handle.remove()
    tap.remove()  # once more does no harm
    model(images_of())
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()


def test_leaving_the_with_block_takes_the_hooks_off_also_on_an_error():
    model = small_cnn()

    with pytest.raises(KeyError), FeatureTap(model, ["stage1"]):
        raise KeyError

    assert num_hooks(model) == 0


def test_a_tap_survives_compilation_in_one_graph():
    images = images_of()
    holder = Holder(small_cnn(norm="group"), "stage1")
    logits, feature = holder(images)

    compiled = torch.compile(holder, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled_logits, compiled_feature = compiled(images)

        torch.testing.assert_close(compiled_logits, logits)
        torch.testing.assert_close(compiled_feature, feature)
    compiled_feature.sum().backward()
    assert holder.model.stem[0].weight.grad.any()


def test_a_deep_copy_records_into_its_own_store():
    holder = Holder(small_cnn(), "stage1")
    copied = copy.deepcopy(holder)

    holder.model(images_of())

    with pytest.raises(RuntimeError, match="did not run"):
        copied.tap.pop()
    copied.model(images_of(2))
    assert copied.tap.pop()["stage1"].shape[0] == 2
    assert holder.tap.pop()["stage1"].shape[0] == 4


def test_removing_the_tap_of_a_deep_copy_leaves_the_original_tapped():
    holder = Holder(small_cnn(), "stage1")
    copied = copy.deepcopy(holder)

    copied.tap.remove()

    assert num_hooks(copied.model) == 0
    assert num_hooks(holder.model) == 1
    holder(images_of())


def test_a_tap_that_holds_a_feature_can_be_copied_without_it():
    holder = Holder(small_cnn(), "stage1")
    holder.model(images_of())

    copied = copy.deepcopy(holder)

    with pytest.raises(RuntimeError, match="did not run"):
        copied.tap.pop()
    holder.tap.pop()


def test_saving_a_tapped_model_saves_the_model_alone():
    model = small_cnn()
    plain_size = size_of(model)
    holder = Holder(model, "stage1")
    holder.ballast = nn.Linear(1000, 1000)  # what else the tap's owner has
    model(images_of(64))  # a feature of 200 kB is waiting in the tap

    assert size_of(model) < plain_size + 2_000
    assert set(model.state_dict()) == set(small_cnn().state_dict())


def test_a_tapped_model_loads_from_its_file():
    model = small_cnn().eval()
    tap = FeatureTap(model, ["stage1"])
    tap.enabled = False
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)

    loaded = torch.load(file, weights_only=False)

    for _ in range(2):
        torch.testing.assert_close(loaded(images_of()), model(images_of()))


def test_gradient_checkpointing_may_run_a_module_again_in_the_backward():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_cnn(norm="group")

        def forward(self, images: Tensor) -> Tensor:
            stages = nn.Sequential(self.model.stem, self.model.stage1)
            feature = checkpoint(stages, images, use_reentrant=False)
            return self.model.fc(self.model.pool(self.model.stage2(feature)).flatten(1))

    model = Checkpointed().double()
    images = images_of().double()
    tap = FeatureTap(model, ["model.stage1"])

    logits = model(images)
    feature = tap.pop()["model.stage1"]
    tap.enabled = False
    (logits.sum() + feature.sum()).backward()

    plain = small_cnn(norm="group").double()
    (plain(images).sum() + plain.stage1(plain.stem(images)).sum()).backward()
    torch.testing.assert_close(model.model.stem[0].weight.grad, plain.stem[0].weight.grad)
