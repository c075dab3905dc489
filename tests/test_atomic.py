"""Files and folders are whole or not there, whatever ends their writing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from hvt_backbones import InputError
from hvt_backbones.atomic import leftovers, whole_file, whole_folder
from tests.full_disk import file_size_limit


def test_a_file_is_replaced_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.b.json"
    for content in ("first", "second"):
        with whole_file(path) as partial:
            partial.write_text(content)
            assert (partial.parent, partial.suffix) == (path.parent, ".json")
            assert list(leftovers(path)) == [partial]
            assert path.exists() == (content == "second")
        assert path.read_text() == content
        assert list(path.parent.iterdir()) == [path]


def test_an_exception_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    with contextlib.suppress(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert (path.read_text(), list(tmp_path.iterdir())) == ("before", [path])


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    expected = rf"^{path} was not written \(File too large\): free room or choose another folder$"
    with pytest.raises(InputError, match=expected), file_size_limit(10), whole_file(path) as partial:
        partial.write_text("x" * 100)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("before", [path])
    with pytest.raises(InputError, match=r"c was not written \(Not a directory\)"), whole_file(path / "b" / "c"):
        pass
    with pytest.raises(InputError, match=r"\(encoder error -2\)"), whole_file(path):
        raise OSError("encoder error -2")  # Pillow's have no number


def test_a_folder_is_complete_or_not_there(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), whole_folder(tmp_path / "data") as staging:
        (staging / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "new" / "data") as staging:
        (staging / "all").touch()
        assert not (tmp_path / "new" / "data").exists()
    assert sorted(tmp_path.rglob("*")) == [
        tmp_path / "new",
        tmp_path / "new" / "data",
        tmp_path / "new" / "data" / "all",
    ]
    assert (tmp_path / "new" / "data").stat().st_mode & 0o777 == 0o755


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with whole_folder(folder) as staging:
        (staging / "first").touch()
    with whole_folder(folder) as staging:
        assert staging is None
    assert [path.name for path in folder.iterdir()] == ["first"]


def test_another_process_may_be_first(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with whole_folder(folder) as staging:
        (staging / "second").touch()
        with whole_folder(folder) as other:
            (other / "first").touch()
    assert sorted(tmp_path.rglob("*")) == [folder, folder / "first"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "data"):
        with pytest.raises(InputError, match=rf"^{folder} was not written"), whole_folder(folder):
            pytest.fail("nothing need be drawn to find that out")
    with pytest.raises(InputError, match=r"\(No space left on device\): free room"), whole_folder(tmp_path / "data"):
        raise OSError(28, os.strerror(28))
    assert list(tmp_path.iterdir()) == [file]
