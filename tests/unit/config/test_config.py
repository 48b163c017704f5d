"""The config: accepted values, error messages, and the values that a resume compares."""

import re
import types
from collections.abc import Iterator
from itertools import pairwise, permutations
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pipeline.config.apply import load_apply_config
from pipeline.config.config import Config, load_config, result_fields
from pipeline.config.fields import OUTPUT_SUFFIXES
from pipeline.config.messages import expected, fields_of
from pipeline.config.template import template
from pipeline.config.training import load_train_config
from pipeline.core.errors import ConfigError
from pipeline.core.lengths import Length
from tests.support.configs import LINE, problems

SMALL = "content: a.tif\nstyles: [{image: s.jpg}]\noutput: out/r.tif\n"
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def only(path: Path, *overrides: str) -> str:
    (line,) = problems(path, *overrides)
    return line


# --- what is accepted ---


def test_template_is_the_defaults(write):
    """Otherwise `pipeline init` followed by `run` renders another image than a config without settings."""
    small = SMALL.replace("a.tif", "content.jpg").replace("s.jpg", "style.jpg").replace("out/r.tif", "result.tif")
    assert load_config(write(template())) == load_config(write(small))


def test_template_has_every_key(write):
    """Users would not find a key that is missing in the template."""
    text = template()
    for name in _leaf_names(Config):
        assert re.search(rf"^ *# \S.*\n[ #-]*{name}: \S", text, re.MULTILINE), name


def test_the_short_template_is_short_and_renders_the_same(write):
    """A first-time user reads ten keys, not eighty, in a terminal of 60 columns."""
    text = template(full=False)
    assert load_config(write(text)) == load_config(write(template()))
    keys = [line for line in text.splitlines() if re.match(r"[ -]*\w+: \S", line)]
    assert len(keys) == 11  # one more for the weight of the style
    assert max(map(len, text.splitlines())) <= 60


@pytest.mark.parametrize(
    "name", ["1e3", "0o17", "1_000", "1:30", "no", "null", "a: b", "# a", "it's", '"a', "- a", "é\u2028"]
)
def test_what_the_template_writes_is_read_back(write, tmp_path, name):
    """PyYAML leaves 1e3 without quotes, which this program reads as a number."""
    given = {"content": name, "styles": [{"image": name}], "output": "r.tif"}
    assert load_config(write(template(given=given))).content == tmp_path / name


def _leaf_names(model: type[BaseModel]) -> Iterator[str]:
    for name, field in fields_of(model).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaf_names(field.annotation)
        elif name != "styles":
            yield name


def test_template_commented_defaults_can_be_switched_on(write):
    """Removing a # must give the default that the template shows."""
    text = template().replace("# work_dir", "work_dir").replace("# stop_condition", "stop_condition")
    assert load_config(write(text)) == load_config(write(template()))


def test_paths_start_at_the_config_and_overrides_here(write, tmp_path, monkeypatch):
    """Paths in a config are relative to its folder, paths in overrides to the current folder."""
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", "/home/painter")
    path = write(SMALL + "network: {weights: ~/w.pth}\n")
    config = load_config(path, ["styles.0.image=x.jpg"])
    assert config.content == tmp_path / "a.tif"
    assert config.output == tmp_path / "out/r.tif"
    assert config.work_dir == tmp_path / "out/r.run"
    assert config.network.weights == Path("/home/painter/w.pth")
    assert config.styles[0].image == here / "x.jpg"
    assert load_config("../c.yaml").content.resolve() == config.content


def test_stop_condition_follows_the_schedule(write):
    """With the wrong default the constant schedule never ends a stage early, or the cosine one ends it too early."""
    path = write(SMALL)
    assert load_config(path).optimizer.stop_condition == 0
    assert load_config(path, ["optimizer.schedule=constant"]).optimizer.stop_condition == 0.1
    assert (
        load_config(path, ["optimizer.schedule=constant", "optimizer.stop_condition=0"]).optimizer.stop_condition == 0
    )


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4GiB", 4 * 2**30), ("2000MB", 2 * 10**9), ("0.5 gib", 2**29), ("123456", 123456), ("'64KB'", 64000)],
)
def test_memory_limit_in_bytes(write, text, size_bytes):
    """A limit that is parsed wrongly makes the machine swap, or the run slow."""
    assert load_config(write(SMALL + f"memory: {{limit: {text}}}")).memory.limit_bytes == size_bytes


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".001", "+1E-3"])
def test_floats_as_people_write_them(write, text):
    """YAML 1.1 reads 1e-3 as text, so the user would see an error for a valid number."""
    assert load_config(write(SMALL + f"optimizer: {{epsilon: {text}}}")).optimizer.epsilon == 1e-3


def test_overrides_read_like_the_file(write):
    """Scripts that sweep settings rely on overrides for every type of value."""
    path = write(SMALL + "size: 4096\nnetwork: {padding: zeros}\n")
    overrides = ["styles.0.weight=2", "network.style_layers={conv1_1: 1}", "size=null", "optimizer.clip=false"]
    config = load_config(path, [*overrides, "memory.limit=1GiB", "seed=1", "seed=2"])
    assert config.styles[0].weight == 2
    assert config.network.style_layers == {"conv1_1": 1.0}
    assert config.network.padding == "zeros"
    assert config.size is None
    assert config.optimizer.clip is False
    assert config.memory.limit_bytes == 2**30
    assert config.seed == 2


def test_the_paper_to_the_letter():
    """configs/paper.yaml reproduces the settings of the paper, to compare with its figures."""
    config = load_config(Path(__file__).parents[3] / "configs" / "paper.yaml")
    assert (config.network.padding, config.network.pooling) == ("zeros", "max")
    assert (config.loss.content_weight, config.loss.style_weight) == (1, 1)
    assert config.initial_size == 512
    adam = config.optimizer
    assert (adam.schedule, adam.max_iterations, adam.stop_condition) == ("constant", 100, 0.1)
    assert (adam.target_pixel_change, adam.beta1, adam.beta2, adam.epsilon) == (12.8, 0.9, 0.99, 1e-6)
    assert not adam.clip
    assert (adam.coarse_iterations, config.init_noise, config.loss.tv_weight) == (1, 0, 0)
    assert set(config.network.content_layers) == {"conv4_2"}
    assert set(config.network.style_layers) == {f"conv{block}_1" for block in range(1, 6)}


@pytest.mark.parametrize("suffix", [*OUTPUT_SUFFIXES, ".TIF"])
def test_every_output_format(write, suffix):
    """Every documented format must be accepted, in capitals too."""
    assert load_config(write(SMALL), [f"output=r{suffix}"]).output.suffix == suffix


def test_a_config_is_frozen(write):
    """A setting that changes during a run would contradict the journal."""
    with pytest.raises(ValidationError):
        load_config(write(SMALL)).seed = 1  # type: ignore[misc]


# --- what is refused, and how ---


def test_everything_at_once(write):
    """All problems are reported at once, so that the user does not need one start per mistake."""
    path = write(
        "content: 3\n"
        "styles: [{image: s.jpg, wieght: 2}]\n"
        "output: r.bmp\n"
        "seed: 1\n"
        "seed: 2\n"
        "sise: 4096\n"
        "compute: {tile_px: 1000}\n"
        "store: {codec: zst}\n"
    )
    lines = problems(path, "optimizer.max_iterations=many", "nonsense")
    starts = [line.removeprefix(f"{path}:") for line in lines]
    assert [start.split(": ")[0] for start in starts] == [
        "1:10", "2:25", "3:9", "5:1", "6:1", "7:20", "8:16", "--set optimizer.max_iterations=many", "--set nonsense",
    ]  # fmt: skip
    text = "\n".join(lines)
    for message in (
        "content: expected a path or null, found 3",
        "styles.0.wieght: unknown key; allowed: image, weight, scale, max_size, mask; did you mean 'weight'?",
        "output: has the suffix '.bmp'",
        "seed: duplicate key, first given at line 4",
        "did you mean 'size'?",
        "compute.tile_px: 1000 is not a multiple of store.chunk_px = 512; tiles are written as whole chunks",
        "store.codec: expected one of none, zstd, lz4, found the text 'zst'; did you mean 'zstd'?",
        "optimizer.max_iterations: expected a whole number >= 1, <= 100000, found the text 'many'",
    ):
        assert message in text


def test_no_second_complaint_about_a_value_already_refused(write):
    """An invalid chunk size must not cause a second message about the tile size, which may be correct."""
    line = only(write(SMALL + "store: {chunk_px: 1000}\ncompute: {tile_px: 2000}\n"))
    assert "store.chunk_px: expected a whole number >= 16, <= 16384, a multiple of 16, found 1000" in line


def test_missing_keys_are_named(write):
    """The message for a missing key says what to add."""
    lines = problems(write("seed: 1"))
    assert [line.split(": ")[1] for line in lines] == ["content", "output", "styles"]
    assert all("missing" in line for line in lines)
    assert "styles.0.image: missing" in only(write("content: a\nstyles: [{weight: 1}]\noutput: r.png"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "size=true",
            "a whole number >= 16, <= 1000000 or a list of 2, each a whole number >= 16, <= 1000000 or "
            "a length such as 60cm or {width: 60cm, dpi: 150} or null, found",
        ),
        ("size=15", "found 15"),
        ("size=512.0", "found 512.0"),
        ("size='512'", "found the text '512'"),
        ("initial_size=null", "found nothing (null)"),
        ("loss.content_weight=.nan", "found nan"),
        ("loss.content_weight=.inf", "found inf"),
        ("loss.content_weight=1e999", "found inf"),
        ("loss.content_weight=-1", "expected a number >= 0, <= 1e+12, found -1"),
        ("optimizer.beta1=1", "expected a number >= 0, < 1, found"),
        ("optimizer.epsilon=0", "expected a number > 0, <= 1e+06, found"),
        ("optimizer.clip=1", "expected true or false, found 1"),
        ("optimizer.clip=yes", "found the text 'yes'"),
        ("network.style_layers={conv1_1: 0}", "network.style_layers.conv1_1: expected a number > 0, <= 1e+12, found"),
        ("network.style_layers={conv9_1: 1}", "unknown layer; allowed: conv1_1"),
        ("network.style_layers={conv1_1: true}", "found true"),
        ("network=3", "a section with name, weights"),
        ("network.name=vgg", "did you mean 'vgg19'?"),
        ("styles=[]", "expected a list with at least one entry, unless loss.style_weight is 0"),
        ("styles=s.jpg", "expected a list with at most 100 entries, found"),
        ("styles.0.weight=-1", "styles.0.weight: expected a number >= 0"),
        ("styles.0.weight=0", "the weights sum to 0.0"),
        ("memory.limit=4Gi", "a size such as 4GiB"),
        ("memory.limit=0", "a size such as 4GiB"),
        ("compute.devices=[gpu]", "expected auto, or a list of devices, as in [cuda:0, cuda:1], found"),
        ("compute.devices=[]", "expected auto, or a list of devices, as in [cuda:0, cuda:1], found"),
        ("compute.device=gpu", "expected one of auto, cpu, cuda, cuda:N, found"),
        ("compute.tile_px=automatic", "or auto, found"),
        ("compute.tile_px=768", "not a multiple of store.chunk_px = 512"),
        ("store.chunk_px=24", "a multiple of 16"),
        ("export.bits=12", "expected one of auto, 8, 16, found 12"),
        ("output=''", "an empty path"),
        ('output="a\\0.tif"', "NUL"),
        ("output=result", "has no suffix"),
        ("output=~nobody_at_all/r.tif", "home folder"),
        ("seed=99999999999999999999999999", "a whole number >= 0"),
        ("seed=" + "9" * 5000, "a whole number >= 0"),
        ("size=1000001", "<= 1000000"),
        ("initial_size=1000001", "<= 1000000"),
        ("compute.tile_px=2000016", "<= 2000000"),
        ("store.chunk_px=16400", "<= 16384"),
        ("optimizer.max_iterations=100001", "<= 100000"),
        ("optimizer.target_pixel_change=256", "<= 255"),
        ("loss.style_weight=1e13", "<= 1e+12"),
        ("network.style_layers={conv1_1: 1e13}", "<= 1e+12"),
        ("styles.0.weight=1e13", "<= 1e+12"),
        ("memory.limit=999999999999TiB", "up to 1048576TiB"),
        ("limits.max_pixels=1000000000001", "<= 1000000000000"),
        ("limits.max_result_pixels=0", ">= 1"),
        ("limits.max_file_bytes=9999999TiB", "up to 1048576TiB"),
        ("styles=[" + "{image: s.jpg}, " * 101 + "]", "at most 100 entries, found a list of 101"),
        (f"content={'x' * 256}", "longer than 255 bytes"),
        (f"content={'x/' * 2048}y", "longer than 4095"),
        ('content="a\\nb.tif"', "line break"),
        ('output="\\e[2Jr.tif"', "control character"),
        ("loss.content_weight=0,05", "write 0.05, with a point"),
        ("loss={content_weight: 0,05}", "a decimal number needs a point"),
        ("size=1_000", "write 1000"),
        ("optimizer.clip=no", "write false"),
        ("styles=[a.jpg]", "write {image: a.jpg}"),
        ("styles=a.jpg", "write [{image: a.jpg}]"),
        ("loss=kind: gatys", "write {kind: gatys}"),
        ("export.panels={overlap: 2cm}", "needs the width of a panel"),
        ("work_dir=0128", "put a name that looks like a number in quotes"),
        ("loss={content_weight: 0, style_weight: 0}", "0, like loss.content_weight"),
        ("network={content_layers: {}, style_layers: {}}", "no layers, and none in network.content_layers"),
        ("network={name: random, weights: w.pth}", "would ignore this file"),
    ],
)
def test_wrong_values(write, setting, message):
    """If accepted, each of these would fail hours later or give an unexpected image."""
    assert message in only(write(SMALL), setting)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export.bits=16", "output=r.jpg"], "export.bits: .jpg images have 8 bits"),
        (["export.bits=16", "export.compression=jpeg"], "export.compression: jpeg stores 8 bits only"),
        (
            ["store.state_dtype=compact", "optimizer.clip=false"],
            "store.state_dtype: compact stores canvas values",
        ),
        (["store.state_dtype=compact", "compute.dtype=float64"], "store.state_dtype: compact would round off"),
        (["network.content_layers={}", "loss.style_weight=0"], "the only weight above 0 belongs to an empty list"),
        (["content=same.tif", "output=./x/../same.tif"], "output: the same file as content"),
        (["styles.0.image=same.png", "output=same.png"], "output: the same file as styles.0.image"),
        (["output=r.zarr", "work_dir=r.zarr"], "work_dir: at or inside the output"),
        (["output=r.zarr", "work_dir=r.zarr/run"], "work_dir: at or inside the output"),
        (["content=c", "work_dir=c"], "work_dir: the same path as content"),
        (["compute.devices=[cpu, cuda:0]"], "compute.devices: CPU and GPU round differently"),
        (["compute.devices=[cpu]", "compute.device=cuda:1"], "compute.devices: compute.device is for a single one"),
        (["compute.scheduler=tls://a:1", "compute.workers=2"], "compute.scheduler: computes on the cluster's workers"),
        (["compute.scheduler=tls://a:1", "compute.devices=[cpu]"], "compute.scheduler: computes on the cluster's"),
    ],
)
def test_values_that_do_not_go_together(write, overrides, message):
    """Contradicting values, such as an output that overwrites an input, are refused before any work."""
    assert message in only(write(SMALL), *overrides)


def test_a_link_to_the_content_is_the_content(write, tmp_path):
    """An output that is a link to the content would overwrite the photo."""
    (tmp_path / "a.tif").write_bytes(b"photo")
    (tmp_path / "hard.tif").hardlink_to(tmp_path / "a.tif")
    (tmp_path / "soft.tif").symlink_to(tmp_path / "a.tif")
    for name in ("hard.tif", "soft.tif"):
        assert "the same file as content" in only(write(SMALL.replace("out/r.tif", name)))


def test_paths_that_cannot_be_looked_at(write, tmp_path):
    """The comparison of paths must not crash on unreadable files; the check of the images reports them later."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("loop", "x" * 255, "a.tif/b"):
        assert load_config(write(SMALL), [f"content={tmp_path}/{name}"]).content == tmp_path / name


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (b"", "1:1", "empty"),
        (b"# only a comment\n", "1:1", "empty"),
        (b"- a\n- b\n", "1:1", "top level"),
        (b"just words", "1:1", "top level"),
        (b"seed: 1\noutput: caf\xe9.tif\n", "2:12", "UTF-8"),
        (b"\xff\xfes\x00e\x00", "1:1", "UTF-8"),
        (b"loss:\n\tkind: gatys\n", "2:1", "tab"),
        (b"seed: [1, 2\n", "2:1", "not valid YAML"),
        (b"seed: 1\n  size: 2\n", "2:7", "not valid YAML"),
        (b"seed: 1\n---\nseed: 2\n", "2:1", "second document"),
        (b"seed: \x00\n", "1:7", "not allowed in YAML"),
        (b'seed: "\\U99999999"\n', "1:", "not valid YAML"),
        (b"seed: " + b"[" * 60_000, "1:", "levels deep"),
        (b"seed: " + b"{a: " * 10_000, "1:", "levels deep"),
        (b"? " * 30_000, "1:", "levels deep"),
        (b"seed: [" + b"1," * 30_000 + b"]", "1:", "more than 5000 values"),
        (b"seed: &a 1\nsize: [" + b"*a, " * 15_000 + b"]", "2:", "more than 5000 values"),
        (b"a: 1\n" * 10_000, "2500:", "more than 5000 values"),
        (b"a: 1\n" * 300_000, "1:1", "larger than"),
    ],
)
def test_files_that_are_no_config(write, text, place, message):
    """A file that is not a config gives a message with a position, not a traceback."""
    path = write(text)
    line = only(path)
    assert line.startswith(f"{path}:{place}"), line
    assert message in line


_OF_COMMANDS = {
    "run": "content: a.jpg\nstyles: [{image: b.jpg}]\noutput: c.png\n",
    "apply": "content: a.jpg\nnetworks: n.safetensors\noutput: c.png\n",
    "train": "photographs: photos\nstyles: [{image: b.jpg}]\noutput: n.safetensors\n",
}


@pytest.mark.parametrize(("of", "to"), list(permutations(_OF_COMMANDS, 2)))
def test_a_config_of_another_command_is_one_problem(tmp_path, of, to):
    """A list of all its keys, each of them unknown, does not say that only the command is wrong."""
    path = tmp_path / "config.yaml"
    path.write_text(_OF_COMMANDS[of])
    load = {"run": load_config, "apply": load_apply_config, "train": load_train_config}[to]
    with pytest.raises(ConfigError, match=rf"^[^\n]*: a key of `pipeline {of}`; give this config to that command$"):
        load(path)


def test_files_that_cannot_be_opened(tmp_path):
    """A mistyped file name gives a clear message."""
    assert "no such file" in only(tmp_path / "absent.yaml")
    (tmp_path / "d.yaml").mkdir()
    assert "folder" in only(tmp_path / "d.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("nul\0.yaml")


def test_anchors_aliases_and_tags_are_refused(write):
    """A config from a stranger must not exhaust memory or run code."""
    path = write(SMALL + "seed: &n 1\nsize: *n\ninitial_size: !!python/object/apply:os.getpid []\n")
    text = "\n".join(problems(path))
    for place, message in (("4:7", "anchors"), ("5:7", "aliases"), ("6:15", "tags")):
        assert f"{path}:{place}: {message} are not supported" in text


def test_billion_laughs_are_refused(write):
    """Ten lines of nested aliases expand to 10^9 values."""
    lines = [f"{after}: &{after} [{f'*{before}, ' * 9}]" for before, after in pairwise("abcdefghij")]
    messages = problems(write(SMALL + "a: &a [lol]\n" + "\n".join(lines)))
    assert sum("anchors are not supported" in line or "aliases are not supported" in line for line in messages) > 30


def test_the_number_of_problems_is_limited(write):
    """A YAML file that is not a config would fill the terminal with megabytes of messages."""
    messages = problems(write(SMALL + "".join(f"key{number}: 1\n" for number in range(1000))))
    assert len(messages) == 41
    assert "key0: unknown key" in messages[0] and "key39: unknown key" in messages[39]
    assert messages[40].endswith("960 more problems from here on")


@pytest.mark.parametrize(
    "name",
    ["Poster #3.run", "#3", "a: b", "*a", "&a b", "!x", "@x", "%x", "- x", "? x", "| x", "---", "it's", "a, b", "`x`",
     "> x", "a]", "1:30", "2024-01-01", "1_000", "no", "...", "<<"],
)  # fmt: skip
def test_a_name_in_an_option_is_that_name(write, tmp_path, monkeypatch, name):
    """`Poster #3.run` was read as `Poster`, and two posters met in one folder: an option has no comments."""
    monkeypatch.chdir(tmp_path)
    assert load_config(write(SMALL), [f"work_dir={name}"]).work_dir == tmp_path / name
    assert load_config(write(SMALL), [f"styles.0.image={name}"]).styles[0].image == tmp_path / name
    quoted = name.replace("'", "''")
    assert load_config(write(SMALL), [f"styles=[{{image: '{quoted}'}}]"]).styles[0].image == tmp_path / name


@pytest.mark.parametrize(
    "setting",
    [
        'output="a.png" # x',
        "styles=[{image: a #1.jpg}]",
        "styles=[{image: a.jpg}] # best",
        "loss={\n# all\nkind: gatys}",
    ],
)
def test_an_option_has_no_comments(write, setting):
    """What follows a # would be dropped in silence."""
    assert "an option has no comments" in only(write(SMALL), setting.replace("\\n", "\n"))


def test_a_missing_input_is_named_with_its_key_and_line(write, tmp_path):
    """The artist finds the mistyped name at once, and the file that was meant."""
    (tmp_path / "a.tiff").touch()
    path = write(SMALL)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["loss.content_mask=m.png"], check_inputs=True)
    assert str(caught.value).splitlines() == [
        f"{path}:1:10: content: no such file: {tmp_path / 'a.tif'}; did you mean 'a.tiff'?",
        f"{path}:2:18: styles.0.image: no such file: {tmp_path / 's.jpg'}",
        f"--set loss.content_mask=m.png: loss.content_mask: no such file: {Path.cwd() / 'm.png'}",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("content=[1] a.jpg", "needs quotes of its own: '\"[1] a.jpg\"'"),
        ("seed", "not key=value"),
        ("=3", "not key=value"),
        ("loss..kind=gatys", "not key=value"),
        (".".join("a" * 2000) + "=1", "not key=value"),
        ("seed.x=3", "this is a single value"),
        ("styles.1.weight=3", "there is no entry 1; the list has 1, counted from 0"),
        ("styles.-1.weight=3", "there is no entry -1"),
        ("loss={kind: gatys, kind: gatys}", "loss.kind: duplicate key; keep"),
        ("loss={kind: gatys", "loss: not valid YAML"),
        ("sede=3", "sede: unknown key"),
        ("los.kind=gatys", "los: unknown key"),
        ("a\nb=3", "unknown key"),
    ],
)
def test_wrong_overrides(write, setting, message):
    """The message for a wrong override points at the command line, not at the file."""
    line = only(write(SMALL + "seed: 1\n"), setting)
    assert line.startswith("--set ")
    assert message in line


# --- generated configs ---


def _values(annotation: Any) -> st.SearchStrategy[Any]:
    """Valid YAML values of a field of this type."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(inner[0])
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(_values, inner))
    if origin is dict:
        return st.dictionaries(st.sampled_from(["conv1_1", "conv3_4", "conv5_1"]), st.floats(0.001, 1e6), min_size=1)
    plain = {
        types.NoneType: st.none(),
        bool: st.booleans(),
        float: st.floats(0, 0.999, exclude_min=True),
        int: st.sampled_from([16, 32, 64]),
        str: st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
        Length: st.sampled_from(["6mm", "2.5cm", "1m", "0.125in"]),
    }
    return plain[annotation]


def _leaves(model: type[BaseModel], start: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every setting that is not a path."""
    for name, field in fields_of(model).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{start}{name}.")
        elif name == "styles":
            yield "styles.0.weight", float
        elif name == "size":
            yield "size", int | None  # with a content
        elif name == "stage_ratio":
            yield "stage_ratio", Literal[2, 3]  # limits that other numbers do not have
        elif name == "coarse_iterations":
            yield start + name, Literal[1, 2.5]
        elif name == "dpi":
            yield start + name, Literal[72, 299.5]
        elif name in ("stages", "devices"):
            continue  # a list of sections; a list that has to fit compute.device
        elif "path" not in expected(field.annotation, field.metadata):
            yield start + name, field.annotation


LEAVES = dict(_leaves(Config))
VALUES = st.fixed_dictionaries({}, optional={key: _values(kind) for key, kind in LEAVES.items()})


def _value(config: BaseModel, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        attribute = "purpose" if part == "for" else part  # a keyword of Python
        value = value[int(part)] if isinstance(value, tuple) else getattr(value, attribute)
    return str(value) if isinstance(value, Length) else value


def _settings(values: dict[str, Any]) -> list[str]:
    return [
        f"{key}={yaml.safe_dump([value], default_flow_style=True, width=10**9).strip()[1:-1]}"
        for key, value in values.items()
    ]


@QUICK
@given(values=VALUES)
def test_any_right_value_arrives_as_written(write, values):
    """No setting may be dropped, rounded or assigned to another key."""
    chunk_px, tile_px = values.get("store.chunk_px", 512), values.get("compute.tile_px", "auto")
    assume(tile_px == "auto" or tile_px % chunk_px == 0)
    assume((values.get("export.bits"), values.get("export.compression")) != (16, "jpeg"))
    if values.get("export.compression") != "jpeg":
        values.pop("export.quality", None)  # which is for JPEG only
    if values.get("export.for") == "print":
        assume(values.get("export.compression") in (None, "deflate", "lzw", "none"))
    if values.get("export.for") == "print" or not values.get("export.pyramid", True):
        values.pop("export.levels", None)  # there are none
    unfit = not values.get("optimizer.clip", True) or values.get("compute.dtype") == "float64"
    assume(not unfit or values.get("store.state_dtype") != "compact")
    values.pop("export.panels.overlap", None)  # which needs a width, and must be smaller
    values.pop("preset", None)  # its values may contradict these: test_presets.py
    config = load_config(write(SMALL), _settings(values))
    for key, value in values.items():
        assert _value(config, key) == value
    again: Any = {}
    for key, value in values.items():
        *sections, name = key.split(".") if key != "styles.0.weight" else ("styles.0", "weight")
        inner = again if sections else again.setdefault("", {})
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    text = yaml.safe_dump({**yaml.safe_load(SMALL), **again.pop("", {})}, sort_keys=False)
    style = again.pop("styles.0", {})
    text = text.replace("- image: s.jpg", f"- {{image: s.jpg, weight: {style.get('weight', 1.0)}}}")
    assert load_config(write(text + (yaml.safe_dump(again) if again else ""))) == config


_YAML_WORDS = [":", "\n", "  ", "\t", "- ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "'", '"', "#", "|", "<<: ", "? "]
_VALUE_WORDS = ["null", "true", "1e-3", ".nan", "9" * 5000, "-1", "~", "seed: 1\n", "é", "\u2028"]
_BAD_WORDS = ["\0", "\ud800", "\\ud800", "\\U99999999", "%YAML 9.9\n", "%YAML 1." + "9" * 5000 + "\n", "---\n"]
WORDS = st.sampled_from(_YAML_WORDS + _VALUE_WORDS + _BAD_WORDS)


@QUICK
@given(data=st.data())
def test_mutated_configs_never_crash(write, data):
    """Any typo gives a message, never a traceback."""
    text = template() if data.draw(st.booleans()) else SMALL
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(start + 6, len(text))))
        text = text[:start] + data.draw(WORDS | st.text(max_size=3)) + text[end:]
    _refuse_or_load(write(text.encode("utf-8", "surrogatepass")), [])


@QUICK
@given(
    raw=st.binary(max_size=200),
    setting=st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(list(LEAVES)), WORDS),
)
def test_noise_never_crashes(write, raw, setting):
    """The same for binary files and arbitrary overrides."""
    _refuse_or_load(write(raw), [setting])
    _refuse_or_load(write(SMALL), [setting])


def _refuse_or_load(path: Path, overrides: list[str]) -> None:
    try:
        load_config(path, overrides)
    except ConfigError as error:
        for line in str(error).split("\n"):
            assert LINE.fullmatch(line), line


# --- what a resume compares ---

HARMLESS = {
    "compute.device",
    "compute.tile_px",
    "memory.limit",
    "store.commit_interval",
}
HARMLESS |= {"compute.workers", "compute.threads", "store.durability"}
HARMLESS |= {"compute.devices", "compute.scheduler", "compute.cluster_key"}
HARMLESS |= {*(key for key in LEAVES if key.startswith(("export.", "limits.")))}


def test_harmless_changes_let_a_run_go_on(write):
    """A run resumes after a change of the device, a folder or the memory limit."""
    before = result_fields(load_config(write(SMALL)))
    overrides = [
        "compute.device=cpu",
        "compute.tile_px=1024",
        "compute.workers=2",
        "compute.threads=3",
        "compute.devices=[cpu, cpu]",
        "compute.cluster_key=key.pem",
        "memory.limit=1GiB",
        "limits.max_pixels=7",
        "export.pyramid=false",
    ]
    overrides += [
        "output=b.tif",
        "work_dir=b",
        "content=moved.tif",
        "styles.0.image=moved.jpg",
        "network.weights=moved.pth",
    ]
    for export in (["bits=16", "compression=none", "for=print"], ["compression=jpeg", "quality=1"]):
        overridden = load_config(write(SMALL), [*overrides, *(f"export.{setting}" for setting in export)])
        assert result_fields(overridden) == before


@QUICK
@given(key=st.sampled_from(sorted(LEAVES.keys() - {"preset"})), data=st.data())  # it stands for values of other keys
def test_every_other_change_is_noticed(write, key, data):
    """If a resume missed a change, one image would be rendered with two different settings."""
    value = data.draw(_values(LEAVES[key]))
    needed = {"export.quality": "export.compression=jpeg", "export.panels.overlap": "export.panels.width=9m"}
    base = ["store.chunk_px=16", *([needed[key]] if key in needed else [])]
    before = load_config(write(SMALL), base)
    after = load_config(write(SMALL), [*base, *_settings({key: value})])
    assume(_value(before, key) != _value(after, key))
    changed = {name for name, _ in result_fields(before).items() ^ result_fields(after).items()}
    if key in HARMLESS:
        assert not changed
    else:
        assert changed
        # The default of stop_condition follows the schedule, so both may be named.
        assert all(name.startswith(key) or name == "optimizer.stop_condition" for name in changed)


def test_result_fields_are_flat_and_json_able(write):
    """The manifest stores them as JSON."""
    fields = result_fields(load_config(write(SMALL), ["styles=[{image: a.jpg}, {image: b.jpg, weight: 2}]"]))
    assert fields["styles.1.weight"] == 2.0
    assert fields["network.style_layers.conv5_1"] == 0.1
    assert all(value is None or isinstance(value, str | int | float | bool) for value in fields.values())
    assert not any("image" in key or key == "content" for key in fields)
