"""Files that are none to be read: what a folder from elsewhere may hold where a file should be."""

import os
from pathlib import Path

KINDS = ("fifo", "device", "folder", "nowhere")


def make_special(path: Path, kind: str) -> None:
    """Make at that path a pipe that nobody writes, a link to a device without an end, a folder, or
    a link to nothing."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
