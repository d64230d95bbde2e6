"""The shapes of rows that are read: whose data sets have them, and which is a row's.

A shape is recognised by its fields. Where several fit, the one that knows all that another knows of
the row, and more, is meant; a row of two shapes neither of which does so is ambiguous.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from engine.shapes import answer_shapes, dialogue_shapes, ranking_shapes, tree_shapes
from engine.shapes.canonical import LeftOut, Purpose, Read, Row, one
from engine.shapes.plain_rows import claimed_by_plain, plain

PLAIN = "plain"
"""The shape of rows in our own fields."""

Gathering = Callable[[Sequence[tuple[str, Row]]], list[tuple[str, Row | LeftOut]]]


class DataShape(NamedTuple):
    """Rows that a public data set has."""

    title: str
    """Whose rows they are."""
    keys: str
    """Fields that a row of it has, with ", " between."""
    read: Read
    has: Mapping[Purpose, str]
    """What it gives for a purpose, in a few words. Any other it has nothing for."""
    also: str = ""
    """Fields that it may have besides."""
    fits: Callable[[Row], bool] = lambda row: True
    """Whether the values of these fields are of its kind."""
    gather: Gathering | None = None
    """What joins the rows of a whole file, where one row is not enough."""

    def claimed(self, row: Row) -> set[str]:
        """Return the fields of a row that the shape knows, none where it is another's."""
        keys = set(_names(self.keys))
        if not keys or not keys <= row.keys() or not self.fits(row):
            return set()
        return keys | (set(_names(self.also)) & row.keys())


def _names(keys: str) -> list[str]:
    return keys.split(", ") if keys else []


def recognised(row: Row) -> list[str]:
    """Return the names of the shapes that a row may be of: one, none, or several that are left."""
    claims = {name: claim for name, shape in SHAPES.items() if (claim := shape.claimed(row))}
    ours = claimed_by_plain(row)
    if claims:
        ours.discard("messages")  # which some sets have beside their pairs
    if ours and not any(ours <= claim for claim in claims.values()):
        claims[PLAIN] = ours
    return [
        name
        for name, claim in claims.items()
        if not any(claim < other for other in claims.values())
    ]


def nearly(row: Row) -> list[str]:
    """Return the names of the shapes that share most of their fields with a row, the nearest
    first; those alone that it has half of."""
    shares = {}
    for name, shape in SHAPES.items():
        keys = _names(shape.keys)
        share = sum(key in row for key in keys) / len(keys) if keys else 0.0
        if share >= 0.5:  # our choice
            shares[name] = share
    return sorted(shares, key=lambda name: -shares[name])[:3]


def _is_text(*keys: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row[key], str) for key in keys)


def _holds(key: str, kind: type, *inner: str) -> Callable[[Row], bool]:
    """Return whether a field is a list of so many of a kind, objects with these fields."""

    def fits(row: Row) -> bool:
        value = row[key]
        first = value[0] if isinstance(value, list) and value else None
        return isinstance(first, kind) and all(name in first for name in inner)  # type: ignore[operator]

    return fits


def _has(key: str, inner: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row[key], dict) and inner in row[key]


_A, _D, _R, _T = answer_shapes, dialogue_shapes, ranking_shapes, tree_shapes
_ANSWER: Mapping[Purpose, str] = {"demonstrations": "yes", "prompts": "yes"}
_DIALOGUE: Mapping[Purpose, str] = {
    "demonstrations": "yes",
    "prompts": "the dialogue before the last answer",
}
_PAIR: Mapping[Purpose, str] = {"comparisons": "pairs", "prompts": "yes"}
_TIES: Mapping[Purpose, str] = {"comparisons": "pairs; ties left out", "prompts": "yes"}
_RATED: Mapping[Purpose, str] = {"comparisons": "all answers of a prompt", "prompts": "yes"}
_PROMPT: Mapping[Purpose, str] = {"prompts": "yes"}

SHAPES: Mapping[str, DataShape] = {
    PLAIN: DataShape(
        "our own fields, and TRL's",
        "",
        plain,
        {
            "demonstrations": "`response`, or the last of `messages`",
            "comparisons": "`ranks`, `scores`, or `chosen` and `rejected`",
            "prompts": "`prompt`, or what is asked in `messages` or a pair",
        },
    ),
    "alpaca": DataShape(
        "Alpaca",
        "instruction, output",
        one(_A.alpaca),
        _ANSWER,
        also="input, context, system, history",
    ),
    "alpaca-pair": DataShape(
        "LLaMA-Factory's pairs",
        "instruction, chosen, rejected",
        one(_D.alpaca_pair),
        _PAIR,
        also="input, context, system, history",
    ),
    "dolly": DataShape(
        "Dolly",
        "instruction, response",
        one(_A.dolly),
        _ANSWER,
        also="context, input, system, history",
    ),
    "self-instruct": DataShape(
        "Self-Instruct's tasks",
        "instruction, instances",
        _A.self_instruct,
        {"demonstrations": "one an instance", "prompts": "one an instance"},
    ),
    "question-answer": DataShape(
        "GSM8K, and other questions with an answer",
        "question, answer",
        one(_A.question_answer),
        _ANSWER,
        fits=_is_text("question", "answer"),
    ),
    "openorca": DataShape(
        "OpenOrca", "question, response", one(_A.openorca), _ANSWER, also="system_prompt"
    ),
    "flan": DataShape("FLAN, Aya", "inputs, targets", one(_A.flan), _ANSWER),
    "input-output": DataShape(
        "OpenRLHF's SFT rows",
        "input, output",
        one(_A.input_output),
        _ANSWER,
        fits=_is_text("input"),
    ),
    "completion": DataShape(
        "TRL's prompt-completion and unpaired preference, OpenAI's legacy fine-tuning",
        "prompt, completion",
        one(_A.prompt_completion),
        {"demonstrations": "yes; `label` false is left out", "prompts": "yes"},
        also="label",
    ),
    "stepwise": DataShape(
        "TRL's stepwise supervision", "prompt, completions, labels", one(_A.stepwise), _PROMPT
    ),
    "tldr": DataShape(
        "TL;DR, filtered by OpenAI", "subreddit, title, post, summary", one(_A.tldr), _ANSWER
    ),
    "prompt-label": DataShape(
        "TL;DR, by CarperAI",
        "prompt, label",
        one(_A.prompt_label),
        _ANSWER,
        fits=_is_text("prompt", "label"),
    ),
    "turns": DataShape(
        "MT-bench, Vicuna's questions",
        "turns",
        one(_A.turns),
        {"prompts": "the first turn"},
        fits=_holds("turns", str),
    ),
    "helpsteer": DataShape(
        "HelpSteer 1 and 2",
        "prompt, response, helpfulness",
        _A.helpsteer,
        {
            "demonstrations": f"those of a helpfulness of at least {_A.HELPFUL:g}",
            "comparisons": "all answers of a prompt, by helpfulness; ties left out",
            "prompts": "each once",
        },
        gather=_A.together,
    ),
    "truthfulqa": DataShape(
        "TruthfulQA.csv",
        "Question, Best Answer, Correct Answers, Incorrect Answers",
        _A.truthfulqa,
        {
            "demonstrations": "the best answer",
            "comparisons": "right answers before wrong ones",
            "prompts": "yes",
        },
    ),
    "sharegpt": DataShape(
        "ShareGPT",
        "conversations",
        one(_D.sharegpt),
        _DIALOGUE,
        also="system",
        fits=_holds("conversations", dict),
    ),
    "sharegpt-pair": DataShape(
        "LLaMA-Factory's pairs of dialogues",
        "conversations, chosen, rejected",
        one(_D.sharegpt_pair),
        _PAIR,
        also="system",
    ),
    "lima": DataShape(
        "LIMA", "conversations", one(_D.lima), _DIALOGUE, fits=_holds("conversations", str)
    ),
    "conversation": DataShape(
        "LMSYS-Chat-1M, WildChat",
        "conversation",
        one(_D.conversation),
        _DIALOGUE,
        fits=_holds("conversation", dict, "role"),
    ),
    "guanaco": DataShape(
        "Guanaco: `### Human:`, `### Assistant:`",
        "text",
        one(_D.guanaco),
        _DIALOGUE,
        fits=lambda row: str(row["text"]).lstrip().startswith("### Human:"),
    ),
    "context-messages": DataShape(
        "OpenRLHF's prompts", "context_messages", one(_D.context_messages), _PROMPT
    ),
    "pair-with-prompt": DataShape(
        "UltraFeedback binarized: `prompt` beside whole dialogues",
        "prompt, chosen, rejected",
        one(_D.pair_with_prompt),
        {
            "demonstrations": "`messages`, where there is one",
            "comparisons": "pairs",
            "prompts": "the dialogue before the last answer",
        },
        fits=lambda row: isinstance(row["chosen"], list) and len(row["chosen"]) > 1,
    ),
    "openai-preference": DataShape(
        "OpenAI's preference fine-tuning",
        "input, preferred_output, non_preferred_output",
        one(_D.openai_preference),
        _PAIR,
        fits=_has("input", "messages"),
    ),
    "nemo": DataShape(
        "NeMo-RL",
        "context, completions",
        one(_D.nemo),
        _RATED,
        fits=_holds("completions", dict, "rank", "completion"),
    ),
    "webgpt": DataShape(
        "WebGPT comparisons",
        "question, answer_0, answer_1, score_0, score_1",
        one(_R.webgpt),
        _TIES,
        fits=_has("question", "full_text"),
    ),
    "summaries": DataShape(
        "summarize-from-feedback", "info, summaries, choice", one(_R.summaries), _PAIR
    ),
    "shp": DataShape("SHP", "history, human_ref_A, human_ref_B, labels", one(_R.shp), _PAIR),
    "ultrafeedback": DataShape(
        "UltraFeedback",
        "instruction, completions",
        one(_R.ultrafeedback),
        {"comparisons": "all answers of a prompt, by their mean rating", "prompts": "yes"},
        fits=_holds("completions", dict, "response"),
    ),
    "argilla": DataShape(
        "Argilla's UltraFeedback",
        "instruction, chosen_response, rejected_response",
        one(_R.argilla),
        _PAIR,
    ),
    "orca-pair": DataShape(
        "orca_dpo_pairs", "question, chosen, rejected", one(_R.orca_pair), _PAIR, also="system"
    ),
    "input-pair": DataShape(
        "orca_dpo_pairs, distilled by Argilla",
        "input, chosen, rejected",
        one(_R.orca_pair),
        _PAIR,
        also="system",
    ),
    "helpsteer2-preference": DataShape(
        "HelpSteer2's preferences",
        "prompt, response_1, response_2, preference_strength",
        one(_R.helpsteer2_preference),
        _TIES,
    ),
    "helpsteer3": DataShape(
        "HelpSteer3's preferences",
        "context, response1, response2, overall_preference",
        one(_R.helpsteer3),
        _TIES,
    ),
    "nectar": DataShape(
        "Nectar",
        "prompt, answers",
        one(_R.nectar),
        {"comparisons": "seven answers by rank", "prompts": "yes"},
        fits=_holds("answers", dict, "answer", "rank"),
    ),
    "pku-saferlhf": DataShape(
        "PKU-SafeRLHF",
        "prompt, response_0, response_1, better_response_id",
        one(_R.pku_saferlhf),
        {"comparisons": "pairs, by helpfulness", "prompts": "yes"},
    ),
    "arena": DataShape(
        "Chatbot Arena, MT-bench's judgments",
        "conversation_a, conversation_b, winner",
        _R.arena,
        {
            "comparisons": "pairs that differ in the last answer; ties left out",
            "prompts": "the first turn",
        },
    ),
    "arena-kaggle": DataShape(
        "Chatbot Arena, Kaggle's",
        "prompt, response_a, response_b, winner_model_a, winner_model_b",
        _R.arena_kaggle,
        {"comparisons": "pairs of one turn; ties left out", "prompts": "the first turn"},
    ),
    "llmbar": DataShape("LLMBar", "input, output_1, output_2, label", one(_R.llmbar), _PAIR),
    "pandalm": DataShape(
        "PandaLM",
        "instruction, response1, response2, annotator1",
        one(_R.pandalm),
        {"comparisons": "pairs, as most annotators say; ties left out", "prompts": "yes"},
        also="input",
    ),
    "truthfulqa-choices": DataShape(
        "TruthfulQA's choices", "question, mc1_targets", one(_R.truthfulqa_choices), _RATED
    ),
    "stack-exchange-pair": DataShape(
        "Stack Exchange, paired",
        "question, response_j, response_k",
        one(_R.stack_exchange_pair),
        _PAIR,
    ),
    "oasst-tree": DataShape(
        "OpenAssistant, trees",
        "message_tree_id, prompt",
        _T.oasst_tree,
        {
            "demonstrations": "the best-ranked dialogue of a tree",
            "comparisons": "all ranked answers to a prompt",
            "prompts": "each in its dialogue",
        },
        fits=lambda row: isinstance(row["prompt"], dict),
    ),
    "oasst": DataShape(
        "OpenAssistant, messages",
        "message_id, role, text",
        _T.oasst_tree,
        {
            "demonstrations": "the best-ranked dialogue of a tree",
            "comparisons": "all ranked answers to a prompt",
            "prompts": "each in its dialogue",
        },
        also="parent_id, message_tree_id, rank",
        gather=_T.oasst_trees,
    ),
    "hh": DataShape(
        "HH-RLHF as messages, where it is asked for by name",
        "",
        one(_D.hh),
        {"comparisons": "pairs", "prompts": "the dialogue before the last answer"},
    ),
}
