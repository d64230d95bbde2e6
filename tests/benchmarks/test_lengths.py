"""Lengths are counted as examples have them, kept as quantiles, and drawn by the sets' sizes."""

import itertools
import sys

import pytest

from benchmarks import lengths
from benchmarks.lengths import Lengths, draw, lengths_of, quantiles, read_table, write_table
from engine.data.comparisons import comparison_examples, read_comparisons
from engine.data.demonstrations import demonstration_examples, read_demonstrations
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from tests.tiny import write_lines


def test_lengths_are_those_of_the_examples(tiny):
    tokenizer = load_tokenizer(tiny / "tokenizer.json")
    records, _ = read_demonstrations(tiny / "demonstrations.jsonl")
    examples, _ = demonstration_examples(records, tokenizer, max_length=1000)
    assert lengths_of("demonstrations", tiny / "demonstrations.jsonl", tokenizer) == [
        [e.prompt_length, len(e.tokens) - e.prompt_length] for e in examples
    ]
    rankings, _ = read_comparisons(tiny / "comparisons.jsonl")
    units, _ = comparison_examples(rankings, tokenizer, max_length=1000)
    assert lengths_of("rankings", tiny / "comparisons.jsonl", tokenizer) == [
        [unit[0].prompt_length, *(len(e.tokens) - e.prompt_length for e in unit)]
        for unit in units
        if len(unit) >= 4
    ]


def test_pairs_alone_are_no_rankings(tiny, tmp_path):
    path = write_lines(
        tmp_path / "pairs.jsonl", [{"prompt": "the", "chosen": "mill", "rejected": "pub"}]
    )
    with pytest.raises(UserError, match="no ranking of 4 to 9 completions"):
        lengths_of("rankings", path, load_tokenizer(tiny / "tokenizer.json"))


def test_quantiles_are_middles_of_equal_shares():
    rows = [[1, n] for n in (9, 2, 7, 4, 5, 6, 3, 8)]
    kept = quantiles(rows, num_kept=2)
    assert kept == Lengths(num_records=8, rows=[[1, 4], [1, 8]])
    assert quantiles(rows, num_kept=100).rows == [[1, n] for n in range(2, 10)]


def test_sets_are_drawn_by_their_records_and_long_ones_left_out():
    sets = {
        "many": Lengths(num_records=900, rows=[[10, 1], [10, 99]]),
        "few": Lengths(num_records=100, rows=[[20, 2]]),
    }
    drawn = draw(sets, 2000, longest=50)
    assert {tuple(row) for row in drawn} == {(10, 1), (20, 2)}
    # A half of the 900 is too long: 450 to 100.
    assert drawn.count([10, 1]) / 2000 == pytest.approx(450 / 550, abs=0.03)
    assert draw(sets, 2000, longest=50) == drawn
    with pytest.raises(UserError, match="over 5 tokens"):
        draw(sets, 1, longest=5)


def test_the_table_has_rankings_of_four_to_nine():
    assert len(read_table("demonstrations")) >= 4
    rows = list(itertools.chain(*(s.rows for s in read_table("rankings").values())))
    assert {len(row) - 1 for row in rows} == set(range(4, 10))
    assert min(itertools.chain(*rows)) > 0


def test_the_command_measures_files_anew(tiny, tmp_path, monkeypatch):
    words = f"lengths --tokenizer {tiny}/tokenizer.json --out {tmp_path}/table.json"
    words += f" --demonstrations a={tiny}/demonstrations.jsonl"
    words += f" --rankings b={tiny}/comparisons.jsonl"
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setattr(lengths, "TABLE", tmp_path / "table.json")
    lengths.main(lambda line: None)
    (found,) = read_table("demonstrations").values()
    assert found.num_records == len(found.rows) == 40
    before = (tmp_path / "table.json").read_text()
    write_table(
        tmp_path / "again.json", {kind: read_table(kind) for kind in ("demonstrations", "rankings")}
    )
    assert (tmp_path / "again.json").read_text() == before
