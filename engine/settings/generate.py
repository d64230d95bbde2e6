"""Settings of generation from a checkpoint: a batch of prompts, or a dialogue."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.settings.checks import check_numbers
from engine.settings.layout import ParallelLayout
from engine.settings.sampling import SamplingConfig
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
    prompt_suffix: str = "\n"
    """Closes every prompt, as in training; what a chat template writes is closed already."""
    chat: Literal["auto", "template", "turns"] = "auto"
    """How messages are read: by the tokenizer's chat template, or as turns "User: ..." as our
    stages train them; auto: a Hugging Face folder's by its template, where it has one."""
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
