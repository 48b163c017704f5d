"""Neural style transfer at print size: exact tiles, disk-backed state, bounded memory, exact resume.

The public API, beside the command line, the config schema and the layout on disk. Each name is imported on first use,
so that `import pipeline` is fast and the command line can handle signals before the slow imports.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False  # importing typing would be the slowest step before the signal handlers are installed
if TYPE_CHECKING:
    from pipeline.commands.apply import apply as apply
    from pipeline.commands.clean import clean as clean
    from pipeline.commands.export import export as export
    from pipeline.commands.gallery import gallery as gallery
    from pipeline.commands.measure import measured_time as measured_time
    from pipeline.commands.preview.crop import CropSpec as CropSpec
    from pipeline.commands.preview.crop import crop as crop
    from pipeline.commands.preview.preview import GridSpec as GridSpec
    from pipeline.commands.preview.preview import preview as preview
    from pipeline.commands.preview.proof import ProofSpec as ProofSpec
    from pipeline.commands.preview.proof import proof as proof
    from pipeline.commands.run import run as run
    from pipeline.commands.start import outlook as outlook
    from pipeline.commands.status import status as status
    from pipeline.commands.train import train as train
    from pipeline.commands.verify.store_check import SampleSpec as SampleSpec
    from pipeline.commands.verify.verify import verify as verify
    from pipeline.commands.view import view as view
    from pipeline.config.apply import ApplyConfig as ApplyConfig
    from pipeline.config.apply import load_apply_config as load_apply_config
    from pipeline.config.config import Config as Config
    from pipeline.config.config import load_config as load_config
    from pipeline.config.training import TrainConfig as TrainConfig
    from pipeline.config.training import load_train_config as load_train_config
    from pipeline.core.allocator import set_up_process as set_up_process
    from pipeline.rundir.preflight import plan as plan

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
__all__ = list(_HOMES)


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
