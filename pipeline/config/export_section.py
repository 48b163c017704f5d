"""The section `export` of a run, as options of `pipeline export` change it: `--set export.bleed=6mm`, `--dpi 300`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from pipeline.config.conflicts import panel_conflicts
from pipeline.config.messages import ConflictsError, validate
from pipeline.config.output_sections import ExportConfig
from pipeline.config.overrides import override
from pipeline.config.sections import Section
from pipeline.config.yaml_reader import CommandLineText, Document, Place, problem_lines
from pipeline.core.errors import ConfigError


class _OnlyExport(Section):
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        if conflicts := list(panel_conflicts(self.export)):
            raise ConflictsError(conflicts)
        return self


def changed_export(
    source: str, section: Mapping[str, Any], settings: Sequence[str], options: Mapping[str, Any]
) -> tuple[ExportConfig, frozenset[str]]:
    """(the section with the changes, the keys that were changed).

    `section`: as JSON has it, from the file `source`. `settings`: of `--set`, each with the key `export` or one inside.
    `options`: values by key, from options of these names. Raises ConfigError with every problem.
    """
    document = Document(source, {"export": dict(section)})
    for number, setting in enumerate(settings):
        override(document, number, setting)
    for number, (name, value) in enumerate(options.items(), start=len(settings)):
        place = Place(10**9 + number, 0, f"--{name}")
        document.put(["export", name], CommandLineText(value) if isinstance(value, str) else value, place)
    changed = validate(_OnlyExport, document, Path.cwd())
    if changed is None or document.problems:
        raise ConfigError(problem_lines(document.problems))
    names = {str(key[1]) for key in document.values if len(key) > 1}
    if ("export",) in document.values:  # the section as a whole
        names |= set(changed.export.model_dump(exclude_unset=True))
    return changed.export, frozenset(names)
