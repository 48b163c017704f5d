"""What a person should know of the output images: options that change nothing, files of an earlier export."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from pipeline.config import ExportConfig
from pipeline.core.files import names_in
from pipeline.core.image_formats import ineffective_options
from pipeline.core.text import count
from pipeline.images import OutputColors
from pipeline.plan import whole_of


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
