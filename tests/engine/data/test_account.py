from engine.data.account import Account
from engine.data.examples import LengthReport
from engine.data.limits import Limit, Limits
from engine.data.records import ReadReport

LIMITS = Limits(prompt=Limit(128, "data.max_prompt_tokens"), whole=Limit(256, "the context"))


def test_what_was_read_is_told_with_every_number_and_reason() -> None:
    account = Account()
    report = ReadReport(
        num_read=9,
        num_bad=2,
        first_errors=("f:3: bad",),
        path="f",
        read_as="webgpt: question",
        left_out={"ties": 4},
    )
    account.add_read("data.train", report)
    lengths = LengthReport(kept=[0, 1], num_long_prompts=3, num_long_sequences=1, num_cut=1)
    account.add_lengths("data.train", lengths, "train", LIMITS)
    short = LengthReport(kept=[0, 1, 2], num_long_prompts=0, num_long_sequences=0)
    account.add_lengths("data.train", short, "valid", LIMITS)
    account.leave_out("data.train", 5, "beyond data.num_valid")
    account.leave_out("data.train", 0, "nothing")
    assert account.files == {
        "data.train": {
            "path": "f",
            "read_as": "webgpt: question",
            "records": 9,
            "bad_lines": 2,
            "first_errors": ["f:3: bad"],
            "left_out": {"ties": 4, "beyond data.num_valid": 5},
            "train": {
                "kept": 2,
                "cut": 1,
                "dropped": 4,
                "dropped_for": {
                    "a prompt over 128 tokens (data.max_prompt_tokens)": 3,
                    "over 256 tokens (the context) in all": 1,
                },
            },
            "valid": {"kept": 3, "cut": 0, "dropped": 0, "dropped_for": {}},
        }
    }
    assert account.counts == {"data.train": {"records": 9, "skipped": 2, "kept": 5, "dropped": 4}}
