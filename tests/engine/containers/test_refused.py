import codecs
import io
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.containers.refused import refuse_other_kinds
from engine.containers.rows import read_rows
from engine.errors import UserError

LINE = '{"prompt": "the mill", "response": "is cheap"}\n'


def zipped(name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, LINE)
    return sink.getvalue()


def tarred() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        info = tarfile.TarInfo("train.jsonl")
        info.size = len(LINE)
        archive.addfile(info, io.BytesIO(LINE.encode()))
    return sink.getvalue()


def saved_by(save: object) -> bytes:
    sink = io.BytesIO()
    save(sink)  # type: ignore[operator]
    return sink.getvalue()


def database(folder: Path) -> bytes:
    with sqlite3.connect(folder / "made.db") as connection:
        connection.execute("create table a (b)")
    return (folder / "made.db").read_bytes()


KINDS: dict[str, tuple[bytes, str]] = {
    "zip": (zipped("train.jsonl"), "a zip archive: unpack it"),
    "Excel": (zipped("[Content_Types].xml"), "an Excel workbook: save it as CSV"),
    "npz": (saved_by(lambda sink: np.savez(sink, a=np.ones(2))), "numpy's .npz"),
    "npy": (saved_by(lambda sink: np.save(sink, np.ones(2))), "numpy's .npy"),
    "torch.save": (saved_by(lambda sink: torch.save({"a": 1}, sink)), "a pickle, as of torch.save"),
    "pickle": (pickle.dumps([{"prompt": "a"}]), "a pickle, as of torch.save, which could run code"),
    "tar": (tarred(), "a tar archive: unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0", "an HDF5 file"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n",
        "a git-lfs pointer and not the file: run `git lfs pull` there",
    ),
    "HTML page": (b"\n<!DOCTYPE html><html>", "a page of HTML or XML, as a download that failed"),
    "PDF": (b"%PDF-1.7\n", "a PDF"),
    "UTF-16": (LINE.encode("utf-16"), "UTF-16: `iconv -f utf-16 -t utf-8` makes it UTF-8"),
    "UTF-16 without a mark": (LINE.encode("utf-16-le"), "utf-16le: `iconv -f utf-16le"),
    "UTF-16, big ends first": (LINE.encode("utf-16-be"), "utf-16be"),
    "UTF-32": (LINE.encode("utf-32"), "UTF-32"),
    "UTF-32 without a mark": (LINE.encode("utf-32-be"), "utf-32be"),
    "zeros": (bytes(1000), ":1: not text: it begins with 1000 NULs"),
    "lz4": (b"\x04\x22\x4d\x18abc", "packed by lz4"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train"])
def test_what_holds_no_data_is_named_whatever_it_is_called(kind: str, name: str, tmp_path: Path):
    content, said = KINDS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_rows(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name))
    assert said in str(error.value)


def test_a_database_is_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(database(tmp_path))
    with pytest.raises(UserError, match="an SQLite database: write its rows as JSON lines"):
        list(read_rows(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "shift-jis", "cp037"])
def test_text_is_not_taken_for_another_kind(encoding: str, tmp_path: Path):
    for text in (LINE, "PARENT\n", "ORC\n", "BZh", "PAR", "7z", "x", "", "Rar!", "Obj", "\x80"):
        refuse_other_kinds(tmp_path / "a", text.encode(encoding, "replace"))
    refuse_other_kinds(tmp_path / "a", codecs.BOM_UTF8 + b"<p>", is_prose=True)
    refuse_other_kinds(tmp_path / "a", b"<html>", is_prose=True)
