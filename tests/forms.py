"""Small sizes of forms that differ from GPT-3's in every field, as families of models do."""

from models.form import Form, Rotary, RotaryScaling
from models.sizes import GPTSize

_DIMENSIONS = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_heads": 4,
    "vocab_size": 100,
    "context_length": 64,
}
FORMS = {
    "llama": GPTSize(
        **_DIMENSIONS,
        query_groups=2,
        head_width=16,
        inner_width=40,
        form=Form(
            norm="rms",
            norm_epsilon=1e-6,
            norms_heads=True,
            activation="silu",
            is_gated=True,
            rotary=Rotary(
                base=100.0, scaling=RotaryScaling(kind="llama3", factor=4.0, original_context=16)
            ),
            bias="none",
            is_tied=False,
        ),
    ),
    "qwen2": GPTSize(
        **_DIMENSIONS,
        query_groups=2,
        inner_width=48,
        form=Form(norm="rms", activation="silu", is_gated=True, rotary=Rotary(), bias="qkv"),
    ),
    "neox": GPTSize(
        **_DIMENSIONS,
        form=Form(
            activation="gelu",
            rotary=Rotary(fraction=0.5),
            bias="mlp",
            is_tied=False,
            is_parallel=True,
        ),
    ),
    # No ReLU: its kinks turn rounding into whole steps of Adam, which layouts would differ by.
    "post-norm": GPTSize(**_DIMENSIONS, form=Form(is_post_norm=True, activation="gelu")),
    "opt-350m": GPTSize(
        **_DIMENSIONS, embedding_width=16, form=Form(is_post_norm=True, activation="gelu")
    ),
    "wide embedding": GPTSize(
        **_DIMENSIONS,
        embedding_width=48,
        form=Form(norm="rms", activation="silu", rotary=Rotary(), bias="none", is_tied=False),
    ),
    "banded": GPTSize(
        **_DIMENSIONS, form=Form(window=5, windowed_layers="every second", scales_by_layer=True)
    ),
}
