"""The table of losses that the common tests run over, and makers of their inputs.

Shapes: B samples, C classes, K votes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softlabels import losses
from softlabels.losses import Method

NUM_VOTES = 9
IGNORED = 255  # a class index that every integer dtype holds

INDICES = "indices"  # [B] class indices
ONE_HOT = "one_hot"  # [B, C], a single label of 1
MIXED = "mixed"  # [B, C], two labels a row, but one in every third row
DENSE = "dense"  # [B, C], every class has a label
NO_TARGET = "no_target"


@dataclass(frozen=True)
class LossCase:
    """One loss with one choice of settings.

    Attributes:
        name: Shown as the test's id.
        function: The pure function.
        module: The module around it.
        inputs: Names of the tensor arguments. `exit_logits_0`, `exit_logits_1` become one list.
        settings: Keyword settings of both; empty for the defaults.
        module_only: Settings that the module alone has.
        target_kinds: The kinds of labels that the loss takes.
        random: It draws; the function is called with torch's generator seeded.
    """

    name: str
    function: Callable[..., Tensor]
    module: type[Method]
    inputs: tuple[str, ...]
    settings: dict[str, object] = field(default_factory=dict)
    module_only: dict[str, object] = field(default_factory=dict)
    target_kinds: tuple[str, ...] = (INDICES, ONE_HOT, MIXED, DENSE)
    random: bool = False

    @property
    def module_settings(self) -> dict[str, object]:
        """Settings of the module."""
        return {**self.settings, **self.module_only}

    def __call__(self, inputs: dict[str, Tensor], **changes: object) -> Tensor:
        """Call the function with the case's settings; `changes` win over them."""
        if self.random and not torch.compiler.is_compiling():
            torch.manual_seed(0)
        return self.function(*self.arguments(inputs), **{**self.settings, **changes})

    def terms(self, inputs: dict[str, Tensor], **changes: object) -> dict[str, Tensor]:
        """The reduced terms of the module with the case's settings; `changes` win over them."""
        if self.random and not torch.compiler.is_compiling():
            torch.manual_seed(0)
        module = self.module(**{**self.module_settings, **changes})
        return module.reduced(*self.module_arguments(inputs))

    def arguments(self, inputs: dict[str, Tensor]) -> tuple[object, ...]:
        """The function's positional arguments."""
        exits = self._exits(inputs)
        if self.function is losses.uskd_loss:
            weak_logits = inputs.get("weak_logits")
            teacher = [inputs["teacher_logits"]] if "teacher_logits" in inputs else []
            return (inputs["logits"], weak_logits, inputs["target"], *teacher)
        if exits:
            return (inputs["logits"], inputs["target"], inputs["votes"], exits)
        return tuple(inputs[name] for name in self.inputs)

    def module_arguments(self, inputs: dict[str, Tensor]) -> tuple[object, ...]:
        """The module's positional arguments: with exits, each brings its own votes."""
        exits = self._exits(inputs)
        if not exits:
            return self.arguments(inputs)
        own, *of_exits = inputs["votes"].tensor_split(1 + len(exits), 1)
        pairs = tuple(t for pair in zip(exits, of_exits, strict=True) for t in pair)
        return (inputs["logits"], inputs["target"], own, pairs)

    def _exits(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(inputs[name] for name in self.inputs if name.startswith("exit_logits"))

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the arguments that get a gradient."""
        names = [n for n in self.inputs if n.endswith("logits") or n.startswith("exit_logits")]
        untrained = {"teacher_logits"}
        if self.settings.get("weak_weight") == 0:
            untrained.add("weak_logits")
        return tuple(name for name in names if name not in untrained)

    @property
    def teacher(self) -> bool:
        """Whether a teacher's logits are read."""
        return "teacher_logits" in self.inputs

    def kept(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B] boolean, the samples that count."""
        kept = torch.ones(len(inputs["logits"]), dtype=torch.bool)
        target = inputs.get("target")
        if target is None:
            return kept
        if self.settings.get("ignore_index") is not None:
            kept &= target != self.settings["ignore_index"]
        if self.settings.get("correct_only"):
            classes = target if target.dim() == 1 else target.argmax(1)
            kept &= inputs["logits"].argmax(1) == classes
        return kept

    def make(
        self,
        target_kind: str,
        batch_size: int = 4,
        num_classes: int = 6,
        dtype: torch.dtype = torch.float32,
        scale: float = 2.0,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Draw inputs; the logits are normal with standard deviation `scale`.

        With `ignore_index` every third sample from the second on is ignored, with `correct_only`
        every second one is predicted correctly.
        """
        generator = torch.Generator().manual_seed(seed)
        inputs: dict[str, Tensor] = {}
        for name in self.inputs:
            if name == "target":
                inputs[name] = make_target(target_kind, batch_size, num_classes, generator)
            elif name == "votes":
                shape = (batch_size, NUM_VOTES)
                inputs[name] = torch.randint(num_classes, shape, generator=generator)
            else:
                drawn = torch.randn(batch_size, num_classes, generator=generator).double()
                inputs[name] = (scale * drawn).to(dtype)
        if self.settings.get("correct_only"):
            target = inputs["target"]
            classes = target if target.dim() == 1 else target.argmax(1)
            logits = inputs["logits"]
            logits[torch.arange(0, batch_size, 2), classes[::2]] = logits.max() + 1
        if self.settings.get("ignore_index") is not None:
            inputs["target"][1::3] = self.settings["ignore_index"]
        return inputs


def make_target(kind: str, batch_size: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Labels of one kind; probabilities are float64 and sum to 1."""
    scores = torch.rand(batch_size, num_classes, generator=generator).double()
    order = scores.argsort(1)
    if kind == INDICES:
        return order[:, 0]
    if kind == DENSE:
        return scores.softmax(1)
    target = torch.zeros(batch_size, num_classes, dtype=torch.float64)
    share = 0.55 + 0.4 * torch.rand(batch_size, 1, generator=generator).double()
    if kind == MIXED:
        share[::3] = 1.0
    elif kind == ONE_HOT:
        share[:] = 1.0
    return target.scatter(1, order[:, :2], torch.cat((share, 1 - share), 1))


NKD_INPUTS = ("logits", "teacher_logits", "target")
USKD_INPUTS = ("logits", "weak_logits", "target")
ZIPF_INPUTS = ("logits", "target", "votes")


def _nkd(name: str, kinds: tuple[str, ...], **settings: object) -> LossCase:
    return LossCase(name, losses.nkd_loss, losses.NKDLoss, NKD_INPUTS, settings, target_kinds=kinds)


def _kd(name: str, **settings: object) -> LossCase:
    inputs = ("logits", "teacher_logits")
    return LossCase(
        name, losses.kd_loss, losses.KDLoss, inputs, settings, target_kinds=(NO_TARGET,)
    )


def _uskd(
    name: str, kinds: tuple[str, ...], inputs: tuple[str, ...] = USKD_INPUTS, **settings: object
) -> LossCase:
    from_teacher = {"target_from": "teacher"} if "teacher_logits" in inputs else {}
    return LossCase(
        name, losses.uskd_loss, losses.USKDLoss, inputs, settings, from_teacher, target_kinds=kinds
    )


def _zipf_ls(
    name: str, kinds: tuple[str, ...], inputs: tuple[str, ...] = ZIPF_INPUTS, **settings: object
) -> LossCase:
    own: dict[str, object] = {} if "votes" in inputs else {"rank_from": "logits"}
    if "exit_logits_0" in inputs:
        own["exit_taps"] = ("early", "late")
    drawn = str(settings.get("distribution", "")).startswith(("random", "sorted"))
    return LossCase(
        name,
        losses.zipf_ls_loss,
        losses.ZipfLSLoss,
        inputs,
        settings,
        own,
        target_kinds=kinds,
        random=drawn,
    )


def _label_smoothing(name: str, kinds: tuple[str, ...], **settings: object) -> LossCase:
    return LossCase(
        name,
        losses.label_smoothing_loss,
        losses.LabelSmoothingLoss,
        ("logits", "target"),
        settings,
        target_kinds=kinds,
    )


ALL_KINDS = (INDICES, ONE_HOT, MIXED, DENSE)
UNSMOOTHED = (INDICES, ONE_HOT, MIXED)
TWO_KINDS = (INDICES, MIXED)

CASES = (
    _nkd("nkd", ALL_KINDS),
    _nkd("nkd_all_labels", UNSMOOTHED, mixed_target="all", temperature=3.0, non_target_weight=0.5),
    _nkd("nkd_rest_all_labels", TWO_KINDS, target_term="T2", mixed_target="all"),
    _nkd(
        "nkd_both_unnormalized",
        TWO_KINDS,
        target_term="both",
        non_target_term="unnormalized",
        temperature=3.0,
    ),
    _nkd("nkd_ignoring", (INDICES,), ignore_index=IGNORED, temperature=2.0),
    _kd("kd"),
    _kd("kd_unit_temperature", temperature=1.0),
    _uskd("uskd", UNSMOOTHED),
    _uskd(
        "uskd_log_probability",
        UNSMOOTHED,
        rank_by="log_probability",
        target_weight=0.1,
        non_target_weight=0.7,
        weak_weight=0.3,
    ),
    _uskd(
        "uskd_tf_nkd",
        TWO_KINDS,
        ("logits", "target"),
        squared=False,
        non_target_weight=0.0,
        weak_weight=0.0,
    ),
    _uskd("uskd_rest", (INDICES,), target_term="T2", rank_from="both_unnormalized"),
    _uskd(
        "uskd_final_both",
        (INDICES,),
        ("logits", "target"),
        target_term="both",
        rank_from="final",
        weak_weight=0.0,
    ),
    _uskd(
        "uskd_teacher",
        TWO_KINDS,
        (*USKD_INPUTS, "teacher_logits"),
        rank_from="weak",
        weak_weight=0.0,
        non_target_weight=0.7,
    ),
    _uskd(
        "uskd_ignoring",
        (INDICES,),
        ignore_index=IGNORED,
        sync_batch_stats=True,
        rank_from="both_unnormalized",
        rank_by="log_probability",
    ),
    _zipf_ls("zipf_ls_votes", ALL_KINDS),
    _zipf_ls("zipf_ls_logits", UNSMOOTHED, ("logits", "target"), mixed_target="all", power=0.5),
    _zipf_ls("zipf_ls_constant", (INDICES,), distribution="constant"),
    _zipf_ls("zipf_ls_linear", TWO_KINDS, distribution="linear_decay", smallest_probability=0.01),
    _zipf_ls(
        "zipf_ls_exponential",
        TWO_KINDS,
        ("logits", "target"),
        distribution="exponential_decay",
        decay=0.4,
        mixed_target="all",
    ),
    _zipf_ls(
        "zipf_ls_unbiased",
        TWO_KINDS,
        distribution="unbiased_zipf",
        lower_bound=0.01,
        upper_bound=2.0,
    ),
    _zipf_ls(
        "zipf_ls_unbiased_logits",
        (INDICES,),
        ("logits", "target"),
        distribution="unbiased_zipf",
        power=1.5,
    ),
    _zipf_ls("zipf_ls_uniform_draws", (INDICES,), distribution="random_uniform"),
    _zipf_ls("zipf_ls_gaussian_draws", (INDICES,), distribution="random_gaussian"),
    _zipf_ls("zipf_ls_pareto_draws", TWO_KINDS, distribution="random_pareto"),
    _zipf_ls("zipf_ls_sorted_draws", TWO_KINDS, distribution="sorted_pareto"),
    _zipf_ls("zipf_ls_correct", TWO_KINDS, correct_only=True),
    _zipf_ls(
        "zipf_ls_exits",
        (INDICES,),
        (*ZIPF_INPUTS, "exit_logits_0", "exit_logits_1"),
        exit_weight=0.3,
        ignore_index=IGNORED,
    ),
    _label_smoothing("label_smoothing", ALL_KINDS),
    _label_smoothing(
        "label_smoothing_non_target", ALL_KINDS, smooth_over="non_target", smoothing=0.3
    ),
    _label_smoothing("label_smoothing_ignoring", (INDICES,), ignore_index=IGNORED),
)

BY_NAME = {case.name: case for case in CASES}
# One case for each loss, with the settings that its method has by default.
PLAIN_CASES = tuple(
    BY_NAME[name] for name in ("nkd", "kd", "uskd", "zipf_ls_votes", "label_smoothing")
)
CASES_AND_KINDS = tuple((case, kind) for case in CASES for kind in case.target_kinds)
CASES_AND_INDICES = tuple((case, case.target_kinds[0]) for case in CASES)
CASES_AND_MAIN_KINDS = tuple(
    (case, kind) for case, kind in CASES_AND_KINDS if kind in (INDICES, MIXED, NO_TARGET)
)


def deterministic(pairs: Iterable[tuple[LossCase, str]]) -> list[tuple[LossCase, str]]:
    """The pairs whose case draws nothing: draws depend on dtype, layout and transform."""
    return [pair for pair in pairs if not pair[0].random]


def case_id(value: object) -> str | None:
    """Name of a case, for pytest's ids."""
    return value.name if isinstance(value, LossCase) else None


def gradients(
    case: LossCase, inputs: dict[str, Tensor], **changes: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients with respect to the trained inputs (fresh leaves)."""
    leaves = {
        name: tensor.detach().clone().requires_grad_() if name in case.trained else tensor
        for name, tensor in inputs.items()
    }
    loss = case(leaves, **changes)
    loss.sum().backward()
    found: dict[str, Tensor] = {}
    for name in case.trained:
        gradient = leaves[name].grad
        assert gradient is not None, f"{name} got no gradient"
        found[name] = gradient
    return loss.detach(), found
