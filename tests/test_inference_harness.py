"""What lm-eval asks of a model, as its task files put it."""

from types import SimpleNamespace
from typing import Any

import pytest

from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.inference.benchmarks import encode_pair, score
from tests.inference_models import FULL, small_model

pytestmark = pytest.mark.peers
MODEL = small_model(FULL)
TOKENIZER = Tokenizer()


@pytest.fixture
def harness() -> Any:
    pytest.importorskip("lm_eval")
    from sota_transformer.inference.harness import Harness

    return Harness(MODEL, TOKENIZER)


def ask(*args: Any) -> Any:
    return SimpleNamespace(args=args)


@pytest.mark.parametrize("pair", [("Ans", "wer"), ("hello wor", "ld")])
def test_a_token_across_the_join_leaves_a_continuation(pair: tuple[str, str], harness: Any) -> None:
    """In `Answer` one token spans both parts, and the whole is no longer than its context."""
    context, continuation = pair
    assert len(TOKENIZER.encode("".join(pair))) <= len(TOKENIZER.encode(context))
    apart = TOKENIZER.encode(context), TOKENIZER.encode(continuation)
    assert encode_pair(TOKENIZER, *pair) == apart
    (nats, greedy), (_, other) = harness.loglikelihood([ask(*pair), ask("One", " two")])
    (alone,) = score(MODEL, [apart])
    assert (nats, greedy) == (pytest.approx(-alone.nats, rel=1e-5), alone.greedy)
    assert other in (True, False)


def test_an_empty_continuation_is_one_line(harness: Any) -> None:
    with pytest.raises(ValueError, match="nothing to score after 'One'"):
        harness.loglikelihood([ask("One", "")])


@pytest.mark.parametrize("tokens", [1, MODEL.config.seq_len, 2 * MODEL.config.seq_len + 5])
def test_a_whole_text_is_read_in_the_windows_of_lm_eval(tokens: int, harness: Any) -> None:
    """The last one is full: `lm_eval --model hf` gives its tokens more than what is left over."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    text = TOKENIZER.decode(TOKENIZER.encode(" ".join(map(str, range(500))))[:tokens])
    ids = TOKENIZER.encode(text)
    assert len(ids) == tokens
    windows = get_rolling_token_windows(ids, EOT, MODEL.config.seq_len, 1)
    scored = score(MODEL, [make_disjoint_window(window) for window in windows])
    (found,) = harness.loglikelihood_rolling([ask(text)])
    assert found == pytest.approx(-sum(part.nats for part in scored), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"max_gen_toks": 3}, 3),
        ({"max_gen_toks": 3, "do_sample": False, "temperature": 1}, 3),  # as LongBench has it
        ({"max_new_tokens": 4}, 4),  # as catalan_bench has it
        ({"max_tokens": 4, "max_gen_toks": 3, "temperature": 0.0}, 3),
    ],
)
def test_greedy_text_as_long_as_asked(options: Any, length: int, harness: Any) -> None:
    (most,) = harness.generate_until([ask("Once upon", {"until": [], "max_gen_toks": 8})])
    (found,) = harness.generate_until([ask("Once upon", {"until": ["\0"], **options})])
    assert most.startswith(found) and found != most
    assert len(TOKENIZER.encode(found)) == length


@pytest.mark.parametrize("options", [{"do_sample": True}, {"temperature": 0.7}])
def test_sampling_is_refused(options: Any, harness: Any) -> None:
    with pytest.raises(ValueError, match="sample"):
        harness.generate_until([ask("Once upon", {"until": [], **options})])


def test_a_long_prompt_is_cut_from_the_left_before_it_is_read(harness: Any) -> None:
    """As HFLM does, so that the context never has to slide."""
    context = MODEL.config.seq_len
    tokens = TOKENIZER.encode(" ".join(map(str, range(4 * context))))
    kept = TOKENIZER.decode(tokens[-(context - 8) :])
    assert TOKENIZER.encode(kept) == tokens[-(context - 8) :]
    options = {"until": ["\0"], "max_gen_toks": 8}
    long, short = harness.generate_until(
        [ask(TOKENIZER.decode(tokens), options), ask(kept, options)]
    )
    assert long == short
    with pytest.raises(ValueError, match="no room for a prompt"):
        harness.generate_until([ask("One", {"until": [], "max_gen_toks": context})])
