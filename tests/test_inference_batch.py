"""Jobs that come and go, stop strings, and benchmark scores against one pair at a time."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.inference.batch import Batch, Drawn, Job, Text, run_jobs
from sota_transformer.inference.benchmarks import (
    Choice,
    encode_pair,
    hellaswag,
    lambada,
    score,
)
from sota_transformer.inference.generate import generate, make_sampler
from tests.inference_models import FULL, as_transformers, small_model

TOKENIZER = Tokenizer()
MODEL = small_model(FULL)
PROMPTS = ["The", "Once upon a time there", " a", "0123456789 " * 8, "x y z"]


def job(prompt: str, seed: int, max_tokens: int = 12, **options: object) -> Job:
    return Job(
        tokens=TOKENIZER.encode(prompt),
        sampler=make_sampler(1.0, seed=seed),
        max_tokens=max_tokens,
        **options,  # type: ignore[arg-type]
    )


def collect(jobs: list[Job], rows: int) -> list[list[Drawn]]:
    found: list[list[Drawn]] = [[] for _ in jobs]
    for number, drawn in run_jobs(MODEL, TOKENIZER, jobs, rows):
        found[number].append(drawn)
    return found


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_batch_draws_what_each_job_draws_alone(rows: int) -> None:
    lengths = [3, 12, 40, 7, 1]
    jobs = [job(p, seed, n) for seed, (p, n) in enumerate(zip(PROMPTS, lengths, strict=True))]
    for seed, (prompt, drawn) in enumerate(zip(PROMPTS, collect(jobs, rows), strict=True)):
        alone = generate(
            MODEL, TOKENIZER.encode(prompt), make_sampler(1.0, seed=seed), lengths[seed]
        )
        assert [d.token for d in drawn if d.token != EOT] == list(alone)
        assert drawn[-1].reason == ("stop" if drawn[-1].token == EOT else "length")
        assert all(d.reason is None for d in drawn[:-1])


def test_dropped_jobs_free_their_rows() -> None:
    batch = Batch(MODEL, TOKENIZER, 2)
    batch.add(1, job("a", 1))
    batch.add(2, job("b", 2))
    assert batch.free == 0
    batch.step()
    batch.drop(1)
    batch.drop(77)
    assert batch.free == 1
    batch.add(3, job("c", 3, 2))
    assert [key for key, _ in batch.step()] == [2, 3]
    assert [drawn.reason for key, drawn in batch.step() if key == 3] == ["length"]
    assert batch.free == 1


def test_log_probabilities_are_the_models_own() -> None:
    prompt = TOKENIZER.encode("Once upon")
    (drawn,) = collect([job("Once upon", 3, 6, alternatives=4)], 1)
    ids = torch.tensor([prompt + [d.token for d in drawn]])
    with torch.no_grad():
        logits = as_transformers(MODEL)(ids).logits[0, len(prompt) - 1 : -1].double()
    logits[:, 50_257:] = -math.inf
    nats = logits.log_softmax(-1)
    for place, piece in enumerate(drawn):
        assert piece.logprob == pytest.approx(float(nats[place, piece.token]), abs=1e-4)
        best = nats[place].topk(4)
        assert [token for token, _ in piece.alternatives] == best.indices.tolist()


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    text = Text(tokenizer)
    return [*(text.push(token) for token in ids), text.finish()]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_streamed_text_is_the_text(text: str) -> None:
    pieces = streamed(TOKENIZER, TOKENIZER.encode(text))
    assert "".join(pieces) == text


class Bytes(Tokenizer):
    """Ids are bytes, so that every split of a character can be tried."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)


BYTES = Bytes()


def test_a_character_is_never_split_and_broken_bytes_are_marked() -> None:
    text = "aé漢🙂"
    assert [piece for piece in streamed(BYTES, text.encode()) if piece] == list(text)
    assert "".join(streamed(BYTES, b"a\xffb\xf0\x9f")) == "a\ufffdb\ufffd"


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab漢🙂", max_size=30),
    st.lists(st.text(alphabet="ab漢", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    shown = Text(BYTES, stops)
    out = ""
    for byte in text.encode():
        out += shown.push(byte)
        if shown.stopped:
            break
    out += shown.finish()
    # The string completed first ends the text, wherever it began.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text
    if ends:
        first = min(end for end, _ in ends)
        expected = text[: min(begin for end, begin in ends if end == first)]
    assert out == expected
    assert shown.stopped == bool(ends)


def test_a_stop_string_ends_a_job_and_frees_the_row() -> None:
    (free,) = collect([job("The", 5, 30)], 1)
    text = "".join(d.text for d in free)
    stop = text[9:12]
    (drawn,) = collect([job("The", 5, 30, stops=[stop])], 1)
    assert drawn[-1].reason == "stop"
    assert "".join(d.text for d in drawn) == text[: text.index(stop)]
    assert len(drawn) < len(free)


def test_an_incomplete_character_may_complete_a_stop_string() -> None:
    cut = TOKENIZER.encode("漢")[0]
    stopped = Job(tokens=[EOT], sampler=lambda *_: cut, max_tokens=1, stops=["\ufffd"])
    ((drawn,),) = collect([stopped], 1)
    assert (drawn.text, drawn.reason) == ("", "stop")


def naive(context: list[int], continuation: list[int]) -> tuple[float, bool, float]:
    whole = (context + continuation)[-FULL.seq_len - 1 :]
    ids = torch.tensor([whole])
    with torch.no_grad():
        logits = as_transformers(MODEL)(ids[:, :-1]).logits[0, -len(continuation) :].double()
    goals = ids[0, -len(continuation) :]
    nats = F.cross_entropy(logits, goals, reduction="none")
    return float(nats.sum()), bool((logits.argmax(-1) == goals).all()), float(nats[-1])


def test_scores_equal_one_pair_at_a_time() -> None:
    contexts = ["One", "One two three", "A much longer beginning of a text, " * 6, "One two three"]
    endings = [" four", " five six seven eight", " x"]
    pairs = [encode_pair(TOKENIZER, c, e) for c in contexts for e in endings]
    pairs += [([EOT], [5]), ([7, 8], [9, 10, 11])]
    for pair, found in zip(pairs, score(MODEL, pairs), strict=True):
        nats, greedy, last = naive(*pair)
        assert found.nats == pytest.approx(nats, rel=1e-5)
        assert found.last_nats == pytest.approx(last, rel=1e-5)
        assert found.greedy == greedy


def test_lambada_knows_right_from_wrong() -> None:
    """Texts that end in the model's own prediction, and texts that do not."""
    known = {}
    for beginning in ["The first", "A second", "Some third", "My fourth", "Our fifth"]:
        start = TOKENIZER.encode(beginning)
        said = TOKENIZER.decode(list(generate(MODEL, start, make_sampler(0.0), 1)))
        known[beginning] = said
    right = [b + s for b, s in known.items() if s.startswith(" ") and len(s.strip()) > 1]
    texts = [*right, "The first zebra", "A second xylophone"]
    rows = {row.name: row for row in lambada(MODEL, TOKENIZER, texts, standard=texts[-2:])}
    assert rows["lambada_openai accuracy"].value == pytest.approx(len(right) / len(texts))
    assert rows["lambada_standard accuracy"].value == 0
    words = [score(MODEL, [encode_pair(TOKENIZER, *t.rsplit(" ", 1))]) for t in ["The first zebra"]]
    assert len(words) == 1
    nats = [
        naive(*encode_pair(TOKENIZER, t.rsplit(" ", 1)[0], " " + t.rsplit(" ", 1)[1]))[0]
        for t in texts
    ]
    assert rows["lambada_openai perplexity"].value == pytest.approx(
        math.exp(sum(nats) / len(nats)), rel=1e-4
    )


def test_hellaswag_by_likelihood_and_by_character() -> None:
    context = "The quick brown"
    endings = ["fox", "a considerably longer ending of the same text", "dog sleeps"]
    nats = [naive(*encode_pair(TOKENIZER, context, " " + e))[0] for e in endings]
    plain = nats.index(min(nats))
    normed = [n / len(e) for n, e in zip(nats, endings, strict=True)]
    by_length = normed.index(min(normed))
    assert plain != by_length  # otherwise this test could not tell them apart
    for label in range(3):
        rows = hellaswag(MODEL, TOKENIZER, [Choice(context, endings, label)])
        assert [row.value for row in rows] == [label == plain, label == by_length]
