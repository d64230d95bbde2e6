"""What the files of a tokenizer put before a text, as transformers' AutoTokenizer reads them."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors
from transformers import AutoTokenizer

from engine.data.beginning_of_text import named_beginning, put_around, template
from engine.data.tokenizer import Tokenizer, make_tokenizer
from engine.data.tokenizer_files import read_tokenizer_files
from engine.data.tokenizer_settings import TokenizerSettings
from engine.errors import UserError
from tests import beginnings
from tests.beginnings import BOS, EOS, FOLDERS, IDS, POST_PROCESSORS, beginning, write_folder
from tests.tokenizer_json import added_token, tokenizer_json

TEXT = "the mill\nthe"


def opened(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, without its trial."""
    return make_tokenizer(read_tokenizer_files(folder))


def their_ids(folder: Path, model_type: str) -> list[int]:
    """What AutoTokenizer makes of TEXT beside a model of that type."""
    beginnings.write_json(folder / "config.json", {"model_type": model_type})
    return AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        opened(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_text_begins_with_what_its_files_say(tmp_path, kind):
    tokenizer = opened(write_folder(kind, tmp_path))
    assert list(tokenizer.bos_ids) == beginning(kind)
    assert tokenizer.bos_text == (EOS if kind.startswith("opt") else BOS)
    assert tokenizer.encode("the the")[-1] not in tokenizer.bos_ids
    assert tokenizer.decode([*tokenizer.bos_ids, *tokenizer.encode("the")]) == "the"
    # The text of a control token is ordinary text.
    assert not set(tokenizer.bos_ids) & set(tokenizer.encode(f"a{tokenizer.bos_text}b"))
    tokenizer.check_fits(tokenizer.vocab_size)


def test_ids_by_hand(tmp_path):
    ids = [IDS["the"], IDS["Ġ"], IDS["th"]]  # "Ġ" is GPT-2's spelling of a space
    for kind in ("template", "opt"):
        tokenizer = opened(write_folder(kind, tmp_path / kind))
        assert tokenizer.encode("the th") == ids == [260, IDS["Ġ"], 259]
    assert (beginning("template"), beginning("opt")) == ([1], [2])


@pytest.mark.parametrize("add", [None, True, False])
@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
@pytest.mark.parametrize(
    ("model_type", "named"),
    [("llama", None), ("llama", "PreTrainedTokenizerFast"), ("opt", "GPT2Tokenizer")],
)
def test_a_tokenizer_json_goes_by_its_post_processor(
    tmp_path, add, post_processor, model_type, named
):
    config = {} if add is None else {"add_bos_token": add}
    config |= {} if named is None else {"tokenizer_class": named}
    processor = POST_PROCESSORS[post_processor]
    folder = beginnings.write_tokenizer_json(tmp_path, processor, **config)
    ours, theirs = opened(folder), their_ids(folder, model_type)
    behind = [ours.eos_id] if post_processor in ("around", "roberta") else []
    assert [*ours.bos_ids, *ours.encode(TEXT), *behind] == theirs
    assert bool(ours.bos_ids) == (post_processor not in ("nothing", "byte level"))
    said = any("add_bos_token" in note for note in ours.notes)
    assert said == (add is not None and add != bool(ours.bos_ids))
    assert len(ours.notes) == said  # the end of text behind a text needs no word


CONFIGS = [
    {},
    {"add_bos_token": True, "bos_token": EOS},
    {"add_bos_token": True, "bos_token": BOS, "add_eos_token": False},
    {"add_bos_token": False, "bos_token": EOS},
    {"add_bos_token": True, "bos_token": None},
    {"bos_token": EOS},
]


@pytest.mark.parametrize("config", CONFIGS, ids=map(json.dumps, CONFIGS))
@pytest.mark.parametrize("model_type", ["opt", "gpt2", "gpt_neox", "qwen2"])
def test_two_files_go_by_add_bos_token(tmp_path, config, model_type):
    folder = beginnings.write_two_files(tmp_path, **config)
    theirs, ours = their_ids(folder, model_type), opened(folder)
    assert [*ours.bos_ids, *ours.encode(TEXT)] == theirs
    assert bool(ours.bos_ids) == bool(config.get("add_bos_token") and config["bos_token"])


@pytest.mark.parametrize(
    "config", [*CONFIGS, {"add_bos_token": True}], ids=lambda config: json.dumps(config)
)
def test_a_sentencepiece_model_goes_by_add_bos_token(tmp_path, config):
    folder = beginnings.write_sentencepiece(tmp_path, **config)
    (bos, *_), ours = their_ids(folder, "llama"), opened(folder)
    # Of such a folder its ids are not ours: the class makes steps of its own.
    assert list(ours.bos_ids) == ([bos] if bos in (1, 2) else [])
    expected = config.get("bos_token", BOS) if config.get("add_bos_token") else None
    assert ours.bos_text == (expected or "")


@pytest.mark.parametrize("token", [BOS, {"content": BOS, "lstrip": False, "normalized": True}])
def test_the_map_of_special_tokens_may_name_it(tmp_path, token):
    folder = beginnings.write_two_files(tmp_path, add_bos_token=True)
    beginnings.write_json(folder / "special_tokens_map.json", {"bos_token": token})
    ours = opened(folder)
    assert [*ours.bos_ids, *ours.encode(TEXT)] == their_ids(folder, "opt")
    assert ours.bos_ids == (1,)


def test_what_two_files_disagree_on_is_refused(tmp_path):
    folder = beginnings.write_two_files(tmp_path, add_bos_token=True, bos_token=EOS)
    beginnings.write_json(folder / "special_tokens_map.json", {"bos_token": BOS})
    message = refusal(folder)
    for part in ("tokenizer_config.json", "special_tokens_map.json", repr(BOS), repr(EOS)):
        assert part in message
    beginnings.write_two_files(tmp_path, bos_token=EOS)  # put nowhere
    assert opened(folder).bos_ids == ()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"add_bos_token": True}, "has add_bos_token, and nothing names the token"),
        ({"add_bos_token": True, "bos_token": "<new>"}, "the bos_token '<new>' before texts"),
        ({"add_bos_token": "yes", "bos_token": BOS}, "is 'yes' and must be true or false"),
    ],
)
def test_what_is_no_token_is_refused(tmp_path, config, problem):
    message = refusal(beginnings.write_two_files(tmp_path, **config))
    assert problem in message and f"{tmp_path / 'tokenizer_config.json'}" in message


def test_a_class_that_drops_it_is_refused(tmp_path):
    folder = beginnings.write_tokenizer_json(tmp_path, POST_PROCESSORS["template"])
    assert their_ids(folder, "gpt_neox")[0] != 1
    message = refusal(folder)
    assert "puts <s> before a text" in message and "GPTNeoXTokenizer" in message
    named = {"tokenizer_class": "PreTrainedTokenizerFast"}
    beginnings.write_tokenizer_json(tmp_path, POST_PROCESSORS["template"], **named)
    assert [*opened(folder).bos_ids] == their_ids(folder, "gpt_neox")[:1] == [1]


def test_another_token_behind_a_text_is_told(tmp_path):
    behind = processors.TemplateProcessing(single="$A <pad>", special_tokens=[("<pad>", 0)])
    (note,) = opened(beginnings.write_tokenizer_json(tmp_path, behind)).notes
    assert note.startswith("its post_processor puts <pad> behind every text")


def put(**template_parts: object) -> None:
    parts = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}} | template_parts
    content = tokenizer_json(post_processor=parts, added_tokens=[added_token(EOS, 31)])
    put_around(tokenizers.Tokenizer.from_str(json.dumps(content)), Path("a/tokenizer.json"))


@pytest.mark.parametrize(
    ("single", "ids", "problem"),
    [
        (["A", "A"], [31], "repeats or drops a text"),
        ([EOS], [31], "repeats or drops a text"),
        ([EOS, "A"], [30], "before a text as the id 30, which is not that token's"),
        ([EOS, "A"], [77], "before a text as the id 77, which is not that token's"),
        ([EOS] * 17 + ["A"], [31], "puts 17 tokens before a text; 16 are the most"),
    ],
)
def test_what_puts_no_tokens_before_a_text_is_refused(single, ids, problem):
    kinds = {"A": "Sequence", EOS: "SpecialToken"}
    parts = [{kinds[name]: {"id": name, "type_id": 0}} for name in single]
    special = {EOS: {"id": EOS, "ids": ids, "tokens": [EOS]}}
    with pytest.raises(UserError, match=f"a/tokenizer.json: .*{problem}"):
        put(single=parts, special_tokens=special)


def test_several_tokens_may_begin_a_text():
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<x>": 1, "<y>": 2}, "a"))
    model.post_processor = processors.TemplateProcessing(
        single="<x> <y> $A <x>", special_tokens=[("<x>", 1), ("<y>", 2)]
    )
    around = put_around(model, Path("glm"))
    assert (around.bos_ids, around.bos_text, around.behind) == ((1, 2), "<x> <y>", ((1, "<x>"),))


@pytest.mark.parametrize("text", ["<s>", "a b:1", "$A", "<|x:y|>"])
def test_a_template_takes_any_name(text):
    content = tokenizer_json(
        post_processor=template(text, 31), added_tokens=[added_token(text, 31)]
    )
    model = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert model.encode("abab").ids == [31, 30]
    assert put_around(model, Path("a")).before == ((31, text),)


def test_the_models_own_beginning_is_the_last_to_be_asked():
    ids, path, adds = {"<a>": 3, "<b>": 4}, Path("x/tokenizer.model"), {"add_bos_token": True}
    named = TokenizerSettings(tokenizer=adds | {"bos_token": "<b>"})
    assert named_beginning(named, ids, path, path.parent, "<a>") == "<b>"
    silent = TokenizerSettings(tokenizer=adds)
    assert named_beginning(silent, ids, path, path.parent, "<a>") == "<a>"
    assert named_beginning(TokenizerSettings(), ids, path, path.parent, "<a>") is None


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_runs_copy_begins_texts_alike(tmp_path, kind):
    tokenizer = opened(write_folder(kind, tmp_path / "source"))
    tokenizer.save(tmp_path / "run")
    again = opened(tmp_path / "run")
    assert (again.bos_ids, again.bos_text) == (tokenizer.bos_ids, tokenizer.bos_text)
    assert again.fingerprint() == tokenizer.fingerprint() and again.is_same_as(tokenizer)
    again.save(tmp_path / "again")
    names = [path.name for path in sorted((tmp_path / "run").iterdir())]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def without(kind: str, folder: Path) -> Tokenizer:
    """The same tokenizer, whose files put nothing before a text."""
    write_folder(kind, folder)
    path = folder / "tokenizer.json"
    if path.exists():
        beginnings.write_json(path, json.loads(path.read_text()) | {"post_processor": None})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    beginnings.write_json(folder / "tokenizer_config.json", config | {"add_bos_token": False})
    return opened(folder)


@pytest.mark.parametrize("kind", FOLDERS)
def test_tokenizers_that_differ_only_in_it_are_not_the_same(tmp_path, kind):
    tokenizer, other = opened(write_folder(kind, tmp_path / "a")), without(kind, tmp_path)
    assert other.bos_ids == () and other.encode(TEXT) == tokenizer.encode(TEXT)
    assert other.fingerprint() != tokenizer.fingerprint()
    assert not other.is_same_as(tokenizer) and not tokenizer.is_same_as(other)
