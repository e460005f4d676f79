"""Archives made to break a reader: truncated, damaged, empty, bombs, names leading elsewhere."""

import bz2
import gzip
import io
import lzma
import random
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import zstandard

from sota_transformer.data import encode, pool, streams, units
from sota_transformer.data.sources import Skipped, find
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.options import Prepare
from tests.preparing import jsonl, read, texts


def test_an_archive_ends_where_it_says(tmp_path: Path) -> None:
    """To the standard library a tar ends where no header follows, even if damaged or truncated."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in ("a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1024
            archive.addfile(info, io.BytesIO(name[0].encode() * 1024))
    data, size = packed.getvalue(), 3 * 512  # size of a member
    damaged = data[:size] + b"?" + data[size + 1 :]
    path = tmp_path / "a.tar"
    cut = [(1, data[:size]), (2, data[: 2 * size]), (1, data[: size + 99])]
    padded = data + bytes(3 << 20)  # as `tar -b 6144` does
    for found, whole in (*cut, (1, damaged), (2, data + data), (2, padded + data)):
        path.write_bytes(whole)
        texts, refused = read(path, tmp_path)
        assert (len(texts), len(refused)) == (found, 1) and "damaged" in refused[0].reason
    for whole in (data[: 2 * size + 512], padded):
        path.write_bytes(whole)
        assert [len(read(path, tmp_path)[i]) for i in (0, 1)] == [2, 0]


def test_a_long_name_is_no_folder_where_it_is_cut(tmp_path: Path) -> None:
    """In tars of the oldest kind a folder is a name that ends in a slash; GNU cuts names at 100."""
    names = ["a.txt", "b" * 99 + "/" + "c" * 9 + ".txt", "d.txt"]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("empty/", *names):
            info = tarfile.TarInfo(name)
            info.type, info.size = tarfile.AREGTYPE, 999 * (name != "empty/")
            archive.addfile(info, io.BytesIO(name[:1].encode() * 999))
    found, refused = read(tmp_path / "a.tar", tmp_path)
    assert (found, refused) == ([letter * 999 for letter in "abd"], [])


def test_what_precedes_damage_in_an_archive_is_kept(tmp_path: Path) -> None:
    """In a zip member, and in a compressed tar, which tarfile reads in blocks of 10 KiB."""
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(3000))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr("a.jsonl", lines)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[len(lines)] ^= 1  # the member's checksum is wrong, which shows at its end
    (tmp_path / "a.zip").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as rolled:
        for name in ("a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            rolled.addfile(info, io.BytesIO(name[:1].encode()))
    cut = (tmp_path / "a.tar.gz").read_bytes()[:-9]
    (tmp_path / "a.tar.gz").write_bytes(cut)
    for name, least in {"a.zip": 2400, "a.tar.gz": 2}.items():
        found, refused = read(tmp_path / name, tmp_path)
        assert len(found) >= least and "damaged" in refused[0].reason, (name, len(found))


@pytest.mark.parametrize("ending", ["gz", "zst", "zip", "tar.gz", "gz in a tar"])
def test_bombs_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(streams, "_BOMB_BYTES", 4 << 20)
    bomb = b"\n" * (32 << 20)
    path = tmp_path / f"bomb.txt.{ending}"
    if ending == "zip":
        path = tmp_path / "bomb.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb.txt", bomb)
    elif "tar" in ending:
        packed, name = gzip.compress(bomb), "bomb.txt.gz"
        members = {name: packed, "a.bin": bytes(1 << 20)} if "in" in ending else {"bomb.txt": bomb}
        path = tmp_path / ("a.tar" if "in" in ending else "a.tar.gz")
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        path.write_bytes((gzip.compress if ending == "gz" else zstandard.compress)(bomb))
    (tmp_path / "spool").mkdir()
    _, refused = read(path, tmp_path / "spool")
    assert any("expands over" in item.reason for item in refused)
    taken = sum(file.stat().st_size for file in (tmp_path / "spool").iterdir())
    least = path.stat().st_size if ending != "gz in a tar" else len(packed)
    assert taken < 500 * least + (8 << 20) < len(bomb)


def test_a_pipe_may_carry_any_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much was sent is known only at its end, so nothing there looks like a bomb."""
    monkeypatch.setattr(streams, "_BOMB_BYTES", 1 << 20)
    data, refused = b"line\n" * 500_000, list[Skipped]()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    ((_, kind, chunks),) = streams.streams(find(("-",))[0][0], refused.append)
    assert (b"".join(chunks), kind, refused) == (data, "text", [])


@pytest.mark.parametrize("codec", ["", "gz", "bz2", "xz", "zst"])
def test_what_is_unpacked_is_all_there_in_bounded_pieces(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However well it was packed, and also if a stream ends where the bytes read at once end."""
    packers = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    parts = [b"\n" * (5 << 20), random.Random(1).randbytes(99_999)]
    first, second = map(packers.get(codec, zstandard.compress), parts)
    for at_once in (streams._PACKED, len(first) << (3 if codec == "zst" else 0)):
        monkeypatch.setattr(streams, "_PACKED", at_once)
        chunks = list(streams.unpacked(io.BytesIO(first + second), codec))
        assert b"".join(chunks) == b"".join(parts)
        if codec:
            sizes = list(map(len, chunks))
            assert max(sizes) <= 2 * streams.CHUNK and min(sizes[:-1]) >= streams.CHUNK


def test_zstandard_is_unpacked_little_by_little() -> None:
    """Four bytes of it can stand for 128 KiB."""
    packed = zstandard.compress(bytes(96 << 20))
    tracemalloc.start()
    assert sum(map(len, streams.unpacked(io.BytesIO(packed), "zst"))) == 96 << 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80 << 20


def test_what_an_archive_may_hold(tmp_path: Path) -> None:
    """Text, also packed; a table has to be a file of its own, and so has an archive."""
    members = {"a.parquet": b"PAR1", "b.zip": b"PK", "c.bin": b"c", "d/e.txt.gz": b"text"}
    members["d/e.txt.gz"] = gzip.compress(members["d/e.txt.gz"])
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped,
        tarfile.open(tmp_path / "a.tar", "w") as rolled,
    ):
        for name, data in members.items():
            zipped.writestr(name, data)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            rolled.addfile(info, io.BytesIO(data))
        for kind in (tarfile.FIFOTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("z.txt")
            info.type, info.linkname = kind, "d/e.txt.gz"
            rolled.addfile(info)
    for name in ("a.zip", "a.tar"):
        refused = list[Skipped]()
        ((full, kind, chunks),) = (
            (full, kind, b"".join(chunks))
            for full, kind, chunks in streams.streams(
                find((str(tmp_path / name),))[0][0], refused.append
            )
        )
        assert (full, kind, chunks) == (f"{name}!d/e.txt.gz", "text", b"text")
        told = [(item.where, item.reason.split(";")[0].split(" (")[0]) for item in refused]
        assert told[:3] == [
            (f"{name}!a.parquet", "parquet inside an archive"),
            (f"{name}!b.zip", "archive inside an archive"),
            (f"{name}!c.bin", "not a text format inside an archive"),
        ]
        links = [(f"{name}!z.txt", "link or device inside an archive")] * 2
        assert told[3:] == (links if name == "a.tar" else [])


def test_a_member_with_a_password_costs_no_other(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "secret")
        archive.writestr("b.txt", "text")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[6] |= 1  # in its own header, and in the directory
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    found, refused = read(tmp_path / "a.zip", tmp_path)
    assert (found, [item.reason for item in refused]) == (["text"], ["damaged or encrypted member"])
    assert refused[0].where.startswith("a.zip!a.txt: ")


def test_what_was_unpacked_goes_once_its_result_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs stay, and a second attempt needs neither."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(5)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts(5, seed=1))))
    inputs = sorted(tmp_path.iterdir())
    (spool := tmp_path / "spool").mkdir()
    cuts = list(units.cut(find(tuple(map(str, inputs)))[0], spool, print, list))
    assert list(spool.iterdir())
    job = units.Job(tmp_path, Prepare(inputs=("x",), out=tmp_path))
    monkeypatch.setattr(pool._Worker, "tools", encode.Tools(job), raising=False)
    made = tuple(units.Unit(i, segments, str(i)) for i, segments in enumerate(cuts))
    counts = pool._encode(made)
    assert not list(spool.iterdir()) and all(path.exists() for path in inputs)
    items = texts(5) + texts(5, seed=1)
    tokens = sum(len(Tokenizer().encode(text)) + 1 for text in items)
    expected = (len(items), sum(len(text.encode()) for text in items), tokens)
    assert tuple(map(sum, zip(*counts, strict=True))) == expected
    for path in inputs:
        path.unlink()
    assert pool._encode(made) == counts


def test_member_names_cannot_escape(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../../escape.txt", "outside " * 20)
        archive.writestr("/etc/absolute.txt", "root " * 20)
    (tmp_path / "spool").mkdir()
    assert len(read(tmp_path / "a.zip", tmp_path / "spool")[0]) == 2
    assert not (tmp_path.parent / "escape.txt").exists()


def test_a_broken_member_name_costs_no_text(tmp_path: Path) -> None:
    """Names that claim to be UTF-8; one of them is not, and its member is not text."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in ("a.txt", "\u00e9\u00e9\u00e9.txt", "\u00e8.txt", "\u00e9\u00e9\u00e9.bin"):
            archive.writestr(name, f"{len(name)} and more")
    data = packed.getvalue().replace("\u00e9".encode() * 3, b"b\xe9d\xff/x")
    (tmp_path / "a.zip").write_bytes(data)
    found, refused = read(tmp_path / "a.zip", tmp_path)
    assert found == ["5 and more", "7 and more", "5 and more"]
    assert [item.where for item in refused] == ["a.zip!b\\xe9d\\xff/x.bin"]


@pytest.mark.parametrize("folders", [0, 2])
def test_an_empty_archive_is_counted(tmp_path: Path, folders: int) -> None:
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped,
        tarfile.open(tmp_path / "a.tar.gz", "w:gz") as rolled,
    ):
        for name in ("one/", "two/")[:folders]:
            zipped.writestr(name, b"")
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE
            rolled.addfile(member)
    for name in ("a.zip", "a.tar.gz"):
        found, refused = read(tmp_path / name, tmp_path)
        assert (found, [item.reason for item in refused]) == ([], ["no document inside"])
