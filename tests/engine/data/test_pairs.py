"""One record asks the same in every stage; a pair with the prompt inside is cut where it may be."""

import pytest

from engine.containers.row import BadRecord
from engine.data.chat import Asked
from engine.data.pairs import asked_in, split_chats, split_texts, without_prompt

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
BAD = {"role": "assistant", "content": "No."}
HH = "\n\nHuman: Why?\n\nAssistant: Hm.\n\nHuman: Well?\n\nAssistant:"


def of(*messages: dict, field: str = "messages") -> Asked:
    return Asked(messages=list(messages), field=field)


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"prompt": "Why?"}, Asked("Why?")),
        ({"prompt": "Why?", "response": "Because."}, Asked("Why?")),
        ({"prompt": [SYSTEM, USER]}, of(SYSTEM, USER, field="prompt")),
        ({"messages": [SYSTEM, USER]}, of(SYSTEM, USER)),
        ({"messages": [USER, GOOD]}, of(USER)),
        ({"messages": [USER, GOOD, USER, BAD]}, of(USER, GOOD, USER)),
        ({"prompt": None, "messages": [USER, GOOD], "chosen": None}, of(USER)),
        # A text beside the dialogue that repeats it, as in ultrafeedback_binarized.
        ({"prompt": "Why?", "messages": [USER, GOOD]}, of(USER)),
        (
            {
                "prompt": "Why?",
                "chosen": [USER, GOOD],
                "rejected": [USER, BAD],
                "messages": [USER, GOOD],
            },
            of(USER, field="chosen"),
        ),
        # The whole dialogue, of which the prompt is the beginning, as in TRL's hh-rlhf.
        (
            {
                "prompt": [USER],
                "chosen": [USER, GOOD, USER, GOOD],
                "rejected": [USER, GOOD, USER, BAD],
            },
            of(USER, GOOD, USER, field="chosen"),
        ),
        ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, Asked("Why?")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, of(USER, field="prompt")),
        ({"prompt": "Why?", "response": "So.", "messages": [USER, GOOD]}, Asked("Why?")),
        ({"chosen": HH + " Yes", "rejected": HH + " No"}, Asked(HH, field="chosen", is_cut=True)),
    ],
)
def test_a_record_asks_one_thing(record, asked):
    assert asked_in(record) == asked


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("The sky is blue.", "The sky is", "The sky"),
        ("The sky is ", "The sky is blue", "The sky"),
        ("Line\nblue", "Line\nblack", "Line\n"),
        ("\u5929\u7a7a\u662f\u84dd\u8272\u7684\u3002", "\u5929\u7a7a\u662f\u7eff\u8272\u7684\u3002")
        + ("\u5929\u7a7a\u662f",),
        ("\u5929\u7a7a", "\u5929\u7a7a\u662f\u84dd", "\u5929"),
        ("\u305d\u3089\u306f\u30a2", "\u305d\u3089\u306f\u30ab", "\u305d\u3089\u306f"),
        # A vowel sign stays with its letter.
        ("\u0e19\u0e49\u0e33\u0e14\u0e35", "\u0e19\u0e49\u0e33\u0e43\u0e2a", "\u0e19\u0e49\u0e33"),
        ("\u0e19\u0e49", "\u0e19\u0e32\u0e49", None),
        # Korean has spaces: no word is cut.
        ("\ud558\ub298\uc740 \ud478\ub985\ub2c8\ub2e4", "\ud558\ub298\uc740 \ud478\ub974\ub2e4")
        + ("\ud558\ub298\uc740",),
        ("\ud558\ub298\uc740", "\ud558\ub298\uc774", None),
    ],
)
def test_texts_part_behind_the_last_whole_word_that_they_share(chosen, rejected, prompt):
    record = {"chosen": chosen, "rejected": rejected}
    if prompt is None:
        with pytest.raises(BadRecord, match="is missing, and chosen and rejected begin diff"):
            split_texts(record)
        return
    asked, replies = split_texts(record)
    assert asked == Asked(prompt, field="chosen", is_cut=True)
    assert [prompt + reply for reply in replies] == [chosen, rejected]
    assert all(reply.strip() for reply in replies)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"chosen": [USER, GOOD], "rejected": "No."},
            'field "rejected" must be a list of messages, as chosen is, not a string',
        ),
        (
            {"chosen": "Yes.", "rejected": [USER, BAD]},
            'field "rejected" must be a string, as chosen is, not a list',
        ),
        (
            {"prompt": "Else?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            'field "prompt" is not in the dialogue',
        ),
        (
            {"prompt": [BAD, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            'field "prompt" is not in the dialogue',
        ),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "must equal chosen up to"),
        ({"chosen": [USER, USER], "rejected": [USER, BAD]}, "must be from the assistant"),
        ({"messages": [GOOD]}, 'field "messages" needs a user message'),
        ({"question": "Why?"}, 'field "prompt" is missing; there is question'),
    ],
)
def test_what_asks_nothing_or_two_things_is_named(record, problem):
    with pytest.raises(BadRecord, match=problem):
        asked = asked_in(record)
        split_chats(record) if asked.field == "chosen" and not asked.is_cut else None


def test_what_else_messages_have_makes_no_other_dialogue() -> None:
    asks = [{"role": "user", "content": "q", "id": 1}, {"role": "user", "content": "q", "id": 2}]
    said = [{"role": "assistant", "content": text} for text in ("a", "b")]
    asked, replies = split_chats({"chosen": [asks[0], said[0]], "rejected": [asks[1], said[1]]})
    assert [message["content"] for message in asked.messages] == ["q"]
    assert replies == ["a", "b"]


@pytest.mark.parametrize(
    ("prompt", "replies", "behind"),
    [
        ("\n\nHuman: a\n\nAssistant:", ["{p} b", "{p} c"], [" b", " c"]),
        ("\n\nHuman: a\n\nAssistant:", ["{p} b"], [" b"]),
        ("Why is the sky blue?", ["{p} Light.", "{p} Air."], [" Light.", " Air."]),
        ("Why is the sky blue?", ["{p} Light."], ["{p} Light."]),
        ("Why is the sky blue?", ["{p} Light.", "Air."], ["{p} Light.", "Air."]),
        ("Why is the sky blue?", ["{p} Light.", "{p}"], ["{p} Light.", "{p}"]),
        ("Yes", ["Yes, so.", "Yes, no."], ["Yes, so.", "Yes, no."]),
    ],
)
def test_a_prompt_that_the_replies_repeat_is_no_part_of_them(prompt, replies, behind):
    said = [reply.format(p=prompt) for reply in replies]
    found = without_prompt(Asked(prompt), said)
    assert found == [reply.format(p=prompt) for reply in behind]
