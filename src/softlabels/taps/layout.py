"""Finds the middle feature, the last map and the head of a model by one dry run."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.taps.dry_run import DryRun, Record, example_shape_of, inside, undisturbed, within
from softlabels.taps.feature_tap import FeatureTap, Kind, TapPoint, find_module
from softlabels.taps.position_head import PositionHead
from softlabels.taps.published import published_tap
from softlabels.taps.stages import activation_after, last_classifier, norm_before, num_layers

__all__ = ["Layout"]

_STAGE_NAME = re.compile(r"(stage|block):(-?\d+)")
_NUM_SPACED = 4  # as many as the stages of most pyramids


class Layout:
    """What a dry run tells of a model: where its features are, and how wide.

    The dry run is in eval mode without gradient; it leaves the model's mode and buffers and the
    random state as they were.

    Args:
        model: Any image classifier, [B, C, H, W] -> [B, classes].
        example_shape: (C, H, W) of an image. None: the channels of the first convolution, and
            the size in the model's own configuration or 224.
        overrides: Paths to use for `"middle"` and `"last"` in place of those found.

    Attributes:
        example_shape: (C, H, W), as used.
        num_classes: Width of the model's logits.
        dry_run: What every module returned.

    Raises:
        ValueError: The dry run fails, or the model gives no [B, classes] logits.
    """

    def __init__(
        self,
        model: nn.Module,
        example_shape: Sequence[int] | None = None,
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        self._model = model
        self._overrides = dict(overrides or {})
        for stage, path in self._overrides.items():
            if stage not in ("middle", "last"):
                raise ValueError(f"taps must name 'middle' or 'last', got {stage!r}")
            find_module(model, path)
        self.example_shape = example_shape_of(model, example_shape)
        self.dry_run = DryRun(model, self.example_shape)
        self.num_classes = self.dry_run.num_classes
        self._stages: list[str] | None = None

    def example(self) -> Tensor:
        """Two images of noise on the model's device, in its dtype."""
        return self.dry_run.example()

    def expanded(self, stages: Sequence[str]) -> list[str]:
        """Names of single stages, with `"stages"` replaced by all of the network."""
        names: list[str] = []
        for stage in stages:
            all_stages = range(len(self.stages())) if stage == "stages" else ()
            names += [f"stage:{k}" for k in all_stages] or [stage]
        return names

    def stages(self) -> list[str]:
        """Paths of the stages, shallow to deep: one a resolution, or evenly spaced blocks.

        Raises:
            ValueError: No rule finds any.
        """
        if self._stages is None:
            last = self._require_last()
            if self.dry_run.size(last) is None:
                blocks = self.blocks()
                ends = (math.ceil(len(blocks) * k / _NUM_SPACED) for k in range(1, _NUM_SPACED + 1))
                self._stages = [blocks[end - 1] for end in dict.fromkeys(ends)]
            else:
                self._stages = self._pyramid(last)
        return self._stages

    def _pyramid(self, last: Record) -> list[str]:
        """One place for each resolution of a CNN's maps; the deepest is the last map.

        Of the others single layers, such as stems, are none, unless the network has nothing else.
        """
        size_of, final = self.dry_run.size, self.dry_run.size(last)
        before = [record for record in self.dry_run.places if record.finished < last.finished]
        sizes = {size for record in before if (size := size_of(record)) is not None}
        falling = sorted(sizes, key=math.prod, reverse=True)
        larger = [size for size in falling if final is None or math.prod(size) > math.prod(final)]
        paths = [record.path for record in before]
        deep = [path for path in paths if num_layers(find_module(self._model, path)) > 1]
        for among in (deep, paths):
            found = [x for size in larger if (x := self._child_of_size(size, among)) is not None]
            if found:
                return [*dict.fromkeys([*found, last.path])]
        return [last.path]

    def blocks(self) -> list[str]:
        """Paths of the longest run of blocks of one class that return tokens.

        Raises:
            ValueError: There is no such run.
        """

        def block_class(child: tuple[str, nn.Module]) -> type[nn.Module] | None:
            path, module = child
            record = self.dry_run.place(path)
            if record is None or next(module.children(), None) is None:
                return None
            return type(module) if self.dry_run.kind(record) == "tokens" else None

        runs: list[list[str]] = [[]]
        for path, module in self._model.named_modules():
            children = [(f"{path}.{n}" if path else n, c) for n, c in module.named_children()]
            for of_class, run in groupby(children, block_class):
                runs += [[child for child, _ in run]] if of_class else []
        blocks = max(runs, key=len)
        if len(blocks) < 2:
            raise ValueError(
                f"found no run of blocks that return tokens in {type(self._model).__name__}: it "
                "needs a vision transformer where a method reads transformer blocks ('block:K'); "
                "name a middle with taps={'middle': 'path.of.module'}"
            )
        return blocks

    def before_activation(self, stage: str) -> TapPoint:
        """The tap for a stage, before the activation that ends it, if one does.

        Where a network normalizes a stage's output before it goes on (pre-activation networks),
        it is what comes out of that norm.

        Raises:
            ValueError: As `point`.
        """
        point = self.point(stage)
        place = self._place(point)
        norm = norm_before(self._model, self.dry_run, place)
        if norm is not None and norm.started > place.finished:
            point = self.at(norm.path)
        activation = activation_after(self._model, self.dry_run, self._place(point))
        return point if activation is None else replace(point, path=activation, of_input=True)

    def _place(self, point: TapPoint) -> Record:
        record = self.dry_run.place(point.path)
        assert record is not None  # `at` has seen to it
        return record

    def norm(self, stage: str) -> nn.BatchNorm2d:
        """The BatchNorm that the map of a stage before its activation comes out of.

        Raises:
            ValueError: There is none, or as `point`.
        """
        point = self.point(stage)
        norm = norm_before(self._model, self.dry_run, self._place(point))
        module = None if norm is None else find_module(self._model, norm.path)
        if not isinstance(module, nn.BatchNorm2d) or not module.affine:
            raise ValueError(
                f"needs a BatchNorm with weight and bias at the end of {point.path!r} of "
                f"{type(self._model).__name__}, found none"
            )
        return module

    def classifier(self) -> nn.Linear:
        """The last layer, which makes the logits of the pooled feature.

        Raises:
            ValueError: The logits do not come out of a linear layer.
        """
        layer = last_classifier(self._model, self.dry_run)
        module = None if layer is None else find_module(self._model, layer.path)
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"needs a linear classifier at the end of {type(self._model).__name__}, found none"
            )
        return module

    def point(self, stage: str) -> TapPoint:
        """The tap for `"middle"`, `"last"`, `"stage:K"`, `"block:K"`, or a dotted path.

        Raises:
            ValueError: No such module, it gives no feature, or no rule finds the stage.
        """
        if numbered := _STAGE_NAME.fullmatch(stage):
            kind, number = numbered[1], int(numbered[2])
            paths = self.blocks() if kind == "block" else self.stages()
            if not -len(paths) <= number < len(paths):
                raise ValueError(f"{stage!r} does not exist: the network has {len(paths)} {kind}s")
            return self.at(paths[number])
        path = self._overrides.get(stage)
        if path is not None or stage != "middle":
            return self.at(path or self.found(stage))
        published = published_tap(self._model)
        layer_norm = published is not None and published[0].layer_norm
        return replace(self.at(self.found(stage)), layer_norm=layer_norm)

    def at(self, path: str) -> TapPoint:
        """The tap at a dotted path.

        Raises:
            ValueError: No such module, or it gives no feature.
        """
        find_module(self._model, path)
        num_calls = self.dry_run.num_calls(path)
        if num_calls > 1:
            raise ValueError(
                f"module {path!r} runs {num_calls} times in a forward and cannot be tapped; name "
                "one that runs once"
            )
        record = self.dry_run.place(path)
        kind = self.dry_run.kind(record) if record else None
        if record is None or kind is None:
            raise ValueError(f"module {path!r} returns no map, tokens or vector in a forward")
        return self._described(record, kind)

    def found(self, stage: str) -> str:
        """The path that the rules find for `"middle"` or `"last"`; any other is a path itself.

        Raises:
            ValueError: No rule finds the stage.
        """
        if stage == "middle":
            return self._middle_path()
        return self._require_last().path if stage == "last" else stage

    def _described(self, record: Record, kind: Kind) -> TapPoint:
        shape = record.shape
        size = self.dry_run.size(record)
        if size is not None:
            return TapPoint(record.path, kind, shape[1 if kind == "NCHW" else 3], *size)
        if kind == "vector":
            return TapPoint(record.path, kind, shape[1])
        class_token = any(
            name.rpartition(".")[2] in ("cls_token", "class_token")
            for name, _ in self._model.named_parameters()
        )
        prefix = getattr(self._model, "num_prefix_tokens", int(class_token))
        prefix = prefix if isinstance(prefix, int) and prefix < shape[1] else int(class_token)
        last = self.dry_run.last
        if last is not None and shape[1] + prefix == last.shape[1]:
            prefix, class_token = 0, False  # it joins later, as in CaiT and XCiT
        num_patches = shape[1] - prefix
        image_height, image_width = self.example_shape[1:]
        rows = round(math.sqrt(num_patches * image_height / image_width))
        columns = num_patches // max(rows, 1)
        grid = (rows, columns) if rows * columns == num_patches else (1, num_patches)
        return TapPoint(record.path, kind, shape[2], *grid, prefix, class_token)

    def _require_last(self) -> Record:
        record = self.dry_run.last
        if record is None:
            raise ValueError(
                f"found no last map or tokens in {type(self._model).__name__}; name one with "
                "taps={'last': 'path.of.module'}"
            )
        return record

    def _middle_path(self) -> str:
        published = published_tap(self._model)
        if published is not None and published[1] is not None:
            return published[1]
        last = self._require_last()
        size = self.dry_run.size(last)
        if size is None:
            blocks = self.blocks()
            return blocks[len(blocks) // 2 - 1]
        child = self._child_of_size((2 * size[0], 2 * size[1]))
        return self._middle_without_halving(last, size) if child is None else child

    def _children(self, path: str) -> list[str]:
        """Paths of the direct children, in the order in which they finish."""
        names = [name for name, _ in find_module(self._model, path).named_children()]
        paths = [f"{path}.{name}" if path else name for name in names]

        def finished(child: str) -> int:
            records = (r for r in self.dry_run.records if within(r.path, child))
            return max((record.finished for record in records), default=0)

        return sorted(paths, key=finished)

    def _child_of_size(
        self, size: tuple[int, int], among: Collection[str] | None = None
    ) -> str | None:
        """The last child with a map of this size, at the first level that has one."""
        paths = [
            r.path
            for r in self.dry_run.places
            if self.dry_run.size(r) == size and (among is None or r.path in among)
        ]
        level = ""
        while True:
            children = self._children(level)[::-1]
            found = next((child for child in children if child in paths), None)
            deeper = (c for c in children if any(inside(path, c) for path in paths))
            level = next(deeper, "") if found is None else ""
            if not level:
                return found

    def _middle_without_halving(self, last: Record, final: tuple[int, int]) -> str:
        """The last child above the final resolution, or the stage before the last."""
        sizes = map(self.dry_run.size, reversed(self.dry_run.places))
        above = next((size for size in sizes if size and math.prod(size) > math.prod(final)), None)
        path = None if above is None else self._child_of_size(above)
        path = path or self._second_to_last_stage(last)
        warnings.warn(
            f"{type(self._model).__name__} has no map at twice the final resolution {final}: "
            f"taking {path!r} as its middle; choose another with "
            "taps={'middle': 'path.of.module'}",
            stacklevel=2,
        )
        return path

    def _second_to_last_stage(self, last: Record) -> str:
        level = ""
        while True:
            children = self._children(level)
            stages = [
                child
                for child in children
                if (record := self.dry_run.place(child)) is not None
                and record.has_parameters
                and record.finished <= last.finished
                and self.dry_run.size(record) is not None
            ]
            if len(stages) > 1:
                return stages[-2]
            inner = [child for child in children if self._children(child)]
            if not inner:
                raise ValueError(
                    f"found no middle feature in {type(self._model).__name__}; name one with "
                    "taps={'middle': 'path.of.module'}"
                )
            level = stages[0] if stages and stages[0] in inner else inner[0]

    def _depends_on_mode(self, path: str) -> bool:
        module = find_module(self._model, path)
        if isinstance(module, nn.Dropout | nn.Dropout2d | nn.AlphaDropout):
            return module.p > 0
        return isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm)

    def head(self) -> PositionHead:
        """The model's own classifier, to be applied at each position of the last map.

        Raises:
            ValueError: The last feature has no positions, or the modules after it cannot work at
                a single one.
        """
        point = self.point("last")
        if point.height * point.width == 0:
            raise ValueError(
                f"{point.path!r} gives no patch tokens to vote; choose a map with "
                "taps={'last': 'path.of.module'}"
            )
        record = self._place(point)
        later = [r for r in self.dry_run.records if r.started > record.finished]
        mode_dependent = tuple(r.path for r in later if self._depends_on_mode(r.path))
        if record is self.dry_run.last and self.dry_run.in_two_halves:
            if getattr(self._model, "drop_rate", 0):
                mode_dependent = ("", *mode_dependent)
            head = PositionHead(point, None, False, mode_dependent, self.num_classes)
            self._check_single_positions(head)
            return head
        steps = tuple(
            (r.path, r.input_dims)
            for r in later
            if not any(inside(r.path, other.path) for other in later)
        )
        for activation in (False, True):
            head = PositionHead(point, steps, activation, mode_dependent, self.num_classes)
            if self.gives_the_logits(head):
                return head
        raise ValueError(
            f"votes need a classifier that works at a single position of the last map "
            f"({point.path!r}, {point.height}x{point.width}): the modules after it "
            f"({', '.join(path for path, _ in steps) or 'none'}) do not give the model's logits "
            "from the pooled map; choose another map with taps={'last': 'path.of.module'}"
        )

    def gives_the_logits(self, head: PositionHead) -> bool:
        """Whether a head makes the model's logits of the pooled map."""
        path = head.point.path
        with undisturbed(self._model), FeatureTap(self._model, [path]) as tap:
            logits = self.dry_run.forward()
            feature = tap.pop()[path]
            tap.enabled = False
            values = functional.relu(feature) if head.activation else feature
            try:
                pooled = head.logits(self._model, head.point.pooled(values))
            except (RuntimeError, ValueError, TypeError):
                return False
        return pooled.shape == logits.shape and torch.allclose(pooled, logits, rtol=1e-3, atol=1e-4)

    def _check_single_positions(self, head: PositionHead) -> None:
        positions = self.example().new_zeros(2, head.point.channels)
        error: Exception | None = None
        try:
            with undisturbed(self._model):
                shape = tuple(head.logits(self._model, positions).shape)
        except (RuntimeError, ValueError, TypeError, AssertionError) as raised:
            error, shape = raised, ()
        if shape != (2, self.num_classes):
            point = head.point
            raise ValueError(
                f"votes need a classifier that works at a single position of the last map "
                f"({point.path!r}, {point.height}x{point.width}): forward_head of "
                f"{type(self._model).__name__} does not ({error or f'it gives {shape}'})"
            ) from error
