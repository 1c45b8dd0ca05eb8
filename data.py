"""Pictures: where they come from, how they are read, how they become batches on the device.

Order and augmentation are functions of (seed, epoch, picture) alone: see augment.py. Needs torch, numpy, pillow;
torchvision only for `--data cifar10|cifar100`. Shapes: N images, C channels, (H, W) source, (h, w) output pixels.
"""
import copy
import math
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps

from augment import (COLOUR, CROP, MASK, ORDER, PIXELS, SUBSET, augment, central_boxes, grey, per_picture, random_boxes,
                     resample, shuffled, uniform)

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DOWNLOADS = ("cifar10", "cifar100")         # the sets that --data fetches by name: all that ever uses the network
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")  # and none that pillow needs a program for
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
MEMORY_LIMIT = 4 << 30      # bytes of uint8 pixels up to which pictures of one size are held in memory
MEMORY_SIDE = 128           # and up to which side: larger ones are cropped by workers as they are read
MOST_PIXELS = 1 << 27       # of one picture, 134 million: what claims more is refused before its pixels are allocated


class UsageError(ValueError):
    """What was asked for cannot be done as asked: one line, exit code 2."""


class RunError(RuntimeError):
    """The run failed for a reason the user can mend: one line, exit code 1."""


class BadFile(ValueError):
    """A picture file that cannot be read, and why."""


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
        """Picture i as a PIL image with in_chans channels of 8 bits; shrink_to(H, W) -> factor allows a smaller one.

        Of an animation or several pages the first. Whatever is wrong with the file is a BadFile.
        """
        try:
            with open_picture(os.path.join(self.root, self.files[i])) as image:
                full = image.size
                if shrink_to is not None and image.format == "JPEG":
                    turned = image.getexif().get(0x0112, 1) > 4             # on its side, by its EXIF orientation
                    factor = shrink_to(full if turned else full[::-1])
                    if factor > 1:
                        image.draft(None, (full[0] // factor, full[1] // factor))
                return to_channels(ImageOps.exif_transpose(image), self.in_chans)
        except BadFile:
            raise
        except Exception as error:                                          # pillow raises a dozen kinds
            raise BadFile(f"{type(error).__name__}: {error}") from None

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


def open_picture(path):
    """A picture file, opened by pillow and not yet decoded; a BadFile if it is none or claims too many pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # its limit is not ours
            image = Image.open(path, formats=FORMATS)
    except Exception as error:
        raise BadFile(f"{type(error).__name__}: {error}") from None
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise BadFile(f"DecompressionBombError: it claims {image.width} x {image.height} pixels")
    return image


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
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[in_chans]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def list_files(root):
    """Picture files below root, relative and sorted; hidden ones left out."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not leads_back(folder, f))
        inside = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(inside, name)) for name in sorted(names)
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return found


def leads_back(folder, name):
    """Whether a folder is a link to one that it lies in: following it would never end."""
    path = os.path.join(folder, name)
    return os.path.islink(path) and (os.path.realpath(folder) + os.sep).startswith(os.path.realpath(path) + os.sep)


def read_list(path):
    """Names of a list file: one a line, alone or followed by a label; LF or CRLF; bare or with folders.

    A name may have blanks in it: a label is what follows the last one, if it is a number or comes after a picture.
    """
    with open(path, encoding="utf-8", errors="replace") as f:
        lines = [line.strip() for line in f.read().splitlines() if line.strip()]
    names = []
    for line in lines:
        name, *label = line.rsplit(maxsplit=1)
        names.append(name if label and (label[0].isdigit() or name.lower().endswith(EXTENSIONS)) else line)
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
        if len(parts) > 1:                                                  # a file in no folder goes by its name alone
            folders = [files[i].replace(os.sep, "/").split("/")[-2:-1] for i in hits]
            hits = [i for i, folder in zip(hits, folders) if folder in ([], parts[-2:-1])]
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
    if in_chans not in (1, 3, 4):
        raise UsageError(f"--in-chans {in_chans}: pictures are read with 1 (grey), 3 (RGB) or 4 (RGBA) channels")
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
            with open_picture(os.path.join(pictures.root, pictures.files[i])) as image:
                sizes.add(image.size)
        except BadFile:
            continue
    if len(sizes) != 1:
        return pictures
    w, h = sizes.pop()
    if max(h, w) > MEMORY_SIDE or len(pictures) * h * w * pictures.in_chans > MEMORY_LIMIT:
        return pictures

    def decode(i):
        try:
            image = np.asarray(pictures.read(i))
            return image if image.shape[:2] == (h, w) else None
        except BadFile as error:
            return str(error)

    stack = np.zeros((len(pictures), h, w, pictures.in_chans), np.uint8)
    good = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, pixels in enumerate(pool.map(decode, range(len(pictures)), chunksize=256)):
            if pixels is None:                                              # another size: read them as files
                pictures.bad.clear()
                return pictures
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
    elif source in DOWNLOADS:
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
            raise UsageError(f"--labels {spec!r}: neither a share (1%), nor '5 per class', nor a list file") from None
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
            except BadFile:
                continue
        total, squares, count = total + x.sum(1), squares + x.square().sum(1), count + x.shape[1]
    if not count:
        raise RunError(f"--stats data: none of the pictures of {pictures.name} can be read")
    mean = total / count / 255
    std = (squares / count / 255 ** 2 - mean ** 2).clamp_min(0).sqrt().clamp_min(1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


# ------------------------------------------------------------------------------------------------ batches
class View:
    """A view of a batch that augments what is sliced from it: `view[a:b]` is (b - a, C, h, w), normalised.

    A function under "pixels" in the view's dict gets each crop as uint8 (C, h, w); files: in the reading process.
    """

    def __init__(self, batch, number):
        self.batch, self.number = batch, number

    def __len__(self):
        return len(self.batch.ids)

    def __getitem__(self, part):
        # micro-batches are drawn inside the model, where autocast is on: pixels stay in float32
        with torch.autocast(self.batch.loader.device.type, enabled=False):
            return self.draw(part)

    def draw(self, part):
        batch, loader = self.batch, self.batch.loader
        spec, ids = loader.views[self.number], batch.ids[part]
        key = (loader.seed, batch.epoch)
        if batch.crops is None:
            images = loader.pictures.images
            sizes = torch.tensor([images.shape[2:]]).expand(len(ids), 2)
            boxes = loader.boxes(ids, sizes, self.number, batch.epoch)
            x = resample(images[ids.to(images.device)], boxes, loader.size, spec["mode"])
            if spec.get("pixels"):
                x = (x * 255 + 0.5).to(torch.uint8)
                x = per_picture(x, ids, spec["pixels"], PIXELS, self.number, *key).float() / 255
        else:
            x = batch.crops[self.number][part].to(loader.device, non_blocking=True).float() / 255
        x = augment(x, ids, spec, COLOUR, self.number, *key)
        return (x - loader.mean) / loader.std


class Batch:
    """ids (n,) of the pictures on the CPU; views[k] a lazy View; noise(L) the uniform numbers that choose masks.

    shown (n,): as ids, but where a picture cannot be read the one that stands in for it: labels go by `shown`.
    """

    def __init__(self, loader, ids, epoch, crops=None, shown=None):
        self.loader, self.ids, self.epoch, self.crops = loader, ids, epoch, crops
        self.shown = ids if shown is None else shown

    @property
    def views(self):
        return [View(self, k) for k in range(len(self.loader.views))]

    def __len__(self):
        return len(self.ids)

    def noise(self, length):
        return uniform(self.ids.to(self.loader.device), length, MASK, self.loader.seed, self.epoch)


class _Reader(torch.utils.data.Dataset):
    """What a worker does: read, decode no larger than the crops need, crop, resize; uint8 out."""

    def __init__(self, loader):
        self.pictures, self.views, self.size = loader.pictures, loader.views, loader.size
        # a copy, which is without the DataLoader: collected in a cycle, that waits 5 s for each of its workers
        self.boxes, self.seed = copy.copy(loader).boxes, loader.seed

    def __getitem__(self, key):
        epoch, wanted = key
        trouble = None
        for attempt in range(20):
            # a picture that cannot be read is replaced by another, the same one on every run
            i = wanted if attempt == 0 else int(shuffled(len(self.pictures), wanted, SUBSET)[attempt])
            try:
                return wanted, i, trouble, self.crops(i, epoch)
            except BadFile as error:
                trouble = trouble or str(error)
        raise RunError(f"20 pictures in a row cannot be read, among them {self.pictures.file(wanted)}: {trouble}")

    def crops(self, i, epoch):
        boxes = []

        def shrink(full):
            """The largest of JPEG's own reductions that keeps every crop at least as large as its output."""
            return max((f for f in (1, 2, 4, 8) if all(box[2] >= f * self.size[0] and box[3] >= f * self.size[1]
                                                       for box in self.plan(i, full, epoch))), default=1)

        image = self.pictures.read(i, shrink)
        for k, (box, view) in enumerate(zip(self.plan(i, (image.size[1], image.size[0]), epoch), self.views)):
            top, left, h, w = box
            filter = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[view["mode"]]
            crop = image.resize((self.size[1], self.size[0]), filter, box=(left, top, left + w, top + h))
            pixels = torch.from_numpy(np.array(crop)).reshape(*self.size, -1).permute(2, 0, 1).contiguous()
            if view.get("pixels"):
                pixels = per_picture(pixels[None], torch.tensor([i]), view["pixels"], PIXELS, k, self.seed, epoch)[0]
            boxes.append(pixels)
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
        self.keys = []                                                      # what self.reader is to read, by batch
        self.reader = None
        if pictures.images is None:
            self.reader = torch.utils.data.DataLoader(
                _Reader(self), batch_sampler=self.keys, num_workers=workers, collate_fn=self.collate,
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

    def __getstate__(self):                                                 # workers need the plan, not the reader
        return {k: v for k, v in self.__dict__.items() if k not in ("reader", "keys", "mean", "std")}

    @staticmethod
    def collate(items):
        wanted, shown, troubles, crops = zip(*items)
        bad = {i: trouble for i, trouble in zip(wanted, troubles) if trouble}
        return torch.tensor(wanted), torch.tensor(shown), bad, [torch.stack(view) for view in zip(*crops)]

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
        self.keys[:] = [[(epoch, i) for i in ids.tolist()] for ids in self.batches(epoch, start)]
        seen = len(self.pictures.bad)
        items = iter(self.reader)
        while True:
            before = time.perf_counter()
            item = next(items, None)
            self.waited += time.perf_counter() - before
            if item is None:
                return
            ids, shown, bad, crops = item
            if bad:
                self.pictures.bad.update((i, t) for i, t in bad.items() if i not in self.pictures.bad)
                seen = report_bad(self.pictures, self.max_bad, seen)
            yield Batch(self, ids, epoch, crops, shown)


# ------------------------------------------------------------------------------------------- embedded set
SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("columns", "rows", "checks", "dots")


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
    """Pattern in [0, 1] at coordinates x, y (N, s, s) for kinds (N,), with u (N, 4): frequency, turn, two phases."""
    angle = (u[:, 1] - 0.5) * 0.4
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    frequency = (14.0 + 5.0 * u[:, 0])[:, None, None]
    a = frequency * (x * cos + y * sin) + 6.28 * u[:, 2, None, None]
    b = frequency * (y * cos - x * sin) + 6.28 * u[:, 3, None, None]
    patterns = torch.stack([3 * a.sin(), 3 * b.sin(), 6 * a.sin() * b.sin(),
                            8 * (0.7 * a).sin().abs() * (0.7 * b).sin().abs() - 4.5], 1)
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

    scale, turn = 0.62 + 0.28 * pick(0), (pick(1) - 0.5) * 0.5
    dx, dy = x - (pick(2) - 0.5) * 0.4, y - (pick(3) - 0.5) * 0.4
    px, py = (dx * turn.cos() + dy * turn.sin()) / scale, (dy * turn.cos() - dx * turn.sin()) / scale
    triangle = torch.maximum(py - 0.7, px.abs() * 1.8 - py - 0.9)
    cross = torch.maximum(torch.maximum(px.abs(), py.abs()) - 1, torch.minimum(px.abs(), py.abs()) - 0.38)
    inside = torch.stack([px.square() + py.square() - 0.9, torch.maximum(px.abs(), py.abs()) - 0.83, triangle, cross], 1)
    inside = (inside[torch.arange(n), label // 4] < 0).float()[:, None]

    def colour(column, low, high):
        """A random light in [low, high] with a tint of its own, (N, 3, 1, 1)."""
        light = low + (high - low) * u[:, column:column + 1]
        return (light + 0.3 * (u[:, column + 1:column + 4] - 0.5))[:, :, None, None]

    # the ground is a smooth wave between two middling colours, the figure's texture a dark and a light one
    wave = (1.5 * (x * (6.28 * pick(4)).cos() + y * (6.28 * pick(4)).sin()) + 6.28 * pick(5)).sin() * 0.5 + 0.5
    ground = torch.lerp(colour(6, 0.3, 0.7), colour(10, 0.3, 0.7), wave[:, None])
    figure = torch.lerp(colour(14, 0.0, 0.3), colour(18, 0.7, 1.0), texture(label % 4, x, y, u[:, 22:26])[:, None])
    image = torch.where(inside.bool(), figure, ground)
    light = 1 + 0.5 * (pick(26) - 0.5) * x + 0.5 * (pick(27) - 0.5) * y
    noise = uniform(ids, 3 * side * side, 20230502).reshape(n, 3, side, side) - 0.5
    image = torch.nn.functional.avg_pool2d(image * light[:, None], 2) + 0.04 * noise
    return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


if __name__ == "__main__":                                                  # the sub-commands, each in its own file
    import sys

    import run
    asked = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if asked == "check":
        import check as command
    else:
        sys.exit(print("usage: python data.py check DIR", file=sys.stderr) or 2)
    run.program(command.main, command.get_args)
