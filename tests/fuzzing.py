"""How many inputs a fuzz test draws, and how: `@fuzzed` over `@given(...)`."""

from hypothesis import settings

fuzzed = settings.get_profile("fuzz")  # tests/conftest.py made it, by --fuzz-inputs
