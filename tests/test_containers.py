"""Tars as data: in whatever form people have them they are the folder they were made from, to the
bit; `data.py pack` writes one and survives kills; damage ends in one line."""
import io
import os
import shutil
import subprocess
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import data
from conftest import ROOT, corrupt, png_of_16_bits

FILES = dict(cat=("a.jpg", "b.png", "sub/c.JPEG", "e.jpg"),
             dog=("A.jpg", "d.jpg", "x.y.jpg", "sub.jpg"))
NAMES = [f"{part}/{c}/{name}" for part in ("train", "val") for c in FILES for name in FILES[c]]
SECOND = NAMES[1].encode()
SIZES = [(140, 200), (150, 133), (300, 270), (131, 400), (260, 520), (140, 140), (400, 300)]


def images(root, names, sizes=((24, 24),)):
    """Smooth images of the given (H, W), as files below a folder; returns its path."""
    for i, name in enumerate(names):
        h, w = sizes[i % len(sizes)]
        pixels = data.draw(torch.tensor([1000 * i]), max(h, w))[0, :, :h, :w].permute(1, 2, 0)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.contiguous().numpy()).save(root / name)
    return str(root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return images(tmp_path_factory.mktemp("folder") / "images", NAMES, SIZES)


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    return pack(folder, tmp_path_factory.mktemp("packed") / "x.tar")


def bytes_of(root, name=""):
    with open(os.path.join(root, name) if name else root, "rb") as f:
        return f.read()


def contents(dataset):
    return [bytes(dataset.source.content(i)) for i in range(len(dataset))]


def opened(path, train=True):
    return data.open_folder(str(path), train, 3)


def pack(*arguments):
    data.pack(data.get_args(["pack", *map(str, arguments), "--workers", "2"]))
    return str(arguments[1])


def tar_of(path, members):
    """A tar of (name, bytes), where bytes are None of a link."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def in_many_forms(folder, out):
    """Paths that all stand for the folder."""
    shuffled = torch.randperm(len(NAMES), generator=torch.Generator().manual_seed(1)).tolist()
    pairs = [(NAMES[i], bytes_of(folder, NAMES[i])) for i in shuffled]
    yield pack(folder, out / "pack.tar")
    with tarfile.open(out / "outside.tar", "w") as tar:     # float times: a pax header for each
        tar.add(folder, "images")
    yield str(out / "outside.tar")
    subprocess.run(["tar", "-C", folder, "-cf", out / "inside.tar", "."], check=True)
    yield str(out / "inside.tar")
    more = [(NAMES[2], b"replaced below"), (".hidden/a.jpg", b""), ("link.jpg", None)]
    yield tar_of(out / "twice.tar", [*more, ("notes.txt", b""), *pairs])
    for i in range(3):
        tar_of(out / f"shard-{i:02}.tar", pairs[i::3])
    yield str(out / "shard-{00..02}.tar")
    yield str(out / "shard-0{2,0,1}.tar")
    for part in ("train", "val"):                           # a tar for each part, two ways
        inside = [(n[len(part) + 1:], c) for n, c in pairs if n.startswith(part)]
        tar_of(out / "parts" / part / "x.tar", inside)
        tar_of(out / f"set-{part}.tar", inside)
        tar_of(out / "whole" / f"{part}.tar", [(f"{part}/{name}", c) for name, c in inside])
        # a class that is called train is no folder around all
        tar_of(out / "named" / f"{part}.tar", [*inside, ("train/1.jpg", inside[0][1])])
    assert opened(out / "named").classes == ["cat", "dog", "train"]
    yield str(out / "parts")
    yield str(out / "set-{train,val}.tar")
    yield str(out / "whole")


def test_a_tar_is_the_folder_in_whatever_form(folder, tmp_path, capsys):
    for path in in_many_forms(folder, tmp_path):
        for train in (True, False, True):                   # the index is made, then read
            ours, theirs = data.load(path, train), data.load(folder, train)
            assert list(ours.files) == list(theirs.files) and len(ours) == 8, path
            assert ours.classes == theirs.classes == ["cat", "dog"]
            assert torch.equal(ours.labels, theirs.labels)
            assert contents(ours) == contents(theirs) and ours.digest == theirs.digest, path
        assert list(data.every_image(path).files) == list(data.every_image(folder).files)
    some = ours.select(torch.tensor([5, 1]))
    assert contents(some) == [contents(ours)[i] for i in (5, 1)] and some.file(0) == ours.file(5)
    said = capsys.readouterr().out
    assert "passed over 1 files that are no images: 1 .txt" in said
    assert "passed over 1 links" in said


def test_batches_are_the_folders_to_the_bit(folder, packed):
    loaders = [data.Loader(data.load(path), augment.MOCO_VIEWS, (48, 48), 4, seed=3, workers=n)
               for path, n in ((packed, 2), (folder, 0))]
    for a, b in zip(*(loader.epoch(1) for loader in loaders)):
        assert torch.equal(a.ids, b.ids)
        assert all(torch.equal(a.view(k), b.view(k)) for k in range(2))


def test_small_images_go_into_memory_and_lists_choose_and_label(tmp_path):
    root = images(tmp_path / "f", ["train/cat/1.png", "train/dog/2.png", "train/dog/3.png"])
    path, table = pack(root, tmp_path / "x.tar"), str(tmp_path / "some.txt")
    ours, theirs = data.load(path), data.load(root)
    assert ours.images is not None and torch.equal(ours.images, theirs.images)
    (tmp_path / "some.txt").write_text("cat/1.png 5\n3.png 7\n")
    ours, theirs = (data.load(path, labels_file=table) for path in (path, root))
    assert list(ours.files) == list(theirs.files) and torch.equal(ours.labels, theirs.labels)


def test_shards_of_webdataset(folder, tmp_path):
    image = bytes_of(folder, NAMES[0])
    for part, labels in (("train", "523"), ("validation", "35")):
        for shard in range(2):
            pairs = [(f"{i}.{end}", content) for i, label in enumerate(labels)
                     for end, content in (("png", image), ("cls", label.encode()))]
            tar_of(tmp_path / f"set-{part}-{shard}.tar", pairs)
    train, test = (opened(tmp_path, train) for train in (True, False))
    assert train.classes == ["2", "3", "5"] and train.labels.tolist() == [2, 2, 0, 0, 1, 1]
    assert data.same_classes(train, test).labels.tolist() == [1, 1, 2, 2]
    with pytest.raises(data.DataError, match="in .cls files"):
        pack(tmp_path, tmp_path / "again.tar")
    path = tar_of(tmp_path / "a.tar", [("1.png", image), ("1.cls", b"4"), ("2.png", image)])
    with pytest.raises(data.DataError, match="no labels, 1 have no .cls, first 2.png"):
        data.labelled(opened(path))


def test_imagenets_tar_of_tars(folder, tmp_path):
    inner = {c: [(name, bytes_of(folder, f"train/{c}/{name}")) for name in FILES[c]] for c in FILES}
    tars = [(f"{c}.tar", bytes_of(tar_of(tmp_path / f"{c}.tar", inner[c]))) for c in inner]
    ours, theirs = opened(tar_of(tmp_path / "all.tar", tars[::-1])), opened(folder)
    assert list(ours.files) == list(theirs.files) and contents(ours) == contents(theirs)
    assert ours.classes == theirs.classes and torch.equal(ours.labels, theirs.labels)
    classes = ["n01440764", "n01443537"]                    # unpacked once
    for c in classes:
        tar_of(tmp_path / "once" / f"{c}.tar", [(f"{c}_{i}.JPEG", b"") for i in (2, 1)])
    found = opened(tmp_path / "once")
    assert found.classes == classes and found.labels.tolist() == [0, 0, 1, 1]
    assert found.file(2) == f"{classes[1]}/{classes[1]}_1.JPEG"


def test_the_index_is_made_once_and_again_when_stale_or_damaged(folder, tmp_path, monkeypatch):
    path, index, made = pack(folder, tmp_path / "x.tar"), tmp_path / "x.tar.index.npz", []
    expected, original = list(data.every_image(path).files), data.index_tars
    monkeypatch.setattr(data, "index_tars", lambda *a: made.append(1) or original(*a))
    assert list(data.every_image(path).files) == expected and not made
    whole = index.read_bytes()
    for damaged in (whole[:-100], b"", b"other", whole.replace(b"cat", b"cot")):
        index.write_bytes(damaged)
        assert list(data.every_image(path).files) == expected
    os.utime(path, ns=(0, 0))
    assert list(data.every_image(path).files) == expected and len(made) == 5
    index.unlink()
    monkeypatch.setattr(data.os, "access", lambda *a: False)
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        assert list(data.every_image(path).files) == expected
    assert len(made) == 6 and not index.exists() and list(tmp_path.glob("tar-index-*.npz"))


@pytest.mark.parametrize("change, message", [
    (lambda w: w[:len(w) // 2], "cut short"), (lambda w: b"", "cut short"),
    (lambda w: w[:-10240], "cut short"),
    (lambda w: w.replace(SECOND, SECOND.upper()), "damaged, cut short or two in one at "),
    (lambda w: w[:124] + b"7" * 12 + w[136:], "damaged"), (lambda w: w * 2, "two in one"),
    (lambda w: b"\x1f\x8b" + w, "compressed by gzip")])
def test_damage_ends_in_one_line(packed, tmp_path, change, message):
    path, whole = tmp_path / "x.tar", bytes_of(packed)
    path.write_bytes(whole)
    before = opened(path)
    path.write_bytes(change(whole))
    with pytest.raises(data.DataError, match=message) as error:
        opened(path)
    assert "\n" not in str(error.value)
    if path.stat().st_size != len(whole):
        with pytest.raises(data.BadFile, match="has changed since it was opened"):
            before.read(2)


@pytest.mark.parametrize("arguments, message", [
    (["/nowhere", "x.tar"], "/nowhere: no such folder"), ([ROOT], "a tar alone with --verify"),
    ([ROOT, "/nowhere/x.tar"], "cannot write"), (["y-{0..2}.tar", "b"], "no such tar"),
    (["--short-side", "3", ROOT, "b"], "16 to 16384")])
def test_bad_input_ends_in_one_line(capsys, arguments, message):
    assert data.program(["pack", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


def test_the_short_side_is_shrunk_and_what_a_jpeg_cannot_hold_is_kept(tmp_path):
    sizes = [(150, 301), (200, 160), (90, 300)]
    root = images(tmp_path / "f", ["a.jpg", "b.png", "c.jpg"], sizes)
    Image.open(f"{root}/b.png").convert("RGBA").save(f"{root}/d.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(f"{root}/a.jpg").save(f"{root}/e.jpg", exif=turned, quality=95)
    Image.fromarray(np.arange(40000, dtype=np.uint16).reshape(200, 200)).save(f"{root}/f.png")
    (tmp_path / "f/g.png").write_bytes(png_of_16_bits(np.zeros((150, 150, 3))))
    Image.new("RGBA", (150, 150)).save(f"{root}/h.tif")
    bands = bytes_of(root, "h.tif").replace(b"\x52\1\3\0\1\0\0\0\2", b"\x52\1\3\0\1\0\0\0\0")
    assert bands != bytes_of(root, "h.tif")
    (tmp_path / "f/h.tif").write_bytes(bands)               # a fourth band that is no alpha
    path = pack(root, tmp_path / "x.tar", "--short-side", "100")
    ours, theirs = data.every_image(path), data.every_image(root)
    assert [ours.open(i).size for i in range(8)] == [
        (100, 201), (125, 100), (90, 300), (200, 160), (201, 100), (200, 200), (150, 150),
        (150, 150)]
    assert [contents(ours)[i] == contents(theirs)[i] for i in range(8)] == [0, 0, 1, 1, 0, 1, 1, 1]
    for i in (0, 1, 4):
        size = ours.open(i).size[::-1]
        small = np.array(Image.fromarray(theirs.read(i).numpy()).resize(size, Image.LANCZOS))
        assert np.abs(small.astype(int) - ours.read(i).numpy()).mean() < 2.5


def test_bad_images_are_skipped_named_and_counted(tmp_path, capsys):
    root = images(tmp_path / "f", [f"{i:03}.png" for i in range(200)])
    corrupt(f"{root}/050.png")
    corrupt(f"{root}/150.jpg")
    path = pack(root, tmp_path / "x.tar")
    said = capsys.readouterr().out
    assert said.count("warning: skipped") == 2 and "199 images" in said and "2 skipped" in said
    assert data.program(["pack", root, f"{tmp_path}/y.tar", "--max-bad", "0.005"]) == 1
    assert not (tmp_path / "y.tar").exists()
    with tarfile.open(path) as tar:                         # any tool reads it
        assert tar.getnames() == [f"{i:03}.png" for i in range(200) if i != 50]
    assert data.program(["pack", "--verify", path]) == 0
    assert "199 of 199 images are good" in capsys.readouterr().out


def test_formats_whose_header_goes_with_their_pixels_are_packed(tmp_path):
    """Pillow forgets where the pixels of a PPM begin once they are read."""
    root = images(tmp_path / "f", ["a.ppm", "b.pgm"], [(60, 80), (60, 80)])
    path = pack(root, tmp_path / "x.tar", "--short-side", "30")
    assert [data.load(path).read(i).shape[0] for i in (0, 1)] == [30, 30]


def test_a_dangling_link_among_tars_is_named(folder, packed, tmp_path):
    shutil.copy(packed, tmp_path / "a.tar")
    os.symlink("nowhere.tar", tmp_path / "b.tar")
    with pytest.raises(data.DataError, match="b.tar: a link to a tar that is not there"):
        opened(tmp_path)


def test_packing_goes_on_after_kill_9(start, tmp_path, capsys):
    root = images(tmp_path / "f", ["00.jpg"], [(500, 600)])
    for i in range(1, 80):
        shutil.copy(f"{root}/00.jpg", f"{root}/{i:02}.jpg")
    path, part, small = tmp_path / "x.tar", tmp_path / "x.tar.200.part", ("--short-side", "200")
    whole = bytes_of(pack(root, tmp_path / "once.tar", *small))
    job = start(pack, root, path, *small)
    deadline = time.monotonic() + 120
    while not part.exists() or part.stat().st_size <= len(whole) // 5:
        assert time.monotonic() < deadline and job.jobs[0].is_alive(), job.said()
        time.sleep(0.005)
    job.jobs[0].kill()
    assert job.codes() == [-9] and not path.exists()
    lost = part.read_bytes()
    capsys.readouterr()
    for content in (b"", lost[:100], lost[:-100]):
        part.write_bytes(content)
        pack(root, path, *small)
        assert path.read_bytes() == whole
        path.unlink()
    assert capsys.readouterr().out.count("going on: ") == 1
    part.write_bytes(lost[:-100])
    os.remove(f"{root}/00.jpg")                             # then it was begun with another set
    pack(root, path, *small)
    assert "was begun with other images, such as 00.jpg: starts over" in capsys.readouterr().out
    assert len(data.load(str(path)).files) == 79
