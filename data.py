"""Pictures: where they come from, how they are read, how they are augmented in batches on the device.

Whatever is random about picture i in epoch e (its place in the order, its crops, colours and masks) is a hash of
(seed, e, i): not of the number of processes, workers, restarts or accumulation steps. Needs torch, numpy, pillow;
torchvision only for `--data cifar10|cifar100`. Shapes: N images, C channels, (H, W) source, (h, w) output pixels.
"""
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
MEMORY_LIMIT = 4 << 30      # bytes of uint8 pixels up to which pictures of one size are held in memory
MEMORY_SIDE = 128           # and up to which side: larger ones are cropped by workers as they are read

# One dict a view; the probabilities are per image. BYOL's recipe as MoCo v3 uses it, and MAE's.
MAE_VIEW = dict(scale=(0.2, 1.0), mode="bicubic", flip=0.5)
MOCO_VIEWS = (dict(scale=(0.08, 1.0), mode="bilinear", jitter=0.8, grey=0.2, blur=1.0, solarise=0.0, flip=0.5),
              dict(scale=(0.08, 1.0), mode="bilinear", jitter=0.8, grey=0.2, blur=0.1, solarise=0.2, flip=0.5))
TRAIN_VIEW = dict(scale=(0.08, 1.0), mode="bilinear", flip=0.5)             # linear evaluation
TEST_VIEW = dict(scale=None, mode="bicubic")                                # Resize 256, CenterCrop 224
JITTER = (0.4, 0.4, 0.2, 0.1)                                               # brightness, contrast, saturation, hue


class UsageError(ValueError):
    """What was asked for cannot be done as asked: one line, exit code 2."""


class RunError(RuntimeError):
    """The run failed for a reason the user can mend: one line, exit code 1."""


# -------------------------------------------------------------------------------------------- randomness
ORDER, CROP, COLOUR, MASK, SUBSET = range(5)                                # what a random number is for
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(x):
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix(z):
    """The finaliser of splitmix64 (Steele et al., 2014) on an int64 tensor; multiplication wraps around."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def random_bits(ids, n, *key):
    """ids (N,) int64, key integers -> (N, n) int64: a hash of (key, id, column), the same on every device."""
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


# ---------------------------------------------------------------------------------------- boxes and crops
def random_boxes(ids, sizes, scale, *key, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's boxes (N, 4) as (top, left, height, width) for pictures of sizes (N, 2) as (H, W).

    Ten tries at an area share U(scale) and an aspect ratio exp(U(log ratio)), then the largest central box whose
    ratio is allowed: torchvision's algorithm.
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
    central = torch.cat([((h - central_h) / 2).floor(), ((w - central_w) / 2).floor(), central_h, central_w], 1)
    return torch.where(fits.any(1, keepdim=True), torch.cat([top, left, box_h, box_w], 1), central)


def central_boxes(sizes, size):
    """Resize the short side to size * 256 / 224 and cut out the centre, as a box; a picture of exactly `size` whole."""
    sizes = sizes.float()
    target = torch.tensor(size, dtype=torch.float32)
    box = target * (sizes / target).min(1, keepdim=True).values * (224 / 256)
    box = torch.where((sizes == target).all(1, keepdim=True), sizes, box)
    return torch.cat([(sizes - box) / 2, box], 1)


def resample_matrix(start, length, n_in, n_out, mode):
    """Weights (N, n_out, n_in) that resize pixels [start, start + length) to n_out with antialiasing.

    start, length (N,). The triangle or Keys' cubic filter (a = -1/2), widened when shrinking: pillow's resize.
    """
    pixels = torch.arange(n_in, device=start.device, dtype=start.dtype)
    step = (length / n_out)[:, None, None]
    centre = start[:, None, None] + (torch.arange(n_out, device=start.device, dtype=start.dtype)[:, None] + 0.5) * step
    t = ((pixels + 0.5 - centre) / step.clamp_min(1)).abs()                 # (N, n_out, n_in)
    if mode == "bilinear":
        weights = (1 - t).clamp_min(0)
    else:
        weights = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2)
        weights = weights * (t < 2)
    inside = (pixels + 1 > start[:, None]) & (pixels < (start + length)[:, None])
    weights = weights * inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


def resample(images, boxes, size, mode):
    """Boxes (N, 4) of uint8 images (N, C, H, W) -> float32 (N, C, h, w) in [0, 1]: two matrix products an image."""
    boxes = boxes.to(images.device)
    rows = resample_matrix(boxes[:, 0], boxes[:, 2], images.shape[2], size[0], mode)
    columns = resample_matrix(boxes[:, 1], boxes[:, 3], images.shape[3], size[1], mode)
    x = rows[:, None] @ (images.float() / 255) @ columns[:, None].transpose(-2, -1)
    return x.clamp_(0, 1)


# ------------------------------------------------------- augmentation: (N, C, h, w) floats in [0, 1] to the same
def _per_image(factor, x):
    return factor.to(x.device, x.dtype)[:, None, None, None]


def grey(x):
    """Luma (ITU-R 601-2) of (N, 3, h, w), one channel; other channel counts: their mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def adjust_brightness(x, factor):
    return (x * _per_image(factor, x)).clamp(0, 1)


def adjust_contrast(x, factor):
    mean = grey(x).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(x), x, _per_image(factor, x)).clamp(0, 1)


def adjust_saturation(x, factor):
    return torch.lerp(grey(x).expand_as(x), x, _per_image(factor, x)).clamp(0, 1) if x.shape[1] == 3 else x


def adjust_hue(x, factor):
    """Rotate the hue of (N, 3, h, w) by factor, in turns (-0.5 to 0.5), in HSV space."""
    if x.shape[1] != 3:
        return x
    value, which = x.max(1)
    chroma = value - x.min(1).values
    r, g, b = x.unbind(1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(which == 0, (g - b) / safe, torch.where(which == 1, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = (hue / 6 + factor.to(x.device, x.dtype)[:, None, None]) % 1.0
    # channel c = value - chroma * clip(min(k, 4 - k), 0, 1) with k = (n_c + 6 hue) mod 6, n = 5, 3, 1
    k = (x.new_tensor([5.0, 3.0, 1.0])[:, None, None] + 6 * hue[:, None]) % 6
    return (value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def color_jitter(x, factors, order):
    """factors (N, 4) for brightness, contrast, saturation, hue, applied in order (N, 4), indices 0-3; -1: skipped.

    `order` lies on the CPU, so that choosing the images costs no synchronisation with the device.
    """
    ops = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    x = x.clone()
    for position in range(4):
        for k, op in enumerate(ops):
            chosen = (order[:, position] == k).nonzero()[:, 0]
            if len(chosen):
                on_device = chosen.to(x.device)
                x[on_device] = op(x[on_device], factors[chosen, k])
    return x


def blur_matrix(n, sigma):
    """(N, n, n) Gaussian blur of a line of n pixels with reflected borders, cut at 3 sigma; sigma (N,), 0 = none."""
    position = torch.arange(n, device=sigma.device, dtype=sigma.dtype)
    i, j = position[:, None], position[None]
    s = sigma[:, None, None]

    def weight(distance):
        return torch.exp(-0.5 * (distance / s.clamp_min(1e-3)) ** 2) * (distance.abs() <= (3 * s).ceil())

    weights = weight(i - j) + weight(i + j) * (j > 0) + weight(2 * (n - 1) - i - j) * (j < n - 1)
    return weights / weights.sum(-1, keepdim=True)


def gaussian_blur(x, sigma):
    sigma = sigma.to(x.device, x.dtype)
    return blur_matrix(x.shape[2], sigma)[:, None] @ x @ blur_matrix(x.shape[3], sigma)[:, None].transpose(-2, -1)


def solarise(x, threshold=128 / 255):
    return torch.where(x >= threshold, 1 - x, x)


def augment(x, ids, view, *key):
    """All but the crop of a view: jitter, greyscale, blur, solarise, flip. x (N, C, h, w) in [0, 1], ids (N,) on CPU."""
    u = uniform(ids, 14, *key)
    if view.get("jitter"):
        spread = torch.tensor(JITTER)
        factors = (2 * u[:, :4] - 1) * spread + torch.tensor([1.0, 1.0, 1.0, 0.0])
        order = u[:, 4:8].argsort(dim=1, stable=True)
        x = color_jitter(x, factors, torch.where(u[:, 8:9] < view["jitter"], order, -1))
    if view.get("grey") and x.shape[1] == 3:
        x = torch.where(_per_image(u[:, 9] < view["grey"], x).bool(), grey(x), x)
    if view.get("blur"):
        chosen = (u[:, 10] < view["blur"]).nonzero()[:, 0]
        if len(chosen):
            on_device = chosen.to(x.device)
            x[on_device] = gaussian_blur(x[on_device], 0.1 + 1.9 * u[chosen, 11])
    if view.get("solarise"):
        x = torch.where(_per_image(u[:, 12] < view["solarise"], x).bool(), solarise(x), x)
    if view.get("flip"):
        x = torch.where(_per_image(u[:, 13] < view["flip"], x).bool(), x.flip(3), x)
    return x


# ---------------------------------------------------------------------------------------- sources of pictures
class Pictures:
    """A set of pictures: `files` under `root`, or uint8 `images` (N, C, H, W) in memory, or both.

    labels: (N,) int64 or None; classes: names; mean, std: of the channels, after scaling to [0, 1].
    """

    def __init__(self, files=None, root=None, images=None, labels=None, classes=None, in_chans=3, name=""):
        self.files, self.root, self.images = files, root, images
        self.labels, self.classes, self.in_chans, self.name = labels, classes, in_chans, name
        self.bad = {}                                                       # index: what is wrong with the file
        self.mean, self.std = channel_stats(in_chans)

    def __len__(self):
        return len(self.files) if self.images is None else len(self.images)

    def file(self, i):
        return self.files[i] if self.files is not None else f"{self.name}/{i}"

    def read(self, i, shrink_to=None):
        """Picture i as a PIL image with in_chans channels of 8 bits; shrink_to(H, W) -> factor allows a smaller one."""
        with Image.open(os.path.join(self.root, self.files[i])) as image:
            full = image.size
            if shrink_to is not None and image.format == "JPEG":
                factor = shrink_to((full[1], full[0]))
                if factor > 1:
                    image.draft(None, (full[0] // factor, full[1] // factor))
            return to_channels(ImageOps.exif_transpose(image), self.in_chans)

    def select(self, ids):
        """The pictures at ids (a list or tensor of indices), as a set of its own."""
        ids = torch.as_tensor(ids, dtype=torch.long)
        part = Pictures([self.files[i] for i in ids.tolist()] if self.files is not None else None, self.root,
                        self.images[ids.to(self.images.device)] if self.images is not None else None,
                        self.labels[ids] if self.labels is not None else None, self.classes, self.in_chans, self.name)
        part.mean, part.std = self.mean, self.std
        return part

    def hold(self, device):
        """Move pictures that are in memory to the device; others stay files."""
        if self.images is not None:
            self.images = self.images.to(device)
        return self


def channel_stats(in_chans):
    """ImageNet's mean and std for three channels, their average repeated for another number."""
    if in_chans == 3:
        return IMAGENET_STATS
    return tuple((sum(values) / 3,) * in_chans for values in IMAGENET_STATS)


def to_channels(image, in_chans):
    """Any PIL image with in_chans channels of 8 bits: greyscale, palette, CMYK, alpha, 16-bit and float included."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float32)
        scale = 1 if values.max(initial=0) <= 255 else 255 / 65535          # 16 bits unless it all fits 8
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(in_chans)
    if mode is None:
        raise UsageError(f"--in-chans {in_chans}: pictures are read with 1 (grey), 3 (RGB) or 4 (RGBA) channels")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def list_files(root):
    """Picture files below root, relative and sorted; hidden ones left out."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inside = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(inside, name)) for name in sorted(names)
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return found


def read_list(path):
    """Names of a list file: one a line, alone or followed by a label; LF or CRLF; bare or with folders."""
    with open(path, encoding="utf-8", errors="replace") as f:
        names = [line.split()[0] for line in f.read().splitlines() if line.strip()]
    for name in names:
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            raise UsageError(f"{path}: the name {name!r} leads out of the data folder")
    if not names:
        raise UsageError(f"{path}: the list is empty")
    return names


def find_listed(files, names, where):
    """Indices into files of the listed names, matched by their last two or one parts; every name must be found."""
    position = {}
    for i, file in enumerate(files):
        parts = file.replace(os.sep, "/").split("/")
        position.setdefault(parts[-1], []).append(i)
    chosen, missing, doubtful = [], [], []
    for name in names:
        parts = name.split("/")
        hits = position.get(parts[-1], [])
        if len(hits) > 1 and len(parts) > 1:
            hits = [i for i in hits if files[i].replace(os.sep, "/").split("/")[-2:] == parts[-2:]]
        if len(hits) == 1:
            chosen.append(hits[0])
        else:
            (doubtful if hits else missing).append(name)
    if missing:
        raise UsageError(f"{where}: {len(missing)} of {len(names)} listed pictures do not exist, first {missing[0]}")
    if doubtful:
        raise UsageError(f"{where}: {doubtful[0]} stands for several pictures; list it with its folder")
    return chosen


def open_folder(path, train, in_chans):
    """A folder with train/ and val/ or test/, any folder of pictures, or a list file beside its pictures."""
    if os.path.isfile(path):
        root = os.path.dirname(os.path.abspath(path))
        files = list_files(root)
        files = [files[i] for i in find_listed(files, read_list(path), path)]
    elif os.path.isdir(path):
        names = ("train",) if train else ("val", "test")
        parts = [name for name in names if os.path.isdir(os.path.join(path, name))]
        has_parts = any(os.path.isdir(os.path.join(path, name)) for name in ("train", "val", "test"))
        if has_parts and not parts:
            raise UsageError(f"{path}: no {' or '.join(name + '/' for name in names)} in this folder")
        if not has_parts and not train:
            raise UsageError(f"{path}: no train/ and no val/ or test/ in this folder, so nothing to evaluate on")
        root = os.path.join(path, parts[0]) if parts else path
        files = list_files(root)
    else:
        raise UsageError(f"{path}: no such folder or list file (--data)")
    if not files:
        raise UsageError(f"{path}: no pictures found (looked for {', '.join(EXTENSIONS)})")
    folders = [file.split(os.sep)[0] if os.sep in file else None for file in files]
    classes = sorted({folder for folder in folders if folder is not None})
    labels = None
    if None not in folders and len(classes) > 1:
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number[folder] for folder in folders])
    return Pictures(files, root, labels=labels, classes=classes if labels is not None else None, in_chans=in_chans,
                    name=path)


def into_memory(pictures, max_bad=0.01):
    """Decode pictures that all have one small size into memory; leaves the set as it is when they do not."""
    sizes = set()
    for i in shuffled(len(pictures), 0, SUBSET)[:64].tolist():
        try:
            with Image.open(os.path.join(pictures.root, pictures.files[i])) as image:
                sizes.add(image.size)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
    if len(sizes) != 1:
        return pictures
    w, h = sizes.pop()
    if max(h, w) > MEMORY_SIDE or len(pictures) * h * w * pictures.in_chans > MEMORY_LIMIT:
        return pictures

    def decode(i):
        try:
            image = np.asarray(pictures.read(i)).reshape(-1)
            return image if image.size == h * w * pictures.in_chans else None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return str(error)

    stack = np.zeros((len(pictures), h, w, pictures.in_chans), np.uint8)
    good = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, pixels in enumerate(pool.map(decode, range(len(pictures)), chunksize=256)):
            if pixels is None:
                return pictures                                             # another size: read them as files
            if isinstance(pixels, str):
                pictures.bad[i] = pixels
            else:
                stack[i] = pixels.reshape(stack.shape[1:])
                good.append(i)
    report_bad(pictures, max_bad)
    pictures.images = torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()
    kept = pictures if len(good) == len(pictures) else pictures.select(good)
    kept.bad = pictures.bad
    return kept


def report_bad(pictures, max_bad, seen=0):
    """Name bad files once; give up when their share of the set is above max_bad."""
    for i in list(pictures.bad)[seen:]:
        print(f"warning: skipped {os.path.join(pictures.root, pictures.files[i])}: {pictures.bad[i]}", flush=True)
    if len(pictures.bad) > max(max_bad * len(pictures), 1):
        raise RunError(f"{len(pictures.bad)} of {len(pictures)} pictures cannot be read, more than --max-bad {max_bad:g} "
                       f"allows; first {pictures.file(next(iter(pictures.bad)))}")
    return len(pictures.bad)


def load_data(source, train=True, in_chans=3, stats="imagenet", max_bad=0.01):
    """The pictures that --data names: None the embedded set, cifar10, cifar100, a folder or a list file."""
    source = source or os.environ.get("DATA")
    if not source:
        pictures = embedded(train, in_chans)
    elif source in ("cifar10", "cifar100"):
        import torchvision
        reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[source]
        try:
            raw = reader("downloads", train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise RunError(f"--data {source}: not in downloads/ and cannot be downloaded ({error})") from None
        images = torch.from_numpy(np.ascontiguousarray(raw.data)).permute(0, 3, 1, 2).contiguous()
        if in_chans != 3:
            raise UsageError(f"--data {source} has three channels, not {in_chans}")
        pictures = Pictures(images=images, labels=torch.tensor(raw.targets), classes=raw.classes, name=source)
    else:
        pictures = into_memory(open_folder(source, train, in_chans), max_bad)
    if stats == "data":
        pictures.mean, pictures.std = measure_stats(pictures)
    return pictures


def labelled(pictures, spec=None, seed=0):
    """Indices of the pictures whose labels may be used, sorted, and how they were chosen.

    spec: None for all; "1%" or "5 per class", a class-balanced draw by seed; or a list file (SimCLR's lists).
    """
    if pictures.labels is None:
        raise UsageError(f"{pictures.name}: no labels (a labelled set has one folder a class in train/ and val/ or test/)")
    labels = pictures.labels
    counts = labels.bincount(minlength=len(pictures.classes))
    if spec is None:
        ids, how = torch.arange(len(labels)), "all"
    elif os.path.isfile(spec):
        if pictures.files is None:
            raise UsageError(f"--labels {spec}: a list names files, and {pictures.name} has none")
        ids = torch.tensor(sorted(find_listed(pictures.files, read_list(spec), f"--labels {spec}")))
        how = f"list {os.path.basename(spec)}"
    else:
        text = spec.replace("per class", "").strip()
        number = text.removesuffix("%")
        try:
            value = float(number) if text.endswith("%") else int(number)
        except ValueError:
            raise UsageError(f"--labels {spec!r}: neither a share (1%), nor '5 per class', nor an existing list file") from None
        if not (0 < value <= 100 if text.endswith("%") else value > 0):
            raise UsageError(f"--labels {spec!r}: out of range")
        wanted = (counts * value / 100).round().clamp_min(1).long() if text.endswith("%") else torch.full_like(counts, value)
        short = (counts < wanted).nonzero()[:, 0].tolist()
        if short:
            raise UsageError(f"--labels {spec!r}: class {pictures.classes[short[0]]} has only {counts[short[0]]} pictures")
        order = shuffled(len(labels), SUBSET, 3, seed)
        rank = torch.empty_like(order)                                      # place of each picture within its class
        for c in range(len(counts)):
            mine = order[labels[order] == c]
            rank[mine] = torch.arange(len(mine))
        ids, how = (rank < wanted[labels]).nonzero()[:, 0], f"{spec}, balanced draw, seed {seed}"
    found = labels[ids].unique()
    if len(found) < 2:
        raise UsageError(f"{pictures.name}: one class only among the {len(ids)} labelled pictures, nothing to tell apart")
    if len(found) < len(pictures.classes):
        absent = sorted(set(range(len(pictures.classes))) - set(found.tolist()))
        raise UsageError(f"--labels {spec!r}: no picture of {len(absent)} of the {len(pictures.classes)} classes, "
                         f"first {pictures.classes[absent[0]]}")
    return ids, how


def same_classes(train, test):
    """Give the test set the class numbers of the training set; every test class must be known there."""
    if test.labels is None:
        raise UsageError(f"{test.name}: the test pictures have no class folders")
    unknown = [c for c in test.classes if c not in train.classes]
    if unknown:
        raise UsageError(f"{test.name}: the test class {unknown[0]} is not among the training classes")
    test.labels = torch.tensor([train.classes.index(c) for c in test.classes])[test.labels]
    test.classes = train.classes
    return test


def measure_stats(pictures, most=5000):
    """Mean and std of each channel over at most 5,000 pictures, chosen by hash."""
    total, squares, count = 0.0, 0.0, 0
    for i in shuffled(len(pictures), 1, SUBSET)[:most].tolist():
        if pictures.images is not None:
            x = pictures.images[i].double().flatten(1)
        else:
            try:
                x = torch.from_numpy(np.array(pictures.read(i))).double().reshape(-1, pictures.in_chans).T
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                continue
        total, squares, count = total + x.sum(1), squares + x.square().sum(1), count + x.shape[1]
    mean = total / count / 255
    std = (squares / count / 255 ** 2 - mean ** 2).clamp_min(0).sqrt().clamp_min(1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


# ------------------------------------------------------------------------------------------------ batches
class View:
    """A view of a batch that augments what is sliced from it: `view[a:b]` is (b - a, C, h, w), normalised."""

    def __init__(self, batch, number):
        self.batch, self.number = batch, number

    def __len__(self):
        return len(self.batch.ids)

    def __getitem__(self, part):
        batch, loader = self.batch, self.batch.loader
        spec, ids = loader.views[self.number], batch.ids[part]
        key = (loader.seed, batch.epoch)
        if batch.crops is None:
            images = loader.pictures.images
            sizes = torch.tensor([images.shape[2:]]).expand(len(ids), 2)
            boxes = loader.boxes(ids, sizes, self.number, batch.epoch)
            x = resample(images[ids.to(images.device)], boxes, loader.size, spec["mode"])
        else:
            x = batch.crops[self.number][part].to(loader.device, non_blocking=True).float() / 255
        x = augment(x, ids, spec, COLOUR, self.number, *key)
        return (x - loader.mean) / loader.std


class Batch:
    """ids (n,) of the pictures on the CPU; views[k] a lazy View; noise(L) the uniform numbers that choose masks."""

    def __init__(self, loader, ids, epoch, crops=None):
        self.loader, self.ids, self.epoch, self.crops = loader, ids, epoch, crops
        self.views = [View(self, k) for k in range(len(loader.views))]

    def __len__(self):
        return len(self.ids)

    def noise(self, length):
        return uniform(self.ids.to(self.loader.device), length, MASK, self.loader.seed, self.epoch)


class _Reader(torch.utils.data.Dataset):
    """What a worker does: read, decode no larger than the crops need, crop, resize; uint8 out."""

    def __init__(self, loader):
        self.pictures, self.views, self.size = loader.pictures, loader.views, loader.size
        self.boxes = loader.boxes

    def __getitem__(self, key):
        epoch, wanted = key
        trouble = None
        for attempt in range(20):
            # a picture that cannot be read is replaced by another, the same one on every run
            i = wanted if attempt == 0 else int(shuffled(len(self.pictures), wanted, SUBSET)[attempt])
            try:
                return wanted, trouble, self.crops(i, epoch)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                trouble = trouble or f"{type(error).__name__}: {error}"
        raise RunError(f"20 pictures in a row cannot be read, among them {self.pictures.file(wanted)}: {trouble}")

    def crops(self, i, epoch):
        boxes = []

        def shrink(full):
            """The largest of JPEG's own reductions that keeps every crop at least as large as its output."""
            return max((f for f in (1, 2, 4, 8) if all(box[2] >= f * self.size[0] and box[3] >= f * self.size[1]
                                                       for box in self.plan(i, full, epoch))), default=1)

        image = self.pictures.read(i, shrink)
        for box, view in zip(self.plan(i, (image.size[1], image.size[0]), epoch), self.views):
            top, left, h, w = box
            filter = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[view["mode"]]
            crop = image.resize((self.size[1], self.size[0]), filter, box=(left, top, left + w, top + h))
            boxes.append(torch.from_numpy(np.array(crop)).reshape(*self.size, -1).permute(2, 0, 1).contiguous())
        return boxes

    def plan(self, i, full, epoch):
        ids, sizes = torch.tensor([i]), torch.tensor([full])
        return [self.boxes(ids, sizes, k, epoch)[0].tolist() for k in range(len(self.views))]


class Loader:
    """Batches of a set, in hashed order: for batch in loader.epoch(e, start): ... Every process gets its share.

    batch_size is this process's share of the global batch; the rest of an epoch that fills no global batch is left
    out, or with shuffle=False handed out as a shorter batch. `waited` counts seconds spent waiting for data.
    """

    def __init__(self, pictures, views, size, batch_size, seed=0, workers=0, device="cpu", rank=0, processes=1,
                 shuffle=True, max_bad=0.01, mean=None, std=None):
        self.pictures, self.views, self.size = pictures, views, tuple(size)
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self.rank, self.processes, self.shuffle, self.max_bad = rank, processes, shuffle, max_bad
        self.mean = torch.tensor(mean or pictures.mean, device=device)[:, None, None]
        self.std = torch.tensor(std or pictures.std, device=device)[:, None, None]
        self.waited = 0.0
        self.keys = []
        self.reader = None
        if pictures.images is None:
            self.reader = torch.utils.data.DataLoader(
                _Reader(self), batch_sampler=self, num_workers=workers, collate_fn=self.collate,
                pin_memory=self.device.type == "cuda", persistent_workers=workers > 0)

    def __len__(self):
        if self.shuffle:
            return len(self.pictures) // (self.batch_size * self.processes)
        return math.ceil(len(self.pictures) / (self.batch_size * self.processes))

    def boxes(self, ids, sizes, number, epoch):
        scale = self.views[number]["scale"]
        if scale is None:
            return central_boxes(sizes, self.size)
        return random_boxes(ids, sizes, scale, CROP, number, self.seed, epoch)

    def __iter__(self):
        return iter(self.keys)                                              # the batch sampler of self.reader

    def __getstate__(self):                                                 # workers need the plan, not the reader
        return {k: v for k, v in self.__dict__.items() if k not in ("reader", "keys", "mean", "std")}

    @staticmethod
    def collate(items):
        wanted, troubles, crops = zip(*items)
        bad = {i: trouble for i, trouble in zip(wanted, troubles) if trouble}
        return torch.tensor(wanted), bad, [torch.stack(view) for view in zip(*crops)]

    def batches(self, epoch, start=0):
        """The indices of each batch of this process, from batch `start` on."""
        n, share = self.batch_size * self.processes, self.batch_size
        order = shuffled(len(self.pictures), ORDER, self.seed, epoch) if self.shuffle else torch.arange(
            len(self.pictures))
        for b in range(start, len(self)):
            ids = order[b * n + self.rank * share:min(b * n + (self.rank + 1) * share, len(order))]
            if len(ids):
                yield ids

    def epoch(self, epoch, start=0):
        if self.reader is None:
            for ids in self.batches(epoch, start):
                yield Batch(self, ids, epoch)
            return
        self.keys = [[(epoch, i) for i in ids.tolist()] for ids in self.batches(epoch, start)]
        seen = len(self.pictures.bad)
        items = iter(self.reader)
        while True:
            before = time.perf_counter()
            item = next(items, None)
            self.waited += time.perf_counter() - before
            if item is None:
                return
            ids, bad, crops = item
            if bad:
                self.pictures.bad.update((i, t) for i, t in bad.items() if i not in self.pictures.bad)
                seen = report_bad(self.pictures, self.max_bad, seen)
            yield Batch(self, ids, epoch, crops)


# ------------------------------------------------------------------------------------------- embedded set
SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("stripes", "checks", "dots", "waves")


def embedded(train=True, in_chans=3, n=None, side=32):
    """4,096 (train) or 2,048 (test) drawn pictures of 16 classes, a shape filled with a texture: picture i is a
    function of i alone. Colours, place, size, turn, ground and light are random, so that no pixel tells the class."""
    n = n or (4096 if train else 2048)
    first = 0 if train else 1 << 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                # many small operations: faster alone
    images = torch.cat([draw(torch.arange(first + i, first + min(i + 32, n)), side) for i in range(0, n, 32)])
    torch.set_num_threads(threads)
    if in_chans == 1:
        images = (grey(images.float()) + 0.5).to(torch.uint8)
    elif in_chans != 3:
        raise UsageError(f"--in-chans {in_chans}: the embedded pictures have 3 channels, or 1 in grey")
    labels = (torch.arange(n) * 5) % 16
    classes = [f"{shape} of {texture}" for shape in SHAPES for texture in TEXTURES]
    return Pictures(images=images, labels=labels, classes=classes, in_chans=in_chans, name="embedded")


def texture(kind, x, y, u):
    """Pattern in [0, 1] at coordinates x, y (N, s, s) for kinds (N,), with u (N, 4): frequency, turn, phases."""
    angle = u[:, 1] * math.pi
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    frequency = (7.0 + 5.0 * u[:, 0])[:, None, None]
    a = frequency * (x * cos + y * sin) + 6.28 * u[:, 2, None, None]
    b = frequency * (y * cos - x * sin) + 6.28 * u[:, 3, None, None]
    patterns = torch.stack([(3 * a.sin()), 3 * a.sin() * b.sin() * 2, 6 * (a.sin() * b.sin()).abs() - 3.2,
                            3 * (a + 1.6 * (b * 0.8).sin()).sin()], 1)
    return patterns[torch.arange(len(kind)), kind].sigmoid()


def draw(ids, side=32):
    """Embedded pictures with these numbers: (N, 3, side, side) uint8. Drawn at twice the size, then averaged."""
    n, s = len(ids), 2 * side
    u = uniform(ids, 40, 20230501)
    label = (ids % (1 << 20) * 5) % 16
    line = (torch.arange(s) + 0.5) / s * 2 - 1
    y, x = line[:, None].expand(n, s, s), line[None].expand(n, s, s)

    def pick(column):
        return u[:, column, None, None]

    scale, turn = 0.5 + 0.3 * pick(0), (pick(1) - 0.5) * 1.2
    dx, dy = x - (pick(2) - 0.5) * 0.7, y - (pick(3) - 0.5) * 0.7
    px, py = (dx * turn.cos() + dy * turn.sin()) / scale, (dy * turn.cos() - dx * turn.sin()) / scale
    triangle = torch.maximum(py - 0.7, px.abs() * 1.8 - py - 0.9)
    cross = torch.maximum(torch.maximum(px.abs(), py.abs()) - 1, torch.minimum(px.abs(), py.abs()) - 0.38)
    inside = torch.stack([px.square() + py.square() - 0.9, torch.maximum(px.abs(), py.abs()) - 0.83, triangle, cross], 1)
    inside = (inside[torch.arange(n), label // 4] < 0).float()[:, None]

    def colours(column):
        """Two colours (N, 3, 1, 1) that differ by at least some light."""
        first, second = u[:, column:column + 3], u[:, column + 3:column + 6]
        apart = (second.mean(1, keepdim=True) - first.mean(1, keepdim=True))
        second = second + (0.35 * apart.sign() - apart).where(apart.abs() < 0.35, torch.zeros(()))
        return first[:, :, None, None], second.clamp(0, 1)[:, :, None, None]

    def painted(pattern, column):
        low, high = colours(column)
        return low + (high - low) * pattern[:, None]

    # the ground carries a texture of its own, of a kind that says nothing about the class
    ground = painted(texture((u[:, 4] * 4).long(), x, y, u[:, 5:9]), 9)
    figure = painted(texture(label % 4, x, y, u[:, 15:19]), 19)
    ground = ground.lerp(ground.mean((2, 3), keepdim=True), 0.5)
    image = torch.where(inside.bool(), figure, ground)
    light = 1 + (pick(25) - 0.5) * x + (pick(26) - 0.5) * y
    noise = uniform(ids, 3 * side * side, 20230502).reshape(n, 3, side, side) - 0.5
    image = torch.nn.functional.avg_pool2d(image * light[:, None], 2) + 0.12 * noise
    return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
