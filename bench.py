"""How fast everything is: each case on fixed data after a warm-up, beside its floor and beside what others use.

    python bench.py                                             # every case with ViT-B/16, on a GPU if there is one
    python bench.py --only mae,graft --against                  # turn by turn with timm's blocks, transformers' ViTMAE
    python bench.py --only reading --data PICTURES --against    # per worker core, with torchvision's transforms
    python bench.py --only loop                                 # the demonstration's training loops beside bare steps
    python bench.py --only graft --arch vit_large --batch-size 128 --against --out bench.jsonl

Prints for each case its floor and a table, and appends one JSON line a row to --out. Codes take turns (A B A B ...) in
one process and medians are given, so that what else the machine does falls on all alike. FLOPs are those of the matrix
products that a case needs (a multiply-add counts twice), whoever runs it.
"""
import contextlib
import importlib.util
import io
import json
import os
import statistics
import tempfile
import time
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
from model import ARCHS, Block, MaskedAutoencoder, MoCoV3, VisionTransformer, freeze

HIDDEN, OUT = 4096, 256                 # MoCo v3's heads
ADAMW = 28                              # bytes a step moves per weight: reads weight, gradient, moments; writes three
MOMENTUM = 12                           # reads both weights, writes one
LINEAR_EPOCHS = 90                      # of the linear protocol
LOOP_EPOCHS = 3                         # of the demonstration's 25 and 8
JPEG = dict(pictures=64, size=(500, 375), quality=90)                       # like ImageNet's: about 100 kB each

# codes: the first is ours. batch: pictures a call; flops: per picture; moved: bytes a call moves besides; note: a word
Case = namedtuple("Case", "name batch flops moved codes note", defaults=("",))
# build() -> call; call() -> None, or a Timed if it timed itself. dtype: the autocast type, None for float32
Code = namedtuple("Code", "name build dtype")
Timed = namedtuple("Timed", "seconds waited")                               # seconds a call, share waiting for data
Measured = namedtuple("Measured", "seconds cpu waited peak")


def get_args(argv=None):
    parser = run.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--only", help=f"a comma list of {', '.join(CASES)} (default: all)")
    add("--against", action="store_true", help="turn by turn with the references that can be imported")
    add("--arch", choices=ARCHS, default="vit_base", help="at 224 pixels, vit_mini at 32; loop always takes vit_mini")
    add("--batch-size", type=run.number(int, 1), help="pictures a step (default 256 on a GPU, else 16)")
    add("--micro-batch", type=run.number(int, 1), help="of the graft step in micro-batches (default: a quarter)")
    add("--data", help="reading: a folder or a pack of pictures (default: JPEGs drawn for it)")
    add("--data-against", help="reading: what the references read (default: as --data)")
    add("--repeats", type=run.number(int, 1), default=5, help="turns; the median is given")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 if the hardware has it")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile our blocks; auto: on a GPU")
    add("--out", metavar="FILE.jsonl", help="append one JSON line a row")
    args = parser.parse_args(argv)
    args.only = args.only.split(",") if args.only else list(CASES)
    unknown = [name for name in args.only if name not in CASES]
    if unknown:
        parser.error(f"--only {unknown[0]}: it must be one of {', '.join(CASES)}")
    return args


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


# ------------------------------------------------------------------------------------------------- the clock
def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def status(field):
    """Bytes of a field of /proc/self/status, or None where there is none."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))
    except (OSError, StopIteration):
        return None


def memory_now(device):
    """Bytes in use, after forgetting the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return status("VmRSS:")


def memory_peak(device, before):
    """Bytes in use at most since `memory_now` said `before`, above that; None where the system does not tell."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM:")
    return None if peak is None or before is None else max(peak - before, 0)


def turns(codes, repeats, device, least=0.2):
    """A Measured per code: medians over `repeats` turns, in each of which every code runs for `least` seconds or once.

    The peak memory is that of building and of the first calls, with what they keep.
    """
    calls, counts, peaks, found = [], [], [], [[] for _ in codes]
    for code in codes:
        before = memory_now(device)
        call = code.build()
        timed = call()
        wait(device)
        started = time.perf_counter()
        if not timed:
            call()                                                          # again: now with what the first left behind
        wait(device)
        spent = time.perf_counter() - started
        calls.append(call)
        counts.append(1 if timed else max(1, int(least / max(spent, 1e-9))))
        peaks.append(memory_peak(device, before))
    for _ in range(repeats):
        for call, count, times in zip(calls, counts, found):
            started, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                timed = call()
            wait(device)
            spent, cpu = (time.perf_counter() - started) / count, (time.process_time() - cpu) / count
            times.append((timed.seconds, None, timed.waited) if timed else (spent, cpu, None))
    middle = [[None if None in column else statistics.median(column) for column in zip(*times)] for times in found]
    return [Measured(*values, peak) for values, peak in zip(middle, peaks)]


def best_of(call, device, repeats=5):
    """Seconds of the fastest of a few calls, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


class Bench:
    """The device, what it can do at most, and the settings of a run."""

    def __init__(self, args):
        self.args = args
        self.device, rank, processes = run.setup(args.device)
        if processes > 1:
            raise UsageError("bench.py measures one process: start it without torchrun")
        self.dtype = run.precision(args.amp, self.device)
        cuda = self.device.type == "cuda"
        self.batch = args.batch_size or (256 if cuda else 16)
        self.compile = args.compile == "on" or (args.compile == "auto" and cuda)
        (patch, dim, depth, heads), self.decoder = ARCHS[args.arch]
        side = 32 if args.arch == "vit_mini" else 224
        self.config = dict(img_size=[side, side], patch_size=patch, in_chans=3, dim=dim, depth=depth, heads=heads,
                           mlp_ratio=4.0)
        self.name = torch.cuda.get_device_name(self.device) if cuda else cpu_name()
        self.rates, self.moves = {}, None

    def rate(self, dtype):
        """FLOP/s of a large square matrix product, measured."""
        dtype = dtype or torch.float32
        if dtype not in self.rates:
            n = 8192 if self.device.type == "cuda" else 2048
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            self.rates[dtype] = 2 * n ** 3 / best_of(lambda: a @ b, self.device)
        return self.rates[dtype]

    def bandwidth(self):
        """Bytes/s read and written by a large copy, measured."""
        if self.moves is None:
            n = (1 << 30) if self.device.type == "cuda" else (1 << 28)
            a = torch.zeros(n, dtype=torch.uint8, device=self.device)
            b = torch.empty_like(a).copy_(a)
            self.moves = 2 * n / best_of(lambda: b.copy_(a), self.device)
        return self.moves

    def random(self, *shape):
        return torch.randn(*shape, device=self.device)

    def pictures(self, side):
        """Drawn uint8 pictures (batch, 3, side, side) in memory, as a set."""
        images = data.draw(torch.arange(self.batch), side)
        return data.Pictures(images=images, name="drawn").hold(self.device)

    def against(self, package):
        """Whether to run a reference: with --against, and where its package can be imported."""
        if not self.args.against:
            return False
        if importlib.util.find_spec(package) is None:
            print(f"  {package} is not installed: left out")
            return False
        return True

    def ours(self, build):
        """Our code under the run's precision, compiled as the training scripts compile it."""
        return Code("ours", build, self.dtype)

    def prepare(self, net):
        net.to(self.device).train()
        if self.compile:
            for block in [m for m in net.modules() if isinstance(m, Block)]:
                block.compile()
        return net


def cpu_name():
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


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
    """A reference under the run's precision, and in float32 if that is another. build(dtype) -> call."""
    return [Code(name if dtype else f"{name}, fp32", partial(build, dtype), dtype)
            for dtype in dict.fromkeys((b.dtype, None))]


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
    larger = b.pictures(h * 8 // 7)
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
    for i, picture in enumerate(data.draw(torch.arange(JPEG["pictures"]), max(w, h))):
        pixels = picture[:, :h, :w].permute(1, 2, 0).contiguous().numpy()
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
    pictures = b.pictures(b.config["img_size"][0])
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
        codes.append(Code("timm", theirs, b.dtype))
    yield Case("features", b.batch, vit_flops(b.config), 0, codes)


def linear_case(b):
    """The linear protocol of evaluate.py, all 35 rates against one, on cached features and on fresh crops."""
    classes = 16 if b.args.arch == "vit_mini" else 1000
    dim = b.config["dim"]
    net = VisionTransformer(**b.config).to(b.device).eval().requires_grad_(False)
    pictures = b.pictures(b.config["img_size"][0])
    labels = torch.arange(b.batch, device=b.device) % classes
    loader = data.Loader(pictures, [augment.TRAIN_VIEW], b.config["img_size"], b.batch, device=b.device)

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
        codes = [Code(f"{len(rates)} rates", partial(build, rates), b.dtype) for rates in (evaluate.SWEEP, [0.1])]
        yield Case(f"linear, {name}", b.batch, flops, 0, codes, f"{classes} classes; FLOPs of {n} rates")


def fewshot_case(b):
    """Logistic regression on features with a decaying spectrum and a common direction, as an encoder's."""
    n, dim, classes = (12811, b.config["dim"], 1000) if b.device.type == "cuda" else (1280, b.config["dim"], 100)
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


# ------------------------------------------------------------------------------------------------ the report
def floor_line(b, case):
    """What the case costs at least, and why."""
    parts, seconds = [], 0.0
    if case.flops:
        total, dtype = case.flops * case.batch, case.codes[0].dtype
        seconds += total / b.rate(dtype)
        parts.append(f"{total / 1e9:,.1f} GFLOP at {b.rate(dtype) / 1e9:,.0f} GFLOP/s")
    if case.moved:
        seconds += case.moved / b.bandwidth()
        parts.append(f"{case.moved / 1e6:,.1f} MB at {b.bandwidth() / 1e9:,.1f} GB/s")
    floor = f"floor {seconds * 1e3:,.2f} ms: {', '.join(parts)}" if parts else ""
    return "; ".join(text for text in (floor, case.note) if text)


def rows_of(b, case, codes, measured):
    """One dict a code: what is printed and written."""
    rows = []
    for code, m in zip(codes, measured):
        rate = case.batch / m.seconds if case.batch else None
        rows.append(dict(
            case=case.name, code=code.name, device=b.name, torch=torch.__version__,
            precision=str(code.dtype or torch.float32).removeprefix("torch."), arch=b.args.arch, batch=case.batch,
            images_per_second=rate, ms=m.seconds * 1e3, cpu_ms=None if m.cpu is None else m.cpu * 1e3,
            peak_mib=None if m.peak is None else m.peak / 2 ** 20, flops_per_image=case.flops or None,
            peak_share=case.flops * rate / b.rate(code.dtype) if case.flops else None, data_wait=m.waited,
            ours_faster=m.seconds / measured[0].seconds))
    return rows


COLUMNS = (("images/s", "images_per_second", "{:,.2f}"), ("ms", "ms", "{:,.2f}"), ("CPU ms", "cpu_ms", "{:,.2f}"),
           ("peak MiB", "peak_mib", "{:,.0f}"), ("MFLOP/image", "flops_per_image", "{:,.0f}"),
           ("of peak", "peak_share", "{:.0%}"), ("waiting", "data_wait", "{:.0%}"), ("ours faster", "ours_faster", "{:.2f}x"))


def table(rows):
    """The rows as lines of text; what is not known is left empty."""
    lines = [f"  {'':<30}" + "".join(f"{title:>13}" for title, _, _ in COLUMNS)]
    for row in rows:
        values = row | dict(flops_per_image=row["flops_per_image"] and row["flops_per_image"] / 1e6)
        cells = ["" if values[key] is None else form.format(values[key]) for _, key, form in COLUMNS]
        lines.append(f"  {row['code'] + ' ' + row['precision']:<30}" + "".join(f"{cell:>13}" for cell in cells))
    return lines


def write(path, rows):
    """Append the rows to a file of JSON lines."""
    try:
        with open(path, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise RunError(f"--out {path}: cannot write there ({error.strerror})") from None


def main(args):
    b = Bench(args)
    if args.out:
        write(args.out, [])
    print(f"{b.name}; torch {torch.__version__}; {b.dtype or torch.float32}; {args.arch}, {b.config['img_size'][0]} pixels")
    found = []
    for name in args.only:
        for case in CASES[name](b):
            print(f"\n{case.name}: {floor_line(b, case)}", flush=True)
            rows = rows_of(b, case, case.codes, turns(case.codes, args.repeats, b.device))
            print("\n".join(table(rows)), flush=True)
            if args.out:
                write(args.out, rows)
            found += rows
    return found


if __name__ == "__main__":
    run.program(main, get_args)
