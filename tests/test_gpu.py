"""What can be known about a GPU without one: on fake tensors, which have a device and a shape and no numbers, PyTorch
refuses to mix devices, and to look at a number, for which a real GPU would be waited for"""
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from partal_nb.config import RunConfig
from partal_nb.data.arrays import Arrays, unit_rgb
from partal_nb.dev.network_speed import NYU
from partal_nb.losses import total_loss
from partal_nb.metrics import meter
from partal_nb.model.padnet import make_model
from partal_nb.tasks import standard_task
from partal_nb.training.augment import AUGMENTS, augment
from partal_nb.training.evaluate import image_error
from partal_nb.training.hooks import image_losses, move_average, ranking_loss
from partal_nb.training.trainer import DevicePool, pick_injected, training_loss
from partal_nb.uncertainty.maps import QUANTITIES, entropy_maps
from partal_nb.uncertainty.passes import ESTIMATORS

ROOT = Path(__file__).parents[1]
CUDA = torch.device('cuda')
FIVE = (*NYU, *map(standard_task, ('saliency', 'edges')))
SMALL = dict(encoder='test_efficientnet', pretrained=False, features=16, height=64, width=64)

def fake(**kw): return FakeTensorMode(allow_non_fake_inputs=True, **kw)

def network(tasks=FIVE, **changes):
    "A network, made on the CPU before fake tensors are switched on"
    return make_model(RunConfig(**SMALL, **changes), tasks)

def batch(tasks=FIVE, B=4, device='cuda'):
    shape = lambda t: (B, t.label_channels, 64, 64)
    labels = {t.name: torch.ones(shape(t), dtype=getattr(torch, t.form.tensor), device=device) for t in tasks}
    return torch.rand(B, 3, 64, 64, device=device), labels

def devices(*tensors): return {t.device.type for t in tensors}

def test_the_guard_sees_a_mix_and_a_wait():
    with fake():
        x = torch.ones(2, device='cuda')
        with pytest.raises(RuntimeError, match='at least two devices|two different devices'): x + torch.ones(2)
        with pytest.raises(DataDependentOutputException): x.sum().item()

@pytest.mark.parametrize('changes', [{}, dict(strategy='learning_loss'), dict(dropout_at='all', message='features'),
                                     dict(estimator='masksembles'), dict(dropout_kind='channel')], ids=str)
def test_a_training_step_stays_on_the_card(changes):
    net = network(**changes).train()
    with fake():
        net.to(CUDA)
        x, labels = batch()
        inject = pick_injected(FIVE, labels, .5, np.ones((4, 5), bool))
        out, loss = training_loss(net, x, labels, FIVE, inject)
        if net.loss_head: loss = loss + ranking_loss(out.predicted_loss, image_losses(FIVE, out, labels))
        assert devices(loss, *inject.values(), *out.guess.values(), *out.final.values()) == {'cuda'}
        assert loss.dtype == torch.float32 and loss.requires_grad

def test_losses_in_both_precisions():
    with fake():
        _, labels = batch()
        for dtype in (torch.float32, torch.bfloat16):
            raw = {t.name: torch.rand(4, t.channels, 16, 16, device='cuda', dtype=dtype) for t in FIVE}
            loss, each = total_loss(FIVE, raw, raw, labels)
            assert devices(loss, *each.values()) == {'cuda'} and loss.dtype == torch.float32

@pytest.mark.parametrize('name', AUGMENTS)
def test_augmentation_stays_on_the_card(name):
    with fake():
        rgb, labels = torch.zeros(4, 3, 64, 64, dtype=torch.uint8, device='cuda'), batch()[1]
        for seed in range(3):
            x, moved = augment(rgb, labels, FIVE, name, seed)
            assert devices(x, *moved.values()) == {'cuda'}

def test_a_pool_on_the_card_and_averaged_weights():
    size = lambda t: np.ones((6, 64, 64, t.label_channels), t.form.cached)
    arrays = Arrays(tuple('abcdef'), FIVE, np.zeros((6, 64, 64, 3), np.uint8), {t.name: size(t) for t in FIVE},
                    np.ones((6, 5), bool))
    net = network()
    with fake():
        pool = DevicePool(arrays, np.array([1, 3, 5]), CUDA)
        rgb, labels = pool.batch(np.array([5, 1]), np.ones((2, 5), bool))
        assert devices(rgb, unit_rgb(rgb), *labels.values()) == {'cuda'} and rgb.shape == (2, 3, 64, 64)
        state = net.to(CUDA).state_dict()
        move_average({k: v.clone() for k, v in state.items()}, state, .9)

@pytest.mark.parametrize("measure", QUANTITIES)
@pytest.mark.parametrize('name', ESTIMATORS)
def test_scoring_does_not_wait(name, measure):
    "Whatever the estimator, injected labels included; numbers are looked at when all batches are done"
    models = [network(estimator=name) for _ in range(2 if name in ('ensemble', 'snapshots') else 1)]
    with fake():
        for m in models: m.to(CUDA)
        x, labels = batch()
        maps = entropy_maps(models, x, 3, labels, name, measure)
        assert devices(*maps.values()) == {'cuda'} and {m.dtype for m in maps.values()} == {torch.float32}

@pytest.mark.parametrize('task', [t for t in FIVE if t.metric in ('rmse', 'angle', 'max_iou')], ids=lambda t: t.name)
def test_metrics_stay_on_the_card(task):
    "They wait for how many pixels are labeled, which a shape environment allows; edges are matched on the CPU"
    with fake(shape_env=ShapeEnv()):
        target = batch((task,))[1][task.name]
        assert devices(image_error(task, torch.rand(4, task.channels, 16, 16, device='cuda'), target)) == {'cuda'}
        valid = (target != task.ignore).any(1, keepdim=True)
        up = torch.rand(4, task.channels, 64, 64, device='cuda')
        assert devices(meter(task).sums(up, target, valid)) == {'cuda'}

# A package that is only on the path, as on a machine that code is carried to

def test_a_package_without_metadata(tmp_path):
    (tmp_path/'partal_nb').symlink_to(ROOT/'partal_nb')
    code = ("import importlib.metadata as m; own = m.version\n"
            "def version(name):\n    if name == 'partal_nb': raise m.PackageNotFoundError(name)\n    return own(name)\n"
            "m.version = version\n"
            "from partal_nb.runs.checks import about_machine\n"
            "print(about_machine('cpu')['versions']['partal_nb'])")
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == re.search(r'"(.+)"', (ROOT/'partal_nb/__init__.py').read_text())[1], done.stderr
