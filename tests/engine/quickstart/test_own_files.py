import gzip
import json
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.quickstart.own_files import NAMES, is_text, own_files, split_files
from tests.tiny import write_lines


def say(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def split(folder: Path, **sources: Path) -> dict[str, tuple[Path, Path]]:
    ending = {name: ".txt" if is_text(path) else ".jsonl" for name, path in sources.items()}
    targets = {
        name: (folder / f"data/{name}{ending[name]}", folder / f"data/{name}_valid{ending[name]}")
        for name in sources
    }
    split_files(sources, targets)
    return targets


def test_files_are_found_by_their_plain_names(tmp_path):
    assert own_files(tmp_path) == dict.fromkeys(NAMES)
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    (tmp_path / "pretraining.txt.gz").write_bytes(gzip.compress(b"text"))
    found = own_files(tmp_path)
    assert found["prompts"] == tmp_path / "prompts.jsonl"
    assert found["pretraining"] == tmp_path / "pretraining.txt.gz"
    assert found["comparisons"] is None


def test_a_prompt_is_on_one_side_in_all_files(tmp_path):
    prompts = [f"prompt {i}" for i in range(300)]
    sources = {
        "demonstrations": write_lines(
            tmp_path / "d.jsonl", ({"prompt": p, "response": str(n)} for p in prompts for n in "ab")
        ),
        "prompts": write_lines(tmp_path / "p.jsonl", ({"prompt": p} for p in prompts)),
    }
    sides = {
        name: [{row["prompt"] for row in lines(path)} for path in paths]
        for name, paths in split(tmp_path, **sources).items()
    }
    assert sides["demonstrations"] == sides["prompts"]
    kept, held_out = sides["prompts"]
    assert kept.isdisjoint(held_out) and kept | held_out == set(prompts)
    assert 15 < len(held_out) < 50
    assert len(lines(tmp_path / "data/demonstrations.jsonl")) == 2 * len(kept)


@pytest.mark.parametrize("number", [2, 3, 5, 9])
def test_few_prompts_leave_something_on_either_side(tmp_path, number):
    for start in range(20):
        folder = tmp_path / str(start)
        folder.mkdir()
        rows = [{"prompt": f"{start} {i}"} for i in range(number)]
        kept, held_out = split(folder, prompts=write_lines(folder / "p.jsonl", rows))["prompts"]
        assert lines(kept) and lines(held_out)
        assert len(lines(kept)) + len(lines(held_out)) == number


def test_prompts_that_would_all_be_held_out_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.quickstart.own_files._FRACTION", 1.0)
    rows = [{"prompt": str(i)} for i in range(9)]
    kept, held_out = split(tmp_path, prompts=write_lines(tmp_path / "p.jsonl", rows))["prompts"]
    assert (len(lines(kept)), len(lines(held_out))) == (1, 8)


def test_rows_stay_as_they_are_and_dialogues_are_told_apart_by_their_prompt(tmp_path):
    def chat(question: str, answer: str) -> list[dict]:
        roles = {"user": question, "assistant": answer}
        return [{"role": role, "content": content} for role, content in roles.items()]

    rows = [
        {"chosen": chat(f"q{i}", a), "rejected": chat(f"q{i}", "é")}
        for i in range(60)
        for a in "xy"
    ]
    kept, held_out = split(tmp_path, comparisons=write_lines(tmp_path / "c.jsonl", rows))[
        "comparisons"
    ]
    found = [lines(kept), lines(held_out)]
    assert sorted(map(json.dumps, found[0] + found[1])) == sorted(map(json.dumps, rows))
    asked = [{row["chosen"][0]["content"] for row in side} for side in found]
    assert asked[0].isdisjoint(asked[1])
    texts = [
        {"chosen": f"Human: {i}\n\nAssistant: {a}", "rejected": f"Human: {i}\n\nAssistant: r"}
        for i in range(60)
        for a in "xy"
    ]
    path = write_lines(tmp_path / "t.jsonl", texts)
    (tmp_path / "other").mkdir()
    kept, held_out = split(tmp_path / "other", comparisons=path)["comparisons"]
    asked = [{row["chosen"].partition("\n")[0] for row in lines(p)} for p in (kept, held_out)]
    assert asked[0].isdisjoint(asked[1])


def test_a_prompt_is_on_one_side_whatever_form_the_files_have(tmp_path):
    questions = [f"What is {n}?" for n in range(80)]
    sources = {
        "demonstrations": [{"instruction": q, "output": "a"} for q in questions],
        "comparisons": [
            {"chosen": [ask, say("x")], "rejected": [ask, say("y")]}
            for ask in ({"role": "user", "content": q} for q in questions)
        ],
        "prompts": [{"prompt": q} for q in questions],
    }
    paths = {n: write_lines(tmp_path / f"{n}.jsonl", rows) for n, rows in sources.items()}
    found = split(tmp_path, **paths)
    sides = [
        {each["prompt"] for name in ("demonstrations", "prompts") for each in lines(found[name][n])}
        | {each["chosen"][0]["content"] for each in lines(found["comparisons"][n])}
        for n in (0, 1)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == set(questions)


def test_what_several_rows_make_is_split_whole(tmp_path):
    rows = []
    for n in range(40):
        asks = {"message_id": f"q{n}", "parent_id": None, "role": "prompter", "text": f"q{n}"}
        rows.append(asks)
        rows += [
            {"message_id": f"a{n}{k}", "parent_id": f"q{n}", "role": "assistant", "text": f"a{k}"}
            | {"rank": k}
            for k in range(3)
        ]
    path = write_lines(tmp_path / "c.jsonl", [row | {"lang": "en"} for row in rows])
    sides = split(tmp_path, comparisons=path)["comparisons"]
    assert sum(len(lines(side)) for side in sides) == 40
    assert {len(each["completions"]) for side in sides for each in lines(side)} == {3}


def test_two_files_of_one_name_are_refused(tmp_path):
    for ending in (".jsonl", ".csv"):
        (tmp_path / f"prompts{ending}").write_text("x")
    with pytest.raises(UserError, match=r"prompts.jsonl and .*prompts.csv: one file of prompts"):
        own_files(tmp_path)


def test_a_folder_stands_for_a_file_where_there_is_none(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
    (tmp_path / "prompts.txt").write_text("".join(f"What is {i}?\n" for i in range(30)))
    for part in range(2):
        rows = [{"prompt": f"q {part} {i}", "response": "r"} for i in range(20)]
        write_lines(tmp_path / f"demonstrations/train-0000{part}-of-00002.jsonl", rows)
        (tmp_path / f"pretraining/{part}.txt").write_text(f"The text of {part}.\nIt is long.\n")
    (tmp_path / "demonstrations/README.md").write_text("# Mine")
    found = own_files(tmp_path)
    assert found["prompts"] == tmp_path / "prompts.txt"
    assert found["comparisons"] == tmp_path / "comparisons"
    sides = split(tmp_path, **{n: p for n, p in found.items() if n != "comparisons"})
    assert sum(len(lines(side)) for side in sides["demonstrations"]) == 40
    assert sum(len(lines(side)) for side in sides["prompts"]) == 30
    assert sorted(each["text"] for side in sides["pretraining"] for each in lines(side)) == [
        f"The text of {part}.\nIt is long.\n" for part in range(2)
    ]
    (tmp_path / "pretraining/0.txt").write_text("Another.\n")
    with pytest.raises(UserError, match="pretraining: other content than that which"):
        split(tmp_path, pretraining=tmp_path / "pretraining")
    write_lines(tmp_path / "demonstrations/test.jsonl", [{"prompt": "q", "response": "r"}])
    with pytest.raises(
        UserError, match=r"\(test, train\): .*/train; to take it, let .*demonstrations be"
    ):
        split(tmp_path / "other", demonstrations=tmp_path / "demonstrations")


def test_a_folder_of_one_text_is_that_text(tmp_path):
    (tmp_path / "pretraining").mkdir()
    (tmp_path / "pretraining/book.txt").write_text("".join(f"line {i}\n" for i in range(50)))
    assert is_text(tmp_path / "pretraining")
    kept, held_out = split(tmp_path, pretraining=tmp_path / "pretraining")["pretraining"]
    assert (len(kept.read_text().splitlines()), len(held_out.read_text().splitlines())) == (45, 5)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"a\n\xe9", "b.txt:2: not UTF-8"), (b" \n", 'b.txt: field "text" is empty')],
)
def test_a_text_of_a_folder_that_is_none_is_named(tmp_path, content, said):
    (tmp_path / "pretraining").mkdir()
    (tmp_path / "pretraining/a.txt").write_text("text")
    (tmp_path / "pretraining/b.txt").write_bytes(content)
    with pytest.raises(UserError, match=said):
        split(tmp_path, pretraining=tmp_path / "pretraining")


def test_of_a_text_the_end_is_held_out(tmp_path):
    path = tmp_path / "pretraining.txt"
    path.write_text("".join(f"line {i}\n" for i in range(50)))
    kept, held_out = split(tmp_path, pretraining=path)["pretraining"]
    assert kept.read_text() + held_out.read_text() == path.read_text()
    assert held_out.read_text().splitlines() == [f"line {i}" for i in range(45, 50)]


def test_what_cannot_be_split_is_named(tmp_path):
    one = write_lines(tmp_path / "p.jsonl", [{"prompt": "p"}, {"prompt": "p"}])
    with pytest.raises(UserError, match="p.jsonl: one prompt or text; two or more can be split"):
        split(tmp_path, prompts=one)
    (tmp_path / "t.txt").write_text("one line")
    with pytest.raises(UserError, match="t.txt: one line of text; two or more can be split"):
        split(tmp_path, pretraining=tmp_path / "t.txt")


def test_a_file_that_was_changed_since_is_refused_and_a_lost_part_made_again(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", ({"prompt": str(i)} for i in range(30)))
    kept, held_out = split(tmp_path, prompts=path)["prompts"]
    before = kept.read_bytes(), held_out.read_bytes()
    held_out.unlink()
    split(tmp_path, prompts=path)
    assert (kept.read_bytes(), held_out.read_bytes()) == before
    write_lines(path, [{"prompt": "other"}, {"prompt": "more"}])
    with pytest.raises(UserError, match="other content than that which .* was begun with"):
        split(tmp_path, prompts=path)
