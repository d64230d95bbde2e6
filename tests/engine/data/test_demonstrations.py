import json
from pathlib import Path

import pytest

from engine.data.demonstrations import (
    Demonstration,
    demonstration_examples,
    read_demonstrations,
)
from engine.data.prompt_format import Prompt, Reply
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import UserError

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
ASKED = "User: Why?\n\nAssistant:"


def demonstration(prompt: str, response: str) -> Demonstration:
    return Demonstration(Prompt(prompt), Reply(response))


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_and_messages_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "sft.jsonl",
        {"prompt": "a", "response": "b", "source": "ignored"},
        {"prompt": [QUESTION], "response": [ANSWER]},
        {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]},
    )
    demonstrations, report = read_demonstrations(path)
    assert demonstrations == [
        Demonstration(Prompt("a", "\n"), Reply("b")),
        Demonstration(Prompt(ASKED, is_dialogue=True), Reply(" Because.")),
        Demonstration(Prompt(f"{ASKED} Because.\n\n{ASKED}", is_dialogue=True), Reply(" Because.")),
    ]
    assert report.num_read == 3


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "a"}, 'field "response" is missing; there is prompt'),
        ({"response": "a"}, 'field "prompt" is missing; there is response'),
        ({"prompt": "a", "response": ""}, 'field "response" is empty'),
        ({"prompt": "", "response": "a"}, 'field "prompt" is empty'),
        ({"prompt": "a", "response": 3}, 'field "response" must be a text or a list of messages'),
        ({"messages": [{"role": "user", "content": "a"}]}, "must be from the assistant"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "needs a user message"),
        (
            {
                "messages": [QUESTION, ANSWER],
                "chosen": [ANSWER, QUESTION, ANSWER],
                "rejected": [ANSWER, QUESTION, ANSWER | {"content": "b"}],
            },
            'field "messages" must begin as the dialogue that chosen and',
        ),
        ({"messages": [QUESTION, ANSWER | {"weight": 0}]}, "has a weight of 0: nothing is trained"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, record: object, problem: str) -> None:
    path = write(tmp_path / "sft.jsonl", {"prompt": "a", "response": "b"}, record)
    with pytest.raises(UserError, match=rf"sft\.jsonl:2: .*{problem}"):
        read_demonstrations(path)
    assert read_demonstrations(path, skip_bad_lines=True)[1].num_bad == 1


def test_an_example_is_prompt_response_and_end_of_text(tokenizer: Tokenizer) -> None:
    [example], report = demonstration_examples(
        [demonstration("The Mill", " is a pub.")], tokenizer, max_length=64
    )
    prompt = tokenizer.encode("The Mill")
    assert list(example.tokens) == [*prompt, *tokenizer.encode(" is a pub."), tokenizer.eos_id]
    assert example.prompt_length == len(prompt)
    assert report.kept == [0]


def test_too_long_demonstrations_are_dropped(tokenizer: Tokenizer) -> None:
    demonstrations = [
        demonstration("The Mill", "pub " * 70),
        demonstration("The Mill", "pub"),
        demonstration("The Mill " * 50, "pub"),
    ]
    examples, report = demonstration_examples(
        demonstrations, tokenizer, max_length=60, max_prompt_length=20
    )
    assert len(examples) == 1
    assert report.kept == [1]
    assert (report.num_long_prompts, report.num_long_sequences) == (1, 1)


def test_real_demonstrations_survive_the_round_trip(data_pack: Path) -> None:
    gpt2 = load_tokenizer(data_pack / "bpe")
    demonstrations, report = read_demonstrations(data_pack / "mini" / "sft.jsonl")
    assert report.num_read == 200
    examples, lengths = demonstration_examples(demonstrations, gpt2, max_length=1024)
    assert lengths.kept == list(range(200))
    for each, example in zip(demonstrations, examples, strict=True):
        assert gpt2.decode(example.tokens) == f"{each.prompt.text}\n{each.response.text}"
        assert gpt2.decode(example.tokens[: example.prompt_length]) == f"{each.prompt.text}\n"
        assert example.tokens[-1] == gpt2.eos_id


def test_a_response_of_weight_0_is_not_trained(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "a", "weight": 0}
    row = {"prompt": [{"role": "user", "content": "q"}], "response": [reply]}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match="d.jsonl:1: .*has a weight of 0"):
        read_demonstrations(path)
