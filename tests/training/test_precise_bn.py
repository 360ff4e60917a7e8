"""PreciseBN: statistics are averages over training images, and nothing else moves."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from torch import nn

import softlabels
from shared.patterns import FAST
from shared.signalling import Signalling
from shared.small_networks import small_cnn
from softlabels.data.randomness import derive_seed
from softlabels.training.build import build_distiller, with_defaults
from softlabels.training.config import resolve
from softlabels.training.distributed import start
from softlabels.training.engine import Engine
from softlabels.training.errors import Interrupted
from softlabels.training.optim import build_optimizer, build_schedule
from softlabels.training.precise_bn import recompute_statistics
from softlabels.training.task import ClassificationTask


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, 16, 16, generator=generator) + number for number in range(count)]


def test_statistics_are_the_mean_over_batches_of_means_and_unbiased_variances():
    network = small_cnn()
    network.train()(batches()[0])  # running ones that must not enter
    recompute_statistics(network, batches())

    inputs = [network.stem[0](images).transpose(0, 1).flatten(1) for images in batches()]
    mean = torch.stack([x.mean(1) for x in inputs]).mean(0)
    variance = torch.stack([x.var(1) for x in inputs]).mean(0)
    torch.testing.assert_close(network.stem[1].running_mean, mean)
    torch.testing.assert_close(network.stem[1].running_var, variance)


def test_later_layers_see_what_batch_statistics_make_of_the_earlier_ones():
    network = small_cnn()
    recompute_statistics(network, batches(1))
    twin = copy.deepcopy(network).train()
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    twin(batches(1)[0])
    torch.testing.assert_close(network.stage2[1].running_var, twin.stage2[1].running_var)


def test_nothing_but_the_statistics_changes():
    network = small_cnn(dropout=0.5)
    network.train()
    network.stage1.eval()  # a part that is kept frozen
    network.stem[1].momentum = 0.3
    network.stem[1].num_batches_tracked.fill_(7)
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    random_state = torch.get_rng_state()

    recompute_statistics(network, batches())

    changed = {n for n, v in network.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {n for n in before if n.endswith(("running_mean", "running_var"))}
    assert [module.training for module in network.modules()] == modes
    assert network.stem[1].momentum == 0.3
    assert torch.equal(torch.get_rng_state(), random_state)


def test_processes_average_in_one_message():
    networks = [small_cnn(), small_cnn()]
    sent: list[torch.Tensor] = []
    recompute_statistics(networks[0], batches(1), lambda own: sent.append(own.clone()) or own)
    recompute_statistics(networks[1], batches(2)[1:], lambda own: (own + sent[0]) / 2)
    assert len(sent) == 1

    both = small_cnn()
    recompute_statistics(both, batches(2))
    for name, value in networks[1].state_dict().items():
        torch.testing.assert_close(value, both.state_dict()[name], msg=name)


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match="no training images"):
        recompute_statistics(small_cnn(), [])


def engine_of(source, **settings) -> Engine:
    config = resolve({"student": {"name": "timm:resnet8_glyphs"}, "batch_size": 32, **settings})
    config = with_defaults(config, source.info)
    distiller = build_distiller(config, source.info)
    optimizer = build_optimizer(config.optimizer, distiller.trainable)
    schedule = build_schedule(config.schedule, optimizer, epochs=1, steps_per_epoch=3)
    task = ClassificationTask(config, source.info, distiller.extras)
    return Engine(distiller, optimizer, schedule, source, start(config), config, task)


class NoSignal:
    asked = None


@pytest.mark.parametrize("ema_decay", [None, 0.5])
@pytest.mark.parametrize(("wanted", "num_batches"), [(5, 1), (64, 2), (90, 2), (1000, 3)])
def test_the_evaluated_network_has_averages_over_whole_batches_of_other_draws(
    source, ema_decay, wanted, num_batches
):
    """Three batches of 32 are an epoch; asked for more or less, whole ones are taken."""
    engine = engine_of(
        source, precise_bn=wanted, ema_decay=ema_decay, epochs=1, method="uskd", seed=4
    )
    engine.fit([], NoSignal())

    expected = copy.deepcopy(engine.network)
    seed = derive_seed(4, "precise_bn")
    views = source.train_batches(seed=seed, epoch=0, batch_size=32, device="cpu")
    recompute_statistics(expected, [batch.images for batch in views][:num_batches])
    for name, value in expected.state_dict().items():
        assert torch.equal(value, engine.network.state_dict()[name]), name


def test_the_student_keeps_its_running_statistics_where_the_average_is_evaluated(source):
    plain, precise = (
        engine_of(source, ema_decay=0.5, epochs=1, **settings)
        for settings in ({}, {"precise_bn": 64})
    )
    for engine in (plain, precise):
        engine.fit([], NoSignal())
    for name, value in plain.core.state_dict().items():
        assert torch.equal(value, precise.core.state_dict()[name]), name
    assert any(
        not torch.equal(value, precise.network.state_dict()[name])
        for name, value in plain.network.state_dict().items()
    )


def test_a_resumed_run_equals_a_straight_one(source, tmp_path):
    extra = {"precise_bn": 64, "method": "uskd", "ema_decay": 0.5, "epochs": 2}
    softlabels.train(source, output=str(tmp_path / "straight"), **{**FAST, **extra})
    stopping = Signalling(source, 3, signal.SIGTERM)  # the last step of the first epoch
    with pytest.raises(Interrupted):
        softlabels.train(stopping, output=str(tmp_path / "resumed"), **{**FAST, **extra})
    config = tmp_path / "resumed" / "config.yaml"
    config.write_text(config.read_text().replace("object:Signalling", "object:InMemorySource"))
    softlabels.train(source, output=str(tmp_path / "resumed"), **{**FAST, **extra})
    for name in ("metrics.jsonl", "student.safetensors"):
        texts = [(tmp_path / run / name).read_bytes() for run in ("straight", "resumed")]
        assert texts[0] == texts[1], name


def test_a_network_without_batch_norm_is_refused_before_training(source, tmp_path):
    message = "statistics of BatchNorm, which the network VisionTransformer has none of"
    with pytest.raises(ValueError, match=message):
        softlabels.train(
            source, output=str(tmp_path / "run"), precise_bn=64,
            **{**FAST, "student": "timm:vit_mini_patch4_32"},
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
