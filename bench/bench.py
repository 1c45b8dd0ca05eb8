"""How fast each part is, beside the least that its products can take and beside what others use.

    python bench/bench.py                                # every case with ViT-B/16, on a GPU or CPU
    python bench/bench.py --only mae graft --against        # beside timm's blocks, transformers
    python bench/bench.py --only reading --data IMAGES --against        # beside torchvision
    python bench/bench.py --only graft --arch vit_large --batch-size 128 --json >> bench.jsonl

Codes take turns (A B A B ...), each in a process of its own that ends before the next one starts:
all meet the same machine, and memory is needed for one at a time. Given are medians.
"""
import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(sys.path[0])              # the root, where the library lies

import run  # first: a Ctrl-C while torch is imported ends in one line

import contextlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import torch
import torch.distributed as dist
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import augment
import data
import evaluate
import graft_train
import mae_pretrain
import segment
from bench import references
from model import ARCHS, MaskedAutoencoder, MoCoV3, VisionTransformer, freeze

SEGMENT = 512                                   # side of the images of the segment case
LEAST = 0.2                                     # seconds measured at least
MATRIX = {"cuda": 8192, "cpu": 2048}            # side of the square matrices of the peak
HEADS = (4096, 256)                             # MoCo v3's
EPOCHS = dict(linear=90, loop=3)                # the protocol's; of the demonstration's
LINEAR_BATCH = {"cuda": 1024, "cpu": 64}        # the protocol's; what a CPU does in seconds
SCALE = dict(classes=100, files=640, labels=1281167, voters=64, images=64, copies=16, side=320)
FEWSHOT = {"cuda": (12811, 1000), "cpu": (1280, 100)}       # images, classes: 1 % of ImageNet; less

# batch: images a call; flops(): of an image, or None; codes: {name: Code}, ours first
Case = namedtuple("Case", "name batch flops codes note", defaults=("",))
Code = namedtuple("Code", "build dtype", defaults=(None,))  # build() -> call() -> None or Measured
Measured = namedtuple("Measured", "seconds cpu waited peak", defaults=(None,) * 3)


def get_args(argv=None):
    parser = run.Parser(__doc__)
    add = parser.group("bench")
    add("--only", nargs="+", choices=list(CASES), default=list(CASES), help="(default: all)")
    add("--against", action="store_true", help="beside the references that can be imported")
    add("--arch", choices=ARCHS, default="vit_base", help="at 224 pixels, vit_mini at 32")
    add("--batch-size", type=run.number(int, 1), help="default 256 on a GPU, else 8")
    add("--data", help="for reading: a folder, a tar or a list file of images")
    add("--repeats", type=run.number(int, 1), default=5, help="turns, of which the median counts")
    add("--json", action="store_true", help="print a line of JSON for each row, not a table")
    run.add_options(add, "device amp compile")
    args = parser.parse_args(argv)
    run.check(parser, args)
    return args


class Bench:
    """The device and the settings of a run, and what the cases share."""

    def __init__(self, args):
        self.args, self.env, self.rates = args, run.setup(args), {}
        self.device, self.dtype = self.env.device, self.env.dtype
        self.batch = args.batch_size or (256 if self.device.type == "cuda" else 8)
        (patch, dim, depth, heads), self.decoder = ARCHS[args.arch]
        self.side = 32 if args.arch == "vit_mini" else 224
        self.config = dict(img_size=[self.side] * 2, patch_size=patch, in_chans=3, dim=dim,
                           depth=depth, heads=heads, mlp_ratio=4.0)

    def rate(self, dtype):
        """FLOP/s of a large square matrix product: the best yet."""
        n, end = MATRIX[self.device.type], time.perf_counter() + 5 * LEAST
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        while time.perf_counter() < end or dtype not in self.rates:
            rate = 2 * n ** 3 / timed(lambda: a @ b, 2, self.device)
            self.rates[dtype] = max(rate, self.rates.get(dtype, 0))
        return self.rates[dtype]

    def views(self, n, batch=None):
        """n tensors (B, 3, h, w) of random numbers."""
        return torch.randn(n, batch or self.batch, 3, self.side, self.side, device=self.device)

    def loader(self, views, n, side):
        """Of n drawn images of that side in memory, at most 32 different ones, as one batch."""
        images = data.draw(torch.arange(min(n, 32)), side)[torch.arange(n) % 32]
        dataset = data.Dataset(images=images, name="drawn").hold(self.device)
        return data.Loader(dataset, views, self.config["img_size"], n, device=self.device)

    def against(self, package, build, dtype=None):
        """{package: Code} of a reference: with --against, where its package can be imported."""
        found = self.args.against and importlib.util.find_spec(package) is not None
        if self.args.against and not found:
            print(f"  {package} is not installed: left out")
        return {package: Code(build, dtype)} if found else {}

    def step(self, net, loss_of, betas=(0.9, 0.95), momentum=None, fused=True):
        """A training step as the loops take it, its blocks compiled as they compile them."""
        net.to(self.device).train()
        run.compile_blocks(net, self.args.compile, self.device, dynamic=False)
        weights = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=betas, fused=fused)
        scaler, loss_of = run.grad_scaler(self.env), self.env.autocast(loss_of)

        def call():
            if momentum is not None:
                net.update_momentum(momentum)
            scaler.scale(loss_of()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        return call

    def codes(self, build):
        """Our code and timm's blocks with AdamW as it comes. build(net -> net, fused) -> call"""
        theirs = [references.with_timm_blocks, None]
        return {"ours": Code(partial(build, lambda net: net, True), self.dtype),
                **self.against("timm", partial(build, *theirs), self.dtype)}


# ------------------------------------------------------------------------- the cases: Bench -> Case
def flops_of(config, make, loss_of, n=2):
    """FLOPs for an image as torch counts those of products (a multiply-add counts twice); there
    and back if it is a loss. Nothing is computed."""
    autocast = torch.autocast("cpu", torch.bfloat16)        # attention is two products then
    with FakeTensorMode(), autocast, FlopCounterMode(display=False) as counted:
        result = loss_of(make(), torch.empty(2, n, 3, *config["img_size"]))
        if result.ndim == 0:
            result.backward()
    return counted.get_total_flops() / n


def forward_flops(config):
    return flops_of(config, lambda: VisionTransformer(**config), lambda net, x: net(x[0]))


def mae_case(b):
    make = partial(MaskedAutoencoder, *b.decoder, **b.config)

    def build(change, fused):
        net, (images,) = change(make()), b.views(1)
        return b.step(net, lambda: net(images, 0.75)[0], fused=fused)

    def transformers():
        net, (images,) = references.transformers_mae(b.config, b.decoder), b.views(1)
        return b.step(net, lambda: net(pixel_values=images).loss, fused=None)

    codes = b.codes(build) | b.against("transformers", transformers, b.dtype)
    flops = partial(flops_of, b.config, make, lambda net, x: net(x[0], 0.75)[0])
    yield Case("mae", b.batch, flops, codes)


def graft_case(b):
    micro = max(b.batch // 4, 1)

    def make():
        net = MoCoV3(VisionTransformer(**b.config), *HEADS)
        freeze(net, b.config["depth"], patch_embed=True)
        return net

    def build(change, fused, micro_batch=0):
        net, (x1, x2) = change(make()), b.views(2)
        return b.step(net, lambda: net(x1, x2, micro_batch)[0], (0.9, 0.999), 0.99, fused)

    def flops(again=0.0):                                   # of both views' forward passes
        whole = flops_of(b.config, make, lambda net, x: net(*x)[0])
        return whole + (2 * again * forward_flops(b.config) if again else 0)

    codes = b.codes(build)
    yield Case("graft", b.batch, flops, codes)
    again = partial(flops, 1 - micro / b.batch)             # the last part is still there
    codes = {"ours": Code(partial(codes["ours"].build, micro), b.dtype), "undivided": codes["ours"]}
    yield Case(f"graft, micro-batches of {micro}", b.batch, again, codes)


def segment_case(b):
    """A step of UperNet on two images, 150 classes."""
    config = b.config | dict(img_size=[SEGMENT] * 2)
    head = segment.describe("upernet", config["depth"], 150, config["dim"])

    def batch():
        shape = 2, SEGMENT, SEGMENT
        return (torch.randn(2, 3, SEGMENT, SEGMENT, device=b.device),
                torch.randint(head["classes"], shape, device=b.device))

    def build(change=lambda net: net):
        net, (x, labels) = change(segment.Segmenter(config, head)), batch()
        return b.step(net, lambda: sum(segment.pixel_loss(y, labels) for y in net(x)))

    def whole():
        net = references.transformers_upernet(config, head["channels"], head["classes"])
        x, labels = batch()
        return b.step(net, lambda: net(pixel_values=x, labels=labels).loss)

    codes = {"ours": Code(build, b.dtype), **b.against("transformers", whole, b.dtype)}
    if len(codes) > 1:
        codes["its head on our encoder"] = Code(
            partial(build, references.with_transformers_upernet), b.dtype)
    yield Case("segment", 2, None, codes, "transformers: UperNet on BEiT of the same sizes")


CROP = dict(scale=(0.08, 1.0), mode="bilinear")
VIEWS = {"crop": [CROP], "MAE view": [augment.MAE_VIEW], "pair of views": list(augment.MOCO_VIEWS)}


def augment_case(b):
    """Views of images in memory, a seventh larger than they are."""
    def ours(views):
        batch = next(b.loader(views, b.batch, b.side * 8 // 7).epoch(0))
        return lambda: [batch.view(k) for k in range(len(views))]

    def pillow(name):
        images = b.loader([CROP], b.batch, b.side * 8 // 7).dataset.images.cpu()
        images = [Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()) for x in images]
        function = references.pillow_views(b.side)[name]
        return lambda: [function(image) for image in images]

    for name, views in VIEWS.items():
        theirs = b.against("torchvision", partial(pillow, name))
        codes = {"ours": Code(partial(ours, views)), **theirs}
        yield Case(f"augment: {name}", b.batch, None, codes, "from memory")


def reading_case(b):
    """What one worker does for each image on one core: read, decode, crop, hand over uint8."""
    if not b.args.data:
        return print("\nreading: needs --data")
    dataset = data.load(b.args.data)
    if dataset.images is not None:
        raise run.UsageError(f"--data {b.args.data} fits into memory, no worker reads it")
    n = min(len(dataset), 64)
    dataset = dataset.select(range(n))

    def loading(views, drawn):
        loader = data.Loader(dataset, views, b.config["img_size"], n, device=b.device)
        return lambda: [batch.view(k) for batch in loader.epoch(0) for k in range(drawn)]

    def reading(name):
        function = references.pillow_views(b.side)[name] if name else lambda image: image

        def call():
            for i in range(n):
                content = io.BytesIO(dataset.source.content(i))
                function(Image.open(content).convert("RGB"))
        return call

    for name in ("MAE view", "pair of views"):
        views = VIEWS[name]
        codes = {"ours, worker": Code(partial(loading, views, 0)),
                 "ours, worker and device": Code(partial(loading, views, len(views))),
                 "decoding alone, pillow": Code(partial(reading, None))}
        codes |= b.against("torchvision", partial(reading, name))
        yield Case(f"reading: {name}", n, None, codes, "one core; floor: decoding alone")


def linear_case(b):
    """The linear protocol of evaluate.py, its 35 rates against one, cached and on fresh crops."""
    classes, dim = 16 if b.args.arch == "vit_mini" else 1000, b.config["dim"]
    n, many = b.args.batch_size or LINEAR_BATCH[b.device.type], len(evaluate.SWEEP)

    def protocol(rates, epochs):
        net = VisionTransformer(**b.config).to(b.device).eval().requires_grad_(False)
        features = b.env.autocast(net.forward_features)
        loader, labels = b.loader([augment.TRAIN_VIEW], n, b.side), torch.arange(n) % classes
        sweep = evaluate.LinearSweep(rates, dim, classes, b.device, False, 0)

        def call():
            x = features(next(loader.epoch(0)).view(0)).float()
            for _ in range(epochs):
                sweep.step(x, labels.to(b.device), 0.5)
        return call

    def linear_flops(epochs):
        return forward_flops(b.config) + epochs * 4 * dim * classes * many

    for name, epochs in (("fresh crops", 1), ("cached, every epoch", EPOCHS["linear"])):
        flops = partial(linear_flops, epochs)
        codes = {f"{many} rates": Code(partial(protocol, evaluate.SWEEP, epochs), b.dtype),
                 "1 rate": Code(partial(protocol, [0.1], epochs), b.dtype)}
        yield Case(f"linear, {name}", n, flops, codes, f"{classes} classes, {many} rates")


def fewshot_case(b):
    """Logistic regression on features with a decaying spectrum, as an encoder's."""
    (n, classes), dim = FEWSHOT[b.device.type], b.config["dim"]
    torch.manual_seed(0)                                    # the same ones in every process
    labels = torch.arange(n) % classes
    x = 0.7 * torch.randn(classes, dim)[labels] + torch.randn(n, dim)
    x = evaluate.centre_and_normalise(x * torch.arange(1, dim + 1) ** -0.5)

    def ours():
        ready = x.to(b.device), labels.to(b.device), classes, 2.5e-4 / n
        return lambda: evaluate.logistic_regression(*ready)

    codes = b.against("sklearn", lambda: references.scikit_learn(x, labels, 2.5e-4))
    yield Case("fewshot", n, None, {"ours": Code(ours), **codes}, f"{dim} wide, {classes} classes")


def loop_case(b):
    """The demonstration's loops, with data, views, log and checkpoints, against bare steps."""
    for stage in (mae_pretrain, graft_train):
        args = stage.get_args([
            "--resume", "never", "--epochs", str(EPOCHS["loop"]), "--device", b.device.type,
            "--amp", b.args.amp, "--compile", b.args.compile, "--init", "none"])
        args.data = None                                    # the embedded set, whatever $DATA says

        def loop(stage=stage, args=args):
            with tempfile.TemporaryDirectory() as args.out:
                stage.main(args)
                return loop_times(os.path.join(args.out, "log.jsonl"), args.batch_size)

        def bare(stage=stage, args=args):
            net, (x1, x2) = stage.build(args)[0], b.views(2, args.batch_size)
            if stage is mae_pretrain:
                return b.step(net, lambda: net(x1, args.mask_ratio)[0])
            return b.step(net, lambda: net(x1, x2)[0], (0.9, 0.999), 0.99)

        codes = {"ours, training loop": Code(lambda loop=loop: loop, b.dtype),
                 "bare steps": Code(bare, b.dtype)}
        note = "vit_mini; floor: the bare steps"
        yield Case(f"loop: {stage.__name__}", args.batch_size, None, codes, note)


def loop_times(path, batch_size):
    """The Measured of a run by its log, without the first line."""
    with open(path) as f:
        log = [json.loads(line) for line in f][1:]
    if not log:
        raise run.RunError(f"{path}: too short a run to time its loop")
    seconds = sum(line["seconds"] for line in log)
    images = sum(line["seconds"] * line["images_per_second"] for line in log)
    waited = sum(line["seconds"] * line["data_wait"] for line in log) / seconds
    return Measured(seconds / images * batch_size, None, waited)


def scale_case(b):
    """What grows with images and processes: listing, drawing labels, votes, saves, epochs' ends."""
    yield from (save_case(b), epoch_case(b), listing_case(b), labelled_case(), votes_case())


def listing_case(b):
    """Listing a folder of empty files in class folders: a 20th of ImageNet."""
    classes, files = SCALE["classes"], SCALE["files"]

    def of(function):
        place = tempfile.TemporaryDirectory()
        for c in range(classes):
            os.mkdir(os.path.join(place.name, f"n{c:08}"))
            for i in range(files):
                open(os.path.join(place.name, f"n{c:08}", f"n{c:08}_{i}.JPEG"), "w").close()
        return partial(function, place)                     # the folder lives as long as this

    def torchvision():
        from torchvision.datasets import folder
        return of(lambda place: folder.make_dataset(
            place.name, folder.find_classes(place.name)[1], folder.IMG_EXTENSIONS))

    codes = {"ours": Code(partial(of, lambda place: data.list_files(place.name)))}
    return Case("listing", classes * files, None, codes | b.against("torchvision", torchvision))


def labelled_case():
    """The draw of 1 % of the labels of as many images and classes as ImageNet has."""
    n = SCALE["labels"]
    labels = augment.shuffled(n, 0, 0) % 1000

    def ours():
        dataset = data.Dataset(data.FileSource("", [""] * n), labels=labels, classes=range(1000))
        return lambda: data.labelled(dataset, "1%", 0)

    codes = {"ours": Code(ours), "one stable sort": Code(lambda: lambda: labels.sort(stable=True))}
    return Case("labels of 1 %", n, None, codes)


def votes_case():
    """Processes, here threads, vote through the store of one of them."""
    n = SCALE["voters"]

    def of(function):
        meet = dict(host_name="127.0.0.1", wait_for_workers=False)
        first = dist.TCPStore(port=0, is_master=True, **meet)
        stores = [first] + [dist.TCPStore(port=first.port, **meet) for _ in range(n - 1)]
        pool = ThreadPoolExecutor(n)
        peers = [object.__new__(run.Peers) for _ in stores]
        for rank, (each, store) in enumerate(zip(peers, stores)):
            vars(each).update(store=store, rank=rank, n=n, questions=0, seconds=60)
        return lambda: list(pool.map(function, peers))

    def a_request_for_each(peer):
        peer.questions += 1
        peer.store.set(f"{peer.questions}/{peer.rank}", "0")
        return [peer.store.get(f"{peer.questions}/{r}") for r in range(peer.n)]

    codes = {"ours": Code(partial(of, lambda peer: peer.ask("a vote", 0))),
             "a request for each": Code(partial(of, a_request_for_each))}
    return Case(f"vote of {n} processes", 1, None, codes, "wall time, for the processor is shared")


def save_case(b):
    """A checkpoint of MoCo v3: how long training stands still, and how long the save takes."""
    def of(whole):
        args = graft_train.get_args(["--init", "none", "--arch", b.args.arch, "--device",
                                     b.device.type, "--save-minutes", "1000"])
        net, place = graft_train.build(args)[0].to(b.device), tempfile.TemporaryDirectory()
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        args.out = place.name
        loader = b.loader([CROP], b.batch, b.side)
        job = run.Job(args, b.env, net, optimizer, run.grad_scaler(b.env), loader, {})

        def call():
            job.written()
            started = time.perf_counter()
            job.save(1)
            if whole:
                job.written()
            seconds = time.perf_counter() - started
            job.written()
            return Measured(seconds)
        call.place = place                                  # which is there as long as its object
        return call

    codes = {"ours, training stands still": Code(partial(of, False)),
             "until it is on the disk and read back": Code(partial(of, True))}
    return Case("save", 1, None, codes, "MoCo v3 with its optimizer")


def epoch_case(b):
    """The time to the first batch of an epoch against that between the others: 32 of many JPEGs a
    batch, read by two processes as fast as they can."""
    def of(first):
        place = tempfile.TemporaryDirectory()
        for i, image in enumerate(data.draw(torch.arange(SCALE["images"]), SCALE["side"])):
            image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            for j in range(SCALE["copies"]):
                image.save(os.path.join(place.name, f"{i}_{j}.jpg"))
        loader = data.Loader(data.load(place.name), VIEWS["pair of views"], b.config["img_size"],
                             32, workers=2, device=b.device)

        def call():
            waits, last = ([], []), None
            for epoch in range(4):
                for k, _ in enumerate(loader.epoch(epoch)):
                    now = time.perf_counter()
                    if epoch > 0:                           # the readers have started
                        waits[k > 0].append(now - last)
                    last = now
            return Measured(statistics.mean(waits[0 if first else 1]))
        call.place = place
        return call

    codes = {"first batch": Code(partial(of, True)), "the others": Code(partial(of, False))}
    return Case("first batch of an epoch", 32, None, codes)


CASES = dict(mae=mae_case, graft=graft_case, segment=segment_case, augment=augment_case,
             reading=reading_case, linear=linear_case, fewshot=fewshot_case, loop=loop_case,
             scale=scale_case)


# --------------------------------------------------------------------------------- a turn of a code
def timed(call, n, device):
    """Seconds of a call, of n in a row."""
    started = time.perf_counter()
    for _ in range(n):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / n


def measure(code, device):
    """A code's Measured: built, called twice to warm up, then for LEAST seconds."""
    call = code.build()
    first = call()
    if isinstance(first, Measured):
        return first._replace(peak=run.peak_memory(device))
    n = max(1, int(LEAST / timed(call, 1, device)))
    cpu = time.process_time()
    seconds = timed(call, n, device)
    return Measured(seconds, (time.process_time() - cpu) / n, None, run.peak_memory(device))


def turn(args, name, number, code):
    """A turn of a code of the case of that number of CASES[name]: what its process does."""
    with contextlib.redirect_stdout(io.StringIO()):         # what is said, the first process says
        b = Bench(args)
        case = next(itertools.islice(CASES[name](b), number, None))
        return measure(case.codes[code], b.device)


def alone(args, name, number, code):
    """The same in a process of its own."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(turn, args, name, number, code).result()
    except BrokenProcessPool:
        raise run.RunError(f"{name}: the process of {code} was killed: for want of memory? "
                           "Try a smaller --batch-size") from None


# --------------------------------------------------------------------------------------- the report
COLUMNS = dict(images_per_second="{:,.2f}", floor_ms="{:,.2f}", ms="{:,.2f}", cpu_ms="{:,.2f}",
               peak_mib="{:,.0f}", data_wait="{:.0%}", ours_faster="{:.2f}x")


def rows_of(b, case, turns):
    """One dict a code: what is printed. turns: {code: [Measured]}."""
    rows, device = [], torch.backends.cpu.get_cpu_capability()
    if b.device.type == "cuda":
        device = torch.cuda.get_device_name(b.device)
    dtype = next(iter(case.codes.values())).dtype or torch.float32
    flops = case.flops and case.flops()
    floor = flops and 1e3 * flops * case.batch / b.rate(dtype)
    for code, found in turns.items():
        m = Measured(*(None if None in x else statistics.median(x) for x in zip(*found)))
        rows.append(dict(
            case=case.name, code=code, device=device, threads=torch.get_num_threads(),
            torch=torch.__version__, arch=b.args.arch, precision=str(dtype).removeprefix("torch."),
            batch=case.batch, images_per_second=case.batch / m.seconds,
            flops_per_image=flops, floor_ms=floor,
            ms=m.seconds * 1e3, cpu_ms=m.cpu and m.cpu * 1e3, peak_mib=m.peak / 2 ** 20,
            data_wait=m.waited))
        rows[-1]["ours_faster"] = rows[-1]["ms"] / rows[0]["ms"]
    return rows


def main(args):
    b, found = Bench(args), []
    if b.env.processes > 1:
        raise run.UsageError("bench.py measures one process: start it without torchrun")
    for name in args.only:
        for number, case in enumerate(CASES[name](b)):
            turns = {code: [] for code in case.codes}
            for _, code in itertools.product(range(args.repeats), turns):
                turns[code].append(alone(args, name, number, code))
            rows = rows_of(b, case, turns)
            found += rows
            if args.json:
                print(*map(json.dumps, rows), sep="\n", flush=True)
                continue
            titles = "".join(f"{title:>18}" for title in COLUMNS)
            print(f"\n{case.name}  {case.note}\n  {rows[0]['precision']:<30}{titles}")
            for row in rows:
                cells = [form.format(row[k]) if row[k] else "" for k, form in COLUMNS.items()]
                print(f"  {row['code']:<30}" + "".join(f"{x:>18}" for x in cells), flush=True)
    return found


if __name__ == "__main__":
    run.program(main, get_args)
