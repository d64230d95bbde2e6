from engine.huggingface.hard_texts import hard_texts


def test_hard_texts_are_thousands_and_have_what_tells_tokenizers_apart():
    texts = list(hard_texts())
    assert 5_000 < len(texts) < 50_000
    assert texts == list(hard_texts())
    joined = "".join(texts)
    for part in ("  ", "\r\n", "\t", "\u2581", "\u00a0", "\u3000", "\u200d", "\0", "</s>", "漢"):
        assert part in joined
    assert "" in texts and "e\u0301" in joined
