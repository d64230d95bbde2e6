"""Checkpoints and runs from elsewhere: no code in them runs, whatever file it lies in, and what is
consistent but hostile ends in words."""

import json
import math
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from engine.answers.load import load_model
from engine.checkpoints.__main__ import main
from engine.checkpoints.found import size_of
from engine.checkpoints.manifest import FileDigest
from engine.errors import UserError
from engine.huggingface.convert import export_huggingface
from engine.settings.convert import ConvertConfig
from engine.settings.generate import GenerateConfig
from tests.engine.checkpoints.resigned import change, resign
from tests.engine.checkpoints.stage_runs import ROLES, Resumer, limited, resumer
from tests.tiny import EVERY_STEP, sft_config, train

ADDRESS_SPACE = 2 << 30  # bytes more than are taken already: far more than these networks want


class Payload:
    """Touches a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch '{self._marker}'",)


class PlantedMetadata(Metadata):
    """Of harmless classes; a reader of torch's would unpickle the file that it leads to."""


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


def zipped(marker: Path) -> bytes:
    path = marker.with_name("zip")
    torch.save({"model": Payload(marker)}, path)
    content = path.read_bytes()
    path.unlink()
    return content


PAYLOADS: dict[str, Callable[[Path], bytes]] = {"a pickle": pickled, "a zip": zipped}
ONE_QUICKLY = ["a pickle", pytest.param("a zip", marks=pytest.mark.slow)]


def bytes_item() -> bytes:
    return pickle.dumps(Metadata({"decoder.final_layernorm.weight": BytesStorageMetadata()}))


@pytest.fixture(scope="module")
def resumers(finished: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("hostile")
    found = {stage: resumer(stage, finished, tiny, folder) for stage in ROLES}
    for run in found.values():
        shutil.copytree(run.run, run.run.with_name(f"{run.stage}_kept"))
    return found


@pytest.fixture(params=["sft", *(pytest.param(s, marks=pytest.mark.slow) for s in ("rm", "ppo"))])
def run(request: pytest.FixtureRequest, resumers: dict) -> Resumer:
    """A run as it was written."""
    return fresh(resumers[request.param])


def fresh(run: Resumer) -> Resumer:
    shutil.rmtree(run.run)
    shutil.copytree(run.run.with_name(f"{run.stage}_kept"), run.run)
    return run


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def ends_in_words(attempt: Callable[[], object]) -> str:
    """Make an attempt that may fail with a user's mistake only; return its words, "" for none."""
    try:
        with limited():
            attempt()
    except UserError as error:
        assert len(str(error).splitlines()) <= 2, error
        assert len(str(error)) < 2_000, error
        return str(error)
    return ""


def readers(run: Resumer, out: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads a run: each may fail with a user's mistake only."""
    found: dict[str, Callable[[], object]] = {
        "resume": run.resume,
        "verify": lambda: main(["verify", str(run.run)]),
        "inspect": lambda: main(["inspect", str(run.run)]),
    }
    for role in ROLES[run.stage]:
        found[f"load {role}"] = lambda role=role: run.load(role)
        found[f"size {role}"] = lambda role=role: size_of(run.run, role)
        if role in ("policy", "ema"):
            found[f"generate {role}"] = lambda role=role: load_model(
                GenerateConfig(source=run.run, role=role)
            )
            found[f"export {role}"] = lambda role=role: export_huggingface(
                ConvertConfig(direction="export", source=run.run, out=out / role, role=role)
            )
    return found


def read_all(run: Resumer, out: Path, marker: Path) -> dict[str, str]:
    """Have everything read a run; return what each says."""
    said = {}
    for name, reader in readers(run, out).items():
        said[name] = ends_in_words(reader)
        assert not marker.exists(), f"{name} ran it"
        shutil.rmtree(out, ignore_errors=True)
    return said


def test_a_payload_would_run_where_it_is_unpickled(marker: Path):
    for make in PAYLOADS.values():
        (marker.parent / "file").write_bytes(make(marker))
        torch.load(marker.parent / "file", weights_only=False) if make is zipped else pickle.loads(
            make(marker)
        )
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize("name", ONE_QUICKLY)
def test_payload_in_the_place_of_a_file_is_passed_over(
    name: str, run: Resumer, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content = PAYLOADS[name](marker)
    for path in run.files():
        kept = path.read_bytes()
        path.write_bytes(content)
        progress = run.resume()
        assert progress is not None and progress["step"] == run.step - 1
        assert main(["verify", str(run.run)]) == 1
        assert str(path) in capsys.readouterr().out
        said = read_all(run, tmp_path / "out", marker)
        assert not any(said.values()), said  # the one before, or what the file is no part of
        path.write_bytes(kept)


@pytest.mark.parametrize("name", PAYLOADS)
def test_payload_in_every_file_of_every_checkpoint_is_an_error(
    name: str, run: Resumer, marker: Path, tmp_path: Path
):
    content = PAYLOADS[name](marker)
    for path in (p for p in run.checkpoints.rglob("*") if p.is_file() and p.name != "latest"):
        path.write_bytes(content)
    said = read_all(run, tmp_path / "out", marker)
    assert main(["verify", str(run.run)]) == 1
    for reader, words in said.items():
        if reader not in ("verify", "inspect"):  # which print
            assert str(run.newest) in words, reader
    (run.checkpoints / "latest").write_bytes(content)
    assert not any(
        w == "" for r, w in read_all(run, tmp_path / "out", marker).items() if "e" not in r
    )
    with pytest.raises(UserError, match="latest"):
        run.resume()


def test_payload_beside_the_files_is_not_looked_at(
    run: Resumer, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    names = (".metadata", "common.pt", "metadata.json", "__0_0.distcp", "data.pkl", "weights.bin")
    for folder in (
        run.run,
        run.checkpoints,
        run.newest,
        *(p.parent for p in run.newest.glob("*/network.json")),
    ):
        for number, name in enumerate(names):
            make = list(PAYLOADS.values())[number % 2]
            (folder / name).write_bytes(make(marker))
        if folder.parent == run.newest:
            (folder / ".metadata").write_bytes(bytes_item())
    progress = run.resume()
    assert progress is not None and progress["step"] == run.step
    assert not any(read_all(run, tmp_path / "out", marker).values())
    capsys.readouterr()
    assert main(["verify", str(run.run)]) == 0


@pytest.mark.parametrize("metadata", ["a payload", "a bytes item"])
def test_checkpoint_of_the_older_form_is_not_read(
    metadata: str, run: Resumer, marker: Path, tmp_path: Path
):
    """torch's own: a pickled .metadata, common.pt, and files of tensors that may be pickles too."""
    for step in (run.newest, run.before):
        for role in ROLES[run.stage]:
            description = (step / role / "network.json").read_text()
            shutil.rmtree(step / role)
            (step / role).mkdir()
            (step / role / "network.json").write_text(description)
            is_payload = metadata == "a payload"
            (step / role / ".metadata").write_bytes(pickled(marker) if is_payload else bytes_item())
            for name in ("common.pt", "__0_0.distcp"):
                (step / role / name).write_bytes(zipped(marker))
            (step / role / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        (step / "manifest.json").unlink()
    for name, words in read_all(run, tmp_path / "out", marker).items():
        if name not in ("verify", "inspect"):
            assert "a checkpoint of before manifests, which is not read" in words, name


@pytest.mark.parametrize("name", ONE_QUICKLY)
def test_payload_in_the_files_of_a_run_does_not_run(
    name: str, resumers: dict, tiny: Path, marker: Path, tmp_path: Path
):
    run = fresh(resumers["sft"])
    files = [p for p in run.run.rglob("*") if p.is_file() and run.checkpoints not in p.parents]
    found = {str(p.relative_to(run.run)).partition("/")[0] for p in files}
    assert found >= {"config.json", "tokenizer", "tokens", "metrics.jsonl"}
    (run.run / "selected.json").touch()
    config = sft_config(tiny, run.run, saving=EVERY_STEP, save_every_epoch=True)
    for path in [
        *files,
        run.run / "selected.json",
        run.run / "samples.jsonl",
        run.run / "alarms.jsonl",
    ]:
        fresh(run)
        path.write_bytes(PAYLOADS[name](marker))
        words = ends_in_words(lambda: train(config))
        assert not marker.exists(), path
        # What is made again or only written is no error.
        assert words == "" or path.name in words, path
        for reader in ("generate policy", "export policy"):
            words = ends_in_words(readers(run, tmp_path / "out")[reader])
            assert not marker.exists(), (path, reader)
            assert words == "" or path.name in words, (path, reader)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


WORDS, PROJECTION = (
    "embedding.word_embeddings.weight",
    "decoder.layers.self_attention.linear_proj.weight",
)
NORM = "decoder.final_layernorm.weight"
HUGE = (1 << 39, 1 << 62, 10**400)
Change = tuple[str, tuple, Any]


def sizes() -> list[Change]:
    """Changes of network.json."""
    found: list[Change] = [
        ("network.json", ("kind",), to) for to in ("x", None, [], 3, "x" * 10**6)
    ]
    found += [("network.json", ("size",), to) for to in ({}, [], None, "tiny", {"hidden_size": 32})]
    for name in ("num_layers", "hidden_size", "num_heads", "vocab_size", "context_length"):
        for to in (*HUGE, 0, -1, True, 1.5, "32", None, [32], math.nan):
            found.append(("network.json", ("size", name), to))
    found.append(("network.json", ("size", "extra"), 1))
    found += [("network.json", ("tokenizer",), to) for to in (None, 3, [], "another")]
    return found


def indices() -> list[Change]:
    """Changes of tensors.json."""
    found: list[Change] = [("tensors.json", ("tensors",), to) for to in ({}, [], None, {"a": 1})]
    for tensor in (WORDS, PROJECTION, NORM):
        at = ("tensors", tensor)
        found.append(("tensors.json", at, None))
        found += [
            ("tensors.json", (*at, "dtype"), to) for to in ("F64", "F16", "I32", "x", None, [])
        ]
        found += [
            ("tensors.json", (*at, "shape"), to)
            for to in ([], [31], [HUGE[0]], [HUGE[1], 2], [-32], None)
        ]
        found += [("tensors.json", (*at, "pieces"), to) for to in ([], None, {}, [None], [{}])]
        piece = (*at, "pieces", 0)
        for to in (
            "../../latest",
            "/etc/passwd",
            "weights-00000.safetensors\0",
            "optimizer-00000.safetensors",
        ):
            found.append(("tensors.json", (*piece, "file"), to))
        found += [
            ("tensors.json", (*piece, "file"), to) for to in ("weights-00009.safetensors", None, 3)
        ]
        found += [
            ("tensors.json", (*piece, "offset"), to) for to in ([], [1] * 3, [-1], [HUGE[2]], None)
        ]
        found += [
            ("tensors.json", (*piece, "shape"), to) for to in ([], [9], [HUGE[0]], [HUGE[2]], None)
        ]
    return found


def counts() -> list[Change]:
    found: list[Change] = [("tensors.json", ("counts",), to) for to in ({}, [], None, 3)]
    for to in (None, "3", -1.0, math.nan, math.inf, 10**400, [3.0], True):
        found.append(("tensors.json", ("counts", "step"), to))
    for to in (None, [], "x", {"total": "x"}, {"in_a_row": 10**400}, {"total": -1}):
        found.append(("tensors.json", ("counts", "skipped"), to))
    return found


def numbers() -> list[Change]:
    """Changes of progress.json."""
    at = "../progress.json"
    found: list[Change] = [
        (at, ("step",), to) for to in (None, "3", 3.0, True, -1, 10**400, 1, [3])
    ]
    found += [
        (at, ("kl_coef",), to) for to in (None, "x", math.nan, math.inf, 10**400, [1.0], True)
    ]
    found += [(at, ("metrics",), to) for to in (None, [], "x", {"a/b": "x"}, {"a/b": 10**400})]
    found += [(at, ("alarms",), to) for to in (None, [], {}, {"streaks": 3}, "x")]
    found += [(at, ("epochs",), to) for to in (None, {}, [3], [{}], [{"epoch": 1}], "x")]
    return found


def consistent(run: Resumer, role: str, changes: list[Change]) -> list[tuple[Change, str]]:
    """Return each change, and where it is not refused; the checksums are right."""
    for name, keys, to in changes:
        fresh(run)
        change(run.newest / role / name, *keys, to=to)
        resign(run.newest)
        yield_words = {
            "resume": ends_in_words(run.resume),
            "load": ends_in_words(lambda: run.load(role)),
        }
        yield (name, keys, to), yield_words  # type: ignore[misc]


@pytest.fixture
def little_memory():  # type: ignore[no-untyped-def]
    """Let this process take little more than it has."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESS_SPACE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("stage", "role"),
    [
        ("sft", "policy"),
        pytest.param("rm", "reward_model", marks=pytest.mark.slow),
        pytest.param("ppo", "ema", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("make", [sizes, indices])
def test_consistent_but_hostile_network_is_refused_by_who_reads_it(
    make: Callable[[], list[Change]], stage: str, role: str, resumers: dict, little_memory: None
):
    run, folder = resumers[stage], resumers[stage].newest / role
    for found, words in consistent(run, role, make()):
        for reader, said in words.items():
            if found[1] == ("tokenizer",) and found[2] == "another" and reader == "load":
                continue  # it is given no tokenizer to compare with
            assert str(folder) in said, (found, reader)
        if found[0] == "network.json" and found[1][0] == "size":
            assert str(folder) in ends_in_words(lambda: size_of(run.run, role)), found
        assert main(["inspect", str(run.newest)]) in (0, 1)
        assert main(["verify", str(run.newest)]) in (0, 1)  # as written, and perhaps senseless


def test_consistent_but_hostile_numbers_are_refused(resumers: dict, capsys):
    for stage, make in (("sft", counts), ("sft", numbers), ("ppo", numbers)):
        run = resumers[stage]
        for found, words in consistent(run, "policy", make()):
            if found[1:] == (("counts",), {}) and not words["resume"]:
                pytest.fail("an optimizer without counts")
            assert str(run.newest) in words["resume"], (stage, found)
            is_index = (
                found[0] == "tensors.json"
                and type(found[2]) is not dict
                and found[1] == ("counts",)
            )
            assert bool(words["load"]) == is_index, found  # weights have no such numbers


def test_weights_that_are_not_numbers_are_refused(resumers: dict):
    run = resumers["sft"]
    for value in (math.nan, math.inf):
        fresh(run)
        path = run.newest / "policy" / "weights-00000.safetensors"
        tensors = load_file(path)
        tensors[f"{NORM}@0"][3] = value
        path.unlink()
        save_file(tensors, path)
        resign(run.newest)
        for attempt in (run.resume, lambda: run.load("policy")):
            assert "weights that are not finite" in ends_in_words(attempt)


def test_file_with_other_tensors_than_its_index_says_is_refused(resumers: dict):
    run = resumers["sft"]
    for name, tensor in (
        (f"{NORM}@0", torch.zeros(31)),
        (f"{NORM}@0", torch.zeros(32, dtype=torch.int64)),
        (f"{NORM}@0", torch.zeros(32, dtype=torch.float16)),
        (f"{NORM}@1", torch.zeros(32)),
    ):
        fresh(run)
        path = run.newest / "policy" / "weights-00000.safetensors"
        tensors = load_file(path)
        del tensors[f"{NORM}@0"]
        path.unlink()
        save_file(tensors | {name: tensor, "padding": torch.zeros(64)}, path)
        resign(run.newest)
        for attempt in (run.resume, lambda: run.load("policy")):
            assert f"{path}: cannot be read as tensors.json says" in ends_in_words(attempt)


def test_weights_in_a_pipe_that_nobody_checks_are_not_waited_for(resumers: dict):
    """Who loads weights alone checks no file of optimizer state."""
    run = fresh(resumers["sft"])
    optimizer = run.newest / "policy" / "optimizer-00000.safetensors"
    change(
        run.newest / "policy" / "tensors.json",
        *("tensors", NORM, "pieces", 0, "file"),
        to=optimizer.name,
    )
    optimizer.unlink()
    os.mkfifo(optimizer)
    digest = FileDigest(bytes=1 << 40, xxh3_128="")
    resign(run.newest, **{f"policy/{optimizer.name}": digest})
    assert str(run.newest) in ends_in_words(lambda: run.load("policy"))
    progress = run.resume()  # which checks it
    assert progress is not None and progress["step"] == run.step - 1


def test_listed_files_that_are_not_there_or_lead_out_are_damage(resumers: dict, capsys):
    run = resumers["sft"]
    for name in ("policy/more", "more"):
        fresh(run)
        resign(run.newest, **{name.replace("/", "__"): FileDigest(bytes=3, xxh3_128="")})
        progress = run.resume()
        assert progress is not None and progress["step"] == run.step - 1
        assert name in capsys.readouterr().err
    for name in ("../latest", "/etc/passwd", "policy/../x", "a\0"):
        fresh(run)
        resign(run.newest, **{name: FileDigest(bytes=3, xxh3_128="")})
        progress = run.resume()
        assert progress is not None and progress["step"] == run.step - 1
        assert "is no file of a checkpoint" in capsys.readouterr().err


def test_kept_runs_are_as_they_were(resumers: dict):
    """The tests above have changed copies: what is left reads as it was written."""
    for run in resumers.values():
        progress = fresh(run).resume()
        assert progress is not None and progress["step"] == run.step
        assert json.loads((run.newest / "progress.json").read_text()) == progress
