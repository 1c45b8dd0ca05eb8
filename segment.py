"""Semantic segmentation (Table 6): an encoder fine-tuned under UperNet, or a linear head on it.

    python segment.py --data ADE20K --init out/graft                        # the paper's
    torchrun --nproc_per_node 8 segment.py --data ADE20K --init out/graft   # on eight GPUs
    python segment.py --data ADE20K --init none out/mae out/graft           # the rows of a table
    python segment.py --data CAMVID --init out/graft --protocol linear4 --crop-size 48x64 \\
        --iterations 120 --batch-size 8 --lr 1e-2 --amp off                 # half a minute on a CPU
    python segment.py --predict IMAGES --segmenter out/segment              # label PNGs, overlays

Writes last.pt (to resume), segmenter.pt, log.jsonl and sheet.png into --out, and the mIoU on the
test images as one line of results.jsonl. Settings are those of MAE's ADE20K runs in mmsegmentation
(configs/mae/upernet_mae-base_fp16_8x2_512x512_160k_ade20k.py), which follow BEiT.
"""
import run  # first: a Ctrl-C while torch is imported ends in one line

import argparse
import contextlib
import hashlib
import math
import os
import time
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import augment
import checkpoint
import data
from data import DataError
from figures import segmentation as figures
from model import (Attention, BatchNorm1d, Block, VisionTransformer, confusion_matrix,
                   drop_path, full, init_mae_, param_groups, set_rates, world)
from run import UsageError, number

IGNORED = 255               # the label of pixels that count for nothing
SEGMENT = 17                # augment.uniform's key: what a random number is drawn for
AUXILIARY = 0.4             # weight of the auxiliary head's loss
# by protocol: mmsegmentation's, DINOv2's, iBOT's
DEFAULTS = dict(
    upernet=dict(iterations=160000, lr=1e-4, weight_decay=0.05, layer_decay=0.65, drop_path=0.1),
    linear=dict(iterations=40000, lr=1e-3, weight_decay=1e-4, layer_decay=1.0, drop_path=0.0),
    linear4=dict(iterations=160000, lr=8e-4, weight_decay=0.05, layer_decay=1.0, drop_path=0.0))
# what matters after training alone: it may differ when a run is resumed
TEST_OPTIONS = ("show", "predict", "segmenter", "test_part", "stride")


def get_args(argv=None):
    parser = run.Parser(__doc__)
    add = parser.group("data")
    add("--data", help="folder with train/images, train/labels, val/images and val/labels, or "
        "ADE20K's, Cityscapes' or VOC's folders as they are unpacked (default: $DATA)")
    add("--classes", metavar="FILE", help="their names, one a line (default: known, or numbers)")
    add("--ignore", type=number(int, -2 ** 31, 2 ** 31), action="append", metavar="ID",
        help="a further id that counts for nothing, as 255 does; may be repeated")
    add("--reduce-zero-label", action=argparse.BooleanOptionalAction,
        help="id 0 counts for nothing, k becomes k - 1 (default: in ADE20K's own folders)")
    add("--labels", help="training images used: 32 or 10%%, drawn by --seed (default: all)")
    add("--test-part", choices=("val", "test"), help="what is tested (default: val, else test)")
    run.add_options(add, "range workers max-bad")
    add = parser.group("model")
    add("--init", nargs="+", default=["out/graft"], help="encoders, a row each: a run's folder, "
        "our files, MAE, MoCo v3, DINO, timm, transformers; or none")
    run.add_options(add, "weights heads init-size arch patch-size", arch="vit_base")
    add("--protocol", choices=DEFAULTS, default="upernet", help="linear, linear4: BatchNorm and a "
        "linear classifier on the last or four blocks' tokens of the frozen encoder")
    add("--channels", type=number(int, 1, 4096), help="of UperNet (default: the encoder's width)")
    add("--relative-positions", action=argparse.BooleanOptionalAction, default=True,
        help="a learned bias by offset in every block, from 0, beside the positions")
    add("--layer-scale", type=number(float, 0, 10), default=1.0,
        help="first value of the learned scale of every branch; 0: none")
    add = parser.group("images")
    add("--crop-size", type=run.image_size, default=[512, 512], help="512 or HEIGHTxWIDTH; also "
        "of the windows in the test")
    add("--short-side", type=number(int, 1, 8192), help="of the images, before the random resize "
        "and in the test (default: the crop's)")
    add("--stride", type=number(int, 1, 8192), help="of the windows (default: 2/3 of the crop)")
    add("--show", type=number(int, 0, 64), default=4, help="test images on the sheet")
    add = parser.group("optimisation")
    add("--iterations", type=number(int, 1, 10 ** 7), help="default 160000; linear 40000")
    add("--batch-size", type=number(int, 1), default=16, help="global, of all devices")
    add("--lr", type=number(above=True), help="default 1e-4; linear 1e-3; linear4 8e-4")
    add("--layer-decay", type=number(float, 0, 1, above=True), help="rate of a layer / rate of the "
        "layer above (default 0.65)")
    add("--weight-decay", type=number(), help="not on 1-D parameters (default 0.05; linear 1e-4)")
    add("--warmup-iterations", type=number(int, 0, 10 ** 7), help="default 1500, or 15 %% of a "
        "shorter run")
    add("--drop-path", type=number(float, 0, 0.99), help="of the last block, falling to 0 at the "
        "first (default 0.1)")
    add("--loss-over", choices=("all", "valid"), default="all", help="pixels whose mean is the "
        "loss: with the ignored ones, as in mmsegmentation, or without")
    add = parser.group("predict")
    add("--predict", metavar="FOLDER", help="only write labels and overlays of its images")
    add("--segmenter", help="a run's folder or its segmenter.pt (default: --out)")
    add = parser.group("run")
    run.add_options(add, "out resume seed device amp compile log-every save-minutes "
                    "timeout-minutes results", out="out/segment")
    args = parser.parse_args(argv)
    args.data = args.data or os.environ.get("DATA")
    side = min(args.crop_size)
    run.fill(args, DEFAULTS[args.protocol])
    run.fill(args, dict(short_side=side, stride=max(side * 2 // 3, 1), ignore=[]))
    run.fill(args, dict(warmup_iterations=min(1500, int(0.15 * args.iterations))))
    if args.stride > side:
        parser.error(f"--stride {args.stride} is more than the crop's {side}: it leaves pixels out")
    if not args.predict:
        if not args.data:
            parser.error("--data is needed, a folder of images with labels for every pixel")
        if args.classes and not os.path.isfile(args.classes):
            parser.error(f"--classes {args.classes}: no such file")
    elif not os.path.isdir(args.predict):
        parser.error(f"--predict {args.predict}: no such folder (of images)")
    if args.amp == "auto" and (args.device == "cpu" or not torch.cuda.is_available()):
        args.amp = "off"        # convolutions in bf16 took 20 times as long on a CPU (torch 2.14)
    run.check(parser, args, [] if args.predict else args.init)
    return args


# -------------------------------------------------------------------------------------- the encoder
class RelativeAttention(Attention):
    """Attention with a learned bias by head and offset between patches, from 0 (Bao et al., 2021).

    offsets (h, 2 H - 1, 2 W - 1) for a grid of (H, W) patches; class_bias (h, 3): of the class
    token to patches, of patches to it, of it to itself.
    """

    def __init__(self, dim, heads, grid):
        super().__init__(dim, heads)
        self.grid = grid
        self.offsets = nn.Parameter(torch.zeros(heads, 2 * grid[0] - 1, 2 * grid[1] - 1))
        self.class_bias = nn.Parameter(torch.zeros(heads, 3))

    def bias(self, dtype):
        """(h, T, T): row, the token that asks; column, the one that is asked."""
        h, w = self.grid
        # [y', x', y, x] holds the offset (y - y', x - x')
        patches = self.offsets.to(dtype).unfold(1, h, 1).unfold(2, w, 1).flip(1, 2)
        patches = patches.permute(0, 3, 4, 1, 2).reshape(self.heads, h * w, h * w)
        bias = F.pad(patches, (1, 0, 1, 0))
        to_patches, to_class, own = self.class_bias.to(dtype)[..., None].unbind(1)     # (h, 1)
        bias[:, 0, 1:], bias[:, 1:, 0], bias[:, 0, :1] = to_patches, to_class, own
        return bias

    def forward(self, x, attention=None, first=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, bias = q[:, :, :first], self.bias(q.dtype)[:, :first]
        if attention is None and q.is_cuda:
            x = F.scaled_dot_product_attention(q, k, v, bias.expand(len(q), -1, -1, -1))
        else:                           # no fused kernel of a CPU has a gradient for the bias
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias).softmax(-1)
            x = weights @ v
            if attention is not None:
                attention.append(weights)
        return self.proj(x.transpose(1, 2).flatten(2))


class ScaledBlock(Block):
    """A block with a learned scale for each channel of its branches (Touvron et al., 2021)."""

    def __init__(self, dim, heads, mlp_ratio, rate, scale):
        super().__init__(dim, heads, mlp_ratio, rate)
        self.gamma_1 = nn.Parameter(torch.full((dim,), float(scale)))
        self.gamma_2 = nn.Parameter(torch.full((dim,), float(scale)))

    def forward(self, x, attention=None, first=None):
        branch = self.gamma_1 * self.attn(self.norm1(x), attention, first)
        x = x[:, :first] + drop_path(branch, self.drop_path, self.training)
        branch = self.gamma_2 * self.mlp(self.norm2(x))
        return x + drop_path(branch, self.drop_path, self.training)


# ---------------------------------------------------------------------------------------- the heads
class BatchNorm2d(BatchNorm1d):
    """BatchNorm of (N, C, h, w) over the images of all processes, in float32 under autocast.

    A batch that is not finite leaves no trace in the running statistics.
    """

    def forward(self, x):
        x, running = full(x), (self.running_mean, self.running_var)
        if self.training and world()[1] > 1:
            n, _, h, w = x.shape
            y = super().forward(x.permute(0, 2, 3, 1).flatten(0, 2))
            return y.unflatten(0, (n, h, w)).permute(0, 3, 1, 2)
        new = [value.clone() for value in running]
        y = F.batch_norm(x, *new, self.weight, self.bias, self.training, self.momentum, self.eps)
        if self.training:
            self.num_batches_tracked += 1
            for kept, value in zip(running, new):
                kept.copy_(value.where(value.isfinite(), kept))
        return y


def conv(inner, outer, size=1, kind=nn.Conv2d):
    """Convolution, BatchNorm, ReLU. Weights: Kaiming's, by what goes out, as mmcv's ConvModule."""
    layer = kind(inner, outer, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, BatchNorm2d(outer), nn.ReLU(inplace=True))


def pixel_classifier(width, classes, dropout=0.1):
    """Dropout of whole channels, then a 1x1 convolution with weights of std .01."""
    layer = nn.Conv2d(width, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(dropout), layer)


def resized(x, size):
    """(N, C, h, w) -> (N, C, *size): bilinear, corners not aligned."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def resize_taps(x, n, size):
    """Matrix (3n, size), like x: n pixels for each of a kernel's three taps -> `size` pixels, all
    `resized`, moved to their tap's place (by 1, 0 and -1) and summed."""
    matrix = F.interpolate(torch.eye(n, device=x.device, dtype=x.dtype)[None], size, mode="linear",
                           align_corners=False)[0]
    matrix = F.pad(matrix, (1, 1))
    return torch.cat([matrix[:, tap:tap + size] for tap in range(3)]).to(x.dtype)


class FusingConv(nn.Conv2d):
    """3x3 convolution of maps (N, C, ., .) side by side, each `resized` to the size of the first.

    Convolving and resizing are linear and change places here: the products of each tap with the
    channels, nearly all of the work, are made at a map's own size, and their results resized and
    summed. Equal to rounding; a map of a quarter of the pixels costs a third of its operations.
    """

    def __init__(self, inner, outer, size, **more):
        super().__init__(sum(inner), outer, size, **more)
        self.inner = inner

    def forward(self, maps):
        first, *weights = self.weight.split(self.inner, 1)
        y = F.conv2d(maps[0], first, padding=1)
        height, width = y.shape[2:]
        for x, weight in zip(maps[1:], weights):
            n, channels, h, w = x.shape
            taps = F.conv2d(x, weight.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1))
            taps = taps.view(n, -1, 3, 3, h, w).transpose(3, 4).reshape(n, -1, 3 * h, 3 * w)
            rows, columns = resize_taps(taps, h, height), resize_taps(taps, w, width)
            y = y + rows.T @ (taps @ columns)
        return y


class Pyramid(nn.ModuleList):
    """Four maps (N, D, h, w) of one size -> at 4, 2, 1 and 1/2 times that size, rounded down."""

    def __init__(self, dim):
        up4 = nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2), BatchNorm2d(dim), nn.GELU(),
                            nn.ConvTranspose2d(dim, dim, 2, 2))
        super().__init__([up4, nn.ConvTranspose2d(dim, dim, 2, 2), nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, maps):
        return [level(x) for level, x in zip(self, maps)]


class UperNet(nn.Module):
    """UperNet (Xiao et al., 2018): four maps (N, D, ., .), finest first -> logits as fine."""

    SCALES = (1, 2, 3, 6)

    def __init__(self, dim, channels, classes):
        super().__init__()
        self.pooled = nn.ModuleList([conv(dim, channels) for _ in self.SCALES])
        self.bottleneck = conv([dim] + [channels] * len(self.SCALES), channels, 3, FusingConv)
        self.laterals = nn.ModuleList([conv(dim, channels) for _ in range(3)])
        self.fpn = nn.ModuleList([conv(channels, channels, 3) for _ in range(3)])
        self.fuse = conv([channels] * 4, channels, 3, FusingConv)
        self.classifier = pixel_classifier(channels, classes)

    def forward(self, maps):
        top = maps[-1]
        pooled = [layer(F.adaptive_avg_pool2d(top, scale))
                  for layer, scale in zip(self.pooled, self.SCALES)]
        levels = [self.bottleneck([top, *pooled])]
        for lateral, x in zip(reversed(self.laterals), reversed(maps[:-1])):
            levels.insert(0, lateral(x) + resized(levels[0], x.shape[2:]))
        levels = [layer(x) for layer, x in zip(self.fpn, levels)] + levels[3:]  # the top has none
        return self.classifier(self.fuse(levels))


class Segmenter(VisionTransformer):
    """An encoder and a head: images (N, C, H, W) -> (logits (N, classes, h, w), those of the
    auxiliary head or None).

    head: the dict of `describe`. Under UperNet everything trains, positions included, and taps are
    the blocks' outputs as they are. A linear head reads them after the final norm and trains alone.
    """

    def __init__(self, config, head, drop_path=0.0):
        super().__init__(**config, drop_path=drop_path)
        self.taps, self.frozen = head["taps"], head["protocol"] != "upernet"
        dim, heads, classes = self.dim, config["heads"], head["classes"]
        if self.frozen:
            self.requires_grad_(False)
            width = dim * len(self.taps)
            self.head = nn.Sequential(BatchNorm2d(width), pixel_classifier(width, classes, 0.0))
            return
        self.pos_embed.requires_grad_(True)
        self.norm = nn.Identity()
        for i, block in enumerate(self.blocks):
            if head["layer_scale"]:
                block = ScaledBlock(dim, heads, self.config["mlp_ratio"], block.drop_path,
                                    head["layer_scale"])
            if head["relative"]:
                block.attn = RelativeAttention(dim, heads, self.grid)
            self.blocks[i] = block
        init_mae_(self)
        fcn = conv(dim, head["fcn_channels"], 3), pixel_classifier(head["fcn_channels"], classes)
        self.head = nn.ModuleDict(dict(pyramid=Pyramid(dim), fcn=nn.Sequential(*fcn),
                                       upernet=UperNet(dim, head["channels"], classes)))

    def train(self, mode=True):
        super().train(mode and not self.frozen)
        self.head.train(mode)
        return self

    def maps(self, x):
        """The patches after each tap (N, D, h, w), without the class token."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = [self.norm(x)[:, 1:] for x in self.intermediate(x, self.taps)]
        return [x.transpose(1, 2).unflatten(2, self.grid) for x in tokens]

    def forward(self, x):
        maps = self.maps(x)
        if self.frozen:
            return self.head(torch.cat(maps, 1)), None
        maps = self.head.pyramid(maps)
        return self.head.upernet(maps), self.head.fcn(maps[2]) if self.training else None


def describe(protocol, depth, classes, channels=768, relative=True, layer_scale=1.0,
             fcn_channels=256):
    """A Segmenter's head. Taps: after blocks 4, 6, 8 and 12 of 12, and in proportion."""
    taps = [max(1, round(depth * share)) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
    head = dict(protocol=protocol, classes=classes, taps=taps[3:] if protocol == "linear" else taps)
    if protocol == "upernet":
        head |= dict(channels=channels, relative=relative, layer_scale=layer_scale,
                     fcn_channels=fcn_channels)
    return head


def build(config, head, state=None, drop_path=0.0):
    """(segmenter, names in `state` that it has no place for); state, config: of checkpoint.fit.

    UsageError: sizes that do not fit each other.
    """
    try:
        net = Segmenter(config, head, drop_path)
    except ValueError as error:
        raise UsageError(str(error).replace("--img-size", "--crop-size")) from None
    if min(net.grid) < 2:
        raise UsageError("--crop-size: {}x{} patches are too few, 2x2 at least".format(*net.grid))
    return net, net.load_state_dict(state or {}, strict=False).unexpected_keys


def load_segmenter(path):
    """(network in evaluation mode, what segmenter.pt, or the one in a folder, holds besides)."""
    path = checkpoint.in_folder(path, "segmenter.pt")
    content = checkpoint.read(path)
    wanted = dict(model=dict, config=dict, head=dict, classes=list, mean=list, std=list,
                  short_side=int, stride=int)
    try:
        wrong = [name for name, kind in wanted.items() if not isinstance(content[name], kind)]
        if wrong:
            raise ValueError(wrong[0])
        state, config, head = content["model"], content["config"], content["head"]
        checkpoint.check_config(config, state)
        checkpoint.check_meta(content, config)
        widest = max((n for v in state.values() for n in v.shape), default=0)
        claims = [head.get(k, 0) for k in ("classes", "channels", "fcn_channels")]
        if not all(type(n) is int and 0 <= n <= widest for n in claims):
            raise ValueError(f"it claims a head {head!r:.80}")
        net = Segmenter(config, head)
        net.load_state_dict(state)
        ignored = content.setdefault("ignored", [])
        if type(ignored) is not list or not {*ignored} <= {*range(head["classes"])}:
            raise ValueError(f"it ignores {ignored!r:.80}")
        if len(content["classes"]) != head["classes"]:
            raise ValueError(f"{len(content['classes'])} names for {head['classes']} classes")
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"{path}: not a segmenter that segment.py wrote ({why})") from None
    return net.eval(), content


# ---------------------------------------------------------------------------- loss, rates, measures
def pixel_loss(logits, labels, over="all"):
    """Cross-entropy of logits (N, K, h, w), resized to labels (N, H, W); IGNORED ones give nothing.

    over: "all" divides by all pixels, the ignored ones too, as mmsegmentation does; "valid" by the
    others, of all processes.
    """
    logits = resized(full(logits), labels.shape[1:])
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if over == "all":
        return total / labels.numel()
    valid = (labels != IGNORED).sum()
    if world()[1] > 1:
        dist.all_reduce(valid)
    return total / (valid / world()[1]).clamp_min(1)


def linear_factor(step, steps, warmup):
    """Factor on every rate: from 1 to 0 over all steps, times a warm-up from 1e-6 to 1, as in
    mmsegmentation 0.x (its 1.x starts the fall where the warm-up ends)."""
    warm = 1 - (1 - step / warmup) * (1 - 1e-6) if step < warmup else 1.0
    return warm * (1 - step / steps)


def confusion(labels, predicted, classes):
    """(classes, classes) pixel counts, truth by row, prediction by column, without IGNORED ones."""
    valid = labels != IGNORED
    return confusion_matrix(predicted[valid].long(), labels[valid].long(), classes)


def measures(matrix, ignored=()):
    """Percentages of a confusion matrix: iou of each class, None where it is ignored or neither in
    the truth nor in the prediction; miou, the mean of the others; accuracy, of all pixels."""
    matrix = matrix.double()
    right = matrix.diag()
    iou = 100 * right / (matrix.sum(0) + matrix.sum(1) - right)             # 0 / 0 is NaN
    iou[list(ignored)] = math.nan
    return dict(miou=round(iou.nanmean().item(), 2),
                accuracy=round((100 * right.sum() / matrix.sum()).item(), 2),
                iou=[None if math.isnan(v) else round(v, 2) for v in iou.tolist()])


# -------------------------------------------------------------------------------- images and labels
VOC = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
       "motorbike person pottedplant sheep sofa train tvmonitor").split()
CITYSCAPES = ["road", "sidewalk", "building", "wall", "fence", "pole", "traffic light",
              "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
              "bus", "train", "motorcycle", "bicycle"]


def lines_of(path):
    """The lines of a text file, but blank ones; none where there is no such file."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        return [line.strip() for line in f if line.strip()]


def stems(root, folder, ending=""):
    """{name without its ending: path below root} of the images in a folder of root, if it is there.

    ending: "_x.png" for these alone. DataError: two files of one name.
    """
    place, found = os.path.join(root, folder), {}
    for name in data.list_files(place) if os.path.isdir(place) else ():
        if name.endswith(ending):
            key = name.removesuffix(ending) if ending else os.path.splitext(name)[0]
            path = os.path.join(folder, name)
            if key in found:
                raise DataError(f"{root}: two files of one name, {found[key]} and {path}")
            found[key] = path
    return found


def find(root, part):
    """({name: path below root} of the images of a part, train, val or test; of its labels; whether
    their id 0 counts for nothing; names of the classes or None)."""
    def there(folder):
        return os.path.isdir(os.path.join(root, folder))

    if there("JPEGImages"):
        path = os.path.join(root, "ImageSets", "Segmentation", f"{part}.txt")
        images, labels = stems(root, "JPEGImages"), stems(root, "SegmentationClass")
        names = lines_of(path)
        missing = set(names) - images.keys() - labels.keys()
        if missing:
            raise DataError(f"{path}: no image {min(missing)} in JPEGImages")
        images, labels = ({k: of[k] for k in names if k in of} for of in (images, labels))
        return images, labels, False, VOC
    if there("images/training"):
        folder = dict(train="training", val="validation", test="testing")[part]
        # each line begins with the class id and ends with the synonyms of its name
        lines = lines_of(os.path.join(root, "objectInfo150.txt"))[1:]
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
        return (stems(root, f"images/{folder}"), stems(root, f"annotations/{folder}"), True,
                names or [str(i + 1) for i in range(150)])
    if there("leftImg8bit"):
        images = stems(root, f"leftImg8bit/{part}", "_leftImg8bit.png")
        labels = stems(root, f"gtFine/{part}", "_gtFine_labelTrainIds.png")
        if images and not labels:
            raise DataError(f"{root}: no *_gtFine_labelTrainIds.png in gtFine/{part}; "
                            "cityscapesscripts' createTrainIdLabelImgs makes them")
        return images, labels, False, CITYSCAPES
    return stems(root, f"{part}/images"), stems(root, f"{part}/labels"), False, None


def orientation(image):
    """The EXIF orientation of a PIL image, 1 to 8; of a PNG without, pillow would decode all."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(0x0112, 1)


class Pairs(data.Dataset):
    """Images with labels: `targets`, the paths of the labels; `classes`, their names.

    Every image must have its label and the reverse, the label one channel and the image's size: a
    DataError names the first that has not. Ids are looked at when they are read.
    """

    def __init__(self, root, part, in_chans=3, classes=None, ignore=(), reduce_zero=None):
        images, labels, no_zero, names = find(root, part)
        for what, have, lack in (("label", images, labels), ("image", labels, images)):
            alone = sorted(have.keys() - lack.keys())
            if alone and not lack:
                raise DataError(f"{root}: {len(have)} files of {part}, and no {what}s (looked for "
                                f"in {part}/{what}s, or as in ADE20K, Cityscapes and VOC)")
            if alone:
                raise DataError(f"{os.path.join(root, have[alone[0]])}: no {what} goes with it "
                                f"(so with {len(alone)} of {len(have)} files)")
        keys = sorted(images)
        source = data.FileSource(root, [images[k] for k in keys])
        super().__init__(source, in_chans=in_chans, name=root)
        self.part, self.targets = part, [os.path.join(root, labels[k]) for k in keys]
        self.reduce_zero = no_zero if reduce_zero is None else reduce_zero
        if names and self.reduce_zero != no_zero:           # the ids move, and with them the names
            names = names[1:] if self.reduce_zero else ["other", *names]
        self.ignored, self.classes, self.seen = [IGNORED, *ignore], classes or names, None
        progress = run.Progress(f"headers of {part}", len(keys))
        for i in range(len(keys)):
            self.check_headers(i)
            progress.step()

    def select(self, ids):
        """The pairs at these indices, as a set of its own."""
        part = super().select(ids)
        part.targets = [self.targets[i] for i in ids]
        return part

    def check_headers(self, i):
        """Refuse a label that cannot be its image's. What is no image at all is found when read."""
        path = self.targets[i]
        try:
            with data.open_image(path) as label:
                mode, size, form = label.mode, label.size, label.format
                label_turned = orientation(label) != 1
            with data.open_image(os.path.join(self.name, self.file(i))) as image:
                turned = orientation(image) > 4
                shown = image.size[::-1] if turned else image.size
                if turned and image.format == "TIFF":       # pillow may have turned its header
                    shown = size
        except data.BadFile:
            return
        if form in ("JPEG", "MPO", "GIF"):                  # JPEG blurs ids, GIF numbers them anew
            raise DataError(f"{path}: a {form} does not keep class ids; write labels as PNGs, from "
                            "what they were made of")
        if label_turned:
            raise DataError(f"{path}: a label with an EXIF orientation; save it as it is shown")
        if mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise DataError(f"{path}: a label of {mode} pixels; needed is one channel of class ids "
                            "(a palette PNG is read by its indices)")
        if size != shown:
            raise DataError(f"{path}: a label of {size[0]}x{size[1]} pixels for an image of "
                            f"{shown[0]}x{shown[1]}")

    def label(self, i):
        """uint8 (H, W) of class ids, or IGNORED; without names any ids below IGNORED."""
        with data.or_bad_file(), data.open_image(self.targets[i]) as image:
            ids = np.array(image).astype(np.int64)
        first, classes = int(self.reduce_zero), len(self.classes or range(IGNORED))
        ignored = np.isin(ids, self.ignored) | (self.reduce_zero & (ids == 0))
        wrong = ids[~ignored & ((ids < first) | (ids >= first + classes))]
        if len(wrong):
            raise DataError(f"{self.targets[i]}: class id {wrong[0]}, and the {classes} classes "
                            f"are {first} to {classes - 1 + first}; --ignore leaves ids out"
                            + ", --classes FILE names more" * bool(self.classes))
        return np.where(ignored, IGNORED, ids - first).astype(np.uint8)

    def pair(self, i):
        """(image, label) as PIL images."""
        image, label = picture(self.read(i)), Image.fromarray(self.label(i))
        if image.size != label.size:
            raise DataError(f"{self.targets[i]}: a label of {label.width}x{label.height} pixels "
                            f"for an image of {image.width}x{image.height}")
        return image, label

    def look(self):
        """The largest id of all labels, at which it looks: a DataError names the first with a wrong
        one, or says that none counts."""
        progress = run.Progress(f"class ids of {self.part}", len(self), "labels")

        def seen(i):
            with contextlib.suppress(data.BadFile):
                ids = self.label(i)
                return int(ids[ids != IGNORED].max(initial=0)), (ids != IGNORED).any(), crc32(ids)
            return 0, False, 0

        found = []
        with ThreadPool(os.cpu_count()) as pool:
            for each in pool.imap(seen, range(len(self))):
                found.append(each)
                progress.step()
        largest, counts, sums = zip(*found)
        if not any(counts):
            raise DataError(f"{self.name}: no pixel of the labels of {self.part} counts, all are "
                            "ignored")
        self.seen = hashlib.sha256(str(sums).encode()).hexdigest()[:16]
        return max(largest)

    @property
    def label_digest(self):
        """Changes when a label that was looked at does, or the classes' names."""
        return hashlib.sha256(f"{self.seen} {self.classes}".encode()).hexdigest()[:16]

    def check_ids(self):
        """Refuse masks of 0 and 255, whose second class would count for nothing, and of 0, 128
        and 255, whose classes would be 129."""
        found = set()
        for i in augment.shuffled(len(self), augment.SUBSET, 7)[:64].tolist():
            with contextlib.suppress(data.BadFile):
                found.update(np.unique(self.label(i)).tolist())
        if len(found) == 2 and IGNORED in found:
            raise DataError(f"{self.name}: the labels hold but one class, and {IGNORED}, which is "
                            f"ignored: if {IGNORED} is a class, write it as 1")
        ids = sorted(found - {IGNORED})
        if self.classes is None and ids and ids[-1] >= 16 * len(ids):
            raise DataError(f"{self.name}: the labels hold the ids {', '.join(map(str, ids))} "
                            f"alone and {IGNORED}, which is ignored: write the classes as 0, 1, 2, "
                            f"..., or name all {ids[-1] + 1} of them by --classes")


def picture(pixels):
    """uint8 (H, W, C) -> PIL image."""
    return Image.fromarray(pixels.squeeze(2).numpy())


# ------------------------------------------------------------------------- augmentation and batches
def fit_short(image, short, factor=1.0):
    """(width, height) for a PIL image: its short side factor * short, the long one at most 4 times
    that."""
    scale = factor * min(short / min(image.size), 4 * short / max(image.size))
    return tuple(max(1, int(side * scale + 0.5)) for side in image.size)


def shrunk(image, short):
    """A PIL image, its short side resized, as uint8 (C, h, w)."""
    pixels = np.array(data.plain_bands(image).resize(fit_short(image, short), Image.BILINEAR))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def random_crop(image, label, crop, short, i, *key):
    """Resize by 0.5 to 2, crop, flip: PIL image and label -> uint8 (h, w, C), (h, w), at most crop.

    The crop is drawn again, up to 10 times, while one class has 75 % or more of the pixels that
    count.
    """
    u = augment.uniform(torch.tensor([i]), 24, SEGMENT, 0, *key)[0].tolist()
    size = fit_short(image, short, 0.5 + 1.5 * u[0])
    image = np.asarray(data.plain_bands(image).resize(size, Image.BILINEAR))
    label = np.asarray(label.resize(size, Image.NEAREST))
    room = [max(side - wanted, 0) + 1 for side, wanted in zip(label.shape, crop)]
    for down, across in zip(u[2::2], u[3::2]):
        top, left = int(down * room[0]), int(across * room[1])
        box = slice(top, top + crop[0]), slice(left, left + crop[1])
        counts = np.bincount(label[box].ravel(), minlength=256)[:IGNORED]
        if 0 < counts.max() < 0.75 * counts.sum():
            break
    image, label = image[box], label[box]
    return (image[:, ::-1], label[:, ::-1]) if u[1] < 0.5 else (image, label)


def photometric(x, ids, *key):
    """mmsegmentation's distortion of x (N, C, h, w) in [0, 1], each part with probability .5:
    brightness +-32 / 255; contrast .5 to 1.5, before or after saturation .5 to 1.5 and hue +-.1
    turns, which are of RGB alone."""
    u = augment.upload(augment.uniform(ids, 9, SEGMENT, 1, *key), x.device)
    on, spread = u[:, :4, None, None, None] < 0.5, 2 * u[:, 4:8, None, None, None] - 1
    brightness, contrast, saturation, hue = (on * spread).unbind(1)             # (N, 1, 1, 1)
    first = u[:, 8, None, None, None] < 0.5
    x = (x + brightness * 32 / 255).clamp(0, 1)
    x = (x * (1 + first * contrast / 2)).clamp(0, 1)
    if x.shape[1] == 3:
        value = x.amax(1, keepdim=True)
        present = (value - x.amin(1, keepdim=True)) / value.clamp_min(1e-6)
        factor = torch.minimum(1 + saturation / 2, 1 / present.clamp_min(1e-6))
        x = augment.turn_hue_(value - (value - x) * factor, 0.1 * hue)
    return (x * (1 + ~first * contrast / 2)).clamp(0, 1)


class Whole(torch.utils.data.Dataset):
    """(image uint8 (C, h, w) with `short` as its short side, label uint8 (H, W) as it is, what is
    wrong or None), read by a worker."""

    def __init__(self, pairs, short):
        self.pairs, self.short = pairs, short

    def __getitem__(self, i):
        try:
            image, label = self.pairs.pair(i)
        except ValueError as error:
            return None, None, error
        return shrunk(image, self.short), torch.from_numpy(np.array(label)), None


class Crops(torch.utils.data.Dataset):
    """A batch of random crops, read by a worker, for its [(turn, i), ...]: (uint8 (n, C, h, w),
    labels uint8 (n, h, w), where there is an image and no padding (n, 1, h, w), {i: what is wrong
    with it}). What cannot be read is padding alone."""

    def __init__(self, pairs, crop, short, seed):
        self.pairs, self.crop, self.short, self.seed = pairs, tuple(crop), short, seed

    def __getitems__(self, keys):
        images = torch.zeros(len(keys), self.pairs.in_chans, *self.crop, dtype=torch.uint8)
        labels = torch.full((len(keys), *self.crop), IGNORED, dtype=torch.uint8)
        inside = torch.zeros(len(keys), 1, *self.crop, dtype=torch.bool)
        wrong = {}
        for row, (turn, i) in enumerate(keys):
            try:
                pair = self.pairs.pair(i)
            except ValueError as error:
                wrong[i] = error
                continue
            image, label = random_crop(*pair, self.crop, self.short, i, self.seed, turn)
            image = torch.from_numpy(image.reshape(*label.shape, -1).copy()).permute(2, 0, 1)
            place = row, ..., slice(label.shape[0]), slice(label.shape[1])
            images[place], labels[place] = image, torch.from_numpy(label.copy())
            inside[place] = True
        return images, labels, inside, wrong


class Batch(NamedTuple):
    """images (n, C, h, w), normalised, 0 in the padding; labels (n, h, w) int64; ids (n,), on the
    CPU."""
    ids: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor


class Loader:
    """`iterations` random batches, as one epoch: image i looks the same in its turn-th crop,
    whatever the number of processes, workers and restarts. batch_size is this process's share."""

    def __init__(self, pairs, crop, short, batch_size, iterations, env, seed=0, workers=0,
                 max_bad=0.01):
        self.dataset, self.iterations, self.seed, self.max_bad = pairs, iterations, seed, max_bad
        self.batch_size, self.env, self.workers, self.waited = batch_size, env, workers, 0.0
        self.turn = len(pairs) // (batch_size * env.processes)      # batches with each image once
        self.crops = Crops(pairs, crop, short, seed)
        self.mean, self.std = statistics(pairs.mean, pairs.std, env.device)

    def __len__(self):
        return self.iterations

    def plan(self, start):
        """[(turn, image), ...] of each batch, from batch `start` on."""
        order = None
        for step in range(start, self.iterations):
            turn, b = divmod(step, self.turn)
            if b == 0 or order is None:
                order = augment.shuffled(len(self.dataset), augment.ORDER, self.seed, turn)
            first = (b * self.env.processes + self.env.rank) * self.batch_size
            yield [(turn, i) for i in order[first:first + self.batch_size].tolist()]

    def epoch(self, epoch=0, start=0):
        device = self.env.device
        reader = torch.utils.data.DataLoader(
            self.crops, batch_sampler=self.plan(start), num_workers=self.workers,
            collate_fn=list, pin_memory=device.type == "cuda")
        before = time.perf_counter()
        for keys, (images, labels, inside, wrong) in zip(self.plan(start), reader):
            self.waited += time.perf_counter() - before
            note(self.dataset, wrong, self.max_bad)
            ids = torch.tensor([i for _, i in keys])
            x = augment.upload(images, device).float() / 255
            x = (photometric(x, ids, self.seed, keys[0][0]) - self.mean) / self.std
            yield Batch(ids, x * augment.upload(inside, device),
                        augment.upload(labels, device).long())
            before = time.perf_counter()


def statistics(mean, std, device):
    """Mean and deviation of the channels as tensors (C, 1, 1)."""
    return [torch.tensor(values, device=device)[:, None, None] for values in (mean, std)]


def note(dataset, wrong, max_bad):
    """Take note of files that cannot be read, {i: error}. Any other fault, as of a label, ends the
    run."""
    known = len(dataset.bad)
    for i, error in wrong.items():
        if not isinstance(error, data.BadFile):
            raise error
        dataset.bad.setdefault(i, str(error))
    data.report_bad(dataset, max_bad, known)


# ----------------------------------------------------------------------------------------- the test
def corners(length, size, stride):
    """Where windows of `size` start: every `stride`, the last moved inward to end with the side."""
    return [*range(0, length - size, stride), length - size]


@torch.no_grad()
def slide(forward, x, size, stride, at_once=8):
    """Logits (K, H, W) of a normalised image x (C, H, W): the mean over windows of `size`; a
    smaller image is padded by 0. forward: (n, C, *size) -> (logits, anything)."""
    height, width = x.shape[1:]
    x = F.pad(x, (0, max(size[1] - width, 0), 0, max(size[0] - height, 0)))
    boxes = [(slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
             for top in corners(x.shape[1], size[0], stride)
             for left in corners(x.shape[2], size[1], stride)]
    total, count = 0, torch.zeros_like(x[:1])
    for start in range(0, len(boxes), at_once):
        some = boxes[start:start + at_once]
        logits = resized(full(forward(torch.stack([x[box] for box in some]))[0]), size)
        if start == 0:
            total = logits.new_zeros(logits.shape[1], *x.shape[1:])
        for box, window in zip(some, logits):
            total[box] += window
            count[box] += 1
    return (total / count)[:, :height, :width]


def label_map(logits, size, together=32):
    """Logits (K, h, w) -> uint8 (H, W), the likeliest class at that size; `together` classes at
    once, since 150 of them at the size of a photograph fill a memory."""
    values, ids = [], []
    for first, part in enumerate(logits.split(together)):
        value, index = resized(part[None], size)[0].max(0)
        values.append(value)
        ids.append((index + first * together).to(torch.uint8))
    best = torch.stack(values).argmax(0, keepdim=True)
    return torch.stack(ids).gather(0, best)[0]


class Tester:
    """Labels whole images: resized to the short side of `content`, what segmenter.pt holds, in
    windows, at their own size in the end."""

    def __init__(self, net, env, content):
        self.forward, self.env, self.size = env.autocast(net.eval()), env, net.config["img_size"]
        self.short, self.stride = content["short_side"], content["stride"]
        self.mean, self.std = statistics(content["mean"], content["std"], env.device)
        self.ignored = content["ignored"]

    def label(self, image, size):
        """uint8 (C, h, w) -> class ids uint8 (H, W) of `size`, on the device."""
        x = (augment.upload(image, self.env.device).float() / 255 - self.mean) / self.std
        logits = slide(self.forward, x, self.size, self.stride)
        logits[self.ignored] = logits.min() - 1             # which nowhere is the largest
        return label_map(logits, size)

    def label_picture(self, image):
        """PIL image -> class ids uint8 (H, W) as an array."""
        return self.label(shrunk(image, self.short), image.size[::-1]).cpu().numpy()

    def confusion(self, pairs, workers=0, max_bad=0.01):
        """(confusion matrix over all images, their number): each is read by one process."""
        env, classes, tested = self.env, len(pairs.classes), 0
        matrix = torch.zeros(classes, classes, dtype=torch.long, device=env.device)
        mine = range(env.rank, len(pairs), env.processes)
        reader = torch.utils.data.DataLoader(Whole(pairs, self.short), batch_size=None,
                                             sampler=mine, num_workers=workers)
        progress = run.Progress("test images", len(mine), quiet=env.rank > 0)
        for i, (image, label, wrong) in zip(mine, reader):
            if wrong is not None:
                note(pairs, {i: wrong}, max_bad)
            else:
                predicted = self.label(image, label.shape)
                matrix += confusion(augment.upload(label, env.device), predicted, classes)
                tested += 1
            progress.step()
        if env.processes > 1:
            dist.all_reduce(matrix)
        tested = sum(run.gather_objects(tested))
        for i, error in sum(run.gather_objects(list(pairs.bad.items())), []):
            pairs.bad.setdefault(i, error)
        data.report_bad(pairs, max_bad, len(pairs.bad))     # of all processes together
        if not tested:
            raise DataError(f"{pairs.name}: none of the test images can be read", 1)
        return matrix.cpu(), tested


# -------------------------------------------------------------------------------------------- a run
def load_pairs(args, in_chans, known):
    """(training pairs in use, how they were chosen, test pairs); known: the encoder's meta."""
    if in_chans not in (1, 3, 4):
        raise DataError(f"--init takes {in_chans} channels: images are read with 1, 3 or 4")

    def pairs_of(part, classes):
        return Pairs(args.data, part, in_chans, classes, args.ignore, args.reduce_zero_label)

    train = pairs_of("train", lines_of(args.classes) if args.classes else None)
    if not len(train):
        raise DataError(f"{args.data}: no training images (looked for train/images and "
                        "train/labels, and for ADE20K's, Cityscapes' and VOC's folders)")
    train.check_ids()
    largest = train.look()                  # now, not after days of training
    train.classes = train.classes or [str(i) for i in range(largest + 1)]
    if len(set(train.classes)) < len(train.classes):
        raise DataError(f"{args.data}: two classes of one name, "
                        f"{max(train.classes, key=train.classes.count)}")
    if not 2 <= len(train.classes) <= IGNORED:
        raise DataError(f"{args.data}: {len(train.classes)} classes; there must be 2 to {IGNORED}")
    test = pairs_of(args.test_part or "val", train.classes)
    if not len(test) and not args.test_part:
        test = pairs_of("test", train.classes)
    if not len(test):
        raise DataError(f"{args.data}: no images to test on ({args.test_part or 'val or test'})")
    test.look()
    used, how = train, "all"
    if args.labels and "class" in args.labels:
        raise DataError(f"--labels {args.labels}: a number of images or a share, 32 or 10%")
    if args.labels:
        every = SimpleNamespace(labels=torch.zeros(len(train)), classes=[""])   # as one class
        used = train.select(data.drawn(every, args.labels, args.seed, "natural").tolist())
        how = f"{args.labels}, drawn by seed {args.seed}"
    values = data.find_range(train, args.range or known.get("range"))
    for pairs in (used, test):
        pairs.range = values
        pairs.mean, pairs.std = (tuple(known.get(k) or getattr(pairs, k)) for k in ("mean", "std"))
    return used, how, test


def train_and_test(args, env):
    """A row: (its result, the sheet's columns {title: images})."""
    # ------------------------------------------------------------- 1. images, network
    size = dict(img_size=args.crop_size, in_chans=None)
    of_init = argparse.Namespace(**vars(args) | size)
    source, state, config = run.once_a_node(checkpoint.start, of_init)
    known = source["meta"] if source else {}
    pairs, how, test = run.once_a_node(load_pairs, args, config["in_chans"], known)
    run.same("numbers of images", f"{len(pairs)} and {len(test)}")
    args.batch_size = min(args.batch_size, len(pairs) // env.processes * env.processes)
    if args.batch_size < 2:
        raise UsageError(f"--batch-size, of {len(pairs)} training images: the heads' BatchNorm "
                         "needs two images")
    local = env.share(args.batch_size)
    torch.manual_seed(args.seed)
    head = describe(args.protocol, config["depth"], len(pairs.classes),
                    args.channels or config["dim"], args.relative_positions, args.layer_scale)
    net, unused = build(config, head, state, args.drop_path)
    loader = Loader(pairs, args.crop_size, args.short_side, local, args.iterations, env, args.seed,
                    args.workers, args.max_bad)
    net.to(env.device).train()
    run.compile_blocks(net, args.compile, env.device)
    model = run.distribute(net, env)
    forward = env.autocast(model)

    # ------------------------------------------------------------- 2. rates
    groups = param_groups(net, net.depth, [args.lr], args.weight_decay,
                          layer_decay=args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    scaler = run.grad_scaler(env)
    fixed = checkpoint.digest(net, checkpoint.is_encoder)

    # ------------------------------------------------------------- 3. what the run is
    name = os.path.basename(os.path.normpath(args.init))
    system = known.get("system") or ("random" if source is None else name)
    meta = dict(system=f"{system}, {args.protocol}", data=pairs.name, mean=list(pairs.mean),
                std=list(pairs.std), iterations=args.iterations, seed=args.seed,
                init=source and source["digest"], commit=run.commit())
    trained = {k: v for k, v in vars(args).items() if k not in TEST_OPTIONS}
    job = run.Job(argparse.Namespace(**trained), env, net, optimizer, scaler, loader, meta, source,
                  args.warmup_iterations, encoder_file=False)
    title = (f"{args.protocol}, {len(pairs.classes)} classes, labels: {how}; {len(test)} images of "
             f"{test.part} to test; ")
    job.report(groups, 1.0, local, title=title)
    if unused:
        job.say(f"  left out: {', '.join(unused)} (UperNet reads the blocks' outputs as they are)")
    if pairs.reduce_zero:
        job.say("label 0 counts for nothing, k is class k - 1")

    # ------------------------------------------------------------- 4. the method
    for step, batch in job.steps():
        factor = linear_factor(step, args.iterations, args.warmup_iterations)
        set_rates(optimizer, factor)
        # what a step drops depends on its number, not on restarts
        torch.manual_seed((args.seed * args.iterations + step) * env.processes + env.rank)
        logits, auxiliary = forward(batch.images)
        loss = pixel_loss(logits, batch.labels, args.loss_over)
        if auxiliary is not None:
            loss = loss + AUXILIARY * pixel_loss(auxiliary, batch.labels, args.loss_over)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        job.record(loss, batch, [args.lr * factor])

    # ------------------------------------------------------------- 5. the result, of the last step
    if net.frozen:
        now = checkpoint.digest(net, checkpoint.is_encoder)
        assert now == fixed, "training changed frozen weights"
    content = dict(model={k: v.cpu() for k, v in net.state_dict().items()}, config=net.config,
                   head=head, classes=list(pairs.classes), mean=list(pairs.mean),
                   std=list(pairs.std), range=pairs.range, short_side=args.short_side,
                   stride=args.stride, meta=meta,
                   ignored=[i for i in range(len(pairs.classes))
                            if i + pairs.reduce_zero in args.ignore])
    if env.rank == 0:
        checkpoint.save(content, job.path("segmenter.pt"))
        job.say(f"wrote {job.path('segmenter.pt')}")
    tester = Tester(net, env, content)
    matrix, tested = tester.confusion(test, args.workers, args.max_bad)
    found = measures(matrix, content["ignored"])
    asked = ("seed", "iterations", "batch_size", "lr", "layer_decay", "weight_decay", "crop_size",
             "short_side", "stride")
    told = ("epochs", "step", "seed", "data", "commit")
    result = dict(system=system, protocol=args.protocol, miou=found["miou"],
                  accuracy=found["accuracy"], iou=dict(zip(pairs.classes, found["iou"])),
                  checkpoint=args.init, data=pairs.name,
                  digest=source and checkpoint.encoder_digest(source),
                  part=test.part, labels=how, labelled=len(pairs), tested=tested,
                  **{k: getattr(args, k) for k in asked}, head=head,
                  pretraining={k: known.get(k) for k in told},
                  seconds=round(job.seconds(), 1), commit=run.commit())
    if env.rank > 0:
        return result, {}
    run.write_result(args.results or args.out, result)
    return result, sheet_columns(tester, test, args.show, f"{system}: {found['miou']:.1f}")


def sheet_columns(tester, pairs, n, title):
    """{title: RGB images} of n pairs, chosen by hash among those that can be read: the images, the
    true and the predicted classes."""
    order = augment.shuffled(len(pairs), augment.SUBSET, 5).tolist()
    chosen = sorted([i for i in order if i not in pairs.bad][:n])
    images, labels = zip(*map(pairs.pair, chosen)) if chosen else ((), ())
    found = [tester.label_picture(image) for image in images]
    columns = dict(image=[np.asarray(image.convert("RGB")) for image in images])
    for name, maps in (("truth", labels), (title, found)):
        columns[name] = [figures.coloured(np.asarray(ids), len(pairs.classes)) for ids in maps]
    return columns


def predict(args):
    """Writes palette PNGs of class ids, as trained, and overlays of the images in --predict."""
    env = run.setup(args)
    net, content = load_segmenter(args.segmenter or args.out)
    own = os.path.relpath(os.path.join(args.out, "predict"), args.predict)
    files = {name: path for name, path in stems(args.predict, "").items()
             if not path.startswith((own + "/", own + "-overlays/"))}
    if not files:
        raise DataError(f"{args.predict}: no images in this folder")
    images = data.Dataset(data.FileSource(args.predict, list(files.values())),
                          in_chans=net.config["in_chans"], name=args.predict)
    images.range = content.get("range")
    tester = Tester(net.to(env.device), env, content)
    out, classes = os.path.join(args.out, "predict"), len(content["classes"])
    progress = run.Progress("images", len(images))
    for i, name in enumerate(files):
        progress.step()
        try:
            image = picture(images.read(i))
        except data.BadFile as error:
            note(images, {i: error}, args.max_bad)
            continue
        labels = tester.label_picture(image)
        over = figures.overlay(np.asarray(image.convert("RGB")), labels, classes)
        drawn = {"predict": figures.label_image(labels, classes),
                 "predict-overlays": Image.fromarray(over)}
        for folder, page in drawn.items():
            with run.atomic(os.path.join(args.out, folder, f"{name}.png")) as path:
                page.save(path, format="PNG")
    done = len(images) - len(images.bad)
    print(f"wrote {out}: labels of {done} images, and {out}-overlays", flush=True)
    return dict(images=done, classes=content["classes"], path=out)


def main(args):
    if args.predict:
        return predict(args)
    env = run.setup(args)
    names = [os.path.basename(os.path.normpath(init)) for init in args.init]
    if len(set(names)) < len(names):
        names = [f"{i}-{name}" for i, name in enumerate(names, start=1)]
    results, columns = [], {}
    for name, init in zip(names, args.init):
        row = argparse.Namespace(**vars(args) | dict(init=init))
        if len(names) > 1:
            row.out, row.results = os.path.join(args.out, name), args.results or args.out
        result, shown = train_and_test(row, env)
        results.append(result)
        columns |= {title if title in ("image", "truth") or len(names) == 1 else f"{name}, {title}":
                    images for title, images in shown.items()}
    if env.rank == 0 and args.show:
        with run.atomic(os.path.join(args.out, "sheet.png")) as path:
            figures.sheet(path, columns, list(result["iou"]))
    return results if len(results) > 1 else results[0]


if __name__ == "__main__":
    run.program(main, get_args)
