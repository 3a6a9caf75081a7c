"""Galleries of crops: what is refused of folders and of saved ones."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from afen import datasets
from afen.retrieval import Gallery, list_crops
from afen.trained import TrainedRun


@pytest.fixture
def gallery(tmp_path):
    """Two crops and their features by a run that is no more than its name and weights."""
    run = TrainedRun({"id": "folder-agw"}, None, None, torch.device("cpu"), "weights of a")
    crops = pd.DataFrame({"path": ["a.png", "b.png"], "modality": ["visible"] * 2})
    small = np.zeros((2, 128), np.float32)
    return Gallery(run, tmp_path, crops, torch.eye(2), small)


def test_a_folder_that_may_not_be_opened_is_said(tmp_path, monkeypatch):
    for name in ("here", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    entries = datasets._entries

    def refuse(place):
        if str(place).endswith("closed"):
            raise PermissionError(place)
        return entries(place)

    monkeypatch.setattr(datasets, "_entries", refuse)
    with pytest.raises(PermissionError, match="closed may not be opened"):
        list_crops(tmp_path, "visible")


def test_a_gallery_opens_with_its_own_weights_only(gallery, tmp_path):
    """A run on other photographs, or trained again, has the same name."""
    path = gallery.save(tmp_path / "g.npz")
    assert Gallery.open(path, gallery.run).crops.equals(gallery.crops)
    other = replace(gallery.run, weights="weights of b")
    with pytest.raises(ValueError, match="made with other weights.*make it again"):
        Gallery.open(path, other)
    held = dict(np.load(path))
    del held["weights"]  # as earlier code wrote them
    np.savez(path, **held)
    with pytest.raises(ValueError, match="make it again"):
        Gallery.open(path, gallery.run)
