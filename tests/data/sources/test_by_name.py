import inspect
import typing

import pytest

from shared.data_files import write_idx
from softlabels.data import open_source
from softlabels.data.sources.by_name import SOURCES
from softlabels.data.sources.folder import FolderSource


def test_without_anything_it_is_the_embedded_glyphs():
    assert open_source().info.name == "glyphs100"
    assert open_source(num_fonts=2).num_train == 200


def test_a_path_decides_by_what_it_holds(image_folder, tmp_path):
    assert open_source(path=str(write_idx(tmp_path / "mnist"))).info.in_channels == 1
    folder = open_source(path=str(image_folder), image_size=16, workers=0)
    assert isinstance(folder, FolderSource)
    assert folder.info.image_size == (16, 16)


def test_a_source_can_be_named(image_folder):
    assert open_source("folder", str(image_folder)).num_train == 23
    with pytest.raises(ValueError, match="has no file train-images-idx3-ubyte"):
        open_source("idx", str(image_folder))


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (
            ("folders",),
            {},
            "unknown data source 'folders', expected glyphs100, cifar100, cifar10, .*; "
            "did you mean 'folder'",
        ),
        (
            ("xyz",),
            {},
            "unknown data source 'xyz', expected glyphs100, cifar100, .*, folder, noise$",
        ),
        (("folder",), {}, "the data source 'folder' needs a path, got none"),
        (("glyphs100", "some"), {}, "'glyphs100' takes no path, got 'some'"),
        (
            (),
            {"num_font": 3},
            "'glyphs100' has no setting 'num_font', expected num_fonts, .*mean 'num_fonts'",
        ),
        (
            ("folder", "x"),
            {"rotation": 3},
            "'folder' has no setting 'rotation', expected .*, mean, ",
        ),
    ],
)
def test_wrong_names_are_told(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        open_source(*arguments, **settings)


@pytest.mark.parametrize("name", SOURCES)
def test_every_setting_has_a_default_a_type_and_a_description(name):
    constructor = SOURCES[name].open
    # A class need not describe again what those that it builds on do.
    described = inspect.getmro(constructor) if inspect.isclass(constructor) else [constructor]
    documentation = "\n".join(filter(None, map(inspect.getdoc, described)))
    parameters = inspect.signature(constructor, eval_str=True).parameters
    settings = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert settings
    for parameter in settings:
        assert parameter.default is not parameter.empty
        assert parameter.annotation is not parameter.empty
        assert not isinstance(parameter.annotation, str)
        assert typing.get_origin(parameter.annotation) is not list
        assert f"\n    {parameter.name}: " in documentation
