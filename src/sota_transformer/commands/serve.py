"""`sota serve`: a model behind an OpenAI-compatible server, with its run's loss curve."""

import math
import os
from pathlib import Path

from sota_transformer.commands.common import check, open_to_generate
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.errors import SotaError
from sota_transformer.options import Serve
from sota_transformer.report import Points, column
from sota_transformer.training.runlog import read_metrics

_POINTS = 500  # of a curve


def run_serve(options: Serve) -> int:
    """Serve until a signal."""
    check(
        {
            "--port must be from 0 to 65535": 0 <= options.port <= 65_535,
            "--rows must be from 1 to 64": 1 <= options.rows <= 64,
            "--api-key must be ASCII": options.api_key.isascii(),
        }
    )
    try:
        from sota_transformer.serve.schema import Curve
        from sota_transformer.serve.server import serve
    except ImportError as error:
        raise SotaError(
            f"serving needs the package {error.name}: pip install 'sota-transformer[serve]'"
        ) from error
    opened = open_to_generate(options.run, options.device, options.step, options.dtype)
    train, validation = _curve(options.run)
    serve(
        opened.model,
        Tokenizer(),
        opened.name,
        Curve(train=train, validation=validation),
        host=options.host,
        port=options.port,
        api_key=options.api_key or os.environ.get("SOTA_API_KEY", ""),
        rows=options.rows,
    )
    return 0


def _curve(folder: Path) -> tuple[Points, Points]:
    """(step, nats) while training and on validation text."""
    lines = read_metrics(folder)
    return _thinned(column(lines, "loss")), _thinned(column(lines, "val_loss"))


def _thinned(points: Points) -> Points:
    """Not more points than a page can show; first and last stay."""
    if len(points) <= _POINTS:
        return points
    stride = math.ceil(len(points) / _POINTS)
    return [*points[:-1:stride], points[-1]]
