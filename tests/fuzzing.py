"""How many inputs a generated test draws, and how: `@fuzzed` over `@given(...)`, or `settings` of a
state machine's TestCase."""

from hypothesis import settings

# tests/conftest.py made them, by --fuzz-inputs.
fuzzed = settings.get_profile("fuzz")
proved = settings.get_profile("proved")
"""Of a property whose test is not marked `fuzz`: few inputs, unless the option says how many."""
