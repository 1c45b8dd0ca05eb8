"""Files that are out to harm, and files that are broken: checkpoints, classifiers, lists, pictures. And check.py."""
import io
import os
import pickle
import random
import resource
import runpy
import shutil
import sys
import time
import zipfile
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import check
import checkpoint
import data
import finetune
import model
import run
from test_data import folder_of
from test_faults import HERE, reachable, saved, unprivileged

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with an encoder.pt as our own scripts write it."""
    place = tmp_path_factory.mktemp("encoder")
    net = model.MoCoV3(model.VisionTransformer(32, 8, dim=24, depth=3, heads=3), 32)
    meta = dict(system="MoCo v3", mean=[0.5] * 3, std=[0.2] * 3, epochs=1)
    torch.save(checkpoint.encoder_file(net, meta), place / "encoder.pt")
    return place


# ------------------------------------------------------------------------------------------------ hostile files
class Payload:
    """A pickled object that would run code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("payload-was-run",)


def rezipped(path, change, compression=zipfile.ZIP_STORED):
    """Write a checkpoint's archive again with other parts: change(name, bytes) -> bytes."""
    with zipfile.ZipFile(path) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts:
            archive.writestr(name, change(name, content))


def many_keys(path, legacy):
    """A file of 20 MB that torch would take half a minute over."""
    torch.save({}, path, _use_new_zipfile_serialization=not legacy)
    listed = pickle.dumps({"model": dict.fromkeys((f"blocks.{i}.weight" for i in range(1_000_000)), 0)}, 2)
    if legacy:                                                              # the fourth of five pickles
        path.write_bytes(path.read_bytes().replace(pickle.dumps({}, 2), listed, 1))
    else:
        rezipped(path, lambda name, content: listed if name.endswith("data.pkl") else content)


def claims(path, encoder, **config):
    """Our own layout, whose description of the encoder lies."""
    content = saved(encoder, "encoder.pt")
    content["config"] = content["config"] | config
    torch.save(content, path)


def with_tensor(path, encoder, tensor, name="norm.weight"):
    content = saved(encoder, "encoder.pt")
    content["model"][name] = tensor
    torch.save(content, path)


def with_meta(path, encoder, **meta):
    content = saved(encoder, "encoder.pt")
    content["meta"] |= meta
    torch.save(content, path)


def short_storage(path, encoder):
    """Every tensor's bytes cut to four, its size in the list of contents left as it was."""
    shutil.copy(encoder / "encoder.pt", path)
    rezipped(path, lambda name, content: content[:4] if "/data/" in name else content)


def padded_storage(path, encoder):
    """The same, and as many bytes as the file had in a part that no tensor uses."""
    short_storage(path, encoder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/padding", bytes(1 << 20))


def bomb(path, encoder):
    """A quarter of a gigabyte of zeros, deflated to a megabyte."""
    shutil.copy(encoder / "encoder.pt", path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data/zeros", bytes(1 << 28))


def petabytes(path, encoder):
    """A tensor whose rebuilding asks for 10^15 elements of a storage of four bytes."""
    with_tensor(path, encoder, torch.zeros(7777))
    # 7777 as a pickled BININT2 stands for the size, and for the number of elements in the storage
    rezipped(path, lambda name, content: content.replace(b"M" + (7777).to_bytes(2, "little"),
                                                         b"\x8a\x08" + (10 ** 15).to_bytes(8, "little"))
             if name.endswith("data.pkl") else content)


def nested(path, depth=200_000):
    torch.save({}, path)
    listed = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    rezipped(path, lambda name, content: listed if name.endswith("data.pkl") else content)


HOSTILE = {
    "code": lambda path, encoder: torch.save({"model": Payload()}, path),
    "code in the old format": lambda path, encoder: torch.save({"model": Payload()}, path,
                                                               _use_new_zipfile_serialization=False),
    "code in a bare pickle": lambda path, encoder: path.write_bytes(pickle.dumps({"model": Payload()}, 2)),
    "code as a key": lambda path, encoder: torch.save({"model": {}, "meta": {"x": [Payload()]}}, path),
    "a whole model": lambda path, encoder: torch.save(model.VisionTransformer(16, 8, dim=24, depth=1, heads=1), path),
    "a function": lambda path, encoder: path.write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
    "a million keys": lambda path, encoder: many_keys(path, False),
    "a million keys in the old format": lambda path, encoder: many_keys(path, True),
    "deep nesting": lambda path, encoder: nested(path),
    "a petabyte by expand": lambda path, encoder: with_tensor(path, encoder, torch.zeros(1).expand(10 ** 7, 10 ** 8)),
    "a width by expand": lambda path, encoder: with_tensor(path, encoder, torch.zeros(1).expand(24)),
    "a petabyte by its size": lambda path, encoder: petabytes(path, encoder),
    "bytes that are not there": lambda path, encoder: short_storage(path, encoder),
    "bytes that are not there, padded": lambda path, encoder: padded_storage(path, encoder),
    "a zip bomb": lambda path, encoder: bomb(path, encoder),
    "no tensors": lambda path, encoder: torch.save({"model": {"pos_embed": 3, "patch_embed.proj.weight": "x"}}, path),
    "keys that are no names": lambda path, encoder: torch.save({"model": {1: torch.zeros(2), (2,): torch.zeros(2)}}, path),
    "a sparse tensor": lambda path, encoder: with_tensor(path, encoder, torch.sparse_coo_tensor([[0]], [1.0], (10 ** 12,))),
    "a tensor on no device": lambda path, encoder: with_tensor(path, encoder, torch.empty(10 ** 9, 10 ** 6, device="meta")),
    "no dimensions": lambda path, encoder: with_tensor(path, encoder, torch.tensor(1.0), "patch_embed.proj.weight"),
    "whole numbers": lambda path, encoder: with_tensor(path, encoder, torch.zeros(24, dtype=torch.int64)),
    "no number": lambda path, encoder: with_tensor(path, encoder, torch.full((24,), float("nan"))),
    "infinite": lambda path, encoder: with_tensor(path, encoder, torch.full((24,), float("inf"))),
    "a width of 10^9": lambda path, encoder: claims(path, encoder, dim=10 ** 9),
    "a width of 4096": lambda path, encoder: claims(path, encoder, dim=4096, heads=1),
    "a million blocks": lambda path, encoder: claims(path, encoder, depth=10 ** 6),
    "two hundred blocks": lambda path, encoder: claims(path, encoder, depth=200),
    "no heads": lambda path, encoder: claims(path, encoder, heads=0),
    "pictures of a gigapixel": lambda path, encoder: claims(path, encoder, img_size=[10 ** 6, 10 ** 6]),
    "pictures of 16384": lambda path, encoder: claims(path, encoder, img_size=[16384, 16384]),
    "pictures of three sides": lambda path, encoder: claims(path, encoder, img_size=[32, 32, 32]),
    "a picture that is a word": lambda path, encoder: claims(path, encoder, img_size="32"),
    "patches of nothing": lambda path, encoder: claims(path, encoder, patch_size=0),
    "an infinite mlp": lambda path, encoder: claims(path, encoder, mlp_ratio=float("inf")),
    "an mlp that is a word": lambda path, encoder: claims(path, encoder, mlp_ratio="wide"),
    "a negative width": lambda path, encoder: claims(path, encoder, dim=-24),
    "an unknown setting": lambda path, encoder: claims(path, encoder, backdoor=True),
    "a mean that is a word": lambda path, encoder: with_meta(path, encoder, mean="0.5"),
    "a mean for one channel": lambda path, encoder: with_meta(path, encoder, mean=[0.5]),
    "a std of zero": lambda path, encoder: with_meta(path, encoder, std=[0.0, 0.2, 0.2]),
    "a mean that is no number": lambda path, encoder: with_meta(path, encoder, mean=[float("nan")] * 3),
    "a system that is a list": lambda path, encoder: with_meta(path, encoder, system=["a"] * 3),
    "nothing": lambda path, encoder: path.write_bytes(b""),
    "noise": lambda path, encoder: path.write_bytes(random.Random(0).randbytes(100_000)),
    "half a file": lambda path, encoder: path.write_bytes((encoder / "encoder.pt").read_bytes()[:5000]),
    "a flipped archive": lambda path, encoder: path.write_bytes((encoder / "encoder.pt").read_bytes()[::-1]),
    "a picture": lambda path, encoder: Image.new("RGB", (9, 9)).save(path, "PNG"),
    "a folder": lambda path, encoder: path.mkdir(),
    "a named pipe": lambda path, encoder: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoints_are_refused_in_a_line_and_at_once(encoder, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pt"
    HOSTILE[kind](path, encoder)
    limit, began = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with open("/proc/self/statm") as f:                                 # it may take one gigabyte more
            pages = int(f.read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limit[1]))
        with pytest.raises(data.UsageError) as error:
            checkpoint.read_encoder(str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10      # in KiB
    assert "\n" not in str(error.value) and "hostile.pt" in str(error.value) and len(str(error.value)) < 400
    assert not os.path.exists("payload-was-run")


def test_a_tensor_larger_than_its_part_of_the_archive_is_refused_by_us_too():
    """Newer versions of torch look for themselves; the older ones read on into other memory."""
    content = {"a": torch.zeros(100), "b": [torch.zeros(3, dtype=torch.int64)]}
    checkpoint.measure(content, 1000, Counter([400, 24, 8]), "file")
    with pytest.raises(data.UsageError, match="file: refused, its tensors claim 424 bytes"):
        checkpoint.measure(content, 1000, Counter([40, 24]), "file")
    with pytest.raises(data.UsageError, match="file: refused, its tensors claim 424 bytes"):
        checkpoint.measure(content, 423, None, "file")


LINES = ["../secret.png", "../../etc/passwd", "/etc/passwd", "cat/../../secret.png", "..", "cat\\..\\..\\secret.png",
         "~/secret.png", "file:///etc/passwd", "http://example.org/a.png", "cat/nothing.png 3", "\x00", "cat/",
         "%2e%2e/secret.png"]


@pytest.mark.parametrize("line", LINES)
def test_list_files_lead_to_no_file_outside_the_data(tmp_path, line):
    root = folder_of(tmp_path / "data", ["cat/1.png", "dog/2.png"])
    folder_of(tmp_path, ["secret.png"])
    (tmp_path / "data" / "list.txt").write_text(f"cat/1.png\n{line}\n")
    with pytest.raises(data.UsageError) as error:
        data.load_data(f"{root}/list.txt")
    assert "\n" not in str(error.value) and "list.txt" in str(error.value)


def test_names_in_lists_may_have_blanks(tmp_path):
    names = ["a cat/name with spaces.jpg", "a cat/2 3.png", "a cat/7", "dogs/1.png"]
    root = folder_of(tmp_path, [n if "." in n else n + ".png" for n in names])
    for text, expected in (("a cat/name with spaces.jpg 12\na cat/2 3.png\t4\ndogs/1.png",
                            ["a cat/name with spaces.jpg", "a cat/2 3.png", "dogs/1.png"]),
                           ("a cat/name with spaces.jpg cat\n", ["a cat/name with spaces.jpg"]),
                           ("  name with spaces.jpg  \r\n2 3.png 0\r\n", ["a cat/name with spaces.jpg", "a cat/2 3.png"])):
        (tmp_path / "list.txt").write_text(text)
        assert data.load_data(f"{root}/list.txt").files == expected


def test_a_link_to_a_folder_above_is_followed_no_further(tmp_path):
    folder_of(tmp_path / "data", ["cat/1.png", "dog/2.png"])
    folder_of(tmp_path / "elsewhere", ["3.png"])
    os.symlink(tmp_path / "data", tmp_path / "data" / "cat" / "again")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "bird")          # other links are: sets are put together so
    assert data.list_files(str(tmp_path / "data")) == ["bird/3.png", "cat/1.png", "dog/2.png"]


CLASSIFIERS = {
    "no head": dict(head=3), "a width of 10^9": dict(head=dict(kind="projector", width=10 ** 9, bias=True)),
    "a million blocks": dict(head=dict(kind="probe", block=1, blocks=10 ** 6)), "a word": dict(classes="cat"),
    "too many classes": dict(classes=["c"] * 100), "another kind": dict(head=dict(kind="probe", block=-1, blocks=0)),
    "no mean": dict(mean=None, std=[0.0] * 3), "a huge encoder": dict(config=dict(dim=10 ** 9, depth=3)),
    "no weights": dict(model={}), "weights that are words": dict(model={"a": "b"})}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_hostile_classifiers_are_refused(encoder, tmp_path, kind):
    net = finetune.make(saved(encoder, "encoder.pt")["config"], dict(kind="linear"), 4)
    good = dict(model=net.state_dict(), config=net.config, classes=list("abcd"), head=dict(kind="linear"), mean=[0.5] * 3,
                std=[0.5] * 3)
    torch.save(good, tmp_path / "classifier.pt")
    assert len(finetune.load_classifier(str(tmp_path))[1]["classes"]) == 4
    torch.save(good | CLASSIFIERS[kind], tmp_path / "classifier.pt")
    began = time.monotonic()
    with pytest.raises(data.UsageError) as error:
        finetune.load_classifier(str(tmp_path))
    assert "\n" not in str(error.value) and time.monotonic() - began < 2


@pytest.mark.parametrize("change", [dict(classifier=3), dict(classifier={}), dict(classes=["a"]), dict(mean="x"),
                                    dict(checkpoint=3), dict(std=[0.0] * 3)], ids=str)
def test_hostile_linear_classifiers_are_refused(tmp_path, change):
    good = dict(classifier=dict(weight=torch.zeros(4, 24), bias=torch.zeros(4), normalise=False), classes=list("abcd"),
                checkpoint="x", encoder_digest="x", mean=[0.5] * 3, std=[0.5] * 3)
    checkpoint.check_linear(good, "file")
    with pytest.raises(data.UsageError, match="^file: "):
        checkpoint.check_linear(good | change, "file")


# ------------------------------------------------------------------------------------------- broken picture files
def chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png_that_claims(width, height):
    """A PNG of a hundred bytes that says it has so many pixels."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def encoded(form, mode="RGB", size=(40, 36), **more):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).convert(mode)
    into = io.BytesIO()
    picture.save(into, form, **more)
    return into.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


GOOD_FILES = {
    "animated.gif": encoded("GIF", "P", save_all=True, append_images=[Image.new("P", (40, 36))] * 3),
    "cmyk.jpg": encoded("JPEG", "CMYK"), "sixteen.png": encoded("PNG", "I;16"), "turned.jpg": turned(),
    "a_png_in_truth.jpg": encoded("PNG"), "grey.png": encoded("PNG", "L"), "alpha.png": encoded("PNG", "RGBA"),
    "palette.png": encoded("PNG", "P"), "one_bit.tif": encoded("TIFF", "1"),
    "progressive.jpg": encoded("JPEG", progressive=True), "a dot.and spaces.PNG": encoded("PNG"),
    "wide.bmp": encoded("BMP", size=(300, 2)), "one_pixel.png": encoded("PNG", size=(1, 1)),
    "animated.webp": encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 36))] * 3)}
BAD_FILES = {
    "truncated.jpg": encoded("JPEG")[:600], "truncated.png": encoded("PNG")[:900], "truncated.gif": encoded("GIF")[:300],
    "truncated.webp": encoded("WEBP")[:200], "truncated.tif": encoded("TIFF")[:900], "truncated.bmp": encoded("BMP")[:900],
    "header_only.png": encoded("PNG")[:8], "empty.jpg": b"", "text.jpg": b"this is text\n" * 9,
    "html.png": b"<!DOCTYPE html>",
    "noise.jpg": random.Random(0).randbytes(5000), "noise_after_head.jpg": encoded("JPEG")[:20] + bytes(range(256)) * 9,
    "flipped.png": encoded("PNG")[:200] + bytes(64) + encoded("PNG")[264:], "bomb.png": png_that_claims(60000, 60000),
    "small_bomb.png": png_that_claims(12000, 12000), "vast.png": png_that_claims(2 ** 31 - 1, 2 ** 31 - 1),
    "no_pixels.png": png_that_claims(0, 0), "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pickle.png": pickle.dumps({"a": Payload()}, 2), "short.jpg": b"\xff\xd8\xff"}


@pytest.fixture
def mixed(tmp_path):
    """A folder of 100 good pictures and every bad and unusual one."""
    root = tmp_path / "pictures"
    folder_of(root, [f"good/{i:03}.png" for i in range(100)], (24, 136))
    for name, content in (GOOD_FILES | BAD_FILES).items():
        (root / name).write_bytes(content)
    (root / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    return root


ALL_BAD = {*BAD_FILES, "dangling.png"}


@pytest.mark.parametrize("name", [*BAD_FILES, *GOOD_FILES])
def test_each_kind_of_file_is_read_or_refused_without_its_memory(tmp_path, name):
    (tmp_path / name).write_bytes((BAD_FILES | GOOD_FILES)[name])
    pictures, before = data.Pictures([name], str(tmp_path)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name in BAD_FILES:
        with pytest.raises(data.BadFile):
            pictures.read(0)
    else:
        assert pictures.read(0).mode == "RGB"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    if name == "turned.jpg":
        assert pictures.read(0).size == (36, 40)
    if name == "animated.gif":
        assert np.abs(np.asarray(pictures.read(0)).astype(int)).std() > 20  # the first picture, not a blank later one


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_kill_no_run_and_are_named_once(mixed, capsys, workers):
    pictures = data.load_data(str(mixed), max_bad=0.5)
    loader = data.Loader(pictures, [augment.MAE_VIEW], (16, 16), 10, workers=workers, max_bad=0.5)
    for epoch in range(3):
        batches = list(loader.epoch(epoch))
        assert len(batches) == len(pictures) // 10 and all(b.views[0][:].isfinite().all() for b in batches)
    said = capsys.readouterr().out
    assert {pictures.file(i) for i in pictures.bad} <= ALL_BAD and len(pictures.bad) >= len(ALL_BAD) - 2
    for i in pictures.bad:
        assert said.count(f"warning: skipped {mixed / pictures.file(i)}: ") == 1
    with pytest.raises(data.RunError, match=r"pictures cannot be read, more than --max-bad 0.05 allows; first"):
        again = data.load_data(str(mixed), max_bad=0.05)
        for _ in data.Loader(again, [augment.MAE_VIEW], (16, 16), 10, max_bad=0.05).epoch(0):
            pass


def test_files_that_vanish_while_training_are_replaced(tmp_path, capsys):
    names = [f"{i:03}.png" for i in range(40)]
    pictures = data.load_data(folder_of(tmp_path, names, (24, 136)))
    loader = data.Loader(pictures, [augment.MAE_VIEW], (16, 16), 10, max_bad=0.3)
    assert len(list(loader.epoch(0))) == 4
    for name in names[:5]:
        os.remove(tmp_path / name)
    for epoch in (1, 2):
        assert len(list(loader.epoch(epoch))) == 4
    assert sorted(pictures.bad) == list(range(5))
    said = capsys.readouterr().out
    assert said.count("warning: skipped") == 5 and said.count("FileNotFoundError") == 5


def test_files_without_permission_are_replaced(tmp_path):
    names = [f"{i:03}.png" for i in range(40)]
    root = folder_of(tmp_path / "pictures", names, (24, 136))
    os.chmod(tmp_path / "pictures" / "007.png", 0)
    reachable(tmp_path / "pictures")

    def work():
        pictures = data.load_data(root)
        assert len(list(data.Loader(pictures, [augment.MAE_VIEW], (16, 16), 10, max_bad=0.1).epoch(0))) == 4
        assert list(pictures.bad) == [7]

    assert "007.png: PermissionError" in unprivileged(work)


def checked(arguments, monkeypatch, capsys):
    """(exit code, what it printed, its errors) of python data.py check."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run.program(check.main, check.get_args)
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_check_reports_what_a_run_would_meet(mixed, tmp_path, monkeypatch, capsys):
    code, out, err = checked([mixed, "--out", tmp_path / "bad.txt", "--workers", 2], monkeypatch, capsys)
    assert code == 1 and len(err.strip().splitlines()) == 1
    listed = dict(line.split("\t")[:2] for line in (tmp_path / "bad.txt").read_text().splitlines())
    assert set(listed) == ALL_BAD
    assert listed["empty.jpg"] == "empty" and listed["dangling.png"] == "vanished" and listed["text.jpg"] == "no picture"
    assert {listed[n] for n in ("bomb.png", "small_bomb.png", "vast.png")} == {"decompression bomb"}
    assert {listed[n] for n in ("truncated.jpg", "truncated.png")} == {"truncated"}
    assert f"{len(ALL_BAD)} of {100 + len(GOOD_FILES) + len(ALL_BAD)} pictures are bad" in err
    assert "3 decompression bomb" in err
    assert f"{100 + len(GOOD_FILES)} of {100 + len(GOOD_FILES) + len(ALL_BAD)} pictures are good" in out
    for words in ("2 animated", "1 CMYK", "1 16-bit", "1 turned by EXIF", "1 another format than its name says"):
        assert words in out, out
    shutil.rmtree(mixed / "good")
    for name in ALL_BAD:
        os.remove(mixed / name)
    code, out, err = checked([mixed], monkeypatch, capsys)
    assert code == 0 and not err and f"{len(GOOD_FILES)} of {len(GOOD_FILES)} pictures are good" in out


def test_check_shows_its_progress_and_refuses_nonsense(tmp_path, monkeypatch, capsys):
    root = folder_of(tmp_path / "p", [f"{i}.png" for i in range(40)])
    clock = iter(range(0, 10 ** 6, 10))
    with monkeypatch.context() as patch:
        patch.setattr(check.time, "perf_counter", lambda: float(next(clock)))
        code, out, err = checked([root, "--workers", "1"], patch, capsys)
    assert code == 0 and len(err.splitlines()) > 10 and "20/40 read, 0 bad, left " in err
    (tmp_path / "empty").mkdir()
    for arguments in ([tmp_path / "nowhere"], [tmp_path / "empty"], [root, "--workers", "0"], [root, "--out", tmp_path], []):
        code, out, err = checked(arguments, monkeypatch, capsys)
        assert code == 2 and len(err.strip().splitlines()) == 1, err


def test_data_py_hands_over_to_its_commands(tmp_path, monkeypatch, capsys):
    root = folder_of(tmp_path, ["1.png", "2.png"])
    (tmp_path / "3.png").write_bytes(b"")
    for arguments, code, words in (["check", root], 1, "error: 1 of 3 pictures are bad: 1 empty"), (
            ["juggle"], 2, "which command?"), ([], 2, "which command?"):
        monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(os.path.join(HERE, "data.py"), run_name="__main__")
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == code and len(lines) == 1 and words in lines[0], lines
