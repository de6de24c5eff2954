"Real samples through reader, data set, cache and one training step; interruptions, a full disk, two processes at once"
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from scipy.io import loadmat, savemat
from scipy.ndimage import binary_dilation, maximum_filter, minimum_filter
from torch import nn
from typer.testing import CliRunner

from partal_nb.cli import app
from partal_nb.data.rooms import ROOM_TASKS, render_room, room_scene
from partal_nb.data.dataset import INDEX, PLAN, Dataset, verify, write_dataset
from partal_nb.data.dataset import current_index, fingerprint, version_1_index
from partal_nb.data.arrays import load_arrays, unit_rgb
from partal_nb.data.derive import edges_from_ids, normals_from_depth
from partal_nb.data.mat import INDOOR, NYU40, NYU_MAT, merged_parts
from partal_nb.data.folders import FOLDER_LAYOUTS, Folder, read_folder
from partal_nb.data.prepare import check, detect, open_data, open_source, prepare
from partal_nb.data.walks import prepare_rooms
from partal_nb.training.augment import Moves, augment, move
from partal_nb.training.trainer import train_step
from partal_nb.losses import total_loss
from partal_nb.model.padnet import PADNet

FOLDERS = dict(rgb='.webp', seg40='.png', depth='.png', normals='.png')
TASKS = ['semseg', 'depth', 'normals']

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('PARTAL_CACHE', str(tmp_path/'cache'))

@pytest.fixture(scope='session')
def nyu(shared)->Path: return shared/'nyuv2_192x144'

def copy_some(nyu, path, n=4):
    for split in ('train', 'test'):
        ids = (nyu/f'{split}.txt').read_text().split()[::150][:n]
        path.mkdir(exist_ok=True)
        (path/f'{split}.txt').write_text('\n'.join(ids))
        for folder, suffix in FOLDERS.items():
            (path/folder).mkdir(exist_ok=True)
            for i in ids: shutil.copy(nyu/folder/(i + suffix), path/folder)
    shutil.copy(nyu/'classes.json', path)
    return path

@pytest.fixture
def some(nyu, tmp_path): return copy_some(nyu, tmp_path/'some')

FEW = dict(n_train=6, n_test=2, height=24, width=32, progress=False)

def rooms(path, **kw): return prepare_rooms(path, **FEW | kw)

def test_the_sample_is_all_of_nyuv2(nyu):
    ids = {s: (nyu/f'{s}.txt').read_text().split() for s in ('train', 'test')}
    assert (len(ids['train']), len(ids['test'])) == (795, 654)
    assert sorted(ids['train'] + ids['test']) == [f'{i:04d}' for i in range(1, 1450)]
    for folder, suffix in FOLDERS.items():
        assert {p.name for p in (nyu/folder).iterdir()} == {f'{i:04d}{suffix}' for i in range(1, 1450)}
    assert detect(nyu) == 'nyuv2_folder'

def test_values_of_real_frames(some, tmp_path):
    s = read_folder(some, tmp_path/'prepared', FOLDER_LAYOUTS['nyuv2_folder'], progress=False)
    assert {k: len(v) for k, v in s.splits.items()} == dict(train=4, test=4) and s.derived == ('normals',)
    assert len(s.tasks['semseg'].classes) == 40 and s.tasks['semseg'].classes[:23] == NYU40[:23]
    for i in s.splits['train'] + s.splits['test']:
        assert s.rgb(i).shape == (144, 192, 3) and s.rgb(i).std() > 10
        seg, depth, n = (s.label(i, t) for t in TASKS)
        raw = np.array(Image.open(some/f'seg40/{i}.png'))
        assert (seg[..., 0][raw > 0] == raw[raw > 0] - 1).all() and ((seg[..., 0] == 255) == (raw == 0)).all()
        assert .5 < depth.min() and depth.max() < 10
        assert np.allclose(np.linalg.norm(n, axis=2)[n.any(2)], 1, atol=1e-5) and n.any(2).mean() > .8
        assert n[..., 2].mean() > .2, 'normals look at the viewer'
    assert verify(s) == []

def test_partly_labeled(some, tmp_path):
    first = (some/'train.txt').read_text().split()[0]
    (some/f'depth/{first}.png').unlink()
    s = read_folder(some, tmp_path/'prepared', FOLDER_LAYOUTS['nyuv2_folder'], progress=False)
    arrays = load_arrays(s, s.splits['train'], TASKS, 72, 96, progress=False)
    assert not arrays.available[0, 1] and arrays.available.sum() == 4*3 - 1
    assert not arrays.labels['depth'][0].any() and arrays.labels['depth'][1].any()

@pytest.mark.parametrize('stops_at_borders,median,mean', [(False, 2.5, 13), (True, 1.6, 3.6)])
def test_normals_from_depth_agree_with_those_of_the_sample(shared, stops_at_borders, median, mean):
    medians, means = [], []
    for f in sorted((shared/'nyuv2_full_sample/depth').iterdir()):
        semseg = np.array(Image.open(f.parents[1]/'seg40'/f.name)) if stops_at_borders else None
        found = normals_from_depth(np.array(Image.open(f))/1000, semseg=semseg)
        stored = np.array(Image.open(f.parents[1]/'normals'/f.name))
        n = stored/127.5 - 1
        cosine = (found*n).sum(2)/np.linalg.norm(n, axis=2)
        degrees = np.degrees(np.arccos(cosine[stored.any(2)].clip(-1, 1)))
        medians.append(np.median(degrees))
        means.append(degrees.mean())
    assert len(medians) == 12 and max(medians) <= median and max(means) <= mean, (medians, means)

SAMPLES = dict( # tasks, and how many images of each split have each of them
    nyuv2_192x144=(TASKS, (795, 654)), nyuv2_full_sample=(TASKS, (10, 2)),
    pascal_part18=(['semseg', 'parts', 'edges'], (15, 3)),
    voc2012=(['semseg'], (104, 26)), bsds500_val60=(['edges'], (48, 12)), ecssd60=(['saliency'], (48, 12)))
COARSE = dict(normals=.01, depth=6e-4) # how much a file may change a label; others not at all

class Small(nn.Module):
    "An encoder of one convolution"
    channels, widths = 8, (8,)
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
    def levels(self, x): return [self.body(x)]
    def fuse(self, levels, H, W): return levels[0]
    def forward(self, x): return self.body(x)

def steps(arrays, n=6): # losses of training on the first images, again and again
    torch.manual_seed(0)
    model = PADNet(arrays.tasks, Small(), features=16, dropout=nn.Identity).train()
    optimizer, acc = torch.optim.Adam(model.parameters(), 3e-3), Accelerator(cpu=True)
    rgb, labels = arrays.batch(range(len(arrays)))
    x, labels = augment(rgb, labels, arrays.tasks, 'flip', 0)
    return model, [train_step(model, optimizer, acc, x, labels, arrays.tasks, .5).item() for _ in range(n)]

@pytest.mark.parametrize('name', SAMPLES)
def test_each_sample_is_read_as_it_lies_and_trained_on(shared, tmp_path, name):
    tasks, images = SAMPLES[name]
    source = open_source(shared/name)
    assert list(source.tasks) == tasks and tuple(map(len, source.splits.values())) == images
    assert [len(source.ids(t)) for t in ('rgb', *tasks)] == [sum(images)]*(1 + len(tasks))
    some = source.splits['train'][::max(1, images[0]//4)][:4] + source.splits['test'][:1]
    splits = dict(train=some[:4], test=some[4:])
    sample = lambda i: {t: source.label(i, t) for t in tasks} | dict(rgb=source.rgb(i))
    dataset = write_dataset(tmp_path/'prepared', name, source.tasks.values(), splits, sample, '', source.derived, False)
    for i in some:
        for t in tasks: assert np.abs(dataset.label(i, t) - source.label(i, t)).max() <= COARSE.get(t, 0)
    model, losses = steps(load_arrays(dataset, some[:4], tasks, 64, 64, progress=False))
    assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

def test_a_batch_without_a_label_of_a_task(shared, tmp_path):
    source = open_source(shared/'pascal_part18')
    nobody = [i for i in source.splits['train'] if (source.label(i, 'parts') == 255).all()][:3]
    def sample(i):
        semseg = {} if i == nobody[0] else dict(semseg=source.label(i, 'semseg'))
        return dict(semseg, rgb=source.rgb(i), parts=source.label(i, 'parts'))
    tasks, splits = source.tasks.values(), dict(train=nobody)
    dataset = write_dataset(tmp_path/'prepared', 'nobody', tasks, splits, sample, progress=False)
    arrays = load_arrays(dataset, nobody, list(source.tasks), 64, 64, progress=False)
    assert arrays.available.tolist() == [[k > 0, True, False] for k in range(3)]
    model, losses = steps(arrays)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    rgb, labels = arrays.batch(range(3))
    model.zero_grad()
    out = model(unit_rgb(rgb))
    loss, each = total_loss(arrays.tasks, out.guess, out.final, labels)
    loss.backward()
    assert float(each['parts']) == float(each['edges']) == 0 < float(each['semseg'])
    for task, has in dict(semseg=True, parts=False, edges=False).items():
        assert any(p.grad is not None and p.grad.any() for p in model.head[task].parameters()) == has, task

def test_merged_parts_are_those_of_the_sample(shared):
    folder = Folder(shared/'pascal_part18', FOLDER_LAYOUTS['samples'])
    people = 0
    for i in folder.ids('rgb'):
        found = merged_parts(loadmat(shared/f'pascal_part18/anno_mat/{i}.mat', simplify_cells=True))
        assert (found == folder.label(i, 'parts')[..., 0]).all(), i
        people += (found != 255).any()
    assert people == 8

def test_edges_from_instances_are_those_of_the_sample(shared):
    near = lambda a: binary_dilation(a, np.ones((3, 3)), iterations=2)
    for f in sorted((shared/'pascal_part18/instance').iterdir()):
        found = edges_from_ids(np.array(Image.open(f))) > 0
        given = np.array(Image.open(f.parents[1]/'edge'/f.name)) > 0
        assert given.sum()/2 < found.sum() < given.sum()*1.1, f.name
        assert (found & ~near(given)).sum() == 0 and (given & ~near(found)).mean() < 1e-4, f.name

def test_all_real_labels_are_readable(shared):
    for name in ('nyuv2_full_sample', 'pascal_part18', 'bsds500_val60', 'ecssd60'):
        assert check(shared/name, progress=False).faults == []

# Layouts that no sample has: small folders of the same structure, from rendered rooms

ROOMS = dict(zip(('a1', 'b2', 'c3'), (render_room(k, 24, 32) for k in (3, 5, 8))))

def save(file, a):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == '.npy': np.save(file, a)
    elif file.suffix == '.mat': savemat(file, a)
    else: Image.fromarray(a).save(file)

def lists(path, folder, names=('train.txt', 'val.txt')):
    (path/folder).mkdir(parents=True, exist_ok=True)
    for name, ids in zip(names, ('a1\nb2\n', 'c3\n')): (path/folder/name).write_text(ids)

def read_back(path, layout, tmp_path):
    assert detect(path) == layout
    s = read_folder(path, tmp_path/'prepared', FOLDER_LAYOUTS[layout], progress=False)
    found = check(path, progress=False)
    assert found.faults == [] and list(found.counts) == ['train', 'test']
    return s

def same(dataset, image, **expected):
    for task, y in expected.items():
        off = np.abs(dataset.label(image, task).astype(float) - np.atleast_3d(y)).max()
        assert off <= COARSE.get(task, 0), (image, task)

def test_the_surveys_nyud_mt(tmp_path):
    p = tmp_path/'NYUD_MT'
    for i, r in ROOMS.items():
        raw = np.where(r['semseg'] == 255, 0, r['semseg'] + 1).astype(np.uint8)
        raw[:2] = 0
        depth = np.where(np.arange(32) < 3, 0, r['depth']).astype(np.float32)
        y_down = (r['normals']*[1, -1, 1]).astype(np.float32)
        y_down[-1] = 0
        save(p/f'images/{i}.jpg', r['rgb'])
        save(p/f'segmentation/{i}.png', raw)
        save(p/f'depth/{i}.npy', depth)
        save(p/f'normals/{i}.npy', y_down)
        save(p/f'edge/{i}.npy', r['edges'].astype(np.float32))
    lists(p, 'gt_sets')
    s = read_back(p, 'nyud_mt', tmp_path)
    assert (s.splits, s.derived) == (dict(train=['a1', 'b2'], test=['c3']), ('normals', 'edges'))
    for i, r in ROOMS.items():
        row, column = np.arange(24)[:, None], np.arange(32)
        same(s, i, edges=r['edges'], semseg=np.where(row < 2, 255, r['semseg']))
        same(s, i, depth=np.where(column < 3, 0, r['depth']), normals=np.where(row[..., None] == 23, 0, r['normals']))
        assert abs(s.rgb(i).astype(int) - r['rgb']).mean() < 12, 'a JPEG of it'

def test_mtans_folders(tmp_path):
    p = tmp_path/'nyuv2'
    for split, n in (('train', 11), ('val', 2)):
        for k in range(n):
            r = ROOMS['a1'] if k else ROOMS['b2']
            label = np.where(np.arange(32) < 4, -1, r['semseg']%13).astype(np.float32)
            arrays = dict(image=r['rgb']/255, label=label, depth=r['depth'][..., None], normal=r['normals'])
            for f, a in arrays.items(): save(p/split/f'{f}/{k}.npy', a)
    (p/'val/depth/1.npy').unlink()
    s = read_back(p, 'mtan', tmp_path)
    assert [len(v) for v in s.splits.values()] == [11, 2] and s.splits['test'] == ['val_0', 'val_1']
    assert len(s.tasks['semseg'].classes) == 13
    assert [s.has(i, 'depth') for i in s.splits['test']] == [True, False]
    b2 = ROOMS['b2']
    same(s, 'val_0', semseg=np.where(np.arange(32) < 4, 255, b2['semseg']%13), depth=b2['depth'], normals=b2['normals'])
    assert (s.rgb('train_10') == ROOMS['a1']['rgb']).all()

def anno(objects): # (class, {part: mask}) as PASCAL-Part keeps them
    made = np.zeros((1, len(objects)), [(k, object) for k in ('class', 'class_ind', 'mask', 'parts')])
    for k, (cls, masks) in enumerate(objects):
        parts = np.zeros((1, len(masks)), [('part_name', object), ('mask', object)])
        for m, (name, mask) in enumerate(masks.items()): parts[0, m] = (name, mask.astype(np.uint8))
        made[0, k] = (str(cls), cls, np.ones((24, 32), np.uint8), parts if masks else np.zeros((0, 0)))
    return dict(anno=np.array([[('x', made)]], [('imname', object), ('objects', object)]))

def test_the_surveys_pascal_mt(tmp_path):
    p, box = tmp_path/'PASCAL_MT', np.zeros((24, 32), bool)
    box[4:12, 5:20] = True
    head, hand = box & (np.arange(24) < 8)[:, None], box & (np.arange(24) >= 8)[:, None]
    semseg = np.where(box, 15, 255).astype(np.uint8)
    context = np.where(box, 284, 360).astype(np.uint16) # a person before the sky
    normals = np.zeros((24, 32, 3), np.uint8) + np.uint8([128, 0, 128])
    people = dict(a1=[(15, dict(hair=head, rhand=hand)), (9, {})], b2=[(9, dict(head=box))], c3=[(15, {})])
    for i in ROOMS:
        save(p/f'JPEGImages/{i}.jpg', ROOMS[i]['rgb'])
        save(p/('semseg/VOC12' if i != 'b2' else 'semseg/pascal-context')/f'{i}.png', semseg)
        save(p/f'human_parts/{i}.mat', anno(people[i]))
        save(p/f'sal_distill/{i}.png', np.where(box, 128, 127).astype(np.uint8))
        save(p/f'normals_distill/{i}.png', normals)
        save(p/f'pascal-context/trainval/{i}.mat', dict(LabelMap=context))
    (p/'sal_distill/b2.png').unlink()
    lists(p, 'ImageSets/Context')
    s = read_back(p, 'pascal_mt', tmp_path)
    assert s.derived == ('saliency', 'edges', 'normals')
    assert [s.has(i, 'saliency') for i in ROOMS] == [True, False, True]
    assert 284 in INDOOR and 360 not in INDOOR
    up = np.where(box[..., None], [0, 1, 0], 0)
    for i in ROOMS: same(s, i, semseg=semseg, edges=edges_from_ids(context), normals=up)
    same(s, 'a1', parts=head + 4*hand, saliency=box)
    for i in ('b2', 'c3'): same(s, i, parts=np.full((24, 32), 255))

def test_folders_of_one_task(tmp_path):
    voc, ecssd = tmp_path/'VOC2012', tmp_path/'ECSSD'
    semseg = np.where(np.arange(32) < 4, 255, ROOMS['a1']['semseg']%21).astype(np.uint8)
    for i, r in ROOMS.items():
        save(voc/f'JPEGImages/{i}.jpg', r['rgb'])
        save(voc/f'SegmentationClass/{i}.png', semseg)
        save(ecssd/f'images/{i}.jpg', r['rgb'])
        save(ecssd/f'ground_truth_mask/{i}.png', r['saliency']*np.uint8(255))
    save(voc/'JPEGImages/unlabeled.jpg', ROOMS['a1']['rgb'])
    lists(voc, 'ImageSets/Segmentation')
    lists(ecssd, '.', ('train.txt', 'test.txt'))
    s = read_back(voc, 'voc', tmp_path/'v')
    assert s.splits == dict(train=['a1', 'b2'], test=['c3'])
    same(s, 'b2', semseg=semseg)
    same(read_back(ecssd, 'ecssd', tmp_path/'e'), 'c3', saliency=ROOMS['c3']['saliency'])

def test_a_broken_mat_file_is_named(tmp_path):
    p = tmp_path/'PASCAL_MT'
    for i in ROOMS: save(p/f'JPEGImages/{i}.jpg', ROOMS[i]['rgb'])
    lists(p, 'ImageSets/Context')
    save(p/'human_parts/a1.mat', dict(other=1))
    (p/'human_parts/b2.mat').write_bytes(b'MATLAB')
    save(p/'human_parts/c3.mat', anno([(15, dict(tail=np.ones((24, 32))))]))
    faults = check(p, progress=False).faults
    assert [(f.image, f.task) for f in faults] == [('a1', 'parts'), ('b2', 'parts'), ('c3', 'parts')]
    expected = "no 'anno' in it", 'not a whole .mat file (6 bytes)', "no 'tail' in it"
    for f, message in zip(faults, expected): assert message in f.what, f

def test_a_mat_file_of_version_7_3_is_refused_with_its_cure(tmp_path):
    p = tmp_path/'PASCAL_MT'
    for i in ROOMS: save(p/f'JPEGImages/{i}.jpg', ROOMS[i]['rgb'])
    lists(p, 'ImageSets/Context')
    hdf5 = b'MATLAB 7.3 MAT-file'.ljust(124) + b'\0\2IM' + bytes(400)
    for folder in ('human_parts', 'pascal-context/trainval'):
        (p/folder).mkdir(parents=True)
        (p/folder/'a1.mat').write_bytes(hdf5)
    faults = check(p, progress=False).faults
    assert [(f.image, f.task) for f in faults] == [('a1', 'parts'), ('a1', 'edges')]
    assert all("of version 7.3 (HDF5); save it in MATLAB with save(name, '-v7')" in f.what for f in faults)

def test_where_the_files_beside_the_official_one_lie_can_be_said_on_the_command_line(tmp_path):
    (tmp_path/'official').mkdir()
    with h5py.File(tmp_path/'official'/NYU_MAT, 'w') as f:
        f['images'] = np.stack([r['rgb'].transpose(2, 1, 0) for r in ROOMS.values()])
        f['depths'] = np.stack([r['depth'].T for r in ROOMS.values()])
        f['labels'] = np.stack([r['semseg'].T.astype(np.uint16) + 1 for r in ROOMS.values()])
        names = f.create_dataset('names', (1, 40), h5py.ref_dtype)
        for k in range(40):
            f[f'#refs#/{k}'] = np.frombuffer(f'raw {k}'.encode(), np.uint8).astype(np.uint16)
            names[0, k] = f[f'#refs#/{k}'].ref
    save(tmp_path/'elsewhere/40.mat', dict(mapClass=np.arange(1, 41)[None]))
    save(tmp_path/'elsewhere/mine.mat', dict(trainNdxs=[[3], [1]], testNdxs=[[2]]))
    prepare = ['prepare', str(tmp_path/'official'), str(tmp_path/'prepared')]
    mapping = f'--mapping={tmp_path}/elsewhere/40.mat'
    splits = f'--splits={tmp_path}/elsewhere/mine.mat'
    refused = CliRunner().invoke(app, [*prepare, mapping])
    assert refused.exit_code and 'without splits.mat' in ' '.join(refused.output.split())
    assert CliRunner().invoke(app, [*prepare, mapping, splits]).exit_code == 0
    dataset = Dataset(tmp_path/'prepared')
    assert dataset.splits == dict(train=['0001', '0003'], test=['0002'])
    for i, room in enumerate(ROOMS.values(), 1):
        assert np.array_equal(dataset.label(f'{i:04}', 'semseg')[..., 0], room['semseg'])
    file = ['prepare', str(tmp_path/'official'/NYU_MAT), str(tmp_path/'of the file'), mapping, splits]
    assert CliRunner().invoke(app, file).exit_code == 0
    save(tmp_path/'elsewhere/40.mat', dict(mapClass=np.full((1, 40), 3)))
    for again in ([*prepare, mapping, splits], file):
        refused = CliRunner().invoke(app, again)
        assert refused.exit_code and 'that have changed since' in ' '.join(refused.output.split())

def spoil(file): # what the cache looks at stays: size and time
    time = file.stat().st_mtime_ns
    file.write_bytes(bytes(file.stat().st_size))
    os.utime(file, ns=(time, time))

def test_cache_round_trip(some, tmp_path):
    s = open_data(some, progress=False)
    native = load_arrays(s, s.splits['test'], TASKS, 144, 192, progress=False)
    for k, i in enumerate(native.images):
        assert (native.rgb[k] == s.rgb(i)).all()
        for t in TASKS: assert np.abs(native.labels[t][k] - s.label(i, t)).max() <= (1e-3 if t == 'normals' else 0)
    first = load_arrays(s, s.splits['train'], TASKS, 72, 96, progress=False)
    for kind in ('rgb', *TASKS):
        for file in (s.path/kind).iterdir(): spoil(file) # decoding it again would fail
    again = load_arrays(Dataset(s.path), s.splits['train'][1:3], TASKS, 72, 96, progress=False)
    assert (np.asarray(again.rgb) == first.rgb[1:3]).all()
    assert (again.labels['normals'] == first.labels['normals'][1:3]).all()
    held_out = load_arrays(s, [s.splits['train'][k] for k in (3, 0)], TASKS, 72, 96, progress=False)
    assert (held_out.batch([0, 1])[0] == first.batch([3, 0])[0]).all()

@pytest.mark.parametrize('seed', (3, 5, 8))
@pytest.mark.parametrize('how', ('as it is', 'flip', 'zoom', 'turn', 'all'))
def test_moved_depth_and_moved_normals_agree(seed, how):
    "Normals computed from the moved depth are the moved normals; zooming makes the lens longer by the same factor"
    room = render_room(seed, 240, 320)
    flip = how in ('flip', 'all')
    zoom = 1.5 if how in ('zoom', 'all') else 1.
    angle = np.radians(15.) if how in ('turn', 'all') else 0.
    tensor = lambda k: torch.from_numpy(np.atleast_3d(room[k])).permute(2, 0, 1)[None]
    tasks = [ROOM_TASKS[k] for k in ('depth', 'normals')]
    moves = Moves(np.array([flip]), np.array([zoom]), np.array([angle]))
    _, y = move(tensor('rgb'), {t.name: tensor(t.name) for t in tasks}, tasks, moves)
    depth, normals = y['depth'][0, 0].numpy(), y['normals'][0].permute(1, 2, 0).numpy()
    f = room_scene(seed).camera.focal(640)*zoom
    found = normals_from_depth(depth, (f, f, 319.5, 239.5))
    spread = maximum_filter(normals, (15, 15, 1)) - minimum_filter(normals, (15, 15, 1))
    flat = (spread < .02).all(2) & found.any(2) & normals.any(2) # one plane fills the window that the fit looks through
    off = lambda n: np.median(np.degrees(np.arccos((found*n).sum(2)[flat].clip(-1, 1))))
    assert flat.mean() > .2 and off(normals) < .75, (flat.mean(), off(normals))
    if how == 'all': assert off(room['normals']) > 10, 'it would show'

def test_resized_labels_are_values_of_the_label(some):
    s = open_data(some, progress=False)
    arrays = load_arrays(s, s.splits['train'], TASKS, 50, 70, progress=False)
    for k, i in enumerate(arrays.images):
        for t in ('semseg', 'depth'): assert set(np.unique(arrays.labels[t][k])) <= set(np.unique(s.label(i, t)))
        length = np.linalg.norm(arrays.labels['normals'][k].astype(float), axis=2)
        assert ((length == 0) | (abs(length - 1) < 1e-3)).all()

CODE = '''
import sys
from partal_nb.data.walks import prepare_rooms
from partal_nb.data.arrays import load_arrays
s = prepare_rooms(sys.argv[1], int(sys.argv[2]), 1, 24, 32, progress=False)
a = load_arrays(s, s.splits['train'], list(s.tasks), 12, 16, progress=False)
print(s.fingerprint, int(a.rgb.sum()), sum(float(v.sum()) for v in a.labels.values()))
'''
def start(path, n):
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, '-c', CODE, str(path), str(n)], stdout=pipe, stderr=pipe, text=True)

def test_interrupted_while_preparing_then_resumed(tmp_path):
    p = start(tmp_path/'killed', 200)
    end = time.time() + 120
    written = lambda: len(list((tmp_path/'killed/rgb').glob('*.png')))
    while written() < 3 and p.poll() is None and time.time() < end: time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert p.returncode == -signal.SIGKILL
    done = {f: f.stat().st_mtime_ns for f in (tmp_path/'killed/rgb').glob('[0-9]*.png')}
    assert 3 <= len(done) < 201
    with pytest.raises(FileNotFoundError, match='interrupted: run the same command again'): Dataset(tmp_path/'killed')
    resumed = rooms(tmp_path/'killed', n_train=200, n_test=1)
    assert all(f.stat().st_mtime_ns == t for f, t in done.items())
    assert resumed.fingerprint == rooms(tmp_path/'straight', n_train=200, n_test=1).fingerprint

KILLED = '''
import os, sys
from partal_nb.data import dataset
from partal_nb.data.prepare import prepare
whole, left = dataset.png_bytes, iter((True, False))
def png_bytes(a): return whole(a) if next(left) else os._exit(9)
dataset.png_bytes = png_bytes
prepare(*sys.argv[1:], progress=False)
'''
@pytest.mark.parametrize('mended', [False, True])
def test_a_folder_that_is_mended_after_an_interruption(tmp_path, mended):
    "What was written is kept, or, from other files, written again"
    folder, out = tmp_path/'mine', tmp_path/'out'
    for i in 'ab':
        save(folder/f'rgb/{i}.png', ROOMS['a1']['rgb'])
        save(folder/f'depth/{i}.png', np.full((24, 32), 2000, np.uint16))
    (folder/'tasks.json').write_text('[{"name": "depth"}]')
    assert subprocess.run([sys.executable, '-c', KILLED, folder, out]).returncode == 9
    first = (out/'rgb/a.png').stat().st_mtime_ns
    if mended: save(folder/'depth/a.png', np.full((24, 32), 7000, np.uint16))
    dataset = prepare(folder, out, progress=False)
    assert [dataset.label(i, 'depth').max().round() for i in 'ab'] == [7 if mended else 2, 2]
    assert ((out/'rgb/a.png').stat().st_mtime_ns != first) == mended
    assert check(out, progress=False).faults == []

def test_two_processes_at_once(tmp_path):
    both = [start(tmp_path/'shared', 12) for _ in range(2)]
    outs = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert outs[0][0] == outs[1][0]
    assert not [p for p in tmp_path.rglob('*.part')] and verify(Dataset(tmp_path/'shared')) == []

@pytest.mark.parametrize('moment', ['writes its plan', 'has written its plan', 'has ended'])
def test_another_process_begins_or_ends_in_between(tmp_path, monkeypatch, moment):
    path, there, iterdir = tmp_path/'rooms', tmp_path/'there', Path.iterdir
    rooms(there)
    index = json.loads((there/INDEX).read_text())
    def other(folder): # what the other process does right after our look at the folder
        found = list(iterdir(folder))
        if folder == path and moment == 'has written its plan': (path/'..preparing.json.99.part').rename(path/PLAN)
        if folder == path and moment == 'has ended':
            shutil.copytree(there, path, dirs_exist_ok=True)
            (path/PLAN).unlink()
        return iter(found)
    path.mkdir()
    (path/(PLAN if moment == 'has ended' else '..preparing.json.99.part')).write_text(json.dumps(index))
    monkeypatch.setattr(Path, 'iterdir', other)
    assert rooms(path).fingerprint == Dataset(there).fingerprint
    assert not (path/PLAN).exists()

def load_depth(dataset): return load_arrays(dataset, dataset.splits['train'], ['depth'], 24, 32, progress=False)

def test_a_full_disk_while_the_cache_is_made(tmp_path, monkeypatch):
    s = rooms(tmp_path/'rooms')
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='free some space or set PARTAL_CACHE to a larger disk'): load_depth(s)
    assert not [p for p in (tmp_path/'cache').rglob('*') if p.is_file()]
    assert load_depth(s).labels['depth'].any()

def test_a_broken_file_is_named(tmp_path):
    s = rooms(tmp_path/'rooms')
    f = s.file(s.splits['train'][2], 'depth')
    f.write_bytes(f.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf'{f.name} \(task depth\): not a whole image'): load_depth(s)
    assert verify(s) == ['depth']

# What the first version of the package wrote, to the byte
VERSION_1 = '''{
 "version": 1,
 "name": "Straße",
 "licence": "CC0",
 "tasks": [
  {
   "name": "depth",
   "kind": "regression",
   "channels": 1,
   "loss": "l1",
   "metric": "rmse",
   "classes": [],
   "unit": "m",
   "ignore": 0,
   "weight": 1.0,
   "cost": 1.0,
   "cmap": "magma"
  },
  {
   "name": "edges",
   "kind": "binary",
   "channels": 1,
   "loss": "edge_bce",
   "metric": "odsf",
   "classes": [],
   "unit": "",
   "ignore": 255,
   "weight": 50,
   "cost": 1.0,
   "cmap": "gray"
  }
 ],
 "derived": [],
 "splits": {
  "train": [
   "a"
  ]
 },
 "files": {
  "rgb": {
   "suffix": ".png"
  },
  "depth": {
   "suffix": ".png",
   "scale": 0.001,
   "offset": 0.0
  },
  "edges": {
   "suffix": ".png"
  }
 }
}
'''

def test_a_fingerprint_outlives_the_spelling_of_the_index(tmp_path):
    (tmp_path/INDEX).write_text(VERSION_1, 'utf-8')
    old = fingerprint(tmp_path)
    assert old == hashlib.sha256(VERSION_1.encode()).hexdigest()[:12] == '3138c8cc0a7f'
    new = current_index(json.loads(VERSION_1))
    assert (new['version'], new['license'], [t['form'] for t in new['tasks']]) == (2, 'CC0', ['distance', 'yes_no'])
    (tmp_path/INDEX).write_text(json.dumps(new))
    assert fingerprint(tmp_path) == old

def test_a_data_set_of_version_1_is_read_and_resumed(tmp_path):
    new = rooms(tmp_path/'new')
    shutil.copytree(new.path, tmp_path/'old')
    index = version_1_index(json.loads((new.path/INDEX).read_bytes()))
    (tmp_path/'old'/INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + '\n', 'utf-8')
    old = Dataset(tmp_path/'old')
    assert (old.fingerprint, old.tasks) == (new.fingerprint, new.tasks)
    assert (old.license, old.splits) == (new.license, new.splits)
    assert verify(old) == [] and rooms(old.path).fingerprint == new.fingerprint
    (old.path/INDEX).rename(old.path/PLAN) # as if it had been interrupted before its last image
    last = old.splits['test'][-1]
    old.file(last, 'rgb').unlink()
    assert rooms(old.path).fingerprint == new.fingerprint
    assert json.loads((old.path/INDEX).read_bytes())['version'] == 2
    with pytest.raises(FileExistsError, match=r"it differs in \['splits'\]"): rooms(old.path, n_train=7)
