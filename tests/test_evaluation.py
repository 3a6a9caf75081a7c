"""The evaluation against the released code's numbers, a plain loop, and by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from afen import evaluation
from afen.evaluation import (
    PROTOCOLS,
    RANKS,
    RERANKED,
    Scores,
    average,
    average_precision,
    cosine_distances,
    evaluate,
    evaluate_naive,
    evaluate_trials,
    inverse_penalty,
    rerank,
    rerank_naive,
    may_see_naive,
    summarise,
)

GOLDEN = Path(__file__).parent / "golden"
INPUTS = ("distances", "query_ids", "gallery_ids", "query_cams", "gallery_cams")
CASES = [
    ("eval_sysu_all_single", "sysu"),
    ("eval_sysu_all_multi", "sysu"),
    ("eval_sysu_indoor_single", "sysu"),
    ("eval_regdb", "regdb"),
]


def assert_same(first, second):
    np.testing.assert_allclose(first.cmc, second.cmc, atol=1e-12, rtol=0)
    np.testing.assert_allclose(first.mAP, second.mAP, atol=1e-12, rtol=0)
    np.testing.assert_allclose(first.mINP, second.mINP, atol=1e-12, rtol=0)
    assert (first.n_queries, first.n_dropped) == (second.n_queries, second.n_dropped)


def outcome(form, case):
    try:
        return form(*case)
    except ValueError as error:
        return str(error)


def unit_rows(features):
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


@pytest.mark.parametrize("form", [evaluate, evaluate_naive])
@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_released_code(name, protocol, form):
    stored = np.load(GOLDEN / f"{name}.npz")
    arguments = {key: stored[key] for key in INPUTS if key in stored}
    scores = form(**arguments, protocol=protocol)
    np.testing.assert_allclose(scores.cmc, stored["cmc"], atol=1e-6, rtol=0)
    assert abs(scores.mAP - stored["mAP"]) < 1e-9
    assert abs(scores.mINP - stored["mINP"]) < 1e-9
    assert scores.n_queries + scores.n_dropped == len(stored["query_ids"])


def random_case(seed, protocol):
    """Few distinct distances, so ties everywhere, and few identities and cameras."""
    rng = np.random.default_rng([seed, PROTOCOLS.index(protocol)])
    n_query, n_gallery = rng.integers(1, 30), rng.integers(1, 45)
    n_identities = rng.integers(1, 35)
    distances = rng.integers(-5, rng.integers(2, 60), (n_query, n_gallery)) / 8
    ids = [rng.integers(0, n_identities, n) for n in distances.shape]
    cams = [rng.integers(1, 7, n) for n in distances.shape]
    return distances, *ids, *cams, protocol


@pytest.mark.parametrize("block", [None, 50])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_fast_equals_loop(protocol, block, monkeypatch):
    if block:  # several blocks of queries instead of one
        monkeypatch.setattr(evaluation, "BLOCK", block)
    scored = 0
    for seed in range(150):
        case = random_case(seed, protocol)
        slow, fast = outcome(evaluate_naive, case), outcome(evaluate, case)
        if isinstance(slow, str):
            assert fast == slow
        else:
            assert_same(fast, slow)
            scored += 1
    assert scored > 100


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64])
def test_types_and_tensors_give_the_same(dtype):
    rng = np.random.default_rng(3)
    distances = rng.integers(0, 9, (12, 20)).astype(dtype)
    ids = [rng.integers(0, 5, n) for n in distances.shape]
    expected = evaluate_naive(distances, *ids)
    assert_same(evaluate(distances, *ids), expected)
    tensors = [torch.from_numpy(a) for a in (distances, *ids)]
    assert_same(evaluate(*tensors), expected)
    assert_same(evaluate(distances.tolist(), *(list(i) for i in ids)), expected)


def test_by_hand():
    # matches at ranks 1, 3 and 6; identity 8 has the two images of ranks 2 and 4
    scores = evaluate([[0, 1, 2, 3, 4, 5]], [7], [7, 8, 7, 8, 9, 7])
    assert scores.mAP == pytest.approx((1 + 2 / 3 + 3 / 6) / 3, abs=1e-15)
    assert scores.mINP == 0.5
    assert scores.rank(1) == 1


def test_cmc_counts_images_or_identities():
    case = [[0, 1, 2, 3]], [7], [8, 8, 9, 7], [6], [1, 1, 1, 1]
    images, identities = (evaluate(*case, protocol=p) for p in ("regdb", "sysu"))
    assert np.flatnonzero(images.cmc)[0] + 1 == 4
    assert np.flatnonzero(identities.cmc)[0] + 1 == 3
    assert images.mAP == identities.mAP == 1 / 4


def test_sysu_rule_hides_camera_2_from_camera_3_whoever_is_on_it():
    # one stranger on camera 2 is nearer than the match
    for query_cam, stranger_cam, rank in [(3, 2, 1), (6, 2, 2), (3, 1, 2)]:
        cams = [query_cam], [stranger_cam, 1]
        scores = evaluate([[0, 1]], [7], [8, 7], *cams, protocol="sysu")
        assert scores.mAP == 1 / rank


def test_llcm_rule_hides_the_same_identity_on_the_same_camera():
    same = evaluate([[0, 1, 2]], [7], [7, 8, 7], [4], [4, 4, 5], "llcm")
    assert same.mAP == 1 / 2  # the image at rank 1 is hidden, the stranger is not
    other = evaluate([[0, 1, 2]], [7], [7, 8, 7], [1], [4, 4, 5], "llcm")
    assert other.rank(1) == 1


def test_ties_rank_in_gallery_order():
    assert evaluate([[1.0, 1.0]], [7], [7, 8]).rank(1) == 1
    assert evaluate([[1.0, 1.0]], [7], [8, 7]).rank(1) == 0
    # past the length where unstable sorts begin to swap equal elements
    gallery_ids = np.arange(400)
    for place in (0, 13, 399):
        scores = evaluate(np.zeros((1, 400)), [place], gallery_ids)
        assert scores.mAP == 1 / (place + 1)


def test_queries_without_a_match_leave_every_denominator():
    distances = [[0, 1], [0, 1], [1, 0]]
    scores = evaluate(distances, [7, 99, 7], [7, 8])
    assert (scores.n_queries, scores.n_dropped) == (2, 1)
    assert scores.rank(1) == 0.5 and scores.mAP == 0.75 and scores.mINP == 0.75


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_small_gallery_keeps_its_last_value(protocol):
    scores = evaluate([[0, 1, 2]], [9], [7, 8, 9], [6], [1, 1, 1], protocol)
    assert scores.cmc.tolist() == [0, 0] + [1] * (RANKS - 2)


@pytest.mark.parametrize(
    "change",
    [lambda d: d - 100, lambda d: 3 * d, lambda d: -1 / (1 + d), lambda d: np.exp(d)],
    ids=["offset", "scale", "negative", "curved"],
)
def test_only_the_order_counts(change):
    rng = np.random.default_rng(5)
    distances = rng.random((30, 50))
    ids, gallery_ids = rng.integers(0, 8, 30), rng.integers(0, 8, 50)
    before = evaluate(distances, ids, gallery_ids)
    assert_same(evaluate(change(distances), ids, gallery_ids), before)
    assert evaluate(-distances, ids, gallery_ids).mAP != before.mAP


SQUARE, IDS = np.eye(2), [1, 2]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("did you mean 'sysu'", (SQUARE, IDS, IDS, IDS, IDS, "sisu")),
        ("give a matrix", ([0.1, 0.2], IDS, IDS)),
        ("give a matrix", (np.zeros((2, 2, 2)), IDS, IDS)),
        ("query set is empty", (np.zeros((0, 2)), [], IDS)),
        ("gallery set is empty", (np.zeros((2, 0)), IDS, [])),
        ("of query 1 and gallery image 0", ([[0, 0], [np.nan, 0]], IDS, IDS)),
        ("2 distances are not finite", ([[0, np.inf], [-np.inf, 0]], IDS, IDS)),
        ("query identities have shape (3,)", (SQUARE, [1, 2, 3], IDS)),
        ("gallery identities have shape (2, 1)", (SQUARE, IDS, [[1], [2]])),
        ("query cameras have shape (1,)", (SQUARE, IDS, IDS, [3], IDS, "sysu")),
        ("gallery cameras have shape (3,)", (SQUARE, IDS, IDS, IDS, [1, 2, 3])),
        ("give the query cameras", (SQUARE, IDS, IDS, None, None, "sysu")),
        ("give the gallery cameras", (SQUARE, IDS, IDS, IDS, None, "llcm")),
        ("None of the 2 queries", (SQUARE, IDS, [3, 4])),
        ("None of the 2 queries", (SQUARE, [1, 1], [1, 1], [3, 3], [2, 2], "sysu")),
    ],
)
def test_one_clear_sentence(words, arguments):
    with pytest.raises(ValueError) as caught:
        evaluate(*arguments)
    message = str(caught.value)
    assert words in message and "\n" not in message


TWO = {"query_cams": [3, 6], "gallery_cams": [1, 2], "protocol": "sysu"}
OUTSIDE = [
    ("query cameras are not whole numbers (the first is 'cam3')", {"query_cams": ["cam3", "cam6"]}),
    ("query cameras are not whole numbers (the first is '3')", {"query_cams": ["3", "6"]}),
    ("query cameras are not whole numbers", {"query_cams": [b"3", b"6"]}),
    ("gallery cameras are not whole numbers", {"gallery_cams": [True, True]}),
    ("gallery cameras are not whole numbers", {"gallery_cams": [1, None]}),
    ("gallery cameras are not whole numbers", {"gallery_cams": [1, np.nan]}),
    ("gallery cameras are not whole numbers", {"gallery_cams": [1, 2.5]}),
    ("There is no query camera 0", {"query_cams": [2, 0]}),
    ("There is no gallery camera 7", {"gallery_cams": [1, 7]}),
    ("There is no query camera 10", {"query_cams": [1, 10], "protocol": "llcm"}),
    ("query identities are not whole numbers", {"query_ids": [1, np.nan]}),
    ("query identities are not whole numbers", {"query_ids": [1, None]}),
    ("gallery identities are not whole numbers", {"gallery_ids": [1.5, 2]}),
    ("gallery identities are not whole numbers", {"gallery_ids": [1j, 2]}),
    ("One side has text", {"gallery_ids": ["1", "2"]}),
    ("Distances are <U", {"distances": [["0", "1"], ["1", "0"]]}),
    ("Distances are complex128", {"distances": SQUARE * 1j}),
    ("Distances are bool", {"distances": SQUARE > 0}),
    ("Distances are object", {"distances": SQUARE.astype(object)}),
    ("have 9223372036854775808, which", {"query_ids": np.array([2**63, 1], np.uint64)}),
    ("query identities have 18446744073709551616, which", {"query_ids": [2**64, 1]}),
    ("numbers below 2**53", {"gallery_ids": [1, 2.0**53]}),
    ("numbers below 2**24", {"gallery_ids": np.array([1, 2**24], np.float32)}),
    ("loses its mask", {"distances": np.ma.masked_equal(SQUARE, 0)}),
    ("loses its mask", {"gallery_ids": np.ma.masked_equal([1, 2], 2)}),
]


@pytest.mark.parametrize(("words", "change"), OUTSIDE)
def test_what_comes_from_outside_is_checked(words, change):
    usual = {"distances": SQUARE, "query_ids": IDS, "gallery_ids": IDS} | TWO
    evaluate(**usual)
    with pytest.raises(ValueError) as caught:
        evaluate(**usual | change)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [list, np.array, np.float64, torch.tensor, pd.Series, "object"])
def test_cameras_of_every_kind_of_number_hide(kind):
    """One stranger on camera 2 is nearer than the match."""
    make = (lambda v: np.array(v, object)) if kind == "object" else kind
    cams = [make([3]), make([2, 1])]
    assert evaluate([[0, 1]], [7], [8, 7], *cams, protocol="sysu").mAP == 1


@pytest.mark.parametrize("make", [list, np.array, lambda v: np.array(v, object), np.bytes_])
def test_identities_may_be_text(make):
    scores = evaluate([[0, 1], [0, 1]], make(["a", "b"]), ["a", "b"])
    assert scores.mAP == 0.75 and scores.n_dropped == 0


BIG = 2**60  # as floats, it and its neighbours are one


@pytest.mark.parametrize("kinds", [("uint64", "int64"), ("int64", "uint64"), ("O", "uint64")])
def test_large_identities_of_two_kinds_stay_apart(kinds):
    query, gallery = map(np.array, ([BIG], [BIG + 1, BIG]), kinds)
    scores = evaluate([[0.1, 0.2]], query, gallery)
    assert scores.rank(1) == 0 and scores.mAP == 0.5
    assert evaluate([[0.1, 0.2]], [7.0], np.array([8, 7], np.uint64)).mAP == 0.5


def test_a_list_without_a_match_has_no_precision():
    for measure in (average_precision, inverse_penalty):
        with pytest.raises(ValueError, match="no match"):
            measure([False, False])


def test_may_see_is_total():
    assert all(may_see_naive(1, 1, 1, 1, p) for p in ("regdb", "sysu"))
    assert not may_see_naive(1, 1, 1, 1, "llcm")


def test_scores():
    scores = Scores(np.linspace(0.05, 1, RANKS), 0.25, 0.125, 8, 2)
    for text in ("rank-1 5.00%", "mAP 25.00%", "mINP 12.50%", "8 queries, 2 dropped"):
        assert text in repr(scores)
    for k in (0, 21):
        with pytest.raises(ValueError, match="ask for 1 to 20"):
            scores.rank(k)
    with pytest.raises(AttributeError):
        scores.mAP = 1.0


def test_average_and_summary():
    scores = [Scores(np.full(RANKS, v), v / 2, v / 4, 10, 1) for v in (0.2, 0.3, 0.7)]
    mean, summary = average(scores), summarise(scores)
    assert mean.rank(5) == pytest.approx(0.4) and mean.mINP == pytest.approx(0.1)
    assert (mean.n_queries, mean.n_dropped) == (30, 3)
    assert list(summary) == ["rank1", "rank5", "rank10", "rank20", "mAP", "mINP"]
    assert summary["mAP"]["std"] == pytest.approx(np.std([0.1, 0.15, 0.35], ddof=1))
    assert summary["mAP"]["n"] == 3
    assert summarise(scores[:1])["rank1"]["std"] is None
    for form in (average, summarise):
        with pytest.raises(ValueError, match="no scores"):
            form([])


@pytest.mark.parametrize("kind", ["numpy", "float32", "float16", "bfloat16"])
def test_cosine_distances(kind):
    rng = np.random.default_rng(2)
    query, gallery = (unit_rows(rng.normal(size=(n, 64))) for n in (5, 7))
    pair, close = (query, gallery), 1e-12
    if kind != "numpy":
        dtype = getattr(torch, kind)
        pair = [torch.from_numpy(a).to(dtype) for a in pair]
        close = 1e-6 if kind == "float32" else 1e-2
    distances = cosine_distances(*pair)
    expected = [[1 - sum(q * g) for g in gallery] for q in query]
    assert isinstance(distances, np.ndarray) and distances.dtype != np.float16
    np.testing.assert_allclose(distances, expected, atol=close)


@pytest.mark.parametrize(
    ("words", "bad"),
    [
        ("Row 1 of the gallery features has length 3", [[1.0, 0.0], [0.0, 3.0]]),
        ("Row 0 of the gallery features has length nan", [[np.nan, 1.0]]),
        ("give a matrix", [1.0, 0.0]),
    ],
)
def test_features_must_have_length_one(words, bad):
    for form in (cosine_distances, rerank):
        with pytest.raises(ValueError, match=words):
            form(np.array([[1.0, 0.0]]), np.array(bad))


@pytest.mark.parametrize(
    ("n_query", "n_gallery", "k1", "k2"),
    [(10, 25, 20, 6), (12, 30, 5, 2), (9, 9, 7, 1), (6, 20, 4, 6), (2, 3, 20, 6)],
)
def test_rerank_equals_sets(n_query, n_gallery, k1, k2, monkeypatch):
    rng = np.random.default_rng(n_gallery)
    centres = rng.normal(size=(5, 6))
    query, gallery = (
        unit_rows(centres[np.arange(n) % 5] + rng.normal(size=(n, 6)))
        for n in (n_query, n_gallery)
    )
    expected = rerank_naive(query, gallery, k1, k2)
    np.testing.assert_allclose(rerank(query, gallery, k1, k2), expected, atol=1e-12)
    monkeypatch.setattr(evaluation, "BLOCK", 40)
    np.testing.assert_allclose(rerank(query, gallery, k1, k2), expected, atol=1e-12)


def test_rerank_released_code():
    stored = np.load(GOLDEN / "rerank.npz")
    distances = rerank(stored["query"], stored["gallery"])
    np.testing.assert_allclose(distances, stored["distances"], atol=1e-5)


def test_rerank_with_the_whole_weight_on_the_distance_keeps_the_order():
    rng = np.random.default_rng(8)
    query, gallery = unit_rows(rng.normal(size=(2, 6, 5)))
    plain = cosine_distances(query, gallery).argsort(axis=1)
    only = rerank(query, gallery, k1=4, k2=2, original_weight=1.0)
    assert (only.argsort(axis=1) == plain).all()


@pytest.mark.parametrize("feature", [np.ones(8), np.eye(8)[0]])
def test_rerank_of_collapsed_features_is_finite(feature):
    same = np.tile(unit_rows(feature), (9, 1))
    assert np.isfinite(rerank(same[:4], same[4:])).all()


@pytest.fixture
def split():
    """Eight identities on six cameras, two images each, in the layout of SYSU-MM01."""
    ids, cams, _ = (a.ravel() for a in np.mgrid[0:8, 1:7, 0:2])
    query = np.flatnonzero(np.isin(cams, (3, 6)))
    gallery = np.flatnonzero(~np.isin(cams, (3, 6)))
    trials = [
        SimpleNamespace(setting=setting, query=query, gallery=gallery[part::2])
        for part in (0, 1)
        for setting in ("all-single", "all-multi")
    ]
    test = pd.DataFrame({"identity": ids, "camera": cams})
    return SimpleNamespace(test=test, trials=trials, protocol="sysu")


def test_trials(split):
    rng = np.random.default_rng(4)
    identities = split.test["identity"].to_numpy()
    noise = rng.normal(size=(len(identities), 12))
    features = unit_rows(rng.normal(size=(8, 12))[identities] + noise)
    plain = evaluate_trials(torch.from_numpy(features), split)
    assert {setting: len(scores) for setting, scores in plain.items()} == {
        "all-single": 2,
        "all-multi": 2,
    }
    q, g = split.trials[-1].query, split.trials[-1].gallery
    ids, cams = (split.test[c].to_numpy() for c in ("identity", "camera"))
    rules = ids[q], ids[g], cams[q], cams[g], "sysu"
    expected = evaluate_naive(1 - features[q] @ features[g].T, *rules)
    assert_same(plain["all-multi"][1], expected)

    both = evaluate_trials(features, split, reranked=True)
    assert set(both) == set(plain) | {setting + RERANKED for setting in plain}
    for setting, scores in plain.items():
        for first, second in zip(scores, both[setting], strict=True):
            assert_same(first, second)
    voted = evaluate(rerank(features[q], features[g]), *rules)
    assert_same(both["all-multi" + RERANKED][1], voted)


def test_trials_want_every_test_image_once(split):
    features = unit_rows(np.ones((len(split.test) - 1, 4)))
    with pytest.raises(ValueError, match="95 features for 96 test images"):
        evaluate_trials(features, split)


@pytest.mark.parametrize("change", [
    lambda t: {"query": t.query - 1},
    lambda t: {"gallery": t.gallery + 90},
    lambda t: {"query": t.query.astype(float)},
    lambda t: {"query": t.query > 3},
])  # fmt: skip
def test_rows_outside_the_table_are_refused(split, change):
    trial = split.trials[0]
    trial.query = np.concatenate([[0], trial.query[1:]])
    vars(trial).update(change(trial))
    with pytest.raises(ValueError, match="rows that are not in the test table"):
        evaluate_trials(unit_rows(np.ones((96, 4))), split)


def test_an_image_on_both_sides_is_refused(split):
    split.trials[1].gallery = np.append(split.trials[1].gallery, split.trials[1].query[0])
    with pytest.raises(ValueError, match="as query and in the gallery"):
        evaluate_trials(unit_rows(np.ones((96, 4))), split)
