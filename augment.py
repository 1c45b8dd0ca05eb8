"""Randomness per image, crops and augmentations, in batches on the device. Needs torch alone.

Whatever is random about image i in epoch e (its place in the order, its crops, colours and masks)
is a hash of (seed, e, i): not of the number of processes, workers, restarts or micro-batches.
Shapes: N images, C channels, (H, W) source pixels, (h, w) output pixels.
"""
import math

import torch
import torch.nn.functional as F

# One dict a view; the probabilities are per image. BYOL's recipe as MoCo v3 uses it, and MAE's.
MAE_VIEW = dict(scale=(0.2, 1.0), mode="bicubic", flip=0.5)
TRAIN_VIEW = dict(scale=(0.08, 1.0), mode="bilinear", flip=0.5)         # linear evaluation
TEST_VIEW = dict(scale=None, mode="bicubic")                            # Resize 256, CenterCrop 224
MOCO_VIEWS = (TRAIN_VIEW | dict(jitter=0.8, grey=0.2, blur=1.0, solarise=0.0),
              TRAIN_VIEW | dict(jitter=0.8, grey=0.2, blur=0.1, solarise=0.2))
JITTER = (0.4, 0.4, 0.2, 0.1)                           # brightness, contrast, saturation, hue
BLUR = (0.1, 2.0)                                                       # sigma in pixels


# --------------------------------------------------------------------------------------- randomness
ORDER, CROP, COLOUR, MASK, SUBSET, PIXELS, ERASE = range(7)             # what a number is drawn for
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(x):
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix(z):
    """The finaliser of splitmix64 (Steele et al., 2014) on an int64 tensor, which wraps around."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def random_bits(ids, n, *key):
    """ids (N,) int64, key integers -> (N, n) int64: a hash of (key, id, column) on any device."""
    state = 0
    for part in key:
        state = (state + part + 1) * _GOLDEN & _MASK64
        state ^= state >> 29
    z = _mix(ids[:, None] * _signed(_GOLDEN) + _signed(state))
    return _mix(z + torch.arange(1, n + 1, device=ids.device) * _signed(0xD1342543DE82EF95))


def uniform(ids, n, *key):
    """As `random_bits`, as float32 in [0, 1) with 24 random bits."""
    return ((random_bits(ids, n, *key) >> 40) & 0xFFFFFF).float() / (1 << 24)


def shuffled(n, *key):
    """A permutation of range(n) that depends on the key alone."""
    return random_bits(torch.arange(n), 1, *key)[:, 0].argsort(stable=True)


def per_image(x, ids, function, *key):
    """function(image) for each image of x (N, C, h, w), torch's generator seeded by (key, id).

    For the random transforms of other libraries, which draw once a call. The generator is put back
    afterwards.
    """
    seeds = random_bits(ids, 1, *key)[:, 0].tolist()
    images = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(x, seeds):
            torch.default_generator.manual_seed(seed)
            images.append(function(image))
    return torch.stack(images)


per_picture = per_image                                 # until its callers say per_image


# ---------------------------------------------------------------------------------- boxes and crops
def random_boxes(ids, sizes, scale, *key, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's boxes (N, 4): (top, left, height, width), for sizes (N, 2): (H, W).

    Ten tries at an area share U(scale) and an aspect ratio exp(U(log ratio)), then the largest
    central box whose ratio is allowed: torchvision's algorithm.
    """
    u = uniform(ids, 22, *key)
    h, w = sizes[:, :1].float(), sizes[:, 1:].float()
    area = h * w * (scale[0] + (scale[1] - scale[0]) * u[:, :10])
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[:, 10:20])
    box_w, box_h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (box_w > 0) & (box_w <= w) & (box_h > 0) & (box_h <= h)
    first = fits.float().argmax(1, keepdim=True)
    box_h, box_w = box_h.gather(1, first), box_w.gather(1, first)
    top = (u[:, 20:21] * (h - box_h + 1)).floor()
    left = (u[:, 21:22] * (w - box_w + 1)).floor()
    wide, tall = w / h > ratio[1], w / h < ratio[0]
    central_w = torch.where(wide, (h * ratio[1]).round(), w)
    central_h = torch.where(tall, (w / ratio[0]).round(), h)
    central_top, central_left = ((h - central_h) / 2).floor(), ((w - central_w) / 2).floor()
    central = torch.cat([central_top, central_left, central_h, central_w], 1)
    return torch.where(fits.any(1, keepdim=True), torch.cat([top, left, box_h, box_w], 1), central)


def central_boxes(sizes, size):
    """Boxes (N, 4) that resize the short side to size * 256 / 224 and cut out the centre.

    An image of exactly `size` stays whole.
    """
    sizes = sizes.float()
    target = torch.tensor(size, dtype=torch.float32)
    box = target * (sizes / target).min(1, keepdim=True).values * (224 / 256)
    box = torch.where((sizes == target).all(1, keepdim=True), sizes, box)
    return torch.cat([(sizes - box) / 2, box], 1)


def resample_matrix(start, length, n_in, n_out, mode):
    """Weights (N, n_out, n_in) that resize pixels [start, start + length) to n_out, antialiased.

    start, length (N,). The triangle or Keys' cubic filter (a = -1/2), widened when shrinking:
    pillow's resize.
    """
    pixels, new = (torch.arange(n, device=start.device, dtype=start.dtype) for n in (n_in, n_out))
    step = (length / n_out)[:, None, None]
    centre = start[:, None, None] + (new[:, None] + 0.5) * step
    t = ((pixels + 0.5 - centre) / step.clamp_min(1)).abs()                 # (N, n_out, n_in)
    if mode == "bilinear":
        weights = (1 - t).clamp_min(0)
    else:
        near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
        weights = torch.where(t < 1, near, far) * (t < 2)
    inside = (pixels + 1 > start[:, None]) & (pixels < (start + length)[:, None])
    weights = weights * inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


def upload(x, device):
    """x on the device, without waiting for the work queued there as pageable memory would."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def resample(images, boxes, size, mode):
    """Boxes (N, 4) of uint8 images (N, C, H, W) -> float32 (N, C, h, w) in [0, 1].

    Two matrix products an image.
    """
    boxes = upload(boxes, images.device)
    rows = resample_matrix(boxes[:, 0], boxes[:, 2], images.shape[2], size[0], mode)
    columns = resample_matrix(boxes[:, 1], boxes[:, 3], images.shape[3], size[1], mode)
    x = rows[:, None] @ (images.float() / 255) @ columns[:, None].transpose(-2, -1)
    return x.clamp_(0, 1)


# ------------------------------------------ augmentation: (N, C, h, w) floats in [0, 1] to the same
def _factor(factor, x):
    return upload(factor, x.device).to(x.dtype)[:, None, None, None]


def grey(x):
    """Luma (ITU-R 601-2) of (N, 3, h, w), one channel; other channel counts: their mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def adjust_brightness(x, factor):
    return (x * _factor(factor, x)).clamp(0, 1)


def adjust_contrast(x, factor):
    mean = grey(x).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(x), x, _factor(factor, x)).clamp(0, 1)


def adjust_saturation(x, factor):
    if x.shape[1] != 3:
        return x
    return torch.lerp(grey(x).expand_as(x), x, _factor(factor, x)).clamp(0, 1)


def adjust_hue(x, factor):
    """Rotate the hue of (N, 3, h, w) by factor, in turns (-0.5 to 0.5), in HSV space."""
    if x.shape[1] != 3:
        return x
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(g == value, (b - r) / safe + 2, (r - g) / safe + 4)
    hue = torch.where(r == value, (g - b) / safe, hue)
    hue = (hue[:, None] / 6 + _factor(factor, x)) % 1.0
    # channel c: value - chroma * clip(min(k, 4 - k), 0, 1), k = (n_c + 6 hue) mod 6, n = 5, 3, 1
    k = (torch.arange(5, 0, -2, device=x.device)[:, None, None] + 6 * hue) % 6
    return (value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def apply_(function, x, chosen, *numbers):
    """x, in place, with function(images, *numbers) in the place of the images chosen (N,).

    numbers (N,) each. `chosen` lies on the CPU, so that finding the images costs no synchronisation
    with the device.
    """
    ids = chosen.nonzero()[:, 0]
    if len(ids):
        on_device = upload(ids, x.device)
        x[on_device] = function(x[on_device], *(values[ids] for values in numbers))


def color_jitter_(x, factors, order):
    """x, in place, with brightness, contrast, saturation and hue changed by factors (N, 4).

    order (N, 4): the operation (0 to 3) that comes first, second, ...; -1: none.
    """
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for position in range(4):
        for k, operation in enumerate(operations):
            apply_(operation, x, order[:, position] == k, factors[:, k])
    return x


def gaussian_blur(x, sigma):
    """Gaussian blur of (N, C, h, w) with reflected borders, cut at 3 sigma.

    sigma (N,) in pixels, at most BLUR's, 0: none. Two convolutions, down and across, in which each
    channel of each image has its own filter.
    """
    n, c, h, w = x.shape
    sigma = upload(sigma, x.device).to(x.dtype)[:, None]
    reach = math.ceil(3 * BLUR[1])

    def filters(size):
        """(N C, 1, taps) for a side of `size` pixels, which a reflection cannot leave."""
        side = min(reach, size - 1)
        distance = torch.arange(-side, side + 1, device=x.device, dtype=x.dtype)
        weights = torch.exp(-0.5 * (distance / sigma.clamp_min(1e-3)) ** 2)
        weights = weights * (distance.abs() <= (3 * sigma).ceil())
        return (weights / weights.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]

    down, across = filters(h), filters(w)
    borders = [across.shape[2] // 2] * 2 + [down.shape[2] // 2] * 2
    x = F.pad(x, borders, mode="reflect").flatten(0, 1)[None]
    x = F.conv2d(x, down[..., None], groups=n * c)
    return F.conv2d(x, across[:, :, None], groups=n * c).reshape(n, c, h, w)


def solarise(x, threshold=128 / 255):
    return torch.where(x >= threshold, 1 - x, x)


def augment(x, ids, view, *key):
    """All but the crop of a view: jitter, greyscale, blur, solarise, flip.

    x (N, C, h, w) in [0, 1], ids (N,) on the CPU.
    """
    u = uniform(ids, 14, *key)
    x = x.clone()
    if view.get("jitter"):
        spread = torch.tensor(JITTER)
        factors = (2 * u[:, :4] - 1) * spread + torch.tensor([1.0, 1.0, 1.0, 0.0])
        order = u[:, 4:8].argsort(dim=1, stable=True)
        color_jitter_(x, factors, torch.where(u[:, 8:9] < view["jitter"], order, -1))
    if view.get("grey") and x.shape[1] == 3:
        apply_(grey, x, u[:, 9] < view["grey"])
    if view.get("blur"):
        apply_(gaussian_blur, x, u[:, 10] < view["blur"], BLUR[0] + (BLUR[1] - BLUR[0]) * u[:, 11])
    if view.get("solarise"):
        apply_(solarise, x, u[:, 12] < view["solarise"])
    if view.get("flip"):
        apply_(lambda images: images.flip(3), x, u[:, 13] < view["flip"])
    return x
