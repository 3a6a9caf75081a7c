"""Records: what is refused, what they say of the machine, and what stands on them."""

import json
import platform
from pathlib import Path

import pytest
import torch

from afen.core import cpu_name, digest
from afen.probes import load_probes, probes_folder
from afen.records import (
    check_record,
    fingerprint,
    keep_record,
    load_records,
    machine,
    read_record,
    run_id,
)

RECORDS = {record["id"]: record for record in load_records()}


def sealed(record):
    """The record as somebody would leave it who knows how to seal one."""
    return record | {"fingerprint": fingerprint(record)}


CHANGES = {
    "seed": lambda p: p | {"seed": 7},
    "a recipe's rate": lambda p: p | {"recipe": p["recipe"] | {"lr": 0.5}},
    "one more parameter": lambda p: p | {"luck": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tampered_parameter_is_refused_though_it_is_sealed(change, tmp_path):
    record = next(iter(RECORDS.values()))
    check_record(sealed(record))
    wrong = sealed(record | {"parameters": CHANGES[change](record["parameters"])})
    path = tmp_path / "record.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="do not give its name and hash") as caught:
        read_record(path)
    assert str(caught.value).count(". ") == 0 and "\n" not in str(caught.value)


def test_a_name_and_a_hash_alone_are_refused_too():
    record = next(iter(RECORDS.values()))
    other = record["parameters"] | {"seed": 7}
    for wrong in ({"id": run_id(other)}, {"parameters_hash": "0" * 32}):
        with pytest.raises(ValueError, match="do not give its name and hash"):
            check_record(sealed(record | wrong))


def forged(**changes):
    """A record that is consistent in itself, of parameters that nobody could give."""
    record = next(iter(RECORDS.values()))
    p = record["parameters"] | changes
    return sealed(record | {"parameters": p, "id": run_id(p), "parameters_hash": digest(p)})


@pytest.mark.parametrize("dataset", ["../../outside", "/tmp/outside", "a b", "A", "a\n"])
def test_a_forged_name_does_not_leave_the_folder_of_records(tmp_path, dataset):
    run, kept = tmp_path / "run", tmp_path / "deep" / "er" / "kept"
    run.mkdir()
    kept.mkdir(parents=True)
    (run / "record.json").write_text(json.dumps(forged(dataset=dataset)))
    with pytest.raises(ValueError, match="is not valid at id"):
        keep_record(run, kept)
    assert [p.name for p in tmp_path.rglob("*.json")] == ["record.json"]


@pytest.mark.parametrize("content, sentence", [
    (b"[1, 2]", "is no JSON object"),
    (b"null", "is no JSON object"),
    (b"\xff\xfe{}", "is not JSON in UTF-8"),
    (b"", "is not JSON in UTF-8"),
    (b"[" * 100_000, "is not JSON in UTF-8"),
    (b"{}", "is not valid at the record"),
])  # fmt: skip
def test_what_is_no_record_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_record(path)
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -0.1, 1.1])
def test_scores_are_finite_fractions(tmp_path, number):
    record = json.loads(json.dumps(next(iter(RECORDS.values()))))
    entry = next(iter(record["scores"].values()))
    for place in (entry["mean"], entry["each"][0], entry["std"]):
        before, place["mAP"] = place["mAP"], number
        if place is not entry["std"] or number != 1.1:  # a spread has no upper bound here
            with pytest.raises(ValueError, match="NaN or infinity|is not valid at scores"):
                check_record(sealed(record))
        place["mAP"] = before


def test_every_kept_record_is_checked_and_under_its_name(tmp_path):
    record = next(iter(RECORDS.values()))
    path = tmp_path / "another-name.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="rename it"):
        load_records(tmp_path)
    path.write_text(json.dumps(record | {"reason": "made better"}))
    with pytest.raises(ValueError, match="was changed after it was written"):
        load_records(tmp_path)


CODE = {"revision": "a" * 40, "dirty": False}
UNKNOWN = {"revision": "unknown", "dirty": False}


def left(folder, **changes):
    """A run's folder with a finished record of committed code, or with changes."""
    folder.mkdir(exist_ok=True)
    record = next(iter(RECORDS.values())) | {"code": CODE} | changes
    (folder / "record.json").write_text(json.dumps(sealed(record)))
    return folder


FAILED = {"status": "failed", "reason": "did not finish", "scores": {}}
IMAGES = {"data": next(iter(RECORDS.values()))["data"] | {"hash": "2-0"}}
REFUSED = {  # what is kept, what comes, why it stays out
    "other revision": ({}, {"code": CODE | {"revision": "b" * 40}}, "is of revision bbbbbbb:"),
    "changed code": ({}, {"code": CODE | {"dirty": True}}, "aaaaaaa with changes:"),
    "both changed": ({"code": CODE | {"dirty": True}},) * 2 + ("aaaaaaa with changes:",),
    "unknown code": ({"code": UNKNOWN}, {"code": UNKNOWN}, "is of revision unknown:"),
    "other images": ({}, IMAGES, "is of other images or labels:"),
    "failed": ({}, FAILED, "and this one failed:"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_finished_record_is_not_replaced_by_another(tmp_path, case):
    before, after, why = REFUSED[case]
    path = keep_record(left(tmp_path / "run", **before), tmp_path / "kept")
    kept = path.read_bytes()
    again = left(tmp_path / "run", started="2030-01-01T00:00:00+00:00", **after)
    with pytest.raises(ValueError, match=why) as caught:
        keep_record(again, tmp_path / "kept")
    assert "delete" in str(caught.value) and str(caught.value).count(". ") == 0
    assert path.read_bytes() == kept


REPLACED = {  # what is kept, what comes
    "the same run again": ({}, {}),
    "after a failure": (FAILED, {"code": CODE | {"dirty": True}}),
    "another failure": (FAILED, FAILED | {"code": UNKNOWN}),
}


@pytest.mark.parametrize("case", REPLACED)
def test_the_same_run_again_and_what_follows_a_failure_are_kept(tmp_path, case):
    before, after = REPLACED[case]
    path = keep_record(left(tmp_path / "run", **before), tmp_path / "kept")
    again = left(tmp_path / "run", started="2030-01-01T00:00:00+00:00", **after)
    assert keep_record(again, tmp_path / "kept") == path
    assert path.read_bytes() == (again / "record.json").read_bytes()


def test_one_record_may_be_kept_twice_whatever_code_it_is_of(tmp_path):
    run = left(tmp_path / "run", code=CODE | {"dirty": True})
    assert keep_record(run, tmp_path / "kept") == keep_record(run, tmp_path / "kept")


def test_the_machine_names_its_cpu(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Processor 9000\nflags\t: a b\n")
    assert cpu_name(info) == "A Processor 9000"
    info.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")  # as on some ARM systems
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert cpu_name(info) == cpu_name(tmp_path / "none") == "arm64"
    assert machine(torch.device("cpu"), 1.0, "float32")["device"] == f"cpu: {cpu_name()}"


PROBES = sorted(Path(probes_folder()).glob("*.json"))


def test_there_are_probes():
    assert PROBES and len(load_probes()) == len(PROBES)


@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.stem)
def test_a_probe_is_of_a_kept_record_and_of_committed_code(path):
    probe = json.loads(path.read_text())
    assert probe["run"] == path.stem and probe["run"] in RECORDS
    assert probe["status"] == RECORDS[probe["run"]]["status"]
    assert not probe["code"]["dirty"], "probed with uncommitted code: probe it again"
