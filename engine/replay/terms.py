"""The loss of a skipped step, term by term, from what was kept of it."""

import torch

from engine.data.examples import Unit
from engine.errors import UserError
from engine.evidence.case import Case
from engine.feed import pack_for, step_batch
from engine.losses import clipped_value_loss, comparison_loss
from engine.ranks.parallel import Parallel
from engine.replay.kept import SOURCES, KeptConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig
from engine.sft import supervised_objectives
from engine.training.passes import Objective
from engine.update import policy_objectives
from kernels.moments import Whitening


def terms_of(
    case: Case, config: KeptConfig, sources: dict[str, list[Unit]], parallel: Parallel
) -> dict[str, Objective]:
    """Return the terms of the step's loss by name, on this rank's part of the batch."""
    budget = config.micro_batch_tokens
    if isinstance(config, SFTConfig):
        # In the order of the run: dropout is drawn in it.
        names = [name for name in SOURCES["sft", "policy"] if name in sources]
        taken = {name: step_batch(sources[name], parallel, budget) for name in names}
        fraction = config.data.pretraining_fraction
        return dict(zip(taken, supervised_objectives(taken, fraction), strict=True))
    if isinstance(config, RMConfig):
        units = sources["loss"]
        loss = comparison_loss(len(units))
        batches = pack_for(units, parallel, budget, share_prompts=config.share_prompts)
        return {"loss": Objective(batches=batches, loss=loss)}
    episodes = step_batch(sources["episodes"], parallel, budget)
    num_targets = torch.tensor(float(episodes.num_targets), device=parallel.device)
    if case.role == "critic":
        loss = clipped_value_loss(num_targets, cliprange=config.value_cliprange)
        return {"value_loss": Objective(batches=episodes.batches, loss=loss)}
    text = step_batch(sources["ptx"], parallel, budget) if "ptx" in sources else None
    whitening = _whitening(case, parallel)
    found = policy_objectives(config, episodes.batches, num_targets, whitening, text)
    return dict(zip(("policy_loss", "ptx_loss"), found, strict=False))


def _whitening(case: Case, parallel: Parallel) -> Whitening | None:
    if not case.numbers:
        return None
    try:
        values = [case.numbers[name] for name in Whitening._fields]
    except KeyError as error:
        raise UserError(f"{case.name}: whitening without its {error}") from None
    return Whitening(*(torch.tensor(value, device=parallel.device) for value in values))
