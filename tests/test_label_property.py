"Hundreds of generated files a form: a folder and an answer read the same; what is stated is read rightly or refused"
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from partal_nb.annotate.formats import FORMATS
from partal_nb.annotate.query import legend
from partal_nb.core import write_atomic, write_json
from partal_nb.data.folders import Folder, own_layout
from partal_nb.data.labels import image_size, png_bytes, read_rgb, voc_colors
from partal_nb.data.entries import own_task, split_entry

N, SIZE = 300, (6, 9)

def npy(a):
    np.save(f := io.BytesIO(), a)
    return '.npy', f.getvalue()

def png(a, palette=None):
    image = Image.fromarray(np.ascontiguousarray(a))
    if palette is not None: image.putpalette(np.uint8(palette).ravel().tolist())
    image.save(f := io.BytesIO(), 'png')
    return '.png', f.getvalue()

def other(a): # what no label comes as
    kind = 'jpeg' if a.dtype == np.uint8 else 'tiff'
    Image.fromarray(np.ascontiguousarray(a)).save(f := io.BytesIO(), kind)
    return ('.jpg' if kind == 'jpeg' else '.tif'), f.getvalue()

class Draw:
    "Random choices, which a failing test can repeat by its seed"
    def __init__(self, seed): self.rng = np.random.default_rng(seed)
    def one(self, *values): return values[self.rng.integers(len(values))]
    def chance(self, p=.5): return self.rng.random() < p
    def ints(self, low, high): return self.rng.integers(low, high, SIZE)
    def floats(self, low, high): return self.rng.uniform(low, high, SIZE)
    def holes(self): return self.rng.random(SIZE) < self.one(0, .1, .4)

def classes(d): # entry, suffix and content, the truth, or None where nothing is known but that both doors agree
    n = d.one(2, 4, 40, 254)
    names = [f'c{k}' for k in range(n)]
    if d.chance(): names[0] = 'background'
    entry, truth = dict(name='semseg', classes=names), d.ints(0, n)
    truth = np.where(d.holes(), 255, truth)
    stored = truth
    if n < 254 and d.chance(.3):
        entry['first_class'] = 1
        stored = np.where(truth == 255, d.one(0, 255), truth + 1)
    elif n < 200 and d.chance(.3):
        entry['void'] = [d.one(200, 254)]
        stored = np.where(truth == 255, entry['void'][0], truth)
    kind = d.one('png', 'npy', 'npy', 'palette', 'packed', 'colors', 'wrong', 'wide', 'other')
    if kind == 'png': return entry, *png(np.uint8(stored)), truth
    if kind == 'npy': return entry, *npy(stored.astype(d.one(*'BHihfdl'))), truth
    if kind == 'other': return entry, *other(np.uint8(stored)), 'refused'
    if kind == 'wide':
        stored = np.where(d.rng.random(SIZE) < .2, d.one(256, 259, 511, -253, 7.9, np.nan, 1e30, -1, 65535), stored)
        known = stored == np.where(stored == stored, stored, 0)
        strange = ~known | ~((stored >= 0) & (stored < 256))
        return entry, *npy(stored.astype('d')), 'refused' if strange.any() else None
    if kind == 'wrong':
        bits = d.one(np.uint16, np.uint8)
        return entry, *png(d.ints(0, 256).astype(bits)), None if bits is np.uint8 else 'refused'
    colors = np.zeros((256, 3), np.uint8)
    for p in legend(own_task(entry)): colors[p.value] = p.color
    if kind == 'palette': return entry, *png(np.uint8(truth), colors), 'folder may refuse' if len(entry) > 2 else truth
    if kind == 'colors': return entry, *png(colors[truth]), 'folder may refuse'
    used, index = np.unique(truth, return_inverse=True)
    if 'background' not in names or len(entry) > 2: return entry, *png(np.uint8(truth)), None
    order = d.rng.permutation(len(used))
    return entry, *png(np.uint8(np.argsort(order)[index.reshape(SIZE)]), colors[used[order]]), truth

def yes_no(d):
    entry, truth = dict(name='saliency'), np.where(d.holes(), 255, d.ints(0, 2))
    kind = d.one('png', 'npy', 'bool', '1 bit', 'picture', 'picture, unstated', 'soft', 'palette', 'white', 'other')
    sure = np.where(truth == 255, 0, truth)
    known = truth if (truth == 1).any() or (truth < 255).all() else 'refused'
    if kind == 'png': return entry, *png(np.uint8(truth)), known
    if kind == 'npy': return entry, *npy(truth.astype(d.one(*'BHihfd'))), known
    if kind == 'bool': return entry, *npy(sure > 0), sure
    if kind == '1 bit':
        Image.fromarray(np.uint8(sure*255)).convert('1').save(f := io.BytesIO(), 'png')
        return entry, '.png', f.getvalue(), sure
    gray = np.where(truth == 255, 128, truth*255)
    if kind == 'picture': return entry | dict(yes=255, void=128), *png(np.uint8(gray)), truth
    if kind == 'picture, unstated': return entry, *png(np.uint8(sure*255)), 'refused' if sure.any() else sure
    if kind == 'soft': return entry | dict(yes=255), *png(np.uint8(d.ints(0, 256))), 'refused'
    if kind == 'other': return entry, *other(np.uint8(sure)), 'refused'
    if kind == 'palette': return entry, *png(np.uint8(sure), [[0, 0, 0], [255, 255, 255]]), sure
    return entry, *png(np.uint8(sure*255)[..., None].repeat(3, 2)), sure

def distance(d):
    entry, truth = dict(name='depth'), d.floats(.3, d.one(4, 60, 200))
    truth = np.where(d.holes(), 0, truth)
    scale = d.one(.001, 1/256, .01, 1/50)
    units = np.where(truth > 0, np.maximum(np.round(truth/scale), 1), 0)
    if units.max() > 65535: units, truth = units//10, truth/10
    kind = d.one('mm', 'scaled', 'float', 'none', 'none, unstated', 'negative', 'inverse', 'byte', 'other', 'integers')
    none = d.one(np.nan, np.inf, -1, 1e10, 65535)
    holed = np.where(truth == 0, none, truth)
    if kind == 'mm': return entry, *png(np.uint16(np.minimum(truth, 60)*1000)), np.minimum(truth, 60)
    if kind == 'scaled': return entry | dict(scale=scale), *d.one(png, npy)(np.uint16(units)), units*scale
    if kind == 'integers': return entry, *npy(np.round(truth*1000).astype(d.one(*'iIl'))), truth
    if kind == 'float': return entry, *npy(truth.astype(d.one(*'fd'))), truth
    if kind == 'none': return entry | dict(void=['nan', 'inf', -1, 1e10, 65535]), *npy(holed), truth
    if kind == 'none, unstated': return entry, *npy(holed), 'refused' if (truth == 0).any() else truth
    if kind == 'negative': return entry, *npy(-truth), 'refused'
    if kind == 'inverse':
        inverse = np.divide(1, truth, where=truth > 0, out=np.zeros(SIZE))
        return entry | dict(inverse=True), *npy(inverse), truth
    if kind == 'other': return entry, *other(np.uint8(truth)), 'refused'
    return entry, *d.one(png, npy)(np.uint8(truth)), 'refused'

def direction(d):
    entry = dict(name='normals')
    x, y = d.floats(-.6, .6), d.floats(-.6, .6)
    truth = np.stack([x, y, np.sqrt(1 - x*x - y*y)], 2)
    truth[d.holes()] = 0
    there = truth.any(2, keepdims=True)
    names = [n for n in ('bgr', 'x_left', 'y_down', 'z_away') if d.chance(.3)]
    stored = truth*[-1 if n in names else 1 for n in ('x_left', 'y_down', 'z_away')]
    if 'bgr' in names: stored = stored[..., ::-1]
    kind = d.one('png', 'float', '0 to 1', 'short', 'away', '0 to 1, unstated', 'other', 'gray', 'void')
    as_bytes = np.where(there, np.round((stored + 1)*127.5), 0).astype(np.uint8)
    if kind == 'png': return entry | dict(convention=names), *png(as_bytes), truth
    if kind == 'void':
        return entry | dict(convention=names, void=128), *png(np.where(there, as_bytes, 128).astype(np.uint8)), None
    if kind == 'float': return entry | dict(convention=names), *npy(stored.astype(d.one(*'fd'))), truth
    if kind == '0 to 1':
        return entry | dict(convention=['0to1', *names]), *npy(np.where(there, (stored + 1)/2, 0)), truth
    if kind == '0 to 1, unstated': return entry, *npy(np.where(there, (truth + 1)/2, 0)), 'refused'
    if kind == 'short': return entry, *npy(truth*d.one(.5, .9, 1.1, 2)), 'refused'
    if kind == 'away': return entry, *d.one(npy)(-truth), 'refused'
    if kind == 'other': return entry, *other(as_bytes), 'refused'
    return entry, *png(as_bytes[..., 0]), 'refused'

def values(d):
    entry = dict(name='height', form='values', channels=d.one(1, 3), loss='l1', metric='rmse', ignore=d.one(-1, -9999.))
    truth = d.rng.normal(0, 100, (*SIZE, entry['channels']))
    truth[d.holes()] = entry['ignore']
    kind = d.one('float', 'scaled', 'unscaled', 'infinite', 'none', 'integers')
    raw = d.rng.integers(0, 256, truth.shape).astype(np.uint8)
    flat = raw[..., 0] if raw.shape[2] == 1 else raw
    if kind == 'float': return entry, *npy(truth.astype(d.one(*'fd'))), truth
    if kind == 'scaled': return entry | dict(scale=.5, offset=3), *png(flat), raw*.5 + 3
    if kind == 'unscaled': return entry, *png(flat), 'refused'
    high = truth > 50
    if kind == 'infinite': return entry, *npy(np.where(high, np.inf, truth)), 'refused' if high.any() else truth
    if kind == 'integers': return entry, *npy(raw.astype(d.one(*'BHi'))), raw
    return entry | dict(void='nan'), *npy(np.where(truth == entry['ignore'], np.nan, truth)), truth

def by_folder(path, entry, suffix, data): # label, or why it is refused
    write_json(path/'tasks.json', [entry])
    write_atomic(path/'rgb/x.png', png_bytes(np.zeros((*SIZE, 3), np.uint8)))
    write_atomic(path/f"{entry['name']}/x{suffix}", data)
    try: return Folder(path, own_layout(path)).label('x', entry['name'])
    except ValueError as e: return str(e)

def by_answer(path, entry, suffix, data):
    task = own_task(entry)
    write_atomic(path/f'labels/x{suffix}', data)
    (path/'format.json').write_text(json.dumps(split_entry(entry)[1]))
    answer, = FORMATS['npy'].read(path, task, {'x': SIZE})
    return answer.problem or answer.label

@pytest.mark.filterwarnings('ignore:invalid value:RuntimeWarning', 'ignore:overflow:RuntimeWarning')
@pytest.mark.parametrize('form', [classes, yes_no, distance, direction, values], ids=lambda f: f.__name__)
def test_a_folder_and_an_answer_are_read_alike(form, tmp_path):
    taken = refused = 0
    for seed in range(N):
        entry, suffix, data, truth = form(Draw(seed))
        there = tmp_path/str(seed)
        a, b = by_folder(there/'a', entry, suffix, data), by_answer(there/'b', entry, suffix, data)
        if isinstance(truth, str) and truth == 'folder may refuse' and isinstance(a, str):
            texts = [y for y in (a, b) if isinstance(y, str)]
            assert all('save the numbers of the classes in gray' in text for text in texts), (seed, texts)
            continue
        assert isinstance(a, str) == isinstance(b, str), (seed, entry, a, b)
        if isinstance(a, str):
            refused += 1
            assert f"(task {entry['name']})" in a and f"(task {entry['name']})" in b and f'x{suffix}' in a, (seed, a, b)
            all_void = isinstance(truth, np.ndarray) and 'all of it is void' in a
            assert truth is None or isinstance(truth, str) or all_void, (seed, entry, a)
            continue
        taken += 1
        assert a.dtype == b.dtype and np.array_equal(a, b), (seed, entry)
        assert not (isinstance(truth, str) and truth == 'refused'), (seed, entry, a)
        if isinstance(truth, np.ndarray):
            eps = dict(semseg=0, saliency=0, depth=.0011, normals=.011, height=1e-3)[entry['name']]
            assert abs(a - np.atleast_3d(truth)).max() <= eps, (seed, entry)
    assert taken > N//8 and refused > N//20, (taken, refused)

def photograph(d): # an image of any mode, depth and orientation → file
    mode = d.one('L', 'RGB', 'RGBA', 'P', '1', 'LA', 'CMYK', 'I;16')
    a = d.rng.integers(0, 256, (*SIZE, 4), np.uint8)
    if mode == 'I;16': image = Image.fromarray(d.rng.integers(0, 65536, SIZE).astype(np.uint16))
    else: image = Image.fromarray(a).convert('RGB').convert(mode)
    suffixes = dict(
        CMYK=('jpg', 'tif'), RGB=('jpg', 'png', 'webp', 'tif'), L=('jpg', 'png', 'tif'), RGBA=('png', 'webp'))
    return image, d.one(*suffixes.get(mode, ('png',)))

def test_photographs_are_read_as_they_are_shown(tmp_path):
    seen = set()
    for seed in range(N):
        d = Draw(seed)
        image, suffix = photograph(d)
        exif = Image.Exif()
        exif[0x0112] = turn = int(d.rng.integers(1, 9))
        file = tmp_path/f'{seed}.{suffix}'
        image.save(file, exif=exif)
        if suffix == 'tif' and turn > 1:
            for read in (read_rgb, image_size):
                with pytest.raises(ValueError, match='turned by its orientation'): read(file)
            continue
        got = read_rgb(file)
        shown = ImageOps.exif_transpose(Image.open(file))
        if image.mode == 'I;16': expected = np.round(np.array(shown)/257).astype(np.uint8)[..., None].repeat(3, 2)
        else: expected = np.array(shown.convert('RGB'))
        assert got.dtype == np.uint8 and np.array_equal(got, expected), (seed, image.mode, suffix, turn)
        assert image_size(file) == got.shape[:2] == (SIZE[::-1] if turn > 4 else SIZE), (seed, suffix, turn)
        seen.add((image.mode, turn))
    assert len(seen) > 50

def test_a_folder_counts_numbers_where_colors_are_its_own(tmp_path):
    "Palettes that no legend has: an answer is refused, since its colors were handed out"
    entry, ids = dict(name='semseg', classes=['a', 'b', 'c', 'd']), np.arange(54).reshape(SIZE) % 4
    own = np.random.default_rng(0).integers(1, 100, (256, 3))
    suffix, data = png(np.uint8(ids), own)
    assert np.array_equal(by_folder(tmp_path/'a', entry, suffix, data)[..., 0], ids)
    assert 'colors of no class' in by_answer(tmp_path/'b', entry, suffix, data)
    suffix, data = png(np.uint8(ids % 2), own[:2])
    assert 'it may have been packed' in by_folder(tmp_path/'a', entry, suffix, data)

def test_where_number_and_color_both_could_be_meant_neither_door_guesses(tmp_path):
    "VOC's palette, and no class called background: its color of number 1 is that of class 0"
    entry, ids = dict(name='semseg', classes=['a', 'b', 'c', 'd']), np.arange(54).reshape(SIZE) % 4
    suffix, data = png(np.uint8(ids), voc_colors())
    for door in (by_folder, by_answer):
        assert "can't be known which of the two counts" in door(tmp_path/door.__name__, entry, suffix, data)
        stated = door(tmp_path/f'{door.__name__}1', dict(entry, first_class=1), suffix, data) # then both say the same
        assert np.array_equal(stated[..., 0], np.where(ids == 0, 255, ids - 1))

def test_palettes_that_differ_from_file_to_file_are_packed(tmp_path):
    "The second file's colors have other numbers: an optimizer sorted them"
    own = np.random.default_rng(0).integers(1, 100, (4, 3))
    ids = np.arange(54).reshape(SIZE) % 4
    entry = dict(name='semseg', classes=['a', 'b', 'c', 'd'])
    suffix, data = png(np.uint8(ids), own)
    assert np.array_equal(by_folder(tmp_path, entry, suffix, data)[..., 0], ids)
    write_atomic(tmp_path/'rgb/y.png', png_bytes(np.zeros((*SIZE, 3), np.uint8)))
    write_atomic(tmp_path/'semseg/y.png', png(np.uint8(3 - ids), own[::-1])[1])
    folder = Folder(tmp_path, own_layout(tmp_path))
    folder.label('x', 'semseg')
    with pytest.raises(ValueError, match='in a file before it was'): folder.label('y', 'semseg')
