"""How long real demonstrations and rankings are, in tokens; batches of such lengths.

    python -m benchmarks.lengths --tokenizer DIR --demonstrations NAME=FILE --rankings NAME=FILE

writes lengths.json, which lies beside this file and has numbers alone. Of every set it keeps the
number of records and NUM_KEPT of them, evenly spaced when they are sorted by their tokens: a table
of quantiles that keeps which prompt goes with which response, and with how many. It was made with
GPT-2's byte pairs. The demonstrations are the training files of E2E NLG (tuetschek/e2e-cleaning),
GSM8K, Open Assistant and the seeds of Self-Instruct, and of FLAN four: StrategyQA, CREAK, QASC
(flan_cot) and ComVE (sensemaking). The rankings are of E2E, TruthfulQA and GSM8K answers and of
Open Assistant's human rankings. A record is counted as engine/data/ makes examples of it: a
response with its end of text.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.command_line import command, mistakes_in_one_line
from engine.data.comparisons import Comparison, read_comparisons
from engine.data.demonstrations import Demonstration, read_demonstrations
from engine.data.examples import encode_prompts
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import UserError

TABLE = Path(__file__).with_name("lengths.json")
NUM_KEPT = 64
FEWEST_RANKED, MOST_RANKED = 4, 9
"""Completions of a prompt that a labeler ranks (InstructGPT 3.4); other rankings are left out."""

Row = list[int]
"""[prompt's tokens, a response's tokens, ...]: one response of a demonstration, K of a ranking."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """One set of records."""

    num_records: int
    """How many it has, of which the rows stand for equal shares."""
    rows: list[Row]


def read_table(kind: str) -> dict[str, Lengths]:
    """Return the sets of lengths.json by name; kind: "demonstrations" or "rankings"."""
    stored = json.loads(TABLE.read_text(encoding="utf-8"))[kind]
    return {name: Lengths(**values) for name, values in stored.items()}


def lengths_of(kind: str, path: Path, tokenizer: Tokenizer) -> list[Row]:
    """Return the lengths of a file's records. Raises UserError, also where a file of rankings has
    none of 4 to 9 completions."""
    records: Sequence[Demonstration | Comparison]
    if kind == "demonstrations":
        demonstrations, _ = read_demonstrations(path)
        records, answers = demonstrations, [[each.response.text] for each in demonstrations]
    else:
        comparisons, _ = read_comparisons(path)
        records = [
            each for each in comparisons if FEWEST_RANKED <= len(each.completions) <= MOST_RANKED
        ]
        answers = [
            [completion.text for completion in each.completions]
            for each in records
            if isinstance(each, Comparison)
        ]
    if not records:
        raise UserError(
            f"{path} has no {kind.removesuffix('s')}"
            + (f" of {FEWEST_RANKED} to {MOST_RANKED} completions" if kind == "rankings" else "")
        )
    counted = tokenizer.encode_all(text for texts in answers for text in texts)
    prompts = encode_prompts([record.prompt for record in records], tokenizer)
    return [
        [len(prompt), *(len(next(counted)) + 1 for _ in texts)]  # 1: the end of text
        for prompt, texts in zip(prompts, answers, strict=True)
    ]


def quantiles(rows: Sequence[Row], num_kept: int = NUM_KEPT) -> Lengths:
    """Return a set as lengths.json has it: rows in the middle of equal shares of those sorted by
    their tokens."""
    ordered = sorted(rows, key=lambda row: (num_tokens(row), row))
    num_kept = min(num_kept, len(ordered))
    places = [(2 * i + 1) * len(ordered) // (2 * num_kept) for i in range(num_kept)]
    return Lengths(num_records=len(ordered), rows=[ordered[place] for place in places])


def num_tokens(row: Row) -> int:
    """Return the tokens of a record's sequences, each with the prompt."""
    return sum(row[0] + response for response in row[1:])


def draw(sets: Mapping[str, Lengths], num_rows: int, *, longest: int, seed: int = 0) -> list[Row]:
    """Return rows as a run on all the sets' records would meet them, the same at every call.

    A record with a sequence over `longest` tokens is left out, as the engine drops it. Raises
    UserError where all are.
    """
    rows, weights = [], []
    for lengths in sets.values():
        for row in lengths.rows:
            if row[0] + max(row[1:]) <= longest:
                rows.append(row)
                weights.append(lengths.num_records / len(lengths.rows))
    if not rows:
        raise UserError(f"all records have a sequence over {longest} tokens")
    shares = np.array(weights) / sum(weights)
    chosen = np.random.default_rng(seed).choice(len(rows), size=num_rows, p=shares)
    return [rows[index] for index in chosen]


def write_table(path: Path, sets: Mapping[str, Mapping[str, Lengths]]) -> None:
    """Write a table of both kinds, a line a set."""
    kinds = []
    for kind, named in sets.items():
        lines = [
            f'  "{name}": {{"num_records": {each.num_records}, "rows": {json.dumps(each.rows)}}}'
            for name, each in named.items()
        ]
        kinds.append(f' "{kind}": {{\n' + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(kinds) + "\n}\n", encoding="utf-8")


@mistakes_in_one_line()
def main(write: Callable[[str], object] = print) -> None:
    """Measure files anew and write the table."""
    parser = command("lengths")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--demonstrations", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--rankings", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, default=TABLE)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    sets: dict[str, dict[str, Lengths]] = {}
    for kind in ("demonstrations", "rankings"):
        named = dict(each.split("=", 1) for each in getattr(arguments, kind))
        sets[kind] = {
            name: quantiles(lengths_of(kind, Path(file), tokenizer)) for name, file in named.items()
        }
        for name, lengths in sets[kind].items():
            write(f"{name}: {lengths.num_records} {kind}")
    write_table(arguments.out, sets)


if __name__ == "__main__":
    main()
