"""The names of the presets; their files are in assets/presets."""

from typing import Literal, get_args

PresetName = Literal["painterly", "faithful", "texture", "portrait", "flat", "paper"]
PRESETS: tuple[str, ...] = get_args(PresetName)
