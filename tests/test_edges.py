"odsF against pyEdgeEval on embedded rooms and on photographs; thinning and pairing against plain versions"
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from edge_reference import room_arguments, sample
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

from partal_nb.boundaries import CUTS, Matcher, best_f, boundary_counts, thin
from partal_nb.tasks import standard_task
from partal_nb.metrics import meter

REFERENCE = json.loads((Path(__file__).parent/'reference/edges.json').read_text())

@pytest.mark.parametrize('case', REFERENCE['rooms'], ids=lambda c: f"{c['seed']}-{c['tolerance']}")
def test_counts_of_one_room(case):
    "Runs in a plain clone: what pyEdgeEval counted lies beside, the room is rendered"
    got, expected = boundary_counts(*room_arguments(case)), np.array(case['counts'])
    assert expected[1, 0] > 100 and .2 < best_f(expected)['f'] < .95, 'edges to be found, and to be missed'
    assert abs(best_f(got)['f'] - best_f(expected)['f']) <= .001
    assert (abs(got - expected) <= np.maximum(3, .005*expected[3])).all(), 'pairs of some threshold differ'

@pytest.mark.parametrize('case', REFERENCE['cases'], ids=lambda c: f"{c['image']}-{c['annotators']}-{c['tolerance']}")
def test_counts_of_one_photograph(shared, case):
    began = time.process_time()
    got = boundary_counts(*sample(shared/'bsds500_val60', case['image'], case['annotators']), case['tolerance'])
    seconds = time.process_time() - began
    times = case['seconds']/case['ours']
    print(f"{seconds:.2f} s here; where the reference was made {case['ours']} s "
          f"against {case['seconds']} s of pyEdgeEval, {times:.1f} times as fast")
    expected = np.array(case['counts'])
    assert abs(best_f(got)['f'] - best_f(expected)['f']) <= .001
    assert (abs(got - expected) <= np.maximum(3, .005*expected[3])).all(), 'pairs of some threshold differ'

def test_f_of_the_set(shared):
    "With counts summed over photographs, and interpolated as pyEdgeEval does, here in a loop of 101 steps a threshold"
    cases = [c for c in REFERENCE['cases'] if (c['annotators'], c['tolerance']) == (1, .0075)]
    got = sum(boundary_counts(*sample(shared/'bsds500_val60', c['image'], 1), .0075) for c in cases)
    r_hit, r_all, p_hit, p_all = np.sum([c['counts'] for c in cases], 0)
    r, p, best = r_hit/r_all, p_hit/np.maximum(p_all, 1), 0
    for k in range(1, len(CUTS)):
        for d in np.linspace(0, 1, 101):
            a, b = r[k]*d + r[k-1]*(1 - d), p[k]*d + p[k-1]*(1 - d)
            best = max(best, 2*a*b/max(a + b, 1e-9))
    assert best_f(got)['f'] == pytest.approx(best, abs=.001)

def test_meter_is_counts_of_thinned_truths(shared):
    "Batch by batch, with a photograph's outputs as logits and part of it void"
    p, (truth,) = sample(shared/'bsds500_val60', REFERENCE['cases'][0]['image'], 1)
    p, truth = p[:200, :200], truth[:200, :200]
    task, void = standard_task('edges'), np.zeros_like(truth)
    void[:, 150:] = True
    m, expected = meter(task), 0
    for turned in range(2):
        a, b, v = (np.rot90(x, turned).copy() for x in (p, truth, void))
        y = torch.from_numpy(np.where(v, 255, b).astype(np.float32))[None, None]
        m.update(torch.from_numpy(a).clamp(1e-6, 1 - 1e-6).logit()[None, None], y)
        a = torch.from_numpy(a).clamp(1e-6, 1 - 1e-6).logit().float().sigmoid().numpy() # rounded as in the meter
        expected = expected + boundary_counts(np.where(v, 0, a), [thin(b & ~v)], .0075)
    found, best = m.compute(), best_f(expected)
    assert found['odsf'] == pytest.approx(100*best['f']) and found['threshold'] == best['threshold']
    for name in ('precision', 'recall'): assert found[name] == pytest.approx(100*best[name])

RING = [(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)] # from east counterclockwise

def plain_thin(x):
    "Guo and Hall's conditions as they stand in their paper, pixel by pixel"
    x = np.pad(x, 1).astype(int)
    while True:
        any_gone = False
        for turn in (0, 1):
            gone = []
            for r, c in np.argwhere(x):
                n = [x[r + dr, c + dc] for dr, dc in RING]
                C = sum((not n[i]) and (n[i + 1] or n[(i + 2) % 8]) for i in (0, 2, 4, 6))
                pairs = [(i, i + 1, (i + 2) % 8) for i in (0, 2, 4, 6)]
                N = min(sum(n[i] or n[j] for i, j, _ in pairs), sum(n[j] or n[k] for _, j, k in pairs))
                e, ne, no, nw, w, sw, s, se = n
                side = e and (ne or no or not se) if turn == 0 else w and (sw or s or not nw)
                if C == 1 and 2 <= N <= 3 and not side: gone.append((r, c))
            for r, c in gone: x[r, c] = 0
            any_gone |= bool(gone)
        if not any_gone: return x[1:-1, 1:-1].astype(bool)

@pytest.mark.parametrize('share', (.3, .5, .7, .85, .97, 1))
def test_thinning(share):
    x = np.random.default_rng(0).random((3, 18, 23)) < share
    assert (thin(x) == [plain_thin(m) for m in x]).all()

@pytest.mark.parametrize('dtype', (np.uint8, np.uint64))
def test_bits_are_maps_of_their_own(dtype):
    bits = np.dtype(dtype).itemsize*8
    x = np.random.default_rng(1).random((bits, 12, 15)) < np.linspace(.2, 1, bits)[:, None, None]
    word = np.zeros((12, 15), dtype)
    for k in range(bits): word |= x[k].astype(dtype) << dtype(k)
    assert all(((thin(word) >> dtype(k) & dtype(1)) == thin(x[k])).all() for k in range(bits))

@pytest.mark.parametrize('reach', (.9, 1, 1.5, 2.3, 4.4))
def test_pairs(reach):
    "Their greatest number, by the Hungarian algorithm over what a k-d tree finds; several maps are as one by one"
    rng = np.random.default_rng(0)
    truth, predicted = rng.random((20, 26)) < .15, rng.random((6, 20, 26)) < np.linspace(0, .6, 6)[:, None, None]
    got = Matcher(truth, reach)(predicted)
    assert got.shape == predicted.shape and not (got & ~predicted).any()
    for g, s in zip(got, predicted):
        a, b = np.argwhere(truth), np.argwhere(s)
        near = np.zeros((len(a), len(b)), bool)
        for i, js in enumerate(cKDTree(b).query_ball_point(a, reach + 1e-9)) if len(b) else (): near[i, js] = True
        assert g.sum() == near[linear_sum_assignment(near, maximize=True)].sum()
        assert (cKDTree(a).query(np.argwhere(g))[0] <= reach + 1e-9).all() if g.any() else True

def test_time_does_not_explode():
    "Half of all pixels: a search that never marks a dead end takes minutes; both sides have the same number of pairs"
    a, b = np.random.default_rng(0).random((2, 160, 160)) < .5
    assert Matcher(a, 2.3)(b[None]).sum() == Matcher(b, 2.3)(a[None]).sum()

def test_perfect_edges_score_100_and_none_score_0():
    y = torch.zeros(1, 1, 40, 60)
    y[..., 10:30, 20:22] = 1 # two pixels wide
    for raw, expected in ((20*y - 10, 100), (0*y - 10, 0)):
        m = meter(standard_task('edges'))
        m.update(raw, y)
        assert m.compute()['odsf'] == expected
