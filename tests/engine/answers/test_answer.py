import pytest
import torch

from engine.answers.answer import generate_text
from engine.answers.load import load_model
from engine.errors import UserError
from engine.settings.generate import GenerateConfig
from engine.settings.sampling import SamplingConfig
from tests.engine.answers.answering import config


@pytest.mark.parametrize("dialogue", [False, True])
def test_weights_that_are_not_finite_are_a_mistake(dialogue, run, tmp_path, monkeypatch):
    def load_broken(config: GenerateConfig):
        network, tokenizer = load_model(config)
        next(network.modules[0].parameters()).data.fill_(torch.nan)
        return network, tokenizer

    monkeypatch.setattr("engine.answers.answer.load_model", load_broken)
    monkeypatch.setattr("builtins.input", lambda prompt: "the mill")
    settings = config(run / "policy", tmp_path, **({"prompts": None} if dialogue else {}))
    with pytest.raises(UserError, match="policy: the logits of sample .* are not finite"):
        generate_text(settings)
    assert not settings.out.exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_samples": 0}, "--num-samples must"),
        ({"source": None}, "--source is required"),
        ({"sampling": SamplingConfig(top_p=0.0)}, "--sampling.top-p must"),
    ],
)
def test_a_mistake_is_named(run, tmp_path, change, match):
    settings = {"source": run / "policy"} | change
    with pytest.raises(UserError, match=match):
        generate_text(config(tmp_path=tmp_path, **settings))
