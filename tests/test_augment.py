"""augment.py: randomness per image, crops and augmentations, against torchvision's."""
import itertools
import math

import pytest
import torch
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as tv
from torch.utils._python_dispatch import TorchDispatchMode

import augment
from conftest import images_like


def float_images(n=5, h=12, w=10):
    x = images_like(n, h, w).float() / 255
    x[0, :, :4] = 0.5                                                       # grey
    x[1, :, :4], x[1, 1, :4] = 1.0, 0.0                                     # saturated
    return x


# ----------------------------------------------------------------------------- randomness per image
def test_random_numbers_depend_on_the_key_and_the_image_alone():
    ids = torch.tensor([5, 0, 3, 1 << 20, 7, 4095])
    u = augment.uniform(ids, 6, 2, 0, 13)
    assert u.dtype == torch.float32 and u.shape == (6, 6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(augment.uniform(ids[order], 6, 2, 0, 13), u[order])
    assert torch.equal(augment.uniform(ids[2:5], 6, 2, 0, 13), u[2:5])
    assert torch.equal(augment.uniform(ids[3:4], 9, 2, 0, 13)[:, :6], u[3:4])
    for other in ((2, 0, 14), (2, 1, 13), (3, 0, 13), (2, 0), (2, 0, 13, 0)):
        assert not (augment.uniform(ids, 6, *other) == u).any(), other


def test_random_numbers_are_uniform_and_independent():
    n = 20000
    u = augment.uniform(torch.arange(n), 8, 1, 2, 3).double()
    assert u.min() >= 0 and u.max() < 1
    error = 1 / math.sqrt(12 * n)                               # of the mean of n uniform numbers
    assert ((u.mean(0) - 0.5).abs() < 4.5 * error).all()
    assert ((u.var(0) * 12 - 1).abs() < 0.05).all()
    others = [augment.uniform(torch.arange(n), 8, *key).double() for key in ((1, 2, 4), (1, 3, 3))]
    correlation = torch.corrcoef(torch.cat([u, u.roll(1, 0), *others], 1).T) - torch.eye(32)
    assert correlation.abs().max() < 5 / math.sqrt(n)


# -------------------------------------------------------------------------------- boxes, resampling
def box_by_loop(u, h, w, scale, ratio=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop.get_params: u holds 10 areas, 10 ratios and 2 places."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(10):
        area = h * w * (scale[0] + (scale[1] - scale[0]) * u[i])
        aspect = math.exp(low + (high - low) * u[10 + i])
        box_w, box_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_w <= w and 0 < box_h <= h:
            return [int(u[20] * (h - box_h + 1)), int(u[21] * (w - box_w + 1)), box_h, box_w]
    return list(transforms.RandomResizedCrop.get_params(torch.empty(3, h, w), (2.0, 2.0), ratio))


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.95, 1.0)])
def test_random_boxes_follow_torchvisions_algorithm(scale):
    sizes = torch.tensor([[32, 32], [224, 300], [300, 224], [64, 96], [40, 20], [100, 20],
                          [20, 190], [7, 5]]).repeat(100, 1)
    ids = torch.arange(len(sizes))
    boxes = augment.random_boxes(ids, sizes, scale, 9)
    u = augment.uniform(ids, 22, 9).double().tolist()
    expected = torch.tensor([box_by_loop(v, *size, scale) for v, size in zip(u, sizes.tolist())])
    off = (boxes - expected).abs().max(1).values
    assert (off == 0).float().mean() > 0.995            # float32 may round .5 to the other side
    assert off.max() <= 1
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(8, 8), (20, 28), (64, 48), (72, 80)])
def test_resample_equals_torchvisions_resized_crop(mode, size):
    images = images_like(6, 32, 40)
    boxes = torch.tensor([[0, 0, 32, 40], [3, 5, 20, 30], [31, 39, 1, 1], [0, 10, 32, 7],
                          [10, 0, 13, 40], [5, 6, 8, 8]])
    ours = augment.resample(images, boxes.float(), size, mode)
    for i in range(6):
        theirs = tv.resized_crop(images[i].float() / 255, *boxes[i].tolist(), list(size),
                                 interpolation=tv.InterpolationMode(mode), antialias=True)
        torch.testing.assert_close(ours[i], theirs.clamp(0, 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_large_crops_on_a_cpu_are_the_matrix_products(mode, monkeypatch):
    images = images_like(6, 120, 90)
    boxes = augment.random_boxes(torch.arange(6), torch.tensor([[120, 90]] * 6), (0.08, 1.0), 1)
    ours = augment.resample(images, boxes, (96, 80), mode)
    monkeypatch.setattr(augment, "SMALL", 10 ** 9)
    products = augment.resample(images, boxes, (96, 80), mode)
    assert not torch.equal(ours, products)              # another way, indeed
    torch.testing.assert_close(ours, products, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(128, 128), (96, 192), (160, 64)])
def test_central_view_equals_resize_and_centre_crop(size):
    """Resize to 8/7 of the side, then CenterCrop, as one box: equal but for the border."""
    images, side = images_like(2, *size), 56
    boxes = augment.central_boxes(torch.tensor([size] * 2), (side, side))
    ours = augment.resample(images, boxes, (side, side), "bicubic")
    for i in range(2):
        resized = tv.resize(images[i].float() / 255, 64, tv.InterpolationMode.BICUBIC,
                            antialias=True)
        theirs = tv.center_crop(resized, [side, side]).clamp(0, 1)
        inner = (slice(None), slice(3, -3), slice(3, -3))
        torch.testing.assert_close(ours[i][inner], theirs[inner], rtol=0, atol=2e-4)
    whole = augment.central_boxes(torch.tensor([[56, 56]]), (side, side))
    assert whole.tolist() == [[0, 0, 56, 56]]


# ------------------------------------------------------------------------------------ augmentations
OPERATIONS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def jittered(x, factors, orders):
    ids, numbers, hue_at = augment.jitter_plan(factors, orders)
    return augment.color_jitter_(x.clone(), ids, numbers, hue_at)


@pytest.mark.parametrize("operation", range(4))
def test_jitter_operations_equal_torchvisions(operation):
    factors = [-0.5, -0.1, 0.0, 0.07, 0.5] if operation == 3 else [0.0, 0.6, 1.0, 1.37, 2.5]
    factors = torch.tensor(factors)
    x, orders = float_images(), torch.tensor([[-1, operation, -1, -1]] * 5)
    for shift in range(5):                                              # every factor, every image
        rolled = factors.roll(shift)
        expected = torch.stack([OPERATIONS[operation](image, factor.item())
                                for image, factor in zip(x, rolled)])
        ours = jittered(x, rolled[:, None].expand(5, 4), orders)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def test_color_jitter_honours_each_images_order():
    every = list(itertools.permutations(range(4)))
    orders = torch.tensor([[-1] * 4] + every + [[2, -1, 0, -1], [-1, 3, -1, 1], [-1, -1, -1, 2]])
    x = images_like(1, 12, 10).float().expand(len(orders), -1, -1, -1) / 255
    factors = torch.tensor([1.4, 0.6, 1.3, 0.1]).expand(len(orders), 4)
    ours = jittered(x, factors, orders)
    for i, order in enumerate(orders.tolist()):
        expected = x[i]
        for k in order:
            expected = OPERATIONS[k](expected, factors[i, k].item()) if k >= 0 else expected
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=5e-5)
    assert torch.equal(ours[0], x[0])
    assert (ours[1] - ours[2]).abs().max() > 0.01                           # the order matters


def test_grey_and_solarise_equal_torchvisions():
    x = float_images()
    x[2, 0, 0, :3] = torch.tensor([127.0, 128.0, 129.0]) / 255              # around the threshold
    for i in range(5):
        theirs = tv.rgb_to_grayscale(x[i])
        torch.testing.assert_close(augment.grey(x)[i], theirs, rtol=0, atol=1e-6)
        assert torch.equal(augment.solarise(x)[i], tv.solarize(x[i], 128 / 255))
    eight_bit = images_like(2, 12, 10)
    ours = (augment.solarise(eight_bit.float() / 255) * 255).round().to(torch.uint8)
    assert torch.equal(ours, tv.solarize(eight_bit, 128))                   # the recipe's threshold


@pytest.mark.parametrize("size", [(20, 16), (72, 60)])                      # convolutions; sums
def test_blur_equals_torchvisions(size):
    x, sigmas = float_images(6, *size), torch.tensor([0.1, 0.31, 0.77, 1.0, 1.5, 2.0])
    ours = augment.gaussian_blur(x, sigmas)
    for i, sigma in enumerate(sigmas.tolist()):
        width = 2 * math.ceil(3 * sigma) + 1
        theirs = tv.gaussian_blur(x[i], [width, width], [sigma, sigma])
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=2e-5)
    torch.testing.assert_close(augment.gaussian_blur(x, torch.zeros(6)), x)


@pytest.mark.parametrize("view", augment.MOCO_VIEWS, ids=["first", "second"])
def test_a_batch_in_pieces_is_the_batch(view, monkeypatch):
    x, ids = float_images(13, 8, 6), torch.arange(13)
    whole = augment.augment(x, ids, view, 1)
    assert torch.equal(x, float_images(13, 8, 6))                           # the given one stays
    monkeypatch.setattr(augment, "CACHED", 5 * x[0].numel())
    torch.testing.assert_close(augment.augment(x, ids, view, 1), whole, rtol=0, atol=2e-6)


class Operations(TorchDispatchMode):
    """Counts what is done on the device that holds no data: operations on images, and uploads."""

    def __init__(self):
        super().__init__()
        self.images = self.uploads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "meta":
            if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
                self.uploads += 1
            elif not function.is_view and result.ndim > 2 and result.numel() >= 20 * 20:
                self.images += 1
        return result


@pytest.mark.parametrize("view", augment.MOCO_VIEWS, ids=["first", "second"])
def test_a_view_on_a_device_takes_one_upload_and_no_look_at_the_pixels(view):
    """231 operations on images and 36 uploads before; reading one would raise on this device."""
    with Operations() as counted:
        x = augment.augment(torch.empty(128, 3, 20, 20, device="meta"), torch.arange(128), view, 1)
    assert x.shape == (128, 3, 20, 20) and x.device.type == "meta"
    assert counted.uploads == 1
    assert 40 < counted.images <= 105


def test_views_are_the_recipe():
    first, second = augment.MOCO_VIEWS
    common = dict(scale=(0.08, 1.0), mode="bilinear", jitter=0.8, grey=0.2, flip=0.5)
    assert first == common | dict(blur=1.0, solarise=0.0)
    assert second == common | dict(blur=0.1, solarise=0.2)
    assert augment.MAE_VIEW == dict(scale=(0.2, 1.0), mode="bicubic", flip=0.5)
    assert augment.JITTER == (0.4, 0.4, 0.2, 0.1)


def test_each_operation_has_its_probability_independently_of_the_others():
    n = 4000
    x = images_like(1, 8, 8).float().expand(n, -1, -1, -1) / 255
    changed = {}
    for name, share in (("jitter", 0.8), ("grey", 0.2), ("blur", 0.1), ("solarise", 0.2),
                        ("flip", 0.5)):
        y = augment.augment(x.clone(), torch.arange(n), {name: share}, 1, 2, 3)
        changed[name] = (y != x).flatten(1).any(1)
        assert abs(changed[name].float().mean() - share) < 0.03, name
        assert torch.equal(augment.augment(x.clone(), torch.arange(n), {name: 0.0}, 1, 2, 3), x)
    assert torch.equal(augment.augment(x.clone(), torch.arange(n), {"flip": 1.0}, 1), x.flip(3))
    correlation = torch.corrcoef(torch.stack(list(changed.values())).float()) - torch.eye(5)
    assert correlation.abs().max() < 0.08


def test_factors_orders_and_sigmas_are_drawn_as_the_recipe_does(monkeypatch):
    drawn, n, plan = {}, 3000, augment.jitter_plan
    monkeypatch.setattr(augment, "gaussian_blur", lambda x, sigma: drawn.update(sigma=sigma) or x)
    augment.augment(torch.zeros(n, 3, 2, 2), torch.arange(n), {"blur": 1.0}, 1)
    sigmas = drawn["sigma"].min(), drawn["sigma"].mean(), drawn["sigma"].max()
    assert [x.item() for x in sigmas] == pytest.approx([0.1, 1.05, 2.0], abs=0.04)

    def note(factors, order):
        drawn.update(factors=factors, order=order)
        return plan(factors, order)

    monkeypatch.setattr(augment, "jitter_plan", note)
    augment.augment(torch.zeros(n, 3, 2, 2), torch.arange(n), {"jitter": 1.0}, 1)
    for k, (centre, spread) in enumerate(((1, 0.4), (1, 0.4), (1, 0.2), (0, 0.1))):
        values = drawn["factors"][:, k]
        assert values.min().item() == pytest.approx(centre - spread, abs=0.01)
        assert values.max().item() == pytest.approx(centre + spread, abs=0.01)
        assert values.mean().item() == pytest.approx(centre, abs=0.05 * spread)
    orders = [tuple(order) for order in drawn["order"].tolist()]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == n and min(counts) > 80                            # 125 expected of each


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_pass_through_the_augmentations(channels):
    x = torch.rand(8, channels, 6, 6)
    y = augment.augment(x.clone(), torch.arange(8), augment.MOCO_VIEWS[1], 1)
    assert y.shape == x.shape and y.isfinite().all() and not torch.equal(x, y)
    factors, orders = torch.tensor([[1.4, 0.6, 9.0, 9.0]]), torch.tensor([[1, -1, 0, -1]])
    grey = torch.rand(1, 1, 6, 6)
    expected = (0.6 * grey + 0.4 * grey.mean()).clamp(0, 1).mul(1.4).clamp(0, 1)
    torch.testing.assert_close(jittered(grey, factors, orders), expected)
