import json

import numpy as np

from engine.prepare.choice import Verdict
from engine.prepare.entries import EntryList
from engine.prepare.lengths import measures_of
from engine.prepare.logs import parse_log
from engine.prepare.outputs import Decided, Outputs, largest_duplicates
from engine.prepare.summary import Summary
from engine.settings.prepare import LogFields, PrepareConfig


def test_each_entry_goes_where_its_verdict_says(tmp_path):
    labels = {"response": "r", "completions": ["a", "b"], "ranks": [1, 2]}
    records = [parse_log({"prompt": p, **labels}, LogFields()) for p in "pq"]
    entries = EntryList(prefix_characters=9, seed=0)
    for line, record in enumerate(records, start=1):
        entries.add(f"log:{line}", record)
    chosen = Decided(
        entries=entries.entries(),
        original=np.array([0, 1, 0, 3]),
        side=np.array([1, 1, 2, 2]),
        verdict=np.array([Verdict.KEPT, Verdict.OVER_CAP, Verdict.DUPLICATE, Verdict.KEPT]),
    )
    config = PrepareConfig(logs=("log",), out=tmp_path)
    outputs = Outputs(config, chosen, Summary(measures_of(None)), None, lambda text: "en")
    with outputs.within(tmp_path):
        for line, record in enumerate(records, start=1):
            outputs.record(f"log:{line}", record)
        outputs.bad_line("log:3", "odd")
    found = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in tmp_path.iterdir()
    }
    assert [row["id"] for row in found["sft.valid.jsonl"]] == ["log:1"]
    assert [row["prompt"] for row in found["comparisons.test.jsonl"]] == ["q"]
    reasons = [(row["where"], row.get("set"), row["reason"]) for row in found["dropped.jsonl"]]
    assert reasons == [
        ("log:1", "comparisons", "over_cap"),
        ("log:2", "sft", "duplicate"),
        ("log:3", None, "bad_line"),
    ]
    assert largest_duplicates(chosen, 5) == [{"set": "sft", "kept": "log:1", "times": 2}]
