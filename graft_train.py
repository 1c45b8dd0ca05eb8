"""Step ii of Layer Grafted Pre-training: the MAE encoder goes on with contrastive learning, each
stage of its blocks with a rate of its own, so that the lower layers barely move.

    python graft_train.py                                       # from out/mae, two minutes on a CPU
    python graft_train.py --init mae_pretrain_vit_base.pth --data IMAGENET      # the paper's
    torchrun --nproc_per_node 8 graft_train.py --lr 1.5e-5,1.5e-5,1.5e-4 --data IMAGENET
    python graft_train.py --init none --lr 1.5e-4               # plain MoCo v3

Writes encoder.pt (for the next stage), last.pt (to resume) and log.jsonl into --out.
"""
import run  # first: a Ctrl-C while torch is imported ends in one line

import math

import torch

import augment
import checkpoint
import data
from model import (MaskedAutoencoder, MoCoV3, SimCLR, VICReg, VisionTransformer, anchor_penalty,
                   anchors_of, class_tokens, decoder_of, freeze, init_moco_, lr_factor, momentum_at,
                   param_groups, set_rates)
from run import number, numbers

# where no option is given: the demonstration's settings without --data, the paper's with it
SMALL = dict(arch="vit_mini", img_size=[32, 32], epochs=8, batch_size=128, lr=[5e-4, 5e-4, 1.5e-3],
             crop_min=0.4, hidden_dim=512)
PAPER = dict(arch="vit_base", img_size=[224, 224], epochs=300, batch_size=4096,
             lr=[1.5e-5, 1.5e-5, 1.5e-4], crop_min=0.08, hidden_dim=4096)


def get_args(argv=None):
    parser = run.Parser(__doc__, SMALL, PAPER)
    add = parser.group("data")
    run.add_options(add, "data img-size in-chans stats range labels-file workers max-bad crop-min")
    add = parser.group("model")
    run.add_options(add, "init arch patch-size heads init-size freeze-blocks", init="out/mae")
    add("--train-patch-embed", action="store_true", help="MoCo v3 freezes the patch projection")
    add("--hidden-dim", type=number(int, 1, 32768), help="of the heads, for VICReg twice as wide")
    add = parser.group("loss")
    add("--loss", choices=("moco", "vicreg", "simclr"), default="moco", help="the contrastive end")
    add("--temperature", type=number(above=True), default=0.2, help="of the contrastive softmax")
    add("--momentum", type=number(float, 0, 1), default=0.99, help="of k's encoder, rising to 1")
    add("--mim-weight", type=number(), default=0.0, help="MTL: of the MAE loss on a third view")
    run.add_options(add, "mask-ratio")
    add("--anchor-weight", type=number(), default=0.0, help="of the summed distance of the lower "
        "layers to those of --init (released code for ViT-L: 1e-5)")
    add("--anchor-blocks", type=number(int), default=12, help="the embeddings and K blocks")
    add("--anchor-norm", choices=("l1", "l2"), default="l1",
        help="|w - w0| as released, (w - w0)^2 as in the paper's words")
    add = parser.group("optimisation")
    add("--epochs", type=number(int, 1), help="passes over the images")
    add("--batch-size", type=number(int, 2), help="global, of all devices")
    run.add_options(add, "micro-batch")
    add("--lr", type=numbers(), help="base rate for batch 256, one, or one per stage of blocks "
        "from the lowest up; 0 freezes")
    add("--weight-decay", type=number(), default=0.1, help="not on 1-D ones, but with --init none")
    add("--warmup-epochs", type=number(), help="default 40, or 15 %% of a shorter run")
    add = parser.group("run")
    run.add_options(add, "out resume seed device amp compile log-every save-minutes knn-every "
                    "every-epochs timeout-minutes deterministic bf16-gradients tensorboard",
                    out="out/graft")
    args, defaults = run.parse(parser, argv)
    if args.init == "none" and args.anchor_weight:
        parser.error("--anchor-weight keeps layers near --init: it cannot go with --init none")
    if args.init == "none":
        defaults["lr"] = defaults["lr"][-1:]            # plain MoCo v3: one rate
    defaults["hidden_dim"] *= 2 if args.loss == "vicreg" else 1
    return run.complete(parser, args, defaults)


def system_name(args, source):
    """What the paper calls this run."""
    name = {"moco": "MoCo v3", "vicreg": "VICReg", "simclr": "SimCLR"}[args.loss]
    if args.mim_weight:
        return f"MTL (MAE + {name})"
    goes_on = source is None or source["meta"].get("system") == name
    lower = args.freeze_blocks or 0 in args.lr
    if lower and not goes_on:
        return f"MIM -> {name} grafting"
    if goes_on or len(set(args.lr)) == 1:
        return name if goes_on else f"{name} from {source['meta'].get('system', 'other')} weights"
    return "Layer grafted" if args.loss == "moco" else f"Layer grafted {name}"


def build(args):
    """The model with random weights, or with the encoder of --init, and what that file held."""
    source, state, config = run.once_a_node(checkpoint.start, args)
    decoder = decoder_of(config)
    encoder = MaskedAutoencoder(*decoder, **config) if args.mim_weight else VisionTransformer(
        **config)
    if state is not None:
        encoder.load_state_dict(state, strict=False)
    else:
        init_moco_(encoder)
    heads = {"moco": MoCoV3, "vicreg": VICReg, "simclr": SimCLR}[args.loss]
    vicreg = args.loss == "vicreg"                  # as wide at its end as within
    more = dict(out=args.hidden_dim) if vicreg else dict(temperature=args.temperature)
    net = heads(encoder, args.hidden_dim, mim_weight=args.mim_weight, **more)
    freeze(net, encoder.depth, args.lr, args.freeze_blocks, not args.train_patch_embed)
    return net, source


def main(args):
    # ------------------------------------------------------------- 1. device, model, images
    env = run.setup(args)
    local = env.share(args.batch_size)
    torch.manual_seed(args.seed)
    net, source = build(args)
    encoder = net.base_encoder
    dataset = run.training_images(args, encoder.config, source, env)
    views = [view | dict(scale=(args.crop_min, 1.0)) for view in augment.MOCO_VIEWS]
    views += [augment.MAE_VIEW] if args.mim_weight else []
    loader = data.Loader(dataset, views, encoder.config["img_size"], local, args.seed, args.workers,
                         env.device, env.rank, env.processes, max_bad=args.max_bad)
    net.to(env.device).train()
    run.compile_blocks(net, args.compile, env.device, dynamic=False)
    model = run.distribute(net, env, args.bf16_gradients)
    forward = env.autocast(model)

    # ------------------------------------------------------------- 2. rates
    # The method of the paper: the blocks are cut into equal stages, and each stage has a base rate
    # of its own, from below 1.5e-5, 1.5e-5, 1.5e-4. The lower layers stay what MAE made of them,
    # the higher ones learn to tell images apart. set_rates puts group["base_lr"] into force.
    groups = param_groups(net, encoder.depth, args.lr, args.weight_decay, args.init == "none")
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    scaler = run.grad_scaler(env)
    scale = args.batch_size / 256
    steps, warmup = args.epochs * len(loader), int(args.warmup_epochs * len(loader))
    anchored, anchors = anchors_of(encoder, args.anchor_blocks if args.anchor_weight else None)

    # ------------------------------------------------------------- 3. what the run is
    meta = run.about(args, system_name(args, source), dataset, source)
    meta |= dict(decoder=getattr(encoder, "decoder_config", None))
    chance = 4 * args.temperature * math.log(args.batch_size) if args.loss == "moco" else None
    job = run.Job(args, env, net, optimizer, scaler, loader, meta, source, warmup, chance)

    def attempt(n):
        x = torch.zeros(n, dataset.in_chans, *encoder.config["img_size"], device=env.device)
        sum(f.sum() for f in env.autocast(class_tokens)(encoder, x, x)).backward()
        if args.mim_weight:
            env.autocast(encoder)(x, args.mask_ratio)[0].backward()
        net.zero_grad(set_to_none=True)

    size = run.micro_batch(args.micro_batch, attempt, local, env, net.parameters())
    job.report(groups, scale, size)

    # ------------------------------------------------------------- 4. the method
    for step, batch in job.steps():
        factor = lr_factor(step, steps, warmup)
        set_rates(optimizer, scale * factor)
        x1, x2, mim = batch.view(0), batch.view(1), None
        if args.mim_weight:                             # MTL: images, their masks' noise, ratio
            mim = batch.view(2), batch.noise(encoder.grid[0] * encoder.grid[1]), args.mask_ratio
        net.update_momentum(momentum_at(step, steps, args.momentum))
        loss, log = forward(x1, x2, size, mim)          # ctr(q1, k2) + ctr(q2, k1)
        if args.anchor_weight:
            log["anchor"] = anchor_penalty(anchored, anchors, args.anchor_norm)
            loss = loss + args.anchor_weight * log["anchor"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if job.ends_epoch(args.knn_every):
            log["knn"] = run.online_knn(encoder, dataset, env, args.workers)
        job.record(loss, batch, [lr * scale * factor for lr in args.lr], **log)
    return job.result()


if __name__ == "__main__":
    run.program(main, get_args)
