"""The documentation site builds, and its pages load nothing from the web."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_LOADED = re.compile(
    r"<(?:script|img|iframe|link(?=[^>]*stylesheet))[^>]*(?:src|href)=\"?(https?:[^\" >]+)"
)


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_the_web(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    pages = {
        page.relative_to(tmp_path).parent.as_posix(): page.read_text()
        for page in tmp_path.rglob("*.html")
    }
    assert {"methods/nkd", "api/losses", "which_method"} <= set(pages)
    assert "<math" in pages["methods/nkd"]
    for name, text in pages.items():
        assert not _LOADED.findall(text), name
