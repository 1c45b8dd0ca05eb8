"""pack.py: a pack is the folder, survives kills, notices damage, and refuses what leads out of it."""
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("DATA", None)

import contextlib
import hashlib
import io
import json
import multiprocessing
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import augment
import data
import mae_pretrain
import pack
import run
from test_data import class_folder, corrupt, folder_of, save_picture
from test_model import assert_identical, pictures_like

torch.set_num_threads(1)

HERE = os.path.dirname(os.path.abspath(__file__))


def photographs(root, names, sizes, quality=92):
    """Smooth pictures of the given (H, W), as files."""
    for i, (name, size) in enumerate(zip(names, sizes)):
        pixels = F.interpolate(pictures_like(1, 8, 8, seed=i).float(), size=size, mode="bicubic").clamp(0, 255)
        options = dict(quality=quality) if name.endswith("jpg") else {}
        save_picture(os.path.join(root, name), pixels[0].permute(1, 2, 0).numpy().astype(np.uint8), **options)
    return str(root)


NAMES = [f"train/{c}/{n}" for c in ("cat", "dog") for n in ("a.jpg", "b.png", "sub/c.jpg", "d.jpg")]
SIZES = [(140, 200), (150, 133), (300, 270), (131, 400), (260, 520), (140, 140), (129, 129), (400, 300)]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A folder with train/ and val/ in two classes, of sizes that are read as files, and its pack."""
    root = tmp_path_factory.mktemp("split") / "pictures"
    photographs(root, NAMES + [name.replace("train", "val") for name in NAMES[:6]], SIZES * 2)
    pack.write_pack(str(root), f"{root}.pack", workers=2)
    return str(root), f"{root}.pack"


def content_of(pictures, i):
    with open(os.path.join(pictures.root, pictures.files[i]), "rb") as f:
        return f.read()


# ------------------------------------------------------------------------------------------- a pack is the folder
@pytest.mark.parametrize("train", [True, False])
def test_a_pack_holds_names_classes_parts_and_bytes_of_the_folder(split, train):
    folder, packed = (data.load_data(path, train) for path in split)
    assert packed.files == folder.files and len(folder) == (8 if train else 6)
    assert packed.classes == folder.classes == ["cat", "dog"] and torch.equal(packed.labels, folder.labels)
    assert [packed.packed.content(i) for i in range(len(packed))] == [content_of(folder, i) for i in range(len(folder))]
    some = packed.select([5, 1])
    assert [some.packed.content(i) for i in (0, 1)] == [content_of(folder, i) for i in (5, 1)]
    assert np.array_equal(np.array(some.read(0)), np.array(folder.read(5)))


@pytest.mark.parametrize("names", [["1.png", "2.JPG", "x/3.png"], ["b/1.png", "a/2.png", "a/z/3.png"]])
def test_flat_and_nested_folders_without_parts(tmp_path, names):
    root = folder_of(tmp_path / "pictures", names, (24, 140))
    pack.write_pack(root, str(tmp_path / "pack"))
    folder, packed = data.load_data(root), data.load_data(str(tmp_path / "pack"))
    assert packed.files == folder.files and packed.classes == folder.classes
    for path in (root, str(tmp_path / "pack")):
        with pytest.raises(data.UsageError, match="no train/ and no val/"):
            data.load_data(path, train=False)
    class_folder(tmp_path / "half", "train")
    pack.write_pack(str(tmp_path / "half"), str(tmp_path / "half.pack"))
    with pytest.raises(data.UsageError, match="no val/ or test/ in this folder"):
        data.load_data(str(tmp_path / "half.pack"), train=False)


@pytest.mark.parametrize("views", [augment.MOCO_VIEWS, [augment.MAE_VIEW], [augment.TEST_VIEW, augment.TRAIN_VIEW]],
                         ids=["moco", "mae", "evaluation"])
def test_batches_of_a_pack_are_the_folders_to_the_bit(split, views):
    for epoch in range(2):
        a, b = (next(data.Loader(data.load_data(path), views, (48, 48), 8, seed=3).epoch(epoch)) for path in split)
        assert torch.equal(a.ids, b.ids) and a.ids.tolist() != list(range(8))
        for one, other in zip(a.views, b.views):
            assert torch.equal(one[:], other[:])


def test_a_run_from_a_pack_is_the_folders_to_the_bit(split, tmp_path):
    for path, out in zip(split, ("folder", "pack")):
        options = ["--arch", "vit_mini", "--patch-size", "8", "--img-size", "16", "--epochs", "2", "--batch-size", "4",
                   "--amp", "off", "--workers", "0", "--device", "cpu", "--lr", "0.1"]
        mae_pretrain.main(mae_pretrain.get_args([*options, "--data", path, "--out", str(tmp_path / out)]))
    ours, theirs = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("pack", "folder"))
    assert ours["step"] == 4
    assert_identical(ours["model"], theirs["model"])


def test_label_lists_and_small_pictures_in_memory(tmp_path):
    root = class_folder(tmp_path / "pictures")
    pack.write_pack(root, str(tmp_path / "pack"))
    (tmp_path / "some.txt").write_text("train/dog/dog_1.png\ncat_0.png\n")
    folder, packed = data.load_data(root), data.load_data(str(tmp_path / "pack"))
    assert packed.images is not None and torch.equal(packed.images, folder.images)
    for spec in (str(tmp_path / "some.txt"), "1 per class"):
        assert torch.equal(data.labelled(packed, spec)[0], data.labelled(folder, spec)[0])


def test_every_picture_of_a_pack_whatever_its_part(split):
    folder, packed = (data.every_picture(path, 3) for path in split)
    assert packed.files == folder.files and len(packed) == 14 and not len(data.every_picture("/nowhere", 3))
    assert np.array_equal(np.array(packed.read(9)), np.array(folder.read(9)))


def spawned(queue, pictures):
    queue.put(pictures.packed.content(3))


def test_worker_processes_open_the_pack_themselves(split):
    pictures = data.load_data(split[1])
    expected = pictures.packed.content(3)
    again = pickle.loads(pickle.dumps(pictures))
    assert again.packed.fd is None and again.packed.content(3) == expected
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=spawned, args=(queue, pictures))
    worker.start()
    assert queue.get(timeout=60) == expected
    worker.join()
    alone, shared = (next(data.Loader(pictures, augment.MOCO_VIEWS, (32, 32), 8, workers=workers).epoch(0))
                     for workers in (0, 2))
    assert torch.equal(alone.views[1][:], shared.views[1][:])


# ------------------------------------------------------------------------------------------------------ shrinking
def test_the_short_side_is_shrunk_and_what_a_jpeg_cannot_hold_is_kept(tmp_path):
    root = photographs(tmp_path / "pictures", ["a.jpg", "b.png", "c.jpg"], [(150, 301), (200, 160), (90, 300)])
    alpha = Image.fromarray(pictures_like(1, 200, 200)[0].permute(1, 2, 0).numpy()).convert("RGBA")
    alpha.save(tmp_path / "pictures" / "d.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(tmp_path / "pictures" / "a.jpg").save(tmp_path / "pictures" / "e.jpg", exif=turned, quality=95)
    pack.write_pack(root, str(tmp_path / "pack"), short_side=100, quality=95)
    folder, packed = data.load_data(root), data.load_data(str(tmp_path / "pack"))
    assert packed.files == ["a.jpg", "b.png", "c.jpg", "d.png", "e.jpg"]
    assert [packed.read(i).size for i in range(5)] == [(201, 100), (100, 125), (300, 90), (200, 200), (100, 201)]
    for i, kept in enumerate([False, False, True, True, False]):
        assert (packed.packed.content(i) == content_of(folder, i)) == kept, packed.files[i]
        assert kept or Image.open(io.BytesIO(packed.packed.content(i))).format == "JPEG"
        expected = folder.read(i).resize(packed.read(i).size, Image.LANCZOS)
        assert np.abs(np.array(expected).astype(int) - np.array(packed.read(i))).mean() < 2.5


def test_bad_pictures_are_skipped_named_and_counted(tmp_path, capsys):
    root = folder_of(tmp_path / "pictures", [f"{i:03}.png" for i in range(200)])
    corrupt(tmp_path / "pictures" / "050.png")
    (tmp_path / "pictures" / "150.jpg").write_text("no picture at all")
    pack.write_pack(root, str(tmp_path / "pack"), workers=2)
    said = capsys.readouterr().out
    assert said.count("warning: skipped") == 2 and "200 pictures" not in said and "199 pictures" in said
    for name in ("050.png", "150.jpg"):
        assert f"skipped {tmp_path}/pictures/{name}: " in said
    assert data.load_data(str(tmp_path / "pack")).files == [f"{i:03}.png" for i in range(200) if i != 50]
    with pytest.raises(data.RunError, match="2 of 201 pictures cannot be read, more than --max-bad 0.005"):
        pack.write_pack(root, str(tmp_path / "other"), max_bad=0.005)
    assert not os.path.exists(tmp_path / "other")


def test_progress_says_the_time_that_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pack.Progress, "EVERY", 0.0)
    root = folder_of(tmp_path / "pictures", ["1.png", "2.png", "3.png"])
    pack.write_pack(root, str(tmp_path / "pack"))
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("packed 2 of 3 pictures, ") and " a second, left 0:0" in said[1]


# ------------------------------------------------------------------------------------------------ kills, two at once
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_packing_goes_on_after_a_kill(tmp_path, capsys, number):
    """A pipe that nobody writes to holds the packing up at a known place; what is packed by then is not read again."""
    root = folder_of(tmp_path / "pictures", [f"{i:02}.png" for i in range(50)], (40, 140))
    expected = {name: (tmp_path / "pictures" / name).read_bytes() for name in os.listdir(root)}
    pipe, pack_path, part = tmp_path / "pictures" / "40.png", tmp_path / "out.pack", tmp_path / "out.pack.part"
    pipe.unlink()
    os.mkfifo(pipe)
    job = subprocess.Popen([sys.executable, os.path.join(HERE, "data.py"), "pack", root, str(pack_path),
                            "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    enough = sum(len(expected[f"{i:02}.png"]) for i in range(32))           # the first block
    deadline = time.monotonic() + 60
    while not part.exists() or part.stat().st_size < enough:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    with pytest.raises(data.UsageError, match="being written by another process"):
        pack.write_pack(root, str(pack_path))
    job.send_signal(number)
    while number == signal.SIGTERM and job.poll() is None:                  # which waits for the pipe's reader, if one is
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):                                  # nobody reads: not yet, or not any more
            with open(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "wb") as f:
                f.write(expected["40.png"])
        time.sleep(0.02)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == (-9 if number == signal.SIGKILL else 128 + number), said
    assert "Traceback" not in said and not pack_path.exists()
    pipe.unlink()
    pipe.write_bytes(expected["40.png"])
    (tmp_path / "pictures" / "07.png").write_text("packed already")
    with open(part, "ab") as f:                                             # a record that was being written
        f.write(pack.RECORD.pack(6, 1 << 60, bytes(16)) + b"33.png half of it")
    capsys.readouterr()
    pack.write_pack(root, str(pack_path), workers=2)
    assert re.match(r"going on: (3[2-9]|40) of 50 pictures are packed already", capsys.readouterr().out)
    packed = data.load_data(str(pack_path))
    assert packed.files == sorted(expected)
    assert [packed.packed.content(i) for i in range(50)] == [expected[name] for name in packed.files]
    (tmp_path / "pictures" / "07.png").write_bytes(expected["07.png"])
    pack.write_pack(root, str(tmp_path / "at once"))
    assert pack_path.read_bytes() == (tmp_path / "at once").read_bytes()


def test_a_pack_that_was_begun_otherwise_is_not_gone_on_with(tmp_path):
    root = folder_of(tmp_path / "pictures", ["1.png"])
    with pack.begin(str(tmp_path / "pack.part")) as f:
        pack.records(f, "pack.part", dict(short_side=320, quality=90))
    with pytest.raises(data.UsageError, match='was begun with {"short_side": 320, "quality": 90}, not'):
        pack.write_pack(root, str(tmp_path / "pack"))
    (tmp_path / "pack.part").write_text("something quite different")
    with pytest.raises(data.UsageError, match="not the beginning of a pack"):
        pack.write_pack(root, str(tmp_path / "pack"))
    (tmp_path / "pack.part").write_bytes(data.PACK_MAGIC[:7])               # killed at its very beginning
    pack.write_pack(root, str(tmp_path / "pack"))
    with pytest.raises(data.UsageError, match="is there already"):
        pack.write_pack(root, str(tmp_path / "pack"))
    assert len(data.load_data(str(tmp_path / "pack"))) == 1


def test_what_a_power_failure_lost_is_packed_again(tmp_path):
    root = folder_of(tmp_path / "pictures", ["1.png", "2.png", "3.png"], (40, 140))
    pack.write_pack(root, str(tmp_path / "pack"))
    whole = (tmp_path / "pack").read_bytes()
    middle = data.load_data(str(tmp_path / "pack")).packed.offsets[1]
    lost = bytearray(whole)
    lost[middle:middle + 50] = bytes(50)                                    # a page that never reached the disk
    (tmp_path / "again.part").write_bytes(lost)
    pack.write_pack(root, str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == whole


# --------------------------------------------------------------------------------------------- damage, hostile files
def test_damage_is_noticed_and_named(split, tmp_path, capsys):
    whole = open(split[1], "rb").read()
    packed = data.load_data(split[1])
    path = str(tmp_path / "pack")
    for at in (packed.packed.offsets[2] + 30, packed.packed.offsets[2] - 3, packed.packed.offsets[2] - 25):
        bad = bytearray(whole)                                              # in the bytes, the name, the record's head
        bad[at] ^= 1
        open(path, "wb").write(bad)
        with pytest.raises(data.RunError, match=r"1 of 14 pictures are damaged: train/cat/sub/c.jpg|train/cat/d.jpg"):
            pack.verify(path)
    for at, message in ((len(whole) - 1, "index of this pack is damaged"), (len(whole) - 56, "has no end"),
                        (len(whole) - 80, "index of this pack is damaged"), (len(whole) - 34, "damaged")):
        bad = bytearray(whole)
        bad[at] ^= 0x40
        open(path, "wb").write(bad)
        with pytest.raises(data.UsageError, match=message):
            data.load_data(path)
    pack.verify(split[1])
    assert "all 14 pictures are as they were packed" in capsys.readouterr().out


@pytest.mark.parametrize("length", [16, 40, 79, 80, 1000, -1])
def test_packs_that_are_cut_short_are_refused(split, tmp_path, length):
    (tmp_path / "pack").write_bytes(open(split[1], "rb").read()[:length])
    with pytest.raises(data.UsageError, match="cut short"):
        data.load_data(str(tmp_path / "pack"))


@pytest.mark.parametrize("change, message", [
    (dict(offsets=[1 << 40, 90]), "leads out of its pictures"), (dict(offsets=[-5, 90]), "leads out of its pictures"),
    (dict(offsets=[(1 << 63) - 1, 90]), "leads out of its"), (dict(offsets=[0, 90]), "leads out of its pictures"),
    (dict(lengths=[-1, 10]), "leads out of its pictures"), (dict(lengths=[1 << 62, 10]), "leads out of its pictures"),
    (dict(names=["../a.png", "b.png"]), "the name '../a.png'"), (dict(names=["/a.png", "b.png"]), "name '/a.png'"),
    (dict(names=["x/../../a.png", "b.png"]), "leads out of it"), (dict(names=["", "b.png"]), "the name ''"),
    (dict(names=["a.png"]), "leads out of its"), (dict(n=3), "leads out|damaged"), (dict(n=1 << 60), "damaged"),
    (dict(start=1 << 62), "damaged"), (dict(start=(1 << 64) - 1), "damaged")])
def test_hostile_indices_are_refused(tmp_path, change, message):
    """With a digest that is right: somebody meant it."""
    body = data.PACK_MAGIC + bytes(200)
    given = dict(offsets=[60, 90], lengths=[10, 10], names=["a.png", "b.png"], n=2, start=len(body)) | change
    index = np.array(given["offsets"] + given["lengths"], "<i8").tobytes() + "\0".join(given["names"]).encode()
    footer = pack.FOOTER.pack(pack.FOOTER_TAG, given["n"], given["start"], hashlib.sha256(index).digest())
    (tmp_path / "pack").write_bytes(body + index + footer)
    with pytest.raises(data.UsageError, match=message):
        data.open_folder(str(tmp_path / "pack"), True, 3)


def test_a_pack_that_shrinks_under_the_reader_is_a_bad_picture(split, tmp_path):
    path = tmp_path / "pack"
    path.write_bytes(open(split[1], "rb").read())
    pictures = data.load_data(str(path))
    os.truncate(path, 100)
    with pytest.raises(data.BadFile, match="ends within this picture"):
        pictures.read(2)


@pytest.mark.parametrize("arguments, code, message", [
    (["/nowhere", "x.pack"], 2, "/nowhere: no such folder"), (["one"], 2, "a folder of pictures and the file to write"),
    (["--verify", "/nowhere"], 2, "/nowhere: no such pack"), (["--verify", __file__], 2, "not a pack"),
    (["--short-side", "3", "a", "b"], 2, "out of range"), (["FOLDER", "/nowhere/x.pack"], 1, "cannot write /nowhere")])
def test_bad_input_ends_in_one_line(tmp_path, capsys, monkeypatch, arguments, code, message):
    root = folder_of(tmp_path / "pictures", ["1.png"])
    arguments = [root if part == "FOLDER" else part for part in arguments]
    with pytest.raises(SystemExit) as end:
        run.program(pack.main, lambda: pack.get_args(arguments))
    said = capsys.readouterr()
    assert end.value.code == code and message in said.err and said.err.count("\n") == 1 and not said.out


def test_the_format_is_what_its_description_says(split):
    """Read by hand, without pack.py."""
    whole = open(split[1], "rb").read()
    folder = data.load_data(split[0])
    assert whole[:16] == data.PACK_MAGIC and whole[-56:-48] == b"pack end"
    n, start = np.frombuffer(whole[-48:-32], "<u8").tolist()
    index = whole[start:-56]
    assert n == 14 and hashlib.sha256(index).digest() == whole[-32:]
    offsets, lengths = np.frombuffer(index[:16 * n], "<i8").reshape(2, n).tolist()
    names = index[16 * n:].decode().split("\0")
    assert names[:8] == [f"train/{name}" for name in folder.files]
    assert [whole[o:o + k] for o, k in zip(offsets[:8], lengths)] == [content_of(folder, i) for i in range(8)]
    settings = int.from_bytes(whole[20:28], "little")
    assert whole[16:20] == bytes(4) and json.loads(whole[44:44 + settings]) == dict(short_side=None, quality=None)
