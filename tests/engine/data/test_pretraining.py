import gzip
import json
import lzma
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from engine.data import pretraining
from engine.data.pretraining import open_token_file
from engine.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from engine.errors import UserError
from engine.stop import EXIT_STATUS, noting_signals
from tests.engine.data.made_tokenizer import made_tokenizer

TEXTS = ["The Mill is a pub.\n", "The Punter is cheap.", "  It serves food.  "]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_documents_follow_one_another_with_an_end_of_text(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stream = [token for text in TEXTS for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    source = write(tmp_path / "books.jsonl", TEXTS)
    packed = tmp_path / "books.jsonl.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    for path in (source, packed):
        tokens = open_token_file(path, tokenizer, tmp_path / "cache")
        assert tokens.tokens.dtype == np.uint16
        assert list(tokens.tokens) == stream
        assert tokens.report.num_read == 3


def letters(bos_ids: tuple[int, ...]) -> Tokenizer:
    return made_tokenizer(
        lambda texts: [list(map(ord, text)) for text in texts], bos_ids=bos_ids, eos_id=3
    )


def test_every_document_begins_as_its_tokenizer_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = write(tmp_path / "a.jsonl", ["ab", "c"]), tmp_path / "cache"
    (tmp_path / "b.txt").write_text("a b c d\n" * 4)
    plain = open_token_file(source, letters(()), cache)
    assert plain.tokens.tolist() == [97, 98, 3, 99, 3]
    begun = open_token_file(source, letters((7,)), cache)  # not what is kept of the other
    assert begun.tokens.tolist() == [7, 97, 98, 3, 7, 99, 3]
    windows = begun.sequences(3)
    assert [windows[n].tokens.tolist() for n in range(2)] == [[7, 97, 98], [3, 7, 99]]
    assert [windows[n].prompt_length for n in range(2)] == [1, 1]
    assert windows.shapes(0) == [(3, 1)]
    # A long document comes in parts and batches, and begins once.
    monkeypatch.setattr(pretraining, "_PIECE_CHARACTERS", 3)
    monkeypatch.setattr("engine.data.tokenizer.BATCH_CHARACTERS", 5)
    whole = open_token_file(tmp_path / "b.txt", letters((7, 9)), cache).tokens.tolist()
    assert whole == [7, 9, *b"a b c d\n" * 4, 3]


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    tokenizer = made_tokenizer(lambda texts: [[65_536]], vocab_size=70_000, eos_id=69_999)
    tokens = open_token_file(write(tmp_path / "a.jsonl", ["x"]), tokenizer, tmp_path / "cache")
    assert tokens.tokens.dtype == np.uint32
    assert list(tokens.tokens) == [65_536, 69_999]


def test_sequences_are_cut_in_order_and_the_rest_is_left(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    token_file = open_token_file(write(tmp_path / "a.jsonl", TEXTS), tokenizer, tmp_path / "cache")
    sequences = token_file.sequences(5)
    assert len(sequences) == len(token_file.tokens) // 5
    joined = np.concatenate([sequences[index].tokens for index in range(len(sequences))])
    assert joined.dtype == np.int64
    assert np.array_equal(joined, token_file.tokens[: len(sequences) * 5])
    assert sequences[0].prompt_length == 1
    with pytest.raises(UserError, match=r"a\.jsonl: its \d+ tokens do not fill one sequence of"):
        token_file.sequences(1000)


def test_the_cache_is_used_until_content_or_tokenizer_change(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    calls = []

    def counting(texts: list[str]) -> list[list[int]]:
        calls.extend(texts)
        return list(tokenizer.encode_all(texts))

    counted = made_tokenizer(counting, files={"name": b"one"})
    first = open_token_file(source, counted, cache)
    again = open_token_file(source, counted, cache)
    assert len(calls) == 3
    assert np.array_equal(first.tokens, again.tokens)
    assert first.report == again.report

    renamed = made_tokenizer(counting, files={"name": b"two"})
    open_token_file(source, renamed, cache)
    assert len(calls) == 6
    write(source, [*TEXTS, "More."])
    assert len(open_token_file(source, counted, cache).tokens) > len(first.tokens)
    assert len(calls) == 10


def spoilt(path: Path) -> Iterator[str]:
    """Damage a file in one way after the other, each from what it was, and name it."""
    whole = path.read_bytes()
    middle = len(whole) // 2
    for what, content in {
        "cut": whole[:-4],
        "cut within a token": whole[:-1],
        "empty": b"",
        "longer": whole + b"\0\0",
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "zeros": bytes(len(whole)),
        "another's": b"\1\0" * (len(whole) // 2),
        "no text": b"\xff" * len(whole),
        "list": b"[]",
        "brackets": b"[" * 100_000,
    }.items():
        path.write_bytes(content)
        yield what
    path.write_bytes(whole)


@pytest.mark.parametrize("ending", ["uint16", "json"])
def test_damaged_tokens_are_made_again_and_said(
    tokenizer: Tokenizer, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    made = open_token_file(source, tokenizer, cache)
    expected = made.tokens.tolist()  # the file is mapped, and will be spoilt
    [path] = cache.glob(f"*.{ending}")
    capsys.readouterr()
    for what in spoilt(path):
        found = open_token_file(source, tokenizer, cache)
        assert found.tokens.tolist() == expected, what
        assert found.report == made.report, what
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and said.startswith("WARNING: "), what
        assert ".uint16: damaged, or of an earlier version; it is made again" in said
    open_token_file(source, tokenizer, cache)
    assert capsys.readouterr().err == ""


def test_a_count_in_the_report_is_as_safe_as_the_tokens(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    open_token_file(source, tokenizer, cache)
    [path] = cache.glob("*.json")
    path.write_text(path.read_text().replace('"num_read": 3', '"num_read": 7'))
    assert open_token_file(source, tokenizer, cache).report.num_read == 3


def test_ids_that_the_tokenizer_lacks_are_not_taken_whatever_the_checksum(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    expected = list(open_token_file(source, tokenizer, cache).tokens)
    [tokens], [report] = cache.glob("*.uint16"), cache.glob("*.json")
    content = np.full(len(expected), tokenizer.vocab_size, np.uint16).tobytes()
    tokens.write_bytes(content)
    summary = json.loads(report.read_text())
    del summary["checksum"]
    digest = xxhash.xxh3_128_hexdigest(content + json.dumps(summary).encode())
    report.write_text(json.dumps(summary | {"checksum": digest}))
    assert list(open_token_file(source, tokenizer, cache).tokens) == expected


def test_damaged_tokens_without_their_source_are_an_error(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    open_token_file(source, tokenizer, cache)
    [path] = cache.glob("*.uint16")
    path.write_bytes(path.read_bytes()[:-4])
    source.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: no such file"):
        open_token_file(source, tokenizer, cache)


def test_a_pipe_in_the_place_of_tokens_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    open_token_file(source, tokenizer, cache)
    [path] = cache.glob("*.uint16")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="uint16 is no regular file"):
        open_token_file(source, tokenizer, cache)


def test_a_bad_line_stops_and_leaves_no_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    source.write_text(source.read_text() + '{"txt": "x"}\n')
    with pytest.raises(UserError, match=r'a\.jsonl:4: field "text" is missing'):
        open_token_file(source, tokenizer, cache)
    assert not list(cache.iterdir())

    skipped = open_token_file(source, tokenizer, cache, skip_bad_lines=True)
    assert (skipped.report.num_read, skipped.report.num_bad) == (3, 1)
    assert "a.jsonl:4" in skipped.report.first_errors[0]
    assert open_token_file(source, tokenizer, cache, skip_bad_lines=True).report == skipped.report
    with pytest.raises(UserError):  # what was made while skipping does not hide the bad line
        open_token_file(source, tokenizer, cache)


def test_batches_change_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (write(tmp_path / "a.jsonl", TEXTS), tmp_path / "b.txt"):
        source.write_text(source.read_text() if source.exists() else "The Mill.\n" * 20_000)
        whole = open_token_file(source, tokenizer, tmp_path / "whole").tokens
        for num_characters in (1, 30, 100_000):
            monkeypatch.setattr("engine.data.tokenizer.BATCH_CHARACTERS", num_characters)
            parts = open_token_file(source, tokenizer, tmp_path / str(num_characters)).tokens
            assert np.array_equal(parts, whole)


def test_a_long_file_says_how_far_it_is(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS * 20_000)
    open_token_file(source, tokenizer, tmp_path / "quiet")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(pretraining, "_SECONDS_A_LINE", 0.0)
    monkeypatch.setattr("engine.data.tokenizer.BATCH_CHARACTERS", 300_000)
    open_token_file(source, tokenizer, tmp_path / "loud")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    shares = [int(re.search(r"a\.jsonl: (\d+)% read, .* million tokens", x)[1]) for x in lines]  # type: ignore[index]
    assert shares == sorted(shares) and 15 < shares[0] < 35 and shares[-1] == 100


def test_a_signal_while_text_is_read_leaves_nothing_of_it(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def signalled(texts: list[str]) -> list[list[int]]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return list(tokenizer.encode_all(texts))

    source, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    asked = made_tokenizer(signalled)
    with noting_signals(), pytest.raises(SystemExit) as stopped:
        open_token_file(source, asked, cache)
    assert stopped.value.code == EXIT_STATUS
    assert not list(cache.iterdir())


def test_a_text_file_is_one_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "The Mill is a pub.\n\n  The Punter is not.\n" * 4_000  # several parts
    source = tmp_path / "book.txt"
    source.write_text(text)
    token_file = open_token_file(source, tokenizer, tmp_path / "cache")
    assert tokenizer.decode(token_file.tokens) == text
    assert list(token_file.tokens).count(tokenizer.eos_id) == 1
    assert token_file.tokens[-1] == tokenizer.eos_id
    assert token_file.report.num_read == 1


@pytest.mark.parametrize("words", ["moderately  priced \u00e9t\u00e9 ", "na\u00efvet\u00e9"])
def test_a_line_of_megabytes_is_read_in_parts(
    tokenizer: Tokenizer, tmp_path: Path, words: str
) -> None:
    text = words * (3_000_000 // len(words))
    source, packed = tmp_path / "book.txt", tmp_path / "packed.txt.gz"
    source.write_text(text)
    packed.write_bytes(gzip.compress(text.encode(), 1))
    longest = 0

    def noted(texts: list[str]) -> list[list[int]]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return list(tokenizer.encode_all(texts))

    noting = made_tokenizer(noted)
    tokens = open_token_file(source, noting, tmp_path / "cache").tokens
    assert longest < 3 * 2**19
    assert np.array_equal(tokens, open_token_file(packed, noting, tmp_path / "cache").tokens)
    if " " in words:  # cut before whitespace, where the tokenizer cuts as well
        assert list(tokens) == [*tokenizer.encode(text), tokenizer.eos_id]
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("before", [2**20 - 1, 2**20, 3 * 2**20 - 2])
def test_a_byte_that_is_no_text_is_named_in_a_long_line(
    tokenizer: Tokenizer, tmp_path: Path, before: int
) -> None:
    for bad in (b"\xff", b"\xe2\x82 a", b"\xe2\x82"):
        (tmp_path / "a.txt").write_bytes(b"a\n" + b"b " * (before // 2) + b"b" * (before % 2) + bad)
        with pytest.raises(UserError, match=rf"a\.txt:2: not UTF-8: byte {before + 1} of the line"):
            open_token_file(tmp_path / "a.txt", tokenizer, tmp_path / "cache")


@pytest.mark.parametrize("report", ["", "[", "[]", "{}", '{"num_bytes": 1}', "[" * 100_000])
def test_a_damaged_report_is_made_again(tokenizer: Tokenizer, tmp_path: Path, report: str) -> None:
    source, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    expected = open_token_file(source, tokenizer, cache)
    [path] = cache.glob("*.json")
    path.write_text(report)
    again = open_token_file(source, tokenizer, cache)
    assert np.array_equal(again.tokens, expected.tokens)
    assert again.report == expected.report


def test_what_is_no_text_is_refused_before_it_is_read_whole(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 40)  # of zeros, which take no room on the disk
        with pytest.raises(UserError, match=rf"{name}:1: "):
            open_token_file(tmp_path / name, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"a\nb\0", r"a\.txt:2: not text: it holds a NUL"),
        ("a.txt", b" \n", "the file is empty"),
        ("a.txt", b"a\n\xff", r"a\.txt:2: not UTF-8"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.csv", b"a", "the file is empty"),
        ("a.txt", b"\xef\xbb\xbf", "the file is empty"),
        ("a.txt", b"%PDF-1.7", r"a\.txt is a PDF"),
        ("a.csv", b"prompt\na\n", r"a\.csv:2: has no text; there is prompt"),
        ("a.txt", None, "no such file"),
    ],
)
def test_a_bad_source_is_a_user_error(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        open_token_file(tmp_path / name, tokenizer, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_real_text_comes_back(data_pack: Path, tmp_path: Path) -> None:
    source = data_pack / "mini" / "pretrain.jsonl"
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    for tokenizer in (
        load_tokenizer(data_pack / "bpe"),
        train_sentencepiece(texts, tmp_path / "sp.model", vocab_size=1000),
    ):
        tokens = open_token_file(source, tokenizer, tmp_path / "cache").tokens
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        parts = np.split(tokens, ends + 1)[:-1]
        assert [tokenizer.decode(part) for part in parts] == texts


def test_text_comes_from_every_container_and_several_of_them(tmp_path: Path) -> None:
    def read(name: str) -> tuple[list[int], str]:
        path = ",".join(f"{tmp_path}/{part}" for part in name.split(","))
        found = open_token_file(path, letters(()), tmp_path / "cache")
        return found.tokens.tolist(), str(found.report)

    write(tmp_path / "a.jsonl", ["ab", "c"])
    (tmp_path / "b.csv").write_text("id,text\n1,ab\n2,c\n")
    (tmp_path / "c.json").write_text(json.dumps([{"text": "ab"}, {"text": "c"}], indent=1))
    pq.write_table(pa.table({"text": ["ab", "c"]}), tmp_path / "d.parquet")
    both = [97, 98, 3, 99, 3]
    for name in ("a.jsonl", "b.csv", "c.json", "d.parquet"):
        assert read(name) == (both, "2 records")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "1.md").write_text("\ufeffx", encoding="utf-8")
    (tmp_path / "notes" / "2.txt").write_bytes(lzma.compress(b"yz"))
    assert read("notes") == ([120, 3, 121, 122, 3], "2 records")
    assert read("notes,a.jsonl@2") == ([120, 3, 121, 122, 3, *both, *both], "4 records")
    write(tmp_path / "e.jsonl", [chr(100 + n) for n in range(20)])
    tokens, _ = read("e.jsonl@1.5")
    assert tokens[:40] == read("e.jsonl")[0]
    assert 6 < len(tokens) - 40 < 34 and set(tokens[40:]) < set(tokens[:40])
    assert tokens[40:] == read("e.jsonl@.5")[0]
    with pytest.raises(UserError, match="a file of text is one document, and cannot count 0.5"):
        read("notes@0.5")
    (tmp_path / "f.txt").write_text("t")
    with pytest.raises(UserError, match="text files among others; name them apart"):
        read("[af].*")


def test_a_list_of_texts_says_how_each_was_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["ab"])
    write(tmp_path / "b.jsonl", ["c", "d"])
    path = Path(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl@3")
    for _ in range(2):  # as made, and as kept
        report = open_token_file(path, letters(()), tmp_path / "cache").report
        assert report.notes("text", ", 8 tokens") == [
            f"{tmp_path}/a.jsonl: 1 records",
            f"{tmp_path}/b.jsonl@3: 2 records; 6 an epoch",
            "text: 3 records in all, 8 tokens",
        ]
