from pathlib import Path

import pytest

from engine.data.end_of_text import find_end
from engine.data.tokenizer_settings import TokenizerSettings
from engine.errors import UserError

IDS = {"<|endoftext|>": 0, "<s>": 1, "<|im_end|>": 5, "word": 6}
PATH = Path("model/tokenizer.json")


def settings(named: str | None = None, *model: int) -> TokenizerSettings:
    return TokenizerSettings(
        end_of_text=named,
        end_path="model/tokenizer_config.json",
        model_ends=model,
        model_path="model/config.json",
    )


@pytest.mark.parametrize(
    ("found", "own", "text", "also"),
    [
        (settings("<|im_end|>"), None, "<|im_end|>", ()),
        (settings("<|im_end|>", 5), None, "<|im_end|>", ()),
        (settings("<|im_end|>", 5, 0), None, "<|im_end|>", (0,)),
        (settings("<|im_end|>", 0, 5, 99), "<s>", "<|im_end|>", (0,)),  # 99 is no token
        (settings(None, 1, 5), "<s>", "<s>", (5,)),
        (settings(None, 5), None, "<|im_end|>", ()),
        (settings(None, 5, 99), None, "<|im_end|>", ()),
        (settings(), None, "<|endoftext|>", ()),
    ],
)
def test_the_end_is_found(found, own, text, also):
    end = find_end(found, IDS, PATH, own)
    assert (end.text, end.id, end.also_stops) == (text, IDS[text], also)


@pytest.mark.parametrize(
    ("found", "own", "parts"),
    [
        (
            settings("<|endoftext|>", 5),
            None,
            ["tokenizer_config.json names '<|endoftext|>' (id 0)", "config.json has", " 5: corr"],
        ),
        (settings("<s>", 5, 0), None, ["(id 1)", "[5, 0]"]),
        (settings("<s>", 99), None, ["(id 1)", "eos_token_id 99"]),
        (settings(None, 5), "<s>", ["(id 1)", "config.json has eos_token_id 5"]),
        (settings(None, 5, 0), None, ["eos_token_id [5, 0]", "nothing says which"]),
        (settings(None, 99), None, ["eos_token_id [99], which model/tokenizer.json lacks"]),
        (settings("<nowhere>"), None, ["has no end-of-text token (<nowhere>)"]),
    ],
)
def test_what_disagrees_or_is_open_names_files_and_values(found, own, parts):
    with pytest.raises(UserError) as caught:
        find_end(found, IDS, PATH, own)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1


def test_two_usual_names_are_not_guessed_from():
    with pytest.raises(UserError, match=r"<\|endoftext\|> and </s>, and nothing says which"):
        find_end(settings(), IDS | {"</s>": 9}, PATH)
    with pytest.raises(UserError, match="has no end-of-text token"):
        find_end(settings(), {"a": 0}, PATH)
