"""No command destroys an input, whatever it is told to force."""

from __future__ import annotations

from tests.support.e2e import write_config, write_run


def test_commands_refuse_them_with_force(tmp_path, call):
    """`export -o photo --force` destroyed the original, and the run with it."""
    path = write_run(tmp_path, optimizer={"max_iterations": 1})
    assert call("run", "-c", path).code == 0
    originals = {name: (tmp_path / name).read_bytes() for name in ("content.png", "style.png")}
    (tmp_path / "other.png").write_bytes(originals["style.png"])
    moved = write_config(tmp_path, "moved.yaml", styles=[{"image": "other.png"}], optimizer={"max_iterations": 1})
    commands = [
        ["export", "-c", path, "-o", tmp_path / "content.png", "--force"],
        ["export", "--run", tmp_path / "run", "-o", tmp_path / "style.png", "--force"],
        ["export", "-c", moved, "-o", tmp_path / "other.png", "--force"],
        ["run", "-c", path, "--profile", tmp_path / "content.png", "--force"],
        [
            "preview",
            "-c",
            moved,
            "--vary",
            f"content={tmp_path}/content.png,{tmp_path}/other.png",
            "-o",
            tmp_path / "content.png",
            "--force",
        ],
    ]
    for command in commands:
        said = call(*command)
        assert said.code == 3 and "would be overwritten" in said.err, (command, said)
    assert {name: (tmp_path / name).read_bytes() for name in originals} == originals
    assert (tmp_path / "other.png").read_bytes() == originals["style.png"]
