import json
from pathlib import Path

from engine.data.account import Account
from engine.data.demonstrations import read_demonstrations
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


def test_each_part_of_a_list_has_its_own_numbers(tmp_path: Path) -> None:
    for name, rows in (("a", 9), ("b", 3), ("dir/c", 2)):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps({"prompt": f"{name} {n}", "response": "r"}) for n in range(rows)]
        path.write_text("\n".join([*lines, "{"] if name == "b" else lines))
    dolly = {"instruction": "i", "response": "r", "context": ""}
    (tmp_path / "d.jsonl").write_text(json.dumps(dolly))
    named = ["a.jsonl@0.5", "b.jsonl@2", "dir/", "d.jsonl"]
    records, report = read_demonstrations(
        ",".join(f"{tmp_path}/{part}" for part in named), skip_bad_lines=True
    )
    account = Account()
    account.add_read("data.train", report)
    found = account.files["data.train"]
    assert (found["records"], found["bad_lines"], found["read_as"][:5]) == (15, 1, "dolly")
    names = ("path", "weight", "records", "bad_lines", "records_an_epoch", "read_as")
    drawn = sum(record.prompt.text.startswith("a ") for record in records)
    assert [tuple(part[name] for name in names) for part in found["parts"]] == [
        (f"{tmp_path}/a.jsonl", 0.5, 9, 0, drawn, "plain"),
        (f"{tmp_path}/b.jsonl", 2.0, 3, 1, 6, "plain"),
        (f"{tmp_path}/dir/", 1.0, 2, 0, 2, "plain"),
        (f"{tmp_path}/d.jsonl", 1.0, 1, 0, 1, "dolly: instruction, response, context"),
    ]
    assert "b.jsonl:4" in found["parts"][1]["first_errors"][0]
    _, alone = read_demonstrations(f"{tmp_path}/a.jsonl")
    assert "parts" not in alone.as_object()
