"""tools/picture/lab.py on tiny images: it renders what is missing, and only that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from tests.support.inputs import write_image
from tools.picture import lab


def run_lab(folder: Path, weights: Path, settings: dict[str, Any], *options: str) -> dict[str, int]:
    """The time of every result, by pair and setting."""
    base = {"size": 96, "initial_size": 96, "network": {"weights": str(weights)}, "optimizer": {"max_iterations": 1}}
    keys = {
        "base": {**base, "store": {"chunk_px": 96}, "compute": {"device": "cpu"}},
        "settings": settings,
        "pairs": {"pair": {"content": "content.png", "style": "style.png"}},
        "identity": True,
        "cell_px": 64,
    }
    (folder / "lab.yaml").write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    arguments = [str(folder / "lab.yaml"), str(folder / "out"), *options]
    result = CliRunner().invoke(lab.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    results = sorted((folder / "out").glob("*/*/out.png"))
    return {str(path.relative_to(folder / "out")): path.stat().st_mtime_ns for path in results}


def test_results_are_reused_until_their_setting_changes(tmp_path, narrow_weights):
    """Hours of renders would be repeated for one more setting, or an old picture be shown for a new setting."""
    write_image(tmp_path / "content.png", 96, 80, seed=1)
    write_image(tmp_path / "style.png", 96, 96, seed=2)
    first = run_lab(tmp_path, narrow_weights, {"plain": None})
    assert list(first) == ["identity_style/plain/out.png", "pair/plain/out.png"]
    smaller = {"loss": {"content_weight": 0.1}, "style": {"max_size": 80}}
    second = run_lab(tmp_path, narrow_weights, {"plain": None, "other": smaller}, "--only", "pair")
    assert second.items() > first.items()
    smaller["loss"]["content_weight"] = 0.2
    third = run_lab(tmp_path, narrow_weights, {"plain": None, "other": smaller}, "--only", "pair")
    assert {name for name in third if third[name] != second[name]} == {"pair/other/out.png"}

    found = json.loads((tmp_path / "out" / "measures.json").read_text())
    assert list(found["pair"]) == ["style", "content", "plain", "other"]
    assert found["pair"]["style"]["W2 mean"] < 1e-6 < found["pair"]["content"]["W2 mean"]
    assert found["identity_style"]["plain"]["PSNR, dB"] > 10  # of the first call
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img") == 2 and "http" not in page
