"""Configuration of the quickstart: the whole recipe on a small model."""

from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import UserError, quoted
from engine.settings.checks import check_numbers
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig
from engine.settings.waiting import WaitingConfig


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """One pass through the recipe."""

    directory: Path = Path("runs/quickstart")
    """Everything is written below it; finished stages of an earlier start are kept."""
    data: Path | None = None
    """Folder of files to train on instead of the made ones: demonstrations.jsonl,
    comparisons.jsonl, prompts.jsonl and pretraining.jsonl or .txt, or other containers of rows or
    folders by these names (recipes/DATA.md); a tenth of the prompts is held out. Or a tree with its
    own split:
    {sft,comparisons,prompts}/TASK*.{train,val}.jsonl[.gz] and pretrain/{train,val}.jsonl[.gz]."""
    task: str = "e2e"
    """Which files of a tree: their names begin with it."""
    vocab_size: int = 1500
    """Entries of the sentencepiece tokenizer that is trained."""
    num_pretraining_tokens: int = 300_000
    """Tokens that the base model is trained on, drawn from all of the text."""
    num_demonstrations: int = 6000
    """Made demonstrations, or from files: demonstrations seen, fewer ones being read again."""
    num_compared: int = 800
    """Prompts whose completions are sampled from the SFT model and ranked; a tenth is held out."""
    faults_per_level: float = 3.0
    """Faults by which the scripted labeler tells two completions apart; closer ones tie."""
    num_prompts: int = 2000
    """Made prompts for PPO."""
    num_judged: int = 300
    """Held-out prompts that the four models answer at the end."""
    pretrain: SFTConfig = field(default_factory=SFTConfig)
    """The base model's stage; files and folder are filled in."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """The RLHF initialisation's stage; files and folder are filled in."""
    rm: RMConfig = field(default_factory=RMConfig)
    """The reward model's stage; files and folder are filled in."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """PPO-ptx's stage, and with ptx_coef 0 PPO's; files and folder are filled in."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Parallelism of every stage."""
    waiting: WaitingConfig = field(default_factory=WaitingConfig)
    """How long ranks wait for one that does not come or is silent."""
    numerics: Numerics = field(default_factory=Numerics)
    """Dtype of every stage."""
    seed: int = 0
    """Of every stage."""
    accept_changed: tuple[str, ...] = ()
    """What may differ from what the stages of an earlier start were made from: of every stage that
    knows the name."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            counts="vocab_size num_pretraining_tokens num_demonstrations num_compared num_prompts"
            " num_judged",
            not_negative="faults_per_level seed",
        )
        if not set(self.task).isdisjoint("/*?[]"):
            raise UserError(f"task {quoted(self.task)} must be the beginning of file names")
