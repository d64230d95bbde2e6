"""The whole recipe, small: `make quickstart`, or python recipes/quickstart.py.

A GPT of about a million parameters is pretrained, fine-tuned on demonstrations, and trained by PPO
and PPO-ptx against a reward model of rankings, in minutes on two CPU cores. Values are ours, chosen
for that size.
"""

from pathlib import Path

from engine.environment import rank_of_environment
from engine.progress import LongWork
from engine.quickstart.settings import QuickstartConfig
from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.kl import KLConfig
from engine.settings.ppo import PPOConfig, PPOData
from engine.settings.rm import RMConfig, RMData
from engine.settings.sampling import SamplingConfig
from engine.settings.sft import SFTConfig, SFTData

CONTEXT = 256

config = QuickstartConfig(
    directory=Path("runs/quickstart"),
    vocab_size=1400,
    num_demonstrations=9_000,
    faults_per_level=1.0,
    num_compared=3000,
    num_judged=500,
    pretrain=SFTConfig(
        size="tiny",
        data=SFTData(pretraining_tokens=CONTEXT),
        batch_size=16,
        micro_batch_tokens=4096,
        # At 3e-3 the model settles on word statistics and SFT no longer learns to copy facts.
        adam=AdamConfig(lr=1e-3, warmup=10),
        dropout=0.0,
        eval_every=37,  # a look at what is held out takes the time of two steps
    ),
    sft=SFTConfig(
        data=SFTData(pretraining_fraction=0.1, pretraining_tokens=64, max_tokens=CONTEXT),
        batch_size=16,
        micro_batch_tokens=4096,
        adam=AdamConfig(lr=3e-3, warmup=20),
        dropout=0.0,
        eval_every=160,
    ),
    rm=RMConfig(
        data=RMData(max_tokens=CONTEXT, num_demonstrations=256),
        epochs=1.0,
        batch_size=4,
        micro_batch_tokens=8192,
        # At 7e-4 the trunk forgets what SFT taught it: 0.76 of the held-out pairs instead of 0.82.
        adam=AdamConfig(lr=2.5e-4, warmup=10),
        eval_every=250,
    ),
    ppo=PPOConfig(
        data=PPOData(pretraining_tokens=128, num_valid=64),
        sampling=SamplingConfig(max_new_tokens=64, num_slots=256),
        iterations=60,
        eval_every=15,  # a look takes half an iteration's time, or all of it
        rollout_batch_size=64,
        minibatch_size=32,
        micro_batch_tokens=4096,
        kl=KLConfig(coef=0.15),
        ptx_coef=1.0,
        ptx_examples_per_episode=1,
        adam=AdamConfig(lr=2e-4, schedule="constant", warmup=3),
        critic_adam=AdamConfig(lr=1e-3, schedule="constant", warmup=3),
    ),
)


def train(config: QuickstartConfig) -> None:
    """Run it, once torch is imported: that takes seconds, which a wrong option need not wait for,
    and in which something is said."""
    with LongWork("start: torch and megatron-core", is_writer=rank_of_environment() == 0):
        from engine.quickstart.run import run
    run(config)


if __name__ == "__main__":
    run_stage(train, config, has_dry_run=False)
