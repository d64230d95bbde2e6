"""What is amiss between the prompts that a run reads and the form that they are given.

Pure functions, as engine/cautions/of_data.py. Thresholds are our choice.
"""

from collections.abc import Sequence

from engine.alarms import Alarm
from engine.data.prompt_format import DIALOGUES, TEXTS, Prompt, PromptFormat
from engine.data.renderer import Renderer
from engine.data.tokenizer import Tokenizer

_MOST_SPACED = 0.5  # share of replies that may begin, or of prompts that may end, with whitespace
# beside a suffix of whitespace
_MOST_STRANGE = 0.05  # share of prompts that may be of another kind


def prompt_cautions(
    renderer: Renderer, prompts: Sequence[Prompt], replies: Sequence[str] = ()
) -> list[Alarm]:
    """Return what is amiss with a file's prompts, which the renderer has made, and the replies to
    them."""
    form = renderer.form
    found = kind_cautions(form, prompts)
    for option, other in renderer.others.items():
        if (other.trained_on, other.text_turns) != (form.trained_on, form.text_turns):
            found += kind_cautions(other, prompts, option)
    found += _mixture_cautions(form, prompts) + _seam_cautions(form, prompts, replies)
    found += _system_cautions(form, prompts)
    return found + _suffix_cautions(renderer.tokenizer, prompts)


def kind_cautions(
    form: PromptFormat,
    prompts: Sequence[Prompt],
    whose: str = "the run before",
    prefix: str = "data.",
) -> list[Alarm]:
    """Return whether many of the prompts are of no kind that a model was trained on. whose: what it
    is called; prefix: of the options that say how prompts are read."""
    texts = [prompt for prompt in prompts if not prompt.is_dialogue]
    as_messages = _as_messages(form, prefix)
    if form.chat == "template" and not form.trained_on:
        strange, kind, known = texts, "plain texts", "by its tokenizer's chat template, if at all"
        remedy = as_messages
    elif form.trained_on == (DIALOGUES,):
        strange, kind, known = texts, "plain texts", "on dialogues alone"
        remedy = as_messages
    elif form.trained_on == (TEXTS,) and len(prompts) - len(texts) > _MOST_STRANGE * len(prompts):
        strange = [prompt for prompt in prompts if prompt.is_dialogue]
        kind, known = "dialogues", "on plain texts alone"
        remedy = (
            f"train it on dialogues, or with --{prefix}plain-prompts message; or give plain prompts"
        )
    elif form.trained_on == (TEXTS,) and form.text_turns:
        strange = [prompt for prompt in texts if not form.text_turns_of(prompt.text)]
        kind, known = "no dialogues in text", "mostly on such"
        remedy = f"write prompts as {form.in_text([{'role': 'user', 'content': '...'}])!r}"
    else:
        return []
    if len(strange) <= _MOST_STRANGE * len(prompts):
        return []
    counted = "all" if len(strange) == len(prompts) else f"{len(strange)} of {len(prompts)}"
    return [
        Alarm(
            "prompt_form",
            f"{counted} prompts are {kind}, and {whose} was trained {known}: it does not know this "
            f"form; {remedy}",
        )
    ]


def _mixture_cautions(form: PromptFormat, prompts: Sequence[Prompt]) -> list[Alarm]:
    """Return whether a file teaches two forms, where each is more than a few of its prompts."""
    num_texts = sum(not prompt.is_dialogue for prompt in prompts)
    if min(num_texts, len(prompts) - num_texts) <= _MOST_STRANGE * len(prompts):
        return []
    return [
        Alarm(
            "two_forms",
            f"{num_texts} of {len(prompts)} prompts are plain texts, and the others dialogues: the "
            f"model learns two forms; {_as_messages(form)}",
        )
    ]


def _as_messages(form: PromptFormat, prefix: str = "data.") -> str:
    """Return how plain prompts are made messages."""
    if form.plain_prompts == "message":
        return (
            f"they are cut out of pairs, and stay texts with --{prefix}plain-prompts message too: "
            f"give a `prompt` beside chosen and rejected, or --{prefix}fields hh for HH-RLHF's"
        )
    return f"--{prefix}plain-prompts message has each read as one message of the user's"


def _system_cautions(form: PromptFormat, prompts: Sequence[Prompt]) -> list[Alarm]:
    """Return whether a system message has no dialogue to stand before."""
    if not form.system or any(prompt.is_dialogue for prompt in prompts):
        return []
    return [
        Alarm(
            "system",
            "--data.system goes before dialogues, and all prompts are plain texts: it is in none "
            f"of them; {_as_messages(form)}",
        )
    ]


def _seam_cautions(
    form: PromptFormat, prompts: Sequence[Prompt], replies: Sequence[str]
) -> list[Alarm]:
    """Return whether whitespace closes prompts that bring their own, or whose replies do."""
    closed = [p for p in prompts if p.suffix.isspace() and not p.is_dialogue]
    num_closed, suffix = len(closed), form.prompt_suffix
    num_ended = sum(prompt.text[-1:].isspace() for prompt in closed)
    if num_ended > _MOST_SPACED * len(prompts):
        return [
            Alarm(
                "prompt_seam",
                f"{num_ended} of {len(prompts)} prompts end in whitespace, and {suffix!r} closes "
                "them all the same; --data.prompt-suffix '' leaves it out",
            )
        ]
    num_spaced = sum(reply[:1].isspace() for reply in replies)
    if not num_closed or num_spaced <= _MOST_SPACED * len(replies):
        return []
    return [
        Alarm(
            "prompt_seam",
            f"{num_spaced} of {len(replies)} replies begin with whitespace, and {suffix!r} closes "
            f"{num_closed} prompts before them: that is whitespace twice, and a line break within "
            "a sentence where the reply goes on with it; --data.prompt-suffix '' leaves it out",
        )
    ]


def _suffix_cautions(tokenizer: Tokenizer | None, prompts: Sequence[Prompt]) -> list[Alarm]:
    """Return whether a suffix is nothing to the tokenizer."""
    closed = next((p for p in prompts if p.suffix and p.tokens is None), None)
    if closed is None or tokenizer is None:
        return []
    with_it = tokenizer.encode(closed.text + closed.suffix)
    if with_it != tokenizer.encode(closed.text):
        return []
    return [
        Alarm(
            "prompt_suffix",
            f"the prompt suffix {closed.suffix!r} becomes no token: {tokenizer.path} leaves it "
            "out, and nothing parts prompts from replies; name another by --data.prompt-suffix",
        )
    ]
