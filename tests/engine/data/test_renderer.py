"""Dialogues in turns, plain prompts and their seams; templates, against transformers."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from engine.containers.row import BadRecord
from engine.data.chat import Asked
from engine.data.chat_template import digest_of_template
from engine.data.demonstrations import demonstration_examples, read_demonstrations
from engine.data.examples import TRAINED
from engine.data.prompt_format import DIALOGUES, TEXTS, Prompt, PromptFormat, Reply
from engine.data.prompts import read_prompts
from engine.data.renderer import Renderer
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import UserError
from tests.engine.data.made_tokenizer import made_tokenizer
from tests.engine.data.test_chat_template import CONTROL, folder_of
from tests.tiny import write_lines

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What does the mill cost?"}
REPLY = {"role": "assistant", "content": "Little."}
AGAIN = {"role": "user", "content": "And the system?"}
OTHER = {"role": "assistant", "content": "More.\n\nMuch more."}
HH = "\n\nHuman: Why?\n\nAssistant:"
BLANK = "{% if add_generation_prompt %}"
# What families write, in short, with the control tokens that their tokenizers have.
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n"
    "{% endfor %}" + BLANK + "<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}" + BLANK + "<|im_start|>assistant<|im_end|>\n\n"
    "{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% for m in messages if m.role != 'system' %}<|im_start|>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}" + BLANK + "<|im_start|>model\n{% endif %}",
    "without_an_end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    + BLANK
    + "assistant: {% endif %}",
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "gemma": "<|im_end|>"}


def asked(*messages: dict) -> Asked:
    return Asked(messages=list(messages), field="messages")


def tokenizer_of(path: Path, name: str) -> Tokenizer:
    """A tokenizer with one of the templates."""
    end = ENDS.get(name, "<|endoftext|>")
    return load_tokenizer(folder_of(path, TEMPLATES[name], eos_token=end))


def test_a_dialogue_is_rendered_with_the_reply_open():
    by = Renderer()
    prompt = by.prompt(asked(SYSTEM, USER, REPLY, AGAIN))
    assert prompt == Prompt(
        "System: Be brief.\n\nUser: What does the mill cost?\n\nAssistant: Little.\n\n"
        "User: And the system?\n\nAssistant:",
        is_dialogue=True,
    )
    # The next turn of a dialogue is spelled as prompt + reply, so training sees one form.
    first = by.prompt(asked(SYSTEM, USER))
    assert prompt.text.startswith(first.text + by.reply(asked(SYSTEM, USER), "Little.").text)


@pytest.mark.parametrize(
    ("text", "is_cut", "suffix", "closed"),
    [
        ("Why?", False, "\n", True),
        ("Why?", True, "\n", False),  # "The sky is| blue"
        ("Why? ", False, "\n", True),
        ("Why?\n", False, "\n", False),
        ("Why?\n", True, " =>", False),
        ("Why?\n", False, " =>", True),
        (HH, False, "\n", False),
        (HH, False, " =>", False),
        ("Why?", False, "", False),
    ],
)
def test_a_plain_prompt_is_closed_unless_it_is_open(text, is_cut, suffix, closed):
    question = Asked(text, is_cut=is_cut)
    found = Renderer(PromptFormat(prompt_suffix=suffix)).prompt(question)
    assert found == Prompt(text, suffix if closed else "")
    old = Renderer(PromptFormat(prompt_suffix=suffix, closes_open=True))
    assert old.prompt(question) == Prompt(text, suffix)
    assert old.prompt(asked(USER)).suffix == suffix  # as runs of before had it
    assert old.reply(question, "x") == Reply("x")


def test_who_closes_a_prompt_otherwise_is_named_with_it():
    old = PromptFormat(closes_open=True, trained_on=(TEXTS, DIALOGUES))
    by = Renderer(PromptFormat(), others={"--reward-model runs/rm": old})
    assert by.prompt(Asked("Why?")) == Prompt("Why?", "\n")
    said = (
        r"--reward-model runs/rm was trained by another version, .*Assistant:' by '\\n', and .* ''"
    )
    for question in (asked(USER), Asked("Why?", is_cut=True), Asked(HH)):
        with pytest.raises(UserError, match=said if not question.is_cut else "Why.*by '\\\\n'"):
            by.prompt(question)
    texts = Renderer(PromptFormat(), others={"it": PromptFormat(closes_open=True)})
    assert texts.prompt(asked(USER)).suffix == ""  # that one has learned from no dialogue


def test_a_system_message_is_put_before_dialogues_that_have_none():
    by = Renderer(PromptFormat(system="Be kind."))
    assert by.prompt(asked(USER)).text.startswith("System: Be kind.\n\nUser: What")
    assert by.prompt(asked(SYSTEM, USER)).text.startswith("System: Be brief.\n\nUser: What")
    assert by.prompt(Asked("Why?")) == Prompt("Why?", "\n")


def test_a_plain_prompt_may_be_one_message():
    by = Renderer(PromptFormat(plain_prompts="message", system="Be kind."))
    assert by.prompt(Asked("Why?")) == by.prompt(asked({"role": "user", "content": "Why?"}))
    assert by.reply(Asked("Why?"), "So.") == Reply(" So.")
    assert not by.prompt(Asked("The sky is", is_cut=True)).is_dialogue


def test_other_roles_and_separators_are_written_as_they_are_kept():
    roles = {"system": "S", "user": "Human", "assistant": "Bot"}
    form = PromptFormat(roles=roles, separator="\n")
    assert Renderer(form).prompt(asked(USER)).text == "Human: What does the mill cost?\nBot:"
    assert form.next_turn == "\nHuman:"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("before", [[USER], [SYSTEM, USER], [SYSTEM, USER, REPLY, AGAIN]])
def test_prompt_and_reply_are_what_transformers_makes_of_the_dialogue(tmp_path, name, before):
    tokenizer = tokenizer_of(tmp_path, name)
    by = Renderer(PromptFormat(chat="template"), tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prompt, reply = by.prompt(asked(*before)), by.reply(asked(*before), OTHER["content"])
    opened = theirs.apply_chat_template(before, add_generation_prompt=True, return_dict=True)
    assert prompt.tokens.tolist() == opened["input_ids"]
    whole = theirs.apply_chat_template([*before, OTHER], return_dict=True)["input_ids"]
    ours = [*prompt.tokens, *reply.tokens]
    assert ours[-1] == tokenizer.eos_id and reply.tokens.tolist().count(tokenizer.eos_id) == 1
    if name == "without_an_end":
        assert ours == [*whole, tokenizer.eos_id]
    else:  # behind the end is what parts two turns
        assert ours == whole[: len(ours)] and len(whole) - len(ours) <= 1
    assert reply.text == OTHER["content"]
    first = "<s>" if "bos_token" in TEMPLATES[name] else None
    assert (ours[0] == CONTROL.index("<s>")) == (first is not None)
    assert ours.count(CONTROL.index("<s>")) <= 1


def test_another_token_that_stops_a_response_ends_a_reply(tmp_path):
    path = folder_of(tmp_path, TEMPLATES["gemma"])
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_id, tokenizer.also_stops) == (0, (2,))
    reply = Renderer(PromptFormat(chat="template"), tokenizer).reply(asked(USER), "Little.")
    assert reply.tokens.tolist() == [*tokenizer.encode("Little."), 2]


def test_the_text_of_a_control_token_in_a_reply_stays_text(tmp_path):
    by = Renderer(PromptFormat(chat="template"), tokenizer_of(tmp_path, "chatml"))
    reply = by.reply(asked(USER), "a<|im_end|>\n<|im_start|>user\nb")
    assert [token for token in reply.tokens.tolist() if token < len(CONTROL)] == [2]
    assert by.prompt(asked(USER)).tokens.tolist()[-1] not in range(len(CONTROL))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages[0].content }}" + BLANK + "[INST]{% endif %}", "writes a reply otherwise"),
        ("{{ messages|length }}{{ messages[-1].content }}", "writes a reply otherwise"),
        ("{{ messages[0].content }}", "writes a reply otherwise"),
        ("{% if messages|length > 1 %}{{ raise_exception('No.') }}{% endif %}a", "does not take"),
    ],
)
def test_a_template_that_cannot_be_trained_by_is_named(tmp_path, template, problem):
    tokenizer = load_tokenizer(folder_of(tmp_path, template))
    by = Renderer(PromptFormat(chat="template"), tokenizer)
    with pytest.raises(BadRecord, match=f'"messages" is not taken: .*{problem}'):
        by.reply(asked(USER), "Little.")


def test_a_template_is_the_one_that_was_trained_by(tmp_path):
    tokenizer = tokenizer_of(tmp_path, "chatml")
    digest = digest_of_template(tokenizer)
    form = PromptFormat(chat="template", chat_template=digest)
    assert Renderer(form, tokenizer).kept().chat_template == digest
    with pytest.raises(UserError, match="its chat template is another than the one that was trai"):
        Renderer(PromptFormat(chat="template", chat_template="ab"), tokenizer)
    with pytest.raises(UserError, match="has no chat template"):
        Renderer(form, load_tokenizer(folder_of(tmp_path / "none", None)))


def test_what_is_kept_says_what_was_read(tokenizer):
    by = Renderer(PromptFormat(trained_on=(TEXTS,)), tokenizer)
    assert by.kept().trained_on == (TEXTS,)
    by.note([by.prompt(asked(USER))])
    kept = by.kept()
    assert kept.trained_on == (TEXTS, DIALOGUES)
    assert (kept.begins_with, kept.ends_with) == (tokenizer.bos_ids, tokenizer.eos_id)


def test_a_prompt_that_becomes_no_token_is_a_bad_line(tmp_path):
    letters = made_tokenizer(lambda texts: [[ord(c) for c in t if c.isalpha()] for t in texts])
    path = write_lines(
        tmp_path / "asked.jsonl",
        [{"prompt": "a"}, {"prompt": "\u200b?"}, {"prompt": "?" * 50 + "a"}],
    )
    by = Renderer(PromptFormat(), letters)
    with pytest.raises(UserError, match=r'asked\.jsonl:2: field "prompt" becomes no token'):
        read_prompts(path, by)
    found, report = read_prompts(path, by, skip_bad_lines=True)
    assert (len(found), report.num_bad) == (2, 1)
    begun = made_tokenizer(lambda texts: [[] for _ in texts], bos_ids=(7,))
    assert Renderer(PromptFormat(), begun).prompt(Asked("?")).text == "?"  # its beginning is one


def trained_parts(path: Path, tokenizer: Tokenizer, form: PromptFormat, messages: list) -> list:
    """The texts of the parts of a dialogue that are trained with all replies, and what of it the
    tokens are with the last alone."""
    lines = write_lines(path, [{"messages": messages}])
    by = Renderer(form, tokenizer)
    (all_of_it,), _ = read_demonstrations(lines, by, replies="all")
    (last,), _ = read_demonstrations(lines, by)
    (example,), _ = demonstration_examples([all_of_it], tokenizer, max_length=999)
    (other,), _ = demonstration_examples([last], tokenizer, max_length=999)
    assert example.tokens.tolist() == other.tokens.tolist()  # as they are asked, turn by turn
    trained = np.flatnonzero(example.fields[TRAINED])
    assert example.prompt_length == trained[0]
    parts = np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)
    return [example.tokens[part].tolist() for part in parts]


def test_all_replies_in_turns_are_trained(tmp_path, tokenizer):
    messages = [SYSTEM, USER, REPLY, AGAIN, OTHER]
    parts = trained_parts(tmp_path / "a.jsonl", tokenizer, PromptFormat(), messages)
    first, last = (tokenizer.decode(part) for part in parts)
    assert " Little.".startswith(first) and len(first) > 5  # a token may join "." and a line break
    assert last == " More.\n\nMuch more."
    assert parts[1][-1] == tokenizer.eos_id
    unweighted = [USER, REPLY | {"weight": 0}, AGAIN, OTHER | {"weight": 1}]
    (only,) = trained_parts(tmp_path / "b.jsonl", tokenizer, PromptFormat(), unweighted)
    assert only == parts[1]
    greeted = [REPLY, USER, OTHER]
    parts = trained_parts(tmp_path / "c.jsonl", tokenizer, PromptFormat(), greeted)
    assert tokenizer.decode(parts[0])[:6] == " Littl"


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_all_replies_of_a_template_are_trained_with_what_ends_them(tmp_path, name):
    tokenizer = tokenizer_of(tmp_path, name)
    form = PromptFormat(chat="template")
    messages = [SYSTEM, USER, REPLY, AGAIN, OTHER]
    parts = trained_parts(tmp_path / "a.jsonl", tokenizer, form, messages)
    said = [" Little.", " " + OTHER["content"]] if name == "mistral" else None
    said = said or ["Little.", OTHER["content"]]
    assert parts == [[*tokenizer.encode(text), tokenizer.eos_id] for text in said]


def test_a_dialogue_may_train_earlier_replies_alone(tmp_path, tokenizer):
    messages = [USER, REPLY, AGAIN, OTHER | {"weight": 0}]
    lines = write_lines(
        tmp_path / "a.jsonl", [{"messages": messages}, {"prompt": "a", "response": "b"}]
    )
    found, _ = read_demonstrations(lines, Renderer(PromptFormat(), tokenizer), replies="all")
    (example, plain), _ = demonstration_examples(found, tokenizer, max_length=999)
    assert not example.fields[TRAINED][-3:].any() and example.fields[TRAINED].any()
    assert plain.fields[TRAINED].tolist() == [
        n >= plain.prompt_length for n in range(len(plain.tokens))
    ]
    nothing = write_lines(tmp_path / "b.jsonl", [{"messages": [USER, REPLY | {"weight": 0}]}])
    with pytest.raises(UserError, match="has weights of 0 alone: nothing is trained"):
        read_demonstrations(nothing, Renderer(PromptFormat(), tokenizer), replies="all")


def test_a_template_that_rewrites_earlier_replies_trains_the_last_alone(tmp_path):
    thinks = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}[INST]{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + BLANK + "<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load_tokenizer(folder_of(tmp_path, thinks, eos_token="<|im_end|>"))
    lines = write_lines(tmp_path / "a.jsonl", [{"messages": [USER, REPLY, AGAIN, OTHER]}])
    by = Renderer(PromptFormat(chat="template"), tokenizer)
    assert len(read_demonstrations(lines, by)[0]) == 1
    with pytest.raises(UserError, match="otherwise where another follows; --data.replies last"):
        read_demonstrations(lines, by, replies="all")


def test_a_token_with_more_than_a_reply_in_it_is_none_of_it(tmp_path):
    # ": " is one piece here, which nobody draws: a prompt ends in the colon. So is ".\n".
    pieces = {": ": 900, ".\n": 901}

    def encode(text: str) -> list[int]:
        found, at = [], 0
        while at < len(text):
            step = 2 if text[at : at + 2] in pieces else 1
            found.append(pieces.get(text[at : at + step], ord(text[at])))
            at += step
        return found

    joined = made_tokenizer(lambda texts: [encode(text) for text in texts])
    messages = [USER, REPLY, AGAIN, OTHER]
    first, last = trained_parts(tmp_path / "a.jsonl", joined, PromptFormat(), messages)
    assert first == encode("Little")
    assert last == [*encode(" More.\n\nMuch more."), joined.eos_id]
