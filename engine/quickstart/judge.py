"""The models of a quickstart on held-out prompts: how good are they, and which is preferred."""

from collections.abc import Callable, Sequence
from typing import Any

from engine.data.demonstrations import read_demonstrations
from engine.data.pretraining import open_token_file
from engine.data.prompts import read_prompts
from engine.losses import last_readings, mean_language_loss
from engine.progress import LongWork
from engine.quickstart.files import Files
from engine.quickstart.finished_stages import FinishedStages
from engine.quickstart.labeler import e2e_language, score
from engine.quickstart.places import parse_facts
from engine.quickstart.report import MODELS
from engine.quickstart.settings import QuickstartConfig
from engine.quickstart.win_rate import win_rate


def judge_models(
    config: QuickstartConfig, files: Files, finished: FinishedStages
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary of base, sft, ppo and ppo_ptx on held-out prompts, and some answers side
    by side.

    The judge is the scripted labeler where the prompts list facts, else the reward model.
    """
    # The quickstart has no option that skips lines.
    read, _ = read_prompts(files.prompts_valid, finished.renderer, skip_option="")
    prompts = finished.fitting(read)[: config.num_judged]
    init = finished.load("sft", "language")
    reward_model = finished.load("rm", "scalar")
    label = _labeler(config, files, [prompt.text for prompt in prompts])
    text = open_token_file(files.pretraining_valid, finished.tokenizer, config.directory / "tokens")
    held_out = text.sequences(config.pretrain.data.pretraining_tokens)
    judged: dict[str, Any] = {"judge": "labeler" if label else "reward_model"}
    scores: dict[str, list[float]] = {}
    texts: dict[str, list[str]] = {}
    title, is_writer = f"judge: {len(prompts)} prompts", finished.parallel.is_writer
    with LongWork(title, is_writer=is_writer, total=len(MODELS)) as work:
        for name, shown in MODELS.items():
            work.tell(f"{shown} answers")
            network = init if name == "sft" else finished.load(name, "language")
            rollout, texts[name] = finished.answer(network, prompts)
            work.tell(f"{shown} is read")
            readings = finished.read(reward_model, rollout)
            rewards = last_readings(readings, rollout.cu_seqlens).tolist()
            scores[name] = label(texts[name]) if label else rewards
            init_logprobs = finished.read(init, rollout)
            logprobs = init_logprobs if name == "sft" else finished.read(network, rollout)
            log_ratio = (logprobs - init_logprobs)[rollout.response_mask]
            judged[name] = {
                "labeler_score": sum(scores[name]) / len(prompts),
                "reward": sum(rewards) / len(prompts),
                "kl_from_init": float(log_ratio.sum()) / len(prompts),
                "pretrain_loss": mean_language_loss(
                    network, held_out, config.pretrain.micro_batch_tokens
                ),
                "response_tokens": sum(rollout.response_lengths) / len(prompts),
                "eos_rate": float(rollout.has_eos.double().mean()),
            }
            work.advance()
    for name in MODELS:
        judged[name] |= preferred(scores[name], scores["sft"])
    samples = [
        {
            "prompt": prompt.text,
            "answers": {name: texts[name][i] for name in MODELS},
            "scores": {name: scores[name][i] for name in MODELS},
        }
        for i, prompt in enumerate(prompts[:8])
    ]
    return judged, samples


def preferred(scores: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Return how often a score beats the other's on the same prompt, ties split, and the interval
    of that."""
    pairs = list(zip(scores, others, strict=True))
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    result = win_rate(wins, len(pairs) - wins - losses, losses)
    return {"win_rate_vs_sft": result.rate, "win_rate_interval": (result.low, result.high)}


def _labeler(
    config: QuickstartConfig, files: Files, prompts: Sequence[str]
) -> Callable[[Sequence[str]], list[float]] | None:
    """Return the scripted labeler of answers to the prompts; None where a prompt lists no facts.

    It reads the generator's language, or with files that of their demonstrations.
    """
    language = None
    try:
        facts = [parse_facts(prompt) for prompt in prompts]
        if config.data is not None:
            records, _ = read_demonstrations(files.demonstrations)
            language = e2e_language([(r.prompt.text, r.response.text) for r in records])
    except ValueError:
        return None
    return lambda texts: [score(f, t, language) for f, t in zip(facts, texts, strict=True)]
