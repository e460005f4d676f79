"""An OpenAI-compatible server for one model, with a page to try it. Loopback only by default.

    GET  /                 the page              GET  /healthz    health and load
    GET  /curve            the run's loss        GET  /v1/models  the one model (also by its name)
    POST /v1/completions   text, whole or streamed

Every number in a request has a limit, no route takes a path, and a client that disconnects frees
its place. `Engine` computes, `Guard` and `Protocol` filter requests, `completions` answers them.
"""

import asyncio
import base64
import hashlib
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from sota_transformer import __version__
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.errors import TEMPORARY, SotaError
from sota_transformer.model.transformer import Transformer
from sota_transformer.serve.completions import Completions
from sota_transformer.serve.engine import Engine
from sota_transformer.serve.guard import HEADER_BYTES, Guard, Protocol, error_body, is_loopback
from sota_transformer.serve.schema import Answer, Completion, Curve, Entry, Error, Health, ModelList

_PAGE = files("sota_transformer.serve").joinpath("page.html").read_text("utf-8")
WAITING = 16  # queued continuations
CONNECTIONS = 512
GRACE_SECONDS = 3.0  # for running requests to finish after a signal, before they get an error
_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": Error, "description": "the key is missing or wrong"},
    403: {"model": Error, "description": "a request from another site"},
    421: {"model": Error, "description": "a wrong host name"},
    "4XX": {"model": Error, "description": "another fault of the request"},  # no 422 by FastAPI
}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_ANSWERS = _REFUSALS | {
    200: {"model": Answer, "content": {"text/event-stream": {"schema": _EVENT}}},
    400: {"model": Error, "description": "malformed, or a field is invalid or exceeds its limit"},
    413: {"model": Error, "description": "the body is too large"},
    415: {"model": Error, "description": "not JSON"},
    503: {"model": Error, "description": "the server is busy; try again"},
    504: {"model": Error, "description": "generation took too long"},
}


def build_app(
    model: Transformer, tokenizer: Tokenizer, name: str, curve: Curve, engine: Engine
) -> FastAPI:
    """The application without `Guard`."""
    app = FastAPI(
        title="sota_transformer",
        version=__version__,
        docs_url=None,  # FastAPI's pages load scripts from other sites
        redoc_url=None,
    )
    completions = Completions(model, tokenizer, name, engine)

    @app.get("/", include_in_schema=False)
    async def _page() -> HTMLResponse:
        return HTMLResponse(_PAGE)

    @app.get("/healthz", responses={421: _REFUSALS[421], 403: _REFUSALS[403]})
    async def healthz() -> Health:
        """Health and load."""
        return Health(status="ok", busy=engine.busy)

    @app.get("/curve", responses=_REFUSALS)
    async def loss_curve() -> Curve:
        """The loss of the run that made the model."""
        return curve

    entry = Entry(id=name, object="model", created=0, owned_by="local")

    @app.get("/v1/models", responses=_REFUSALS)
    async def models() -> ModelList:
        """The one model."""
        return ModelList(object="list", data=[entry])

    @app.get("/v1/models/{wanted}", responses=_REFUSALS)
    async def model_named(wanted: str) -> Entry:
        """The one model, if it has this name."""
        if wanted != name:
            raise HTTPException(404, f"no such model; this server has {name}")
        return entry

    @app.post("/v1/completions", response_model=None, responses=_ANSWERS)
    async def create_completion(wanted: Completion, request: Request) -> Response:
        """Continue a prompt."""
        return await completions.answer(wanted, request)

    _explain(app)
    return app


def _explain(app: FastAPI) -> None:
    """Format errors as OpenAI does."""

    @app.exception_handler(HTTPException)
    async def _refused(_: Request, error: HTTPException) -> JSONResponse:
        said = str(error.detail)
        if said == "Not Found":  # by no route, most often a chat client
            said = "no such path; the model continues text at /v1/completions, it has no chat"
        body = error_body(error.status_code, said)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        lines = list(dict.fromkeys(map(_describe, error.errors())))[:5]
        # Not 422 like FastAPI: old openai clients take that for a fault of the server.
        return JSONResponse(error_body(400, "; ".join(lines)[:1000]), 400)


def _describe(found: Any) -> str:
    """One error in a request: the field and what is wrong, without pydantic's type names."""
    field, *inside = found["loc"][1:] or ("body",)
    if found["type"] == "json_invalid":
        return f"body: invalid JSON at character {field}"
    kept = [str(part) for part in inside if not re.search(r"[-\[]", str(part))]
    known = Completion.model_fields.get(str(field))
    only = known.description if known else None  # why a field of OpenAI's is not supported
    why = f" ({only[0].lower()}{only[1:-1]})" if only and only.startswith("Only") else ""
    return f"{'.'.join([str(field), *kept])}: {found['msg']}{why}"


class _Server(uvicorn.Server):
    """Sends running requests an error on shutdown; uvicorn alone would cut them off."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave ignored what the parent process ignores, such as Ctrl-C for a script's `sota &`."""
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        with super().capture_signals():
            if ignored:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Give running requests some time to finish, then end them with an error."""
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._engine.stop)
        await super().shutdown(sockets)
        self._engine.close()


def content_policy() -> str:
    """The page's content security policy: its own script and style by hash, and this server."""

    def allowed(tag: str) -> str:
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
        return base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()

    return (
        f"default-src 'self'; script-src 'sha256-{allowed('script')}'; "
        f"style-src 'sha256-{allowed('style')}'; img-src 'self' data:; object-src 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def serve(
    model: Transformer,
    tokenizer: Tokenizer,
    name: str,
    curve: Curve,
    *,
    host: str,
    port: int,
    api_key: str,
    rows: int,
) -> None:
    """Serve until a signal. SotaError without a key beyond loopback, or if the port is taken."""
    if not api_key and not is_loopback(host):
        raise SotaError(
            f"--host {host} is reachable from other machines; set --api-key or SOTA_API_KEY"
        )
    try:
        listener = socket.create_server((host, port), backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:
        raise SotaError(
            f"cannot listen on {host}:{port} ({error}); choose another --host or --port", TEMPORARY
        ) from error
    engine = Engine(model, tokenizer, rows, WAITING)
    app = build_app(model, tokenizer, name, curve, engine)
    config = uvicorn.Config(
        Guard(app, host, api_key, content_policy()),  # type: ignore[arg-type]
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=10,
        server_header=False,
        access_log=False,
        log_level="warning",
        proxy_headers=False,
    )
    print(f"serving {name} on http://{host}:{listener.getsockname()[1]}", flush=True)
    _Server(config, engine).run(sockets=[listener])
