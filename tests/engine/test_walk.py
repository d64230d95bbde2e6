"""The walk of a prompt in ARCHITECTURE.md: the calls that hand it from file to file, counted."""

import re
import sys
from pathlib import Path
from types import CodeType, FrameType

from tests.tiny import ppo_config, train

ROOT = Path(__file__).parents[2]

# Each a call into another file that hands on the prompt, or what it has become; in their order.
WALK = re.findall(
    r"\S+",
    """
data/prompts.read_prompts data/records.read_records shapes/held_lists.with_lists
shapes/fields.Fields.__call__ shapes/plain_rows.plain data/pairs.asked_in data/chat.asked_in_prompt
data/renderer.Renderer.prompt data/prompt_format.PromptFormat.closing
data/prompts.prompt_examples data/examples.encode_prompts data/tokenizer.Tokenizer.encode_all
data/examples.drop_long data/batches.EpochOrder.indices
rollout.generate_rollout generation/generate.generate generation/scheduler.Scheduler.next_step
generation/runner.Runner.launch generation/step_tensors.upload
models/packed_sequences.PackedSequences.of
models/gpt.GPT.forward_paged models/paged_forward.paged_embedding
models/paged_forward.paged_forward models/layers.LayerNorm.forward kernels/layer_norm.layer_norm
models/paged_attention.PagedSequences.attend kernels/append_kv.append_kv
models/attention.packed_attention kernels/gelu.gelu models/readouts.Logits.read
generation/draws.Draws.__call__ models/vocab_parallel.vocab_parallel_sample
kernels/sample_state.sample_state kernels/sample.merge_samples generation/runner.Runner.collect
generation/scheduler.Scheduler.finish_step generation/sequence.LiveSequence.extend
generation/sequence.LiveSequence.response
score.score_rollout feed.pack_for data/batches.micro_batches data/batches.PackedBatch.to
training/passes.forward models/gpt.GPT.forward models/trunk.run_trunk
models/attention.PackedAttention.forward models/readouts.Logprobs.read
models/vocab_parallel.vocab_parallel_linear_logprobs
kernels/linear_logprobs.shard_linear_logprobs models/packed_sequences.PackedSequences.join
advantage.estimate_advantages kernels/gae.gae kernels/moments.whitening
update.learn feed.step_batch training/passes.accumulate
losses.ClippedPolicyLoss.token_loss models/readouts.TokenLosses.read
models/vocab_parallel.vocab_parallel_linear_logprobs_loss
kernels/linear_logprobs.shard_linear_logprobs_loss
models/readouts.TokenLosses.read.<locals>.at_tokens kernels/policy_loss.policy_token_losses
losses.ClippedPolicyLoss.metrics kernels/policy_loss.policy_metrics
training/optimizer.Optimizer.step training/passes.finish_gradients
""",
)


def file_of(code: CodeType) -> str | None:
    """Return the library's file that has the code, as the walk names it; None for another's."""
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT):
        return None
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] not in ("engine", "models", "kernels"):
        return None
    return "/".join(parts).removeprefix("engine/")


def test_walk_is_what_runs_and_is_short(tiny: Path, tmp_path: Path):
    calls: dict[str, int] = {}  # when each was first made

    def note(frame: FrameType, event: str, _: object) -> None:
        called = file_of(frame.f_code) if event == "call" else None
        caller = frame.f_back
        while called and caller is not None and file_of(caller.f_code) is None:
            caller = caller.f_back
        if called and caller is not None and file_of(caller.f_code) != called:
            calls.setdefault(f"{called}.{frame.f_code.co_qualname}", len(calls))

    sys.setprofile(note)
    try:
        train(ppo_config(tiny, tmp_path, iterations=1, ptx_coef=0.0))
    finally:
        sys.setprofile(None)
    assert [hop for hop in WALK if hop not in calls] == []
    for first, last in (
        ("read_prompts", "generate"),
        ("append_kv", "score_rollout"),
        ("gae", "step"),
    ):
        order = [calls[next(h for h in WALK if h.endswith(f".{name}"))] for name in (first, last)]
        assert order == sorted(order)
    num_files = len({re.split(r"\.", hop)[0] for hop in WALK})
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert f"{len(WALK)} hops through {num_files} files" in text
    assert len(WALK) <= 66
