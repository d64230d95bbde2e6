"""Settings of generation from a checkpoint: a batch of prompts, or a dialogue."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.settings.checks import check_numbers
from engine.settings.layout import ParallelLayout
from engine.settings.sampling import SamplingConfig
from engine.settings.typed_text import TypedText
from engine.settings.waiting import WaitingConfig


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """A batch of prompts, or without `prompts` a dialogue in the terminal."""

    source: Path | None = None
    """A run, one of its checkpoints, a network in one, or a Hugging Face folder."""
    role: str = "policy"
    """Which network of a checkpoint: policy or ema."""
    strict: bool = False
    """Refuse a run whose newest checkpoint is damaged, instead of taking the newest whole one."""
    tokenizer: Path | None = None
    """Tokenizer file or folder; none: the one that lies with the source."""
    prompts: Path | None = None
    """Prompts to answer, {"prompt"} or {"messages"}, a file in any container, a folder or a list
    (README.md, Your data)."""
    out: Path = Path("responses.jsonl")
    """Their answers: {"prompt", "response", "sample", "tokens", "logprob", "has_eos"} a line, in
    the prompts' order. Until all are there they are kept in OUT.partial, where the same command
    goes on. An OUT that was made from anything else is not replaced."""
    overwrite: bool = False
    """Replace OUT, whatever it holds."""
    num_samples: int = 1
    """Answers to each prompt."""
    prompt_suffix: TypedText | None = None
    r"""Closes every plain prompt that is not open; \n is a line break. None: as the source was
    trained."""
    chat: Literal["turns", "template"] | None = None
    """How messages are written: as turns "User: ...", or by the tokenizer's chat template. None: as
    the source was trained; a Hugging Face folder's by its template, where it has one."""
    plain_prompts: Literal["text", "message"] | None = None
    """A plain prompt is read as the text that it is, or as one message of the user's. None: as the
    source was trained."""
    system: TypedText | None = None
    """Put before messages that begin without a system's. None: as the source was trained."""
    fields: str = "auto"
    """Which fields of prompts are read, and as what: auto, by the keys of the first good row; the
    name of a shape (recipes/DATA.md); or OURS=THEIRS, as prompt=question."""
    too_long: Literal["drop", "cut-left"] = "drop"
    """What becomes of a prompt that leaves no room for an answer: drop; or cut-left, it loses its
    beginning, which a dialogue must not."""
    skip_bad_lines: bool = False
    """Count and report bad lines instead of stopping at the first."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=256))
    """How answers are drawn."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of weights and computation."""
    seed: int = 1
    """Seeds the draws."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Ranks that share the model; those left over share the prompts."""
    waiting: WaitingConfig = field(default_factory=WaitingConfig)
    """How long ranks wait for one that does not come or is silent."""

    def __post_init__(self) -> None:
        check_numbers(self, counts="num_samples", not_negative="seed")
