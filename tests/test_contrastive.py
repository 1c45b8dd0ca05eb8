"""The contrastive models of model.py: formulas, micro-batches, and two processes against one."""
import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import model
from test_model import (EXACT, SYSTEMS, assert_same, contrastive, gradients, rand, vit, vit_names)



def head_names(prefix, linear, norm, plain_norm):
    names = {f"{prefix}.{i}.weight" for i in linear + norm} | {f"{prefix}.{i}.bias" for i in norm}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return names | {f"{prefix}.{i}.{buffer}" for i in norm + plain_norm for buffer in buffers}


def test_moco_state_names_are_the_official_ones():
    head = head_names("head", (0, 3, 6), (1, 4), (7,))
    names = vit_names(3) | head
    expected = {f"{net}.{name}" for net in ("base_encoder", "momentum_encoder") for name in names}
    expected |= head_names("predictor", (0, 3), (1,), (4,))
    assert set(contrastive("moco").state_dict()) == expected


def head_by_hand(head, x):
    """A head of MoCo v3 with torch's batch normalisation, in training mode."""
    for layer in head:
        if isinstance(layer, nn.BatchNorm1d):
            x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
        else:
            x = F.relu(x) if isinstance(layer, nn.ReLU) else F.linear(x, layer.weight, layer.bias)
    return x


def test_moco_equals_its_formula_and_no_gradient_reaches_the_keys():
    net, x1, x2 = contrastive("moco"), rand(6, 3, 16, 16), rand(6, 3, 16, 16, seed=1)
    assert not torch.equal(net.momentum_encoder.cls_token, net.base_encoder.cls_token)
    loss = net(x1, x2)[0]
    loss.backward()
    assert all(p.grad is None for p in net.momentum_encoder.parameters())
    ours = gradients(net)
    net.zero_grad()
    q, k = [], []
    for x in (x1, x2):
        z = head_by_hand(net.base_encoder.head, net.base_encoder.forward_features(x))
        q.append(head_by_hand(net.predictor, z))
        features = net.momentum_encoder.forward_features(x)
        k.append(head_by_hand(net.momentum_encoder.head, features).detach())
    expected = 0.0
    for a, b in ((q[0], k[1]), (q[1], k[0])):
        similarity = F.cosine_similarity(a[:, None], b[None], dim=-1) / net.temperature
        expected = expected - 2 * net.temperature * similarity.log_softmax(1).diagonal().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, **EXACT)
    assert_same(ours, gradients(net))


def test_momentum_update():
    net = contrastive("moco")
    before = copy.deepcopy(net.state_dict())
    net.update_momentum(0.9)
    after = net.state_dict()
    for name in after:
        expected = before[name]
        parameter = "running_" not in name and "num_batches" not in name
        if name.startswith("momentum_encoder.") and parameter:
            base = before[name.replace("momentum_encoder", "base_encoder")]
            expected = 0.9 * before[name] + 0.1 * base
            torch.testing.assert_close(after[name], expected, **EXACT)
        else:
            assert torch.equal(after[name], expected), name
    # weights that are equal stay equal to the last bit
    net = model.MoCoV3(vit(torch.float32), 32, 16)
    for m in (0.99, 0.9973, 0.3, 1.0):
        net.update_momentum(m)
    for name, p in net.momentum_encoder.named_parameters():
        assert torch.equal(p, dict(net.base_encoder.named_parameters())[name]), name


@pytest.mark.parametrize("system, mim", [("moco", True), ("vicreg", False), ("simclr", False)])
def test_the_loss_of_a_fixed_batch_falls(system, mim):
    net = contrastive(system, mim, torch.float32)
    views = [rand(8, 3, 16, 16, seed=s, dtype=torch.float32) for s in (1, 2, 3)]
    noise = rand(8, 16, seed=4, dtype=torch.float32).sigmoid()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-3)
    logs = []
    for _ in range(30):
        net.update_momentum(0.9)
        loss, log = net(views[0], views[1], mim=(views[2], noise, 0.75) if mim else None)
        logs.append(log | dict(loss=loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for key in ("loss", "contrastive", "mim") if mim else ("loss",):
        assert logs[-1][key] < 0.7 * logs[0][key], (key, logs[0][key], logs[-1][key])


# ------------------------------------------------------------------------------------ micro-batches
BATCH = 6
CASES = list(itertools.product(SYSTEMS, (False, True), (False, True)))      # system, MTL, anchored


def one_step(case, part=slice(None), micro=0, wrap=lambda net: net):
    """Loss, gradients and state after a step of SGD and a momentum update, on part of a batch."""
    system, mim, anchor = case
    net = contrastive(system, mim)
    wrapped = wrap(net)
    views = [rand(BATCH, 3, 16, 16, seed=s)[part] for s in (1, 2, 3)]
    noise = rand(BATCH, 16, seed=4).sigmoid()[part]
    loss, _ = wrapped(views[0], views[1], micro, (views[2], noise, 0.75) if mim else None)
    if anchor:
        lower = [p for name, p in net.base_encoder.named_parameters()
                 if model.layer_of(name, 3) <= 2 and p.requires_grad]
        start = [rand(*p.shape, seed=5) for p in lower]
        l1, l2 = (model.anchor_penalty(lower, start, norm) for norm in ("l1", "l2"))
        loss = loss + 0.01 * l1 + 0.02 * l2
    loss.backward()
    grads = gradients(net)
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
    net.update_momentum(0.9)
    return {"loss": loss.detach()}, grads, net.state_dict()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_micro_batches_equal_the_undivided_step(case):
    whole = one_step(case)
    assert any("running_mean" in name for name in whole[2])
    for micro in (1, 4, 100):                                               # 4 does not divide 6
        for ours, expected in zip(one_step(case, micro=micro), whole):
            assert_same(ours, expected)


def test_micro_batches_keep_fewer_activations():
    """The bytes that autograd keeps for the encoder fall with the micro-batch."""
    def kept(micro):
        net, x = contrastive("simclr"), rand(32, 3, 16, 16)
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            f = model.class_tokens(net.base_encoder, x, x, micro)
        assert f[0].shape == (32, 24)
        return sum(sizes.values())
    assert kept(4) < 0.2 * kept(0)


# ------------------------------------------------------------------------------------ two processes
def normalised_batch(norm, part=slice(None)):
    """Outputs, input gradients and statistics of two training steps and one in evaluation mode."""
    x, upstream = 3 * rand(8, 5) + 1, rand(8, 5, seed=1)
    found = {}
    for i in range(2):
        leaf = (x[part] + i).requires_grad_()
        y = norm(leaf)
        y.backward(upstream[part])
        found |= {f"y{i}": y.detach(), f"x{i}": leaf.grad}
    norm.eval()
    found["eval"] = norm(x[part]).detach()
    return found, norm.state_dict()


def batchnorms():
    """Ours and torch's with the same weights, with and without affine."""
    for affine in (True, False):
        pair = [kind(5, affine=affine).double() for kind in (model.BatchNorm1d, nn.BatchNorm1d)]
        for norm in pair:
            if affine:
                norm.weight.data, norm.bias.data = rand(5, seed=2), rand(5, seed=3)
        yield pair


def two_views(norm, part=slice(None), apart=False):
    """As normalised_batch, of one step of two views, in one call or in two."""
    x, upstream = (3 * rand(2, 8, 5) + 1)[:, part].requires_grad_(), rand(2, 8, 5, seed=1)[:, part]
    y = torch.stack([norm(view) for view in x]) if apart else norm(x)
    y.backward(upstream)
    return dict(y=y.detach(), x=x.grad), norm.state_dict()


def far_away():
    """Rows whose mean is 10,000 standard deviations, in float32."""
    return rand(8, 5, dtype=torch.float32) + 1e4


def collectives_of_a_step(part):
    """What a step of MoCo v3 sends, apart from DDP's gradients."""
    sent = []

    def noting(name, call):
        return lambda *inputs: sent.append(name) or call(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather"):
            patch.setattr(dist, name, noting(name, getattr(dist, name)))
        one_step(("moco", False, False), part)
    return sent


def wrapped(net):
    return DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)


def in_a_process(rank, folder):
    """What each of two processes computes of its half of the batch, written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    half, found = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2), {}
    for case in CASES:
        for micro in (0, 2):                                            # 2 does not divide 3
            found[case, micro] = one_step(case, half, micro, wrapped)
    four = slice(rank * 4, rank * 4 + 4)
    found["norm"] = [normalised_batch(ours, four) for ours, _ in batchnorms()]
    found["views"] = two_views(model.BatchNorm1d(5).double(), four)
    norm = model.BatchNorm1d(5)
    found["far"] = norm(far_away()[four]).detach(), norm.running_var
    found["collectives"] = collectives_of_a_step(half)
    rows = rand(6, 2)[half]
    leaf = rows.clone().requires_grad_()
    weights = rand(6, 2, seed=10 + rank)
    (model.gather_with_grad(leaf) * weights).sum().backward()
    found["gather"] = model.gather(rows), leaf.grad
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("processes"))
    torch.multiprocessing.start_processes(in_a_process, (folder,), 2, start_method="forkserver")
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_equal_one_on_the_whole_batch(two_processes, case, micro):
    loss, grads, state = one_step(case)
    both = [found[case, micro] for found in two_processes]
    torch.testing.assert_close((both[0][0]["loss"] + both[1][0]["loss"]) / 2, loss["loss"], **EXACT)
    for _, ours, weights in both:
        assert_same(ours, grads)
        assert_same(weights, state)


def test_batchnorm_in_two_processes_is_torchs_on_the_whole_batch(two_processes):
    for i, (_, torchs) in enumerate(batchnorms()):
        expected, state = normalised_batch(torchs)
        halves = [found["norm"][i] for found in two_processes]
        assert_same({k: torch.cat([halves[0][0][k], halves[1][0][k]]) for k in expected}, expected)
        for _, ours in halves:
            assert_same(ours, state)


def test_two_views_in_one_batchnorm_are_two_calls(two_processes):
    expected, state = two_views(nn.BatchNorm1d(5).double(), apart=True)
    ours, own = two_views(model.BatchNorm1d(5).double())
    assert_same(ours, expected)
    assert_same(own, state)
    halves = [found["views"] for found in two_processes]
    assert_same({k: torch.cat([halves[0][0][k], halves[1][0][k]], 1) for k in expected}, expected)
    assert_same(halves[0][1], state)
    norm = model.BatchNorm1d(5).double().eval()
    x = rand(2, 8, 5)
    assert torch.equal(norm(x), torch.stack([norm(view) for view in x]))


def test_a_large_mean_costs_batchnorm_no_digits(two_processes):
    x = far_away().double()
    expected = F.batch_norm(x, None, None, training=True)
    y, var = two_processes[0]["far"]
    torch.testing.assert_close(y.double(), expected[:4], rtol=0, atol=2e-3)     # of the mean's 1e-3
    torch.testing.assert_close(var.double(), 0.9 + 0.1 * x.var(0), rtol=1e-4, atol=0)


def test_a_step_of_moco_sends_at_most_fifteen_messages(two_processes):
    sent = two_processes[0]["collectives"]
    assert sent.count("all_gather") == 1
    assert len(sent) == 1 + 8 + 5       # the keys; each BatchNorm forward; those that learn, back


def test_gathering(two_processes):
    rows, total = rand(6, 2), rand(6, 2, seed=10) + rand(6, 2, seed=11)
    for rank, found in enumerate(two_processes):
        gathered, grad = found["gather"]
        assert torch.equal(gathered, rows)                                  # in rank order
        torch.testing.assert_close(grad, total[3 * rank:3 * rank + 3], **EXACT)


def test_batchnorm_keeps_its_statistics_when_a_batch_is_not_finite():
    norm = model.BatchNorm1d(5)
    norm(rand(8, 5, dtype=torch.float32))
    before = copy.deepcopy(norm.state_dict())
    assert norm(torch.full((8, 5), float("nan"))).isnan().all()
    for name in ("running_mean", "running_var"):
        assert torch.equal(norm.state_dict()[name], before[name])
