"""What an earlier start has left in a quickstart's folder, and whether this one may go on with it.

    HOME/config.json    the settings it was begun with
    HOME/stages.json    the seconds of each stage, whether it is finished, and the digests of the
                        files that the stages were made from, and of those that came of them

One folder has the result of one set of settings and files, or is refused.
"""

import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.checkpoints.manifest import digest_of_file
from engine.errors import UserError
from engine.files import open_file, read_object, replacing
from engine.printable import say
from engine.quickstart.files import Files
from engine.quickstart.settings import QuickstartConfig
from engine.ranks.first_rank import said_by_first_rank
from engine.run import MANNER, changed_setting
from engine.settings.saved import save_config

# The folder of each stage, in their order; each is made from those before it, but ppo_ptx.
FOLDERS = {"pretrain": "base", "sft": "sft", "rm": "rm", "ppo": "ppo", "ppo_ptx": "ppo_ptx"}
_BEGIN_AGAIN = (
    "; nobody knows what the stages here were made from: put a copy of the file back, remove the "
    "folder to begin again, or give another --directory"
)
_FILES = ("data", "task")  # the quickstart's own two, and no stage's: files are known by content


@dataclass(kw_only=True)
class Begun:
    """What is there, the same on every rank; only the first one writes."""

    home: Path
    is_writer: bool
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage, over all starts."""
    finished: set[str] = field(default_factory=set)
    """Stages that need not run."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of the files, by name: what the stages were made from."""
    results: dict[str, str] = field(default_factory=dict)
    """Digests of the files that came of the stages, by their names in the folder."""

    def check_files(self, files: Files) -> None:
        """Raise UserError, on every rank, where a file is another than this quickstart began with;
        remember those that are new."""

        def look() -> str:
            paths = {f.name: getattr(files, f.name) for f in fields(files)}
            paths["tokenizer"] = self.home / "tokenizer.model"
            found = {
                name: digest_of_file(path).xxh3_128 for name, path in paths.items() if path.exists()
            }
            for name, digest in found.items():
                if self.digests.get(name, digest) != digest:
                    is_made = self.home in paths[name].parents
                    remedy = "remove it, and it is made again" if is_made else "put it back"
                    raise UserError(
                        f"{paths[name]}: other content than that which {self.home} was begun with; "
                        f"{remedy}, or give another --directory"
                    )
            return json.dumps(found)

        self.digests |= json.loads(said_by_first_rank(look))
        self._write()

    def run(self, stage: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do a stage's work, with its seconds added to those of earlier starts; what is judged of
        it is out of date then."""
        self.finished -= {stage, "judge"}
        start, before = time.perf_counter(), self.seconds.get(stage, 0.0)
        try:
            result = work(*arguments)
            self.finished.add(stage)
        finally:
            self.seconds[stage] = round(before + time.perf_counter() - start, 1)
            self._write()
        return result

    def keep_results(self, names: Collection[str]) -> None:
        """Remember the files that came of the stages, as they are now."""
        if self.is_writer:
            self.results = self._digests_of(names)
            self._write()

    def has_results(self, names: Collection[str]) -> bool:
        """Return whether those files are as they were written, on the rank that asks; say which is
        not."""
        found = self._digests_of(names)
        for name in names:
            if name in found and found[name] != self.results.get(name):
                say(f"{self.home / name}: changed or damaged; it is made again")
        return all(name in found and found[name] == self.results.get(name) for name in names)

    def _digests_of(self, names: Collection[str]) -> dict[str, str]:
        paths = {name: self.home / name for name in names}
        return {n: digest_of_file(path).xxh3_128 for n, path in paths.items() if path.exists()}

    def _write(self) -> None:
        if not self.is_writer:
            return
        record = {
            "seconds": self.seconds,
            "finished": sorted(self.finished),
            "digests": self.digests,
            "results": self.results,
        }
        with replacing(self.home / "stages.json") as stream:
            stream.write((json.dumps(record, indent=1) + "\n").encode())


def begin(config: QuickstartConfig, *, is_writer: bool) -> Begun:
    """Return what is there, and say it stage by stage; all ranks call together.

    Raises UserError where it is of other settings, or of more than one pass.
    """
    home = config.directory
    record = json.loads(said_by_first_rank(lambda: json.dumps(_look(config))))
    begun = Begun(
        home=home,
        is_writer=is_writer,
        seconds=record["seconds"],
        finished=set(record["finished"]),
        digests=record["digests"],
        results=record["results"],
    )
    if is_writer and begun.digests:
        for stage, folder in FOLDERS.items():
            say(f"{stage}: {_state(begun, stage, folder)}")
    return begun


def _look(config: QuickstartConfig) -> dict[str, Any]:
    """Return the record of the folder; where nothing has come of it yet, clear it and begin one."""
    home = config.directory
    record: dict[str, Any] = {"seconds": {}, "finished": [], "digests": {}, "results": {}}
    if (home / "stages.json").exists():
        record |= _checked(home / "stages.json")
    steps = {stage: _newest(home / folder) for stage, folder in FOLDERS.items()}
    if record["digests"]:
        _check_settings(config)
    elif any(steps.values()):
        raise UserError(
            f"{home} has stages of a quickstart, and no stages.json that says what they were made "
            "from; give another --directory, or remove the folder"
        )
    else:  # what a start that was stopped within its files has left may be of other settings
        for path in (home / "tokenizer.model", *_split_files(home / "data")):
            path.unlink(missing_ok=True)
    names = list(FOLDERS)
    record["finished"] = [name for name in record["finished"] if steps.get(name, True)]
    for index, stage in enumerate(names[:3]):
        later = [name for name in names[index + 1 :] if steps[name]]
        if stage not in record["finished"] and later:
            raise UserError(
                f"{home / FOLDERS[later[0]]} was made from another {stage} than will be there; "
                f"remove it, or give another --directory"
            )
    save_config(config, home / "config.json")
    return record


def _split_files(folder: Path) -> list[Path]:
    return [path for name in ("*.jsonl", "*.txt", "*.json") for path in sorted(folder.glob(name))]


def _check_settings(config: QuickstartConfig) -> None:
    # How long a stage is shapes those after it, which a stage by itself has not.
    path = config.directory / "config.json"
    try:
        change = changed_setting(config, path, may_change=MANNER, passing_over=_FILES)
    except UserError as error:
        raise UserError(f"{error}{_BEGIN_AGAIN}") from None
    if change is not None:
        raise UserError(
            f"{config.directory} is a quickstart with {change}; give another --directory, or "
            "remove the folder to begin again"
        )


def _checked(path: Path) -> dict[str, Any]:
    try:
        record = read_object(path)
    except UserError as error:
        raise UserError(f"{error}{_BEGIN_AGAIN}") from None
    seconds, finished, digests = (record.get(n) for n in ("seconds", "finished", "digests"))
    results = record.get("results", {})  # which earlier versions did not have
    is_sound = (
        isinstance(seconds, dict)
        and all(type(value) in (int, float) for value in seconds.values())
        and isinstance(finished, list)
        and all(isinstance(name, str) for name in finished)
        and isinstance(digests, dict)
        and isinstance(results, dict)
    )
    if not is_sound:
        raise UserError(f"{path}: not the record of a quickstart{_BEGIN_AGAIN}")
    return {"seconds": seconds, "finished": finished, "digests": digests, "results": results}


def _newest(folder: Path) -> str:
    """Return the name of a stage's newest checkpoint, "" where it has none."""
    path = folder / "checkpoints" / "latest"
    if not path.exists():
        return ""
    with open_file(path) as stream:
        return stream.read(100).decode(errors="replace").strip()


def _state(begun: Begun, stage: str, folder: str) -> str:
    newest = _newest(begun.home / folder)
    steps = newest.rpartition("_")[2].lstrip("0") or "0"
    if stage in begun.finished:
        return f"finished, {steps} steps; kept"
    return f"goes on after step {steps}" if newest else "new"
