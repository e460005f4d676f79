"""Which files named by the inputs are used, and what is reported about the others."""

import gzip
import io
import json
import os
import re
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sota_transformer.data import units
from sota_transformer.data.prepare import merge
from sota_transformer.data.sources import Skipped, find, format_of
from sota_transformer.data.streams import streams
from sota_transformer.errors import SotaError
from sota_transformer.options import Merge
from tests.preparing import everything, jsonl, read, run
from tests.preparing import refused as fails
from tests.preparing import texts as some

RUN = ("config.json", "run.json", "metrics.jsonl", "samples.txt")
MODEL = ("tokenizer_config.json", "merges.txt", "README.md")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one text, a run, a model, and hidden files."""
    made = [f"runs/mine/{name}" for name in RUN] + [f"models/m/{name}" for name in MODEL]
    for name in (*made, "a.txt", ".b.txt", ".git/c.txt", "x/__pycache__/d.txt", "x/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"the text of {name}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*inputs: str) -> tuple[list[str], set[str]]:
    """Paths that are used, and the reasons for the others."""
    sources, skipped = find(inputs)
    return [source.path for source in sources], {item.reason.split(";")[0] for item in skipped}


@pytest.mark.parametrize("given", ["runs/mine", "runs/*", "models/m", "models/m/*", "./runs/mine/"])
def test_a_run_or_a_model_is_no_text_however_it_is_given(here: Path, given: str) -> None:
    with pytest.raises(SotaError, match=r"m(ine)?(/\S+)?: a (run|model); its"):
        find((given,))
    assert found(given, "a.txt") == (["a.txt"], {"a run" if "runs" in given else "a model"})
    assert found("runs/mine/samples.txt")[0] == ["runs/mine/samples.txt"]


def test_a_glob_finds_what_a_folder_walk_finds(here: Path) -> None:
    """Unless the pattern itself asks for hidden files."""
    expected = (["a.txt", "x/e.txt"], {"a run", "a model", "hidden"})
    assert found("**/*.txt") == found("*") == expected
    assert sorted(os.path.relpath(path) for path in found(str(here))[0]) == expected[0]
    assert found(".git/*.txt")[0] == [".git/c.txt"]
    assert sorted(map(os.path.relpath, found("**")[0])) == expected[0], "`x/e.txt` once, with `x`"


def test_what_is_found_does_not_depend_on_how_a_folder_is_listed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in the order of the bytes of their names, the others by name; a dot has a name."""
    for name in ("b.TXT", "B.txt", "\uffff.txt", "\U0001f600.txt", "d.y", "c.x", "e.x"):
        (here / name).write_text("text")
    forward, skipped = find((".",))
    listing = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: list(listing(path))[::-1])
    assert find((".",)) == (forward, skipped)
    names = ["B.txt", "a.txt", "b.TXT", "x/e.txt", "\uffff.txt", "\U0001f600.txt"]
    assert [source.name for source in forward] == [f"{here.name}/{name}" for name in names]
    places = [item.where for item in skipped]
    assert places == sorted(places) and f"{here.name}/d.y" in places


def test_pythons_own_sources_are_taken_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of packages may be in one folder, which may be inside the standard library's."""
    names = ["lib/a.py", "lib/b/c.py", "lib/d.txt", "lib/.e.py", "lib/site-packages/f.py"]
    for name in (*names, "plat/g.py"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("pass")
    paths = {"stdlib": "lib", "purelib": "lib/site-packages", "platlib": "lib/b/../site-packages"}
    taken = ["lib/site-packages/f.py", "lib/a.py", "lib/b/c.py"]
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    assert found("python:") == (taken, set())
    paths["platlib"] = "plat"
    assert found("python:") == ([taken[0], "plat/g.py", *taken[1:]], set())


def test_what_another_pipe_brought_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it will bring is not known before it is read."""
    for seed in (1, 2):
        lines = io.TextIOWrapper(io.BytesIO(jsonl([f"{seed} {n}" for n in range(40)])))
        monkeypatch.setattr(sys, "stdin", lines)
        if seed == 1:
            run(tmp_path / "data", "-")
        else:
            fails(73, "from different or changed inputs", out=tmp_path / "data", inputs=("-",))
    assert everything(tmp_path / "data") == sorted(f"1 {n}" for n in range(40))


def test_links_stay_inside_and_a_folder_that_cannot_be_listed_is_reported(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "x2").mkdir()
    (here / "x2" / "out.txt").write_text("outside")
    (here / "x" / "in.txt").symlink_to(here / "x" / "e.txt")
    (here / "x" / "out.txt").symlink_to(here / "x2" / "out.txt")
    (here / "x" / "loop").symlink_to(here / "x")
    (here / "x" / "y").mkdir()
    listing = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("y"):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    sources, skipped = find(("x",))
    assert [source.name for source in sources] == ["x/e.txt", "x/in.txt"]
    assert [(item.where, item.reason.split("(")[0].split(",")[0]) for item in skipped] == [
        ("x/__pycache__", "hidden"), ("x/loop", "link to a folder"), ("x/out.txt", "broken link"),
        ("x/y", "cannot be read "),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.tgz", ("gz", "tar")),
        ("a.TBZ2", ("bz2", "tar")),
        ("a.txz", ("xz", "tar")),
        ("a.tzst", ("zst", "tar")),
        ("A.JSONL.GZ", ("gz", "jsonl")),
        ("gz", ("gz", "")),
        ("a.tar.b", ("", "")),
        ("a.adoc", ("", "text")),
    ],
)
def test_the_format_that_a_name_stands_for(name: str, expected: tuple[str, str]) -> None:
    assert format_of(name) == expected


def test_endings_of_other_files_are_told_briefly(here: Path) -> None:
    """As part of a reason that many files share; a codec's name alone would be no reason."""
    names = ["a." + "x" * 20, "b.PNG", "c." + "z" * 20 + ".gz", "d.png.gz", "Makefile", "e.gz"]
    names.append("config.json")  # alone it makes no run
    for name in names:
        (here / "x" / name).write_text("text")
    texts = [item.reason.removesuffix(" is not a text format") for item in find(("x",))[1]]
    texts.remove("hidden")
    assert sorted(texts) == [
        ".json file is not a text format; if you name it, it is read as JSON lines",
        ".png file", ".png.gz file", f".{'x' * 11} file", f".{'z' * 11}.gz file",
        "file without an extension", "file without an extension, in .gz",
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", ["a**b", "[", "x/["])
def test_a_pattern_that_is_none_matches_nothing(here: Path, pattern: str) -> None:
    with pytest.raises(SotaError, match="matches nothing"):
        find((pattern,))


def test_hidden_members_are_counted_like_hidden_files(tmp_path: Path) -> None:
    names = ["./a.txt", "b/../c.txt", "x/e.py", ".f.txt", "x/.git/g.txt", "__MACOSX/x/._e.py"]
    names += ["x/__pycache__/h.py", ".DS_Store", "v\\.obsidian\\i.js"]
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped,
        tarfile.open(tmp_path / "a.tar", "w") as rolled,
    ):
        for name in names:
            zipped.writestr(name, name)
            member = tarfile.TarInfo(name)
            member.size = len(name)
            rolled.addfile(member, io.BytesIO(name.encode()))
    for archive in ("a.zip", "a.tar"):
        source, refused = find((str(tmp_path / archive),))[0][0], list[Skipped]()
        texts = [b"".join(chunks).decode() for _, _, chunks in streams(source, refused.append)]
        assert texts == names[:3]
        assert [(item.reason, item.where.split("!")[1]) for item in refused] == [
            ("hidden", name) for name in names[3:]
        ]


@pytest.mark.parametrize("header", [f"text,{'n' * 2000}", f"{'n' * 2000},text"])
@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
def test_a_header_that_is_too_long_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str, ending: str
) -> None:
    """It was split, so each piece lost its first row or its text column, with a wrong reason."""
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    data = "\n".join([header, *(f"row {i},row {i}" for i in range(500)), ""]).encode()
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    texts, refused = read(path, tmp_path)
    assert (len(texts), refused) == (500, [])
    monkeypatch.setattr(units, "_HEADER_BYTES", 1000)
    texts, refused = read(path, tmp_path)
    assert texts == []
    assert {item.reason for item in refused} == {"piece of a table whose header is over 1 MiB"}
    monkeypatch.undo()
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    data = data.replace(b"text", b"Text", 1)
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    assert [item.reason for item in read(path, tmp_path)[1]] == ["no column 'text'"]  # once


def test_merge_needs_the_inputs_of_its_parts(tmp_path: Path) -> None:
    """A missing one would be lacking in a result reported as complete."""
    folder, out = tmp_path / "in", tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_bytes(jsonl(some(40, seed=i)))
    for part in ("1/2", "2/2"):
        run(out, folder, part=part)
    (folder / "1.jsonl").rename(tmp_path / "1.jsonl")
    with pytest.raises(SotaError, match=r"have changed;.* without --part") as caught:
        merge(Merge(out=out, workers=1))
    assert caught.value.code == 65 and not out.exists()
    fails(73, "or changed inputs", out=out, inputs=(folder,), part="1/2")
    (tmp_path / "1.jsonl").rename(folder / "1.jsonl")
    merge(Merge(out=out, workers=1))
    assert everything(out) == sorted(text for i in range(3) for text in some(40, seed=i))


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
def test_a_member_of_any_claimed_size_ends_with_its_archive(
    tmp_path: Path, ending: str, name: str
) -> None:
    """Kept or skipped; reading or looking for 10**20 bytes would take years."""
    member = tarfile.TarInfo(name)
    member.size, member.pax_headers = 5, {"size": str(10**20)}
    path = tmp_path / f"a.{ending}"
    with tarfile.open(path, "w:gz" if ending.endswith("gz") else "w") as archive:
        archive.addfile(member, io.BytesIO(b"bytes"))
    started = time.process_time()
    assert any(item.reason.startswith("damaged archive") for item in read(path, tmp_path)[1])
    assert time.process_time() - started < 5


def test_a_link_in_a_zip_is_no_text(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("link.txt")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "../the/path/of/a/text.txt")
        archive.writestr("a.txt", "a text")
    texts, refused = read(tmp_path / "a.zip", tmp_path)
    assert texts == ["a text"]
    assert [item.reason for item in refused] == ["link or device inside an archive"]


@pytest.mark.parametrize("count,share", [(2, 0.0001), (3, 0.999), (5, 0.0001), (100, 0.0001)])
def test_the_suggested_fraction_leaves_no_split_empty(
    tmp_path: Path, count: int, share: float
) -> None:
    source, out = tmp_path / "few.jsonl", tmp_path / "data"
    source.write_bytes(jsonl(some(count)))
    with pytest.raises(SotaError, match="split would be empty") as caught:
        run(out, source, val_fraction=share)
    advised = float(str(caught.value).rpartition("--val-fraction ")[2])
    splits = run(out, source, val_fraction=advised)["splits"]
    assert splits["val"]["documents"] == min(8, count // 2)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_of_end_of_text_divide_a_text_file(tmp_path: Path, ending: str) -> None:
    stories = [f"Story {i}.{ending}{ending}It ended, as <|endoftext|> does." for i in range(40)]
    stories[7] = "\n".join(f"A long line {i}." for i in range(10_000))  # split as a file would be
    text = f"{ending}<|endoftext|> {ending}{ending}".join(stories) + f"{ending}<|endoftext|>"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.py").write_text("#\n<|endoftext|>\n#")
    run(tmp_path / "data", tmp_path / "a.txt", tmp_path / "b.py")
    taken = everything(tmp_path / "data")
    assert set(stories) - set(taken) == {stories[7]} and "#\n<|endoftext|>\n#" in taken
    rest = [text for text in taken if text.startswith("A long line")]
    assert len(rest) > 10 and len("".join(rest)) == len(stories[7])
    assert len(taken) == 39 + len(rest) + 1


def test_more_validation_needs_a_fresh_preparation(tmp_path: Path, capsys) -> None:
    """Prepared data keeps its fraction, even under --append, so the note must say so."""
    (tmp_path / "few.jsonl").write_bytes(jsonl(some(40)))
    run(tmp_path / "data", tmp_path / "few.jsonl", val_fraction=0.2)
    assert "or start over with --val-fraction 0.4" in capsys.readouterr().out


def test_repaired_text_is_not_listed_as_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"caf\xe9")
    (folder / "b.txt").touch()
    run(tmp_path / "data", folder, val_fraction=0, bad_text="replace")
    _, skipped, repaired = re.split("skipped:\n|repaired:\n", capsys.readouterr().out)
    assert "empty file" in skipped and "not valid UTF-8" in repaired


@pytest.mark.parametrize("name", ["text_field", "bad_text", "near_dedup", "exclude", "a file"])
def test_what_an_interrupted_preparation_left_serves_no_other(tmp_path: Path, name: str) -> None:
    """Its units are all there, but were made with another option or from another text."""
    items = [f"{i} " + " ".join(f"w{i * j % 97}" for j in range(80)) for i in range(30)]
    source, held = tmp_path / "a.jsonl", tmp_path / "held.txt"
    lines = [{"text": item, "body": f"The body of {item}"} for item in [*items, items[5] + " z"]]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 " * 20)
    held.write_text(items[7])
    now = {"text_field": "body", "bad_text": "replace", "near_dedup": 0.8, "exclude": (str(held),)}
    options = {name: now[name]} if name in now else {}
    split = {"val_fraction": 0.0}
    inputs = source, tmp_path / "b.txt"
    run(tmp_path / "data", *inputs, part="1/1", **split)
    plain = sorted((tmp_path / ".data.preparing" / "units").iterdir())
    if not options:
        source.write_text(source.read_text().replace("w1", "v1"))  # of the same size
        os.utime(source, ns=(1, 1))
    run(tmp_path / "data", *inputs, **options, **split)
    run(tmp_path / "fresh", *inputs, **options, **split)
    assert plain and not (tmp_path / ".data.preparing").exists()
    assert everything(tmp_path / "data") == everything(tmp_path / "fresh")
    run(tmp_path / "plain", *inputs, **split)
    assert (everything(tmp_path / "plain") != everything(tmp_path / "fresh")) == bool(options)
