"""What one H100 should reach, and whether the records of a run say that it does.

A rate is judged against the ceilings that were measured beside it in the same process, where the
target names one of an H100's: 3.0 TB/s for a copy, 790 TFLOP/s for a product of matrices.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.records import Record, kernel_case, kernel_size, newest

COPY = "copy of as many bytes"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the records say of a target."""

    measured: str
    is_met: bool | None
    """None where it is not known whether it is met."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One line of the targets."""

    name: str
    goal: str
    steps: tuple[str, ...]
    """The steps that measure it."""
    judge: Callable[[Sequence[Record]], Finding | None]
    """From all records of a device; None where they lack the measurement."""
    operations: tuple[str, ...] = ()
    """The kernels it stands on, by their names in the checks."""


def _kernel_case(records: Sequence[Record], operation: str, **size: int) -> dict[str, Record]:
    """By provider the newest records of one case of the kernel suite, backward pass included where
    it has one: at the target's size, or else at the largest that was timed."""
    found = [r for r in records if r["benchmark"] == "kernels" and r["operation"] == operation]
    # A run in which the rivals were not reached tells less than an older one in which they were.
    found = [r for r in found if r["status"] != "alone"] or found
    # "forward" comes before "forward+backward".
    mode = max((r["mode"] for r in found), default="")
    found = newest((r for r in found if r["mode"] == mode), kernel_case)
    ours = [r for r in found if r["provider"] == "trident" and r["status"] in ("timed", "alone")]
    if not ours:
        return {}
    best = max(ours, key=lambda r: (size.items() <= r.items(), math.prod(kernel_size(r).values())))
    return _timed([r for r in found if kernel_case(r) == kernel_case(best)])


def _words(record: Record) -> str:
    return ", ".join(f"{name} {number}" for name, number in kernel_size(record).items())


def _timed(records: Sequence[Record]) -> dict[str, Record]:
    """By provider what was timed: in turns, or ours alone where the rivals took the time."""
    return {
        r["provider"]: r for status in ("alone", "timed") for r in records if r["status"] == status
    }


def _met(ours: Record, is_met: bool, **size: int) -> bool | None:
    """Whether a target is met; not known where ours was not timed beside the others, or at another
    size than the target's."""
    return is_met if ours["status"] == "timed" and size.items() <= ours.items() else None


def _rivals(timed: dict[str, Record]) -> Iterator[tuple[str, float]]:
    for name, record in timed.items():
        if not record["is_bound"] and not name.startswith("trident"):
            yield name, record["median_ms"]


def _best_rival(timed: dict[str, Record]) -> str:
    name, ms = min(_rivals(timed), key=lambda rival: rival[1], default=("no rival", float("nan")))
    return f"best rival {name} {ms:.3g} ms"


def _is_ahead(timed: dict[str, Record]) -> bool:
    ours = timed["trident"]["median_ms"]
    return all(ours < ms for _, ms in _rivals(timed))


def _logprobs(records: Sequence[Record]) -> Finding | None:
    timed = _kernel_case(records, "logprobs", tokens=32768)
    if not {"trident", COPY} <= timed.keys():
        return None
    ours, copy = timed["trident"], timed[COPY]
    share = copy["median_ms"] / ours["median_ms"]
    return Finding(
        measured=f"{_words(ours)}: {ours['median_ms']:.3g} ms, {share:.0%} of a copy "
        f"({copy['gb_per_s'] / 1e3:.2f} TB/s); {_best_rival(timed)}",
        is_met=_met(ours, share >= 0.9 and _is_ahead(timed), tokens=32768),
    )


def _linear_loss(records: Sequence[Record]) -> Finding | None:
    timed = _kernel_case(records, "linear_loss", tokens=131072, hidden=4096)
    if not {"trident", "bare products"} <= timed.keys():
        return None
    ours = timed["trident"]
    share = timed["bare products"]["median_ms"] / ours["median_ms"]
    measured = f"{_words(ours)}: {share:.0%} of the bare products"
    extra = None
    if "extra_bytes" in ours:
        # The gradients are results, the weight's as the fp32 sum that training keeps.
        extra = ours["extra_bytes"] - (4 - 2) * ours["vocab"] * ours["hidden"]
        measured += f", {extra / 2**20:.0f} MiB beside the gradients"
    is_met = share >= 0.85 and extra is not None and extra <= 512 * 2**20
    return Finding(
        measured=f"{measured}; ours {ours['median_ms']:.3g} ms, {_best_rival(timed)}",
        is_met=_met(ours, is_met, tokens=131072, hidden=4096),
    )


def _gae(records: Sequence[Record]) -> Finding | None:
    timed = _kernel_case(records, "gae", sequences=512, length=1024)
    if "trident" not in timed:
        return None
    ours = timed["trident"]
    wall, launches = ours.get("wall_ms") or ours["median_ms"], ours.get("launches", "?")
    loops = {n: r["median_ms"] for n, r in timed.items() if "loop" in n and "compile" not in n}
    least = min(loops.values(), default=float("nan")) / wall
    is_met = launches == 1 and wall <= 0.035 and least >= 1000
    return Finding(
        measured=f"{launches} launches, {ours['median_ms'] * 1e3:.0f} us on the device, "
        f"{wall * 1e3:.0f} us wall, {least:.0f}x the fastest of {len(loops)} Python loops",
        is_met=_met(ours, is_met, sequences=512, length=1024),
    )


def _policy_loss(records: Sequence[Record]) -> Finding | None:
    timed = _kernel_case(records, "policy_loss", tokens=131072)
    if "trident" not in timed:
        return None
    ours = timed["trident"]
    repeats, launches = bool(ours.get("is_repeatable")), ours.get("launches", "?")
    return Finding(
        measured=f"{launches} launches, {ours['median_ms'] * 1e3:.0f} us, "
        f"{'the same bits twice' if repeats else 'other bits the second time'}; "
        f"{_best_rival(timed)}",
        is_met=_met(ours, launches == 3 and repeats, tokens=131072),
    )


def _newest_of(records: Sequence[Record], benchmark: str, **wanted: object) -> list[Record]:
    found = [
        r
        for r in records
        if r["benchmark"] == benchmark and all(r.get(k) == v for k, v in wanted.items())
    ]
    parts = ("workload", "micro_batch_tokens")
    return newest(found, lambda r: (str(_size(r)), *(r.get(part) for part in parts)))


def _size(record: Record) -> dict:
    return record.get("size") or record["job"]["size"]


def _largest(records: Sequence[Record]) -> dict[str, Record]:
    """Of each provider the record of the largest model: 1.3B on a GPU, less in a quick look."""
    if not records:
        return {}
    width = max(_size(r)["hidden_size"] for r in records)
    return {r["provider"]: r for r in records if _size(r)["hidden_size"] == width}


def _decode(records: Sequence[Record]) -> Finding | None:
    found = _largest(_newest_of(records, "generation", workload="decode"))
    if "trident" not in found:
        return None
    ours = found["trident"]
    waits = ours.get("host_syncs_per_step")
    measured = (
        f"{ours['step_ms']:.2f} ms a step at {ours['context']} tokens, "
        f"{ours['bandwidth_share']:.0%} of the bound"
    )
    if waits is None:
        return Finding(measured=measured, is_met=None)
    beside = "".join(
        f"; {name} {record['step_ms']:.2f} ms" for name, record in found.items() if record != ours
    )
    return Finding(
        measured=f"{measured}, {waits:.2f} waits of the host a token{beside}",
        # It looks at the tokens of eight steps at once.
        is_met=ours["bandwidth_share"] >= 0.6 and waits < 1,
    )


def _sft_step(records: Sequence[Record]) -> Finding | None:
    steps = sorted(_newest_of(records, "train_step"), key=lambda r: r["mfu"])
    found = _largest(steps)  # with the micro-batches that suit each best
    if "trident" not in found:
        return None
    ours, beside = found["trident"], ""
    if "huggingface" in found:
        beside = f"; plain torch {found['huggingface']['mfu']:.0%}"
    return Finding(
        measured=f"{ours['model_flops_per_s'] / 1e12:.0f} TFLOP/s, {ours['mfu']:.0%} of the "
        f"{ours['peak_flops_source']}, micro-batches of {ours['micro_batch_tokens']} tokens, "
        f"{ours['peak_bytes'] / 1e9:.0f} GB{beside}",
        is_met=ours["mfu"] >= 0.5,
    )


def _ppo_step(records: Sequence[Record]) -> Finding | None:
    fixed = [r for r in records if r.get("workload", "fixed") == "fixed"]
    found = _largest(_newest_of(fixed, "ppo_step"))
    if "trident" not in found:
        return None
    ours = found["trident"]
    job = ours["job"]
    measured = (
        f"{job['num_episodes']} episodes of {job['prompt_tokens']} + {job['response_tokens']} "
        f"tokens: {ours['episodes_per_s']:.1f} episodes/s ({ours['num_samples']} iterations "
        f"counted), {ours['peak_bytes'] / 1e9:.0f} GB"
    )
    rivals = [r for name, r in found.items() if name.startswith("trl")]
    if not rivals:
        return Finding(measured=f"{measured}; TRL not measured", is_met=None)
    trl = max(rivals, key=lambda r: r["episodes_per_s"])
    ratio = ours["episodes_per_s"] / trl["episodes_per_s"]
    phases = ", ".join(
        f"{phase} {ours['phase_s'][phase]:.2f} against {seconds:.2f} s"
        for phase, seconds in trl["phase_s"].items()
    )
    return Finding(measured=f"{measured}; {ratio:.1f}x TRL's PPO: {phases}", is_met=ratio >= 5)


def _swap(records: Sequence[Record]) -> Finding | None:
    found = _largest(_newest_of(records, "residency"))
    if "swap" not in found:
        return None
    swap, share = found["swap"], found["swap"]["link_share"]
    measured = f"{swap['swap_bytes_per_s'] / 1e9:.1f} GB/s, {share:.0%} of the link"
    if "hidden" not in found:
        return Finding(measured=f"{measured}; hidden fraction not measured", is_met=None)
    hidden = found["hidden"]["hidden_fraction"]
    return Finding(measured=f"{measured}, {hidden:.0%} hidden", is_met=share >= 0.8)


TARGETS = (
    Target(
        name="log-probs from logits, forward + backward, bf16",
        goal=">= 90% of a copy at 6 bytes an element; ahead of the rivals in the same run",
        steps=("time logprobs",),
        judge=_logprobs,
        operations=("logprobs", "logprobs_entropy"),
    ),
    Target(
        name="log-probs from hidden states, forward + backward",
        goal=">= 85% of the bare products at hidden 4096; <= 512 MiB beside gradients (dW in fp32)",
        steps=("time linear_loss",),
        judge=_linear_loss,
        operations=("linear_logprobs", "linear_loss"),
    ),
    Target(
        name="GAE, KL shaping and whitening statistics, [512, 1024] packed",
        goal="one launch, <= 35 us wall, >= 1000x the Python loops",
        steps=("time gae, policy_loss",),
        judge=_gae,
        operations=("gae",),
    ),
    Target(
        name="PPO's policy loss, gradient and metrics, 131,072 tokens",
        goal="one launch, two for the metrics, deterministic",
        steps=("time gae, policy_loss",),
        judge=_policy_loss,
        operations=("policy_loss",),
    ),
    Target(
        name="decode, 1.3B bf16, 64 sequences at 1024 tokens",
        goal=">= 60% of the bandwidth bound, CUDA graphs, no host sync a token",
        steps=("decode",),
        judge=_decode,
        operations=("decode_attention", "sample", "sample_top_p", "layer_norm"),
    ),
    Target(
        name="SFT step, 1.3B, sequences of 2048, bf16",
        goal=">= 50% of 989 TFLOP/s (model FLOPs)",
        steps=("train_step",),
        judge=_sft_step,
        operations=("linear_loss", "layer_norm"),
    ),
    Target(
        name="PPO iteration, policy and critic of 1.3B, all four models on one GPU",
        goal="fits in 80 GB; >= 5x the episodes/s of TRL's PPO at equal work",
        steps=("ppo_step",),
        judge=_ppo_step,
    ),
    Target(
        name="swap of a frozen model from pinned memory",
        goal=">= 80% of the link's bandwidth; hidden fraction reported",
        steps=("residency",),
        judge=_swap,
    ),
)
