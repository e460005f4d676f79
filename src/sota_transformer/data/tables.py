"""Text columns of parquet and Arrow files, by row ranges; runs in workers, pyarrow is optional.

A row group cannot be entered in its middle. Each worker therefore keeps its last reader and goes on
from where it stands, so that a file of one huge row group is decoded once a worker, not once a
unit; and the pool leaves a row group to one worker where it can. Small row groups share a unit, and
the file stays open: its footer describes every column of every row group, and takes its time.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from sota_transformer.data.sources import Skipped, Source
from sota_transformer.data.units import UNIT_BYTES, Segment

_BATCH_ROWS = 32
_BUFFER_BYTES = 1 << 20
_BYTES = {"string": "binary", "large_string": "large_binary", "string_view": "binary_view"}
_LEFT_OUT = "damaged table; only its readable start was taken"

Row = tuple[int, Any]  # row number, value


def probe(source: Source, field: str) -> list[tuple[int, int, int]]:
    """(row group or 0, first row, end row) pieces of about UNIT_BYTES; one piece if unreadable.

    Rows count from the beginning of the file, and a piece may go on into the next row groups.
    """
    try:
        if source.kind == "arrow":  # whose batches have to be read to be counted
            columns = _columns(source.path, field)
            pieces = _pieces((len(column), column.nbytes) for column in columns)
            return [(0, first, end) for _, first, end in pieces]
        from pyarrow import parquet

        meta = parquet.read_metadata(source.path)
        return _pieces(_row_groups(meta, field))
    except (*damage(), ImportError):
        return [(0, 0, source.size)]  # reading it will say what is wrong


def _row_groups(meta: Any, field: str) -> Iterator[tuple[int, int]]:
    """(rows, bytes of the column) of each row group; dictionaries take less than the text."""
    places = (at for at in range(meta.num_columns) if meta.schema.column(at).path == field)
    column = next(places, None)
    for number in range(meta.num_row_groups):
        group = meta.row_group(number)
        size = 0 if column is None else group.column(column).total_uncompressed_size
        yield group.num_rows, size


def _pieces(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(part, first row, end row) of parts of so many rows and bytes: large ones cut, small ones
    put together.
    """
    pieces, row, held = [], 0, 0
    for number, (rows, size) in enumerate(parts):
        if not rows:
            continue  # what follows would go on a large one's last piece, read without it
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


def damage() -> tuple[type[BaseException], ...]:
    """What reading a damaged table may raise."""
    try:
        import pyarrow
    except ImportError:
        return (OSError, ValueError)
    return (OSError, ValueError, KeyError, OverflowError, pyarrow.ArrowException)


class Tables:
    """A worker's table reader, which remembers where it stands."""

    def __init__(self) -> None:
        self._place: tuple[str, int] | None = None
        self._row = 0
        self._path = ""
        self._file: Any = None
        self._ends: list[int] = []  # rows of the file up to the end of each row group
        self._batches: Iterator[Any] = iter(())
        self._rest: list[Any] = []

    def rows(self, segment: Segment, field: str) -> Iterator[Row | Skipped]:
        """The values of a segment's rows, or why there are none."""
        try:
            if segment.whole:
                yield from self._all(segment, field)
            else:
                yield from self._range(segment, field)
        except ImportError:
            hint = "parquet and Arrow need `pip install 'sota-transformer[parquet]'`"
            yield Skipped(hint, segment.name)
        except KeyError:
            if not segment.start:  # else the first piece says it
                yield Skipped(f"no column {field!r}", segment.name)
        except damage() as error:
            self._place = None
            text = (str(error).splitlines() or [""])[0][:80]
            yield Skipped(_LEFT_OUT, f"{segment.name}: {text}")

    def _all(self, segment: Segment, field: str) -> Iterator[Row]:
        """Every row of a small file."""
        row = 0
        for batch in self._open(segment, field)[1]:
            for value in batch.to_pylist():
                yield row, value
                row += 1

    def _range(self, segment: Segment, field: str) -> Iterator[Row]:
        """Rows start..stop, from where the reader stands if that is before."""
        import pyarrow

        place = (segment.path, segment.offset)
        if self._place != place or self._row > segment.start:
            self._batches, self._rest = iter(()), []  # what is read goes before more comes
            pyarrow.default_memory_pool().release_unused()
            self._row, self._batches = self._open(segment, field)
            self._place = place
        while self._row < segment.stop:
            if not self._rest:
                batch = next(self._batches, None)
                if batch is None:
                    raise OSError("fewer rows than when it was looked at first")
                if self._row + len(batch) <= segment.start:
                    self._row += len(batch)  # another worker's rows: not worth making strings of
                    continue
                self._rest = batch.to_pylist()[::-1]
            value = self._rest.pop()
            self._row += 1
            if self._row > segment.start:
                yield self._row - 1, value

    def _open(self, segment: Segment, field: str) -> tuple[int, Iterator[Any]]:
        """The first row and all batches from the segment's row group on, or of an Arrow file."""
        if segment.kind == "arrow":
            return 0, _arrow(segment, field)
        from pyarrow import parquet

        if self._path != segment.path:
            # In small pieces, for a column may be larger than memory.
            how: dict[str, Any] = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
            self._path, self._file = "", parquet.ParquetFile(segment.path, **how)
            groups = map(self._file.metadata.row_group, range(self._file.num_row_groups))
            self._ends = list(accumulate(group.num_rows for group in groups))
            self._path = segment.path
        return _parquet(self._file, self._ends, segment, field)


def _parquet(file: Any, ends: list[int], segment: Segment, field: str) -> tuple[int, Iterator[Any]]:
    """The first row of the segment's row groups, and the batches of the column in them."""
    if field not in file.schema_arrow.names:
        raise KeyError(field)
    last = len(ends) if segment.whole else min(len(ends), bisect_left(ends, segment.stop) + 1)
    groups = list(range(segment.offset, last))
    how = {"row_groups": groups, "columns": [field], "use_threads": False}
    batches = file.iter_batches(_BATCH_ROWS, **how) if groups else ()  # pyarrow 18 fails on none
    return max(ends[: segment.offset], default=0), (_column(batch, field) for batch in batches)


def _arrow(segment: Segment, field: str) -> Iterator[Any]:
    """Batches of the column of an Arrow file."""
    for column in _columns(segment.path, field):
        for at in range(0, len(column), _BATCH_ROWS):
            yield column.slice(at, _BATCH_ROWS)


def _columns(path: str, field: str) -> Iterator[Any]:
    """The column of each batch of an Arrow file, or of an Arrow stream, as `datasets` caches it."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.OSFile(path) as raw:
        if raw.read(6) == b"ARROW1":
            file = ipc.open_file(raw)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            raw.seek(0)
            batches = iter(ipc.open_stream(raw))
        for batch in batches:
            if field not in batch.schema.names:
                raise KeyError(field)
            column = _column(batch, field)
            column.validate(full=True)
            yield column


def _column(batch: Any, field: str) -> Any:
    """The first of that name: names may repeat, and parquet's readers give `text.x` for `text`.

    Strings are bytes in it, which copies nothing: one that is no UTF-8 would take others along.
    """
    column = batch.column(batch.schema.names.index(field))
    if (values := getattr(column, "dictionary", None)) is not None:  # as of a pandas category
        return type(column).from_arrays(column.indices, _raw(values))
    return _raw(column)


def _raw(column: Any) -> Any:
    """A column of strings as one of bytes, any other as it is."""
    raw = _BYTES.get(str(column.type))
    return column.view(raw) if raw else column
