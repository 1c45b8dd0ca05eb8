"""augment.py: randomness per image, crops and augmentations against torchvision's."""
import itertools
import math

import pytest
import torch
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as tv

import augment
from test_data import images_like

torch.set_num_threads(1)


# ----------------------------------------------------------------------------- randomness per image
def test_random_numbers_depend_on_the_key_and_the_image_alone():
    ids = torch.tensor([5, 0, 3, 1 << 20, 7, 4095])
    u = augment.uniform(ids, 6, 2, 0, 13)
    assert u.dtype == torch.float32 and u.shape == (6, 6)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(augment.uniform(ids[order], 6, 2, 0, 13), u[order])
    assert torch.equal(augment.uniform(ids[2:5], 6, 2, 0, 13), u[2:5])
    assert torch.equal(augment.uniform(ids[3:4], 9, 2, 0, 13)[:, :6], u[3:4])
    for other in ((2, 0, 14), (2, 1, 13), (3, 0, 13), (0, 2, 13), (13, 0, 2), (2, 0),
                  (2, 0, 13, 0)):
        assert not (augment.uniform(ids, 6, *other) == u).any(), other


def test_random_numbers_are_uniform_and_uncorrelated():
    n = 20000
    u = augment.uniform(torch.arange(n), 8, 1, 2, 3).double()
    assert 0 <= u.min() and u.max() < 1
    error = 1 / math.sqrt(12 * n)  # of the mean of n uniform numbers
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


# ------------------------------------------------------------------------------ boxes, resampling
def box_by_loop(u, h, w, scale, ratio=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop.get_params with its random numbers, 22 of them."""
    for i in range(10):
        area = h * w * (scale[0] + (scale[1] - scale[0]) * u[i])
        low, high = map(math.log, ratio)
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
    expected = torch.tensor([box_by_loop(u[i], *sizes[i].tolist(), scale)
                             for i in range(len(sizes))])
    off = (boxes - expected).abs().max(1).values
    assert (off == 0).float().mean() > 0.995  # float32 may round .5 to the other side
    assert off.max() <= 1
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    assert (boxes[:, 2:] > 0).all()


def test_a_image_too_long_for_any_box_gets_torchvisions_central_one():
    sizes = torch.tensor([[20, 190], [190, 20], [33, 101], [101, 33]])
    boxes = augment.random_boxes(torch.arange(4), sizes, (0.95, 1.0), 9)
    for box, (h, w) in zip(boxes.tolist(), sizes.tolist()):
        theirs = transforms.RandomResizedCrop.get_params(torch.empty(3, h, w), (0.95, 1.0),
                                                         (3 / 4, 4 / 3))
        assert box == list(theirs)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(8, 8), (20, 28), (64, 48)])
def test_resample_equals_torchvisions_resized_crop(mode, size):
    images = images_like(6, 32, 40)
    boxes = torch.tensor([[0, 0, 32, 40], [3, 5, 20, 30], [31, 39, 1, 1], [0, 10, 32, 7],
                          [10, 0, 13, 40], [5, 6, 8, 8]])
    ours = augment.resample(images, boxes.float(), size, mode)
    for i in range(6):
        theirs = tv.resized_crop(images[i].float() / 255, *boxes[i].tolist(), list(size),
                                 tv.InterpolationMode(mode), antialias=True).clamp(0, 1)
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=2e-5)


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


# ---------------------------------------------------------------------------------- augmentations
FACTORS = torch.tensor([0.0, 0.6, 1.0, 1.37, 2.5])
TURNS = torch.tensor([-0.5, -0.1, 0.0, 0.07, 0.5])


def float_images(n=5, h=12, w=10):
    x = images_like(n, h, w).float() / 255
    x[0, :, :4] = 0.5  # grey
    x[1, :, :4], x[1, 1, :4] = 1.0, 0.0  # saturated
    return x


@pytest.mark.parametrize("ours, theirs, factors", [
    (augment.adjust_brightness, tv.adjust_brightness, FACTORS),
    (augment.adjust_contrast, tv.adjust_contrast, FACTORS),
    (augment.adjust_saturation, tv.adjust_saturation, FACTORS),
    (augment.adjust_hue, tv.adjust_hue, TURNS)],
    ids=["brightness", "contrast", "saturation", "hue"])
def test_jitter_operations_equal_torchvisions(ours, theirs, factors):
    x = float_images()
    for shift in range(5):  # every factor on every image
        rolled = factors.roll(shift)
        expected = torch.stack([theirs(image, factor.item()) for image, factor in zip(x, rolled)])
        torch.testing.assert_close(ours(x, rolled), expected, rtol=0, atol=2e-5)


def test_grey_and_solarise_equal_torchvisions():
    x = float_images()
    x[2, 0, 0, :3] = torch.tensor([127.0, 128.0, 129.0]) / 255  # around the threshold
    for i in range(5):
        torch.testing.assert_close(augment.grey(x)[i], tv.rgb_to_grayscale(x[i]), rtol=0, atol=1e-6)
        assert torch.equal(augment.solarise(x)[i], tv.solarize(x[i], 128 / 255))
    eight_bit = images_like(2, 12, 10)
    ours = (augment.solarise(eight_bit.float() / 255) * 255).round().to(torch.uint8)
    assert torch.equal(ours, tv.solarize(eight_bit, 128))  # the threshold that the recipe names


def test_blur_equals_torchvisions():
    x, sigmas = float_images(6, 20, 16), torch.tensor([0.1, 0.31, 0.77, 1.0, 1.5, 2.0])
    ours = augment.gaussian_blur(x, sigmas)
    for i, sigma in enumerate(sigmas.tolist()):
        width = 2 * math.ceil(3 * sigma) + 1
        theirs = tv.gaussian_blur(x[i], [width, width], [sigma, sigma])
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=2e-5)
    torch.testing.assert_close(augment.gaussian_blur(x, torch.zeros(6)), x)


def test_color_jitter_honours_each_images_order():
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    orders = torch.tensor(list(itertools.permutations(range(4))) + [[-1] * 4, [2, -1, 0, -1]])
    x = images_like(1, 12, 10).float().expand(len(orders), -1, -1, -1) / 255
    factors = torch.tensor([1.4, 0.6, 1.3, 0.1]).expand(len(orders), 4)
    ours = augment.color_jitter_(x.clone(), factors, orders)
    for i, order in enumerate(orders.tolist()):
        expected = x[i]
        for k in order:
            expected = operations[k](expected, factors[i, k].item()) if k >= 0 else expected
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=5e-5)
    assert (ours[0] - ours[1]).abs().max() > 0.01  # the order matters


def test_operations_change_the_chosen_images_alone_and_the_given_ones_never():
    x = float_images(40, 8, 6)
    ids, before = torch.arange(40), x.clone()
    for name, operation in (("grey", augment.grey), ("solarise", augment.solarise),
                            ("flip", lambda x: x.flip(3))):
        ours = augment.augment(x, ids, {name: 0.5}, 1)
        changed = (ours != x).flatten(1).any(1)
        assert 8 < changed.sum() < 32
        assert torch.equal(ours[changed], operation(x).expand_as(x)[changed])
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
    x = images_like(1, 8, 8).float().expand(n, -1, -1, -1) / 255
    changed = {}
    for name, share in (dict(jitter=0.8, grey=0.2, blur=0.1, solarise=0.2, flip=0.5)).items():
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
    assert sum(counts) == n and min(counts) > 80  # 125 expected of each of 24


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


def test_boxes_of_a_batch_are_those_of_each_image():
    """To the bit, on which rests that an image's crop does not depend on its batch."""
    n = 300
    sizes = torch.stack([torch.arange(n) % 97 + 100, torch.arange(n) % 89 + 120], 1)
    together = augment.random_boxes(torch.arange(n), sizes, (0.08, 1.0), 1, 2)
    alone = [augment.random_boxes(torch.tensor([i]), sizes[i:i + 1], (0.08, 1.0), 1, 2)
             for i in range(n)]
    assert torch.equal(torch.cat(alone), together)
