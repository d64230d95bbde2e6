"""Settings of data preparation, from raw logs to the files of the stages (section 3.2, app. A).

Imports neither torch nor megatron.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.errors import UserError, quoted
from engine.settings.checks import check_numbers
from engine.settings.saved import EARLIER

PersonalKind = Literal["email", "iban", "card", "ssn", "ip", "phone"]
"""What the filter of personal data looks for."""


@dataclass(frozen=True, kw_only=True)
class LogFields:
    """What a log calls its fields; only the prompt, or messages in its stead, must be there."""

    prompt: str = "prompt"
    """The prompt: a text, or a list of {"role", "content"}."""
    messages: str = "messages"
    """Instead of the prompt: a dialogue; one that ends with the assistant has its response too, the
    last reply whose "weight" is not 0."""
    user: str = "user"
    """Who sent it: a text or a whole number; 7, 7.0 and "7.0" are one. Without one, or with nan,
    null or none, a prompt is a user by itself."""
    id: str = "id"
    """What the record is called in the outputs; without one, FILE:LINE."""
    time: str = "time"
    """When it was sent, a number or ISO 8601: of duplicates the earliest is kept; without one, the
    first in the logs."""
    kind: str = "kind"
    """Its use case, such as brainstorming, which the report counts."""
    response: str = "response"
    """A labeler's demonstration. "demonstration" is taken too."""
    completions: str = "completions"
    """Answers that were ranked."""
    ranks: str = "ranks"
    """Their ranks, 1 is best."""
    scores: str = field(default="scores", metadata={EARLIER: "scores"})
    """Instead of ranks: ratings of the answers, the highest is the best."""
    chosen: str = field(default="chosen", metadata={EARLIER: "chosen"})
    """Instead of completions: the better of two answers, a text or messages; the prompt may be
    within both."""
    rejected: str = field(default="rejected", metadata={EARLIER: "rejected"})
    """The other one."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """One preparation."""

    logs: tuple[Path, ...] = ()
    """Raw logs, in any container of rows or folders of them (recipes/DATA.md: JSON lines and lists,
    CSV, parquet and more, packed or not), in the order of time. Must be given."""
    out: Path | None = None
    """The folder to make. Must be given."""
    fields: LogFields = field(default_factory=LogFields)
    """What the logs call their fields, a dot leading into an object (meta.user); a name that no
    line has is an error. Where no label is named, rows of public data sets are known (DATA.md)."""
    skip_bad_lines: bool = False
    """Drop bad lines with their reason instead of stopping at the first."""
    prefix_characters: int = 200
    """Prompts of one data set that share so long a beginning are duplicates, shorter ones where
    they are equal; without regard to case and runs of whitespace. Section 3.2 says "a long common
    prefix": the length is our choice, about 45 tokens."""
    max_prompts_per_user: int = 200
    """The most different prompts of one user, over all data sets, counted without duplicates
    (3.2). Which: those of the lowest hashes, our choice."""
    valid_fraction: float = 0.1
    """Share of the users whose prompts are for validation, one at least where there are two; our
    choice (Table 6 has 5 to 35% of the prompts). Of one user, or nobody, prompts are split."""
    test_fraction: float = 0.05
    """Share of the users whose prompts are for a test; our choice."""
    seed: int = 0
    """Says, with a hash of the user, on which side a user is."""
    personal: Literal["drop", "mask", "keep"] = "drop"
    """What becomes of a record with personal data: it is dropped, as in 3.2, or what was found is
    replaced by its kind, such as [EMAIL]; keep: nothing is looked for."""
    personal_splits: Literal["train", "all"] = "train"
    """Where personal data are looked for: in training data, as in 3.2, or in all."""
    personal_kinds: tuple[PersonalKind, ...] = ("email", "iban", "card", "ssn", "ip", "phone")
    """What is looked for; names of persons and postal addresses are not found, and addresses at
    example.com and the like stay: SECURITY.md."""
    phone_regions: tuple[str, ...] = ("US", "GB", "DE", "FR", "IN")
    """Countries (ISO 3166) whose numbers are found as they are written at home; numbers with + and
    a country's code are found of any country."""
    languages: bool = True
    """Count the languages of the prompts, by py3langid: the paper's langid.py, kept up. Of fewer
    than four letters, or a confidence below 0.5, a prompt's is "undetermined": our choice."""
    tokenizer: Path | None = None
    """Tokenizer, or run, whose tokens the lengths are given in; none: words and characters."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            counts="prefix_characters max_prompts_per_user",
            not_negative="seed",
            shares="valid_fraction test_fraction",
        )
        if self.valid_fraction + self.test_fraction >= 1:
            raise UserError(
                f"--valid-fraction {self.valid_fraction} and --test-fraction {self.test_fraction} "
                "leave nothing for training"
            )
        for region in self.phone_regions:
            if len(region) != 2 or not (region.isascii() and region.isupper()):
                raise UserError(
                    f"--phone-regions wants countries of two capital letters, got {quoted(region)}"
                )
