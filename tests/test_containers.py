"""Tars as data: a tar is the folder it was made from, to the bit, in whatever form people have it; `data.py pack`
writes one and survives kills; damage and hostile files end in one line."""
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import augment
import data
import mae_pretrain

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CAT, DOG = ("a.jpg", "b.png", "sub/c.JPEG", "e.jpg"), ("A.jpg", "d.jpg", "x.y.jpg", "sub.jpg")
NAMES = [f"{part}/{c}/{n}" for part in ("train", "val") for c, names in (("cat", CAT), ("dog", DOG)) for n in names]
SIZES = [(140, 200), (150, 133), (300, 270), (131, 400), (260, 520), (140, 140), (129, 129), (400, 300)]


def photographs(root, names, sizes=None):
    """Smooth images of the given (H, W), as files."""
    for i, name in enumerate(names):
        generator = torch.Generator().manual_seed(i)
        size = sizes[i % len(sizes)] if sizes else (24, 24)
        pixels = F.interpolate(torch.rand(1, 3, 8, 8, generator=generator) * 255, size=size, mode="bicubic")
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(pixels[0].clamp(0, 255).permute(1, 2, 0).byte().numpy()).save(path, quality=92)
    return str(root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("folder") / "images", NAMES, SIZES)


def bytes_of(root, name):
    with open(os.path.join(root, name), "rb") as f:
        return f.read()


def contents(dataset):
    return [bytes(dataset.source.content(i)) for i in range(len(dataset))]


def pack(*arguments):
    data.pack(data.get_args(["pack", *map(str, arguments), "--workers", "2"]))
    return str(arguments[1])


def tar_of(path, members, mode="w", **options):
    """A tar of (name, bytes or TarInfo)."""
    with tarfile.open(path, mode, **options) as tar:
        for name, content in members:
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(content, tarfile.TarInfo):
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return str(path)


def tars_in_many_forms(folder, out):
    """Paths that all stand for the folder."""
    pairs = [(name, bytes_of(folder, name)) for name in NAMES]
    mixed = [pairs[i] for i in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))]
    yield pack(folder, out / "pack.tar")
    yield tar_of(out / "ustar.tar", mixed, format=tarfile.USTAR_FORMAT)
    with tarfile.open(out / "outside.tar", "w") as tar:     # float times: a pax header for each
        tar.add(folder, "images")
    yield str(out / "outside.tar")
    subprocess.run(["tar", "-C", folder, "-cf", out / "inside.tar", "."], check=True)
    yield str(out / "inside.tar")
    again = [(NAMES[2], b"overwritten below"), (".hidden/a.jpg", b""), ("train/._a.jpg", b""), ("notes.txt", b"")]
    yield tar_of(out / "twice.tar", again + mixed)
    for i in range(3):
        tar_of(out / f"shard-{i:02}.tar", mixed[i::3])
    yield str(out / "shard-{00..02}.tar")
    yield str(out / "shard-0{2,0,1}.tar")
    for part in ("train", "val"):                           # a folder of tars for the parts
        (out / "parts" / part).mkdir(parents=True)
        tar_of(out / "parts" / part / "x.tar", [(n.split("/", 1)[1], c) for n, c in mixed if n.startswith(part)])
        tar_of(out / f"set-{part}.tar", [(n.split("/", 1)[1], c) for n, c in mixed if n.startswith(part)])
    yield str(out / "parts")
    yield str(out / "set-{train,val}.tar")


def test_a_tar_is_the_folder_in_whatever_form(folder, tmp_path, capsys):
    for path in tars_in_many_forms(folder, tmp_path):
        for again in range(2):                              # with an index made, then read
            for train in (True, False):
                ours, theirs = data.load(path, train), data.load(folder, train)
                assert list(ours.files) == list(theirs.files) and len(ours) == 8, path
                assert ours.classes == theirs.classes == ["cat", "dog"]
                assert torch.equal(ours.labels, theirs.labels)
                assert contents(ours) == contents(theirs), path
        assert list(data.every_image(path).files) == list(data.every_image(folder).files)
    some = ours.select(torch.tensor([5, 1]))
    assert contents(some) == [contents(ours)[5], contents(ours)[1]] and some.file(0) == ours.file(5)
    assert "passed over 1 files that are no images: 1 .txt" in capsys.readouterr().out


@pytest.mark.parametrize("views", [augment.MOCO_VIEWS, [augment.MAE_VIEW], [augment.TEST_VIEW]],
                         ids=["moco", "mae", "evaluation"])
def test_batches_are_the_folders_to_the_bit(folder, tmp_path, views):
    path = pack(folder, tmp_path / "x.tar")
    for workers in (0, 2):
        loaders = [data.Loader(data.load(p), views, (48, 48), 4, seed=3, workers=workers) for p in (path, folder)]
        for a, b in zip(*(loader.epoch(1) for loader in loaders)):
            assert torch.equal(a.ids, b.ids)
            for k in range(len(views)):
                assert torch.equal(a.view(k), b.view(k))


def test_a_run_from_a_tar_is_the_folders_to_the_bit(folder, tmp_path):
    weights = []
    for path in (pack(folder, tmp_path / "x.tar"), folder):
        out = str(tmp_path / f"run{len(weights)}")
        mae_pretrain.main(mae_pretrain.get_args(
            ["--arch", "vit_mini", "--patch-size", "8", "--img-size", "16", "--epochs", "2", "--batch-size", "4",
             "--amp", "off", "--workers", "0", "--device", "cpu", "--lr", "0.1", "--data", path, "--out", out]))
        weights.append(torch.load(os.path.join(out, "last.pt"), weights_only=True)["model"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values()))


def test_small_images_go_into_memory_and_lists_choose(tmp_path):
    root = photographs(tmp_path / "f", ["train/cat/1.png", "train/dog/2.png", "train/dog/3.png"])
    ours, theirs = data.load(pack(root, tmp_path / "x.tar")), data.load(root)
    assert ours.images is not None and torch.equal(ours.images, theirs.images)
    (tmp_path / "some.txt").write_text("cat/1.png\n3.png\n")
    assert torch.equal(*(data.labelled(d, str(tmp_path / "some.txt"))[0] for d in (ours, theirs)))


# ------------------------------------------------------------------------------------- webdataset, imagenet
@pytest.mark.parametrize("text", ["{}", "class {}", "{}\n"])
def test_shards_of_webdataset(tmp_path, text):
    wds = pytest.importorskip("webdataset")
    root = photographs(tmp_path / "f", [f"{i % 12:02}/{i:04}.png" for i in range(30)])
    names = sorted(os.listdir(os.path.join(root, c)) for c in os.listdir(root))
    names = sorted(name for some in names for name in some)
    with wds.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=7, verbose=0) as sink:
        for name in names:
            label = int(name[:4]) % 12
            sink.write({"__key__": name[:-4], "png": bytes_of(root, f"{label:02}/{name}"), "json": {"x": 1},
                        "cls": text.format(label)})
    for path in (f"{tmp_path}/s-{{000..004}}.tar", str(tmp_path / "only")):
        if path.endswith("only"):
            os.makedirs(path)
            for i in range(5):
                os.rename(tmp_path / f"s-{i:03}.tar", tmp_path / "only" / f"s-{i:03}.tar")
        dataset = data.open_folder(path, True, 3)
        assert list(dataset.files) == names
        assert dataset.classes == [text.format(i).strip() for i in sorted(
            range(12), key=str if text.startswith("class") else int)]
        assert [dataset.classes[c] for c in dataset.labels.tolist()] == [
            text.format(int(n[:4]) % 12).strip() for n in names]
        assert contents(dataset) == [bytes_of(root, f"{int(n[:4]) % 12:02}/{n}") for n in names]
        samples = [s for s in wds.WebDataset([str(t) for t in data.find_tars(path)], shardshuffle=False)]
        assert [s["png"] for s in samples] == contents(dataset)
    with pytest.raises(data.DataError, match="in .cls files"):
        pack(path, tmp_path / "again.tar")


def test_shards_with_keys_that_begin_anew_parts_and_missing_labels(tmp_path):
    image = bytes_of(photographs(tmp_path / "f", ["1.png"]), "1.png")
    for part, labels in (("train", "523"), ("validation", "35")):
        for shard in range(2):
            pairs = [(f"{i}.{end}", content) for i, label in enumerate(labels)
                     for end, content in (("png", image), ("cls", label.encode()))]
            tar_of(tmp_path / f"set-{part}-{shard}.tar", pairs)
    os.rename(tmp_path / "f", tmp_path / ".f")
    train, test = (data.open_folder(str(tmp_path), train, 3) for train in (True, False))
    assert train.classes == ["2", "3", "5"] and train.labels.tolist() == [2, 0, 1] * 2
    assert train.file(3) == "set-train-1_0.png"
    assert data.same_classes(train, test).labels.tolist() == [1, 2, 1, 2]
    path = tar_of(tmp_path / "some.tar", [("1.png", image), ("1.cls", b"4"), ("2.png", image)])
    assert data.open_folder(path, True, 3).labels is None
    with pytest.raises(data.DataError, match="no labels, 1 have no .cls, first 2.png"):
        data.labelled(data.open_folder(path, True, 3))


def test_imagenets_tar_of_tars(folder, tmp_path):
    inner = {}
    for name in NAMES[:8]:
        _, c, *rest = name.split("/")
        inner.setdefault(c, []).append(("/".join(rest), bytes_of(folder, name)))
    for c, pairs in inner.items():
        (tmp_path / "classes").mkdir(exist_ok=True)
        tar_of(tmp_path / "classes" / f"{c}.tar", [(n.replace("/", "_"), b) for n, b in pairs])
        tar_of(tmp_path / f"{c}.tar", pairs)
    path = tar_of(tmp_path / "all.tar", [(f"{c}.tar", (tmp_path / f"{c}.tar").read_bytes()) for c in ("dog", "cat")])
    ours, theirs = data.open_folder(path, True, 3), data.open_folder(folder, True, 3)
    assert list(ours.files) == list(theirs.files) and contents(ours) == contents(theirs)
    assert ours.classes == theirs.classes and torch.equal(ours.labels, theirs.labels)
    assert data.open_folder(str(tmp_path / "classes"), True, 3).labels.tolist() == ours.labels.tolist()
    (tmp_path / "i").mkdir()
    for c in ("n01440764", "n01443537"):                    # unpacked once, as many have it
        tar_of(tmp_path / "i" / f"{c}.tar", [(f"{c}_{i}.JPEG", ours.source.content(i)[:]) for i in ()] + [
            (f"{c}_{i}.JPEG", bytes(ours.source.content(i))) for i in (2, 1)])
    found = data.open_folder(str(tmp_path / "i"), True, 3)
    assert found.classes == ["n01440764", "n01443537"] and found.file(2) == "n01443537/n01443537_1.JPEG"


# ------------------------------------------------------------------------------------------------ the index
def test_the_index_is_made_once_and_again_when_stale_or_damaged(folder, tmp_path, monkeypatch):
    path = pack(folder, tmp_path / "x.tar")
    index = tmp_path / "x.tar.index.npz"
    expected, made = list(data.every_image(path).files), []
    original = data.index_tars
    monkeypatch.setattr(data, "index_tars", lambda *a: made.append(1) or original(*a))
    data.open_folder(path, True, 3)
    assert index.exists() and not made
    whole = index.read_bytes()
    for damaged in (whole[:100], whole[:-100], b"", b"something else", whole.replace(b"cat", b"cot")):
        index.write_bytes(damaged)
        assert list(data.every_image(path).files) == expected
    assert len(made) == 5 and index.read_bytes()[-100:] == whole[-100:]
    os.utime(path, ns=(0, 0))
    assert list(data.every_image(path).files) == expected and len(made) == 6
    index.unlink()
    index.mkdir()                                           # cannot be written: in the temporary folder
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        assert list(data.every_image(path).files) == expected
    assert len(made) == 7 and not list(tmp_path.glob("*.part"))


def reads(queue, dataset):
    queue.put(contents(dataset))


def test_processes_open_the_tars_themselves_and_many_tars_are_no_trouble(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "OPEN_TARS", 3)
    for i, name in enumerate(NAMES):
        tar_of(tmp_path / f"s{i:02}.tar", [(name, bytes_of(folder, name))])
    dataset = data.open_folder(str(tmp_path), True, 3)
    expected = contents(data.open_folder(folder, True, 3))
    assert contents(dataset) == expected == contents(pickle.loads(pickle.dumps(dataset)))
    assert len(dataset.source.tars.fds) == 3
    for kind in ("spawn", "fork"):
        context = multiprocessing.get_context(kind)
        queue = context.Queue()
        worker = context.Process(target=reads, args=(queue, dataset))
        worker.start()
        assert queue.get(timeout=60) == expected
        worker.join()
        queue.close()
    if os.path.isdir("/proc/self/fd"):
        before = os.listdir("/proc/self/fd")
        contents(dataset)
        assert len(os.listdir("/proc/self/fd")) == len(before)


# --------------------------------------------------------------------------------------- damage, hostile files
def test_what_cannot_be_read_ends_in_one_line(folder, tmp_path, capsys):
    path = tmp_path / "x.tar"
    whole = open(pack(folder, path), "rb").read()
    link, long = tarfile.TarInfo("b.png"), "d" * 90 + "/" + "e" * 200 + "é.png"
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    image = bytes_of(folder, NAMES[0])
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        tar_of(path, [("b.png", link), (long, image)], format=format)
        found = data.every_image(str(path))
        assert list(found.files) == [long] and contents(found) == [image]
    assert "passed over 1 links" in capsys.readouterr().out
    for content, message in (
            (whole[:len(whole) // 2], "cut short"), (whole[:600], "cut short"), (b"", "cut short"),
            (whole[:-10240], "cut short"), (whole[:2000] + bytes(5000), "no header|cut short|no images"),
            (whole[:1024] + b"x" + whole[1025:], "damaged, there is no header at byte 1024"), (whole * 2, "tar -A"),
            (whole[:124] + b"7" * 12 + whole[136:], "damaged"), (b"\x1f\x8b" + bytes(600), "compressed by gzip"),
            (data.OLD_PACK + bytes(600), "older version.*data.py pack FOLDER FILE.tar")):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=message) as error:
            data.open_folder(str(path), True, 3)
        assert "\n" not in str(error.value)
    for name in ("../a.png", "/a.png", "x/../../a.png"):
        with pytest.raises(data.DataError, match="leads out of it"):
            data.open_folder(tar_of(path, [(name, image)]), True, 3)
    for name in ("y-{0..2}.tar", "{}.tar", "nothing.tar"):
        with pytest.raises(data.DataError, match="no such"):
            data.open_folder(str(tmp_path / name), True, 3)


def test_a_tar_that_changes_under_the_reader_is_a_bad_image(folder, tmp_path):
    dataset = data.load(pack(folder, tmp_path / "x.tar"))
    assert dataset.read(2) is not None
    os.truncate(tmp_path / "x.tar", 4000)
    with pytest.raises(data.BadFile, match="has changed since it was opened"):
        dataset.read(2)


# ------------------------------------------------------------------------------------------------ writing
def test_the_short_side_is_shrunk_and_what_a_jpeg_cannot_hold_is_kept(tmp_path):
    root = photographs(tmp_path / "f", ["a.jpg", "b.png", "c.jpg"], [(150, 301), (200, 160), (90, 300)])
    Image.open(f"{root}/b.png").convert("RGBA").save(f"{root}/d.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(f"{root}/a.jpg").save(f"{root}/e.jpg", exif=turned, quality=95)
    Image.fromarray(np.arange(40000, dtype=np.uint16).reshape(200, 200)).save(f"{root}/f.png")
    ours = data.every_image(pack(root, tmp_path / "x.tar", "--short-side", "100", "--quality", "95"))
    theirs = data.every_image(root)
    assert [ours.open(i).size for i in range(6)] == [(100, 201), (125, 100), (90, 300), (200, 160), (201, 100),
                                                     (200, 200)]
    for i, kept in enumerate((False, False, True, True, False, True)):
        assert (contents(ours)[i] == contents(theirs)[i]) == kept
        if not kept:
            assert ours.open(i).is_jpeg
            size = ours.open(i).size[::-1]
            expected = Image.fromarray(theirs.read(i).numpy()).resize(size, Image.LANCZOS)
            assert np.abs(np.array(expected).astype(int) - ours.read(i).numpy()).mean() < 2.5


def test_bad_images_are_skipped_named_and_counted(tmp_path, capsys):
    root = photographs(tmp_path / "f", [f"{i:03}.png" for i in range(200)])
    for name in ("050.png", "150.jpg"):
        with open(f"{root}/{name}", "wb") as f:
            f.write(b"no image")
    path = pack(root, tmp_path / "x.tar")
    said = capsys.readouterr().out
    assert said.count("warning: skipped") == 2 and "199 images" in said and "2 skipped" in said
    assert len(data.every_image(path)) == 199
    with pytest.raises(data.DataError, match="2 of 201 images cannot be read, more than --max-bad 0.005") as error:
        pack(root, tmp_path / "y.tar", "--max-bad", "0.005")
    assert error.value.exit_code == 1 and not (tmp_path / "y.tar").exists()
    with tarfile.open(path) as tar:
        assert all(m.mtime == m.uid == 0 and m.mode == 0o644 for m in tar) and len(tar.getnames()) == 199
    data.pack(data.get_args(["pack", "--verify", path]))
    assert "199 of 199 images are good" in capsys.readouterr().out


def test_packing_goes_on_after_kill_9_and_a_loss_of_power(tmp_path, capsys):
    names = [f"{i:03}.jpg" for i in range(120)]
    root, path, part = photographs(tmp_path / "f", names, [(700, 900)]), tmp_path / "x.tar", tmp_path / "x.tar.part"
    whole = open(pack(root, tmp_path / "once.tar", "--short-side", "300"), "rb").read()
    command = [sys.executable, os.path.join(ROOT, "data.py"), "pack", root, str(path), "--short-side", "300",
               "--workers", "1"]
    for attempt in range(2):
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        reached, deadline = part.stat().st_size if attempt else 0, time.monotonic() + 120
        while not part.exists() or part.stat().st_size <= reached + len(whole) // 5:
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.005)
        if not attempt:
            with pytest.raises(data.DataError, match="being written by another process"):
                pack(root, path, "--short-side", "300")
        job.send_signal(signal.SIGKILL)
        assert job.wait() == -9 and not path.exists()
    lost = bytearray(part.read_bytes())
    kept = len(lost) // 512 // 2 * 512
    capsys.readouterr()
    for content in (lost[:-100], lost[:kept] + bytes(4096) + lost[kept + 4096:], lost[:700], lost[:100], b""):
        part.write_bytes(content)
        pack(root, path, "--short-side", "300")
        assert path.read_bytes() == whole
        path.unlink()
    assert capsys.readouterr().out.count("going on: ") == 2
    part.write_bytes(lost)
    with pytest.raises(data.DataError, match="begun with other options"):
        pack(root, path)


@pytest.mark.parametrize("arguments, code, message", [
    (["/nowhere", "x.tar"], 2, "/nowhere: no such folder"), (["FOLDER"], 2, "a tar alone with --verify"),
    (["--verify", "/nowhere"], 2, "/nowhere: no such"), (["--verify", __file__], 2, "no such folder or tar"),
    (["--short-side", "3", "FOLDER", "b"], 2, "16 to 16384"), (["FOLDER", "/nowhere/x.tar"], 2, "cannot write"),
    (["FOLDER", "/dev/full/x"], 2, "cannot write")])
def test_bad_input_ends_in_one_line(folder, capsys, arguments, code, message):
    arguments = [folder if part == "FOLDER" else part for part in arguments]
    assert data.program(["pack", *arguments]) == code
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
