"""docs/reliability.md names a test for every promise, and the test exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.partition("## Promises")[2].partition("\n## ")[0].splitlines() if line.startswith("| ")]
PROMISES = [row.split("|")[1:3] for row in ROWS[1:]]


@pytest.mark.parametrize(("promise", "tests"), PROMISES, ids=range(1, len(PROMISES) + 1))
def test_every_promise_names_tests_that_exist(promise, tests):
    """After a test is renamed or removed, the table would claim a proof that nobody runs."""
    names = re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", tests)
    assert names, promise
    text = ""
    for path, function in names:
        text = (ROOT / path).read_text(encoding="utf-8") if path else text  # without a path: in the file before
        assert not function or f"\ndef {function}(" in text, function
