"Meters against torchmetrics and against plain NumPy written down a second time, over grids of cases"
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics.functional.classification as tm
from torchmetrics.functional.regression import mean_squared_error

from partal_nb.tasks import semseg_task, standard_task
from partal_nb.metrics import THRESHOLDS, meter, multi_task_delta

def resized(pred, size): return F.interpolate(pred, size, mode='bilinear', align_corners=False)

def batches(task, seed, sizes=((2, 24, 32), (3, 16, 16), (1, 9, 31)), void=.3, stride=4):
    "Batches of several sizes: raw outputs at a stride, labels with void pixels, one image all void"
    g = torch.Generator().manual_seed(seed)
    for n, (B, H, W) in enumerate(sizes):
        pred = 2*torch.randn(B, task.channels, -(-H//stride), -(-W//stride), generator=g)
        y = label_of(task, (B, task.label_channels, H, W), g)
        if task.form == 'distance': pred = pred + 4
        hole = torch.rand(B, 1, H, W, generator=g) < void
        if n == 0: hole[0] = True
        yield pred, torch.where(hole, torch.tensor(task.ignore).to(y.dtype), y)

def label_of(task, shape, g): # (B, C, H, W), at random
    if task.form == 'classes': return torch.randint(task.channels, shape, generator=g)
    if task.form == 'yes_no': return (torch.rand(shape, generator=g) < .3).float()
    if task.form == 'direction': return F.normalize(torch.randn(shape, generator=g), dim=1)
    return 1 + 9*torch.rand(shape, generator=g)

def computed(task, data):
    m = meter(task)
    for pred, y in data: m.update(pred, y)
    return m.compute()

@pytest.mark.parametrize('C,seed,void,stride', list(product((2, 7, 40), (0, 1), (0., .3, .9), (1, 4))))
def test_miou(C, seed, void, stride):
    task = semseg_task([f'c{c}' for c in range(C)])
    data = list(batches(task, seed, void=void, stride=stride))
    got = computed(task, data)
    p = torch.cat([resized(x, y.shape[-2:]).argmax(1).flatten() for x, y in data])
    y = torch.cat([y.flatten() for _, y in data])
    kw = dict(num_classes=C, ignore_index=255)
    each = tm.multiclass_jaccard_index(p, y, average='none', **kw)
    assert got['miou'] == pytest.approx(100*each.nan_to_num(0).mean().item(), abs=1e-3)
    present = tm.multiclass_jaccard_index(p, y, average='macro', **kw)
    right = tm.multiclass_accuracy(p, y, average='micro', **kw)
    assert got['miou_present'] == pytest.approx(100*present.item(), abs=1e-3)
    assert got['pixel_accuracy'] == pytest.approx(100*right.item(), abs=1e-3)

@pytest.mark.parametrize('absent', (1, 3))
def test_absent_classes(absent):
    "The mean over all classes is that over present ones, times their share"
    task = semseg_task('abcdefg')
    y = torch.randint(7 - absent, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    pred = torch.randn(2, 7, 8, 8, generator=torch.Generator().manual_seed(1))
    pred[:, 7 - absent:] = -99
    got = computed(task, [(pred, y)])
    assert got['miou'] == pytest.approx(got['miou_present']*(7 - absent)/7)

def test_parts_are_evaluated_on_people():
    parts, plain = standard_task('parts'), standard_task('parts', metric='miou')
    people = list(batches(parts, 0))
    empty = [(x, torch.where(y == 255, 255, 0)) for x, y in batches(parts, 1)]
    got = computed(parts, people + empty)
    assert got['parts_miou'] == computed(plain, people)['miou'] != computed(plain, people + empty)['miou']

@pytest.mark.parametrize('seed,void,stride', list(product(range(3), (0., .3, .95), (1, 2, 4))))
def test_rmse(seed, void, stride):
    task = standard_task('depth')
    data = list(batches(task, seed, void=void, stride=stride))
    p = torch.cat([resized(x, y.shape[-2:]).flatten() for x, y in data])
    y = torch.cat([y.flatten() for _, y in data])
    p, y = p[y != 0], y[y != 0]
    got = computed(task, data)
    assert got['rmse'] == pytest.approx(mean_squared_error(p.double(), y.double(), squared=False).item())
    assert got['abs_rel'] == pytest.approx(np.mean(np.abs(p.numpy().astype(float) - y.numpy())/y.numpy()))

@pytest.mark.parametrize('seed,stride,dtype', list(product(range(3), (1, 4), (torch.float32, torch.float16))))
def test_angle(seed, stride, dtype):
    task = standard_task('normals')
    data = [(x, y.to(dtype)) for x, y in batches(task, seed, stride=stride)]
    rows = lambda v: v.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 3)
    p = np.concatenate([rows(resized(x, y.shape[-2:])) for x, y in data])
    y = np.concatenate([rows(y) for _, y in data])
    p, y = p[y.any(1)], y[y.any(1)]
    cos = (p*y).sum(1)/np.linalg.norm(p, axis=1)/np.linalg.norm(y, axis=1)
    deg = np.degrees(np.arccos(cos.clip(-1, 1)))
    got = computed(task, data)
    assert got['angle'] == pytest.approx(deg.mean(), abs=1e-4)
    assert got['rms'] == pytest.approx(np.sqrt((deg**2).mean()), abs=1e-4)
    assert got['median'] == pytest.approx(np.sort(deg)[(len(deg) - 1)//2], abs=.0051)
    for k, most in dict(within_11=11.25, within_22=22.5, within_30=30).items():
        assert got[k] == pytest.approx(100*(deg < most).mean(), abs=.01)

@pytest.mark.parametrize('degrees', (0., 1e-3, .1, 10., 45., 90., 135., 179.9, 180.))
def test_turned_by_so_many_degrees(degrees):
    "Labels all around, each prediction turned about an axis at right angles to its label; small angles are kept"
    cross = lambda a, b: torch.linalg.cross(a, b.expand_as(a), dim=1)
    y = F.normalize(torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    axis = F.normalize(cross(y, torch.tensor([.3, .5, .8]).double().view(1, 3, 1, 1)), dim=1)
    a = torch.deg2rad(torch.tensor(degrees).double())
    turned = 5*(y*a.cos() + cross(axis, y)*a.sin())
    got = computed(standard_task('normals'), [(turned.float(), y.float())])
    assert got['angle'] == pytest.approx(degrees, abs=2e-5)
    assert got['median'] == pytest.approx(degrees, abs=.0051)

@pytest.mark.parametrize('seed,void,stride', list(product(range(3), (0., .4), (1, 4))))
def test_max_iou(seed, void, stride):
    task = standard_task('saliency')
    data = list(batches(task, seed, void=void, stride=stride))
    iou, f = np.zeros((2, len(THRESHOLDS), 0))
    for x, y in data:
        for p, label in zip(resized(x, y.shape[-2:]).sigmoid(), y):
            if (label == 255).all(): continue
            at_all = lambda fn: [fn(p, label.long(), threshold=t, ignore_index=255).item() for t in THRESHOLDS]
            iou = np.c_[iou, at_all(tm.binary_jaccard_index)]
            f = np.c_[f, at_all(tm.binary_f1_score)]
    got = computed(task, data)
    assert got['max_iou'] == pytest.approx(100*iou.mean(1).max(), abs=1e-3)
    assert got['maxf'] == pytest.approx(100*f.mean(1).max(), abs=1e-3)
    assert got['threshold'] == THRESHOLDS[iou.mean(1).argmax()]

def test_maxf_both_ways_under_two_names():
    "Two images: precision 1 and 1/2, recall 1/2 and 1; F of the means is .75, the mean of F is 2/3"
    x = torch.full((2, 1, 1, 4), -9.)
    x[0, 0, 0, :1] = x[1, 0, 0, :4] = 9
    y = torch.zeros(2, 1, 1, 4)
    y[:, 0, 0, :2] = 1
    mean_f = computed(standard_task('saliency'), [(x, y)])
    f_of_means = computed(standard_task('saliency', metric='maxf_of_means'), [(x, y)])
    assert mean_f['maxf'] == pytest.approx(100*2/3, abs=1e-3)
    assert f_of_means['maxf_of_means'] == pytest.approx(75, abs=1e-3) and 'maxf' not in f_of_means

EVERY = [semseg_task('abcde')] + [standard_task(name) for name in ('depth', 'normals', 'edges', 'saliency', 'parts')]

@pytest.mark.parametrize('task', EVERY, ids=lambda t: t.name)
def test_batches_do_not_matter(task):
    "One batch, image by image, and two meters whose states are added have the same metrics"
    data = list(batches(task, 3, sizes=((4, 16, 16), (2, 16, 16))))
    whole = computed(task, data)
    singles = [(x[i:i+1], y[i:i+1]) for x, y in data for i in range(len(x))]
    assert computed(task, singles) == pytest.approx(whole, rel=1e-6)
    a, b = meter(task), meter(task)
    for n, (x, y) in enumerate(singles): (a, b)[n%2].update(x, y)
    a.state = a.state + b.state
    assert a.compute() == pytest.approx(whole, rel=1e-6)

@pytest.mark.parametrize('task', EVERY, ids=lambda t: t.name)
def test_zeros_in_the_place_of_void(task, monkeypatch):
    "What a GPU adds up, which does not tell how many pixels are labeled"
    data = list(batches(task, 3, sizes=((4, 16, 16), (2, 16, 16))))
    data += [(x, torch.full_like(y, task.ignore)) for x, y in data[:1]]
    expected = computed(task, data)
    on_card = lambda x, valid, other=0: torch.where(valid, x, other).flatten()
    monkeypatch.setattr('partal_nb.metrics.valid_or', on_card)
    assert computed(task, data) == pytest.approx(expected, rel=1e-9)

@pytest.mark.parametrize('task', EVERY, ids=lambda t: t.name)
def test_nothing_and_nan_are_refused(task):
    m = meter(task)
    y = torch.full((2, task.label_channels, 8, 8), task.ignore)
    m.update(torch.randn(2, task.channels, 2, 2), y)
    with pytest.raises(ValueError, match=f"no labeled pixel of task '{task.name}'"): m.compute()
    m.update(torch.full((2, task.channels, 2, 2), float('inf')), y)
    with pytest.raises(ValueError, match='not finite'): m.compute()

@pytest.mark.parametrize('value', (.5, 3.))
def test_a_constant_predictor(value):
    "RMSE of a constant: the spread around it; mIoU of one class: its share, over all classes"
    y = 1 + torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    got = computed(standard_task('depth'), [(torch.full((1, 1, 8, 8), value), y)])
    assert got['rmse'] == pytest.approx((y.double().var(correction=0) + (y.double().mean() - value)**2).sqrt().item())
    c = torch.randint(4, (1, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    pred = torch.zeros(1, 4, 8, 8)
    pred[:, 2] = 1
    share = (c == 2).double().mean().item()
    assert computed(semseg_task('abcd'), [(pred, c)])['miou'] == pytest.approx(100*share/4)

def test_delta_of_better_everywhere():
    ref = {t.name: {t.metric: 50.} for t in EVERY}
    better = {t.name: {t.metric: 45. if t.lower_is_better else 55.} for t in EVERY}
    assert multi_task_delta(better, ref, tuple(EVERY)) == pytest.approx(10)
