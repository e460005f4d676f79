"""Preparation in parts that are merged, appends, and targets in unusual places."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from sota_transformer.data import prepare as preparing
from sota_transformer.data import units
from sota_transformer.data.prepare import merge
from sota_transformer.data.shards import TokenWindows
from sota_transformer.durable import canonical_json, seal
from sota_transformer.errors import SotaError
from sota_transformer.options import Merge
from tests.preparing import bytes_of, documents, everything, jsonl, refused, run, texts


def test_parts_then_together(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 16 << 10)
    out = tmp_path / "data"
    for part in ("3/3", "1/3"):
        assert run(out, source, part=part) == {}
    found = sorted(path.name for path in (tmp_path / ".data.preparing" / "units").iterdir())
    assert all(int(name[5:]) % 3 != 1 for name in found)
    run(out, source)
    run(tmp_path / "whole", source)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_merge_puts_parts_together(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 16 << 10)
    out = tmp_path / "data"
    monkeypatch.chdir(source.parent)
    with pytest.raises(SotaError, match=r"no parts of .*; name the --out of") as caught:
        merge(Merge(out=out))
    assert caught.value.code == 66
    for part in ("3/3", "1/3"):
        run(out, source.name, part=part)
    with pytest.raises(SotaError, match="parts with different or changed inputs,") as caught:
        run(out, source.name, part="2/3", near_dedup=0.8)
    assert caught.value.code == 73
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SotaError, match=r"unfinished parts .*--part 2/3") as caught:
        merge(Merge(out=out))
    assert caught.value.code == 66
    monkeypatch.chdir(source.parent)
    run(out, source.name, part="2/3")
    monkeypatch.chdir(tmp_path)
    begun = json.loads((tmp_path / ".data.preparing" / "asked.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", lambda _: begun | {"folder": str(tmp_path / "gone")})
        with pytest.raises(
            SotaError, match=r"gone, the working directory .* no longer exists"
        ) as caught:
            merge(Merge(out=Path("data"), workers=1))
        assert caught.value.code == 66
    merged = merge(Merge(out=Path("data"), workers=1))
    assert merge(Merge(out=out))["fingerprint"] == merged["fingerprint"]
    (tmp_path / ".data.preparing").mkdir()  # as NFS leaves it, with the lock open until the end
    assert merge(Merge(out=out))["fingerprint"] == merged["fingerprint"]
    run(tmp_path / "whole", source)
    assert bytes_of(out, manifest=False) == bytes_of(tmp_path / "whole", manifest=False)


def test_an_append_that_may_not_write_is_not_sent_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, inputs = tmp_path / "data", (tmp_path / "b.txt",)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(50)))
    inputs[0].write_text("another text")
    run(out, tmp_path / "a.jsonl")

    def refusing(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(preparing, "make_folder", refusing)
    refused(73, "; make its folder writable", out=out, inputs=inputs, append=True)
    refused(73, "; choose another --out", out=tmp_path / "new", inputs=inputs)


def test_append_keeps_what_is_there(tmp_path: Path) -> None:
    out, old, new = tmp_path / "data", texts(300), texts(200, seed=4)
    (tmp_path / "a.jsonl").write_bytes(jsonl(old))
    (tmp_path / "b.jsonl").write_bytes(jsonl(old[:30] + new))
    run(out, tmp_path / "a.jsonl")
    shards = bytes_of(out, manifest=False)
    sides = {split: documents(out, split) for split in ("train", "val")}
    manifest = run(out, tmp_path / "b.jsonl", append=True, val_fraction=0.5)
    assert bytes_of(out, manifest=False).items() >= shards.items()
    assert manifest["rejects"]["exact duplicate"]["count"] == 30
    for split, before in sides.items():
        assert documents(out, split)[: len(before)] == before
    assert everything(out) == sorted(old + new)
    again = run(out, tmp_path / "b.jsonl", append=True, val_fraction=0.5)
    assert again["fingerprint"] == manifest["fingerprint"]
    # The splits are those that preparing both at once would have given.
    (tmp_path / "c.jsonl").write_bytes(jsonl(old + new))
    run(tmp_path / "both", tmp_path / "c.jsonl")
    assert documents(tmp_path / "both", "val") == documents(out, "val")
    assert json.loads((out / "manifest.json").read_text())["inputs"][1]["documents"] == 200
    damaged = next(out.glob("*.hashes.npy"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    refused(65, "hashes.npy: sha256 mism", out=out, inputs=(tmp_path / "c.jsonl",), append=True)


def test_append_to_data_hashed_by_another_version_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "data"
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(300)))
    (tmp_path / "b.jsonl").write_bytes(jsonl(texts(300, seed=1)))
    manifest = run(out, tmp_path / "a.jsonl")
    rule = manifest["split_rule"] | {"hash": "BLAKE2b-128 of the UTF-8 text, key sota-document-1"}
    (out / "manifest.json").write_bytes(canonical_json(seal(manifest | {"split_rule": rule})))
    before = bytes_of(out)
    refused(65, "BLAKE2b-128", out=out, inputs=(tmp_path / "b.jsonl",), append=True)
    assert bytes_of(out) == before
    assert len(TokenWindows(out, "train", 16))  # it can still be trained on


def test_a_link_to_a_folder_is_the_folder(tmp_path: Path) -> None:
    """Created, appended to and merged there, even on another disk than the link."""
    for i, name in enumerate(("a.jsonl", "b.jsonl")):
        (tmp_path / name).write_bytes(jsonl(texts(300, seed=i)))
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    out = tmp_path / "data"
    out.symlink_to(tmp_path / "disk" / "empty")
    run(out, tmp_path / "a.jsonl", part="1/1")
    assert [path.name for path in tmp_path.glob(".*")] == []
    merge(Merge(out=out))
    run(out, tmp_path / "b.jsonl", append=True)
    assert out.is_symlink() and len(everything(out)) == 600


def test_a_target_inside_its_input_gives_the_same_when_resumed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(300)))
    run(tmp_path / "data", tmp_path)
    whole = bytes_of(tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    run(tmp_path / "data", tmp_path, part="1/1")
    run(tmp_path / "data", tmp_path)
    assert bytes_of(tmp_path / "data") == whole


def test_text_repaired_by_an_older_version_is_listed_as_repaired(tmp_path: Path, capsys) -> None:
    """An append keeps the reasons in the manifest, which were worded differently."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(300)) + b'{"text": "caf\xe9"}\n')
    (tmp_path / "b.jsonl").write_bytes(jsonl(texts(300, seed=1)))
    manifest = run(tmp_path / "data", tmp_path / "a.jsonl", bad_text="replace")
    ((reason, entry),) = manifest["rejects"].items()
    before = "not valid UTF-8; taken, with U+FFFD for what is broken"
    assert reason != before
    older = canonical_json(seal(manifest | {"rejects": {before: entry}}))
    (tmp_path / "data" / "manifest.json").write_bytes(older)
    capsys.readouterr()
    run(tmp_path / "data", tmp_path / "b.jsonl", append=True)
    out = capsys.readouterr().out
    assert f"repaired:\n          1  {before}" in out and "skipped:" not in out
