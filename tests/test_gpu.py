"""What can be known about a GPU without one: on fake tensors, which have a device and a shape and no numbers, PyTorch
refuses to mix devices, and to look at a number, for which a real GPU would be waited for"""
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import partal_nb
from partal_nb.annotate.ask import _query, expected_minutes
from partal_nb.config import RunConfig
from partal_nb.data.arrays import Arrays, unit_rgb
from partal_nb.dev.network_speed import NYU
from partal_nb.explore.run import network_output
from partal_nb.losses import total_loss
from partal_nb.metrics import meter
from partal_nb.model.padnet import make_model
from partal_nb.runs.checks import code_version
from partal_nb.runs.pictures import prediction_tiles
from partal_nb.tasks import standard_task
from partal_nb.training.augment import AUGMENTS, augment
from partal_nb.training.evaluate import image_error
from partal_nb.training.hooks import image_losses, move_average, predicted_labels, ranking_loss
from partal_nb.training.trainer import DevicePool, pick_injected, training_loss
from partal_nb.uncertainty.acquisition import Acquisition
from partal_nb.uncertainty.maps import QUANTITIES, _load, entropy_maps
from partal_nb.uncertainty.passes import ESTIMATORS
from partal_nb.uncertainty.quality import uncertainty_quality

ROOT = Path(__file__).parents[1]
CUDA = torch.device('cuda')
FIVE = (*NYU, *map(standard_task, ('saliency', 'edges')))
SMALL = dict(encoder='test_efficientnet', pretrained=False, features=16, height=64, width=64)

def fake(**kw): return FakeTensorMode(allow_non_fake_inputs=True, **kw)

class Watched(TorchDispatchMode):
    "What is called, by name, and copies from and to the CPU that wait for all a GPU was asked before"
    def __init__(self):
        super().__init__()
        self.called, self.blocking, self.fetched = set(), [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        self.called.add(name)
        if name in ('_to_copy', 'copy_'):
            source = args[0] if name == '_to_copy' else args[1]
            waits = not (kwargs or {}).get('non_blocking', name == 'copy_' and len(args) > 2 and args[2])
            way = source.device.type, out.device.type
            if waits and way == ('cpu', 'cuda'): self.blocking.append(tuple(out.shape))
            if waits and way == ('cuda', 'cpu'): self.fetched.append(tuple(out.shape))
        return out

def network(tasks=FIVE, rank_losses=False, **changes):
    "A network, made on the CPU before fake tensors are switched on"
    return make_model(RunConfig(**SMALL | changes), tasks, rank_losses)

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
        with Watched() as seen:
            torch.ones(3).to('cuda', non_blocking=True)
            assert not seen.blocking
            torch.ones(4).to('cuda')
            torch.zeros(5, device='cuda').copy_(torch.ones(5))
            torch.tensor([1.]*6, device='cuda')
            torch.as_tensor(np.ones(7), device='cuda')
            x.to('cpu', non_blocking=True)
            assert not seen.fetched
            x.cpu()
        assert (seen.blocking, seen.fetched) == ([(4,), (5,), (6,), (7,)], [(2,)])
        assert {'_to_copy', 'copy_'} <= seen.called

@pytest.mark.parametrize('changes', [{}, dict(rank_losses=True), dict(dropout_at='all', message='features'),
                                     dict(estimator='masksembles'), dict(dropout_kind='channel')], ids=str)
def test_a_training_step_stays_on_the_card(changes):
    net = network(**changes).train()
    with fake():
        net.to(CUDA)
        x, labels = batch()
        with Watched() as seen:
            inject = pick_injected(FIVE, labels, .5, np.ones((4, 5), bool))
            out, loss = training_loss(net, x, labels, FIVE, inject)
            if net.loss_head: loss = loss + ranking_loss(out.predicted_loss, image_losses(FIVE, out, labels))
        assert not seen.blocking
        assert devices(loss, *inject.values(), *out.guess.values(), *out.final.values()) == {'cuda'}
        assert loss.dtype == torch.float32 and loss.requires_grad

# What PyTorch refuses on a GPU where deterministic algorithms are asked for: the list in the documentation of
# `torch.use_deterministic_algorithms`, by the names of what is called
REFUSED = re.compile(
    'upsample_.*linear.*_backward|upsample_bicubic.*_backward|adaptive_.*_backward|avg_pool3d_backward'
    '|reflection_pad.*_backward|grid_sampler.*_backward|nll_loss|ctc_loss|put_$|histc|bincount|median|kthvalue'
    '|fractional|unpool|embedding_bag')

@contextmanager
def deterministic(on):
    torch.use_deterministic_algorithms(on)
    try: yield
    finally: torch.use_deterministic_algorithms(False)

@pytest.mark.parametrize('encoder', ['lite0', 'hrnet_w18_small_v2'])
def test_what_a_deterministic_step_calls(encoder):
    "Nothing that is refused; without being asked it does, so that the list sees something. `meta` can go backward, too"
    net = network(encoder=encoder).train().to('meta')
    x, labels = batch(device='meta')
    inject = pick_injected(FIVE, labels, .5)
    found = {}
    for on in (False, True):
        with deterministic(on), Watched() as seen: training_loss(net, x, labels, FIVE, inject)[1].backward()
        found[on] = {name for name in seen.called if REFUSED.match(name)}
    assert found == {False: {'upsample_bilinear2d_backward'}, True: set()}

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
            with Watched() as seen: x, moved = augment(rgb, labels, FIVE, name, seed)
            assert devices(x, *moved.values()) == {'cuda'} and not seen.blocking

def stored():
    "A pool of six images"
    size = lambda t: np.ones((6, 64, 64, t.label_channels), t.form.cached)
    return Arrays(tuple('abcdef'), FIVE, np.zeros((6, 64, 64, 3), np.uint8), {t.name: size(t) for t in FIVE},
                  np.ones((6, 5), bool))

def test_a_pool_on_the_card_and_averaged_weights():
    arrays, net = stored(), network()
    with fake():
        pool = DevicePool(arrays, np.array([1, 3, 5]), CUDA)
        with Watched() as seen: rgb, labels = pool.batch(np.array([5, 1]), np.ones((2, 5), bool))
        assert not seen.blocking
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

def test_what_is_scored_goes_to_the_card_without_a_wait():
    "Images, and the labels that are injected; the same where a network makes pseudo-labels"
    arrays, net = stored(), network()
    with fake():
        net.to(CUDA)
        with Watched() as seen:
            at, x, inject = _load(arrays, np.array([2, 4]), arrays.available[[2, 4]], CUDA)
            predicted_labels(net, arrays, np.arange(6), arrays.available, 2)
        assert not seen.blocking
        assert len(seen.fetched) == len(FIVE) # once a task, when all is predicted
        assert devices(x, *inject.values()) == {'cuda'} and at.tolist() == [2, 4] and x.shape == (2, 3, 64, 64)

def test_the_quality_of_uncertainty_waits_once(monkeypatch):
    "When all batches are asked for, however many they are"
    arrays, net, waits, found = stored(), network(), [], []
    monkeypatch.setattr('torch.cuda.synchronize', waits.append)
    monkeypatch.setattr('partal_nb.training.evaluate.prefetch', iter) # fake tensors are of this thread
    monkeypatch.setattr('partal_nb.uncertainty.quality.order_quality', lambda *maps: found.append(maps))
    with fake():
        net.to(CUDA)
        with Watched() as seen: uncertainty_quality(net, arrays, 2, 0, batch_size=2)
    assert not seen.blocking and not seen.fetched and [d.type for d in waits] == ['cuda']
    assert [tuple(v.shape) for maps in found for v in maps] == [(6, 64, 64)]*10 and devices(*sum(found, ())) == {'cpu'}

def ask_quality(net, arrays): uncertainty_quality(net, arrays, 2, 0)
def ask_picture(net, arrays): prediction_tiles(net, arrays, [0], 2)
def ask_explorer(net, arrays):
    network_output([net], Acquisition(), unit_rgb(arrays.batch(np.arange(1))[0]), None)
def ask_query(net, arrays):
    p = SimpleNamespace(config=RunConfig(**SMALL))
    _query(p, FIVE[0], dict(image='a', score=1.), arrays.rgb[0], arrays, net)
def ask_time(net, arrays):
    expected_minutes(SimpleNamespace(config=RunConfig(**SMALL)), net, arrays, arrays.available)

@pytest.mark.parametrize('ask', [ask_quality, ask_picture, ask_explorer, ask_query, ask_time])
def test_whoever_asks_a_network_does_it_in_its_precision(ask):
    "Else a prediction in fp32 is shown beside maps in bf16. Asked on a CPU, where bf16 has to be wished for"
    net = network(precision='bf16').eval()
    found = []
    net.encoder.net.register_forward_pre_hook(lambda *_: found.append(torch.is_autocast_enabled('cpu')))
    ask(net, stored())
    assert len(found) >= 2 and all(found)

METERED = [*FIVE, standard_task('parts'), standard_task('saliency', metric='maxf_of_means')]

@pytest.mark.parametrize('task', METERED, ids=lambda t: t.metric)
def test_metrics_do_not_wait(task):
    "Nor does the meter of edges, whose maps stay on the card until the numbers are asked for"
    with fake():
        target = batch((task,))[1][task.name]
        raw = torch.rand(4, task.channels, 16, 16, device='cuda')
        m = meter(task)
        with Watched() as seen:
            for _ in range(2): m.update(raw, target)
        assert not seen.blocking
        assert devices(m.state, image_error(task, raw, target), *getattr(m, 'later', [])) == {'cuda'}

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

def test_code_that_was_carried_without_its_repository(tmp_path, monkeypatch):
    "A `git` that stands in for it knows the commit and nothing else; another repository's commit is not ours"
    for says, expected in (('', 'ab12'), ('rev-parse) echo .git; exit 0;;', f'version {partal_nb.__version__}')):
        (tmp_path/'git').write_text(f'#!/bin/sh\ncase $1 in describe) echo ab12; exit 0;; {says} esac\nexit 128\n')
        (tmp_path/'git').chmod(0o755)
        monkeypatch.setenv('PATH', f'{tmp_path}:/bin')
        assert code_version() == expected
