"""How long sequences may be, and which setting or network says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from engine.data.examples import CUT_OPTION, LengthReport
from engine.errors import UserError
from models.sizes import SIZES


class Limit(NamedTuple):
    """The most tokens of a sequence or a prompt, and who says so."""

    tokens: int
    source: str
    """The option, or whose context, with what has a longer one."""

    def __str__(self) -> str:
        return f"{self.tokens} tokens ({self.source})"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits that bind."""

    prompt: Limit
    whole: Limit | None = None
    """Of prompt and response together; none: there are only prompts."""

    def __str__(self) -> str:
        whole = "" if self.whole is None else f" and {self.whole} in all"
        return f"a prompt of {self.prompt}{whole}"

    def counts(self, report: LengthReport) -> dict[str, int]:
        """Return how many were too long, by the limit in words; those of 0 are left out."""
        found = {
            f"a prompt over {self.prompt}": report.num_long_prompts,
            f"over {self.whole} in all": report.num_long_sequences,
        }
        return {limit: number for limit, number in found.items() if number}

    def dropped(self, report: LengthReport) -> str:
        """Return how many were too long and by which limit, "" where none was."""
        return ", ".join(
            f"{number} with {limit}" if limit.startswith("a ") else f"{number} {limit}"
            for limit, number in self.counts(report).items()
        )

    def described(self, report: LengthReport) -> str:
        """Return how many were kept, cut and dropped, with the limits that were passed."""
        cut = f" ({report.num_cut} of them cut)" if report.num_cut else ""
        dropped = f", {report.num_dropped} dropped: {self.dropped(report)}"
        none = "" if report.num_cut else ", none too long"
        return f"{len(report.kept)} kept{cut}{dropped if report.num_dropped else none}"

    def check(self, report: LengthReport, what: str, cut: str = CUT_OPTION) -> None:
        """Raise UserError where all examples were too long; `what` names them. cut: the option that
        cuts them; "": there is none."""
        if report.num_dropped and not report.kept:
            remedy = f", or cut them by {cut}" if cut else ""
            raise UserError(
                f"{what}: all {report.num_dropped} examples are too long, {self.dropped(report)}; "
                f"raise what limits them{remedy}"
            )


def training_limits(*, max_tokens: int, max_prompt_tokens: int, context: Limit) -> Limits:
    """Return what of the settings and of the context binds in SFT and RM."""
    return Limits(
        prompt=_smallest(context, Limit(max_prompt_tokens, "--data.max-prompt-tokens")),
        whole=_smallest(context, Limit(max_tokens, "--data.max-tokens")),
    )


def context_limit(context_length: int, *, can_grow: bool) -> Limit:
    """Return the limit that a model's context is. can_grow: its size is an option's, and another
    may be named."""
    longer = {name: size.context_length for name, size in SIZES.items()}
    found = next((name for name in longer if longer[name] > context_length), None)
    if not can_grow or found is None:
        return Limit(context_length, "the model's context")
    return Limit(context_length, f"the model's context; --size {found} has {longer[found]}")


def prompt_limits(
    contexts: Mapping[str, int], max_new_tokens: int, *, max_prompt_tokens: int, prefix: str = ""
) -> Limits:
    """Return the limit of prompts that are answered, so that every response has room in the context
    of each network.

    contexts: tokens by the network's name. prefix: of sampling's options. Raises UserError where no
    prompt has room.
    """
    whose = min(contexts, key=lambda name: contexts[name])
    room = contexts[whose] - max_new_tokens
    option = f"--{prefix}sampling.max-new-tokens {max_new_tokens}"
    if room < 1:
        raise UserError(
            f"{option} leaves no room for a prompt in the {whose}'s context of {contexts[whose]}"
        )
    left = Limit(room, f"what {option} leaves of the {whose}'s context of {contexts[whose]}")
    return Limits(prompt=_smallest(left, Limit(max_prompt_tokens, "--data.max-prompt-tokens")))


def _smallest(first: Limit, second: Limit) -> Limit:
    """Return the one that binds; of equal ones the first, which the other cannot lift."""
    return min(first, second, key=lambda limit: limit.tokens)
