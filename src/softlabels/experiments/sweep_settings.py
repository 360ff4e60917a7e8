"""The settings of a search, beside those of its runs."""

# pydantic reads the fields' types, so they are not deferred to text.

from typing import Annotated

import tyro
from pydantic import Field

from softlabels.experiments.sweep_record import Metric
from softlabels.training.settings import Section

__all__ = ["SweepOptions"]


class SweepOptions(Section):
    """Settings of a run, and how some of them are searched.

    --trials, --startup, --space, --metric, --seeds and --jobs are those of the search, whose folder
    is --output, by default runs/sweep-DATA-METHOD; the rest is what each trial trains with.
    """

    trials: int = Field(20, ge=1, le=100_000, description="Settings that are tried.")
    startup: int = Field(
        8, ge=0, description="How many of them are drawn at random, before the search learns."
    )
    space: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = Field(
        (),
        description="What is searched, KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=VALUE,VALUE; once "
        "for each setting. None: the method's weights and temperatures.",
    )
    metric: Metric = Field(
        "top1", description="What decides, on the validation images after the last epoch."
    )
    seeds: int = Field(1, ge=1, le=1000, description="Runs of each trial: seed, seed + 1, ...")
    jobs: int = Field(1, ge=1, le=1024, description="Runs at a time, and trials proposed together.")
