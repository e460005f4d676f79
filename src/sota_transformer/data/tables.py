"""Text columns of parquet and Arrow files, by row ranges; runs in workers, pyarrow is optional.

A row group cannot be entered in its middle. Each worker therefore keeps its last reader and goes on
from where it stands, so that a file of one huge row group is decoded once a worker, not once a
unit; and the pool leaves a row group to one worker where it can.
"""

from collections.abc import Iterator
from typing import Any

from sota_transformer.data.sources import Skipped, Source
from sota_transformer.data.units import UNIT_BYTES, Segment

_BATCH_ROWS = 32
_BUFFER_BYTES = 1 << 20
_LEFT_OUT = "damaged table; only its readable start was taken"

Row = tuple[int, Any]  # row number, value


def probe(source: Source, field: str) -> list[tuple[int, int, int]]:
    """(row group or 0, first row, end row) pieces of about UNIT_BYTES; one piece if unreadable."""
    try:
        if source.kind == "arrow":
            return _arrow_pieces(source.path, field)
        from pyarrow import parquet

        meta = parquet.read_metadata(source.path)
        pieces = []
        for group in range(meta.num_row_groups):
            rows = meta.row_group(group).num_rows
            step = max(1, rows * UNIT_BYTES // max(1, _column_bytes(meta.row_group(group), field)))
            pieces += [(group, at, min(at + step, rows)) for at in range(0, rows, step)]
        return pieces
    except (*damage(), ImportError):
        return [(0, 0, source.size)]  # reading it will say what is wrong


def _arrow_pieces(path: str, field: str) -> list[tuple[int, int, int]]:
    """The same of an Arrow file, whose batches have to be read to be counted."""
    pieces, row = [], 0
    for column in _columns(path, field):
        step = max(1, len(column) * UNIT_BYTES // max(1, column.nbytes))
        end = row + len(column)
        pieces += [(0, at, min(at + step, end)) for at in range(row, end, step)]
        row = end
    return pieces


def _column_bytes(group: Any, field: str) -> int:
    """Uncompressed size of a column in a row group; dictionaries make it smaller than the text."""
    for at in range(group.num_columns):
        column = group.column(at)
        if column.path_in_schema == field:
            return int(column.total_uncompressed_size)
    return 0


def damage() -> tuple[type[BaseException], ...]:
    """What reading a damaged table may raise."""
    try:
        import pyarrow
    except ImportError:
        return (OSError, ValueError)
    return (OSError, ValueError, KeyError, pyarrow.ArrowException)


class Tables:
    """A worker's table reader, which remembers where it stands."""

    def __init__(self) -> None:
        self._place: tuple[str, int] | None = None
        self._row = 0
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
            hint = "parquet and Arrow need `pip install sota-transformer[parquet]`"
            yield Skipped(hint, segment.name)
        except KeyError:
            yield Skipped(f"no column {field!r}", segment.name)
        except damage() as error:
            self._place = None
            text = (str(error).splitlines() or [""])[0][:80]
            yield Skipped(_LEFT_OUT, f"{segment.name}: {text}")

    def _all(self, segment: Segment, field: str) -> Iterator[Row]:
        """Every row of a small file."""
        row = 0
        for batch in _batches(segment, field, None):
            for value in batch.to_pylist():
                yield row, value
                row += 1

    def _range(self, segment: Segment, field: str) -> Iterator[Row]:
        """Rows start..stop of one row group, from where the reader stands if that is before."""
        place = (segment.path, segment.offset)
        if self._place != place or self._row > segment.start:
            self._batches, self._rest = iter(()), []  # what is read goes before more comes
            _release()
            self._batches = _batches(segment, field, [segment.offset])
            self._place, self._row = place, 0
        while self._row < segment.stop:
            if not self._rest:
                batch = next(self._batches, None)
                if batch is None:
                    self._place = None
                    return
                if self._row + len(batch) <= segment.start:
                    self._row += len(batch)  # another worker's rows: not worth making strings of
                    continue
                self._rest = batch.to_pylist()[::-1]
            value = self._rest.pop()
            self._row += 1
            if self._row > segment.start:
                yield self._row - 1, value


def _release() -> None:
    """Give back what Arrow's allocator keeps of memory that is free."""
    import pyarrow

    pyarrow.default_memory_pool().release_unused()


def _batches(segment: Segment, field: str, groups: list[int] | None) -> Iterator[Any]:
    """Batches of the column: of these row groups of a parquet file, or of an Arrow file."""
    return _arrow(segment, field) if segment.kind == "arrow" else _parquet(segment, field, groups)


def _parquet(segment: Segment, field: str, groups: list[int] | None) -> Iterator[Any]:
    """Batches of the column; read in small pieces, for a column may be larger than memory."""
    from pyarrow import parquet

    with parquet.ParquetFile(segment.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        if field not in file.schema_arrow.names:
            raise KeyError(field)
        for batch in file.iter_batches(
            _BATCH_ROWS, row_groups=groups, columns=[field], use_threads=False
        ):
            yield _column(batch, field)


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
            batch.validate(full=True)
            yield _column(batch, field)


def _column(batch: Any, field: str) -> Any:
    """The first of that name: names may repeat, and parquet's readers give `text.x` for `text`."""
    return batch.column(batch.schema.names.index(field))
