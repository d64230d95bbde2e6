"""Which stage reads a row that has nothing for the stage it was given to, in words."""

from collections.abc import Iterable, Mapping

from engine.shapes.canonical import Purpose, Row
from engine.shapes.shapes import PLAIN, SHAPES, recognised

READERS: Mapping[Purpose, str] = {
    "demonstrations": "recipes/sft_*.py --data.train",
    "comparisons": "recipes/rm_*.py --data.train",
    "prompts": "recipes/ppo_*.py --data.prompts",
    "text": "--data.pretraining",
}
"""What reads a purpose's files."""
_WORDS: Mapping[Purpose, str] = {"text": "pretraining text"}
_RANKED = ({"chosen", "rejected"}, {"completions", "ranks"}, {"completions", "scores"})


def purposes_of(row: Row) -> list[Purpose]:
    """Return what a row is for, in our own fields that it is made for alone; of a known shape all
    that it has; none for a row that nothing here reads."""
    names = [name for name in recognised(row) if name != PLAIN]
    if len(names) == 1:
        return list(SHAPES[names[0]].has)
    if any(keys <= row.keys() for keys in _RANKED):
        return ["comparisons"]
    if row.keys() & {"response", "messages"}:
        return ["demonstrations"]
    if "prompt" in row and not row.keys() & set().union(*_RANKED):
        return ["prompts"]
    return ["text"] if any(isinstance(row.get(key), str) for key in ("text", "content")) else []


def read_by(purposes: Iterable[Purpose], *, with_options: bool) -> str:
    """Return "comparisons, which recipes/rm_*.py --data.train reads", or the like for several;
    without the options for a command that has others."""
    found = [
        _WORDS.get(each, each) + (f", which {READERS[each]} reads" if with_options else "")
        for each in purposes
    ]
    return "; and ".join(found) if with_options else ", ".join(found)
