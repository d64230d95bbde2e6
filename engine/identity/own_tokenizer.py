"""Whether a run has the tokenizer that it began with: its folder's copy, which it keeps to the
end."""

from dataclasses import replace
from pathlib import Path

from engine.data.tokenizer import load_tokenizer
from engine.data.tokenizer_files import read_tokenizer_files
from engine.errors import UserError
from engine.identity.record import TokenizerRecord
from engine.run import Run, keeps_tokenizer, tokenizer_beside

_SHOWN = 8  # characters of a fingerprint; our choice
_HINT = "; leave --tokenizer out: this run keeps its own"


def tokenizer_now(run: Run, given: Path | None, earlier: TokenizerRecord) -> TokenizerRecord:
    """Return what is to be recorded of a run's tokenizer, on the rank that asks.

    given: what --tokenizer names; earlier: what was recorded, with a sha256 of "" where nothing
    was. Raises UserError where a run that has begun has another tokenizer than then, or is given
    another than its own. What is no longer there, or means the same, changes nothing.
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
    if given is None or not given.exists():
        return record
    path = tokenizer_beside(given)
    try:
        digest = read_tokenizer_files(path).digest()
        other = load_tokenizer(path) if keeps and digest != earlier.given else run.tokenizer
    except UserError as error:
        raise UserError(f"{error}{_HINT if keeps else ''}") from None
    if not run.tokenizer.is_same_as(other):
        raise UserError(
            f"--tokenizer {given} is another tokenizer ({other.fingerprint()[:_SHOWN]}) than "
            f"{own} ({sha256[:_SHOWN]}), which this run keeps: leave the option out or name that "
            "folder, or begin in a new --directory"
        )
    return replace(record, path=str(given), given=digest)
