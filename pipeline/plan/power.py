"""The power that this machine draws while it works, measured where the system says it, else assumed.

A GPU's draw comes from nvidia-smi, a processor's from RAPL (Linux; most systems let only root read it). What neither
sees, the rest of the computer, is assumed to draw REST_W; a processor that cannot be measured CORE_W per core.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

REST_W = 60.0
CORE_W = 10.0
_RAPL = Path("/sys/class/powercap")
_SAMPLE_S = 0.5


@dataclass(frozen=True)
class Power:
    """Watts of the whole computer, and where they come from, in words."""

    watts: float
    source: str


class PowerMeter:
    """Measures the power of a device between entering and leaving the block."""

    def __init__(self, device: str):
        self._device = device
        self._ended = threading.Event()
        self._samples_w: list[float] = []
        self._sampler = threading.Thread(target=self._sample, name="power", daemon=True)

    def __enter__(self) -> PowerMeter:
        self._since, self._joule = time.monotonic(), _rapl_joule()
        if self._device != "cpu":
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds, self._joule_after = time.monotonic() - self._since, _rapl_joule()
        self._ended.set()
        if self._sampler.ident is not None:
            self._sampler.join()

    def power(self) -> Power:
        """What was measured, once the block has been left."""
        parts, sources = REST_W, [f"{REST_W:.0f} W assumed for the rest"]
        if self._samples_w:
            parts += median(self._samples_w)
            sources.insert(0, "GPU by nvidia-smi")
        if self._joule is not None and self._joule_after is not None and self._joule_after > self._joule:
            parts += (self._joule_after - self._joule) / self._seconds
            sources.insert(0, "processor by RAPL")
        if len(sources) == 1:
            cores = psutil.cpu_count(logical=False) or 1
            return Power(REST_W + CORE_W * cores, f"assumed: {REST_W:.0f} W and {CORE_W:.0f} W per core")
        return Power(parts, ", ".join(sources))

    def _sample(self) -> None:
        # without nvidia-smi, or with another maker's GPU, nothing is measured
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, AttributeError):
            command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
            command += ["-i", _gpu_name(self._device)]
            while not self._ended.wait(_SAMPLE_S):
                answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
                self._samples_w.append(float(answer.stdout))


def _gpu_name(device: str) -> str:
    """The UUID of a CUDA device: nvidia-smi counts devices that CUDA_VISIBLE_DEVICES hides."""
    import torch  # noqa: PLC0415 - only a machine with a GPU gets here

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def _rapl_joule() -> float | None:
    """The energy counter of all processor packages; None where it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        # other zones hold the packages too (psys, the whole board), or are parts of them
        zones = [path for path in _RAPL.glob("intel-rapl:*") if _text(path / "name").startswith("package")]
        if zones:
            return sum(int(_text(zone / "energy_uj")) for zone in zones) / 1e6
    return None
