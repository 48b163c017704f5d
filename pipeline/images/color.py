"""The colours of input images: what a file says about them, and their conversion to the colour space of the canvas.

    channels ──► the picture's own ──► linear light (matrix profile, or libvips' XYZ) ──► [a printer's gamut] ──► canvas

Everything between is in float and may leave 0..1, so that nothing is clipped before the last step. Images of 8 bits
that become sRGB take libvips' own path instead, which is as exact at that depth, and gives the bytes it always gave.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyvips

from pipeline.core.color_spaces import D50, Matrix, SpaceName, space_matrix, to_d50
from pipeline.images import icc, png, tiff
from pipeline.images.vips_streams import FileSource

# How TIFFs may store colours (tag 262): white or black is 0, RGB, palette, CMYK, YCbCr, CIELAB, ICC's L*a*b*.
_CIELAB, _ICCLAB = 8, 9
_PHOTOMETRICS = {0, 1, 2, 3, 5, 6, _CIELAB, _ICCLAB}
_COLORS = {"cmyk": 4, "b-w": 1, "grey16": 1}  # their number, by libvips' interpretation; else 3
# The white of libvips' XYZ; its Lab has a slightly other one.
VIPS_WHITE, _VIPS_LAB_WHITE = (0.95046, 1.0, 1.08904), np.array([0.95047, 1.0, 1.088827])
_LAB_TO_D50 = np.diag(D50 / _VIPS_LAB_WHITE)
_ICC_TO_XYZ = {"pcs": "xyz", "intent": "relative", "black_point_compensation": True}


class UnreadableColorsError(ValueError):
    """A way of storing colours that would be read as wrong ones. The text completes a sentence about the file."""


@dataclass(frozen=True)
class Colors:
    """What colours are converted to. `proof`: a printer's profile, through which they are taken and back."""

    space: SpaceName = "srgb"
    proof: icc.Profile | None = None


SRGB = Colors()


@dataclass(frozen=True)
class ColorSource:
    """What a file says about its colours.

    `count`: channels that are colours, the first ones. `alpha`: index of the alpha channel. `ignored`: further
    channels, such as saved selections and spot colours. `profile`: None without a usable one. `icc_lab`: the pixels
    are L*a*b* as in ICC profiles, which libvips takes for RGB. `plain_rgb`: they are RGB, and marked as grey.
    `embedded`: the profile is one of the file, and not what other parts of it mean.
    """

    count: int
    alpha: int | None
    ignored: int
    profile: icc.Profile | None
    icc_lab: bool = False
    plain_rgb: bool = False
    embedded: bool = True

    def needs_float(self, colors: Colors, bits: int) -> bool:
        """Whether libvips' own conversion to sRGB would be wrong, or does not lead to `colors`."""
        if colors != SRGB or self.icc_lab or not self.embedded:
            return True
        return bits == 16 and self.profile is not None and not self.is_srgb

    @property
    def is_srgb(self) -> bool:
        """Whether the file has the very profile that we write."""
        return self.profile is not None and self.profile.data == icc.builtin_profile("srgb").data


PLAIN_RGB = ColorSource(3, None, 0, None)


def color_source(file: FileSource, image: Any) -> ColorSource:
    """Read what an opened file says. Raises UnreadableColorsError."""
    loader, space = str(image.get("vips-loader")), str(image.interpretation)
    count = _COLORS.get(space, 3)
    # RGB that was written without saying so: a grey picture has no two further channels
    plain_rgb = count == 1 and image.bands >= 3
    count = min(3 if plain_rgb else count, image.bands)
    extra = image.bands - count
    alpha = count if extra == 1 else None
    icc_lab = False
    if loader.startswith("tiffload"):
        stored = _tiff_channels(file)
        if stored is not None:
            icc_lab = stored.photometric == _ICCLAB
            if extra and stored.says_extra:
                index = None if stored.alpha is None else (1 if plain_rgb else count) + stored.alpha
                alpha = index if index is not None and count <= index < image.bands else None
    ignored = extra - (alpha is not None)
    if icc_lab or space in ("lab", "labs"):
        return ColorSource(count, alpha, ignored, None, icc_lab)
    said = png.profile(file.read_at) if loader.startswith("pngload") else None
    profile = said or _embedded_profile(image, count)
    return ColorSource(count, alpha, ignored, profile, icc_lab, plain_rgb, embedded=said is None)


def _tiff_channels(file: FileSource) -> tiff.Channels | None:
    try:
        stored = tiff.channels(file.read_at)
    except ValueError:  # libtiff accepts the directory although we cannot read it
        return None
    if stored.photometric not in _PHOTOMETRICS:
        raise UnreadableColorsError(
            f"stores its colours in a way that is not read here (photometric interpretation {stored.photometric}), and "
            "they would come out wrong. Save it as RGB"
        )
    return stored


def unreadable_lab(file: FileSource) -> str | None:
    """Why libvips cannot open an intact TIFF: it has CIELAB of 8 bits without alpha."""
    try:
        stored = tiff.channels(file.read_at)
    except ValueError:
        return None
    if stored.photometric != _CIELAB or stored.bits != 8:
        return None
    return "has CIELAB colours of 8 bits, which libvips cannot read. Save it as RGB, or as Lab of 16 bits"


def _embedded_profile(image: Any, count: int) -> icc.Profile | None:
    """The file's profile. One that is damaged or for other pixels is ignored, as browsers do."""
    if not image.get_typeof("icc-profile-data"):
        return None
    try:
        profile = icc.parse(bytes(image.get("icc-profile-data")))
    except ValueError:
        return None
    return profile if profile.space == {1: "GRAY", 3: "RGB", 4: "CMYK"}.get(count) else None


def converted(image: Any, source: ColorSource, colors: Colors, keep_alpha: bool) -> Any:
    """RGB of 8 or 16 bits, transparent parts composited on white, with the alpha as a fourth band if `keep_alpha`.

    16 bits if the image has them, or if 8 would lose something.
    """
    if source.ignored or source.plain_rgb:
        image = _without_ignored(image, source)
    bits = 16 if image.format == "ushort" else 8
    if source.needs_float(colors, bits):
        alpha = _alpha16(image)
        image = _exactly(image, source, colors)
    else:
        image = _by_libvips(image, bits, source.is_srgb)
        alpha = image.extract_band(image.bands - 1)
    rgb = image.extract_band(0, n=3)
    if source.alpha is None:
        return rgb
    # Before the resize, so that the hidden colours of transparent pixels do not bleed into their neighbours.
    with_alpha = rgb.bandjoin(alpha).copy(interpretation=image.interpretation)
    rgb = with_alpha.flatten(background=[65535 if image.format == "ushort" else 255] * 3)
    return rgb.bandjoin(alpha) if keep_alpha else rgb


def _alpha16(image: Any) -> Any:
    """The last band of an image as 16 bits."""
    if image.format not in ("uchar", "ushort"):  # Lab, whose alpha libvips scales with the colours
        image = image.colourspace("rgb16")
    alpha = image.extract_band(image.bands - 1)
    return alpha if alpha.format == "ushort" else (alpha * 257).cast("ushort")


def _without_ignored(image: Any, source: ColorSource) -> Any:
    """The colours and the alpha alone, in this order."""
    interpretation = str(image.interpretation)
    if source.plain_rgb:
        interpretation = "rgb16" if image.format == "ushort" else "srgb"
    colors = image.extract_band(0, n=source.count)
    if source.alpha is not None:
        colors = colors.bandjoin(image.extract_band(source.alpha))
    return colors.copy(interpretation=interpretation)


def _by_libvips(image: Any, bits: int, is_srgb: bool) -> Any:
    """SRGB by libvips. A profile that it cannot use is ignored, as browsers do."""
    target = "rgb16" if bits == 16 else "srgb"
    if image.get_typeof("icc-profile-data") and not is_srgb:  # our own exports are read back bit for bit
        with contextlib.suppress(pyvips.Error):
            image = image.icc_transform(
                "srgb", embedded=True, intent="relative", black_point_compensation=True, depth=bits
            )
    return image if image.interpretation == target else image.colourspace(target)


def _exactly(image: Any, source: ColorSource, colors: Colors) -> Any:
    """The colours as 16-bit RGB of `colors`, through float."""
    linear = _linear(image, source, space_matrix(colors.space))
    if colors.proof is not None:
        linear = _proofed(linear, colors.proof, space_matrix(colors.space))
    return linear.copy(interpretation="scrgb").colourspace("rgb16")


def _linear(image: Any, source: ColorSource, space: Matrix) -> Any:
    """Linear light in a space, float, of the image's colours."""
    profile, colors = source.profile, image.extract_band(0, n=source.count)
    if profile is None and source.count == 3 and image.interpretation in ("srgb", "rgb16", "rgb"):
        profile = icc.builtin_profile("srgb")
    if profile is not None and profile.curves:
        tables = profile.tables(256 if image.format == "uchar" else 65536).astype(np.float32)
        light = colors.maplut(pyvips.Image.new_from_array(tables[np.newaxis]))
        if profile.matrix is None:  # grey is neutral in every space
            return light.bandjoin([light, light])
        return recombined(light, np.linalg.inv(space) @ profile.matrix)
    if source.icc_lab or image.interpretation in ("lab", "labs"):
        # Lab is relative to its white, which is D50 in print; libvips multiplies it by its own
        return recombined(_lab(image, colors, source).colourspace("xyz"), np.linalg.inv(space) @ _LAB_TO_D50 / 100)
    return recombined(_xyz(image, colors, source), np.linalg.inv(space) @ to_d50(VIPS_WHITE) / 100)


def _lab(image: Any, colors: Any, source: ColorSource) -> Any:
    if not source.icc_lab:
        return colors.copy(interpretation=image.interpretation)
    # 8 bits: 255 is L = 100, and 128 is neutral; 16 bits as in ICC version 2: 0xff00 is L = 100
    lightness, scale = (100 / 255, 1.0) if image.format == "uchar" else (100 / 65280, 1 / 256)
    return colors.linear([lightness, scale, scale], [0, -128, -128]).copy(interpretation="lab")


def _xyz(image: Any, colors: Any, source: ColorSource) -> Any:
    """Libvips' XYZ: by tables of a profile, or what an interpretation alone says."""
    if source.profile is not None:
        with contextlib.suppress(pyvips.Error):
            return colors.icc_import(embedded=True, **_ICC_TO_XYZ)
    return colors.copy(interpretation=image.interpretation).colourspace("xyz")


def recombined(image: Any, matrix: Matrix) -> Any:
    """Every pixel, as a column, multiplied by a matrix."""
    return image.recomb(pyvips.Image.new_from_list(matrix.tolist()))


def with_profile(image: Any, profile: icc.Profile) -> Any:
    """The image with this profile in the place of its own."""
    image = image.copy()
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile.data)
    return image


def _proofed(linear: Any, proof: icc.Profile, space: Matrix) -> Any:
    """The colours as a printer would show them: those that it cannot print become the nearest ones that it can."""
    vips_xyz = recombined(linear, 100 * np.linalg.inv(to_d50(VIPS_WHITE)) @ space).copy(interpretation="xyz")
    printed = with_profile(vips_xyz, proof).icc_export(depth=16, **_ICC_TO_XYZ)
    seen = printed.icc_import(embedded=True, **_ICC_TO_XYZ)
    return recombined(seen, np.linalg.inv(space) @ to_d50(VIPS_WHITE) / 100)
