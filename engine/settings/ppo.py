"""One run of engine/ppo.py. Imports neither torch nor megatron."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from engine.errors import UserError
from engine.settings.adam import AdamConfig
from engine.settings.alarms import AlarmConfig
from engine.settings.checks import check_numbers
from engine.settings.kl import KLConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.prompt_options import PromptOptions
from engine.settings.residency import ResidencyConfig
from engine.settings.sampling import SamplingConfig
from engine.settings.saved import EARLIER
from engine.settings.saving import SaveConfig
from engine.settings.spikes import SpikeConfig
from engine.settings.waiting import WaitingConfig

EosRule = Literal["none", "penalty", "replace"]


@dataclass(frozen=True, kw_only=True)
class PPOData(PromptOptions):
    """What the stage reads."""

    prompts: Path = Path("data/prompts.jsonl")
    """Prompts {prompt}, a file in any container, a folder, or "A@2,B@0.5" with weights (README.md,
    Your data)."""
    valid: Path | None = None
    """Held-out prompts; none: valid_fraction of the training prompts."""
    valid_fraction: float = field(default=0.05, metadata={EARLIER: 0.0})
    """Share of the distinct prompts held out where no valid file is given."""
    num_valid: int = 256
    """Most prompts held out, or answered of a valid file, the first distinct ones. Our choice: the
    mean reward is then known to a sixteenth of its spread, and ten evaluations are 1% of the
    paper's episodes."""
    pretraining: Path = Path("data/pretraining.jsonl")
    """Pretraining text for the ptx gradients; read when ptx_coef > 0."""
    pretraining_valid: Path | None = None
    """Held-out pretraining text; read without ptx too, for it shows what PPO forgets."""
    pretraining_tokens: int = 2048
    """Length of a pretraining sequence in tokens; not stated, our choice: the context, as the
    paper's compute suggests."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted (paper, app. C: over 1k tokens)."""
    fields: str = field(default="auto", metadata={EARLIER: "auto"})
    """Which fields of prompts are read, and as what: auto, by the keys of the first good row; the
    name of a shape (recipes/DATA.md); or OURS=THEIRS,... as prompt=question. text=THEIRS names the
    field of pretraining text."""
    too_long: Literal["drop", "cut-left"] = field(default="drop", metadata={EARLIER: "drop"})
    """What becomes of a prompt over its limit: drop, as the paper does; or cut-left, it loses its
    beginning, which a dialogue must not."""
    skip_bad_lines: bool = False
    """Count and report bad lines instead of stopping at the first."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.", counts="num_valid", shares="valid_fraction")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """One PPO run."""

    directory: Path = Path("runs/ppo")
    """The run's folder; a run that has checkpoints there continues from the newest."""
    policy: Path = Path("runs/init")
    """Run or checkpoint of the RLHF initialisation, or a Hugging Face folder: the policy starts
    from it and the KL is measured to it."""
    reference: Path | None = None
    """Another KL reference, likewise; none: the policy's own start (paper, C.4)."""
    reward_model: Path = Path("runs/rm")
    """Run or checkpoint of the reward model; the critic starts from it, head and bias included
    (paper, C.4)."""
    size: str = ""
    """Named size (models/sizes.py) that the policy must have, and that plans are made for; "":
    whatever the checkpoint holds."""
    reward_model_size: str = ""
    """Named size that reward model and critic must have (paper, C.4: 6B for every policy); "":
    whatever the checkpoint holds."""
    data: PPOData = field(default_factory=PPOData)
    """Files and limits."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=1024))
    """Rollouts (paper, C.4: temperature 1; app. C: responses up to 1k tokens)."""
    iterations: int = 500
    """Rollout batches (paper, C.4: 256k episodes in batches of 512)."""
    rollout_batch_size: int = 512
    """Episodes of an iteration, over all ranks (paper, C.4: 512)."""
    minibatch_size: int = 64
    """Episodes of an optimizer step, over all ranks (paper, C.4: 64)."""
    ppo_epochs: int = 1
    """Passes over an iteration's episodes (paper, C.4: 1)."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward pass on one rank; changes speed and memory, nothing else."""
    kl: KLConfig = field(default_factory=KLConfig)
    """KL penalty."""
    gamma: float = 1.0
    """Discount (paper, C.4: none)."""
    lam: float = 0.95
    """GAE's lambda; not stated, our choice: Stiennon et al. 2020."""
    cliprange: float = 0.2
    """Policy ratio clip (paper, C.4: 0.2)."""
    value_cliprange: float | None = 0.2
    """Value clip; not stated, our choice: Ziegler et al. 2019's code. None: no clip."""
    whiten_advantages: bool = True
    """Shift and scale advantages over the global rollout batch; not stated, our choice: Ziegler et
    al. 2019's code."""
    policy_logprobs: Literal["auto", "sampled", "scored"] = "auto"
    """Where the log-probs are from that ratios and KL are taken against: "sampled", those that the
    sampler drew by; "scored", the trainer's own forward pass over the finished responses; "auto":
    sampled in fp32, where both are the same up to rounding and a sixteenth of the responses is read
    again to check it; scored in 16 bits, where they are 0.01 nats a token apart. Not stated, our
    choice."""
    eos_rule: EosRule = "none"
    """What becomes of the score of a response that hit the length limit; not stated, our choice:
    nothing."""
    eos_penalty: float = 1.0
    """The number of the eos_rule (Ziegler et al. 2019's code: replace by -1)."""
    ptx_coef: float = 27.8
    """gamma of InstructGPT eq. 2 (paper, C.4: 27.8); 0 is plain PPO."""
    ptx_examples_per_episode: int = 8
    """Pretraining sequences an episode (paper, C.4: 8)."""
    ema_decay: float = 0.992
    """Decay of the averaged weights (paper, C.4: 0.992), an optimizer step: our choice."""
    adam: AdamConfig = field(
        default_factory=lambda: AdamConfig(lr=5.49e-6, schedule="constant", warmup=10)
    )
    """Policy optimizer (paper, C.4: constant lr after 10 iterations of warm-up from a tenth; the lr
    by size is not stated)."""
    critic_adam: AdamConfig = field(
        default_factory=lambda: AdamConfig(lr=9e-6, schedule="constant", warmup=10)
    )
    """Critic optimizer (paper, C.4: 9e-6, 5e-6 at 175B)."""
    numerics: Numerics = field(default_factory=Numerics)
    """Dtype and recomputation."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Parallelism of policy and reference."""
    critic_layout: ParallelLayout | None = None
    """Parallelism of critic and reward model, on the same ranks; none: the policy's. A critic much
    smaller than the policy wants less tensor and pipeline parallelism."""
    generation_layout: ParallelLayout | None = None
    """Parallelism of the policy while it generates, on the same ranks; none: the policy's. A
    pipeline decodes slowly: tp, or dp, in its place costs a copy of the weights, brought up to date
    before every rollout and given up after it."""
    residency: ResidencyConfig = field(default_factory=ResidencyConfig)
    """Which weights and optimizer state leave the GPU while nobody reads them."""
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    """When a number is called wrong."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """What is done about a loss or a gradient that leaps."""
    seed: int = 0
    """Shuffling and sampling."""
    eval_every: int | None = None
    """Iterations between answers to held-out prompts; none: about ten times over the run; 0: only
    at the end."""
    accept_changed: tuple[str, ...] = ()
    """What may differ from what the run was made from, for once: data.train, torch, code, ...; it
    is recorded in identity.json."""
    saving: Annotated[SaveConfig, tyro.conf.arg(name="")] = field(default_factory=SaveConfig)
    """Checkpoints: when they are written and which are kept; its options have no prefix."""
    waiting: WaitingConfig = field(default_factory=WaitingConfig)
    """How long ranks wait for one that does not come or is silent."""
    num_shown: int = 2
    """Sample texts in the table of an iteration."""
    show_every: int = 10
    """Iterations between sample tables."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            counts="iterations rollout_batch_size minibatch_size ppo_epochs show_every",
            positive="cliprange value_cliprange",
            not_negative="eos_penalty ptx_coef seed eval_every num_shown",
            shares="gamma lam ema_decay",
        )
        check_numbers(self, counts="micro_batch_tokens ptx_examples_per_episode")
        if self.rollout_batch_size % self.minibatch_size:
            raise UserError(
                f"--rollout-batch-size {self.rollout_batch_size} must be a multiple of "
                f"--minibatch-size {self.minibatch_size}"
            )
        self.kl.check_batch(self.rollout_batch_size)

    @property
    def num_updates(self) -> int:
        """The optimizer steps of an iteration."""
        return self.ppo_epochs * self.rollout_batch_size // self.minibatch_size

    @property
    def scores_policy(self) -> bool:
        """Whether the policy reads all its responses again, for its log-probs."""
        is_exact = self.numerics.dtype == "fp32"
        return self.policy_logprobs == "scored" or (self.policy_logprobs == "auto" and not is_exact)

    def check_generation_layout(self) -> None:
        """Raise UserError where the policy's weights cannot be copied into generation_layout."""
        if self.generation_layout is None:
            return
        try:
            self.layout.check_refit(self.generation_layout)
        except UserError as error:
            raise UserError(f"generation_layout: {error}".replace("--layout.", "")) from None
