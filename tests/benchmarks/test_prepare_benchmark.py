import json
from collections import Counter

from benchmarks.made_log import CAP, PREFIX, by_kind, luhn, made_log
from benchmarks.prepare import found_against_planted
from engine.settings.prepare import PrepareConfig


def test_the_log_has_what_it_says_and_is_the_same_each_time():
    planted = made_log(3000, seed=2)
    assert planted == made_log(3000, seed=2) != made_log(3000, seed=3)
    assert len(planted) == 3000
    assert len({p.row["id"] for p in planted}) == 3000
    whats = Counter(p.what for p in planted)
    assert whats["over the cap"] == CAP + 100
    duplicates = [p for p in planted if p.what.startswith("duplicate")]
    groups = {p.row["id"].partition("/")[0] for p in duplicates}
    assert sum(p.reason == "" for p in duplicates) == len(groups)
    default = PrepareConfig()
    assert (default.prefix_characters, default.max_prompts_per_user) == (PREFIX, CAP)


def test_check_digits_are_those_of_the_standard():
    assert luhn("411111111111111") == "1"
    assert luhn("37828224631000") == "5"


def test_what_was_found_is_held_against_what_was_planted(tmp_path):
    planted = made_log(3000, seed=2)
    kinds = dict(by_kind(planted))
    missed, wrong = kinds["email: plain"][0], kinds["plain"][0]
    rows = [{"id": p.row["id"], "reason": p.reason} for p in planted if p.reason and p != missed]
    rows = [row for row in rows if row["reason"] != "over_cap"]
    rows += [{"id": p.row["id"], "reason": "over_cap"} for p in kinds["over the cap"][:100]]
    rows.append({"id": wrong.row["id"], "reason": "personal"})
    (tmp_path / "dropped.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = {row["what"]: row for row in found_against_planted(planted, tmp_path)}
    odd = {
        what for what, row in found.items() if row["to_drop"] != row["dropped"] or row["wrongly"]
    }
    assert odd == {"email: plain", "plain"}
    assert found["email: plain"]["dropped"] == found["email: plain"]["to_drop"] - 1
    assert found["plain"]["wrongly"] == 1
