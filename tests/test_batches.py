"""Packing image files, drawing identity-balanced rows, loading ahead."""

import pickle
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from afen import batches
from afen.batches import IdentitySampler, PackedImages, pack
from afen.core import keyed_rng, torch_generator

SIZE = (24, 12)


@pytest.fixture
def tree(tmp_path):
    """A folder of 30 images of several formats and sizes, and their paths."""
    rng, paths = np.random.default_rng(0), []
    for i in range(30):
        height, width = rng.integers(20, 60, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        if i % 5 == 0:
            image = image.convert("L")
        paths.append(f"{i % 3}/{i:02}.{'png' if i % 2 else 'bmp'}")
        (tmp_path / "images" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / paths[-1])
    return tmp_path / "images", paths, tmp_path / "cache"


def table_of(n_identities=10, visible=5, infrared=4):
    """A training table without images: the rows of an identity are not contiguous."""
    rows = [(i, m) for i in range(n_identities) for m in visible * ["visible"]]
    rows += [(i, m) for i in range(n_identities) for m in infrared * ["infrared"]]
    frame = pd.DataFrame(rows, columns=["label", "modality"])
    return frame.sample(frac=1, random_state=0).reset_index(drop=True)


# --- packing ----------------------------------------------------------------------


def test_pixels_are_those_of_pillow(tree):
    root, paths, cache = tree
    packed = pack(root, paths, SIZE, cache)
    assert packed.images.shape == (30, *SIZE, 3) and packed.images.dtype == np.uint8
    for path, pixels, file_size in zip(paths, packed.images, packed.file_sizes):
        with Image.open(root / path) as image:
            assert tuple(file_size) == image.size[::-1]
            wanted = image.convert("RGB").resize(SIZE[::-1], Image.Resampling.LANCZOS)
        assert np.array_equal(pixels, np.asarray(wanted))


def test_every_kind_of_image_becomes_rgb(tmp_path):
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down, as viewers show it; the authors' code does not look
    colour.save(tmp_path / "plain.jpg", quality=100)
    colour.save(tmp_path / "turned.jpg", quality=100, exif=exif)
    colour.convert("CMYK").save(tmp_path / "cmyk.tif")
    colour.convert("L").save(tmp_path / "grey.png")
    colour.convert("L").convert("LA").save(tmp_path / "grey-alpha.png")
    colour.quantize(16).save(tmp_path / "palette.png")
    clear = colour.copy()
    clear.putalpha(0)
    clear.save(tmp_path / "alpha.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    packed = pack(tmp_path, names, SIZE, tmp_path / "cache")
    pixels = dict(zip(names, packed.images))
    grey = np.asarray(colour.convert("L"))[:, :, None].repeat(3, axis=2)
    assert np.array_equal(pixels["grey.png"], grey)
    assert np.array_equal(pixels["grey-alpha.png"], grey)
    assert np.array_equal(pixels["alpha.png"], np.asarray(colour))
    assert np.array_equal(pixels["cmyk.tif"], np.asarray(colour))
    sixteen = np.asarray(colour.quantize(16).convert("RGB"))
    assert np.array_equal(pixels["palette.png"], sixteen)
    turned = Image.fromarray(pixels["turned.jpg"]).transpose(Image.Transpose.ROTATE_180)
    assert np.abs(np.asarray(turned).astype(int) - pixels["plain.jpg"]).max() <= 2
    assert tuple(packed.file_sizes[names.index("turned.jpg")]) == SIZE


def test_a_file_held_on_its_side_has_its_sides_changed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 40)).save(tmp_path / "a.png", exif=exif)
    assert tuple(pack(tmp_path, ["a.png"], SIZE, tmp_path / "cache").file_sizes[0]) == (20, 40)


def sixteen_bits(mode):
    """A PNG of 16 bits a channel, which Pillow cannot write; twelve of them are in use."""
    channels, kind = {"RGB": (3, 2), "LA": (2, 4), "RGBA": (4, 6), "L": (1, 0)}[mode]
    rows = b"".join(b"\0" + struct.pack(f">{4 * channels}H", *[4095] * 4 * channels) for _ in "ab")
    parts = b"IHDR" + struct.pack(">IIBBBBB", 4, 2, 16, kind, 0, 0, 0), b"IDAT" + zlib.compress(rows)
    chunks = [struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p))
              for p in (*parts, b"IEND")]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("name, content", [
    *((f"{mode}.png", sixteen_bits(mode)) for mode in ("RGB", "LA", "RGBA", "L")),
    ("colour.ppm", b"P6\n2 1\n4095\n" + b"\x0f\xff" * 6),
    ("grey.pgm", b"P5\n2 1\n4095\n" + b"\x0f\xff" * 2),
])  # fmt: skip
def test_more_than_eight_bits_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: mode .* has over 8 bits a channel; convert"):
        pack(tmp_path, [name], SIZE, tmp_path / "cache")


@pytest.mark.parametrize("name, content", [
    ("bits.pbm", b"P4\n8 1\n\xf0"), ("grey.pgm", b"P5\n2 1\n255\n\x00\xff"),
    ("colour.ppm", b"P6\n1 1\n100\n\x64\x00\x00"),
])  # fmt: skip
def test_up_to_eight_bits_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert pack(tmp_path, [name], SIZE, tmp_path / "cache").images.max() == 255


def test_second_call_decodes_nothing(tree, monkeypatch):
    root, paths, cache = tree
    first = pack(root, paths, SIZE, cache)

    def decode(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(batches, "decode", decode)
    assert pack(root, pd.Series(paths), list(SIZE), cache).path == first.path
    with pytest.raises(ValueError, match="decoded again"):
        pack(root, paths, (12, 24), cache)


def test_content_names_the_file(tree):
    root, paths, cache = tree
    names = {pack(root, paths, SIZE, cache).path}
    names.add(pack(root, paths[::-1], SIZE, cache).path)
    names.add(pack(root, paths[:-1], SIZE, cache).path)
    Image.new("RGB", (9, 9)).save(root / paths[4])
    changed = pack(root, paths, SIZE, cache)
    (root / paths[0]).rename(root / "renamed.bmp")
    renamed = pack(root, ["renamed.bmp", *paths[1:]], SIZE, cache)
    assert len(names | {changed.path, renamed.path}) == 5
    assert (changed.images[4] == 0).all()


def test_one_byte_that_no_pixel_shows_changes_the_name(tree):
    root, paths, _ = tree
    before = batches.content_key(root, paths, SIZE)
    assert batches.content_key(root, paths, SIZE) == before
    whole = (root / paths[7]).read_bytes()
    (root / paths[7]).write_bytes(whole[:-1] + b"x")  # after the pixels, same length
    assert batches.content_key(root, paths, SIZE) != before


def test_a_moved_folder_keeps_its_name(tree):
    root, paths, cache = tree
    path = pack(root, paths, SIZE, cache).path
    moved = root.rename(root.with_name("elsewhere"))
    assert pack(str(moved), paths, SIZE, str(cache)).path == path


@pytest.mark.parametrize("where", [0, 20, 70, 500, -1, -5, -40, -200])
def test_one_wrong_bit_is_repaired(tree, where):
    root, paths, cache = tree
    path = pack(root, paths, SIZE, cache).path
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[where] ^= 4
    path.write_bytes(damaged)
    packed = pack(root, paths, SIZE, cache)
    assert packed.path == path and path.read_bytes() == whole


@pytest.mark.parametrize("keep", [0, 1, 4, 100, 5000, -1, -4])
def test_a_cut_file_is_repaired(tree, keep):
    root, paths, cache = tree
    path = pack(root, paths, SIZE, cache).path
    whole = path.read_bytes()
    for damaged in [whole[:keep], whole + b"more"]:
        path.write_bytes(damaged)
        pack(root, paths, SIZE, cache)
        assert path.read_bytes() == whole


def test_every_broken_image_is_named_at_once(tree):
    root, paths, cache = tree
    whole = (root / paths[1]).read_bytes()
    (root / paths[1]).write_bytes(whole[: len(whole) // 2])
    (root / paths[2]).write_bytes(b"")
    (root / paths[3]).unlink()
    (root / paths[5]).unlink()
    (root / paths[5]).mkdir()
    Image.fromarray(np.full((9, 9), 999, np.int32)).save(root / "deep.tif")
    with pytest.raises(ValueError) as caught:
        pack(root, [*paths, "deep.tif"], SIZE, cache)
    message = str(caught.value)
    for name in [paths[1], paths[2], paths[3], paths[5], "deep.tif"]:
        assert message.count(f"{name}: ") == 1
    assert message.startswith("5 of 31 images") and "No such file" in message
    assert not cache.exists() or not list(cache.glob("*.npy"))  # nothing half written


def test_many_broken_images_are_counted(tree):
    root, paths, cache = tree
    with pytest.raises(ValueError, match="23 of 53") as caught:
        pack(root, [*paths, *(f"none/{i}.png" for i in range(23))], SIZE, cache)
    assert str(caught.value).count("none/") == 20
    assert str(caught.value).endswith("and 3 more")


def test_wrong_requests_are_one_sentence(tree):
    root, paths, cache = tree
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pack(root / "absent", paths, SIZE, cache)
    with pytest.raises(ValueError, match="list of paths is empty"):
        pack(root, [], SIZE, cache)
    for size in [(24,), (0, 12), (24, 12, 3)]:
        with pytest.raises(ValueError, match="height, width"):
            pack(root, paths, size, cache)


def test_memory_holds_one_chunk(monkeypatch):
    tried = []
    image = batches.Decoded(np.zeros((*SIZE, 3), np.uint8), SIZE)
    monkeypatch.setattr(batches, "try_decode", lambda *job: tried.append(job) or image)
    monkeypatch.setattr(batches, "CHUNK", 8)
    stream = batches.decode_all(Path("."), ["x"] * 100, SIZE)
    for i, _ in enumerate(stream):
        assert len(tried) == min(8 * (i // 8 + 1), 100)
    assert i == 99


def test_threads_may_pack_the_same_set(tree, monkeypatch):
    root, paths, cache = tree
    decode, decoded = batches.decode, []

    def slow_decode(path, size):
        decoded.append(path)
        time.sleep(0.005)  # the other threads arrive meanwhile
        return decode(path, size)

    monkeypatch.setattr(batches, "decode", slow_decode)
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(pack, root, paths, SIZE, cache) for _ in range(6)]
        packs = [job.result() for job in jobs]
    assert len({packed.path for packed in packs}) == 1
    assert len(decoded) == 30  # once for all
    assert all(np.array_equal(p.images, packs[0].images) for p in packs)
    assert list(cache.glob("*.npy")) == [packs[0].path]


def test_processes_may_pack_the_same_set(tree):
    root, paths, cache = tree
    program = (
        "import sys; from afen.batches import pack; root, cache, *paths = sys.argv[1:];"
        f"print(pack(root, paths, {SIZE}, cache).images.sum())"
    )
    command = [sys.executable, "-c", program, str(root), str(cache), *paths]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipe) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    packed = pack(root, paths, SIZE, cache)
    assert [int(out) for out, _ in outputs] == 2 * [int(packed.images.sum())]
    assert list(cache.glob("*.npy")) == [packed.path]


# --- packed images ----------------------------------------------------------------


def test_batch_is_the_rows(tree):
    root, paths, cache = tree
    packed = pack(root, paths, SIZE, cache)
    rows = np.array([29, 0, 3, 3])
    for copy in [packed, pickle.loads(pickle.dumps(packed))]:
        batch = copy.batch(rows, "cpu")
        assert batch.shape == (4, 3, *SIZE) and batch.dtype == torch.uint8
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.permute(0, 2, 3, 1), packed.images[rows])
    assert packed.batch(np.array([], int)).shape == (0, 3, *SIZE)
    assert len(pickle.dumps(packed)) < 1000
    for outside in [30, -1]:
        with pytest.raises(IndexError, match="30 packed images"):
            packed.batch(np.array([0, outside]))


def test_threads_may_read_together(tree):
    root, paths, cache = tree
    packed = pack(root, paths, SIZE, cache)
    draws = [np.random.default_rng(i).integers(0, 30, 16) for i in range(50)]
    with ThreadPoolExecutor(8) as pool:
        for rows, batch in zip(draws, pool.map(packed.batch, draws)):
            assert np.array_equal(batch.permute(0, 2, 3, 1), packed.images[rows])


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the memory")
def test_memory_does_not_grow_with_the_file(tmp_path):
    shape = (22_258 + 11_909, 288, 144, 3)  # the training images of SYSU-MM01
    header, tail = batches.file_parts([], shape)
    with (tmp_path / "large.npy").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + int(np.prod(shape)))  # sparse: no disk is used
        file.seek(0, 2)
        file.write(tail)
    program = """
import sys
from pathlib import Path
import numpy as np
from afen.batches import PackedImages

def peak():  # in kB, as ru_maxrss, which would begin with the parent's memory
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

packed = PackedImages(sys.argv[1])
before = peak()
for rows in np.array_split(np.arange(0, len(packed), 4), 130):
    assert packed.batch(rows).shape == (len(rows), 3, 288, 144)
print((peak() - before) / 1000)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "large.npy")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 300  # MB, of 4250


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batch_reaches_the_gpu(tree):
    root, paths, cache = tree
    packed = pack(root, paths, SIZE, cache)
    rows = np.arange(30)
    assert torch.equal(packed.batch(rows, "cuda").cpu(), packed.batch(rows))


# --- the sampler ------------------------------------------------------------------


def draw_naively(table, n_identities, n_images, rng):
    """AGW's batch, written with lists."""
    chosen = rng.permutation(sorted(set(table.label)))[:n_identities]
    halves = []
    for modality in ["visible", "infrared"]:
        rows = []
        for label in chosen:
            mask = (table.label == label) & (table.modality == modality)
            images = table.index[mask].tolist()
            rows += [images[int(rng.random() * len(images))] for _ in range(n_images)]
        halves.append(rows)
    return halves


@pytest.mark.parametrize("identities, images", [(8, 4), (3, 2), (10, 1)])
def test_sampler_is_the_naive_one(identities, images):
    table = table_of()
    sampler = IdentitySampler(table.label, table.modality, identities, images, seed=5)
    for step in range(50):
        rng = keyed_rng("sampler", 5, 1, step)
        expected = draw_naively(table, identities, images, rng)
        assert [rows.tolist() for rows in sampler.draw(1, step)] == expected


@pytest.mark.parametrize("replacement", [True, False])
def test_batches_are_balanced_and_aligned(replacement):
    table = table_of()
    label, modality = table.label.to_numpy(), table.modality.to_numpy(str)
    sampler = IdentitySampler(label, modality, seed=1, replacement=replacement)
    for visible, infrared in sampler.epoch(0):
        assert np.array_equal(label[visible], label[infrared])
        assert (modality[visible] == "visible").all()
        assert (modality[infrared] == "infrared").all()
        assert list(Counter(label[visible]).values()) == 8 * [4]
        assert (label[visible].reshape(8, 4).std(1) == 0).all()
        if not replacement:
            assert len(set(visible)) == len(set(infrared)) == 32


def test_distinct_rows_of_unequal_identities():
    table = table_of(n_identities=9, visible=12)
    spare = (table.groupby(["label", "modality"]).cumcount() >= 4) & (table.label < 8)
    table = table[~spare].reset_index(drop=True)  # 12 visible images of label 8 alone
    sampler = IdentitySampler(table.label, table.modality, replacement=False)
    for step in range(100):
        for rows in sampler.draw(0, step):
            label = table.label[rows].to_numpy().reshape(8, 4)
            assert (label == label[:, :1]).all() and len(set(rows)) == 32


def test_drawing_repeats_only_with_replacement():
    table = table_of()
    sampler = IdentitySampler(table.label, table.modality)
    assert any(len(set(rows)) < 32 for pair in sampler.epoch(0) for rows in pair)


@pytest.mark.parametrize(
    "counts, length", [((22_258, 11_909), 696), ((2060, 2060), 65)]
)
def test_epoch_length_is_that_of_the_released_code(counts, length):
    modality = np.repeat(["visible", "infrared"], counts)
    sampler = IdentitySampler(np.arange(len(modality)) % 206, modality)
    assert len(sampler) == length == sum(1 for _ in sampler.epoch(0))


def test_resuming_gives_the_same_rows():
    table = table_of(visible=40)
    sampler = IdentitySampler(table.label, table.modality, seed=3)
    again = IdentitySampler(table.label.tolist(), table.modality.tolist(), seed=3)
    whole = [np.stack(rows) for rows in sampler.epoch(7)]
    rest = [np.stack(rows) for rows in again.epoch(7, start=5)]
    assert len(whole) == len(sampler) == 13
    assert np.array_equal(whole[5:], rest)
    for other in [sampler.epoch(8), IdentitySampler(*table.to_numpy().T).epoch(7)]:
        assert not np.array_equal(whole, [np.stack(rows) for rows in other])


@pytest.mark.parametrize("replacement", [True, False])
def test_draws_are_uniform(replacement):
    table = table_of(n_identities=6, visible=7, infrared=5)
    sampler = IdentitySampler(
        table.label, table.modality, 2, 3, replacement=replacement
    )
    n, drawn = 10_000, np.zeros(len(table))
    for step in range(n):
        for rows in sampler.draw(0, step):
            np.add.at(drawn, rows, 1)
    m = np.where(table.modality == "visible", 7, 5)
    mean, p = 2 / 6 * 3 / m, 2 / 6
    if replacement:
        variance = p * (3 / m * (1 - 1 / m) + (3 / m) ** 2) - mean**2
    else:
        variance = mean * (1 - mean)  # an image is there or not
    assert (np.abs(drawn - n * mean) < 5 * np.sqrt(n * variance)).all()


def test_any_labels_will_do():
    table = table_of()
    odd = 100 - 7 * table.label
    sampler = IdentitySampler(odd, table.modality)
    visible, infrared = sampler.draw(0, 0)
    assert (odd[visible].to_numpy() == odd[infrared].to_numpy()).all()
    assert len(set(odd[visible])) == 8


def test_tables_that_cannot_fill_a_batch():
    table = table_of()
    lacking = table[(table.label != 4) | (table.modality == "visible")]
    with pytest.raises(ValueError, match="Label 4 has 0 infrared images"):
        IdentitySampler(lacking.label, lacking.modality)
    with pytest.raises(ValueError, match="needs 11 identities .* has 10"):
        IdentitySampler(table.label, table.modality, n_identities=11)
    with pytest.raises(ValueError, match="has 4 infrared images and needs 5"):
        IdentitySampler(table.label, table.modality, 8, 5, replacement=False)
    with pytest.raises(ValueError, match="'thermal'.*infrared"):
        IdentitySampler(table.label, table.modality.replace("infrared", "thermal"))


# --- an epoch ---------------------------------------------------------------------


@pytest.fixture
def loaded(tree):
    """Thirty packed images, five of each of three identities and two modalities."""
    root, paths, cache = tree
    number = np.arange(30)
    modality = np.where(number < 15, "visible", "infrared")
    table = pd.DataFrame({"path": paths, "label": number % 3, "modality": modality})
    sampler = IdentitySampler(table.label, table.modality, n_identities=2, n_images=2)
    return pack(root, paths, SIZE, cache), table, sampler


def test_batches_hold_what_the_sampler_drew(loaded):
    packed, table, sampler = loaded
    epoch = list(batches.batches(packed, table, sampler, 2, 0, "cpu", seed=9))
    assert len(epoch) == len(sampler) == 4
    for step, (batch, rows) in enumerate(zip(epoch, sampler.epoch(2))):
        assert np.array_equal(batch.visible_rows, rows[0])
        assert np.array_equal(batch.infrared_rows, rows[1])
        assert torch.equal(batch.visible, packed.batch(rows[0]))
        assert torch.equal(batch.infrared, packed.batch(rows[1]))
        assert batch.visible_labels.dtype == torch.int64
        assert batch.visible_labels.tolist() == table.label[rows[0]].tolist()
        assert batch.infrared_labels.tolist() == table.label[rows[1]].tolist()
        assert batch.visible_joints is None and batch.infrared_joints is None
        wanted = torch_generator("augment", 9, 2, step).get_state()
        assert torch.equal(batch.generator.get_state(), wanted)


def test_resuming_gives_the_same_batches(loaded):
    whole = list(batches.batches(*loaded, 1, 0, "cpu", seed=0))
    rest = list(batches.batches(*loaded, 1, 2, "cpu", seed=0))
    assert len(rest) == 2
    for old, new in zip(whole[2:], rest):
        assert torch.equal(old.infrared, new.infrared)
        assert torch.equal(old.generator.get_state(), new.generator.get_state())
    assert list(batches.batches(*loaded, 1, 4, "cpu", seed=0)) == []


def test_joints_are_scaled_to_the_packed_size(loaded):
    packed, table, sampler = loaded
    joints = np.random.default_rng(0).random((30, 17, 3)) * [50, 50, 1]
    columns = pd.DataFrame(joints.reshape(30, 51), columns=batches.JOINT_COLUMNS)
    table = pd.concat([table, columns], axis=1)
    batch = next(batches.batches(packed, table, sampler, 0, 0, "cpu", seed=0))
    for rows, half in [
        (batch.visible_rows, batch.visible_joints),
        (batch.infrared_rows, batch.infrared_joints),
    ]:
        assert half.shape == (4, 17, 3) and half.dtype == torch.float32
        for row, moved in zip(rows, half):
            height, width = packed.file_sizes[row]
            scale = [SIZE[1] / width, SIZE[0] / height, 1]
            assert np.allclose(moved, joints[row] * scale, atol=1e-4)


class WatchedImages(PackedImages):
    """Counts the rows that were read, and breaks on demand."""

    def __init__(self, path):
        super().__init__(path)
        self.reads, self.third = 0, threading.Event()

    def batch(self, rows, device="cpu"):
        batch = super().batch(rows, device)
        self.reads += 1
        if self.reads == 6:  # both halves of the third batch
            self.third.set()
        return batch


def test_reads_ahead_in_the_background(loaded):
    packed, table, sampler = loaded
    watched = WatchedImages(packed.path)
    stream = batches.batches(watched, table, sampler, 0, 0, "cpu", seed=0)
    next(stream)
    assert watched.third.wait(10)  # before anybody asked for it
    stream.close()
    assert watched.reads == 6  # and no further


def test_batches_go_to_the_gpu_of_the_process_that_asks(loaded, monkeypatch):
    """CUDA's current device is each thread's own; "cuda" in the reading thread is the first."""
    asked = []

    def note(packed, table, visible, infrared, device, generator):
        asked.append(device)

    monkeypatch.setattr(batches, "make_batch", note)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    list(batches.batches(*loaded, 0, 0, "cuda", seed=0))
    list(batches.batches(*loaded, 0, 0, "cuda:3", seed=0))
    assert set(map(str, asked)) == {"cuda:1", "cuda:3"}


def readers():
    """The threads that read ahead."""
    return [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def test_trouble_in_the_background_comes_forward(loaded):
    packed, table, sampler = loaded
    watched = WatchedImages(packed.path)
    stream = batches.batches(watched, table, sampler, 0, 0, "cpu", seed=0)
    first = next(stream)
    assert watched.third.wait(10)  # two more are read
    packed.path.unlink()
    good = [next(stream), next(stream)]
    with pytest.raises(FileNotFoundError):
        next(stream)
    assert not readers()
    drawn = [batch.visible_rows.tolist() for batch in [first, *good]]
    assert drawn == [rows.tolist() for rows, _ in sampler.epoch(0)][:3]


def test_no_thread_stays_behind(loaded):
    for _ in batches.batches(*loaded, 0, 0, "cpu", seed=0):
        assert len(readers()) == 1
        break
    assert not readers()
    list(batches.batches(*loaded, 0, 0, "cpu", seed=0))
    assert not readers()


def test_images_of_another_table_are_refused(loaded):
    packed, table, sampler = loaded
    with pytest.raises(ValueError, match="30 packed images and 29 rows"):
        next(batches.batches(packed, table[1:], sampler, 0, 0, "cpu", seed=0))
