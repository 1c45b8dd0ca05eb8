"""Fine-tune an encoder with labels: all of it, its higher blocks, from the projector on, or new
blocks on top.

    python finetune.py                                      # out/graft, embedded images, a minute
    python finetune.py --labels 10% --from-projector        # the 10 % protocol (Table 2)
    python finetune.py --freeze-blocks 3                    # partial fine-tuning (Figure 5)
    python finetune.py --probe-block 6 --blocks 2           # depth probe (Table 5)
    torchrun --nproc_per_node 8 finetune.py --data IMAGENET             # the paper's, on 8 GPUs

Writes last.pt (to resume), classifier.pt (for `evaluate.py --mode predict`) and log.jsonl into
--out, and the accuracy on the test images after the last epoch as a line of results.jsonl.
"""
import run  # first: a Ctrl-C while torch is imported ends in one line

import os

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import augment
import checkpoint
import data
from model import (Classifier, VisionTransformer, accuracies, confusion_matrix, freeze, lr_factor,
                   param_groups, set_rates)
from run import RunError, UsageError, number

# where no option is given: the demonstration's settings without --data, the paper's with it
SMALL = dict(epochs=10, batch_size=64, lr=8e-3, layer_decay=0.75, crop_min=0.5, rand_augment=0,
             mixup=0.0, cutmix=0.0, erasing=0.0)
PAPER = dict(epochs=100, batch_size=1024, lr=5e-4, layer_decay=0.6, crop_min=0.08, rand_augment=9,
             mixup=0.8, cutmix=1.0, erasing=0.25)
# and with a part of the labels, whatever is trained: every row of a table has the same schedule
SMALL_FEW = dict(epochs=60)
PAPER_FEW = dict(epochs=400, lr=3e-5)


def get_args(argv=None):
    parser = run.Parser(__doc__, SMALL, PAPER)
    add = parser.group("data")
    run.add_options(add, "data labels-file val-share img-size stats range workers max-bad")
    add("--labels", help="labels used: 1%%, 10%%, '5 per class', a list file (default: all)")
    add = parser.group("model")
    add("--checkpoint", default="out/graft", help="a run's folder or a file: ours, MAE, MoCo v3, "
        "DINO, timm, transformers")
    run.add_options(add, "weights heads init-size")
    what = parser.add_mutually_exclusive_group().add_argument
    what("--from-projector", action="store_true", help="keep the projector's first Linear before "
         "the classifier")
    what("--freeze-blocks", type=number(int), default=0, metavar="K", help="keep the embeddings "
         "and the first K blocks as they are")
    what("--probe-block", type=number(int, 1), metavar="K", help="frozen tokens of block K under "
         "new blocks")
    add("--blocks", type=number(int, 1, 100), help="new blocks of --probe-block, default 1 (none "
        "is linear evaluation: evaluate.py --mode linear --block K)")
    add = parser.group("augmentation")
    add("--crop-min", type=number(float, 0, 1, above=True), help="smallest crop, as a share")
    add("--rand-augment", type=number(int, 0, 10), metavar="M", help="its magnitude, 0: none")
    add("--mixup", type=number(), help="its Beta distribution's alpha, 0: none")
    add("--cutmix", type=number(), help="the same for CutMix")
    add("--erasing", type=number(float, 0, 1), help="probability of random erasing")
    add("--label-smoothing", type=number(float, 0, 1), default=0.1, help="of the targets")
    add = parser.group("optimisation")
    add("--epochs", type=number(int, 1), help="default 100, embedded 10; with --labels for a part "
        "of them 400, embedded 60")
    add("--batch-size", type=number(int, 1), help="global; all images if they are fewer")
    run.add_options(add, "micro-batch")
    add("--lr", type=number(above=True), help="base rate for batch 256: default 5e-4, embedded "
        "8e-3; with --labels for a part of them 3e-5, embedded 8e-3")
    add("--layer-decay", type=number(float, 0, 1, above=True), help="rate of a layer / rate of the "
        "layer above")
    add("--min-lr", type=number(), default=1e-6, help="what the cosine ends at")
    add("--weight-decay", type=number(), default=0.05, help="not on 1-D ones and the class token")
    add("--warmup-epochs", type=number(), help="default 5, or 15 %% of a shorter run")
    add("--drop-path", type=number(float, 0, 0.99), default=0.1, help="of the last block, falling "
        "to 0 at the first; with --probe-block, of each new block")
    add = parser.group("run")
    run.add_options(add, "out resume seed device amp compile log-every save-minutes "
                    "timeout-minutes deterministic tensorboard results per-class",
                    out="out/finetune")
    add("--eval-every", type=number(int), default=0, help="epochs between test accuracies in the "
        "log; the result is that of the last epoch in any case; 0: only then")
    args = parser.parse_args(argv)
    args.data = args.data or os.environ.get("DATA")
    if args.blocks is not None and not args.probe_block:
        parser.error("--blocks goes with --probe-block")
    if args.labels and args.labels != "100%":
        run.fill(args, PAPER_FEW if args.data else SMALL_FEW)
    run.fill(args, PAPER if args.data else SMALL)
    run.fill(args, dict(warmup_epochs=min(5, 0.15 * args.epochs), blocks=1))
    run.check(parser, args, [args.checkpoint])
    return args


def protocol_name(args, share):
    """What the result is filed under: with the labels as they were asked for, or, for a list file,
    the share of the training labels (in [0, 1]) that it has."""
    name = "fine-tune"
    if args.from_projector:
        name = "from projector"
    elif args.freeze_blocks:
        name = f"partial fine-tune {args.freeze_blocks}"
    elif args.probe_block:
        name = f"probe block {args.probe_block} + {args.blocks} blocks"
    if share == 1:
        return name
    if not os.path.isfile(args.labels):
        return f"{args.labels} {name}"
    return (f"{100 * share:.0f}% " if share >= 0.01 else f"{100 * share:.2g}% ") + name


def build(args, source, classes):
    """(classifier around the encoder of --checkpoint, its head's description, what it took of the
    projector)."""
    state, config = checkpoint.fit(source, args.img_size)
    taken = {}
    head = dict(kind="linear")
    if args.from_projector:
        taken = {k: v for k, v in source["rest"].items() if k in ("head.0.weight", "head.0.bias")}
        weight = taken.get("head.0.weight")
        if weight is None or weight.ndim != 2 or weight.shape[1] != config["dim"]:
            raise UsageError(f"{source['path']}: no projector in it (head.0.weight); "
                             "--from-projector needs a file of graft_train.py or of MoCo v3")
        head = dict(kind="projector", width=len(weight), bias="head.0.bias" in taken)
    fixed = args.freeze_blocks or args.probe_block or 0
    if fixed > config["depth"]:
        option = "--probe-block" if args.probe_block else "--freeze-blocks"
        raise UsageError(f"{option} {fixed}: the encoder has {config['depth']} blocks")
    if args.probe_block:
        # new blocks and a new norm take the place of what is above block K: layer decay counts them
        # as the highest layers, as in released code
        above = ("norm.", *(f"blocks.{i}." for i in range(fixed, config["depth"])))
        state = {k: v for k, v in state.items() if not k.startswith(above)}
        config = config | dict(depth=fixed + args.blocks)
    net = Classifier(config, head, classes, args.drop_path)
    net.load_state_dict(state | taken, strict=False)    # read_encoder matched every encoder tensor
    if args.probe_block:
        for block in net.blocks[fixed:]:
            block.drop_path = args.drop_path
    if fixed:
        net.frozen = fixed
        freeze(net, net.depth, blocks=fixed)
    return net, head, list(taken)


# --------------------------------------------------------------------------- augmentation, test
def train_view(args, dataset):
    """Crop, RandAugment and flip: the view of the training images."""
    view = dict(scale=(args.crop_min, 1.0), mode="bicubic", flip=0.5)
    if args.rand_augment:
        # MAE's is timm's rand-m9-mstd0.5-inc1: two operations, each with probability 1/2, magnitude
        # 9 of 10 (9 in torchvision's own scale is 9 of 30, a third of that). This is the nearest
        # that torchvision has: the magnitude is not jittered, Posterize keeps 4 bits and not 1,
        # Identity is in, Invert and SolarizeAdd are not.
        if dataset.in_chans not in (1, 3):
            raise UsageError(f"--rand-augment works on 1 or 3 channels, not {dataset.in_chans}: "
                             "give --rand-augment 0")
        one = v2.RandAugment(1, args.rand_augment, num_magnitude_bins=11,
                             fill=[round(255 * m) for m in dataset.mean],
                             interpolation=v2.InterpolationMode.BILINEAR)
        view["pixels"] = v2.Compose([v2.RandomApply([one], 0.5)] * 2)
    return view


def mixing(args, classes):
    """MixUp or CutMix, drawn at each call: images (n, C, H, W), labels (n,) -> images, targets
    (n, classes)."""
    transforms = [kind(alpha=alpha, num_classes=classes)
                  for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    return v2.RandomChoice(transforms) if transforms else lambda images, labels: (images, labels)


def evaluate(net, test, dataset, args, env):
    """(percentages of model.accuracies, confusion matrix (C, C) on the CPU) over the test images
    that can be read; the training set has their mean and deviation."""
    classes = len(test.classes)
    ranked, readable = run.extract(
        net, test, env, workers=args.workers, mean=dataset.mean, std=dataset.std, what="test",
        max_bad=args.max_bad, function=lambda net, x: net(x).topk(min(5, classes)).indices)
    if not readable.any():
        raise RunError(f"{test.name}: none of the test images can be read")
    ranked, labels = ranked.long().cpu()[readable], test.labels[readable]           # (n, 5)
    confusion = confusion_matrix(ranked[:, 0], labels, classes)
    return accuracies(confusion, int((ranked == labels[:, None]).sum())), confusion


def load(args, source, env):
    """(training images whose labels may be used, how these were chosen, all, test images)."""
    known = source["meta"]
    everything, test = (run.once_a_node(
        data.load, args.data, train, source["config"]["in_chans"], args.stats or "imagenet",
        args.max_bad, args.range or known.get("range"), args.labels_file, args.val_share)
        for train in (True, False))
    test = data.same_classes(everything, test).hold(env.device)
    run.same("numbers of images", len(everything))
    run.same("numbers of test images", len(test))
    run.say_what_was_seen(args, known)
    ids, how = data.labelled(everything, args.labels, args.seed)
    dataset = everything.select(ids).hold(env.device)
    if known.get("mean") and not args.stats:
        dataset.mean, dataset.std = tuple(known["mean"]), tuple(known["std"])
    return dataset, how, everything, test


def main(args):
    # ------------------------------------------------------------- 1. device, images, model
    env = run.setup(args)
    env.share(args.batch_size)
    source = run.once_a_node(checkpoint.read_encoder, args.checkpoint, args.weights, args.heads,
                             args.init_size)
    dataset, how, everything, test = load(args, source, env)
    batch_size = min(args.batch_size, len(dataset) // env.processes * env.processes)
    if batch_size < args.batch_size:
        data.note(f"batches of {batch_size}, not {args.batch_size}: {len(dataset)} images")
    if batch_size == 0:
        raise UsageError(f"{len(dataset)} labelled images are fewer than the {env.processes} "
                         "processes")
    local, classes = env.share(batch_size), len(dataset.classes)
    torch.manual_seed(args.seed)
    net, head, taken = build(args, source, classes)
    size = net.config["img_size"]
    loader = data.Loader(dataset, [train_view(args, dataset)], size, local, args.seed, args.workers,
                         env.device, env.rank, env.processes, max_bad=args.max_bad)
    net.to(env.device).train()
    # not dynamic=False: the rate of dropped paths differs by block, and one graph serves any rate
    run.compile_blocks(net, args.compile, env.device)
    model = run.distribute(net, env)
    forward = env.autocast(model)

    # ------------------------------------------------------------- 2. rates
    groups = param_groups(net, net.depth, [args.lr], args.weight_decay,
                          layer_decay=args.layer_decay, no_decay=("cls_token",))    # as MAE's
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    scaler = run.grad_scaler(env)
    scale = batch_size / 256
    steps, warmup = args.epochs * len(loader), int(args.warmup_epochs * len(loader))
    floor = min(args.min_lr / (args.lr * scale), 1.0)
    mix = mixing(args, classes)
    eraser = v2.RandomErasing(args.erasing, value="random")

    # ------------------------------------------------------------- 3. what the run is
    protocol = protocol_name(args, len(dataset) / len(everything))
    system = source["meta"].get("system", os.path.basename(os.path.normpath(args.checkpoint)))
    meta = run.about(args, f"{system}, {protocol}", dataset, source)
    job = run.Job(args, env, net, optimizer, scaler, loader, meta, source, warmup,
                  encoder_file=False)
    fixed = {name for name, p in net.named_parameters() if not p.requires_grad}
    before = checkpoint.digest(net, fixed.__contains__)

    def attempt(n):
        x = torch.zeros(n, dataset.in_chans, *size, device=env.device)
        env.autocast(net)(x).float().sum().backward()
        net.zero_grad(set_to_none=True)

    at_once = run.micro_batch(args.micro_batch, attempt, local, env, net.parameters())
    job.report(groups, scale, at_once, taken,
               f"{protocol}, labels {how}, {len(test)} images to test: ")

    # ------------------------------------------------------------- 4. the method
    for step, batch in job.steps():
        factor = lr_factor(step, steps, warmup, floor)
        set_rates(optimizer, scale * factor)
        # what a step draws (mixing, dropped paths) depends on its number, not on restarts
        torch.manual_seed((args.seed * steps + step) * env.processes + env.rank)
        images, labels = batch.view(0), augment.upload(dataset.labels[batch.shown], env.device)
        if args.erasing:
            images = augment.per_image(images, batch.ids, eraser, augment.ERASE, args.seed,
                                       step // len(loader))
        if batch.readable.any() and not batch.readable.all():
            readable = augment.upload(batch.readable, env.device)
            images, labels = images[readable], labels[readable]
        images, targets = mix(images, labels)
        loss, log = 0.0, {}
        for part in run.slices(model, len(images), at_once):    # no image sees another: exact
            part_loss = F.cross_entropy(forward(images[part]).float(), targets[part],
                                        label_smoothing=args.label_smoothing)
            # of the batch, also where some could not be read: processes weigh all images alike
            part_loss = part_loss * (len(targets[part]) / len(batch))
            scaler.scale(part_loss).backward()
            loss = loss + part_loss.detach()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if job.ends_epoch(args.eval_every):
            log, _ = evaluate(net, test, dataset, args, env)
        job.record(loss, batch, [args.lr * scale * factor], **log)

    # ------------------------------------------------------------- 5. the result, of the last epoch
    found, confusion = evaluate(net, test, dataset, args, env)
    assert checkpoint.digest(net, fixed.__contains__) == before, "training changed frozen weights"
    tested = int(confusion.sum())
    digest = checkpoint.encoder_digest(source, args.img_size)
    bad = set().union(*run.gather_objects(list(dataset.bad)))
    pretraining = {k: source["meta"].get(k) for k in ("epochs", "step", "seed", "data", "commit")}
    entry = dict(system=system, protocol=protocol, **{k: round(v, 2) for k, v in found.items()},
                 chosen_on="nothing", checkpoint=args.checkpoint, digest=digest,
                 weights=args.weights, img_size=list(net.config["img_size"]), data=dataset.name,
                 labels=how, labelled=len(dataset), tested=tested,
                 unreadable=len(test) - tested + len(bad), seed=args.seed,
                 epochs=args.epochs, batch_size=batch_size, lr=args.lr,
                 layer_decay=args.layer_decay, pretraining=pretraining,
                 seconds=round(job.seconds(), 1), commit=run.commit())
    if env.rank == 0:
        path, state = job.path("classifier.pt"), net.state_dict()
        checkpoint.save(dict(model={k: v.cpu() for k, v in state.items()}, config=net.config,
                             head=head, classes=dataset.classes, mean=meta["mean"],
                             std=meta["std"], range=meta["range"], protocol=protocol,
                             encoder_digest=digest, meta=meta), path)
        job.say(f"wrote {path}")
        run.write_result(args.results or args.out, entry)
        if args.per_class:
            run.write_per_class(args.out, "finetune", confusion, dataset.classes)
    return entry


if __name__ == "__main__":
    run.program(main, get_args)
