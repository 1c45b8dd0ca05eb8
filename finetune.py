"""Fine-tune an encoder with labels: all of it, its higher blocks only, from the projector on, or new blocks on top.

    python finetune.py                                              # out/graft, embedded pictures, a minute on a CPU
    python finetune.py --labels 10% --from-projector                # the 10 % protocol (Table 2)
    python finetune.py --freeze-blocks 3                            # partial fine-tuning (Figure 5)
    python finetune.py --probe-block 6 --blocks 2                   # depth probe (Table 5)
    torchrun --nproc_per_node 8 finetune.py --checkpoint out/graft --data IMAGENET      # the paper's, on eight GPUs

Writes last.pt (to resume), classifier.pt (for `evaluate.py --mode predict`) and log.jsonl into --out, and the accuracy
on the test pictures after the last epoch as one line of results.jsonl.
"""
import os
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

import augment
import checkpoint
import data
import peers
import run
from data import RunError, UsageError
from features import digest
from model import Block, VisionTransformer, freeze, group_table, init_mae_, lr_factor, param_groups
from run import number

# where no option is given: the demonstration's settings without --data, the paper's with it
SMALL = dict(epochs=10, batch_size=64, lr=8e-3, layer_decay=0.75, crop_min=0.5, rand_augment=0, mixup=0.0, cutmix=0.0,
             erasing=0.0)
PAPER = dict(epochs=100, batch_size=1024, lr=5e-4, layer_decay=0.6, crop_min=0.08, rand_augment=9, mixup=0.8,
             cutmix=1.0, erasing=0.25)
# and with --from-projector
SMALL_PROJECTOR = dict(epochs=60)
PAPER_PROJECTOR = dict(epochs=400, lr=3e-5)


def get_args(argv=None):
    parser = run.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    # data
    add("--data", help="folder with train/ and val/ or test/, cifar10, cifar100 (default: $DATA, else an embedded set)")
    add("--labels", help="labels used: 1%%, 10%%, '5 per class', a list file (default: all)")
    add("--img-size", type=run.image_size, help="224 or HEIGHTxWIDTH (default: the checkpoint's)")
    add("--stats", choices=("imagenet", "data"), default="imagenet", help="channel statistics, where the file has none")
    add("--workers", type=number(int, 0, 256), default=min(os.cpu_count(), 10), help="reading processes per device")
    add("--max-bad", type=number(float, 0, 1), default=0.01, help="stop when this share of the files cannot be read")
    # protocol
    add("--checkpoint", default="out/graft", help="a run's folder or a file: ours, MAE, MoCo v3, DINO, timm")
    add("--weights", choices=("base", "momentum"), default="base", help="of a MoCo v3 file that holds both encoders")
    protocol = parser.add_mutually_exclusive_group().add_argument
    protocol("--from-projector", action="store_true", help="keep the projector's first Linear before the classifier")
    protocol("--freeze-blocks", type=number(int), default=0, metavar="K", help="keep embeddings, first K blocks fixed")
    protocol("--probe-block", type=number(int, 1), metavar="K", help="frozen tokens of block K under --blocks new ones "
             "(of the last block: after the final norm)")
    add("--blocks", type=number(int, 0, 100), help="new blocks on --probe-block; 0, the default, is a linear classifier")
    # augmentation
    add("--crop-min", type=number(float, 0, 1, above=True), help="smallest crop (default 0.08; embedded 0.5)")
    add("--rand-augment", type=number(int, 0, 10), metavar="M", help="its magnitude, 0: none (default 9; embedded 0)")
    add("--mixup", type=number(), help="its Beta distribution's alpha, 0: none (default 0.8; embedded 0)")
    add("--cutmix", type=number(), help="the same for CutMix (default 1; embedded 0)")
    add("--erasing", type=number(float, 0, 1), help="probability of random erasing (default 0.25; embedded 0)")
    add("--label-smoothing", type=number(float, 0, 1), default=0.1)
    # optimisation
    add("--epochs", type=number(int, 1), help="default 100, from the projector 400; embedded 10 and 60")
    add("--batch-size", type=number(int, 1), help="global: per device x devices x accumulation (default 1024; "
        "embedded 64); all pictures if they are fewer")
    add("--accum", type=number(int, 0), default=0, help="micro-batches per step and device (0: as few as fit)")
    add("--lr", type=number(above=True), help="base rate for batch 256 (default 5e-4, from the projector 3e-5; "
        "embedded 8e-3)")
    add("--layer-decay", type=number(float, 0, 1, above=True), help="rate of a layer / rate of the layer above "
        "(default 0.6; embedded 0.75)")
    add("--min-lr", type=number(), default=1e-6, help="what the cosine ends at")
    add("--weight-decay", type=number(), default=0.05, help="not on 1-D parameters")
    add("--warmup-epochs", type=number(), help="default 5, or 15 %% of a shorter run")
    add("--drop-path", type=number(float, 0, 0.99), default=0.1, help="of the last block, falling to 0 at the first")
    # run
    add("--out", default="out/finetune", help="folder of this run")
    add("--results", help="folder of the results.jsonl that gets the result (default: --out)")
    add("--resume", choices=("auto", "never"), default="auto", help="go on from last.pt in --out, or start over")
    add("--seed", type=number(int, 0, 2 ** 31), default=0)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 if the hardware has it")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile the blocks; auto: on a GPU")
    add("--log-every", type=number(int, 1), default=20, help="steps between lines of the log")
    add("--save-minutes", type=number(float, 0, above=True), default=10.0, help="also saved after every epoch")
    add("--timeout-minutes", type=number(float, 0, 1440, above=True), default=10.0, help="for a process that hangs")
    add("--deterministic", action="store_true", help="the same bits on every run, on a GPU too (slower there)")
    add("--eval-every", type=number(int), default=0, help="epochs between test accuracies in the log; the result is "
        "that of the last epoch in any case (0: only then)")
    args = parser.parse_args(argv)
    args.data = args.data or os.environ.get("DATA")
    if args.blocks is not None and not args.probe_block:
        parser.error("--blocks goes with --probe-block")
    if not os.path.exists(args.checkpoint):
        parser.error(f"no checkpoint {args.checkpoint}: run `python mae_pretrain.py` and `python graft_train.py` "
                     "first, or give --checkpoint FILE")
    if args.from_projector:
        run.fill(args, PAPER_PROJECTOR if args.data else SMALL_PROJECTOR)
    run.fill(args, PAPER if args.data else SMALL)
    run.fill(args, dict(warmup_epochs=min(5, 0.15 * args.epochs), blocks=0))
    run.check(parser, args)
    return args


def protocol_name(args, share):
    """What the result is filed under; share: of the training labels that were used, in [0, 1]."""
    name = "fine-tune"
    if args.from_projector:
        name = "from projector"
    elif args.freeze_blocks:
        name = f"partial fine-tune {args.freeze_blocks}"
    elif args.probe_block:
        name = f"probe block {args.probe_block} + {args.blocks} blocks"
    if share == 1:
        return name
    return (f"{100 * share:.0f}% " if share >= 0.01 else f"{100 * share:.2g}% ") + name


# ------------------------------------------------------------------------------------------------- the networks
class Classifier(VisionTransformer):
    """An encoder and a linear classifier on its class token: pictures (N, C, H, W) -> logits (N, classes).

    head: {"kind": "linear"}, or {"kind": "projector", "width", "bias"} for the projector's first Linear before the
    classifier, with nothing between them. The first `frozen` blocks stay in evaluation mode.
    """

    def __init__(self, config, head, classes, drop_path=0.0):
        super().__init__(**config, drop_path=drop_path)
        self.frozen = 0
        self.head = classifier = nn.Linear(head.get("width", self.dim), classes)
        if head["kind"] == "projector":
            self.head = nn.Sequential(nn.Linear(self.dim, head["width"], bias=head["bias"]), classifier)
        init_classifier_(classifier)

    def train(self, mode=True):
        super().train(mode)
        self.blocks[:self.frozen].eval()
        return self


class DepthProbe(Classifier):
    """New blocks on frozen tokens: pictures (N, C, H, W) -> logits (N, classes). Only `head` trains.

    head: {"kind": "probe", "block", "blocks"}: the tokens of block `block` (of the last: after the final norm) go
    through `blocks` new blocks and a LayerNorm, then the class token is classified; without blocks, at once.
    """

    def __init__(self, config, head, classes, drop_path=0.0):
        super().__init__(config, dict(kind="linear"), classes)
        self.block, blocks = head["block"], head["blocks"]
        rates = [drop_path * i / max(blocks - 1, 1) for i in range(blocks)]
        new = [Block(self.dim, config["heads"], config["mlp_ratio"], rate) for rate in rates]
        self.head = nn.ModuleDict(dict(blocks=nn.Sequential(*new), classifier=self.head,
                                       norm=nn.LayerNorm(self.dim, eps=1e-6) if new else nn.Identity()))
        init_mae_(self)
        init_classifier_(self.head.classifier)
        self.frozen = self.depth
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def forward(self, x):
        with torch.no_grad():
            x = self.tokens(x) if self.block == self.depth else self.intermediate(x, [self.block])[0]
        return self.head.classifier(self.head.norm(self.head.blocks(x)[:, 0]))


def init_classifier_(classifier):
    """MAE's: weights normal with std 2e-5 (cut at +-2, as in timm), bias 0: all classes are equally likely at first."""
    nn.init.trunc_normal_(classifier.weight, std=2e-5)
    nn.init.zeros_(classifier.bias)


def build(args, source, classes):
    """The classifier around the encoder of --checkpoint, and the description of its head."""
    state, config = checkpoint.fit(source, args.img_size)
    taken = {}
    head = dict(kind="linear")
    if args.from_projector:
        taken = {k: v for k, v in source["rest"].items() if k in ("head.0.weight", "head.0.bias")}
        weight = taken.get("head.0.weight")
        if weight is None or weight.ndim != 2 or weight.shape[1] != config["dim"]:
            raise UsageError(f"{source['path']}: no projector in it (head.0.weight); --from-projector needs a "
                             "checkpoint of graft_train.py or of MoCo v3")
        head = dict(kind="projector", width=len(weight), bias="head.0.bias" in taken)
    elif args.probe_block:
        head = dict(kind="probe", block=args.probe_block, blocks=args.blocks)
    for option, k in (("--freeze-blocks", args.freeze_blocks), ("--probe-block", args.probe_block or 0)):
        if k > config["depth"]:
            raise UsageError(f"{option} {k}: the encoder has {config['depth']} blocks")
    try:
        net = make(config, head, classes, args.drop_path)
    except ValueError as error:
        raise UsageError(error) from None
    net.load_state_dict(state | taken, strict=False)        # read_encoder matched every encoder tensor
    if args.freeze_blocks:
        net.frozen = args.freeze_blocks
        freeze(net, net.depth, blocks=args.freeze_blocks)
    return net, head, list(taken)


def make(config, head, classes, drop_path=0.0):
    """The network for a description of its head, with random weights."""
    return (DepthProbe if head["kind"] == "probe" else Classifier)(config, head, classes, drop_path)


def load_classifier(path):
    """(network in evaluation mode, what classifier.pt holds besides): pictures normalised with its "mean" and "std"
    (N, C, H, W) -> logits (N, classes), in the order of its "classes". A run's folder stands for its classifier.pt."""
    path = checkpoint.in_folder(path, "classifier.pt")
    content = checkpoint.read(path)
    if not isinstance(content, dict) or not {"model", "config", "head", "classes", "mean", "std"} <= set(content):
        raise UsageError(f"{path}: not a classifier that finetune.py wrote")
    state, config, head, classes = (content[k] for k in ("model", "config", "head", "classes"))
    if not all(isinstance(value, dict) for value in (state, config, head)) or not isinstance(classes, (list, tuple)):
        raise UsageError(f"{path}: not a classifier that finetune.py wrote")
    checkpoint.check_config(config, state, path)
    checkpoint.check_meta(content, config, path)
    widest = max((n for v in state.values() for n in v.shape), default=0)
    claims = [head.get("width", 0), head.get("block", 0), head.get("blocks", 0), len(classes)]
    if (not all(type(n) is int and 0 <= n <= widest for n in claims)
            or head.get("blocks", 0) > checkpoint.LARGEST["depth"]):
        raise UsageError(f"{path}: refused, it claims a head {head!r:.80}")
    try:
        net = make(config, head, len(classes))
        net.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path}: not a classifier that finetune.py wrote ({str(error).splitlines()[0]})") from None
    return net.eval(), content


# -------------------------------------------------------------------------------------------- augmentation, test
def train_view(args, pictures):
    """Crop, RandAugment and flip: the view of the training pictures."""
    view = dict(scale=(args.crop_min, 1.0), mode="bicubic", flip=0.5)
    if args.rand_augment:
        # MAE's is timm's rand-m9-mstd0.5-inc1: two operations, each applied with probability 1/2, magnitude 9 of 10
        # (9 in torchvision's own scale is 9 of 30, a third of that). This is the nearest that torchvision has: the
        # magnitude is not jittered, Posterize keeps 4 bits and not 1, Identity is in, Invert and SolarizeAdd are not.
        if pictures.in_chans not in (1, 3):
            raise UsageError(f"--rand-augment works on 1 or 3 channels, not {pictures.in_chans}: give --rand-augment 0")
        one = v2.RandAugment(1, args.rand_augment, num_magnitude_bins=11, fill=[round(255 * m) for m in pictures.mean],
                             interpolation=v2.InterpolationMode.BILINEAR)
        view["pixels"] = v2.Compose([v2.RandomApply([one], 0.5)] * 2)
    return view


def mixing(args, classes):
    """MixUp or CutMix, drawn at each call: images (n, C, H, W), labels (n,) -> images, targets (n, classes)."""
    transforms = [kind(alpha=alpha, num_classes=classes)
                  for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    return v2.RandomChoice(transforms) if transforms else lambda images, labels: (images, labels)


@torch.no_grad()
def evaluate(net, loader, dtype):
    """(top-1, top-5) in percent and the number of pictures that could be read, each counted by one process."""
    net.eval()
    labels = loader.pictures.labels
    counts = torch.zeros(3, dtype=torch.long, device=loader.device)
    for batch in loader.epoch(0):
        readable = batch.shown == batch.ids
        with torch.autocast(loader.device.type, dtype, enabled=dtype is not None):
            logits = net(batch.views[0][:])
        ranked = logits.float().topk(min(5, logits.shape[1])).indices           # (n, 5)
        right = (ranked == labels[batch.ids, None].to(loader.device)) & readable[:, None].to(loader.device)
        counts += torch.stack([right[:, 0].sum(), right.sum(), readable.sum().to(loader.device)])
    if loader.processes > 1:
        dist.all_reduce(counts)
    first, five, n = counts.tolist()
    if n == 0:
        raise RunError(f"{loader.pictures.name}: none of the test pictures can be read")
    return 100 * first / n, 100 * five / n, n


def main(args):
    # ---------------------------------------------------------------- 1. processes, data, model
    device, rank, processes = run.setup(args.device, args.timeout_minutes, args.deterministic)
    dtype = run.precision(args.amp, device)
    if args.batch_size % processes:
        raise UsageError(f"--batch-size {args.batch_size} is not divided by {processes} processes")
    source = checkpoint.read_encoder(args.checkpoint, args.weights)
    in_chans = source["config"]["in_chans"]
    everything = data.load_data(args.data, True, in_chans, args.stats, args.max_bad)
    ids, how = data.labelled(everything, args.labels, args.seed)
    pictures = everything.select(ids).hold(device)
    test = data.same_classes(everything, data.load_data(args.data, False, in_chans, args.stats, args.max_bad))
    pictures.mean, pictures.std = (source["meta"].get(k) or getattr(pictures, k) for k in ("mean", "std"))
    peers.same("numbers of pictures", len(everything))
    peers.same("numbers of test pictures", len(test))
    batch_size = min(args.batch_size, len(pictures) // processes * processes)
    if batch_size == 0:
        raise UsageError(f"{len(pictures)} labelled pictures are fewer than the {processes} processes")
    local = batch_size // processes
    torch.manual_seed(args.seed)
    net, head, taken = build(args, source, len(pictures.classes))
    loader = data.Loader(pictures, [train_view(args, pictures)], net.config["img_size"], local, args.seed, args.workers,
                         device, rank, processes, max_bad=args.max_bad)
    test_loader = data.Loader(test.hold(device), [augment.TEST_VIEW], net.config["img_size"], 256, args.seed,
                              args.workers, device, rank, processes, shuffle=False, max_bad=args.max_bad,
                              mean=pictures.mean, std=pictures.std)
    net.to(device).train()
    # not dynamic=False: the rate of dropped paths differs by block, and one graph serves any rate
    run.compile_blocks([m for m in net.modules() if isinstance(m, Block)], args.compile, device)
    model = DistributedDataParallel(net) if processes > 1 else net

    # ---------------------------------------------------------------- 2. rates
    groups = param_groups(net, net.depth, [args.lr], args.weight_decay, layer_decay=args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    scaler = run.grad_scaler(device, dtype)
    scale = batch_size / 256
    steps, warmup = args.epochs * len(loader), int(args.warmup_epochs * len(loader))
    mix = mixing(args, len(pictures.classes))
    eraser = v2.RandomErasing(args.erasing, value="random")
    fixed = {name for name, p in net.named_parameters() if not p.requires_grad}
    encoder_digest, fixed_digest = digest(net, checkpoint.is_encoder), digest(net, fixed.__contains__)

    def loss_of(images, targets):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(images)
        return F.cross_entropy(logits.float(), targets, label_smoothing=args.label_smoothing)

    with run.Run(args.out, rank, processes, device, args.log_every, steps, batch_size,
                 args.save_minutes) as job:
        # ------------------------------------------------------------ 3. own last checkpoint, or start
        settings = run.settings(args, source=source["digest"])
        job.watch(optimizer, scaler, dtype)
        state = job.load(settings) if args.resume == "auto" else job.cut_log(0)
        step, before = 0, 0.0
        if state is not None:
            step, before = job.restore(state, net), state["seconds"]
        protocol = protocol_name(args, len(pictures) / len(everything))
        system = source["meta"].get("system", os.path.basename(os.path.normpath(args.checkpoint)))
        meta = dict(system=f"{system}, {protocol}", data=pictures.name, mean=list(pictures.mean),
                    std=list(pictures.std), epochs=args.epochs, seed=args.seed, classes=pictures.classes,
                    init=source["digest"], commit=run.commit())

        def save(step):
            job.save(dict(model=net.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                          step=step, config=net.config, meta=meta, settings=settings, skipped=job.skipped,
                          seconds=before + time.perf_counter() - job.started))

        def attempt(n):
            images = torch.zeros(n, in_chans, *net.config["img_size"], device=device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                net(images).float().sum().backward()
            net.zero_grad(set_to_none=True)

        asked = -(-local // args.accum) if args.accum else 0
        size = run.micro_batch(asked, attempt, local, device, processes, net.parameters())
        parts = [slice(i, min(i + size, local)) for i in range(0, local, size)]

        # ------------------------------------------------------------ 4. report
        for line in checkpoint.report(source, taken):
            job.say(line)
        job.say(f"{protocol}: {len(pictures)} pictures of {pictures.name} ({how}), {len(test)} to test; global batch "
                f"{batch_size} = {size} x {len(parts)} micro-batches x {processes} processes; {steps} steps, "
                f"{warmup} of warm-up; {device}, {dtype or torch.float32}")
        for line in group_table(groups, scale):
            job.say(line)

        # ------------------------------------------------------------ 5. the method
        while step < steps:
            epoch = step // len(loader)
            for batch in loader.epoch(epoch, start=step % len(loader)):
                factor = lr_factor(step, steps, warmup, floor=min(args.min_lr / (args.lr * scale), 1.0))
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * scale * factor

                # what a step draws (mixing, dropped paths) depends on its number, not on restarts
                torch.manual_seed((args.seed * steps + step) * processes + rank)
                images = batch.views[0][:]
                if args.erasing:
                    images = augment.per_picture(images, batch.ids, eraser, augment.ERASE, args.seed, epoch)
                images, targets = mix(images, augment.upload(pictures.labels[batch.shown], device))
                total = 0.0
                for part in parts:                                          # plain accumulation: exact, no BatchNorm
                    with model.no_sync() if processes > 1 and part is not parts[-1] else nullcontext():
                        loss = loss_of(images[part], targets[part]) * (len(targets[part]) / local)
                        scaler.scale(loss).backward()
                    total = total + loss.detach()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)

                step += 1
                job.record(step, total, batch.ids)
                (stop, due), epoch_done = job.asked(step), step % len(loader) == 0
                if stop or due or epoch_done or step % args.log_every == 0:
                    more = {}
                    if epoch_done and args.eval_every and (step // len(loader)) % args.eval_every == 0:
                        more["top1"], more["top5"], _ = evaluate(net, test_loader, dtype)
                        net.train()
                    job.log(step, step / len(loader), [args.lr * scale * factor], loader, **more)
                    if stop or due or epoch_done:
                        save(step)
                if stop:
                    raise run.Stopped(stop)

        # ------------------------------------------------------------ 6. the result, of the last epoch
        top1, top5, tested = evaluate(net, test_loader, dtype)
        assert digest(net, fixed.__contains__) == fixed_digest, "training changed frozen weights"
        pretraining = {k: source["meta"].get(k) for k in ("epochs", "step", "seed", "data", "commit")}
        entry = dict(system=system, protocol=protocol, top1=round(top1, 2), top5=round(top5, 2), chosen_on="nothing",
                     checkpoint=args.checkpoint, digest=encoder_digest, weights=args.weights, data=pictures.name,
                     labels=how, labelled=len(pictures), tested=tested, seed=args.seed, epochs=args.epochs,
                     batch_size=batch_size, lr=args.lr, layer_decay=args.layer_decay, pretraining=pretraining,
                     seconds=round(before + time.perf_counter() - job.started, 1), commit=run.commit())
        if rank == 0:
            model = {k: v.cpu() for k, v in net.state_dict().items()}
            checkpoint.save(dict(model=model, config=net.config, classes=pictures.classes, head=head,
                                 mean=list(pictures.mean), std=list(pictures.std), protocol=protocol,
                                 encoder_digest=encoder_digest, meta=meta), job.path("classifier.pt"))
            job.say(f"wrote {job.path('classifier.pt')}")
            run.write_result(args.results or args.out, entry, once=True)
        return entry


if __name__ == "__main__":
    run.program(main, get_args)
