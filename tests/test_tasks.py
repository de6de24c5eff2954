"Every modality, and two made up by a user, in a loss, a meter, an entropy, an injection, a picture and a whole run"
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from partal_nb.tasks import Task, semseg_task, standard_task
from partal_nb.config import RunConfig
from partal_nb.data.dataset import write_dataset
from partal_nb.data.arrays import load_arrays
from partal_nb.model.padnet import activate, make_model, message_of_label
from partal_nb.moments import FLOOR
from partal_nb.losses import task_loss, total_loss
from partal_nb.metrics import meter
from partal_nb.training.trainer import train
from partal_nb.runs.folder import RunFolder
from partal_nb.runs.loop import run
from partal_nb.runs.pictures import as_label, paint

def classes(n): return [f'class {c}' for c in range(n)]

REFLECTANCE = Task('reflectance', 'values', 3, 'l1', 'rmse', ignore=-1)
INDOORS = Task('indoors', 'yes_no', 1, 'balanced_bce', 'max_iou', cmap='gray')
STANDARD = [standard_task(name) for name in ('depth', 'normals', 'edges', 'saliency', 'parts')]
TASKS = [*(semseg_task(classes(n), name=f'semseg{n}') for n in (13, 21, 40)), *STANDARD, REFLECTANCE, INDOORS]
every_task = pytest.mark.parametrize('task', TASKS, ids=lambda t: t.name)

def label_of(task, seed=0, B=2, H=24, W=32, void=.2):
    "Blobs rather than noise, so that edges are lines; with void pixels, the whole top left cell among them"
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(B, task.label_channels, H//8, W//8, generator=g)
    x = F.interpolate(coarse, (H, W), mode='bicubic').clamp(0, .999)
    values = dict(
        classes=lambda x: (x*task.channels).long(),
        yes_no=lambda x: (x > .5).float(),
        distance=lambda x: x + .1,
        direction=lambda x: F.normalize(2*x - 1, dim=1),
        values=lambda x: x + .1)
    y = values[task.form](x)
    hole = torch.rand(B, 1, H, W, generator=g) < void
    hole[0, :, :4, :4] = True
    return torch.where(hole, torch.tensor(task.ignore).to(y.dtype), y)

def one_hot(y, channels): return F.one_hot(y, channels).float()

def raw_of(task, y):
    "Raw outputs that mean the label"
    if task.form == 'classes': return 50*one_hot(torch.where(y == 255, 0, y)[:, 0], task.channels).movedim(-1, 1)
    return torch.where(y == 1, 50., -50.) if task.form == 'yes_no' else y

@every_task
def test_loss(task):
    y = label_of(task)
    right, wrong = raw_of(task, y), raw_of(task, y.roll(8, -1))
    assert 0 <= task_loss(task, right, y) < 1e-5 < task_loss(task, wrong, y)
    x = torch.randn_like(right, requires_grad=True)
    task_loss(task, x, y).backward()
    valid = (y != task.ignore).any(1, keepdim=True).expand_as(x)
    assert (x.grad[~valid] == 0).all() and (x.grad[valid] != 0).any() and x.grad.isfinite().all()

@every_task
def test_meter(task):
    y = label_of(task)
    scores = []
    for raw in (raw_of(task, y), raw_of(task, y.roll(8, -1))):
        m = meter(task)
        m.update(raw, y)
        scores.append(m.compute()[task.metric])
    assert list(m.compute())[0] == task.metric
    present = len(set(y.unique().tolist()) - {255})/task.channels if task.form == 'classes' else 1
    assert scores[0] == pytest.approx(0 if task.lower_is_better else 100*present, abs=1e-3)
    assert scores[0] < scores[1] if task.lower_is_better else scores[0] > scores[1]

@every_task
def test_entropy(task):
    "Of ten passes, against one pixel written down with NumPy"
    raw = torch.randn(10, 2, task.channels, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = task.form.accumulator()
    for x in raw: a.add(activate(task, x))
    got, p = a.entropy(), activate(task, raw.flatten(0, 1)).view_as(raw)[:, 1, :, 2, 3].numpy()
    assert got.shape == (2, 6, 8)
    if not task.form.discrete:
        cov = np.atleast_2d(np.cov(p.T)) + FLOOR*np.eye(task.channels)
        expected = .5*math.log(np.linalg.det(2*math.pi*math.e*cov))
    else:
        mean = (p if task.form == 'classes' else np.hstack([1 - p, p])).mean(0)
        expected = -(mean*np.log(mean)).sum()
        assert (got <= math.log(len(mean)) + 1e-9).all()
    assert got[1, 2, 3].item() == pytest.approx(expected, rel=1e-5)

@every_task
def test_injection(task):
    "Each cell of the message is the right prediction there: the mean over the valid ones of sixteen pixels"
    y = label_of(task)
    got, valid = message_of_label(task, y, (6, 8))
    assert got.shape == (2, task.channels, 6, 8) and not valid[0, 0, 0, 0]
    for b, i, j in ((0, 1, 2), (1, 3, 5), (1, 5, 7)):
        cell = y[b, :, 4*i:4*i + 4, 4*j:4*j + 4].flatten(1).T
        pixels = [p for p in cell if (p != task.ignore).any()]
        assert valid[b, 0, i, j] == (len(pixels) > 0)
        if task.form == 'classes': pixels = [one_hot(p[0], task.channels) for p in pixels]
        mean = torch.stack(pixels).float().mean(0)
        if task.form == 'direction': mean = F.normalize(mean, dim=0)
        assert torch.allclose(got[b, :, i, j], mean, atol=1e-5)

@every_task
def test_picture(task):
    y = label_of(task)
    truth = paint(task, y[0].movedim(0, -1).numpy())
    predicted = paint(task, as_label(task, raw_of(task, y)[0], y.shape[-2:]))
    void = (y[0] == task.ignore).all(0).numpy()
    assert truth.shape == predicted.shape == (24, 32, 3) and truth.dtype == np.uint8
    assert (truth[void] == 0).all() and len(np.unique(truth[~void], axis=0)) > 1
    same = (abs(truth.astype(int) - predicted)[~void] <= 1).all(1).mean()
    assert same > .95

CONFIG = RunConfig(
    height=32, width=48, start_images=4, step_pairs=6, rounds=1, passes=2, features=8, pretrained=False,
    train_by='steps', train_for=3, batch_size=4, augment='pascal', device='cpu')

def finished(config, folder, tasks):
    run(config, folder, progress=False)
    made = RunFolder(folder)
    journal = made.journal()
    assert len(journal) == 2 and sum(journal[0]['bought'].values()) == config.step_pairs
    for t in tasks: assert math.isfinite(journal[1]['metrics'][t.name][t.metric])
    assert [t.name for t in made.load_model(1).tasks] == [t.name for t in tasks]

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('PARTAL_CACHE', str(tmp_path/'cache'))

def test_run_on_rooms(tmp_path):
    "All six standard modalities, augmented as PASCAL is"
    tasks = [semseg_task(classes(13)), *STANDARD]
    finished(replace(CONFIG, tasks=tuple(t.name for t in tasks), pool_images=8, test_images=8), tmp_path/'run', tasks)

SPLITS = dict(train=list('01234567'), test=['8', '9', '10', '11'])

def small_dataset(path, tasks, without=()): # task names of which no image has a label
    labeled = [t for t in tasks if t.name not in without]
    def label(t, seed): return label_of(t, seed, 1, 32, 48)[0].movedim(0, -1).numpy().astype(t.form.dtype)
    def sample(i):
        rng = np.random.default_rng(int(i))
        return dict(rgb=rng.integers(0, 256, (32, 48, 3), np.uint8), **{t.name: label(t, int(i)) for t in labeled})
    return write_dataset(path, 'made up', tasks, SPLITS, sample, progress=False)

@pytest.mark.parametrize('n', (21, 40))
def test_run_on_a_data_set(tmp_path, n):
    "Semantic segmentation of other class counts, and the user's two tasks"
    tasks = [semseg_task(classes(n)), REFLECTANCE, INDOORS]
    small_dataset(tmp_path/'prepared', tasks)
    finished(replace(CONFIG, data=str(tmp_path/'prepared')), tmp_path/'run', tasks)

@pytest.mark.parametrize('absent', ('semseg', 'normals', 'saliency', 'reflectance'))
def test_a_data_set_without_one_task_trains_the_others(tmp_path, absent):
    tasks = [semseg_task(classes(13)), standard_task('normals'), standard_task('saliency'), REFLECTANCE]
    dataset = small_dataset(tmp_path/'prepared', tasks, without=[absent])
    arrays = load_arrays(dataset, dataset.splits['train'], list(dataset.tasks), 32, 48, progress=False)
    assert arrays.available.all(0).tolist() == [t.name != absent for t in tasks]
    model = make_model(CONFIG, arrays.tasks)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = train(model, arrays, arrays.available, CONFIG, 0, tmp_path/'a.safetensors', progress=False)
    assert math.isfinite(found['loss']) and found['steps'] == 3
    assert all(v.isfinite().all() for v in model.state_dict().values())
    for t in tasks:
        weight = f'head.{t.name}.3.weight'
        if t.name != absent: assert not torch.equal(model.state_dict()[weight], before[weight])

@every_task
def test_no_label_no_gradient(task):
    "Without labels of `task` in a batch its loss is 0, and so are the gradients of what only its final prediction uses"
    tasks = (semseg_task(classes(5)), task, INDOORS) if task is not INDOORS else (semseg_task(classes(5)), task)
    torch.manual_seed(0)
    model = make_model(CONFIG, tasks).train()
    labels = {t.name: label_of(t, 1, 2, 32, 48) for t in tasks}
    labels[task.name] = torch.full_like(labels[task.name], task.ignore)
    out = model(torch.rand(2, 3, 32, 48), labels)
    loss, each = total_loss(tasks, out.guess, out.final, labels)
    loss.backward()
    assert each[task.name] == 0 and loss > 0
    for t in tasks:
        own = [p.grad for part in (model.head[t.name], model.distill.refine[t.name]) for p in part.parameters()]
        assert own and all((g == 0).all() for g in own) == (t is task)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
