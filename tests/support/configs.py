"""Loads configs that are expected to be refused."""

import re
from pathlib import Path

import pytest

from pipeline.config.config import load_config
from pipeline.core.errors import ConfigError

LINE = re.compile(r"(.+\.yaml:[1-9]\d*:[1-9]\d*|--set .*?): \S.*")


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error message; asserts that each of them names file, line and column, or the override."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    lines = str(caught.value).split("\n")
    for line in lines:
        assert LINE.fullmatch(line), line
    return lines
