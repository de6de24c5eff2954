"""What pyEdgeEval counts on embedded rooms and on samples of BSDS, for `test_edges.py`, and its time beside ours.

    pip install pyEdgeEval==0.2.8 opencv-python-headless scikit-image
    python tests/edge_reference.py SAMPLES/bsds500_val60 tests/reference/edges.json

It is no requirement of the tests: it is compiled when it is installed, and needs OpenCV without naming it.
"""
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_gradient_magnitude

from partal_nb.boundaries import boundary_counts, thin
from partal_nb.data.rooms import render_room
from partal_nb.dev.pool_speed import reference_counts

SAMPLES = (
    ('101085', 1, .0075), ('103070', 1, .0075), ('119082', 1, .0075), ('16077', 1, .0075), ('108005', 3, .0075),
    ('145086', 1, .011))
CASES = [dict(image=i, annotators=a, tolerance=t) for i, a, t in SAMPLES]

ROOMS = [dict(seed=seed, height=120, width=160, tolerance=t) for seed, t in ((7, .0075), (8, .011))]

def likely_edges(gray:np.ndarray, blur:float): # (H, W) → (H, W) in [0, 1]
    "Gradient magnitude as the probability of an edge"
    strength = gaussian_gradient_magnitude(gray, blur)
    return np.clip(strength/np.quantile(strength, .99), 0, 1).round(3)

def sample(folder, image:str, annotators:int):
    "A photograph's likely edges; what at least 1/4, half or 3/4 of the annotators marked"
    gray = np.asarray(Image.open(Path(folder)/f'rgb/{image}.jpg').convert('L'), float)
    share = np.asarray(Image.open(Path(folder)/f'edge/{image}.png'))/255
    return likely_edges(gray, 2), [share >= s for s in (.5, .25, .75)[:annotators]]

def room_sample(seed:int, height:int, width:int):
    "An embedded room's likely edges, and its true ones"
    room = render_room(seed, height, width)
    return likely_edges(room['rgb'].mean(2), 1), [thin(room['edges'] == 1)]

def timed(f, *args):
    began = time.process_time()
    return f(*args), round(time.process_time() - began, 3)

def counted(case:dict, args:tuple)->dict: # the case, with the counts of pyEdgeEval
    (_, ours), (counts, theirs) = timed(boundary_counts, *args), timed(reference_counts, *args)
    print(f'{case}: {theirs} s of one core, ours {ours} s, {theirs/ours:.1f} times as fast', flush=True)
    return dict(case, counts=counts.tolist(), seconds=theirs, ours=ours)

def room_arguments(case:dict)->tuple: # of `boundary_counts`
    return *room_sample(case['seed'], case['height'], case['width']), case['tolerance']

if __name__ == '__main__': # without a folder of samples only the rooms are counted anew
    *folder, file = map(Path, sys.argv[1:])
    found = json.loads(file.read_text()) if file.exists() else {}
    found['rooms'] = [counted(case, room_arguments(case)) for case in ROOMS]
    if folder:
        photographs = [(case, sample(folder[0], case['image'], case['annotators'])) for case in CASES]
        found['cases'] = [counted(case, (*args, case['tolerance'])) for case, args in photographs]
    found['versions'] = {p: version(p) for p in ('pyEdgeEval', 'numpy', 'scipy')}
    found['command'] = f'python tests/edge_reference.py SAMPLES/bsds500_val60 {file}'
    file.write_text(json.dumps(found) + '\n')
