"""Step ii of Layer Grafted Pre-training: the MAE encoder goes on with contrastive learning, each stage of its blocks
with a rate of its own, so that the lower layers barely move.

    python graft_train.py                                           # from out/mae, embedded pictures, minutes on a CPU
    python graft_train.py --init mae_pretrain_vit_base.pth --data IMAGENET                  # the paper's, one GPU
    torchrun --nproc_per_node 8 graft_train.py --lr 1.5e-5,1.5e-5,1.5e-4 --data IMAGENET    # the same run on eight
    python graft_train.py --init none --lr 1.5e-4                   # plain MoCo v3

Writes last.pt (to resume), encoder.pt (the encoder, for evaluate.py) and log.jsonl into --out.
"""
import math
import os

import torch
from torch.nn.parallel import DistributedDataParallel

import augment
import checkpoint
import data
import peers
import run
from data import UsageError
from features import online_knn
from model import (ARCHS, Block, MaskedAutoencoder, MoCoV3, SimCLR, VICReg, VisionTransformer, anchor_penalty, class_tokens,
                   feature_stats, freeze, group_table, init_moco_, layer_of, lr_factor, momentum_at, param_groups)
from run import number, numbers

# where no option is given: the demonstration's settings without --data, the paper's with it
SMALL = dict(arch="vit_mini", img_size=[32, 32], epochs=8, batch_size=128, lr=[5e-4, 5e-4, 1.5e-3],
             hidden_dim=512, crop_min=0.4)
PAPER = dict(arch="vit_base", img_size=[224, 224], epochs=300, batch_size=4096, lr=[1.5e-5, 1.5e-5, 1.5e-4],
             hidden_dim=4096, crop_min=0.08)


def get_args(argv=None):
    parser = run.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    # data
    add("--data", help="folder of pictures, list file, cifar10 or cifar100 (default: $DATA, else an embedded set)")
    add("--img-size", type=run.image_size, help="224 or HEIGHTxWIDTH (default: that of --init)")
    add("--in-chans", type=int, choices=(1, 3, 4), default=3, help="1 grey, 3 RGB, 4 RGBA")
    add("--stats", choices=("imagenet", "data"), default="imagenet", help="mean and std of the channels")
    add("--crop-min", type=number(float, 0, 1, above=True), help="smallest crop, as a share (default 0.08; embedded 0.4)")
    add("--workers", type=number(int, 0, 256), default=min(os.cpu_count(), 10), help="reading processes per device")
    add("--decode", choices=("cpu", "gpu"), default="cpu", help="of JPEGs: by the workers, or on the GPU by nvJPEG")
    add("--max-bad", type=number(float, 0, 1), default=0.01, help="stop when this share of the files cannot be read")
    # model
    add("--init", default="out/mae", help="encoder to graft onto: a run's folder, ours, MAE, MoCo v3, DINO, timm; or none")
    add("--arch", choices=ARCHS, help="with --init none; default vit_base, embedded vit_mini")
    add("--patch-size", type=number(int, 1, 256), help="with --init none; default: the architecture's")
    add("--train-patch-embed", action="store_true", help="train the patch projection too (MoCo v3 freezes it)")
    add("--freeze-blocks", type=number(int), default=0, help="MIM -> CL grafting: keep embeddings and first K blocks fixed")
    add("--hidden-dim", type=number(int, 1, 32768), help="of the heads (default 4096, VICReg 8192; embedded 512, 1024)")
    # loss
    add("--loss", choices=("moco", "vicreg", "simclr"), default="moco", help="the contrastive end")
    add("--temperature", type=number(above=True), default=0.2)
    add("--momentum", type=number(float, 0, 1), default=0.99, help="of the momentum encoder, rising to 1")
    add("--mim-weight", type=number(), default=0.0, help="MTL: adds this times the MAE loss on a lightly cropped view")
    add("--mask-ratio", type=number(float, 0, 0.99, above=True), default=0.75, help="of the MAE loss in MTL")
    add("--anchor-weight", type=number(), default=0.0, help="weight of the sum over all parameters of the anchored "
        "layers of |w - w0| or (w - w0)^2, w0 from --init (released code for ViT-L: 1e-5, l1)")
    add("--anchor-blocks", type=number(int), default=12, help="anchored: the embeddings and the first K blocks")
    add("--anchor-norm", choices=("l1", "l2"), default="l1", help="l1: the released code's, l2: the paper's words")
    # optimisation
    add("--epochs", type=number(int, 1), help="default 300; embedded 8")
    add("--batch-size", type=number(int, 1), help="global: per device x devices (default 4096; embedded 128)")
    add("--micro-batch", type=lambda t: 0 if t == "auto" else number(int, 1)(t), default=0, metavar="M",
        help="images per device whose activations are kept at once: sets the memory, not the result (default auto)")
    add("--lr", type=numbers(), help="base rate for batch 256 per stage, lowest first; 0 freezes (1.5e-5,1.5e-5,1.5e-4)")
    add("--weight-decay", type=number(), default=0.1, help="not on 1-D parameters, unless --init none")
    add("--warmup-epochs", type=number(), help="default 40, or 15 %% of a shorter run")
    # run
    add("--out", default="out/graft", help="folder of this run")
    add("--resume", choices=("auto", "never"), default="auto", help="go on from last.pt in --out, or start over")
    add("--seed", type=number(int, 0, 2 ** 31), default=0)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 if the hardware has it")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile the blocks; auto: on a GPU")
    add("--log-every", type=number(int, 1), default=20, help="steps between lines of the log")
    add("--save-minutes", type=number(float, 0, above=True), default=10.0, help="also saved after every epoch")
    add("--timeout-minutes", type=number(float, 0, 1440, above=True), default=10.0, help="for a process that hangs")
    add("--deterministic", action="store_true", help="the same bits on every run, on a GPU too (slower there)")
    add("--every-epochs", type=number(int), default=0, help="epochs between weights kept as epochNNNN.pt (0: none)")
    add("--knn-every", type=number(int), default=0, help="epochs between k-NN accuracies on held-out labels (0: never)")
    args = parser.parse_args(argv)
    args.data = args.data or os.environ.get("DATA")
    defaults = dict(PAPER if args.data else SMALL)
    if args.init != "none":                                                 # then the file decides
        if args.arch or args.patch_size:
            parser.error("--arch and --patch-size go with --init none: the file of --init says what the encoder is")
        if not os.path.exists(args.init):
            parser.error(f"no checkpoint {args.init}: run `python mae_pretrain.py` first, or give --init FILE or none")
        del defaults["arch"], defaults["img_size"]
    elif args.lr is None:
        defaults["lr"] = defaults["lr"][-1:]                                # plain MoCo v3: one rate
    if args.anchor_weight and args.init == "none":
        parser.error("--anchor-weight keeps layers near the weights of --init: it cannot go with --init none")
    if args.loss == "vicreg":
        defaults["hidden_dim"] *= 2
    run.fill(args, defaults)
    run.fill(args, dict(warmup_epochs=min(40, 0.15 * args.epochs)))
    run.check(parser, args)
    return args


def system_name(args):
    """What the paper calls this run."""
    name = {"moco": "MoCo v3", "vicreg": "VICReg", "simclr": "SimCLR"}[args.loss]
    if args.mim_weight:
        return f"MTL (MAE + {name})"
    if args.init == "none":
        return name
    if args.freeze_blocks or 0 in args.lr:
        return f"MIM -> {name} grafting"
    return "Layer grafted" if args.loss == "moco" else f"Layer grafted {name}"


def build(args):
    """The contrastive model around the encoder of --init, or around a random one, and what that file held."""
    source = state = None
    if args.init == "none":
        (patch, dim, depth, heads), decoder = ARCHS[args.arch]
        config = dict(img_size=args.img_size, patch_size=args.patch_size or patch, in_chans=args.in_chans, dim=dim,
                      depth=depth, heads=heads)
    else:
        source = checkpoint.read_encoder(args.init)
        state, config = checkpoint.fit(source, args.img_size, args.in_chans)
        decoder = next((d for e, d in ARCHS.values() if e[1] == config["dim"]), (512, 8, 16))
    try:
        if args.mim_weight:
            encoder = MaskedAutoencoder(*decoder, **config)
        else:
            encoder = VisionTransformer(**config)
        if state is None:
            init_moco_(encoder)
        else:
            encoder.load_state_dict(state, strict=False)    # read_encoder matched every encoder tensor
        if args.loss == "vicreg":
            net = VICReg(encoder, args.hidden_dim, args.hidden_dim, mim_weight=args.mim_weight)
        else:
            kind = {"moco": MoCoV3, "simclr": SimCLR}[args.loss]
            net = kind(encoder, args.hidden_dim, temperature=args.temperature, mim_weight=args.mim_weight)
        freeze(net, encoder.depth, args.lr, args.freeze_blocks, not args.train_patch_embed)
    except ValueError as error:
        raise UsageError(error) from None
    return net, source


def main(args):
    # ---------------------------------------------------------------- 1. processes, data, model
    device, rank, processes = run.setup(args.device, args.timeout_minutes, args.deterministic)
    dtype = run.precision(args.amp, device)
    if args.batch_size % processes:
        raise UsageError(f"--batch-size {args.batch_size} is not divided by {processes} processes")
    local = args.batch_size // processes
    torch.manual_seed(args.seed)
    net, source = build(args)
    encoder = net.base_encoder
    pictures = data.load_data(args.data, True, args.in_chans, args.stats, args.max_bad).hold(device)
    peers.same("numbers of pictures", len(pictures))
    views = [view | dict(scale=(args.crop_min, 1.0)) for view in augment.MOCO_VIEWS]
    loader = data.Loader(pictures, views + [augment.MAE_VIEW] * bool(args.mim_weight), encoder.config["img_size"], local,
                         args.seed, args.workers, device, rank, processes, max_bad=args.max_bad,
                         decoder=data.decoder(args.decode, device))
    if len(loader) == 0:
        raise UsageError(f"--batch-size {args.batch_size} is more than the {len(pictures)} pictures of {pictures.name}")
    if args.knn_every and pictures.labels is None:
        raise UsageError(f"--knn-every needs labels, {pictures.name} has no class folders")
    net.to(device).train()
    run.compile_blocks([m for m in net.modules() if isinstance(m, Block)], args.compile, device, dynamic=False)
    model = DistributedDataParallel(net, broadcast_buffers=False) if processes > 1 else net

    # ---------------------------------------------------------------- 2. rates
    groups = param_groups(net, encoder.depth, args.lr, args.weight_decay, decay_all=args.init == "none")
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    scaler = run.grad_scaler(device, dtype)
    scale = args.batch_size / 256
    steps, warmup = args.epochs * len(loader), int(args.warmup_epochs * len(loader))
    anchored = [p for name, p in encoder.named_parameters()
                if layer_of(name, encoder.depth) <= min(args.anchor_blocks, encoder.depth) and p.requires_grad]
    anchors = [p.detach().clone() for p in anchored] if args.anchor_weight else []

    def loss_of(x1, x2, mim, log, micro_batch):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(x1, x2, micro_batch, mim, log)
        if args.anchor_weight:
            penalty = anchor_penalty(anchored, anchors, args.anchor_norm)
            log["anchor"] = penalty.detach()
            loss = loss + args.anchor_weight * penalty
        return loss

    with run.Run(args.out, rank, processes, device, args.log_every, steps, args.batch_size,
                 args.save_minutes) as job:
        # ------------------------------------------------------------ 3. own last checkpoint, or start
        settings = run.settings(args, source=source and source["digest"])
        chance = 4 * args.temperature * math.log(args.batch_size) if args.loss == "moco" else None
        job.watch(optimizer, scaler, dtype, warmup, chance)
        state = job.load(settings) if args.resume == "auto" else job.cut_log(0)
        step = 0
        if state is not None:
            step = job.restore(state, net)
        meta = dict(system=system_name(args), data=pictures.name, mean=list(pictures.mean), std=list(pictures.std),
                    epochs=args.epochs, seed=args.seed, classes=pictures.classes, init=source and source["digest"],
                    decoder=getattr(encoder, "decoder_config", None), commit=run.commit())

        def save(step):
            weights = dict(model=net.state_dict(), config=encoder.config, meta=meta, settings=settings, step=step)
            files = {"encoder.pt": checkpoint.encoder_file(net, meta | dict(step=step))}
            epoch, rest = divmod(step, len(loader))
            if args.every_epochs and rest == 0 and epoch % args.every_epochs == 0:
                files[f"epoch{epoch:04}.pt"] = weights | dict(epoch=epoch)
            job.save(weights | dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), skipped=job.skipped),
                     before=files)

        def attempt(n):
            x = torch.zeros(n, args.in_chans, *encoder.config["img_size"], device=device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                sum(f.sum() for f in class_tokens(encoder, x, x)).backward()
                if args.mim_weight:
                    encoder(x, args.mask_ratio)[0].backward()
            net.zero_grad(set_to_none=True)

        size = run.micro_batch(args.micro_batch, attempt, local, device, processes, net.parameters())

        # ------------------------------------------------------------ 4. report
        for line in checkpoint.report(source) if source else []:
            job.say(line)
        job.say(f"{len(pictures)} pictures of {pictures.name}; global batch {args.batch_size} = {local} x {processes} "
                f"processes, {size} at once; {steps} steps, {warmup} of warm-up; {device}, {dtype or torch.float32}")
        for line in group_table(groups, scale):
            job.say(line)
        if chance is not None:
            job.say(f"chance level of the loss: {chance:.3f}")

        # ------------------------------------------------------------ 5. the method
        while step < steps:
            epoch = step // len(loader)
            for batch in loader.epoch(epoch, start=step % len(loader)):
                factor = lr_factor(step, steps, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * scale * factor

                # two views, or three with MTL; in micro-batches each is augmented when it is needed
                x1, x2, *minimal = (view[:] if size >= local else view for view in batch.views)
                mim = (minimal[0], batch.noise(encoder.grid[0] * encoder.grid[1]), args.mask_ratio) if minimal else None
                net.update_momentum(momentum_at(step, steps, args.momentum))
                log = {}
                loss = loss_of(x1, x2, mim, log, size)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)

                step += 1
                job.record(step, loss, batch.ids)
                (stop, due), epoch_done = job.asked(step), step % len(loader) == 0
                if stop or due or epoch_done or step % args.log_every == 0:
                    more = feature_stats(log.pop("features"), log.pop("q"), log.pop("k"), rank) | log
                    if epoch_done and args.knn_every and (step // len(loader)) % args.knn_every == 0 and rank == 0:
                        more["knn"] = online_knn(encoder, pictures, device, dtype, args.workers)
                    job.log(step, step / len(loader), [lr * scale * factor for lr in args.lr], loader, **more)
                    if stop or due or epoch_done:
                        save(step)
                if stop:
                    raise run.Stopped(stop)
        job.say(f"wrote {job.path('encoder.pt')}")


if __name__ == "__main__":
    run.program(main, get_args)
