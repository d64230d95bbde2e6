"""Runs as they were before a folder said what its run was made from."""

from dataclasses import replace
from pathlib import Path

from engine.checkpoints.manifest import read_manifest, write_manifest
from engine.identity.record import IDENTITY


def forget_identity(run: Path) -> None:
    """Take what a run was made from out of its folder, and out of its whole checkpoints."""
    (run / IDENTITY).unlink()
    for folder in (run / "checkpoints").glob("step_*"):
        manifest = read_manifest(folder)
        files = {name: digest for name, digest in manifest.files.items() if name != IDENTITY}
        (folder / IDENTITY).unlink()
        write_manifest(folder, replace(manifest, files=files))
