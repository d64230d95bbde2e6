"""Whether a Hugging Face folder's own tokenizer reads texts as the one used with its model does."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from engine.checkpoints.whole import warn
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import UserError
from engine.ranks.first_rank import said_by_first_rank


def check_own_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError, on all ranks, where a Hugging Face folder's tokenizer reads texts otherwise
    than the one that a run has; say so where it has none that can be read. All call together."""

    def compare() -> str:
        try:
            is_same = _reads_as_own(path, tokenizer)
        except UserError as error:
            warn(f"{error}: nothing says whether {path} was trained with this run's tokenizer")
            return ""
        if not is_same:
            raise UserError(
                f"{path}: its tokenizer is another than this run's ({tokenizer.path}), by more "
                "than control tokens: in the same ids it reads other words. Train one from this "
                "run's base model; or, knowing that they are the same, import it with this run's: "
                "recipes/convert_hf.py import --tokenizer"
            )
        return ""

    said_by_first_rank(compare)


def warn_of_own_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Say, on the first rank, where a tokenizer that was chosen for a Hugging Face folder's model
    reads texts otherwise than the folder's own. All call together."""

    def compare() -> str:
        with contextlib.suppress(UserError):  # it has none that can be read
            if not _reads_as_own(path, tokenizer):
                warn(
                    f"--tokenizer {tokenizer.path} is another tokenizer than that in {path}, which "
                    "its model was trained with: in the same ids it reads other words"
                )
        return ""

    said_by_first_rank(compare)


def _reads_as_own(path: Path, tokenizer: Tokenizer) -> bool:
    own = load_tokenizer(path)
    return any(tokenizer.reads_as(each) for each in (own, *_beside(path, own)))


def _beside(path: Path, tokenizer: Tokenizer) -> Iterator[Tokenizer]:
    """Yield the sentencepiece model beside a folder's tokenizer.json, which was made from it, as
    our exports have both."""
    models = list(path.glob("*.model"))
    if tokenizer.sentencepiece_model() is None and len(models) == 1:
        with contextlib.suppress(UserError):
            yield load_tokenizer(models[0])
