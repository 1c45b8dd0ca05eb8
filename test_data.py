"""augment.py and data.py: randomness per picture, crops and augmentations against torchvision's, reading, order."""
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("DATA", None)

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as tv
from PIL import Image

import augment
import data
from test_model import pictures_like

torch.set_num_threads(1)



# --------------------------------------------------------------------------------- randomness per picture
def test_random_numbers_depend_on_the_key_and_the_picture_alone():
    ids = torch.tensor([5, 0, 3, 1 << 20, 7, 4095])
    u = augment.uniform(ids, 6, 2, 0, 13)
    assert u.dtype == torch.float32 and u.shape == (6, 6)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(augment.uniform(ids[order], 6, 2, 0, 13), u[order])
    assert torch.equal(augment.uniform(ids[2:5], 6, 2, 0, 13), u[2:5])
    assert torch.equal(augment.uniform(ids[3:4], 9, 2, 0, 13)[:, :6], u[3:4])
    for other in ((2, 0, 14), (2, 1, 13), (3, 0, 13), (0, 2, 13), (13, 0, 2), (2, 0), (2, 0, 13, 0)):
        assert not (augment.uniform(ids, 6, *other) == u).any(), other


def test_random_numbers_are_uniform_and_uncorrelated():
    n = 20000
    u = augment.uniform(torch.arange(n), 8, 1, 2, 3).double()
    assert 0 <= u.min() and u.max() < 1
    error = 1 / math.sqrt(12 * n)                                           # of the mean of n uniform numbers
    assert ((u.mean(0) - 0.5).abs() < 4.5 * error).all()
    assert ((u.var(0) * 12 - 1).abs() < 0.05).all()
    neighbours = [u, u.roll(1, 0), augment.uniform(torch.arange(n), 8, 1, 2, 4).double(),
                  augment.uniform(torch.arange(n), 8, 1, 3, 3).double()]
    correlation = torch.corrcoef(torch.cat(neighbours, 1).T) - torch.eye(32)
    assert correlation.abs().max() < 5 / math.sqrt(n)


def test_shuffled_is_a_permutation_that_depends_on_the_key():
    a, b = augment.shuffled(1000, 0, 1, 2), augment.shuffled(1000, 0, 1, 3)
    assert a.sort().values.tolist() == list(range(1000))
    assert torch.equal(a, augment.shuffled(1000, 0, 1, 2))
    assert (a == b).sum() < 10 and (a == torch.arange(1000)).sum() < 10


# -------------------------------------------------------------------------------------- boxes, resampling
def box_by_loop(u, h, w, scale, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop.get_params of torchvision with its random numbers given: u holds 10 areas, 10 ratios, 2."""
    for i in range(10):
        area = h * w * (scale[0] + (scale[1] - scale[0]) * u[i])
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[10 + i])
        box_w, box_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_w <= w and 0 < box_h <= h:
            return [int(u[20] * (h - box_h + 1)), int(u[21] * (w - box_w + 1)), box_h, box_w]
    return list(transforms.RandomResizedCrop.get_params(torch.empty(3, h, w), (2.0, 2.0), ratio))


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.95, 1.0)])
def test_random_boxes_follow_torchvisions_algorithm(scale):
    sizes = torch.tensor([[32, 32], [224, 300], [300, 224], [64, 96], [40, 20], [100, 20], [20, 190], [7, 5]])
    sizes = sizes.repeat(100, 1)
    ids = torch.arange(len(sizes))
    boxes = augment.random_boxes(ids, sizes, scale, 9)
    u = augment.uniform(ids, 22, 9).double().tolist()
    expected = torch.tensor([box_by_loop(u[i], *sizes[i].tolist(), scale) for i in range(len(sizes))])
    off = (boxes - expected).abs().max(1).values
    assert (off == 0).float().mean() > 0.995                                # float32 may round .5 to the other side
    assert off.max() <= 1
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes).all() and (boxes[:, 2:] > 0).all()


def test_a_picture_too_long_for_any_box_gets_torchvisions_central_one():
    sizes = torch.tensor([[20, 190], [190, 20], [33, 101], [101, 33]])
    boxes = augment.random_boxes(torch.arange(4), sizes, (0.95, 1.0), 9)
    for box, (h, w) in zip(boxes.tolist(), sizes.tolist()):
        theirs = transforms.RandomResizedCrop.get_params(torch.empty(3, h, w), (0.95, 1.0), (3 / 4, 4 / 3))
        assert box == list(theirs)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(8, 8), (20, 28), (64, 48)])
def test_resample_equals_torchvisions_resized_crop(mode, size):
    images = pictures_like(6, 32, 40)
    boxes = torch.tensor([[0, 0, 32, 40], [3, 5, 20, 30], [31, 39, 1, 1], [0, 10, 32, 7], [10, 0, 13, 40],
                          [5, 6, 8, 8]])
    ours = augment.resample(images, boxes.float(), size, mode)
    for i in range(6):
        theirs = tv.resized_crop(images[i].float() / 255, *boxes[i].tolist(), list(size),
                                 interpolation=tv.InterpolationMode(mode), antialias=True).clamp(0, 1)
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [(128, 128), (96, 192), (160, 64)])
def test_central_view_equals_resize_and_centre_crop(size):
    """Resize to 8/7 of the side, then CenterCrop, as one box: equal but for one or two pixels at the border."""
    images, side = pictures_like(2, *size), 56
    boxes = augment.central_boxes(torch.tensor([size] * 2), (side, side))
    ours = augment.resample(images, boxes, (side, side), "bicubic")
    for i in range(2):
        resized = tv.resize(images[i].float() / 255, 64, tv.InterpolationMode.BICUBIC, antialias=True)
        theirs = tv.center_crop(resized, [side, side]).clamp(0, 1)
        inner = (slice(None), slice(3, -3), slice(3, -3))
        torch.testing.assert_close(ours[i][inner], theirs[inner], rtol=0, atol=2e-4)
    whole = augment.central_boxes(torch.tensor([[56, 56]]), (side, side))
    assert whole.tolist() == [[0, 0, 56, 56]]


# ------------------------------------------------------------------------------------------ augmentations
FACTORS = torch.tensor([0.0, 0.6, 1.0, 1.37, 2.5])
TURNS = torch.tensor([-0.5, -0.1, 0.0, 0.07, 0.5])


def float_pictures(n=5, h=12, w=10):
    x = pictures_like(n, h, w).float() / 255
    x[0, :, :4] = 0.5                                                       # grey
    x[1, :, :4], x[1, 1, :4] = 1.0, 0.0                                     # saturated
    return x


@pytest.mark.parametrize("ours, theirs, factors", [
    (augment.adjust_brightness, tv.adjust_brightness, FACTORS),
    (augment.adjust_contrast, tv.adjust_contrast, FACTORS),
    (augment.adjust_saturation, tv.adjust_saturation, FACTORS),
    (augment.adjust_hue, tv.adjust_hue, TURNS)], ids=["brightness", "contrast", "saturation", "hue"])
def test_jitter_operations_equal_torchvisions(ours, theirs, factors):
    x = float_pictures()
    for shift in range(5):                                                  # every factor on every picture
        rolled = factors.roll(shift)
        expected = torch.stack([theirs(picture, factor.item()) for picture, factor in zip(x, rolled)])
        torch.testing.assert_close(ours(x, rolled), expected, rtol=0, atol=2e-5)


def test_grey_and_solarise_equal_torchvisions():
    x = float_pictures()
    x[2, 0, 0, :3] = torch.tensor([127.0, 128.0, 129.0]) / 255              # around the threshold
    for i in range(5):
        torch.testing.assert_close(augment.grey(x)[i], tv.rgb_to_grayscale(x[i]), rtol=0, atol=1e-6)
        assert torch.equal(augment.solarise(x)[i], tv.solarize(x[i], 128 / 255))
    eight_bit = pictures_like(2, 12, 10)
    ours = (augment.solarise(eight_bit.float() / 255) * 255).round().to(torch.uint8)
    assert torch.equal(ours, tv.solarize(eight_bit, 128))                   # the threshold that the recipe names


def test_blur_equals_torchvisions():
    x, sigmas = float_pictures(6, 20, 16), torch.tensor([0.1, 0.31, 0.77, 1.0, 1.5, 2.0])
    ours = augment.gaussian_blur(x, sigmas)
    for i, sigma in enumerate(sigmas.tolist()):
        width = 2 * math.ceil(3 * sigma) + 1
        torch.testing.assert_close(ours[i], tv.gaussian_blur(x[i], [width, width], [sigma, sigma]), rtol=0, atol=2e-5)
    torch.testing.assert_close(augment.gaussian_blur(x, torch.zeros(6)), x)


def test_color_jitter_honours_each_pictures_order():
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    orders = torch.tensor(list(itertools.permutations(range(4))) + [[-1] * 4, [2, -1, 0, -1]])
    x = pictures_like(1, 12, 10).float().expand(len(orders), -1, -1, -1) / 255
    factors = torch.tensor([1.4, 0.6, 1.3, 0.1]).expand(len(orders), 4)
    ours = augment.color_jitter_(x.clone(), factors, orders)
    for i, order in enumerate(orders.tolist()):
        expected = x[i]
        for k in order:
            expected = operations[k](expected, factors[i, k].item()) if k >= 0 else expected
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=5e-5)
    assert (ours[0] - ours[1]).abs().max() > 0.01                           # the order matters


def test_operations_change_the_chosen_pictures_alone_and_the_given_ones_never():
    x = float_pictures(40, 8, 6)
    ids, before = torch.arange(40), x.clone()
    for name, operation in (("grey", augment.grey), ("solarise", augment.solarise), ("flip", lambda x: x.flip(3))):
        ours = augment.augment(x, ids, {name: 0.5}, 1)
        changed = (ours != x).flatten(1).any(1)
        assert 8 < changed.sum() < 32 and torch.equal(ours[changed], operation(x).expand_as(x)[changed])
    augment.augment(x, ids, augment.MOCO_VIEWS[0], 1)
    assert torch.equal(x, before)


def test_views_are_the_recipe():
    first, second = augment.MOCO_VIEWS
    common = dict(scale=(0.08, 1.0), mode="bilinear", jitter=0.8, grey=0.2, flip=0.5)
    assert first == common | dict(blur=1.0, solarise=0.0)
    assert second == common | dict(blur=0.1, solarise=0.2)
    assert augment.MAE_VIEW == dict(scale=(0.2, 1.0), mode="bicubic", flip=0.5)
    assert augment.JITTER == (0.4, 0.4, 0.2, 0.1)


def test_each_operation_has_its_probability_independently_of_the_others():
    n = 4000
    x = pictures_like(1, 8, 8).float().expand(n, -1, -1, -1) / 255
    changed = {}
    for name, share in (("jitter", 0.8), ("grey", 0.2), ("blur", 0.1), ("solarise", 0.2), ("flip", 0.5)):
        y = augment.augment(x.clone(), torch.arange(n), {name: share}, 1, 2, 3)
        changed[name] = (y != x).flatten(1).any(1)
        assert abs(changed[name].float().mean() - share) < 0.03, name
        assert torch.equal(augment.augment(x.clone(), torch.arange(n), {name: 0.0}, 1, 2, 3), x)
    assert torch.equal(augment.augment(x.clone(), torch.arange(n), {"flip": 1.0}, 1), x.flip(3))
    correlation = torch.corrcoef(torch.stack(list(changed.values())).float()) - torch.eye(5)
    assert correlation.abs().max() < 0.08


def test_jitter_draws_its_factors_and_orders_as_colorjitter_does(monkeypatch):
    drawn, n = {}, 3000

    def note(x, factors, order):
        drawn.update(factors=factors, order=order)
        return x

    monkeypatch.setattr(augment, "color_jitter_", note)
    augment.augment(torch.zeros(n, 3, 2, 2), torch.arange(n), {"jitter": 1.0}, 1)
    for k, (centre, spread) in enumerate(((1, 0.4), (1, 0.4), (1, 0.2), (0, 0.1))):
        values = drawn["factors"][:, k]
        assert values.min().item() == pytest.approx(centre - spread, abs=0.01)
        assert values.max().item() == pytest.approx(centre + spread, abs=0.01)
        assert values.mean().item() == pytest.approx(centre, abs=0.05 * spread)
    orders = [tuple(order) for order in drawn["order"].tolist()]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == n and min(counts) > 80                            # 125 expected of each of 24


def test_blur_draws_its_sigma_from_the_range(monkeypatch):
    drawn = []
    monkeypatch.setattr(augment, "gaussian_blur", lambda x, sigma: drawn.append(sigma) or x)
    augment.augment(torch.zeros(3000, 3, 2, 2), torch.arange(3000), {"blur": 1.0}, 1)
    assert drawn[0].min().item() == pytest.approx(0.1, abs=0.01)
    assert drawn[0].max().item() == pytest.approx(2.0, abs=0.01)
    assert drawn[0].mean().item() == pytest.approx(1.05, abs=0.04)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_pass_through_the_augmentations(channels):
    x = torch.rand(8, channels, 6, 6)
    y = augment.augment(x.clone(), torch.arange(8), augment.MOCO_VIEWS[1], 1)
    assert y.shape == x.shape and y.isfinite().all() and not torch.equal(x, y)


# --------------------------------------------------------------------------------------- reading pictures
def save_picture(path, pixels, **options):
    """uint8 pixels (H, W, 3) as a file, its folder made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def folder_of(root, names, size=(16, 16), seed=0):
    """A folder with a picture for each name."""
    for i, (name, pixels) in enumerate(zip(names, pictures_like(len(names), *size, seed).permute(0, 2, 3, 1).numpy())):
        save_picture(os.path.join(root, name), pixels)
    return str(root)


def class_folder(root, part="train", classes=("cat", "dog"), each=3, **options):
    folder_of(os.path.join(root, part), [f"{c}/{c}_{i}.png" for c in classes for i in range(each)], **options)
    return str(root)


def test_class_folders(tmp_path):
    class_folder(tmp_path, "train", ("b", "a", "c"))
    class_folder(tmp_path, "test", ("c", "a"), each=2)
    train, test = data.load_data(str(tmp_path)), data.load_data(str(tmp_path), train=False)
    assert train.classes == ["a", "b", "c"] and train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert [train.file(i) for i in (0, 3)] == ["a/a_0.png", "b/b_0.png"]
    assert test.classes == ["a", "c"] and len(test) == 4
    assert data.same_classes(train, test).labels.tolist() == [0, 0, 2, 2] and test.classes == train.classes
    class_folder(tmp_path, "val", ("z",))
    other = data.load_data(str(tmp_path), train=False)                      # val/ goes before test/
    other.labels, other.classes = torch.zeros(3, dtype=torch.long), ["z"]
    with pytest.raises(data.UsageError, match="test class z"):
        data.same_classes(train, other)


def test_unlabelled_folders_flat_and_nested(tmp_path):
    flat = data.load_data(folder_of(tmp_path / "flat", ["1.png", "2.JPG", "3.webp", ".hidden.png"]))
    assert len(flat) == 3 and flat.labels is None
    (tmp_path / "flat" / "notes.txt").write_text("no picture")
    nested = data.load_data(folder_of(tmp_path / "nested", ["x/1.png", "y/deep/2.png", "3.png", ".git/4.png"]))
    assert sorted(nested.files) == ["3.png", "x/1.png", "y/deep/2.png"] and nested.labels is None
    with pytest.raises(data.UsageError, match="no train/ and no val/"):
        data.load_data(str(tmp_path / "flat"), train=False)


@pytest.mark.parametrize("text", ["dog_1.png\ncat_0.png\n", "dog_1.png\r\ncat_0.png", "\ndog_1.png\ncat_0.png\n\n",
                                  "train/dog/dog_1.png 1\ntrain/cat/cat_0.png 0\n",
                                  "train/dog/dog_1.png 1\r\ntrain/cat/cat_0.png 0\r\n",
                                  "dog/dog_1.png\ncat/cat_0.png"])
def test_list_files(tmp_path, text):
    root = class_folder(tmp_path)
    (tmp_path / "some.txt").write_bytes(text.encode())
    listed = data.load_data(f"{root}/some.txt")
    assert [os.path.basename(name) for name in listed.files] == ["dog_1.png", "cat_0.png"]
    full = data.load_data(root)
    expected = [full.files.index("dog/dog_1.png"), full.files.index("cat/cat_0.png")]
    assert torch.equal(listed.images, full.images[expected])
    ids, how = data.labelled(full, f"{root}/some.txt")
    assert ids.tolist() == sorted(expected) and how == "list some.txt"


def test_list_files_that_cannot_be_followed(tmp_path):
    root = class_folder(tmp_path)
    folder_of(tmp_path / "train", ["cat/same.png", "dog/same.png", "dog/only.png"])
    full = data.load_data(root)
    for text, message in (("cat_9.png", "do not exist, first cat_9"), ("same.png", "several pictures"),
                          ("../cat_0.png", "leads out"), ("/etc/cat_0.png", "leads out"), ("\n\n", "empty"),
                          ("cat/only.png", "do not exist, first cat/only.png")):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(data.UsageError, match=message):
            data.labelled(full, f"{root}/bad.txt")
    (tmp_path / "good.txt").write_text("dog/same.png\ncat/same.png")
    assert [full.files[i] for i in data.labelled(full, f"{root}/good.txt")[0]] == ["cat/same.png", "dog/same.png"]


def read_back(tmp_path, image, name="picture.png", in_chans=3, **options):
    image.save(tmp_path / name, **options)
    read = data.Pictures([name], str(tmp_path), in_chans=in_chans).read(0)
    return np.asarray(read).reshape(read.size[1], read.size[0], -1)


def test_kinds_of_pictures_are_read_right(tmp_path):
    rgb = pictures_like(1, 10, 14)[0].permute(1, 2, 0).numpy()
    grey = rgb[..., 0]
    three = np.repeat(grey[..., None], 3, 2)
    assert np.array_equal(read_back(tmp_path, Image.fromarray(rgb)), rgb)
    assert np.array_equal(read_back(tmp_path, Image.fromarray(grey)), three)
    assert np.array_equal(read_back(tmp_path, Image.fromarray(grey), in_chans=1), grey[..., None])
    rgba = np.dstack([rgb, np.full((10, 14), 77, np.uint8)])
    assert np.array_equal(read_back(tmp_path, Image.fromarray(rgba)), rgb)
    assert np.array_equal(read_back(tmp_path, Image.fromarray(rgba), in_chans=4), rgba)
    assert np.array_equal(read_back(tmp_path, Image.fromarray(rgb), in_chans=4)[..., 3], np.full((10, 14), 255))
    assert np.array_equal(read_back(tmp_path, Image.fromarray(np.dstack([grey, rgba[..., 3]]))), three)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    assert np.abs(read_back(tmp_path, sixteen).astype(int) - three).max() <= 1
    assert np.abs(read_back(tmp_path, sixteen, "p.tif", in_chans=1).astype(int) - grey[..., None]).max() <= 1
    palette = Image.fromarray(rgb).quantize(16)
    assert np.array_equal(read_back(tmp_path, palette), np.asarray(palette.convert("RGB")))
    assert np.array_equal(read_back(tmp_path, palette, transparency=3), np.asarray(palette.convert("RGB")))
    assert np.array_equal(read_back(tmp_path, palette, "p.gif"), np.asarray(palette.convert("RGB")))
    bilevel = Image.fromarray(grey > 128)
    assert np.array_equal(read_back(tmp_path, bilevel), np.repeat((grey > 128)[..., None] * 255, 3, 2))
    ink = 255 - rgb                                                         # CMYK without black is the complement
    cmyk = Image.fromarray(np.dstack([ink, np.zeros((10, 14), np.uint8)]), mode="CMYK")
    assert np.array_equal(read_back(tmp_path, cmyk, "p.tif"), rgb)
    smooth = Image.fromarray(rgb).resize((4, 4)).resize((56, 40), Image.BICUBIC)
    ink = 255 - np.asarray(smooth)
    cmyk = Image.fromarray(np.dstack([ink, np.zeros((40, 56), np.uint8)]), mode="CMYK")
    read = read_back(tmp_path, cmyk, "p.jpg", quality=98)
    assert np.abs(read.astype(int) - np.asarray(smooth)).mean() < 3
    assert read_back(tmp_path, cmyk, "p.jpg", in_chans=1).shape == (40, 56, 1)


@pytest.mark.parametrize("orientation, turned", [(3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)),
                                                 (8, lambda x: np.rot90(x))])
def test_pictures_are_turned_as_their_exif_says(tmp_path, orientation, turned):
    rgb = pictures_like(1, 10, 14)[0].permute(1, 2, 0).numpy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_back(tmp_path, Image.fromarray(rgb), exif=exif), turned(rgb))


def corrupt(path):
    """The first half of a picture file."""
    with open(path, "rb") as f:
        content = f.read()
    with open(path, "wb") as f:
        f.write(content[:len(content) // 2])


@pytest.mark.parametrize("in_memory", [True, False])
def test_corrupt_files_are_skipped_named_and_counted(tmp_path, capsys, in_memory):
    names = [f"{i:03}.png" for i in range(200)]
    root = folder_of(tmp_path, names, (16, 16) if in_memory else (24, 136))
    corrupt(tmp_path / "050.png")
    (tmp_path / "150.png").write_text("no picture at all")
    pictures = data.load_data(root)
    assert (pictures.images is not None) == in_memory
    loader = data.Loader(pictures, [augment.MAE_VIEW], (16, 16), 18)
    for epoch in range(2):
        batches = list(loader.epoch(epoch))
        assert len(batches) == 11 and all(b.views[0][:].shape == (18, 3, 16, 16) for b in batches)
    assert sorted(pictures.bad) == [50, 150]
    said = capsys.readouterr().out
    assert said.count("warning: skipped") == 2
    assert said.count("skipped " + str(tmp_path / "050.png")) == said.count("skipped " + str(tmp_path / "150.png")) == 1
    if in_memory:
        assert len(pictures) == 198 and not {"050.png", "150.png"} & set(pictures.files)
        assert torch.equal(pictures.images[50], torch.from_numpy(np.array(pictures.read(50))).permute(2, 0, 1))
    for name in names[::20]:
        corrupt(tmp_path / name)
    with pytest.raises(data.RunError, match=r"of 200 pictures cannot be read, more than --max-bad 0.01"):
        for _ in data.Loader(data.load_data(root), [augment.MAE_VIEW], (16, 16), 18).epoch(0):
            pass


def test_a_picture_that_cannot_be_read_is_replaced_by_one_with_its_own_label(tmp_path):
    root = folder_of(tmp_path, [f"{i}.png" for i in range(8)], (24, 136))
    corrupt(tmp_path / "3.png")
    pictures = data.load_data(root)
    batch = next(data.Loader(pictures, [augment.TEST_VIEW], (16, 16), 8, shuffle=False).epoch(0))
    assert batch.ids.tolist() == list(range(8)) and batch.shown[3] != 3
    views = batch.views[0][:]
    assert torch.equal(views[3], views[batch.shown[3]])


def test_small_pictures_of_one_size_are_held_in_memory(tmp_path, monkeypatch):
    small = data.load_data(folder_of(tmp_path / "small", ["1.png", "2.png"], (16, 24)))
    assert small.images.shape == (2, 3, 16, 24) and small.images.dtype == torch.uint8
    assert np.array_equal(small.images[1].permute(1, 2, 0).numpy(), np.array(small.read(1)))
    assert data.load_data(folder_of(tmp_path / "large", ["1.png"], (16, 136))).images is None
    folder_of(tmp_path / "mixed", ["1.png"], (16, 24))
    assert data.load_data(folder_of(tmp_path / "mixed", ["2.png"], (24, 16))).images is None
    monkeypatch.setattr(data, "MEMORY_LIMIT", 1000)
    assert data.load_data(str(tmp_path / "small")).images is None


def test_a_turned_picture_among_equal_ones_is_not_garbled(tmp_path):
    root = folder_of(tmp_path, ["1.png", "2.png"], (16, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "1.png").save(tmp_path / "3.png", exif=exif)
    pictures = data.load_data(root)
    assert pictures.images is None and pictures.read(2).size == (16, 24)


def test_reading_files_gives_the_views_of_memory(tmp_path, monkeypatch):
    names = [f"{i}.png" for i in range(8)]
    root, views = folder_of(tmp_path, names, (40, 48)), [*augment.MOCO_VIEWS, augment.MAE_VIEW, augment.TEST_VIEW]
    held = data.load_data(root)
    monkeypatch.setattr(data, "MEMORY_SIDE", 8)
    files = data.load_data(root)
    assert held.images is not None and files.images is None
    a, b = (next(data.Loader(p, views, (16, 16), 8, seed=3).epoch(2)) for p in (held, files))
    assert torch.equal(a.ids, b.ids)
    for k in range(4):
        difference = (a.views[k][:] - b.views[k][:]).abs()
        assert difference.mean() < 0.03, k                                  # pillow rounds to 8 bits; and at the border


def test_large_jpegs_are_decoded_small_without_moving_the_crop(tmp_path):
    smooth = F.interpolate(pictures_like(1, 8, 8).float(), size=(512, 640), mode="bicubic").clamp(0, 255)
    save_picture(str(tmp_path / "1.jpg"), smooth[0].permute(1, 2, 0).numpy().astype(np.uint8), quality=95)
    save_picture(str(tmp_path / "1.png"), smooth[0].permute(1, 2, 0).numpy().astype(np.uint8))
    sizes = []
    for name in ("1.jpg", "1.png"):
        pictures = data.Pictures([name], str(tmp_path))
        loader = data.Loader(pictures, [augment.TRAIN_VIEW | dict(flip=0), augment.TEST_VIEW], (16, 16), 1)
        sizes.append([next(loader.epoch(e)).views for e in range(4)])
        shrunk = pictures.read(0, lambda full: 4)
        assert shrunk.size == ((160, 128) if name == "1.jpg" else (640, 512))
    for jpeg, png in zip(*sizes):
        for k in (0, 1):
            assert (jpeg[k][:] - png[k][:]).abs().mean() < 0.05


# ------------------------------------------------------------------------------------ sets, labels, order
def test_embedded_pictures_depend_on_their_index_alone():
    few, many = data.embedded(n=10), data.embedded(n=50)
    assert torch.equal(few.images, many.images[:10])
    assert few.images.shape == (10, 3, 32, 32) and few.images.dtype == torch.uint8
    assert torch.equal(few.labels, many.labels[:10])
    test = data.embedded(train=False, n=10)
    assert len({x.numpy().tobytes() for x in torch.cat([many.images, test.images])}) == 60
    assert data.embedded(n=32).labels.bincount().tolist() == [2] * 16
    assert data.embedded(n=10, in_chans=1).images.shape == (10, 1, 32, 32)
    assert many.images.float().std() > 30                                   # not blank
    with pytest.raises(data.UsageError, match="--in-chans 4"):
        data.embedded(n=10, in_chans=4)


def test_label_subsets():
    pictures = data.embedded(n=1600)
    ids, how = data.labelled(pictures)
    assert ids.tolist() == list(range(1600)) and how == "all"
    for spec, each in (("1%", 1), ("10%", 10), ("0.1%", 1), ("7 per class", 7), ("7", 7)):
        ids, how = data.labelled(pictures, spec, seed=5)
        assert pictures.labels[ids].bincount().tolist() == [each] * 16, spec
        assert ids.tolist() == sorted(set(ids.tolist())) and "seed 5" in how
        assert torch.equal(ids, data.labelled(pictures, spec, seed=5)[0])
        assert not torch.equal(ids, data.labelled(pictures, spec, seed=6)[0])
    small = set(data.labelled(pictures, "5%")[0].tolist())
    assert small < set(data.labelled(pictures, "20%")[0].tolist())          # one draw holds the other


@pytest.mark.parametrize("spec, message", [("x", "neither a share"), ("0%", "out of range"), ("101%", "out of range"),
                                           ("nan%", "out of range"), ("-3", "out of range"), ("1.5", "neither a share"),
                                           ("101 per class", "has only 100"), ("/nowhere.txt", "neither a share")])
def test_label_subsets_that_cannot_be_drawn(spec, message):
    with pytest.raises(data.UsageError, match=message):
        data.labelled(data.embedded(n=1600), spec)


def test_label_errors(tmp_path):
    root = class_folder(tmp_path)
    pictures = data.load_data(root)
    (tmp_path / "one.txt").write_text("cat_0.png\ncat_1.png")
    with pytest.raises(data.UsageError, match="one class only"):
        data.labelled(pictures, f"{root}/one.txt")
    with pytest.raises(data.UsageError, match="a list names files"):
        data.labelled(data.embedded(n=16), f"{root}/one.txt")
    pictures.labels = None
    with pytest.raises(data.UsageError, match="no labels"):
        data.labelled(pictures, "1%")


def test_channel_statistics():
    pictures = data.embedded(n=64)
    mean, std = data.measure_stats(pictures)
    x = pictures.images.double() / 255
    assert mean == pytest.approx(x.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(x.transpose(0, 1).flatten(1).std(1, unbiased=False).tolist())
    view = next(data.Loader(pictures, [augment.TEST_VIEW], (32, 32), 64, shuffle=False).epoch(0)).views[0][:]
    for c in range(3):
        expected = (x[:, c] - data.IMAGENET_STATS[0][c]) / data.IMAGENET_STATS[1][c]
        torch.testing.assert_close(view[:, c].double(), expected, rtol=0, atol=1e-5)


def loaded(pictures, start=0, epoch=1, rank=0, processes=1, batch=12, workers=0, views=augment.MOCO_VIEWS):
    """What a process gets of an epoch: ids, both views and mask noise of each batch."""
    loader = data.Loader(pictures, views, (16, 16), batch // processes, seed=7, workers=workers, rank=rank,
                         processes=processes)
    return [(b.ids, *(view[:] for view in b.views), b.noise(4)) for b in loader.epoch(epoch, start)]


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_do_not_depend_on_processes_workers_or_restarts(tmp_path, in_memory):
    if in_memory:
        pictures = data.embedded(n=50)
    else:
        pictures = data.load_data(folder_of(tmp_path, [f"{i:02}.png" for i in range(50)], (24, 136)))
    whole = loaded(pictures)
    assert len(whole) == 4                                                  # the last 2 of 50 fill no batch
    seen = torch.cat([batch[0] for batch in whole]).tolist()
    assert len(set(seen)) == 48
    assert seen != torch.cat([batch[0] for batch in loaded(pictures, epoch=2)]).tolist()
    ranks = [loaded(pictures, rank=rank, processes=2, workers=0 if in_memory else 2) for rank in (0, 1)]
    for expected, *parts in zip(whole, *ranks, strict=True):
        for k in range(4):
            assert torch.equal(torch.cat([part[k] for part in parts]), expected[k])
    for expected, again in zip(whole[2:], loaded(pictures, start=2), strict=True):
        for k in range(4):
            assert torch.equal(again[k], expected[k])


def test_a_slice_of_a_view_is_the_slice_of_the_batch():
    pictures, views = data.embedded(n=20), [*augment.MOCO_VIEWS, augment.MAE_VIEW]
    batch = next(data.Loader(pictures, views, (16, 24), 10).epoch(0))
    for view in batch.views:
        assert len(view) == 10 and view[:].shape == (10, 3, 16, 24)
        assert torch.equal(torch.cat([view[:4], view[4:8], view[8:12]]), view[:])
    assert not torch.equal(batch.views[0][:], batch.views[1][:])


@pytest.mark.parametrize("view, equal", [(dict(scale=(0.2, 1.0), mode="bilinear"), 0.0),
                                         (dict(scale=None, mode="bilinear", flip=0.5), 0.5)], ids=["crop", "flip"])
def test_views_and_epochs_are_drawn_independently(view, equal):
    """Share of pictures that come out the same: none where they are cropped, half where they are only flipped."""
    n = 2000
    loader = data.Loader(data.Pictures(images=pictures_like(n, 8, 8)), [view, view], (8, 8), n, seed=1)

    def drawn(epoch):
        batch = next(loader.epoch(epoch))
        return [v[:][batch.ids.argsort()] for v in batch.views]

    (first, second), (later, _) = drawn(0), drawn(1)
    for other in (second, later):
        same = (first == other).flatten(1).all(1).float().mean().item()
        assert abs(same - equal) < 0.05


def test_views_are_drawn_in_float32_under_autocast():
    view = next(data.Loader(data.embedded(n=8), augment.MOCO_VIEWS, (16, 16), 8).epoch(0)).views[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = view[:]
    assert torch.equal(inside, view[:])


def test_evaluation_order_covers_every_picture():
    pictures = data.embedded(n=21)
    loader = data.Loader(pictures, [augment.TEST_VIEW], (32, 32), 8, shuffle=False)
    batches = list(loader.epoch(0))
    assert len(loader) == 3 and [len(b) for b in batches] == [8, 8, 5]
    assert torch.cat([b.ids for b in batches]).tolist() == list(range(21))
