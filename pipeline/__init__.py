"""Neural style transfer at print size: exact tiles, disk-backed state, bounded memory, exact resume.

The public API, beside the command line, the config schema and the layout on disk. Each name is imported on first use,
so that `import pipeline` is fast and the command line can handle signals before the slow imports.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False  # importing typing would be the slowest step before the signal handlers are installed
if TYPE_CHECKING:
    from pipeline.commands.apply import apply
    from pipeline.commands.clean import clean
    from pipeline.commands.export import export
    from pipeline.commands.gallery import gallery
    from pipeline.commands.measure import measured_time
    from pipeline.commands.preview.crop import CropSpec, crop
    from pipeline.commands.preview.preview import GridSpec, preview
    from pipeline.commands.preview.proof import ProofSpec, proof
    from pipeline.commands.run import run
    from pipeline.commands.start import outlook
    from pipeline.commands.status import status
    from pipeline.commands.train import train
    from pipeline.commands.verify.store_check import SampleSpec
    from pipeline.commands.verify.verify import verify
    from pipeline.commands.view import view
    from pipeline.config.apply import ApplyConfig, load_apply_config
    from pipeline.config.config import Config, load_config
    from pipeline.config.training import TrainConfig, load_train_config
    from pipeline.core.allocator import set_up_process
    from pipeline.rundir.preflight import plan

__all__ = [
    "ApplyConfig",
    "Config",
    "CropSpec",
    "GridSpec",
    "ProofSpec",
    "SampleSpec",
    "TrainConfig",
    "apply",
    "clean",
    "crop",
    "export",
    "gallery",
    "load_apply_config",
    "load_config",
    "load_train_config",
    "measured_time",
    "outlook",
    "plan",
    "preview",
    "proof",
    "run",
    "set_up_process",
    "status",
    "train",
    "verify",
    "view",
]

# The module of each name.
_HOMES = {
    "ApplyConfig": "config.apply",
    "Config": "config.config",
    "CropSpec": "commands.preview.crop",
    "GridSpec": "commands.preview.preview",
    "ProofSpec": "commands.preview.proof",
    "SampleSpec": "commands.verify.store_check",
    "TrainConfig": "config.training",
    "apply": "commands.apply",
    "clean": "commands.clean",
    "crop": "commands.preview.crop",
    "export": "commands.export",
    "gallery": "commands.gallery",
    "load_apply_config": "config.apply",
    "load_config": "config.config",
    "load_train_config": "config.training",
    "measured_time": "commands.measure",
    "outlook": "commands.start",
    "plan": "rundir.preflight",
    "preview": "commands.preview.preview",
    "proof": "commands.preview.proof",
    "run": "commands.run",
    "set_up_process": "core.allocator",
    "status": "commands.status",
    "train": "commands.train",
    "verify": "commands.verify.verify",
    "view": "commands.view",
}


class _Package(ModuleType):
    """This package. Where a function and a module share a name, the attribute is always the function."""

    def __getattr__(self, name: str) -> object:
        from importlib import import_module  # noqa: PLC0415 - slow

        if name == "errors":  # the exceptions of the functions, as pipeline.errors.Stopped
            return import_module("pipeline.core.errors")
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value: object = getattr(import_module(f"pipeline.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            return  # the import system sets every imported module as an attribute of its package
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
