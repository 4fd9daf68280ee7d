"""Whose a folder of labels is: a second job at the same time, a killed one, another data set, no lock at all."""

import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dfa.data import storage
from dfa.label.claim import Claim
from dfa.label.output import LabelItem, LabelRecord, Quality, commit, committed, finish
from dfa.label.scoring import LabelSettings, Tally

ROOT = Path(__file__).parents[2]
SETTINGS = LabelSettings(3, None, 1.0, 0.0, ())
ITEMS = [LabelItem(f"shard-{number:06d}.tar", "image", 1, "hash") for number in range(6)]
HOLD = (
    "import sys, time; from dfa.label.claim import Claim\n"
    "with Claim(sys.argv[1], ('cat',), 'h', 'p').held(): print('held', flush=True); time.sleep(600)"
)


def claim(root, **changes):
    return replace(Claim(str(root), ("cat",), "h", "p"), **changes)


def write(root, item):
    quality = Quality(f"k{item.shard[6:12]}", 0, (1,), 4, 3, 0.5, 0.0, (), 1.0, None, None)
    record = LabelRecord({"png": item.shard.encode() * 500, "json": b"{}"}, quality)
    commit(str(root), item, SETTINGS, [record], [], Tally.zero(SETTINGS), {"wall_s": 1.0})


def content(root):
    return {name: storage.read_bytes(storage.join(root, name)) for name in storage.list_names(root) if "." in name}


def test_a_second_job_is_refused_while_the_first_one_lives_and_no_kill_leaves_a_lock(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        for other in (claim(tmp_path), claim(tmp_path, hash="other")):
            with pytest.raises(ValueError, match=f"another job is labelling into {tmp_path}"), other.held():
                pass
        assert storage.read_json(f"{tmp_path}/plan.json")["hash"] == "h"
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    for _ in range(2):
        with claim(tmp_path).held():
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_labels_that_are_replaced_are_told_with_what_differs(tmp_path, caplog):
    mine = claim(tmp_path)
    for each, words in (
        (mine, ""),
        (mine, ""),
        (replace(mine, hash="other"), "holds labels of other settings or model; they are replaced"),
        (replace(mine, image_plan_hash="more"), "holds labels of other images and other settings or model; they"),
    ):
        caplog.clear()
        with each.held():
            assert words in caplog.text and bool(words) == bool(caplog.text)


def test_where_nothing_locks_the_job_that_came_first_stops_when_another_took_the_folder():
    root = "memory://claims/taken"
    with claim(root).held():
        claim(root).check()
        with claim(root).held():  # the same labels: both may go on
            claim(root).check()
        with claim(root, hash="other").held():
            claim(root, hash="other").check()
            with pytest.raises(ValueError, match=f"another job labels into {root}, with another model"):
                claim(root).check()
    storage.remove_tree(root)


def test_where_nothing_locks_two_jobs_of_the_same_labels_leave_the_bytes_of_one(tmp_path):
    (tmp_path / "alone").mkdir()
    for item in ITEMS:
        write(tmp_path / "alone", item)
    finish(str(tmp_path / "alone"), ITEMS, ("cat",), "p", SETTINGS)
    root, together, problems = "memory://claims/both", threading.Barrier(2), []

    def job(items):
        try:
            with claim(root).held():
                for item in items:
                    together.wait(timeout=60)
                    write(root, item)
                    together.wait(timeout=60)  # before that the other one may just be replacing it
                    assert committed(root, item, SETTINGS)
                finish(root, ITEMS, ("cat",), "p", SETTINGS)
        except Exception as error:  # handed to the test
            problems.append(error)

    # Both begin every shard at the same moment.
    jobs = [threading.Thread(target=job, args=(ITEMS,)) for _ in range(2)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join(timeout=120)
    assert problems == []
    made, expected = content(root), content(str(tmp_path / "alone"))
    assert made.pop("plan.json")
    assert made == expected
    storage.remove_tree(root)


def test_a_folder_of_one_data_set_is_not_given_to_another_of_the_same_name(tmp_path):
    mine = claim(tmp_path, origin="/photos/a")
    with mine.held():
        pass
    with mine.held():
        pass
    grown = replace(mine, image_plan_hash="more")
    with grown.held():
        assert storage.read_json(f"{tmp_path}/plan.json")["image_plan_hash"] == "more"
    other, words = (
        replace(mine, origin="/other/a"),
        r"holds the masks of /photos/a, not of /other/a; choose another folder",
    )
    with pytest.raises(ValueError, match=words), other.held():
        pass


def test_finishing_deletes_what_other_images_left_and_nothing_foreign(tmp_path):
    for item in ITEMS:
        write(tmp_path, item)
    finish(str(tmp_path), ITEMS, ("cat",), "p", SETTINGS)
    foreign = ["notes.txt", "shard-a.tar", "pngs.json", "timings/mine.json", "shard-000005.tar.bak"]
    for name in [*foreign, ".shard-000001.tar.0.partial"]:
        (tmp_path / name).write_bytes(b"x")
    finish(str(tmp_path), ITEMS[:4], ("cat",), "fewer", SETTINGS)
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {
        name
        for item in ITEMS[:4]
        for name in (item.shard, f"{item.shard[:12]}.json", f"timings/{item.shard[:12]}.json")
    }
    assert there == kept | set(foreign) | {"index.json", "samples.parquet"}


def test_a_finished_folder_is_not_written_again(tmp_path):
    for item in ITEMS:
        write(tmp_path, item)
    first = finish(str(tmp_path), ITEMS, ("cat",), "p", SETTINGS)

    def state():
        paths = [tmp_path, *tmp_path.rglob("*")]  # a folder's time changes with every name in it
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}

    before = state()
    again = finish(str(tmp_path), ITEMS, ("cat",), "p", SETTINGS)
    assert state() == before
    assert (again.num_samples, again.rejects) == (first.num_samples, first.rejects) == (6, ())
    finish(str(tmp_path), ITEMS, ("cat",), "other plan", SETTINGS)
    assert storage.read_json(f"{tmp_path}/index.json")["image_plan_hash"] == "other plan"
