"""The config of a run: loading it from YAML, and which of its values a resume compares."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, model_validator

from pipeline.config.conflicts import all_conflicts
from pipeline.config.messages import ConflictsError, fields_of, validate
from pipeline.config.output_sections import ExportConfig
from pipeline.config.overrides import override
from pipeline.config.presets import with_preset
from pipeline.config.regions import shared_masks
from pipeline.config.sections import ADDED_LATER, COMPARED_BY_CONTENT, HARMLESS, Section, StageConfig
from pipeline.config.settings import Settings
from pipeline.config.yaml_reader import Document, Key, Problem, dotted, problem_lines, read
from pipeline.core.errors import ConfigError
from pipeline.core.files import icc_fault, names_in
from pipeline.core.text import shown

S = TypeVar("S", bound=Section)


class Config(Settings):
    """The settings of one run, which do not contradict each other."""

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        if conflicts := list(all_conflicts(self, input_files(self))):
            raise ConflictsError(conflicts)
        return self


_PROFILES: tuple[Key, ...] = (("export", "profile"), ("proof",))


def load_config(
    path: str | Path, overrides: Sequence[str] = (), varied: Sequence[str] = (), *, check_inputs: bool = False
) -> Config:
    """The config in the YAML file `path`, with `key.inner=value` overrides applied and all paths made absolute.

    Paths in the file are relative to its folder, paths in overrides to the current folder. `varied`: the overrides
    of one variation of a preview. Keys that are given nowhere have the values of the `preset`. `check_inputs`: a
    missing input file is a problem too. Raises ConfigError with every problem, one per line, as
    `file:line:column: key: problem` (`--set key=value: key: problem` for an override, `--vary …` for a varied one), and
    StorageError if the disk fails.
    """
    file = Path(path)
    document = read_overridden(file, overrides, varied)
    return config_of(document, Path.cwd() / file.parent, check_inputs)


def read_overridden(file: Path, overrides: Sequence[str], varied: Sequence[str] = ()) -> Document:
    """The document of a YAML file, with overrides applied."""
    document = read(file)
    settings = [*(("--set", setting) for setting in overrides), *(("--vary", setting) for setting in varied)]
    for number, (option, setting) in enumerate(settings):
        override(document, number, setting, option)
    return document


def config_of(document: Document, base: Path, check_inputs: bool = False) -> Config:
    """The config of a document whose relative paths start at `base`. Raises ConfigError with every problem."""
    if document.readable and isinstance(document.data, dict):
        refuse_other_command(document, "run")
        document.data = with_preset(document.data)
    return validated(Config, document, base, check_inputs)


# Keys that only the config of this command has, the clearest first.
_COMMANDS = (("train", {"photographs"}), ("apply", {"networks"}), ("run", {"styles", "content"}))


def refuse_other_command(document: Document, command: str) -> None:
    """Raise ConfigError for the config of another command, in place of a list of all its keys."""
    data = document.data if isinstance(document.data, dict) else {}
    other, keys = next(((name, keys) for name, keys in _COMMANDS if keys <= data.keys()), (command, set()))
    if other != command:
        key = max(keys)
        text = f"a key of `pipeline {other}`; give this config to that command"
        raise ConfigError(problem_lines([Problem(document.place((key,), of_name=True), key, text)]))


def validated(model: type[S], document: Document, base: Path, check_inputs: bool) -> S:
    """A document as the config `model`; otherwise as config_of."""
    config = validate(model, document, base) if document.readable else None
    if config is not None and check_inputs:
        document.problems += _missing_inputs(config, document)
    if config is None or document.problems:
        raise ConfigError(problem_lines(document.problems))
    return config


def _missing_inputs(config: Section, document: Document) -> Iterator[Problem]:
    """A problem for every file that does not exist, or is no profile; other faults are found when it is opened."""
    export = getattr(config, "export", None)
    profile = export.profile if isinstance(export, ExportConfig) else None
    profiles = [(("export", "profile"), profile)] if isinstance(profile, Path) else []
    for key, path in (*input_files(config), *profiles):
        try:
            if key in _PROFILES and (fault := icc_fault(path)) is not None:
                yield Problem(document.place(key), dotted(key), f"{shown(str(path), 4096)}: {fault}")
            else:
                path.stat()
        except FileNotFoundError:
            close = difflib.get_close_matches(path.name, names_in(path.parent), n=1)
            hint = f"; did you mean {shown(close[0])!r}?" if close else ""
            yield Problem(document.place(key), dotted(key), f"no such file: {shown(str(path), 4096)}{hint}")
        except OSError:
            continue


def result_fields(config: Section) -> dict[str, object]:
    """The JSON-able value of every key that decides the output, by dotted key.

    A resume with another value would mix two results in one image. Keys marked HARMLESS are left out, and so are files,
    which are compared by their content elsewhere.
    """
    by_content = COMPARED_BY_CONTENT["resume"]
    fields = {
        dotted(key): value
        for key, value, mark in _values(config)
        if mark is None or (mark == by_content and isinstance(value, str))  # a keyword of `init`, which may be a file
    }
    if not isinstance(config, Settings):
        return fields
    fields |= shared_masks(config.styles, "")
    for index, stage in enumerate(config.stages):
        fields |= shared_masks(stage.styles or (), f"stages.{index}.")
    return fields


def differing_keys(first: Config, second: Config) -> list[str]:
    """The dotted keys, in the order of the template, whose values differ."""
    before, after = ({dotted(key): value for key, value, _ in _values(config)} for config in (first, second))
    missing = object()
    return [key for key in {**before, **after} if before.get(key, missing) != after.get(key, missing)]


def input_files(config: Section) -> Iterator[tuple[Key, Path]]:
    """(key, path) of every file that the config reads."""
    for key, value, mark in _values(config):
        if mark == COMPARED_BY_CONTENT["resume"] and isinstance(value, Path):
            yield key, value


def paths_of(config: Config) -> Iterator[tuple[Key, Path]]:
    """(key, path) of every path in the config, also of those that it writes."""
    for key, value, _ in _values(config):
        if isinstance(value, Path):
            yield key, value


def is_default(config: Section, key: Key) -> bool:
    """Whether a key that is not given in the config has its default."""
    inner: object = config
    for part in key[:-1]:
        if isinstance(inner, BaseModel):
            inner = getattr(inner, str(part), None)
        elif isinstance(inner, tuple) and part in range(len(inner)):
            inner = inner[int(part)]
        else:
            return False
    is_field = isinstance(inner, BaseModel) and key[-1] in type(inner).model_fields
    return is_field and isinstance(inner, BaseModel) and key[-1] not in inner.model_fields_set


def _values(
    value: object, key: Key = (), mark: object = None, given_only: bool = False
) -> Iterator[tuple[Key, Any, object]]:
    """(key, value, resume mark) of every value that is not a section or a list. `given_only`: skip defaults."""
    if isinstance(value, BaseModel):
        for (name, field), key_name in zip(type(value).model_fields.items(), fields_of(type(value)), strict=True):
            inner, marks = getattr(value, name), field.json_schema_extra
            own = marks.get("resume") if isinstance(marks, dict) else None
            if isinstance(marks, dict) and own == ADDED_LATER:
                # In an entry of `stages` a given value counts: it may override another one of the config's top level.
                own = HARMLESS["resume"] if inner == marks["before"] and not given_only else None
            if not given_only or name in value.model_fields_set:
                yield from _values(inner, (*key, key_name), mark or own, given_only or isinstance(value, StageConfig))
    elif isinstance(value, tuple):
        for index, entry in enumerate(value):
            yield from _values(entry, (*key, index), mark, given_only)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _values(entry, (*key, name), mark, given_only)
    else:
        yield key, value, mark
