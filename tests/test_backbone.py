"""The small ResNet and the trunks that runs on rendered people start from."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from afen import backbone, pretrain, runs
from afen.backbone import DualResNet, count_parameters, load_resnet, output_shapes, trunk_file
from afen.core import digest, project_root, seed_everything
from afen.method import POCKET_RECIPE, method_class, method_names
from afen.methods.pmt import make_vit
from afen.people import write_tree
from afen.records import read_record, run_id
from afen.runs import DEFAULTS, carry_out, make_plan
from afen.trained import initial_network, open_run


def small_by_hand() -> dict[str, int]:
    """Parameters of each part: 3x3 kernels, 1x1 projections, two for each norm's channel."""
    def block(c_in, c_out, projected):
        kernels = 9 * c_in * c_out + 9 * c_out**2 + projected * c_in * c_out
        return kernels + (2 + projected) * 2 * c_out

    return {
        "conv1": 3 * 7 * 7 * 32, "bn1": 2 * 32,
        "layer1": block(32, 32, False), "layer2": block(32, 64, True),
        "layer3": block(64, 128, True), "layer4": block(128, 128, True),
    }  # fmt: skip


def test_the_small_resnet_has_the_size_counted_by_hand():
    resnet, by_hand = load_resnet(10, "none"), small_by_hand()
    assert {part: count_parameters(getattr(resnet, part)) for part in by_hand} == by_hand
    stem = by_hand["conv1"] + by_hand["bn1"]
    assert count_parameters(DualResNet(10, "none")) == sum(by_hand.values()) + stem


def test_the_maps_of_the_small_resnet_on_pocket_images():
    """Stem and strides of two; layer4 keeps its size. MECS is after layer2, FEM after layer3."""
    net = DualResNet(10, "none").eval()
    size = POCKET_RECIPE.height, POCKET_RECIPE.width
    with torch.no_grad():
        shapes = output_shapes(net, lambda: net(torch.zeros(1, 3, *size)))
    maps = {name: shapes[f"trunk.{name}"][1:] for name in backbone.STAGES}
    assert size == (64, 32) and shapes["stems.visible"] == (1, 32, 32, 16)
    assert maps == {
        "layer1": (32, 32, 16), "layer2": (64, 16, 8), "layer3": (128, 8, 4),
        "layer4": (128, 8, 4),
    }  # fmt: skip
    assert net.channels == 128


def test_there_are_no_imagenet_weights_for_the_small_resnet():
    with pytest.raises(ValueError, match="use -p weights pocket, or -p weights none"):
        load_resnet(10, "imagenet")


@pytest.fixture
def trunks(tmp_path, monkeypatch):
    """A project with three trunks, of random weights; its folder of trunks."""
    folder = tmp_path / "project" / "data" / "trunks"
    folder.mkdir(parents=True)
    for number in range(3):
        keep_random(folder, number, number)
    monkeypatch.setattr(backbone, "project_root", lambda: tmp_path / "project")
    return folder


def keep_random(folder, number, seed):
    """A trunk of random weights, under its number."""
    seed_everything(seed)
    state = load_resnet(10, "none").state_dict()
    state = {name: v for name, v in state.items() if not name.startswith("fc.")}
    save_file(state, folder / f"resnet-{number:02d}.safetensors")


def test_a_run_takes_the_trunk_of_its_seed(trunks):
    taken = [trunk_file("resnet", seed).name for seed in range(7)]
    assert taken == [f"resnet-{n:02d}.safetensors" for n in (0, 1, 2, 0, 1, 2, 0)]
    one = load_resnet(10, str(trunks / "resnet-00.safetensors"))
    assert load_resnet(10, "pocket").conv1.weight.equal(one.conv1.weight)
    assert not load_resnet(10, str(trunks / "resnet-01.safetensors")).conv1.weight.equal(
        one.conv1.weight
    )


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_without_trunks_a_sentence_says_what_to_do(trunks, kind):
    for path in trunks.glob("resnet-*"):
        path.unlink()
    sentence = f"python -m afen.pretrain {kind} 0, or start from chance with -p weights none"
    with pytest.raises(FileNotFoundError, match=sentence):
        trunk_file(kind)


def test_each_row_starts_from_a_trunk_of_its_kind():
    kinds = {name: method_class(name).trunk for name in method_names()}
    assert kinds.pop("pmt") == "vit" and set(kinds.values()) == {"resnet"}
    for name in method_names():
        assert method_class(name).recipes["pocket"].weights == "pocket", name


def plan_of(**given):
    return make_plan(DEFAULTS | {"device": "cpu"} | given)


def test_a_plan_calls_every_trunk_by_one_name(trunks):
    """Runs of several seeds are one cell; what a file holds is in the record."""
    plans = [plan_of(seed=seed) for seed in (0, 1, 3)]
    assert {plan.parameters["recipe"]["weights"] for plan in plans} == {"pocket"}
    hashes = [digest(trunks / f"resnet-{n:02d}.safetensors") for n in (0, 1, 0)]
    assert [plan.weights_hash for plan in plans] == hashes
    assert all(plan.changed == () for plan in plans)
    path = trunks / "resnet-00.safetensors"
    given, chance = plan_of(weights=str(path)), plan_of(weights="none")
    assert given.parameters["recipe"]["weights"] == f"file:{hashes[0]}"
    assert (chance.weights_hash, chance.parameters["recipe"]["weights"]) == ("", "none")
    assert given.changed == chance.changed == ("weights",)
    assert len({run_id(plan.parameters) for plan in (plans[0], given, chance)}) == 3


def test_a_run_is_trained_anew_when_its_trunk_has_changed(trunks, tmp_path, monkeypatch):
    tree = write_tree("regdb", tmp_path / "tree", n_train=2, n_test=2, n_images=2, size=(48, 24))
    given = {"dataset": "regdb", "root": str(tree), "preset": "pocket", "seed": 1, "epochs": 1}
    given |= {"steps": 1, "identities": 2, "out": str(tmp_path / "run"), "method": "agw"}
    trained, fit = [], runs.Run.fit
    monkeypatch.setattr(runs, "draw", lambda *_: None)
    monkeypatch.setattr(runs.Run, "fit", lambda self, *a, **k: (
        trained.append(self.epoch < self.method.recipe.epochs), fit(self, *a, **k))[1])

    def record():
        carry_out(plan_of(**given))
        return read_record(tmp_path / "run" / "record.json")

    first, again = record(), record()
    assert trained == [True, False] and again == first
    path = trunks / "resnet-01.safetensors"
    assert first["start_weights"] == {"file": path.name, "hash": digest(path)}
    keep_random(trunks, 1, 7)
    other = record()
    assert trained == [True, False, True] and other["id"] == first["id"]
    assert other["start_weights"] == {"file": path.name, "hash": digest(path)} != (
        first["start_weights"]
    )


# The kept trunks, and how they are made


KEPT = sorted((project_root() / "data" / "trunks").glob("*.safetensors"))


def test_what_is_kept_of_trunks_is_small():
    kinds = [path.stem.split("-")[0] for path in KEPT]
    assert kinds.count("resnet") >= 6 and kinds.count("vit") >= 2
    assert sum(path.stat().st_size for path in KEPT) < 25e6


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_kept_trunk_is_that_of_its_record_and_fits_its_network(path):
    record = pretrain.trunk_record(path)
    assert record["file"] == path.name == f"{record['kind']}-{record['number']:02d}.safetensors"
    assert record["people"] == pretrain.trunk_people(record["number"]).n_train
    assert record["bytes"] == path.stat().st_size and 0 < record["mAP"] < 1
    if record["kind"] in ("resnet", "visible"):
        load_resnet(10, str(path))
    else:
        make_vit("tiny", (64, 32), str(path))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trunk of two steps, made by the command with few people; its weights' path."""
    folder = tmp_path_factory.mktemp("made")
    few = dict(n_train=32, n_test=2, n_images=2)
    kept = pretrain.trunk_people, pretrain.project_root, pretrain.KINDS, pretrain.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "trunk_people", lambda n: pretrain.replace(kept[0](n), **few))
        patch.setattr(pretrain, "project_root", lambda: folder)
        base, recipe = kept[2]["resnet"]
        short = pretrain.replace(recipe, epochs=2, drops=(1,))
        patch.setattr(pretrain, "KINDS", {"resnet": (base, short)})
        tests = write_tree("regdb", folder / "tests", **few | {"n_train": 2, "n_test": 4})
        patch.setattr(pretrain, "load", lambda name, root=None: kept[3](
            "regdb", root or tests))
        pretrain.main(["resnet", "3", "--steps", "1", "--out", str(folder / "kept")])
    return folder / "kept" / "resnet-03.safetensors"


def test_a_trunk_is_made_with_its_record(made):
    record = pretrain.trunk_record(made)
    assert (record["file"], record["number"], record["steps"]) == (made.name, 3, 2)
    assert record["people"] == 32 and len(record["history"]) == 2
    assert 0 < record["mAP"] <= 1 and record["bytes"] == made.stat().st_size
    state = load_file(made)
    assert {v.dtype for v in state.values()} == {torch.float16, torch.int64}
    bare = load_resnet(10, "none").state_dict()
    assert set(state) == {name for name in bare if not name.startswith("fc.")}
    resnet = load_resnet(10, str(made))
    assert resnet.conv1.weight.dtype == torch.float32
    assert resnet.conv1.weight.half().equal(state["conv1.weight"])


def test_a_damaged_trunk_is_refused(made, tmp_path):
    path = tmp_path / made.name
    path.with_suffix(".json").write_bytes(made.with_suffix(".json").read_bytes())
    data = bytearray(made.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not the file that its record tells of"):
        pretrain.trunk_record(path)
    path.write_bytes(data[:1000])
    with pytest.raises(ValueError, match=made.name):
        load_resnet(10, str(path))


def test_a_runs_start_is_found_by_its_record(tmp_path, monkeypatch):
    """`initial_network` takes the kept trunk, and refuses another file of its name."""
    tree = write_tree("regdb", tmp_path / "tree", n_train=2, n_test=2, n_images=2, size=(48, 24))
    given = {"dataset": "regdb", "root": str(tree), "preset": "pocket", "method": "agw"}
    given |= {"steps": 1, "identities": 2, "epochs": 1, "out": str(tmp_path / "run"), "seed": 1}
    plan = plan_of(**given)
    monkeypatch.setattr(runs, "draw", lambda *_: None)
    carry_out(plan)
    run = open_run(tmp_path / "run", "cpu")
    start = load_file(plan.recipe.weights)["layer1.0.conv1.weight"].float()
    assert initial_network(run).net.trunk["layer1"][0].conv1.weight.equal(start)
    run.record["start_weights"]["hash"] = "0" * 64
    with pytest.raises(ValueError, match="is not the one that the run started from"):
        initial_network(run)
