import io
import pickle
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.huggingface.pickles import Called, ForeignNameError, Named, read_pickle
from tests.fuzzing import fuzzed


class Anything:
    """Names of which all are expected."""

    def __contains__(self, name: str) -> bool:
        return True


def read(content: bytes, names=Anything()):  # noqa: B008 - it never changes
    return read_pickle(io.BytesIO(content), names)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_those_of_pickle(protocol):
    value = {"a": [1, -2, 3.5, None, True, ()], "b": ((1,), (1, 2), (1, 2, 3, 2**40, "é")), "c": {}}
    value["again"] = value["a"]
    found = read(pickle.dumps(value, protocol))
    assert found == value
    assert found["again"] is found["a"]


def test_one_pickle_ends_where_the_next_begins():
    stream = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps("two", 2) + b"rest")
    assert (read_pickle(stream), read_pickle(stream), stream.read()) == ([1], "two", b"rest")


def test_an_ordered_dict_is_a_dict_and_its_attributes_are_dropped():
    value = OrderedDict(a=1)
    value._metadata = {"": {"version": 1}}
    assert read(pickle.dumps(value, 2)) == {"a": 1}


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_a_file_names_is_not_imported_and_its_calls_are_records(protocol, tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was_run",)

    found = read(pickle.dumps({"a": Hostile()}, protocol).replace(b"pathlib", b"nowhere"))["a"]
    assert isinstance(found, Called)
    assert isinstance(found.arguments[0], Called)  # of a path
    assert not (tmp_path / "was_run").exists()
    assert isinstance(read(b"cno.such.module\nname\n."), Named)
    assert isinstance(read(pickle.dumps(Counter("a"), protocol)), Called)


@pytest.mark.parametrize("value", [Path.touch, Path("x"), {"a": [(Path("x"),)]}, Counter])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_name_that_is_not_expected_is_refused_wherever_it_stands(protocol, value):
    with pytest.raises(ForeignNameError, match="the name '(__builtin__|pathlib|collections)"):
        read(pickle.dumps(value, protocol), {"collections.OrderedDict"})


def test_a_long_name_is_cut():
    with pytest.raises(ForeignNameError) as caught:
        read(b"cmodule\n" + b"x" * 10**6 + b"\n.", ())
    assert len(str(caught.value)) < 80


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "exhausted"),
        (b"\x80\x02}", "exhausted"),
        (b"\x80\x02.", "not enough values|expected 1"),
        (b"\x80\x02]]e.", "makes no sense"),  # appends without a mark
        (b"\x80\x02h\x05.", "makes no sense"),  # a value that was never put away
        (b"\x80\x02}]K\x01s.", "makes no sense"),  # a list as a key
        (pickle.dumps(2**4000, 2), "instruction LONG4"),
        (pickle.dumps({1}, 4), "instruction EMPTY_SET"),
        (pickle.dumps(bytearray(3), 5), "instruction BYTEARRAY8"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"(ios\nsystem\n.", "instruction INST"),
    ],
)
def test_whatever_else_is_refused_in_a_few_words(content, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        read(content)
    assert len(str(caught.value)) < 200


def test_an_index_of_billions_takes_no_memory():
    assert read(b"\x80\x02K\x07r\xff\xff\xff\x7f.") == 7


SAMPLES = [
    pickle.dumps(value, protocol)
    for protocol in (0, 2, 4, 5)
    for value in ({"a": [1, 2.5, (None, True)]}, OrderedDict(a=Path("x")), [{1}, b"b", 2**70])
]


@pytest.mark.fuzz
@fuzzed
@given(
    content=st.binary(max_size=80)
    | st.tuples(st.sampled_from(SAMPLES), st.integers(0, 200), st.binary(max_size=4)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + len(parts[2]) :]
    )
)
def test_any_bytes_are_a_value_or_a_value_error(content):
    try:
        read(content, {"collections.OrderedDict"})
    except ValueError as error:
        assert len(str(error)) < 2000
