import pytest

from engine.containers.row import BadRecord
from engine.data.comparisons import read_comparisons
from engine.data.demonstrations import read_demonstrations
from engine.data.prompts import read_prompts
from engine.prepare.labels import labels_of
from engine.prepare.logs import parse_log
from engine.settings.prepare import LogFields
from tests.tiny import write_lines


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


LONG = [user("q"), assistant("a"), user("r")]
HH = "\n\nHuman: hi there\n\nAssistant:"
ROWS = {
    "pair of chats": {
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
    },
    "pair of messages": {
        "prompt": [user("q")],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    },
    "pair with its dialogue": {
        "prompt": "q",
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
        "messages": [user("q"), assistant("a")],
    },
    "texts of one beginning": {"chosen": "It is very fine", "rejected": "It is bad"},
    "HH": {"chosen": f"{HH} hello", "rejected": f"{HH} go away"},
    "scores": {"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 5, 3.5]},
    "alpaca": {"instruction": "add", "input": "1 2", "output": "3"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "UltraChat": {
        "prompt": "q",
        "messages": [user("q"), assistant("a"), user("r"), assistant("b")],
    },
    "TRL": {"prompt": [user("q")], "completion": [assistant("a")]},
    "question": {"question": "q", "answer": "a"},
    "NeMo": {
        "context": [user("q")],
        "completions": [
            {"rank": 0, "completion": [assistant("a")]},
            {"rank": 1, "completion": [assistant("b")]},
        ],
    },
}
READERS = {"sft": read_demonstrations, "comparisons": read_comparisons, "prompts": read_prompts}


@pytest.mark.parametrize("name", ROWS)
def test_a_prepared_row_is_to_the_stages_what_the_log_s_row_is(name, tmp_path):
    record = parse_log(ROWS[name], LogFields())
    for dataset in record.sets():
        made = write_lines(tmp_path / f"{dataset}.jsonl", [record.row(dataset, "log:1")])
        raw = write_lines(tmp_path / "raw.jsonl", [ROWS[name]])
        assert READERS[dataset](made)[0] == READERS[dataset](raw)[0], dataset


def test_each_row_is_for_the_data_sets_of_its_labels():
    sets = {name: parse_log(row, LogFields()).sets() for name, row in ROWS.items()}
    pairs = ("pair of chats", "pair of messages", "texts of one beginning", "HH", "scores", "NeMo")
    assert all(sets.pop(name) == ["comparisons"] for name in pairs)
    assert sets.pop("pair with its dialogue") == ["sft", "comparisons"]
    assert all(found == ["sft"] for found in sets.values())
    assert labels_of(ROWS["alpaca"], are_named=False)[1] == "alpaca"
    assert labels_of(ROWS["scores"], are_named=False)[0].ranks == [3, 1, 2]


@pytest.mark.parametrize(
    "weights, response, asked",
    [
        ((None, None), "d", ["a", "b", "c"]),
        ((0, 1), "d", ["a", "b", "c"]),
        ((1, 0), "b", ["a"]),
        ((0, 0), None, ["a", "b", "c"]),
    ],
)
def test_the_last_reply_that_is_trained_is_the_response(weights, response, asked):
    first, second = ({} if weight is None else {"weight": weight} for weight in weights)
    row = {"messages": [user("a"), assistant("b", **first), user("c"), assistant("d", **second)]}
    record = parse_log(row, LogFields())
    assert record.response == response
    assert [message["content"] for message in record.prompt] == asked
    assert record.sets() == (["prompts"] if response is None else ["sft"])
    assert record.left_out == ((("sft", "replies of weight 0"),) if response is None else ())


def test_what_teaches_nothing_stays_as_a_prompt_and_says_why():
    tie = {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b"}
    tie |= {"score_0": 0.0, "score_1": 0.0}
    wrong = {"prompt": "q", "completion": "a", "label": False}
    for row, left_out in (
        (tie, ("comparisons", "ties")),
        (wrong, ("sft", "completions labelled false")),
    ):
        record = parse_log(row, LogFields())
        assert (record.sets(), record.left_out) == (["prompts"], (left_out,))


def test_who_spoke_is_not_kept_in_a_message():
    row = {"messages": [user("a") | {"name": "Ann", "account": 7}, assistant("b")]}
    assert parse_log(row, LogFields()).prompt == [user("a")]


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"prompt": "q", "response": "a", "helpfulness": 3}, "HelpSteer 1 and 2 .* to the stages"),
        (
            {"instruction": "i", "instances": [{"input": "", "output": "o"}] * 2},
            "Self-Instruct.* makes 2 records",
        ),
        ({"prompt": "q", "label": "chat"}, "a response or a use case: --fields.response label"),
        ({"prompt": "q", "completions": ["a", "b"], "ratings": [1, 2]}, "or by --fields.scores"),
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": [1]}]}, "a call of a tool"),
        ({"messages": [user("a"), assistant("b"), assistant("c")]}, "needs a user message"),
        ({"chosen": [user("a"), assistant("b")], "rejected": "b"}, "must be a list of messages"),
        ({"chosen": "a", "prompt": "q"}, 'field "rejected" is missing'),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "is the same text as chosen"),
        (
            ROWS["pair of chats"] | {"messages": [user("other"), assistant("a")]},
            "must begin as the dialogue",
        ),
        (
            ROWS["pair with its dialogue"] | {"messages": [user("other"), assistant("a")]},
            '"messages" must begin as the dialogue that chosen and rejected share',
        ),
        (
            {
                "prompt": "r",
                "messages": [*LONG, assistant("c", weight=0)],
                "chosen": [*LONG, assistant("c")],
                "rejected": [*LONG, assistant("d")],
            },
            '"messages" must begin as .* completions answer, up to the last reply that is trained',
        ),
        ({"text": "p"}, 'field "prompt" is missing; there is text.*name it by --fields.prompt'),
    ],
)
def test_what_is_not_taken_is_refused_by_its_name(row, problem):
    with pytest.raises(BadRecord, match=problem):
        parse_log(row, LogFields())
