"""Evaluate frozen encoders by the paper's protocols: linear, k-NN and few-shot accuracy, or write features.

    python evaluate.py --mode linear                                        # what graft_train.py wrote
    python evaluate.py --mode fewshot --labels 1% --checkpoint out/mae out/moco out/graft
    torchrun --nproc_per_node 8 evaluate.py --mode linear --data IMAGENET --checkpoint out/graft
    python evaluate.py --mode predict --classifier out/classifier-linear.pt --input NEW_PICTURES
    python evaluate.py --table                                              # results.jsonl as a table

Each result is one JSON line, printed and appended to results.jsonl in --out. Fine-tuning and the depth probe are in
finetune.py and can be called from here too: --mode finetune, --mode probe.
"""
import csv
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import augment
import checkpoint
import data
import peers
import run
from data import UsageError
from features import digest, extract, knn_scores
from model import BatchNorm1d, VisionTransformer, gather
from run import number, numbers

# {1, 3, 5, 7, 9} x 10^{-5..1}, times batch / 256: the released sweep
SWEEP = [m * 10.0 ** e for e in range(-5, 2) for m in (1, 3, 5, 7, 9)]
MODES = ("linear", "knn", "fewshot", "features", "predict", "finetune", "probe")


def get_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    for mode in ("finetune", "probe"):                                      # a file of their own, with its own options
        if mode in argv and argv[max(argv.index(mode) - 1, 0)] == "--mode" or f"--mode={mode}" in argv:
            import finetune
            rest = [a for i, a in enumerate(argv) if a not in ("--mode", f"--mode={mode}")
                    and not (a == mode and argv[i - 1] == "--mode")]
            rest = ["--probe-block" if a == "--block" and mode == "probe" else a for a in rest]
            args = finetune.get_args(rest)
            args.mode = mode
            return args
    parser = run.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    # what
    add("--mode", choices=MODES, default="linear", help="finetune and probe take finetune.py's options")
    add("--checkpoint", nargs="+", default=["out/graft"], help="runs' folders or files: ours, MAE, MoCo v3, DINO, timm")
    add("--weights", choices=("base", "momentum"), default="base", help="of a MoCo v3 file that holds both encoders")
    add("--data", help="folder with train/ and val/ or test/, cifar10, cifar100 (default: $DATA, else an embedded set)")
    add("--stats", choices=("imagenet", "data"), default="imagenet", help="channel statistics, where the file has none")
    add("--img-size", type=run.image_size, help="224 or HEIGHTxWIDTH (default: the checkpoint's)")
    add("--labels", help="labels used: 1%%, 10%%, '5 per class', a list file (default: all; fewshot 1%%)")
    add("--seeds", type=numbers(kind=int, high=2 ** 31), default=[0], help="comma list; several give mean and deviation")
    # linear
    add("--lr", type=numbers(above=True), default=SWEEP, help="base rates for batch 256, all trained at once (35 rates)")
    add("--epochs", type=number(int, 1), default=90, help="of the linear classifier")
    add("--batch-size", type=number(int, 1), help="global (default 1024; embedded 256)")
    add("--cache-features", action=run.argparse.BooleanOptionalAction, help="linear on features of the centre crops, "
        "computed once: minutes instead of hours, no augmentation (default: only for the embedded set)")
    add("--batchnorm", action="store_true", help="parameter-free BatchNorm before the linear classifier (MAE's protocol)")
    # knn, features, predict, export, table
    add("--k", type=numbers(kind=int, low=1), default=[20], help="neighbours, a comma list; the first is reported as top-1")
    add("--block", type=number(int, 1), help="features: of this block, before the final norm (default: after the last)")
    add("--classifier", help="predict: a classifier-*.pt that linear, fewshot or finetune wrote")
    add("--input", help="features, predict: a folder of pictures, with or without classes")
    add("--export", nargs=2, metavar=("timm|hf", "FILE"), help="write the encoder for timm or transformers, and stop")
    add("--table", action="store_true", help="print results.jsonl as a Markdown table, and stop")
    # run
    add("--out", default="out", help="folder for results.jsonl, classifiers, features and predictions")
    add("--workers", type=number(int, 0, 256), default=min(os.cpu_count(), 10), help="reading processes per device")
    add("--max-bad", type=number(float, 0, 1), default=0.01, help="stop when this share of the files cannot be read")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 if the hardware has it")
    args = parser.parse_args(argv)
    args.data = args.data or os.environ.get("DATA")
    run.fill(args, dict(batch_size=1024 if args.data else 256, cache_features=not args.data))
    args.seeds = [int(seed) for seed in args.seeds]
    if args.mode == "fewshot":
        run.fill(args, dict(labels="1%"))
    if args.mode == "predict" and not (args.classifier and args.input):
        parser.error("--mode predict needs --classifier FILE and --input FOLDER")
    if args.export and args.export[0] not in ("timm", "hf"):
        parser.error(f"--export {args.export[0]!r}: it must be timm or hf, then a file")
    if args.export and args.table:
        parser.error("--export and --table: one at a time")
    for option, value, modes in (("--block", args.block, ("features",)), ("--classifier", args.classifier, ("predict",)),
                                 ("--input", args.input, ("features", "predict"))):
        if value and args.mode not in modes:
            parser.error(f"{option} goes with --mode {' or '.join(modes)}")
    if not (args.table or args.export) and args.mode != "predict":
        for path in args.checkpoint:
            if not os.path.exists(path):
                parser.error(f"no checkpoint {path}: run `python mae_pretrain.py` and `python graft_train.py` first, "
                             "or give --checkpoint FILE")
    run.check(parser, args)
    return args


def load_encoder(path, args, device):
    """The frozen encoder of a checkpoint, and what its file said of itself."""
    source = checkpoint.read_encoder(path, args.weights)
    state, config = checkpoint.fit(source, args.img_size)
    try:
        encoder = VisionTransformer(**config)
    except ValueError as error:
        raise UsageError(error) from None
    encoder.load_state_dict(state)
    return encoder.to(device).eval().requires_grad_(False), source


# ------------------------------------------------------------------------------------------------- protocols
def accuracy(scores, labels):
    """(top-1, top-5) in percent of scores (N, classes) against labels (N,)."""
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return hits[:, 0].float().mean().item() * 100, hits.any(1).float().mean().item() * 100


class LinearSweep:
    """One linear classifier per rate, trained together by SGD with momentum 0.9 and no weight decay.

    The R classifiers are one matrix (D, R C): a step costs two matrix products, about what one classifier costs.
    """

    def __init__(self, rates, dim, classes, device, batchnorm, seed):
        self.rates = torch.tensor(rates, device=device).repeat_interleave(classes)          # (R C,)
        self.classes = classes
        weight = torch.empty(dim, classes).normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        self.weight = weight.repeat(1, len(rates)).to(device)                               # (D, R C)
        self.bias = torch.zeros(len(rates) * classes, device=device)
        self.velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self.norm = BatchNorm1d(dim, eps=1e-6, affine=False).to(device) if batchnorm else torch.nn.Identity()

    def state(self):
        """Its tensors, to go on from: all that a step changes."""
        return dict(weight=self.weight, bias=self.bias, velocity=self.velocity, norm=self.norm.state_dict())

    def restore(self, state):
        self.weight.copy_(state["weight"])
        self.bias.copy_(state["bias"])
        for own, kept in zip(self.velocity, state["velocity"]):
            own.copy_(kept)
        self.norm.load_state_dict(state["norm"])

    def logits(self, x):
        """(n, D) -> (n, R, C)."""
        return torch.addmm(self.bias, x, self.weight).unflatten(1, (-1, self.classes))

    def step(self, x, labels, factor):
        """One step on features x (n, D); every rate times factor. The gradient of cross-entropy, written out."""
        x = self.norm.train()(x)
        error = self.logits(x).softmax(2)
        error[torch.arange(len(x), device=x.device), :, labels] -= 1
        error = error.flatten(1)                                                            # (n, R C)
        self.velocity[0].addmm_(x.T, error, beta=0.9, alpha=1 / len(x))
        self.velocity[1].mul_(0.9).add_(error.sum(0), alpha=1 / len(x))
        for value, velocity in zip((self.weight, self.bias), self.velocity):
            value.addcmul_(velocity, self.rates, value=-factor)

    @torch.no_grad()
    def scores(self, x, rate, chunk=4096):
        """(N, D) -> (N, C), the logits of one rate."""
        self.norm.eval()
        return torch.cat([self.logits(self.norm(part))[:, rate] for part in x.split(chunk)])

    @torch.no_grad()
    def accuracies(self, x, labels, chunk=1024):
        """Top-1 in percent of every rate, (R,)."""
        self.norm.eval()
        right = sum((self.logits(self.norm(part)).argmax(2) == own[:, None]).sum(0)
                    for part, own in zip(x.split(chunk), labels.split(chunk)))
        return right / len(x) * 100

    def classifier(self, rate):
        """The weights of one rate, with the BatchNorm before it folded in: (C, D), (C,)."""
        columns = slice(rate * self.classes, (rate + 1) * self.classes)
        weight, bias = self.weight[:, columns].T, self.bias[columns]
        if isinstance(self.norm, BatchNorm1d):
            scale = torch.rsqrt(self.norm.running_var + self.norm.eps)
            weight, bias = weight * scale, bias - weight @ (self.norm.running_mean * scale)
        return weight, bias


def resume_linear(sweep, path, asked):
    """Put back what an earlier, stopped evaluation of the same kind had reached; returns the epochs done."""
    epoch = 0
    if os.path.exists(path):
        try:
            content = checkpoint.read(path)
            if content["asked"] == asked:
                sweep.restore(content["sweep"])
                epoch = content["epoch"]
        except (UsageError, KeyError, TypeError, RuntimeError) as error:
            print(f"warning: {path} is damaged, linear evaluation starts over ({str(error).splitlines()[0]})", flush=True)
    peers.same("epochs to go on from in --out", epoch)
    return epoch


def linear(encoder, train, test, args, seed, how):
    """The linear protocol: (fields of the result, classifier). The rate is chosen on held-out training pictures."""
    order = data.shuffled(len(train), augment.SUBSET, 4, seed)
    held = min(len(train) // 10, 10000)
    fit, chooser = train.select(order[held:]), train.select(order[:held])
    test_x, chooser_x = extract(encoder, test, **how), extract(encoder, chooser, **how)
    device = test_x.device
    batch_size = min(args.batch_size, len(fit))
    processes = how["processes"]
    sweep = LinearSweep([lr * batch_size / 256 for lr in args.lr], test_x.shape[1], len(train.classes), device,
                        args.batchnorm, seed)
    labels = fit.labels.to(device)
    if args.cache_features:
        x = extract(encoder, fit, **how)
        steps = args.epochs * (len(fit) // batch_size)
        for step in range(steps):
            epoch, place = divmod(step, len(fit) // batch_size)
            if place == 0:
                order = data.shuffled(len(fit), augment.ORDER, seed, epoch).to(device)
            ids = order[place * batch_size:(place + 1) * batch_size]
            sweep.step(x[ids], labels[ids], 0.5 * (1 + math.cos(math.pi * step / steps)))
    else:
        batch_size -= batch_size % processes
        loader = data.Loader(fit, [augment.TRAIN_VIEW], encoder.config["img_size"], batch_size // processes, seed,
                             args.workers, device, how["rank"], processes, max_bad=args.max_bad, mean=how["mean"],
                             std=how["std"])
        path = os.path.join(args.out, f"linear-{digest(encoder)}-seed{seed}.part.pt")
        asked = dict(lr=args.lr, epochs=args.epochs, batch_size=batch_size, batchnorm=args.batchnorm, labels=args.labels,
                     data=args.data, pictures=len(fit))
        os.makedirs(args.out, exist_ok=True)
        first = resume_linear(sweep, path, asked)
        steps, step, started = args.epochs * len(loader), first * len(loader), time.perf_counter()
        for epoch in range(first, args.epochs):
            for batch in loader.epoch(epoch):
                with torch.no_grad(), torch.autocast(device.type, how["dtype"], enabled=how["dtype"] is not None):
                    x = encoder.forward_features(batch.views[0][:]).float()
                own = labels[augment.upload(batch.shown, device)]
                sweep.step(gather(x), gather(own), 0.5 * (1 + math.cos(math.pi * step / steps)))
                step += 1
            if how["rank"] == 0:
                checkpoint.save(dict(asked=asked, epoch=epoch + 1, sweep=sweep.state()), path)
                left = (time.perf_counter() - started) / (epoch + 1 - first) * (args.epochs - epoch - 1)
                print(f"epoch {epoch + 1}/{args.epochs} left {run.duration(left)}", file=sys.stderr, flush=True)
        if how["rank"] == 0:
            os.remove(path)
    held_out = sweep.accuracies(chooser_x, chooser.labels.to(device))
    chosen = int(held_out.argmax())
    on_test = sweep.accuracies(test_x, test.labels.to(device))
    top1, top5 = accuracy(sweep.scores(test_x, chosen), test.labels.to(device))
    protocol = "linear" + (" (cached features)" if args.cache_features else "") + (", BatchNorm" if args.batchnorm else "")
    fields = dict(protocol=protocol, top1=top1, top5=top5, lr=args.lr[chosen],
                  chosen_on=f"{held} held-out training pictures", held_out_top1=held_out[chosen].item(),
                  epochs=args.epochs, batch_size=batch_size,
                  best_on_test=on_test.max().item(), best_on_test_note="chosen on the test pictures, as released code does")
    weight, bias = sweep.classifier(chosen)
    return fields, dict(weight=weight, bias=bias, normalise=False)


def knn(encoder, train, test, args, seed, how):
    """DINO's weighted k-NN, at several k at once."""
    bank, queries = extract(encoder, train, **how), extract(encoder, test, **how)
    labels = test.labels.to(queries.device)
    scores = knn_scores(queries, bank, train.labels.to(bank.device), len(train.classes), [int(k) for k in args.k])
    by_k = {str(int(k)): accuracy(score, labels)[0] for k, score in zip(args.k, scores)}
    top1, top5 = accuracy(scores[0], labels)
    return dict(protocol=f"{int(args.k[0])}-NN", top1=top1, top5=top5, chosen_on="nothing", by_k=by_k), None


def centre_and_normalise(x):
    """Each feature vector (row) minus its own mean, then to unit length: no statistics over the data set."""
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def logistic_regression(x, labels, classes, penalty, tolerance=1e-6, max_iterations=5000):
    """Weights (C, D) that minimise mean cross-entropy + penalty / 2 |W|^2, no intercept; x (n, D).

    L-BFGS until no entry of the gradient exceeds `tolerance`, in coordinates in which the Hessian at W = 0 is about
    the identity (the minimiser does not depend on coordinates, the number of iterations does): in float32, then to
    the end in float64.
    """
    n, dim = x.shape
    x = x.double()
    root = torch.linalg.cholesky(x.T @ x / (n * classes) + penalty * torch.eye(dim, dtype=x.dtype, device=x.device))
    to_w = torch.linalg.inv(root).T                                         # W^T = to_w @ v, so dL/dW^T = root @ dL/dv

    def descend(v, dtype):
        """L-BFGS from v in this precision, to the tolerance or until float32 gains no more."""
        z, basis, back = (x @ to_w).to(dtype), to_w.to(dtype), root.to(dtype)
        v = v.to(dtype).requires_grad_()
        optimizer = torch.optim.LBFGS([v], max_iter=5, history_size=20, tolerance_grad=0, tolerance_change=0,
                                      line_search_fn="strong_wolfe")

        norms = []

        def objective():
            optimizer.zero_grad()
            loss = F.cross_entropy(z @ v, labels) + penalty / 2 * (basis @ v).square().sum()
            loss.backward()
            norms.append((back @ v.grad).abs().max())
            return loss

        last = objective().item()
        steps = 0
        while norms[0] > tolerance and steps < max_iterations:
            norms.clear()                                                   # norms[0]: where this step started
            loss = optimizer.step(objective).item()
            steps += 5
            if not math.isfinite(loss) or (dtype is torch.float32 and steps > 5 and last - loss < 1e-6 * loss):
                break
            last = loss
        return v.detach()

    v = torch.zeros(dim, classes, dtype=x.dtype, device=x.device)
    for dtype in (torch.float32, torch.float64):
        v = descend(v, dtype)
    return (to_w @ v.double()).T


def fewshot(encoder, train, test, args, seed, how):
    """The 1 % protocol: multinomial logistic regression on frozen features, lambda = 2.5e-4 / n, no intercept."""
    x, test_x = (centre_and_normalise(extract(encoder, part, **how)) for part in (train, test))
    weight = logistic_regression(x, train.labels.to(x.device), len(train.classes), 2.5e-4 / len(x)).float()
    top1, top5 = accuracy(test_x @ weight.T, test.labels.to(x.device))
    fields = dict(protocol=f"few-shot {args.labels}", top1=top1, top5=top5, chosen_on="nothing")
    return fields, dict(weight=weight, bias=torch.zeros(len(weight)), normalise=True)


# --------------------------------------------------------------------------------- features, predictions, tables
def write_features(encoder, args, how, path):
    """One .npz: class token and mean of the patch tokens (N, D), labels (or none) and file names."""
    pictures = data.load_data(args.input or args.data, True, encoder.config["in_chans"], max_bad=args.max_bad)

    def both(net, images):
        tokens = net.intermediate(images, [args.block])[0] if args.block else net.tokens(images)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)

    if args.block and args.block > encoder.depth:
        raise UsageError(f"--block {args.block}: the encoder has {encoder.depth} blocks")
    x = extract(encoder, pictures.hold(how["device"]), function=both, **how).cpu().numpy()
    fields = dict(class_token=x[:, :encoder.dim], patch_mean=x[:, encoder.dim:],
                  files=np.array([pictures.file(i) for i in range(len(pictures))]))
    if pictures.labels is not None:
        fields |= dict(labels=pictures.labels.numpy(), classes=np.array(pictures.classes))
    np.savez(path, **fields)
    print(f"wrote {path}: class_token and patch_mean of {len(pictures)} pictures", flush=True)


def predict(args, device, dtype):
    """A CSV with file, class and probability for every picture of --input, by a classifier that was saved."""
    content = checkpoint.read(args.classifier)
    if "classifier" in content:
        checkpoint.check_linear(content, args.classifier)
        encoder, source = load_encoder(content["checkpoint"] if args.checkpoint == ["out/graft"] else args.checkpoint[0],
                                       args, device)
        if digest(encoder) != content["encoder_digest"]:
            raise UsageError(f"{args.classifier} was trained on the features of another encoder "
                             f"({content['checkpoint']}, {content['encoder_digest']}) than {source['path']}")
        head = {k: v.to(device) if torch.is_tensor(v) else v for k, v in content["classifier"].items()}

        def logits(net, images):
            x = net.forward_features(images).float()
            x = centre_and_normalise(x) if head["normalise"] else x
            return x @ head["weight"].T + head["bias"]
    else:
        import finetune
        encoder, content = finetune.load_classifier(args.classifier)
        encoder = encoder.to(device).eval()

        def logits(net, images):
            return net(images)

    pictures = data.every_picture(args.input, encoder.config["in_chans"])
    if not len(pictures):
        raise UsageError(f"--input {args.input}: no pictures found there")
    how = dict(device=device, dtype=dtype, workers=args.workers, mean=content["mean"], std=content["std"])
    probability, best = extract(encoder, pictures, function=logits, **how).softmax(1).max(1)
    path = os.path.join(args.out, "predictions.csv")
    os.makedirs(args.out, exist_ok=True)
    with open(path, "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["file", "class", "probability"])
        for i, (name, c, p) in enumerate(zip(pictures.files, best.tolist(), probability.tolist())):
            rows.writerow([name, "", "unreadable"] if i in pictures.bad else [name, content["classes"][c], f"{p:.4f}"])
    print(f"wrote {path}: {len(pictures)} pictures", flush=True)
    return path


def table(entries):
    """Markdown: systems as rows, protocols as columns, top-1; mean ± standard deviation where there are several."""
    import statistics
    columns = list(dict.fromkeys(e["protocol"] for e in entries))
    rows = list(dict.fromkeys(e["system"] for e in entries))
    lines = ["| system | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for system in rows:
        cells = []
        for protocol in columns:
            found = [e["top1"] for e in entries if e["system"] == system and e["protocol"] == protocol]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}" if found else "")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ main
def main(args):
    if args.mode in ("finetune", "probe"):
        import finetune
        return finetune.main(args)
    if args.table:
        path = os.path.join(args.out, "results.jsonl")
        print(table(run.read_results(path)))
        return []
    if args.export:
        source = checkpoint.read_encoder(args.checkpoint[0], args.weights)
        print(checkpoint.export(source, *args.export))
        return []
    device, rank, processes = run.setup(args.device)
    dtype = run.precision(args.amp, device)
    if args.mode == "predict":
        return predict(args, device, dtype)
    results = []
    loaded = {}
    for path in args.checkpoint:
        encoder, source = load_encoder(path, args, device)
        before, started = digest(encoder), time.perf_counter()
        meta = source["meta"]
        how = dict(device=device, dtype=dtype, workers=args.workers, mean=meta.get("mean"), std=meta.get("std"),
                   rank=rank, processes=processes)
        if args.mode == "features":
            os.makedirs(args.out, exist_ok=True)
            write_features(encoder, args, how, os.path.join(args.out, f"features-{before}.npz"))
            continue
        in_chans = encoder.config["in_chans"]
        if in_chans not in loaded:
            train = data.load_data(args.data, True, in_chans, args.stats, args.max_bad)
            test = data.same_classes(train, data.load_data(args.data, False, in_chans, args.stats, args.max_bad))
            test.mean, test.std = train.mean, train.std
            peers.same("numbers of pictures", len(train))
            peers.same("numbers of test pictures", len(test))
            loaded[in_chans] = train.hold(device), test.hold(device)
        train, test = loaded[in_chans]
        for seed in args.seeds:
            ids, how_labelled = data.labelled(train, args.labels, seed)
            protocol = {"linear": linear, "knn": knn, "fewshot": fewshot}[args.mode]
            fields, classifier = protocol(encoder, train.select(ids), test, args, seed, how)
            fields = {k: round(v, 2) if k in ("top1", "top5", "best_on_test") else v for k, v in fields.items()}
            entry = dict(system=meta.get("system", os.path.basename(path)), **fields, checkpoint=path, digest=before,
                         weights=args.weights, data=train.name, labels=how_labelled, labelled=len(ids), tested=len(test),
                         seed=seed, pretraining={k: meta.get(k) for k in ("epochs", "step", "seed", "data", "commit")},
                         seconds=round(time.perf_counter() - started, 1), commit=run.commit())
            assert digest(encoder) == before, "the evaluation changed the encoder"
            if rank == 0:
                run.write_result(args.out, entry)
                if classifier is not None:
                    classifier = {k: v.cpu() if torch.is_tensor(v) else v for k, v in classifier.items()}
                    saved = dict(classifier=classifier, classes=train.classes, checkpoint=path, encoder_digest=before,
                                 mean=list(how["mean"] or train.mean), std=list(how["std"] or train.std),
                                 protocol=fields["protocol"])
                    checkpoint.save(saved, os.path.join(args.out, f"classifier-{args.mode}.pt"))
            results.append(entry)
    if rank == 0 and len(results) > 1:
        print(table(results), flush=True)
    return results


if __name__ == "__main__":
    run.program(main, get_args)
