"""evaluate.py: every protocol against a plain reference, files in and out, bad input."""
import csv
import json
import math
import os
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import augment
import checkpoint
import data
import evaluate
import finetune
import run
from conftest import QUIET, class_folder, corrupt, folder_of, rows_of
from model import VisionTransformer, accuracies, confusion_matrix


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A folder with the encoder.pt of a random small ViT."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    net = VisionTransformer(32, 8, 3, 32, 3, 2)
    checkpoint.save(checkpoint.encoder_file(net, dict(system="random")), folder / "encoder.pt")
    return folder


def run_mode(encoder_folder, out, *options):
    own = ["--checkpoint", encoder_folder, "--out", out, *QUIET]
    return evaluate.main(evaluate.get_args([str(option) for option in [*own, *options]]))


def features_in(out):
    path, = out.glob("features-*.npz")
    return np.load(path)


# ---------------------------------------------------------------------------------------- linear
@pytest.mark.parametrize("batchnorm", [False, True])
def test_linear_sweep_equals_one_sgd_run_per_rate(batchnorm):
    torch.manual_seed(0)
    rates, n, dim, classes = [0.01, 0.1, 1.0], 40, 12, 5
    x, labels = torch.randn(n, dim), torch.randint(classes, (n,))
    sweep = evaluate.LinearSweep(rates, dim, classes, "cpu", batchnorm, seed=3)
    singles = []
    for r, rate in enumerate(rates):
        fc = torch.nn.Linear(dim, classes)
        with torch.no_grad():
            fc.weight.copy_(sweep.weight[:, r * classes:(r + 1) * classes].T)
            fc.bias.zero_()
        norm = torch.nn.BatchNorm1d(dim, 1e-6, affine=False) if batchnorm else torch.nn.Identity()
        singles.append((fc, norm, torch.optim.SGD(fc.parameters(), lr=rate, momentum=0.9)))
    for step in range(8):
        part = slice(step * 5, step * 5 + 10)
        factor = 0.5 * (1 + math.cos(math.pi * step / 8))
        sweep.step(x[part], labels[part], factor)
        for rate, (fc, norm, sgd) in zip(rates, singles):
            sgd.param_groups[0]["lr"] = rate * factor
            sgd.zero_grad()
            F.cross_entropy(fc(norm(x[part])), labels[part]).backward()
            sgd.step()
    for r, (fc, norm, _) in enumerate(singles):
        expected = fc(norm.eval()(x))
        assert torch.allclose(sweep.scores(x, r), expected, atol=1e-5)
        weight, bias = sweep.classifier(r)
        assert torch.allclose(x @ weight.T + bias, expected, atol=1e-5)
        right = (expected.argmax(1) == labels).float().mean() * 100
        assert torch.isclose(sweep.accuracies(x, labels)[r], right)


@pytest.mark.parametrize("cache", ["--cache-features", "--no-cache-features"])
def test_linear_chooses_on_held_out_images(encoder_folder, tmp_path, monkeypatch, cache):
    drawn = data.embedded
    monkeypatch.setattr(data, "embedded", lambda train, *more: drawn(train, n=640 if train else 96))
    (entry,), _ = (run_mode(encoder_folder, tmp_path, "--epochs", 2, cache, "--lr", "0.01,0.1,1")
                   for _ in range(2))
    assert entry["chosen_on"] == "64 held-out training images"
    assert entry["best_on_test"] >= entry["top1"] and entry["top5"] >= entry["top1"]
    assert ("cached" in entry["protocol"]) == (cache == "--cache-features")
    assert {"checkpoint", "digest", "data", "labels", "seed", "commit", "system", "balanced",
            "tested", "unreadable"} <= set(entry)
    with open(tmp_path / "results.jsonl") as f:         # the same result once, not as a second seed
        assert [json.loads(line) for line in f] == [entry]


@pytest.mark.parametrize("labels, folds, cache", [("1 per class", 4, "--cache-features"),
                                                  ("3 per class", 5, "--no-cache-features")])
def test_few_labels_choose_by_cross_validation(encoder_folder, tmp_path, cache, labels, folds,
                                               monkeypatch):
    root, seen, step = class_folder(tmp_path / "data", 4, 4, "abcd"), {}, evaluate.LinearSweep.step

    def counted(sweep, x, *more):
        seen[sweep] = seen.get(sweep, 0) + len(x)
        step(sweep, x, *more)

    monkeypatch.setattr(evaluate.LinearSweep, "step", counted)
    entry, = run_mode(encoder_folder, tmp_path, "--data", root, "--labels", labels, "--epochs", 2,
                      "--lr", "0.1,1", cache)
    n = 4 * int(labels[0])
    assert entry["chosen_on"] == f"{folds}-fold cross-validation of {n} training images"
    whole, *parts = seen.values()
    assert whole == 2 * n and sum(parts) == 2 * n * (folds - 1) and len(parts) == folds


@pytest.fixture
def steps(monkeypatch):
    """taken: the factors of the rate of all steps of linear sweeps, interrupted at step stop_at."""
    step, steps = evaluate.LinearSweep.step, SimpleNamespace(taken=[], stop_at=None)

    def noted(self, x, labels, factor):
        steps.taken.append(factor)
        if len(steps.taken) == steps.stop_at:
            raise KeyboardInterrupt
        return step(self, x, labels, factor)

    monkeypatch.setattr(evaluate.LinearSweep, "step", noted)
    return steps


@pytest.mark.parametrize("norm", [[], ["--batchnorm"]])
def test_a_stopped_linear_evaluation_goes_on(encoder_folder, tmp_path, steps, norm, capsys):
    root = class_folder(tmp_path / "data", 8, 8, sizes=2)
    corrupt(root / "train" / "cat" / "3.png")

    def go(name):
        """The result, and the factors of the rate of every step taken."""
        steps.taken.clear()
        entry, = run_mode(encoder_folder, tmp_path / name, "--data", root, "--epochs", 3,
                          "--batch-size", 8, "--no-cache-features", "--max-bad", 0.5, *norm)
        return entry, list(steps.taken)

    whole, every = go("whole")
    steps.stop_at = 2 * len(every) // 3 + 1                             # in the third epoch
    with pytest.raises(KeyboardInterrupt):
        go("parts")
    kept, = (tmp_path / "parts").glob("linear-*.part.pt")
    steps.stop_at = None
    with pytest.MonkeyPatch.context() as patch:             # again, before the result is written
        patch.delattr(run, "write_result")
        with pytest.raises(AttributeError, match="write_result"):
            go("parts")
    rest = list(steps.taken)
    part = kept.read_bytes()                                # another protocol leaves it alone
    run_mode(encoder_folder, tmp_path / "parts", "--data", root, "--epochs", 1, "--cache-features")
    assert kept.read_bytes() == part
    parts, more = go("parts")
    assert rest == every[-len(every) // 3:] and not more and not kept.exists()
    assert whole["unreadable"] > 0
    for key in ("top1", "best_on_test", "held_out_top1", "lr", "unreadable"):
        assert parts[key] == whole[key], key
    ours, theirs = (checkpoint.read(tmp_path / name / "classifier-linear.pt")["classifier"]
                    for name in ("parts", "whole"))
    assert torch.equal(ours["weight"], theirs["weight"])
    kept.write_bytes(b"half")                                       # a damaged one is left aside
    assert go("parts")[1] == every and "starts over" in capsys.readouterr().out


def test_a_block_of_linear_is_its_class_token_after_the_norm(encoder_folder, tmp_path, monkeypatch):
    root, encoder = class_folder(tmp_path / "data"), checkpoint.load(str(encoder_folder))
    seen = {}
    knn = evaluate.knn_scores
    monkeypatch.setattr(evaluate, "knn_scores", lambda queries, *more, **options: seen.update(
        queries=queries) or knn(queries, *more, **options))
    run_mode(encoder_folder, tmp_path, "--mode", "knn", "--data", root, "--block", 2, "--k", 1)
    test = data.load(str(root), False)
    loader = data.Loader(test, [augment.TEST_VIEW], (32, 32), 12, shuffle=False)
    tokens, = encoder.intermediate(next(iter(loader.epoch(0))).view(0), [2])
    assert torch.allclose(seen["queries"], encoder.norm(tokens[:, 0]), atol=1e-5)
    entry, = run_mode(encoder_folder, tmp_path, "--data", root, "--block", 2, "--epochs", 1)
    assert entry["protocol"] == "linear, block 2"
    with pytest.raises(run.UsageError, match="--block 4: the encoder has 3 blocks"):
        run_mode(encoder_folder, tmp_path, "--data", root, "--block", 4)


# ---------------------------------------------------------------------------------------- k-NN
def test_knn_reports_every_k(encoder_folder, tmp_path):
    root = class_folder(tmp_path / "data", 3, 3, "abcdef")
    entry, = run_mode(encoder_folder, tmp_path, "--mode", "knn", "--data", root, "--k", "3,5")
    assert "top5" not in entry                              # of three neighbours
    assert set(entry["by_k"]) == {"3", "5"} and entry["top1"] == round(entry["by_k"]["3"], 2)
    entry, = run_mode(encoder_folder, tmp_path, "--mode", "knn", "--data", root, "--k", "5,3",
                      "--per-class")
    assert entry["balanced"] == entry["top1"] <= entry["top5"]          # as many of each class
    path, = tmp_path.glob("per-class-knn-*.csv")
    run_mode(encoder_folder, tmp_path, "--mode", "knn", "--data", root, "--block", 2, "--per-class")
    assert len([*tmp_path.glob("per-class-knn-*.csv")]) == 2            # none overwritten
    assert sum(int(row["support"]) for row in rows_of(path)) == 18
    shutil.rmtree(root / "val" / "a")                                   # fewer classes, and one
    for name in "bcde":
        shutil.rmtree(root / "val" / name)
    entry, = run_mode(encoder_folder, tmp_path, "--mode", "knn", "--data", root, "--k", 3)
    assert entry["tested"] == 3 and entry["balanced"] == entry["top1"]


# ------------------------------------------------------------------------------------- few labels
@pytest.mark.parametrize("n, dim, classes, decay", [(300, 24, 7, 0), (40, 60, 4, 0),
                                                    (200, 40, 9, 1.5)])
def test_logistic_regression_has_scikit_learns_optimum(n, dim, classes, decay):
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    centres, labels = torch.randn(classes, dim), torch.arange(n) % classes
    x = centres[labels] * 0.4 + torch.randn(n, dim) + 2 * torch.randn(dim)
    x = evaluate.centre_and_normalise(x * torch.arange(1, dim + 1) ** -float(decay)).double()
    assert x.mean(1).abs().max() < 1e-6 and torch.allclose(x.norm(dim=1), torch.ones(n).double())
    penalty = 2.5e-4 / n

    def objective(weight):
        fit = F.cross_entropy(x @ weight.T, labels)
        return (fit + penalty / 2 * weight.square().sum()).item()

    weight = evaluate.logistic_regression(x.float(), labels, classes, penalty, tolerance=1e-8)
    theirs = linear_model.LogisticRegression(C=4000, fit_intercept=False, max_iter=20000, tol=1e-8)
    theirs = torch.from_numpy(theirs.fit(x.numpy(), labels.numpy()).coef_)
    assert objective(weight) <= objective(theirs) * (1 + 1e-4)
    assert ((x @ weight.T).argmax(1) == (x @ theirs.T).argmax(1)).float().mean() > 0.99
    weight = weight.requires_grad_()
    loss = F.cross_entropy(x @ weight.T, labels) + penalty / 2 * weight.square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-7


def test_fewshot_over_seeds_and_the_table(encoder_folder, world, tmp_path, capsys):
    entries = run_mode(encoder_folder, tmp_path, "--mode", "fewshot", "--labels", "2 per class",
                       "--seeds", "0,1,2")
    assert [e["seed"] for e in entries] == [0, 1, 2] and all(e["labelled"] == 32 for e in entries)
    evaluate.main(evaluate.get_args(["--table", "--out", str(tmp_path)]))
    last = capsys.readouterr().out.strip().split("\n")[-1]
    tops = [e["top1"] for e in entries]
    assert last == f"| random | {np.mean(tops):.1f} ± {np.std(tops, ddof=1):.1f} |"
    assert len(list(tmp_path.glob("classifier-fewshot-*-seed?.pt"))) == 3       # none overwritten
    for mode in (["fewshot", "--labels", "2 per class"], ["knn", "--k", 3]):    # a block's own
        entry, = run_mode(encoder_folder, tmp_path, "--mode", *mode, "--block", 2)
        assert entry["protocol"].endswith(", block 2")
    (tmp_path / "results.jsonl").write_text('{"top1": 3}\n')
    with pytest.raises(run.UsageError, match="lacks system, protocol or top1"):
        evaluate.main(evaluate.get_args(["--table", "--out", str(tmp_path)]))


def test_a_csv_quotes_what_a_spreadsheet_would_compute(tmp_path):
    run.write_csv(tmp_path / "x.csv", [["-1", "+1.5", "-a.png", "=1", "a"]])
    assert (tmp_path / "x.csv").read_text().strip() == "-1,+1.5,'-a.png,'=1,a"


def test_a_table_averages_seeds_alone():
    def entry(top1, digest, seed=0, data="A", labels="all"):
        return dict(system="MAE", protocol="20-NN", top1=top1, digest=digest, data=data, seed=0,
                    labels=labels, checkpoint=f"out/{digest}", pretraining=dict(seed=seed))

    seeds = [entry(99.0, "a"), entry(40.0, "a"), entry(42.0, "b", seed=1)]      # the last of one
    assert evaluate.table(seeds).endswith("| MAE | 41.0 ± 1.4 |")
    again = entry(44.0, "d") | dict(checkpoint="out/a")             # an encoder trained again
    assert "| MAE, out/a | 44.0 |" in evaluate.table([*seeds, again])
    sizes = [entry(50.0, "a") | dict(img_size=[n, n], weights=w) for n in (32, 48) for w in "bm"]
    assert "| MAE, b, [48, 48] | 50.0 |" in evaluate.table(sizes)
    more = [*seeds, entry(60.0, "c"), entry(70.0, "a", data="B"), entry(30.0, "a", labels="1%")]
    assert evaluate.table(more).split("\n") == [
        "| system | 20-NN, all | 20-NN, 1% |", "|---|---|---|", "| MAE, A, out/a | 40.0 | 30.0 |",
        "| MAE, A, out/b | 42.0 |  |", "| MAE, A, out/c | 60.0 |  |", "| MAE, B | 70.0 |  |"]


def test_a_stopped_linear_evaluation_with_other_labels_starts_over(encoder_folder, tmp_path, steps):
    names = [f"{i}.png" for i in range(32)]
    root, table = folder_of(tmp_path / "data", names, (32, 32)), tmp_path / "labels.csv"
    def go(out, turned):
        steps.taken.clear()
        rows = [f"{name},{'xy'[(i + turned) % 2]},{'val' if i > 23 else 'train'}\n"
                for i, name in enumerate(names)]
        table.write_text("file,label,split\n" + "".join(rows))
        run_mode(encoder_folder, tmp_path / out, "--data", root, "--labels-file", table, "--epochs",
                 3, "--batch-size", 8, "--no-cache-features")
        return list(steps.taken)

    every = go("whole", 1)
    steps.stop_at = 2 * len(every) // 3 + 1
    with pytest.raises(KeyboardInterrupt):
        go("parts", 0)
    assert list((tmp_path / "parts").glob("linear-*.part.pt"))
    steps.stop_at = None
    assert go("parts", 1) == every


def test_labels_from_a_file_and_a_share_to_test_on(encoder_folder, tmp_path, capsys):
    """A flat folder: labels from a CSV, a quarter of each class to test on."""
    names = [f"{c}{i}.png" for c in ("cat", "dog") for i in range(8)]
    flat, table = folder_of(tmp_path / "flat", names, (32, 32)), tmp_path / "labels.csv"
    table.write_text("file,label\n" + "\n".join(f"{name},{name[:3]}" for name in names))
    options = ["--data", flat, "--labels-file", table, "--val-share", 0.25]
    seen = SimpleNamespace(val_share=0.25, data=f"{flat}/")
    for trained_on, said in ((flat, 1), (tmp_path, 0)):
        run.say_what_was_seen(seen, dict(data=str(trained_on)))
        assert capsys.readouterr().out.count("has seen all images") == said
    entry, = run_mode(encoder_folder, tmp_path, "--mode", "knn", "--k", 3, *options)
    assert entry["labelled"] == 12 and entry["tested"] == 4
    run_mode(encoder_folder, tmp_path, "--mode", "features", *options)
    content = features_in(tmp_path)
    assert sorted(content["classes"]) == ["cat", "dog"] and len(content["labels"]) == 12
    args = finetune.get_args(["--checkpoint", str(encoder_folder), *map(str, options)])
    source = checkpoint.read_encoder(args.checkpoint)
    dataset, _, everything, test = finetune.load(args, source, run.Env(torch.device("cpu")))
    assert (len(dataset), len(everything), len(test)) == (12, 12, 4)


def test_a_natural_draw_keeps_the_frequencies_and_a_balanced_one_does_not():
    dataset = data.embedded(n=640)
    dataset.labels = (torch.arange(640) % 8 == 0).long()                # one in eight
    dataset.classes = ["often", "seldom"]
    ids, how = data.labelled(dataset, "80 per class", 0, "balanced")
    assert dataset.labels[ids].bincount().tolist() == [80, 80] and "balanced" in how
    counts = []
    for seed in range(20):
        ids, how = data.labelled(dataset, "80 per class", seed, "natural")
        assert len(ids) == 160 and "natural" in how
        counts.append(int(dataset.labels[ids].sum()))
    assert np.mean(counts) == pytest.approx(20, abs=3) and len(set(counts)) > 3
    assert len(data.labelled(dataset, "10%", 0, "natural")[0]) == 64


# ----------------------------------------------------------------------------- figures by class
def test_figures_are_scikit_learns(tmp_path):
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    labels, classes = torch.randint(6, (200,)), ["=a", "b", "c", "d", "e", "never"]
    labels[labels == 5] = 0
    predicted = torch.where(torch.rand(200) < 0.6, labels, torch.randint(5, (200,)))
    confusion = confusion_matrix(predicted, labels, 6)
    assert np.array_equal(confusion, metrics.confusion_matrix(labels, predicted, labels=range(6)))
    found = accuracies(confusion, 190)
    balanced = 100 * metrics.balanced_accuracy_score(labels, predicted)
    assert found["balanced"] == pytest.approx(balanced) and found["top5"] == 95
    assert "top5" not in accuracies(confusion[:5, :5], 190)
    run.write_per_class(str(tmp_path), "x", confusion, classes)
    rows = rows_of(tmp_path / "per-class-x.csv")
    assert [row["class"] for row in rows] == ["'=a", *classes[1:]]
    theirs = metrics.precision_recall_fscore_support(labels, predicted, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), theirs):
        assert [float(row[name]) for row in rows[:5]] == pytest.approx(list(values), abs=1e-4)
    assert rows[5]["recall"] == "" and rows[5]["support"] == "0"
    matrix = list(csv.reader(open(tmp_path / "confusion-x.csv")))
    assert [[int(v) for v in row[1:]] for row in matrix[1:]] == confusion.tolist()
    pixels = np.array(Image.open(tmp_path / "confusion-x.png"))
    assert pixels.shape == (480, 480) and pixels[0, 0] == round(
        255 * (1 - confusion[0, 0].item() / confusion[0].sum().item()))


# --------------------------------------------------------------------------- unreadable images
@pytest.mark.parametrize("sizes, options", [
    (1, ["knn", "--k", 3]), (3, ["fewshot", "--labels", "5 per class"]),
    (1, ["linear", "--cache-features", "--epochs", 3]),
    (3, ["linear", "--no-cache-features", "--epochs", 2])], ids=str)
def test_what_cannot_be_read_is_left_out_and_counted(encoder_folder, tmp_path, options, sizes):
    root = class_folder(tmp_path / "data", sizes=sizes)
    bad = [root / name for name in ("train/cat/2.png", "train/dog/5.png", "val/dog/1.png")]
    for path in bad:
        corrupt(path)
    entry, = run_mode(encoder_folder, tmp_path, "--mode", *options, "--data", root, "--max-bad",
                      0.3)
    # of few-shot's two in train, those that were drawn
    assert entry["tested"] == 11 and entry["unreadable"] in ((1, 2, 3) if sizes == 3 else (3,))
    if options[0] == "knn":
        for path in bad:
            path.unlink()
        clean, = run_mode(encoder_folder, tmp_path, "--mode", *options, "--data", root)
        assert clean["top1"] == entry["top1"] and clean["unreadable"] == 0
    for i in (0, 3, 4):
        corrupt(root / f"val/dog/{i}.png")
    with pytest.raises((run.RunError, data.DataError), match="--max-bad") as stop:
        run_mode(encoder_folder, tmp_path, "--mode", *options, "--data", root)
    assert stop.value.exit_code == 1


# ------------------------------------------------------------------- features, prediction, export
def test_features_of_an_unlabelled_folder_and_of_a_block(encoder_folder, tmp_path):
    folder = class_folder(tmp_path / "data", 3, 3) / "val" / "cat"
    encoder = checkpoint.load(str(encoder_folder))
    loader = data.Loader(data.load(str(folder)), [augment.TEST_VIEW], (32, 32), 3, shuffle=False)
    x = next(iter(loader.epoch(0))).view(0)
    second, = encoder.intermediate(x, [2])
    for more, tokens in (([], encoder.tokens(x)), (["--block", 2], second)):
        run_mode(encoder_folder, tmp_path, "--mode", "features", "--input", folder, *more)
        content = np.load(*tmp_path.glob(f"features-*{'-block2' if more else '[!2]'}.npz"))
        assert list(content["files"]) == ["0.png", "1.png", "2.png"] and "labels" not in content
        assert np.allclose(content["class_token"], tokens[:, 0], atol=1e-5)
        assert np.allclose(content["patch_mean"], tokens[:, 1:].mean(1), atol=1e-5)


@pytest.mark.parametrize("mode", ["linear", "fewshot"])
def test_predict_gives_the_tested_answers(encoder_folder, tmp_path, mode):
    root = class_folder(tmp_path / "data", 12, 12)
    options = ["--labels", "8 per class"]
    if mode == "linear":
        options = ["--epochs", 30, "--cache-features"]
    entry, = run_mode(encoder_folder, tmp_path, "--mode", mode, "--data", root, *options,
                      "--img-size", "40")
    predict = ["--mode", "predict", "--classifier", tmp_path / f"classifier-{mode}.pt", "--input",
               root / "val"]
    run_mode(encoder_folder, tmp_path, *predict)            # at the size that it was trained at
    rows = rows_of(tmp_path / "predictions.csv")
    right = np.mean([row["class"] == row["file"].split("/")[0] for row in rows])
    assert len(rows) == 24 and 100 * right == pytest.approx(entry["top1"], abs=0.01)
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    run_mode(encoder_folder, tmp_path, *predict, "--all-probabilities")
    for row in rows_of(tmp_path / "predictions.csv"):
        every = {name: float(row[name]) for name in ("cat", "dog")}
        assert sum(every.values()) == pytest.approx(1, abs=2e-3)
        assert every[row["class"]] == max(every.values()) == float(row["probability"])
    run_mode(encoder_folder, tmp_path, *predict[:-1], root / "val" / rows[5]["file"])
    one, = rows_of(tmp_path / "predictions.csv")
    assert (one["class"], one["probability"]) == (rows[5]["class"], rows[5]["probability"])


def test_predict_refuses_another_encoder_and_broken_classifiers(encoder_folder, tmp_path,
                                                                monkeypatch):
    root = class_folder(tmp_path / "data", 3, 3)
    run_mode(encoder_folder, tmp_path, "--mode", "fewshot", "--labels", "2 per class", "--data",
             root)
    torch.manual_seed(5)
    other, path = tmp_path / "other.pt", tmp_path / "classifier-fewshot.pt"
    checkpoint.save(checkpoint.encoder_file(VisionTransformer(32, 8, 3, 32, 3, 2), {}), other)
    predict = ["--mode", "predict", "--classifier", path, "--input", root]
    with pytest.raises(run.UsageError, match="another encoder"):
        run_mode(other, tmp_path, *predict)
    content = checkpoint.read(path)                         # the encoder lies elsewhere by now
    checkpoint.save(content | dict(checkpoint=str(tmp_path / "gone")), path)
    shutil.copytree(encoder_folder, tmp_path / "out/graft")
    monkeypatch.chdir(tmp_path)
    run_mode("out/graft", tmp_path, *predict)
    with pytest.raises(checkpoint.CheckpointError, match="gone"):
        evaluate.main(evaluate.get_args([str(x) for x in (*predict, "--out", tmp_path, *QUIET)]))
    content = checkpoint.read(path)
    for value in (math.nan, math.inf, 1e38):
        content["classifier"]["weight"][0, 0] = value
        checkpoint.save(content, path)
        with pytest.raises(checkpoint.CheckpointError, match="not a finite number"):
            run_mode(encoder_folder, tmp_path, *predict)


# ------------------------------------------------------------------------------ several processes
def every_mode(encoder_folder, root, clean, out, parts):
    """One result of each protocol, features and predictions; fine-tuning in parts of a batch."""
    for options in (["linear", "--epochs", 2, "--batch-size", 9, "--no-cache-features"],
                    ["knn", "--k", 3], ["fewshot", "--labels", "3 per class"], ["features"],
                    ["predict", "--classifier", out / "classifier-fewshot.pt", "--input", root]):
        run_mode(encoder_folder, out, "--mode", *options, "--data", root, "--max-bad", 0.2)
    still = ["--warmup-epochs", 0, "--drop-path", 0, "--mixup", 0, "--cutmix", 0]
    options = ["--checkpoint", encoder_folder, "--out", out, *QUIET, "--data", clean,
               "--batch-size", 9, "--epochs", 4, "--lr", 1e-2, "--micro-batch", parts, *still]
    finetune.main(finetune.get_args([str(option) for option in options]))


def test_three_processes_give_the_result_of_one(start, encoder_folder, tmp_path):
    """Of 2 images to test on one has none; of 12 to label, 4 each; each is counted once."""
    root, clean = (class_folder(tmp_path / name, 5, 1, sizes=2) for name in ("data", "clean"))
    corrupt(root / "train/cat/1.png")
    one, three = tmp_path / "one", tmp_path / "three"
    every_mode(encoder_folder, root, clean, one, 9)
    job = start(every_mode, encoder_folder, root, clean, three, 2, processes=3)
    assert job.codes() == [0] * 3, job.said()
    assert job.said().count("wrote ") == 5              # by the first process alone
    found, written, logits = [], [], []
    for out in (one, three):
        with open(out / "results.jsonl") as f:
            found.append([json.loads(line) | dict(seconds=0, commit="") for line in f])
        content = features_in(out)
        rows = {row["file"]: row for row in rows_of(out / "predictions.csv")}
        answers = {name: row["class"] for name, row in rows.items()}
        written.append((content["class_token"], content["readable"].tolist(), answers))
        unread = rows["train/cat/1.png"]
        assert unread | {"file": ""} == {"file": "", "class": "", "probability": "unreadable"}
        bad = [str(name).endswith("cat/1.png") for name in content["files"]]
        assert (content["readable"] == ~np.array(bad)).all()
        assert (content["class_token"][bad] == 0).all()
        net, content = checkpoint.load_classifier(str(out))
        images = data.load(str(clean))
        logits.append(run.extract(net, images, run.Env(torch.device("cpu")), mean=content["mean"],
                                  std=content["std"], function=lambda net, x: net(x))[0])
    assert found[0] == found[1] and len(found[0]) == 4
    assert found[0][0]["unreadable"] == 1 and {entry["tested"] for entry in found[0]} == {2}
    assert np.allclose(written[0][0], written[1][0], atol=1e-5)
    assert written[0][1:] == written[1][1:] and written[0][1].count(False) == 1
    assert (logits[0].std(0) > 1e-3).all()              # it tells images apart
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------- the command line
def test_finetune_and_probe_from_the_command_line(capsys, monkeypatch):
    hand = evaluate.handed_on
    assert hand(["--mode", "finetune", "--lr", "1"]) == ["--lr", "1"]
    assert hand(["--lr", "1"]) is None
    for block in (["--block", "6"], ["--block=6"]):
        expected = ["--blocks", "2", "--probe-block", "6"]
        assert hand(["--mode=probe", *block, "--blocks", "2"]) == expected
    with pytest.raises(SystemExit) as stop:
        hand(["--mode", "probe", "--blocks", "1"])
    assert stop.value.code == 2 and "--mode probe needs --block" in capsys.readouterr().err
    called = []
    monkeypatch.setattr(os, "execv", lambda program, argv: called.append(argv) or exit(3))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--mode", "finetune", "--epochs", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(evaluate.__file__, run_name="__main__")
    assert called == [[sys.executable, finetune.__file__, "--epochs", "1"]]
