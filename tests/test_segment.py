"""Tests of segment.py: identities of measure, windows, networks and rates; labels; runs."""
import itertools
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import checkpoint
import model
import run
import segment
from conftest import log_of
from data import DataError
from figures import segmentation as figures
from run import UsageError

CONFIG = dict(img_size=[16, 24], patch_size=4, in_chans=3, dim=24, depth=6, heads=3, mlp_ratio=4.0)
ENV = SimpleNamespace(device=torch.device("cpu"), rank=0, processes=1, autocast=lambda net: net)
QUIET = ["--device", "cpu", "--amp", "off", "--workers", "0", "--log-every", "1", "--show", "2"]
SMALL = "--init none --arch vit_mini --channels 8 --crop-size 16x24 --iterations 4 --batch-size 2"


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A still smaller vit_mini."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.ARCHS, "vit_mini", ((4, 24, 3, 3), (16, 1, 2)))
        patch.delenv("DATA", raising=False)
        yield


def go(folder, out, *more):
    options = [*QUIET, *SMALL.split(), "--data", str(folder), "--out", str(out), *more]
    return segment.main(segment.get_args(options))


def network(protocol="upernet", config=CONFIG):
    torch.manual_seed(0)
    head = segment.describe(protocol, config["depth"], 3, channels=8, fcn_channels=8)
    return segment.build(config, head)[0]


def scene(i, size=(16, 24)):
    """(image whose colours tell its classes, its label): three bands, different for each i."""
    rng = np.random.default_rng(i)
    label = np.zeros(size, np.uint8)
    label[rng.integers(4, 8):] = 1
    label[:, rng.integers(12, 18):] = 2
    colours = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 230]])
    return (colours[label] + rng.integers(-20, 20, (*size, 3))).astype(np.uint8), label


def write(root, part, n, first=0, **more):
    for i in range(first, first + n):
        for kind, pixels in zip(("images", "labels"), scene(i, **more)):
            os.makedirs(root / part / kind, exist_ok=True)
            Image.fromarray(pixels).save(root / part / kind / f"{i:02}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write(root, "train", 4)
    write(root, "val", 3, first=10, size=(20, 31))
    return root


def test_miou_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]])
    guess = torch.tensor([[0, 1, 1, 1], [2, 0, 3, 0]])
    matrix = segment.confusion(truth, guess, 5)
    found = segment.measures(matrix)
    assert found["iou"] == [33.33, 66.67, 50.0, None, None]    # 1/3, 2/3, 1/2; two classes nowhere
    assert found["miou"] == 50.0 and found["accuracy"] == 66.67
    assert segment.measures(matrix, [1])["miou"] == 41.67           # the mean of 1/3 and 1/2
    other = torch.where(truth == 255, 4, guess)    # whatever is said where 255 is
    assert torch.equal(matrix, segment.confusion(truth, other, 5))
    # a class that is only predicted counts, with 0; accumulated, no mean over images
    one, two = (segment.confusion(torch.tensor(a), torch.tensor(b), 5)
                for a, b in (([0] * 8, [0] * 8), ([0, 1], [1, 3])))
    expected = pytest.approx(100 * (8 / 9 + 0 + 0) / 3, abs=0.01)
    assert segment.measures(one + two)["miou"] == expected


def test_windows_of_one_size_cover_any_image():
    assert segment.corners(512, 512, 341) == [0]
    assert segment.corners(683, 512, 341) == [0, 171]
    assert segment.corners(1024, 512, 341) == [0, 341, 512]
    assert segment.corners(853, 512, 341) == [0, 341]    # fits to the pixel
    logits = torch.arange(40.0)[:, None, None]    # more classes than are resized at once
    found = segment.slide(lambda x: (logits.expand(len(x), 40, 4, 6), None),
                          torch.randn(3, 41, 67), (16, 24), 11)
    torch.testing.assert_close(found, logits.expand(40, 41, 67))
    assert (segment.label_map(found, (50, 33)) == torch.full((50, 33), 39)).all()
    x = torch.randn(40, 5, 7)
    expected = segment.resized(x[None], (9, 9))[0].argmax(0)
    assert torch.equal(segment.label_map(x, (9, 9)).long(), expected)
    # one window is the whole; small images are padded
    net, x = network().eval(), torch.randn(3, 16, 24)
    whole = segment.resized(net(x[None])[0], (16, 24))[0]
    assert torch.equal(segment.slide(net, x, (16, 24), 8), whole)
    again = net(F.pad(x[:, :10, :20], (0, 4, 0, 6))[None])[0]
    expected = segment.resized(again, (16, 24))[0, :, :10, :20]
    assert torch.equal(segment.slide(net, x[:, :10, :20], (16, 24), 8), expected)


def test_relative_bias_is_by_offset_and_of_zero_the_plain_encoder():
    layer = segment.RelativeAttention(24, 3, (3, 4))
    torch.nn.init.normal_(layer.offsets)
    torch.nn.init.normal_(layer.class_bias)
    bias = layer.bias(torch.float32)
    for asks, asked in itertools.product(range(12), range(12)):
        dy, dx = asks // 4 - asked // 4, asks % 4 - asked % 4
        assert torch.equal(bias[:, 1 + asks, 1 + asked], layer.offsets[:, dy + 2, dx + 3])
    to_patches, to_class, own = layer.class_bias.unbind(1)
    assert torch.equal(bias[:, 0, 1:], to_patches[:, None].expand(3, 12))
    assert torch.equal(bias[:, 0, 0], own)
    assert torch.equal(bias[:, 1:, 0], to_class[:, None].expand(3, 12))
    net, plain = network().eval(), model.VisionTransformer(**CONFIG).eval()
    state = {k: v for k, v in net.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(state, strict=False)
    x = torch.randn(2, 3, 16, 24)
    for ours, theirs in zip(net.intermediate(x, net.taps), plain.intermediate(x, net.taps)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(5, 7), (4, 6), (2, 3)])
def test_pyramid_and_head_take_odd_grids(grid):
    net = network(config=CONFIG | dict(img_size=[4 * side for side in grid]))
    (h, w), x = grid, torch.randn(2, 3, 4 * grid[0], 4 * grid[1])
    shapes = [tuple(level.shape[2:]) for level in net.head.pyramid(net.maps(x))]
    assert shapes == [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), (h // 2, w // 2)]
    logits, auxiliary = net.train()(x)
    assert logits.shape == (2, 3, 4 * h, 4 * w) and auxiliary.shape == (2, 3, h, w)
    assert net.eval()(x)[1] is None
    assert segment.describe("upernet", 12, 150)["taps"] == [4, 6, 8, 12]
    assert segment.describe("linear", 24, 150)["taps"] == [24]
    rates = [segment.DEFAULTS[protocol]["lr"] for protocol in ("upernet", "linear", "linear4")]
    assert rates == [1e-4, 1e-3, 8e-4]                      # MAE's, DINOv2's, iBOT's


@pytest.mark.parametrize("sizes", [[(12, 20), (6, 10), (3, 5), (1, 2)], [(7, 9), (1, 1), (6, 6)],
                                   [(4, 4), (4, 4), (3, 4)]])
def test_a_fusing_convolution_is_that_of_the_resized_maps(sizes):
    channels = [3, 5, 2, 4][:len(sizes)]
    layer = segment.FusingConv(channels, 6, 3, padding=1, bias=False).double()
    maps = [torch.randn(2, c, *size, dtype=torch.float64, requires_grad=True)
            for c, size in zip(channels, sizes)]
    together = torch.cat([segment.resized(x, sizes[0]) for x in maps], 1)
    expected = F.conv2d(together, layer.weight, padding=1)
    direction = torch.randn_like(expected)
    results = [[y, *torch.autograd.grad(y, [layer.weight, *maps], direction, retain_graph=True)]
               for y in (layer(maps), expected)]
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradient_is_zero_at_ignored_pixels():
    logits = torch.randn(2, 3, 4, 6, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 6))
    labels[0, :2] = 255
    for over in ("all", "valid"):
        gradient, = torch.autograd.grad(segment.pixel_loss(logits, labels, over), logits)
        assert (gradient[0, :, :2] == 0).all() and (gradient[0, :, 2:] != 0).all()
        loss = segment.pixel_loss(logits, torch.full_like(labels, 255), over)
        gradient, = torch.autograd.grad(loss, logits)
        assert loss == 0 and (gradient == 0).all()
    mean = F.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(segment.pixel_loss(logits, labels, "valid"), mean)
    torch.testing.assert_close(segment.pixel_loss(logits, labels), mean * 36 / 48)


def test_batchnorm_schedule_and_the_layer_decay_of_every_tensor():
    ours, theirs, x = segment.BatchNorm2d(5), torch.nn.BatchNorm2d(5), torch.randn(3, 5, 4, 6)
    factors = [segment.linear_factor(step, 100, 10) for step in (0, 5, 10, 55, 100)]
    assert factors == pytest.approx([1e-6, 0.95 * (0.5 + 0.5e-6), 0.9, 0.45, 0.0])
    assert torch.equal(ours(x), theirs(x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    net = network()
    groups = model.param_groups(net, net.depth, [1.0], 0.05, layer_decay=0.5)
    rates = {name: group["base_lr"] for group in groups for name in group["names"]}
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert set(rates) == {name for name, _ in net.named_parameters()}    # all, positions too
    for name, parameter in net.named_parameters():
        above = 6 - int(name.split(".")[1]) if name.startswith("blocks.") else 0
        if name in ("pos_embed", "cls_token") or name.startswith("patch_embed."):
            above = 7
        assert rates[name] == 0.5 ** above, name
        decay = 0.05 if parameter.ndim > 1 else 0.0             # as there, of the class token too
        assert decays[name] == decay, name
    for protocol in ("linear", "linear4"):
        trained = {name: p.requires_grad for name, p in network(protocol).named_parameters()}
        assert all(name.startswith("head.") == trains for name, trains in trained.items())


def test_image_and_label_are_cropped_and_flipped_together():
    """Each pixel of the label is what the image says there, for every draw; all draws differ."""
    label = np.kron(np.arange(48).reshape(6, 8), np.ones((8, 8))).astype(np.uint8)
    pair = Image.fromarray(np.stack([label * 4] * 3, 2)), Image.fromarray(label)
    seen, flipped = set(), 0
    for epoch in range(30):
        pixels, ids = segment.random_crop(*pair, (32, 32), 48, 7, 0, epoch)
        assert ids.shape[0] <= 32 and ids.shape[1] <= 32 and set(np.unique(ids)) <= set(range(48))
        off = np.abs(pixels[..., 0].astype(int) - 4 * ids)
        assert np.median(off) == 0 and (off > 0).mean() < 0.45    # mixed between two classes
        seen.add(ids.tobytes())
        flipped += bool((np.diff(ids[0].astype(int)) < 0).any())
    assert len(seen) == 30 and 5 < flipped < 25


def test_crops_have_no_class_with_three_quarters():
    label = np.zeros((100, 100), np.uint8)
    label[:, 90:] = 1
    pair = Image.new("RGB", (100, 100)), Image.fromarray(label)
    shares = [np.mean(segment.random_crop(*pair, (24, 24), 100, i, 0)[1] == 0) for i in range(60)]
    # a single draw has less than that 5 times in 100, one of eleven 43 times
    assert 0.3 < np.mean([share < 0.75 for share in shares]) < 0.6


def test_photometric():
    x, ids = torch.rand(64, 3, 4, 4), torch.arange(64)
    y = segment.photometric(x, ids, 0, 0)
    same = (x - y).abs().flatten(1).amax(1) < 1e-5
    assert 0 < same.sum() < 16 and 0 <= y.min() and y.max() <= 1    # 1 in 16 has none of the four
    assert torch.equal(y[5:9], segment.photometric(x[5:9], ids[5:9], 0, 0))
    assert not torch.equal(y, segment.photometric(x, ids, 0, 1))


def test_batches_do_not_depend_on_processes_or_restarts(folder):
    pairs = segment.Pairs(str(folder), "train")
    assert pairs.classes is None and pairs.look() == 2

    def batches(size, start=0, **more):
        env = SimpleNamespace(**(vars(ENV) | more))
        return list(segment.Loader(pairs, (16, 24), 16, size, 5, env).epoch(0, start))

    whole = batches(4)
    halves = zip(batches(2, processes=2), batches(2, processes=2, rank=1))
    for one, (a, b) in zip(whole, halves, strict=True):
        assert torch.equal(one.images, torch.cat([a.images, b.images]))
        assert torch.equal(one.labels, torch.cat([a.labels, b.labels]))
    for a, b in zip(whole[2:], batches(4, start=2), strict=True):
        assert torch.equal(a.images, b.images)
    padding = (whole[0].labels == 255)[:, None].expand_as(whole[0].images)
    assert padding.any() and (whole[0].images[padding] == 0).all()    # 0 after normalising


def test_layouts(tmp_path):
    label = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8))
    image = Image.new("RGB", (2, 2))

    def put(content, name):
        os.makedirs((tmp_path / name).parent, exist_ok=True)
        content.save(tmp_path / name)

    put(image, "ade/images/training/a.jpg")
    put(label, "ade/annotations/training/a.png")
    (tmp_path / "ade" / "objectInfo150.txt").write_text("Idx\tName\n1\twall, brick\n2\tsky\n")
    ade = segment.Pairs(str(tmp_path / "ade"), "train")
    assert ade.classes == ["wall", "sky"] and ade.label(0).tolist() == [[255, 0], [1, 255]]
    put(image, "city/leftImg8bit/val/ulm/u_leftImg8bit.png")
    put(label, "city/gtFine/val/ulm/u_gtFine_labelTrainIds.png")
    put(image, "city/gtFine/val/ulm/u_gtFine_color.png")
    city = segment.Pairs(str(tmp_path / "city"), "val", ignore=[2])
    assert len(city.classes) == 19 and city.label(0).tolist() == [[0, 1], [255, 255]]
    palette = figures.label_image(np.array(label), 3)
    for name in "abc":
        put(image, f"voc/JPEGImages/{name}.jpg")
        put(palette, f"voc/SegmentationClass/{name}.png")
    lists = tmp_path / "voc" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("c\nb\n")
    voc = segment.Pairs(str(tmp_path / "voc"), "train")
    assert list(voc.files) == ["JPEGImages/b.jpg", "JPEGImages/c.jpg"]
    assert voc.classes == segment.VOC
    assert voc.label(0).tolist() == [[0, 1], [2, 255]]    # the indices, not the colours


@pytest.mark.parametrize("fault", ["rgb", "size", "id", "no label", "no image", "twins"])
def test_bad_labels_are_refused_by_name(tmp_path, fault):
    write(tmp_path, "train", 2)
    write(tmp_path, "val", 1)
    label = tmp_path / "train" / "labels" / "01.png"
    image = tmp_path / "train" / "images" / "01.png"
    {"rgb": lambda: Image.open(label).convert("RGB").save(label),
     "size": lambda: Image.open(label).resize((3, 4)).save(label),
     "id": lambda: Image.fromarray(np.full((16, 24), 3, np.uint8)).save(label),
     "no label": label.unlink, "no image": image.unlink,
     "twins": lambda: Image.open(image).save(image.with_suffix(".jpg"))}[fault]()
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match="01") as error:
        go(tmp_path, tmp_path / "out", "--classes", str(tmp_path / "names.txt"))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_overfits_and_predicts(tmp_path):
    """Two images are learned by heart; segmenter.pt labels them alone, through --predict."""
    write(tmp_path, "train", 2)
    write(tmp_path, "val", 2)    # the same ones
    result = go(tmp_path, tmp_path / "out", "--iterations", "150", "--lr", "3e-3", "--log-every",
                "50", "--drop-path", "0")
    assert result["accuracy"] > 95 and result["tested"] == 2 and list(result["iou"]) == list("012")
    assert json.loads((tmp_path / "out" / "results.jsonl").read_text()) == result
    assert Image.open(tmp_path / "out" / "sheet.png").size[0] > 3 * 200
    found = segment.main(segment.get_args([
        *QUIET, "--out", str(tmp_path / "out"), "--predict", str(tmp_path / "val" / "images")]))
    assert found["images"] == 2
    labels = [np.array(Image.open(os.path.join(found["path"], f"{i:02}.png"))) for i in range(2)]
    right = np.mean([label == scene(i)[1] for i, label in enumerate(labels)])
    assert 100 * right == pytest.approx(result["accuracy"], abs=0.01)
    assert Image.open(tmp_path / "out" / "predict-overlays" / "00.png").mode == "RGB"


def test_the_range_of_values_goes_on_to_predictions(tmp_path, monkeypatch):
    head = segment.describe("linear", 3, 2)
    content = dict(model=segment.Segmenter(CONFIG, head).state_dict(), config=CONFIG, head=head,
                   classes=["a", "b"], mean=[0.5] * 3, std=[0.5] * 3, range=(0.0, 1000.0),
                   short_side=16, stride=8)
    checkpoint.save(content, tmp_path / "segmenter.pt")
    (tmp_path / "new").mkdir()
    Image.fromarray(np.full((16, 24), 500, np.uint16)).save(tmp_path / "new" / "1.png")
    seen, label_picture = [], segment.Tester.label_picture
    monkeypatch.setattr(segment.Tester, "label_picture", lambda tester, image: seen.append(
        np.asarray(image)) or label_picture(tester, image))
    segment.main(segment.get_args([*QUIET, "--out", str(tmp_path), "--predict",
                                   str(tmp_path / "new")]))
    assert np.unique(seen[0]).tolist() == [128]


def test_masks_of_0_and_255_are_refused(tmp_path):
    for part in ("train", "val"):
        write(tmp_path, part, 2)
        for path in (tmp_path / part / "labels").iterdir():
            Image.fromarray((np.array(Image.open(path)) > 0).astype(np.uint8) * 255).save(path)
    (tmp_path / "names.txt").write_text("ground\ncell\n")
    for more in ([], ["--classes", str(tmp_path / "names.txt")]):
        with pytest.raises(DataError, match="if 255 is a class, write it as 1"):
            go(tmp_path, tmp_path / "out", *more)
    path = tmp_path / "train" / "labels" / "00.png"
    mask = np.array(Image.open(path))
    mask[:2] = 128
    Image.fromarray(mask).save(path)
    with pytest.raises(DataError, match="ids 0, 128 alone and 255, which is ignored: write"):
        go(tmp_path, tmp_path / "out")
    path.unlink()
    Image.fromarray(mask).save(path.with_suffix(".jpg"))
    with pytest.raises(DataError, match="00.jpg: a JPEG does not keep class ids"):
        go(tmp_path, tmp_path / "out")


def test_labels_that_change_or_say_nothing_are_met_before_training(folder, tmp_path):
    """Between stop and resume too."""
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    go(root, tmp_path / "out")
    path = root / "train" / "labels" / "00.png"
    label = np.array(Image.open(path))
    for other, classes, message in ((2 - label, "", "written with labels_digest"),
                                    (label, "a\nb\na\n", "two classes of one name, a")):
        Image.fromarray(other).save(path)
        (tmp_path / "names.txt").write_text(classes)
        with pytest.raises(ValueError, match=message):
            go(root, tmp_path / "out", *["--classes", str(tmp_path / "names.txt")] * bool(classes))
    for path in (root / "val" / "labels").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    with pytest.raises(DataError, match="no pixel of the labels of val counts"):
        go(root, tmp_path / "out")
    shutil.rmtree(root / "val" / "labels")
    with pytest.raises(DataError, match=r"3 files of val, and no labels \(looked for in val/l"):
        go(root, tmp_path / "out")
    with pytest.raises(DataError, match="a number of images or a share"):
        go(folder, tmp_path / "out", "--labels", "2 per class")


def test_images_that_are_turned_go_with_labels_as_they_are_shown(tmp_path):
    for name in "ab":
        for part in ("train", "val"):
            write(tmp_path / name, part, 1)
    for place in (tmp_path / "a" / "train", tmp_path / "b" / "train"):
        image = Image.open(place / "images" / "00.png")
        (place / "images" / "00.png").unlink()
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(place / "images" / "00.tif", exif=exif)              # shown as 16 x 24
    label = tmp_path / "b" / "train" / "labels" / "00.png"
    Image.open(label).rotate(-90, expand=True).save(label)
    image, turned = segment.Pairs(str(tmp_path / "b"), "train").pair(0)
    assert image.size == turned.size == (16, 24)
    with pytest.raises(DataError, match="a label of 24x16 pixels for an image of 16x24"):
        segment.Pairs(str(tmp_path / "a"), "train").pair(0)
    Image.open(label).save(label, exif=exif)
    with pytest.raises(DataError, match="a label with an EXIF orientation"):
        segment.Pairs(str(tmp_path / "b"), "train")


def test_values_of_images_have_the_range_that_is_asked(folder, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    for part in ("train", "val"):
        for path in (root / part / "images").iterdir():
            values = np.array(Image.open(path).convert("L")).astype(np.uint16) * 4
            Image.fromarray(values).save(path)
    args = segment.get_args([*QUIET, *SMALL.split(), "--data", str(root), "--range", "0,1020"])
    train, _, test = segment.load_pairs(args, 1, {})
    assert train.range == test.range == (0, 1020) and train.read(0).max() > 100
    args.range = None
    assert segment.load_pairs(args, 1, {})[0].range == (0, 65535)
    assert segment.load_pairs(args, 1, dict(range=[0, 1020]))[2].range == (0, 1020)


def test_two_processes_of_a_machine_are_as_one(start, folder, tmp_path):
    found, root = [], tmp_path / "set"
    shutil.copytree(folder, root)
    (root / "val" / "images" / "11.png").write_text("junk")
    for n in (1, 2):
        out = tmp_path / str(n)                             # UperNet's dropout is random
        job = start("segment", *QUIET, *SMALL.split(), "--protocol", "linear4", "--data", root,
                    "--max-bad", "0.4", "--show", "3", "--out", out, processes=n)
        assert job.codes() == [0] * n, job.said()
        assert (out / "sheet.png").exists()
        result, = run.read_results(out / "results.jsonl")
        found.append([result["miou"], result["accuracy"]] + [e["loss"] for e in log_of(out)])
    assert len(found[0]) == 6 and found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("protocol", ["upernet", "linear4"])
def test_resumes_to_the_same_weights(folder, tmp_path, protocol, monkeypatch):
    more = ["--protocol", protocol, "--drop-path", "0.3", "--lr", "1e-2"]
    whole = go(folder, tmp_path / "a", *more)
    record = run.Job.record

    def stop(job, *args, **log):
        record(job, *args, **log)
        job.signal = 15 if job.step == 1 else None

    with monkeypatch.context() as patch, pytest.raises(run.Stopped):
        patch.setattr(run.Job, "record", stop)
        go(folder, tmp_path / "b", *more)
    resumed = go(folder, tmp_path / "b", *more)
    assert whole["iou"] == resumed["iou"] and whole["labelled"] == 4
    a, b = (checkpoint.read(str(tmp_path / name / "segmenter.pt"))["model"] for name in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert go(folder, tmp_path / "b", *more, "--show", "1")["miou"] == whole["miou"]    # is done
    assert len((tmp_path / "b" / "results.jsonl").read_text().splitlines()) == 1


def test_encoders_are_loaded_and_what_is_left_out_is_named(folder, tmp_path, capsys):
    encoder = model.VisionTransformer(**CONFIG | dict(img_size=[32, 32]))
    torch.nn.init.normal_(encoder.norm.weight)
    path = str(tmp_path / "encoder.pt")
    checkpoint.save(checkpoint.encoder_file(encoder, dict(system="MAE")), path)
    results = go(folder, tmp_path / "t", "--init", "none", path, "--iterations", "1", "--lr",
                 "1e-9")
    assert [result["system"] for result in results] == ["random", "MAE"]
    source = checkpoint.read_encoder(path)
    assert [result["digest"] for result in results] == [None, checkpoint.encoder_digest(source)]
    bands = model.VisionTransformer(**CONFIG | dict(in_chans=12))
    torch.save(bands.state_dict(), tmp_path / "bands.pt")              # its images were 16x24
    for more, message in (([], "--init-size"), (["--init-size", "16x24"], "takes 12 channels")):
        with pytest.raises(ValueError, match=message):
            go(folder, tmp_path / "t", "--init", str(tmp_path / "bands.pt"), *more)
    assert "left out: norm.weight, norm.bias" in capsys.readouterr().out
    net, content = segment.load_segmenter(str(tmp_path / "t" / "encoder.pt"))
    state = checkpoint.fit(checkpoint.read_encoder(path), [16, 24])[0]
    for name, value in state.items():
        if not name.startswith("norm."):
            torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=1e-6)
    assert (tmp_path / "t" / "sheet.png").exists()
    go(folder, tmp_path / "l", "--init", path, "--protocol", "linear", "--iterations", "2")
    net, content = segment.load_segmenter(str(tmp_path / "l"))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
    damaged = content | dict(head=content["head"] | dict(classes=10 ** 9))
    checkpoint.save(damaged, str(tmp_path / "bad.pt"))
    with pytest.raises(UsageError, match="claims a head"):
        segment.load_segmenter(str(tmp_path / "bad.pt"))


def test_unreadable_files_are_left_out(tmp_path):
    for part, n in (("train", 4), ("val", 3)):
        write(tmp_path, part, n)
        (tmp_path / part / "images" / "01.png").write_bytes(b"no image")
    result = go(tmp_path, tmp_path / "out", "--max-bad", "0.5", "--labels", "3")
    assert result["tested"] == 2 and result["labelled"] == 3


def test_what_is_ignored_is_no_class_and_wrong_ids_are_met_before_training(folder, tmp_path):
    result = go(folder, tmp_path / "out", "--ignore", "1", "--protocol", "linear", "--lr", "1e-9",
                "--iterations", "1")                        # as it was drawn: any class is likely
    assert result["iou"]["1"] is None and set(result["iou"]) == {"0", "1", "2"}
    net, content = segment.load_segmenter(str(tmp_path / "out"))
    tester = segment.Tester(net, ENV, content)
    shown = [tester.label_picture(Image.fromarray(scene(i)[0])) for i in range(4)]
    assert 1 not in np.stack(shown)
    assert 1 in np.stack([segment.Tester(net, ENV, content | dict(ignored=[])).label_picture(
        Image.fromarray(scene(i)[0])) for i in range(4)])
    write(tmp_path / "set", "train", 4)
    write(tmp_path / "set", "val", 2)
    path = tmp_path / "set/val/labels/01.png"
    Image.fromarray(np.full((16, 24), 7, np.uint8)).save(path)
    with pytest.raises(DataError, match="01.png: class id 7, and the 3 .* --ignore leaves"):
        go(tmp_path / "set", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_names_go_with_the_ids_where_zero_is_treated_otherwise(tmp_path):
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        os.makedirs(tmp_path / name)
    image, label = scene(0)
    Image.fromarray(image).save(tmp_path / "JPEGImages/a.jpg")
    Image.fromarray(label).save(tmp_path / "SegmentationClass/a.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\n")
    plain, moved = (segment.Pairs(str(tmp_path), "train", reduce_zero=z) for z in (None, True))
    assert plain.classes[1] == moved.classes[0] == "aeroplane"
    assert (plain.label(0) == 1).sum() == (moved.label(0) == 0).sum() > 0
    own = segment.Pairs(str(tmp_path), "train", classes=["x", "y"], reduce_zero=True)
    assert own.classes == ["x", "y"]


@pytest.mark.parametrize("more", [["--stride", "17"], ["--crop-size", "4"], ["--crop-size", "18"],
                                  ["--labels", "9"], ["--labels", "x"], ["--batch-size", "1"]])
def test_what_cannot_be_done_is_refused(folder, tmp_path, more):
    with pytest.raises((UsageError, DataError, SystemExit)):
        go(folder, tmp_path, *more)
    assert not (tmp_path / "last.pt").exists()
