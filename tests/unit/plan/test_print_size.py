"""The size on paper: a result of another size would be refused by the printer, or rendered for days in vain."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import ConfigError
from pipeline.plan.sizes import canvas_shape, fit, with_size_in_px
from tests.support.plans import Header, config_of, headers, planned

TEXTURE: dict[str, Any] = {"content": None, "loss": {"content_weight": 0}}


def canvas_of(size: object, content: tuple[int, int] | None, **values: Any) -> tuple[int, int]:
    """(height, width) of the last stage."""
    config = with_size_in_px(config_of(size=size, **({} if content else TEXTURE), **values), content)
    shape = canvas_shape(config, headers(content, [(10, 10)]))
    assert config.target_px is not None
    return fit(shape, config.target_px)


@given(
    content=st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    side=st.sampled_from(["width", "height", "long_side"]),
    side_px=st.integers(16, 10_000),
)
def test_the_side_that_is_asked_for_has_exactly_its_px(content, side, side_px):
    """At 254 dpi a px is 0.1 mm. A px less, and a frame shows a white line."""
    height, width = content
    long_px = round(side_px * max(content) / {"width": width, "height": height, "long_side": max(content)}[side])
    if not 16 <= long_px <= 1_000_000:
        return
    canvas = canvas_of({side: f"{side_px / 10}mm", "dpi": 254}, content)
    assert {"width": canvas[1], "height": canvas[0], "long_side": max(canvas)}[side] == side_px


@pytest.mark.parametrize(
    ("size", "export", "canvas"),
    [
        ("254mm", {}, (2000, 3000)),  # 300 dpi by default
        ("254mm", {"dpi": 100}, (667, 1000)),
        ({"width": "254mm", "dpi": 150}, {}, (1000, 1500)),
        ({"height": "10in", "dpi": 150}, {"dpi": 150}, (1500, 2250)),
    ],
)
def test_the_resolution_of_a_size_on_paper(size, export, canvas):
    assert canvas_of(size, (400, 600), export=export) == canvas


@pytest.mark.parametrize(
    ("size", "canvas"),
    [("1in", (300, 300)), ({"width": "1in"}, (300, 300)), ({"width": "2in", "height": "1in", "dpi": 100}, (100, 200))],
)
def test_a_texture_on_paper(size, canvas):
    assert canvas_of(size, None) == canvas


@pytest.mark.parametrize(
    ("size", "export", "problem"),
    [
        ({"dpi": 100}, {}, "no length"),
        ({"width": "1m", "height": "1m"}, {}, "width and height together"),
        ({"width": "1m", "dpi": 100}, {"dpi": 200}, "another size on paper"),
        ("1mm", {}, "would be 12 px, but 16 to 1,000,000 px"),
        ("200m", {}, "would be 2,362,205 px"),
    ],
)
def test_sizes_that_cannot_be(size, export, problem):
    with pytest.raises((ValueError, ConfigError), match=problem):
        with_size_in_px(config_of(size=size, export=export), (400, 600))


def test_the_contents_size_on_paper_is_kept():
    """A picture of 30,000 px opened as 30 m wide."""
    content = Header(1000, 800, dpi=200)
    assert planned_dpi(content, size=2000) == 400
    assert planned_dpi(content, size=1000) == 200
    assert planned_dpi(content, size=2000, export={"dpi": 72}) == 72
    assert planned_dpi(Header(1000, 800), size=2000) == 300  # about which nothing is known


def planned_dpi(content: Header, **values: Any) -> float:
    from pipeline.plan.sizes import output_dpi

    config = config_of(styles=[{"image": "/s0.png"}], **values)
    canvas = fit((content.height_px, content.width_px), values["size"])
    return output_dpi(config, canvas, {config.content: content})


def test_the_plan_counts_what_lies_around_the_canvas():
    """Else a disk that is full at the last minute loses a day."""
    plain = planned(output="/o.tif")
    wide = planned(output="/o.tif", export={"dpi": 254, "bleed": "50mm", "panels": "60mm"})
    assert list(plain.outputs.values()) == [(1000, 800)]
    assert list(wide.outputs.items()) == [
        ("/o-1of3.tif", (2000, 600)),
        ("/o-2of3.tif", (2000, 600)),
        ("/o-3of3.tif", (2000, 600)),
    ]
    assert wide.output_bytes == plain.output_bytes * (2000 * 1800) // (1000 * 800)
    edges = planned(output="/o.tif", export={"dpi": 254, "bleed": "1mm"})
    assert (
        edges.host_bytes["export"] > plain.host_bytes["export"] + 512 * 800 * 3
    )  # rows of the canvas and of the sheet
