"""Figures: what is written, that it repeats byte for byte, and that it says enough."""

import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from afen.figures import (
    CAPTIONS,
    RIGHT,
    SMOKE,
    STRIP,
    WRONG,
    caption,
    cmc_curve,
    cmc_table,
    distance_histograms,
    distance_table,
    is_smoke,
    learning_rate,
    loss_curves,
    ranked_lists,
    ranked_table,
    save,
    seed_points,
    style,
)

METRICS = pd.DataFrame(
    {
        "epoch": [0, 1, 2],
        "lr": [0.01, 0.1, 0.01],
        "loss": [3.0, 2.0, 1 / 3],
        "identity": [2.0, 1.5, 0.3],
        "triplet": [1.0, 0.5, 0.1],
        "seconds": [9.0, 9.0, 9.0],
    }
)
CURVES = {"all-single": np.linspace(0.3, 1, 20), "indoor": np.linspace(0.4, 1, 20)}
IDS = np.arange(12) % 4
DISTANCES = np.random.default_rng(0).random((12, 12))
QUERIES = list(np.random.default_rng(1).integers(0, 255, (2, 16, 8, 3), np.uint8))
LISTS = [QUERIES * 2, QUERIES]  # four images and two
CORRECT = [[True, False, True, False], [False, True]]
POINTS = pd.DataFrame(
    [
        (group, label, panel, seed, 50.0 + seed)
        for group, label in (("one", "a"), ("one", "b"), ("two", "c"))
        for panel in ("Rank-1", "mAP")
        for seed in range(3)
    ],
    columns=["group", "label", "panel", "seed", "value"],
)

# name -> the figure, and the table saved with it
DRAW = {
    "loss_curves": lambda **o: (loss_curves(METRICS, **o), METRICS),
    "learning_rate": lambda **o: (learning_rate(METRICS, **o), METRICS),
    "cmc_curve": lambda **o: (cmc_curve(CURVES, **o), cmc_table(CURVES)),
    "distance_histograms": lambda **o: (
        distance_histograms(DISTANCES, IDS, IDS, **o),
        distance_table(DISTANCES, IDS, IDS),
    ),
    "ranked_lists": lambda **o: (
        ranked_lists(QUERIES, LISTS, CORRECT, **o),
        ranked_table(CORRECT),
    ),
    "seed_points": lambda **o: (seed_points(POINTS, **o), POINTS),
}


def test_every_figure_has_a_caption():
    assert set(CAPTIONS) == set(DRAW)


@pytest.mark.parametrize("name", DRAW)
def test_four_files_that_repeat(name, tmp_path):
    (figure, data), (redrawn, _) = DRAW[name](), DRAW[name]()
    first = save(figure, tmp_path / "a" / name, data, CAPTIONS[name])
    for again in (figure, redrawn):
        second = save(again, tmp_path / "b" / name, data, CAPTIONS[name])
        for kind in ("svg", "png", "csv", "txt"):
            assert first[kind].read_bytes() == second[kind].read_bytes(), kind
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert written == {f"{name}.{kind}" for kind in first}

    assert first["csv"].read_text() == data.to_csv(index=False)
    pd.testing.assert_frame_equal(pd.read_csv(first["csv"]), data)
    ElementTree.parse(first["svg"])
    svg = first["svg"].read_text()
    assert CAPTIONS[name] in svg and "dc:date" not in svg
    with Image.open(first["png"]) as picture:
        assert picture.size[0] == 1000  # 5 inches at 200 dots
        assert picture.info["Description"].startswith(CAPTIONS[name])


@pytest.mark.parametrize("name", DRAW)
def test_rendered_data_carries_its_mark(name, tmp_path):
    plain, data = DRAW[name]()
    marked, _ = DRAW[name](smoke=True)
    assert is_smoke(marked) and not is_smoke(plain)
    files = [save(f, tmp_path / name, data, "A caption.") for f in (plain, marked)]
    assert all(path.name.startswith("smoke_") for path in files[1].values())
    assert SMOKE not in files[0]["svg"].read_text()
    assert SMOKE in files[1]["svg"].read_text()
    assert "Rendered data" in files[1]["txt"].read_text()
    assert files[0]["txt"].read_text() == "A caption.\n"
    marked.draw_without_rendering()
    (mark,) = marked.texts
    box, (width, height) = mark.get_window_extent(), marked.get_size_inches() * marked.dpi
    assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height
    across = name == "ranked_lists"  # the only one of images
    for axes in marked.axes:
        assert across or mark.get_bbox_patch().get_window_extent().y1 <= axes.get_tightbbox().y0
    # and the mark is seen: dark letters in the strip at the foot, or across the images
    sizes = [Image.open(f["png"]).size for f in files]
    picture = np.asarray(Image.open(files[1]["png"]).convert("L"), float)
    if across:
        plain = np.asarray(Image.open(files[0]["png"]).convert("L"), float)
        assert (np.abs(plain - picture) > 20).mean() > 0.01
    else:
        strip = sizes[1][1] - sizes[0][1]
        assert strip == pytest.approx(STRIP * 200, abs=1)
        assert (picture[-strip:] < 60).mean() > 0.01


def test_a_caption_names_data_and_seeds(tmp_path):
    text = caption("seed_points", "pocket-sysu", 3)
    assert text.startswith(CAPTIONS["seed_points"]) and "pocket-sysu, 3 seeds." in text
    paths = save(seed_points(POINTS, smoke=True), tmp_path / "points", POINTS, text)
    saved = paths["txt"].read_text(encoding="utf-8")
    assert saved.startswith(text) and "Rendered data" in saved


def test_an_axis_says_what_it_shows_and_its_unit():
    each = [(a.get_title(), a.get_xlabel()) for a in seed_points(POINTS).axes]
    assert each == [("", "Rank-1 [%]"), ("", "mAP [%]")]
    one = seed_points(POINTS, axis="mAP [%]").axes
    assert [(a.get_title(), a.get_xlabel()) for a in one] == [
        ("Rank-1", "mAP [%]"),
        ("mAP", "mAP [%]"),
    ]


def test_the_mark_is_named_once(tmp_path):
    figure = loss_curves(METRICS, smoke=True)
    paths = save(figure, tmp_path / "smoke_losses", METRICS, "A caption.")
    assert paths["svg"].name == "smoke_losses.svg"


def test_a_dot_in_the_name_is_kept(tmp_path):
    paths = save(loss_curves(METRICS), tmp_path / "caj-v1.0", METRICS, "A caption.")
    assert paths["png"].name == "caj-v1.0.png" and paths["png"].exists()


def test_figures_leave_pyplot_as_it_was():
    before = plt.get_fignums()
    with mpl.rc_context():
        mpl.rcdefaults()
        settings = mpl.rcParams.copy()
        for draw in DRAW.values():
            draw(smoke=True)
        assert mpl.rcParams == settings
    assert plt.get_fignums() == before


def test_lines_differ_without_colour():
    with style():
        looks = list(mpl.rcParams["axes.prop_cycle"])
    assert len({look["marker"] for look in looks}) == len(looks)
    figure = cmc_curve(CURVES)
    first, second = figure.axes[0].get_lines()
    assert first.get_marker() != second.get_marker()
    assert first.get_linestyle() != second.get_linestyle()


def test_losses_show_the_total_and_its_terms():
    lines = loss_curves(METRICS).axes[0].get_lines()
    shown = {line.get_label(): list(line.get_ydata()) for line in lines}
    assert shown == {
        "total": METRICS["loss"].tolist(),
        "identity": METRICS["identity"].tolist(),
        "triplet": METRICS["triplet"].tolist(),
    }


def test_a_single_epoch_is_seen():
    for line in loss_curves(METRICS.head(1)).axes[0].get_lines():
        assert line.get_marker() not in ("", "None", None)


def test_curves_are_drawn_from_the_table():
    table = cmc_table(CURVES)
    assert table["rank"].tolist() == list(range(1, 21))
    for line, name in zip(cmc_curve(CURVES).axes[0].get_lines(), CURVES, strict=True):
        np.testing.assert_allclose(line.get_ydata(), 100 * CURVES[name])
        assert f"{name} ({CURVES[name][0]:.1%})" == line.get_label()


def test_distance_shares_by_hand():
    table = distance_table(np.array([[0.0, 1.0], [0.9, 0.6]]), [7, 8], [7, 8], bins=2)
    assert table["low"].tolist() == [0, 0.5] and table["high"].tolist() == [0.5, 1]
    assert table["within"].tolist() == [0.5, 0.5]
    assert table["across"].tolist() == [0, 1]


def test_ranked_lists_tell_right_from_wrong_twice():
    figure = ranked_lists(QUERIES, LISTS, CORRECT)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["query", "1 ✓", "2 ✗", "3 ✓", "4 ✗", "query", "1 ✗", "2 ✓"]
    for axes in figure.axes:
        colour = axes.spines["left"].get_edgecolor()
        for sign, expected in (("✓", RIGHT), ("✗", WRONG)):
            if sign in axes.get_title():
                assert colour == mpl.colors.to_rgba(expected)


def test_seeds_are_dots_about_their_mean():
    points = POINTS.assign(value=POINTS.value.where(POINTS.label != "b"))
    left, right = seed_points(points).axes
    names = [tick.get_text() for tick in left.get_yticklabels()]
    assert names == ["one", "a", "b", "two", "c"]
    assert [left.get_xlabel(), right.get_xlabel()] == ["Rank-1 [%]", "mAP [%]"]
    line, dots, mean = left.get_lines()[:3]
    assert list(line.get_xdata()) == [50, 52] and set(line.get_ydata()) == {1}
    assert list(dots.get_xdata()) == [50, 51, 52] and set(mean.get_xdata()) == {51}
    (missing,) = left.texts
    assert missing.get_text() == "not run" and missing.get_position()[1] == 2


def test_panels_that_do_not_fill_the_grid():
    axes = seed_points(POINTS, columns=1).axes
    assert len(axes) == 2
    third = POINTS[POINTS.panel == "mAP"].assign(panel="mINP")
    three = pd.concat([POINTS, third])
    assert [a.axison for a in seed_points(three, columns=2).axes] == [True] * 3 + [False]


REFUSALS = [
    ("no column 'loss'", lambda: loss_curves(METRICS.drop(columns="loss"))),
    ("no column 'lr'", lambda: learning_rate(METRICS.drop(columns="lr"))),
    ("no row", lambda: loss_curves(METRICS.head(0))),
    ("lengths []", lambda: cmc_curve({})),
    ("lengths [1, 2]", lambda: cmc_curve({"a": [1], "b": [0, 1]})),
    ("for 12 query and 4 gallery", lambda: distance_table(DISTANCES, IDS, IDS[:4])),
    ("of two", lambda: distance_table(np.ones((2, 2)), [1, 1], [1, 1])),
    ("of two", lambda: distance_table(np.ones((2, 2)), [1, 1], [2, 2])),
    ("one list of images", lambda: ranked_lists(QUERIES, LISTS, CORRECT[:1])),
    ("one list of images", lambda: ranked_lists(QUERIES[:1], LISTS, CORRECT)),
    ("one list of images", lambda: ranked_lists([], [], [])),
    ("0 rows", lambda: seed_points(POINTS.head(0))),
    ("with label, panel, seed, value", lambda: seed_points(POINTS.drop(columns="seed"))),
    ("Seed 0 of 'a' is twice", lambda: seed_points(POINTS.assign(seed=0))),
]


@pytest.mark.parametrize(("words", "call"), REFUSALS)
def test_one_clear_sentence(words, call):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)
