import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config

from engine.data.tokenizer import load_tokenizer
from engine.huggingface.export_tokenizer import export_tokenizer
from engine.huggingface.sentencepiece_json import MAY_DIFFER
from tests.beginnings import FOLDERS, beginning, write_folder
from tests.engine.huggingface.sentencepiece_models import KINDS, write_model
from tests.tokenizer_json import added_token, tokenizer_json

TEXTS = ("the cheap  mill", " near the  river\n", "é\u2603 \u2581 x", "fish")


def export(source: Path, folder: Path) -> str:
    tokenizer = load_tokenizer(source)
    folder.mkdir()
    GPT2Config(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id).save_pretrained(
        folder
    )
    return export_tokenizer(tokenizer, folder, 64)


def assert_loads_alike(source: Path, folder: Path, behind: tuple[int, ...] = ()) -> None:
    ours, theirs = load_tokenizer(source), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == [*ours.bos_ids, *ours.encode(text), *behind]
    assert (theirs.eos_token_id, theirs.eos_token) == (ours.eos_id, ours.eos_text)
    again = load_tokenizer(folder)
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert (again.vocab_size, again.eos_id) == (ours.vocab_size, ours.eos_id)
    assert (again.bos_ids, again.bos_text) == (ours.bos_ids, ours.bos_text)


@pytest.mark.parametrize("name", KINDS)
def test_a_sentencepiece_model_loads_in_transformers(tmp_path, name):
    path = write_model(tmp_path / "a.model", **KINDS[name])
    note = export(path, tmp_path / "hf")
    assert_loads_alike(path, tmp_path / "hf")
    normalises = KINDS[name].get("normalization_rule_name") != "identity"
    assert note == (f"{path}: {MAY_DIFFER}" if normalises else "")


def write_gpt2(folder: Path, vocabulary: dict[str, int]) -> None:
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n", encoding="utf-8")


@pytest.fixture(scope="module")
def letters() -> dict[str, int]:
    import tokenizers

    pieces = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th"]
    return {piece: number for number, piece in enumerate(pieces)}


def test_two_files_with_added_tokens_keep_them(tmp_path, letters):
    source = tmp_path / "chatml"
    write_gpt2(source, letters | {"<|endoftext|>": 257})
    added = {"<|im_start|>": 258, "<|im_end|>": 259}
    (source / "added_tokens.json").write_text(json.dumps(added))
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    (source / "special_tokens_map.json").write_text(json.dumps(special))
    ours = load_tokenizer(source)
    assert (ours.vocab_size, ours.eos_id) == (260, 259)
    ours.save(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").fingerprint() == ours.fingerprint()
    assert export(tmp_path / "run", tmp_path / "hf") == ""
    assert_loads_alike(source, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.convert_tokens_to_ids([*added]) == [258, 259]
    assert len(theirs) == 260


def test_two_files_may_end_texts_as_opt_does(tmp_path, letters):
    source = tmp_path / "opt"
    write_gpt2(source, {"<s>": 257, "<pad>": 258, "</s>": 259, **letters})
    assert load_tokenizer(source).eos_text == "</s>"
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (source / "config.json").write_text(json.dumps({"eos_token_id": 259, "vocab_size": 260}))
    load_tokenizer(source).save(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    assert_loads_alike(source, tmp_path / "hf")


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_begins_a_text_begins_an_exports(tmp_path, kind):
    source = write_folder(kind, tmp_path / "source")
    load_tokenizer(source).save(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    # What a tokenizer.json puts behind a text stays in it.
    behind = (load_tokenizer(source).eos_id,) if kind in ("around", "roberta") else ()
    for model_type in ("llama", "opt", "gpt_neox"):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert_loads_alike(source, tmp_path / "hf", behind)
        theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert [theirs.bos_token_id] == beginning(kind)


@pytest.mark.parametrize("name", ["bos_token", "pad_token"])
def test_a_token_that_only_the_map_names_loads_in_transformers(tmp_path, letters, name):
    source = tmp_path / "source"
    write_gpt2(source, letters | {"<|endoftext|>": 257, "<x>": 258})
    token = {"content": "<x>", "lstrip": False, "normalized": False}
    listed = {name: token, "additional_special_tokens": [token]}
    (source / "special_tokens_map.json").write_text(json.dumps(listed))
    load_tokenizer(source).save(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    assert getattr(AutoTokenizer.from_pretrained(tmp_path / "hf"), f"{name}_id") == 258


def test_what_a_run_does_not_use_survives_it(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tokens = [added_token("<|endoftext|>", 31), added_token("[PAD]", 32), added_token("<x>", 33)]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer_json(added_tokens=tokens)))
    kept = {
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "pad_token": "[PAD]",
        "chat_template": "{% for m in messages %}{{ m.content }}|{% endfor %}",
        "model_max_length": 77,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(kept))
    generation = {"eos_token_id": [31, 33], "pad_token_id": 32, "top_p": 0.8}
    (source / "generation_config.json").write_text(json.dumps(generation))
    load_tokenizer(source).save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert again.also_stops == (33,)
    assert again.fingerprint() == load_tokenizer(source).fingerprint()
    export(tmp_path / "run", tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.pad_token_id, theirs.model_max_length) == (32, 77)
    chat = [{"role": "user", "content": "ab"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "ab|"
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == generation
