"""Whether a run has the tokenizer that it began with: its folder's copy, which it keeps to the
end. And whether the networks that it reads were trained with one that reads all texts as it does.

    RUN/sources/reward_model/tokenizer/    of a network whose tokenizer has other control tokens
"""

from dataclasses import replace
from pathlib import Path

from engine.checkpoints.found import read_network
from engine.data.tokenizer import load_tokenizer
from engine.data.tokenizer_files import read_tokenizer_files
from engine.errors import UserError
from engine.identity.record import TokenizerRecord
from engine.ranks.first_rank import said_by_first_rank
from engine.run import Run, keeps_tokenizer, tokenizer_beside

_SHOWN = 8  # characters of a fingerprint; our choice
_HINT = "; leave --tokenizer out: this run keeps its own"


def tokenizer_now(run: Run, given: Path | None, earlier: TokenizerRecord) -> TokenizerRecord:
    """Return what is to be recorded of a run's tokenizer, on the rank that asks.

    given: what --tokenizer names; earlier: what was recorded, with a sha256 of "" where nothing
    was. Raises UserError where a run that has begun has another tokenizer than then, or is given
    another than its own. What is no longer there, or reads all texts alike, changes nothing.
    """
    own, sha256 = run.directory / "tokenizer", run.tokenizer.fingerprint()
    keeps = keeps_tokenizer(run.directory)
    if earlier.sha256 not in ("", sha256):
        found = f"{own} is not" if keeps else f"{own} is gone, and what was named is not"
        raise UserError(
            f"{found} the tokenizer that this run was made with "
            f"({earlier.sha256[:_SHOWN]} -> {sha256[:_SHOWN]}): put that back, or begin in a new "
            "--directory"
        )
    record = replace(earlier, sha256=sha256)
    if given is None:
        return record
    if not given.exists():
        _check_gone(given, earlier)
        return record
    path = tokenizer_beside(given)
    try:
        digest = read_tokenizer_files(path).digest()
        other = load_tokenizer(path) if keeps and digest != earlier.given else run.tokenizer
    except UserError as error:
        raise UserError(f"{error}{_HINT if keeps else ''}") from None
    if not run.tokenizer.reads_as(other):
        raise UserError(
            f"--tokenizer {given} is another tokenizer ({other.fingerprint()[:_SHOWN]}) than "
            f"{own} ({sha256[:_SHOWN]}), which this run keeps: leave the option out or name that "
            "folder, or begin in a new --directory"
        )
    return replace(record, path=str(given), given=digest)


def _check_gone(given: Path, earlier: TokenizerRecord) -> None:
    """Raise UserError where nothing is at the path that --tokenizer names, and it is not the one
    that the run was given: that may have gone since."""
    known = {given.absolute(), given.absolute() / "tokenizer"}
    if not earlier.path or Path(earlier.path).absolute() not in known:
        raise UserError(f"--tokenizer {given}: no such file or folder{_HINT}")


def keep_like_tokenizer(checkpoint: Path, copy: Path, role: str, run: Run) -> None:
    """Keep beside a network's copy the tokenizer that it was trained with, where that is not the
    run's and reads all texts alike; all ranks call together. checkpoint: what the copy is of."""

    def keep() -> str:
        trained_with = read_network(copy / role).tokenizer
        if trained_with in ("", run.tokenizer.fingerprint()):
            return ""
        try:
            theirs = load_tokenizer(tokenizer_beside(checkpoint))
        except UserError:  # without it nothing says so, and whoever loads the network refuses it
            return ""
        if theirs.fingerprint() == trained_with and theirs.reads_as(run.tokenizer):
            theirs.save(copy / "tokenizer")
        return ""

    said_by_first_rank(keep)


def fingerprint_of_copy(copy: Path, run: Run) -> str:
    """Return the fingerprint of the tokenizer with which a network's copy is to have been trained:
    the run's, or that of one that reads all texts alike. All ranks call together."""

    def look() -> str:
        own = run.tokenizer.fingerprint()
        if not (copy / "tokenizer").exists():
            return own
        theirs = load_tokenizer(copy / "tokenizer")
        return theirs.fingerprint() if theirs.reads_as(run.tokenizer) else own

    return said_by_first_rank(look)
