"""What the networks of finished stages answer, and what they make of answers."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from engine.checkpoints.found import size_of
from engine.checkpoints.weights import load_weights
from engine.data.chat import Asked
from engine.data.examples import Example, LengthReport
from engine.data.limits import prompt_limits
from engine.data.prompt_format import Prompt, read_prompt_format
from engine.data.prompts import prompt_examples
from engine.data.renderer import Renderer
from engine.data.tokenizer import load_tokenizer
from engine.ranks.parallel import Parallel
from engine.rollout import Rollout, generate_rollout
from engine.score import read_rollout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig
from engine.training.network import Network, build_network
from models.sizes import Kind


class FinishedStages:
    """Loads the networks of the runs below one folder, and samples them as PPO would."""

    def __init__(
        self, home: Path, parallel: Parallel, numerics: Numerics, ppo: PPOConfig, *, seed: int
    ) -> None:
        self.home = home
        self.parallel = parallel
        self.numerics = numerics
        self.ppo = ppo
        self.seed = seed
        self.tokenizer = load_tokenizer(home / "sft" / "tokenizer")
        self.renderer = Renderer(read_prompt_format(home / "sft"), self.tokenizer)
        self.context_length = size_of(home / "sft", "policy").context_length

    def prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """Return plain prompts as the stages read them."""
        return [self.renderer.prompt(Asked(text)) for text in texts]

    def load(self, stage: str, kind: Kind) -> Network:
        """Return the network that a stage ended with."""
        path, role = self.home / stage, "policy" if kind == "language" else "reward_model"
        network = build_network(kind, size_of(path, role), self.parallel, numerics=self.numerics)
        load_weights(network, path, role=role)
        return network

    def fitting(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts that leave room for a whole answer; UserError when none does."""
        return [prompts[n] for n in self._encode(prompts)[1].kept]

    def answer(
        self,
        network: Network,
        prompts: Sequence[Prompt],
        on_answer: Callable[[], None] | None = None,
    ) -> tuple[Rollout, list[str]]:
        """Return one sampled answer to each of the prompts, which fit, as tokens and as text;
        on_answer() hears of each that this rank has finished."""
        rollout = generate_rollout(
            network,
            self._encode(prompts)[0],
            self.ppo.sampling,
            eos_id=self.tokenizer.eos_id,
            tokenizer=self.tokenizer,
            seed=self.seed + 1_000_003,  # other draws than training's
            first_sample_index=0,
            on_response=on_answer,
        )
        return rollout, rollout.responses(self.tokenizer)

    def read(self, network: Network, rollout: Rollout) -> Tensor:
        """Return a network's output [T] for a rollout."""
        return read_rollout(network, rollout, self.ppo.micro_batch_tokens)

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[list[Example], LengthReport]:
        limits = prompt_limits(
            {"policy": self.context_length},
            self.ppo.sampling.max_new_tokens,
            max_prompt_tokens=self.context_length,  # longer ones are judged too
        )
        examples, lengths = prompt_examples(
            prompts, self.tokenizer, max_prompt_length=limits.prompt.tokens
        )
        limits.check(lengths, "prompts")
        return examples, lengths
