"""Randomness per image, crops and augmentations, in batches on the device. Needs torch alone.

Whatever is random about image i in epoch e (its place in the order, its crops, colours and masks)
is a hash of (seed, e, i): not of the number of processes, workers, restarts or micro-batches.
Shapes: N images, C channels, (H, W) source pixels, (h, w) output pixels.
"""
import bisect
import contextlib
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
# on a CPU: floats worked on at once, for its cache; pixels from which an image is large
CACHED, SMALL = 2 ** 19, 64 * 64


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


# ---------------------------------------------------------------------------------- boxes and crops
def random_boxes(ids, sizes, scale, *key):
    """RandomResizedCrop's boxes (N, 4): (top, left, height, width), for sizes (N, 2): (H, W).

    Ten tries at an area share U(scale) and an aspect ratio exp(U(log 3/4, log 4/3)), then the
    largest central box whose ratio is allowed: torchvision's algorithm.
    """
    u, ratio = uniform(ids, 22, *key), (3 / 4, 4 / 3)
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


@contextlib.contextmanager
def float32_products():
    """Matrix products in float32 throughout: a GPU's TF32 would be off by up to a grey level."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def upload(x, device):
    """x on the device, without waiting for the work queued there as pageable memory would."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def send(device, *tensors):
    """Small tensors of the CPU on the device, in one copy: float64 holds their integers too."""
    if torch.device(device).type == "cpu":
        return tensors
    packed = upload(torch.cat([x.flatten().double() for x in tensors]), device)
    parts = packed.split([x.numel() for x in tensors])
    return [part.to(x.dtype).view(x.shape) for part, x in zip(parts, tensors)]


def resample(images, boxes, size, mode):
    """Boxes (N, 4) of uint8 images (N, C, H, W) -> float32 (N, C, h, w) in [0, 1].

    Two matrix products an image; on a CPU large images by torch's resize of each, the same numbers
    to rounding and three times as fast.
    """
    if images.device.type == "cpu" and size[0] * size[1] > SMALL and not boxes.frac().any():
        x = torch.empty(*images.shape[:2], *size)
        for image, (top, left, h, w), out in zip(images, boxes.long().tolist(), x):
            box = image[None, :, top:top + h, left:left + w].float()
            box = F.interpolate(box, size, mode=mode, antialias=True)[0]
            torch.div(box, 255, out=out).clamp_(0, 1)
        return x
    boxes = upload(boxes, images.device)
    rows = resample_matrix(boxes[:, 0], boxes[:, 2], images.shape[2], size[0], mode)
    columns = resample_matrix(boxes[:, 1], boxes[:, 3], images.shape[3], size[1], mode)
    with float32_products():
        x = rows[:, None] @ (images.float() / 255) @ columns[:, None].transpose(-2, -1)
    return x.clamp_(0, 1)


# ---------------------------- augmentation: (N, C, h, w) floats in [0, 1] to the same, numbers (N,)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def grey(x):
    """Luma (ITU-R 601-2) of (N, 3, h, w), one channel; other channel counts: their mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def blend_(x, own, mean, luma):
    """x, in place: own x + mean mean(grey(x)) + luma grey(x), clamped to [0, 1].

    own, mean, luma: (N, 1, 1, 1). A factor f of brightness is own = f; of contrast also
    mean = 1 - f; of saturation luma = 1 - f.
    """
    other = grey(x)
    mean = other.mean((1, 2, 3), keepdim=True) * mean
    other.mul_(luma).add_(mean)
    return torch.addcmul(other, x, own, out=x).clamp_(0, 1)


def turn_hue_(x, turn):
    """x (N, 3, h, w), in place, its hue turned by turn (N, 1, 1, 1), -1/2 to 1/2, in HSV space."""
    red, green, blue = x.split(1, 1)
    high = torch.maximum(red, green).maximum(blue)
    low = torch.minimum(red, green).minimum(blue)
    chroma = (high - low).clamp_min_(1e-12)
    hue = torch.where(green == high, (blue - red).add_(chroma, alpha=2),
                      (red - green).add_(chroma, alpha=4))
    hue = torch.where(red == high, green - blue, hue).div_(chroma).add_(6 * turn)
    hue.sub_((hue / 6).floor_(), alpha=6)           # red at 0 and 6, green at 2, blue at 4
    for channel, centre, far, near in ((red, 3, high, low), (green, 2, low, high),
                                       (blue, 4, low, high)):
        torch.lerp(far, near, (hue - centre).abs_().neg_().add_(2).clamp_(0, 1), out=channel)
    return x


def jitter_plan(factors, order):
    """What `color_jitter_` needs of factors (N, 4) for brightness, contrast, saturation and hue.

    order (N, 4): which of them comes first, second, ...; -1: none. Returns ids (M,) of the images
    that change, those first whose hue is turned first; numbers (M, 13); at which position each of
    their hues is turned (4: never).
    """
    hue_at = torch.where((order == HUE).any(1), (order == HUE).float().argmax(1), 4)
    ids = hue_at.argsort(stable=True)
    ids = ids[(order[ids] >= 0).any(1)]
    hue_at, order, factors = hue_at[ids], order[ids], factors[ids]
    f = factors.gather(1, order.clamp_min(0))
    f = torch.where((order < 0) | (order == HUE), 1.0, f)
    turn = torch.where(hue_at < 4, factors[:, HUE], 0.0)[:, None]
    mean, luma = (1 - f) * (order == CONTRAST), (1 - f) * (order == SATURATION)
    numbers = torch.cat([f, mean, luma, turn], 1)
    return ids, numbers, hue_at.tolist()


def color_jitter_(x, ids, numbers, hue_at):
    """x, in place, changed as planned by `jitter_plan`; ids and numbers lie on its device.

    In the order of the hues: what comes before is done to the last images, what comes after to the
    first, and each hue is turned once.
    """
    y = x.index_select(0, ids)
    numbers = numbers[:, :, None, None, None]
    for position in range(4):
        late = slice(bisect.bisect_right(hue_at, position), None)
        if hue_at[late]:
            blend_(y[late], *numbers[late, position:12:4].unbind(1))
    if x.shape[1] == 3:
        turn_hue_(y, numbers[:, 12])
    for position in range(4):
        early = slice(bisect.bisect_left(hue_at, position))
        if hue_at[early]:
            blend_(y[early], *numbers[early, position:12:4].unbind(1))
    return x.index_copy_(0, ids, y)


def gaussian_blur(x, sigma):
    """Gaussian blur of (N, C, h, w) with reflected borders, cut at 3 sigma.

    sigma (N,) in pixels, at most BLUR's, 0: none. Down and across, each image with its own filter:
    two convolutions, or for large images on a CPU sums of the shifted image, twice as fast there.
    """
    n, c, h, w = x.shape
    sigma = sigma.to(x.dtype)[:, None]

    def filters(size):
        """(N, taps) for a side of `size` pixels, which a reflection cannot leave."""
        side = min(math.ceil(3 * BLUR[1]), size - 1)
        distance = torch.arange(-side, side + 1, device=x.device, dtype=x.dtype)
        weights = torch.exp(-0.5 * (distance / sigma.clamp_min(1e-3)) ** 2)
        weights = weights * (distance.abs() <= (3 * sigma).ceil())
        return weights / weights.sum(1, keepdim=True)

    down, across = filters(h), filters(w)
    borders = [across.shape[1] // 2] * 2 + [down.shape[1] // 2] * 2
    x = F.pad(x, borders, mode="reflect")
    if x.device.type == "cpu" and h * w > SMALL:
        for dim, size, weights in ((2, h, down), (3, w, across)):
            used = weights.any(0).nonzero()[:, 0].tolist()
            weights = weights[:, :, None, None, None]
            total = x.narrow(dim, used[0], size) * weights[:, used[0]]
            for tap in used[1:]:
                total.addcmul_(x.narrow(dim, tap, size), weights[:, tap])
            x = total
        return x
    down, across = (weights.repeat_interleave(c, 0)[:, None] for weights in (down, across))
    x = F.conv2d(x.flatten(0, 1)[None], down[..., None], groups=n * c)
    return F.conv2d(x, across[:, :, None], groups=n * c).reshape(n, c, h, w)


def solarise(x):
    return torch.where(x >= 128 / 255, 1 - x, x)


def apply_(function, x, ids, *numbers):
    """x, in place, with function(images, *numbers) in the place of the images ids (M,)."""
    if len(ids) == len(x):
        return x.copy_(function(x, *numbers))
    if len(ids):
        images = function(x.index_select(0, ids), *numbers)
        x.index_copy_(0, ids, images.expand(-1, *x.shape[1:]))
    return x


def augment(x, ids, view, *key):
    """All but the crop of a view: jitter, greyscale, blur, solarise, flip.

    x (N, C, h, w) in [0, 1], ids (N,) on the CPU.
    """
    x, u = x.clone(), uniform(ids, 14, *key)
    # on a CPU as many at once as its cache holds
    at_once = max(CACHED // x[0].numel(), 1) if x.device.type == "cpu" else len(x)
    for images, numbers in zip(x.split(at_once), u.split(at_once)):
        augment_(images, numbers, view)
    return x


def augment_(x, u, view):
    """As `augment`, in place, with the random numbers u (N, 14) on the CPU."""
    colour, none = x.shape[1] == 3, torch.zeros(0, dtype=torch.long)

    def chosen(name, column):
        return (u[:, column] < view[name]).nonzero()[:, 0] if view.get(name) else none

    jittered, factors, hue_at = none, u, []
    if view.get("jitter"):
        order = u[:, 4:8].argsort(dim=1, stable=True)
        order[u[:, 8] >= view["jitter"]] = -1
        if not colour:
            order[order >= SATURATION] = -1
        factors = (2 * u[:, :4] - 1) * torch.tensor(JITTER) + torch.tensor([1.0, 1.0, 1.0, 0.0])
        jittered, factors, hue_at = jitter_plan(factors, order)
    blurred = chosen("blur", 10)
    sigma = BLUR[0] + (BLUR[1] - BLUR[0]) * u[blurred, 11]
    jittered, factors, greyed, blurred, sigma, solarised, flipped = send(
        x.device, jittered, factors, chosen("grey", 9) if colour else none, blurred, sigma,
        chosen("solarise", 12), chosen("flip", 13))
    if hue_at:
        color_jitter_(x, jittered, factors, hue_at)
    apply_(grey, x, greyed)
    apply_(gaussian_blur, x, blurred, sigma)
    apply_(solarise, x, solarised)
    apply_(lambda images: images.flip(3), x, flipped)
