"""A file of prompts, answered by a checkpoint."""

from pathlib import Path
from typing import Any

from engine.answers.asked import asked_as, warn_of_kinds
from engine.answers.kept import Answers, Origin, digest_of_prompts, digest_of_weights
from engine.answers.load import find_weights
from engine.data.batches import deal
from engine.data.limits import Limit, Limits
from engine.data.prompts import prompt_examples, read_prompts
from engine.data.tokenizer import Tokenizer
from engine.generation.generate import generate
from engine.printable import say
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.parallel import Parallel
from engine.settings.generate import GenerateConfig
from engine.training.network import Network


def answer_file(
    network: Network, tokenizer: Tokenizer, config: GenerateConfig, prompts: Path
) -> None:
    """Write num_samples answers to each prompt of the file, in its order. Raises UserError.

    What an earlier run of the same settings has answered is kept.
    """
    parallel = network.parallel
    renderer = asked_as(config, tokenizer)
    asked, read_report = read_prompts(
        prompts,
        renderer,
        fields=config.fields,
        skip_bad_lines=config.skip_bad_lines,
        skip_option="--skip-bad-lines",
    )
    warn_of_kinds(config, renderer.form, asked)
    context_length = network.size.context_length
    limit = Limit(context_length - 1, f"one less than the model's context of {context_length}")
    options: dict[str, Any] = {"too_long": config.too_long, "cut_option": "--too-long"}
    examples, length_report = prompt_examples(
        asked, tokenizer, max_prompt_length=limit.tokens, **options
    )
    limits = Limits(prompt=limit)
    limits.check(length_report, f"--prompts {prompts}", "--too-long")
    digest = digest_of_prompts([e.tokens for e in examples], tokenizer.fingerprint())
    origin = _origin(config, digest)
    num_answers = len(examples) * config.num_samples
    answers = Answers(config.out, origin, parallel, num_answers, overwrite=config.overwrite)
    if answers.is_finished:
        if parallel.is_writer:
            say(f"{config.out}: finished, {num_answers} answers; --overwrite draws them again")
        return
    if parallel.is_writer and answers.kept:
        say(f"{config.out}: {len(answers.kept)} of {num_answers} answers are there already")
    missing = [number for number in range(num_answers) if number not in answers.kept]
    numbers = _dealt(missing, [len(each.tokens) for each in examples], config, parallel)
    for response in generate(
        network,
        [examples[number // config.num_samples].tokens for number in numbers],
        config.sampling,
        eos_id=tokenizer.eos_id,
        tokenizer=tokenizer,
        seed=config.seed,
        sample_indices=numbers,
    ):
        index, sample = divmod(response.sample_index, config.num_samples)
        answer = {
            "prompt": asked[length_report.kept[index]].text,
            "response": tokenizer.decode(response.tokens.tolist()),
            "sample": sample,
            "tokens": len(response.tokens),
            "logprob": float(response.logprobs.sum()),
            "has_eos": response.has_eos,
        }
        answers.add(response.sample_index, answer)
    answers.finish()
    if parallel.is_writer:
        kept = limits.described(length_report)
        say(f"{config.out}: {num_answers} answers; {read_report}; prompts: {kept}")


def _dealt(
    missing: list[int], lengths: list[int], config: GenerateConfig, parallel: Parallel
) -> list[int]:
    """Return which of the missing answers this replica draws. The samples of a prompt stay on one,
    which computes it once; lengths: of the prompts, in tokens."""
    open_prompts = sorted({number // config.num_samples for number in missing})
    dealt = deal([lengths[index] for index in open_prompts], parallel.num_replicas)
    mine = {open_prompts[n] for n in dealt[parallel.replica_rank]}
    return [number for number in missing if number // config.num_samples in mine]


def _origin(config: GenerateConfig, digest: str) -> Origin:
    """Return what the answers depend on; digest: of the prompts."""
    weights, is_huggingface = find_weights(config)
    return Origin(
        weights=str(weights.resolve()),
        prompts=digest,
        num_samples=config.num_samples,
        sampling=config.sampling,
        dtype=config.dtype,
        seed=config.seed,
        content=said_by_first_rank(
            lambda: digest_of_weights(weights, is_huggingface=is_huggingface)
        ),
    )
