"""Which ranks are silent, and which no longer come further: a judgement on what they tell.

Each tells its signs of life every few seconds; the first rank looks at all of them, the others at
the first rank's. At 1,024 ranks the store so takes 205 small values a second, and gives 205. Every
five seconds it gives all of them to the first rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.ranks.signs import Signs, signs_of

BEAT_SECONDS = 5.0
"""Between two signs that a rank tells; our choice, nine within the default of silence_seconds."""
_MAX_NAMED = 16  # ranks that a message names; our choice


@dataclass
class Heard:
    """What was last heard of a rank."""

    text: str
    at: float
    """When it first said so, by the clock of who listens."""

    @property
    def signs(self) -> Signs:
        """What it said of itself."""
        return signs_of(self.text.partition(" ")[2])


@dataclass(kw_only=True)
class Watch:
    """What one rank has heard of those that it listens to."""

    world_size: int
    silence_seconds: float
    hang_seconds: float
    """0: nobody is too slow."""
    heard: dict[int, Heard] = field(default_factory=dict)
    given: set[int] = field(default_factory=set)
    """Ranks that have ever told something."""
    _progress: tuple[str, float] = ("", 0.0)
    """The signs of all, and since when they are the same."""

    def hear(self, texts: Mapping[int, str], now: float) -> None:
        """Take in what each rank tells now: "BEAT SIGNS", with a number that every beat raises."""
        for rank, text in texts.items():
            if rank not in self.heard or self.heard[rank].text != text:
                self.heard[rank] = Heard(text, now)
        signs = " ".join(f"{self.heard[r].signs.count}" for r in sorted(self.heard))
        if signs != self._progress[0]:
            self._progress = (signs, now)

    def silent(self, now: float, seconds: float | None = None) -> list[int]:
        """Return the ranks that were heard of last so long ago, silence_seconds by default."""
        limit = self.silence_seconds if seconds is None else seconds
        return [rank for rank, heard in sorted(self.heard.items()) if now - heard.at > limit]

    def verdict(self, now: float, seconds: float | None = None) -> str | None:
        """Return why the run has to end, in a line; None where it goes on."""
        silent = self.silent(now, seconds)
        if silent:
            since = min(now - self.heard[rank].at for rank in silent)
            living = [rank for rank in sorted(self.heard) if rank not in silent]
            return (
                f"{ranks_named(silent)} of {self.world_size} gave no sign of life for "
                f"{since:.0f} s, last seen in {self._places(silent)}; "
                + (f"{ranks_named(living)} lived, in {self._places(living)}" if living else "")
            ).rstrip("; ")
        is_bounded = all(heard.signs.is_bounded for heard in self.heard.values())
        hung = now - self._progress[1]
        if self.hang_seconds and self.heard and is_bounded and hung > self.hang_seconds:
            return (
                f"no rank came any further for {hung / 60:.0f} minutes, though all live: "
                + self._places(sorted(self.heard))
            )
        return None

    def _places(self, ranks: Sequence[int]) -> str:
        """Return where ranks are, those at one place together."""
        places: dict[str, list[int]] = {}
        for rank in ranks:
            places.setdefault(self.heard[rank].signs.where(), []).append(rank)
        if len(places) == 1:
            return next(iter(places))
        named = [f"{place} ({ranks_named(there)})" for place, there in places.items()]
        return ", ".join(named[:4] + ["..."] * (len(named) > 4))


def ranks_named(ranks: Sequence[int]) -> str:
    """Return ranks in words: "rank 3", "ranks 0 to 3, 7"; the first ones of many."""
    groups: list[list[int]] = []
    for rank in sorted(ranks):
        if groups and rank == groups[-1][1] + 1:
            groups[-1][1] = rank
        else:
            groups.append([rank, rank])
    named = [str(a) if a == b else f"{a} to {b}" for a, b in groups[:_MAX_NAMED]]
    more = ["..."] if len(groups) > _MAX_NAMED else []
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(named + more)
