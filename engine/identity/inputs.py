"""What a stage is made from, held to what its run was made from at its first start.

    RUN/identity.json    digests of networks, data, tokenizer and code, versions of packages
    RUN/sources/         the networks' own copies (engine/checkpoints/sources.py)

Until a run has a checkpoint a start writes both anew; from then on they are fixed.
"""

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.found import read_network
from engine.checkpoints.manifest import MANIFEST, read_manifest
from engine.checkpoints.retention import step_name
from engine.checkpoints.saving import remove
from engine.checkpoints.sources import (
    Source,
    digest_of_network,
    naming_source,
    newest_source,
    take_source,
)
from engine.checkpoints.weights import load_weights
from engine.claim import UNFINISHED
from engine.data.prompt_format import write_prompt_format
from engine.errors import UserError, quoted
from engine.files import sync_folder, writing
from engine.huggingface.described import stored_size
from engine.huggingface.foreign import is_foreign
from engine.huggingface.model_source import digest_of_model, take_model
from engine.identity.data_files import look_at
from engine.identity.held_to import HeldTo, at_odds, held_to, odds_in_words
from engine.identity.made_from import (
    NamedNetwork,
    RunConfig,
    beginning,
    files_of,
    names_of,
    networks_of,
    stage_of,
)
from engine.identity.origins import note_of_origin
from engine.identity.own_tokenizer import (
    fingerprint_of_copy,
    keep_like_tokenizer,
    tokenizer_now,
)
from engine.identity.prompt_formats import renderer_of
from engine.identity.record import (
    IDENTITY,
    Acceptance,
    Change,
    Code,
    Identity,
    NetworkRecord,
    changes,
    disagreements,
    identity_in,
    identity_text,
    write_identity,
)
from engine.identity.refusal import refusal
from engine.process.software import code_commit, code_digest, package_versions
from engine.ranks.first_rank import said_by_first_rank
from engine.run import Changed, Run, has_begun, require_path
from engine.settings.saved import with_saved_fields
from engine.settings.size import check_named_size
from engine.training.network import Network
from models.sizes import GPTSize

_POLICY_COPIES = ("policy", "reference")  # the names that the copy of PPO's policy may have


class Inputs:
    """The networks, files and software of a stage. All ranks make it, and call it, together.

    Raises UserError, on all of them, where the run has checkpoints and was made from anything else.
    """

    def __init__(self, run: Run, config: RunConfig) -> None:
        # The settings have from here on what they take over from the run before.
        self.renderer, self.config, told_of_prompts = renderer_of(run, config)
        self._run = run
        self._recorded: Identity | None = None  # on the first rank, as all that is read from files
        self._accepted: list[Change] = []
        told = json.loads(said_by_first_rank(self._begin))
        self._known: list[str] = told["known"]
        self.goes_on: bool = told["goes_on"]
        """Whether the run has a checkpoint, which holds what the stage has trained."""
        settings: Changed = {name: tuple(both) for name, both in told["settings"].items()}
        with self._saying(settings):
            if settings:  # what else keeps the run from going on is seen with those it had
                before = {name: old for name, (old, _) in settings.items()}
                self.config = with_saved_fields(self.config, before)
            told |= json.loads(said_by_first_rank(self._clear))
            self._networks = networks_of(self.config, told["policy_kept_as"])
            self._sources = self._take(set(told["kept"]))
        told = json.loads(said_by_first_rank(lambda: self._compare(settings)))
        self.notes: list[str] = told["notes"] + told_of_prompts
        """What is to be told of where the networks come from, and of the form of prompts."""
        self.digests: dict[str, str] = told["digests"]
        """Of the networks, by the names of their copies in RUN/sources."""

    def size(self, name: str) -> GPTSize:
        """Return the size of a network, by the name of its option."""
        with self._naming(name):
            return read_network(self._folder(name) / self._networks[name].role).size

    def load(self, name: str, network: Network) -> None:
        """Load a network's weights, whatever layout wrote them; UserError as load_weights."""
        with self._naming(name):
            load_weights(
                network,
                self._folder(name),
                role=self._networks[name].role,
                tokenizer_fingerprint=fingerprint_of_copy(self._folder(name), self._run),
                strict=True,
            )

    def start(self, name: str, network: Network) -> Network:
        """Return a network with the weights that it starts from, loaded unless the run's checkpoint
        has later ones."""
        if not self.goes_on:
            self.load(name, network)
        return network

    def keep(self, step: int, checkpointer: Checkpointer) -> None:
        """Write what the run is made from into its folder, and its settings, now that all is loaded
        and it goes on from `step`; each checkpoint has it too. UserError where data was written to
        meanwhile."""
        self.notes.insert(0, beginning(self.config, step if self.goes_on else None))
        checkpointer.texts[IDENTITY] = said_by_first_rank(lambda: self._keep(step))
        self._run.write_settings(self.config, self._known)

    def _begin(self) -> str:
        """Read what the run's folder says, for all ranks."""
        known = names_of(type(self.config))
        unknown = [name for name in self.config.accept_changed if name not in known]
        if unknown:
            raise UserError(
                f"--accept-changed {quoted(unknown[0])}: no such name; there are {', '.join(known)}"
            )
        found = HeldTo(identity=None, settings={}, known=())
        if goes_on := has_begun(self._run.directory):
            found = held_to(self._run, self.config)
        self._recorded = found.identity
        return json.dumps({"goes_on": goes_on, "known": found.known, "settings": found.settings})

    def _clear(self) -> str:
        """Clear what an earlier start left; find out which copies of networks are the run's."""
        directory = self._run.directory
        with writing(directory):
            remove(directory / UNFINISHED)
            if not self.goes_on:
                remove(directory / "sources")
        kept = [path.parent.name for path in (directory / "sources").glob(f"*/{MANIFEST}")]
        policy_kept_as = self._policy_kept_as(kept)
        networks = networks_of(self.config, policy_kept_as)
        others = [name for name, network in networks.items() if self._is_another(name, network)]
        if {"policy", "reference"} & {*others}:  # what their paths mean now decides anew
            policy_kept_as, networks = "", networks_of(self.config)
        dropped = {networks[name].kept_as for name in others}
        kept = [name for name in kept if name not in dropped]
        return json.dumps({"kept": kept, "policy_kept_as": policy_kept_as})

    @contextlib.contextmanager
    def _saying(self, settings: Changed) -> Iterator[None]:
        """Have an error of a block say which settings keep the run from going on too."""
        try:
            yield
        except UserError as error:
            if not settings:
                raise
            raise UserError(f"{refusal(self._run, self.config, settings, [])}\n{error}") from None

    def _is_another(self, name: str, network: NamedNetwork) -> bool:
        """Return whether an option now has another path, and another network is there: what the run
        has kept is not what is meant. UserError where nothing is there."""
        known = self._recorded and self._recorded.networks.get(name)
        if not known or not known.path:  # of an identity without paths; config.json has them
            return False
        if Path(known.path).absolute() == network.path.absolute():
            return False
        if not network.path.exists():
            is_policy = name == "reference" and getattr(self.config, name) is None
            option = "policy" if is_policy else name.replace("_", "-")
            raise UserError(f"--{option} {network.path}: no such file or folder")
        if is_foreign(network.path):
            return digest_of_model(network.path) != known.model_xxh3_128
        return newest_source(network.path, network.role)[1] != known.xxh3_128

    def _policy_kept_as(self, kept: Collection[str]) -> str:
        """Return the name of a PPO run's copy of its policy: as the run began, whatever its paths
        have come to mean; "" where nothing says it."""
        record = self._recorded.networks.get("policy") if self._recorded else None
        names = [name for name in _POLICY_COPIES if record and record.kept == f"sources/{name}"]
        return next(iter(names or [name for name in _POLICY_COPIES if name in kept]), "")

    def _take(self, kept: set[str]) -> dict[str, Source]:
        """Copy the networks that the run has not kept; return those by the names of the copies."""
        taken: dict[str, Source] = {}
        said_by_first_rank(lambda: self._check_sizes(kept))
        for name, network in self._networks.items():
            if network.kept_as not in kept and network.kept_as not in taken:
                option, path = self._origin(name)
                require_path(path, option.replace("_", "-"))
                taken[network.kept_as] = self._taken(path, network)
        return taken

    def _check_sizes(self, kept: set[str]) -> str:
        """Raise UserError where a network that is to be copied has another size than is named: a
        refusal copies nothing."""
        for network in self._networks.values():
            if network.size and network.kept_as not in kept and network.path.exists():
                size, _ = stored_size(network.path, network.role)
                check_named_size(network.size, size, network.path, network.role)
        return ""

    def _taken(self, path: Path, network: NamedNetwork) -> Source:
        """Copy a network at a path, of a run or of a Hugging Face folder, for this run."""
        folder = self._run.directory / UNFINISHED / network.kept_as
        if not said_by_first_rank(lambda: "foreign" if is_foreign(path) else ""):
            source = take_source(path, network.role, folder, strict=network.strict)
            keep_like_tokenizer(Path(source.checkpoint), folder, network.role, self._run)
            return source
        return take_model(path, network.role, folder, self._run, self.config)

    def _origin(self, name: str) -> tuple[str, Path]:
        """Return the option whose path a network's copy is taken from, and that path: one copy for
        policy and reference is the reference, which counts to the end."""
        is_named = getattr(self.config, "reference", None) is not None
        option = "reference" if is_named and self._networks[name].kept_as == "reference" else name
        return option, self._networks[option].path

    def _compare(self, settings: Changed) -> str:
        """Find out what is there; UserError where the run was made from something else, or has
        other settings, or its folder is of two runs."""
        earlier = self._recorded or Identity()
        with self._saying(settings):
            self._now = self._found(earlier)
        odds, found = "", changes(earlier, self._now) if self._recorded is not None else []
        if self._recorded is not None:
            odds, saved, apart = at_odds(self._run.directory, self._recorded)
            if saved is not None and odds:  # what is as either says is not what has changed
                neither = {c.name for c in changes(saved, self._now)}
                names = {c.name for c in apart}
                found = [c for c in found if c.name in neither or c.name not in names]
        if refused := refusal(self._run, self.config, settings, found, odds):
            raise UserError(refused)
        self._accepted = found
        networks = self._now.networks.items()
        digests = {self._networks[name].kept_as: record.xxh3_128 for name, record in networks}
        return json.dumps({"notes": self._source_notes(), "digests": digests})

    def _found(self, earlier: Identity) -> Identity:
        """Return what is there."""
        return Identity(
            stage=stage_of(self.config),
            networks={name: self._record(name, earlier) for name in self._networks},
            data={
                name: look_at(path, earlier.data.get(name))
                for name, path in files_of(self.config).items()
            },
            tokenizer=tokenizer_now(
                self._run, getattr(self.config, "tokenizer", None), earlier.tokenizer
            ),
            packages=package_versions(),
            code=Code(xxh3_128=code_digest(), commit=code_commit()),
            accepted=earlier.accepted,
        )

    def _record(self, name: str, earlier: Identity) -> NetworkRecord:
        network = self._networks[name]
        kept, source = f"sources/{network.kept_as}", self._sources.get(network.kept_as)
        if source is not None:
            return NetworkRecord(
                path=str(network.path),
                checkpoint=source.checkpoint,
                network=source.network,
                step=source.step,
                xxh3_128=source.xxh3_128,
                kept=kept,
                model_xxh3_128=source.model_xxh3_128,
            )
        with self._naming(name):
            digest = digest_of_network(read_manifest(self._folder(name)), network.role)
        known = earlier.networks.get(name, NetworkRecord())
        model = known.model_xxh3_128 if digest == known.xxh3_128 else ""  # or it was changed
        return dataclasses.replace(
            known, path=str(network.path), xxh3_128=digest, kept=kept, model_xxh3_128=model
        )

    def _source_notes(self) -> list[str]:
        if not self.goes_on:
            notes = [
                f"{source.checkpoint}: copied to {self._run.directory / 'sources' / kept_as}, "
                + (
                    "which this run reads from now on"
                    if source.model_xxh3_128
                    else "for its files cannot be linked there"
                )
                for kept_as, source in self._sources.items()
                if not source.is_linked
            ]
            return notes + self._anchor_note()
        paths: dict[Path, str] = {}
        for name, network in self._networks.items():
            if network.kept_as not in self._sources and network.path not in paths:
                record, copy = self._now.networks[name], self._kept(network)
                paths[network.path] = note_of_origin(record, network, copy)
        return [note for note in paths.values() if note]

    def _anchor_note(self) -> list[str]:
        """Return what is to be said where PPO starts from PPO's own policy."""
        network = self._networks.get("policy")
        source = self._sources.get(network.kept_as) if network else None
        if network is None or source is None or "critic" not in source.roles:
            return []
        if network.kept_as != "reference":  # another one is named
            return []
        before = Path(source.checkpoint).absolute().parents[1] / "sources" / "reference"
        old = before if before.exists() else "PATH"
        return [
            f"{network.path} is itself a PPO run: the KL of this one is measured "
            "to that policy, and the critic starts anew from the reward model; to keep the KL "
            f"reference of before, begin with --reference {old}"
        ]

    def _keep(self, step: int) -> str:
        directory, counts = self._run.directory, self._run.account.counts
        if self._recorded is not None:
            folder = self._run.checkpoints / step_name(step)
            found = disagreements(identity_in(folder) or self._recorded, self._recorded)
            if found:  # of an older checkpoint than was looked at: that is damaged
                raise UserError(odds_in_words(directory, folder, found))
        for name, file in self._now.data.items():
            if not file.is_still_there():
                raise UserError(f"--{name} {file.path}: written to while it was read; start again")
        data = {
            name: dataclasses.replace(file, **counts.get(name, {}))
            for name, file in self._now.data.items()
        }
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        accepted = [Acceptance(change=change, step=step, at=at) for change in self._accepted]
        with writing(directory):
            self._publish()
        self._now = dataclasses.replace(
            self._now, data=data, accepted=(*self._now.accepted, *accepted)
        )
        write_identity(directory, self._now)
        write_prompt_format(self.renderer.kept(), directory)
        return identity_text(self._now)

    def _publish(self) -> None:
        """Give the copies that were taken their names."""
        unfinished, sources = (self._run.directory / name for name in (UNFINISHED, "sources"))
        for kept_as in self._sources:
            sources.mkdir(exist_ok=True)
            remove(sources / kept_as)
            os.rename(unfinished / kept_as, sources / kept_as)
        if self._sources:
            sync_folder(sources)
            sync_folder(sources.parent)
            remove(unfinished)

    def _kept(self, network: NamedNetwork) -> Path:
        return self._run.directory / "sources" / network.kept_as

    def _folder(self, name: str) -> Path:
        network = self._networks[name]
        is_new = network.kept_as in self._sources
        return self._run.directory / UNFINISHED / network.kept_as if is_new else self._kept(network)

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Have what is wrong with a copy name what it is a copy of, or how it is had again."""
        network, folder = self._networks[name], self._folder(name)
        source = self._sources.get(network.kept_as)
        if source is not None:
            with naming_source(source, folder, network.role):
                yield
            return
        try:
            yield
        except UserError as error:
            if not str(error).startswith(str(folder)):
                raise
            raise UserError(
                f"{error}; remove {folder}, and it is taken from {self._origin(name)[1]} again"
            ) from None
