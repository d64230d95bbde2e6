"""The random weights that all providers start from, of a model that ends its responses by itself.

The end of text of "mixed" lengths is drawn like any other token; nothing tells a sampler when. Its
embedding, which is also its row of the head, is b u for a direction u of the residual stream that
only positions write: all other embeddings and what the layers write is made orthogonal to u. So the
last layer norm's output has u times a / s, and the logit of the end is b a / s. Here a is what the
position wrote, and s the standard deviation of the residual stream. Up to the shortest response a
is so negative that the end is practically never drawn; from there on it is positive, and b is
chosen so that the mean chance is the job's hazard a token.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.ppo_job import Job
from engine.ranks.device import DTYPES

_NUM_SEQUENCES = 8
"""Random sequences that the chance is a mean over; our choice: some 1000 tokens at 128."""


def write_weights(job: Job, folder: Path, device: torch.device) -> None:
    """Write the policy and the trunk of the critic as folders of Hugging Face's GPT-2."""
    from benchmarks.random_gpt2 import random_gpt2  # transformers, which ours runs without

    dtype = DTYPES[job.numerics.dtype]
    policy = random_gpt2(job.size, device, torch.float32)
    if job.eos_id is not None:
        draw_the_end(policy, job)
    policy.to(dtype).save_pretrained(folder / "policy", max_shard_size="1TB")
    del policy
    if job.eos_id is None and job.critic_size == job.size:
        (folder / "critic").symlink_to("policy")
        return
    random_gpt2(job.critic_size, device, dtype).save_pretrained(
        folder / "critic", max_shard_size="1TB"
    )


@torch.no_grad()
def draw_the_end(model: Any, job: Job) -> None:
    """Make a GPT2LMHeadModel draw its last token with the job's hazard: from the state on in which
    the shortest response may end."""
    stack, hidden = model.transformer, job.size.hidden_size
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(hidden, generator=generator).to(model.device)
    direction = F.normalize(direction - direction.mean(), dim=0)  # a layer norm takes the mean off
    writers = [stack.wte, stack.wpe]
    writers += [part.c_proj for block in stack.h for part in (block.attn, block.mlp)]
    for writer in writers:  # their rows are what they write
        writer.weight -= torch.outer(writer.weight @ direction, direction)
    # The token at p is drawn in the state of position p - 1.
    first = job.prompt_tokens + job.shortest - 2
    length = job.prompt_tokens + job.response_tokens - 1
    shape = (_NUM_SEQUENCES, length)
    tokens = torch.randint(job.size.vocab_size - 1, shape, generator=generator).to(model.device)
    radius = float(_before_last_norm(model, tokens).std(-1).mean()) * hidden**0.5
    stack.wpe.weight[:first] -= 2 * radius * direction  # 0.9 of the whole stream
    stack.wpe.weight[first:] += radius / 2 * direction  # 0.45
    states = stack(tokens).last_hidden_state[:, first:]
    rivals = (states @ stack.wte.weight[:-1].T).logsumexp(-1)
    stack.wte.weight[-1] = direction * _strength(states @ direction, rivals, job.hazard)


def _before_last_norm(model: Any, tokens: Tensor) -> Tensor:
    """Return what the last layer norm reads, [n, length, hidden]."""
    seen: list[Tensor] = []
    hook = model.transformer.ln_f.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    model.transformer(tokens)
    hook.remove()
    return seen[0]


def _strength(along: Tensor, rivals: Tensor, hazard: float) -> float:
    """Return the b at which the mean chance of a logit b x along, beside the others' logsumexp, is
    the hazard; along is positive."""
    low, high = 0.0, 100.0 / float(along.min())
    for _ in range(60):  # halves: to the last bit
        middle = (low + high) / 2
        chance = float((middle * along - rivals).sigmoid().mean())
        low, high = (middle, high) if chance < hazard else (low, middle)
    return low


def score_weight(hidden_size: int) -> Tensor:
    """Return the weight [1, hidden] of the head of critic and reward model; its bias is 0."""
    draw = torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(2))
    return draw * (hidden_size + 1) ** -0.5


def load_theirs(model: Any, folder: Path) -> None:
    """Fill transformers' GPT-2, a policy ("lm_head") or a critic ("score")."""
    is_critic = hasattr(model, "score")
    tensors = load_file(folder / ("critic" if is_critic else "policy") / "model.safetensors")
    result = model.load_state_dict(tensors, strict=False)
    expected = ["score.weight"] if is_critic else ["lm_head.weight"]  # tied to the embedding
    if result.missing_keys != expected or result.unexpected_keys:
        raise RuntimeError(f"{folder}: {result}")
    if is_critic:
        model.score.weight.data.copy_(score_weight(model.config.n_embd))
