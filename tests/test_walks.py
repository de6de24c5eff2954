"A redundant pool: what its ids keep, where its cameras stand, and that picks which cover features spread over rooms"
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from partal_nb.config import RunConfig, config_hash
from partal_nb.data.rooms import ROOM_SPLITS, render_room, room_ids, room_scene
from partal_nb.data.walks import (
    View, cluster_id, has_space, nearest_neighbors, relative_distances, render_view, view_counts, view_id, view_of,
    view_scene, walk_ids, walk_test_ids)
from partal_nb.model.encoder import Encoder
from partal_nb.select.k_center import k_center

@pytest.mark.parametrize('seed', [0, 41, ROOM_SPLITS['test'] + 3])
def test_first_views_are_the_independent_rooms(seed):
    one, other = render_view(f'{seed:07d}', 48, 64), render_room(seed, 48, 64)
    assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in other.items()}
    assert all((one[k] == other[k]).all() for k in one)

def test_a_view_depends_on_its_id_only():
    code = ("import hashlib; from partal_nb.data.walks import render_view; "
            "print(hashlib.sha256(render_view('rare0000003-012', 24, 32)['rgb'].tobytes()).hexdigest())")
    run = lambda: subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    there = run(), run()
    assert there[0] == there[1] != ''

@pytest.mark.parametrize('rare', [False, True])
def test_cameras_stand_in_free_space_and_see_what_the_first_sees(rare):
    for seed in range(30):
        first = set(view_scene(View(seed, 0, rare)).classes)
        for number in (1, 2, 3):
            scene = view_scene(View(seed, number, rare))
            assert has_space(scene, scene.camera.at) and set(scene.classes) == first
    for seed in range(12):
        depth = render_view(view_id(View(seed, 1, rare)), 24, 32)['depth']
        assert depth.min() > .1 and np.isfinite(depth).all()

def test_moves_are_as_large_as_described():
    aside, high, turn, tilt = [], [], [], []
    for seed in range(150):
        own, now = room_scene(seed).camera, view_scene(View(seed, 1)).camera
        move = own.axes@(now.at - own.at)
        ways = [-c.axes[2] for c in (own, now)]
        angles = [np.degrees(np.arctan2(w[0], -w[2])) for w in ways]
        aside.append(move[0]), high.append(now.at[1] - own.at[1])
        turn.append(angles[1] - angles[0]), tilt.append(np.degrees(np.arcsin(ways[1][1]) - np.arcsin(ways[0][1])))
    spread = [np.std(v) for v in (aside, high, turn, tilt)]
    np.testing.assert_allclose(spread, (.25, .05, 10, 3), rtol=.2)

def test_pools():
    assert walk_ids(600, 0.) == room_ids(600) and walk_test_ids(200) == room_ids(200, 'test')
    pools = [walk_ids(400, 1.1, .1, seed) for seed in range(3)]
    rooms = [set(map(cluster_id, ids)) for ids in pools]
    assert all(len(set(ids)) == 400 and 100 < len(r) < 150 for ids, r in zip(pools, rooms))
    assert not rooms[0] & rooms[1] and not rooms[1] & rooms[2] and not set.union(*rooms) & set(walk_test_ids(400))
    for ids in pools:
        numbers = Counter(map(cluster_id, ids))
        assert all(view_id(view_of(room)._replace(number=k)) in ids for room, n in numbers.items() for k in range(n))
    halves = [len(set(map(cluster_id, ids))) for ids in (pools[0][:200], pools[0][200:])]
    assert min(halves) > .8*max(halves) # the order is random: no half has the common rooms

def test_redundancy_grows_with_the_exponent():
    rooms = [np.mean([(view_counts(400, a, s) > 0).sum() for s in range(5)]) for a in (.5, .8, 1.1, 1.5, 2.)]
    assert (np.diff(rooms) < 0).all()

@pytest.fixture(scope='module')
def walk():
    "A pool of 120 images, and pretrained features of them"
    torch.manual_seed(0)
    encoder, ids = Encoder('lite0').eval(), walk_ids(120)
    x = torch.from_numpy(np.stack([render_view(i, 48, 64)['rgb'] for i in ids])).permute(0, 3, 1, 2)/255
    with torch.no_grad(): return ids, torch.cat([encoder.levels(b)[-1].mean((2, 3)) for b in x.split(20)]).numpy()

def test_neighbors_are_of_the_same_room(walk):
    ids, features = walk
    numbers = Counter(map(cluster_id, ids))
    nearest, far = nearest_neighbors(relative_distances(features))
    same = np.array([cluster_id(a) == cluster_id(ids[b]) for a, b in zip(ids, nearest)])
    common = np.array([numbers[cluster_id(i)] >= 4 for i in ids])
    assert same[common].mean() > .7 and np.median(far[common]) < np.median(far[~common])

def test_picks_that_cover_features_spread_over_rooms(walk):
    ids, features = walk
    rooms = np.array([cluster_id(i) for i in ids])
    covered = len(set(rooms[k_center(features, np.array([], int), 40)]))
    at_random = [len(set(np.random.default_rng(s).choice(rooms, 40, replace=False))) for s in range(200)]
    assert covered > np.quantile(at_random, .99)

def test_configurations_keep_their_hash():
    assert config_hash(RunConfig(views=0., rare=0., pool_seed=0)) == config_hash(RunConfig())
    changed = {config_hash(RunConfig(**c)) for c in (dict(views=1.1), dict(rare=.1), dict(pool_seed=1))}
    assert len(changed | {config_hash(RunConfig())}) == 4
    for wrong in (dict(views=-1.), dict(rare=1.), dict(pool_seed=-1), dict(views=1.1, data='photos')):
        with pytest.raises(ValueError, match=f'config {next(iter(wrong))}'): RunConfig(**wrong)
