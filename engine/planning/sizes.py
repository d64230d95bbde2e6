"""The sizes of a stage's networks and what says so: what is at the paths that its settings name, or
the named sizes. Imports neither torch nor megatron.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH, hub_name
from engine.huggingface.described import stored_size
from engine.identity.made_from import networks_of
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig
from engine.settings.size import banded, check_named_size, check_starts, named_size
from models.sizes import GPTSize

StageConfig = SFTConfig | RMConfig | PPOConfig

SELECTOR = "6b"  # what selects SFT's epoch where its run is not there: the paper's is this


@dataclass(frozen=True, kw_only=True)
class NetworkSize:
    """The size of a network, and what says that it has it."""

    size: GPTSize
    origin: str
    """In words: a path, or a named size and why that was taken."""
    is_found: bool = False
    """Whether a model that is there has it; else it is a setting's."""

    def __str__(self) -> str:
        size = self.size
        return (
            f"{size.num_layers} layers of {size.hidden_size}, {size.num_heads} heads "
            f"({size.num_kv_heads} of keys and values), vocabulary {size.vocab_size:,}, context "
            f"{size.context_length:,}; {self.origin}"
        )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a stage's networks: SFT has a policy, RM a reward model, PPO both."""

    policy: NetworkSize | None = None
    reward_model: NetworkSize | None = None
    """PPO's critic is its like; in SFT the one that selects the epoch."""
    reference: NetworkSize | None = None
    """PPO's, where one is named; else it is the policy's like."""

    @property
    def trained_network(self) -> NetworkSize:
        """What the stage trains: of PPO's networks the policy."""
        found = self.policy or self.reward_model
        assert found is not None  # every stage has one of them
        return found

    @property
    def trained(self) -> GPTSize:
        """The size of that."""
        return self.trained_network.size

    def lines(self) -> Iterator[str]:
        """Yield what each has, and what says so, in a line."""
        for role, found in vars(self).items():
            if found is not None:
                yield f"{role.replace('_', ' ')}: {found}"


def named_sizes(config: StageConfig) -> Sizes:
    """Return the sizes that a stage's settings name, whatever is at its paths; raises UserError
    where they name none. A reward model of no named size is taken for one of the policy's."""
    return _sizes(config, looks=False)


def sizes_at(config: StageConfig) -> Sizes:
    """Return the sizes of the networks that a stage starts from: those of the runs, checkpoints and
    Hugging Face folders that are there, the named ones for others.

    Of a Hugging Face folder config.json is enough. Raises UserError for what is no network, and
    where one has another size than PPO's settings name.
    """
    return _sizes(config, looks=True)


def _sizes(config: StageConfig, *, looks: bool) -> Sizes:
    if isinstance(config, PPOConfig):
        return _ppo_sizes(config, looks=looks)
    check_starts(config.size, config.init_from)
    start = _size(config, "init_from", config.size, looks=looks)
    if isinstance(config, RMConfig):
        return Sizes(reward_model=start)
    if config.band:
        origin = f"{start.origin}, with a band of {config.band} tokens in every second layer"
        start = NetworkSize(size=banded(start.size, config.band), origin=origin)
    if config.selection.reward_model is None:
        return Sizes(policy=start)
    selector = _size(config, "selection.reward_model", SELECTOR, looks=looks)
    return Sizes(policy=start, reward_model=selector)


def _ppo_sizes(config: PPOConfig, *, looks: bool) -> Sizes:
    policy = _size(config, "policy", config.size, looks=looks)
    check_named_size(config.size, policy.size, config.policy, "policy")
    role, name, alike = "reward_model", config.reward_model_size, ("the policy's", policy.size)
    scorer = _size(config, role, name, looks=looks, like=alike)
    check_named_size(name, scorer.size, config.reward_model, role)
    reference = None
    if config.reference is not None:
        reference = _size(config, "reference", "", looks=looks, like=alike)
    return Sizes(policy=policy, reward_model=scorer, reference=reference)


def _size(
    config: StageConfig,
    option: str,
    name: str,
    *,
    looks: bool,
    like: tuple[str, GPTSize] | None = None,
) -> NetworkSize:
    """Return the size of the network that an option names: of the copy that its run has begun with,
    or of what is at the path. Where neither is, or nobody looks, it is the named one, or else that
    of `like`, with words for it."""
    network, reason = networks_of(config).get(option), ""
    if network is not None and looks:
        for path in (config.directory / "sources" / network.kept_as, network.path):
            if path.exists():
                size, where = stored_size(path, network.role)
                origin = f"as {named(where, MAX_SHOWN_PATH)} says"
                return NetworkSize(size=size, origin=origin, is_found=True)
        flag, shown = option.replace("_", "-"), named(network.path, MAX_SHOWN_PATH)
        reason = f", for --{flag} {shown} is not there{hub_name(network.path)}"
    if name:
        return NetworkSize(size=named_size(name), origin=f"the size {name}{reason}")
    if like is not None:
        return NetworkSize(size=like[1], origin=f"{like[0]}{reason}")
    raise UserError(f"a plan needs --size{reason}")
