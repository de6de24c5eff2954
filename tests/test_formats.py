"Real labels through every format and back, broken and hostile files, and what the tools' own libraries make of ours"
import io
import json
import os
import random
import shutil
import subprocess
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partal_nb.annotate.query import Query, legend
from partal_nb.annotate.submission import LIMITS, from_npy, from_png, open_zip, to_npy, to_png
from partal_nb.annotate.label_studio import brush_mask, brush_rle
from partal_nb.annotate.formats import FORMATS, detect_format
from partal_nb.tasks import semseg_task, standard_task
from partal_nb.data.prepare import open_source
from partal_nb.data.rooms import render_room

SAMPLES = dict(nyuv2_192x144=('semseg', 'depth', 'normals'), voc2012=('semseg',), ecssd60=('saliency',),
               pascal_part18=('semseg', 'parts', 'edges'), bsds500_val60=('edges',))
VALUES = ('depth', 'normals')
ROUNDS = [(s, t, f) for s, tasks in SAMPLES.items() for t in tasks
          for f in (('png', 'npy') if t in VALUES else FORMATS)]

def queries(source, name, n=3): # whose guess is the truth
    task = source.tasks[name]
    for i in source.ids(name)[::7]:
        if n == 0: return
        rgb, label = source.rgb(i), source.label(i, name)
        if (label == task.ignore).all(): continue
        n -= 1
        yield Query(i, task, rgb, label, np.random.default_rng(0).random(rgb.shape[:2]))

def play(format, folder, task): # an annotator who takes every guess as it is; where the answers are
    if format == 'cvat': return folder/'guess/guess.zip'
    if format != 'label-studio':
        shutil.copytree(folder/'guess', folder/'labels', dirs_exist_ok=True)
        return folder
    tasks = json.loads((folder/'tasks.json').read_bytes())
    for k, t in enumerate(tasks):
        result = t.pop('predictions')[0]['result']
        annotation = dict(id=k, result=result, was_cancelled=False, completed_by=1, lead_time=60*k)
        t.update(id=k, annotations=[annotation])
    (folder/'export.json').write_text(json.dumps(tasks))
    return folder/'export.json'

@pytest.mark.parametrize('sample,name,format', ROUNDS, ids=['-'.join(r) for r in ROUNDS])
def test_real_labels_go_out_and_come_back(shared, tmp_path, sample, name, format):
    asked = list(queries(open_source(shared/sample), name))
    task, truth = asked[0].task, {q.image: q.guess for q in asked}
    assert FORMATS[format].write(tmp_path/'q', task, iter(asked)) == list(truth)
    back = play(format, tmp_path/'q', task)
    answers = list(FORMATS[format].read(back, task, {q.image: q.rgb.shape[:2] for q in asked}))
    assert [a.problem for a in answers] == [None]*len(asked) and {a.image for a in answers} == set(truth)
    assert detect_format(back) == format
    if format == 'label-studio': assert [a.minutes for a in answers] == list(range(len(asked)))
    for a in answers:
        y = truth[a.image]
        assert a.label.shape == y.shape and a.label.dtype == task.form.dtype
        if task.form.discrete: assert np.array_equal(a.label, y)
        elif name == 'depth': assert abs(a.label - y).max() <= (.0005 if format == 'png' else 0) + 1e-6
        else:
            void = (y == 0).all(2)
            assert np.array_equal((a.label == 0).all(2), void)
            angle = np.degrees(np.arccos(np.clip((a.label*y).sum(2)[~void], -1, 1)))
            assert angle.max() < (.5 if format == 'png' else .05)

def test_what_goes_out_can_be_looked_at(shared, tmp_path):
    asked = list(queries(open_source(shared/'nyuv2_192x144'), 'semseg'))
    FORMATS['png'].write(tmp_path, asked[0].task, asked)
    for q in asked:
        assert np.array_equal(np.array(Image.open(tmp_path/f'images/{q.image}.png')), q.rgb)
        assert Image.open(tmp_path/f'uncertainty/{q.image}.png').size == q.rgb.shape[1::-1]
        seen = np.array(Image.open(tmp_path/f'guess/{q.image}.png').convert('RGB'))
        colors = {p.value: p.color for p in legend(q.task)}
        for v in np.unique(q.guess): assert (seen[q.guess[..., 0] == v] == colors[int(v)]).all()

semseg = semseg_task(['wall', 'floor', 'chair'])
depth, normals, edges = map(standard_task, ('depth', 'normals', 'edges'))
SIZE, SIZES = (24, 32), {f'room{k}': (24, 32) for k in range(3)}

def label_of(task, k=0):
    room = render_room(k, *SIZE)
    return room['semseg'][..., None] % 3 if task is semseg else room[task.name].reshape(*SIZE, -1)

def batch(folder, format, task):
    def query(k, image): return Query(image, task, render_room(k, *SIZE)['rgb'], label_of(task, k))
    FORMATS[format].write(folder, task, [query(k, i) for k, i in enumerate(SIZES)])
    return play(format, folder, task)

def test_a_zip_is_read_as_its_folder_is(tmp_path):
    batch(tmp_path/'q', 'png', semseg)
    shutil.make_archive(tmp_path/'whole', 'zip', tmp_path/'q')
    shutil.make_archive(tmp_path/'wrapped', 'zip', tmp_path, 'q')
    shutil.make_archive(tmp_path/'labels', 'zip', tmp_path/'q/labels')
    shutil.copytree(tmp_path/'q', tmp_path/'all/semseg')
    shutil.copytree(tmp_path/'q', tmp_path/'all/other')
    for path in ('q', 'q/labels', 'whole.zip', 'wrapped.zip', 'labels.zip', 'all'):
        answers = list(FORMATS['png'].read(tmp_path/path, semseg, SIZES))
        assert [(a.image, a.problem) for a in answers] == [(i, None) for i in SIZES], path
        for k, a in enumerate(answers): assert np.array_equal(a.label, label_of(semseg, k))
    one, = FORMATS['png'].read(tmp_path/'q/labels/room2.png', semseg, SIZES)
    assert one.image == 'room2' and np.array_equal(one.label, label_of(semseg, 2))

def evil_zip(path, names, link=None):
    with zipfile.ZipFile(path, 'w') as z:
        for n in names: z.writestr(n, to_png(label_of(semseg), semseg))
        if link:
            info = zipfile.ZipInfo('labels/room2.png')
            info.external_attr = 0o120777 << 16
            z.writestr(info, link)
    return path

def test_no_name_from_outside_becomes_a_path(tmp_path):
    secret = tmp_path/'secret.png'
    secret.write_bytes(to_png(label_of(semseg), semseg))
    names = ['labels/room0.png', '../labels/room1.png', str(secret), 'labels/../../secret.png', 'C:\\room1.png',
             'labels/room1.png/../../../x.png']
    before = sorted(tmp_path.rglob('*'))
    answers = list(FORMATS['png'].read(evil_zip(tmp_path/'z.zip', names, link='../secret.png'), semseg, SIZES))
    assert [a.image for a in answers if a.label is not None] == ['room0']
    assert all('leaves its folder' in a.problem for a in answers if a.source in names[1:4] + names[5:])
    assert 'not a whole PNG' in next(a.problem for a in answers if a.source == 'labels/room2.png')
    assert sorted(tmp_path.rglob('*')) == sorted([*before, tmp_path/'z.zip'])
    (tmp_path/'f/labels').mkdir(parents=True)
    (tmp_path/'f/labels/room0.png').symlink_to(secret)
    (tmp_path/'f/labels/room1.png').write_bytes(secret.read_bytes())
    answers = {a.image: a for a in FORMATS['png'].read(tmp_path/'f', semseg, SIZES)}
    assert 'leaves its folder' in answers['room0'].problem and answers['room1'].label is not None

def test_a_file_of_a_zip_that_explodes_costs_itself(tmp_path):
    with zipfile.ZipFile(tmp_path/'z.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('labels/room0.png', 'w', force_zip64=True) as f:
            for _ in range(300): f.write(bytes(1 << 20))
        z.writestr('labels/room1.png', to_png(label_of(semseg), semseg))
    answers = {a.image: a for a in FORMATS['png'].read(tmp_path/'z.zip', semseg, SIZES)}
    assert 'room0.png' in answers['room0'].problem and 'expected at most 100 times' in answers['room0'].problem
    assert answers['room1'].problem is None and answers['room1'].label is not None
    with pytest.raises(ValueError, match='would unpack to 314,.* bytes, expected at most 268,435,456'):
        open_zip(tmp_path/'z.zip', LIMITS | dict(ratio=2000, bytes=1 << 28))

def test_a_file_that_claims_to_be_huge_is_not_unpacked():
    png = to_png(label_of(semseg), semseg)
    for side, message in ((9000, 'expected 24 × 32 pixels .* got 9000 × 9000'),
                          (60000, 'a.png .task semseg.: not a whole PNG .* exceeds limit')):
        ihdr = b'IHDR' + side.to_bytes(4, 'big')*2 + png[24:29]
        huge = png[:12] + ihdr + zlib.crc32(ihdr).to_bytes(4, 'big') + png[33:]
        with pytest.raises(ValueError, match=message): from_png(huge, semseg, SIZE, 'a.png')
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr='<f4', fortran_order=False, shape=(24, 32, 1 << 40)))
    with pytest.raises(ValueError, match='expected shape'): from_npy(head.getvalue(), depth, SIZE, 'a.npy')

def test_a_palette_that_is_too_short():
    def chunk(name, data):
        return len(data).to_bytes(4, 'big') + name + data + zlib.crc32(name + data).to_bytes(4, 'big')
    size = (4).to_bytes(4, 'big') + (1).to_bytes(4, 'big')
    head = chunk(b'IHDR', size + bytes([8, 3, 0, 0, 0])) + chunk(b'PLTE', bytes(3) + b'\x80\0\0')
    pixels = chunk(b'IDAT', zlib.compress(bytes([0, 0, 1, 2, 3])))
    png = b'\x89PNG\r\n\x1a\n' + head + pixels + chunk(b'IEND', b'')
    with pytest.raises(ValueError, match='a palette of 2 colors, but pixels of number 3'):
        from_png(png, semseg, (1, 4), 'a.png')

@pytest.mark.parametrize('task', [semseg, depth, normals, edges], ids=lambda t: t.name)
def test_a_file_cut_anywhere_is_refused_by_name(task):
    for data, read, step in ((to_png(label_of(task), task), from_png, 7), (to_npy(label_of(task), task), from_npy, 61)):
        whole, refused = read(data, task, SIZE, 'a'), 0
        assert np.isfinite(whole).all()
        for n in range(0, len(data), step):
            try: got = read(data[:n], task, SIZE, 'a.b')
            except ValueError as e: refused += str(e).startswith('a.b')
            else: assert np.array_equal(got, whole), n # only checksums and an empty chunk are lost
        assert refused >= len(data)//step - 4

@pytest.mark.filterwarnings('ignore:overflow:RuntimeWarning', 'ignore:invalid escape:DeprecationWarning')
@pytest.mark.parametrize('task', [semseg, depth, normals, edges], ids=lambda t: t.name)
def test_a_file_with_wrong_bytes_is_refused_or_still_a_label(task):
    rng, refused = np.random.default_rng(0), 0
    for data, read in ((to_png(label_of(task), task), from_png), (to_npy(label_of(task), task), from_npy)):
        for k in range(400):
            spoiled = bytearray(data)
            for at in rng.integers(0, len(data) if k % 2 else 130, 3): spoiled[at] = rng.integers(0, 256)
            try: assert read(bytes(spoiled), task, SIZE, 'a').shape == label_of(task).shape
            except ValueError: refused += 1
    assert refused

@pytest.mark.parametrize('task,wrong,message', [
    (depth, lambda y: y*1000, 'unit off by a thousand'),
    (depth, lambda y: y/1000, 'unit off by a thousand'),
    (depth, lambda y: -y, 'depths are negative'),
    (depth, lambda y: y*0, 'all of it is void'),
    (depth, lambda y: y*np.nan, 'not finite'),
    (depth, lambda y: y[:, ::2], 'expected'),
    (normals, lambda y: y*.5, 'not of length 1'),
    (normals, lambda y: -y, 'look away'),
    (normals, lambda y: y[..., :1], 'expected shape'),
    (semseg, lambda y: y + 3, 'there are 3 classes'),
    (semseg, lambda y: y*0 + 255, 'all of it is void'),
    (semseg, lambda y: y + .25, 'expected integers'),
    (edges, lambda y: y + 1, 'there are 2 classes'),
    (semseg, lambda y: y.swapaxes(0, 1), 'expected')], ids=range(14))
def test_a_wrong_array_costs_only_itself(tmp_path, task, wrong, message):
    batch(tmp_path, 'npy', task)
    np.save(tmp_path/'labels/room1.npy', wrong(label_of(task, 1)))
    bad = {a.image: a for a in FORMATS['npy'].read(tmp_path, task, SIZES)}
    assert message in bad['room1'].problem and 'room1.npy' in bad['room1'].problem and bad['room1'].label is None
    assert all(bad[i].problem is None and bad[i].label is not None for i in ('room0', 'room2'))

def spoil(d, rng): # a copy of JSON's content, with one thing in it gone or another
    d = json.loads(json.dumps(d))
    at, places = [d], []
    while at:
        x = at.pop()
        for k in (list(x) if isinstance(x, dict) else range(min(len(x), 40))):
            places.append((x, k))
            if isinstance(x[k], (dict, list)): at.append(x[k])
    x, k = rng.choice(places)
    if rng.random() < .2: del x[k]
    else: x[k] = rng.choice([None, -1, 1 << 40, 1e308, 'x', '', '../x', [], {}, [[]], [None], True, x])
    return d

@pytest.mark.parametrize('format', ['label-studio', 'coco'])
def test_spoiled_json_is_refused_and_never_breaks_the_reader(tmp_path, format):
    back = batch(tmp_path, format, semseg)
    file = tmp_path/'labels/instances.json' if format == 'coco' else back
    rng, outcomes = random.Random(0), dict(taken=0, problem=0, refused=0)
    good, truth = json.loads(file.read_bytes()), {i: label_of(semseg, k) for k, i in enumerate(SIZES)}
    if format == 'label-studio':
        for t in good: t['data'] |= dict(image='', uncertainty='')
    for _ in range(400):
        try: text = json.dumps(spoil(good, rng))
        except (ValueError, RecursionError): continue # it held itself
        file.write_text(text)
        try: answers = list(FORMATS[format].read(back, semseg, SIZES))
        except (ValueError, FileNotFoundError): outcomes['refused'] += 1; continue
        for a in answers:
            outcomes['problem' if a.problem else 'taken'] += 1
            if a.label is not None: assert a.label.shape == (*SIZE, 1) and a.image in truth
    assert min(outcomes.values()) > 3, outcomes

def test_random_codes_of_label_studio_end():
    rng = np.random.default_rng(0)
    code = brush_rle(label_of(semseg)[..., 0] == 1)
    for _ in range(300):
        spoiled = np.array(code)
        spoiled[rng.integers(0, len(code), 3)] = rng.integers(0, 256, 3)
        try: assert brush_mask(spoiled.tolist(), SIZE).shape == SIZE
        except ValueError: pass

pytestmark = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning') # pycocotools with NumPy 2

def outside(tools, script, *args): # in a Python that has the tools' libraries
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    subprocess.run([tools/'python', '-c', script, *map(str, args)], check=True, env=env)

DATUMARO = """
import sys
from pathlib import Path
import numpy as np
import datumaro as dm
from datumaro.components.annotation import Mask
source, kind, out = sys.argv[1:]
data = dm.Dataset.import_from(source, kind)
names = [c.name for c in data.categories()[dm.AnnotationType.label]]
for item in data:
    masks = {names[a.label]: a.image.astype(bool) for a in item.annotations if isinstance(a, Mask)}
    np.savez(Path(out)/f'{item.id}.npz', **masks)
data.export(out + '/again', kind, save_media=False)
if kind == 'coco_instances': data.export(out + '/panoptic', 'coco_panoptic', save_media=False)
"""

@pytest.mark.parametrize('sample,name', [
    ('nyuv2_192x144', 'semseg'), ('pascal_part18', 'parts'), ('bsds500_val60', 'edges')])
@pytest.mark.parametrize('format', ['cvat', 'coco'])
def test_datumaro_reads_what_we_write_and_we_read_what_it_writes(shared, tools, tmp_path, sample, name, format):
    asked = list(queries(open_source(shared/sample), name, n=2))
    task, sizes = asked[0].task, {q.image: q.rgb.shape[:2] for q in asked}
    source, kind, out = tmp_path/'in', 'voc_segmentation' if format == 'cvat' else 'coco_instances', tmp_path/'out'
    out.mkdir()
    FORMATS[format].write(tmp_path/'q', task, asked)
    if format == 'cvat': zipfile.ZipFile(tmp_path/'q/guess/guess.zip').extractall(source)
    else:
        for folder in ('annotations', 'images'): (source/folder).mkdir(parents=True)
        shutil.copy(tmp_path/'q/guess/instances.json', source/'annotations/instances_default.json')
    outside(tools, DATUMARO, source, kind, out)
    for q in asked:
        masks = np.load(out/f'{q.image}.npz')
        assert set(masks) - {'background'} == {p.name for p in legend(q.task)[1:] if (q.guess == p.value).any()}
        for p in legend(q.task)[1:]:
            if p.name in masks: assert np.array_equal(masks[p.name], q.guess[..., 0] == p.value)
    for again in ['again', *(['panoptic'] if format == 'coco' else [])]:
        answers = list(FORMATS[format].read(out/again, task, sizes))
        assert [a.problem for a in answers] == [None]*len(asked), again
        for a in answers: assert np.array_equal(a.label, next(q.guess for q in asked if q.image == a.image))

SDK = """
import json, sys
import numpy as np
from label_studio_sdk.converter.brush import decode_rle, mask2rle
source, out = sys.argv[1:]
masks = np.load(source)
codes = json.load(open(source + '.json'))
read = {k: decode_rle(codes[k]).reshape(*masks[k].shape, 4) for k in codes}
np.savez(out, **read)
json.dump({k: mask2rle((masks[k]*255).astype(np.uint8)) for k in codes}, open(out + '.json', 'w'))
"""

def test_label_studios_own_converter_agrees_with_our_code(shared, tools, tmp_path):
    q = next(queries(open_source(shared/'nyuv2_192x144'), 'semseg'))
    masks = {f'c{v}': q.guess[..., 0] == v for v in np.unique(q.guess)}
    masks |= dict(noise=np.random.default_rng(0).random((37, 53)) > .5, long=np.ones((300, 400), bool))
    np.savez(tmp_path/'m.npz', **masks)
    Path(f'{tmp_path}/m.npz.json').write_text(json.dumps({k: brush_rle(m) for k, m in masks.items()}))
    outside(tools, SDK, tmp_path/'m.npz', tmp_path/'o.npz')
    read, codes = np.load(tmp_path/'o.npz'), json.loads(Path(f'{tmp_path}/o.npz.json').read_text())
    for k, m in masks.items():
        assert np.array_equal(read[k], np.repeat(m[..., None], 4, 2)*255)
        assert np.array_equal(brush_mask(codes[k], m.shape), m)

CVAT = """
import json, sys
from cvat_sdk import models
for label in json.load(open(sys.argv[1])):
    known = models.PatchedLabelRequest
    assert set(label) <= set(known.openapi_types), label
    assert label['type'] in models.LabelType.allowed_values['value',].values(), label
    assert known._from_openapi_data(**label).to_dict() == label
"""

@pytest.mark.parametrize('task', [semseg, edges], ids=lambda t: t.name)
def test_cvats_own_sdk_knows_our_labels(tools, tmp_path, task):
    "Their keys and kinds; its server, which can not run everywhere, would check the rest"
    batch(tmp_path, 'cvat', task)
    outside(tools, CVAT, tmp_path/'labels.json')
