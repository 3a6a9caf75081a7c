"""Each augmentation against its definition, and its chances against 10,000 draws."""

import random

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as reference

from afen.augment import (
    FILL,
    LUMA,
    MEAN,
    STD,
    channel_view,
    denormalise,
    draw_adaptions,
    draw_boxes,
    draw_copies,
    draw_placement,
    erase,
    grayscale,
    infrared_view,
    mix_channels,
    normalise,
    place,
    place_joints,
    to_float,
    weak_view,
)
from afen.core import torch_generator

VIEWS = [weak_view, channel_view, infrared_view]
N = 10_000


def key(*keys):
    """A fresh generator: the same keys, the same draws."""
    return torch_generator("test", *keys)


def bytes_(count=16, height=30, width=14, seed=0):
    """Random images, as uint8."""
    size = count, 3, height, width
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=key(seed))


def within_five_sigma(count, p, n=N):
    """Whether a binomial count is as far from its mean as chance allows."""
    return abs(int(count) - n * p) <= 5 * (n * p * (1 - p)) ** 0.5


# --- numbers ----------------------------------------------------------------------


def test_constants_are_those_of_the_released_code():
    assert MEAN == (0.485, 0.456, 0.406) and STD == (0.229, 0.224, 0.225)
    assert LUMA == (0.2989, 0.5870, 0.1140)
    assert FILL == (0.4914, 0.4822, 0.4465)


def test_normalise_is_torchvisions():
    images = bytes_()
    assert torch.equal(to_float(images), images / 255)
    z = normalise(to_float(images))
    assert torch.allclose(z, reference.normalize(images / 255, MEAN, STD), atol=1e-6)
    assert torch.allclose(denormalise(z), images / 255, atol=1e-6)


# --- placement --------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 1, 5, 10])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_place_is_slicing(pad, layout):
    images = bytes_(32)
    placement = draw_placement(32, key(pad), pad)
    placed = place(images.contiguous(memory_format=layout), placement)
    for image, old, top, left, flipped in zip(placed, images, *placement[:3]):
        window = F.pad(old, [pad] * 4)[:, top : top + 30, left : left + 14]
        assert torch.equal(image, window.flip(-1) if flipped else window)
    assert placed.dtype == torch.uint8


def test_crops_and_mirrors_are_drawn_apart():
    images = bytes_(40)

    def placed(pad, mirrored):
        placement = draw_placement(40, key(), pad)
        return place(images, placement._replace(flipped=mirrored(placement.flipped)))

    for image, old in zip(placed(2, torch.zeros_like), images):
        padded = F.pad(old, [2] * 4)
        windows = padded.unfold(1, 30, 1).unfold(2, 14, 1).flatten(1, 2)
        assert (windows == image[:, None]).all((0, 2, 3)).sum() == 1
    some = placed(0, torch.clone)
    changed = (some != images).any(3).any(2).any(1)
    assert torch.equal(some[changed], images[changed].flip(-1))
    assert 5 < changed.sum() < 35
    assert torch.equal(placed(0, torch.zeros_like), images)
    assert torch.equal(placed(0, torch.ones_like), images.flip(-1))


def test_placements_are_uniform():
    placement = draw_placement(N, key(), pad=4)
    for corner in (placement.top, placement.left):
        counts = corner.bincount()
        assert len(counts) == 9
        assert all(within_five_sigma(count, 1 / 9) for count in counts)
    pairs = (9 * placement.top + placement.left).bincount(minlength=81)
    assert all(within_five_sigma(count, 1 / 81) for count in pairs)  # independent
    assert within_five_sigma(placement.flipped.sum(), 0.5)


def test_joints_stay_on_their_pixel():
    images, joints = torch.zeros(100, 17, 30, 14), torch.zeros(100, 17, 3)
    for joint in range(17):
        row, column = 2 + joint, (3 * joint) % 14
        images[:, joint, row, column] = 1
        joints[:, joint] = torch.tensor([column + 0.5, row + 0.5, 1.0])
    before = joints.clone()
    placement = draw_placement(100, key(), pad=5)
    placed, moved = place(images, placement), place_joints(joints, placement, (30, 14))
    assert torch.equal(joints, before)
    crops = 0
    for i in range(100):
        for joint, (x, y, visibility) in enumerate(moved[i]):
            other = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15][joint]
            channel = placed[i, other if placement.flipped[i] else joint]
            assert channel.sum() == visibility
            if visibility:
                assert channel[int(y), int(x)] == 1
                crops += 1
    assert 0 < crops < 1700  # some were cut off
    hidden = joints * torch.tensor([1.0, 1.0, 0.0])
    assert (place_joints(hidden, placement, (30, 14))[:, :, 2] == 0).all()


# --- erasing ----------------------------------------------------------------------


def textbook_box(rng, height, width):
    """Random erasing as its authors describe it: one image, Python's own numbers."""
    for _ in range(100):
        area = rng.uniform(0.02, 0.4) * height * width
        aspect = rng.uniform(0.3, 1 / 0.3)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if h < height and w < width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return 0, 0, 0, 0


@pytest.mark.parametrize("size", [(288, 144), (96, 48)])
def test_boxes_have_the_law_of_the_textbook(size):
    rng = random.Random(0)
    ours = draw_boxes(N, size, key(), p=1.0).double()
    textbook = torch.tensor([textbook_box(rng, *size) for _ in range(N)]).double()
    for statistic in [
        lambda b: b,
        lambda b: b**2,
        lambda b: (b[:, 2] * b[:, 3])[:, None],
        lambda b: (b[:, 2] / b[:, 3])[:, None],
        lambda b: (b[:, :2] + b[:, 2:] == torch.tensor(size)).double(),  # at the edge
        lambda b: (b[:, :2] == 0).double(),
    ]:
        one, two = statistic(ours), statistic(textbook)
        sigma = ((one.var(0) + two.var(0)) / N).sqrt()
        assert ((one.mean(0) - two.mean(0)).abs() < 5 * sigma).all()


def test_boxes_are_within_bounds():
    top, left, h, w = draw_boxes(N, (96, 48), key(1), p=1.0).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= 96).all() and (left + w <= 48).all() and (w < 48).all()
    slack = (h + w) / 2 + 0.25  # each side is rounded
    assert (h * w + slack >= 0.02 * 96 * 48).all()
    assert (h * w - slack <= 0.4 * 96 * 48).all()
    assert ((h + 0.5) / (w - 0.5) >= 0.3).all()
    assert ((h - 0.5) / (w + 0.5) <= 1 / 0.3).all()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_chance_of_erasing(p):
    erased = (draw_boxes(N, (96, 48), key(2), p)[:, 2] > 0).sum()
    assert within_five_sigma(erased, p)


@pytest.mark.parametrize("fill", [FILL, (0.0, 1.0, 2.0)])
def test_erase_paints_one_box_and_nothing_else(fill):
    images = normalise(to_float(bytes_(50)))
    before = images.clone()
    erased = erase(images, key(), 0.5, fill)
    assert torch.equal(images, before)
    boxes = draw_boxes(50, (30, 14), key(), 0.5).tolist()
    for image, old, (top, left, h, w) in zip(erased, images, boxes):
        wanted = old.clone()
        wanted[:, top : top + h, left : left + w] = torch.tensor(fill)[:, None, None]
        assert torch.equal(image, wanted)


def test_nothing_is_erased_where_no_box_fits():
    assert (draw_boxes(N, (1, 1000), key(), p=1.0) == 0).all()  # a side is 2 or more
    images = torch.randn(50, 3, 1, 1000, generator=key())
    assert torch.equal(erase(images, key(), p=1.0), images)


# --- colours ----------------------------------------------------------------------

PIXEL = torch.tensor([1.0, 10.0, 100.0])


def copy_channel(images, generator):
    """The channel operation of `channel_view` alone."""
    return mix_channels(images, *draw_copies(len(images), generator))


def adapt_gray(images, generator):
    """The channel operation of `infrared_view` alone."""
    return mix_channels(images, *draw_adaptions(len(images), generator))


OUTCOMES = torch.stack(
    [*(PIXEL[[c, c, c]] for c in range(3)), PIXEL @ torch.tensor(LUMA) * torch.ones(3)]
    + [PIXEL]
)


@pytest.mark.parametrize(
    "operation, chances",
    [
        (copy_channel, [1 / 3, 1 / 3, 1 / 3, 0, 0]),
        (adapt_gray, [1 / 4, 1 / 4, 1 / 4, 1 / 8, 1 / 8]),
        (grayscale, [0, 0, 0, 1, 0]),
        (lambda images, g: grayscale(images, g, p=0.3), [0, 0, 0, 0.3, 0.7]),
    ],
)
def test_channel_operations_have_their_chances(operation, chances):
    out = operation(PIXEL[:, None, None].repeat(N, 1, 1, 1), key())[:, :, 0, 0]
    same = torch.isclose(out[:, None], OUTCOMES, rtol=1e-6).all(2)  # [N, 5]
    assert (same.sum(1) == 1).all()
    for count, p in zip(same.sum(0), chances):
        assert within_five_sigma(count, p)


def test_copies_are_exact():
    images = torch.randn(200, 3, 6, 4, generator=key())
    copied = copy_channel(images, key())
    assert torch.equal(copied[:, 0], copied[:, 1])
    assert torch.equal(copied[:, 0], copied[:, 2])
    assert (copied[:, :1] == images).all(3).all(2).any(1).all()
    adapted = adapt_gray(images, key())
    equal = (adapted[:, :1] == adapted).all(3).all(2).all(1)
    assert torch.equal(adapted[~equal], images[~equal])
    assert within_five_sigma((~equal).sum(), 1 / 8, 200)


def test_copying_after_normalising_changes_a_grey_image():
    grey = torch.full((30, 3, 2, 2), 0.5)
    copied = denormalise(copy_channel(normalise(grey), key()))
    for image in copied:
        shifts = [
            [m + s * (0.5 - MEAN[k]) / STD[k] for m, s in zip(MEAN, STD)]
            for k in range(3)
        ]
        wanted = torch.tensor(shifts)  # [3 copies, 3 channels]
        assert torch.isclose(image[:, 0, 0], wanted, atol=1e-5).all(1).sum() == 1
    assert torch.equal(copy_channel(grey, key()), grey)


# --- views ------------------------------------------------------------------------


def naive_view(images, generator, operation, erasing, pad):
    """CAJ's order, one image at a time, from the draws of the quick view."""
    count, _, height, width = images.shape
    placement = draw_placement(count, generator, pad)
    boxes = draw_boxes(count, (height, width), generator, erasing).tolist()
    high = {"copy": 3, "adapt": 8, "none": 1}[operation]
    draws = torch.randint(0, high, (count,), generator=generator).tolist()
    done = []
    for i, (top, left, h, w) in enumerate(boxes):
        padded = F.pad(images[i], [pad] * 4)
        y, x = placement.top[i], placement.left[i]
        image = padded[:, y : y + height, x : x + width]
        image = image.flip(-1) if placement.flipped[i] else image
        z = reference.normalize(image / 255, MEAN, STD)
        z[:, top : top + h, left : left + w] = torch.tensor(FILL)[:, None, None]
        if operation == "copy":
            z = z[[draws[i]] * 3]
        elif operation == "adapt" and draws[i] < 6:
            z = z[[draws[i] // 2] * 3]
        elif operation == "adapt" and draws[i] == 6:
            z = torch.tensordot(torch.tensor(LUMA), z, 1).expand(3, -1, -1)
        done.append(z)
    return torch.stack(done)


@pytest.mark.parametrize("erasing, pad", [(0.5, 10), (0.0, 5), (1.0, 0)])
@pytest.mark.parametrize(
    "view, operation",
    [(weak_view, "none"), (channel_view, "copy"), (infrared_view, "adapt")],
)
def test_views_follow_the_released_order(view, operation, erasing, pad):
    images = bytes_(64)
    quick = view(images, key(), erasing=erasing, pad=pad)
    naive = naive_view(images, key(), operation, erasing, pad)
    assert torch.allclose(quick, naive, atol=1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_defaults_are_those_of_the_released_code(view):
    images = bytes_(64)
    released = view(images, key(), erasing=0.5, pad=10)
    assert torch.equal(view(images, key()), released)
    floats = to_float(images)
    assert torch.equal(erase(floats, key()), erase(floats, key(), 0.5, FILL))


@pytest.mark.parametrize("view", VIEWS)
def test_views_depend_on_their_generator_alone(view):
    images = bytes_()
    before = images.clone()
    torch.manual_seed(1)
    one = view(images, key())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = view(images.contiguous(memory_format=torch.channels_last), key())
    assert torch.equal(one, two) and torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is untouched
    assert not torch.equal(one, view(images, key("other")))
    generator = key()
    assert not torch.equal(view(images, generator), view(images, generator))


@pytest.mark.parametrize("view", VIEWS)
def test_views_keep_shape_and_precision(view):
    for count, height, width in [(1, 96, 48), (3, 64, 65)]:
        out = view(bytes_(count, height, width), key())
        assert out.shape == (count, 3, height, width) and out.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # a method may call a view there
        drawn = view(bytes_(), key())
    assert torch.equal(drawn, view(bytes_(), key()))


@pytest.mark.parametrize("view", [channel_view, infrared_view])
def test_without_channel_operation_a_view_is_the_weak_one(view):
    images = bytes_()
    plain = view(images, key(), channel_ops=False)
    assert torch.equal(plain, weak_view(images, key()))
    assert not torch.equal(plain, view(images, key()))


@pytest.mark.parametrize("operation", [erase, copy_channel, adapt_gray])
def test_precision_does_not_change_the_draws(operation):
    images = torch.randn(200, 3, 30, 14, generator=key())
    single = operation(images, key())
    double = operation(images.double(), key())
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert torch.allclose(single, double.float(), atol=1e-6)
    assert operation(images.half(), key()).dtype == torch.float16
    assert not torch.equal(single, images)


@pytest.mark.parametrize("view", VIEWS)
def test_draws_are_made_on_the_cpu(view):
    here, there = key(), key()
    view(bytes_(), here)
    out = view(bytes_().to("meta"), there)  # a device without numbers
    assert out.is_meta and out.shape == (16, 3, 30, 14)
    assert torch.equal(here.get_state(), there.get_state())


def test_floats_are_not_taken_for_bytes():
    with pytest.raises(AssertionError, match="not bytes"):
        to_float(torch.rand(1, 3, 4, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("view", VIEWS)
def test_every_device_sees_the_same_draws(view):
    images = bytes_()
    there = view(images.cuda(), key())
    assert there.is_cuda
    assert torch.allclose(there.cpu(), view(images, key()), atol=1e-5)
