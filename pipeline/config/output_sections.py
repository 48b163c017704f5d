"""The section `export` of a config: the file format, the edges and the panels of the output."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StrictBool, model_validator

from pipeline.config.fields import Bool, Dpi, Int, Length, Profile
from pipeline.config.messages import Expected
from pipeline.config.sections import Section
from pipeline.core.image_formats import TIFF_COMPRESSIONS, Bits, Compression, Intent, Levels, MetadataKept, Purpose
from pipeline.core.lengths import NO_LENGTH


class EdgeConfig(Section):
    """What continues the picture beyond its edges: mirrored, and further out its last pixels drawn out.

    A length alone is mirrored.
    """

    mirror: Length = Field(NO_LENGTH, description="how far the picture continues as its mirror image")
    stretch: Length = Field(NO_LENGTH, description="how far its outermost pixels are repeated, beyond the mirror image")

    @model_validator(mode="before")
    @classmethod
    def _of_a_length(cls, data: object) -> object:
        return _section_of(data, "mirror")


class PanelsConfig(Section):
    """Panels side by side, each a file. A length alone is their width."""

    width: Length | None = Field(None, description="width of a panel, what the printer can print; null: one file")
    overlap: Length = Field(NO_LENGTH, description="width that neighbouring panels share")

    @model_validator(mode="before")
    @classmethod
    def _of_a_length(cls, data: object) -> object:
        return _section_of(data, "width")


def _section_of(data: object, name: str) -> object:
    """The data of a section that may be written as its most used key alone, or as null."""
    if data is None:
        return {}
    return data if isinstance(data, dict | Section) else {name: data}


class ExportConfig(Section):
    """How the output image is written."""

    metadata: MetadataKept = Field(
        "keep", description="keep: author, rights and captions of the content; keep-gps: and its place; none"
    )
    bits: Bits = Field("auto", description="bits per channel; auto: 16 if content and format have 16, else 8")
    compression: Annotated[Compression, Expected(f"one of {', '.join(TIFF_COMPRESSIONS)}")] = Field(
        "deflate", description="compression of a TIFF"
    )
    quality: Int = Field(95, ge=1, le=100, description="JPEG quality")
    profile: Profile = Field(
        "srgb", description="colours of the output; content: as the content; or a printer's profile"
    )
    intent: Intent = Field("relative", description="rendering intent of a printer's profile")
    black_point_compensation: Bool = Field(True, description="map black to the printer's black")
    pyramid: StrictBool = Field(
        True, description="smaller levels in a TIFF, for viewers; a third more disk space, two thirds while writing"
    )
    dpi: Dpi | None = Field(
        None, description="px per inch of the print; null: the content's, scaled with the size, or 300"
    )
    wrap: EdgeConfig = Field(EdgeConfig(), description="sides of a canvas, folded over its frame")
    border: Length = Field(NO_LENGTH, description="white border, outside the wrap")
    bleed: EdgeConfig = Field(EdgeConfig(), description="what is cut off, outside all else; white around a border")
    marks: StrictBool = Field(False, description="crop marks, in a white margin of 8mm")
    panels: PanelsConfig = Field(PanelsConfig(), description="several files, numbered, for walls wider than a printer")
    purpose: Purpose = Field(
        "viewer", alias="for", description="reader of a TIFF; print: strips without levels, for layout programs"
    )
    levels: Levels = Field("pages", description="place of a TIFF's levels; subifds: for Bio-Formats (QuPath)")

    @property
    def has_levels(self) -> bool:
        """Whether a TIFF has smaller levels."""
        return self.pyramid and self.purpose == "viewer"

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults; `pipeline init` writes the defaults for every format."""
        return self.model_dump(exclude_defaults=True)
