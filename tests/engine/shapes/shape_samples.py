"""Lines of public data sets in their exact form, texts shortened, and the records that they are."""

import json
from dataclasses import dataclass, field
from typing import Any

from engine.containers.json_lines import without_nulls


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def asked(*contents: str) -> list[dict[str, str]]:
    """Return a dialogue, the user's turns and the assistant's, that begins with the user's."""
    return [said(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]


@dataclass(frozen=True)
class Sample:
    """Rows of one format, and what each purpose has of them; a text is the error's."""

    format: str
    rows: list[dict[str, Any]]
    demonstrations: list[dict[str, Any]] | str
    comparisons: list[dict[str, Any]] | str
    prompts: list[dict[str, Any]] | str
    shape: str = "plain"
    text: list[dict[str, Any]] | str = "has no text; there is"
    fields: str = "auto"
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    def as_read(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the rows as they come of a file: each with its place, and no nulls."""
        rows = json.loads(json.dumps(self.rows))
        return [(f"f.jsonl:{n}", without_nulls(row)) for n, row in enumerate(rows, 1)]


SKY = "What color is the sky?"
BLUE, GREEN = "It is blue.", "It is green."
NO_ANSWER = "has no answer to imitate"
NO_RANKS = "has no answers of one prompt that are ranked"
NO_RESPONSE = "has no answer to imitate; there is"
NO_COMPLETIONS = "has no answers of one prompt that are ranked; there is"
NO_PROMPTS = "has no prompts; there is"
SYSTEM = said("system", "Be brief.")


def ranking(prompt: Any, completions: list[Any], ranks: list[int]) -> dict[str, Any]:
    return {"prompt": prompt, "completions": completions, "ranks": ranks}


def _node(id_: str, role: str, text: str, **others: Any) -> dict[str, Any]:
    return {"message_id": id_, "text": text, "role": role, "lang": "en", **others}


OASST_TREE = {
    "message_tree_id": "m0",
    "tree_state": "ready_for_export",
    "prompt": {
        **_node("m0", "prompter", SKY, review_count=3, deleted=False, rank=None),
        "replies": [
            _node("m1", "assistant", GREEN, rank=1, deleted=False, replies=[]),
            {
                **_node("m2", "assistant", BLUE, rank=0, deleted=False),
                "replies": [
                    {
                        **_node("m4", "prompter", "Why?", rank=None),
                        "replies": [_node("m5", "assistant", "Light.", rank=None, replies=[])],
                    }
                ],
            },
            _node("m3", "assistant", "spam", rank=2, deleted=True, replies=[]),
        ],
    },
}
_FLAT = {
    "user_id": "u",
    "created_date": "2023-02-05T14:23:50.983374+00:00",
    "review_result": True,
    "synthetic": False,
    "model_name": None,
    "detoxify": None,
    "message_tree_id": "m0",
    "tree_state": "ready_for_export",
    "emojis": None,
    "labels": None,
}
OASST_ROWS = [
    {**_node("m0", "prompter", SKY, rank=None, deleted=False), "parent_id": None, **_FLAT},
    {**_node("m1", "assistant", GREEN, rank=1, deleted=False), "parent_id": "m0", **_FLAT},
    {**_node("m2", "assistant", BLUE, rank=0, deleted=False), "parent_id": "m0", **_FLAT},
    {**_node("m3", "assistant", "spam", rank=2, deleted=True), "parent_id": "m0", **_FLAT},
    {**_node("m4", "prompter", "Why?", rank=None, deleted=False), "parent_id": "m2", **_FLAT},
    {**_node("m5", "assistant", "Light.", rank=None, deleted=False), "parent_id": "m4", **_FLAT},
]
_OASST: dict[str, Any] = {
    "demonstrations": [{"messages": asked(SKY, BLUE, "Why?", "Light.")}],
    "comparisons": [ranking(asked(SKY), [GREEN, BLUE], [2, 1])],
    "prompts": [{"prompt": asked(SKY)}, {"prompt": asked(SKY, BLUE, "Why?")}],
}


def _rated(response: str, rating: str, overall: float) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {
        "annotations": {
            aspect: {"Rating": rating, "Rationale": "...", "Type": ["1"]} for aspect in aspects
        },
        "custom_system_prompt": "You are helpful.",
        "model": "alpaca-7b",
        "principle": "helpfulness",
        "response": response,
        "critique": "...",
        "overall_score": overall,
        "fine-grained_score": 4.0,
    }


def _helpsteer(prompt: str, response: str, helpfulness: int) -> dict[str, Any]:
    others = {"correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **others}


def _webgpt(first: float) -> dict[str, Any]:
    side = {"title": ["a page"], "extract": ["words"]}
    return {
        "question": {"dataset": "eli5_val", "id": "8gbt16", "full_text": SKY},
        "quotes_0": side,
        "answer_0": BLUE,
        "tokens_0": {"prefix": [1], "completion": [2]},
        "score_0": first,
        "quotes_1": side,
        "answer_1": GREEN,
        "tokens_1": {"prefix": [1], "completion": [3]},
        "score_1": -first,
    }


def _arena(winner: str, a: list[dict[str, str]], b: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "question_id": "58210e39b3fd4441a2bd4a518bb44c2d",
        "model_a": "chatglm-6b",
        "model_b": "koala-13b",
        "winner": winner,
        "judge": "arena_user_973",
        "conversation_a": a,
        "conversation_b": b,
        "turn": len(a) // 2,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.1322,
    }


def _tldr(text: str) -> str:
    return f"SUBREDDIT: r/AskReddit\n\nTITLE: {SKY}\n\nPOST: {text}\n\nTL;DR:"


_BLUE_OVER_GREEN = [ranking(SKY, [BLUE, GREEN], [1, 2])]
_ASKED = [{"prompt": SKY}]
_ASKED_CHAT = [{"prompt": asked(SKY)}]

ANSWERS = [
    Sample(
        "prompt and response",
        [{"prompt": SKY, "response": BLUE}],
        [{"prompt": SKY, "response": BLUE}],
        NO_COMPLETIONS,
        _ASKED,
    ),
    Sample(
        "TRL: prompt-only",
        [{"prompt": "The sky is"}],
        NO_RESPONSE,
        NO_COMPLETIONS,
        [{"prompt": "The sky is"}],
    ),
    Sample(
        "TRL: prompt-only, conversational",
        [{"prompt": asked(SKY)}],
        NO_RESPONSE,
        NO_COMPLETIONS,
        _ASKED_CHAT,
    ),
    Sample(
        "TRL: prompt-completion",
        [{"prompt": "The sky is", "completion": " blue."}],
        [{"prompt": "The sky is", "response": " blue."}],
        NO_RANKS,
        [{"prompt": "The sky is"}],
        "completion",
    ),
    Sample(
        "TRL: prompt-completion, conversational",
        [{"prompt": asked(SKY), "completion": [said("assistant", BLUE)]}],
        [{"messages": asked(SKY, BLUE)}],
        NO_RANKS,
        _ASKED_CHAT,
        "completion",
    ),
    Sample(
        "TRL: unpaired preference",
        [
            {"prompt": "The sky is", "completion": " blue.", "label": True},
            {"prompt": "The sky is", "completion": " green.", "label": False},
        ],
        [{"prompt": "The sky is", "response": " blue."}],
        NO_RANKS,
        [{"prompt": "The sky is"}] * 2,
        "completion",
        left_out={"demonstrations": {"completions labelled false": 1}},
    ),
    Sample(
        "TRL: unpaired preference, conversational",
        [{"prompt": asked(SKY), "completion": [said("assistant", BLUE)], "label": True}],
        [{"messages": asked(SKY, BLUE)}],
        NO_RANKS,
        _ASKED_CHAT,
        "completion",
    ),
    Sample(
        "TRL: stepwise supervision",
        [{"prompt": SKY, "completions": ["Look up.", "It is green."], "labels": [True, False]}],
        NO_ANSWER,
        NO_RANKS,
        _ASKED,
        "stepwise",
    ),
    Sample(
        "OpenAI: legacy fine-tuning",
        [{"prompt": f"{SKY}\n\n###\n\n", "completion": " blue END"}],
        [{"prompt": f"{SKY}\n\n###\n\n", "response": " blue END"}],
        NO_RANKS,
        [{"prompt": f"{SKY}\n\n###\n\n"}],
        "completion",
    ),
    Sample(
        "Alpaca",
        [
            {
                "instruction": "Name the color.",
                "input": "sky",
                "output": "blue",
                "text": "Below is an instruction ...",
            },
            {"instruction": SKY, "input": "", "output": BLUE, "text": "Below is ..."},
        ],
        [
            {"prompt": "Name the color.\n\nsky", "response": "blue"},
            {"prompt": SKY, "response": BLUE},
        ],
        NO_RANKS,
        [{"prompt": "Name the color.\n\nsky"}, {"prompt": SKY}],
        "alpaca",
        text=[{"text": "Below is an instruction ..."}, {"text": "Below is ..."}],
    ),
    Sample(
        "Alpaca with system and history (LLaMA-Factory)",
        [
            {
                "instruction": "Why?",
                "input": "",
                "output": "Light.",
                "system": "Be brief.",
                "history": [[SKY, BLUE]],
            }
        ],
        [{"messages": [SYSTEM, *asked(SKY, BLUE, "Why?", "Light.")]}],
        NO_RANKS,
        [{"prompt": [SYSTEM, *asked(SKY, BLUE, "Why?")]}],
        "alpaca",
    ),
    Sample(
        "Dolly",
        [
            {
                "instruction": SKY,
                "context": "At noon.",
                "response": BLUE,
                "category": "closed_qa",
            }
        ],
        [{"prompt": f"{SKY}\n\nAt noon.", "response": BLUE}],
        NO_RANKS,
        [{"prompt": f"{SKY}\n\nAt noon."}],
        "dolly",
    ),
    Sample(
        "Alpaca, its output called response",
        [{"instruction": "Name the color.", "input": "sky", "response": "blue"}],
        [{"prompt": "Name the color.\n\nsky", "response": "blue"}],
        NO_RANKS,
        [{"prompt": "Name the color.\n\nsky"}],
        "dolly",
    ),
    Sample(
        "GSM8K",
        [{"question": "2 apples and 3 more?", "answer": "2+3=<<2+3=5>>5\n#### 5"}],
        [{"prompt": "2 apples and 3 more?", "response": "2+3=<<2+3=5>>5\n#### 5"}],
        NO_RANKS,
        [{"prompt": "2 apples and 3 more?"}],
        "question-answer",
    ),
    Sample(
        "OpenOrca",
        [
            {
                "id": "niv.242684",
                "system_prompt": "Be brief.",
                "question": SKY,
                "response": BLUE,
            },
            {"id": "flan.1", "system_prompt": "", "question": SKY, "response": BLUE},
        ],
        [{"messages": [SYSTEM, *asked(SKY, BLUE)]}, {"messages": asked(SKY, BLUE)}],
        NO_RANKS,
        [{"prompt": [SYSTEM, *asked(SKY)]}, {"prompt": asked(SKY)}],
        "openorca",
    ),
    Sample(
        "FLAN, Aya",
        [{"inputs": SKY, "targets": BLUE, "task": "color"}],
        [{"prompt": SKY, "response": BLUE}],
        NO_RANKS,
        _ASKED,
        "flan",
    ),
    Sample(
        "OpenRLHF: input and output",
        [{"input": SKY, "output": BLUE}],
        [{"prompt": SKY, "response": BLUE}],
        NO_RANKS,
        _ASKED,
        "input-output",
    ),
    Sample(
        "Self-Instruct: tasks",
        [
            {
                "id": "seed_task_0",
                "name": "color",
                "instruction": "Name the color.",
                "instances": [{"input": "sky", "output": "blue"}, {"input": "", "output": "red"}],
                "is_classification": False,
            }
        ],
        [
            {"prompt": "Name the color.\n\nsky", "response": "blue"},
            {"prompt": "Name the color.", "response": "red"},
        ],
        NO_RANKS,
        [{"prompt": "Name the color.\n\nsky"}, {"prompt": "Name the color."}],
        "self-instruct",
    ),
    Sample(
        "TL;DR, filtered by OpenAI",
        [
            {
                "id": "t3_1hxu8s",
                "subreddit": "AskReddit",
                "title": SKY,
                "post": "I looked up.",
                "summary": "It was blue.",
            }
        ],
        [{"prompt": _tldr("I looked up."), "response": " It was blue."}],
        NO_RANKS,
        [{"prompt": _tldr("I looked up.")}],
        "tldr",
    ),
    Sample(
        "TL;DR, by CarperAI",
        [{"prompt": _tldr("I looked up."), "label": "It was blue."}],
        [{"prompt": _tldr("I looked up."), "response": "It was blue."}],
        NO_RANKS,
        [{"prompt": _tldr("I looked up.")}],
        "prompt-label",
    ),
    Sample(
        "MT-bench, Vicuna: turns",
        [{"question_id": 81, "category": "writing", "turns": [SKY, "Rewrite your answer."]}],
        NO_ANSWER,
        NO_RANKS,
        _ASKED,
        "turns",
    ),
    Sample(
        "HumanEval",
        [
            {
                "task_id": "HumanEval/0",
                "prompt": "def f():\n",
                "entry_point": "f",
                "canonical_solution": "    return 1\n",
                "test": "assert f() == 1",
            }
        ],
        NO_RESPONSE,
        NO_COMPLETIONS,
        [{"prompt": "def f():\n"}],
    ),
    Sample(
        "verl: prompts",
        [
            {
                "data_source": "openai/gsm8k",
                "prompt": asked(SKY),
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "5"},
                "extra_info": {"split": "train", "index": 0, "answer": BLUE, "question": SKY},
            }
        ],
        NO_RESPONSE,
        NO_COMPLETIONS,
        _ASKED_CHAT,
    ),
    Sample(
        "OpenRLHF: prompts",
        [{"dataset": "x", "context": SKY, "context_messages": asked(SKY), "id": "0"}],
        NO_ANSWER,
        NO_RANKS,
        _ASKED_CHAT,
        "context-messages",
    ),
    Sample(
        "text (TRL, C4, FineWeb)",
        [{"text": "The sky is blue.", "url": "https://example.org"}],
        NO_RESPONSE,
        NO_COMPLETIONS,
        NO_PROMPTS,
        "",
        text=[{"text": "The sky is blue."}],
    ),
    Sample(
        "content (The Stack)",
        [{"content": "print(1)", "lang": "Python", "size": 8}],
        NO_RESPONSE,
        NO_COMPLETIONS,
        NO_PROMPTS,
        "",
        text=[{"text": "print(1)"}],
    ),
]

DIALOGUES = [
    Sample(
        "messages (OpenAI, TRL, UltraChat)",
        [{"messages": [SYSTEM, *asked(SKY, BLUE)]}, {"prompt": None, "messages": asked("a", "b")}],
        [{"messages": [SYSTEM, *asked(SKY, BLUE)]}, {"messages": asked("a", "b")}],
        NO_COMPLETIONS.replace("completions", "prompt"),
        [{"messages": [SYSTEM, *asked(SKY)]}, {"messages": asked("a")}],
    ),
    Sample(
        "OpenAI: contents in parts, a developer",
        [
            {
                "messages": [
                    said("developer", "Be brief."),
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What color"},
                            {"type": "text", "text": "is the sky?"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": BLUE}]},
                ],
                "parallel_tool_calls": False,
                "tools": [],
            }
        ],
        [{"messages": [SYSTEM, *asked("What color\nis the sky?", BLUE)]}],
        NO_COMPLETIONS,
        [{"messages": [SYSTEM, *asked("What color\nis the sky?")]}],
    ),
    Sample(
        "OpenAI: images",
        [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": SKY},
                            {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}},
                        ],
                    },
                    said("assistant", BLUE),
                ]
            }
        ],
        "of a content's parts only texts are read",
        NO_COMPLETIONS,
        "of a content's parts only texts are read",
    ),
    Sample(
        "OpenAI: calls of tools",
        [
            {
                "messages": [
                    said("user", SKY),
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "call_1",
                                "type": "function",
                                "function": {"name": "look", "arguments": "{}"},
                            }
                        ],
                    },
                ],
                "tools": [{"type": "function", "function": {"name": "look"}}],
            }
        ],
        'field "tools" describes tools',
        NO_COMPLETIONS,
        'field "tools" describes tools',
    ),
    Sample(
        "ShareGPT",
        [
            {
                "id": "QWJhYvA_0",
                "conversations": [
                    {"from": "human", "value": SKY},
                    {"from": "gpt", "value": BLUE},
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "Light."},
                ],
            },
            {
                "id": "a_0",
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "user", "value": SKY},
                    {"from": "assistant", "value": BLUE},
                ],
            },
        ],
        [
            {"messages": asked(SKY, BLUE, "Why?", "Light.")},
            {"messages": [SYSTEM, *asked(SKY, BLUE)]},
        ],
        NO_RANKS,
        [{"prompt": asked(SKY, BLUE, "Why?")}, {"prompt": [SYSTEM, *asked(SKY)]}],
        "sharegpt",
    ),
    Sample(
        "ShareGPT with a system field (LLaMA-Factory, NeMo)",
        [
            {
                "system": "Be brief.",
                "mask": "User",
                "conversations": [
                    {"from": "User", "value": SKY},
                    {"from": "Assistant", "value": BLUE},
                ],
            }
        ],
        [{"messages": [SYSTEM, *asked(SKY, BLUE)]}],
        NO_RANKS,
        [{"prompt": [SYSTEM, *asked(SKY)]}],
        "sharegpt",
    ),
    Sample(
        "ShareGPT pairs (LLaMA-Factory)",
        [
            {
                "conversations": [{"from": "human", "value": SKY}],
                "chosen": {"from": "gpt", "value": BLUE},
                "rejected": {"from": "gpt", "value": GREEN},
            }
        ],
        NO_ANSWER,
        [ranking(asked(SKY), [BLUE, GREEN], [1, 2])],
        _ASKED_CHAT,
        "sharegpt-pair",
    ),
    Sample(
        "LIMA",
        [{"conversations": [SKY, BLUE], "source": "stackexchange"}],
        [{"messages": asked(SKY, BLUE)}],
        NO_RANKS,
        _ASKED_CHAT,
        "lima",
    ),
    Sample(
        "LMSYS-Chat-1M, WildChat",
        [
            {
                "conversation_id": "33f0",
                "model": "vicuna-33b",
                "conversation": asked(SKY, BLUE),
                "turn": 1,
                "language": "English",
                "redacted": False,
            }
        ],
        [{"messages": asked(SKY, BLUE)}],
        NO_RANKS,
        _ASKED_CHAT,
        "conversation",
    ),
    Sample(
        "Guanaco",
        [{"text": f"### Human: {SKY}### Assistant: {BLUE}### Human: Why?### Assistant: Light."}],
        [{"messages": asked(SKY, BLUE, "Why?", "Light.")}],
        NO_RANKS,
        [{"prompt": asked(SKY, BLUE, "Why?")}],
        "guanaco",
        text=[
            {"text": f"### Human: {SKY}### Assistant: {BLUE}### Human: Why?### Assistant: Light."}
        ],
    ),
    Sample(
        "OpenAssistant: trees",
        [OASST_TREE],
        **_OASST,
        shape="oasst-tree",
        left_out={
            "demonstrations": {"deleted messages": 1},
            "comparisons": {"deleted messages": 1, "prompts with one answer alone": 1},
            "prompts": {"deleted messages": 1},
        },
    ),
    Sample(
        "OpenAssistant: messages",
        OASST_ROWS,
        **_OASST,
        shape="oasst",
        text=[{"text": row["text"]} for row in OASST_ROWS],
        left_out={
            "demonstrations": {"deleted messages": 1},
            "comparisons": {"deleted messages": 1, "prompts with one answer alone": 1},
            "prompts": {"deleted messages": 1},
        },
    ),
]

_HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What color?\n\nAssistant:"

COMPARISONS = [
    Sample(
        "ranks of K completions",
        [{"prompt": SKY, "completions": [GREEN, BLUE, "Blue."], "ranks": [2, 1, 1]}],
        NO_RESPONSE,
        [{"prompt": SKY, "completions": [GREEN, BLUE, "Blue."], "ranks": [2, 1, 1]}],
        _ASKED,
    ),
    Sample(
        "scores of K completions",
        [{"prompt": SKY, "completions": [GREEN, BLUE, "Blue."], "scores": [-0.5, 2.0, 2]}],
        NO_RESPONSE,
        [ranking(SKY, [GREEN, BLUE, "Blue."], [2, 1, 1])],
        _ASKED,
    ),
    Sample(
        "TRL: preference",
        [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}],
        NO_RESPONSE,
        [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}],
        [{"prompt": "The sky is"}],
    ),
    Sample(
        "TRL: preference, implicit prompt",
        [{"chosen": "The sky is blue.", "rejected": "The sky is green."}],
        NO_RESPONSE,
        [{"chosen": "The sky is blue.", "rejected": "The sky is green."}],
        [{"prompt": "The sky is"}],
    ),
    Sample(
        "TRL: preference, conversational",
        [
            {
                "prompt": asked(SKY),
                "chosen": [said("assistant", BLUE)],
                "rejected": [said("assistant", GREEN)],
            }
        ],
        NO_RESPONSE,
        [
            {
                "prompt": asked(SKY),
                "chosen": [said("assistant", BLUE)],
                "rejected": [said("assistant", GREEN)],
            }
        ],
        _ASKED_CHAT,
    ),
    Sample(
        "TRL: preference, conversational, implicit prompt (OpenRLHF, Skywork)",
        [{"chosen": asked(SKY, BLUE), "rejected": asked(SKY, GREEN)}],
        NO_RESPONSE,
        [{"chosen": asked(SKY, BLUE), "rejected": asked(SKY, GREEN)}],
        _ASKED_CHAT,
    ),
    Sample(
        "HH-RLHF",
        [{"chosen": f"{_HH} Blue.", "rejected": f"{_HH} Green."}],
        NO_RESPONSE,
        [{"chosen": f"{_HH} Blue.", "rejected": f"{_HH} Green."}],
        [{"prompt": _HH}],
    ),
    Sample(
        "HH-RLHF, with --data.fields hh",
        [{"chosen": f"{_HH} Blue.", "rejected": f"{_HH} Green."}],
        NO_ANSWER,
        [ranking(asked("Hi", "Hello.", "What color?"), ["Blue.", "Green."], [1, 2])],
        [{"prompt": asked("Hi", "Hello.", "What color?")}],
        "hh",
        fields="hh",
    ),
    Sample(
        "Dahoas: full-hh-rlhf, rm-static",
        [{"prompt": _HH, "response": " Blue.", "chosen": " Blue.", "rejected": " Green."}],
        [{"prompt": _HH, "response": " Blue.", "chosen": " Blue.", "rejected": " Green."}],
        [{"prompt": _HH, "response": " Blue.", "chosen": " Blue.", "rejected": " Green."}],
        [{"prompt": _HH}],
    ),
    Sample(
        "UltraFeedback binarized (HuggingFaceH4)",
        [
            {
                "prompt": SKY,
                "prompt_id": "f0e3",
                "chosen": asked(SKY, BLUE),
                "rejected": asked(SKY, GREEN),
                "messages": asked(SKY, BLUE),
                "score_chosen": 8.5,
                "score_rejected": 4.0,
            }
        ],
        [{"messages": asked(SKY, BLUE)}],
        [
            ranking(
                asked(SKY),
                [[said("assistant", BLUE)], [said("assistant", GREEN)]],
                [1, 2],
            )
        ],
        _ASKED_CHAT,
        "pair-with-prompt",
    ),
    Sample(
        "UltraFeedback binarized (Argilla, cleaned; TRL's hh-rlhf)",
        [
            {
                "source": "evol_instruct",
                "prompt": SKY,
                "chosen": asked(SKY, BLUE),
                "chosen-rating": 5.0,
                "chosen-model": "gpt-4",
                "rejected": asked(SKY, GREEN),
                "rejected-rating": 2.5,
                "rejected-model": "falcon",
            }
        ],
        "there are pairs, and no dialogue to imitate",
        [
            ranking(
                asked(SKY),
                [[said("assistant", BLUE)], [said("assistant", GREEN)]],
                [1, 2],
            )
        ],
        _ASKED_CHAT,
        "pair-with-prompt",
    ),
    Sample(
        "UltraFeedback (Argilla, first)",
        [
            {
                "source": "evol_instruct",
                "instruction": SKY,
                "chosen_response": BLUE,
                "rejected_response": GREEN,
                "chosen_avg_rating": 5.0,
                "rejected_avg_rating": 2.5,
                "chosen_model": "gpt-4",
            }
        ],
        NO_ANSWER,
        _BLUE_OVER_GREEN,
        _ASKED,
        "argilla",
    ),
    Sample(
        "UltraFeedback",
        [
            {
                "source": "evol_instruct",
                "instruction": SKY,
                "models": ["alpaca-7b", "gpt-4", "llama"],
                "completions": [
                    _rated(GREEN, "1", 10),
                    _rated(BLUE, "5", 8.5),
                    _rated("Blue.", "5", 8),
                ],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            },
            {
                "source": "evol_instruct",
                "instruction": SKY,
                "models": ["alpaca-7b", "gpt-4"],
                "completions": [_rated(GREEN, "N/A", 3), _rated(BLUE, "5", 8.5)],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            },
        ],
        NO_ANSWER,
        [
            ranking(SKY, [GREEN, BLUE, "Blue."], [2, 1, 1]),
            ranking(SKY, [GREEN, BLUE], [2, 1]),
        ],
        [{"prompt": SKY}] * 2,
        "ultrafeedback",
    ),
    Sample(
        "HelpSteer 1 and 2",
        [
            _helpsteer(SKY, GREEN, 1),
            _helpsteer(SKY, BLUE, 4),
            _helpsteer("c#", "A language.", 3),
            _helpsteer("c#", "A tone.", 3),
            _helpsteer(
                f"{SKY}\n<extra_id_1>Assistant\n{BLUE}\n<extra_id_1>User\nWhy?\n", "Light.", 4
            ),
        ],
        [
            {"messages": asked(SKY, BLUE)},
            {"messages": asked("c#", "A language.")},
            {"messages": asked("c#", "A tone.")},
            {"messages": asked(SKY, BLUE, "Why?", "Light.")},
        ],
        [ranking(asked(SKY), [GREEN, BLUE], [2, 1])],
        [
            {"prompt": asked(SKY)},
            {"prompt": asked("c#")},
            {"prompt": asked(SKY, BLUE, "Why?")},
        ],
        "helpsteer",
        left_out={
            "demonstrations": {"answers of a helpfulness below 3": 1},
            "comparisons": {"ties": 1, "prompts with one answer alone": 1},
        },
    ),
    Sample(
        "HelpSteer2: preferences",
        [
            {
                "split": "train",
                "prompt": SKY,
                "response_1": GREEN,
                "response_2": BLUE,
                "preference_strength": 2,
                "preference_statement": "Response 2 is right.",
                "preference_elaboration": "...",
                "three_most_similar_preferences": [],
                "all_preferences_unprocessed": [],
            },
            {
                "split": "train",
                "prompt": "c#",
                "response_1": "A language.",
                "response_2": "A tone.",
                "preference_strength": 0,
            },
        ],
        NO_ANSWER,
        [ranking(asked(SKY), [GREEN, BLUE], [2, 1])],
        [{"prompt": asked(SKY)}, {"prompt": asked("c#")}],
        "helpsteer2-preference",
        left_out={"comparisons": {"ties": 1}},
    ),
    Sample(
        "HelpSteer3: preferences",
        [
            {
                "domain": "general",
                "language": "english",
                "context": asked(SKY),
                "response1": BLUE,
                "response2": GREEN,
                "overall_preference": -3,
                "individual_preference": [{"score": -3, "reasoning": "..."}],
            }
        ],
        NO_ANSWER,
        [ranking(asked(SKY), [BLUE, GREEN], [1, 2])],
        _ASKED_CHAT,
        "helpsteer3",
    ),
    Sample(
        "NeMo-RL: preferences",
        [
            {
                "context": asked(SKY),
                "completions": [
                    {"rank": 1, "completion": [said("assistant", GREEN)]},
                    {"rank": 0, "completion": [said("assistant", BLUE)]},
                ],
            }
        ],
        NO_ANSWER,
        [
            ranking(
                asked(SKY),
                [[said("assistant", GREEN)], [said("assistant", BLUE)]],
                [2, 1],
            )
        ],
        _ASKED_CHAT,
        "nemo",
    ),
    Sample(
        "OpenAI: preference fine-tuning",
        [
            {
                "input": {"messages": asked(SKY), "tools": [], "parallel_tool_calls": True},
                "preferred_output": [said("assistant", BLUE)],
                "non_preferred_output": [said("assistant", GREEN)],
            }
        ],
        NO_ANSWER,
        [
            ranking(
                asked(SKY),
                [[said("assistant", BLUE)], [said("assistant", GREEN)]],
                [1, 2],
            )
        ],
        _ASKED_CHAT,
        "openai-preference",
    ),
    Sample(
        "WebGPT comparisons",
        [_webgpt(0.5), _webgpt(0.0)],
        NO_ANSWER,
        _BLUE_OVER_GREEN,
        _ASKED * 2,
        "webgpt",
        left_out={"comparisons": {"ties": 1}},
    ),
    Sample(
        "summarize-from-feedback: comparisons of posts",
        [
            {
                "info": {
                    "id": "t3_34xale",
                    "post": "I looked up.",
                    "title": SKY,
                    "subreddit": "AskReddit",
                    "site": None,
                    "article": None,
                },
                "summaries": [
                    {"text": " It was green.", "policy": "sup1", "note": "Wrong."},
                    {"text": " It was blue.", "policy": "ref", "note": "Right."},
                ],
                "choice": 1,
                "worker": "ikNmucwunMnYJCQpnq6ZYb57OW7NiD",
                "batch": "batch9",
                "split": "train",
                "extra": {"confidence": 8},
            }
        ],
        NO_ANSWER,
        [ranking(_tldr("I looked up."), [" It was green.", " It was blue."], [2, 1])],
        [{"prompt": _tldr("I looked up.")}],
        "summaries",
    ),
    Sample(
        "summarize-from-feedback: comparisons of articles",
        [
            {
                "info": {
                    "id": "f37f",
                    "post": None,
                    "title": "Sky news",
                    "subreddit": None,
                    "site": "cnn",
                    "article": "The sky was blue today.",
                },
                "summaries": [{"text": " Blue.", "policy": "a"}, {"text": " Sky.", "policy": "b"}],
                "choice": 0,
                "worker": "w",
                "batch": "cnndm0",
                "split": "valid2",
                "extra": {"confidence": None},
            }
        ],
        NO_ANSWER,
        [ranking("Article:\n\nThe sky was blue today.\n\nTL;DR:", [" Blue.", " Sky."], [1, 2])],
        [{"prompt": "Article:\n\nThe sky was blue today.\n\nTL;DR:"}],
        "summaries",
    ),
    Sample(
        "SHP",
        [
            {
                "post_id": "himc90",
                "domain": "askacademia_train",
                "upvote_ratio": 0.99,
                "history": SKY,
                "c_root_id_A": "fwhnqao",
                "c_root_id_B": "fwhoiht",
                "score_A": 52,
                "score_B": 54,
                "human_ref_A": GREEN,
                "human_ref_B": BLUE,
                "labels": 0,
                "seconds_difference": 907.0,
                "score_ratio": 1.04,
            }
        ],
        NO_ANSWER,
        [ranking(SKY, [GREEN, BLUE], [2, 1])],
        _ASKED,
        "shp",
    ),
    Sample(
        "Nectar",
        [
            {
                "prompt": f"\n\nHuman: {SKY}\n\nAssistant: ",
                "answers": [
                    {"answer": text, "model": f"m{rank}", "rank": float(rank)}
                    for rank, text in enumerate("ABCDEFG", 1)
                ],
                "turns": 1,
                "num_responses": 7,
                "source": ["lmsys-chat-1m"],
                "good_natured": True,
            }
        ],
        NO_ANSWER,
        [ranking(asked(SKY), list("ABCDEFG"), [1, 2, 3, 4, 5, 6, 7])],
        _ASKED_CHAT,
        "nectar",
    ),
    Sample(
        "PKU-SafeRLHF",
        [
            {
                "prompt": SKY,
                "response_0": GREEN,
                "response_1": BLUE,
                "is_response_0_safe": True,
                "is_response_1_safe": True,
                "better_response_id": 1,
                "safer_response_id": 0,
            }
        ],
        NO_ANSWER,
        [ranking(SKY, [GREEN, BLUE], [2, 1])],
        _ASKED,
        "pku-saferlhf",
    ),
    Sample(
        "Chatbot Arena, MT-bench's judgments",
        [
            _arena("model_b", asked(SKY, GREEN), asked(SKY, BLUE)),
            _arena("tie (bothbad)", asked(SKY, GREEN), asked(SKY, BLUE)),
            _arena("model_a", asked(SKY, BLUE, "Why?", "L."), asked(SKY, GREEN, "Why?", "M.")),
        ],
        NO_ANSWER,
        [
            ranking(
                asked(SKY),
                [[said("assistant", GREEN)], [said("assistant", BLUE)]],
                [2, 1],
            )
        ],
        [{"prompt": asked(SKY)}] * 3,
        "arena",
        left_out={"comparisons": {"ties": 1, "dialogues that differ before their last answer": 1}},
    ),
    Sample(
        "Chatbot Arena, Kaggle's",
        [
            {
                "id": 30192,
                "model_a": "gpt-4-1106-preview",
                "model_b": "gpt-4-0613",
                "prompt": f'["{SKY}"]',
                "response_a": f'["{BLUE}"]',
                "response_b": f'["{GREEN}"]',
                "winner_model_a": 1,
                "winner_model_b": 0,
                "winner_tie": 0,
            }
        ],
        NO_ANSWER,
        [ranking(asked(SKY), [BLUE, GREEN], [1, 2])],
        _ASKED_CHAT,
        "arena-kaggle",
    ),
    Sample(
        "LLMBar",
        [{"input": SKY, "output_1": GREEN, "output_2": BLUE, "label": 2}],
        NO_ANSWER,
        [ranking(SKY, [GREEN, BLUE], [2, 1])],
        _ASKED,
        "llmbar",
    ),
    Sample(
        "PandaLM",
        [
            {
                "idx": 0,
                "motivation_app": "Grammarly",
                "cmp_key": "bloom-7b_llama-7b",
                "instruction": "Name the color.",
                "input": "sky",
                "response1": "Green.",
                "response2": "Blue.",
                "annotator1": 2,
                "annotator2": 2,
                "annotator3": 1,
            },
            {
                "idx": 1,
                "motivation_app": "Grammarly",
                "cmp_key": "bloom-7b_llama-7b",
                "instruction": "Name the color.",
                "input": "",
                "response1": "Green.",
                "response2": "Blue.",
                "annotator1": 2,
                "annotator2": 0,
                "annotator3": 1,
            },
        ],
        NO_ANSWER,
        [ranking("Name the color.\n\nsky", ["Green.", "Blue."], [2, 1])],
        [{"prompt": "Name the color.\n\nsky"}, {"prompt": "Name the color."}],
        "pandalm",
        left_out={"comparisons": {"ties": 1}},
    ),
    Sample(
        "TruthfulQA: choices",
        [
            {
                "question": SKY,
                "mc1_targets": {BLUE: 1, GREEN: 0, "It is red.": 0},
                "mc2_targets": {BLUE: 1, GREEN: 0, "It is red.": 0},
            },
            {
                "question": SKY,
                "mc1_targets": {"choices": [BLUE, GREEN], "labels": [1, 0]},
                "mc2_targets": {"choices": [BLUE, GREEN], "labels": [1, 0]},
            },
        ],
        NO_ANSWER,
        [
            ranking(SKY, [BLUE, GREEN, "It is red."], [1, 2, 2]),
            ranking(SKY, [BLUE, GREEN], [1, 2]),
        ],
        _ASKED * 2,
        "truthfulqa-choices",
    ),
    Sample(
        "TruthfulQA.csv",
        [
            {
                "Type": "Adversarial",
                "Category": "Misconceptions",
                "Question": SKY,
                "Best Answer": BLUE,
                "Correct Answers": f"{BLUE}; Blue.",
                "Incorrect Answers": f"{GREEN}; ",
                "Source": "https://example.org",
            }
        ],
        [{"prompt": SKY, "response": BLUE}],
        [ranking(SKY, [BLUE, "Blue.", GREEN], [1, 1, 2])],
        _ASKED,
        "truthfulqa",
    ),
    Sample(
        "orca_dpo_pairs",
        [{"system": "Be brief.", "question": SKY, "chosen": BLUE, "rejected": GREEN}],
        NO_ANSWER,
        [ranking([SYSTEM, *asked(SKY)], [BLUE, GREEN], [1, 2])],
        [{"prompt": [SYSTEM, *asked(SKY)]}],
        "orca-pair",
    ),
    Sample(
        "orca_dpo_pairs, distilled (Argilla)",
        [
            {
                "system": "Be brief.",
                "input": SKY,
                "chosen": BLUE,
                "rejected": GREEN,
                "generations": [BLUE, GREEN],
                "order": ["a", "b"],
                "status": "unchanged",
                "chosen_score": 9.0,
            }
        ],
        NO_ANSWER,
        [ranking([SYSTEM, *asked(SKY)], [BLUE, GREEN], [1, 2])],
        [{"prompt": [SYSTEM, *asked(SKY)]}],
        "input-pair",
    ),
    Sample(
        "Alpaca pairs (LLaMA-Factory)",
        [{"instruction": SKY, "input": "", "chosen": BLUE, "rejected": GREEN}],
        NO_ANSWER,
        _BLUE_OVER_GREEN,
        _ASKED,
        "alpaca-pair",
    ),
    Sample(
        "Stack Exchange, paired",
        [
            {
                "qid": 1,
                "question": SKY,
                "date": "2015/02/16",
                "metadata": ["https://math.stackexchange.com/q/1"],
                "response_j": BLUE,
                "response_k": GREEN,
            }
        ],
        NO_ANSWER,
        _BLUE_OVER_GREEN,
        _ASKED,
        "stack-exchange-pair",
    ),
]

SAMPLES = [*ANSWERS, *DIALOGUES, *COMPARISONS]
