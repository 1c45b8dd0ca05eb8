"""Step i of Layer Grafted Pre-training: train a ViT as a masked autoencoder (MAE).

    python mae_pretrain.py                                      # embedded images, a minute on a CPU
    python mae_pretrain.py --data IMAGENET                      # the paper's: ViT-B/16, batch 4096
    torchrun --nproc_per_node 8 mae_pretrain.py --data IMAGENET # the same run on eight GPUs

Writes encoder.pt (for the next stage), last.pt (to resume) and log.jsonl into --out.
"""
import run  # first: a Ctrl-C while torch is imported ends in one line

import argparse

import torch

import augment
import checkpoint
import data
from model import MaskedAutoencoder, decoder_of, freeze, lr_factor, param_groups, set_rates
from run import number, numbers

# where no option is given: the demonstration's settings without --data, the paper's with it
SMALL = dict(arch="vit_mini", img_size=[32, 32], epochs=25, batch_size=128, lr=[3e-3], crop_min=0.2)
PAPER = dict(arch="vit_base", img_size=[224, 224], epochs=800, batch_size=4096, lr=[1.5e-4],
             crop_min=0.2)


def get_args(argv=None):
    parser = run.Parser(__doc__, SMALL, PAPER)
    add = parser.group("data")
    run.add_options(add, "data img-size in-chans stats range labels-file workers max-bad crop-min")
    add = parser.group("model")
    run.add_options(add, "init arch patch-size heads init-size freeze-blocks", init="none")
    add = parser.group("loss")
    run.add_options(add, "mask-ratio")
    add("--norm-pix-loss", action=argparse.BooleanOptionalAction, default=True,
        help="targets normalised by the mean and variance of each patch")
    add = parser.group("optimisation")
    add("--epochs", type=number(int, 1), help="passes over the images")
    add("--batch-size", type=number(int, 1), help="global, of all devices")
    run.add_options(add, "micro-batch")
    add("--lr", type=numbers(), help="base rate for batch 256, one, or one per stage of blocks "
        "from the lowest up; 0 freezes")
    add("--weight-decay", type=number(), default=0.05, help="not on 1-D parameters")
    add("--warmup-epochs", type=number(), help="default 40, or 15 %% of a shorter run")
    add = parser.group("run")
    run.add_options(add, "out resume seed device amp compile log-every save-minutes knn-every "
                    "every-epochs timeout-minutes deterministic bf16-gradients tensorboard",
                    out="out/mae")
    args, defaults = run.parse(parser, argv)
    return run.complete(parser, args, defaults)


def system_name(args, source):
    """What the paper calls this run."""
    goes_on = source is None or "MAE" in (source["layout"], source["meta"].get("system"))
    lower = args.freeze_blocks or 0 in args.lr
    return "CL -> MIM grafting" if lower and not goes_on else "MAE"


def build(args):
    """The model with random weights, or with the encoder of --init, and what that file held."""
    source, state, config = run.once_a_node(checkpoint.start, args)
    net = MaskedAutoencoder(*decoder_of(config), args.norm_pix_loss, **config)
    if state is not None:
        net.load_state_dict(state, strict=False)        # no decoder in it; the encoder matched
    freeze(net, net.depth, args.lr, args.freeze_blocks)
    return net, source


def main(args):
    # ------------------------------------------------------------- 1. device, model, images
    env = run.setup(args)
    local = env.share(args.batch_size)
    torch.manual_seed(args.seed)
    net, source = build(args)
    encoder = net
    dataset = run.training_images(args, encoder.config, source, env)
    views = [augment.MAE_VIEW | dict(scale=(args.crop_min, 1.0))]
    loader = data.Loader(dataset, views, encoder.config["img_size"], local, args.seed, args.workers,
                         env.device, env.rank, env.processes, max_bad=args.max_bad)
    net.to(env.device).train()
    run.compile_blocks(net, args.compile, env.device, dynamic=False)
    model = run.distribute(net, env, args.bf16_gradients)
    forward = env.autocast(model)

    # ------------------------------------------------------------- 2. rates
    groups = param_groups(net, encoder.depth, args.lr, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    scaler = run.grad_scaler(env)
    scale = args.batch_size / 256
    steps, warmup = args.epochs * len(loader), int(args.warmup_epochs * len(loader))

    # ------------------------------------------------------------- 3. what the run is
    meta = run.about(args, system_name(args, source), dataset, source)
    meta |= dict(decoder=getattr(encoder, "decoder_config", None))
    job = run.Job(args, env, net, optimizer, scaler, loader, meta, source, warmup)

    def attempt(n):
        x = torch.zeros(n, dataset.in_chans, *encoder.config["img_size"], device=env.device)
        env.autocast(net)(x, args.mask_ratio)[0].backward()
        net.zero_grad(set_to_none=True)

    size = run.micro_batch(args.micro_batch, attempt, local, env, net.parameters())
    job.report(groups, scale, size)

    # ------------------------------------------------------------- 4. the method
    for step, batch in job.steps():
        factor = lr_factor(step, steps, warmup)
        set_rates(optimizer, scale * factor)
        images, noise = batch.view(0), batch.noise(net.grid[0] * net.grid[1])
        loss, log = 0.0, {}
        for part in run.slices(model, local, size):     # no image sees another: sums are exact
            share = len(noise[part]) / local
            part_loss = forward(images[part], args.mask_ratio, noise[part])[0] * share
            scaler.scale(part_loss).backward()
            loss = loss + part_loss.detach()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if job.ends_epoch(args.knn_every):
            log["knn"] = run.online_knn(encoder, dataset, env, args.workers)
        job.record(loss, batch, [lr * scale * factor for lr in args.lr], **log)
    return job.result()


if __name__ == "__main__":
    run.program(main, get_args)
