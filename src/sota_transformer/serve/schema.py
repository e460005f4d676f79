"""The requests and responses of `/v1/completions`, each number with its limit.

Unknown options are rejected rather than silently ignored. OpenAI's that no model here has are
accepted at the value that means nothing, since some clients (LangChain) always send them.
"""

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from sota_transformer.config import GPT2_VOCAB
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.inference.batch import Drawn

MOST_PROMPTS = 32
MOST_STOPS = 16


def _whole(value: object) -> object:
    """Accept 3.0 as 3: JSON does not distinguish integers from floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)
_TOKEN = Annotated[int, Field(ge=0, lt=GPT2_VOCAB), _WHOLE]
_TOKENS = Annotated[list[_TOKEN], Field(min_length=1, max_length=1 << 17)]
_STOP = Annotated[str, StringConstraints(min_length=1, max_length=200)]
_TEXT = Annotated[str, StringConstraints(max_length=1 << 20)]
_ZERO = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class StreamOptions(_Strict):
    """What a stream may include besides text."""

    include_usage: bool = False


def _extend(schema: dict[str, Any]) -> None:
    """Add to the JSON schema what the types do not say: null, and that 0 tokens need `echo`."""
    for name, field in schema["properties"].items():
        schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
    schema["not"] = {
        "properties": {"max_tokens": {"const": 0}, "echo": {"enum": [False, None]}},
        "required": ["max_tokens"],
    }


class Completion(_Strict):
    """A request to continue one or several prompts."""

    model_config = ConfigDict(json_schema_extra=_extend)

    prompt: (
        _TEXT
        | Annotated[list[_TEXT], Field(min_length=1, max_length=MOST_PROMPTS)]
        | _TOKENS
        | Annotated[list[_TOKENS], Field(min_length=1, max_length=MOST_PROMPTS)]
    ) = ""
    """Text or token ids; special tokens in text are treated as ordinary text."""
    model: Annotated[str, StringConstraints(max_length=200)] | None = None
    """Ignored: there is only one model."""
    max_tokens: Annotated[int, Field(ge=0, le=1 << 17), _WHOLE] = 16
    """Maximum tokens to generate; fewer if the model's context fills up. 0 needs `echo`."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens whose probabilities add up to this."""
    top_k: Annotated[int, Field(ge=0, le=GPT2_VOCAB), _WHOLE] = 0
    """Sample from the k most likely tokens; 0 samples from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample only tokens with at least this fraction of the most likely one's probability."""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    """Values above 1 make tokens that already occurred less likely."""
    n: Annotated[int, Field(ge=1, le=4), _WHOLE] = 1
    """Continuations per prompt; at most 32 in all."""
    stop: _STOP | Annotated[list[_STOP], Field(max_length=MOST_STOPS)] | None = None
    """Strings that end the text."""
    seed: Annotated[int, Field(ge=0, lt=1 << 53), _WHOLE] | None = None
    """The same seed gives the same text; limited to what JSON represents exactly."""
    logprobs: Annotated[int, Field(ge=0, le=20), _WHOLE] | None = None
    """Log-probabilities of each token and of this many alternatives."""
    stream: bool = False
    """Send the text piece by piece as server-sent events."""
    stream_options: StreamOptions | None = None
    """What the stream includes besides text."""
    echo: bool = False
    """Begin the text with the prompt, and `logprobs` with its tokens."""
    user: Annotated[str, StringConstraints(max_length=200)] | None = None
    """Ignored."""
    frequency_penalty: _ZERO = 0
    """Only 0: see `repetition_penalty`."""
    presence_penalty: _ZERO = 0
    """Only 0: see `repetition_penalty`."""
    best_of: Annotated[int, Field(ge=1, le=1), _WHOLE] = 1
    """Only 1: every continuation is returned."""
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    """Only an empty one."""
    suffix: Literal[""] | None = None
    """Only an empty one: the model does not fill in."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Take null for the default, as OpenAI does; its client sends a None that it was given."""
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if value is not None or name not in cls.model_fields
        }


class Logprobs(BaseModel):
    """Parallel lists, one entry per token; nothing predicts the first token of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One continuation, or a piece of it."""

    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
    """Number of tokens read and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """A whole response, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An error in OpenAI's format."""

    error: ErrorDetail


class Entry(BaseModel):
    """The one model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All models: just one."""

    object: Literal["list"]
    data: list[Entry]


class Health(BaseModel):
    """Status, and how many continuations are running or waiting."""

    status: Literal["ok"]
    busy: int


_POINT = Annotated[list[float], Field(min_length=2, max_length=2)]


class Curve(BaseModel):
    """The run's loss as [step, nats], in training and on validation text."""

    train: list[_POINT]
    validation: list[_POINT]


@cache  # a response may have a hundred thousand tokens; the vocabulary is smaller
def shown(tokenizer: Tokenizer, token: int) -> str:
    """One token as text, or its bytes if it is not whole characters."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode() or "<|endoftext|>"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def logprobs_of(tokenizer: Tokenizer, drawn: list[Drawn]) -> Logprobs:
    """The lists for the given tokens of one continuation."""
    result = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for piece in drawn:
        result.tokens.append(shown(tokenizer, piece.token))
        result.token_logprobs.append(piece.logprob)
        result.text_offset.append(piece.offset)
        best = {shown(tokenizer, token): nats for token, nats in piece.alternatives}
        result.top_logprobs.append(best if piece.logprob is not None else None)
    return result
