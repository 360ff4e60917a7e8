"""The section about wrong answers: within groups of similar classes, and by pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from softlabels.report.canvas import printable, shorten
from softlabels.report.entries import (
    Bar,
    BarTable,
    Block,
    Entry,
    Section,
    has_seeds,
    same_classes,
    without,
)
from softlabels.training.schemas import Analysis

_PAIRS, _GROUPS, _GROUP_NAME = 15, 25, 40

Confusion = defaultdict[tuple[int, int], float]
Tally = defaultdict[int | str | None, float]
Rows = tuple[tuple[str, tuple[Bar, ...]], ...]


def confusion_sections(entries: Sequence[Entry]) -> list[Section]:
    """Where wrong answers go: within groups of similar classes, and the most confused pairs."""
    known = [entry for entry in entries if entry.analyses]
    known = [entry for entry in known if same_classes(entry, known[0])]
    if not known:
        return []
    facts = known[0].analyses[0]
    names = [printable(name) for name in facts.class_names]
    counts = [_confusion(entry.analyses) for entry in known]
    seeds = ", mean over seeds" if has_seeds(entries) else ""
    remark = f"{seeds}{without(entries, lambda entry: entry in known)}."

    def table(heading: str, text: str, corner: str, rows: Rows) -> list[Block]:
        bars = BarTable(corner, tuple(known), rows)
        return [Block(text + remark, heading=heading, table=bars)] if rows else []

    blocks = (
        *table(
            "Errors within groups",
            "Share of the wrong answers that stay in the true class's group of similar classes",
            "group",
            _group_rows(facts.groups or (), names, counts),
        ),
        *table(
            "Most confused classes",
            f"Number of the {facts.images:,} test images of the first class that are taken for the "
            "second",
            "true \u2192 answer",
            _pair_rows(names, counts, digits=int(has_seeds(entries))),
        ),
    )
    return [Section("confusion", "Confusion", blocks)] if blocks else []


def _confusion(analyses: Sequence[Analysis]) -> Confusion:
    """Mean number of images of a class that are taken for another one."""
    counts = Confusion(float)
    for analysis in analyses:
        for true, predicted, count in analysis.confusion:
            if true != predicted:
                counts[true, predicted] += count / len(analyses)
    return counts


def _pair_rows(names: Sequence[str], counts: Sequence[Confusion], *, digits: int) -> Rows:
    """The pairs with the most confusions in all entries together."""
    totals = Confusion(float)
    for one in counts:
        for pair, count in one.items():
            totals[pair] += count
    chosen = sorted(totals, key=lambda pair: (-totals[pair], pair))[:_PAIRS]
    most = max((one[pair] for one in counts for pair in chosen), default=0.0) or 1.0
    return tuple(
        (
            f"{names[true]} \u2192 {names[predicted]}",
            tuple(
                Bar(f"{one[true, predicted]:.{digits}f}", one[true, predicted] / most)
                for one in counts
            ),
        )
        for true, predicted in chosen
    )


def _group_rows(
    groups: Sequence[int | str], names: Sequence[str], counts: Sequence[Confusion]
) -> Rows:
    """Shares of errors within each group that has several classes, and within all of them."""
    members: dict[int | str, list[str]] = {}
    for name, group in zip(names, groups, strict=False):
        members.setdefault(group, []).append(name)
    tallies = [_tally(groups, one) for one in counts if groups]
    errors = {group: sum(total[group] for _, total in tallies) for group in members}
    several = [group for group in members if len(members[group]) > 1 and errors[group]]
    chosen = sorted(several, key=lambda group: -errors[group])[:_GROUPS]
    shown = {group: shorten(" ".join(members[group]), _GROUP_NAME) for group in chosen}
    return tuple(
        (name, tuple(_share(within[group], total[group]) for within, total in tallies))
        for group, name in ((None, "all classes"), *shown.items())
        if shown
    )


def _tally(groups: Sequence[int | str], counts: Confusion) -> tuple[Tally, Tally]:
    """For each group, and None for all, the errors that stay in their group, and all errors."""
    within, total = Tally(float), Tally(float)
    for (true, predicted), count in counts.items():
        for group in (groups[true], None):
            total[group] += count
            within[group] += count if groups[predicted] == groups[true] else 0.0
    return within, total


def _share(part: float, whole: float) -> Bar:
    return Bar(f"{100 * part / whole:.1f} %", part / whole) if whole else Bar("")
