"""What pyEdgeEval counts on samples of BSDS, for `test_edges.py`, and its time beside `boundary_counts` in one process.

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

from partal_nb.boundaries import boundary_counts
from partal_nb.dev.pool_speed import reference_counts

SAMPLES = (
    ('101085', 1, .0075), ('103070', 1, .0075), ('119082', 1, .0075), ('16077', 1, .0075), ('108005', 3, .0075),
    ('145086', 1, .011))
CASES = [dict(image=i, annotators=a, tolerance=t) for i, a, t in SAMPLES]

def sample(folder, image:str, annotators:int):
    "Gradient magnitude as the probability of an edge; what at least 1/4, half or 3/4 of the annotators marked"
    gray = np.asarray(Image.open(Path(folder)/f'rgb/{image}.jpg').convert('L'), float)
    strength = gaussian_gradient_magnitude(gray, 2)
    share = np.asarray(Image.open(Path(folder)/f'edge/{image}.png'))/255
    prob = np.clip(strength/np.quantile(strength, .99), 0, 1).round(3)
    return prob, [share >= s for s in (.5, .25, .75)[:annotators]]

def timed(f, *args):
    began = time.process_time()
    return f(*args), round(time.process_time() - began, 3)

if __name__ == '__main__':
    found = []
    for case in CASES:
        args = *sample(sys.argv[1], case['image'], case['annotators']), case['tolerance']
        (_, ours), (counts, theirs) = timed(boundary_counts, *args), timed(reference_counts, *args)
        found.append(dict(case, counts=counts.tolist(), seconds=theirs, ours=ours))
        print(f'{case}: {theirs} s of one core, ours {ours} s, {theirs/ours:.1f} times as fast', flush=True)
    about = {p: version(p) for p in ('pyEdgeEval', 'numpy', 'scipy')}
    command = f'python tests/edge_reference.py SAMPLES/bsds500_val60 {sys.argv[2]}'
    Path(sys.argv[2]).write_text(json.dumps(dict(versions=about, command=command, cases=found)) + '\n')
