"""Neural style transfer at print size: exact tiles, disk-backed state, bounded memory, exact resume.

The public surface, beside the CLI, the config schema and the layout on disk.
"""

from pipeline.config import Config, load_config
from pipeline.crop import crop
from pipeline.preview import preview
from pipeline.run import run
from pipeline.status import export, status
from pipeline.survey import plan
from pipeline.verify import verify

__all__ = ["Config", "crop", "export", "load_config", "plan", "preview", "run", "status", "verify"]
