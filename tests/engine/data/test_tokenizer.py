import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from engine.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_sentencepiece
from engine.errors import UserError
from tests.tokenizer_json import EOS, added_token, tokenizer_json

# Any text that UTF-8 can hold; long runs of whitespace, newlines and the marks that tokenizers use
# for themselves come more often than chance would have them.
TEXTS = st.lists(
    st.text(st.characters(codec="utf-8"))
    | st.sampled_from(
        ["  ", "\n\n", "\t", "\r\n", "\u2581", "\u2047", "\0", "\ufeff", "🙂", "👩‍👩‍👧"]
    )
    | st.sampled_from([END_OF_TEXT, "</s>", "<unk>", "<0x0A>", "The Mill", " is"])
).map("".join)


@given(text=TEXTS)
@example(text=" \u2581 a\u2581\u2581\n")
def test_sentencepiece_gives_every_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_many_texts_are_encoded_as_each_is(
    tokenizer: Tokenizer, gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["The Mill", "", "a \u2581 b\u2581", " x\n", "<|endoftext|>", "cheap pub \u00e9"] * 3
    for each in (tokenizer, gpt2):
        expected = [each.encode(text) for text in texts]
        for num_characters in (1, 10, 1_000):
            monkeypatch.setattr("engine.data.tokenizer.BATCH_CHARACTERS", num_characters)
            assert list(each.encode_all(iter(texts))) == expected
        assert list(each.encode_all([])) == []


def test_sentencepiece_learns_pieces_and_keeps_its_size(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 400
    text = "The Mill is a cheap pub near the river."
    assert len(tokenizer.encode(text)) < len(text) / 3


def test_the_end_of_text_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("pub"), tokenizer.eos_id]) == "pub"
    assert tokenizer.decode([]) == ""


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    texts = ["The Mill is a pub.\n\nThe Punter is not."] * 3
    one = train_sentencepiece(texts, tmp_path / "one.model", vocab_size=290)
    two = train_sentencepiece(texts, tmp_path / "two.model", vocab_size=290)
    other = train_sentencepiece(texts, tmp_path / "other.model", vocab_size=291)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()


def test_a_long_text_is_not_left_out_of_training(tmp_path: Path) -> None:
    texts = ["word " * 5_000, "zebra"]  # over sentencepiece's own limit of 4,192 bytes
    tokenizer = train_sentencepiece(texts, tmp_path / "long.model", vocab_size=270)
    assert len(tokenizer.encode(" word")) == 1


@pytest.mark.parametrize(
    ("texts", "vocab_size", "problem"),
    [
        (["a pub"], 5_000, "Vocabulary size too high"),
        (["a pub"], 100, "Vocabulary size is smaller"),
        ([], 300, "there is no text"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_a_user_error(
    tmp_path: Path, texts: list[str], vocab_size: int, problem: str
) -> None:
    with pytest.raises(UserError, match=f"vocab_size {vocab_size} does not fit .*{problem}"):
        train_sentencepiece(texts, tmp_path / "none.model", vocab_size=vocab_size)
    assert not list(tmp_path.iterdir())


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "tokenizer.model"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        assert loaded.encode("The Mill") == tokenizer.encode("The Mill")


def write_huggingface(folder: Path, *, is_special: bool, eos: str) -> None:
    """Write a byte-level tokenizer.json that adds `eos` around every text and truncates to 4."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    model.train_from_iterator(["the mill the pub"], trainer)
    token = tokenizers.AddedToken(eos, special=is_special)
    model.add_special_tokens([token]) if is_special else model.add_tokens([token])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"<s> $A {eos}",
        special_tokens=[("<s>", model.token_to_id("<s>")), (eos, model.token_to_id(eos))],
    )
    model.enable_truncation(4)
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("is_special", [True, False])
def test_huggingface_text_never_becomes_a_control_token(tmp_path: Path, is_special: bool) -> None:
    write_huggingface(tmp_path, is_special=is_special, eos="<|endoftext|>")
    tokenizer = load_tokenizer(tmp_path)
    text = "the mill<|endoftext|> <s> the pub, at length"
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert tokenizer.eos_id not in ids
    assert tokenizer.vocab_size == tokenizer.eos_id + 1  # it was added last


def test_huggingface_end_of_text_is_found_or_named(tmp_path: Path) -> None:
    write_huggingface(tmp_path, is_special=True, eos="<stop>")
    with pytest.raises(UserError, match=r"has no end-of-text token .* tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    assert loaded.eos_id == tokenizer.eos_id
    assert loaded.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("bad.model", b"not a model", "is not a sentencepiece model"),
        ("empty.model", b"", "is not a sentencepiece model"),
        ("tokenizer.json", b"{}", "is not a tokenizer.json that can be read"),
        ("tokenizer.json", b"\xff", "is not a tokenizer.json that can be read"),
        ("encoder.json", b"{}", "vocab.bpe: no such file"),
    ],
)
def test_a_bad_tokenizer_file_is_a_user_error(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        load_tokenizer(tmp_path / name)


def test_a_folder_must_say_which_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds none of them"):
        load_tokenizer(tmp_path)
    (tmp_path / "a.model").touch()
    (tmp_path / "b.model").touch()
    with pytest.raises(UserError, match=r"holds 2 \.model files"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"c\.model: no such file; .* has .*a\.model"):
        load_tokenizer(tmp_path / "c.model")


# GPT-2


@pytest.fixture(scope="module")
def gpt2(data_pack: Path) -> Tokenizer:
    return load_tokenizer(data_pack / "bpe")


def gpt2_encode(text: str, encoder: dict[str, int], ranks: dict[tuple[str, ...], int]) -> list[int]:
    """GPT-2's encoder as openai/gpt-2 src/encoder.py has it, in a dozen lines."""
    regex = pytest.importorskip("regex")
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    ids = []
    for word in regex.findall(pattern, text):
        parts = [letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            rank, place = min(
                (ranks.get(pair, len(ranks)), place)
                for place, pair in enumerate(zip(parts, parts[1:], strict=False))
            )
            if rank == len(ranks):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [encoder[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def gpt2_tables(data_pack: Path) -> tuple[dict[str, int], dict[tuple[str, ...], int]]:
    encoder = json.loads((data_pack / "bpe" / "encoder.json").read_text())
    merges = (data_pack / "bpe" / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    return encoder, {tuple(merge.split()): rank for rank, merge in enumerate(merges)}


def test_gpt2_has_its_known_ids(gpt2: Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(END_OF_TEXT) == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.decode([15496, 50256]) == "Hello"


@given(text=TEXTS)
def test_gpt2_equals_its_reference(gpt2: Tokenizer, gpt2_tables: tuple, text: str) -> None:
    ids = gpt2.encode(text)
    assert ids == gpt2_encode(text, *gpt2_tables)
    assert gpt2.decode(ids) == text
    assert gpt2.eos_id not in ids


def test_gpt2_equals_its_reference_on_prose(
    gpt2: Tokenizer, gpt2_tables: tuple, data_pack: Path
) -> None:
    lines = (data_pack / "mini" / "pretrain.jsonl").read_text().splitlines()[:20]
    for text in (json.loads(line)["text"] for line in lines):
        assert gpt2.encode(text) == gpt2_encode(text, *gpt2_tables)


def test_a_saved_gpt2_is_the_same(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path)
    loaded = load_tokenizer(tmp_path / "encoder.json")
    assert loaded.fingerprint() == gpt2.fingerprint()
    assert loaded.encode("It's 3 o'clock\n\n") == gpt2.encode("It's 3 o'clock\n\n")


# What a model may say


def test_ids_that_are_no_token_decode_to_nothing(tokenizer: Tokenizer, gpt2: Tokenizer) -> None:
    for each in (tokenizer, gpt2):
        ids = each.encode("a pub")
        size = each.vocab_size
        assert each.decode([-1, *ids, size, size + 7, 2**31, 2**40]) == "a pub"
        assert each.absent_ids(size) == each.absent_ids(size - 5) == ()
        assert each.absent_ids(size + 2) == (size, size + 1)
        each.draw_below(size - 2)
        each.draw_below(size)
        assert each.absent_ids(size - 2) == ()
        assert each.absent_ids(size + 1) == (size - 2, size - 1, size)


def write_with_added(folder: Path, added: dict[str, int], *, special: bool = True) -> Tokenizer:
    tokens = [added_token(text, number) | {"special": special} for text, number in added.items()]
    whole = tokenizer_json(added_tokens=[added_token(EOS, 31), *tokens])
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return load_tokenizer(folder)


def test_added_control_tokens_may_be_beyond_the_model(tmp_path: Path) -> None:
    tokenizer = write_with_added(tmp_path, {"[PAD]": 32, "<x>": 33})
    tokenizer.check_fits(32)
    assert max(tokenizer.encode("a[PAD]<x>b")) < 32
    with pytest.raises(UserError, match=r"tokenizer.json: the tokenizer has 34 ids, the model 31"):
        tokenizer.check_fits(31)  # which lacks the end of text
    with pytest.raises(UserError, match="has 33 ids, the model 32: give the tokenizer of"):
        write_with_added(tmp_path, {"<word>": 32}, special=False).check_fits(32)


def test_an_added_end_of_text_must_be_in_the_model(tmp_path: Path) -> None:
    write_with_added(tmp_path, {"<|im_end|>": 32})
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 32
    tokenizer.check_fits(33)
    with pytest.raises(UserError, match="has 33 ids, the model 32"):
        tokenizer.check_fits(32)


def test_gaps_between_ids_are_no_tokens(tmp_path: Path) -> None:
    whole = tokenizer_json()
    whole["model"]["vocab"]["abab"] = 35
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    loaded = load_tokenizer(tmp_path)
    assert set(loaded.absent_ids(38)) == set(range(38)) - loaded_ids(tmp_path)


def loaded_ids(folder: Path) -> set[int]:
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return set(model.get_vocab(with_added_tokens=True).values())


def test_an_id_of_another_token_is_an_error_that_names_both(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 5}')
    with pytest.raises(UserError, match="'<pad>' is an added token with the id 5, and tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 400}')
    with pytest.raises(UserError, match="'<pad>' is not special"):
        load_tokenizer(tmp_path)


def test_a_run_keeps_no_end_that_is_beyond_the_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "hf")
    ids = {"eos_token_id": 50256}  # transformers' default for a GPT-2
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(ids))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(ids | {"vocab_size": 500}))
    load_tokenizer(tmp_path / "hf").save(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").eos_id == tokenizer.eos_id
    assert load_tokenizer(tmp_path / "run").kept("generation_config.json") == {
        "eos_token_id": tokenizer.eos_id
    }


def test_a_space_is_a_character_of_texts_without_one_where_it_is_asked_for(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(40))
    options = {"path": tmp_path / "t.model", "vocab_size": 310}
    tokenizer = train_sentencepiece([text], **options)
    assert tokenizer.decode(tokenizer.encode(" a  b")) != " a  b"
    tokenizer = train_sentencepiece([text], **options, with_space=True)
    assert tokenizer.decode(tokenizer.encode(" a  b")) == " a  b"
