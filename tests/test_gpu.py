"""What a GPU computes is what a CPU computes, and no step waits for it. Skipped without one."""
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

import augment
import data
import graft_train
import mae_pretrain
import model
import run
from conftest import assert_identical, log_of, saved

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
VIT = dict(img_size=[32, 32], patch_size=8, in_chans=3, dim=24, depth=3, heads=3, mlp_ratio=4.0)
SHORT = ["--arch", "vit_test", "--init", "none", "--batch-size", "16", "--compile", "off"]


def loss_and_gradients(net, x1, x2, micro_batch, mim, device):
    net = copy.deepcopy(net).to(device)
    images, noise, ratio = mim
    mim = images.to(device), noise.to(device), ratio
    loss, _ = net(x1.to(device), x2.to(device), micro_batch, mim)
    loss.backward()
    return [loss.detach().cpu(), *(p.grad.cpu() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", [model.MoCoV3, model.VICReg, model.SimCLR])
def test_loss_and_gradients_are_those_of_the_cpu(kind):
    torch.manual_seed(0)
    net = kind(model.MaskedAutoencoder(16, 2, 2, **VIT), 16, 8, mim_weight=0.1).double()
    x1, x2, images = torch.randn(3, 8, 3, 32, 32, dtype=torch.float64)
    mim = images, torch.rand(8, 16, dtype=torch.float64), 0.75
    expected = loss_and_gradients(net, x1, x2, 0, mim, "cpu")
    for micro_batch in (0, 3):
        found = loss_and_gradients(net, x1, x2, micro_batch, mim, "cuda")
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", [32, 224])
def test_views_are_those_of_the_cpu(side):
    """Where TF32 is allowed, as in a run: a view's products are not made in it."""
    run.setup(SimpleNamespace(device="auto"))
    assert torch.backends.cuda.matmul.allow_tf32
    views = [augment.MAE_VIEW, augment.TEST_VIEW, *(
        view | dict(solarise=0.0) for view in augment.MOCO_VIEWS)]      # solarise has a threshold
    images, found = data.draw(torch.arange(16), side * 8 // 7), {}
    for device in ("cpu", "cuda"):
        held = data.Dataset(images=images.clone(), name="drawn").hold(torch.device(device))
        batch = next(data.Loader(held, views, (side, side), 16, device=device).epoch(0))
        found[device] = [*(batch.view(k).cpu() for k in range(4)), batch.noise(64).cpu()]
    for ours, theirs in zip(*found.values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage, more", [
    (mae_pretrain, []), (graft_train, ["--hidden-dim", "32"]),
    (graft_train, ["--hidden-dim", "32", "--mim-weight", "1", "--micro-batch", "8"])])
def test_no_step_waits_for_the_gpu(world, tmp_path, monkeypatch, stage, more):
    """Between two lines of the log: at a line all wait."""
    steps, mode = run.Job.steps, torch.cuda.set_sync_debug_mode

    def watched(job):
        for k, (step, batch) in enumerate(steps(job)):
            if k == 2:
                mode("warn")
            yield step, batch
            if k == 4:
                mode("default")

    monkeypatch.setattr(run.Job, "steps", watched)
    options = [*SHORT, *more, "--epochs", "1", "--log-every", "96", "--out", str(tmp_path)]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        stage.main(stage.get_args(options))
    waits = [str(w.message) for w in found if "called a synchronizing" in str(w.message)]
    assert len(log_of(tmp_path)) == 1 and not waits, waits


def test_a_deterministic_run_gives_the_same_bits(world, tmp_path):
    for out in ("one", "two"):
        options = [*SHORT, "--epochs", "1", "--deterministic", "--out", str(tmp_path / out)]
        mae_pretrain.main(mae_pretrain.get_args(options))
    one, two = (saved(tmp_path / out)["model"] for out in ("one", "two"))
    assert_identical(one, two)
