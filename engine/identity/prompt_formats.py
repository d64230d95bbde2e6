"""How a stage's prompts are read: as the run before it had them read, or as its options say.

What the run before was trained with is no matter of choice: another format is an error, for the
model would be asked what it was not taught to read. So is another reward model's or reference's.
Versions have closed some prompts otherwise: where a file has such a prompt, that is an error too.
"""

import json
from dataclasses import asdict, replace
from typing import Any

from engine.data.chat_template import ChatTemplate, digest_of_template, template_of
from engine.data.prompt_format import (
    OPTIONS,
    PromptFormat,
    format_differences,
    in_words,
    prompt_format_beside,
    prompt_format_of,
    read_prompt_format,
)
from engine.data.renderer import Renderer
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from engine.huggingface.foreign import is_foreign
from engine.identity.made_from import NamedNetwork, RunConfig, networks_of
from engine.ranks.first_rank import said_by_first_rank
from engine.run import Run, has_begun
from engine.settings.command_line import as_options

_FIRST = ("init_from", "policy")  # the networks that bring a format


def renderer_of(run: Run, config: RunConfig) -> tuple[Renderer, RunConfig, list[str]]:
    """Return what reads a stage's prompts, the config with the format's options as they are then,
    and what is to be told of it. All ranks call together.

    Raises UserError where a network was trained with another format.
    """
    told = json.loads(said_by_first_rank(lambda: json.dumps(_found(run, config))))
    form, notes = prompt_format_of(told["format"]), told["notes"]
    others = {option: prompt_format_of(theirs) for option, theirs in told["others"].items()}
    renderer = Renderer(form, run.tokenizer, others)
    if form.chat == "turns" and template_of(run.tokenizer) is not None:
        notes.append(
            f"{run.tokenizer.path}: its chat template is not applied: messages go in as turns "
            f"({form.roles['user']}: ...)"
        )
    data: Any = replace(config.data, **{name: getattr(form, name) for name in OPTIONS})
    return renderer, replace(config, data=data), notes


def default_format(tokenizer: Tokenizer) -> tuple[PromptFormat, str]:
    """Return the format of a model that nothing is known of: dialogues by its tokenizer's chat
    template where it has one that loads; and what is to be said where it does not load."""
    if template_of(tokenizer) is None:
        return PromptFormat(), ""
    try:
        ChatTemplate(tokenizer)
    except UserError as error:
        return PromptFormat(), f"{error}; messages are read as turns"
    return PromptFormat(chat="template", chat_template=digest_of_template(tokenizer)), ""


def _found(run: Run, config: RunConfig) -> dict[str, Any]:
    """Return a stage's format, and notes, on the rank that asks."""
    options = {name: getattr(config.data, name) for name in OPTIONS}
    own = read_prompt_format(run.directory) if has_begun(run.directory) else None
    if own is not None:
        return {"format": asdict(own.having(options)), "others": {}, "notes": []}
    networks = networks_of(config)
    formats = {name: prompt_format_beside(network.path) for name, network in networks.items()}
    notes: list[str] = []
    first = next((name for name in _FIRST if name in networks), None)
    kept = formats.get(first) if first else PromptFormat()
    if kept is None:
        kept, note = default_format(run.tokenizer)
        notes += [note] if note else []
    form = kept.having(options)
    if form.chat == "template":
        form = replace(form, chat_template=digest_of_template(run.tokenizer))
    others = {}
    for name, network in networks.items():
        theirs = formats[name]
        if theirs is not None:
            _check(config, name, theirs, form, kept)
            if name not in _FIRST:
                others[_option(name, network)] = asdict(theirs)
        elif network.path.exists() and not (name in _FIRST and is_foreign(network.path)):
            notes.append(
                f"{network.path}: nothing says in which form it was trained to read prompts; this "
                f"run has {_told(form)}"
            )
    return {"format": asdict(form), "others": others, "notes": notes}


def _option(name: str, network: NamedNetwork) -> str:
    """Return the option that names a network, as it is given."""
    return f"--{name.replace('_', '-')} {network.path}"


def _check(
    config: RunConfig, name: str, theirs: PromptFormat, form: PromptFormat, kept: PromptFormat
) -> None:
    """Raise UserError where a network was trained with another format than a stage's. kept: of the
    run before, which leaves open what it was not trained with."""
    found = format_differences(theirs, form)
    if not found:
        return
    options = {each: getattr(theirs, each) for each in found if each in OPTIONS}
    remedy = "train that one in this form too"
    if options and not format_differences(kept, form.having(options)):
        wanted = as_options(config, {f"data.{each}": value for each, value in options.items()})
        remedy = f"give {wanted}, or {remedy}"
    raise UserError(
        f"{_option(name, networks_of(config)[name])} was trained to read prompts in another form "
        f"than this run's: {in_words(found, 'there', 'here')}; {remedy}"
    )


def _told(form: PromptFormat) -> str:
    plain = "as a message" if form.plain_prompts == "message" else f"with {form.prompt_suffix!r}"
    return f"plain prompts {plain}, dialogues by {form.chat}"
