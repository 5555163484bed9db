"""The journal: entries are read back in order, once, whatever happens to the process or the file."""

import contextlib
import errno
import fcntl
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shufflenet_mlflow.errors import BusyError, JournalError
from shufflenet_mlflow.tracking.journal import DAMAGED_NAME, Journal
from shufflenet_mlflow.tracking.journal_file import JOURNAL_NAME, new_provisional_id, read_pending

RUN = "r" * 32


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    journal.set_owner(RUN, "http://127.0.0.1:5000")
    yield journal
    journal.close()


@pytest.fixture
def reopen(tmp_path: Path) -> Callable[[Journal], Journal]:
    """Open the journal as the next process does after this one was killed."""

    def open_after_kill(journal: Journal) -> Journal:
        journal._lock.release()
        os.close(journal._descriptor)
        journal.close = lambda: None  # type: ignore[method-assign]
        return Journal(tmp_path)

    return open_after_kill


def numbers(journal: Journal, most: int = 1000) -> list[int]:
    return [entry.body["n"] for entry in journal.oldest(most)]


def fill(journal: Journal, *values: int) -> None:
    for value in values:
        journal.append(RUN, "metrics", {"n": value})


def test_in_order_and_once(journal: Journal) -> None:
    fill(journal, 1, 2, 3)
    assert (numbers(journal), journal.pending) == ([1, 2, 3], 3)
    assert numbers(journal, 2) == [1, 2]
    journal.delivered(journal.oldest(2)[-1].seq)
    fill(journal, 4)
    assert (numbers(journal), journal.pending) == ([3, 4], 2)


def test_the_next_process_goes_on(journal: Journal, reopen: Callable[[Journal], Journal], tmp_path: Path) -> None:
    fill(journal, 1, 2, 3)
    journal.delivered(journal.oldest()[0].seq)
    reopened = reopen(journal)
    assert (numbers(reopened), reopened.pending, reopened.run, reopened.uri) == (
        [2, 3],
        2,
        RUN,
        "http://127.0.0.1:5000",
    )
    reopened.delivered(reopened.oldest(2)[-1].seq)
    reopened.close()
    assert read_pending(tmp_path).entries == ()
    assert (tmp_path / JOURNAL_NAME).read_bytes().count(b"\n") == 1
    assert read_pending(tmp_path).run_id == RUN


def test_a_truncated_last_line_is_not_damage(
    journal: Journal, reopen: Callable[[Journal], Journal], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(journal, 1, 2)
    with open(tmp_path / JOURNAL_NAME, "ab") as file:
        file.write(b'1234abcd {"seq":3,"ru')
    reopened = reopen(journal)
    fill(reopened, 3)
    assert numbers(reopened) == [1, 2, 3]
    assert not caplog.text
    reopened.close()


def test_damage_is_named_and_set_aside(
    journal: Journal, reopen: Callable[[Journal], Journal], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(journal, 1, 2, 3)
    data = (tmp_path / JOURNAL_NAME).read_bytes()
    (tmp_path / JOURNAL_NAME).write_bytes(data.replace(b'"n":2', b'"n":7'))
    reopened = reopen(journal)
    assert numbers(reopened) == [1, 3]
    assert "1 line damaged, 1 entry missing" in caplog.text
    assert b'"n":7' in (tmp_path / DAMAGED_NAME).read_bytes()
    assert reopened.was_damaged
    caplog.clear()
    reopened_twice = reopen(reopened)
    assert (numbers(reopened_twice), caplog.text, reopened_twice.was_damaged) == ([1, 3], "", False)
    reopened_twice.close()


@pytest.mark.parametrize("seed", range(4))
def test_altered_entries_are_never_read(seed: int, tmp_path: Path) -> None:
    """Flip bits and truncate at random: an entry is read as it was written, or not at all."""
    generator = random.Random(seed)
    journal = Journal(tmp_path)
    fill(journal, *range(30))
    journal._lock.release()
    original = (tmp_path / JOURNAL_NAME).read_bytes()
    for trial in range(60):
        damaged = bytearray(original)
        if trial % 4:
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        else:
            del damaged[generator.randrange(len(damaged)) :]
        (tmp_path / JOURNAL_NAME).write_bytes(damaged)
        reopened = Journal(tmp_path)
        found = numbers(reopened)
        assert found == sorted(set(found))
        assert set(found) <= set(range(30))
        if trial % 4:
            assert len(found) >= 28  # a lost line break costs two
            assert len(found) == 30 or reopened.was_damaged
        else:
            assert found == list(range(len(found)))
        reopened._lock.release()


def test_one_process_at_a_time(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(BusyError, match="in use by this process already"):
        Journal(tmp_path)
    script = (
        "from pathlib import Path; from shufflenet_mlflow.tracking.journal import Journal; "
        f"Journal(Path({str(tmp_path)!r}))"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"is in use by process {os.getpid()}; wait for it, or stop it" in other.stderr


def test_a_file_system_without_locks_is_not_called_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(JournalError, match="No locks available; choose another folder with --save-dir"):
        Journal(tmp_path)


def test_confirmations_after_closing_are_ignored(tmp_path: Path) -> None:
    """A request that hung returns when another file has the descriptor's number."""
    journal = Journal(tmp_path)
    fill(journal, 1)
    journal.bind(new_provisional_id(), RUN)
    before = journal.oldest()[0]
    journal.close()
    written = (tmp_path / JOURNAL_NAME).read_bytes()
    with contextlib.ExitStack() as files:
        others = [files.enter_context(open(tmp_path / f"{number}", "wb", buffering=0)) for number in range(9)]
        journal.delivered(before.seq)
        journal.bind(new_provisional_id(), RUN)
        assert [Path(file.name).stat().st_size for file in others] == [0] * 9
    assert (tmp_path / JOURNAL_NAME).read_bytes() == written


def test_looking_does_not_disturb(journal: Journal, tmp_path: Path) -> None:
    fill(journal, 1)
    assert [entry.body["n"] for entry in read_pending(tmp_path).entries] == [1]
    fill(journal, 2)
    assert numbers(journal) == [1, 2]
    with pytest.raises(BusyError):  # the lock is still held
        Journal(tmp_path)


def test_a_full_disk_loses_nothing_while_the_process_lives(journal: Journal, tmp_path: Path) -> None:
    fill(journal, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / JOURNAL_NAME).stat().st_size + 20, hard))
    try:
        fill(journal, 2, 3)
        assert journal.failure is not None
        assert "File too large" in journal.failure
        assert (numbers(journal), journal.pending) == ([1, 2, 3], 3)
        journal.delivered(journal.oldest(2)[-1].seq)
        assert numbers(journal) == [3]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fill(journal, 4)
    assert (numbers(journal), journal.failure) == ([3, 4], None)
    assert [entry.body["n"] for entry in read_pending(tmp_path).entries] == [3, 4]


def test_a_full_disk_at_the_start_of_a_run(journal: Journal, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(
            JournalError, match="cannot keep a journal in .*File too large; choose another folder with --save-dir"
        ):
            journal.set_owner("s" * 32, "http://127.0.0.1:5000")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_pending(tmp_path).run_id == RUN


def test_a_journal_of_a_later_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shufflenet_mlflow.tracking.journal_file.JOURNAL_VERSION", 2)
        Journal(tmp_path).close()
    before = (tmp_path / JOURNAL_NAME).read_bytes()
    for read in (Journal, read_pending, Journal):
        with pytest.raises(JournalError, match="has format 2, and this version reads only format 1; upgrade"):
            read(tmp_path)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before


def test_the_journal_is_compacted(journal: Journal, tmp_path: Path) -> None:
    for number in range(6000):
        fill(journal, number)
        journal.delivered(journal.oldest()[0].seq)
    assert (tmp_path / JOURNAL_NAME).stat().st_size < 300_000
    fill(journal, 6000)
    assert numbers(journal) == [6000]


def test_a_run_that_does_not_exist_yet(tmp_path: Path, reopen: Callable[[Journal], Journal]) -> None:
    key = new_provisional_id()
    journal = Journal(tmp_path)
    journal.set_owner(key, "http://127.0.0.1:5000")
    journal.append(key, "create", {})
    assert read_pending(tmp_path).run_id is None
    journal.bind(key, RUN)
    assert journal.run_id_of(key) == RUN
    reopened = reopen(journal)
    assert (reopened.run, reopened.run_id_of(key), read_pending(tmp_path).run_id) == (key, RUN, RUN)
    reopened.delivered(reopened.oldest()[0].seq)
    reopened.close()
    assert read_pending(tmp_path).run_id == RUN  # also after it was written anew


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(
        JournalError, match="cannot keep a journal in '.*models'.*; choose another folder with --save-dir"
    ):
        Journal(tmp_path / "models")
