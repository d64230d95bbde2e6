"""One text, one way: every form of a record is the same tokens in SFT, reward model, PPO, batch
generation and dialogue, in turns and by a chat template; and these are those of transformers."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine import rm, rollout, sft
from engine.answers import batch, dialogue
from engine.answers.answer import generate_text
from engine.data.prompt_format import read_prompt_format
from engine.data.tokenizer import load_tokenizer
from engine.settings.generate import GenerateConfig
from engine.settings.sampling import SamplingConfig
from tests.engine.data.test_chat_template import folder_of
from tests.engine.data.test_renderer import TEMPLATES
from tests.families import save_family
from tests.tiny import ppo_config, rm_config, sft_config, train, write_lines

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What does the mill cost?"}
GOOD = {"role": "assistant", "content": "Little."}
BAD = {"role": "assistant", "content": "Much."}
AGAIN = {"role": "user", "content": "And the system?"}
HH = "\n\nHuman: What does it cost?\n\nAssistant: Why?\n\nHuman: So.\n\nAssistant:"
NAMES = {"user": "Human", "assistant": "Assistant"}
SAME = {"response": " Little.", "chosen": " Little.", "rejected": " Much."}


def dialogue_of(*messages: dict[str, str]) -> dict[str, Any]:
    """A record of a dialogue, as all stages may read it."""
    return {
        "messages": [*messages, GOOD],
        "chosen": [*messages, GOOD],
        "rejected": [*messages, BAD],
    }


# By form: a record, and what it asks: a text with its suffix, or messages.
FORMS: dict[str, tuple[dict[str, Any], str | list[dict[str, str]]]] = {
    "plain": ({"prompt": "The mill", **SAME}, "The mill\n"),
    "plain, spaced": ({"prompt": "The mill is ", **SAME}, "The mill is \n"),
    "plain, closed": ({"prompt": "The mill is\n", **SAME}, "The mill is\n"),
    "HH in text": ({"prompt": HH, **SAME}, HH),
    "one turn": (dialogue_of(USER), [USER]),
    "turns": (dialogue_of(USER, GOOD, AGAIN), [USER, GOOD, AGAIN]),
    "with a system": (dialogue_of(SYSTEM, USER), [SYSTEM, USER]),
    "a developer": (dialogue_of(SYSTEM | {"role": "developer"}, USER), [SYSTEM, USER]),
    "prompt as messages": (
        {"prompt": [SYSTEM, USER], "response": [GOOD], "chosen": [GOOD], "rejected": [BAD]},
        [SYSTEM, USER],
    ),
    "messages and texts": (
        {"messages": [USER], "response": "Little.", "chosen": "Little.", "rejected": "Much."},
        [USER],
    ),
    "ultrafeedback_binarized": ({"prompt": USER["content"], **dialogue_of(USER)}, [USER]),
    "TRL's hh-rlhf": ({"prompt": [USER], **dialogue_of(USER, GOOD, AGAIN)}, [USER, GOOD, AGAIN]),
    "K answers": (
        {
            "messages": [SYSTEM, USER],
            "response": "Little.",
            "completions": ["Little.", "Much.", "So."],
            "ranks": [1, 2, 3],
        },
        [SYSTEM, USER],
    ),
    "implicit text": ({"chosen": "The mill is so.", "rejected": "The mill is not."}, "The mill is"),
    "implicit HH": ({"chosen": f"{HH} So.", "rejected": f"{HH} No."}, HH),
    "implicit chats": (
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        [SYSTEM, USER],
    ),
}
IN_SFT = [name for name, (record, _) in FORMS.items() if {"response", "messages"} & record.keys()]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[int]]]:
    """The prompts' tokens by who read them, as stages and generation run."""
    found: dict[str, list[list[int]]] = {}

    def note(who: str, where: Any, name: str) -> None:
        function = getattr(where, name)

        def noting(*arguments: Any, **options: Any) -> Any:
            units, report = function(*arguments, **options)
            firsts = [unit[0] if isinstance(unit, list) else unit for unit in units]
            tokens = [e.tokens[: e.prompt_length].tolist() for e in firsts]
            found.setdefault(who, tokens)  # training's; what is held out comes later
            return units, report

        monkeypatch.setattr(where, name, noting)

    note("sft", sft, "demonstration_examples")
    note("rm", rm, "comparison_examples")
    note("ppo", rollout, "prompt_examples")
    note("generate", batch, "prompt_examples")
    return found


@pytest.fixture(params=["turns", "template"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder with a run of each stage, on records of all forms; each from the one before."""
    records = [record for record, _ in FORMS.values()]
    chat = None if request.param == "template" else "turns"
    train_stages(tmp_path, [FORMS[name][0] for name in IN_SFT], records, chat)
    yield tmp_path


def train_stages(
    path: Path, demonstrations: list[dict], records: list[dict], chat: str | None
) -> None:
    """Run each stage, from the one before; the first from a folder with a chat template."""
    folder = path / "theirs"
    save_family("llama", folder, max_position_embeddings=512)
    folder_of(folder, TEMPLATES["chatml"], eos_token="<|im_end|>")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": 2}))
    write_lines(path / "sft.jsonl", demonstrations)
    write_lines(path / "all.jsonl", records)
    config: Any = sft_config(path, path / "sft", init_from=folder, epochs=0.1, batch_size=2)
    data = {"train": path / "sft.jsonl", "pretraining": None, "pretraining_fraction": 0.0}
    train(changed(config, chat=chat, valid_fraction=0.0, **data))
    config = rm_config(path, path / "rm", init_from=path / "sft", epochs=0.1)
    config = dataclasses.replace(config, batch_size=2)
    data = {"train": path / "all.jsonl", "demonstrations": None}
    train(changed(config, valid_fraction=0.0, **data))
    config = ppo_config(
        path,
        path / "ppo",
        policy=path / "sft",
        reference=None,
        reward_model=path / "rm",
        sampling=SamplingConfig(max_new_tokens=2, cache_gib=0.01),
        iterations=1,
        rollout_batch_size=2,
        minibatch_size=2,
        ptx_coef=0.0,
    )
    data = {"prompts": path / "all.jsonl", "pretraining_valid": None}
    train(changed(config, valid_fraction=0.0, **data))


def changed(config: Any, **data: Any) -> Any:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def talked(source: Path, messages: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> list:
    """What a model is asked last in a dialogue that goes so."""
    asked: list[list[int]] = []
    typed = iter([m["content"] for m in messages if m["role"] == "user"])
    replies = iter([m["content"] for m in messages if m["role"] == "assistant"] + ["So."])
    system = next((m["content"] for m in messages if m["role"] == "system"), None)

    def answer(network, prompts, *rest, tokenizer, on_tokens, **others):
        asked.append(prompts[0].tolist())
        on_tokens(0, tokenizer.encode(f" {next(replies)}"))
        return []

    with monkeypatch.context() as patch:
        patch.setattr("builtins.input", lambda prompt: next(typed, None) or "quit")
        patch.setattr(dialogue, "generate", answer)
        generate_text(GenerateConfig(source=source, system=system))
    return asked[-1]


def test_every_form_is_the_same_tokens_everywhere(seen, run, monkeypatch):
    form = read_prompt_format(run / "ppo")
    for stage in ("sft", "rm"):
        kept = read_prompt_format(run / stage)
        assert kept == form and set(kept.trained_on) == {"texts", "dialogues"}
    settings = GenerateConfig(
        source=run / "ppo",
        prompts=run / "all.jsonl",
        out=run / "out.jsonl",
        sampling=SamplingConfig(max_new_tokens=1, temperature=0.0),
    )
    generate_text(settings)
    assert seen["rm"] == seen["ppo"] == seen["generate"]
    by_form = dict(zip(FORMS, seen["generate"], strict=True))
    assert seen["sft"] == [by_form[name] for name in IN_SFT]
    tokenizer = load_tokenizer(run / "theirs")
    theirs = AutoTokenizer.from_pretrained(run / "theirs")
    for name, (_, asked) in FORMS.items():
        if isinstance(asked, str):
            assert by_form[name] == tokenizer.encode(asked), name
            continue
        assert talked(run / "ppo", asked, monkeypatch) == by_form[name], name
        if form.chat == "turns":
            said = [f"{m['role'].capitalize()}: {m['content']}" for m in asked]
            text = "\n\n".join([*said, "Assistant:"])
            assert by_form[name] == tokenizer.encode(text), name
        else:
            opened = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
            assert by_form[name] == opened["input_ids"], name


def test_a_dialogue_is_asked_as_the_texts_of_hh_rlhf_were_trained(seen, tmp_path, monkeypatch):
    dialogues = [[USER], [USER, GOOD, AGAIN], [USER, GOOD, AGAIN, BAD, USER]]
    texts = [
        "".join(f"\n\n{NAMES[m['role']]}: {m['content']}" for m in messages) + "\n\nAssistant:"
        for messages in dialogues
    ]
    pairs = [{"chosen": f"{text} Little.", "rejected": f"{text} Much."} for text in texts]
    train_stages(tmp_path, [{"prompt": text, "response": " So."} for text in texts], pairs, None)
    tokenizer = load_tokenizer(tmp_path / "theirs")
    expected = [[*tokenizer.bos_ids, *tokenizer.encode(text)] for text in texts]
    assert seen["sft"] == seen["rm"] == seen["ppo"] == expected
    for stage in ("sft", "ppo"):
        assert [talked(tmp_path / stage, each, monkeypatch) for each in dialogues] == expected
