"""How an exported model is asked: its run's form of prompts, and a chat template of that form.

    FOLDER/prompt_format.json        for a stage or generate.py that starts from the folder
    FOLDER/tokenizer_config.json     chat_template, for everybody else

A run that was trained by its tokenizer's template has that; one that was trained in turns, or on
dialogues in text, gets one that writes these. A template that was kept and not trained by goes: it
would ask wrongly.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from engine.data.prompt_format import (
    DIALOGUES,
    PromptFormat,
    read_prompt_format,
    write_prompt_format,
)
from engine.data.tokenizer import Tokenizer
from engine.errors import quoted
from engine.files import read_object, write_object

_CONFIG = "tokenizer_config.json"


def export_chat(run: Path, tokenizer: Tokenizer, folder: Path) -> str:
    """Write a run's form of prompts into its export, beside the tokenizer's files; return what is
    to be said of it, "" for nothing. Of a run that was trained on no prompts all stays as it is."""
    form = read_prompt_format(run)
    if form is None or not form.trained_on:
        return ""
    if form.chat == "template" and DIALOGUES in form.trained_on:
        write_prompt_format(form, folder)
        return _system_missing(form, tokenizer)
    if form.chat == "template":
        form = replace(form, chat="turns", chat_template="")
    write_prompt_format(form, folder)
    settings = read_object(folder / _CONFIG)
    had = settings.pop("chat_template", None) is not None
    instead = f"none is there instead: ask in plain prompts, closed by {form.prompt_suffix!r}"
    if DIALOGUES in form.trained_on:
        settings["chat_template"] = turns_template(form, tokenizer)
        instead = "one that writes these turns is there instead"
    elif form.text_turns:
        settings["chat_template"] = text_template(form, tokenizer)
        instead = f"one that writes dialogues from {form.text_turns!r} on is there instead"
    write_object(folder / _CONFIG, settings)
    if not had:
        return ""
    return (
        f"{tokenizer.path}: its chat template is left out, for the run was not trained by it; "
        f"{instead}"
    )


def _system_missing(form: PromptFormat, tokenizer: Tokenizer) -> str:
    """Return what whoever asks an export must add: a template writes the messages it is given."""
    if not form.system:
        return ""
    return (
        f"{tokenizer.path}: its chat template writes no system message by itself, and the run was "
        f"trained with one: give {quoted(form.system)} as the first message"
    )


def turns_template(form: PromptFormat, tokenizer: Tokenizer) -> str:
    """Return a chat template that writes dialogues as they were trained in turns: what begins a
    text before them, the end of text behind a last reply."""
    system = f"{form.roles['system']}: {form.system}{form.separator}" if form.system else ""
    names = {**form.roles, "developer": form.roles["system"]}
    return _template(form, tokenizer, names, system)


def text_template(form: PromptFormat, tokenizer: Tokenizer) -> str:
    """Return a chat template that writes dialogues as the run's were in its plain prompts, which
    have no system message; else as turns_template."""
    user = form.text_turns.lstrip()
    names = {"user": user.removesuffix(":"), "assistant": form.roles["assistant"]}
    return _template(form, tokenizer, names, form.text_turns.removesuffix(user))


def _template(
    form: PromptFormat, tokenizer: Tokenizer, names: Mapping[str, str], first: str
) -> str:
    """Return a chat template of turns that begin with names. first: what is before the first one,
    unless that is the system's."""
    begin = "".join(tokenizer.bos_text.split(" "))
    closed = form.prompt_suffix if form.closes_open else ""
    is_reply = "loop.last and message['role'] == 'assistant'"
    return (
        f"{{% set names = {ascii(names)} %}}{{{{ {ascii(begin)} }}}}"
        "{% if messages[0]['role'] not in ['system', 'developer'] %}"
        f"{{{{ {ascii(first)} }}}}{{% endif %}}{{% for message in messages %}}"
        "{% if message['role'] not in names %}"
        "{{ raise_exception('no such role: ' + message['role']) }}{% endif %}"
        f"{{% if not loop.first %}}{{{{ {ascii(form.separator)} }}}}{{% endif %}}"
        "{{ names[message['role']] + ':' }}"
        f"{{% if {is_reply} %}}{{{{ {ascii(closed)} }}}}{{% endif %}}"
        "{{ ' ' + message['content'] }}"
        f"{{% if {is_reply} %}}{{{{ {ascii(tokenizer.eos_text)} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {ascii(form.open_turn + closed)} }}}}{{% endif %}}"
    )
