"""Says where features of a model are found, how votes are made, and what else could be tapped."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from softlabels.taps.dry_run import DryRun, inside
from softlabels.taps.feature_tap import TapPoint, find_module
from softlabels.taps.layout import Layout
from softlabels.taps.published import published_tap
from softlabels.taps.stages import Classifier, last_classifier, num_layers

__all__ = ["Classifier", "Finding", "TapSurvey", "describe_taps"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for in a model.

    Attributes:
        point: The tap; None if there is none.
        text: The kind of feature, its width and size in words; or why there is none.
        notes: What to know of it, a sentence each.
    """

    point: TapPoint | None
    text: str
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Dotted name of the tapped module; empty if there is none."""
        return "" if self.point is None else self.point.path


@dataclass(frozen=True)
class TapSurvey:
    """What `describe_taps` found; `str()` of it is a text of some lines.

    Attributes:
        model: Name of the model's class.
        example_shape: (C, H, W) of the images of the dry run.
        num_classes: Width of the logits.
        middle: The feature in the middle, read by `WeakLogits` (USKD).
        last: The last map or tokens.
        votes: How the positions of the last map vote (`Votes`, read by Zipf's LS).
        classifier: None if no layer gives the logits.
        others: Further stages and blocks, in the order in which they end.
    """

    model: str
    example_shape: tuple[int, int, int]
    num_classes: int
    middle: Finding
    last: Finding
    votes: Finding
    classifier: Classifier | None
    others: tuple[Finding, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The text, by lines without their ends."""
        size = "x".join(map(str, self.example_shape))
        lines = [f"{self.model}, images of {size}, {self.num_classes} classes", ""]
        layer = self.classifier
        rows = [
            ("middle", self.middle.path, self.middle.text, self.middle.notes),
            ("last", self.last.path, self.last.text, self.last.notes),
            ("votes", "", self.votes.text, self.votes.notes),
            ("classifier", "", "found no linear layer that gives the logits", ())
            if layer is None
            else ("classifier", layer.path, f"{layer.in_features} -> {layer.out_features}", ()),
        ]
        width = max(len(path) for _, path, _, _ in rows)
        for name, path, text, notes in rows:
            lines.append(f"{name:12}{path:{width}}  {text}" if path else f"{name:12}{text}")
            lines.extend(f"{'':12}- {note}" for note in notes)
        if self.others:
            lines += ["", "also possible, with taps={'middle': PATH} or {'last': PATH}:"]
            places = list(_runs(self.others))
            width = max(len(path) for path, _ in places)
            lines += [f"  {path:{width}}  {text}" for path, text in places]
        return lines


def describe_taps(
    model: nn.Module,
    example_shape: Sequence[int] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> TapSurvey:
    """Say where the features of a model are found, by a dry run that leaves the model as it was.

    Args:
        model: As of `Layout`, and so the others.
        example_shape: (C, H, W) of an image, or None.
        overrides: Paths to look at as `"middle"` and `"last"` in place of those found.

    Returns:
        The survey. Where a feature is not found, it holds the reason.

    Raises:
        TypeError: The model is no module.
        ValueError: The dry run fails, the model gives no [B, classes] logits, an override names
            no module, or there is nothing at all to tap.

    Example:
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1),
        ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        ... )
        >>> survey = describe_taps(model, (3, 16, 16))
        >>> survey.middle.point.path, survey.last.text
        ('0', 'map, 8x8, 8 channels')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layout = Layout(model, example_shape, overrides)
    classifier = last_classifier(model, layout.dry_run)
    middle, last = _finding(model, layout, "middle"), _finding(model, layout, "last")
    found = {finding.path for finding in (middle, last)} - {""}
    others = tuple(
        Finding(point, _words(model, point))
        for path in _places(model, layout.dry_run, classifier)
        if path not in found and (point := _point(layout, path)) is not None
    )
    if not found and not others:
        raise ValueError(
            f"found nothing to tap in {type(model).__name__}: no module but the classifier gives "
            "a map, tokens or a vector, from one call in a forward"
        )
    return TapSurvey(
        model=type(model).__name__,
        example_shape=layout.example_shape,
        num_classes=layout.num_classes,
        middle=middle,
        last=last,
        votes=_votes(layout) if last.point else Finding(None, "none without a last map"),
        classifier=classifier,
        others=others,
    )


def _finding(model: nn.Module, layout: Layout, stage: str) -> Finding:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            point = layout.point(stage)
        except ValueError as error:
            return Finding(None, str(error))
    notes = [str(warning.message) for warning in caught]
    text = _words(model, point)
    if stage == "middle" and point.kind != "vector":
        text += f"; read as the {'class token' if point.class_token else 'mean over positions'}"
        text += " after a LayerNorm of its own" if point.layer_norm else ""
    if stage == "middle" and not notes:
        notes = _of_published_runs(model, layout, point)
    return Finding(point, text, tuple(notes))


def _of_published_runs(model: nn.Module, layout: Layout, middle: TapPoint) -> list[str]:
    """How a middle feature compares to that of the published runs of this family of networks."""
    published = published_tap(model)
    if published is None:
        return []
    tap = published[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = layout.found("middle")
    runs = f"the published runs of {tap.family} tapped"
    return [f"{runs} {path}: {tap.place}" if middle.path != path else f"where {runs}: {tap.place}"]


def _words(model: nn.Module, point: TapPoint) -> str:
    width = f"{point.channels} channels"
    if point.kind == "vector":
        return f"vector, {width}"
    size = f"{point.height}x{point.width}"
    if point.kind == "tokens":
        token = "class token and " if point.class_token else ""
        return f"{token}{size} patch tokens, {width}"
    module = find_module(model, point.path)
    kind = "CNN stage" if _is_container(module) else "CNN block"
    kind = "map" if num_layers(module) < 2 else kind
    if point.kind == "NHWC":
        kind = f"{kind.removeprefix('CNN ')} with channels last"
    return f"{kind}, {size}, {width}"


def _votes(layout: Layout) -> Finding:
    try:
        head = layout.head()
    except ValueError as error:
        return Finding(None, str(error))
    point = head.point
    notes = []
    if head.steps is None:
        how = "each position through the model's own forward_head"
        if not layout.gives_the_logits(head):
            notes.append(
                "the head does not begin with a mean over positions: each position votes as if "
                "the whole map were like it"
            )
    else:
        steps = [*(["a ReLU"] if head.activation else []), *(path for path, _ in head.steps)]
        how = f"each position through {', '.join(steps) or 'no layer: its channels are classes'}"
    if point.class_token:
        notes.append(
            "the class token predicts: the task's loss trains no patch token, so that votes may "
            "mean little (the share that agrees is logged)"
        )
    num_votes = point.height * point.width
    return Finding(point, f"{num_votes} an image, {how}", tuple(notes))


def _point(layout: Layout, path: str) -> TapPoint | None:
    try:
        return layout.at(path)
    except ValueError:
        return None


def _places(model: nn.Module, run: DryRun, classifier: Classifier | None) -> list[str]:
    """Paths of stages and blocks, and of single layers with weights beside them.

    Blocks are not looked into: what is inside of a residual branch is no feature of the network.
    """
    paths: list[str] = []

    def visit(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            if num_layers(child):
                paths.append(child_path)
            if num_layers(child) > 1 and _is_container(child):
                visit(child_path, child)

    visit("", model)
    head = classifier.path if classifier else ""
    finished = {record.path: record.finished for record in run.places}
    places = [
        path for path in paths if path in finished and path != head and not inside(head, path)
    ]
    return sorted(places, key=finished.__getitem__)


def _is_container(module: nn.Module) -> bool:
    """Whether a module is a row of blocks, or holds one."""
    children = list(module.children())
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or _is_row(children):
        return True
    return any(
        isinstance(child, nn.Sequential | nn.ModuleList) and _is_row([*child.children()], least=1)
        for child in children
    )


def _is_row(modules: Sequence[nn.Module], least: int = 2) -> bool:
    """Whether so many modules are blocks of one class, not the sequences of layers inside one."""
    blocks = Counter(
        type(module)
        for module in modules
        if num_layers(module) > 1 and not isinstance(module, nn.Sequential)
    )
    return max(blocks.values(), default=0) >= least


def _runs(findings: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """Path and words of each finding; neighbors in one container that are alike share a row."""
    points = [(finding.point, finding.text) for finding in findings if finding.point is not None]
    for (_, text), group in groupby(points, lambda p: (p[0].path.rpartition(".")[0], p[1])):
        paths = [point.path for point, _ in group]
        if len(paths) < 3:
            yield from ((path, text) for path in paths)
        else:
            yield f"{paths[0]} ... {paths[-1]}", f"{text} ({len(paths)} places)"
