"""Every row of Table 1 in the paper's configuration: ResNet-50 or ViT-B, full size."""

import numpy as np
import pytest

from afen.method import method_names
from afen.people import write_tree
from afen.records import read_record
from afen.runs import (
    DEFAULTS,
    begin_record,
    end_record,
    make_plan,
    open_data,
    score,
    start,
)

LAYOUTS = ("regdb", "sysu")
# from chance, so the gradient is bounded; two images of two identities a modality
TRIAL = {"preset": "paper", "weights": "none", "clip": 5.0, "epochs": 1, "steps": 2}
TRIAL |= {"identities": 2, "images": 2}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A small rendered tree in each layout, at the size of real crops."""
    folder = tmp_path_factory.mktemp("rows")
    size = {"n_train": 4, "n_test": 2, "n_images": 2, "size": (128, 64)}
    return {name: write_tree(name, folder / name, **size) for name in LAYOUTS}


@pytest.mark.parametrize("place, method", list(enumerate(method_names())), ids=str)
def test_a_row_trains_and_scores_at_the_papers_size(trees, tmp_path, place, method):
    dataset = LAYOUTS[place % 2]  # in turn: the layouts are tested in test_train
    given = {"dataset": dataset, "root": str(trees[dataset]), "out": str(tmp_path)}
    plan = make_plan(DEFAULTS | TRIAL | given | {"method": method})
    assert max(plan.recipe.height, plan.recipe.width) >= 256
    data = open_data(plan)
    record, run = begin_record(plan, data), start(plan, data)
    metrics = run.fit(progress=False)
    features, scores = score(plan, data, run)
    assert np.isfinite(metrics.loss).all() and np.isfinite(features).all()
    assert len(features) == len(data.split.test)
    assert read_record(end_record(record, plan, data, run, scores))["status"] == "smoke"
