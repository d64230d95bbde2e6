"""The language model and the tokenizer that a source holds."""

from pathlib import Path

from engine.checkpoints.found import find_network, run_of, size_of
from engine.checkpoints.weights import load_weights
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from engine.huggingface.convert import load_huggingface
from engine.huggingface.folder_tokenizer import warn_of_own_tokenizer
from engine.huggingface.foreign import is_foreign, require_model_folder
from engine.huggingface.model_folder import read_size
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.start import start_parallel
from engine.run import load_shared_tokenizer, require_path, tokenizer_beside
from engine.settings.generate import GenerateConfig
from engine.settings.numerics import Numerics
from engine.training.network import Network, build_network


def load_model(config: GenerateConfig) -> tuple[Network, Tokenizer]:
    """Return the language model at the source, on the ranks of the layout, and its tokenizer."""
    parallel = start_parallel(config.layout, config.seed, config.waiting, config)
    weights, is_huggingface = find_weights(config)
    if is_huggingface:
        size, beside = read_size(weights), weights
    else:
        size = size_of(weights, config.role)
        beside = run_of(weights) / "tokenizer"
    if config.tokenizer is not None:
        beside = tokenizer_beside(require_path(config.tokenizer, "tokenizer"))
    tokenizer = load_shared_tokenizer(lambda: beside)
    tokenizer.check_fits(size.vocab_size)
    network = build_network("language", size, parallel, numerics=Numerics(dtype=config.dtype))
    if is_huggingface:
        if config.tokenizer is not None:
            warn_of_own_tokenizer(weights, tokenizer)
        load_huggingface(network, weights)
    else:
        fingerprint = tokenizer.fingerprint()
        load_weights(network, weights, role=config.role, tokenizer_fingerprint=fingerprint)
    return network, tokenizer


def find_weights(config: GenerateConfig) -> tuple[Path, bool]:
    """Return the folder of the network at the source, and whether it is Hugging Face's."""
    source = require_path(config.source, "source")

    def look() -> str:
        if not is_foreign(source):
            return ""
        require_model_folder(source)
        if config.role != "policy":
            raise UserError(
                f"--role {config.role}: {source} is a Hugging Face folder, which holds one model; "
                "leave --role out"
            )
        return "foreign"

    if said_by_first_rank(look):
        return source, True
    return find_network(source, config.role, strict=config.strict), False
