"""The section about wrong answers: within groups of similar classes, and by pairs."""

from __future__ import annotations

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

Confusion = dict[tuple[int, int], float]
Tally = dict[int | str, float]
Rows = tuple[tuple[str, tuple[Bar, ...]], ...]


def confusion_sections(entries: Sequence[Entry]) -> list[Section]:
    """Where wrong answers go: within groups of similar classes, and the most confused pairs."""
    known = [entry for entry in entries if entry.analyses]
    known = [entry for entry in known if same_classes(entry, known[0])]
    if not known:
        return []
    facts = known[0].analyses[0]
    names = [printable(name) for name in facts.class_names]
    counts = {entry.number: _confusion(entry.analyses) for entry in known}
    missing = without(entries, lambda entry: entry in known)
    mean = ", mean over seeds" if has_seeds(entries) else ""
    blocks = []
    if facts.groups is not None:
        rows = _group_rows(facts.groups, names, list(counts.values()))
        text = (
            "Share of the wrong answers that stay in the true class's group of similar "
            f"classes{mean}{missing}."
        )
        if rows:
            table = BarTable("group", tuple(known), rows)
            blocks.append(Block(text, heading="Errors within groups", table=table))
    rows = _pair_rows(names, list(counts.values()), digits=int(has_seeds(entries)))
    if rows:
        text = (
            f"Number of the {facts.images:,} test images of the first class that are taken for the "
            f"second{mean}{missing}."
        )
        table = BarTable("true \u2192 answer", tuple(known), rows)
        blocks.append(Block(text, heading="Most confused classes", table=table))
    return [Section("confusion", "Confusion", tuple(blocks))] if blocks else []


def _confusion(analyses: Sequence[Analysis]) -> Confusion:
    """Mean number of images of a class that are taken for another one."""
    counts: Confusion = {}
    for analysis in analyses:
        for true, predicted, count in analysis.confusion:
            if true != predicted:
                pair = (true, predicted)
                counts[pair] = counts.get(pair, 0.0) + count / len(analyses)
    return counts


def _pair_rows(names: Sequence[str], counts: Sequence[Confusion], *, digits: int) -> Rows:
    """The pairs with the most confusions in all entries together."""
    totals: Confusion = {}
    for one in counts:
        for pair, count in one.items():
            totals[pair] = totals.get(pair, 0.0) + count
    chosen = sorted(totals, key=lambda pair: (-totals[pair], pair))[:_PAIRS]
    most = max((one.get(pair, 0.0) for one in counts for pair in chosen), default=0.0) or 1.0

    def cell(count: float) -> Bar:
        return Bar(f"{count:.{digits}f}", count / most)

    return tuple(
        (
            f"{names[pair[0]]} \u2192 {names[pair[1]]}",
            tuple(cell(one.get(pair, 0.0)) for one in counts),
        )
        for pair in chosen
    )


def _group_rows(
    groups: Sequence[int | str], names: Sequence[str], counts: Sequence[Confusion]
) -> Rows:
    """Shares of errors within each group that has several classes, and within all of them."""
    members: dict[int | str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    tallies = [_tally(groups, one) for one in counts]
    errors = {group: sum(total.get(group, 0.0) for _, total in tallies) for group in members}
    several = [group for group in members if len(members[group]) > 1 and errors[group]]
    chosen = sorted(several, key=lambda group: -errors[group])[:_GROUPS]
    rows = [
        (
            shorten(" ".join(names[index] for index in members[group]), _GROUP_NAME),
            tuple(
                _share(within.get(group, 0.0), total.get(group, 0.0)) for within, total in tallies
            ),
        )
        for group in chosen
    ]
    everything = tuple(
        _share(sum(within.values()), sum(total.values())) for within, total in tallies
    )
    return (("all classes", everything), *rows) if rows else ()


def _tally(groups: Sequence[int | str], counts: Confusion) -> tuple[Tally, Tally]:
    """For each group the errors of its images that stay in it, and all of them."""
    within: Tally = {}
    total: Tally = {}
    for (true, predicted), count in counts.items():
        group = groups[true]
        total[group] = total.get(group, 0.0) + count
        if groups[predicted] == group:
            within[group] = within.get(group, 0.0) + count
    return within, total


def _share(part: float, whole: float) -> Bar:
    return Bar(f"{100 * part / whole:.1f} %", part / whole) if whole else Bar("")
