"""One run of engine/rm.py. Imports neither torch nor megatron."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from engine.errors import UserError
from engine.settings.adam import AdamConfig
from engine.settings.alarms import LossAlarmConfig
from engine.settings.checks import check_epochs, check_numbers
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.prompt_options import PromptOptions
from engine.settings.saved import EARLIER
from engine.settings.saving import SaveConfig
from engine.settings.spikes import SpikeConfig
from engine.settings.waiting import WaitingConfig


@dataclass(frozen=True, kw_only=True)
class RMData(PromptOptions):
    """What the stage reads."""

    train: Path = Path("data/comparisons.jsonl")
    """Comparisons {prompt, completions, ranks} or pairs {prompt, chosen, rejected}, a file in any
    container, a folder, or "A@2,B@0.5" with weights (README.md, Your data)."""
    valid: Path | None = None
    """Held-out comparisons; none: valid_fraction of the training prompts."""
    valid_fraction: float = 0.05
    """Share of the distinct prompts held out where no valid file is given."""
    demonstrations: Path | None = None
    """Demonstrations whose mean score the bias shift sets to 0; none: no shift."""
    num_demonstrations: int = 1024
    """Demonstrations that are scored for the shift, the first ones; our choice."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted (paper, app. C: over 1k tokens)."""
    max_tokens: int = 2048
    """Longer sequences are dropped with their whole comparison and counted (paper, app. C: 2k
    context)."""
    fields: str = field(default="auto", metadata={EARLIER: "auto"})
    """Which fields of comparisons are read, and as what: auto, by the keys of the first good row;
    the name of a shape (recipes/DATA.md); or OURS=THEIRS,... as prompt=question,scores=ratings."""
    too_long: Literal["drop", "cut-left", "cut-right"] = field(
        default="drop", metadata={EARLIER: "drop"}
    )
    """What becomes of a comparison over a limit: drop, as the paper does; cut-left, its prompt
    loses its beginning, which a dialogue must not. cut-right is refused: a score is read at the
    end."""
    skip_bad_lines: bool = False
    """Count and report bad lines instead of stopping at the first."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.", counts="num_demonstrations", shares="valid_fraction")
        if self.too_long == "cut-right":
            raise UserError(
                "--data.too-long cut-right takes the end off a completion, where its score is "
                "read; give drop or cut-left"
            )


@dataclass(frozen=True, kw_only=True)
class RMConfig:
    """One reward model run."""

    directory: Path = Path("runs/rm")
    """The run's folder; a run that has checkpoints there continues from the newest."""
    size: str = "tiny"
    """Named size of a model that starts from nothing; with init_from its size, and this may be
    ""."""
    init_from: Path | None = None
    """A run or checkpoint whose policy the trunk starts from, or a Hugging Face folder (paper, C.2:
    SFT and GPT-3 give similar results)."""
    tokenizer: Path | None = None
    """Tokenizer file or folder; none: the one that lies with init_from."""
    data: RMData = field(default_factory=RMData)
    """Files and limits."""
    epochs: float = 1.0
    """Passes over the comparisons (paper, C.2: 1; more overfits fast)."""
    batch_size: int = 64
    """Prompts a step, each with all its completions (paper, C.2: 64)."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward pass on one rank; a prompt's completions stay in one."""
    share_prompts: bool = field(default=True, metadata={EARLIER: False})
    """Compute a prompt once for all its completions, which go on from it; otherwise once for each.
    Our choice: scores and gradients are the same but for rounding, and tokens are spared; a run may
    go on with the other."""
    adam: AdamConfig = field(default_factory=lambda: AdamConfig(lr=9e-6))
    """Optimizer (paper, C.2: lr 9e-6, cosine to 10%)."""
    alarms: LossAlarmConfig = field(default_factory=LossAlarmConfig)
    """When a number of a step is called wrong."""
    numerics: Numerics = field(default_factory=Numerics)
    """Dtype and recomputation."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Parallelism."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """What is done about a loss or a gradient that leaps."""
    seed: int = 0
    """Shuffling and initialisation."""
    eval_every: int | None = None
    """Steps between held-out accuracies; none: about ten times over the run; 0: only at the end."""
    accept_changed: tuple[str, ...] = ()
    """What may differ from what the run was made from, for once: data.train, torch, code, ...; it
    is recorded in identity.json."""
    saving: Annotated[SaveConfig, tyro.conf.arg(name="")] = field(default_factory=SaveConfig)
    """Checkpoints: when they are written and which are kept; its options have no prefix."""
    waiting: WaitingConfig = field(default_factory=WaitingConfig)
    """How long ranks wait for one that does not come or is silent."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            counts="batch_size micro_batch_tokens",
            positive="epochs",
            not_negative="seed eval_every",
        )
        check_epochs(self.epochs)
