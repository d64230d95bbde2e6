import pytest

from engine.cautions.of_prompts import prompt_cautions
from engine.data.prompt_format import DIALOGUES, TEXTS, Prompt, PromptFormat
from engine.data.renderer import Renderer
from tests.engine.data.made_tokenizer import made_tokenizer

LETTERS = made_tokenizer(lambda texts: [list(map(ord, text)) for text in texts])
PLAIN = [Prompt("Why?", "\n")] * 3
CHATS = [Prompt("User: Why?\n\nAssistant:", is_dialogue=True)] * 3


@pytest.mark.parametrize(
    ("kinds", "prompts", "said"),
    [
        ((DIALOGUES,), PLAIN, "plain texts, and the run before was trained on dialogues alone"),
        ((TEXTS,), CHATS, "dialogues, and the run before was trained on plain texts alone"),
        ((TEXTS, DIALOGUES), PLAIN, None),
        ((), CHATS, None),
        ((DIALOGUES,), [*PLAIN[:1], *CHATS * 7], None),  # one in 22 is little
        ((TEXTS,), [*PLAIN * 7, *CHATS[:1]], None),
    ],
)
def test_a_form_that_the_run_before_has_not_seen_is_said(kinds, prompts, said):
    found = prompt_cautions(Renderer(PromptFormat(trained_on=kinds), LETTERS), prompts)
    assert [alarm.name for alarm in found] == (["prompt_form"] if said else [])
    if said:
        assert said in found[0].message and "--data.plain-prompts message" in found[0].message


def test_prompts_of_another_form_are_counted_where_others_are_known():
    mixed = [*PLAIN, *CHATS]
    for kinds, said in (((DIALOGUES,), "3 of 6 prompts are plain texts"), ((TEXTS,), "dialogues")):
        found = prompt_cautions(Renderer(PromptFormat(trained_on=kinds), LETTERS), mixed)
        assert [alarm.name for alarm in found] == ["prompt_form", "two_forms"]
        assert said in found[0].message
        assert "3 of 6 prompts are plain texts, and the others dialogues" in found[1].message
    seen = PromptFormat(trained_on=(TEXTS, DIALOGUES))
    assert prompt_cautions(Renderer(seen, LETTERS), [PLAIN[0], *CHATS * 7]) == []


def test_each_network_that_reads_the_prompts_is_asked():
    chats, turns = PromptFormat(trained_on=(DIALOGUES,)), "\n\nHuman:"
    others = {
        "--reward-model a": chats,
        "--reference b": PromptFormat(trained_on=(TEXTS,)),  # as the run's own
        "--reference c": PromptFormat(trained_on=(TEXTS,), text_turns=turns),
    }
    by = Renderer(PromptFormat(trained_on=(TEXTS,)), LETTERS, others)
    first, second = prompt_cautions(by, PLAIN)
    assert "plain texts, and --reward-model a was trained on dialogues alone" in first.message
    assert "no dialogues in text, and --reference c was trained mostly on such" in second.message


def test_plain_prompts_for_a_model_that_has_a_chat_template_are_said():
    by_template = Renderer(PromptFormat(chat="template"))
    (alarm,) = prompt_cautions(by_template, PLAIN)
    assert "by its tokenizer's chat template, if at all" in alarm.message
    assert "--data.plain-prompts message" in alarm.message
    assert prompt_cautions(by_template, CHATS) == []
    trained = PromptFormat(chat="template", trained_on=(TEXTS,))
    assert prompt_cautions(Renderer(trained), PLAIN) == []


def test_pairs_that_stay_texts_are_not_told_to_be_messages_again():
    form = PromptFormat(chat="template", plain_prompts="message", system="Be brief.")
    cut = [Prompt("\n\nHuman: Why?\n\nAssistant:")]
    found = prompt_cautions(Renderer(form), cut)
    assert [alarm.name for alarm in found] == ["prompt_form", "system"]
    for alarm in found:
        assert "cut out of pairs, and stay texts" in alarm.message
        assert "--data.fields hh" in alarm.message and "has each read" not in alarm.message


def test_prompts_that_are_no_dialogues_in_text_are_said_to_a_run_of_such():
    form = PromptFormat(trained_on=(TEXTS,), text_turns="\n\nHuman:")
    (alarm,) = prompt_cautions(Renderer(form, LETTERS), PLAIN)
    assert r"write prompts as '\n\nHuman: ...\n\nAssistant:'" in alarm.message
    turns = [PLAIN[0], *[Prompt("\n\nHuman: Why?\n\nAssistant:")] * 20]
    assert prompt_cautions(Renderer(form, LETTERS), turns) == []


def test_whitespace_that_closes_prompts_which_end_in_whitespace_is_said():
    spaced = Prompt("Why? ", "\n")
    (alarm,) = prompt_cautions(Renderer(None, LETTERS), [spaced, spaced, PLAIN[0]])
    assert alarm.name == "prompt_seam"
    assert alarm.message.startswith("2 of 3 prompts end in whitespace, and '\\n' closes them")
    assert prompt_cautions(Renderer(None, LETTERS), [spaced, PLAIN[0]]) == []


def test_a_system_message_that_is_in_no_prompt_is_said():
    by = Renderer(PromptFormat(system="Be brief."))
    assert [alarm.name for alarm in prompt_cautions(by, PLAIN)] == ["system"]
    assert prompt_cautions(by, [*PLAIN[:1], *CHATS * 7]) == []


@pytest.mark.parametrize(
    ("prompts", "replies", "is_said"),
    [
        (PLAIN, [" So.", " No.", "Yes."], True),
        (PLAIN, [" So.", "No.", "Yes.", "\tYes."], False),  # no more than half
        ([Prompt("Why?", " =>")], [" So."], False),
        ([Prompt("Why?")], [" So."], False),
        (CHATS, [" So."], False),
        (PLAIN, [], False),
    ],
)
def test_whitespace_on_both_sides_of_the_seam_is_said(prompts, replies, is_said):
    found = prompt_cautions(Renderer(None, LETTERS), prompts, replies)
    assert [alarm.name for alarm in found] == (["prompt_seam"] if is_said else [])
    if is_said:
        assert found[0].message.endswith("--data.prompt-suffix '' leaves it out")
        assert found[0].message.startswith("2 of 3 replies begin with whitespace")


def test_a_suffix_that_is_nothing_to_the_tokenizer_is_said():
    without = made_tokenizer(lambda texts: [list(map(ord, text.strip())) for text in texts])
    (alarm,) = prompt_cautions(Renderer(None, without), PLAIN)
    assert alarm.name == "prompt_suffix" and r"'\n' becomes no token" in alarm.message
    assert prompt_cautions(Renderer(None, without), CHATS) == []
