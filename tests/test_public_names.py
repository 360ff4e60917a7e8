"""The names that others write in their code and on their command lines change only on purpose."""

from __future__ import annotations

import re
from pathlib import Path

import softlabels
from softlabels import losses
from softlabels.cli import main

SNAPSHOT = Path(__file__).with_name("public_names.txt")


def test_the_public_names_are_those_of_the_snapshot(capsys):
    assert main(["--help"]) == 0
    _, _, listed = capsys.readouterr().out.partition("commands:\n")
    commands = re.findall(r"^  ([a-z][a-z-]*) ", listed, re.MULTILINE)
    assert len(commands) > 5

    names = {f"softlabels.{name}" for name in softlabels.__all__}
    names |= {f"softlabels.losses.{name}" for name in losses.__all__}
    names |= {f"$ softlabels {command}" for command in commands}
    snapshot = set(SNAPSHOT.read_text(encoding="utf-8").splitlines())

    change = [*(f"+ {name}" for name in names - snapshot), *(f"- {n}" for n in snapshot - names)]
    assert sorted(change) == [], f"if this is meant, change {SNAPSHOT.name} and CHANGELOG.md"
