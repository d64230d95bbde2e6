"""A pickle read as plain values: nothing is imported, nothing is called.

pickle.load is a machine that runs what a file says. Here the few instructions that torch.save
writes for a dictionary of tensors (protocol 2, and 4) build numbers, texts, lists, tuples and
dictionaries. A function or a class that the file names stays a name, and only names that the
reader expects may stand there; a call of it is a record. Any other instruction is refused. Memory
and time are bounded by the bytes that are read.
"""

import pickletools
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, BinaryIO

_MOST_SHOWN = 60  # characters of a name from the file in an error; our choice


class ForeignNameError(ValueError):
    """The pickle names a function or a class that has no place in it, and may mean to run it."""


@dataclass(frozen=True, eq=False)
class Named:
    """What a file names by its module and its name there."""

    name: str


@dataclass(frozen=True, eq=False)
class Called:
    """What a file asks to be made by calling `function`."""

    function: Any
    arguments: Any


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """What the file keeps outside of the pickle, under a key of any form."""

    key: Any


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_PLAIN = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("SHORT_BINSTRING", "BINSTRING"),  # texts that Python 2 wrote
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(stream: BinaryIO, names: Container[str] = ()) -> Any:
    """Return what one pickle at the stream's place holds; the stream then stands behind it.

    names: the functions and classes that may be named in it, as module.name.
    Raises ValueError, in a few words, for a pickle that is damaged or asks for more.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                (value,) = stack
                return value
            _follow(opcode.name, argument, stack, memo)
            if stack and isinstance(stack[-1], Named) and stack[-1].name not in names:
                raise ForeignNameError(f"the name {stack[-1].name!r:.{_MOST_SHOWN}}")
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a pickle that makes no sense: {type(error).__name__}") from None
    raise ValueError("a pickle without an end")


def _follow(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Do what one instruction says."""
    if name in _PLAIN:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "TUPLE":
        stack.append(tuple(_above_mark(stack)))
    elif name in _TUPLES:
        values = [stack.pop() for _ in range(_TUPLES[name])]
        stack.append(tuple(values[::-1]))
    elif name in _EMPTY:
        stack.append(_EMPTY[name]())
    elif name in ("APPEND", "APPENDS"):
        values = [stack.pop()] if name == "APPEND" else _above_mark(stack)
        _of(list, stack[-1]).extend(values)
    else:
        _follow_name(name, argument, stack)


def _follow_name(name: str, argument: Any, stack: list[Any]) -> None:
    """Do what one instruction says that names something, gives it a name, or would call it."""
    if name in ("SETITEM", "SETITEMS"):
        values = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else _above_mark(stack)
        _set_items(_of(dict, stack[-1]), values)
    elif name == "GLOBAL":
        stack.append(Named(argument.replace(" ", ".", 1)))
    elif name == "STACK_GLOBAL":
        attribute, module = _of(str, stack.pop()), _of(str, stack.pop())
        stack.append(Named(f"{module}.{attribute}"))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        is_dict = isinstance(function, Named) and function.name == "collections.OrderedDict"
        stack.append({} if is_dict and arguments == () else Called(function, arguments))
    elif name == "BUILD":
        stack.pop()  # attributes: those of a module's dictionary are versions
    elif name == "BINPERSID":
        stack.append(Elsewhere(stack.pop()))
    elif name not in ("PROTO", "FRAME"):
        raise ValueError(f"the instruction {name}, which no file of tensors needs")


def _above_mark(stack: list[Any]) -> list[Any]:
    """Take what lies above the last mark off the stack, and the mark."""
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _set_items(target: dict[Any, Any], values: list[Any]) -> None:
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[_of((str, int), key)] = value


def _of(kind: Any, value: Any) -> Any:
    """Return a value that is of that kind; raises TypeError."""
    if not isinstance(value, kind):
        raise TypeError
    return value
