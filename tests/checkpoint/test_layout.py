"""The folder protocol of checkpoints without a model: pointer damage, corruption, kills between renames, retention."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from engine import disk
from engine.checkpoint import layout
from engine.errors import UserError


def write(checkpoints: Path, step: int, payload: str = "weights") -> Path:
    """A small checkpoint, published as the manager does."""
    final = layout.folder(checkpoints, step)
    temporary = final.with_name(final.name + ".tmp")
    (temporary / "sharded").mkdir(parents=True)
    files = {"sharded/__0_0.distcp": f"{payload} {step} " * 50, "state.json": json.dumps({"step": step})}
    for name, text in files.items():
        (temporary / name).write_text(text)
    layout.publish(temporary, final, {name: disk.sha256(temporary / name) for name in files})
    return final


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = layout.root(tmp_path)
    for step in (10, 20, 30):
        write(folder, step)
    return folder


def test_the_pointer_names_the_newest(checkpoints):
    assert (checkpoints / layout.POINTER).read_text() == "30\n"
    assert layout.latest(checkpoints) == checkpoints / "iter_0000030"
    for path in (checkpoints.parent, checkpoints, checkpoints / "iter_0000030"):
        assert layout.find(path) == checkpoints / "iter_0000030"
    assert [layout.step_of(p) for p in layout.existing(checkpoints)] == [10, 20, 30]
    assert not list(checkpoints.glob("*.tmp"))


def test_nothing_there_is_a_fresh_start_but_nothing_to_find(tmp_path):
    assert layout.latest(layout.root(tmp_path)) is None
    with pytest.raises(UserError, match="no checkpoint in this folder"):
        layout.find(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        layout.find(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"", b"\n", b"garbage", b"40", b"-30", b"3.0e1", "\uff13\uff10".encode(),
                                     b"\xff\xfe\x00", b"9" * 5000, b"30\n30\n", b"30 garbage", b"../iter_0000030"])
def test_a_damaged_pointer_is_an_error_that_names_the_way_out(checkpoints, content):
    (checkpoints / layout.POINTER).write_bytes(content)
    with pytest.raises(UserError, match=r"names no finished checkpoint.*--resume_from_checkpoint .*iter_0000030"):
        layout.latest(checkpoints)


def test_a_missing_pointer_is_an_error(checkpoints):
    (checkpoints / layout.POINTER).unlink()
    with pytest.raises(UserError, match=r"pointer file is missing.*iter_0000030"):
        layout.latest(checkpoints)
    with pytest.raises(UserError, match="pointer file is missing"):
        layout.find(checkpoints.parent)
    for path in layout.existing(checkpoints):
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="pointer file is missing"):  # nor a fresh start beside damaged ones
        layout.latest(checkpoints)


def test_a_pointer_to_a_checkpoint_without_manifest_is_an_error(checkpoints):
    (checkpoints / "iter_0000030" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"names no finished checkpoint.*iter_0000020"):
        layout.latest(checkpoints)


@pytest.mark.parametrize("first", [False, True])
def test_a_kill_before_the_pointer_moves_loses_nothing(tmp_path, monkeypatch, first):
    checkpoints = layout.root(tmp_path)
    if not first:
        write(checkpoints, 10)

    def killed(self, target):
        if target.name == layout.POINTER:
            raise KeyboardInterrupt
        return replace(self, target)

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(checkpoints, 20)
    monkeypatch.undo()
    assert layout.latest(checkpoints) == checkpoints / "iter_0000020"
    layout.verify(checkpoints / "iter_0000020")
    write(checkpoints, 30)
    assert layout.latest(checkpoints) == checkpoints / "iter_0000030"


def test_a_kill_before_the_folder_is_renamed_leaves_the_previous(checkpoints, monkeypatch):
    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(checkpoints, 40)
    monkeypatch.undo()
    assert layout.latest(checkpoints) == checkpoints / "iter_0000030"
    layout.clean_temporary(checkpoints)
    write(checkpoints, 40)
    assert layout.latest(checkpoints) == checkpoints / "iter_0000040"


def _files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file())


def test_every_flip_truncation_and_deletion_is_found(checkpoints):
    checkpoint, rng = checkpoints / "iter_0000030", random.Random(0)
    layout.verify(checkpoint)
    assert len(_files(checkpoint)) == 3
    for path in _files(checkpoint):
        whole = path.read_bytes()
        damages = [whole[:cut] for cut in {0, len(whole) - 1, *rng.sample(range(len(whole)), 10)}]
        for _ in range(60):
            flipped = bytearray(whole)
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            damages.append(bytes(flipped))
        for damage in damages:
            path.write_bytes(damage)
            with pytest.raises(UserError):
                layout.verify(checkpoint)
        path.unlink()
        with pytest.raises(UserError, match=path.name):
            layout.verify(checkpoint)
        path.write_bytes(whole)
    layout.verify(checkpoint)


def test_every_bit_of_the_manifest_counts(checkpoints):
    manifest = checkpoints / "iter_0000030" / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        manifest.write_bytes(damaged)
        with pytest.raises(UserError):
            layout.verify(manifest.parent)


def test_swapped_and_added_files_are_found(checkpoints):
    checkpoint = checkpoints / "iter_0000030"
    shard, other = checkpoint / "sharded/__0_0.distcp", checkpoints / "iter_0000020/sharded/__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"__0_0\.distcp: does not match its SHA-256"):
        layout.verify(checkpoint)
    shard.write_bytes(whole)
    (checkpoint / "extra").touch()
    with pytest.raises(UserError, match="extra: is not part of the checkpoint"):
        layout.verify(checkpoint)


@pytest.mark.parametrize(("keep_last", "keep", "left"), [
    (1, set(), [30]), (2, set(), [20, 30]), (1, {10}, [10, 30]), (9, set(), [10, 20, 30]), (1, {99}, [30])])
def test_retention(checkpoints, keep_last, keep, left):
    deleted = layout.prune(checkpoints, keep_last=keep_last, keep=keep)
    assert [layout.step_of(p) for p in layout.existing(checkpoints)] == left
    assert sorted(map(layout.step_of, deleted)) == sorted({10, 20, 30} - set(left))
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        *(f"iter_{step:07d}" for step in left), layout.POINTER]


def test_steps_of_more_than_seven_digits_sort_by_number(tmp_path):
    checkpoints = layout.root(tmp_path)
    for step in (9_999_999, 10_000_000):
        write(checkpoints, step)
    assert [layout.step_of(p) for p in layout.existing(checkpoints)] == [9_999_999, 10_000_000]
    assert layout.step_of(layout.latest(checkpoints)) == 10_000_000
