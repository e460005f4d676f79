"""`sota serve`: an OpenAI-compatible server for a model, with its run's loss curve."""

import os

from sota_transformer.commands.common import check, open_to_generate
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.errors import SotaError
from sota_transformer.options import Serve
from sota_transformer.report import column, thinned
from sota_transformer.training.runlog import read_metrics


def run_serve(options: Serve) -> int:
    """Serve until a signal arrives."""
    check(
        {
            "--host must name an address": options.host != "",
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
    metrics = read_metrics(options.run)
    serve(
        opened.model,
        Tokenizer(),
        opened.name,
        Curve(
            train=thinned(column(metrics, "loss")),
            validation=thinned(column(metrics, "val_loss")),
        ),
        host=options.host,
        port=options.port,
        api_key=options.api_key or os.environ.get("SOTA_API_KEY", ""),
        rows=options.rows,
    )
    return 0
