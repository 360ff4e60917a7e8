"""The commands that tell: `methods`, `taps`, `recipes` and `config`."""

from tyro.conf import Positional

from softlabels.cli.parsing import Count, UsageError, command, configured

__all__ = ["config", "methods", "recipes", "taps"]


@command("methods")
def methods(kind: str | None = None) -> None:
    """List the methods, what they read, and their settings.

    Args:
        kind: Show this one alone.
    """
    from softlabels.training.config import describe_method
    from softlabels.training.settings import METHOD_SETTINGS

    try:
        print("\n\n".join(map(describe_method, METHOD_SETTINGS if kind is None else [kind])))
    except ImportError as error:  # of the user's own module
        raise UsageError(str(error)) from error


@command("taps")
def taps(
    model: Positional[str],
    image_size: Count | None = None,
    in_channels: Count = 3,
    num_classes: int | None = None,
    middle: str | None = None,
    last: str | None = None,
) -> None:
    """Say where a network's features are read, how its positions vote, and what else could be.

    Args:
        model: timm:NAME, torchvision:NAME, file:PATH or package.module:function.
        image_size: Height and width of the images; the model's own size, or 224.
        in_channels: Channels of the images.
        num_classes: Number of classes; the model's own.
        middle: Path of a module to look at as the feature in the middle.
        last: Path of a module to look at as the last map.
    """
    from softlabels.models import build_model
    from softlabels.taps import describe_taps

    network = build_model(
        model, num_classes=num_classes, in_channels=in_channels, image_size=image_size
    )
    shape = None if image_size is None else (in_channels, image_size, image_size)
    paths = {"middle": middle, "last": last}
    given = {stage: path for stage, path in paths.items() if path is not None}
    print(describe_taps(network, shape, given))


def recipes(arguments: list[str]) -> None:
    """List the recipes, or show one."""
    if arguments[:1] == ["show"]:
        _show_recipe(arguments[1:])
    else:
        _list_recipes(arguments)


@command("recipes")
def _list_recipes(
    data: str | None = None, method: str | None = None, table: str | None = None
) -> None:
    """List the recipes of the package: a name, what it runs, and what was published.

    `softlabels recipes show NAME` prints one with all of its settings.

    Args:
        data: Only those on this data source, such as cifar100.
        method: Only those of this method, such as uskd, or cross_entropy.
        table: Only those of this table, such as table1.
    """
    from softlabels.experiments.reproduce import describe_recipes

    print("\n".join(describe_recipes(data=data, method=method, table=table)))


@command("recipes show")
def _show_recipe(name: Positional[str]) -> None:
    """Print a recipe: its own words, then all settings as they are resolved.

    Args:
        name: One of `softlabels recipes`, or a YAML file.
    """
    from softlabels.training.config import dump, load_recipe, resolve
    from softlabels.training.recipes import read_recipe_text

    resolved = dump(resolve(load_recipe(name)))
    comments = [line for line in read_recipe_text(name).splitlines() if line.startswith("#")]
    print("\n".join([*comments, resolved]), end="")


def config(arguments: list[str]) -> None:
    """Print a resolved configuration."""
    from softlabels.training.config import dump, recipe_names

    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: softlabels config show [RECIPE] [OPTIONS]\n\n"
            "Print the configuration that `softlabels train` with the same arguments would use,\n"
            "as YAML that `softlabels train FILE` takes. Recipes in the package:\n"
        )
        print("\n".join(f"  {name}" for name in recipe_names()))
    elif arguments[0] == "show":
        print(dump(configured(arguments[1:], "config show")[0]), end="")
    else:
        raise UsageError(f"expected `config show`, got {arguments[0]!r}")
