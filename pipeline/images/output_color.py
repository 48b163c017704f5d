"""The colours of output images: the profile that a file gets, and the conversion from the canvas's space to it.

A profile of curves and a matrix is applied to the canvas's float values by numpy, one of tables (CMYK, most printers)
by libvips, to rows of 16 bits, while the file is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from numpy.typing import NDArray

from pipeline.config import LimitsConfig
from pipeline.core.color_spaces import SpaceName, smallest_space, space_matrix, srgb_decoded, to_d50
from pipeline.core.errors import ConfigError
from pipeline.core.image_formats import PixelKind, ProfileName, format_of
from pipeline.images import icc
from pipeline.images.color import VIPS_WHITE, recombined, with_profile
from pipeline.images.header import describe, open_file, open_image, read_header

# CMYK profiles have up to 5 MB, some device links more.
_MAX_PROFILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class OutputColors:
    """The profile of an output image; `space`: that of the rows. `intent`, `black_point`: of profiles of tables."""

    profile: icc.Profile
    space: SpaceName = "srgb"
    intent: str = "relative"
    black_point: bool = True

    @property
    def by_tables(self) -> bool:
        """Whether libvips converts the rows, which then have 16 bits."""
        return self.profile.matrix is None

    def picture_kind(self, kind: PixelKind) -> PixelKind:
        """The pixels of an image of `kind` in these colours: in CMYK, transparent parts are white."""
        return replace(kind, alpha=False) if self.profile.space == "CMYK" else kind

    def rows_kind(self, kind: PixelKind) -> PixelKind:
        """The pixels of the rows of an image of `kind`."""
        return PixelKind(16, kind.alpha) if self.by_tables else kind

    def convert(self, pixels_HWC: NDArray[Any]) -> NDArray[Any]:
        """Numbers 0..255 of the canvas's space as numbers 0..255 of the output's rows."""
        profile, own = self.profile, icc.space_profile(self.space)
        if self.by_tables or profile.data == own.data:
            return pixels_HWC
        assert profile.matrix is not None
        to_output = (np.linalg.inv(profile.matrix) @ space_matrix(self.space)).astype(np.float32)
        light = srgb_decoded(pixels_HWC.astype(np.float32) / 255) @ to_output.T
        return icc.encode(profile, np.clip(light, 0, 1)) * np.float32(255)

    def through_tables(self, image: Any, kind: PixelKind) -> Any:
        """The libvips image of the rows as one of the output's colours, of the bits of `kind`."""
        if not self.by_tables:
            return image
        numbers = np.linspace(0, 1, 2**16, dtype=np.float64)
        curve = pyvips.Image.new_from_array(srgb_decoded(numbers).astype(np.float32)[np.newaxis])
        light = image.extract_band(0, n=3).maplut(curve)
        to_xyz = 100 * np.linalg.inv(to_d50(VIPS_WHITE)) @ space_matrix(self.space)
        xyz = recombined(light, to_xyz).copy(interpretation="xyz")
        converted = with_profile(xyz, self.profile).icc_export(
            pcs="xyz", intent=self.intent, black_point_compensation=self.black_point, depth=kind.bits
        )
        if not kind.alpha:
            return converted
        alpha = image.extract_band(3)
        alpha = alpha if kind.bits == 16 else (alpha / 257).rint().cast("uchar")
        return converted.bandjoin(alpha).copy(interpretation=converted.interpretation)


def srgb_output(space: SpaceName) -> OutputColors:
    """A canvas of a space as sRGB."""
    return OutputColors(icc.builtin_profile("srgb"), space)


def canvas_output(space: SpaceName) -> OutputColors:
    """A canvas as it is, tagged with the profile of its space."""
    return OutputColors(icc.space_profile(space), space)


def output_profile(
    profile: ProfileName | Path, content: Path | None, limits: LimitsConfig | None = None
) -> icc.Profile:
    """The profile that `export.profile` names. Raises ConfigError for a file that cannot be used, InputError.

    `limits`: of the content, None if it was read before.
    """
    if isinstance(profile, Path):
        return _profile_file("export.profile", profile)
    if profile != "content":
        return icc.builtin_profile(profile)
    found = None if content is None else _content_profile(content, limits)
    # grey holds none of the canvas's colours, and a picture without a profile counts as sRGB
    usable = found is not None and found.space in ("RGB", "CMYK") and found.writable
    return found if usable and found is not None else icc.builtin_profile("srgb")


def _content_profile(content: Path, limits: LimitsConfig | None) -> icc.Profile | None:
    if limits is not None:
        return read_header(content, limits).colors.profile
    file = open_file(content)
    return describe(file, open_image(file, "sequential")).colors.profile


def proof_profile(path: Path) -> icc.Profile:
    """The profile that `proof` names. Raises ConfigError for a file that cannot be used."""
    return _profile_file("proof", path)


def _profile_file(key: str, path: Path) -> icc.Profile:
    try:
        if path.stat().st_size > _MAX_PROFILE_BYTES:
            raise ConfigError(f"{key}: {path}: is too large for an ICC profile.")
        profile = icc.parse(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{key}: {path}: no such file.") from None
    except OSError as error:
        raise ConfigError(f"{key}: {path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{key}: {path}: is not an ICC profile that can be used ({error}).") from error
    if profile.space not in ("RGB", "CMYK") or profile.device in ("link", "abst", "nmcl"):
        raise ConfigError(
            f"{key}: {path}: is a profile of {profile.space} colours and class {profile.device}. Use the profile of an "
            "RGB or CMYK printer, screen or colour space."
        )
    if not profile.writable:
        raise ConfigError(
            f"{key}: {path}: {profile.name} only describes colours that a device has read, such as a scanner, and "
            "nothing can be converted to it. Use the profile of a printer or of a colour space."
        )
    return profile


def wanted_space(profile: icc.Profile) -> SpaceName:
    """The space of a canvas for a profile: the smallest one that has its colours.

    Printers' colours are taken to be in Adobe RGB, which was made to hold those of offset printing.
    """
    return "adobe-rgb" if profile.matrix is None else smallest_space(profile.matrix)


def check_colors(path: Path, colors: OutputColors, compression: str) -> None:
    """Raise ConfigError if the format of `path` cannot hold the profile's colours."""
    form = format_of(path)
    if colors.profile.space == "CMYK" and (form is None or form.name != "TIFF"):
        raise ConfigError(f"{path}: {colors.profile.name} is a profile of CMYK colours. Use .tif, or another profile.")
    if colors.profile.space == "CMYK" and compression == "jpeg":
        raise ConfigError(f"{path}: JPEG in TIFF is written in RGB only. Use deflate for {colors.profile.name}.")
