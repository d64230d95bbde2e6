import json
from collections import Counter
from pathlib import Path

import pytest

from engine.containers.lines import read_lines
from engine.quickstart.places import (
    FIELDS,
    Split,
    demonstrations,
    fact_lists,
    parse_facts,
    render_facts,
    split_of,
)

SPLITS: tuple[Split, ...] = ("train", "prompts", "valid")


def test_same_seed_same_places() -> None:
    assert demonstrations("train", 300, seed=3) == demonstrations("train", 300, seed=3)
    assert demonstrations("train", 300, seed=3)[:100] == demonstrations("train", 100, seed=3)
    assert demonstrations("train", 100, seed=3) != demonstrations("train", 100, seed=4)


def test_splits_share_no_name() -> None:
    names = {split: {facts["name"] for facts in fact_lists(split, 2000)} for split in SPLITS}
    assert names["train"] & names["prompts"] == set()
    assert names["train"] & names["valid"] == set()
    assert names["prompts"] & names["valid"] == set()
    assert all(split_of(name) == split for split in SPLITS for name in names[split])
    assert min(map(len, names.values())) >= 15
    # A held-out name is made of words that training names have.
    words = {split: {w for name in names[split] for w in name.split()} for split in SPLITS}
    assert words["valid"] | words["prompts"] <= words["train"]


@pytest.mark.parametrize("split", SPLITS)
def test_places_differ(split: Split) -> None:
    prompts = [render_facts(facts) for facts in fact_lists(split, 2000)]
    assert len(set(prompts)) == 2000


def test_values_are_balanced() -> None:
    places = fact_lists("train", 4000)
    assert 4.5 < sum(map(len, places)) / len(places) < 5.5
    for field in FIELDS[1:]:
        values = Counter(facts[field].split()[0] for facts in places if field in facts)
        assert max(values.values()) < 1.5 * min(values.values()), field
        assert 0.4 < values.total() / len(places) < 0.9


def test_prompt_round_trip() -> None:
    for facts in fact_lists("valid", 500):
        assert parse_facts(render_facts(facts)) == facts
        assert list(facts) == [field for field in FIELDS if field in facts]


def test_prompt_form() -> None:
    facts = {"name": "Blue Spice", "type": "pub", "family friendly": "yes"}
    prompt = "Describe this place. name: Blue Spice | type: pub | family friendly: yes"
    assert render_facts(facts) == prompt
    assert parse_facts(f" {prompt}\n") == facts


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Why is the sky blue?",
        "Describe this place.",
        "Describe this place. name: | type: pub",
        "Describe this place. name: Blue Spice | colour: red",
        "Please. Describe this place. name: Blue Spice",
    ],
)
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a list of facts"):
        parse_facts(prompt)


@pytest.mark.parametrize("name", ["sft/e2e", "prompts/e2e", "comparisons/e2e_slots"])
def test_e2e_prompts_are_of_the_same_form(data_pack: Path, name: str) -> None:
    prompts = [
        json.loads(line)["prompt"] for _, line in read_lines(data_pack / f"{name}.val.jsonl.gz")
    ]
    assert all(render_facts(parse_facts(prompt)) == prompt for prompt in prompts)
