from engine.prepare.lengths import Lengths, measures_of


def test_lengths_have_the_papers_columns():
    lengths = Lengths(measures_of(None))
    for text in ("a", "a b", "a b c", "a b c d", "a b c d e"):
        lengths.add(text, ("prompt", "sft", "train"), ("kind", "sft", "chat"))
    found = lengths.summary()
    words = {"n": 5, "mean": 3.0, "std": 1.41, "min": 1, "25%": 2, "50%": 3, "75%": 4, "max": 5}
    assert found["prompt", "sft", "train", "words"] == words
    assert found["kind", "sft", "chat", "words"] == words
    assert found["prompt", "sft", "train", "characters"]["max"] == 9


def test_with_a_tokenizer_lengths_are_in_tokens_alone():
    lengths = Lengths(measures_of(lambda text: [0] * (2 * len(text))))
    lengths.add("abc", ("prompt",))
    assert {name: row["mean"] for name, row in lengths.summary().items()} == {
        ("prompt", "tokens"): 6.0
    }
