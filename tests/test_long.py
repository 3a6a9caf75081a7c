"""Short forms of the long tests (python -m tests.long), and that they can fail."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest

from afen.datasets import load
from tests import long, long_broken, long_fuzz, long_kills, long_numerics

RECORDS = {path.stem: json.loads(path.read_text()) for path in sorted(long.FOLDER.glob("*.json"))}


def test_broken_sets_load_right_or_are_refused(tmp_path):
    outcome = long_broken.try_trees(tmp_path, 30, seed=7)
    assert outcome["faults"] == []
    assert outcome["refused"] and outcome["right"] and outcome["said"]


def test_there_are_many_kinds_of_faults_in_every_layout():
    kinds = {kind: layouts for kind, (_, layouts) in long_broken.BREAKS.items()}
    assert len(kinds) > 50 and set().union(*kinds.values()) == set(long_broken.LAYOUTS)


def test_silently_wrong_data_would_be_noticed(tmp_path):
    root = long_broken.whole_trees(tmp_path)["sysu"]
    split = load("sysu", root)
    pixels = [np.zeros((*long_broken.SIZE, 3), np.uint8)] * (len(split.train) + len(split.test))
    faults = "\n".join(long_broken.faults_of(split, root, pixels))
    assert "has other pixels" in faults and "is of" not in faults
    other = split.test.identity.where(split.test.index > 0, 99)
    wrong = replace(split, test=split.test.assign(identity=other))
    faults = "\n".join(long_broken.faults_of(wrong, root, pixels))
    assert faults.count("is of 99") == 1


def test_damaged_files_are_refused_or_read_as_they_were(tmp_path):
    outcome = long_fuzz.fuzz(tmp_path, 60, seed=3, tries=8)
    assert outcome["faults"] == []
    assert min(outcome["readers"].values()) >= 1 and outcome["refused"]["record"] == 8


def test_a_reader_that_takes_other_bytes_would_be_noticed():
    assert "as if nothing was" in long_fuzz.fault({"a": 1}, {"a": 2}, must_equal=True)
    assert "KeyError" in long_fuzz.fault(KeyError("a"), None, must_equal=False)
    sentence = ValueError("File x cannot be read: copy it anew.")
    assert not long_fuzz.fault(sentence, None, must_equal=True)


def test_a_step_in_three_precisions(tmp_path):
    outcome = long_numerics.numerics(tmp_path, methods=("agw", "xmodal"))
    assert outcome["faults"] == [] and len(outcome["each"]) == 2
    assert all(row["bfloat16"] > row["float32"] > 0 for row in outcome["each"])


def test_a_killed_process_takes_its_children_along():
    script = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True).wait()"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    family = psutil.Process(process.pid)
    while not (children := family.children(recursive=True)):
        pass
    assert long_kills.kill(process)
    psutil.wait_procs(children, timeout=5)
    assert not any(child.is_running() for child in children)


def test_a_run_is_killed_at_any_moment_of_it():
    stream = long_kills.moments("agw", 0, 10.0)
    drawn = [next(stream) for _ in range(300)]
    assert 0 < min(drawn) < 1 and 9 < max(drawn) < 10


@pytest.mark.parametrize("part", long.PARTS)
def test_the_kept_record_says_what_was_tried(part):
    record = RECORDS[part]
    assert record["part"] == part and record["faults"] == []
    assert len(record["code"]["revision"]) == 40 and not record["code"]["dirty"]
    counts = {"broken": "trees", "fuzz": "inputs", "properties": "examples", "kills": "kills"}
    counts |= {"package": "modules"}
    assert len(record["each"]) == 8 if part == "numerics" else record[counts[part]] > 0


def test_the_kills_that_are_kept_ended_bit_equal():
    record = RECORDS["kills"]
    assert record["bit_equal"] == record["kills"] == len(record["each"])
    assert set(record["methods"]) == set(long_kills.METHODS)
    assert record["while_running"] > record["kills"] // 2  # the others had ended
