import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file, save_model
from timm import create_model
from torch import nn

from softlabels.io.weights import load_weights, read_metadata, save_weights


def network(seed=0, classes=3):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes)
    )
    model[1].running_mean.normal_()
    return model


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4, bias=False)
        self.decode = nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight


class WithExtraState(nn.Linear):
    step = 0

    def get_extra_state(self):
        return {"step": self.step}

    def set_extra_state(self, state):
        self.step = state["step"]


class RunsCode:
    """Unpickling it without care creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --- round trips


def test_round_trip(tmp_path):
    source, model = network(1), network(2)
    save_weights(source, tmp_path / "a.safetensors", metadata={"name": "x", "other": "y"})
    assert not same(source, model)
    load_weights(model, tmp_path / "a.safetensors")
    assert same(source, model)
    assert read_metadata(tmp_path / "a.safetensors") == {"name": "x", "other": "y"}


def test_no_metadata(tmp_path):
    save_weights(network(), tmp_path / "a.safetensors")
    assert read_metadata(tmp_path / "a.safetensors") == {}


def test_the_model_is_not_changed_by_saving(tmp_path):
    model = network()
    model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    strides = model[0].weight.stride()
    save_weights(model, tmp_path / "a.safetensors")
    assert model[0].weight.stride() == strides
    loaded = network(1)
    load_weights(loaded, tmp_path / "a.safetensors")
    assert same(model, loaded)


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "net", "student"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, key, zipped):
    source, model = network(1), network(2)
    state = source.state_dict()
    content = {key: state, "epoch": 3, "optimizer": {"lr": 0.1}} if key else state
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    load_weights(model, tmp_path / "a.pth")
    assert same(source, model)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.module."],
)
def test_prefixes_of_wrappers(tmp_path, prefix):
    source, model = network(1), network(2)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth")
    assert same(source, model)


def test_a_model_whose_own_names_start_like_that(tmp_path):
    class Holder(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.module = network(seed)

    source, model = Holder(1), Holder(2)
    save_weights(source, tmp_path / "a.safetensors")
    load_weights(model, tmp_path / "a.safetensors")
    assert same(source, model)
    torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "wrapped.pth")
    model = Holder(3)
    load_weights(model, tmp_path / "wrapped.pth")
    assert same(source, model)


def test_the_models_dtype_stays(tmp_path):
    source = network(1).half()
    save_weights(source, tmp_path / "a.safetensors")
    model = network(2)
    load_weights(model, tmp_path / "a.safetensors")
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, source[0].weight.float())


def test_tied_weights(tmp_path):
    source, model = Tied(), Tied()
    save_weights(source, tmp_path / "each.safetensors")
    save_model(source, str(tmp_path / "once.safetensors"))  # keeps one of the two names
    for name in ("each", "once"):
        model.encode.weight.data.zero_()
        load_weights(model, tmp_path / f"{name}.safetensors")
        assert same(source, model)
        assert model.decode.weight is model.encode.weight


def test_views_of_one_storage(tmp_path):
    model = nn.Linear(2, 2)
    whole = torch.arange(6.0)
    model.weight.data, model.bias.data = whole[:4].view(2, 2), whole[4:]
    save_weights(model, tmp_path / "a.safetensors")
    loaded = nn.Linear(2, 2)
    load_weights(loaded, tmp_path / "a.safetensors")
    assert same(model, loaded)


def test_extra_state_in_a_torch_file(tmp_path):
    source, model = WithExtraState(1, 1), WithExtraState(1, 1)
    source.step = 3
    torch.save(source.state_dict(), tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth")
    assert model.step == 3
    assert torch.equal(model.weight, source.weight)
    model.get_extra_state = lambda: torch.zeros(2)  # of another type than the file's
    model.step = 0
    load_weights(model, tmp_path / "a.pth")
    assert model.step == 3


# --- files that do not fit


def misfit(tmp_path, state):
    torch.save(state, tmp_path / "other.pth")
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"other\.pth does not fit Sequential") as error:
        load_weights(model, tmp_path / "other.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    return str(error.value)


def test_missing_key(tmp_path):
    state = network(1).state_dict()
    del state["3.bias"]
    assert "missing 3.bias" in misfit(tmp_path, state)


def test_unexpected_key(tmp_path):
    assert "unexpected head.bias" in misfit(
        tmp_path, network(1).state_dict() | {"head.bias": torch.zeros(2)}
    )


def test_other_shape(tmp_path):
    message = misfit(tmp_path, network(1, classes=5).state_dict())
    assert "3.weight: got (5, 4), expected (3, 4)" in message
    assert "3.bias: got (5,), expected (3,)" in message
    assert "missing" not in message


def test_long_lists_are_cut(tmp_path):
    message = misfit(tmp_path, {f"layer{i}": torch.zeros(1) for i in range(100)})
    assert "layer4 and 95 more" in message
    assert "layer5" not in message


def test_not_strict(tmp_path):
    source, model = network(1), network(2)
    bias = model[3].bias.clone()
    state = source.state_dict() | {"extra": torch.zeros(1)}
    del state["3.bias"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=r"a\.pth.*missing 3\.bias; unexpected extra"):
        load_weights(model, tmp_path / "a.pth", strict=False)
    assert torch.equal(model[3].weight, source[3].weight)
    assert torch.equal(model[3].bias, bias)


def test_not_strict_still_wants_shapes_and_one_name(tmp_path):
    torch.save(network(1, classes=5).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"3\.bias: got \(5,\), expected \(3,\)"):
        load_weights(network(), tmp_path / "a.pth", strict=False)
    torch.save({"nothing.shared": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"unexpected nothing\.shared"):
        load_weights(network(), tmp_path / "a.pth", strict=False)


# --- files that are no weights


def test_missing_file(tmp_path):
    for read in (lambda path: load_weights(network(), path), read_metadata):
        with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
            read(tmp_path / "gone.safetensors")


def test_folder(tmp_path):
    with pytest.raises(ValueError, match="got a folder"):
        load_weights(network(), tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path, zipped):
    trace = tmp_path / "code_was_run"
    content = {"state_dict": network().state_dict(), "extra": RunsCode(trace)}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pth.*mkdir.*could run code"):
        load_weights(network(), tmp_path / "evil.pth")
    assert not trace.exists()


def test_code_in_a_plain_pickle_does_not_run(tmp_path):
    trace = tmp_path / "code_was_run"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(RunsCode(trace), protocol=protocol))
        with pytest.raises(ValueError, match=r"evil\.pkl"):
            load_weights(network(), tmp_path / "evil.pkl")
    assert not trace.exists()
    with open(tmp_path / "evil.pkl", "rb") as file:
        pickle.load(file)  # the attack is real: without care it does run
    assert trace.exists()


def test_errors_do_not_advise_unsafe_loading(tmp_path):
    torch.save(network(), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"Sequential.*could run code") as error:
        load_weights(network(), tmp_path / "whole.pth")
    assert "weights_only" not in str(error.value)


def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"archive/{name}", pickle.dumps(3, protocol=2))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(ValueError, match=r"a\.pth is not a readable.*TorchScript") as error:
        load_weights(network(), tmp_path / "a.pth")
    assert "trusted source" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy"])
def test_truncated_anywhere(tmp_path, suffix):
    model, path = network(), tmp_path / f"short{suffix}"
    if suffix == ".safetensors":
        save_weights(model, path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=suffix == ".pth")
    content = path.read_bytes()
    for length in range(0, len(content) - 1, max(1, len(content) // 40)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"short\{suffix} "):
            load_weights(model, path)


@pytest.mark.parametrize("content", [b"", b"not weights at all", bytes(range(256)) * 8])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_other_bytes(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not a readable"):
        load_weights(network(), tmp_path / name)


def test_metadata_of_another_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable"):
        read_metadata(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"epoch": 3}, "holds no state dict.*epoch"),
        ({"model": {}}, "an empty dict"),
        ({1: torch.zeros(1)}, "holds no state dict.*a name of type int"),
        ({"a": torch.eye(2).to_sparse()}, "holds no state dict.*a$"),
        ({"a": torch.zeros(2, device="meta")}, "holds no state dict.*a$"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "holds no state dict.*a$"),
        ({("x" * 10**6,): torch.zeros(1)}, "a name of type tuple$"),
    ],
)
def test_no_state_dict(tmp_path, content, finding):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=finding):
        load_weights(network(), tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0.weight", float("nan")),
        ("3.bias", float("inf")),
        ("1.running_var", float("nan")),
        ("1.running_mean", float("inf")),
    ],
)
def test_numbers_that_are_not_finite(tmp_path, suffix, name, value):
    state = {key: tensor.clone() for key, tensor in network(1).state_dict().items()}
    state[name].view(-1)[-1] = value
    path = tmp_path / f"a{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    model, before = network(2), network(2)
    with pytest.raises(
        ValueError, match=rf"a{suffix} holds numbers that are not finite, in {name}"
    ):
        load_weights(model, path)
    assert same(model, before)


def test_numbers_that_the_models_dtype_cannot_hold(tmp_path):
    save_file(
        {"weight": torch.full((1, 1), 1e30), "bias": torch.zeros(1)}, tmp_path / "a.safetensors"
    )
    load_weights(nn.Linear(1, 1), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not finite, in weight"):
        load_weights(nn.Linear(1, 1).half(), tmp_path / "a.safetensors")


def test_a_mask_may_be_infinite_where_the_models_own_is(tmp_path):
    source, model = nn.Linear(1, 1), nn.Linear(1, 1)
    for one in (source, model):
        one.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    save_weights(source, tmp_path / "a.safetensors")
    load_weights(model, tmp_path / "a.safetensors")
    assert same(model, source)
    model.mask.zero_()
    with pytest.raises(ValueError, match="not finite, in mask"):
        load_weights(model, tmp_path / "a.safetensors")


def repacked(path, compression):
    """The same archive with its parts packed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def test_packed_archives_are_refused(tmp_path):
    """A few kB of them could fill the memory."""
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.zeros(100_000)}, path)
    repacked(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 5000
    assert torch.load(path, weights_only=True)["weight"].numel() == 100_000  # torch unpacks it
    with pytest.raises(ValueError, match=r"a\.pth is not a readable.*its parts are packed"):
        load_weights(network(), path)


def test_archives_whose_parts_overlap_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.zeros(10_000)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(3):
            twin = zipfile.ZipInfo(f"archive/data/{number + 7}")
            original = archive.getinfo("a/data/0")
            for name in ("header_offset", "compress_size", "file_size", "CRC"):
                setattr(twin, name, getattr(original, name))
            archive.filelist.append(twin)
        archive.comment = b" "  # makes it write the list anew
    with pytest.raises(ValueError, match=r"a\.pth is not a readable.*larger than the whole file"):
        load_weights(network(), path)


@pytest.mark.parametrize("numel", [2**40, 2**62])
def test_legacy_file_with_a_gigantic_storage(tmp_path, numel):
    """The pickle says how much is to be reserved."""
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.zeros(7)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"K\x07N") == 1  # the storage's size
    path.write_bytes(content.replace(b"K\x07N", b"\x8a\x08" + numel.to_bytes(8, "little") + b"N"))
    with pytest.raises(ValueError, match=r"a\.pt is not a readable"):
        load_weights(network(), path)


# --- writing


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"must end with \.safetensors, got .*a\.pth"):
        save_weights(network(), tmp_path / "a.pth")
    with pytest.raises(TypeError, match="'epoch': 3"):
        save_weights(network(), tmp_path / "a.safetensors", metadata={"epoch": 3})
    assert list(tmp_path.iterdir()) == []


def test_extra_state_is_refused(tmp_path):
    with pytest.raises(TypeError, match="dict for '_extra_state'"):
        save_weights(WithExtraState(1, 1), tmp_path / "a.safetensors")


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_weights(network(1), path)
    content = path.read_bytes()

    def fail(_descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(network(2), path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"old": torch.zeros(1)}, path)
    save_weights(network(), path)
    load_weights(network(1), path)
    assert list(tmp_path.iterdir()) == [path]


def test_needs_torch_alone():
    program = """
import sys
sys.modules.update(dict.fromkeys(("timm", "safetensors", "torchvision", "pydantic")))
import softlabels.io.weights
try:
    import timm
except ImportError:
    sys.exit(0)
sys.exit("the check cannot fail")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_parts_of_a_classifier_of_mmclassification(tmp_path):
    source, model = (
        create_model("resnet10t", num_classes=3),
        create_model("resnet10t", num_classes=3),
    )
    state = {
        f"{'head' if name.startswith('fc.') else 'backbone'}.{name}": value
        for name, value in source.state_dict().items()
    }
    torch.save({"meta": {"epoch": 100}, "state_dict": state}, tmp_path / "resnet.pth")
    load_weights(model, tmp_path / "resnet.pth")
    assert torch.equal(model.fc.weight, source.fc.weight)
    assert torch.equal(model.layer2[0].conv1.weight, source.layer2[0].conv1.weight)
