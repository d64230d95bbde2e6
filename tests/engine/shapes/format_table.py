"""The table of formats in recipes/DATA.md: `python -m tests.engine.shapes.format_table` writes it.

Each cell is what the readers make of the format's sample lines (shape_samples.py).
"""

from pathlib import Path
from typing import Any

from engine.containers.row import BadRecord
from engine.errors import UserError
from engine.printable import say
from engine.shapes.canonical import PURPOSES
from engine.shapes.fields import Fields
from engine.shapes.shapes import PLAIN, SHAPES
from tests.engine.shapes.shape_samples import ANSWERS, COMPARISONS, DIALOGUES, Sample

PAGE = Path(__file__).parents[3] / "recipes" / "DATA.md"
BEGIN, END = "<!-- formats: by make formats -->\n", "<!-- end of formats -->\n"
HEAD = (
    "| format | fields of a row | SFT | reward model | PPO, generate | pretraining | shape |\n"
    "|---|---|---|---|---|---|---|\n"
)


def table() -> str:
    """Return the table: one part for one answer, dialogues and comparisons each."""
    parts = (
        ("One answer, or none", ANSWERS),
        ("Dialogues", DIALOGUES),
        ("Comparisons", COMPARISONS),
    )
    return "\n".join(
        f"### {title}\n\n{HEAD}{''.join(_line(sample) for sample in samples)}"
        for title, samples in parts
    )


def _line(sample: Sample) -> str:
    cells = [_cell(sample, purpose) for purpose in PURPOSES]
    shape = f"`{sample.shape}`" if sample.shape not in ("", PLAIN) else ""
    return f"| {' | '.join([sample.format, _fields(sample), *cells, shape])} |\n"


def _fields(sample: Sample) -> str:
    """Return the fields that are read of a sample's first row."""
    row = {key: value for key, value in sample.rows[0].items() if value is not None}
    shape = SHAPES.get(sample.shape)
    known = shape.claimed(row) if shape else set()
    ours = (
        "prompt",
        "response",
        "messages",
        "completions",
        "ranks",
        "scores",
        "chosen",
        "rejected",
    )
    chosen = [key for key in row if key in known] or [
        key for key in row if key in ours or sample.shape == "" and key in ("text", "content")
    ]
    return ", ".join(f"`{key}`" for key in chosen)


def _cell(sample: Sample, purpose: Any) -> str:
    shaping = Fields(purpose, sample.fields)
    try:
        found = [record for _, record in shaping(sample.as_read())]
    except UserError:
        return ""
    if any(isinstance(record, BadRecord) for record in found):
        return ""
    if purpose == "text" or sample.shape == PLAIN:
        return "yes"
    return SHAPES[sample.shape].has[purpose]


def main() -> None:
    """Write the table into the page."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
    say(f"{PAGE}: {len(ANSWERS) + len(DIALOGUES) + len(COMPARISONS)} formats")


if __name__ == "__main__":
    main()
