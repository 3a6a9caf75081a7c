"""A run's page: right, whole, escaped, without pictures of real people, and by keyboard."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from afen import findings, report
from afen.core import keyed_rng
from afen.datasets import load
from afen.evaluation import evaluate_trials
from afen.maps import LAST, inner_maps, looks
from afen.method import POCKET_RECIPE, create, method_names
from afen.people import write_tree
from afen.records import fingerprint, new_record, read_record, write_record
from afen.runs import DEFAULTS, carry_out, make_plan

SIZE = {"n_train": 4, "n_test": 6, "n_images": 2, "size": (64, 32)}
FEW = {"epochs": 2, "steps": 1, "identities": 2, "images": 2, "watch": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished tiny run, `run`, and its images, `tree`."""
    here = tmp_path_factory.mktemp("report")
    tree = write_tree("regdb", here / "tree", **SIZE)
    which = {"dataset": "regdb", "root": str(tree), "preset": "pocket", "out": str(here / "run")}
    carry_out(make_plan(DEFAULTS | FEW | which))
    return here


@pytest.fixture(scope="module")
def evidence(place):
    return report.gather(place / "run", root=str(place / "tree"), device="cpu")


@pytest.fixture(scope="module")
def record(place):
    return read_record(place / "run" / "record.json")


@pytest.fixture(scope="module")
def written(place):
    return report.write(place / "run", root=str(place / "tree"), device="cpu")


# --- lists and what is counted from them ----------------------------------------------


@pytest.mark.parametrize("layout", ["regdb", "sysu", "llcm"])
def test_lists_give_the_scores_of_every_protocol(layout, tmp_path):
    split = load(layout, write_tree(layout, tmp_path / "tree", **SIZE | {"size": (16, 8)}))
    features = keyed_rng("lists", layout).normal(size=(len(split.test), 4))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    scores = evaluate_trials(features, split)
    lists = findings.ranked_lists(features, split)
    assert [one.setting for one in lists] == list(scores)
    for one in lists:
        table, expected = one.table.dropna(), scores[one.setting][0]
        assert len(one.table) - len(table) == expected.n_dropped
        assert table.AP.mean() == pytest.approx(expected.mAP)
        assert table.INP.mean() == pytest.approx(expected.mINP)
        for k in (1, 5, 20):
            assert (table["rank"] <= k).mean() == pytest.approx(expected.rank(k))


def test_confusions_count_every_wrong_first_image(evidence):
    for one in evidence.lists:
        pairs = findings.confusions(one, evidence.test)
        ids = evidence.test.identity.to_numpy()
        assert pairs.times.sum() == (ids[one.near[:, 0]] != one.table.identity).sum()
        assert (ids[pairs.image] == pairs.identity).all()
        assert (ids[pairs.nearest] == pairs.taken).all()


def test_the_hardest_query_of_each_person_is_listed(evidence):
    one = evidence.lists[0]
    worst, ranks = findings.hardest(one, 3), one.table.groupby("identity")["rank"].max()
    expected = ranks.sort_values(ascending=False).head(3)
    assert worst["rank"].tolist() == expected.tolist()
    assert (worst["rank"].to_numpy() == ranks[worst.identity].to_numpy()).all()


def test_no_image_finds_itself_within_its_modality():
    """Of people with one image in each modality nobody is found."""
    test = pd.DataFrame({"identity": [1, 2, 1, 2], "camera": [1, 1, 2, 2]})
    test["modality"] = ["visible", "visible", "infrared", "infrared"]
    within = findings.lists_within(np.eye(4), test, "visible")
    assert within["rank"].isna().all() and within.image.tolist() == [0, 1]


def test_groups_leave_out_queries_without_a_match():
    table = pd.DataFrame({"identity": [1, 1, 2], "image": [0, 1, 2], "camera": [1, 1, 2]})
    table = table.assign(rank=[1, 3, np.nan], AP=[1, 0.5, np.nan], INP=1.0)
    (row,) = findings.scores_by(table, "camera").to_dict("records")
    assert row == {"camera": 1, "people": 1, "queries": 2, "rank1": 50.0, "mAP": 75.0}


# --- maps -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", method_names())
def test_every_method_can_be_looked_into(name, evidence):
    network = create(name, 4, replace(POCKET_RECIPE, flip=False, size="tiny")).eval()
    modality = evidence.test.modality.to_numpy()
    seen = inner_maps(network, evidence.data.test, modality, [0, 13])
    expected = set(looks(network))
    assert expected == set(seen[0]) == set(seen[13])
    assert (LAST in expected) == (name != "pmt")
    assert any("MECS" in title for title in expected) == (name == "afen")


def test_modules_in_the_stems_see_their_own_modality(evidence):
    network = create("afen", 4, POCKET_RECIPE, mecs_after="stem", fem="none").eval()
    seen = inner_maps(network, evidence.data.test, evidence.test.modality.to_numpy(), [0, 13])
    gates = [[t for t in seen[row] if "gates" in t] for row in (0, 13)]
    assert gates == [["MECS gates, visible stem"], ["MECS gates, infrared stem"]]


def test_maps_are_those_of_the_modules(evidence):
    network, packed = evidence.run.network, evidence.data.test
    seen = inner_maps(network, packed, evidence.test.modality.to_numpy(), [3])[3]
    inside = {}
    for kind, name in (("ChannelAttention", "gates"), ("FeatureRefinement", "branch")):
        (module,) = [m for m in network.modules() if type(m).__name__ == kind]
        module.register_forward_hook(lambda m, x, y, name=name: inside.update({name: (m, x[0])}))
    with torch.no_grad():
        network.embed(packed.batch([3]), "visible")
        attention, x = inside["gates"]
        refinement, f = inside["branch"]
        gate, smooth = attention.attention(x)[0, :, 0, 0], refinement.smooth(f)
    for module, _ in inside.values():
        module._forward_hooks.clear()
    title = next(t for t in seen if "gates" in t)
    np.testing.assert_allclose(seen[title][-1], gate, rtol=2e-3)
    high = ((f - smooth) ** 2).mean(1).sqrt()[0]
    title = next(t for t in seen if "high" in t)
    np.testing.assert_allclose(seen[title], high, rtol=2e-3)


# --- the page -------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_nothing(written):
    text = written.read_text()
    assert len(text) < 5_000_000
    assert not re.search(r'(src|href)\s*=\s*"(?!data:|#)', text) and "@import" not in text
    assert "default-src 'none'" in text


def test_the_page_says_what_the_record_says(written, record):
    text = written.read_text()
    for entry in record["scores"].values():
        assert f"{100 * entry['mean']['mAP']:.1f}" in text
    for word in (record["id"], record["code"]["revision"], record["data"]["hash"], "smoke"):
        assert word in text
    assert "Watched scores" in text and "By attribute" in text


def test_text_from_files_is_text(evidence, record):
    evil = '</script><script>alert("x")</script>'
    test = evidence.test.assign(path=f"visible/{evil}/1.png", camera=evil)
    test["identity"] = [f"{evil}{who}" for who in test.identity]
    lists = [
        replace(one, table=one.table.assign(identity=test.identity.to_numpy()[one.query], camera=evil))
        for one in evidence.lists
    ]
    split = replace(evidence.data.split, test=test, name="photographs", root=evidence.data.split.root)
    mine = replace(evidence, data=replace(evidence.data, split=split), lists=lists)
    strange = record | {"command": evil, "reason": evil}
    mine_attributes = report.attributes
    try:
        report.attributes = lambda split: None  # of people with such names there are none
        text = report.page(strange, mine)
    finally:
        report.attributes = mine_attributes
    assert text.count("<script") == 2 and "alert(" in text  # the page's own two
    assert text.count("</script>") == 2
    data = re.search(r'id="data">(.*)</script>\n<script>', text, re.S)[1]
    assert json.loads(data)["images"]["0"]["who"].startswith(evil)
    card = report.model_card("`{command}`", strange | {"command": "`<b>`|"}, None, "x")
    assert card == "`'<b>'\\|`"


def test_pictures_of_real_people_only_if_asked(place, evidence):
    real = replace(evidence, data=replace(evidence.data, rendered=False))
    asked = {None: False, True: True, False: False}
    for images, shown in asked.items():
        pictures = real.data.rendered if images is None else images
        data = report.page_data(replace(real, pictures=pictures))
        image = data["images"][0]
        assert (image["picture"] is not None) == shown == bool(image["maps"])
        assert any("agree" in x for x in data["settings"][0]["queries"][0]["list"]) == shown


def test_gather_shows_no_pictures_of_what_is_not_rendered(place, monkeypatch):
    data = report.run_data
    monkeypatch.setattr(report, "run_data", lambda *a: replace(data(*a), rendered=False))
    root = str(place / "tree")
    assert not report.gather(place / "run", root=root, device="cpu").pictures
    assert report.gather(place / "run", True, root, "cpu").pictures


def test_the_pictures_of_large_sets_are_few(evidence, monkeypatch):
    ids = evidence.test.identity.to_numpy()
    monkeypatch.setattr(report, "PICTURES", 12)
    monkeypatch.setattr(report, "DEPTH", 2)
    chosen = report.choose_all(evidence.lists, ids)
    assert 0 < len(chosen[0]) < len(evidence.lists[0].query)
    assert len(report.page_data(evidence)["images"]) <= 12
    table = evidence.lists[0].table
    hard = table.AP[table["rank"] == table["rank"].max()].idxmin()  # of equals the lower AP
    assert len(chosen[0]) == 1 or hard in chosen[0]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_collapsed_network_has_a_page(evidence, record):
    """All features are equal: nobody stands apart, and nothing fails."""
    same = np.zeros_like(evidence.features)
    same[:, 0] = 1
    lists = findings.ranked_lists(same, evidence.data.split)
    text = report.page(record, replace(evidence, features=same, lists=lists))
    assert "all in one place" in text and not re.search(r">\s*nan|:NaN", text)


def test_a_list_ends_with_the_first_match(evidence):
    ids = evidence.test.identity.to_numpy()
    for one in evidence.lists:
        for position in range(len(one.query)):
            shown = report.shown_rows(one, position, ids)
            places = [place for place, _ in shown]
            first = one.table["rank"][position]
            assert places[: report.DEPTH] == [*range(1, min(report.DEPTH, 12) + 1)]
            assert int(first) in places


def copied(place, tmp_path):
    return shutil.copytree(place / "run", tmp_path / "copy")


def test_without_weights_or_images_the_page_says_so(place, tmp_path, capsys):
    folder = copied(place, tmp_path)
    (folder / "weights.safetensors").unlink()
    assert "There are no weights" in report.write(folder, root=str(place / "tree")).read_text()
    assert "There are no weights" in capsys.readouterr().out
    other = write_tree("regdb", tmp_path / "other", **SIZE | {"seed": 1})
    shutil.copy(place / "run" / "weights.safetensors", folder)
    text = report.write(folder, root=str(other), device="cpu").read_text()
    assert "are not those that run" in text and 'id="queries"' not in text
    assert "not measured here" in (folder / "model_card.md").read_text()


def test_a_run_that_failed_has_a_page_too(record, tmp_path):
    failed = new_record(record["parameters"], record["data"])
    failed["command"] = "papermill <x>"
    write_record(failed, tmp_path)
    text = report.write(tmp_path).read_text()
    assert "did not finish" in text and "No epoch ended" in text and "papermill &lt;x&gt;" in text


def test_an_edited_record_is_refused(place, tmp_path):
    folder = copied(place, tmp_path)
    changed = json.loads((folder / "record.json").read_text())
    changed["reason"] = "better"
    assert changed["fingerprint"] != fingerprint(changed)
    (folder / "record.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="was changed after it was written"):
        report.write(folder)


def test_a_method_without_mecs_says_so(evidence):
    network = create("agw", 4, POCKET_RECIPE).eval()
    mine = replace(evidence, run=replace(evidence.run, network=network))
    section = report.queries_section(mine, report.page_data(mine))
    assert "AGW, as it was run, has no MECS" in section


def test_the_model_card_has_no_field_left(written, record):
    card = (written.parent / "model_card.md").read_text()
    assert not re.findall(r"\{[\w.]+\}", card)
    assert record["id"] in card and "| visible | 1 |" in card
    with pytest.raises(KeyError):
        report.model_card("`{nothing.here}`", record)


# --- in a browser ---------------------------------------------------------------------

@pytest.fixture
def tab(browser, written):
    """The page in a tab that notes errors and requests."""
    page = browser.new_page()
    page.trouble = []
    page.on("console", lambda m: m.type in ("error", "warning") and page.trouble.append(m.text))
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("request", lambda r: page.trouble.append(r.url)
            if not r.url.startswith(("data:", written.as_uri())) else None)  # fmt: skip
    page.goto(written.as_uri())
    yield page
    page.close()
    assert page.trouble == []


def chosen(tab, name="query-list"):
    """Where in a list box the choice stands."""
    found = tab.locator(f"#{name} [role=option]").evaluate_all(
        "all => all.flatMap((o, i) => o.ariaSelected === 'true' ? [i] : [])"
    )
    assert len(found) == 1
    return found[0]


def test_the_queries_are_walked_by_keyboard(tab):
    queries = tab.locator("#query-list")
    assert queries.locator("[role=option]").count() == 12 and chosen(tab) == 0
    queries.focus()
    for key, place in (("ArrowRight", 1), ("End", 11), ("ArrowRight", 11), ("ArrowLeft", 10),
                       ("Home", 0), ("PageDown", 10), ("PageUp", 0)):  # fmt: skip
        tab.keyboard.press(key)
        assert chosen(tab) == place, key
    assert queries.get_attribute("aria-activedescendant") == "query-list-0"
    before = tab.locator("#asked").inner_text()
    tab.keyboard.press("End")
    assert tab.locator("#asked").inner_text() != before
    tab.keyboard.press("Tab")  # to the ranked list
    assert tab.evaluate("document.activeElement.id") == "ranked"
    tab.keyboard.press("End")
    last = tab.locator("#ranked [role=option]").count() - 1
    assert chosen(tab, "ranked") == last
    title = tab.locator("#pair h4").nth(1).inner_text()
    place = tab.locator("#ranked .mark").nth(last).inner_text().split()[0]
    assert title == f"Place {place} of its list"


def test_marks_are_those_of_the_lists(tab, evidence):
    ids = evidence.test.identity.to_numpy()
    one = evidence.lists[0]
    expected = ["✓" if ids[r] == ids[one.query[0]] else "✗"
                for _, r in report.shown_rows(one, 0, ids)]  # fmt: skip
    marks = tab.locator("#ranked .mark").all_inner_texts()
    assert [mark.split()[1] for mark in marks] == expected


def test_arrows_act_on_the_queries_from_anywhere_and_a_field_keeps_them(tab):
    tab.keyboard.press("ArrowRight")
    assert chosen(tab) == 1
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "search"
    tab.keyboard.type("a/b")
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#search").input_value() == "a/b"
    assert tab.locator("#count").inner_text() == "0 of 12 queries"
    assert not tab.locator("#one").is_visible()
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement.id") == "query-list"
    assert tab.locator("#count").inner_text() == "12 of 12 queries"


def test_filters_keep_what_they_say(tab, evidence):
    table = evidence.lists[0].table
    wanted = {"first": (table["rank"] == 1).sum(), "late": (table["rank"] > 1).sum()}
    for name, n in wanted.items():
        tab.locator("#rank").select_option(name)
        assert tab.locator("#count").inner_text() == f"{n} of 12 queries"
    tab.locator("#rank").select_option("any")
    tab.locator("#order").select_option("rank")
    ranks = [int(x) for x in tab.locator("#query-list .mark").all_inner_texts()]
    assert ranks == sorted(ranks, reverse=True)
    who = str(table.identity[0])
    tab.locator("#search").fill(who)
    assert tab.locator("#query-list [role=option]").count() == (table.identity == int(who)).sum()
    tab.locator("#search").fill("")
    tab.locator("#setting").select_option("1")
    assert "infrared" in tab.locator("#asked").inner_text()
    assert tab.locator("#camera option").all_inner_texts() == ["all", "2"]


def test_a_hard_query_opens_from_its_table(tab, evidence):
    worst = findings.hardest(evidence.lists[1]).iloc[0]
    tab.locator("a[data-setting='1']").first.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "query-list"
    assert f"rank {worst['rank']:.0f};" in tab.locator("#asked").inner_text()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_is_dark_in_the_dark(tab, width):
    tab.set_viewport_size({"width": width, "height": 900})
    seen = {}
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        seen[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert seen == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 22, 22)"}


def test_every_control_and_picture_has_a_name(tab):
    kinds = "select, input, [role=listbox], [role=option], [role=img], img:not([alt])"
    unnamed = f"""() => [...document.querySelectorAll('{kinds}')].filter(
        e => !e.labels?.length && !e.getAttribute('aria-label')).length"""
    assert tab.evaluate(unnamed) == 0
    levels = tab.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => +h.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:]))


def test_the_page_opens_in_under_a_second(tab, written):
    tab.goto(written.as_uri())
    entry = "performance.getEntriesByType('navigation')[0]"
    took = tab.evaluate(f"{entry}.domContentLoadedEventEnd - {entry}.responseStart")
    assert took < 1000, f"{took:.0f} ms"
