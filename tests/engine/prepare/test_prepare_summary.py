from engine.prepare.lengths import measures_of
from engine.prepare.logs import parse_log
from engine.prepare.summary import Summary, in_markdown, tables
from engine.settings.prepare import LogFields
from tests.hostile import EVERYTHING, dangers


def summary() -> dict:
    found = Summary(measures_of(None))
    chat = parse_log({"prompt": "a b", "response": "c", "kind": "chat"}, LogFields())
    plain = parse_log({"prompt": "a b c d"}, LogFields())
    found.read.update({"sft": 4, "prompts": 2})
    found.keep("sft", "train", chat, user=1, language="en")
    found.keep("sft", "train", chat, user=1, language="de")
    found.keep("sft", "test", chat, user=2, language="en")
    found.keep("prompts", "train", plain, user=3, language="unknown")
    found.drop("sft", "duplicate")
    found.drop("prompts", "personal")
    found.drop("", "bad_line")
    found.personal({"email", "card"})
    return found.as_object()


def test_counts_are_by_data_set_side_and_reason():
    found = summary()
    sft = found["sets"]["sft"]
    assert sft["kept"] == {"train": 2, "valid": 0, "test": 1}
    assert sft["users"] == {"train": 1, "valid": 0, "test": 1}
    assert sft["dropped"] == {"duplicate": 1}
    assert found["bad_lines"] == 1
    assert found["records_with_personal_data"] == {"card": 1, "email": 1}
    assert found["languages"] == {"sft": {"en": 2, "de": 1}, "prompts": {"unknown": 1}}
    assert found["kinds"] == {"sft": {"chat": 3}}
    (row,) = (
        r for r in found["lengths"]["prompts"] if r["set"] == "prompts" and r["in"] == "words"
    )
    assert (row["split"], row["mean"], row["n"]) == ("train", 4.0, 1)
    assert {row["split"] for row in found["lengths"]["responses"]} == {"train", "test"}


def page_of(report: dict, *remarks: str) -> str:
    return in_markdown(report | {"largest_duplicates": [], "split": {"by": "user"}}, remarks)


def test_the_page_says_all_of_it():
    page = page_of(summary(), "a remark")
    for text in (
        "- a remark\n",
        "| users kept | 2 | 1 |",
        "| read | 4 | 2 |",
        "| dropped: duplicate | 1 | 0 |",
        "| kept: train | 2 | 1 |",
        "| en | 2 | 66.7% |",
        "| sft | chat | 3 | 2 | 0 | 2 | 2 | 2 | 2 | 2 |",
        "- `personal`: has personal data",
    ):
        assert text in page, text
    by_prompt = summary() | {"largest_duplicates": [], "split": {"by": "prompt"}}
    assert "users kept" not in in_markdown(by_prompt, ())


def test_names_from_a_log_are_harmless():
    found = Summary(measures_of(None))
    found.read["prompts"] = 1
    record = parse_log({"prompt": "a", "kind": EVERYTHING[:60] + "|"}, LogFields())
    found.keep("prompts", "train", record, user=1, language="")
    page = page_of(found.as_object(), EVERYTHING)
    assert dangers(page) == dangers("")
    assert (
        len(list(tables({**found.as_object(), "largest_duplicates": [], "split": {"by": ""}}))) == 5
    )
