"""Which files are read, and in which order."""

from __future__ import annotations

import os

import pytest
from datafiles import Shuffled
from readings import config, read, tree

from engine.data import sources
from engine.data.sources import list_files
from engine.errors import UserError


def names(cfg) -> list[str]:
    return [file.name for file in list_files(cfg).files]


def test_order_and_kinds(tmp_path):
    root = tree(tmp_path / "in", "b.txt", "a/z.py", "a.md", "B.txt", "a/b/c.jsonl", "a-b.rst", "pic.png", "data.json")
    found = [(file.name, file.kind) for file in list_files(config(root)).files]
    assert found == [
        ("B.txt", "prose"), ("a-b.rst", "prose"), ("a.md", "prose"), ("a/b/c.jsonl", "jsonl"), ("a/z.py", "code"),
        ("b.txt", "prose"), ("data.json", "json"),
    ]  # fmt: skip


def test_order_is_that_of_the_inputs_then_of_the_paths(tmp_path, monkeypatch):
    one, two = tree(tmp_path / "z", "2.txt", "1.txt"), tree(tmp_path / "a", "4.txt", "3.txt")
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Shuffled(listed(path)))
    assert names(config(one, two)) == ["1.txt", "2.txt", "3.txt", "4.txt"]
    assert names(config(two, one)) == ["3.txt", "4.txt", "1.txt", "2.txt"]


def test_exclude_hidden_and_our_own_output(tmp_path):
    root = tree(tmp_path / "in", "keep.txt", ".hidden.txt", ".git/x.txt", "skip/y.txt", "a/skip/z.py", "a/t_x.py",
                "a/b.py", "__pycache__/c.py", "out/train.txt", "out2/d.txt")  # fmt: skip
    cfg = config(root, output=root / "out", exclude=["skip/", "t_*.py"])
    assert names(cfg) == ["a/b.py", "keep.txt", "out2/d.txt"]
    cfg = config(root, output=root / "out", exclude=["a/*", "out2", "skip"], include_hidden=True)
    assert names(cfg) == [".git/x.txt", ".hidden.txt", "keep.txt"]


@pytest.mark.parametrize("output", ["in/out", "in/../in/out", "link/out"])
def test_no_place_of_ours_is_input_however_it_is_named(tmp_path, output):
    root = tree(tmp_path / "in", "a.txt", "b/.c.txt")
    (tmp_path / "link").symlink_to(root)
    for place in ("out", ".out.preparing", ".out.replaced"):
        tree(root / place, "quarantine.jsonl", "read/00000/text.txt")
    assert names(config(root, include_hidden=True, output=tmp_path / output)) == ["a.txt", "b/.c.txt"]


def test_links_are_named_and_loops_are_cut(tmp_path):
    root = tree(tmp_path / "in", "a/one.txt")
    tree(tmp_path / "elsewhere", "two.txt")
    (root / "a/loop").symlink_to(root)
    (root / "far").symlink_to(tmp_path / "elsewhere")
    (root / "far.txt").symlink_to(tmp_path / "elsewhere/two.txt")
    (root / "dangling.txt").symlink_to(tmp_path / "nothing")
    listing = list_files(config(root))
    assert ([file.name for file in listing.files], listing.links_skipped) == (["a/one.txt"], 4)
    # Followed, far.txt is the same file as far/two.txt, and read once.
    assert names(config(root, follow_symlinks=True)) == ["a/one.txt", "far.txt"]


def test_one_file_through_two_inputs_is_read_once(tmp_path):
    root = tree(tmp_path / "in", "a.txt", "b.txt")
    found = [(file.input, file.name) for file in list_files(config(root / "b.txt", root)).files]
    assert found == [(0, "b.txt"), (1, "a.txt")]


def test_special_files_do_not_block(tmp_path):
    root = tree(tmp_path / "in", "a.txt")
    os.mkfifo(root / "pipe.txt")
    assert names(config(root)) == ["a.txt"]


def test_a_file_that_is_gone_since_it_was_found(tmp_path, monkeypatch):
    root = tree(tmp_path / "in", "a.txt", "gone.txt")
    found = sources._files_of

    def _files_of(*given):
        files = found(*given)
        (root / "gone.txt").unlink()
        return files

    monkeypatch.setattr(sources, "_files_of", _files_of)
    listing = list_files(config(root))
    assert [file.name for file in listing.files] == ["a.txt"]
    assert listing.unreadable == [(f"{root}/gone.txt", "No such file or directory")]


def test_a_saved_dataset_without_one_of_its_files(tmp_path):
    root = tree(tmp_path / "in", "dataset_info.json")
    (root / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    with pytest.raises(UserError, match=r"in/data-00000-of-00001\.arrow: No such file or directory\. Check --input"):
        list_files(config(root))


def test_name_that_is_not_utf8(tmp_path):
    (tmp_path / "in").mkdir()
    path = os.fsencode(tmp_path / "in") + b"/caf\xe9.txt"
    with open(path, "w") as stream:
        stream.write("hello")
    documents, _, _ = read(config(tmp_path / "in"))
    assert documents == [(f"{tmp_path}/in/caf\\xe9.txt", "hello")]


def test_folder_that_cannot_be_listed_is_in_quarantine(tmp_path, monkeypatch):
    root = tree(tmp_path / "in", "a.txt", "locked/b.txt")
    listed = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", denied)
    listing = list_files(config(root))
    assert [file.name for file in listing.files] == ["a.txt"]
    assert listing.unreadable == [(f"{root}/locked", "Permission denied")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "the folder holds no files. Read are .txt .md"),
        (lambda path: tree(path, "a.pdf", "b.pdf", "c"), "no readable text among 3 files (2 .pdf, 1 no suffix)"),
        (lambda path: [path.mkdir(), (path / "l").symlink_to("/usr")], "(1 symbolic links were not followed: --follow"),
    ],
)
def test_input_without_anything_to_read(tmp_path, make, message):
    make(tmp_path / "in")
    with pytest.raises(UserError) as error:
        list_files(config(tmp_path / "in"))
    assert str(error.value).startswith(f"{tmp_path}/in: ")
    assert message in str(error.value)


def test_direct_files(tmp_path):
    root = tree(tmp_path / "in", "README", "data.csv", "x.rs", "a.pdf", "b.tar.gz", "NOTES.zst")
    named = [root / name for name in ("README", "x.rs", "data.csv", "NOTES.zst")]
    found = [(file.name, file.kind) for file in list_files(config(*named)).files]
    assert found == [("README", "prose"), ("x.rs", "code"), ("data.csv", "csv"), ("NOTES.zst", "prose")]
    for name, suffix in (("a.pdf", ".pdf"), ("b.tar.gz", ".tar.gz")):
        with pytest.raises(UserError, match=rf"{name}: {suffix} files are not read\. Convert it to JSONL"):
            list_files(config(root / name))
    with pytest.raises(UserError, match="/dev/null: neither a folder nor a regular file"):
        list_files(config(tmp_path.__class__("/dev/null"), output=tmp_path / "out"))
