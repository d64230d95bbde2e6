"""Rows of answers that are compared, as public data sets have them.

Each function returns the exchange of one: a prompt, its completions, and their scores (higher is
better) or ranks (lower is).
"""

import json
import re
from collections import Counter
from typing import Any

from engine.containers.row import BadRecord, check_text, json_type
from engine.shapes.answer_shapes import helpsteer_prompt, tldr_prompt
from engine.shapes.canonical import (
    LeftOut,
    Purpose,
    Row,
    answer_in,
    choice_in,
    list_in,
    message,
    messages_in,
    number_in,
    objects_in,
    of_exchange,
    opened,
    pair,
    paragraphs,
    text_in,
)
from engine.shapes.dialogue_shapes import hh_turns

_TARGETS = ("choices", "labels")
_ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def webgpt(row: Row) -> Row:
    """Return the exchange of {"question": {"full_text"}, "answer_0", "score_0", "answer_1",
    "score_1"}; equal scores are a tie."""
    answers = [answer_in(row, f"answer_{side}") for side in (0, 1)]
    scores = [number_in(row, f"score_{side}") for side in (0, 1)]
    prompt = text_in(row["question"], "full_text", within="question.")
    return {"prompt": prompt, "completions": answers, "scores": scores}


def summaries(row: Row) -> Row:
    """Return the exchange of {"info", "summaries": [{"text"}, {"text"}], "choice"}: OpenAI's
    comparisons of summaries, of posts or of articles."""
    choice = choice_in(row, "choice", {0: -1, 1: 1})
    texts = [
        answer_in(each, "text", within=f"summaries[{index}].")
        for index, each in enumerate(objects_in(row, "summaries"))
    ]
    if len(texts) != 2:
        raise BadRecord(f"must hold 2, not {len(texts)}", field="summaries")
    return pair(summary_prompt(row), texts[0], texts[1], choice)


def summary_prompt(row: Row) -> str:
    """Return what `info` asks to be summarised: a post of Reddit, or an article."""
    info = row["info"]
    if "article" in info and "post" not in info:
        article = text_in(info, "article", within="info.")
        return f"Article:\n\n{article}\n\nTL;DR:"
    return tldr_prompt(info, within="info.")


def shp(row: Row) -> Row:
    """Return the exchange of {"history", "human_ref_A", "human_ref_B", "labels"}; labelled 1, A is
    the better one."""
    better = choice_in(row, "labels", {1: -1, 0: 1})
    answers = [answer_in(row, f"human_ref_{side}") for side in "AB"]
    return pair(text_in(row, "history"), answers[0], answers[1], better)


def ultrafeedback(row: Row) -> Row:
    """Return the exchange of {"instruction", "completions": [{"response", "annotations",
    "overall_score"}]}.

    The score is the mean rating of the four aspects, and overall_score where some answer lacks one:
    that number is known to be wrong in places (Argilla's "ultrafeedback-binarized-preferences").
    """
    answers = objects_in(row, "completions")
    ratings = [_mean_rating(each) for each in answers]
    scores = [rating for rating in ratings if rating is not None]
    if len(scores) < len(answers):
        scores = [
            number_in(each, "overall_score", within=f"completions[{index}].")
            for index, each in enumerate(answers)
        ]
    texts = [
        answer_in(each, "response", within=f"completions[{index}].")
        for index, each in enumerate(answers)
    ]
    return {"prompt": text_in(row, "instruction"), "completions": texts, "scores": scores}


def _mean_rating(answer: Row) -> float | None:
    """Return the mean of an answer's ratings, None where one is missing or no number ("N/A")."""
    annotations = answer.get("annotations")
    found = []
    for aspect in _ASPECTS:
        value = annotations.get(aspect) if isinstance(annotations, dict) else None
        rating = value.get("Rating") if isinstance(value, dict) else None
        if not isinstance(rating, str | int | float) or not re.fullmatch(
            r"\d(\.\d+)?", f"{rating}"
        ):
            return None
        found.append(float(rating))
    return sum(found) / len(found)


def argilla(row: Row) -> Row:
    """Return the exchange of {"instruction", "chosen_response", "rejected_response"}."""
    answers = [answer_in(row, f"{side}_response") for side in ("chosen", "rejected")]
    return {"prompt": text_in(row, "instruction"), "completions": answers, "ranks": [1, 2]}


def orca_pair(row: Row) -> Row:
    """Return the exchange of {"system", "question", "chosen", "rejected"}: orca_dpo_pairs, whose
    copies call the question `input`."""
    system = row.get("system")
    dialogue = [message("user", text_in(row, "question" if "question" in row else "input"))]
    if isinstance(system, str) and system.strip():
        dialogue.insert(0, message("system", system))
    answers = [answer_in(row, side) for side in ("chosen", "rejected")]
    return {"prompt": dialogue, "completions": answers, "ranks": [1, 2]}


def helpsteer2_preference(row: Row) -> Row:
    """Return the exchange of {"prompt", "response_1", "response_2", "preference_strength"}; below 0
    the first is better, 0 is a tie."""
    answers = [answer_in(row, f"response_{side}") for side in (1, 2)]
    strength = number_in(row, "preference_strength")
    return pair(helpsteer_prompt(row), answers[0], answers[1], strength)


def helpsteer3(row: Row) -> Row:
    """Return the exchange of {"context", "response1", "response2", "overall_preference"}; below 0
    the first is better, 0 is a tie."""
    answers = [answer_in(row, f"response{side}") for side in (1, 2)]
    preference = number_in(row, "overall_preference")
    return pair(messages_in(row["context"], "context"), answers[0], answers[1], preference)


def nectar(row: Row) -> Row:
    """Return the exchange of {"prompt", "answers": [{"answer", "rank"}]}; its prompt is a text of
    turns, and becomes messages."""
    answers = objects_in(row, "answers")
    return {
        "prompt": hh_turns(text_in(row, "prompt"), "prompt"),
        "completions": [
            answer_in(each, "answer", within=f"answers[{index}].").strip()
            for index, each in enumerate(answers)
        ],
        "ranks": [
            number_in(each, "rank", within=f"answers[{index}].")
            for index, each in enumerate(answers)
        ],
    }


def pku_saferlhf(row: Row) -> Row:
    """Return the exchange of {"prompt", "response_0", "response_1", "better_response_id"}: the more
    helpful one wins; which is safer stands in another field."""
    better = choice_in(row, "better_response_id", {0: -1, 1: 1})
    answers = [answer_in(row, f"response_{side}") for side in (0, 1)]
    return pair(text_in(row, "prompt"), answers[0], answers[1], better)


def arena(row: Row, purpose: Purpose) -> list[Row | LeftOut]:
    """Return what {"conversation_a", "conversation_b", "winner"} gives.

    The two are compared where they differ in the last answer alone: later on each model has been
    asked by its own answers.
    """
    sides = [messages_in(list_in(row, f"conversation_{side}"), side) for side in "ab"]
    if purpose == "prompts":
        return [{"prompt": sides[0][:1]}]
    if sides[0][:-1] != sides[1][:-1]:
        return [LeftOut("dialogues that differ before their last answer")]
    ties = {"tie": 0, "tie (bothbad)": 0, "both_bad": 0}
    winner = choice_in(row, "winner", {"model_a": -1, "model_b": 1, **ties})
    found = pair(opened(sides[0]), [sides[0][-1]], [sides[1][-1]], winner)
    return [of_exchange(found, purpose)]


def arena_kaggle(row: Row, purpose: Purpose) -> list[Row | LeftOut]:
    """Return what {"prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"} gives,
    whose texts are lists of turns in JSON; of several turns as arena()."""
    prompts, *answers = (_turns(row, key) for key in ("prompt", "response_a", "response_b"))
    prompt = [message("user", prompts[0])]
    if purpose == "prompts":
        return [{"prompt": prompt}]
    if len(prompts) > 1:
        return [LeftOut("dialogues that differ before their last answer")]
    preference = number_in(row, "winner_model_b") - number_in(row, "winner_model_a")
    return [of_exchange(pair(prompt, answers[0][0], answers[1][0], preference), purpose)]


def _turns(row: Row, key: str) -> list[str]:
    try:
        found = json.loads(text_in(row, key))
    except (ValueError, RecursionError):
        raise BadRecord("must be a list of texts in JSON", field=key) from None
    if not isinstance(found, list) or not found:
        raise BadRecord(f"must be a list of texts in JSON, not {json_type(found)}", field=key)
    return [check_text(text, f"{key}[{index}]") for index, text in enumerate(found)]


def llmbar(row: Row) -> Row:
    """Return the exchange of {"input", "output_1", "output_2", "label"}."""
    better = choice_in(row, "label", {1: -1, 2: 1})
    answers = [answer_in(row, f"output_{side}") for side in (1, 2)]
    return pair(text_in(row, "input"), answers[0], answers[1], better)


def pandalm(row: Row) -> Row:
    """Return the exchange of {"instruction", "input", "response1", "response2", "annotator1", ...};
    the most of the annotators decide, and a tie is theirs or where there is no most."""
    votes = [choice_in(row, key, {0: 0, 1: -1, 2: 1}) for key in row if key.startswith("annotator")]
    (most, count), *others = Counter(votes).most_common()
    preference = 0 if others and others[0][1] == count else most
    answers = [answer_in(row, f"response{side}") for side in (1, 2)]
    return pair(paragraphs(row, "instruction", "input"), answers[0], answers[1], preference)


def truthfulqa_choices(row: Row) -> Row:
    """Return the exchange of {"question", "mc1_targets"}: {ANSWER: 1 or 0}, or {"choices",
    "labels"} as on Hugging Face's hub."""
    targets: Any = row["mc1_targets"]
    if isinstance(targets, dict) and "choices" not in targets:
        targets = {"choices": list(targets), "labels": list(targets.values())}
    if not isinstance(targets, dict):
        raise BadRecord(f"must be an object, not {json_type(targets)}", field="mc1_targets")
    choices, labels = (list_in(targets, key, within="mc1_targets.") for key in _TARGETS)
    if len(choices) != len(labels):
        problem = f"has {len(labels)} labels for {len(choices)} choices"
        raise BadRecord(problem, field="mc1_targets")
    return {
        "prompt": text_in(row, "question"),
        "completions": [check_text(each, "mc1_targets") for each in choices],
        "scores": [number_in({"label": each}, "label", within="mc1_targets.") for each in labels],
    }


def stack_exchange_pair(row: Row) -> Row:
    """Return the exchange of {"question", "response_j", "response_k"}; j is the better one."""
    answers = [answer_in(row, f"response_{side}") for side in "jk"]
    return {"prompt": text_in(row, "question"), "completions": answers, "ranks": [1, 2]}
