"""The text of a config with some of its values changed, to be saved beside the file that it comes from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline.config.config import config_of, paths_of
from pipeline.config.one_line import beside, plain_data, replace_at
from pipeline.config.overrides import override
from pipeline.config.yaml_reader import read


def variation_text(path: Path, settings: Sequence[str]) -> str:
    """The YAML of the config at `path` with these `key=value`, with relative paths that start at its folder.

    Raises ConfigError like load_config.
    """
    document = read(path)
    for number, setting in enumerate(settings):
        override(document, number, setting)
    given, folder = copy.deepcopy(document.data), Path.cwd() / path.parent
    for key, file in paths_of(config_of(document, folder)):
        replace_at(given, key, beside(file, folder))
    return yaml.safe_dump(plain_data(given), sort_keys=False, allow_unicode=True)
