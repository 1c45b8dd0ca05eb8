"""Evaluate frozen encoders by the paper's protocols (linear, k-NN, few labels), or use them: write
features, classify images, export.

    python evaluate.py --mode linear                                # what graft_train.py wrote
    python evaluate.py --mode fewshot --labels 1% --checkpoint out/mae out/moco out/graft
    torchrun --nproc_per_node 8 evaluate.py --mode linear --data IMAGENET --checkpoint out/graft
    python evaluate.py --mode predict --classifier out/classifier-linear.pt --input NEW_IMAGES
    python evaluate.py --table                                      # results.jsonl as a table

Each result is one JSON line, printed and appended to results.jsonl in --out. `--mode finetune` and
`--mode probe` start finetune.py with the other options.
"""
import run  # first: a Ctrl-C while torch is imported ends in one line

import argparse
import contextlib
import os
import re
import statistics
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import augment
import checkpoint
import data
from model import (BatchNorm1d, VisionTransformer, accuracies, confusion_matrix, gather,
                   knn_scores, lr_factor)
from run import RunError, UsageError, number, numbers

# {1, 3, 5, 7, 9} x 10^{-5..1}, times batch / 256: the released sweep
SWEEP = [m * 10.0 ** e for e in range(-5, 2) for m in (1, 3, 5, 7, 9)]
PROTOCOLS = ("linear", "knn", "fewshot")
MODES = (*PROTOCOLS, "features", "predict", "finetune", "probe")
# what goes with some of them alone
MODES_OF = dict(block=(*PROTOCOLS, "features"), classifier=("predict",), per_class=PROTOCOLS,
                all_probabilities=("predict",), input=("features", "predict"))
FEWEST = 50             # held-out images that may choose a rate; fewer: cross-validation
FOLDS = 5
# where no option is given: without --data, and with it
SMALL = dict(batch_size=256, cache_features=True)
PAPER = dict(batch_size=1024, cache_features=False)


def get_args(argv=None):
    parser = run.Parser(__doc__, SMALL, PAPER)
    add = parser.group("what to do")
    add("--mode", choices=MODES, default="linear", help="finetune, probe: see finetune.py")
    add("--export", nargs=2, metavar=("timm|hf|onnx", "FILE"), help="write the encoder, and stop")
    add("--table", action="store_true", help="print results.jsonl as a Markdown table, and stop")
    add = parser.group("encoder")
    add("--checkpoint", nargs="+", help="runs' folders or files: ours, MAE, MoCo v3, DINO, timm, "
        "transformers (default: out/graft; of predict what the classifier was trained on)")
    run.add_options(add, "weights heads init-size img-size")
    add("--block", type=number(int, 1), help="features of this block, not the last; through the "
        "final norm, but in --mode features")
    add = parser.group("data")
    run.add_options(add, "data labels-file val-share stats range workers max-bad")
    add("--labels", help="labels used: 1%%, 10%%, '5 per class', a list file (default: all; of "
        "fewshot 1%%)")
    add("--draw", choices=("balanced", "natural"), default="balanced",
        help="of --labels: the share of each class, or of all images whatever their class")
    add("--seeds", type=numbers(kind=int, high=2 ** 31), default=[0], help="comma list; the table "
        "has mean and deviation (default: 0)")
    add = parser.group("linear")
    add("--lr", type=numbers(above=True), default=SWEEP, help="base rates for batch 256, trained "
        "together (default: 35 rates)")
    add("--epochs", type=number(int, 1), default=90, help="of the linear classifier")
    add("--batch-size", type=number(int, 1), help="global, of all devices")
    add("--cache-features", action=argparse.BooleanOptionalAction, help="on features of the centre "
        "crops, computed once: minutes in place of hours, no augmentation")
    add("--batchnorm", action="store_true", help="parameter-free BatchNorm before the classifier, "
        "as in MAE's protocol")
    add = parser.group("k-NN, features, predict")
    add("--k", type=numbers(kind=int, low=1), default=[20], help="neighbours, a comma list; the "
        "first is reported as top-1 (default: 20)")
    run.add_options(add, "per-class")
    add("--classifier", help="predict: what linear, fewshot or finetune.py wrote")
    add("--input", help="features, predict: a folder of images; predict: or an image")
    add("--all-probabilities", action="store_true", help="predict: a column for each class")
    add = parser.group("run")
    run.add_options(add, "out device amp compile timeout-minutes", out="out")
    args = parser.parse_args(argv)
    args.data = args.data or os.environ.get("DATA")
    run.fill(args, PAPER if args.data else SMALL)
    if args.mode != "predict" or args.export:
        run.fill(args, dict(checkpoint=["out/graft"]))
    if args.mode == "fewshot":
        run.fill(args, dict(labels="1%"))
    if args.mode in ("finetune", "probe"):
        parser.error(f"--mode {args.mode} is finetune.py's: from Python, call finetune.main")
    if args.mode == "predict" and not (args.classifier and args.input):
        parser.error("--mode predict needs --classifier FILE and --input FOLDER")
    if args.export and args.export[0] not in ("timm", "hf", "onnx"):
        parser.error(f"--export {args.export[0]!r}: it must be timm, hf or onnx, then a file")
    if args.export and args.table:
        parser.error("--export and --table: one at a time")
    if (args.export or args.mode == "predict") and len(args.checkpoint or []) > 1:
        parser.error("--export and --mode predict are of one encoder: give one --checkpoint")
    if args.export and (args.block or args.img_size):
        parser.error("--export writes the encoder as it is: --block and --img-size are not for it")
    for name, modes in MODES_OF.items():
        if getattr(args, name) and args.mode not in modes:
            parser.error(f"--{name.replace('_', '-')} goes with --mode {' or '.join(modes)}")
    run.check(parser, args, [] if args.table or args.mode == "predict" else args.checkpoint)
    return args


# ----------------------------------------------------------------------------------------- encoders
class Frozen:
    """A frozen encoder, and how it gets its images: statistics, range, processes, workers."""

    def __init__(self, path, args, env):
        source = run.once_a_node(checkpoint.read_encoder, path, args.weights, args.heads,
                                 args.init_size)
        state, config = checkpoint.fit(source, args.img_size)
        self.encoder = VisionTransformer(**config)
        if args.block and args.block > self.encoder.depth:
            raise UsageError(f"--block {args.block}: the encoder has {self.encoder.depth} blocks")
        self.encoder.load_state_dict(state)
        self.encoder.to(env.device).eval().requires_grad_(False)
        run.compile_blocks(self.encoder, args.compile, env.device)
        self.args, self.env, self.path, self.meta = args, env, path, source["meta"]
        self.digest = checkpoint.digest(self.encoder)
        own = {} if args.stats else self.meta
        self.mean, self.std = own.get("mean"), own.get("std")
        self.unreadable = 0                                 # images met so far
        if env.rank == 0:
            print("\n".join(checkpoint.report(source)), flush=True)

    def feature(self, encoder, images):
        """(n, D): the class token (of --block) after the final norm."""
        if self.args.block:
            return encoder.norm(encoder.intermediate(images, [self.args.block])[0][:, 0])
        return encoder.forward_features(images)

    def load(self, source, train=True):
        """The images of `source` with the channels and the range that the encoder has seen."""
        args, in_chans = self.args, self.encoder.config["in_chans"]
        dataset = run.once_a_node(
            data.load, source, train, in_chans, args.stats or "imagenet", args.max_bad,
            args.range or self.meta.get("range"), args.labels_file, args.val_share)
        if train and self.env.rank == 0:
            mean, std = self.mean or dataset.mean, self.std or dataset.std
            print(f"{len(dataset)} images of {dataset.name}, {in_chans} channels, mean and "
                  f"deviation {', '.join(f'{m:.3f} {d:.3f}' for m, d in zip(mean, std))}, values "
                  f"{dataset.range or 'from 0 to the most of their type'}", flush=True)
        return dataset.hold(self.env.device)

    def extract(self, dataset, function=None, shared=False):
        """(features (N, D), readable (N,)) of every image, or of this process's share; rows that
        cannot be read are zeros."""
        return run.extract(self.encoder, dataset, self.env, workers=self.args.workers,
                           mean=self.mean, std=self.std, function=function or self.feature,
                           max_bad=self.args.max_bad, shared=shared)

    def labelled(self, dataset, shared=False):
        """(features (n, D), labels (n,), readable (N,)): of the n images that can be read, of all
        or of this process's share."""
        x, readable = self.extract(dataset, shared=shared)
        if not readable.any():
            raise RunError(f"{dataset.name}: none of {len(dataset)} images can be read")
        self.unreadable += int((~readable).sum())
        mine = run.own_rows(len(dataset), self.env) if shared else slice(None)
        good = readable[mine]
        labels = dataset.labels[mine][good].to(x.device)
        return (x if good.all() else x[good.to(x.device)]), labels, readable


# ---------------------------------------------------------------------------------------- protocols
def of_block(args):
    return f", block {args.block}" if args.block else ""


def scored(ranked, labels, classes):
    """Figures of a test: ranked (n, 5), the likeliest classes first, and the true labels (n,)."""
    confusion = confusion_matrix(ranked[:, 0], labels, classes).cpu()
    among_five = int((ranked == labels[:, None]).sum())
    return dict(accuracies(confusion, among_five), tested=len(labels), confusion=confusion)


def likeliest(scores):
    """Scores (n, classes) -> (n, 5), the classes with the highest, or all where there are fewer."""
    return scores.topk(min(5, scores.shape[1]), dim=1).indices


class LinearSweep:
    """One linear classifier per rate, trained together by SGD, momentum 0.9, no weight decay.

    The R classifiers are one matrix (D, R C): a step costs two products, about what one would cost.
    """

    def __init__(self, rates, dim, classes, device, batchnorm, seed):
        self.rates = torch.tensor(rates, device=device).repeat_interleave(classes)      # (R C,)
        self.classes = classes
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(dim, classes).normal_(std=0.01, generator=generator)
        self.weight = weight.repeat(1, len(rates)).to(device)                           # (D, R C)
        self.bias = torch.zeros(len(rates) * classes, device=device)
        self.velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        norm = BatchNorm1d(dim, eps=1e-6, affine=False) if batchnorm else torch.nn.Identity()
        self.norm = norm.to(device)

    def tensors(self):
        """All that a step changes."""
        return [self.weight, self.bias, *self.velocity, *self.norm.buffers()]

    def logits(self, x):
        """(n, D) -> (n, R, C)."""
        return torch.addmm(self.bias, x, self.weight).unflatten(1, (-1, self.classes))

    def step(self, x, labels, factor):
        """One step on features x (n, D), every rate times factor: the gradient is written out."""
        if len(x) <= isinstance(self.norm, BatchNorm1d):        # no statistics of a single image
            return
        x = self.norm.train()(x)
        error = self.logits(x).softmax(2)
        error[torch.arange(len(x), device=x.device), :, labels] -= 1
        error = error.flatten(1)                                                        # (n, R C)
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


def folds_of(labels, order):
    """(n,) the fold of each image for cross-validation: the classes are dealt out in turn."""
    by_class = order[labels[order].argsort(stable=True)]
    folds = torch.empty_like(order)
    folds[by_class] = torch.arange(len(order)) % min(FOLDS, len(order))
    return folds


def linear(frozen, train, test, args, seed):
    """The linear protocol: (fields of the result, classifier). The rate is chosen on held-out
    training images, or by cross-validation where a tenth of them are fewer than FEWEST."""
    env, classes = frozen.env, len(train.classes)
    order = augment.shuffled(len(train), augment.SUBSET, 4, seed)
    held = min(len(train) // 10, 10000)
    crossed = held < FEWEST
    if crossed:
        fit, chooser, folds = train, train, folds_of(train.labels, order)
    else:
        fit, chooser = train.select(order[held:]), train.select(order[:held])
        folds = torch.zeros(len(fit), dtype=torch.long)
    batch_size = min(args.batch_size, len(fit))
    batch_size -= 0 if args.cache_features else batch_size % env.processes
    if batch_size < args.batch_size:
        data.note(f"batches of {batch_size}, not {args.batch_size}: {len(fit)} images to fit on")
    if batch_size == 0:
        raise UsageError(f"--batch-size {args.batch_size} and {len(fit)} labelled images are too "
                         f"few for {env.processes} processes: each needs an image at a time")
    test_x, test_labels, _ = frozen.labelled(test)
    x, labels, readable = choosing = frozen.labelled(chooser)
    rates = [lr * batch_size / 256 for lr in args.lr]
    sweeps = [LinearSweep(rates, x.shape[1], classes, x.device, args.batchnorm, seed)
              for _ in range(2 + int(folds.max()) if crossed else 1)]
    if args.cache_features:
        known = choosing if crossed else frozen.labelled(fit)
        fit_on_features(sweeps, frozen, *known, folds, batch_size, seed)
    else:
        bad = fit_on_crops(sweeps, frozen, fit, folds, batch_size, seed)
        frozen.unreadable += 0 if crossed else bad          # the images that choose are counted
    if crossed:
        folds = folds[readable].to(x.device)
        own = [(sweep, folds == k) for k, sweep in enumerate(sweeps[1:])]
        on_held_out = sum(sweep.accuracies(x[fold], labels[fold]) * fold.sum()
                          for sweep, fold in own if fold.any()) / len(x)
        chosen_on = f"{len(own)}-fold cross-validation of {len(x)} training images"
    else:
        on_held_out, chosen_on = sweeps[0].accuracies(x, labels), f"{held} held-out training images"
    chosen = int(on_held_out.argmax())
    protocol = "linear" + of_block(args)
    protocol += " (cached features)" if args.cache_features else ""
    protocol += ", BatchNorm" if args.batchnorm else ""
    fields = dict(protocol=protocol, lr=args.lr[chosen],
                  **scored(likeliest(sweeps[0].scores(test_x, chosen)), test_labels, classes),
                  chosen_on=chosen_on, held_out_top1=on_held_out[chosen].item(), epochs=args.epochs,
                  batch_size=batch_size,
                  best_on_test=sweeps[0].accuracies(test_x, test_labels).max().item(),
                  best_on_test_note="chosen on the test images, as released code does")
    if args.labels is None and not args.batchnorm:          # Table 5 without new blocks
        fields |= dict(probe_block=args.block or frozen.encoder.depth, blocks=0)
    weight, bias = sweeps[0].classifier(chosen)
    return fields, dict(weight=weight, bias=bias, normalise=False)


def train_on(batches, sweeps, step, steps, quiet):
    """The steps from `step` on, each on (features (n, D), labels (n,), folds (n,)): of the first
    sweep on all of them, of the k-th after it on all but fold k."""
    progress = run.Progress("linear", steps, "steps", quiet, done=step)
    for step, (x, labels, folds) in enumerate(batches, step):
        factor = lr_factor(step, steps, 0)
        sweeps[0].step(x, labels, factor)
        for k, sweep in enumerate(sweeps[1:]):
            sweep.step(x[folds != k], labels[folds != k], factor)
        progress.step()


def fit_on_features(sweeps, frozen, x, labels, readable, folds, batch_size, seed):
    """Train on features of the centre crops, computed once: the same work in every process."""
    folds, batch_size = folds[readable].to(x.device), min(batch_size, len(x))
    used, epochs = len(x) // batch_size * batch_size, frozen.args.epochs

    def batches():
        for epoch in range(epochs):
            order = augment.shuffled(len(x), augment.ORDER, seed, epoch).to(x.device)
            for ids in order[:used].split(batch_size):
                yield x[ids], labels[ids], folds[ids]

    train_on(batches(), sweeps, 0, epochs * used // batch_size, frozen.env.rank > 0)


def part_of(frozen, seed):
    """Where a linear evaluation keeps what it has done, until its result is written."""
    block = f"-block{frozen.args.block}" if frozen.args.block else ""
    return os.path.join(frozen.args.out, f"linear-{frozen.digest}{block}-seed{seed}.part.pt")


def fit_on_crops(sweeps, frozen, fit, folds, batch_size, seed):
    """Train on a new random crop of each image in each epoch; the number of images that cannot be
    read. What is done is kept in --out after each epoch, and the same evaluation goes on from
    it."""
    env, encoder, args = frozen.env, frozen.encoder, frozen.args
    size, local = encoder.config["img_size"], env.share(batch_size)
    loader = data.Loader(fit, [augment.TRAIN_VIEW], size, local, seed, args.workers, env.device,
                         env.rank, env.processes, max_bad=args.max_bad, mean=frozen.mean,
                         std=frozen.std)
    features, labels = env.autocast(frozen.feature), fit.labels.to(env.device)
    folds, bad = folds.to(env.device), torch.zeros_like(labels)
    path = part_of(frozen, seed)
    asked = dict(lr=args.lr, epochs=args.epochs, batch_size=batch_size, batchnorm=args.batchnorm,
                 images=fit.digest, labels=fit.label_digest,
                 stats=[fit.mean, fit.std, fit.range], block=args.block, sweeps=len(sweeps))
    first = resume_linear([*(sweep.tensors() for sweep in sweeps), [bad]], path, asked)
    if first and env.rank == 0:
        print(f"resumed {path} at epoch {first}", flush=True)

    def batches():
        for epoch in range(first, args.epochs):
            for batch in loader.epoch(epoch):
                with torch.no_grad():
                    x = gather(features(encoder, batch.view(0)).float())
                ids = gather(augment.upload(batch.ids, env.device))
                if env.processes > 1 or not batch.readable.all():
                    good = gather(augment.upload(batch.readable, env.device))
                    bad[ids[~good]] = 1
                    x, ids = x[good], ids[good]
                yield x, labels[ids], folds[ids]
            if env.rank == 0:
                state = [*(sweep.tensors() for sweep in sweeps), [bad]]
                checkpoint.save(dict(asked=asked, epoch=epoch + 1, state=state), path)

    train_on(batches(), sweeps, first * len(loader), args.epochs * len(loader), env.rank > 0)
    return int(bad.sum())


def resume_linear(state, path, asked):
    """Put back what an earlier, stopped evaluation of this kind had reached into the tensors of
    `state`: the epochs done."""
    epoch = 0
    if os.path.exists(path):
        try:
            content = checkpoint.read(path)
            content["asked"].pop("data", None)              # of files of before
            if content["asked"] == asked:
                for ours, theirs in zip(state, content["state"], strict=True):
                    for own, kept in zip(ours, theirs, strict=True):
                        own.copy_(kept)
                epoch = content["epoch"]
            else:
                data.note(f"{path} is of an evaluation with other settings, this one starts over")
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            print(f"warning: {path} is damaged, linear evaluation starts over "
                  f"({str(error).splitlines()[0]})", flush=True)
    run.same("epochs to go on from in --out", epoch)
    return epoch


def knn(frozen, train, test, args, seed):
    """DINO's weighted k-NN, at several k at once. Every process has its share of the bank."""
    env = frozen.env
    shared = env.processes > 1
    bank, bank_labels, _ = frozen.labelled(train, shared)
    queries, labels, _ = frozen.labelled(test)
    progress = run.Progress("k-NN", len(queries), quiet=env.rank > 0)
    parts = []
    for part in queries.split(1024):
        scores = knn_scores(part, bank, bank_labels, len(train.classes), args.k, shared=shared)
        parts.append(torch.stack([likeliest(score) for score in scores], 1))            # (n, ks, 5)
        progress.step(len(part))
    found = [scored(of_k, labels, len(train.classes)) for of_k in torch.cat(parts).unbind(1)]
    by_k = {str(k): each["top1"] for k, each in zip(args.k, found)}
    if args.k[0] < 5:                                       # fewer neighbours than classes named
        found[0].pop("top5", None)
    fields = dict(protocol=f"{args.k[0]}-NN{of_block(args)}", **found[0], chosen_on="nothing")
    return fields | dict(by_k=by_k), None


def centre_and_normalise(x):
    """Each feature vector (row) minus its own mean, then to unit length: no set statistics."""
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def minimise(objective, start, tolerance, most):
    """L-BFGS from `start` until no entry of the gradient exceeds `tolerance`, `most` steps are done
    or rounding lets the objective fall no more."""
    v = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([v], max_iter=most, max_eval=2 * most, tolerance_grad=tolerance,
                               tolerance_change=torch.finfo(v.dtype).eps / 100, history_size=10,
                               line_search_fn="strong_wolfe")
    progress = run.Progress("logistic regression", None, "steps")

    def closure():
        solver.zero_grad()
        value = objective(v)
        value.backward()
        progress.step()
        return value

    solver.step(closure)
    return v.detach()


def logistic_regression(x, labels, classes, penalty, tolerance=1e-6, most=5000):
    """Weights (C, D) that minimise mean cross-entropy + penalty / 2 |W|^2, no intercept; x (n, D).

    Until no entry of the gradient exceeds `tolerance`: some steps in W itself, in float32, which is
    all that classes far apart need, then in coordinates in which the Hessian at W = 0 is about the
    identity, for features of uneven spread; at the end in float64.
    """
    def objective(v, x, basis=None):
        weight = v if basis is None else basis @ v
        return F.cross_entropy(x @ weight, labels) + penalty / 2 * weight.square().sum()

    x = x.double()
    weight = torch.zeros(x.shape[1], classes, device=x.device)                          # (D, C)
    weight = minimise(partial(objective, x=x.float()), weight, tolerance, 40).double()
    gradient = torch.func.grad(objective)(weight, x)
    if gradient.abs().max() <= tolerance:
        return weight.T
    identity = torch.eye(len(weight), dtype=x.dtype, device=x.device)
    root = torch.linalg.cholesky(x.T @ x / (len(x) * classes) + penalty * identity)
    basis, v = torch.linalg.inv(root).T, root.T @ weight
    tolerance /= root.abs().sum(1).max().item()                 # dL/dweight = root dL/dv
    for dtype in (torch.float32, torch.float64):
        of_v = partial(objective, x=x.to(dtype), basis=basis.to(dtype))
        v = minimise(of_v, v.to(dtype), tolerance, most)
    return (basis @ v).T


def fewshot(frozen, train, test, args, seed):
    """The 1 % protocol: multinomial logistic regression on frozen features, lambda = 2.5e-4 / n, no
    intercept."""
    (x, labels, _), (test_x, test_labels, _) = frozen.labelled(train), frozen.labelled(test)
    x, test_x = centre_and_normalise(x), centre_and_normalise(test_x)
    weight = logistic_regression(x, labels, len(train.classes), 2.5e-4 / len(x)).float()
    found = scored(likeliest(test_x @ weight.T), test_labels, len(train.classes))
    protocol = f"few-shot {args.labels}{of_block(args)}"
    fields = dict(protocol=protocol, **found, chosen_on="nothing")
    return fields, dict(weight=weight, bias=torch.zeros(len(weight)), normalise=True)


# ------------------------------------------------------------------ features, predictions, tables
def write_features(frozen, args):
    """One .npz: class token, mean of the patch tokens (N, D), file names, which could be read."""
    dataset, dim = frozen.load(args.input or args.data), frozen.encoder.dim

    def both(net, images):
        tokens = net.intermediate(images, [args.block])[0] if args.block else net.tokens(images)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)

    x, readable = frozen.extract(dataset, both)
    block = f"-block{args.block}" if args.block else ""
    x, path = x.cpu().numpy(), os.path.join(args.out, f"features-{frozen.digest}{block}.npz")
    fields = dict(class_token=x[:, :dim], patch_mean=x[:, dim:], readable=readable.numpy(),
                  files=np.array([dataset.file(i) for i in range(len(x))]))
    if dataset.labels is not None:
        fields |= dict(labels=dataset.labels.numpy(), classes=np.array(dataset.classes))
    if frozen.env.rank == 0:
        with run.atomic(path) as temporary, open(temporary, "wb") as f:
            np.savez(f, **fields)
        print(f"wrote {path}: class_token and patch_mean of {len(x)} images, "
              f"{int((~readable).sum())} of them unreadable", flush=True)


def saved_classifier(args, env):
    """(network, function(network, images) -> logits, what is saved with it) of --classifier."""
    path = checkpoint.in_folder(args.classifier, "classifier.pt")
    content = checkpoint.read(path)
    if not isinstance(content, dict) or "classifier" not in content:
        net, content = checkpoint.load_classifier(path)
        return net.to(env.device), lambda net, images: net(images), content
    checkpoint.check_linear(content, path)
    normalise = content["classifier"]["normalise"]
    weight, bias = (content["classifier"][k].to(env.device) for k in ("weight", "bias"))
    args.block, args.weights = content.get("block"), content.get("weights", args.weights)
    args.heads, args.img_size = args.heads or content.get("heads"), content.get("img_size")
    trained_on = content["checkpoint"]
    frozen = Frozen(args.checkpoint[0] if args.checkpoint else trained_on, args, env)
    if frozen.digest != content["encoder_digest"]:
        raise UsageError(f"{path} was trained on the features of another encoder ({trained_on}, "
                         f"{content['encoder_digest']}) than {frozen.path}")

    def logits(encoder, images):
        x = frozen.feature(encoder, images).float()
        x = centre_and_normalise(x) if normalise else x
        return x @ weight.T + bias

    return frozen.encoder, logits, content


def predict(args, env):
    """A CSV with file, class and probability for every image of --input, by a saved classifier."""
    net, logits, content = saved_classifier(args, env)
    value_range = args.range or content.get("range")
    dataset = data.every_image(args.input, net.config["in_chans"], value_range)
    # as the images to test on were read, to the same bits
    dataset = data.into_memory(dataset, {size for _, size, _ in data.sample(dataset)}, 1.0)
    scores, readable = run.extract(net, dataset, env, workers=args.workers, mean=content["mean"],
                                   std=content["std"], function=logits, max_bad=1.0)
    classes, path = content["classes"], os.path.join(args.out, "predictions.csv")
    every = classes if args.all_probabilities else []
    rows = [["file", "class", "probability", *every]]
    for i, row in enumerate(scores.softmax(1).cpu()):
        best = int(row.argmax())
        found = [classes[best], f"{row[best]:.4f}", *(f"{p:.4f}" for p in row[:len(every)])]
        rows.append([dataset.file(i), *(found if readable[i] else ["", "unreadable"])])
    if env.rank == 0:
        run.write_csv(path, rows)
        print(f"wrote {path}: {len(dataset)} images, {int((~readable).sum())} of them unreadable",
              flush=True)
    return path


def table(entries):
    """Markdown: systems as rows, protocols as columns, top-1; mean ± deviation of several seeds.

    A name is lengthened where it stands for more than seeds: of a row by the data, the weights, the
    size of the images and the checkpoint, of a column by the labels. Of results of one seed, of
    other settings or of an encoder that was trained again, the last counts.
    """
    def names_of(key, *more):
        """A name for each entry, with those further fields that tell entries of a name apart."""
        names = [str(e[key]) for e in entries]
        for field, apart in more:
            for name in set(names):
                own = [i for i, other in enumerate(names) if other == name]
                if apart([entries[i] for i in own]):
                    for i in own:
                        names[i] += f", {told(entries[i], field)}" if field in entries[i] else ""
        return names

    def told(entry, field):
        return re.sub(r", seed \d+$", "", str(entry.get(field)))

    def several(field):
        return lambda own: len({told(e, field) for e in own if field in e}) > 1

    def seed_of(entry):
        """What is another for another seed: (encoder, its seed, the evaluation's)."""
        trained = (entry.get("pretraining") or {}).get("seed")
        return str(entry.get("digest")), str(trained), str(entry.get("seed"))

    def not_seeds(own):
        """Whether two checkpoints are of one seed."""
        found = {seed_of(e)[:2] for e in own}
        return len({seed for _, seed in found}) < len(found)

    fields = "data", "weights", "img_size"
    rows = names_of("system", *((field, several(field)) for field in fields),
                    ("checkpoint", not_seeds))
    columns = names_of("protocol", ("labels", several("labels")))
    cells = {}
    for row, column, entry in zip(rows, columns, entries):
        cells.setdefault((row, column), {})[seed_of(entry)[1:]] = entry["top1"]
    heads = list(dict.fromkeys(columns))
    lines = ["| system | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in dict.fromkeys(rows):
        shown = [row]
        for column in heads:
            found = list(cells.get((row, column), {}).values())
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            shown.append(f"{statistics.mean(found):.1f}{spread}" if found else "")
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- main
def make_folder(option, folder):
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {folder}: cannot write there ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {folder}: cannot write there")


def print_table(args):
    path = os.path.join(args.out, "results.jsonl")
    entries = [entry for entry in run.read_results(path) if "miou" not in entry]  # segment.py's
    for entry in entries:
        named = all(isinstance(entry.get(k), str) for k in ("system", "protocol"))
        if not named or type(entry.get("top1")) not in (int, float):
            raise UsageError(f"{path}: an entry lacks system, protocol or top1: {str(entry)[:80]}")
    if not entries:
        raise UsageError(f"{path}: no results but those of segment.py")
    print(table(entries))
    return entries


def evaluate(frozen, train, test, how, args, seed):
    """One result: printed, filed and returned; its classifier and figures by class in --out."""
    started, meta, frozen.unreadable = time.perf_counter(), frozen.meta, 0
    protocol = {"linear": linear, "knn": knn, "fewshot": fewshot}[args.mode]
    fields, classifier = protocol(frozen, train, test, args, seed)
    confusion, rounded = fields.pop("confusion"), ("top1", "top5", "balanced", "best_on_test")
    fields = {k: round(v, 2) if k in rounded else v for k, v in fields.items()}
    system = meta.get("system", os.path.basename(os.path.normpath(frozen.path)))
    pretraining = {k: meta.get(k) for k in ("epochs", "step", "seed", "data", "commit")}
    entry = dict(system=system, **fields, unreadable=frozen.unreadable, checkpoint=frozen.path,
                 digest=frozen.digest, weights=args.weights,
                 img_size=list(frozen.encoder.config["img_size"]), data=train.name, labels=how,
                 labelled=len(train), seed=seed, pretraining=pretraining,
                 seconds=round(time.perf_counter() - started, 1), commit=run.commit())
    assert checkpoint.digest(frozen.encoder) == frozen.digest, "the evaluation changed the encoder"
    if frozen.env.rank > 0:
        return entry
    run.write_result(args.out, entry)
    if args.per_class:
        # one name for one result: the block and the share of labels are part of it
        name = re.sub(r"\W+", "-", f"{args.mode} {fields['protocol']} {how}").strip("-")
        name = f"{name}-{frozen.digest}-seed{seed}"
        run.write_per_class(args.out, name, confusion, train.classes)
    if classifier is not None:
        classifier = {k: v.cpu() if torch.is_tensor(v) else v for k, v in classifier.items()}
        # one name for one result, so that none of several is overwritten
        alone = len(args.checkpoint) == len(args.seeds) == 1
        name = args.mode if alone else f"{args.mode}-{frozen.digest}-seed{seed}"
        path = os.path.join(args.out, f"classifier-{name}.pt")
        checkpoint.save(dict(
            classifier=classifier, classes=train.classes, checkpoint=frozen.path,
            encoder_digest=frozen.digest, mean=list(frozen.mean or train.mean),
            std=list(frozen.std or train.std), range=train.range, block=args.block,
            img_size=list(frozen.encoder.config["img_size"]), heads=args.heads,
            weights=args.weights, protocol=fields["protocol"],
        ), path)
        print(f"wrote {path}", flush=True)
    if args.mode == "linear" and not args.cache_features:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part_of(frozen, seed))
    return entry


def main(args):
    if args.table:
        return print_table(args)
    if args.export:
        make_folder("--export", os.path.dirname(args.export[1]) or ".")
        source = checkpoint.read_encoder(args.checkpoint[0], args.weights, args.heads,
                                         args.init_size)
        print(checkpoint.export(source, *args.export))
        return []
    make_folder("--out", args.out)
    env = run.setup(args)
    if args.mode == "predict":
        return predict(args, env)
    results, loaded = [], {}
    for path in args.checkpoint:
        frozen = Frozen(path, args, env)
        if args.mode == "features":
            write_features(frozen, args)
            continue
        key = (frozen.encoder.config["in_chans"], str(frozen.meta.get("range")))
        if key not in loaded:
            train, test = frozen.load(args.data), frozen.load(args.data, train=False)
            test = data.same_classes(train, test)
            test.mean, test.std = train.mean, train.std
            run.same("numbers of images", len(train))
            run.same("numbers of test images", len(test))
            run.say_what_was_seen(args, frozen.meta)
            loaded[key] = train, test
        train, test = loaded[key]
        for seed in args.seeds:
            ids, how = data.labelled(train, args.labels, seed, args.draw)
            results.append(evaluate(frozen, train.select(ids), test, how, args, seed))
    if env.rank == 0 and len(results) > 1:
        print(table(results), flush=True)
    return results


def handed_on(argv):
    """finetune.py's arguments where --mode is finetune or probe, whose --block is --probe-block."""
    parser = run.Parser(__doc__, add_help=False)
    parser.add_argument("--mode")
    known, rest = parser.parse_known_args(argv)
    if known.mode == "probe":
        parser.add_argument("--block")
        known, rest = parser.parse_known_args(argv)
        if not known.block:
            parser.error("--mode probe needs --block K, the block whose tokens are probed")
        rest += ["--probe-block", known.block]
    return rest if known.mode in ("finetune", "probe") else None


if __name__ == "__main__":
    rest = handed_on(sys.argv[1:])
    if rest is not None:
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "finetune.py")
        os.execv(sys.executable, [sys.executable, script, *rest])
    run.program(main, get_args)
