"""The pages of the methods: their runs, their recipes by the released rules."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_decisions import NBS, ROOT, cells, committed, rerun

from afen import runs
from afen.augment import FILL, LUMA, MEAN, normalise, to_float
from afen.batches import Batch
from afen.core import torch_generator
from afen.method import create, method_class
from afen.people import write_tree
from afen.records import read_record, write_record
from afen.training import lr_factor, make_sampler

TINY = {"dataset": "regdb", "preset": "pocket", "precision": "float32", "epochs": 1}
TINY |= {"steps": 1, "identities": 2, "images": 2}


@pytest.fixture
def plan(tmp_path):
    """The smallest of runs, on a tree of its own."""
    size = {"n_train": 4, "n_test": 3, "n_images": 2, "size": (48, 24)}
    root = write_tree("regdb", tmp_path / "tree", **size)
    places = {"root": str(root), "out": str(tmp_path / "run")}
    return runs.make_plan(runs.DEFAULTS | TINY | places)


def test_a_failed_run_is_made_again(plan):
    runs.carry_out(plan)
    first = read_record(plan.folder / "record.json")
    assert first["status"] == "smoke" and first["scores"]
    assert (plan.folder / "weights.safetensors").exists()
    write_record(first | {"status": "failed", "reason": "did not finish"}, plan.folder)
    runs.carry_out(plan)
    again = read_record(plan.folder / "record.json")
    assert again["status"] == "smoke" and again["scores"] == first["scores"]


def test_a_page_counts_the_runs_of_its_own_recipe_only(monkeypatch):
    """Other switches, other recipes and other sets are not averaged with it."""
    given = runs.DEFAULTS | {"method": "agw"}
    other = {"stable": False}, {"epochs": 5}, {"label_noise": 0.2}, {"precision": "bfloat16"}
    other += ({"weights": "none"},)
    changes = [{}, {"seed": 1}, *other, {"method": "ddag"}, {"dataset": "regdb"}]
    made = []
    for i, change in enumerate(changes):
        parameters = runs.make_plan(given | change).parameters
        entry = {"mean": dict.fromkeys(("rank1", "mAP", "mINP"), i / 10), "std": {}}
        scores = {"visible-to-infrared": entry | {"n": 1, "over": "splits"}}
        made.append({"id": str(i), "status": "smoke", "parameters": parameters})
        made[-1]["scores"] = scores
    monkeypatch.setattr(runs, "load_records", lambda: made)
    assert [record["id"] for record in runs.page_records("agw")] == ["0", "1"]
    (row,) = runs.page_scores("agw").to_dict("records")
    assert (row["runs"], row["lowest"], row["highest"]) == (2, 0, 10)
    assert row["rank1"] == row["mAP"] == row["mINP"] == 5


def test_a_page_draws_the_losses_of_its_first_kept_seed(monkeypatch):
    """On pocket-regdb, and nothing is trained; without a record the figure says so."""
    monkeypatch.setattr(runs, "start", None)
    made = []
    for seed, dataset in ((5, "pocket-regdb"), (4, "pocket-regdb"), (3, "pocket-sysu")):
        change = {"method": "ddag", "seed": seed, "dataset": dataset}
        history = [{"epoch": e, "loss": seed + 1 / e, "graph": 1 / e} for e in (1, 2, 3)]
        made.append({"parameters": runs.make_plan(runs.DEFAULTS | change).parameters})
        made[-1] |= {"history": history, "data": {"rendered": True}}
    monkeypatch.setattr(runs, "load_records", lambda: made)
    figure = runs.page_curves("ddag")
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    for column, name in (("loss", "total"), ("graph", "graph")):
        history = [row[column] for row in made[1]["history"]]
        assert drawn[name].get_ydata().tolist() == history
    assert runs.figures.is_smoke(figure)
    monkeypatch.setattr(runs, "load_records", lambda: [])
    assert runs.page_scores("ddag").empty
    said = [text.get_text() for text in runs.page_curves("ddag").texts]
    assert "ddag, pocket-regdb: not run" in said


# --- recipes --------------------------------------------------------------------------


def step_rule(epoch):
    """AGW's released rate, and CAJ's and DDAG's; epochs from 0."""
    if epoch < 10:
        return 0.1 * (epoch + 1) / 10
    if epoch < 20:
        return 0.1
    return 0.01 if epoch < 50 else 0.001


def line_rule(epoch):
    """X-modality's, which counts from 1: the line is logged, the drops are inferred."""
    number = epoch + 1
    rate = 3.5e-4 * (0.01 + 0.99 * min(number, 10) / 10)
    return rate / 10 ** ((number >= 40) + (number >= 70))


RULES = {
    "agw": (81, step_rule),
    "ddag": (81, step_rule),
    "caj": (100, step_rule),
    "afen": (100, step_rule),
    "dart": (100, step_rule),
    "spot": (81, step_rule),  # not released: AGW's, by our choice
    "xmodal": (120, line_rule),
}
SIZES = {"xmodal": (256, 128, 12)}  # height, width, identities


@pytest.mark.parametrize("name", RULES)
def test_the_rate_follows_its_rule_at_every_epoch(name):
    recipe, (epochs, rule) = method_class(name).recipes["paper"], RULES[name]
    assert recipe.epochs == epochs
    rates = [recipe.lr * lr_factor(recipe, epoch) for epoch in range(epochs)]
    assert np.allclose(rates, [rule(epoch) for epoch in range(epochs)], rtol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_images_and_batches_have_the_released_size(name):
    recipe = method_class(name).recipes["paper"]
    batch = recipe.height, recipe.width, recipe.identities
    assert batch == SIZES.get(name, (288, 144, 8))
    assert recipe.images == 4 and recipe.replacement


def settings(name):
    """What a sampler is told."""
    recipe = method_class(name).recipes["paper"]
    return recipe.identities, recipe.images, recipe.replacement


DISTINCT = {settings(name): name for name in RULES}.values()  # one method of each kind


@pytest.mark.parametrize("name", DISTINCT)
def test_batches_hold_whole_identities_and_repeat_images(name):
    recipe = method_class(name).recipes["paper"]
    table = pd.DataFrame({"label": np.repeat(np.arange(20), 10)})
    table["modality"] = np.tile(np.repeat(["visible", "infrared"], 5), 20)
    sampler, twice = make_sampler(table, recipe, seed=0), []
    while np.size(twice) < 10_000:
        for rows in sampler.draw(0, len(twice)):
            own = rows.reshape(recipe.identities, 4)
            labels = table.label.to_numpy()[own]
            assert (labels == labels[:, :1]).all()
            assert len(set(labels[:, 0])) == recipe.identities
            twice.append(own[:, 0] == own[:, 1])
    share, n = np.mean(twice), np.size(twice)  # two slots, five images: one in five
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / n) ** 0.5


# --- views ----------------------------------------------------------------------------

N = 10_000
FLAT = torch.tensor([40, 120, 230], dtype=torch.uint8)
Z = normalise(to_float(FLAT[None, :, None, None])).flatten()
COLOURS = torch.stack(  # copies of R, G and B, grey, unchanged
    [*(Z[[k, k, k]] for k in range(3)), (Z @ torch.tensor(LUMA)).expand(3), Z]
)
PLAIN, COPY = [0, 0, 0, 0, 1], [1 / 3, 1 / 3, 1 / 3, 0, 0]
ADAPT = [1 / 4, 1 / 4, 1 / 4, 1 / 8, 1 / 8]
VIEWS = {  # colours of each view, chance of erasing, and its fill
    "agw": ([PLAIN, PLAIN], 0.0, FILL),
    "ddag": ([PLAIN, PLAIN], 0.0, FILL),
    "caj": ([PLAIN, COPY, ADAPT], 0.5, FILL),
    "afen": ([PLAIN, COPY, ADAPT], 0.5, FILL),
    "xmodal": ([PLAIN, PLAIN], 0.5, MEAN),
}


def views_of_flat_images(name):
    """The method's views, each [N, 3, 16, 8], of images of one colour, not padded."""
    recipe = method_class(name).recipes["paper"]
    recipe = replace(recipe, pad=0, depth=18, weights="none")
    images, rows = FLAT[None, :, None, None].repeat(N, 1, 16, 8), np.arange(N)
    generator, labels = torch_generator("pages", name), torch.zeros(N, dtype=torch.long)
    batch = Batch(images, images, labels, labels, rows, rows, None, None, generator)
    visible, infrared, _ = create(name, 4, recipe).views(batch)
    return [*visible.split(N), infrared]


def within_five_sigma(shares, chances):
    p = torch.as_tensor(chances, dtype=torch.float64)
    return ((shares - p).abs() <= 5 * (p * (1 - p) / N).sqrt()).all()


@pytest.mark.parametrize("name", VIEWS)
def test_views_have_the_released_chances(name):
    colours, erasing, fill = VIEWS[name]
    views = views_of_flat_images(name)
    assert len(views) == len(colours)
    for view, chances in zip(views, colours):
        pixels = view.flatten(2)  # [N, 3, 128]
        draws = torch.stack(
            [torch.isclose(pixels, c[:, None], 0, 1e-5).all(1).any(1) for c in COLOURS]
        )
        assert within_five_sigma(draws.double().mean(1), chances)
        erased = (pixels != pixels[:, :, :1]).flatten(1).any(1)
        assert within_five_sigma(erased.double().mean(), erasing)
        if chances is PLAIN and erasing:
            box = torch.isclose(pixels, torch.tensor(fill)[:, None]).all(1).any(1)
            assert torch.equal(box, erased)


# --- how to ---------------------------------------------------------------------------


def test_the_plan_of_how_to_reproduce_is_that_of_the_records():
    pages, _ = rerun("how_to_reproduce")
    assert pages and pages == committed("how_to_reproduce")


# --- what a reader meets first --------------------------------------------------------

FOLDED = ["index", "table1", "pocket", "ablation", "claims", "decisions"]


@pytest.mark.parametrize("name", FOLDED)
def test_code_of_a_results_page_is_folded(name):
    for cell in cells(NBS / f"{name}.ipynb", "code"):
        assert cell["metadata"].get("jupyter") == {"source_hidden": True}


@pytest.mark.parametrize("name", [*FOLDED, "errata"])
def test_a_results_page_begins_with_the_answer(name):
    """At most a screen of words, then an output, whatever folded code makes it."""
    words = []
    for cell in cells(NBS / f"{name}.ipynb"):
        if cell["cell_type"] == "markdown":
            words += "".join(cell["source"]).split()
        elif cell["outputs"]:
            break
    assert len(words) < 120


def test_the_readme_is_short_and_in_the_order_of_its_readers():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 900
    heads = re.findall(r"^## (.+)", text, re.M)
    assert heads == [
        "Two commands", "What holds", "On your data", "Use a trained model",
        "Where to read on", "What it is not for", "Licence",
    ]  # fmt: skip
    assert text.index("afen_network.png") < text.index("## Two commands")


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link
