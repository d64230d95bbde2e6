"""Checkpoints whose checksums are right, whatever is in them: who writes a file can write those."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from engine.checkpoints.manifest import FileDigest, digest_of_file, read_manifest, write_manifest


def resign(folder: Path, **digests: FileDigest) -> None:
    """Write the manifest of what is in a checkpoint's folder now; digests: more files, by names in
    which __ is the slash."""
    found = {}
    for path in (p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"):
        found[str(path.relative_to(folder))] = digest_of_file(path)
    found |= {name.replace("__", "/"): digest for name, digest in digests.items()}
    write_manifest(folder, dataclasses.replace(read_manifest(folder), files=found))


def change(path: Path, *keys: Any, to: Any) -> None:
    """Change a value within a JSON file."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(content))
