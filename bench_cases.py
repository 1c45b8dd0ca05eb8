"""The cases of bench.py: for each what it needs at least and the codes that take turns.

A case is a generator over Case that takes bench.py's Bench: device, dtype, batch, config, args.
"""
import contextlib
import io
import json
import os
import tempfile
from collections import namedtuple
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import augment
import bench_against
import checkpoint
import data
import evaluate
import graft_train
import mae_pretrain
import run
from data import RunError, UsageError
from features import extract
from model import MaskedAutoencoder, MoCoV3, VisionTransformer, freeze

HIDDEN, OUT = 4096, 256                 # MoCo v3's heads
ADAMW = 28                              # bytes a step moves per weight: reads weight, gradient, moments; writes three
MOMENTUM = 12                           # reads both weights, writes one
LINEAR_EPOCHS = 90                      # of the linear protocol
LINEAR_BATCH = {"cuda": 1024, "cpu": 64}                                    # the protocol's; what a CPU does in seconds
LOOP_EPOCHS = 3                         # of the demonstration's 25 and 8
FEWSHOT = {"cuda": (12811, 1000), "cpu": (1280, 100)}                       # features, classes: 1 % of ImageNet; less
JPEG = dict(pictures=64, size=(500, 375), quality=90)                       # like ImageNet's: about 100 kB each

# codes: the first is ours. batch: pictures a call; flops: per picture; moved: bytes a call moves besides; note: a word
Case = namedtuple("Case", "name batch flops moved codes note", defaults=("",))
# build() -> call; call() -> None, or a Timed if it timed itself. dtype: the autocast type, None for float32;
# keeps: in a process of its own on a CPU, whether it keeps freed memory as our scripts do (run.keep_memory)
Code = namedtuple("Code", "name build dtype keeps", defaults=(True,))
Timed = namedtuple("Timed", "seconds waited")                               # seconds a call, share waiting for data


# --------------------------------------------------------------------------------------------- what is counted
def block_flops(tokens, dim, mlp_ratio=4.0, asking=None):
    """Forward FLOPs of a transformer block: qkv, two attention products, projection, MLP.

    asking: tokens that go on (default all); the others only give keys and values.
    """
    asking = tokens if asking is None else asking
    return 6 * tokens * dim ** 2 + 4 * asking * tokens * dim + (2 + 4 * mlp_ratio) * asking * dim ** 2


def embed_flops(config, patches):
    return 2 * patches * config["patch_size"] ** 2 * config["in_chans"] * config["dim"]


def patches_of(config):
    return (config["img_size"][0] // config["patch_size"]) * (config["img_size"][1] // config["patch_size"])


def vit_flops(config, class_only=True):
    """Forward FLOPs of a VisionTransformer for one picture, of its class token or of all tokens."""
    tokens, dim, ratio = 1 + patches_of(config), config["dim"], config["mlp_ratio"]
    whole = block_flops(tokens, dim, ratio)
    last = block_flops(tokens, dim, ratio, 1) if class_only else whole
    return embed_flops(config, tokens - 1) + (config["depth"] - 1) * whole + last


def mae_flops(config, decoder, mask_ratio=0.75):
    """FLOPs of an MAE training step for one picture: backward costs twice the forward, less below the patches."""
    patches = patches_of(config)
    kept, dim = int(patches * (1 - mask_ratio)), config["dim"]
    width, depth, _ = decoder
    forward = config["depth"] * block_flops(1 + kept, dim, config["mlp_ratio"])
    forward += 2 * (1 + kept) * dim * width + depth * block_flops(1 + patches, width)
    forward += 2 * (1 + patches) * width * config["patch_size"] ** 2 * config["in_chans"]
    return 3 * forward + 2 * embed_flops(config, kept)                      # no gradient of the pixels


def graft_flops(config, again=0):
    """FLOPs of a MoCo v3 step for one picture, two views: forward, backward, momentum forward.

    The patch projection is frozen. again: further forward passes of the encoder, as micro-batches need.
    """
    projector = 2 * (config["dim"] * HIDDEN + HIDDEN ** 2 + HIDDEN * OUT)
    predictor = 2 * (OUT * HIDDEN + HIDDEN * OUT)
    encoder, embedding = vit_flops(config), embed_flops(config, patches_of(config))
    return 2 * ((4 + again) * encoder - 2 * embedding + 4 * projector + 3 * predictor)


# ------------------------------------------------------------------------------------------------- the cases
def our_step(b, net, loss_of, betas=(0.9, 0.95), before=None):
    """A training step as the loops of mae_pretrain.py and graft_train.py take it."""
    groups = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=betas, fused=True)
    scaler = run.grad_scaler(b.device, b.dtype)

    def step():
        if before is not None:
            before()
        with torch.autocast(b.device.type, b.dtype, enabled=b.dtype is not None):
            loss = loss_of()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return step


def in_both(b, name, build):
    """A reference as it comes under the run's precision, and in float32 if that is another. build(dtype) -> call."""
    codes = [Code(name if dtype else f"{name}, fp32", partial(build, dtype), dtype, False)
             for dtype in dict.fromkeys((b.dtype, None))]
    if b.args.apart and b.device.type == "cpu":
        codes.append(Code(f"{name}, memory kept", partial(build, b.dtype), b.dtype))
    return codes


def mae_case(b):
    images = b.random(b.batch, 3, *b.config["img_size"])

    def ours():
        net = b.prepare(MaskedAutoencoder(*b.decoder, **b.config))
        return our_step(b, net, lambda: net(images, 0.75)[0])

    with torch.device("meta"):
        weights = sum(p.numel() for p in MaskedAutoencoder(*b.decoder, **b.config).parameters() if p.requires_grad)
    codes = [b.ours(ours)]
    if b.against("timm"):
        codes += in_both(b, "timm's blocks", lambda dtype: bench_against.step(
            bench_against.TimmMAE(b.config, b.decoder).to(b.device), [images], dtype))
    if b.against("transformers"):
        codes += in_both(b, "transformers", lambda dtype: bench_against.step(
            bench_against.TransformersMAE(b.config, b.decoder).to(b.device), [images], dtype))
    yield Case("mae", b.batch, mae_flops(b.config, b.decoder), ADAMW * weights, codes)


def graft_case(b):
    x1, x2 = (b.random(b.batch, 3, *b.config["img_size"]) for _ in range(2))
    micro = b.args.micro_batch or max(b.batch // 4, 1)

    def ours(micro_batch):
        net = MoCoV3(VisionTransformer(**b.config), HIDDEN, OUT)
        freeze(net, b.config["depth"], patch_embed=True)
        b.prepare(net)
        return our_step(b, net, lambda: net(x1, x2, micro_batch), (0.9, 0.999), lambda: net.update_momentum(0.99))

    with torch.device("meta"):
        net = MoCoV3(VisionTransformer(**b.config), HIDDEN, OUT)
        freeze(net, b.config["depth"], patch_embed=True)
    moved = (ADAMW * sum(p.numel() for p in net.parameters() if p.requires_grad)
             + MOMENTUM * sum(p.numel() for p in net.momentum_encoder.parameters()))
    plain = b.ours(partial(ours, 0))
    codes = [plain]
    if b.against("timm"):
        codes += in_both(b, "timm's blocks", lambda dtype: bench_against.step(
            bench_against.TimmMoCo(b.config, HIDDEN, OUT).to(b.device), [x1, x2], dtype))
    yield Case("graft", b.batch, graft_flops(b.config), moved, codes)
    codes = [b.ours(partial(ours, micro)), plain._replace(name="ours, undivided")]
    yield Case(f"graft, micro-batches of {micro}", b.batch, graft_flops(b.config, again=1), moved, codes)


def augment_case(b):
    """Each operation on float32 (B, 3, h, w), the crop from uint8 a seventh larger; whole views as in training."""
    h, w = b.config["img_size"]
    larger = b.pictures(h * 8 // 7, b.batch)
    source = larger.images
    x = source[:, :, :h, :w].float() / 255
    ids = torch.arange(b.batch)
    u = augment.uniform(ids, 4, 0)
    boxes = augment.random_boxes(ids, torch.tensor([source.shape[2:]]).expand(b.batch, 2), (0.08, 1.0), 1)
    light, turn, sigma = 0.6 + 0.8 * u[:, 0], 0.2 * u[:, 1] - 0.1, 0.1 + 1.9 * u[:, 2]
    operations = {
        "crop": lambda: augment.resample(source, boxes, (h, w), "bilinear"),
        "brightness": lambda: augment.adjust_brightness(x, light),
        "contrast": lambda: augment.adjust_contrast(x, light),
        "saturation": lambda: augment.adjust_saturation(x, light),
        "hue": lambda: augment.adjust_hue(x, turn),
        "grey": lambda: augment.grey(x).expand_as(x).contiguous(),
        "blur": lambda: augment.gaussian_blur(x, sigma),
        "solarise": lambda: augment.solarise(x),
        "flip": lambda: x.flip(3),
    }
    for name, views in (("MAE view", [augment.MAE_VIEW]), ("pair of views", augment.MOCO_VIEWS)):
        batch = next(data.Loader(larger, list(views), (h, w), b.batch, device=b.device).epoch(0))
        operations[name] = partial(lambda batch: [view[:] for view in batch.views], batch)
    theirs = {}
    if b.against("torchvision"):
        images = [Image.fromarray(np.ascontiguousarray(p.permute(1, 2, 0).cpu().numpy())) for p in source]
        theirs = bench_against.pillow_operations(h, images)
    for name, call in operations.items():
        pixels = 3 * h * w * b.batch
        read = 3 * source[0, 0].numel() * b.batch if name in ("crop", "MAE view", "pair of views") else 4 * pixels
        written = 4 * pixels * (2 if name == "pair of views" else 1)
        codes = [Code("ours", partial(lambda call: call, call), None)]
        if name in theirs:
            codes.append(Code("torchvision on pillow", partial(lambda call: call, theirs[name]), None))
        yield Case(f"augment: {name}", b.batch, 0, read + written, codes)


def drawn_jpegs(folder):
    """JPEGs of drawn pictures with noise, for want of real ones."""
    w, h = JPEG["size"]
    for i in range(JPEG["pictures"]):
        pixels = data.draw(torch.tensor([i]), max(w, h))[0, :, :h, :w].permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(os.path.join(folder, f"{i}.jpg"), quality=JPEG["quality"])
    return folder


def reading_case(b):
    """What one worker does for each picture, on one core: read, decode, crop, resize, hand over uint8."""
    with tempfile.TemporaryDirectory() as folder:
        source = b.args.data or drawn_jpegs(folder)
        pictures = data.load_data(source)
        plain = data.load_data(b.args.data_against) if b.args.data_against else pictures
        if pictures.images is not None or plain.images is not None:
            raise UsageError(f"--data {source}: its pictures fit into memory, no worker reads them")
        n = min(len(pictures), len(plain), JPEG["pictures"])

        def loading(views, device_too):
            loader = data.Loader(pictures.select(range(n)), views, b.config["img_size"], n, device=b.device)
            return lambda: [[view[:] for view in batch.views] if device_too else batch for batch in loader.epoch(0)]

        def decoding():
            return lambda: [plain.read(i) for i in range(n)]

        def theirs(view_of):
            return lambda: [view_of(plain.read(i)) for i in range(n)]

        for name, views in (("MAE view", [augment.MAE_VIEW]), ("pair of views", list(augment.MOCO_VIEWS))):
            codes = [Code("ours, worker", partial(loading, views, False), None),
                     Code("ours, worker and device work", partial(loading, views, True), None),
                     Code("decoding alone, pillow", decoding, None)]
            if b.against("torchvision"):
                pipeline = bench_against.pillow_pipelines(b.config["img_size"][0])[name]
                codes.append(Code("torchvision on pillow", partial(theirs, pipeline), None))
            what = b.args.data or f"{n} drawn JPEGs"
            yield Case(f"reading: {name}", n, 0, 0, codes, f"{what}, one core; floor: decoding alone")


def features_case(b):
    pictures = b.pictures(b.config["img_size"][0], b.batch)
    how = dict(device=b.device, dtype=b.dtype, batch_size=b.batch)

    def ours():
        net = b.prepare(VisionTransformer(**b.config)).eval()
        return lambda: extract(net, pictures, **how)

    def theirs():
        net = bench_against.timm_vit(b.config).to(b.device).eval()
        net.config = b.config                                               # where extract looks for the size
        return lambda: extract(net, pictures, function=lambda net, images: net(images), **how)

    codes = [b.ours(ours)]
    if b.against("timm"):
        codes.append(Code("timm", theirs, b.dtype, False))
    yield Case("features", b.batch, vit_flops(b.config), 0, codes)


def linear_case(b):
    """The linear protocol of evaluate.py, all 35 rates against one, on cached features and on fresh crops."""
    classes = 16 if b.args.arch == "vit_mini" else 1000
    dim, batch_size = b.config["dim"], b.args.batch_size or LINEAR_BATCH[b.device.type]
    net = VisionTransformer(**b.config).to(b.device).eval().requires_grad_(False)
    pictures = b.pictures(b.config["img_size"][0], batch_size)
    labels = torch.arange(batch_size, device=b.device) % classes
    loader = data.Loader(pictures, [augment.TRAIN_VIEW], b.config["img_size"], batch_size, device=b.device)

    def crops(rates):
        sweep = evaluate.LinearSweep(rates, dim, classes, b.device, False, 0)

        def step():
            for batch in loader.epoch(0):
                with torch.no_grad(), torch.autocast(b.device.type, b.dtype, enabled=b.dtype is not None):
                    x = net.forward_features(batch.views[0][:]).float()
                sweep.step(x, labels, 0.5)
        return step

    def cached(rates):
        sweep = evaluate.LinearSweep(rates, dim, classes, b.device, False, 0)

        def protocol():
            x = extract(net, pictures, device=b.device, dtype=b.dtype)
            for _ in range(LINEAR_EPOCHS):
                sweep.step(x, labels, 0.5)
        return protocol

    n, sweep = len(evaluate.SWEEP), 4 * dim * classes * len(evaluate.SWEEP)
    for name, build, epochs in (("fresh crops", crops, 1), (f"cached, {LINEAR_EPOCHS} epochs", cached, LINEAR_EPOCHS)):
        flops = vit_flops(b.config) + epochs * sweep
        codes = [Code(f"{n} rates", partial(build, evaluate.SWEEP), b.dtype),
                 Code("1 rate", partial(build, [0.1]), b.dtype)]
        yield Case(f"linear, {name}", batch_size, flops, 0, codes, f"{classes} classes; FLOPs of {n} rates")


def fewshot_case(b):
    """Logistic regression on features with a decaying spectrum and a common direction, as an encoder's."""
    (n, classes), dim = FEWSHOT[b.device.type], b.config["dim"]
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, dim + 1) ** -0.5
    labels = torch.arange(n) % classes
    x = 0.7 * torch.randn(classes, dim, generator=generator)[labels] + torch.randn(n, dim, generator=generator)
    x, labels = evaluate.centre_and_normalise(x * scale + 0.1).to(b.device), labels.to(b.device)

    def solve():
        return evaluate.logistic_regression(x, labels, classes, 2.5e-4 / n)

    with FlopCounterMode(display=False) as counted:
        solve()
    codes = [Code("ours", lambda: solve, None)]
    if b.against("sklearn"):
        codes.append(Code("scikit-learn", lambda: bench_against.scikit_learn(x.cpu(), labels.cpu(), 2.5e-4), None))
    yield Case("fewshot", n, counted.get_total_flops() / n, 0, codes, f"{n} features, {classes} classes, to 1e-6")


def save_case(b):
    """The checkpoint of an MAE run: weights and AdamW's two moments."""
    weights = MaskedAutoencoder(*b.decoder, **b.config).to(b.device).state_dict()
    state = dict(model=weights, moments=[{k: torch.zeros_like(v) for k, v in weights.items()} for _ in range(2)])
    size = 3 * sum(v.numel() * v.element_size() for v in weights.values())
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "last.pt")
        raw = bytes(size)

        def write():
            with open(os.path.join(folder, "raw"), "wb") as f:
                f.write(raw)
                f.flush()
                os.fsync(f.fileno())

        codes = [Code("ours", lambda: lambda: checkpoint.save(state, path), None),
                 Code("torch.save, not flushed", lambda: lambda: torch.save(state, path), None),
                 Code("the bytes alone, flushed", lambda: write, None)]
        yield Case("save", None, 0, 2 * size, codes, f"{size / 2 ** 20:.0f} MiB to {tempfile.gettempdir()}")


def loop_case(b):
    """The demonstration's training loops, with data, augmentation, log and checkpoints, against bare steps."""
    for name, stage, options in (("MAE", mae_pretrain, []), ("graft", graft_train, ["--init", "none"])):
        with tempfile.TemporaryDirectory() as out:
            args = stage.get_args(["--out", out, "--resume", "never", "--epochs", str(LOOP_EPOCHS), "--device",
                                   b.device.type, "--amp", b.args.amp, "--compile", b.args.compile, *options])
            args.data = None                                                # the embedded set, whatever $DATA says

            def loop(stage=stage, args=args):
                with contextlib.redirect_stdout(io.StringIO()):
                    stage.main(args)
                return loop_times(os.path.join(args.out, "log.jsonl"), args.batch_size)

            def bare(stage=stage, args=args, name=name):
                net = b.prepare(stage.build(args)[0])
                views = [b.random(args.batch_size, 3, *args.img_size) for _ in range(2)]
                if name == "MAE":
                    return our_step(b, net, lambda: net(views[0], args.mask_ratio)[0])
                return our_step(b, net, lambda: net(*views), (0.9, 0.999), lambda: net.update_momentum(0.99))

            codes = [Code("ours, training loop", lambda loop=loop: loop, b.dtype), Code("bare steps", bare, b.dtype)]
            yield Case(f"loop: {name}", args.batch_size, 0, 0, codes, "vit_mini, embedded set; floor: the bare steps")


def loop_times(path, batch_size):
    """Seconds a step and share spent waiting for data by a run's log, without its first line."""
    with open(path) as f:
        log = [json.loads(line) for line in f]
    if len(log) < 2:
        raise RunError(f"{path}: {len(log)} line in the log, too few to time the loop by")
    parts = [(now["step"] - last["step"], batch_size / now["images_per_second"], now["data_wait"])
             for last, now in zip(log, log[1:])]
    seconds = sum(steps * each for steps, each, _ in parts)
    return Timed(seconds / sum(steps for steps, _, _ in parts),
                 sum(steps * each * share for steps, each, share in parts) / seconds)


CASES = dict(mae=mae_case, graft=graft_case, augment=augment_case, reading=reading_case, features=features_case,
             linear=linear_case, fewshot=fewshot_case, save=save_case, loop=loop_case)
