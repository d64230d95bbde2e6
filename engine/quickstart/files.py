"""The files of a quickstart: found in a folder, or made from nothing but the installed Python."""

from dataclasses import dataclass, fields
from pathlib import Path

from engine.data.demonstrations import read_demonstrations
from engine.data.jsonl import check_text, read_records, required, write_jsonl
from engine.data.tokenizer import train_sentencepiece
from engine.errors import UserError
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
    """Return the files of the config's data folder, or the places of those that are made; raises
    UserError naming the first that is missing."""
    if config.data is not None:
        return _found_files(config.data, config.task)
    folder = config.directory / "data"
    return Files(**{f.name: folder / f"{f.name}.jsonl" for f in fields(Files)})


def _found_files(folder: Path, task: str) -> Files:
    patterns = {
        "demonstrations": f"sft/{task}*",
        "comparisons": f"comparisons/{task}*",
        "prompts": f"prompts/{task}*",
        "pretraining": "pretrain/",
    }
    found = {}
    for name, pattern in patterns.items():
        for key, split in ((name, "train"), (f"{name}_valid", "val")):
            ending = f"{split}.jsonl*" if pattern.endswith("/") else f".{split}.jsonl*"
            matches = sorted(folder.glob(pattern + ending))
            if not matches:
                raise UserError(f"--data {folder}: no file matches {pattern}{ending}")
            found[key] = matches[0]
    return Files(**found)


def write_tokenizer(config: QuickstartConfig, files: Files, path: Path) -> None:
    """Train a sentencepiece tokenizer on the files' training text, unless it is there."""
    if path.exists():
        return
    records, _ = read_demonstrations(files.demonstrations, skip_option="")
    texts = [f"{record.prompt.text}\n{record.response.text}" for record in records]
    texts += read_records(
        files.pretraining,
        lambda record: check_text(required(record, "text"), "text"),
        skip_bad_lines=False,
        skip_option="",  # not all that reads a quickstart's files skips lines
    )[0]
    train_sentencepiece(texts, path, vocab_size=config.vocab_size)


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
