"""Rows of one answer to a prompt, or of prompts alone, as public data sets have them.

Each function turns a row into its exchange (engine/shapes/canonical.py), and says which fields it
reads. An empty line joins what a data set keeps apart of one prompt.
"""

from collections.abc import Sequence
from typing import Any

from engine.containers.row import BadRecord, check_text, json_type, required
from engine.errors import quoted
from engine.shapes.canonical import (
    UNFIT,
    LeftOut,
    Purpose,
    Row,
    answer_in,
    is_true,
    list_in,
    message,
    messages_in,
    number_in,
    objects_in,
    of_exchange,
    paragraphs,
    ranked,
    text_in,
)

HELPFUL = 3.0
"""Least helpfulness, of 0 to 4, of an answer of HelpSteer that is imitated; our choice."""


def alpaca(row: Row) -> Row:
    """Return the exchange of

    {"instruction", "input", "output"}, and perhaps "system" and "history" (LLaMA-Factory).
    """
    return {"prompt": instructed(row), "response": answer_in(row, "output")}


def instructed(row: Row) -> Any:
    """Return what an instruction asks, with its `input` or `context`; a dialogue where there are
    `system` or `history`."""
    if row.get("input") and row.get("context"):
        raise BadRecord("stands beside input: which is first is not known", field="context")
    prompt = paragraphs(row, "instruction", "input", "context")
    return alpaca_dialogue(row, prompt) if "system" in row or row.get("history") else prompt


def alpaca_dialogue(row: Row, prompt: str) -> list[dict[str, str]]:
    """Return LLaMA-Factory's `system` and `history`, pairs of earlier turns, before a prompt."""
    dialogue = _system(row, "system")
    for index, turns in enumerate(row.get("history") or []):
        field = f"history[{index}]"
        if not isinstance(turns, list) or len(turns) != 2:
            raise BadRecord("must be a pair of a question and its answer", field=field)
        for role, turn in zip(("user", "assistant"), turns, strict=True):
            dialogue.append(message(role, check_text(turn, field)))
    return [*dialogue, message("user", prompt)]


def dolly(row: Row) -> Row:
    """Return the exchange of {"instruction", "context", "response"}; copies of Alpaca call
    `response` its output."""
    return {"prompt": instructed(row), "response": answer_in(row, "response")}


def question_answer(row: Row) -> Row:
    """Return the exchange of {"question", "answer"}, such as GSM8K's, whose marks of a calculator
    stay."""
    return {"prompt": text_in(row, "question"), "response": answer_in(row, "answer")}


def openorca(row: Row) -> Row:
    """Return the exchange of {"system_prompt", "question", "response"}, a dialogue in all rows,
    though some have no system prompt."""
    prompt = [*_system(row, "system_prompt"), message("user", text_in(row, "question"))]
    return {"prompt": prompt, "response": answer_in(row, "response")}


def flan(row: Row) -> Row:
    """Return the exchange of {"inputs", "targets"}."""
    return {"prompt": text_in(row, "inputs"), "response": answer_in(row, "targets")}


def input_output(row: Row) -> Row:
    """Return the exchange of {"input", "output"}."""
    return {"prompt": text_in(row, "input"), "response": answer_in(row, "output")}


def prompt_completion(row: Row) -> Row:
    """Return the exchange of {"prompt", "completion"}, texts or messages; a `label` of false says
    that the completion is a bad one."""
    prompt = messages_in(required(row, "prompt"), "prompt")
    completion = messages_in(required(row, "completion"), "completion")
    found = {"prompt": prompt, "response": completion}
    if "label" not in row or is_true(row, "label"):
        return found
    return found | {"unfit": UNFIT}


def stepwise(row: Row) -> Row:
    """Return the prompt of {"prompt", "completions", "labels"}, whose completions are the steps of
    one solution."""
    return {"prompt": messages_in(required(row, "prompt"), "prompt")}


def tldr(row: Row) -> Row:
    """Return the exchange of {"subreddit", "title", "post", "summary"}."""
    return {"prompt": tldr_prompt(row), "response": " " + text_in(row, "summary").lstrip()}


def tldr_prompt(row: Row, *, within: str = "") -> str:
    """Return a post of Reddit as Stiennon et al. 2020 ask for its summary (table 12)."""
    subreddit = text_in(row, "subreddit", within=within)
    title, post = row.get("title") or "", text_in(row, "post", within=within)
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def prompt_label(row: Row) -> Row:
    """Return the exchange of {"prompt", "label"}, where the label is the response."""
    return {"prompt": text_in(row, "prompt"), "response": text_in(row, "label")}


def turns(row: Row) -> Row:
    """Return the prompt of {"turns"}: the first of a user's turns, for the later ones want the
    answers to those before."""
    return {"prompt": check_text(list_in(row, "turns")[0], "turns[0]")}


def self_instruct(row: Row, purpose: Purpose) -> Sequence[Row | LeftOut]:
    """Return what {"instruction", "instances": [{"input", "output"}]} gives, one for each."""
    found = []
    for index, instance in enumerate(objects_in(row, "instances")):
        asked = {"instruction": row.get("instruction"), "input": instance.get("input", "")}
        exchange = {"prompt": paragraphs(asked, "instruction", "input")}
        if purpose == "demonstrations":
            exchange["response"] = answer_in(instance, "output", within=f"instances[{index}].")
        found.append(of_exchange(exchange, purpose))
    return found


def together(rows: Sequence[tuple[str, Row]]) -> list[tuple[str, Row | LeftOut]]:
    """Return rows of equal prompts as one each, {"prompt", "rows"}, where the first of them was."""
    groups: dict[str, tuple[str, Row]] = {}
    for where, row in rows:
        prompt = row.get("prompt")
        key = prompt if isinstance(prompt, str) else f"no prompt {where}"
        groups.setdefault(key, (where, {"prompt": prompt, "rows": []}))[1]["rows"].append(row)
    return [*groups.values()]


def helpsteer(row: Row, purpose: Purpose) -> Sequence[Row | LeftOut]:
    """Return what a prompt's rows {"prompt", "response", "helpfulness"} give: one comparison by
    helpfulness, or a demonstration for each that is helpful enough."""
    prompt = helpsteer_prompt(row)
    if purpose == "prompts":
        return [{"prompt": prompt}]
    responses = [answer_in(each, "response") for each in row["rows"]]
    scores = [number_in(each, "helpfulness") for each in row["rows"]]
    if purpose == "comparisons":
        return [ranked(prompt, responses, scores)]
    return [
        of_exchange({"prompt": prompt, "response": response}, purpose)
        if score >= HELPFUL
        else LeftOut(f"answers of a helpfulness below {HELPFUL:g}")
        for response, score in zip(responses, scores, strict=True)
    ]


def helpsteer_prompt(row: Row) -> list[dict[str, str]]:
    """Return HelpSteer's prompt as messages; in the text of several turns "<extra_id_1>Assistant"
    and "<extra_id_1>User" begin the later ones."""
    first, *later = text_in(row, "prompt").split("<extra_id_1>")
    found = [message("user", first.strip("\n"))]
    for turn in later:
        name, _, content = turn.partition("\n")
        role = name.strip().lower()
        if role not in ("user", "assistant"):
            raise BadRecord(f"has a turn of {quoted(name)}", field="prompt")
        found.append(message(role, content.strip("\n")))
    return found


def truthfulqa(row: Row, purpose: Purpose) -> Sequence[Row | LeftOut]:
    """Return what a line of TruthfulQA.csv gives: {"Question", "Best Answer", "Correct Answers",
    "Incorrect Answers"}, the last two joined by "; ". The comparison has every right answer before
    every wrong one."""
    prompt = text_in(row, "Question")
    if purpose != "comparisons":
        response = text_in(row, "Best Answer") if purpose == "demonstrations" else ""
        return [of_exchange({"prompt": prompt, "response": response}, purpose)]
    right = _answers(row, "Correct Answers")
    wrong = [answer for answer in _answers(row, "Incorrect Answers") if answer not in right]
    return [ranked(prompt, right + wrong, [1.0] * len(right) + [0.0] * len(wrong))]


def _answers(row: Row, key: str) -> list[str]:
    parts = (part.strip() for part in text_in(row, key).split("; "))
    return list(dict.fromkeys(part for part in parts if part))


def _system(row: Row, key: str) -> list[dict[str, str]]:
    """Return a row's system message, none where it is empty or missing."""
    value = row.get(key, "")
    if not isinstance(value, str):
        raise BadRecord(f"must be a string, not {json_type(value)}", field=key)
    return [message("system", check_text(value, key))] if value.strip() else []
