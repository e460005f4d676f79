"""`sota prepare`: text in, token shards out.

1. sources.find       list the files to read and those to skip
2. units.cut          cut them into units of work, a function of the files alone
3. pool.Pool          worker processes read, check, hash and encode; one result file per unit
4. merge.Merger       in order: drop duplicates, assign splits, write shards
5. rename the finished folder into place, with a manifest that covers every byte

Until then everything is in a hidden work folder next to the target. A preparation that is stopped
for any reason leaves that folder; the same command resumes and reuses the finished units.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sota_transformer.data.forks import start_fork_server
from sota_transformer.data.guards import check_splits, one_line_errors, stoppable, workers
from sota_transformer.data.pool import Pool, result_path
from sota_transformer.data.progress import Progress, summary
from sota_transformer.data.sources import ARCHIVES, Skipped, Source, find, find_excluded
from sota_transformer.data.units import Job, Unit, cut, remove_spooled
from sota_transformer.durable import (
    MANIFEST,
    DirectoryLock,
    canonical_json,
    make_folder,
    remove,
    sha256_file,
    write_file,
)
from sota_transformer.errors import (
    BAD_DATA,
    IO_FAILED,
    LOCKED,
    NO_INPUT,
    TEMPORARY,
    USAGE,
    SotaError,
)
from sota_transformer.options import Merge, Prepare
from sota_transformer.words import in_shell

if TYPE_CHECKING:  # numpy loads while the workers start
    from sota_transformer.data.merge import Merger


_ASKED = "asked.json"


def prepare(options: Prepare) -> dict[str, Any]:
    """Prepare `options.inputs` into `options.out`. Returns the manifest, or {} for a single part.

    Every user error and every I/O failure is a SotaError with a documented code.
    """
    if problems := options.problems():
        raise SotaError("; ".join(problems), USAGE)
    start_fork_server()
    if options.out.is_symlink() and options.out.is_dir():  # a folder cannot replace a link
        options = dataclasses.replace(options, out=options.out.resolve())
    sources, skipped = find(options.inputs)
    request = _request(options, sources)
    work = _work_folder(options.out)
    skipped = [item for item in skipped if work.name not in Path(item.where).parts]
    old = _existing(options)
    if old and request in old["requests"]:
        print(f"{options.out} is already prepared from these inputs with these options")
        if work.exists():  # killed after the commit, before the clean-up
            with DirectoryLock(work):
                remove(work)
        return old
    if old and not options.append:
        raise SotaError(
            f"{options.out} was prepared from different or changed inputs, or with different "
            "options; use --append to add new inputs, choose another --out, or delete it: "
            f"rm -r {in_shell(options.out)}",
            LOCKED,
        )
    more = ("make its folder writable",) if old else ()  # the place of an append is given
    with one_line_errors(options.out, *more), stoppable(work), contextlib.ExitStack() as stack:
        run = _Run(options, sources, skipped, request, old, work)
        make_folder(run.own)
        try:
            stack.enter_context(DirectoryLock(run.own))
            changed = _existing(options) != old  # the previous lock holder just appended to it
        except FileNotFoundError:  # or it finished while we waited, and removed the work folder
            changed = True
        if changed:
            raise SotaError(
                f"{options.out} was changed by another process; run the same command again",
                TEMPORARY,
            )
        manifest, text = run.do()
    print(text)  # the data is committed: a closed stdout no longer matters
    return manifest


def merge(options: Merge) -> dict[str, Any]:
    """Merge the parts of `options.out` into what `prepare` without --part gives; the manifest.

    SotaError 66 if parts are missing, 65 if their inputs have changed.
    """
    out = Path(os.path.realpath(options.out))  # `resolve` raises RuntimeError for a loop
    work = _work_folder(out)
    if (out / MANIFEST).exists() and not (work / _ASKED).exists():
        from sota_transformer.data.shards import load_manifest

        print(f"{options.out} is complete; there are no parts to merge")
        return load_manifest(out)
    try:
        asked = json.loads((work / _ASKED).read_bytes())
        done, parts = set(work.glob("done-*")), asked["parts"]
        missing = [i for i in range(1, parts + 1) if work / f"done-{i}-of-{parts}" not in done]
        if missing:
            names = ", ".join(f"{i}/{parts}" for i in missing)
            raise SotaError(f"unfinished parts in {work}: run --part {names} first", NO_INPUT)
        how: dict[str, Any] = asked["options"]
        how |= {name: tuple(how[name]) for name in ("inputs", "exclude")}
        if not Path(asked["folder"]).is_dir():
            text = f"{asked['folder']}, the working directory of the parts, no longer exists"
            raise SotaError(text, NO_INPUT)
        whole = Prepare(out=out, workers=options.workers, memory_mb=options.memory_mb, **how)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        text = f"no parts of {out} found in {work}; name the --out of `sota prepare --part`"
        raise SotaError(text, NO_INPUT) from error
    with contextlib.chdir(asked["folder"]):
        if _request(whole, find(whole.inputs)[0]) != asked.get("request"):
            raise SotaError(
                f"the inputs of the parts in {work} have changed; restore them, or run the command "
                "without --part to prepare the inputs as they are now",
                BAD_DATA,
            )
        return prepare(whole)


def _work_folder(out: Path) -> Path:
    """The work folder, which holds everything until the target is renamed into place."""
    return out.parent / f".{out.name}.preparing"


def _request(options: Prepare, sources: list[Source]) -> str:
    """A hash of everything that determines the result; a different hash is a new preparation."""
    settings = (options.val_fraction, options.text_field, options.near_dedup, options.exclude)
    settings += ("replace",) * (options.bad_text == "replace")
    digest = hashlib.sha256(repr(settings).encode())
    for source in (*sources, *(find_excluded(options.exclude)[0] if options.exclude else ())):
        mark = f"\n{source.input}\0{source.name}\0{source.size}\0{source.modified}"
        digest.update(os.fsencode(mark))
    return digest.hexdigest()


def _existing(options: Prepare) -> dict[str, Any] | None:
    """The target's manifest, None if there is nothing. SotaError 73, 66 or 65 if unusable."""
    out = options.out
    if options.append and not (out / MANIFEST).exists():
        raise SotaError(f"--append: there is no prepared data in {out}", NO_INPUT)
    if os.path.lexists(out) and not out.is_dir():
        raise SotaError(f"{out} exists and is not a folder; choose another --out", LOCKED)
    if not out.is_dir() or not any(out.iterdir()):
        return None
    if not (out / MANIFEST).exists():
        raise SotaError(
            f"{out} is not empty and holds no prepared data; choose another --out or empty it",
            LOCKED,
        )
    from sota_transformer.data.shards import load_manifest

    manifest = load_manifest(out)
    if options.append:
        from sota_transformer.data.encode import HASH_RULE

        if (rule := manifest["split_rule"]["hash"]) != HASH_RULE:
            raise SotaError(
                f"{out} was prepared by another version, which hashes documents differently "
                f"({rule}), so --append could not detect duplicates; prepare everything into a "
                "new folder",
                BAD_DATA,
            )
        _check_same_filters(options, manifest["options"])
    return manifest


def _check_same_filters(options: Prepare, before: dict[str, Any]) -> None:
    """An append must exclude and deduplicate at least what the folder does. SotaError 2."""
    names = {Path(text).name for text in options.exclude}  # by name: the files may have moved
    missing = [f"--exclude {text}" for text in before["exclude"] if Path(text).name not in names]
    if before["near_dedup"] and not 0 < options.near_dedup <= before["near_dedup"]:
        missing.append(f"--near-dedup {before['near_dedup']:g}")
    if missing:
        raise SotaError(
            f"{options.out} was prepared with {', '.join(missing)}; --append needs the same options"
        )


@dataclasses.dataclass
class _Run:
    """One preparation in progress."""

    options: Prepare
    sources: list[Source]
    skipped: list[Skipped]
    request: str
    old: dict[str, Any] | None
    work: Path

    def __post_init__(self) -> None:
        self.part, self.parts = map(int, (self.options.part or "1/1").split("/"))
        self.val_below = min(int(self.options.val_fraction * 2**64), 2**64 - 1)  # of 64-bit hashes
        # Parts share the results folder and nothing else.
        self.own = self.work
        if self.options.part:
            self.own /= f"part-{self.part}-of-{self.parts}"

    def do(self) -> tuple[dict[str, Any], str]:
        """Encode and, unless this is a single part, merge and commit. (manifest, text to print)"""
        for name in ("shards", "spool"):
            shutil.rmtree(self.own / name, ignore_errors=True)
            (self.own / name).mkdir()
        make_folder(self.work / "units")
        if self.options.part:
            self._save_request()
        pool = Pool(Job(self.work / "units", self.options, self._excluded()), workers(self.options))
        packed = any(source.codec or source.kind in ARCHIVES for source in self.sources)
        total = sum(source.size for source in self.sources) // self.parts
        progress = Progress(None if packed else total)
        try:
            units = self._encoded(pool, progress)
            manifest = {} if self.options.part else self._merged(units)
            for _ in units:  # a part only encodes its units
                pass
        except BaseException:
            progress.close()
            pool.close(stop=True)
            raise
        pool.close()
        seconds = progress.close()
        if self.options.part:
            write_file(self.work / f"done-{self.part}-of-{self.parts}", b"")
            remove(self.own)
            return {}, (
                f"part {self.options.part} finished in {seconds:,.1f} s, results in {self.work}; "
                f"when all parts are done, merge them: sota merge {in_shell(self.options.out)}"
            )
        manifest = self._commit(manifest)
        return manifest, (
            f"{summary(manifest, self.options.out)}\n"
            f"{progress.documents / seconds:,.0f} documents/s, "
            f"{progress.text_bytes / seconds / 1e6:,.1f} MB/s, {seconds:,.1f} s"
        )

    def _save_request(self) -> None:
        """Save the options for `merge`. SotaError 73 if another part has different ones."""
        own, path = ("out", "part", "workers", "memory_mb"), self.work / _ASKED
        options = {n: v for n, v in dataclasses.asdict(self.options).items() if n not in own}
        asked = {"options": options, "parts": self.parts, "folder": str(Path.cwd())}
        data = canonical_json(asked | {"request": self.request})
        if not path.exists():
            write_file(path, data)
        elif path.read_bytes() != data:
            raise SotaError(
                f"{self.work} holds parts with different or changed inputs, different options, "
                "another number of parts or another working directory; use the same ones, or "
                f"start over: rm -r {in_shell(self.work)}",
                LOCKED,
            )

    def _excluded(self) -> Path | None:
        """The file of excluded n-grams, written if --exclude is given."""
        if not self.options.exclude:
            return None
        from sota_transformer.data.exclude import write_excluded

        path = self.own / "excluded.npy"
        excluded = write_excluded(self.options.exclude, self.options.text_field, path)
        sizes = {source.size for source in excluded}
        held = {os.path.realpath(source.path) for source in excluded}
        alike = (s for s in self.sources if s.size in sizes)  # resolving all paths would be slow
        inside = [source.name for source in alike if os.path.realpath(source.path) in held]
        if inside:  # someone who wants to leave out a folder, as with tar's --exclude
            print(
                f"note: {inside[0]} is both an input and in --exclude, which also drops every "
                "document that shares 13 tokens in a row with it, such as a license; to leave out "
                "only files, name as inputs the ones to read"
            )
        return path

    def _units(self, pool: Pool) -> Iterator[Unit]:
        """This part's units with their keys, numbered across all parts."""
        options = self.options
        settings = f"13\0{options.text_field}\0{options.near_dedup > 0}\0{options.bad_text}\0"
        if options.exclude:
            settings += sha256_file(self.own / "excluded.npy")
        cuts = cut(self.sources, self.own / "spool", self.skipped.append, pool.probe)
        for index, segments in enumerate(cuts):
            if index % self.parts != self.part - 1:
                remove_spooled(segments)
                continue
            text = f"{settings}{[dataclasses.replace(s, path='') for s in segments]}"
            yield Unit(index, segments, hashlib.sha256(text.encode()).hexdigest())

    def _encoded(self, pool: Pool, progress: Progress) -> Iterator[Unit]:
        """This part's units, each once its result is stored."""
        for unit, counts in pool.run(self._units(pool)):
            progress.add_unit(*counts, sum(segment.taken for segment in unit.segments))
            yield unit

    def _merged(self, units: Iterator[Unit]) -> dict[str, Any]:
        """Merge all units; the manifest's contents."""
        first = next(units, None)  # the workers are busy now, so importing numpy here is free
        from sota_transformer.data.encode import load

        merger = self._merger()
        try:
            for unit in chain([first] if first else [], units):
                encoded = load(result_path(self.work / "units", unit), unit.key, check=False)
                if encoded is None:
                    text = f"{self.work}: a result file disappeared; run the same command again"
                    raise SotaError(text, IO_FAILED)
                merger.add(encoded)
            for item in self.skipped:
                merger.rejects.add(item.reason, item.where)
            return merger.close() | self._inputs(merger)
        except BaseException:
            merger.abandon()
            raise

    def _merger(self) -> "Merger":
        """A merger for this preparation; for an append, it knows the existing documents."""
        from sota_transformer.data.merge import Merger

        options, old, below = self.options, self.old, self.val_below
        if old is not None:
            below = old["split_rule"]["val_below"]
            if below != self.val_below:
                print(f"note: --append keeps the folder's --val-fraction of {below / 2**64:.3g}")
        merger = Merger(self.own / "shards", below, len(options.inputs), options.near_dedup)
        if old is not None:
            merger.load_existing(options.out, old)
        return merger

    def _inputs(self, merger: "Merger") -> dict[str, Any]:
        """The part of the manifest that depends on the inputs and options."""
        options, files = self.options, [0] * len(self.options.inputs)
        for source in self.sources:
            files[source.input] += 1
        rows = zip(options.inputs, files, merger.by_input.tolist(), strict=True)
        return {
            "inputs": [
                {"input": text, "files": count, "documents": n, "text_bytes": size, "tokens": ids}
                for text, count, (n, size, ids) in rows
            ],
            "options": {
                "val_fraction": options.val_fraction,
                "text_field": options.text_field,
                "near_dedup": options.near_dedup,
                "exclude": list(options.exclude),
                "bad_text": options.bad_text,
            },
            "requests": [self.request],
        }

    def _commit(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Put the new shards in place."""
        from sota_transformer.data.commit import commit_append, commit_new, complete, joined

        shards, out = self.own / "shards", self.options.out
        if self.old is None:
            check_splits(manifest, self.options.val_fraction, shards)
            manifest = complete(manifest, self.val_below)
            commit_new(shards, out, manifest)
        else:
            manifest = joined(self.old, manifest)
            commit_append(shards, out, manifest)
        remove(self.work)
        return manifest
