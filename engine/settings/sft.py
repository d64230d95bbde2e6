"""One run of engine/sft.py: SFT, the RLHF initialisation or pretraining.

Imports neither torch nor megatron.
"""

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
from engine.settings.sampling import SamplingConfig
from engine.settings.saved import EARLIER
from engine.settings.saving import SaveConfig
from engine.settings.spikes import SpikeConfig
from engine.settings.waiting import WaitingConfig


@dataclass(frozen=True, kw_only=True)
class SFTData(PromptOptions):
    """What the stage reads."""

    train: Path | None = None
    """Demonstrations {prompt, response}, a file in any container, a folder, or "A@2,B@0.5" with
    weights (README.md, Your data); none: plain language modelling."""
    valid: Path | None = None
    """Held-out demonstrations; none: valid_fraction of the training prompts."""
    valid_fraction: float = 0.05
    """Share of the distinct prompts held out where no valid file is given."""
    pretraining: Path | None = None
    """Pretraining text {text}, or .txt and .md; files as those of train."""
    pretraining_valid: Path | None = None
    """Held-out pretraining text."""
    pretraining_fraction: float = 0.0
    """Share of the sequences, and weight in the loss, of pretraining text (paper, C.3: 10%; what it
    is a share of is not stated)."""
    pretraining_tokens: int = 2048
    """Length of a pretraining sequence in tokens (GPT-3: the context)."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted (paper, app. C: over 1k tokens)."""
    max_tokens: int = 2048
    """Longer sequences, prompt and response together, are dropped and counted (paper, app. C: 2k
    context)."""
    replies: Literal["last", "all"] = field(default="last", metadata={EARLIER: "last"})
    """Which of the assistant's messages are trained; one with a weight of 0 is not. Our choice: the
    paper's demonstrations have one response."""
    fields: str = field(default="auto", metadata={EARLIER: "auto"})
    """Which fields of demonstrations are read, and as what: auto, by those of the first good row;
    the name of a shape (recipes/DATA.md); or OURS=THEIRS,... as prompt=question,response=answer.
    text=THEIRS names the field of pretraining text."""
    too_long: Literal["drop", "cut-left", "cut-right"] = field(
        default="drop", metadata={EARLIER: "drop"}
    )
    """What becomes of an example over a limit: drop, as the paper does; cut-left, its prompt loses
    its beginning, which a dialogue must not; cut-right, its response loses its end, the end of text
    with it."""
    skip_bad_lines: bool = False
    """Count and report bad lines instead of stopping at the first."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.", shares="valid_fraction")
        if not 0.0 <= self.pretraining_fraction < 1.0:
            raise UserError(
                f"--data.pretraining-fraction must be in [0, 1), got {self.pretraining_fraction}"
            )


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which epoch's weights the run is known by: those whose responses to held-out prompts a reward
    model scores highest (paper, 3.5), or the last."""

    reward_model: Path | None = None
    """Run or checkpoint of the reward model, of any size; none: no selection."""
    prompts: Path | None = None
    """Held-out prompts {prompt}; none: those of the held-out demonstrations."""
    num_prompts: int = 512
    """Prompts answered after each epoch, the first distinct ones; not stated, our choice."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=1024))
    """How the responses are drawn, the same draws each epoch; not stated, our choice: as PPO's
    rollouts."""

    def __post_init__(self) -> None:
        check_numbers(self, "selection.", counts="num_prompts")


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """One supervised run."""

    directory: Path = Path("runs/sft")
    """The run's folder; a run that has checkpoints there continues from the newest."""
    size: str = "tiny"
    """Named size (models/sizes.py) of a model that starts from nothing; with init_from its size,
    and this may be ""."""
    band: int = field(default=0, metadata={EARLIER: 0})
    """Tokens that every second layer of a model that starts from nothing attends to, the token
    itself among them: GPT-3's alternating dense and locally banded layers (Brown et al. 2020, 2.1).
    0: all layers are dense, our choice; the papers state no band."""
    init_from: Path | None = None
    """A run or checkpoint whose policy the weights start from, or a Hugging Face folder."""
    tokenizer: Path | None = None
    """Tokenizer file or folder; none: the one that lies with init_from."""
    data: SFTData = field(default_factory=SFTData)
    """Files and limits."""
    epochs: float = 16.0
    """Passes over the demonstrations (paper, C.1: 16; C.3: 2), or over the pretraining text without
    any."""
    batch_size: int = 32
    """Sequences a step, demonstrations and pretraining together (paper, C.1: 32; 8 at 175B)."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward pass on one rank; changes speed and memory, nothing else."""
    adam: AdamConfig = field(default_factory=lambda: AdamConfig(lr=9.65e-6))
    """Optimizer (paper, C.1: lr 9.65e-6, cosine to 10%, no warm-up)."""
    dropout: float = 0.2
    """Residual dropout (paper, C.1: 0.2)."""
    alarms: LossAlarmConfig = field(default_factory=LossAlarmConfig)
    """When a number of a step is called wrong."""
    numerics: Numerics = field(default_factory=Numerics)
    """Dtype and recomputation."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Parallelism."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """What is done about a loss or a gradient that leaps."""
    seed: int = 0
    """Shuffling, initialisation, dropout."""
    eval_every: int | None = None
    """Steps between held-out losses; none: about ten times over the run; 0: only at the end."""
    accept_changed: tuple[str, ...] = ()
    """What may differ from what the run was made from, for once: data.train, torch, code, ...; it
    is recorded in identity.json."""
    saving: Annotated[SaveConfig, tyro.conf.arg(name="")] = field(default_factory=SaveConfig)
    """Checkpoints: when they are written and which are kept; its options have no prefix."""
    waiting: WaitingConfig = field(default_factory=WaitingConfig)
    """How long ranks wait for one that does not come or is silent."""
    save_every_epoch: bool = False
    """Write the weights at the end of each epoch, and keep them all; a selection does so too."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Selection of an epoch by reward (paper, 3.5)."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            counts="batch_size micro_batch_tokens",
            positive="epochs",
            not_negative="band seed eval_every",
            shares="dropout",
        )
        check_epochs(self.epochs)
        if self.band and self.init_from is not None:
            raise UserError(
                f"--band {self.band} is of a model that starts from nothing; with --init-from that "
                "model's own layers count: leave one of the two out"
            )

    @property
    def num_pretraining_sequences(self) -> int:
        """A batch's sequences of pretraining text, where it is mixed in: rounded, and at least one;
        0 where the fraction is."""
        fraction = self.data.pretraining_fraction
        return max(1, round(fraction * self.batch_size)) if fraction else 0
