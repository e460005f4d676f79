"""Text columns of parquet and Arrow files, by row ranges; runs in workers, pyarrow is optional.

Reading cannot start in the middle of a row group. Each worker therefore keeps its last reader and
continues from its position, so that a file with one huge row group is decoded once per worker, not
once per unit; and the pool gives a row group to a single worker where it can. Small row groups
share a unit, and the file stays open: its footer describes every column of every row group and is
slow to parse.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from typing import Any

from sota_transformer.data.sources import Skipped, Source
from sota_transformer.data.units import UNIT_BYTES, Segment

_BATCH_ROWS = 32
_BUFFER_BYTES = 1 << 20
_BYTES = {"string": "binary", "large_string": "large_binary", "string_view": "binary_view"}
_NAMES = 120  # characters to quote of the names of columns
_LEFT_OUT = "damaged table; only its readable start was kept"

Row = tuple[int, Any]  # row number, value


def probe(source: Source, field: str) -> list[tuple[int, int, int]]:
    """(row group or 0, first row, end row) pieces of about UNIT_BYTES; one piece if unreadable.

    Rows count from the beginning of the file; a piece may extend into the following row groups.
    """
    try:
        if source.kind == "arrow":  # its batches have to be read to be counted
            columns = _columns(source.path, field)
            pieces = _pieces((len(column), column.nbytes) for column in columns)
            return [(0, first, end) for _, first, end in pieces]
        from pyarrow import parquet

        meta = parquet.read_metadata(source.path)
        return _pieces(_row_groups(meta, field))
    except (*_damage(), ImportError):
        return [(0, 0, source.size)]  # reading it will report the problem


def _row_groups(meta: Any, field: str) -> Iterator[tuple[int, int]]:
    """(rows, bytes of the column) of each row group; less than the text if dictionary-encoded."""
    places = (at for at in range(meta.num_columns) if meta.schema.column(at).path == field)
    column = next(places, None)
    for number in range(meta.num_row_groups):
        group = meta.row_group(number)
        size = 0 if column is None else group.column(column).total_uncompressed_size
        yield group.num_rows, size


def _pieces(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(part, first row, end row) pieces, from the (rows, bytes) of each part: large parts are cut,
    small ones grouped.
    """
    pieces, row, held = [], 0, 0
    for number, (rows, size) in enumerate(parts):
        if not rows:
            continue  # or the next part would extend a large part's last piece
        end = row + rows
        if pieces and held + size <= UNIT_BYTES:
            pieces[-1] = (*pieces[-1][:2], end)
            held += size
        else:
            step = max(1, rows * UNIT_BYTES // max(1, size))
            pieces += [(number, at, min(at + step, end)) for at in range(row, end, step)]
            held = size
        row = end
    return pieces


def having(where: str, names: Iterable[str]) -> str:
    """The place of a record or table without the text field, with the names that it has instead."""
    found = ", ".join(map(repr, islice(names, _NAMES)))
    return f"{where} (has {found[:_NAMES]})"


def _damage() -> tuple[type[BaseException], ...]:
    """The exceptions that reading a damaged table may raise."""
    try:
        import pyarrow
    except ImportError:
        return (OSError, ValueError)
    return (OSError, ValueError, KeyError, OverflowError, pyarrow.ArrowException)


class Tables:
    """A worker's table reader, which remembers its position."""

    def __init__(self) -> None:
        self._place: tuple[str, int] | None = None
        self._row = 0
        self._path = ""
        self._file: Any = None
        self._ends: list[int] = []  # rows of the file up to the end of each row group
        self._batches: Iterator[Any] = iter(())
        self._rest: list[Any] = []

    def rows(self, segment: Segment, field: str) -> Iterator[Row | Skipped]:
        """The values of a segment's rows, or the reason why there are none."""
        try:
            yield from self._rows(segment, field)
        except ImportError:
            hint = "parquet and Arrow need `pip install 'sota-transformer[parquet]'`"
            yield Skipped(hint, segment.name)
        except KeyError as error:
            if not segment.start:  # otherwise the first piece reports it
                yield Skipped(f"no column {field!r}", having(segment.name, error.args[1:]))
        except _damage() as error:
            self._place = None
            text = (str(error).splitlines() or [""])[0][:80]
            yield Skipped(_LEFT_OUT, f"{segment.name}: {text}")

    def _rows(self, segment: Segment, field: str) -> Iterator[Row]:
        """Rows start..stop, continuing from the reader's position if that is not past `start`."""
        import pyarrow

        place = (segment.path, segment.offset)
        if self._place != place or self._row > segment.start:
            self._batches, self._rest = iter(()), []  # free the old batches before reading more
            if not segment.whole:
                pyarrow.default_memory_pool().release_unused()
            self._row, self._batches = self._open(segment, field)
            self._place = place
        while segment.whole or self._row < segment.stop:
            if not self._rest:
                batch = next(self._batches, None)
                if batch is None:
                    if segment.whole:
                        return
                    raise OSError("truncated while being read")
                if self._row + len(batch) <= segment.start:
                    self._row += len(batch)  # another worker's rows: do not convert them
                    continue
                self._rest = batch.to_pylist()[::-1]
            value = self._rest.pop()
            self._row += 1
            if self._row > segment.start:
                yield self._row - 1, value

    def _open(self, segment: Segment, field: str) -> tuple[int, Iterator[Any]]:
        """The first row and all batches, from the segment's row group or for a whole Arrow file."""
        if segment.kind == "arrow":
            return 0, _arrow(segment, field)
        from pyarrow import parquet

        if self._path != segment.path:
            # Read in small pieces: a column may be larger than memory.
            how = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
            file = parquet.ParquetFile(segment.path, **how)
            groups = map(file.metadata.row_group, range(file.num_row_groups))
            ends = list(accumulate(group.num_rows for group in groups))
            self._path, self._file, self._ends = segment.path, file, ends
        if field not in self._file.schema_arrow.names:
            raise KeyError(field, *self._file.schema_arrow.names)
        ends, first = self._ends, segment.offset
        last = len(ends) if segment.whole else min(len(ends), bisect_left(ends, segment.stop) + 1)
        how = {"row_groups": list(range(first, last)), "columns": [field], "use_threads": False}
        # pyarrow 18 fails on no row groups
        batches = self._file.iter_batches(_BATCH_ROWS, **how) if first < last else ()
        return max(ends[:first], default=0), (_column(batch, field) for batch in batches)


def _arrow(segment: Segment, field: str) -> Iterator[Any]:
    """Batches of the column of an Arrow file."""
    for column in _columns(segment.path, field):
        for at in range(0, len(column), _BATCH_ROWS):
            yield column.slice(at, _BATCH_ROWS)


def _columns(path: str, field: str) -> Iterator[Any]:
    """The column of each batch of an Arrow file or Arrow stream (the format `datasets` caches)."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.OSFile(path) as raw:
        magic = raw.read(6)
        if magic.startswith(b"FEA1"):
            raise ValueError("Feather version 1; write version 2, which is Arrow")
        if magic == b"ARROW1":
            file = ipc.open_file(raw)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            raw.seek(0)
            batches = iter(ipc.open_stream(raw))
        for batch in batches:
            if field not in batch.schema.names:
                raise KeyError(field, *batch.schema.names)
            column = _column(batch, field)
            column.validate(full=True)
            yield column


def _column(batch: Any, field: str) -> Any:
    """The first column of that name. Names may repeat, and parquet gives `text.x` for `text`.

    Strings are viewed as bytes, without a copy: one invalid UTF-8 string would fail its batch.
    """
    column = batch.column(batch.schema.names.index(field))
    if (values := getattr(column, "dictionary", None)) is not None:  # such as a pandas category
        return type(column).from_arrays(column.indices, _raw(values))
    return _raw(column)


def _raw(column: Any) -> Any:
    """A string column viewed as bytes; any other column unchanged."""
    raw = _BYTES.get(str(column.type))
    return column.view(raw) if raw else column
