"""Malformed configs: changed text, changed bytes, and unusual or invalid values."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.config import Config
from pipeline.config.messages import fields_of
from pipeline.config.template import template
from pipeline.core.vgg_layers import CONV_NAMES
from tools.torture.fuzz_files import BYTES, SMALL, Case, sample_images

# --- text ---

WORDS = [
    *(
        ":",
        "\n",
        "  ",
        "\t",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "'",
        '"',
        "#",
        "|",
        "<<: ",
        "? ",
        "=",
        "%",
        "\r",
        "\ufeff",
        "\0",
    ),
    *("&a ", "*a", "!!int ", "!!python/name:os.system ", "%YAML 9.9\n", "---\n", "...\n", "- " * 30, "{a: " * 30),
    *(
        "null",
        "true",
        "1e-3",
        ".nan",
        "9" * 5000,
        "-1",
        "~",
        "0x" + "f" * 39,
        "1e999",
        "4GiB",
        "é",
        "\u2028",
        "\x1b[2J",
    ),
    *("\\ud800", "\\U99999999", "seed: 1\n", "size: 100000000\n", "/dev/zero", "/proc/self/mem", "~nobody/x"),
]


# The image names of SMALL and of the template.
IMAGES = ("content.png", "style.png", "content.jpg", "style.jpg")


def change_text(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines) or 1)
    match rng.randrange(6):
        case 0:
            lines[at : at + 1] = []
        case 1:
            lines.insert(at, rng.choice(lines) if lines else "")
        case 2:
            lines.insert(at, " " * rng.randrange(5) + rng.choice(WORDS) + "\n")
        case 3 if lines:
            lines[at] = "  " * rng.randrange(3) + lines[at].strip() + "\n"
        case _:
            start = rng.randrange(len(text) + 1)
            return text[:start] + rng.choice(WORDS) + text[start + rng.randrange(6) :]
    return "".join(lines)


def yaml_cases(rng: random.Random, count: int) -> Iterator[Case]:
    """Valid configs with changed text or bytes."""
    image = sample_images()["png"]
    bases = [yaml.safe_dump(SMALL), template(), yaml.safe_dump(SMALL, default_flow_style=True)]
    for _ in range(count):
        text = rng.choice(bases)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            text = change_text(rng, text)
        data = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            data = rng.choice(BYTES)(rng, data)
        yield Case("config text", {"c.yaml": data, **dict.fromkeys(IMAGES, image)})


# --- values ---

NASTY = [
    *(
        "",
        ".",
        "..",
        "/",
        "//",
        "~",
        "/dev/zero",
        "/dev/null",
        "/proc/kcore",
        "/proc/self/mem",
        "c.yaml",
        "content.png",
    ),
    *("content.png[page=3]", "content.png/x", "x" * 5000, "a/" * 2000 + "x.png", "\0", "a\nb.png", "\x1b[2J.png"),
    *("\u202e.png", "é.png", ".png", "..png", "x.", "x.PNG", "run", "run.zarr", "run/store.zarr", "out.zarr/run"),
    *("4GiB", "-4GiB", "1e9GiB", "999999999999999TiB", "0B", "auto", "cpu", "cuda", "cuda:999", "cuda:-1", "none"),
    *("null", "no", "${HOME}", "$(id)", "%s%n", "{0}", "conv1_1", "conv9_9", "vgg19", "vgg19-lite", "random"),
]


def anything() -> st.SearchStrategy[Any]:
    numbers = (
        st.integers(-(10**30), 10**30) | st.floats() | st.sampled_from([0, -1, 1, 16, 512, 2**31, 2**63, 2**64, 1e308])
    )
    plain = st.none() | st.booleans() | numbers | st.sampled_from(NASTY) | st.text(max_size=20)
    return st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=5,
    )


def fitting(annotation: Any, marks: Sequence[object] = ()) -> st.SearchStrategy[Any]:
    """Values of a field's type: within, at and beyond its bounds."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        strategy = fitting(inner[0], [*marks, *inner[1:]])
    elif origin is Literal:
        strategy = st.sampled_from(inner)
    elif origin is dict:
        strategy = st.dictionaries(st.sampled_from([*CONV_NAMES]), st.floats(0, 1e12), max_size=16)
    elif inner:  # a union
        strategy = st.one_of(*map(fitting, inner))
    elif annotation in (int, float):
        strategy = bounded(annotation, marks)
    else:
        strategy = {type(None): st.none(), bool: st.booleans()}.get(annotation, NAMES)
    return strategy


NAMES = st.sampled_from(["content.png", "style.jpg", "out.tif", "out.zarr", "out.dz", "out.jpg", "cpu", "auto", *NASTY])


def bounded(kind: type[int] | type[float], marks: Sequence[object]) -> st.SearchStrategy[Any]:
    """Numbers for a field with these bounds."""
    limits = {name: value for mark in flat(marks) for name, value in bounds_of(mark)}
    low = limits.get("ge", limits.get("gt", 0))
    high = limits.get("le", limits.get("lt", low + 2**40))
    step = limits.get("multiple_of", 1)
    edges = st.sampled_from([low - step, low, low + step, high - step, high, high + step, 2 * high])
    if kind is float:
        return st.floats(low, min(high, 1e9)) | st.floats(low, low + 1) | edges
    small = st.integers(-(-low // step), min(high // step, low // step + 2**12)).map(lambda n: n * step)
    powers = st.integers(0, 60).map(lambda n: 2**n)
    return small | small | powers | edges


def flat(marks: Sequence[object]) -> Iterator[object]:
    for mark in marks:
        yield from flat(mark.metadata) if isinstance(mark, FieldInfo) else [mark]


def bounds_of(mark: object) -> Iterator[tuple[str, Any]]:
    return ((name, getattr(mark, name)) for name in ("ge", "gt", "le", "lt", "multiple_of") if hasattr(mark, name))


def leaves(
    model: type[BaseModel], start: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], FieldInfo]]:
    """(path, field) of every setting that is not a section; for the list of styles those of its first entry."""
    for name, field in fields_of(model).items():
        kind, inner = field.annotation, get_args(field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, (*start, name))
        elif get_origin(kind) is tuple:
            yield from leaves(inner[0], (*start, name, 0))
        else:
            yield (*start, name), field


Setting = tuple[tuple[str | int, ...], Any]


def a_setting() -> st.SearchStrategy[Setting]:
    """A key and a value; eight of ten values have the key's type."""
    known = list(leaves(Config))
    right = [st.tuples(st.just(path), fitting(field.annotation, field.metadata)) for path, field in known]
    paths = st.sampled_from([path for path, _ in known] + [(name,) for name in (*Config.model_fields, "sise")])
    wrong = st.tuples(paths, anything())
    return st.integers(0, 9).flatmap(lambda n: wrong if n > 7 else st.one_of(right))


def put(data: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Set a value in a config if its parents still exist."""
    *parents, last = path
    for part in parents:
        if isinstance(data, dict) and isinstance(part, str):
            data = data.setdefault(part, {})
        elif isinstance(data, list) and isinstance(part, int) and data:
            data = data[part]
    if isinstance(data, dict) and isinstance(last, str):
        data[last] = value


def with_settings(some: list[Setting]) -> dict[str, Any]:
    """SMALL with these settings."""
    config = copy.deepcopy(SMALL)
    for path, value in some:
        put(config, path, value)
    return config


def as_text(setting: Setting) -> str:
    """A setting in the form of the command line."""
    path, value = setting
    text = yaml.safe_dump([value], default_flow_style=True, width=10**9).strip()[1:-1]
    return f"{'.'.join(map(str, path))}={text}"


def value_configs() -> st.SearchStrategy[tuple[dict[str, Any], list[str]]]:
    """(config, settings on the command line)."""
    configs = st.lists(a_setting(), min_size=1, max_size=4).map(with_settings)
    overrides = st.lists(a_setting().map(as_text) | st.text(max_size=10), max_size=1)
    return st.tuples(configs, st.just([]) | st.just([]) | overrides)


def value_cases(rng: random.Random, count: int) -> Iterator[Case]:
    """Valid configs with changed values."""
    image = sample_images()["png"]
    for config, some in collected(value_configs(), count, rng.getrandbits(32)):
        try:
            data = yaml.safe_dump(config, allow_unicode=True).encode()
        except (UnicodeEncodeError, yaml.YAMLError):
            continue
        clean = [text.replace("\0", "") for text in some if text.isprintable() and not text.startswith("-")]
        argv = ("plan", "-c", "c.yaml", *(f"--set={text}" for text in clean))
        yield Case("config values", {"c.yaml": data, **dict.fromkeys(IMAGES, image)}, argv)


def collected(strategy: st.SearchStrategy[Any], count: int, number: int) -> list[Any]:
    """`count` examples that Hypothesis draws from a strategy."""
    examples: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(value: Any) -> None:
        examples.append(value)

    draw()
    return examples
