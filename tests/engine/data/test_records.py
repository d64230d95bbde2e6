import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.containers.row import BadRecord, RowOrBad, check_text, required
from engine.data.demonstrations import read_demonstrations
from engine.data.prompts import hold_out
from engine.data.records import ReadReport, read_records
from engine.errors import UserError


def read_texts(
    path: Path, *, skip_bad_lines: bool = False, **named: str
) -> tuple[list[str], ReadReport]:
    return read_records(
        path,
        lambda record: check_text(required(record, "text"), "text"),
        skip_bad_lines=skip_bad_lines,
        **named,
    )


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_records_come_in_order(tmp_path: Path, compress: type) -> None:
    path = tmp_path / "good.jsonl"
    path.write_bytes(compress(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "\xc3\xa9"}'))
    texts, report = read_texts(path)
    assert texts == ["a", "é"]
    assert report == ReadReport(num_read=2, num_bad=0, first_errors=())


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a"', "not one JSON object on one line: Expecting ',' delimiter at column 13"),
        (b'["text"]', "must be one JSON object, not a list"),
        (b'{"txt": "a"}', 'field "text" is missing; there is txt'),
        (b'{"text": 3}', 'field "text" must be a string, not a number'),
        (b'{"text": null}', 'field "text" is missing; there is nothing'),
        (b'{"text": " \\n"}', 'field "text" is empty'),
        (b'{"text": "\\ud83d"}', 'field "text" holds half of a surrogate pair'),
        (b'{"text": "\xff"}', "not UTF-8: byte 11 of the line"),
        (b'{"text": ' + b"[" * 200_000, "not JSON that can be read"),
        (b'{"text": ' + b"1" * 5_000 + b"}", "not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError) as error:
        read_texts(path)
    assert f"some.jsonl:2: {problem}" in str(error.value)
    assert str(error.value).endswith("\ncorrect the line, or pass --data.skip-bad-lines")

    texts, report = read_texts(path, skip_bad_lines=True)
    assert texts == ["a", "b"]
    assert (report.num_read, report.num_bad) == (2, 1)
    assert f"some.jsonl:2: {problem}" in report.first_errors[0]
    assert "1 bad line" in str(report)


def test_a_file_without_records_is_an_error_even_when_bad_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(b"\n\n")
    with pytest.raises(UserError, match="the file is empty"):
        read_texts(path, skip_bad_lines=True)
    path.write_bytes(b"{\n{\n")
    with pytest.raises(UserError, match=r"all 2 lines are bad; the first: .*empty\.jsonl:1"):
        read_texts(path, skip_bad_lines=True)


def test_the_report_keeps_the_first_errors_only(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{\n" * 100 + json.dumps({"text": "a"}))
    _, report = read_texts(path, skip_bad_lines=True)
    assert report.num_bad == 100
    assert len(report.first_errors) == 5


def test_an_error_quotes_little_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for record in ({"k" * 10**6: 1}, {f"key {n}": n for n in range(10**5)}):
        path.write_text(json.dumps(record))
        with pytest.raises(
            UserError, match=r'bad\.jsonl:1: field "text" is missing; there is k'
        ) as e:
            read_texts(path)
        assert len(str(e.value)) < 500
    assert "key 7 and 99992 more" in str(e.value)


def test_records_that_fill_the_memory_are_a_user_error(tmp_path: Path) -> None:
    def parse(record: dict) -> int:
        if record["text"] == 2:
            raise MemoryError
        return record["text"]

    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": number}) + "\n" for number in range(4)))
    with pytest.raises(UserError, match=r"long\.jsonl: 2 records of it fill the memory"):
        read_records(path, parse, skip_bad_lines=True)


def test_a_line_that_takes_all_memory_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def takes_all(text: str) -> None:
        raise MemoryError

    path = tmp_path / "wide.jsonl"
    path.write_text("{}\n{}\n")
    for name in ("json.loads", "_raw_decode"):
        monkeypatch.setattr(f"engine.containers.json_lines.{name}", takes_all)
    with pytest.raises(UserError, match=r"wide\.jsonl:1: as JSON it takes more memory"):
        read_texts(path)


@pytest.mark.parametrize(("option", "advice"), [("--skip", ", or pass --skip"), ("", "")])
def test_advice_names_the_commands_own_option(tmp_path: Path, option: str, advice: str) -> None:
    (tmp_path / "some.jsonl").write_text("{}")
    with pytest.raises(UserError) as error:
        read_texts(tmp_path / "some.jsonl", skip_option=option)
    assert str(error.value).endswith(f"\ncorrect the line{advice}")


def test_a_shape_stands_between_rows_and_records(tmp_path: Path) -> None:
    class Shape:
        read_as, left_out = "", Counter[str]()

        def __call__(self, rows: Iterable[RowOrBad]) -> Iterator[RowOrBad]:
            for where, row in rows:
                yield from self.of(where, row)

        def of(self, where: str, row: dict[str, Any] | BadRecord) -> Iterator[RowOrBad]:
            if isinstance(row, BadRecord):
                yield where, row
                return
            if "no" in row:
                yield where, BadRecord("is no use", field="no")
            for index, text in enumerate(row.get("texts", ())):
                yield f"{where}, text {index + 1}", {"text": text}

    def read(**options: bool) -> tuple[list[str], ReadReport]:
        return read_records(
            path, lambda record: check_text(record["text"], "text"), shaping=Shape, **options
        )

    path = tmp_path / "some.jsonl"
    path.write_text('{"texts": ["a", "b"]}\n{"no": 1}\n{\n{"texts": ["c", ""]}\n')
    with pytest.raises(UserError, match=r'some\.jsonl:2: field "no" is no use'):
        read(skip_bad_lines=False)
    texts, report = read(skip_bad_lines=True)
    assert texts == ["a", "b", "c"]
    assert (report.num_read, report.num_bad) == (3, 3)
    assert [error.partition(": ")[0].rpartition("/")[2] for error in report.first_errors] == [
        "some.jsonl:2",
        "some.jsonl:3",
        "some.jsonl:4, text 2",
    ]


@dataclass(frozen=True)
class Prompted:
    """A record with a prompt."""

    prompt: str


def test_sources_are_read_in_turn_and_counted_by_their_weights(tmp_path: Path) -> None:
    for name, number in (("a", 2), ("b", 1000)):
        lines = (json.dumps({"prompt": f"{name}{n}"}) + "\n" for n in range(number))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines) + "{\n")

    def read(paths: str) -> tuple[list[str], ReadReport]:
        path = ",".join(f"{tmp_path}/{part}" for part in paths.split(","))
        records, report = read_records(
            path, lambda row: Prompted(required(row, "prompt")), skip_bad_lines=True
        )
        return [each.prompt for each in records], report

    prompts, report = read("a.jsonl@2,b.jsonl@0.5")
    assert prompts[:4] == ["a0", "a1", "a0", "a1"]
    assert 400 < len(prompts) - 4 < 600
    assert len(set(prompts[4:])) == len(prompts) - 4
    assert (report.num_read, report.num_bad) == (1002, 2)
    assert report.notes("data")[0].startswith(f"{tmp_path}/a.jsonl@2: 2 records, 1 bad lines sk")
    assert report.notes("data")[0].endswith("; 4 an epoch")
    assert report.notes("data")[1].endswith(f"; {len(prompts) - 4} an epoch")
    assert report.notes("data")[2] == "data: 1002 records in all"

    again, _ = read("b.jsonl@1.5")
    assert again[:1000] == [f"b{n}" for n in range(1000)]
    assert again[1000:] == prompts[4:]  # the same half, and whatever lies beside it
    both, other = read("a.jsonl,b.jsonl")
    assert len(both) == 1002
    assert other.xxh3_128 != read("b.jsonl,a.jsonl")[1].xxh3_128
    assert [note.rpartition("/")[2] for note in other.notes("x")][2:] == ["x: 1002 records in all"]
    plain, alone = read("b.jsonl")
    assert plain == again[:1000] and not alone.sources


def test_no_weight_puts_a_prompt_on_both_sides(tmp_path: Path) -> None:
    texts = [json.dumps({"prompt": f"p{n % 50}", "response": f"r{n}"}) for n in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(texts[:120]))
    (tmp_path / "b.jsonl").write_text("\n".join(texts[120:]))
    paths = f"{tmp_path}/a.jsonl@2.5,{tmp_path}/b.jsonl@0.5"
    records, _ = read_demonstrations(paths)
    trained, held_out = hold_out(records, 0.3, 1)
    assert not {r.prompt for r in trained} & {r.prompt for r in held_out}
    assert len(trained) > 100 and len(held_out) > 20


def test_a_weight_draws_prompts_that_are_one_text_together(tmp_path: Path) -> None:
    ends = ("", "\n", " ")
    rows = [{"prompt": f"p{n}{end}", "response": "r"} for n in range(40) for end in ends]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, _ = read_demonstrations(f"{tmp_path}/a.jsonl@0.5")
    drawn = Counter(each.prompt.key for each in records)
    assert 10 < len(drawn) < 30 and set(drawn.values()) == {len(ends)}


def test_a_report_says_what_a_list_has_bad(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.csv").write_text("text\n \n")
    with pytest.raises(UserError, match=r'b\.csv:2: field "text" is empty'):
        read_texts(Path(f"{tmp_path}/a.jsonl,{tmp_path}/b.csv"))
    with pytest.raises(UserError, match=r"b\.csv: all 1 lines are bad"):
        read_texts(Path(f"{tmp_path}/a.jsonl,{tmp_path}/b.csv"), skip_bad_lines=True)
