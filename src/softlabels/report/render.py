"""Puts a page together and writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from softlabels.io.files import write_text
from softlabels.report.canvas import RUN_COLOURS
from softlabels.report.confusion import confusion_sections
from softlabels.report.curves import curve_sections, loss_share_sections
from softlabels.report.entries import Entry
from softlabels.report.facts import different_settings, environment, facts
from softlabels.report.predictions import (
    class_sections,
    difference_sections,
    feature_sections,
    reliability_sections,
    zipf_sections,
)
from softlabels.training.schemas import Gallery, GalleryImage

_TEMPLATES = Environment(
    loader=PackageLoader("softlabels.report", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Heading:
    """Heading of a column of the results; which side is better, higher or lower, may be empty."""

    text: str
    unit: str = ""
    better: str = ""


@dataclass(frozen=True)
class Cell:
    """A result as it is shown, empty where there is none, with the exact number of a number."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Results:
    """The table of results: cells in the order of the headings, and sentences below."""

    corner: str
    headings: tuple[Heading, ...]
    rows: tuple[tuple[Entry, tuple[Cell, ...]], ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Sample:
    """An image and what each entry says about it."""

    gallery: Gallery
    image: GalleryImage
    answers: list[tuple[Entry, GalleryImage]]


def write_page(
    output: Path,
    entries: Sequence[Entry],
    results: Results,
    *,
    title: str,
    introduction: str,
    against_first: bool,
    notes: Sequence[str],
    command: str | None,
) -> Path:
    """Writes the page of entries, at least one; `against_first`: others are measured against it.

    Below the title stand the introduction, a paragraph, and the notes, further sentences.
    """
    samples = _samples(entries)
    shares = [share for s in samples for _, image in s.answers for _, share in image.non_target]
    page = _TEMPLATES.get_template("page.html.j2").render(
        title=title,
        command=command,
        notes=notes,
        colors=list(enumerate(RUN_COLOURS)),
        introduction=introduction,
        entries=entries,
        results=results,
        sections=[
            *curve_sections(entries),
            *(difference_sections(entries) if against_first else ()),
            *zipf_sections(entries),
            *reliability_sections(entries),
            *class_sections(entries, against_first=against_first),
            *confusion_sections(entries),
            *loss_share_sections(entries),
            *feature_sections(entries),
        ],
        samples=samples,
        longest_bar=max(shares, default=0.0) or 1.0,
        facts=facts(entries),
        differences=different_settings(entries) if len(entries) > 1 else [],
        environment=environment(entries),
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    return output


def _samples(entries: Sequence[Entry]) -> list[_Sample]:
    """The saved images of all entries: one sample an image, even if several saved it."""
    samples: dict[tuple[str, str, int], _Sample] = {}
    for entry in entries:
        gallery = entry.first.gallery
        if gallery is None:
            continue
        for image in gallery.images:
            key = (entry.first.summary.data, gallery.split, image.index)
            samples.setdefault(key, _Sample(gallery, image, [])).answers.append((entry, image))
    return [*samples.values()]
