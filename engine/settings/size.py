"""The size that a setting names. Imports neither torch nor megatron."""

from engine.errors import UserError, quoted
from models.sizes import SIZES, GPTSize


def named_size(name: str) -> GPTSize:
    """Return the size of that name, with GPT-3's vocabulary unless it is a small one; raises
    UserError for an unknown name."""
    if name not in SIZES:
        raise UserError(f"no size is named {quoted(name)}; the sizes are {', '.join(SIZES)}")
    return SIZES[name]
