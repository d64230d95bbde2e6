"""Where the libraries that we are measured against live: in a folder of their own, .rivals.

    make rivals

installs what rivals.txt pins, without dependencies: torch and transformers are the very ones that
the project uses, and its environment stays as it is. Only a process that runs a rival has the
folder on its path.
"""

import importlib.machinery
import importlib.util
import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
RIVALS = ROOT / ".rivals"


def rivals_environment() -> dict[str, str]:
    """Return the environment of a process that runs a rival: this one's, with RIVALS behind what
    PYTHONPATH has."""
    paths = [os.environ.get("PYTHONPATH", ""), str(RIVALS)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def missing_rivals(*modules: str) -> str | None:
    """Return a sentence that names the top-level modules which such a process would not find, and
    the command that mends it; None where it finds all."""
    missing = [name for name in modules if not _is_found(name)]
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} not installed: make rivals"


def _is_found(module: str) -> bool:
    if importlib.machinery.PathFinder.find_spec(module, [str(RIVALS)]) is not None:
        return True
    return importlib.util.find_spec(module) is not None
