"""The commands that tell: `methods`, `taps`, `recipes` and `config`."""

from typing import Annotated

from softlabels.cli.parsing import UsageError, call, configured

__all__ = ["config", "methods", "recipes", "taps"]


def methods(arguments: list[str]) -> int:
    """List the methods."""

    def methods(kind: str | None = None) -> int:
        """List the methods, what they read, and their settings.

        Args:
            kind: Show this one alone.
        """
        from softlabels.training.config import describe_method
        from softlabels.training.settings import METHOD_SETTINGS, settings_class

        if kind is not None:
            try:
                settings_class(kind)
            except (ValueError, ImportError) as error:
                raise UsageError(str(error)) from error
        print("\n\n".join(describe_method(k) for k in ((kind,) if kind else METHOD_SETTINGS)))
        return 0

    return call(methods, arguments, "methods")


def taps(arguments: list[str]) -> int:
    """Say where a network is tapped."""
    import tyro

    def show_taps(
        model: Annotated[str, tyro.conf.Positional],
        image_size: int | None = None,
        in_channels: int = 3,
        num_classes: int | None = None,
        middle: str | None = None,
        last: str | None = None,
    ) -> int:
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

        for name, value in (("image_size", image_size), ("in_channels", in_channels)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more, got {value}")
        network = build_model(
            model, num_classes=num_classes, in_channels=in_channels, image_size=image_size
        )
        shape = None if image_size is None else (in_channels, image_size, image_size)
        paths = {"middle": middle, "last": last}
        given = {stage: path for stage, path in paths.items() if path is not None}
        print(describe_taps(network, shape, given))
        return 0

    return call(show_taps, arguments, "taps")


def recipes(arguments: list[str]) -> int:
    """List the recipes, or show one."""
    if arguments[:1] == ["show"]:
        return _show_recipe(arguments[1:])

    def list_recipes(
        data: str | None = None, method: str | None = None, table: str | None = None
    ) -> int:
        """List the recipes of the package: a name, what it runs, and what was published.

        `softlabels recipes show NAME` prints one with all of its settings.

        Args:
            data: Only those on this data source, such as cifar100.
            method: Only those of this method, such as uskd, or cross_entropy.
            table: Only those of this table, such as table1.
        """
        from softlabels.experiments.reproduce import describe_recipes

        lines = describe_recipes(data=data, method=method, table=table)
        print("\n".join(lines))
        return 0

    return call(list_recipes, arguments, "recipes")


def _show_recipe(arguments: list[str]) -> int:
    import tyro

    def show(name: Annotated[str, tyro.conf.Positional]) -> int:
        """Print a recipe: its own words, then all settings as they are resolved.

        Args:
            name: One of `softlabels recipes`, or a YAML file.
        """
        from softlabels.training.config import dump, load_recipe, resolve
        from softlabels.training.recipes import read_recipe_text

        resolved = dump(resolve(load_recipe(name)))
        comments = [line for line in read_recipe_text(name).splitlines() if line.startswith("#")]
        print("\n".join([*comments, resolved]), end="")
        return 0

    return call(show, arguments, "recipes show")


def config(arguments: list[str]) -> int:
    """Print a resolved configuration."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: softlabels config show [RECIPE] [OPTIONS]\n\n"
            "Print the configuration that `softlabels train` with the same arguments would use,\n"
            "as YAML that `softlabels train FILE` takes. Recipes in the package:\n"
        )
        from softlabels.training.config import recipe_names

        print("\n".join(f"  {name}" for name in recipe_names()))
        return 0
    if arguments[0] != "show":
        raise UsageError(f"expected `config show`, got {arguments[0]!r}")
    from softlabels.training.config import dump

    print(dump(configured(arguments[1:], "config show")[0]), end="")
    return 0
