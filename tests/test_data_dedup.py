"""Near-duplicates against brute force, excluded texts, gram hashes and the set of seen hashes."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sota_transformer.data import merge, near, units
from sota_transformer.data.encode import EXCLUDE_GRAM
from sota_transformer.data.exclude import write_excluded
from sota_transformer.data.grams import GramSet, gram_hashes, gram_order, mixed
from sota_transformer.data.merge import SeenHashes
from sota_transformer.data.sketch import BANDS, MARKS, sketch
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.errors import SotaError
from tests.preparing import bytes_of, everything, jsonl, run

TOKENIZER = Tokenizer()


def random_text(random: np.random.Generator, words: int) -> list[str]:
    return [f"w{n}" for n in random.integers(0, 5000, words)]


def family(random: np.random.Generator, words: int, changes: list[int]) -> list[str]:
    """A text and copies of it with this many words replaced."""
    base, made = random_text(random, words), []
    for change in [0, *changes]:
        copy = list(base)
        for at in random.choice(words, change, replace=False):
            copy[at] = f"new{random.integers(10**6)}"
        made.append(" ".join(copy))
    return made


def jaccard(a: str, b: str) -> float:
    """Exact, over token 5-grams, the slow way."""
    sets = []
    for text in (a, b):
        ids = TOKENIZER.encode(text)
        sets.append({tuple(ids[i : i + 5]) for i in range(len(ids) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def greedy(items: list[str], threshold: float) -> list[str]:
    """What must stay: each document unless it is similar to an earlier one that stayed."""
    kept: list[str] = []
    grams: list[set[tuple[int, ...]]] = []
    for text in items:
        ids = TOKENIZER.encode(text)
        own = {tuple(ids[i : i + 5]) for i in range(len(ids) - 4)}
        if not any(len(own & g) >= threshold * len(own | g) for g in grams if own | g):
            kept.append(text)
            grams.append(own)
    return kept


def test_near_duplicates_as_by_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 16 << 10)
    random, items = np.random.default_rng(1), []
    for words in (12, 40, 150, 600, 2000):
        for _ in range(6):
            steps = [max(1, words // 200), max(1, words // 60), words // 25 + 1, words // 8 + 1]
            items += family(random, words, steps)
    order = random.permutation(len(items))
    items = [items[i] for i in order]
    (tmp_path / "a.jsonl").write_bytes(jsonl(items))
    manifest = run(tmp_path / "data", tmp_path / "a.jsonl", near_dedup=0.8)
    kept = greedy(list(dict.fromkeys(items)), 0.8)
    found = everything(tmp_path / "data")
    assert len(items) - len(kept) > 30
    missed = set(found) - set(kept)
    assert not set(kept) - set(found), "nothing may go that is not alike"
    assert len(missed) <= 1, "the sketch may miss one in a thousand"
    entry = manifest["rejects"]["near-duplicate"]
    assert entry["count"] == len(set(items)) - len(found)
    assert "is like" in entry["examples"][0]
    run(tmp_path / "two", tmp_path / "a.jsonl", near_dedup=0.8, workers=2)
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "data")
    monkeypatch.setattr(near, "_PAIRS", 1)
    run(tmp_path / "singly", tmp_path / "a.jsonl", near_dedup=0.8)
    assert bytes_of(tmp_path / "singly") == bytes_of(tmp_path / "data")


def stays_of(folder: Path, a: np.ndarray, b: np.ndarray, threshold: float) -> list[bool]:
    """Which of two documents stay; `folder` is for their tokens."""
    tokens = np.concatenate([a, [50_256], b, [50_256]]).astype(np.uint16)
    lengths = np.array([len(a) + 1, len(b) + 1], np.uint32)
    tokens.tofile(folder / "tokens")
    place = near.Place(folder / "tokens", 0)
    batch = near.Batch(lengths, *sketch(tokens, lengths), place)
    return near.Similar(threshold).new(batch, np.ones(2, bool)).tolist()


def test_long_documents_near_the_threshold_are_decided_by_all_their_grams(tmp_path: Path) -> None:
    random, sides = np.random.default_rng(9), set()
    for changes in range(255, 285, 3):
        a = random.integers(0, 50_000, 12_000).astype(np.uint16)
        b = a.copy()
        b[random.choice(len(a), changes, replace=False)] += 1
        sets = [set(map(tuple, np.lib.stride_tricks.sliding_window_view(x, 5))) for x in (a, b)]
        alike = len(sets[0] & sets[1]) >= 0.8 * len(sets[0] | sets[1])
        assert stays_of(tmp_path, a, b, 0.8) == [True, not alike]
        sides.add(alike)
    assert sides == {True, False}


def test_documents_hashed_together_have_the_grams_they_have_alone(
    tmp_path: Path, monkeypatch
) -> None:
    """Texts of three words share many 5-grams; the last two are compared by unequal samples."""
    monkeypatch.setattr(near, "_AT_ONCE", 2000)  # tokens: about ten documents
    random = np.random.default_rng(4)
    texts = [random.integers(0, 3, n).astype(np.uint16) for n in random.integers(20, 400, 60)]
    long = random.integers(0, 50_000, 2300).astype(np.uint16)
    texts += [long[:2000], long]
    lengths = np.array([len(text) + 1 for text in texts], np.uint32)
    tokens = np.concatenate([x for text in texts for x in (text, [50_256])]).astype(np.uint16)
    tokens.tofile(tmp_path / "tokens")
    place = near.Place(tmp_path / "tokens", 0)
    similar = near.Similar(0.5)
    similar.add_existing(near.Batch(lengths, *sketch(tokens, lengths), place))
    sets = similar._sets(list(range(62)))
    windows = np.lib.stride_tricks.sliding_window_view
    grams = [set(map(tuple, windows(text, 5).tolist())) for text in texts]
    for a, b in itertools.combinations(range(60), 2):
        exact = len(grams[a] & grams[b]) / len(grams[a] | grams[b])
        assert similar._jaccard(a, b, sets) == pytest.approx(exact)
    assert similar._jaccard(60, 61, sets) == pytest.approx(1996 / 2296, abs=0.05)


def test_at_a_threshold_of_one_a_single_token_counts(tmp_path: Path) -> None:
    random = np.random.default_rng(10)
    a = random.integers(0, 50_000, 30_000).astype(np.uint16)
    twice = np.concatenate([a, a])  # they differ at the joint of the copies
    assert stays_of(tmp_path, a, twice, 1.0) == [True, True]
    for at in range(100, 30_000, 3_000):
        b = a.copy()
        b[at] += 1
        assert stays_of(tmp_path, a, b, 1.0) == [True, True]


def test_append_finds_near_duplicates_of_existing_documents(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(merge, "_KNOWN_DOCUMENTS", 7)
    random = np.random.default_rng(2)
    families = [family(random, 300, [2]) for _ in range(40)]
    (tmp_path / "a.jsonl").write_bytes(jsonl([a for a, _ in families]))
    (tmp_path / "b.jsonl").write_bytes(jsonl([b for _, b in families] + ["something new"] * 2))
    run(tmp_path / "data", tmp_path / "a.jsonl", near_dedup=0.8)
    run(tmp_path / "data", tmp_path / "b.jsonl", near_dedup=0.8, append=True)
    assert everything(tmp_path / "data") == sorted([a for a, _ in families] + ["something new"])


def test_sketch_estimates_the_jaccard_index() -> None:
    random = np.random.default_rng(3)
    for words in (60, 400, 4000):
        errors = []
        for _ in range(15):
            a, b = family(random, words, [words // 30])
            ids = [np.array([*TOKENIZER.encode(text), 50256], np.uint16) for text in (a, b)]
            lengths = np.array([len(x) for x in ids], np.uint32)
            keys, marks = sketch(np.concatenate(ids), lengths)
            assert keys.shape == (2, BANDS) and marks.shape == (2, MARKS)
            there = (marks > 0).any(axis=0)
            errors.append((marks[0] == marks[1])[there].mean() - jaccard(a, b))
        assert abs(np.mean(errors)) < 0.02


def test_sketch_of_a_document_does_not_depend_on_its_neighbors() -> None:
    random = np.random.default_rng(4)
    ids = [
        np.append(random.integers(0, 9000, n), 50256).astype(np.uint16) for n in (1, 5, 700, 9000)
    ]
    lengths = np.array([len(x) for x in ids], np.uint32)
    together = sketch(np.concatenate(ids), lengths)
    for i, own in enumerate(ids):
        alone = sketch(own, lengths[i : i + 1])
        assert all(np.array_equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))


def number_of(run: list[int], bits: int) -> int:
    """A polynomial in the base of `grams`, by Horner's rule; of 32 bits as `gram_order` has it."""
    base, number = 0xD6E8FEB86659FD93, 0
    for token in run:
        number = (number * base + token) % (1 << bits)
    return number * base % (1 << 32) if bits == 32 else number


def splitmix(number: int, steps: tuple[int, ...], factors: tuple[int, ...], bits: int) -> int:
    for step, factor in zip(steps, (*factors, 1), strict=True):
        number = (number ^ number >> step) * factor % (1 << bits)
    return number


def test_numbers_of_runs_are_their_polynomials() -> None:
    """By Python's integers, at the ends and where what is computed at a time begins anew."""
    ids = np.random.default_rng(4).integers(0, 50_257, 140_000).astype(np.uint16)
    for size in (1, 2, 3, 5, 6, 7, 13):
        hashes, order = gram_hashes(ids, size), gram_order(ids, size)
        hashed = mixed(order)
        for at in (0, 1, 32_767, 32_768, 65_535, 65_536, 131_072, len(ids) - size):
            run = ids[at : at + size].tolist()
            number = number_of([token + 1 for token in run], 64)
            factors = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
            assert hashes[at] == splitmix(number, (30, 27, 31), factors, 64), (size, at)
            assert order[at] == number_of(run, 32), (size, at)
            factors = (0x7FEB352D, 0x846CA68B)
            assert hashed[at] == splitmix(int(order[at]), (16, 15, 16), factors, 32)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("numbers", [gram_order, gram_hashes])
def test_gram_hashes_tell_grams_apart(size: int, numbers: Callable[..., Any]) -> None:
    random = np.random.default_rng(5)
    ids = random.integers(0, 50, 150_000).astype(np.uint16)
    hashes = numbers(ids, size)
    assert len(hashes) == len(ids) - size + 1
    assert numbers(ids[:size], size)[0] == hashes[0]
    assert numbers(ids[99_000:], size)[0] == hashes[99_000]
    assert len(numbers(ids[: size - 1], size)) == 0
    runs = np.lib.stride_tricks.sliding_window_view(ids, size)
    different, hashed = len(np.unique(runs, axis=0)), len(np.unique(hashes))
    assert different - hashed <= (20 if numbers is gram_order else 0)


def test_gram_set_is_a_set() -> None:
    random = np.random.default_rng(6)
    inside = random.integers(0, 2**64, 5000, dtype=np.uint64)
    asked = np.concatenate([inside, random.integers(0, 2**64, 50_000, dtype=np.uint64)])
    assert np.array_equal(GramSet(inside).find(asked), np.flatnonzero(np.isin(asked, inside)))
    ids = random.integers(0, 50_257, 80_000).astype(np.uint16)  # more than is looked at at a time
    hashes, at = gram_hashes(ids, 13), np.array([0, 32_755, 32_760, 32_767, 32_768, 65_530, 79_987])
    for known in (hashes, hashes[at]):
        assert np.array_equal(
            GramSet(known).find_runs(ids, 13), np.flatnonzero(np.isin(hashes, known))
        )
    assert len(GramSet(hashes).find_runs(ids[:12], 13)) == 0


def test_seen_hashes_are_a_set() -> None:
    random, seen, known = np.random.default_rng(7), SeenHashes(), set()
    pool = random.integers(0, 2**64, (3000, 2), dtype=np.uint64)
    pool[:100, 1] = 0  # trailing zero bytes must not be lost
    for _ in range(60):
        batch = pool[random.choice(len(pool), 90, replace=False)]
        expected = [row.tobytes() not in known for row in batch]
        assert seen.new(batch).tolist() == expected
        known |= {row.tobytes() for row in batch}
    one, alone = merge.SeenHashes(), np.array([[5, 7]], np.uint64)
    assert one.new(alone).tolist() == [True] and one.new(alone).tolist() == [False]


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_excluded_text_is_dropped_with_documents_quoting_it(tmp_path: Path, codec: str) -> None:
    random = np.random.default_rng(8)
    question = " ".join(random_text(random, 40))
    items = [" ".join(random_text(random, 200)) for _ in range(100)]
    tainted = [f"{a} {question} {b}" for a, b in zip(items[:5], items[5:10], strict=True)]
    partly = f"{items[20]} {' '.join(question.split()[:3])} {items[21]}"
    tainted += [question, f"{question} {items[10]}"]  # after a document that stays
    (tmp_path / "a.jsonl").write_bytes(jsonl([*items, partly]))
    (tmp_path / "b.jsonl").write_bytes(
        jsonl([*tainted[:5], items[30] + ".", *tainted[5:6], items[31] + ".", *tainted[6:]])
    )
    records = [{"question": question, "n": 1}, {"question": "hm"}]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, records)), codec)
    inputs = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    manifest = run(tmp_path / "data", *inputs, exclude=(str(tmp_path / "eval.jsonl"),))
    assert everything(tmp_path / "data") == sorted(
        [*items, partly, *(f"{items[i]}." for i in (30, 31))]
    )
    told = {"count": 7, "examples": ["b.jsonl"] * 5}
    assert manifest["rejects"]["shares text with an excluded file"] == told


def test_excluding_a_folder_of_the_inputs_says_what_else_that_drops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with tar's --exclude, it would be meant to leave out only the folder."""
    random = np.random.default_rng(9)
    texts = [" ".join(random_text(random, 40)) for _ in range(60)]
    (tmp_path / "in" / "vendor").mkdir(parents=True)
    for index, text in enumerate(texts):
        (tmp_path / "in" / f"{index}.txt").write_text(text)
    for name in ("in/vendor/a.txt", "own.txt"):
        (tmp_path / name).write_text(texts[0] + "!")
    run(tmp_path / "one", tmp_path / "in", exclude=(str(tmp_path / "own.txt"),))
    assert "an input" not in capsys.readouterr().out
    excluded = f"{tmp_path}/in/../in/vendor"
    manifest = run(tmp_path / "two", tmp_path / "in", exclude=(excluded,))
    assert manifest["rejects"]["shares text with an excluded file"]["count"] == 2
    said = capsys.readouterr().out
    assert "note: in/vendor/a.txt is both an input and in --exclude, which also drops every" in said


def test_appended_documents_are_checked_like_existing_ones(tmp_path: Path) -> None:
    """The folder promises to be free of the benchmark and of near-duplicates."""
    random = np.random.default_rng(5)
    secret = " ".join(random_text(random, 40))
    (tmp_path / "eval.txt").write_text(secret)
    for name in "ab":
        others = [" ".join(random_text(random, 60)) for _ in range(9)]
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([*others, f"{name} {secret} of old"]))
    clean: dict[str, Any] = {"exclude": (str(tmp_path / "eval.txt"),), "near_dedup": 0.8}
    out, more = tmp_path / "data", tmp_path / "b.jsonl"
    run(out, tmp_path / "a.jsonl", val_fraction=0.0, **clean)
    before = bytes_of(out)
    for name, worse in (("exclude", ()), ("near_dedup", 0.0), ("near_dedup", 0.9)):
        left = clean | {name: worse}
        with pytest.raises(SotaError, match=f"with --{name.replace('_', '-')} .*needs the same"):
            run(out, more, append=True, **left)
    assert bytes_of(out) == before
    run(out, more, append=True, **clean)
    assert len(everything(out)) == 18 and not any(secret in text for text in everything(out))


def test_no_excluded_text_is_silently_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(9)
    long, latin, fine = (" ".join(random_text(random, 40)) for _ in range(3))
    (tmp_path / "fine.txt").write_text(fine)
    (tmp_path / "latin.txt").write_bytes(f"caf\xe9 {latin}".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "a.jsonl").write_bytes(jsonl([long, f"so: {latin}", f"so: {fine}"]))
    names = ("fine.txt", "latin.txt", "empty.txt", "empty.csv")
    given = tuple(str(tmp_path / name) for name in names)
    write_excluded(given, "text", tmp_path / "grams.npy")
    grams = np.load(tmp_path / "grams.npy")
    for text in (latin, fine):
        ids = np.array(TOKENIZER.encode(text)[2:], np.uint16)  # the first depend on the context
        assert np.isin(gram_hashes(ids, EXCLUDE_GRAM), grams).all()
    said = capsys.readouterr().out
    assert "1 text of invalid Unicode, and what is invalid cannot be matched; the first" in said
    assert "latin.txt; convert it: iconv -f" in said
    (tmp_path / "sjis.jsonl").write_bytes(
        json.dumps({"text": fine + "竹藪"}, ensure_ascii=False).encode("cp932")
    )
    write_excluded((str(tmp_path / "sjis.jsonl"),), "text", tmp_path / "grams.npy")
    assert "the first is sjis.jsonl; convert it" in capsys.readouterr().out
    (tmp_path / "sjis.jsonl").unlink()
    for text, warned in ((fine, False), ("पर्यावरण संरक्षण के उपाय " * 3, True)):
        (tmp_path / "eval.txt").write_text(text)
        write_excluded((str(tmp_path / "eval.txt"),), "text", tmp_path / "grams.npy")
        assert ("one common phrase drops" in capsys.readouterr().out) == warned
    (tmp_path / "eval.txt").unlink()
    (tmp_path / "bench.json").write_text(json.dumps({"text": long}))
    (tmp_path / "bench.csv").write_text(f"question,answer\n{long},yes\n")
    (tmp_path / "data.bin").write_bytes(b"\0" * 100)
    for name in ("bench.csv", "data.bin"):
        with pytest.raises(SotaError, match=name) as caught:
            write_excluded((given[0], str(tmp_path / name)), "text", tmp_path / "grams.npy")
        assert caught.value.code == 65
    with pytest.raises(SotaError, match=r"bench\.csv \(has .*\): no column"):
        write_excluded((str(tmp_path),), "text", tmp_path / "grams.npy")
    (tmp_path / "bench.csv").unlink()
    (tmp_path / "zero.txt").write_bytes(b"\0" * 100)
    capsys.readouterr()
    write_excluded((given[0], str(tmp_path)), "text", tmp_path / "grams.npy")
    said = capsys.readouterr().out
    assert "--exclude ignores 4 files; the first is" in said
    assert "/bench.json: .json file is not a text format; if you name it" in said
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SotaError, match=r"gone\.txt: broken link"):
        write_excluded((str(tmp_path),), "text", tmp_path / "grams.npy")


def test_a_changed_excluded_file_is_a_new_preparation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not the same preparation any more."""
    random = np.random.default_rng(9)
    items = [" ".join(random_text(random, 60)) for _ in range(100)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(items))
    held = tmp_path / "held"
    held.mkdir()
    (held / "b.jsonl").write_bytes(jsonl([items[3]]))
    asked = {"exclude": (str(held),)}
    run(tmp_path / "data", tmp_path / "a.jsonl", **asked)
    assert len(everything(tmp_path / "data")) == 99
    run(tmp_path / "data", tmp_path / "a.jsonl", **asked)
    assert "already prepared from these inputs" in capsys.readouterr().out
    (held / "b.jsonl").write_bytes(jsonl([items[3], items[6]]))
    with pytest.raises(SotaError, match="with different options"):
        run(tmp_path / "data", tmp_path / "a.jsonl", **asked)


def test_a_text_is_recognized_however_often_it_repeats_itself(tmp_path: Path) -> None:
    random, items = np.random.default_rng(8), []
    for _ in range(12):
        page = " ".join(random_text(random, 300)) + "\n"
        items += [page * 6, page * 30]
    (tmp_path / "a.jsonl").write_bytes(jsonl(items))
    manifest = run(tmp_path / "data", tmp_path / "a.jsonl", near_dedup=0.8)
    assert manifest["rejects"]["near-duplicate"]["count"] == 12
    assert everything(tmp_path / "data") == sorted(items[::2])


def test_existing_near_duplicates_are_all_remembered(tmp_path: Path) -> None:
    """The folder holds two similar documents; a new one is similar to the second alone."""
    words = random_text(np.random.default_rng(9), 600)
    first, second, third = words[:540], words[30:570], words[60:]
    assert jaccard(" ".join(first), " ".join(third)) < 0.85
    assert min(jaccard(" ".join(second), " ".join(x)) for x in (first, third)) > 0.85
    (tmp_path / "a.jsonl").write_bytes(jsonl([*map(" ".join, (first, second))]))
    (tmp_path / "b.jsonl").write_bytes(jsonl([" ".join(third), "something else " * 20]))
    run(tmp_path / "data", tmp_path / "a.jsonl", val_fraction=0.0)
    more = {"near_dedup": 0.85, "append": True, "val_fraction": 0.0}
    manifest = run(tmp_path / "data", tmp_path / "b.jsonl", **more)
    entry = manifest["rejects"]["near-duplicate"]
    assert (entry["count"], len(entry["examples"])) == (1, 1)
    assert " ".join(third) not in everything(tmp_path / "data")


def test_a_duplicate_from_another_unit_has_an_example(tmp_path: Path) -> None:
    """Only its hash is known there; its first words show which one it is."""
    items = ["the first of two", "it is that", "a third"]
    (tmp_path / "a.jsonl").write_bytes(jsonl([*items, *items]))
    run(tmp_path / "data", tmp_path / "a.jsonl", val_fraction=0.0)
    (tmp_path / "b.jsonl").write_bytes(jsonl([*items, "something new"]))
    manifest = run(tmp_path / "data", tmp_path / "b.jsonl", append=True, val_fraction=0.0)
    entry = manifest["rejects"]["exact duplicate"]  # five examples at most, the older first
    told = ["a.jsonl"] * 3 + [f"begins {text!r}" for text in items[:2]]
    assert entry == {"count": 6, "examples": told}
