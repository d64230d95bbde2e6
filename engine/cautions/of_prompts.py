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


def prompt_cautions(
    renderer: Renderer, prompts: Sequence[Prompt], replies: Sequence[str] = ()
) -> list[Alarm]:
    """Return what is amiss with a file's prompts, which the renderer has made, and the replies to
    them."""
    found = _kind_cautions(renderer.form, prompts) + _seam_cautions(renderer.form, prompts, replies)
    found += _system_cautions(renderer.form, prompts)
    return found + _suffix_cautions(renderer.tokenizer, prompts)


def _kind_cautions(form: PromptFormat, prompts: Sequence[Prompt]) -> list[Alarm]:
    """Return whether no prompt is of the kind that the run before was trained on."""
    num_dialogues = sum(prompt.is_dialogue for prompt in prompts)
    if form.chat == "template" and not form.trained_on and not num_dialogues:
        problem, remedy = (
            "the prompts are plain texts, and the tokenizer has a chat template, by which its "
            "model was trained, if it was to answer",
            _as_messages(form),
        )
    elif form.trained_on == (DIALOGUES,) and not num_dialogues:
        problem, remedy = (
            "the prompts are plain texts, and the run before was trained on dialogues alone",
            _as_messages(form),
        )
    elif form.trained_on == (TEXTS,) and num_dialogues == len(prompts):
        problem, remedy = (
            "the prompts are dialogues, and the run before was trained on plain texts alone",
            "train it on dialogues, or with --data.plain-prompts message; or give plain prompts",
        )
    elif (
        form.trained_on == (TEXTS,)
        and form.text_turns
        and not any(form.text_turns_of(prompt.text) for prompt in prompts)
    ):
        asked = form.in_text([{"role": "user", "content": "..."}])
        problem, remedy = (
            "no prompt is a dialogue in text, and the run before was trained on such alone",
            f"write prompts as {asked!r}",
        )
    else:
        return []
    return [Alarm("prompt_form", f"{problem}: it does not know this form; {remedy}")]


def _as_messages(form: PromptFormat) -> str:
    """Return how plain prompts are made messages."""
    if form.plain_prompts == "message":
        return (
            "they are cut out of pairs, which stay texts with --data.plain-prompts message too: "
            "give a `prompt` beside chosen and rejected, or --data.fields hh for HH-RLHF's"
        )
    return "--data.plain-prompts message has each read as one message of the user's"


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
