"""The files of a quickstart: found in a folder, or made from nothing but the installed Python."""

from dataclasses import dataclass, fields
from pathlib import Path

from engine.data.records import write_jsonl
from engine.errors import UserError, quoted
from engine.prepare.tokenizer_training import texts_of, train_fitting
from engine.quickstart.own_files import NAMES, is_text, own_files, split_files
from engine.quickstart.places import Split, demonstrations, fact_lists, render_facts
from engine.quickstart.python_text import python_documents, split_documents
from engine.quickstart.settings import QuickstartConfig


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of one quickstart."""

    demonstrations: Path
    demonstrations_valid: Path
    comparisons: Path
    comparisons_valid: Path
    prompts: Path
    prompts_valid: Path
    pretraining: Path
    pretraining_valid: Path

    def has_comparisons(self) -> bool:
        """Return whether both files of comparisons are there."""
        return self.comparisons.exists() and self.comparisons_valid.exists()


def find_files(config: QuickstartConfig) -> Files:
    """Return the files of the config's data folder, or the places of those that are made or split;
    raises UserError naming all that is missing."""
    folder = config.directory / "data"
    if config.data is None:
        return Files(**{f.name: folder / f"{f.name}.jsonl" for f in fields(Files)})
    if is_tree(config.data):
        return _found_in_tree(config.data, config.task)
    sources = _own_sources(config.data)
    ends_in_text = is_text(sources["pretraining"])
    return Files(
        **{
            f.name: folder
            / f"{f.name}{'.txt' if ends_in_text and f.name.startswith('pretraining') else '.jsonl'}"
            for f in fields(Files)
        }
    )


def is_tree(folder: Path) -> bool:
    """Return whether a data folder has its files by stage and split, and is not flat."""
    # A tree has folders of comparisons and of prompts too.
    has_flat = any(
        path is not None and (path.is_file() or name not in _PATTERNS.values())
        for name, path in own_files(folder).items()
    )
    return not has_flat and any((folder / name).is_dir() for name in _PATTERNS.values())


_PATTERNS = {
    "demonstrations": "sft",
    "comparisons": "comparisons",
    "prompts": "prompts",
    "pretraining": "pretrain",
}


def _found_in_tree(folder: Path, task: str) -> Files:
    found, missing = {}, []
    for name, room in _PATTERNS.items():
        for key, split in ((name, "train"), (f"{name}_valid", "val")):
            pattern = f"{room}/" if name == "pretraining" else f"{room}/{task}*."
            matches = sorted(folder.glob(f"{pattern}{split}.jsonl*"))
            if matches:
                found[key] = matches[0]
            else:
                missing.append(f"{pattern}{split}.jsonl*")
    if missing:
        raise UserError(
            f"--data {folder}: no file matches {', '.join(missing)}; other names than "
            f"{quoted(task)} by --task"
        )
    return Files(**found)


def _own_sources(folder: Path) -> dict[str, Path]:
    found = own_files(folder)
    missing = [
        f"{name}.jsonl{' or .txt' if name in ('prompts', 'pretraining') else ''}"
        for name, path in found.items()
        if path is None
    ]
    if missing:
        raise UserError(
            f"--data {folder}: there is no {', no '.join(missing)} (or .csv, .parquet and others, "
            'packed or not, or a folder of that name); README\'s "Your data" says what is in them'
        )
    return {name: path for name, path in found.items() if path is not None}


def split_own_files(config: QuickstartConfig, files: Files) -> None:
    """Split the files of a flat data folder into those of `files`; do nothing for a tree, which has
    its split, and for made files."""
    if config.data is not None and not is_tree(config.data):
        targets = {n: (getattr(files, n), getattr(files, f"{n}_valid")) for n in NAMES}
        split_files(_own_sources(config.data), targets)


def write_tokenizer(config: QuickstartConfig, files: Files, path: Path) -> None:
    """Train a sentencepiece tokenizer on the files' training text, unless it is there; of files
    with too little text for its entries, one of as many as there is."""
    if not path.exists():
        texts = [*texts_of(files.demonstrations), *texts_of(files.pretraining)]
        train_fitting(texts, path, config.vocab_size, is_exact=config.data is None)


def write_files(config: QuickstartConfig, files: Files) -> None:
    """Write what is not there of what the quickstart makes itself, except the comparisons, which
    need the SFT model."""
    seed = config.seed
    described: tuple[tuple[Path, Split, int], ...] = (
        (files.demonstrations, "train", config.num_demonstrations),
        (files.demonstrations_valid, "valid", 200),
    )
    for path, split, number in described:
        if not path.exists():
            pairs = demonstrations(split, number, seed=seed)
            write_jsonl(path, [{"prompt": p, "response": r} for p, r in pairs])
    asked: tuple[tuple[Path, Split, int], ...] = (
        (files.prompts, "prompts", config.num_prompts),
        (files.prompts_valid, "valid", config.num_judged),
    )
    for path, split, number in asked:
        if not path.exists():
            listed = fact_lists(split, number, seed=seed + 2)
            write_jsonl(path, [{"prompt": render_facts(facts)} for facts in listed])
    texts = (files.pretraining, files.pretraining_valid)
    if not all(path.exists() for path in texts):
        for path, documents in zip(texts, split_documents(python_documents()), strict=True):
            write_jsonl(path, [{"text": text} for text in documents])
