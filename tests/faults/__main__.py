"""Runs the faults and writes docs/faults.md; arguments go to pytest (with any, the page goes to the screen alone)."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main() -> int:
    """The exit code of pytest."""
    chosen = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "faults.md"
        os.environ["NEWEL_FAULTS_PAGE"] = str(page)
        os.chdir(ROOT)
        code = int(pytest.main(["-q", "--durations=8", str(HERE), *chosen]))
        if page.is_file() and chosen:
            print(page.read_text(encoding="utf-8"))
        elif page.is_file():
            (ROOT / "docs" / "faults.md").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
