"""decode.py and data's reader: the fast ways give what pillow's own gives."""
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("DATA", None)

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageOps

import augment
import data
import decode
import reader
from test_data import corrupt, save_picture
from test_model import pictures_like

torch.set_num_threads(1)


def smooth(h, w, seed=0):
    """A picture (h, w, 3) uint8 with the edges and the noise of a photograph."""
    x = F.interpolate(pictures_like(1, 16, 16, seed).float(), size=(h, w), mode="bicubic")
    x = x + 4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(x[0].clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8))


def as_jpeg(image, orientation=None, **options):
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    content = io.BytesIO()
    image.save(content, "JPEG", **options)
    return bytearray(content.getvalue())


def commented(content, marker=0xFE, text=b"nothing of use"):
    """A JPEG with a segment more."""
    return content[:2] + bytes((0xFF, marker)) + (2 + len(text)).to_bytes(2, "big") + text + content[2:]


RGB = smooth(101, 150)
JPEGS = {"plain": as_jpeg(RGB), "grey": as_jpeg(RGB.convert("L")), "progressive": as_jpeg(RGB, progressive=True),
         "4:4:4": as_jpeg(RGB, subsampling=0), "4:2:2": as_jpeg(RGB, subsampling=1), "comment": commented(as_jpeg(RGB)),
         "restarts": as_jpeg(RGB, restart_marker_rows=1), "XMP without": commented(as_jpeg(RGB), 0xE1, b"http://"),
         "one pixel": as_jpeg(RGB.resize((1, 1))),
         "CMYK": as_jpeg(RGB.convert("CMYK")), "upright": as_jpeg(RGB, 1), "turned": as_jpeg(RGB, 6),
         "upside down": as_jpeg(RGB, 3), "tail": as_jpeg(RGB) + bytes(100),
         "XMP turned": commented(as_jpeg(RGB), 0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')}


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("kind", JPEGS)
def test_pixels_are_pillows(kind, in_chans):
    """Pillow's own way, at every reduction, to the bit."""
    picture = decode.Encoded(JPEGS[kind])
    assert (picture.plain is None) == (kind in ("CMYK", "turned", "upside down", "XMP turned"))
    for factor in (1, 2, 4, 8) if min(picture.size) >= 8 else (1,):
        theirs = Image.open(io.BytesIO(JPEGS[kind]))
        width, height = theirs.size
        if factor > 1:
            theirs.draft(None, (width // factor, height // factor))
        theirs = decode.to_channels(ImageOps.exif_transpose(theirs), in_chans)
        assert picture.size == ((width, height) if "turned" in kind else (height, width))
        ours = decode.Encoded(JPEGS[kind]).pixels(in_chans, factor)
        assert ours.shape == (*(-(-side // factor) for side in picture.size), in_chans)
        assert np.array_equal(ours.numpy(), np.array(theirs).reshape(ours.shape)), factor


def test_without_torchvision_pillow_decodes(monkeypatch):
    fast = decode.Encoded(JPEGS["plain"]).pixels(3)
    called = []
    decoder = decode.jpeg_decoder()
    monkeypatch.setattr(decode, "jpeg_decoder", lambda: lambda *a: called.append(a) or decoder(*a))
    assert torch.equal(decode.Encoded(JPEGS["plain"]).pixels(3), fast) and len(called) == 1
    decode.Encoded(JPEGS["turned"]).pixels(3)
    assert len(called) == 1
    monkeypatch.setattr(decode, "jpeg_decoder", lambda: None)
    assert torch.equal(decode.Encoded(JPEGS["plain"]).pixels(3), fast)


def test_damaged_jpegs_raise_what_pillow_raises():
    whole = JPEGS["plain"]
    for content in (whole[:len(whole) // 2], whole[:300], whole[:20], bytearray(), b"\xff\xd8" + bytearray(100)):
        with pytest.raises(decode.BadFile):
            decode.Encoded(content).pixels(3)
    size = whole.index(b"\xff\xc0") + 5
    for claimed in (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\x65\0\0", b"\0\0\0\x96"):
        hostile = whole[:size] + claimed + whole[size + 4:]
        with pytest.raises(decode.BadFile):
            decode.Encoded(hostile).pixels(3)
    again = whole.index(b"\xff\xc0")                                        # a second frame, of another size
    length = 2 + int.from_bytes(whole[again + 2:again + 4], "big")
    frame = whole[again:again + 5] + b"\0\x10\0\x10" + whole[again + 9:again + length]
    with pytest.raises(decode.BadFile):
        decode.Encoded(whole[:again] + frame + whole[again:]).pixels(3)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_crop_is_torchvisions_resized_crop_of_the_pil_image(mode):
    image = smooth(260, 340)
    for box in ([0, 0, 260, 340], [13, 27, 90, 71], [100, 120, 30, 40], [0, 300, 224, 40], [259, 339, 1, 1]):
        theirs = np.array(tv.resized_crop(image, *box, [56, 64], tv.InterpolationMode(mode))).astype(int)
        ours = decode.crop(torch.from_numpy(np.array(image)), [float(side) for side in box], (56, 64), mode)
        assert ours.shape == (3, 56, 64) and ours.dtype == torch.uint8
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1, box


def test_boxes_of_a_batch_are_those_of_each_picture():
    """To the bit, on which rests that a picture's crop does not depend on its batch."""
    n = 300
    sizes = torch.stack([torch.arange(n) % 97 + 100, torch.arange(n) % 89 + 120], 1)
    for scale in ((0.08, 1.0), (0.2, 1.0)):
        together = augment.random_boxes(torch.arange(n), sizes, scale, 1, 2)
        alone = [augment.random_boxes(torch.tensor([i]), sizes[i:i + 1], scale, 1, 2) for i in range(n)]
        assert torch.equal(torch.cat(alone), together)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEGs and others of many sizes; some on their side, one that cannot be read."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(20):
        exif = Image.Exif()
        exif[0x0112] = 6
        image = smooth(150 + 37 * i, 900 - 31 * i, i)
        if i % 5 == 4:
            image.save(root / f"{i:02}.png", **(dict(exif=exif) if i == 9 else {}))
        else:
            image.save(root / f"{i:02}.jpg", quality=90, **(dict(exif=exif) if i % 5 == 3 else {}))
    corrupt(root / "07.jpg")
    return str(root)


@pytest.mark.parametrize("views, fast", [(augment.MOCO_VIEWS, True), ([augment.MAE_VIEW], True),
                                         ([augment.TEST_VIEW], False)], ids=["moco", "mae", "evaluation"])
def test_a_reader_crops_what_pillow_would(folder, views, fast):
    """Each crop against the picture decoded by pillow at the reduction that the crops allow, its box and its resize."""
    pictures, size = data.load_data(folder), (40, 48)
    loader = data.Loader(pictures, views, size, 20, seed=4)
    ids, shown, bad, crops, left = reader.Reader(loader).__getitems__([(3, i) for i in range(20)])
    assert ids.tolist() == list(range(20)) and list(bad) == [7] and left is None
    assert [i for i in range(20) if shown[i] != i] == [7]
    reduced = set()
    for row, i in enumerate(shown):
        def boxes(image, i=i):
            sizes = torch.tensor([[image.height, image.width]])
            return [loader.boxes(torch.tensor([i]), sizes, k, 3)[0].tolist() for k in range(len(views))]

        path = os.path.join(folder, pictures.files[i])
        image = Image.open(path)
        whole = boxes(ImageOps.exif_transpose(image))
        factor = max(f for f in (1, 2, 4, 8) if all(box[2] >= f * size[0] and box[3] >= f * size[1] for box in whole)
                     or f == 1)
        factor = factor if path.endswith("jpg") else 1
        image = Image.open(path)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        reduced.add(factor)
        image = ImageOps.exif_transpose(image)
        for k, (view, (top, left, height, width)) in enumerate(zip(views, boxes(image))):
            mode = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[view["mode"]]
            corners = (left, top, left + width, top + height)
            resized = image.resize(size[::-1], mode, box=corners)
            if fast:
                resized = image.crop(corners).resize(size[::-1], mode)
            off = np.abs(np.array(resized).astype(int) - crops[k][row].permute(1, 2, 0).numpy())
            assert off.mean() < 2 if fast else off.max() == 0, (i, k, factor)
    assert len(reduced) > 1


def test_crops_do_not_depend_on_what_else_is_in_the_batch(folder, monkeypatch):
    pictures = data.load_data(folder)
    worker = reader.Reader(data.Loader(pictures, augment.MOCO_VIEWS, (32, 32), 20, seed=4))
    whole = worker.__getitems__([(1, i) for i in range(20)])
    monkeypatch.setattr(reader.Reader, "TOGETHER", 3)
    again = worker.__getitems__([(1, i) for i in reversed(range(20))])
    assert whole[1] == again[1][::-1]
    for a, b in zip(whole[3], again[3]):
        assert torch.equal(a, b.flip(0))


def test_functions_of_the_user_get_the_crops(folder):
    pictures, seen = data.load_data(folder), []

    def note(pixels):
        seen.append(pixels)
        return 255 - pixels

    plain, noted = (reader.Reader(data.Loader(pictures, [augment.MAE_VIEW | more], (32, 32), 20)).__getitems__(
        [(1, i) for i in range(5)])[3][0] for more in ({}, dict(pixels=note)))
    assert torch.equal(torch.stack(seen), plain) and torch.equal(noted, 255 - plain)
    assert seen[0].dtype == torch.uint8 and seen[0].shape == (3, 32, 32)


def test_twenty_unreadable_pictures_stop_the_run(tmp_path):
    for i in range(30):
        save_picture(str(tmp_path / f"{i}.jpg"), np.zeros((140, 140, 3), np.uint8))
        corrupt(tmp_path / f"{i}.jpg")
    loader = data.Loader(data.load_data(str(tmp_path)), [augment.MAE_VIEW], (16, 16), 4)
    with pytest.raises(data.RunError, match="20 pictures in a row cannot be read, among them .*jpg: OSError: "):
        next(loader.epoch(0))


# ------------------------------------------------------------------------------------- decoding by the device
def cpu_decoder(contents):
    """Stands in for nvJPEG: the same call, the same errors."""
    return [decode.jpeg_decoder()(bytearray(content.numpy()), 3) for content in contents]


def batches(folder, workers=0, views=augment.MOCO_VIEWS, **options):
    """Two epochs of a folder: ids, shown, crops of each batch."""
    loader = data.Loader(data.load_data(folder), views, (40, 48), 5, seed=4, workers=workers, max_bad=1, **options)
    return [(b.ids, b.shown, *b.crops) for epoch in range(2) for b in loader.epoch(epoch)]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_device_decodes_what_workers_hand_over(folder, workers, capsys):
    """Close to what workers decode, though at full size; turned pictures, PNGs and the corrupt one as before."""
    calls = []

    def decoder(contents):
        calls.append(len(contents))
        return cpu_decoder(contents)

    expected, handed = batches(folder), batches(folder, workers, decoder=decoder)
    assert sum(calls) > 16 and len(expected) == len(handed) == 8
    for ours, theirs in zip(handed, expected):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        for a, b in zip(ours[2:], theirs[2:]):
            assert (a.int() - b.int()).abs().float().mean() < 8 and not torch.equal(a, b)
    said = capsys.readouterr().out
    assert said.count("warning: skipped") == 2 and "07.jpg: OSError" in said and "decode from now on" not in said


@pytest.mark.parametrize("workers", [0, 1])
def test_a_device_that_cannot_decode_is_asked_no_more(folder, workers, capsys):
    calls = []

    def broken(contents):
        calls.append(len(contents))
        raise RuntimeError("nvjpeg: no such device")

    expected, handed = batches(folder), batches(folder, workers, decoder=broken)
    for ours, theirs in zip(handed, expected):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert capsys.readouterr().out.count("the workers decode from now on") == 1
    assert len(calls) <= (1 + workers * 2) * 6      # batches that were read ahead, and each alone


@pytest.mark.parametrize("views", [[augment.TEST_VIEW], [augment.MAE_VIEW | dict(pixels=lambda x: x)]])
def test_evaluations_and_functions_of_the_user_are_not_left_to_the_device(folder, views):
    batches(folder, views=views, decoder=lambda contents: pytest.fail("asked the device"))


def test_the_gpu_is_asked_for_only_where_there_is_one():
    assert data.decoder("cpu", torch.device("cpu")) is None
    with pytest.raises(data.UsageError, match="--decode gpu needs a CUDA device"):
        data.decoder("gpu", torch.device("cpu"))
    assert decode.device_decoder(torch.device("cuda", 0)).keywords["device"] == torch.device("cuda", 0)
