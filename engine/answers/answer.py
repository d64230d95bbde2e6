"""Text in, text out: a file of prompts answered by a checkpoint, or a dialogue in the terminal."""

from engine.answers.batch import answer_file
from engine.answers.dialogue import talk
from engine.answers.load import load_model
from engine.claim import holding_claims
from engine.errors import UserError
from engine.ranks.failure import leave_all
from engine.settings.generate import GenerateConfig
from engine.stop import leaving_at_signals


@leaving_at_signals(leave_all)
@holding_claims()
def generate_text(config: GenerateConfig) -> None:
    """Answer the prompts of a file, or the user's in the terminal. Raises UserError."""
    if config.num_samples < 1:
        raise UserError(f"--num-samples must be at least 1, got {config.num_samples}")
    config.sampling.check()
    network, tokenizer = load_model(config)
    try:
        if config.prompts is None:
            talk(network, tokenizer, config)
        else:
            answer_file(network, tokenizer, config, config.prompts)
    except FloatingPointError as error:
        raise UserError(f"{config.source}: {error}") from None
