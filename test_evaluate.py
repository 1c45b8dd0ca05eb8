"""Tests of evaluate.py and features.py: every protocol against a plain reference, files in and out, bad input."""
import csv
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import data
import evaluate
import features
from model import VisionTransformer

HERE = os.path.dirname(os.path.abspath(__file__))
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A folder with the encoder.pt of a random small ViT."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    net = VisionTransformer(32, 8, 3, 32, 3, 2)
    checkpoint.save(checkpoint.encoder_file(net, dict(system="random")), folder / "encoder.pt")
    return folder


@pytest.fixture
def small(monkeypatch):
    """The embedded set with 192 training and 96 test pictures."""
    full = data.embedded
    monkeypatch.setattr(data, "embedded", lambda train=True, in_chans=3, n=None: full(train, in_chans,
                                                                                      n or (192 if train else 96)))


def run_mode(encoder_folder, out, *options):
    args = evaluate.get_args(["--checkpoint", str(encoder_folder), "--out", str(out), "--amp", "off", *map(str, options)])
    return evaluate.main(args)


def picture_folder(root, classes=("cat", "dog"), n=6):
    """root/train and root/val with n PNGs a class, from the embedded set."""
    pictures = data.embedded(n=2 * n * len(classes))
    from PIL import Image
    number = 0
    for part in ("train", "val"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(pictures.images[number].permute(1, 2, 0).numpy()).save(root / part / name / f"{i}.png")
                number += 1
    return root


# ------------------------------------------------------------------------------------------------ linear
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
        norm = torch.nn.BatchNorm1d(dim, eps=1e-6, affine=False) if batchnorm else torch.nn.Identity()
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


def test_the_sweep_is_the_released_one():
    assert len(evaluate.SWEEP) == 35
    assert min(evaluate.SWEEP) == pytest.approx(1e-5) and max(evaluate.SWEEP) == pytest.approx(90)


@pytest.mark.parametrize("cache", ["--cache-features", "--no-cache-features"])
def test_linear_chooses_on_held_out_pictures_and_leaves_the_encoder(encoder_folder, small, tmp_path, cache):
    entry, = run_mode(encoder_folder, tmp_path, "--mode", "linear", "--epochs", "2", cache)
    assert entry["chosen_on"] == "19 held-out training pictures"
    assert entry["best_on_test"] >= entry["top1"] and entry["top5"] >= entry["top1"]
    assert ("cached" in entry["protocol"]) == (cache == "--cache-features")
    written = [json.loads(line) for line in open(tmp_path / "results.jsonl")]
    assert written == [entry]
    needed = {"protocol", "checkpoint", "digest", "data", "labels", "top1", "top5", "seed", "chosen_on", "commit", "system"}
    assert needed <= set(entry)


@pytest.mark.parametrize("norm", [[], ["--batchnorm"]])
def test_a_stopped_linear_evaluation_goes_on_to_the_same_result(encoder_folder, small, tmp_path, monkeypatch, norm, capsys):
    options = ["--mode", "linear", "--epochs", "3", "--no-cache-features", *norm]
    whole, = run_mode(encoder_folder, tmp_path / "whole", *options)
    step, taken = evaluate.LinearSweep.step, []

    def killed(self, x, labels, factor):
        taken.append(factor)
        if len(taken) == killed_at:
            raise KeyboardInterrupt
        return step(self, x, labels, factor)

    monkeypatch.setattr(evaluate.LinearSweep, "step", killed)
    killed_at = None
    run_mode(encoder_folder, tmp_path / "count", *options)
    every = list(taken)
    killed_at = 2 * len(every) // 3 + 1                                     # the first step of the third epoch
    taken.clear()
    with pytest.raises(KeyboardInterrupt):
        run_mode(encoder_folder, tmp_path / "parts", *options)
    kept, = (tmp_path / "parts").glob("linear-*.part.pt")
    killed_at = None
    taken.clear()
    parts, = run_mode(encoder_folder, tmp_path / "parts", *options)
    assert taken == every[-len(every) // 3:] and not kept.exists()
    for key in ("top1", "top5", "best_on_test", "held_out_top1", "lr"):
        assert parts[key] == whole[key], key
    ours, theirs = (torch.load(tmp_path / name / "classifier-linear.pt", weights_only=True)["classifier"]["weight"]
                    for name in ("parts", "whole"))
    assert torch.equal(ours, theirs)
    kept.write_bytes(b"half")                                               # a damaged one is left aside
    taken.clear()
    run_mode(encoder_folder, tmp_path / "parts", *options)
    assert taken == every and "starts over" in capsys.readouterr().out


def test_linear_learns_what_is_linear(encoder_folder, small, tmp_path, monkeypatch):
    """Features that are the label itself are classified without fault."""
    def features_of_labels(encoder, pictures, **how):
        return F.one_hot(pictures.labels, 16).float()
    monkeypatch.setattr(evaluate, "extract", features_of_labels)
    entry, = run_mode(encoder_folder, tmp_path, "--mode", "linear", "--epochs", "20", "--cache-features")
    assert entry["top1"] == 100


# --------------------------------------------------------------------------------------------------- k-NN
def test_knn_equals_a_loop():
    torch.manual_seed(0)
    queries, bank, labels = torch.randn(7, 5), torch.randn(30, 5), torch.randint(4, (30,))
    scores = features.knn_scores(queries, bank, labels, 4, k=6, chunk=3)
    for i in range(7):
        cos = F.cosine_similarity(queries[i][None], bank)
        expected = torch.zeros(4)
        for j in cos.argsort(descending=True)[:6]:
            expected[labels[j]] += math.exp(cos[j] / 0.07)
        assert torch.allclose(scores[i], expected, rtol=1e-4)
    several = features.knn_scores(queries, bank, labels, 4, k=[2, 6], chunk=4)
    assert torch.allclose(several[1], scores) and not torch.allclose(several[0], scores)


def test_knn_reports_every_k(encoder_folder, small, tmp_path):
    entry, = run_mode(encoder_folder, tmp_path, "--mode", "knn", "--k", "5,20")
    assert set(entry["by_k"]) == {"5", "20"} and entry["top1"] == round(entry["by_k"]["5"], 2)


# ------------------------------------------------------------------------------------------------ few-shot
def test_features_are_centred_and_normalised_by_row():
    x = evaluate.centre_and_normalise(torch.randn(6, 9) + 5)
    assert torch.allclose(x.mean(1), torch.zeros(6), atol=1e-6) and torch.allclose(x.norm(dim=1), torch.ones(6))


def test_logistic_regression_has_scikit_learns_optimum():
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    n, dim, classes = 300, 24, 7
    centres, labels = torch.randn(classes, dim), torch.arange(n) % classes
    x = evaluate.centre_and_normalise(centres[labels] * 0.4 + torch.randn(n, dim) + 2 * torch.randn(dim)).double()
    penalty = 2.5e-4 / n

    def objective(weight):
        return (F.cross_entropy(x @ weight.T, labels) + penalty / 2 * weight.square().sum()).item()

    weight = evaluate.logistic_regression(x.float(), labels, classes, penalty, tolerance=1e-8)
    theirs = linear_model.LogisticRegression(C=4000, fit_intercept=False, max_iter=20000, tol=1e-8)
    theirs.fit(x.numpy(), labels.numpy())
    theirs = torch.from_numpy(theirs.coef_)
    assert objective(weight) <= objective(theirs) * (1 + 1e-4)
    assert ((x @ weight.T).argmax(1) == (x @ theirs.T).argmax(1)).float().mean() > 0.99


def test_logistic_regression_gradient_is_zero_at_the_optimum():
    torch.manual_seed(1)
    x, labels = evaluate.centre_and_normalise(torch.randn(60, 10)), torch.arange(60) % 3
    weight = evaluate.logistic_regression(x, labels, 3, 1e-3, tolerance=1e-9).requires_grad_()
    loss = F.cross_entropy(x.double() @ weight.T, labels) + 1e-3 / 2 * weight.square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-8


def test_fewshot_over_seeds_and_the_table(encoder_folder, small, tmp_path, capsys):
    entries = run_mode(encoder_folder, tmp_path, "--mode", "fewshot", "--labels", "2 per class", "--seeds", "0,1,2")
    assert [e["seed"] for e in entries] == [0, 1, 2] and all(e["labelled"] == 32 for e in entries)
    evaluate.main(evaluate.get_args(["--table", "--out", str(tmp_path)]))
    last = capsys.readouterr().out.strip().split("\n")[-1]
    tops = [e["top1"] for e in entries]
    assert last == f"| random | {np.mean(tops):.1f} ± {np.std(tops, ddof=1):.1f} |"


# ------------------------------------------------------------------------------------------- several processes
def test_two_processes_give_the_result_of_one(encoder_folder, tmp_path):
    data_folder = picture_folder(tmp_path / "data", n=5)
    results = []
    for launcher in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                                        "--master_port", "29653"]):
        out = tmp_path / f"out{len(results)}"
        for options in (["linear", "--epochs", "2", "--batch-size", "8", "--no-cache-features"], ["knn", "--k", "3"],
                        ["fewshot", "--labels", "3 per class"]):
            subprocess.run([*launcher, "evaluate.py", "--mode", *options, "--checkpoint", str(encoder_folder), "--data",
                            str(data_folder), "--out", str(out), "--amp", "off", "--device", "cpu", "--workers", "0"],
                           cwd=HERE, env=os.environ | dict(OMP_NUM_THREADS="1"), check=True, capture_output=True)
        results.append([{k: v for k, v in json.loads(line).items() if k != "seconds"}
                        for line in open(out / "results.jsonl")])
    assert results[0] == results[1] and len(results[0]) == 3


# ----------------------------------------------------------------------------- features, prediction and export
def test_features_of_an_unlabelled_folder(encoder_folder, tmp_path):
    picture_folder(tmp_path / "data", n=3)
    run_mode(encoder_folder, tmp_path / "out", "--mode", "features", "--input", tmp_path / "data" / "val" / "cat")
    path, = (tmp_path / "out").glob("features-*.npz")
    content = np.load(path)
    assert list(content["files"]) == ["0.png", "1.png", "2.png"] and "labels" not in content
    encoder, _ = evaluate.load_encoder(str(encoder_folder), evaluate.get_args(["--checkpoint", str(encoder_folder)]), "cpu")
    pictures = data.into_memory(data.open_folder(str(tmp_path / "data" / "val" / "cat"), True, 3))
    batch = next(iter(data.Loader(pictures, [evaluate.augment.TEST_VIEW], (32, 32), 3, shuffle=False).epoch(0)))
    tokens = encoder.tokens(batch.views[0][:])
    assert np.allclose(content["class_token"], tokens[:, 0].numpy(), atol=1e-5)
    assert np.allclose(content["patch_mean"], tokens[:, 1:].mean(1).numpy(), atol=1e-5)


def test_features_of_a_block(encoder_folder, small, tmp_path):
    run_mode(encoder_folder, tmp_path, "--mode", "features", "--block", "2")
    content = np.load(next(tmp_path.glob("features-*.npz")))
    encoder, _ = evaluate.load_encoder(str(encoder_folder), evaluate.get_args(["--checkpoint", str(encoder_folder)]), "cpu")
    loader = data.Loader(data.embedded(), [evaluate.augment.TEST_VIEW], (32, 32), 8, shuffle=False)
    tokens, = encoder.intermediate(next(iter(loader.epoch(0))).views[0][:], [2])
    assert np.allclose(content["class_token"][:8], tokens[:, 0].numpy(), atol=1e-5)
    assert len(content["labels"]) == 192


@pytest.mark.parametrize("mode", ["linear", "fewshot"])
def test_predict_gives_the_training_answers_in_a_csv(encoder_folder, tmp_path, mode):
    root, out = picture_folder(tmp_path / "data", n=12), tmp_path / "out"
    options = ["--labels", "8 per class"] if mode == "fewshot" else ["--epochs", "30", "--cache-features"]
    entry, = run_mode(encoder_folder, out, "--mode", mode, "--data", root, "--workers", "0", *options)
    run_mode(encoder_folder, out, "--mode", "predict", "--classifier", out / f"classifier-{mode}.pt", "--input",
             root / "val", "--workers", "0")
    rows = list(csv.DictReader(open(out / "predictions.csv")))
    right = np.mean([row["class"] == row["file"].split("/")[0] for row in rows]) * 100
    assert len(rows) == 24 and right == pytest.approx(entry["top1"], abs=0.01)
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)


def test_predict_refuses_another_encoder(encoder_folder, small, tmp_path):
    run_mode(encoder_folder, tmp_path, "--mode", "fewshot", "--labels", "2 per class")
    torch.manual_seed(5)
    other = tmp_path / "other.pt"
    checkpoint.save(checkpoint.encoder_file(VisionTransformer(32, 8, 3, 32, 3, 2), {}), other)
    picture_folder(tmp_path / "data", n=1)
    with pytest.raises(data.UsageError, match="another encoder"):
        run_mode(other, tmp_path, "--mode", "predict", "--classifier", tmp_path / "classifier-fewshot.pt", "--input",
                 tmp_path / "data")


def test_export_to_timm(encoder_folder, tmp_path):
    timm = pytest.importorskip("timm")
    evaluate.main(evaluate.get_args(["--checkpoint", str(encoder_folder), "--export", "timm", str(tmp_path / "vit.pth")]))
    theirs = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    theirs.load_state_dict(torch.load(tmp_path / "vit.pth"), strict=True)
    encoder, _ = evaluate.load_encoder(str(encoder_folder), evaluate.get_args(["--checkpoint", str(encoder_folder)]), "cpu")
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(theirs.eval()(x), encoder(x), atol=1e-5)


def test_export_to_transformers(encoder_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    evaluate.main(evaluate.get_args(["--checkpoint", str(encoder_folder), "--export", "hf", str(tmp_path / "vit")]))
    theirs, loading = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False,
                                                            output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    encoder, _ = evaluate.load_encoder(str(encoder_folder), evaluate.get_args(["--checkpoint", str(encoder_folder)]), "cpu")
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(theirs.eval()(x).last_hidden_state, encoder.tokens(x), atol=1e-5)


# ----------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("options, message", [
    (["--labels", "500 per class"], "has only 12 pictures"),
    (["--labels", "nonsense"], "neither a share"),
    (["--labels", "0%"], "out of range"),
])
def test_bad_labels(encoder_folder, small, tmp_path, options, message):
    with pytest.raises(data.UsageError, match=message):
        run_mode(encoder_folder, tmp_path, "--mode", "fewshot", *options)
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("lines, message", [
    ("cat/0.png\ncat/9.png\n", "1 of 2 listed pictures do not exist, first cat/9.png"),
    ("cat/0.png\ncat/1.png\n", "one class only"),
    ("../../etc/passwd\n", "leads out of the data folder"),
    ("", "the list is empty"),
])
def test_bad_label_lists(encoder_folder, tmp_path, lines, message):
    root = picture_folder(tmp_path / "data", n=2)
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(data.UsageError, match=message):
        run_mode(encoder_folder, tmp_path / "out", "--mode", "fewshot", "--data", root, "--labels", tmp_path / "list.txt")


def test_one_class_only(encoder_folder, tmp_path):
    root = picture_folder(tmp_path / "data", classes=("cat",), n=2)
    with pytest.raises(data.UsageError, match="labels|class"):
        run_mode(encoder_folder, tmp_path / "out", "--mode", "knn", "--data", root)


@pytest.mark.parametrize("argv, message", [
    (["--mode", "linaer"], "invalid choice"), (["--checkpoint", "nowhere"], "no checkpoint nowhere"),
    (["--mode", "predict"], "needs --classifier"), (["--lr", "nan"], "out of range"), (["--epochs", "0"], "out of range"),
    (["--k", "0"], "out of range"), (["--export", "onnx", "x"], "timm or hf"), (["--seeds", "-1"], "out of range"),
])
def test_bad_arguments_end_in_one_line_and_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.get_args(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
