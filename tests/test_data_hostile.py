"""Files made to break a reader: damage at random places, bombs, endless lines, deep nesting."""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import os
import re
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from sota_transformer.data import documents as reading
from sota_transformer.data import streams, units
from sota_transformer.data.documents import documents
from sota_transformer.data.sources import Skipped, find
from sota_transformer.data.tables import Tables
from tests.preparing import everything, jsonl, read, run, texts


def seeds(folder: Path) -> Iterator[Path]:
    """One good file of every kind."""
    items = texts(40)
    lines = jsonl(items)
    sheet = io.StringIO()
    csv.writer(sheet).writerows([["text", "n"], *([text, 1] for text in items)])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", lines)
        archive.writestr("b.txt", "text " * 50)
    rolled = io.BytesIO()
    with tarfile.open(fileobj=rolled, mode="w:gz") as archive:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(lines)
        archive.addfile(info, io.BytesIO(lines))
    files = {
        "s.jsonl": lines,
        "s.jsonl.gz": gzip.compress(lines),
        "s.jsonl.zst": zstandard.compress(lines),
        "s.jsonl.bz2": bz2.compress(lines),
        "s.jsonl.xz": lzma.compress(lines),
        "s.csv": sheet.getvalue().encode(),
        "s.txt": "\n\n".join(items).encode(),
        "s.zip": packed.getvalue(),
        "s.tar.gz": rolled.getvalue(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        yield folder / name


def test_damage_anywhere_is_reported_never_raised(tmp_path: Path) -> None:
    random, spool = np.random.default_rng(1), tmp_path / "spool"
    spool.mkdir()
    good = set(texts(40)) | {"text " * 50}
    for path in list(seeds(tmp_path)):
        original = path.read_bytes()
        for turn in range(60):
            data = bytearray(original)
            if turn % 3 == 0:
                data = data[: int(random.integers(1, len(data)))]
            elif turn % 3 == 1:
                for at in random.integers(0, len(data), 1 + turn // 20):
                    data[at] ^= int(random.integers(1, 256))
            else:
                at = int(random.integers(0, len(data)))
                data[at:at] = random.bytes(int(random.integers(1, 40)))
            path.write_bytes(data)
            found, refused = read(path, spool)
            packed = path.suffix in (".gz", ".zst", ".bz2", ".xz", ".zip")
            if packed and bytes(data) != original and set(found) != good:
                assert refused or len(found) >= 40, (path.name, turn)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_tables_end_in_a_reason(tmp_path: Path, kind: str) -> None:
    """In workers, since a reader written in C++ may do worse than raise."""
    random, folder = np.random.default_rng(2), tmp_path / "in"
    folder.mkdir()
    table = pa.table({"text": texts(50)})
    sink = io.BytesIO()
    if kind == "parquet":
        parquet.write_table(table, sink, row_group_size=20)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=20)
    original = sink.getvalue()
    for turn in range(80):
        data = bytearray(original)
        if turn % 2:
            for at in random.integers(0, len(data), 3):
                data[at] ^= int(random.integers(1, 256))
        else:
            data = data[: int(random.integers(1, len(data)))]
        (folder / f"{turn:03d}.{kind}").write_bytes(data)
    (folder / "good.jsonl").write_bytes(jsonl(texts(60, seed=3)))
    manifest = run(tmp_path / "data", folder)
    assert set(texts(60, seed=3)) <= set(everything(tmp_path / "data"))
    assert manifest["rejects"]["damaged table; only its readable start was kept"]["count"] > 20


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_what_comes_before_damage_is_taken(tmp_path: Path, ending: str) -> None:
    """Streams may be concatenated, but only zstandard allows zeros between them."""
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    compress = packers.get(ending, zstandard.compress)
    zeros = bytes(8) if ending in packers else b""
    first, more = (compress(b'{"text": "%s"}\n' % text) for text in (b"the first", b"more"))
    (tmp_path / f"in.jsonl.{ending}").write_bytes(first + zeros + more + zeros[:4])
    assert read(tmp_path / f"in.jsonl.{ending}", tmp_path) == (["the first", "more"], [])
    for packed in (first + more[:5], first + b"?" + more[1:] + more, first + b"what is this?"):
        (tmp_path / f"in.jsonl.{ending}").write_bytes(packed)
        found, refused = read(tmp_path / f"in.jsonl.{ending}", tmp_path)
        assert found == ["the first"]
        assert [item.reason.split(";")[0] for item in refused] == ["damaged stream"]


@pytest.mark.parametrize("cut", range(1, 11))
def test_what_a_cut_bz2_still_holds_is_taken(tmp_path: Path, cut: int) -> None:
    """Python asks for input while the last block's text waits to be read."""
    lines = [letter * 200_000 for letter in "abcdefghijklmnop"]
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(jsonl(lines))[:-cut])
    found, refused = read(tmp_path / "a.jsonl.bz2", tmp_path)
    assert found == lines
    assert [item.reason[:15] for item in refused] == ["damaged stream;"]


def test_truncated_incompressible_data_is_reported(tmp_path: Path) -> None:
    """The marker appended to detect truncation filled the gap, and was taken for text."""
    text = "".join(map(chr, np.random.default_rng(3).integers(33, 127, 3000)))
    packed = zstandard.ZstdCompressor(level=-7).compress(text.encode())
    for cut in (*range(1, 120, 7), 1000):
        (tmp_path / "a.txt.zst").write_bytes(packed[:-cut])
        found, refused = read(tmp_path / "a.txt.zst", tmp_path)
        assert [item.reason[:15] for item in refused] == ["damaged stream;"], cut
        assert text.startswith("".join(found))


def test_lines_and_documents_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LINE_BYTES", 3 << 20)
    monkeypatch.setattr(reading, "DOCUMENT_BYTES", 1 << 20)
    monkeypatch.setattr(reading, "_AT_ONCE", 1 << 20)
    long_line, long_text = b'{"text": "' + b"x" * (9 << 20) + b'"}', "y" * (2 << 20)
    good = texts(20)
    data = jsonl(good[:10]) + long_line + b"\n" + jsonl([long_text]) + jsonl(good[10:]) + long_line
    for name, content in {"a.jsonl": data, "b.jsonl.gz": gzip.compress(data)}.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / "spool").mkdir(exist_ok=True)
        found, refused = read(tmp_path / name, tmp_path / "spool")
        reasons = [item.reason for item in refused]
        assert found == good
        assert reasons == ["line over 3 MiB", "document over 1 MiB", "line over 3 MiB"]
    for row in (b'"' + b"x,\n" * (2 << 20), b"x," * (3 << 20)):
        (tmp_path / "c.csv").write_bytes(b"text,n\na,1\n" + row)
        found, refused = read(tmp_path / "c.csv", tmp_path / "spool")
        assert (found, len(refused)) == (["a"], 1)
        assert refused[0].reason.startswith("no row ends within 3 MiB")


def test_one_long_run_of_anything_is_quick(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    for i, character in enumerate(("a", " ", "\n", "字", "\u00a0", "[", "\t\r\n")):
        path = tmp_path / f"{i}.txt"
        path.write_text(character * 2_000_000)
        started = time.process_time()
        read(path, tmp_path / "spool")
        assert time.process_time() - started < 5
    (tmp_path / "deep.jsonl").write_text("[" * 3_000_000 + "\n" + '{"a":' * 500_000)
    _, refused = read(tmp_path / "deep.jsonl", tmp_path / "spool")
    assert [item.reason for item in refused] == ["nested too deep", "nested too deep"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "html"])
@pytest.mark.parametrize("unit_bytes", [2000, 1 << 20])
def test_utf16_gives_the_documents_of_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, unit_bytes: int
) -> None:
    """For any size and compression; read 1,000 bytes at a time, so that characters are split."""
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(units, "_TEXT_SLACK", 100)
    monkeypatch.setattr(streams, "CHUNK", 1001)
    items = [f"{'日本' * 40}\U0001f600 {text}" for text in texts(300)]
    sheet = io.StringIO()
    csv.writer(sheet).writerows([["n", "text"], *([1, text] for text in items)])
    text = {"txt": "\n".join(items), "jsonl": jsonl(items).decode(), "csv": sheet.getvalue()}
    text["html"] = f"<html><body><p>{'</p><p>'.join(items)}</p></body></html>"
    (tmp_path / "spool").mkdir()
    (tmp_path / f"8.{kind}").write_bytes(text[kind].encode())
    expected, _ = read(tmp_path / f"8.{kind}", tmp_path / "spool")
    assert sum(map(len, expected)) > 30_000
    for codec in ("utf-16", "utf-16-be"):
        data = ("\ufeff" * (codec == "utf-16-be") + text[kind]).encode(codec)
        (tmp_path / f"16.{kind}").write_bytes(data)
        (tmp_path / f"16.{kind}.gz").write_bytes(gzip.compress(data))
        for name in (f"16.{kind}", f"16.{kind}.gz"):
            assert read(tmp_path / name, tmp_path / "spool") == (expected, []), (name, codec)


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_with_an_unknown_name_is_classified_by_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """JSON lines, although the first bytes inspected are blank."""
    data = f"\n \n\n\n{jsonl(texts(5)).decode()}".encode(codec)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    (tmp_path / "a.json").write_bytes(data)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(data))
    for path in (Path("-"), tmp_path / "a.json", tmp_path / "b.json.gz"):
        assert read(path, tmp_path) == (texts(5), []), path


def test_broken_utf16_is_counted_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spool").mkdir()
    lines = [f'{{"text": "{text.strip()}"}}\n'.encode("utf-16-le") for text in texts(50)]
    lone = '{"text": "cut \ud83d in two, \ufffd was there"}\n'.encode("utf-16-le", "surrogatepass")
    odd = '{"text": "the last'.encode("utf-16-le") + b"\0"
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF16_LE + b"".join([*lines, lone, odd]))
    for unit_bytes in (1 << 20, 2000):
        monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
        found, refused = read(tmp_path / "a.jsonl", tmp_path / "spool")
        assert found == [text.strip() for text in texts(50)]
        assert [item.reason for item in refused] == ["not valid UTF-8", "not valid UTF-8"]
        assert refused[0].repaired.decode() == "cut \ufffd in two, \ufffd was there"


def test_csv_cuts_only_between_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 300)
    items = [f'{text}\n"quoted"\r\n\n, and {i}' for i, text in enumerate(texts(200))]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n" * 100_000, "text"], *enumerate(items)])
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    (tmp_path / "spool").mkdir()
    for name in ("a.csv", "b.csv.gz"):
        assert read(tmp_path / name, tmp_path / "spool") == (items, [])
    # After a quote inside a cell, where a unit may end, comes a cell longer than a unit.
    cells = [cell for i in range(60) for cell in ("x\n" * 200 + str(i), f'a"{"b" * 9 * i}')]
    rows = [cell if "\n" not in cell else f'"{cell}"' for cell in ("text", *cells)]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    assert read(tmp_path / "c.csv", tmp_path / "spool") == (cells, [])


@pytest.mark.parametrize(("kind", "separator"), [("csv", ","), ("tsv", "\t")])
def test_a_table_cut_anywhere_has_all_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, separator: str
) -> None:
    """Quotes and line ends in all orders; cut tables are also unpacked in the smallest pieces."""
    random, marks = np.random.default_rng(5), ['"', '""', '"\n"', f'"{separator}"', separator]
    marks += ["\n", "\r\n", "\r", "a", "bc", "\n", separator]
    (tmp_path / "spool").mkdir()
    for mark, head, end in (("", "\r", "\n"), ("\ufeff", "\n", "\r")):
        soup = "".join(random.choice(marks, 40_000).tolist())
        soup = soup if end == "\n" else re.sub("\r?\n", end, soup)
        data = f'{mark}"text",n{head}{soup}'.replace(",", separator).encode()
        (tmp_path / f"a.{kind}").write_bytes(data)
        (tmp_path / f"a.{kind}.gz").write_bytes(gzip.compress(data))
        monkeypatch.setattr(units, "UNIT_BYTES", 1 << 20)
        expected, refused = read(tmp_path / f"a.{kind}", tmp_path / "spool")
        assert len(expected) > 2000
        monkeypatch.setattr(units, "UNIT_BYTES", 300)
        monkeypatch.setattr(streams, "CHUNK", 17)
        for name in (f"a.{kind}.gz", f"a.{kind}"):
            found, others = read(tmp_path / name, tmp_path / "spool")
            assert found == expected, name
            assert [item.reason for item in others] == [item.reason for item in refused]
        monkeypatch.setattr(reading, "LINE_BYTES", 1 << 14)  # no row is as long
        assert read(tmp_path / f"a.{kind}", tmp_path / "spool") == (expected, others)
        monkeypatch.setattr(reading, "LINE_BYTES", 1 << 20)


def test_a_cell_that_is_too_long_is_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text beyond the limit is no row; other columns may have any length."""
    monkeypatch.setattr(reading, "DOCUMENT_BYTES", 1 << 17)
    long = "no, row\n" * (1 << 15)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "n"], ["a", long], [long, "b"], ["c", "d"]])
    found, refused = read(tmp_path / "a.csv", tmp_path)
    assert found == ["a", "c"] and [item.reason for item in refused] == ["document over 0 MiB"]


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_an_empty_file_is_counted(tmp_path: Path, ending: str) -> None:
    """Also a lone UTF-16 byte order mark."""
    contents = {
        "a.txt": codecs.BOM_UTF16_LE, "b.txt": codecs.BOM_UTF8, "c.jsonl": b"\n \n",
        "d.csv": b"text,n\r\n", "e.jsonl": codecs.BOM_UTF16_BE, "f.txt": b"",
    }  # fmt: skip
    packers = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    pack = packers.get(ending, zstandard.compress)
    (tmp_path / "spool").mkdir()
    for name, data in contents.items():
        (tmp_path / f"{name}{ending}").write_bytes(pack(data))
        if ending or data:  # a file of zero bytes is counted during the file search
            found, refused = read(tmp_path / f"{name}{ending}", tmp_path / "spool")
            assert (found, len(refused)) == ([], 1), (name, refused)


def test_a_table_of_no_rows_is_counted_and_a_name_means_one_column(tmp_path: Path) -> None:
    """A parquet file's columns `text.x` come with `text`; Arrow names may repeat."""
    items = pa.array(["first", "second"])
    others = pa.array(["no", "no"])
    for name, table, expected in (
        ("none", pa.table({"text": items.slice(0, 0)}), []),
        ("dots", pa.table({"text.of": others, "text": items}), ["first", "second"]),
        ("twice", pa.Table.from_arrays([items, others], ["text", "text"]), ["first", "second"]),
    ):
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        with pa.ipc.new_file(tmp_path / f"{name}.arrow", table.schema) as file:
            file.write_table(table)
        for ending in ("parquet", "arrow"):
            found, refused = read(tmp_path / f"{name}.{ending}", tmp_path)
            assert found == expected, (name, ending)
            assert [item.reason for item in refused] == ["no document inside"] * (not expected)
    parquet.write_table(pa.table({"text": pa.array([10**8], pa.date32())}), tmp_path / "a.parquet")
    (refused,) = read(tmp_path / "a.parquet", tmp_path)[1]  # a date beyond Python's range
    assert refused.where == "a.parquet: date value out of range"


def test_a_quote_that_is_never_closed_hides_nothing(tmp_path: Path) -> None:
    """What it swallows is dropped; everything before it, or with merely odd quotes, is kept."""
    (tmp_path / "a.csv").write_bytes(b'text,n\nwhole,1\nin "it",2\n"odd"x,3\n"open,4\nmore,5\n')
    found, refused = read(tmp_path / "a.csv", tmp_path)
    assert found == ["whole", 'in "it"', "oddx"]
    assert [item.reason[:27] for item in refused] == ["quote that is never closed,"]
    assert refused[0].where == "a.csv: row 5 from byte 0"
    (tmp_path / "b.csv").write_bytes(b"n,text\n1,cut \xe2\x82 short")
    found, refused = read(tmp_path / "b.csv", tmp_path)
    assert (found, refused[0].reason) == ([], "not valid UTF-8")
    assert refused[0].repaired.decode() == "cut � short"


@pytest.mark.parametrize("at_once", [8 << 20, 10])
def test_files_that_vanish_or_shrink_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Between the file search, the cut into units and the worker that reads them."""
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    monkeypatch.setattr("sota_transformer.data.documents._AT_ONCE", at_once)
    folder, refused = tmp_path / "in", list[Skipped]()
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (folder / name).write_bytes(jsonl(texts(50)))
    sources = find((str(folder),))[0]
    (folder / "b.jsonl").unlink()
    segments = [s for found in units.cut(sources, tmp_path, refused.append, list) for s in found]
    assert [(item.where, item.reason) for item in refused] == [
        ("in/b.jsonl", "cannot be read (No such file or directory)")
    ]
    assert {segment.name for segment in segments} == {"in/a.jsonl", "in/c.jsonl"}
    os.truncate(folder / "c.jsonl", 100)
    with pytest.raises(OSError, match="truncated while being read"):
        list(documents(segments[-1], "text", Tables()))
