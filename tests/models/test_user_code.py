"""A model's name may come from a stranger's recipe: what is not the user's network never runs."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from softlabels.models import build_model
from softlabels.models.user_code import import_builder


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Write a module into the working folder, which Python does not look into by itself."""
    before, loaded_before = [*sys.path], {*sys.modules}
    monkeypatch.chdir(tmp_path)
    names = []

    def write(name: str, text: str) -> None:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        names.append(name.partition("/")[0])

    yield write
    sys.path[:] = before
    for name in names:
        for loaded in {*sys.modules} - loaded_before:
            if loaded == name or loaded.startswith(f"{name}."):
                del sys.modules[loaded]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("os:system", {"command": "touch {trace}"}),
        ("os:mkdir", {"path": "{trace}"}),
        ("posix:mkdir", {"path": "{trace}"}),
        ("subprocess:call", {"args": "touch {trace}", "shell": True}),
        ("subprocess:Popen", {"args": "touch {trace}", "shell": True}),
        ("pathlib:Path.touch", {"self": "{trace}"}),
        ("builtins:open", {"file": "{trace}", "mode": "w"}),
        ("builtins:exec", {"source": "open('{trace}', 'w')"}),
        ("io:open", {"file": "{trace}", "mode": "w"}),
        ("os.path:os.mkdir", {"path": "{trace}"}),
        ("shutil:copyfile", {"src": "/etc/hostname", "dst": "{trace}"}),
    ],
)
def test_the_standard_library_is_not_called(tmp_path, name, settings):
    trace = tmp_path / "ran"
    settings = {
        key: value.replace("{trace}", str(trace)) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    with pytest.raises(ValueError, match=r"Python's own library|expected a model name"):
        build_model(name, num_classes=7, settings=settings)
    assert not trace.exists()


def test_the_standard_library_is_not_even_imported():
    assert "antigravity" not in sys.modules  # importing it opens a browser
    with pytest.raises(ValueError, match="Python's own library"):
        build_model("antigravity:fly", num_classes=7)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "torch.hub:load",  # fetches code and runs it
        "torch.serialization:load",
        "torch.utils.cpp_extension:load",
        "numpy:save",
        "timm.utils:setup_default_logging",
    ],
)
def test_functions_of_packages_that_do_not_return_a_network_are_not_called(name):
    with pytest.raises(ValueError, match="it is not called"):
        build_model(name, num_classes=7)


def test_what_a_module_imports_from_elsewhere_is_not_called(own_module, tmp_path):
    own_module(
        "borrowing",
        "from os import mkdir\nfrom shutil import copyfile\nimport functools\n"
        f"make = functools.partial(mkdir, {str(tmp_path / 'ran')!r})\n",
    )
    for name in ("mkdir", "copyfile", "make", "functools"):
        with pytest.raises(ValueError, match=r"it is not called|unknown function"):
            build_model(f"borrowing:{name}", num_classes=7)
    assert not (tmp_path / "ran").exists()


def test_the_module_that_defines_a_function_is_named(own_module):
    own_module("zoo/nets", "from torch import nn\ndef make():\n    return nn.Identity()\n")
    own_module("zoo/__init__", "from zoo.nets import make\n")
    with pytest.raises(ValueError, match=r"name it as zoo\.nets:make"):
        build_model("zoo:make", num_classes=7)
    assert isinstance(build_model("zoo.nets:make", num_classes=7), nn.Identity)


def test_the_working_folder_is_looked_into_for_own_code_alone(own_module):
    own_module("only_here", "from torch import nn\nclass Net(nn.Identity):\n    pass\n")
    build_model("timm:resnet8", num_classes=7)
    assert str(sys.path[-1]) not in ("", ".")
    with pytest.raises(ModuleNotFoundError):
        __import__("only_here")
    assert type(build_model("only_here:Net", num_classes=7)).__name__ == "Net"


def test_a_file_of_the_working_folder_does_not_hide_a_package(own_module):
    own_module("timm", "raise SystemExit('the wrong timm')\n")
    assert import_builder("timm.models.resnet", "resnet18")(num_classes=7).num_classes == 7


@pytest.mark.parametrize("name", ["torchvision.models.resnet:resnet18", "torch.nn:Identity"])
def test_builders_and_networks_of_packages_are_taken(name):
    assert isinstance(build_model(name, num_classes=7), nn.Module)


@pytest.mark.parametrize("name", ["a b:c", "a.:c", ".a:c", "x:y:z", "x:y.z", "pip.__main__:main"])
def test_what_is_no_name_of_python_is_refused(name):
    with pytest.raises(ValueError, match=r"expected a model name|Python's own library"):
        build_model(name, num_classes=7)
