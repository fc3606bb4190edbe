"""The folder is the truth: whoever is killed, whatever is damaged, nobody reads what was not written."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_worker._disk_store import MOST, DiskStore
from llama_worker._errors import StateError
from llama_worker._identity import KVIdentity
from llama_worker._saved_prefix import SavedPrefix
from tests.worker.disk_writer import FINGERPRINT, prefix
from tests.worker.test_saved_prefix import same

PROOF = bool(os.environ.get("LLAMA_WORKER_PROOF"))
KILLS = 50 if PROOF else 5


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def small(number: int, n_bytes: int = 1000) -> SavedPrefix:
    tokens = np.arange(number, number + 10, dtype=np.int32)
    return SavedPrefix(FINGERPRINT, tokens, np.full(n_bytes, number % 256, np.uint8))


def opened(folder: Path, budget: int | None = None, clock: Clock | None = None) -> DiskStore:
    store = DiskStore(folder, FINGERPRINT, budget, clock=clock or Clock())
    store.look()
    return store


def kept(folder: Path) -> dict[int, SavedPrefix]:
    """By their first token: what a process that starts now finds."""
    store = opened(folder)
    found = [store.read(shelved) for shelved in store.index]
    return {int(saved.tokens[0]): saved for saved in found if saved is not None}


def test_what_is_written_is_there_for_everybody(tmp_path: Path):
    writer, reader = opened(tmp_path / "a" / "b"), DiskStore(tmp_path / "a" / "b", FINGERPRINT)
    for number in range(3):
        assert writer.write(small(number))
    assert reader.index == ()
    assert reader.look() == 0
    assert sorted(int(shelved.tokens[0]) for shelved in reader.index) == [0, 1, 2]
    assert all(same(saved, small(number)) for number, saved in kept(tmp_path / "a" / "b").items())


def test_another_fingerprint_sees_nothing_of_it(tmp_path: Path):
    opened(tmp_path).write(small(1))
    other = DiskStore(tmp_path, b"x" * 16)
    assert (other.look(), other.index) == (0, ())


def test_a_renamed_file_is_still_nobody_elses(tmp_path: Path):
    """Names are for finding; the head says whose it is."""
    store, other = opened(tmp_path), DiskStore(tmp_path, b"x" * 16)
    store.write(small(1))
    name = store.name_of(small(1))
    (tmp_path / name).rename(tmp_path / other.name_of(small(1)))
    assert (other.look(), other.index) == (1, ())


def test_other_adapters_are_other_prefixes(tmp_path: Path):
    store = opened(tmp_path)
    store.write(small(1))
    store.write(replace(small(1), kv=KVIdentity((("a", 0.5),))))
    store.look()
    assert sorted(shelved.kv.loras for shelved in store.index) == [(), (("a", 0.5),)]


def test_only_the_owner_can_read_it(tmp_path: Path):
    opened(tmp_path / "kept").write(small(1))
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kept", *(tmp_path / "kept").iterdir())]
    assert modes == [0o700, 0o600]


# --- damage


def test_damage_is_found_wherever_it_is(tmp_path: Path):
    """Each byte of the head, and places all over the file; the file goes, and is never read again."""
    store = opened(tmp_path)
    saved = small(1, 5000)
    assert store.write(saved)
    path = tmp_path / store.name_of(saved)
    whole = path.read_bytes()
    head = 200
    rng = random.Random(5)
    for at in [*range(head), *rng.sample(range(head, len(whole)), 1000 if PROOF else 100), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        assert kept_or_damaged(tmp_path) == {}, f"a flip at byte {at} of {len(whole)} was not noticed"
        assert not path.exists()


def kept_or_damaged(folder: Path) -> dict[int, SavedPrefix]:
    store = DiskStore(folder, FINGERPRINT)
    damaged = store.look()
    if not damaged:
        with pytest.raises(StateError):
            store.read(store.index[0])
    return kept(folder)


@pytest.mark.parametrize("length", [0, 1, 20, 100, 500, -1])
def test_a_file_that_is_cut_off_is_none(length: int, tmp_path: Path):
    store = opened(tmp_path)
    store.write(small(1))
    path = tmp_path / store.name_of(small(1))
    path.write_bytes(path.read_bytes()[:length])
    assert kept(tmp_path) == {}


def test_a_file_that_changes_behind_the_index_is_damaged(tmp_path: Path):
    store = opened(tmp_path)
    store.write(small(1))
    store.look()
    path = tmp_path / store.name_of(small(1))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StateError):
        store.read(store.index[0])


def test_a_file_that_another_process_replaced_is_read_as_it_is_now(tmp_path: Path):
    """The same tokens with other checkpoints: longer, or as long, before or after the next look."""
    one, two = opened(tmp_path), opened(tmp_path)
    for replaced in (small(1, 5000), replace(small(1), checkpoints=((5, np.zeros(50, np.uint8)),)), small(1)):
        two.write(small(1))
        assert one.look() == 0
        known = one.index[0]
        two.look()
        two.remove(two.index[0])
        two.write(replaced)
        found = one.read(known)
        assert found is not None
        assert same(found, replaced)
        assert one.look() == 0
        assert one.index[0].n_bytes == replaced.n_bytes
        two.look()
        two.remove(two.index[0])


def test_what_replaced_a_damaged_file_meanwhile_stays(tmp_path: Path):
    store = opened(tmp_path)
    store.write(small(1))
    store.look()
    path = tmp_path / store.name_of(small(1))
    path.write_bytes(b"damaged")
    with path.open("rb", buffering=0) as damaged:
        os.replace(shutil.copy(written(tmp_path / "other", small(1)), tmp_path / "whole"), path)
        with pytest.raises(StateError):
            store._parsed(path, damaged)
    assert same(kept(tmp_path)[1], small(1))


def written(folder: Path, saved: SavedPrefix) -> Path:
    store = opened(folder)
    store.write(saved)
    return folder / store.name_of(saved)


def test_a_file_that_is_gone_is_missed_and_no_more(tmp_path: Path):
    store = opened(tmp_path)
    store.write(small(1))
    store.look()
    (tmp_path / store.name_of(small(1))).unlink()
    assert store.read(store.index[0]) is None
    assert (store.look(), store.index) == (0, ())


def test_what_is_none_of_ours_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / f"{FINGERPRINT.hex()}-folder.kv1").mkdir()
    (tmp_path / f"{FINGERPRINT.hex()}-future.kv9").write_bytes(b"of a later version")
    store = opened(tmp_path, 5000)
    assert store.index == ()
    assert store.write(small(1))
    assert len(list(tmp_path.iterdir())) == 4


def test_files_of_others_are_neither_counted_nor_removed(tmp_path: Path):
    """Whatever their names have in common with ours, and even where they are the same."""
    names = ["main.kv", "data.kvstore.sqlite", "draft.kv.tmp", "a-b.kv1", f"{'0' * 32}-{'1' * 32}.kv1.backup"]
    for name in [*names, f"{'0' * 32}-{'1' * 32}.kv1"]:
        (tmp_path / name).write_bytes(b"somebody else's" * 10_000)
        os.utime(tmp_path / name, (1, 1))
    store = opened(tmp_path, 2 * small(0).n_bytes)
    for number in range(3):
        assert store.write(small(number))
    assert set(names) < {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == len(names) + 1 + 2


# --- the budget


def test_those_used_longest_ago_go_first(tmp_path: Path):
    clock = Clock()
    store = opened(tmp_path, 3 * small(0).n_bytes, clock)
    for number in range(3):
        clock.now += 1
        store.write(small(number))
    clock.now += 1
    store.look()
    assert store.read(next(shelved for shelved in store.index if shelved.tokens[0] == 0)) is not None
    for number in (3, 4):
        clock.now += 1
        store.write(small(number))
    assert sorted(kept(tmp_path)) == [0, 3, 4]


def test_writing_again_is_using(tmp_path: Path):
    clock = Clock()
    store = opened(tmp_path, 2 * small(0).n_bytes, clock)
    for number in (0, 1, 0, 2):
        clock.now += 1
        assert store.write(small(number))
    assert sorted(kept(tmp_path)) == [0, 2]


def test_the_budget_holds_at_every_moment_and_for_all_models_together(tmp_path: Path):
    clock, rng = Clock(), random.Random(1)
    stores = [DiskStore(tmp_path, bytes([i]) * 16, 20_000, clock=clock) for i in range(3)]
    for number in range(100):
        clock.now += 1
        store = rng.choice(stores)
        saved = replace(small(number, rng.randrange(1, 6000)), fingerprint=store.fingerprint)
        assert store.write(saved)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
        store.look()
        assert any(shelved.tokens[0] == number for shelved in store.index)


def test_what_is_larger_than_everything_may_be_costs_nobody_his_place(tmp_path: Path):
    store = opened(tmp_path, 3000)
    store.write(small(1))
    assert not store.write(small(2, 5000))
    assert sorted(kept(tmp_path)) == [1]


def test_there_are_never_more_files_than_can_be_looked_at(tmp_path: Path):
    store = opened(tmp_path, 10**9)
    for number in range(MOST):
        (tmp_path / named(number)).touch()
        os.utime(tmp_path / named(number), (number, number))
    store.write(small(1))
    names = {path.name for path in tmp_path.iterdir()}
    assert (len(names), named(0) in names, named(1) in names) == (MOST, False, True)


def named(number: int) -> str:
    return f"{number:032x}-{number:032x}.kv1"


def test_what_a_killed_writer_left_goes_when_it_is_old(tmp_path: Path):
    clock = Clock()
    store = opened(tmp_path, 10_000, clock)
    store.write(small(1))
    left = tmp_path / f"{store.name_of(small(2))}.123-0.tmp"
    left.write_bytes(small(2).to_bytes()[:300])
    for age, there in ((0, True), (500, True), (700, False)):
        os.utime(left, (clock.now - age, clock.now - age))
        store.write(small(3 + age))
        assert left.exists() is there
        assert 2 not in kept(tmp_path)


# --- others at the same time


def test_a_writer_that_is_killed_loses_at_most_what_it_was_writing(tmp_path: Path):
    """kill -9 at random moments: the next start finds everything that was said to be there, whole, and no error."""
    rng = random.Random(7)
    for kill in range(KILLS):
        folder = tmp_path / f"{kill}"
        said = killed_writer(folder, 0, rng)
        store = DiskStore(folder, FINGERPRINT)
        assert store.look() == 0, "nothing in its place is damaged"
        found = kept(folder)
        assert set(range(said)) <= set(found) <= set(range(said + 1))
        assert all(same(saved, prefix(number)) for number, saved in found.items())
        assert store.write(prefix(10_000))


def test_a_writer_that_is_killed_while_it_makes_room_leaves_no_wrong_entry(tmp_path: Path):
    rng, budget = random.Random(8), 3_000_000
    for _ in range(KILLS // 2):
        killed_writer(tmp_path, budget, rng)
        store = DiskStore(tmp_path, FINGERPRINT)
        assert store.look() == 0
        assert store.n_bytes <= budget
        assert all(same(saved, prefix(number)) for number, saved in kept(tmp_path).items())


def killed_writer(folder: Path, budget: int, rng: random.Random) -> int:
    """Let a process write and kill it in the midst of it. How many prefixes it said are there."""
    command = [sys.executable, "-m", "tests.worker.disk_writer", str(folder), str(budget)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said, done = 0, set()
        for _ in range(rng.randrange(2, 12)):
            assert writer.stdout.readline() == f"{said}\n"
            done.add(DiskStore(folder, FINGERPRINT).name_of(prefix(said)))
            said += 1
        if rng.random() < 0.8:
            await_part(folder, done, int(rng.random() * prefix(said).n_bytes))
        writer.send_signal(signal.SIGKILL)
        return said + len(writer.stdout.read().splitlines())


def await_part(folder: Path, done: set[str], n_bytes: int) -> None:
    """Come back when so much of another file than those that are `done` is written, or it was too quick to be seen."""
    for _ in range(3000):
        for file in list(folder.iterdir()) if folder.exists() else ():
            with suppress(FileNotFoundError):
                if file.name not in done and file.stat().st_size >= n_bytes:
                    return


def test_a_reader_meets_only_whole_files_while_others_write_the_same(tmp_path: Path):
    """Two processes write the same prefixes within a small budget; a third reads what it finds."""
    command = [sys.executable, "-m", "tests.worker.disk_writer", str(tmp_path), "4000000"]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    read = missed = 0
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "0\n"
        store = DiskStore(tmp_path, FINGERPRINT)
        while read < (3000 if PROOF else 200):
            assert store.look() == 0
            for shelved in store.index:
                saved = store.read(shelved)
                missed += saved is None
                if saved is not None:
                    assert same(saved, prefix(int(saved.tokens[0])))
                    read += 1
        assert all(writer.poll() is None for writer in writers)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert read


# --- a disk that does not serve


@contextmanager
def full_disk(n_bytes: int = 100_000) -> Iterator[None]:
    """No file of this process may grow beyond `n_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path: Path):
    store = opened(tmp_path)
    store.write(small(1))
    with full_disk(), pytest.raises(OSError):
        store.write(prefix(2))
    assert len(list(tmp_path.iterdir())) == 1
    assert sorted(kept(tmp_path)) == [1]
    assert store.write(prefix(2))


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    store = DiskStore(tmp_path / "file", FINGERPRINT)
    for call in (store.look, lambda: store.write(small(1))):
        with pytest.raises(OSError):
            call()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_can_be_read(tmp_path: Path):
    opened(tmp_path).write(small(1))
    tmp_path.chmod(0o500)
    try:
        assert same(kept(tmp_path)[1], small(1))
        with pytest.raises(OSError):
            opened(tmp_path).write(small(2))
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_vanished_is_made_again(tmp_path: Path):
    store = opened(tmp_path / "kept")
    store.write(small(1))
    store.look()
    for path in [*(tmp_path / "kept").iterdir()]:
        path.unlink()
    (tmp_path / "kept").rmdir()
    assert store.read(store.index[0]) is None
    assert (store.look(), store.index) == (0, ())
    assert store.write(small(2))
    assert sorted(kept(tmp_path / "kept")) == [2]
