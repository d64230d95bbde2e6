"""Nothing of a table is cut at 80 columns: not of one that wraps, nor of one that is too wide."""

import io
import re
from collections.abc import Sequence

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import decoding, language_step, ppo_table, train_step
from benchmarks.gpu.summary import summary
from benchmarks.kernel_suite import report
from benchmarks.records import Record, read_records
from benchmarks.screen import print_whole
from benchmarks.tables import ROOT
from engine.settings.numerics import Numerics
from models.sizes import SIZES
from tests.benchmarks.test_ppo_provider import JOB
from tests.benchmarks.test_ppo_table import OURS

RESULTS = ROOT / "benchmarks/results"
CPU, GPU = (read_records(RESULTS / f"{name}.jsonl") for name in ("cpu", "nvidia-h100-80gb-hbm3"))


def printed(table: Table | Text, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_whole(console, table)
    return console.export_text()


def words_of(table: Table) -> set[str]:
    cells = (str(text) for column in table.columns for text in (column.header, *column.cells))
    return set(" ".join(cells).split())


def test_a_table_that_fits_has_a_line_a_row():
    table = Table("provider", "tokens/s")
    table.add_row("one of several words", "12345.678")
    row = printed(table, 80).splitlines()[3]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "one of several words",
        "12345.678",
    ]


def test_a_narrow_table_breaks_between_words_alone():
    table = Table("provider", "tokens a second")
    table.add_row("one of several words", "12345.678")
    text = printed(table, 26)
    assert max(map(len, text.splitlines())) <= 26
    assert words_of(table) <= set(text.split())


def test_rows_that_find_no_room_are_printed_as_lines():
    table = Table("provider", "tokens a second", "peak GB", title="a title")
    table.add_row("ours", "12345.678", "")
    table.add_row("theirs", "1.5", "2.5")
    assert printed(table, 20).split("\n") == [
        "a title",
        "provider: ours",
        "    tokens a second:",
        "12345.678",
        "provider: theirs",
        "    tokens a second:",
        "1.5",
        "    peak GB: 2.5",
        "",
    ]


def test_a_table_is_printed_again_on_a_wider_screen():
    table = Table("provider", "tokens a second")
    table.add_row("one of several words", "12345.678")
    printed(table, 10)
    assert "one of several words" in printed(table, 80)


def of(records: Sequence[Record], benchmark: str) -> list[Record]:
    return [record for record in records if record["benchmark"] == benchmark]


def decoded() -> Table:
    records = [record for record in of(GPU, "generation") if "step_ms" in record]
    return decoding.table(decoding.Decode(size=SIZES["1.3b"], batch=64, context=1024), records)


def language() -> Table:
    records = of(GPU, "train_step")
    job = language_step.Job(
        size=SIZES["1.3b"],
        numerics=Numerics(dtype="bf16"),
        num_sequences=16,
        length=2048,
        micro_batch_tokens=8192,
    )
    return language_step.table(job, records)


def kernels() -> Table:
    records = [r for r in of(GPU, "kernels") if r["operation"] == "linear_loss"]
    return report.table(records, "linear_loss", {"tokens": 8192, "vocab": 50304}, "forward")


TABLES = {
    "language": language,
    "decode": decoded,
    "sft": lambda: train_step.table("sft", of(CPU, "sft_step")),
    "rm": lambda: train_step.table("rm", of(CPU, "rm_step")),
    "ppo": lambda: ppo_table.table(JOB, [OURS, *of(CPU, "ppo_step")]),
    "kernels": kernels,
    "targets": lambda: summary([*CPU, *GPU], {}, judges_speed=True)[-1],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_benchmarks_table_is_whole_at_80_columns(name):
    table = TABLES[name]()
    text = printed(table, 80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert words_of(table) <= set(text.split()) | set(re.sub(r":\s", " ", text).split())
