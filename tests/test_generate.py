"""Sampling against `transformers` and plain counting; the cache against no cache."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sota_transformer.config import GPT2_VOCAB, Model
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.errors import SotaError
from sota_transformer.inference.generate import (
    Rows,
    generate,
    make_sampler,
    probabilities,
)
from sota_transformer.model import rows as few_rows
from sota_transformer.model.decode import lay_for_rows
from sota_transformer.model.transformer import project
from tests.inference_models import FULL, TINY, as_transformers, small_model

GREEDY = make_sampler(temperature=0.0)
TOKENIZER = Tokenizer()
PROMPT = [464, 206, 586, 31]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_greedy_equals_transformers(qk_norm: bool) -> None:
    model = small_model(dataclasses.replace(TINY, qk_norm=qk_norm))
    other = as_transformers(model)
    for start in range(5):
        prompt = [start * 20 + token for token in PROMPT]
        ours = list(generate(model, prompt, GREEDY, 20, stop_ids=()))
        theirs = other.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert ours == theirs[0, len(prompt) :].tolist()
        assert len(ours) == 20


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.6},
        {"top_p": 0.99},  # more tokens than the first guess of the nucleus
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.8},
    ],
)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_probabilities_equal_transformers(options: dict[str, float], spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50_258, generator=generator) * spread
    history = [5, 9, 5, 40_000]
    warpers = LogitsProcessorList()
    if "repetition_penalty" in options:
        warpers.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    warpers.append(TemperatureLogitsWarper(float(options.get("temperature", 1.0))))
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    expected = warpers(torch.tensor([history]), logits[None].clone())[0].softmax(-1)
    ours = probabilities(logits, history, **options)
    differing = (ours > 0) != (expected > 0)
    assert differing.sum() <= 1  # a float32 running sum may move the boundary by one token
    torch.testing.assert_close(ours[~differing], expected[~differing], rtol=1e-3, atol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf])
    sample = make_sampler(temperature=1.0, seed=3)
    counts = Counter(sample(logits, []) for _ in range(20_000))
    expected = logits.softmax(-1).tolist()
    for token, chance in enumerate(expected):
        error = (chance * (1 - chance) / 20_000) ** 0.5
        assert abs(counts[token] / 20_000 - chance) <= 5 * error, token


def test_the_seed_decides_and_only_the_seed() -> None:
    model = small_model()

    def text(seed: int) -> list[int]:
        return list(generate(model, PROMPT, make_sampler(1.0, seed=seed), 24, ()))

    first = text(1)
    torch.manual_seed(99)
    assert text(1) == first
    assert len({tuple(text(seed)) for seed in range(6)}) == 6


def test_cache_and_long_text_equal_a_plain_forward() -> None:
    """Far beyond the context: the newer half is kept, exactly as if it were a new prompt."""
    model = small_model()
    size = TINY.seq_len
    ours = list(generate(model, PROMPT, GREEDY, 3 * size, stop_ids=()))
    known, first = list(PROMPT), 0
    for _ in range(3 * size):
        if len(known) - first > size:
            first = len(known) - size // 2
        with torch.no_grad():
            hidden = model(torch.tensor([known[first:]]))[:, -1]
        known.append(int(model.logits(hidden)[0, :GPT2_VOCAB].argmax()))
    assert ours == known[len(PROMPT) :]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [FULL, dataclasses.replace(FULL, qk_norm=True, kv_heads=4)])
def test_one_row_alone_equals_a_plain_forward(
    config: Model, dtype: torch.dtype, threads: int
) -> None:
    """The specialized calls of `decode`, with the weight layout used by `sota generate`."""
    plain, known = small_model(config), list(PROMPT)
    laid = copy.deepcopy(plain)
    for model in (plain, laid):
        model.dtype = dtype
        for parameter in model.parameters():
            if parameter.ndim > 1:  # stored in the dtype of `--dtype`
                parameter.data = parameter.data.to(dtype)
    lay_for_rows(laid)
    assert torch.equal(plain.embedding.weight, laid.embedding.weight)
    by_columns = dtype == torch.float32
    assert (laid.embedding.weight.stride() == (1, config.vocab_size)) == by_columns
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = Rows(laid, 2)
        logits = rows.start(1, known)
        sampler = make_sampler(1.0, seed=4)
        while len(known) < config.seq_len:
            known.append(sampler(logits, known))
            logits = rows.step([1], known[-1:])[0]
            with torch.no_grad():
                hidden = plain(torch.tensor([known]))[:, -1]
            expected = plain.logits(hidden)[0, :GPT2_VOCAB]
            error = (logits[:GPT2_VOCAB] - expected).norm() / expected.norm()
            assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [(1,), (1, 1), (3,), (2, 5), (few_rows._PANELS_UP_TO + 1,)])
@pytest.mark.parametrize("outputs", [96, 90])  # whole panels, and not
def test_laid_out_weights_multiply_as_before(rows: tuple[int, ...], outputs: int) -> None:
    source = torch.Generator().manual_seed(1)
    x = torch.randn(*rows, 48, generator=source)
    weight = torch.randn(outputs, 48, generator=source)
    laid = few_rows.panels(weight)
    assert laid.numel() == weight.numel()  # no second copy, no padding
    if torch.backends.mkl.is_available():
        assert laid.ndim == (3 if outputs == 96 else 2)
    expected = (x.double() @ weight.double().t()).float()
    torch.testing.assert_close(project(x, laid), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_one_row_in_bfloat16_sums_in_float32(threads: int) -> None:
    """Only the result is rounded, for any number of inputs; afterwards oneDNN is used again."""
    source = torch.Generator().manual_seed(2)
    x = torch.rand(1, 4096, generator=source).bfloat16()  # all positive: a bfloat16 sum would stop
    weight = torch.rand(33, 4096, generator=source).bfloat16()
    before, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    torch.set_num_threads(threads)
    try:
        y = project(x, weight)
    finally:
        torch.set_num_threads(before)
    assert y.dtype == torch.bfloat16 and torch.backends.mkldnn.enabled == onednn
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=0)


def test_a_prompt_longer_than_the_context_is_cut_to_its_end() -> None:
    model = small_model()
    long = [token % 700 for token in range(0, 7 * TINY.seq_len * 3, 7)]
    assert list(generate(model, long, GREEDY, 1, ())) == list(
        generate(model, long[-TINY.seq_len :], GREEDY, 1, ())
    )
    assert len(list(generate(model, long, GREEDY, 9, ()))) == 9


def test_rows_of_different_lengths_advance_as_if_alone() -> None:
    model = small_model()
    prompts = [PROMPT, [11], [7, 8, 9, 10, 11, 12, 13], list(range(100, 100 + TINY.seq_len))]
    rows = Rows(model, len(prompts))
    logits = torch.stack([rows.start(row, prompt) for row, prompt in enumerate(prompts)])
    for step in range(TINY.seq_len):  # until every row outgrows the context
        drawn = logits.argmax(-1).tolist()
        logits = rows.step(range(len(prompts)), drawn)
        if step % 7 == 0:
            for row, line in enumerate(rows.tokens):
                alone = Rows(model, 1)
                seen = alone.start(0, line[-rows.lengths[row] :])
                torch.testing.assert_close(logits[row], seen, rtol=1e-4, atol=1e-4)
    subset = rows.step([2, 0], [5, 6])
    for place, row in enumerate([2, 0]):
        alone = Rows(model, 1).start(0, rows.tokens[row][-rows.lengths[row] :])
        torch.testing.assert_close(subset[place], alone, rtol=1e-4, atol=1e-4)


def test_a_prompt_is_computed_once_for_all_its_continuations() -> None:
    model, computed = small_model(), list[int]()
    model.register_forward_hook(lambda *given: computed.append(given[1][0].shape[1]))
    rows = Rows(model, 3)
    first = rows.start(0, PROMPT)
    moved = rows.step([0], [5])
    assert torch.equal(rows.start(1, PROMPT), first)
    assert computed == [len(PROMPT)]
    assert torch.equal(rows.step([1], [5]), moved)
    rows.start(0, PROMPT[:-1])  # overwrites what the others were copied from
    again = rows.start(2, PROMPT)
    assert computed == [len(PROMPT), len(PROMPT) - 1, len(PROMPT)]
    assert torch.equal(again, first) and torch.equal(rows.step([2], [5]), moved)


def test_padding_is_never_drawn_even_if_most_likely() -> None:
    model = small_model(FULL)
    with torch.no_grad():
        known = list(generate(model, PROMPT, GREEDY, 8, ()))
        model.embedding.weight[GPT2_VOCAB] = 3 * model.embedding.weight[known[0]]
        assert model.logits(model(torch.tensor([PROMPT]))[:, -1]).argmax() == GPT2_VOCAB
    assert list(generate(model, PROMPT, GREEDY, 1, ())) == known[:1]
    drawn = generate(model, PROMPT, make_sampler(2.0, seed=1), 60, ())
    assert max(drawn) < GPT2_VOCAB


def test_stops_before_the_stop_token() -> None:
    model = small_model()
    known = list(generate(model, PROMPT, GREEDY, 12, ()))
    stop = known[5]
    assert list(generate(model, PROMPT, GREEDY, 12, (stop,))) == known[: known.index(stop)]
    assert list(generate(model, PROMPT, GREEDY, 0, ())) == []


def test_a_diverged_model_is_an_error() -> None:
    with pytest.raises(SotaError) as caught:
        make_sampler(0.0)(torch.tensor([0.0, float("nan")]), [])
    assert caught.value.code == 70
