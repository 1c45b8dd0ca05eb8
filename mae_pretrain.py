"""Step i of Layer Grafted Pre-training: train a ViT as a masked autoencoder (MAE).

    python mae_pretrain.py                                          # embedded pictures, small model, minutes on a CPU
    python mae_pretrain.py --data IMAGENET                          # the paper's: ViT-B/16, 224, batch 4096
    torchrun --nproc_per_node 8 mae_pretrain.py --data IMAGENET     # the same run on eight GPUs

Writes last.pt (to resume), encoder.pt (the encoder, for graft_train.py and evaluate.py) and log.jsonl into --out.
"""
import os
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

import augment
import checkpoint
import data
import peers
import run
from data import UsageError
from features import online_knn
from model import ARCHS, MaskedAutoencoder, freeze, group_table, lr_factor, param_groups
from run import number, numbers

# where no option is given: the demonstration's settings without --data, the paper's with it
SMALL = dict(arch="vit_mini", img_size=[32, 32], epochs=25, batch_size=128, lr=[3e-3])
PAPER = dict(arch="vit_base", img_size=[224, 224], epochs=800, batch_size=4096, lr=[1.5e-4])


def get_args(argv=None):
    parser = run.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    # data
    add("--data", help="folder of pictures, list file, cifar10 or cifar100 (default: $DATA, else an embedded set)")
    add("--img-size", type=run.image_size, help="224 or HEIGHTxWIDTH (default 224; embedded 32; or that of --init)")
    add("--in-chans", type=int, choices=(1, 3, 4), default=3, help="1 grey, 3 RGB, 4 RGBA")
    add("--stats", choices=("imagenet", "data"), default="imagenet", help="mean and std of the channels")
    add("--crop-min", type=number(float, 0, 1, above=True), default=0.2, help="smallest crop, as a share")
    add("--workers", type=number(int, 0, 256), default=min(os.cpu_count(), 10), help="reading processes per device")
    add("--decode", choices=("cpu", "gpu"), default="cpu", help="of JPEGs: by the workers, or on the GPU by nvJPEG")
    add("--max-bad", type=number(float, 0, 1), default=0.01, help="stop when this share of the files cannot be read")
    # model
    add("--arch", choices=ARCHS, help="without --init; default vit_base, embedded vit_mini")
    add("--patch-size", type=number(int, 1, 256), help="without --init; default: the architecture's")
    add("--mask-ratio", type=number(float, 0, 0.99, above=True), default=0.75, help="share of patches removed")
    add("--norm-pix-loss", action=run.argparse.BooleanOptionalAction, default=True, help="targets normalised by patch")
    add("--init", help="encoder weights to start from: ours, MAE, MoCo v3, DINO, timm (default: random)")
    add("--freeze-blocks", type=number(int), default=0, help="keep embeddings and the first K blocks as they are")
    # optimisation
    add("--epochs", type=number(int, 1), help="default 800; embedded 25")
    add("--batch-size", type=number(int, 1), help="global: per device x devices x accumulation (default 4096; embedded 128)")
    add("--accum", type=number(int, 0), default=0, help="micro-batches per step and device (0: as few as fit)")
    add("--lr", type=numbers(), help="base rate for batch 256, or one per stage (default 1.5e-4; embedded 3e-3)")
    add("--weight-decay", type=number(), default=0.05, help="not on 1-D parameters")
    add("--warmup-epochs", type=number(), help="default 40, or 15 %% of a shorter run")
    # run
    add("--out", default="out/mae", help="folder of this run")
    add("--resume", choices=("auto", "never"), default="auto", help="go on from last.pt in --out, or start over")
    add("--seed", type=number(int, 0, 2 ** 31), default=0)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 if the hardware has it")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile the blocks; auto: on a GPU")
    add("--log-every", type=number(int, 1), default=20, help="steps between lines of the log")
    add("--save-minutes", type=number(float, 0, above=True), default=10.0, help="also saved after every epoch")
    add("--timeout-minutes", type=number(float, 0, 1440, above=True), default=10.0, help="for a process that hangs")
    add("--deterministic", action="store_true", help="the same bits on every run, on a GPU too (slower there)")
    add("--knn-every", type=number(int), default=0, help="epochs between k-NN accuracies on held-out labels (0: never)")
    args = parser.parse_args(argv)
    args.data = args.data or os.environ.get("DATA")
    defaults = dict(PAPER if args.data else SMALL)
    if args.init:                                                           # then the file decides
        if args.arch or args.patch_size:
            parser.error("--arch and --patch-size go without --init: its file says what the encoder is")
        del defaults["arch"], defaults["img_size"]
    run.fill(args, defaults)
    run.fill(args, dict(warmup_epochs=min(40, 0.15 * args.epochs)))
    run.check(parser, args)
    return args


def build(args):
    """The masked autoencoder with random weights, or with the encoder of --init, and what that file held."""
    source = state = None
    if args.init:
        source = checkpoint.read_encoder(args.init)
        state, config = checkpoint.fit(source, args.img_size, args.in_chans)
        decoder = next((d for e, d in ARCHS.values() if e[1] == config["dim"]), (512, 8, 16))
    else:
        (patch, dim, depth, heads), decoder = ARCHS[args.arch]
        config = dict(img_size=args.img_size, patch_size=args.patch_size or patch, in_chans=args.in_chans, dim=dim,
                      depth=depth, heads=heads)
    try:
        model = MaskedAutoencoder(*decoder, args.norm_pix_loss, **config)
        freeze(model, model.depth, args.lr, args.freeze_blocks)
    except ValueError as error:
        raise UsageError(error) from None
    if state is not None:
        model.load_state_dict(state, strict=False)      # read_encoder matched every encoder tensor; no decoder there
    return model, source


def main(args):
    # ---------------------------------------------------------------- 1. processes, data, model
    device, rank, processes = run.setup(args.device, args.timeout_minutes, args.deterministic)
    dtype = run.precision(args.amp, device)
    if args.batch_size % processes:
        raise UsageError(f"--batch-size {args.batch_size} is not divided by {processes} processes")
    local = args.batch_size // processes
    torch.manual_seed(args.seed)
    net, source = build(args)
    pictures = data.load_data(args.data, True, args.in_chans, args.stats, args.max_bad).hold(device)
    peers.same("numbers of pictures", len(pictures))
    view = augment.MAE_VIEW | dict(scale=(args.crop_min, 1.0))
    loader = data.Loader(pictures, [view], net.config["img_size"], local, args.seed, args.workers, device, rank,
                         processes, max_bad=args.max_bad, decoder=data.decoder(args.decode, device))
    if len(loader) == 0:
        raise UsageError(f"--batch-size {args.batch_size} is more than the {len(pictures)} pictures of {pictures.name}")
    if args.knn_every and pictures.labels is None:
        raise UsageError(f"--knn-every needs labels, {pictures.name} has no class folders")
    net.to(device).train()
    run.compile_blocks([*net.blocks, *net.decoder_blocks], args.compile, device, dynamic=False)
    model = DistributedDataParallel(net) if processes > 1 else net

    # ---------------------------------------------------------------- 2. rates
    groups = param_groups(net, net.depth, args.lr, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    scaler = run.grad_scaler(device, dtype)
    scale = args.batch_size / 256
    steps, warmup = args.epochs * len(loader), int(args.warmup_epochs * len(loader))

    def loss_of(images, noise):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(images, args.mask_ratio, noise)[0]

    with run.Run(args.out, rank, processes, device, args.log_every, steps, args.batch_size,
                 args.save_minutes) as job:
        # ------------------------------------------------------------ 3. own last checkpoint, or start
        settings = run.settings(args, source=source and source["digest"])
        job.watch(optimizer, scaler, dtype)
        state = job.load(settings) if args.resume == "auto" else job.cut_log(0)
        step = 0
        if state is not None:
            step = job.restore(state, net)
        system = "CL -> MIM grafting" if args.init and args.freeze_blocks else "MAE"
        meta = dict(system=system, data=pictures.name, mean=list(pictures.mean), std=list(pictures.std), epochs=args.epochs,
                    seed=args.seed, classes=pictures.classes, decoder=net.decoder_config, commit=run.commit())

        def save(step):
            job.save(dict(model=net.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                          step=step, config=net.config, meta=meta, settings=settings, skipped=job.skipped),
                     before={"encoder.pt": checkpoint.encoder_file(net, meta | dict(step=step))})

        def attempt(n):
            images = torch.zeros(n, args.in_chans, *net.config["img_size"], device=device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                net(images, args.mask_ratio)[0].backward()
            net.zero_grad(set_to_none=True)

        asked = -(-local // args.accum) if args.accum else 0
        size = run.micro_batch(asked, attempt, local, device, processes, net.parameters())
        parts = [slice(i, min(i + size, local)) for i in range(0, local, size)]

        # ------------------------------------------------------------ 4. report
        for line in checkpoint.report(source) if source else []:
            job.say(line)
        job.say(f"{len(pictures)} pictures of {pictures.name}; global batch {args.batch_size} = {size} x {len(parts)} "
                f"micro-batches x {processes} processes; {steps} steps, {warmup} of warm-up; "
                f"{device}, {dtype or torch.float32}")
        for line in group_table(groups, scale):
            job.say(line)

        # ------------------------------------------------------------ 5. the method
        model.train()
        while step < steps:
            epoch = step // len(loader)
            for batch in loader.epoch(epoch, start=step % len(loader)):
                factor = lr_factor(step, steps, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * scale * factor

                noise, total = batch.noise(net.grid[0] * net.grid[1]), 0.0
                for part in parts:                                          # plain accumulation: exact for MAE
                    with model.no_sync() if processes > 1 and part is not parts[-1] else nullcontext():
                        loss = loss_of(batch.views[0][part], noise[part]) * (len(noise[part]) / local)
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
                    if epoch_done and args.knn_every and (step // len(loader)) % args.knn_every == 0 and rank == 0:
                        more["knn"] = online_knn(net, pictures, device, dtype, args.workers)
                    job.log(step, step / len(loader), [lr * scale * factor for lr in args.lr], loader, **more)
                    if stop or due or epoch_done:
                        save(step)
                if stop:
                    raise run.Stopped(stop)
        job.say(f"wrote {job.path('encoder.pt')}")


if __name__ == "__main__":
    run.program(main, get_args)
