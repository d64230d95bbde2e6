import gzip
import json

import pytest

from engine.data.end_of_text import END_OF_TEXT
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.prepare.tokenizer_training import texts_of, train_fitting, train_tokenizer
from engine.settings.tokenizer import TokenizerConfig
from tests.tiny import WORDS, write_lines

KINDS = ("sentencepiece", "byte_level")
TEXT = [f"{WORDS[i % 12]} {WORDS[i % 7]} {i} {WORDS[i % 5]}s near the würzburg" for i in range(400)]


@pytest.fixture
def files(tmp_path):
    """One file of each of the stages' kinds."""
    lines = {
        "demonstrations": ({"prompt": text, "response": "yes"} for text in TEXT),
        "comparisons": ({"prompt": t, "completions": ["a", "bb"], "ranks": [1, 2]} for t in TEXT),
        "prompts": ({"messages": [{"role": "user", "content": text}]} for text in TEXT),
        "pretraining": ({"text": text, "source": "not a text"} for text in TEXT),
    }
    return tuple(write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in lines.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_the_stages_files_gives_texts_back_and_ends_them(files, tmp_path, kind):
    out = train_tokenizer(TokenizerConfig(files=files, out=tmp_path / "made", kind=kind))
    tokenizer = load_tokenizer(out)
    for text in (*TEXT[:9], "never seen: 中 \t\n\n x", END_OF_TEXT):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_text == END_OF_TEXT
    assert tokenizer.eos_id not in tokenizer.encode(END_OF_TEXT)
    facts = json.loads((out / "trained_on.json").read_text())
    assert facts["entries"] == tokenizer.vocab_size >= 400
    assert facts["bytes_a_token"] > 2
    assert len(tokenizer.encode(TEXT[0])) < len(TEXT[0].encode()) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_is_as_large_as_asked_or_an_error_says_what_fits(files, tmp_path, kind):
    out = train_tokenizer(
        TokenizerConfig(files=files, out=tmp_path / "a", kind=kind, vocab_size=400)
    )
    assert load_tokenizer(out).vocab_size == 400
    large = TokenizerConfig(files=files, out=tmp_path / "b", kind=kind, vocab_size=50_000)
    with pytest.raises(
        UserError, match=r"--vocab-size 50000 does not fit .*give --vocab-size \d+ or"
    ):
        train_tokenizer(large)
    for size in (1, 2, 200, 256):
        small = TokenizerConfig(files=files, out=tmp_path / "c", kind=kind, vocab_size=size)
        with pytest.raises(UserError, match=rf"^--vocab-size {size} is too few: .* wants (\d+) at"):
            train_tokenizer(small)
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl"}
    assert names == {"a"}, "a mistake left something"


@pytest.mark.parametrize("kind", KINDS)
def test_little_text_gives_a_small_vocabulary_where_none_is_asked_for(tmp_path, kind):
    path = write_lines(tmp_path / "few.jsonl", [{"text": "a few words, and a few more words"}])
    out = train_tokenizer(TokenizerConfig(files=(path,), out=tmp_path / "made", kind=kind))
    assert 256 < load_tokenizer(out).vocab_size < 512


def test_the_same_files_give_the_same_tokenizer(files, tmp_path):
    made = [
        train_tokenizer(TokenizerConfig(files=files, out=tmp_path / name, kind=kind))
        for name, kind in (("a", KINDS[0]), ("b", KINDS[0]), ("c", KINDS[1]), ("d", KINDS[1]))
    ]
    prints = [load_tokenizer(out).fingerprint() for out in made]
    assert prints[0] == prints[1] != prints[2] == prints[3]


def test_all_texts_of_a_record_are_read_and_nothing_else(tmp_path):
    rows = [
        {"prompt": "p", "response": "r", "id": "x"},
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]},
        {"chosen": [{"role": "user", "content": "u"}], "rejected": "no"},
        {"text": "t"},
    ]
    path = write_lines(tmp_path / "all.jsonl", rows)
    assert list(texts_of(path)) == ["p\nr", "p\na\nb", "User: u\nno", "t"]
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert list(texts_of(tmp_path / "t.txt.gz")) == ["one\n", "two\n"]


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.jsonl", b'{"question": "q"}\n', r"a.jsonl:1: none of the fields .*there is question"),
        ("a.jsonl", b'{"prompt": 3}\n', r'a.jsonl:1: field "prompt" must be a text'),
        ("a.txt", b" \n", r"a.txt: the file is empty"),
        ("a.txt", b"fine\n\xff\n", r"a.txt:2: not UTF-8: byte 1"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        list(texts_of(tmp_path / name))


def test_rows_of_public_data_sets_give_all_that_the_stages_read(tmp_path):
    rows = [{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "b"}]
    rows[1]["output"] = "c"
    path = write_lines(tmp_path / "alpaca.jsonl", rows)
    assert list(texts_of(path)) == ["add\n\n1 2\n3", "b\nc"]
    pair = {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": -1}
    path = write_lines(tmp_path / "pairs.jsonl", [pair])
    assert list(texts_of(path)) == ["User: p\nx\ny"]


def test_fields_are_named_where_the_files_have_them(tmp_path, capsys):
    asked = [{"q": {"text": f"what {text}"}, "a": [f"it is {text}"], "id": "x"} for text in TEXT]
    qa = write_lines(tmp_path / "qa.jsonl", asked)
    body = write_lines(tmp_path / "body.jsonl", [{"body": text} for text in TEXT])
    ours = write_lines(tmp_path / "ours.jsonl", [{"prompt": t, "response": "yes"} for t in TEXT])
    fields = "prompt=q.text,response=a.0,text=body"
    config = TokenizerConfig(files=(body, qa, ours), fields=fields, out=tmp_path / "a")
    train_tokenizer(config)
    num_bytes = sum(len(f"what {t}\nit is {t}{t}{t}\nyes".encode()) for t in TEXT)
    facts = json.loads((tmp_path / "a" / "trained_on.json").read_text())
    assert (facts["bytes"], facts["fields"]) == (num_bytes, fields)
    assert f"--data.train {qa} --data.fields {fields}" in capsys.readouterr().out
    train_tokenizer(TokenizerConfig(files=(body,), fields="text=body", out=tmp_path / "b"))
    assert f"--data.pretraining {body} --data.fields text=body" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields, row, problem",
    [
        ("auto", {"q": "a"}, "there is q; name them by --fields OURS=THEIRS"),
        ("prompt=q,response=x", {"q": "a"}, 'a.jsonl:1: field "x" is missing; there is q'),
        ("promt=q", {"q": "a"}, "--fields promt=q: 'promt' is no field of ours"),
        ("alpcaa", {"q": "a"}, "--fields alpcaa: no such shape; perhaps alpaca"),
        ("text=body", {"prompt": "p"}, "--fields text=body: no record .* there is prompt"),
        ("alpaca", {"prompt": "p"}, "--fields alpaca: no record .* there is prompt"),
    ],
)
def test_fields_that_no_record_has_are_told(tmp_path, fields, row, problem):
    path = write_lines(tmp_path / "a.jsonl", [row])
    config = TokenizerConfig(files=(path,), fields=fields, out=tmp_path / "made")
    with pytest.raises(UserError, match=problem):
        train_tokenizer(config)


@pytest.mark.parametrize(
    "fields, row, text",
    [
        (
            "hh",
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            "User: q\na\nb",
        ),
        ("helpsteer", {"prompt": "p", "response": "r", "helpfulness": 3}, "p\nr"),
        ("plain", {"instruction": "i", "output": "o", "text": "t"}, "t"),
        ("alpaca", {"instruction": "i", "output": "o", "text": "t"}, "i\no"),
    ],
)
def test_a_shape_is_named_as_for_the_stages(tmp_path, fields, row, text):
    path = write_lines(tmp_path / "a.jsonl", [row] * 400)
    train_tokenizer(TokenizerConfig(files=(path,), fields=fields, out=tmp_path / "made"))
    facts = json.loads((tmp_path / "made" / "trained_on.json").read_text())
    assert facts["bytes"] == 400 * len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_nuls_is_named(files, tmp_path, kind):
    (tmp_path / "nul.txt").write_bytes(b"\0\0\n\0\n")
    config = TokenizerConfig(files=(*files, tmp_path / "nul.txt"), out=tmp_path / "a", kind=kind)
    with pytest.raises(UserError, match=r"nul\.txt: NUL characters \(U\+0000\) alone are no text"):
        train_tokenizer(config)
    (tmp_path / "nul.txt").write_bytes(b"\0\0\na\0\n")
    assert train_tokenizer(config) == tmp_path / "a"


def test_the_mark_that_begins_a_file_is_no_text(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfFirst\n")
    assert list(texts_of(tmp_path / "b.txt")) == ["First\n"]


def test_only_so_much_is_read_of_each_file_and_that_is_said(files, tmp_path, capsys):
    config = TokenizerConfig(files=files, out=tmp_path / "made", max_megabytes=0.02)
    train_tokenizer(config)
    said = capsys.readouterr().out
    assert f"{files[3]}: not all of it was read (--max-megabytes 0.02)" in said
    assert json.loads((tmp_path / "made/trained_on.json").read_text())["bytes"] < 22_000


def test_a_folder_that_is_there_is_not_written_over(files, tmp_path):
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match="made exists already; name a new folder"):
        train_tokenizer(TokenizerConfig(files=files, out=tmp_path / "made"))
    with pytest.raises(UserError, match=r"--files FILE \[FILE ...\] is required"):
        train_tokenizer(TokenizerConfig(out=tmp_path / "other"))


def test_a_tokenizer_that_changes_a_text_is_refused(files, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "engine.data.tokenizer.Tokenizer.decode", lambda self, ids: "something else"
    )
    with pytest.raises(UserError, match="does not give a text back as it was"):
        train_tokenizer(TokenizerConfig(files=files, out=tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_fitting_reads_again_only_where_the_size_may_change(tmp_path):
    texts = ["a few words", "and a few more"]
    train_fitting(texts, tmp_path / "t.model", 9000, is_exact=False)
    assert load_tokenizer(tmp_path / "t.model").vocab_size < 400
    with pytest.raises(UserError, match="give --vocab-size"):
        train_fitting(texts, tmp_path / "t.model", 9000, is_exact=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_script_of_many_characters_has_room_for_them_where_no_size_is_asked_for(tmp_path, kind):
    text = "".join(chr(0x4E00 + i) for i in range(1500))
    path = write_lines(tmp_path / "zh.jsonl", [{"text": text}])
    out = train_tokenizer(TokenizerConfig(files=(path,), out=tmp_path / "made", kind=kind))
    tokenizer = load_tokenizer(out)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "rows, option",
    [
        ([{"prompt": "a prompt"}], "--data.train demonstrations.jsonl"),
        ([{"prompt": "a prompt", "response": "words"}], "--data.train {path}"),
        ([{"messages": [{"role": "user", "content": "words"}]}], "--data.train demonstrations"),
        ([{"text": "some words"}], "--data.pretraining {path}"),
    ],
)
def test_the_next_command_names_a_file_that_sft_reads(tmp_path, rows, option, capsys):
    path = write_lines(tmp_path / "a file.jsonl", rows)
    train_tokenizer(TokenizerConfig(files=(path,), out=tmp_path / "made"))
    said = capsys.readouterr().out
    assert option.format(path=f"'{path}'") in said
    assert "bytes of text" in said
