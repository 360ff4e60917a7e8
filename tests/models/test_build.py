import json
import sys

import pytest
import timm
import torch
from torch import nn

from softlabels.io.weights import read_metadata, save_weights
from softlabels.models import FileRecord, InputSpec, build_model, model_input, model_metadata

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@pytest.fixture
def module_file(tmp_path, monkeypatch):
    """Write a module `user_models` that can be imported in this test alone."""

    def write(text):
        (tmp_path / "user_models.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "user_models", raising=False)

    yield write
    sys.modules.pop("user_models", None)


def saved(tmp_path, name="vit_mini_patch4_32", **described):
    """Build, save and return a model and its file."""
    described = {"num_classes": 5, "in_channels": 1} | described
    torch.manual_seed(0)
    names = ("num_classes", "in_channels", "image_size", "settings")
    model = build_model(name, **{key: described[key] for key in names if key in described})
    path = tmp_path / "student.safetensors"
    save_weights(model, path, metadata=model_metadata(FileRecord(model=name, **described)))
    return model, path


# --- timm


@pytest.mark.parametrize("name", ["resnet8", "timm:resnet8", "timm:resnet18.a1_in1k"])
def test_timm(name):
    model = build_model(name, num_classes=7, in_channels=2)
    assert model(torch.randn(2, 2, 32, 32)).shape == (2, 7)


def test_timm_settings():
    assert build_model("resnet8", num_classes=7, settings={"drop_rate": 0.3}).head_drop.p == 0.3


def test_own_number_of_classes():
    assert build_model("timm:resnet18", num_classes=None).num_classes == 1000
    assert build_model("torchvision:resnet18", num_classes=None).fc.out_features == 1000


def test_timm_image_size_only_where_it_is_taken():
    vit = build_model("vit_mini_patch4_32", num_classes=7, image_size=(24, 40))
    assert vit(torch.randn(2, 3, 24, 40)).shape == (2, 7)
    swin = build_model("swin_tiny_patch4_window7_224", num_classes=7, image_size=56)
    assert swin.patch_embed.img_size == (56, 56)
    assert build_model("resnet8", num_classes=7, image_size=24)(torch.zeros(2, 3, 24, 24)).any()


def test_same_seed_same_weights_as_timm():
    torch.manual_seed(3)
    model = build_model("vit_mini_patch4_32", num_classes=7, image_size=32)
    torch.manual_seed(3)
    expected = timm.create_model("vit_mini_patch4_32", num_classes=7)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


# --- torchvision


def test_torchvision():
    model = build_model("torchvision:resnet18", num_classes=7, image_size=64)
    assert type(model).__module__ == "torchvision.models.resnet"
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_torchvision_image_size():
    vit = build_model("torchvision:vit_b_32", num_classes=7, image_size=64)
    assert vit(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    with pytest.raises(ValueError, match=r"square.*\(64, 32\)"):
        build_model("torchvision:vit_b_32", num_classes=7, image_size=(64, 32))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_torchvision_gray_is_what_it_saw_of_gray_rgb(name):
    torch.manual_seed(1)
    gray_model = build_model(f"torchvision:{name}", num_classes=7, in_channels=1).eval()
    torch.manual_seed(1)
    rgb_model = build_model(f"torchvision:{name}", num_classes=7).eval()
    gray = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(gray_model(gray), rgb_model(gray.expand(-1, 3, -1, -1)))


def test_torchvision_more_channels():
    model = build_model("torchvision:resnet18", num_classes=7, in_channels=4)
    assert model.conv1.in_channels == 4
    assert model.conv1.stride == (2, 2)
    assert model(torch.randn(2, 4, 32, 32)).shape == (2, 7)
    assert model.conv1.weight.requires_grad


def test_torchvision_without_first_convolution(monkeypatch):
    def without(_name, **_settings):
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(7))

    monkeypatch.setattr("torchvision.models.get_model", without)
    with pytest.raises(ValueError, match=r"no first convolution.*got 1"):
        build_model("torchvision:resnet18", num_classes=7, in_channels=1)


# --- pretrained, without the network


def test_pretrained_reaches_timm(monkeypatch):
    seen = {}
    monkeypatch.setattr(timm, "create_model", lambda name, **k: seen.update(k) or nn.Identity())
    build_model("timm:resnet18", num_classes=7, pretrained=True)
    assert seen == {"pretrained": True, "num_classes": 7, "in_chans": 3}
    build_model("timm:resnet18", num_classes=7)
    assert not seen["pretrained"]


def test_pretrained_reaches_torchvision(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "torchvision.models.get_model", lambda name, **k: seen.update(k) or nn.Identity()
    )
    build_model("torchvision:resnet18", num_classes=None, pretrained=True)
    assert seen == {"weights": "DEFAULT"}
    build_model("torchvision:resnet18", num_classes=None)
    assert seen["weights"] is None


def test_pretrained_without_weights():
    with pytest.raises(ValueError, match="no weights for 'resnet8'"):
        build_model("resnet8", num_classes=7, pretrained=True)


# --- functions


def test_function_gets_what_it_accepts(module_file):
    module_file(
        "from torch import nn\n"
        "def plain(num_classes, in_channels, width=4):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 16, width),\n"
        "                         nn.Linear(width, num_classes))\n"
        "def sized(num_classes, image_size, pretrained):\n"
        "    model = nn.Linear(image_size[0] * image_size[1], num_classes)\n"
        "    model.pretrained = pretrained\n"
        "    return model\n"
        "def none():\n"
        "    return nn.Identity()\n"
    )
    model = build_model(
        "user_models:plain", num_classes=7, in_channels=2, image_size=4, settings={"width": 9}
    )
    assert model(torch.randn(3, 2, 4, 4)).shape == (3, 7)
    assert model[1].out_features == 9
    sized = build_model("user_models:sized", num_classes=7, image_size=(3, 4), pretrained=True)
    assert sized.weight.shape == (7, 12)
    assert sized.pretrained is True
    assert isinstance(build_model("user_models:none", num_classes=7), nn.Identity)


def test_function_errors(module_file):
    module_file(
        "def make(num_classes):\n    return 3\n"
        "def broken(num_classes):\n    raise TypeError('own fault')\n"
    )
    with pytest.raises(ValueError, match="'mak'; near: make"):
        build_model("user_models:mak", num_classes=7)
    with pytest.raises(ValueError, match="does not take the setting 'width'"):
        build_model("user_models:make", num_classes=7, settings={"width": 1})
    with pytest.raises(TypeError, match=r"must return an nn\.Module, got int"):
        build_model("user_models:make", num_classes=7)
    with pytest.raises(ValueError, match="no argument 'pretrained'"):
        build_model("user_models:make", num_classes=7, pretrained=True)
    with pytest.raises(TypeError, match="own fault"):
        build_model("user_models:broken", num_classes=7, settings={})


def test_broken_module_is_not_called_unknown(module_file):
    module_file("import missing_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="missing_dependency"):
        build_model("user_models:make", num_classes=7)


# --- names and settings


@pytest.mark.parametrize("name", ["hub:resnet18", "nowhere.at.all:make"])
def test_unknown_prefix(name):
    with pytest.raises(ValueError, match=r"timm:NAME, torchvision:NAME.*no importable module"):
        build_model(name, num_classes=7)


@pytest.mark.parametrize("name", ["", ":resnet8", "timm:"])
def test_incomplete_name(name):
    with pytest.raises(ValueError, match=f"expected a model name like.*got '{name}'"):
        build_model(name, num_classes=7)


@pytest.mark.parametrize("look_up", [lambda n: build_model(n, num_classes=7), model_input])
def test_unknown_names_list_the_nearest(look_up):
    with pytest.raises(ValueError, match=r"unknown timm model 'resnet8y4'; near: .*resnet8x4"):
        look_up("timm:resnet8y4")
    with pytest.raises(ValueError, match=r"torchvision classifier 'resnet17'; near: .*resnet18"):
        look_up("torchvision:resnet17")
    with pytest.raises(ValueError, match=r"no weights 'nope', only: .*resnet18\.a1_in1k"):
        look_up("resnet18.nope")


def test_torchvision_detectors_are_no_classifiers():
    with pytest.raises(ValueError, match="unknown torchvision classifier"):
        build_model("torchvision:fasterrcnn_resnet50_fpn", num_classes=7)


def test_timm_never_reaches_for_the_hub():
    with pytest.raises(ValueError, match="unknown timm model"):
        build_model("timm:hf-hub:someone/model", num_classes=7)


@pytest.mark.parametrize("name", ["timm:resnet8", "torchvision:resnet18"])
def test_setting_that_the_model_does_not_take(name):
    with pytest.raises(ValueError, match=f"'{name}' does not take the setting 'color'"):
        build_model(name, num_classes=7, settings={"color": 1})


def test_setting_that_the_caller_sets():
    with pytest.raises(ValueError, match="must not hold num_classes, pretrained"):
        build_model("resnet8", num_classes=7, settings={"num_classes": 3, "pretrained": True})


# --- files


def test_file_round_trip(tmp_path):
    model, path = saved(tmp_path, image_size=(24, 24), settings={"depth": 2})
    loaded = build_model(f"file:{path}", num_classes=5, in_channels=1)
    images = torch.randn(2, 1, 24, 24)
    assert len(loaded.blocks) == 2
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    assert build_model(f"file:{path}", num_classes=None, in_channels=1).num_classes == 5


def test_file_of_a_torchvision_model_with_other_channels(tmp_path):
    model, path = saved(tmp_path, "torchvision:shufflenet_v2_x0_5")
    loaded = build_model(f"file:{path}", num_classes=5, in_channels=1)
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_file_settings_can_be_overridden(tmp_path):
    _, path = saved(tmp_path, "resnet8", settings={"drop_rate": 0.3})
    arguments = {"num_classes": 5, "in_channels": 1}
    assert build_model(f"file:{path}", **arguments).head_drop.p == 0.3
    model = build_model(f"file:{path}", **arguments, settings={"drop_rate": 0.1})
    assert model.head_drop.p == 0.1


def test_file_that_does_not_fit_what_is_asked(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(ValueError, match="5 classes, got num_classes=7"):
        build_model(f"file:{path}", num_classes=7, in_channels=1)
    with pytest.raises(ValueError, match="1 channels, got in_channels=3"):
        build_model(f"file:{path}", num_classes=5)
    with pytest.raises(ValueError, match=r"pos_embed: got \(1, 65, 64\), expected \(1, 257, 64\)"):
        build_model(f"file:{path}", num_classes=5, in_channels=1, image_size=64)


def test_file_without_a_record(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_weights(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"plain\.safetensors does not say which model"):
        build_model(f"file:{path}", num_classes=2)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "resnet8"}'])
def test_file_with_a_damaged_record(tmp_path, text):
    path = tmp_path / "damaged.safetensors"
    save_weights(nn.Linear(2, 2), path, metadata={"softlabels": text})
    with pytest.raises(ValueError, match=r"damaged\.safetensors has a damaged model record"):
        build_model(f"file:{path}", num_classes=2)


def test_file_may_not_choose_code(tmp_path, module_file):
    module_file("raise SystemExit('was imported')\n")
    path = tmp_path / "evil.safetensors"
    for name in ("user_models:make", f"file:{path}"):
        record = {"model": name, "num_classes": 2, "in_channels": 3}
        save_weights(nn.Linear(2, 2), path, metadata={"softlabels": json.dumps(record)})
        with pytest.raises(ValueError, match="expected a model of timm or torchvision"):
            build_model(f"file:{path}", num_classes=2)


def test_missing_file(tmp_path):
    for look_up in (lambda name: build_model(name, num_classes=2), model_input):
        with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
            look_up(f"file:{tmp_path / 'gone.safetensors'}")


# --- metadata


def test_metadata_of_a_file_model_names_the_origin(tmp_path):
    _, path = saved(tmp_path, "resnet8", settings={"drop_rate": 0.3})
    again = model_metadata(FileRecord(model=f"file:{path}", num_classes=5, in_channels=1))
    assert again == read_metadata(path)
    assert json.loads(again["softlabels"])["model"] == "timm:resnet8"


def test_metadata_refuses_what_json_lacks():
    settings = {"act_layer": nn.GELU}
    record = FileRecord(model="resnet8", num_classes=5, in_channels=3, settings=settings)
    with pytest.raises(ValueError, match=r"types that JSON has, got.*GELU"):
        model_metadata(record)


def test_metadata_is_the_same_in_every_file(tmp_path):
    described = {"image_size": (32, 32), "mean": (0.1,), "std": (0.2,)}
    contents = set()
    for _ in range(4):
        _, path = saved(tmp_path, **described)
        contents.add(path.read_bytes())
    assert len(contents) == 1


# --- what a model expects to see


@pytest.mark.parametrize("name", ["timm:resnet18", "resnet18.tv_in1k", "torchvision:resnet18"])
def test_input_of_published_weights(name):
    assert model_input(name) == InputSpec(IMAGENET_MEAN, IMAGENET_STD, (224, 224))


def test_input_follows_the_tag():
    plain = model_input("vit_base_patch16_224.augreg_in1k")
    assert plain == InputSpec((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (224, 224))
    assert model_input("resnet50.a1_in1k") != plain


def test_input_of_models():
    assert model_input(timm.create_model("resnet18")) == model_input("timm:resnet18")
    assert model_input(build_model("resnet8", num_classes=7)) == InputSpec()
    assert model_input(nn.Linear(2, 2)) == InputSpec()


@pytest.mark.parametrize("name", ["resnet8", "vit_mini_patch4_32", "some.module:function"])
def test_input_unknown_without_published_weights(name):
    assert model_input(name) == InputSpec(None, None, None)


def test_input_of_a_file(tmp_path):
    _, path = saved(tmp_path, image_size=(24, 24), mean=(0.25,), std=(0.5,))
    assert model_input(f"file:{path}") == InputSpec((0.25,), (0.5,), (24, 24))
