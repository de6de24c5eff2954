"Files that readers get wrong, through every door: check, prepare, init and tell refuse the same, and read the same"
import io
import json
import os
import shutil
import struct
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from partal_nb.annotate.ask import ask
from partal_nb.annotate.project import init, open_project
from partal_nb.annotate.tell import tell
from partal_nb.cli import app
from partal_nb.core import write_atomic, write_json
from partal_nb.data.dataset import Dataset
from partal_nb.data.derive import normals_from_depth
from partal_nb.data.folders import Folder, own_layout
from partal_nb.data.labels import encode_label, image_size, png_bytes, read_label, read_rgb, voc_colors
from partal_nb.data.prepare import check, open_source, prepare
from partal_nb.data.rooms import render_room
from partal_nb.data.entries import split_entry
from partal_nb.tasks import Pair, standard_task

H, W = 8, 12
TINY = dict(height=32, width=48, features=8, encoder='test_efficientnet', pretrained=False, train_by='steps',
            train_for=2, passes=2, device='cpu')
SEMSEG = dict(name='semseg', classes=['background', 'a', 'b', 'c'])
PLAIN = dict(name='semseg', classes=['wall', 'floor', 'chair'])
SALIENCY, DEPTH, NORMALS = dict(name='saliency'), dict(name='depth'), dict(name='normals')
HEIGHT = dict(name='height', form='values', channels=1, loss='l1', metric='rmse')
IDS = np.arange(H*W).reshape(H, W) % 4
MASK = (IDS > 1).astype(np.uint8)
METERS = np.where(IDS == 0, 0, 1. + np.arange(H*W).reshape(H, W)/20).astype(np.float32)
STEEP = np.stack([IDS*.2, .3 + 0*IDS, np.sqrt(1 - (IDS*.2)**2 - .09)], 2).astype(np.float32)

def npy(a):
    np.save(f := io.BytesIO(), a)
    return f.getvalue()

def png(a, palette=None, bits=None):
    image = Image.fromarray(a)
    if palette is not None: image.putpalette(np.uint8(palette).ravel().tolist())
    (image if bits is None else image.convert('1')).save(f := io.BytesIO(), 'png')
    return f.getvalue()

def raw_png(a, bits, kind): # kind: 0 gray, 2 color; as other programs write it, and Pillow does not
    def number(n): return struct.pack('>I', n)
    def chunk(name, data): return number(len(data)) + name + data + number(zlib.crc32(name + data))
    if bits < 8:
        width = np.unpackbits(np.uint8(a)[..., None], axis=2)[..., -bits:].reshape(len(a), -1)
        rows = np.packbits(width, axis=1)
    else: rows = a.astype('>u2').reshape(len(a), -1).view(np.uint8)
    data = b''.join(b'\0' + row.tobytes() for row in rows)
    head = struct.pack('>IIBBBBB', a.shape[1], a.shape[0], bits, kind, 0, 0, 0)
    whole = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + whole

def turned_png(a):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(a).save(f := io.BytesIO(), 'png', exif=exif)
    return f.getvalue()

def with_alpha(a, mode, palette=None):
    image = Image.fromarray(a)
    if palette is not None: image.putpalette(np.uint8(palette).ravel().tolist())
    kw = dict(transparency=0) if mode == 'P' else {}
    (image if mode == 'P' else image.convert(mode)).save(f := io.BytesIO(), 'png', **kw)
    return f.getvalue()

def jpeg(a):
    Image.fromarray(a).save(f := io.BytesIO(), 'jpeg')
    return f.getvalue()

def colors(n): return np.round((n + 1)*127.5).astype(np.uint8)

def bad_number(v): return np.where((IDS == 3) & (np.arange(W) > 6), v, IDS)

def nothing(v): return np.where(METERS == 0, v, METERS)

PACKED = [0, 2, 3] # the palette has only the colors that are used
BYTES = np.uint8(np.where(IDS == 1, 3, np.where(IDS == 0, 0, 2)))

CASES = { # name → entry of the task, suffix, content of the file, what is refused (a text) or the label
    'jpeg': (SEMSEG, '.jpg', jpeg(np.uint8(IDS)), 'expected .png or .npy, got .jpg'),
    'webp': (SEMSEG, '.webp', b'RIFF', 'got .webp, which may change numbers'),
    'a JPEG that is called PNG': (SEMSEG, '.png', jpeg(np.uint8(IDS)), 'not a whole PNG'),
    '259': (SEMSEG, '.npy', npy(bad_number(259)), 'value 259, but there are 4 classes (0 to 3) and void (255)'),
    '511': (SEMSEG, '.npy', npy(bad_number(511)), 'pixels of value 511'),
    '-253': (SEMSEG, '.npy', npy(bad_number(-253)), 'pixels of value -253'),
    '7.9': (SEMSEG, '.npy', npy(bad_number(7.9)), 'expected integers, got'),
    'nan': (SEMSEG, '.npy', npy(bad_number(np.nan)), 'such as nan'),
    'whole floats': (SEMSEG, '.npy', npy(IDS.astype(np.float32)), IDS),
    'from 1, unstated': (PLAIN, '.png', png(np.uint8(IDS)), 'state "first_class": 1'),
    'from 1': (PLAIN | dict(first_class=1), '.png', png(np.uint8(IDS)), np.where(IDS == 0, 255, IDS - 1)),
    'void 9': (SEMSEG | dict(void=9), '.npy', npy(bad_number(9)), bad_number(255)),
    'VOC palette': (SEMSEG, '.png', png(np.uint8(IDS), voc_colors()), IDS),
    'packed palette': (SEMSEG, '.png', png(np.uint8(np.searchsorted(PACKED, BYTES)), voc_colors()[PACKED]), BYTES),
    'in colors': (SEMSEG, '.png', png(voc_colors()[IDS]), IDS),
    'soft edges': (SEMSEG, '.png', png(np.uint8(voc_colors()[IDS]//3)), 'colors of no class'),
    '0 and 255': (SALIENCY, '.png', png(MASK*255), '0 and 255 would be no and void'),
    '0 and 255 in an array': (SALIENCY, '.npy', npy(MASK*255), '"yes": 255'),
    '255 means yes': (SALIENCY | dict(yes=255), '.png', png(MASK*255), MASK),
    '0 and 1': (SALIENCY, '.png', png(MASK), MASK),
    '1 bit': (SALIENCY, '.png', png(MASK*255, bits=1), MASK),
    'soft mask': (SALIENCY | dict(yes=255), '.png', png(np.uint8(MASK*200 + 9)), 'expected 0 for no and 255 for yes'),
    'void': (SALIENCY, '.png', png(MASK*0 + 255), '0 and 255 would be no and void'),
    'all void': (SEMSEG, '.png', png(np.uint8(IDS*0 + 255)), 'all of it is void'),
    'too small': (SEMSEG, '.png', png(np.uint8(IDS[:4])), 'expected 8 × 12 pixels (height × width), got 4 × 12'),
    'millimeters': (DEPTH, '.png', png(np.uint16(METERS*1000)), np.float32(np.uint16(METERS*1000)/1000)),
    'KITTI': (DEPTH | dict(scale=1/256), '.png', png(np.uint16(METERS*256)), np.uint16(METERS*256)/256),
    'centimeters': (DEPTH | dict(scale=.01), '.npy', npy(np.float32(METERS*100)), METERS),
    'float16': (DEPTH, '.npy', npy(np.float16(METERS)), np.float32(np.float16(METERS))),
    '65535': (DEPTH, '.png', png(np.uint16(nothing(65.535)*1000)), '"void": [65535]'),
    '65535 is none': (DEPTH | dict(void=65535), '.png', png(np.uint16(np.round(nothing(65.535)*1000))),
                      np.float32(np.uint16(METERS*1000 + .5)/1000)),
    '1e10': (DEPTH, '.npy', npy(nothing(1e10)), '"void": [1e+10]'),
    'inf': (DEPTH, '.npy', npy(nothing(np.inf)), 'values are not finite'),
    'nan is none': (DEPTH | dict(void='nan'), '.npy', npy(nothing(np.nan)), METERS),
    '-1': (DEPTH, '.npy', npy(nothing(-1)), 'depths are negative'),
    'bytes': (DEPTH, '.npy', npy(np.uint8(METERS*40)), 'expected 16 bit millimeters or floats in meters, got 8 bit'),
    'bytes in a PNG': (DEPTH, '.png', png(np.uint8(METERS*40)), 'got 8 bit gray'),
    'millimeters as floats': (DEPTH, '.npy', npy(METERS*1000), 'off by a thousand'),
    'inverse': (DEPTH | dict(inverse=True), '.npy', npy(np.where(METERS > 0, 1/np.maximum(METERS, .1), 0)), METERS),
    'normals': (NORMALS, '.npy', npy(STEEP), STEEP),
    'normals in a PNG': (NORMALS, '.png', png(colors(STEEP)), STEEP),
    '0 to 1': (NORMALS, '.npy', npy((STEEP + 1)/2), 'state "convention": "0to1"'),
    '0 to 1, stated': (NORMALS | dict(convention='0to1'), '.npy', npy((STEEP + 1)/2), STEEP),
    'too long': (NORMALS, '.npy', npy(STEEP*1.07), 'not of length 1'),
    'z away': (NORMALS, '.png', png(colors(STEEP*[1, 1, -1])), 'most normals look away from the viewer'),
    'z away, stated': (NORMALS | dict(convention='z_away'), '.png', png(colors(STEEP*[1, 1, -1])), STEEP),
    'blue, green, red': (NORMALS | dict(convention='bgr'), '.png', png(colors(STEEP[..., ::-1].copy())), STEEP),
    'y down': (NORMALS | dict(convention=['y_down']), '.npy', npy(STEEP*[1, -1, 1]), STEEP),
    'values in bytes': (HEIGHT, '.png', png(np.uint8(IDS)), 'write .npy, or state "scale"'),
    'values with a scale': (HEIGHT | dict(scale=.5, ignore=-1), '.png', png(np.uint8(IDS*80)), IDS*40.),
    'values': (HEIGHT | dict(ignore=-1), '.npy', npy(IDS*85.), IDS*85.)}
SKY = np.where(np.arange(H)[:, None] < 5, 65535, np.uint16(METERS*1000))
NINES = np.where(IDS == 2, np.nan, IDS)
CASES |= { # what other programs make
    'gray of 2 bit': (SEMSEG, '.png', raw_png(IDS, 2, 0), 'gray of 2 bit, which is stretched'),
    'gray of 4 bit': (SEMSEG, '.png', raw_png(IDS, 4, 0), 'gray of 4 bit, which is stretched'),
    '16 bit a color': (NORMALS, '.png', raw_png(np.uint16(colors(STEEP))*257, 16, 2), 'of which 8 would be lost'),
    'turned by EXIF': (SALIENCY, '.png', turned_png(MASK), 'an orientation in its EXIF'),
    'RGB with alpha': (SALIENCY, '.png', with_alpha(MASK*255, 'RGBA'), 'got RGB with transparency'),
    'gray with alpha': (SEMSEG, '.png', with_alpha(np.uint8(IDS), 'LA'), 'got gray with transparency'),
    'palette with alpha': (SEMSEG, '.png', with_alpha(np.uint8(IDS), 'P', voc_colors()), IDS),
    'big-endian': (SEMSEG, '.npy', npy(IDS.astype('>i4')), IDS),
    'column by column': (DEPTH, '.npy', npy(np.asfortranarray(METERS)), METERS),
    'channels first': (NORMALS, '.npy', npy(STEEP.transpose(2, 0, 1).copy()), 'expected shape (8, 12, 3)'),
    'one row too much': (SEMSEG, '.npy', npy(IDS[None]), 'expected shape (8, 12, 1), got (1, 8, 12)'),
    'one-hot': (SEMSEG, '.npy', npy(np.eye(4)[IDS]), 'expected shape (8, 12, 1), got (8, 12, 4)'),
    'nan is none, of classes': (SEMSEG | dict(void='nan'), '.npy', npy(NINES), np.where(IDS == 2, 255, IDS)),
    'mostly 65535': (DEPTH, '.png', png(SKY.astype(np.uint16)), '"void": [65535]'),
    'signed bytes': (NORMALS, '.npy', npy(np.round(STEEP*[1, -1, 1]*127).astype(np.int8)), 'expected 0 to 255'),
    '1 bit, 255 means yes': (SALIENCY | dict(yes=255), '.png', png(MASK*255, bits=1), MASK),
    'white, 255 means yes': (SALIENCY | dict(yes=255), '.png', png((MASK*255)[..., None].repeat(3, 2)), MASK),
    'from 1, in VOC colors': (PLAIN | dict(first_class=1), '.png', png(np.uint8(IDS), voc_colors()),
                              np.where(IDS == 0, 255, IDS - 1)),
    'VOC colors of other classes': (PLAIN, '.png', png(np.uint8(IDS % 3), voc_colors()), 'which of the two counts'),
    'empty': (SEMSEG, '.png', b'', 'not a whole PNG (0 bytes)'),
    'empty array': (DEPTH, '.npy', b'', 'not a whole array of the size of its image (0 bytes)'),
    'cut off': (SEMSEG, '.png', png(np.uint8(IDS))[:50], 'not a whole PNG (50 bytes)')}
ONLY_FOLDERS = { # a task that is stated in a file of tasks alone
    '255 may be a value': (HEIGHT, '.npy', npy(IDS*85.), 'pixels are 255, which is void unless')}

def made(path, entries, files=(), size=(H, W)): # files: (name, content)
    write_json(path/'tasks.json', entries)
    for i in 'xy': write_atomic(path/f'rgb/{i}.png', png_bytes(np.full((*size, 3), 99, np.uint8)))
    for name, data in files: write_atomic(path/name, data)
    return path

def came(path, entry, suffix, data): return made(path, [entry], [(f"{entry['name']}/x{suffix}", data)])

def close(got, expected):
    "Equal, but for what a PNG rounds"
    eps = .011 if got.shape[2] == 3 else 6e-4 if got.dtype == np.float32 else 0
    return got.shape == np.atleast_3d(expected).shape and abs(got - np.atleast_3d(expected)).max() <= eps

def by_prepare(folder, name, tmp_path): return prepare(folder, tmp_path/'prepared', progress=False).label('x', name)

def by_init(folder, name, tmp_path):
    p = init(folder, tmp_path/'project', **TINY)
    return kept(p, name)

def by_init_with_a_file(folder, name, tmp_path):
    (folder/'tasks.json').rename(tmp_path/'tasks.json')
    return kept(init(folder, tmp_path/'project', tmp_path/'tasks.json', **TINY), name)

def kept(p, name, image='x'):
    task = p.task(name)
    with p.ledger() as ledger: sha256 = ledger.labels()[Pair(image, name)]
    how = {k: v for k, v in task.form.file(task).items() if k != 'suffix'}
    return read_label(p.label_file(image, name, sha256), task, **how)

@pytest.mark.parametrize('door', [by_prepare, by_init, by_init_with_a_file])
@pytest.mark.parametrize('name', [*CASES, *ONLY_FOLDERS])
def test_a_folder(door, name, tmp_path):
    entry, suffix, data, expected = (CASES | ONLY_FOLDERS)[name]
    folder = came(tmp_path/'mine', entry, suffix, data)
    faults = check(folder, progress=False).faults
    if not isinstance(expected, str):
        assert faults == []
        assert close(door(folder, entry['name'], tmp_path), expected)
        return
    file = str(folder/entry['name']/f'x{suffix}')
    assert [f.what for f in faults if expected in f.what and file in f.what and f"(task {entry['name']})" in f.what]
    with pytest.raises(ValueError) as e: door(folder, entry['name'], tmp_path)
    assert expected in str(e.value)
    assert not list(tmp_path.glob('*/dataset.json')) and not (tmp_path/'project').exists()

@pytest.fixture(scope='module')
def projects(tmp_path_factory):
    "One for each task, both pairs asked for: a label is imported into a copy"
    found = {}
    def get(entry):
        task, _ = split_entry(entry)
        key = json.dumps(task)
        if key not in found:
            place = tmp_path_factory.mktemp('project')
            p = init(made(place/'mine', [task]), place/'project', place/'mine/tasks.json', **TINY)
            ask(p.folder, budget=2, progress=False)
            found[key] = p.folder
        return found[key]
    return get

@pytest.mark.parametrize('name', CASES)
def test_an_answer(name, projects, tmp_path):
    entry, suffix, data, expected = CASES[name]
    shutil.copytree(projects(entry), tmp_path/'project')
    back = tmp_path/f"back/{entry['name']}"
    write_atomic(back/f'labels/x{suffix}', data)
    write_json(back/'format.json', split_entry(entry)[1])
    imported = tell(tmp_path/'project', 1, tmp_path/'back')
    if isinstance(expected, str):
        (task, why), = imported.refused
        assert task == entry['name'] and expected in why and f'x{suffix}' in why
        assert not imported.took
    else:
        assert not imported.refused
        assert close(kept(open_project(tmp_path/'project'), entry['name']), expected)

def test_faults_are_listed_together_and_do_not_end_a_preparation(tmp_path):
    folder = made(tmp_path/'mine', [DEPTH, SEMSEG], [
        ('depth/x.png', png(np.uint16(METERS[:4]*1000))), ('depth/y.jpg', jpeg(MASK)),
        ('semseg/y.png', png(np.uint8(IDS + 9))), ('semseg/z.png', png(np.uint8(IDS))), ('rgb/more/a.png', b''),
        ('depth/y.exr', b'')])
    faults = [f.what for f in check(folder, progress=False).faults]
    expected = ('got 4 × 12', 'got .jpg', 'pixels of value 12', "no image 'z'", 'a folder inside of rgb/', 'got .exr')
    assert len(faults) == 6 and all(any(e in f for f in faults) for e in expected), faults
    for f in (folder/'depth/y.exr', folder/'rgb/more/a.png'): f.unlink()
    (folder/'rgb/more').rmdir()
    with pytest.raises(ValueError, match='4 faults, the data set is not finished') as e:
        prepare(folder, tmp_path/'p', progress=False)
    assert all(text in str(e.value) for text in expected[:4])

def test_a_label_of_another_size_is_resampled_only_when_asked(tmp_path):
    half = IDS[::2, ::2]
    folder = came(tmp_path/'mine', SEMSEG, '.png', png(np.uint8(half)))
    with pytest.raises(ValueError, match='got 4 × 6'): prepare(folder, tmp_path/'p', progress=False)
    got = prepare(folder, tmp_path/'q', progress=False, resize=True).label('x', 'semseg')
    assert np.array_equal(got[..., 0], half.repeat(2, 0).repeat(2, 1))

def test_the_cure_of_a_wrong_size_is_named_and_does_not_squeeze(tmp_path):
    folder = came(tmp_path/'mine', SEMSEG, '.png', png(np.ascontiguousarray(np.uint8(IDS.T))))
    fault, = check(folder, progress=False).faults
    assert 'partal prepare --resize' in fault.what
    with pytest.raises(ValueError, match='of another shape, so it is cropped or turned'):
        prepare(folder, tmp_path/'p', progress=False, resize=True)

@pytest.mark.parametrize('entry,why', [
    (SEMSEG | dict(void=[1]), 'void 1: expected numbers that are no classes'),
    (SEMSEG | dict(void=0), '"first_class": 1'),
    (dict(name='semseg', classes=['a', 'b'], ignore=2, first_class=1), 'both void and the last class'),
    (SALIENCY | dict(yes=255, void=255), 'that are no classes')])
def test_a_void_that_is_stated_and_a_class(entry, why, tmp_path):
    folder = came(tmp_path/'mine', entry, '.png', png(np.uint8(IDS % 2)))
    assert why in check(folder, progress=False).faults[0].what
    for door in (by_prepare, by_init, by_init_with_a_file):
        with pytest.raises(ValueError) as e: door(folder, entry['name'], tmp_path)
        assert why in str(e.value)

def test_a_file_that_no_reader_knows_is_named_and_notes_are_not(tmp_path):
    folder = came(tmp_path, SEMSEG, '.png', png(np.uint8(IDS)))
    unknown = ['semseg/y.hdf5', 'semseg/y.pgm', 'rgb/z.heic']
    beside = ['semseg/notes.txt', 'rgb/Thumbs.db', 'semseg/.DS_Store']
    for name in unknown + beside: write_atomic(folder/name, b'?')
    faults = [f.what.split(': ')[0] for f in check(folder, progress=False).faults]
    assert sorted(faults) == sorted(str(folder/name) for name in unknown)

def test_labels_of_no_image_stop_prepare_and_init(tmp_path):
    folder = came(tmp_path/'mine', SEMSEG, '.png', png(np.uint8(IDS)))
    (folder/'semseg/x.png').rename(folder/'semseg/x_mask.png')
    for door in (by_prepare, by_init, by_init_with_a_file):
        with pytest.raises(ValueError, match="there is no image 'x_mask'"): door(folder, 'semseg', tmp_path)

def test_a_folder_with_tasks_in_toml_is_read_as_it_states(tmp_path):
    folder = came(tmp_path/'mine', DEPTH, '.png', png(np.uint16(METERS*256)))
    (folder/'tasks.json').unlink()
    (folder/'tasks.toml').write_text('unit = "min"\n[[tasks]]\nname = "depth"\nscale = 0.00390625\ncost = 2\n')
    assert check(folder, progress=False).notes[0] == 'taken for a folder with tasks.toml'
    assert close(by_prepare(folder, 'depth', tmp_path), np.uint16(METERS*256)/256)
    assert close(by_init(folder, 'depth', tmp_path), np.uint16(METERS*256)/256)

@pytest.mark.parametrize('file,text', [
    ('tasks.json', json.dumps([DEPTH | dict(scale=1/256)])),
    ('tasks.toml', '[[tasks]]\nname = "depth"\nscale = 0.00390625')])
def test_a_file_of_tasks_may_begin_with_a_byte_order_mark(file, text, tmp_path):
    folder = came(tmp_path/'mine', DEPTH, '.png', png(np.uint16(METERS*256)))
    (folder/'tasks.json').unlink()
    (folder/file).write_text('\ufeff' + text)
    assert check(folder, progress=False).faults == []
    assert close(by_prepare(folder, 'depth', tmp_path), np.uint16(METERS*256)/256)
    assert close(kept(init(folder, tmp_path/'project', folder/file, **TINY), 'depth'), np.uint16(METERS*256)/256)

def test_a_misspelled_key_is_refused_with_those_that_there_are(tmp_path):
    folder = came(tmp_path/'mine', DEPTH | dict(sclae=1/256), '.png', png(np.uint16(METERS*256)))
    fault, = check(folder, progress=False).faults
    for door in (by_prepare, by_init, by_init_with_a_file):
        with pytest.raises(ValueError, match=r"unknown task keys \['sclae'\]; there are .*'scale'"):
            door(folder, 'depth', tmp_path)
    assert "unknown task keys ['sclae']" in fault.what and str(folder/'tasks.json') in fault.what

def test_folders_of_labels_that_are_called_otherwise_are_not_dropped(tmp_path):
    folder = made(tmp_path/'mine', [SEMSEG], [('masks/x.png', png(np.uint8(IDS)))])
    assert 'left out: 1 files of masks/, e.g. x.png' in check(folder, progress=False).notes
    with pytest.raises(FileNotFoundError, match='no folder of labels; expected a folder with rgb/ and any of semseg/'):
        by_prepare(folder, 'semseg', tmp_path)
    said = CliRunner().invoke(app, ['init', str(folder), '--project', str(folder/'project')]).output
    assert said.splitlines()[:2] == ['left out: 1 files of masks/, e.g. x.png',
                                     '2 images to ask for, with labels already: 0 semseg']

def test_photographs_may_lie_behind_a_link(tmp_path):
    folder = came(tmp_path/'mine', SEMSEG, '.png', png(np.uint8(IDS)))
    by_link = prepare(folder, tmp_path/'prepared', progress=False).path
    for data in (folder, by_link):
        (data/'rgb').rename(tmp_path/f'photographs of {data.name}')
        (data/'rgb').symlink_to(tmp_path/f'photographs of {data.name}')
        assert check(data, progress=False).faults == []
        p = init(data, tmp_path/f'project of {data.name}', **TINY)
        assert close(kept(p, 'semseg'), IDS) and Dataset(by_link).rgb('x').max() == 99

def test_an_export_of_cvat_is_not_taken_for_voc(tmp_path):
    for name in ('JPEGImages/x.jpg', 'SegmentationClass/x.png', 'labelmap.txt'): write_atomic(tmp_path/name, b'')
    assert 'is in no known layout' in check(tmp_path, progress=False).faults[0].what

def test_a_folder_of_ones_own_that_looks_like_nyuv2_is_looked_at_alike(tmp_path):
    "Without a file of tasks, and refused by the same rules"
    for name, data, why in (('depth/x.png', png(np.uint16(np.round(nothing(65.535)*1000))), '"void": [65535]'),
                            ('normals/x.npy', npy((STEEP + 1)/2), ''),
                            ('normals/x.png', png(colors(STEEP*[1, 1, -1])), 'most normals look away')):
        folder = tmp_path/name.replace('/', '')
        write_atomic(folder/'rgb/x.png', png_bytes(np.full((H, W, 3), 99, np.uint8)))
        write_atomic(folder/name, data)
        found = check(folder, progress=False)
        assert found.notes[0].startswith('taken for nyuv2_folder')
        if why: assert why in found.faults[0].what
        else: assert 'left out: 1 files of normals/' in found.notes[1]

def test_tell_compares_with_the_depth_beside_and_warns_of_a_unit(projects, tmp_path):
    room = render_room(3, 48, 64)
    entries = [NORMALS, DEPTH]
    depth = 'depth/x.png', encode_label(room['depth'], standard_task('depth'))
    folder = made(tmp_path/'mine', entries, [depth], (48, 64))
    p = init(folder, tmp_path/'project', folder/'tasks.json', **TINY)
    ask(p.folder, budget=3, progress=False)
    down = np.where(room['normals'].any(2, keepdims=True), colors(room['normals']*[1, -1, 1]), 0).astype(np.uint8)
    write_atomic(tmp_path/'back/normals/labels/x.png', png(down))
    write_atomic(tmp_path/'back/depth/labels/y.png', png(np.uint16(room['depth']*50)))
    imported = tell(p.folder, 1, tmp_path/'back')
    (task, why), = imported.refused
    assert task == 'normals' and '"convention": "y_down"' in why
    assert 'warning: depth: median 0.' in str(imported)

def test_photographs_of_12_bit_and_arrays_of_other_shapes_are_refused(tmp_path):
    folder = made(tmp_path, [DEPTH], [('depth/x.png', png(np.uint16(METERS*1000)))])
    for data, why, suffix in ((png(np.uint16(IDS*1000)), '16 bit gray from 0 to 3000', '.png'),
                              (npy(np.uint8(IDS)), 'expected shape (H, W, 3)', '.npy')):
        (folder/'rgb/x.png').unlink(missing_ok=True)
        write_atomic(folder/f'rgb/x{suffix}', data)
        assert [f.what for f in check(folder, progress=False).faults if why in f.what]
        with pytest.raises(ValueError) as e: by_prepare(folder, 'depth', tmp_path/suffix)
        assert why in str(e.value)
        (folder/f'rgb/x{suffix}').unlink()

@pytest.mark.parametrize('ignore', [0, 3, -1, 256])
def test_a_void_that_is_a_class_or_no_byte(ignore, tmp_path):
    folder = came(tmp_path/'mine', SEMSEG | dict(ignore=ignore), '.png', png(np.uint8(IDS)))
    fault, = check(folder, progress=False).faults
    assert 'expected 4 to 255' in fault.what and '"first_class": 1' in fault.what
    for door in (by_prepare, by_init, by_init_with_a_file):
        with pytest.raises(ValueError, match='expected 4 to 255'): door(folder, 'semseg', tmp_path)
    assert check(came(tmp_path/'good', SEMSEG | dict(ignore=254), '.png', png(np.uint8(IDS))), False).faults == []

def test_more_classes_than_a_byte_holds(tmp_path):
    entry = dict(name='semseg', classes=[f'c{k}' for k in range(256)])
    assert 'at most 255 and void' in check(came(tmp_path, entry, '.png', b''), progress=False).faults[0].what

@pytest.mark.parametrize('lists', [
    ('Tür.jpg\n', 'b.jpg\n'), ('\ufeffTür\r\n', '\ufeffb\r\n'), ('Tu\u0308r\n', 'b'),
    ('rgb/Tu\u0308r.png', 'rgb/b.png\n\n')])
def test_lists_with_and_without_suffix_and_however_umlauts_are_composed(lists, tmp_path):
    write_json(tmp_path/'tasks.json', [DEPTH])
    for i in ('Tür', 'b'): write_atomic(tmp_path/f'rgb/{i}.jpg', jpeg(np.zeros((H, W, 3), np.uint8)))
    for i in ('Tu\u0308r', 'b'): write_atomic(tmp_path/f'depth/{i}.png', png(np.uint16(METERS*1000)))
    for name, text in zip(('train', 'test'), lists): write_atomic(tmp_path/f'{name}.txt', text.encode())
    found = check(tmp_path, progress=False)
    assert found.faults == [] and found.counts == {s: dict(images=1, depth=1) for s in ('train', 'test')}
    assert open_source(tmp_path).splits == dict(train=['Tür'], test=['b'])

@pytest.mark.parametrize('turn', range(1, 9))
def test_a_photograph_is_turned_as_viewers_show_it(turn, tmp_path, projects):
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = 255
    Image.fromarray(stored).save(f := io.BytesIO(), 'jpeg', exif=exif, quality=95)
    shown = {2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.swapaxes(0, 1),
             6: np.rot90(stored, -1), 7: stored[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(stored)}.get(turn, stored)
    mask = (shown[..., 0] > 0).astype(np.uint8)
    folder = tmp_path/'mine'
    write_json(folder/'tasks.json', [SALIENCY])
    write_atomic(folder/'rgb/x.jpg', f.getvalue())
    write_atomic(folder/'saliency/x.png', png(np.ascontiguousarray(mask)))
    assert check(folder, progress=False).faults == []
    dataset = prepare(folder, tmp_path/'prepared', progress=False)
    for source in (dataset, open_source(folder)):
        assert np.array_equal(source.rgb('x')[..., 0] > 128, mask)
        assert np.array_equal(source.label('x', 'saliency')[..., 0], mask)
        assert image_size(source.file('x', 'rgb')) == mask.shape
    assert by_init(folder, 'saliency', tmp_path).shape[:2] == mask.shape
    (folder/'saliency/x.png').unlink()
    p = init(folder, tmp_path/'asked', folder/'tasks.json', **TINY)
    query, = ask(p.folder, budget=1, progress=False).queries
    assert (query['height'], query['width']) == mask.shape
    out = np.array(Image.open(tmp_path/'asked/batches/001/saliency/images/x.png'))
    assert np.array_equal(out[..., 0] > 128, mask)

def test_photographs_of_16_bits_and_other_kinds(tmp_path):
    ramp = np.arange(H*W).reshape(H, W)
    pictures = dict(
        gray16=Image.fromarray(np.uint16(ramp*680)), gray=Image.fromarray(np.uint8(ramp)),
        palette=Image.fromarray(np.uint8(ramp % 3)), alpha=Image.fromarray(np.uint8(ramp)[..., None].repeat(4, 2)))
    pictures['palette'].putpalette([0, 0, 0, 90, 90, 90, 200, 200, 200])
    for suffix in ('.png', '.bmp', '.tif'):
        folder = tmp_path/suffix[1:]
        write_json(folder/'tasks.json', [DEPTH])
        (folder/'rgb').mkdir()
        for name, image in pictures.items():
            if suffix != '.bmp' or name in ('gray', 'palette'): image.save(folder/f'rgb/{name}{suffix}')
        source = open_source(folder)
        assert source.ids('rgb') == sorted(pictures if suffix != '.bmp' else ('gray', 'palette'))
        assert check(folder, progress=False).faults == []
        assert np.array_equal(source.rgb('gray'), np.uint8(ramp)[..., None].repeat(3, 2))
        if suffix != '.bmp': assert np.array_equal(source.rgb('gray16')[..., 1], np.round(ramp*680/257))
        assert np.array_equal(source.rgb('palette')[..., 2], np.choose(ramp % 3, [0, 90, 200]))

def test_normals_are_compared_with_the_depth_beside(tmp_path):
    room = render_room(3, 48, 64)
    n = normals_from_depth(room['depth'], semseg=room['semseg'])
    depth = 'depth/x.png', encode_label(room['depth'], standard_task('depth'))
    def as_png(n): return png(np.where(n.any(2, keepdims=True), colors(n), 0).astype(np.uint8))
    for convention, as_stored in dict(
            bgr=n[..., ::-1], y_down=n*[1, -1, 1], z_away=n*[1, 1, -1], x_left=n*[-1, 1, 1]).items():
        folder = tmp_path/convention
        for stated in ({}, dict(convention=convention)):
            made(folder, [NORMALS | stated, DEPTH], [depth, ('normals/x.png', as_png(as_stored))], (48, 64))
            faults = [f.what for f in check(folder, progress=False).faults]
            if stated: assert faults == []
            else: assert len(faults) == 1 and f'"convention": "{convention}"' in faults[0], faults

def test_nyuv2_as_later_work_keeps_it_is_read_alike(tmp_path):
    room = render_room(5, 48, 64)
    n = np.round((room['normals'] + 1)*127.5)/127.5 - 1
    n = n/np.linalg.norm(n, axis=2, keepdims=True)
    down, edge = colors(n*[1, -1, 1]), room['edges']
    for tree in ('arrays', 'pictures'):
        root = tmp_path/tree
        suffix = '.jpg' if tree == 'arrays' else '.png'
        Image.fromarray(room['rgb']).save(f := io.BytesIO(), 'png' if suffix == '.png' else 'jpeg')
        write_atomic(root/f'images/0001{suffix}', f.getvalue())
        write_atomic(root/'segmentation/0001.png', png(np.uint8(room['semseg'] + 1)))
        write_atomic(root/'depth/0001.npy', npy(np.float32(room['depth'])))
        kinds = dict(normals=(npy(down/127.5 - 1), png(down)), edge=(npy(edge/1.), png(np.uint8(edge*255))))
        for kind, contents in kinds.items():
            suffix, data = ('.npy', contents[0]) if tree == 'arrays' else ('.png', contents[1])
            write_atomic(root/f'{kind}/0001{suffix}', data)
        for name, ids in dict(train='0001', val='').items(): write_atomic(root/f'gt_sets/{name}.txt', ids.encode())
    a, b = (open_source(tmp_path/tree) for tree in ('arrays', 'pictures'))
    assert check(tmp_path/'pictures', progress=False).faults == []
    assert check(tmp_path/'pictures', progress=False).notes[0].startswith('taken for nyud_mt: ')
    assert list(a.tasks) == list(b.tasks) == ['semseg', 'depth', 'normals', 'edges']
    assert b.tasks['edges'].metric == 'odsf_nyuv2'
    for t in a.tasks: assert np.allclose(a.label('0001', t), b.label('0001', t), atol=1e-6), t

@pytest.mark.parametrize('layout,images,classes,shift', [
    ('nyuv2_folder', 'rgb', 'seg40', 1), ('nyud_mt', 'images', 'segmentation', 1),
    ('mtan', 'train/image', 'train/label', 0)])
def test_derived_edges_of_nyuv2_have_its_tolerance(layout, images, classes, shift, tmp_path):
    suffix, save = ('.npy', npy) if layout == 'mtan' else ('.png', png)
    write_atomic(tmp_path/f'mine/{images}/x{suffix}', save(np.zeros((H, W, 3), np.uint8)))
    write_atomic(tmp_path/f'mine/{classes}/x{suffix}', save(np.uint8(IDS + shift)))
    for name in ('train', 'val'): # lists, as one of the layouts has them
        write_atomic(tmp_path/f'mine/gt_sets/{name}.txt', b'x' if name == 'train' else b'')
    dataset = prepare(tmp_path/'mine', tmp_path/'prepared', progress=False, derive=['edges'])
    assert dataset.tasks['edges'].metric == 'odsf_nyuv2' and 'edges' in dataset.derived

def test_a_folder_without_a_file_of_tasks_says_what_it_is_taken_for(tmp_path):
    write_atomic(tmp_path/'rgb/a.png', png(np.zeros((H, W, 3), np.uint8)))
    write_atomic(tmp_path/'depth/a.png', png(np.uint16(METERS*1000)))
    write_atomic(tmp_path/'saliency/a.png', png(MASK))
    text = str(check(tmp_path, progress=False))
    assert 'taken for nyuv2_folder: a folder with rgb/ and any of seg40/' in text
    assert 'left out: 1 files of saliency/, e.g. a.png' in text

def test_an_implausible_depth_is_said_with_numbers(tmp_path):
    folder = came(tmp_path, DEPTH, '.png', png(np.uint16(METERS*50))) # 1/50 m, read as millimeters
    note = check(folder, progress=False).notes[-1]
    assert note.startswith('warning: depth: median 0.') and 'is "scale" (meters a unit) right?' in note

def told(folder, tmp_path): # a folder of one's own → what becomes of its labels as answers, and the project
    "Its photographs are asked for in all tasks; what it states of its labels is stated beside them"
    tasks, how = zip(*(split_entry(entry) for entry in json.loads((folder/'tasks.json').read_text())))
    shutil.copytree(folder/'rgb', tmp_path/'asked/rgb')
    write_json(tmp_path/'asked/tasks.json', tasks)
    p = init(tmp_path/'asked', tmp_path/'asking', tmp_path/'asked/tasks.json', **TINY)
    ask(p.folder, budget=len(p.images)*len(tasks), progress=False)
    for task, stated in zip(tasks, how):
        shutil.copytree(folder/task['name'], tmp_path/f"back/{task['name']}/labels")
        write_json(tmp_path/f"back/{task['name']}/format.json", stated)
    return tell(p.folder, 1, tmp_path/'back'), p

def test_an_answer_to_a_photograph_that_is_turned_or_of_16_bits(tmp_path):
    "It fits what the annotator was shown"
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, deep = np.zeros((H, W, 3), np.uint8), np.uint16(np.arange(H*W).reshape(H, W)*680)
    write_json(tmp_path/'mine/tasks.json', [SALIENCY])
    for name, a, kw in ('x', turned, dict(exif=exif)), ('y', deep, {}):
        Image.fromarray(a).save(f := io.BytesIO(), 'png', **kw)
        write_atomic(tmp_path/f'mine/rgb/{name}.png', f.getvalue())
    masks = dict(x=np.ascontiguousarray(MASK.T), y=MASK)
    for name, mask in masks.items(): write_atomic(tmp_path/f'mine/saliency/{name}.png', png(mask))
    imported, p = told(tmp_path/'mine', tmp_path)
    assert not imported.refused
    assert all(close(kept(p, 'saliency', name), mask) for name, mask in masks.items())

def test_an_answer_belongs_to_its_image_however_umlauts_are_composed(tmp_path):
    folder = made(tmp_path/'mine', [SALIENCY], [('saliency/Tu\u0308r.png', png(MASK))])
    (folder/'rgb/x.png').rename(folder/'rgb/Tür.png')
    imported, p = told(folder, tmp_path)
    assert not imported.refused and imported.missing == 1
    assert close(kept(p, 'saliency', 'Tür'), MASK)

@pytest.fixture(scope='session')
def cases(shared)->Path:
    "Small inputs on which readers of labels go wrong, beside the sample data"
    folder = shared.parent/'cases'
    if folder.is_dir(): return folder
    if os.environ.get('CI') == 'true' and 'GITHUB_ACTIONS' not in os.environ: pytest.fail(f'no cases at {folder}')
    pytest.skip(f'no cases at {folder}')

def copied(cases, name, tmp_path):
    folder = tmp_path/name
    shutil.copytree(next(cases.glob(f'{name}-*')), folder)
    return folder

REFUSED = { # case → files that are refused, and why; none: the file of tasks is
    '01': (5, 'expected .png or .npy, got .jpg'), '02': (5, 'task semseg'), '04': (4, 'state "convention"'),
    '05': (8, 'task depth'), '06': (10, '"yes": 255'), '07': (0, '"first_class": 1'), '09': (10, 'write .npy')}

@pytest.mark.parametrize('name', REFUSED)
def test_a_handed_case_is_refused_at_every_door(name, cases, tmp_path):
    n, why = REFUSED[name]
    folder = copied(cases, name, tmp_path)
    faults = check(folder, progress=False).faults
    assert len(faults) == max(n, 1) and all(why in f.what for f in faults), faults
    for door in (lambda: prepare(folder, tmp_path/'p', progress=False), lambda: init(folder, tmp_path/'i', **TINY),
                 lambda: init(folder, tmp_path/'i', folder/'tasks.json', **TINY)):
        with pytest.raises(ValueError) as e: door()
        assert why in str(e.value)

TOLD = {'04': 1, '05': 2} # labels that are right as they are, beside those that are refused

@pytest.mark.parametrize('name', sorted({*REFUSED} - {'07'})) # a project has no task like that of 07
def test_an_answer_of_a_handed_case_is_refused(name, cases, tmp_path):
    n, why = REFUSED[name]
    folder = copied(cases, name, tmp_path)
    imported, _ = told(folder, tmp_path)
    whys = [text for task, text in imported.refused]
    assert len(whys) == n and all(why in text and f'(task {task})' in text for task, text in imported.refused), whys
    first = json.loads((folder/'tasks.json').read_text())[0]['name']
    assert sum(pair.task == first for pair in imported.took.get('told', ())) == TOLD.get(name, 0)

@pytest.mark.parametrize('name', ['03', '08', '21'])
def test_a_handed_case_is_read_rightly(name, cases, tmp_path):
    folder = copied(cases, name, tmp_path)
    assert check(folder, progress=False).faults == []
    dataset = prepare(folder, tmp_path/'p', progress=False)
    labeled = {i for t in dataset.tasks for i in dataset.ids(t)}
    assert labeled == set(dataset.ids('rgb'))
    imported, p = told(folder, tmp_path)
    assert not imported.refused and not imported.missing
    by_init = init(folder, tmp_path/'project', **TINY)
    for i, t in product(dataset.ids('rgb'), dataset.tasks):
        assert np.array_equal(kept(p, t, i), dataset.label(i, t))
        if i in by_init.images: assert np.array_equal(kept(by_init, t, i), dataset.label(i, t))
    if name != '03': return
    for i in dataset.ids('rgb'):
        bright = dataset.rgb(i).mean(2) > 128
        assert (bright == dataset.label(i, 'semseg')[..., 0]).mean() > .99, i

STATED = {
    'kitti.png': dict(scale=1/256), 'vkitti_cm.png': dict(scale=.01, void=65535), 'npy_uint8.npy': dict(scale=1/3),
    'max_is_none.png': dict(scale=.02, void=65535), 'npy_float_mm.npy': dict(scale=.02), 'npy_float16.npy': {},
    'npy_inf.npy': dict(void='inf'), 'npy_nan.npy': dict(void='nan'), 'npy_minus1.npy': dict(void=-1),
    'npy_1e10.npy': dict(void=1e10)}

@pytest.mark.parametrize('file', STATED)
def test_depth_of_the_handed_case_is_right_when_stated(file, cases, tmp_path):
    source = next(cases.glob('05-*'))
    folder = made(tmp_path/'mine', [DEPTH | STATED[file]])
    write_atomic(folder/f'depth/x{file[-4:]}', (source/'depth'/file).read_bytes())
    true = np.load(source/'true.npy')
    got = by_prepare(folder, 'depth', tmp_path)[..., 0]
    assert abs(got - true).max() < (.34 if file == 'npy_uint8.npy' else .1)

@pytest.mark.parametrize('file,stated', [
    ('right.png', {}), ('bgr.png', dict(convention='bgr')), ('ydown.png', dict(convention='y_down')),
    ('zaway.png', dict(convention='z_away')), ('zero_to_one.npy', dict(convention='0to1'))])
def test_normals_of_the_handed_case_are_right_when_stated(file, stated, cases, tmp_path):
    folder = copied(cases, '04', tmp_path)
    write_json(folder/'tasks.json', [NORMALS | stated, DEPTH])
    got = Folder(folder, own_layout(folder)).label(Path(file).stem, 'normals')
    assert np.degrees(np.arccos((got*np.load(folder/'true.npy')).sum(2).clip(-1, 1))).max() < 1

def test_classes_from_1_of_the_handed_case(cases, tmp_path):
    folder = copied(cases, '07', tmp_path)
    write_json(folder/'tasks.json', [dict(name='semseg', classes=['red', 'green', 'blue'], first_class=1)])
    dataset = prepare(folder, tmp_path/'p', progress=False)
    assert isinstance(dataset, Dataset)
    for i in dataset.ids('semseg'):
        raw = np.array(Image.open(folder/f'semseg/{i}.png')).astype(int)
        assert np.array_equal(dataset.label(i, 'semseg')[..., 0], np.where(raw == 0, 255, raw - 1))

def test_a_photograph_of_several_pages_is_refused(tmp_path):
    "A page must not be dropped without a word"
    pages = [Image.fromarray(np.full((8, 10, 3), v, np.uint8)) for v in (10, 200)]
    pages[0].save(tmp_path/'a.tif', save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match='several pages'): read_rgb(tmp_path/'a.tif')
    pages[0].save(tmp_path/'b.tif')
    assert read_rgb(tmp_path/'b.tif').max() == 10
