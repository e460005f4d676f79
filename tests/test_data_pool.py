"""Runs of units: what one worker is given at a time, which does not change the output."""

import mmap
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import chain
from multiprocessing import forkserver, spawn
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from sota_transformer.data import encode, forks, tables, units
from sota_transformer.data.pool import Job, Pool, runs
from sota_transformer.data.sources import Skipped, find
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.data.units import Segment, Unit
from sota_transformer.errors import SotaError
from sota_transformer.options import Prepare
from tests.preparing import PrivateMap, bytes_of, everything, jsonl, read, run, texts

ROWS = (100, 100, 100, 100, 100, 30)  # of the row groups


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A parquet file with several units per row group; splitting happens here, with small units."""
    monkeypatch.setattr(units, "UNIT_BYTES", 4 << 10)
    monkeypatch.setattr(tables, "UNIT_BYTES", 4 << 10)
    monkeypatch.setattr(Pool, "probe", lambda _, source: tables.probe(source, "text"))
    path, items = tmp_path / "x.parquet", iter(texts(sum(ROWS)))
    schema = pa.schema([("text", pa.string())])
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in ROWS:
            writer.write_table(pa.table({"text": [next(items) for _ in range(rows)]}))
    return path


def units_of(*paths: Path) -> list[Unit]:
    """The units that these files are cut into."""
    sources, _ = find(tuple(map(str, paths)))
    cuts = units.cut(sources, paths[0].parent, print, lambda s: tables.probe(s, "text"))
    return [Unit(i, segments, str(i)) for i, segments in enumerate(cuts)]


def test_a_drive_without_shared_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to report a lost result."""
    monkeypatch.setattr(mmap, "mmap", PrivateMap)
    items = texts(40)
    for name, some in (("a", items[:30]), ("b", items[30:])):
        (tmp_path / name).write_bytes(jsonl(some))
        how = {"append": name == "b", "near_dedup": 0.95, "val_fraction": 0.5}
        run(tmp_path / "out", tmp_path / name, **how)
    assert everything(tmp_path / "out") == sorted(items)


@pytest.mark.skipif(sys.platform == "darwin", reason="there it is always so")
def test_a_temporary_folder_too_long_for_the_fork_servers_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For example a job's own TMPDIR: `sota prepare` failed with "AF_UNIX path too long"."""
    for length, method in ((75, "forkserver"), (76, "spawn")):
        monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * (length - 1))
        assert forks.worker_context().get_start_method() == method


@pytest.mark.skipif(sys.platform == "darwin", reason="there it is always so")
def test_what_a_mac_would_do_gives_the_same_bytes(tmp_path: Path) -> None:
    """Spawned workers, no /proc, no O_DIRECT, another fsync, and one that a drive refuses."""
    lines = tmp_path / "in.jsonl"
    lines.write_bytes(jsonl(texts(100)))
    said = "import sys; from sota_transformer import durable, runtime; print(runtime.sys.platform)"
    command = f"{said}; from sota_transformer.cli import main; sys.exit(main())"
    path = os.pathsep.join([str(Path(__file__).with_name("darwin")), *filter(None, sys.path)])
    for number, refusal in enumerate(("", "ENOTSUP")):
        out = tmp_path / str(number)
        done = subprocess.run(
            [sys.executable, "-c", command, "prepare", lines, "--out", out, "--workers", "2",
             "--val-fraction", "0.1"],
            env=os.environ | {"PYTHONPATH": path, "NO_FULLFSYNC": refusal},
            capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.startswith("darwin"), done.stderr
    run(tmp_path / "here", lines, workers=2)
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "1") == bytes_of(tmp_path / "here")


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_a_row_group_is_one_run_unless_little_follows_it(table: Path, workers: int) -> None:
    made = units_of(table)
    found = list(runs(iter(made), workers))
    assert list(chain(*found)) == made
    groups = [
        sum(unit.segments[0].offset == group for unit in made) for group in {0, 1, 2, 3, 4, 5}
    ]
    assert min(groups) > 1
    whole = [run for run in found if len(run) > 1]
    assert len(whole) == {1: 6, 2: 4, 3: 3, 8: 0}[workers]
    for one in whole:
        (group,) = {unit.segments[0].offset for unit in one}
        assert len(one) == groups[group]
        assert workers == 1 or sum(map(len, found[found.index(one) :])) >= workers * len(one)


def test_other_files_are_handed_out_at_once_and_in_order(table: Path) -> None:
    lines = table.with_name("a.jsonl")
    lines.write_bytes(jsonl(texts(100)))
    after = table.with_name("z.jsonl")
    after.write_bytes(jsonl(texts(100, seed=1)))
    made, taken = units_of(lines, table, after), []
    found = runs((taken.append(unit) or unit for unit in made), 8)
    assert next(found) == (made[0],)
    assert len(taken) <= 2, "lines must not wait for what comes after them"
    assert [made[0], *chain(*found)] == made


def test_a_table_in_runs_gives_the_bytes_of_lines(table: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(texts(sum(ROWS))))
    run(tmp_path / "lines", tmp_path / "x.jsonl")
    for workers in (1, 2, 3):
        run(tmp_path / f"by{workers}", table, workers=workers)
        assert bytes_of(tmp_path / f"by{workers}") == bytes_of(tmp_path / "by1")
        lines = bytes_of(tmp_path / "lines", manifest=False)
        assert bytes_of(tmp_path / f"by{workers}", manifest=False) == lines


@pytest.mark.skipif(sys.platform != "linux", reason="reads the signal mask from /proc")
def test_ctrl_c_is_held_back_from_a_starting_fork_server() -> None:
    """It came through in a process of its own, where Python starts its resource tracker first."""
    code = (
        "from multiprocessing import forkserver; from sota_transformer.data import forks;"
        "forks.start_fork_server();"
        "print(open(f'/proc/{forkserver._forkserver._forkserver_pid}/status').read())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    blocked = int(run.stdout.split("SigBlk:")[1].split()[0], 16)
    assert blocked >> (signal.SIGINT - 1) & 1


def test_a_worker_killed_within_a_run_is_replaced(table: Path, tmp_path: Path, monkeypatch) -> None:
    made, handed = units_of(table), list[list[str]]()  # what a process is started with
    held = list[bool]()  # Ctrl-C in a starting server, and in a starting worker, printed tracebacks
    prepared = spawn.get_preparation_data

    def note() -> None:
        handed.append(sys.argv)
        held.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    def preparation(name: str) -> dict[str, Any]:
        note()
        return prepared(name)

    monkeypatch.setattr(spawn, "get_preparation_data", preparation)
    monkeypatch.setattr(forkserver, "ensure_running", note)
    monkeypatch.setattr(sys, "argv", ["sota", *map(str, range(100_000))])  # gh-144503
    forks.start_fork_server()
    (tmp_path / "units").mkdir()
    pool = Pool(Job(tmp_path / "units", Prepare(inputs=("x",), out=tmp_path)), 2)
    try:
        results = pool.run(made)
        found = [next(results)]
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        found += results
    finally:
        pool.close(stop=True)
    assert [unit for unit, _ in found] == made
    assert sum(documents for _, (documents, _, _) in found) == sum(ROWS)
    assert len(handed) > 3 and all(arguments == ["sota"] for arguments in handed)
    assert all(held)
    note()
    assert len(sys.argv) > 100_000 and not held[-1]


def test_a_worker_that_cannot_be_stopped_blocks_nothing(table: Path, tmp_path: Path) -> None:
    """Like one still starting while another died: when stopped, it ignores even SIGTERM."""
    made, found = units_of(table), []
    (tmp_path / "units").mkdir()
    pool = Pool(Job(tmp_path / "units", Prepare(inputs=("x",), out=tmp_path)), 2)
    results = pool.run(made)
    found.append(next(results))
    deaf, dead = multiprocessing.active_children()
    os.kill(deaf.pid or 0, signal.SIGSTOP)
    os.kill(dead.pid or 0, signal.SIGKILL)
    rest = threading.Thread(target=lambda: found.extend(results), daemon=True)
    rest.start()
    rest.join(timeout=30)
    hung = rest.is_alive()
    deaf.kill()  # releases whatever hangs
    rest.join(timeout=30)
    pool.close(stop=True)
    assert not hung
    assert [unit for unit, _ in found] == made


def in_turn(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dies: Callable[[Unit], bool]
) -> tuple[list[Unit], Pool]:
    """100 units, and a pool of two whose work is done when wanted; on some units a worker dies."""

    def counts(run: tuple[Unit, ...]) -> list[tuple[int, int, int]]:
        if any(map(dies, run)):
            raise BrokenProcessPool
        return [(unit.index, 0, 0) for unit in run]

    def submit(_: object, run: tuple[Unit, ...]) -> SimpleNamespace:
        return SimpleNamespace(done=lambda: False, result=lambda: counts(run))

    executor = SimpleNamespace(submit=submit, shutdown=lambda **_: None)
    monkeypatch.setattr(Pool, "_start", lambda _: executor)
    monkeypatch.setattr("concurrent.futures.wait", lambda *_: SimpleNamespace(done=True))
    (folder / "a.jsonl").write_bytes(jsonl(texts(3)))
    (unit,) = units_of(folder / "a.jsonl")
    pool = Pool(Job(folder, Prepare(inputs=("x",), out=folder)), 2)
    return [replace(unit, index=index) for index in range(100)], pool


def test_a_bounded_number_of_units_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the first of them is; what waits takes space on the disk."""
    made, pool = in_turn(tmp_path, monkeypatch, lambda _: False)
    taken, waiting = list[Unit](), list[int]()
    for number, found in enumerate(pool.run(taken.append(unit) or unit for unit in made)):
        assert found == (made[number], (number, 0, 0))
        waiting.append(len(taken) - number)
    assert len(taken) == 100 and min(waiting[:80]) > 2 and max(waiting) < 12


@pytest.mark.parametrize("deaths", [1, 2, 9])
def test_the_unit_on_which_workers_die_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    """After a death with others, and two alone."""
    met = list[Unit]()

    def dies(unit: Unit) -> bool:
        met.extend([unit] * (unit.index == 30))
        return unit.index == 30 and len(met) <= deaths

    made, pool = in_turn(tmp_path, monkeypatch, dies)
    found = list[Unit]()
    if deaths < 3:
        found += (unit for unit, _ in pool.run(made))
        assert found == made
        return
    with pytest.raises(SotaError, match=r"died twice on a\.jsonl \(from byte 0\)") as caught:
        found.extend(unit for unit, _ in pool.run(made))
    assert caught.value.code == 65 and found == made[:30] and len(met) == 3


def test_a_file_that_cannot_be_read_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It vanished, or is too large for this machine."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    (unit,) = units_of(*sorted(tmp_path.iterdir()))
    (tmp_path / "a.txt").unlink()
    plain = encode.documents

    def documents(segment: Segment, *how: Any) -> Any:
        if segment.name == "b.txt":
            raise MemoryError
        return plain(segment, *how)

    monkeypatch.setattr(encode, "documents", documents)
    tools = encode.Tools(Job(tmp_path, Prepare(inputs=("x",), out=tmp_path)))
    encoded = encode.encode_unit(unit, tools)
    assert encoded.tokens.tolist() == [*Tokenizer().encode("c"), EOT]
    assert encoded.rejects.entries == {
        "cannot be read (No such file or directory)": {"count": 1, "examples": ["a.txt"]},
        "not enough memory": {"count": 1, "examples": ["b.txt"]},
    }
    encode.store(encoded, tmp_path / "unit", "1")
    stored = (tmp_path / "unit").read_bytes()
    assert encode.load(tmp_path / "unit", "1", check=True).rejects == encoded.rejects
    for at in range(len(stored)):  # no byte may change, not even of what was skipped
        (tmp_path / "unit").write_bytes(stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :])
        assert encode.load(tmp_path / "unit", "1", check=True) is None


@pytest.mark.parametrize("head", [b"", b"[]", b"{}", b"7", b"[" * 9999, b'{"key": "1"}'])
def test_a_result_of_another_form_is_made_again(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "unit").write_bytes(b"tokens" + head + bytes(32) + len(head).to_bytes(8, "little"))
    assert encode.load(tmp_path / "unit", "1", check=True) is None
    assert encode.load(tmp_path / "gone", "1", check=False) is None


def test_a_unit_may_have_any_number_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there is room for at first, or exactly as many."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(3)))
    (unit,) = units_of(tmp_path / "a.jsonl")
    tools = encode.Tools(Job(tmp_path, Prepare(inputs=("x",), out=tmp_path)))
    expected = list(chain(*([*Tokenizer().encode(text), EOT] for text in texts(3))))
    for room in (1, 9, *range(len(expected) - 2, len(expected) + 3)):
        monkeypatch.setattr(encode, "UNIT_BYTES", 2 * room)
        assert encode.encode_unit(unit, tools).tokens.tolist() == expected


def rows_of(items: list[str]) -> list[tuple[int, bytes]]:
    """As yielded by a table reader."""
    return [(row, text.encode()) for row, text in enumerate(items)]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_small_row_groups_share_a_unit_and_a_footer_is_read_once(
    table: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    items, path = texts(300), table.with_name(f"small.{kind}")
    column = pa.table({"text": items})
    if kind == "parquet":
        parquet.write_table(column, path, row_group_size=1)
    else:
        with pa.ipc.new_file(path, column.schema) as file:
            file.write_table(column, max_chunksize=1)
    made, opened = units_of(path), []
    assert 2 < len(made) < 100, "as by their text, not as by their row groups"
    for module, name in ((parquet, "ParquetFile"), (pa, "OSFile")):
        plain = getattr(module, name)
        note = lambda *a, plain=plain, **k: opened.append(a) or plain(*a, **k)  # noqa: E731
        monkeypatch.setattr(module, name, note)
    reader = tables.Tables()
    found = [tuple(reader.rows(part, "text")) for unit in made for part in unit.segments]
    assert list(chain(*found)) == rows_of(items)
    assert len(opened) == 1
    again = [tuple(reader.rows(part, "text")) for unit in made[::-1] for part in unit.segments]
    assert again == found[::-1], "in any order, as workers meet them"


def test_a_row_larger_than_a_unit_is_whole(table: Path) -> None:
    items = ["a", "b " * 9000, "c " * 9000, "d"]
    column = pa.table({"text": items})
    parquet.write_table(column, table, row_group_size=1)
    assert read(table, table.parent) == (items, [])
    path = table.with_suffix(".arrow")
    with pa.ipc.new_file(path, column.schema) as file:
        file.write_table(column, max_chunksize=1)
    assert read(path, table.parent) == (items, [])


@pytest.mark.parametrize("kind", ["", "large_", "view"])
def test_a_broken_string_costs_no_other(tmp_path: Path, kind: str) -> None:
    """Whatever kind of string a table has."""
    if kind == "view" and not hasattr(pa, "string_view"):
        pytest.skip("pyarrow 16 or later")
    binary = pa.binary_view() if kind == "view" else getattr(pa, f"{kind}binary")()
    string = pa.string_view() if kind == "view" else getattr(pa, f"{kind}string")()
    column = pa.array([b"before", b"caf\xe9", b"behind"], binary).view(string)
    batch = pa.record_batch({"text": column})
    with pa.ipc.new_file(tmp_path / "a.arrow", batch.schema) as file:
        file.write_batch(batch)
    found, refused = read(tmp_path / "a.arrow", tmp_path)
    assert found == ["before", "behind"]
    assert [(item.reason, item.repaired) for item in refused] == [
        ("not valid UTF-8", "caf\ufffd".encode())
    ]


def test_a_table_that_cannot_be_read_has_one_reason(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lacks the column, or pyarrow is not installed."""
    column = pa.table({"other": texts(100)})
    other = table.with_name("other.parquet")
    parquet.write_table(column, other, row_group_size=9)
    with pa.ipc.new_file(arrow := other.with_suffix(".arrow"), column.schema) as file:
        file.write_table(column, max_chunksize=9)
    missing = "parquet and Arrow need `pip install 'sota-transformer[parquet]'`"
    for expected in ("no column 'text'", missing):
        for path in (other, arrow):
            found, refused = read(path, table.parent)
            assert (found, [item.reason for item in refused]) == ([], [expected])
        monkeypatch.setitem(sys.modules, "pyarrow", None)


def test_row_groups_of_any_sizes_give_every_row_once(table: Path) -> None:
    """A large row group's last piece must not continue after an empty one, where its reader ends.
    For any of three workers and any order of pieces.
    """
    path, source = table.with_name("groups.parquet"), random.Random(7)
    sizes = [source.choices((0, 0, 1, 3, 20, 60), k=source.randint(1, 9)) for _ in range(25)]
    for rows in ([0, 100, 0, 5, 0, 6], *sizes):
        items, start = texts(sum(rows)), 0
        with parquet.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            for count in rows:
                part = pa.array(items[start : start + count], "string")
                writer.write_table(pa.table({"text": part}))
                start += count
        pieces = [part for unit in units_of(path) for part in unit.segments]
        readers, found = [tables.Tables() for _ in range(3)], dict[int, list]()
        for at in source.sample(range(len(pieces)), len(pieces)):
            found[at] = list(source.choice(readers).rows(pieces[at], "text"))
        assert list(chain(*(found[at] for at in sorted(found)))) == rows_of(items), rows


def test_a_table_that_has_shrunk_is_reported(table: Path) -> None:
    made, items = units_of(table), texts(100)
    parquet.write_table(pa.table({"text": items}), table)
    reader = tables.Tables()
    found = list(chain(*(reader.rows(part, "text") for unit in made for part in unit.segments)))
    skipped = [item for item in found if isinstance(item, Skipped)]
    assert [item for item in found if item not in skipped] == rows_of(items)
    assert skipped and all("truncated" in item.where for item in skipped)
