"""An export is asked as its run was trained: here by its form, elsewhere by its chat template."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.answers.asked import asked_as
from engine.data.chat import Asked
from engine.data.prompt_format import PromptFormat, read_prompt_format, write_prompt_format
from engine.data.renderer import Renderer
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.huggingface.convert import convert
from engine.huggingface.export_chat import export_chat, text_template, turns_template
from engine.huggingface.export_tokenizer import export_tokenizer
from engine.settings.convert import ConvertConfig
from engine.settings.generate import GenerateConfig
from tests.engine.data.test_chat_template import folder_of
from tests.engine.data.test_renderer import TEMPLATES
from tests.families import save_family
from tests.tiny import rm_config, train, write_lines

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why does 'the mill' cost {{ 3 }}?\n\u6f22"}
REPLY = {"role": "assistant", "content": "So."}
DIALOGUES = [[USER], [SYSTEM, USER], [USER, REPLY, USER], [SYSTEM, USER, REPLY, USER]]
TURNS = PromptFormat(trained_on=("dialogues",))
IN_TEXT = PromptFormat(trained_on=("texts",), text_turns="\n\nHuman:")
FORMS = {
    "turns": TURNS,
    "a system": PromptFormat(system="Be 'kind'.\n\U0001f600", trained_on=("dialogues",)),
    "of before": PromptFormat(closes_open=True, trained_on=("texts", "dialogues")),
    "others": PromptFormat(
        roles={"system": "S", "user": "Human", "assistant": "Bot"},
        separator="\n",
        trained_on=("dialogues",),
    ),
}


def exported(path: Path, tokenizer: Tokenizer, form: PromptFormat | None) -> Path:
    """The tokenizer's part of an export of a run of that form."""
    for name in ("run", "out"):
        (path / name).mkdir()
    if form is not None:
        write_prompt_format(form, path / "run")
    export_tokenizer(tokenizer, path / "out", 64)
    export_chat(path / "run", tokenizer, path / "out")
    return path / "out"


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("begins", [False, True])
def test_turns_are_those_of_transformers_by_the_template_that_is_written(tmp_path, name, begins):
    folder = folder_of(tmp_path / "theirs", TEMPLATES["chatml"])
    if begins:
        content = json.loads((folder / "tokenizer.json").read_text())
        before = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [before, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [before, {"Sequence": {"id": "A", "type_id": 0}}]
            + [{"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer, form = load_tokenizer(folder), FORMS[name]
    assert tokenizer.bos_ids == ((3,) if begins else ())
    theirs = AutoTokenizer.from_pretrained(exported(tmp_path, tokenizer, form))
    by = Renderer(form, tokenizer)
    for messages in DIALOGUES:
        asked = Asked(messages=messages)
        ours = [*tokenizer.bos_ids]
        prompt = by.prompt(asked)
        ours += tokenizer.encode(prompt.text + prompt.suffix)
        opened = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert opened["input_ids"] == ours
        if not form.closes_open:  # a line break and a space would be one piece
            ours += [*tokenizer.encode(by.reply(asked, "So.").text), tokenizer.eos_id]
            whole = theirs.apply_chat_template([*messages, REPLY], return_dict=True)["input_ids"]
            assert whole == ours
    developer = [SYSTEM | {"role": "developer"}, USER]
    same = (theirs.apply_chat_template(each, tokenize=False) for each in (developer, DIALOGUES[1]))
    assert next(same) == next(same)
    with pytest.raises(Exception, match="no such role: tool"):
        theirs.apply_chat_template([USER | {"role": "tool"}])


def test_a_sentencepiece_model_is_asked_alike(tmp_path, tokenizer):
    theirs = AutoTokenizer.from_pretrained(exported(tmp_path, tokenizer, TURNS))
    prompt = Renderer(TURNS, tokenizer).prompt(Asked(messages=DIALOGUES[3]))
    opened = theirs.apply_chat_template(DIALOGUES[3], add_generation_prompt=True, return_dict=True)
    assert opened["input_ids"] == tokenizer.encode(prompt.text)


@pytest.mark.parametrize(
    ("form", "template"),
    [
        (None, "theirs"),  # nothing is known of it
        (PromptFormat(), "theirs"),  # nothing was trained
        (PromptFormat(chat="template", trained_on=("dialogues",)), "theirs"),
        (TURNS, "turns"),
        (PromptFormat(trained_on=("texts",)), None),
        (PromptFormat(chat="template", chat_template="ab", trained_on=("texts",)), None),
        (IN_TEXT, "text"),
    ],
)
def test_a_template_that_was_not_trained_by_does_not_stay(tmp_path, form, template):
    tokenizer = load_tokenizer(folder_of(tmp_path / "theirs", TEMPLATES["chatml"]))
    out = exported(tmp_path, tokenizer, form)
    found = json.loads((out / "tokenizer_config.json").read_text()).get("chat_template")
    wanted = {
        "theirs": TEMPLATES["chatml"],
        "turns": turns_template(TURNS, tokenizer),
        "text": text_template(IN_TEXT, tokenizer),
        None: None,
    }
    assert found == wanted[template]
    kept = form if form is not None and form.trained_on else None
    if kept is not None and template is None:
        kept = dataclasses.replace(kept, chat="turns", chat_template="")
    assert read_prompt_format(out) == kept
    (out / "tokenizer_config.json").write_text(json.dumps({"chat_template": "theirs"}))
    note = export_chat(tmp_path / "run", tokenizer, out)
    assert ("its chat template is left out" in note) == (template != "theirs")
    assert ("ask in plain prompts, closed by '\\n'" in note) == (template is None)


def test_dialogues_in_text_are_those_of_transformers_by_the_template_that_is_written(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path / "theirs", TEMPLATES["chatml"]))
    theirs = AutoTokenizer.from_pretrained(exported(tmp_path, tokenizer, IN_TEXT))
    for messages in (DIALOGUES[0], DIALOGUES[2]):
        opened = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        asked = tokenizer.encode(IN_TEXT.in_text(messages))
        assert opened["input_ids"] == [*tokenizer.bos_ids, *asked]
    with pytest.raises(Exception, match="no such role: system"):
        theirs.apply_chat_template(DIALOGUES[1])


def test_a_system_message_that_no_template_writes_is_told(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path / "theirs", TEMPLATES["chatml"]))
    form = PromptFormat(chat="template", trained_on=("dialogues",), system="Be brief.")
    out = exported(tmp_path, tokenizer, form)
    assert "give 'Be brief.' as the first message" in export_chat(tmp_path / "run", tokenizer, out)


def test_an_export_and_its_import_are_asked_as_the_run_was_trained(tiny, tmp_path):
    run = Path(shutil.copytree(tiny / "policy", tmp_path / "run"))
    form = PromptFormat(prompt_suffix=" =>", system="Be.", trained_on=("dialogues", "texts"))
    write_prompt_format(form, run)
    out, again = tmp_path / "out", tmp_path / "again"
    convert(ConvertConfig(direction="export", source=run, out=out))
    convert(ConvertConfig(direction="import", source=out, out=again))
    checkpoint = again / "checkpoints" / "step_00000000"
    for source in (out, again, checkpoint):
        tokenizer = load_tokenizer(out if source == out else again / "tokenizer")
        by = asked_as(GenerateConfig(source=source), tokenizer)
        assert told_by(by.form) == told_by(form)
        assert by.prompt(Asked(messages=[USER])) == Renderer(form).prompt(Asked(messages=[USER]))


def told_by(form: PromptFormat) -> tuple:
    return form.prompt_suffix, form.chat, form.system, form.closes_open, set(form.trained_on)


def test_a_stage_from_a_folder_trains_by_its_template_and_exports_it(tmp_path):
    folder = tmp_path / "theirs"
    save_family("llama", folder, max_position_embeddings=512)
    folder_of(folder, TEMPLATES["chatml"], eos_token="<|im_end|>")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": 2}))
    pair = {"chosen": [USER, REPLY], "rejected": [USER, REPLY | {"content": "No."}]}
    config = rm_config(tmp_path, tmp_path / "rm", init_from=folder, epochs=1.0)
    data = {"train": write_lines(tmp_path / "pairs.jsonl", [pair]), "demonstrations": None}
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, valid_fraction=0.0, **data)
    )
    train(config)
    kept = read_prompt_format(config.directory)
    assert (kept.chat, kept.trained_on) == ("template", ("dialogues",))
    out = tmp_path / "out"
    convert(ConvertConfig(direction="export", source=config.directory, out=out))
    found = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert found == TEMPLATES["chatml"]
    assert read_prompt_format(out) == kept
