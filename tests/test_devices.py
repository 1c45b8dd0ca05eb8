"""On a GPU no tensor of the CPU gets among those of the device.

Run on stand-ins that have a device, a type and a shape but no data (torch's fake tensors), so that
no GPU is needed to notice it. What draws on the CPU stays out.
"""
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import analyze
import augment
import data
import evaluate
import model

VIT = dict(img_size=[32, 32], patch_size=8, in_chans=3, dim=24, depth=3, heads=3, mlp_ratio=4.0)
GPU = torch.device("cuda", 0)


@pytest.fixture
def fake(monkeypatch):
    """Fake images, features, labels, numbers per image: on the GPU all but the last."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)            # there is none to pin
    # it looks at what it drew
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda weight, std: weight)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            torch.zeros(2, 3, device=GPU).uniform_() * torch.rand(2, 1, device=GPU)
        except RuntimeError as error:  # torch 2.6: asks the driver
            pytest.skip(f"no stand-ins for a GPU here: {str(error).splitlines()[0]}")
        yield SimpleNamespace(
            images=torch.rand(8, 3, 32, 32, device=GPU),
            files=torch.zeros(8, 3, 40, 48, dtype=torch.uint8, device=GPU),
            features=torch.rand(40, 24, device=GPU),
            labels=torch.zeros(40, dtype=torch.long, device=GPU), numbers=torch.rand(8, 4))


def on_gpu(build):
    with torch.device(GPU):
        return build()


def test_a_tensor_of_the_cpu_would_be_noticed(fake):
    with pytest.raises(RuntimeError, match="cuda:0.*cpu|cpu.*cuda:0"):
        fake.images + torch.rand(8, 3, 32, 32)


def masked_autoencoder(fake):
    net = on_gpu(lambda: model.MaskedAutoencoder(16, 2, 2, **VIT))
    return (*net(fake.images), *net.intermediate(fake.images),
            model.unpatchify(net.target(fake.images), 8, net.grid))


def two_views(kind, micro_batch):
    def found(fake):
        net = on_gpu(lambda: kind(model.MaskedAutoencoder(16, 2, 2, **VIT), 16, 8, mim_weight=0.1))
        mim = (fake.images, torch.rand(8, 16, device=GPU), 0.75)
        loss, log = net(fake.images, fake.images, micro_batch, mim)
        net.update_momentum(0.99)
        statistics = model.feature_stats(log["features"], log["q"], log["k"])
        return loss, *log.values(), *statistics.values()
    return found


def augmentations(fake):
    numbers, ids = fake.numbers.to(GPU)[:, :, None, None, None], torch.arange(8, device=GPU)
    crops = [augment.resample(fake.files, fake.numbers, (32, 32), mode)
             for mode in ("bilinear", "bicubic")]
    return (augment.blend_(fake.images, *numbers[:, :3].unbind(1)),
            augment.turn_hue_(fake.images, numbers[:, 3]),
            augment.color_jitter_(fake.images, ids, torch.rand(8, 13, device=GPU),
                                  [0, 0, 1, 1, 2, 3, 4, 4]),
            augment.gaussian_blur(fake.images, numbers[:, 0].flatten()), *crops)


def views_of_images_that_the_cpu_holds(fake):
    views = [augment.TEST_VIEW, *augment.MOCO_VIEWS]
    loader = data.Loader(data.Dataset(images=fake.files.cpu(), name=""), views, (32, 32), 8,
                         device=GPU)
    ids = torch.zeros(8, dtype=torch.long)
    batch = data.Batch(loader, ids, 0, ids, None)
    return [batch.view(0)]


def linear_sweep_and_nearest_neighbours(fake):
    found = [*model.knn_scores(fake.features, fake.features, fake.labels, 3, [2, 3])]
    for batchnorm in (False, True):
        sweep = evaluate.LinearSweep([0.1, 0.2], 24, 3, GPU, batchnorm, 0)
        sweep.step(fake.features, fake.labels, 0.5)
        found += [sweep.accuracies(fake.features, fake.labels), sweep.scores(fake.features, 0),
                  *sweep.classifier(1)]
    return found


def classifiers_and_attention(fake):
    heads = dict(kind="linear"), dict(kind="projector", width=16, bias=True)
    net = on_gpu(lambda: model.VisionTransformer(**VIT))
    weights = net.intermediate(fake.images, attention=True)[1]
    return (*(on_gpu(lambda: model.Classifier(VIT, head, 3, 0.1)).train()(fake.images)
              for head in heads),
            *(analyze.attention_distances(w, torch.rand(16, 16, device=GPU)) for w in weights))


@pytest.mark.parametrize("use", [
    masked_autoencoder, two_views(model.MoCoV3, 0), two_views(model.MoCoV3, 3),
    two_views(model.VICReg, 3), two_views(model.SimCLR, 3), augmentations,
    views_of_images_that_the_cpu_holds, linear_sweep_and_nearest_neighbours,
    classifiers_and_attention])
def test_all_is_on_the_device(fake, use):
    found = use(fake)
    assert found and all(x.device == GPU for x in found)
