"""A benchmark's command line, and how a mistake in it is said: one line on stderr and status 2."""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator
from typing import NoReturn

from engine.errors import UserError


def command(module: str) -> argparse.ArgumentParser:
    """Return a parser of `python -m benchmarks.MODULE` that says a mistake without its usage."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}")
    parser.error = _end  # type: ignore[method-assign]
    return parser


def count(text: str) -> int:
    """Parse a number of things, one at least; an argument's type."""
    return _at_least(1, text)


def count_or_none(text: str) -> int:
    """Parse a number of things of which there may be none; an argument's type."""
    return _at_least(0, text)


def seconds(text: str) -> float:
    """Parse a time limit in seconds, above 0 and perhaps inf; an argument's type."""
    value = float(text)
    if math.isnan(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def check_minibatches(num_episodes: int, minibatch_size: int) -> None:
    """Raise UserError where an iteration's episodes cannot be cut into whole minibatches."""
    if num_episodes % minibatch_size:
        raise UserError(
            f"--num-episodes {num_episodes} must be a multiple of --minibatch-size {minibatch_size}"
        )


def check_context(names: str, num_tokens: int, context_length: int) -> None:
    """Raise UserError where the options of those names ask for more tokens than a model reads."""
    if num_tokens > context_length:
        raise UserError(f"{names}: {num_tokens} tokens, more than the context of {context_length}")


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Run a command that ends at a UserError with its line; a decorator of a benchmark's main."""
    try:
        yield
    except UserError as error:
        _end(str(error))


def _at_least(fewest: int, text: str) -> int:
    value = int(text)
    if value < fewest:
        raise argparse.ArgumentTypeError(f"must be at least {fewest}, got {text}")
    return value


def _end(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
