"""What a person should know of a run: colours that are converted, options without effect, files of earlier exports."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from pipeline.config import AnyConfig, ExportConfig
from pipeline.core.color_spaces import SPACES, SpaceName
from pipeline.core.files import names_in
from pipeline.core.image_formats import ineffective_options
from pipeline.core.text import count
from pipeline.images import ImageHeader, OutputColors, wanted_space
from pipeline.plan import whole_of


def color_notes(config: AnyConfig, images: Mapping[Path, ImageHeader], colors: OutputColors) -> tuple[str, ...]:
    """What happens to colours; nothing where all is sRGB. `images`: the headers of all input images."""
    masks = set(config.masks)
    notes = [note for path, header in images.items() if path not in masks for note in _of_image(header, colors.space)]
    if config.proof is not None:
        notes.append(f"content and styles are proofed: they keep the colours that {config.proof.name} can print")
    profile = colors.profile
    if colors.space != "srgb":
        notes.append(f"the canvas has the colours of {colors.space}, with sRGB's tone curve")
    if colors.by_tables:
        black = ", black point compensation" if colors.black_point else ""
        notes.append(f"the output is converted to {profile.name} ({profile.space}, {colors.intent}{black})")
        if profile.space == "CMYK" and config.content is not None and images[config.content].kind.alpha:
            notes.append("the output is CMYK, which is written without alpha: transparent parts are white")
    elif config.export.profile != "srgb":
        notes.append(f"the output has the profile {profile.name}")
    return tuple(notes)


def _of_image(header: ImageHeader, space: SpaceName) -> Iterator[str]:
    source, name = header.colors, header.path.name
    if source.ignored:
        beyond = "its colours and its alpha" if header.kind.alpha else "its colours"
        yield f"{name}: {count(source.ignored, 'channel')} beyond {beyond}: ignored"
    if source.plain_rgb:
        yield f"{name}: is marked as grey, has {header.bands} channels, and is read as RGB"
    if source.icc_lab:
        yield f"{name}: L*a*b* is converted to {space}"
    profile = source.profile
    if profile is None:
        return
    own: SpaceName = "srgb" if profile.space == "GRAY" else wanted_space(profile)
    if SPACES.index(own) > SPACES.index(space):
        keep = (
            "export.profile: content would keep them" if profile.space == "RGB" else "another export.profile keeps them"
        )
        yield f"{name}: {profile.name} is converted to {space}; colours beyond it are clipped ({keep})"
    elif own != space:
        yield f"{name}: {profile.name} is converted to {space}"


def export_notes(output: Path, options: ExportConfig, colors: OutputColors) -> Iterator[str]:
    """A sentence for every option that changes nothing in this output."""
    yield from ineffective_options(output, options.changed)
    if colors.by_tables:
        return
    for name in ("intent", "black_point_compensation"):
        if name in options.changed:
            yield f"export.{name} is for profiles of tables, and changes nothing for {colors.profile.name}"


def sheet_notes(output: Path, images: Collection[Path]) -> Iterator[str]:
    """A sentence on panels, or a whole image, that lie beside the output images `images` and are not part of them."""
    own = set(images)
    paths = [output.with_name(name) for name in sorted(names_in(output.parent))]
    others = [path for path in paths if path not in own and whole_of(path)[0] == output]
    if others:
        names = ", ".join(path.name for path in others[:3]) + (f" and {len(others) - 3} more" if others[3:] else "")
        yield f"beside the {count(len(own), 'image')} of this export lie others that are not part of it: {names}"
