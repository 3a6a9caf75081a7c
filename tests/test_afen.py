"""AFEN's picture says what its network does."""

import pandas as pd
import torch

from afen.backbone import output_shapes
from afen.core import project_root
from afen.fem import FEM
from afen.mecs import MECS
from afen.method import Recipe, create

PARTS = {
    "stem": "net.stems.infrared",
    "layer1": "net.trunk.layer1",
    "layer4": "net.trunk.layer4",
    "GeM": "head.pool",
    "neck": "head.neck",
    "classifier": "head.classifier",
}


def test_the_drawn_shapes_are_those_of_the_network():
    method = create("afen", 395, Recipe(weights="none")).eval()
    visible, infrared = torch.zeros(2, 1, 3, 288, 144)
    with torch.no_grad():
        shapes = output_shapes(method, lambda: method.head(method.net(visible, infrared)))
    kinds = {type(module): name for name, module in method.named_modules()}
    wanted = {part: shapes[name] for part, name in PARTS.items()}
    wanted |= {"MECS": shapes[kinds[MECS]], "FEM": shapes[kinds[FEM]]}
    table = pd.read_csv(project_root() / "figures" / "afen_network.csv", index_col="part")
    drawn = table["shape"].to_dict()
    assert drawn.pop("layer2") == drawn["MECS"] and drawn.pop("layer3") == drawn["FEM"]
    assert drawn == {part: "×".join(map(str, shape[1:])) for part, shape in wanted.items()}


def test_shapes_are_noted_while_a_network_runs_and_not_after():
    network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Identity())
    assert output_shapes(network, lambda: network(torch.zeros(2, 3))) == {
        "0": (2, 5), "1": (2, 5), "": (2, 5),
    }  # fmt: skip
    assert output_shapes(network, lambda: None) == {}
    assert not any(part._forward_hooks for part in network.modules())
