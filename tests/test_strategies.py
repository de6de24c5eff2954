"Rows of choices: the named ones pick to the bit what functions picked before; greedy picks against scikit-activeml"
import time
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from strategies_reference import OLD
from test_prices import TINY, interrupted

from partal_nb.pool import Context, Pool, Scores
from partal_nb.runs.folder import RunFolder
from partal_nb.runs.journal import read_journal
from partal_nb.runs.ledger import read_labeled
from partal_nb.runs.loop import run
from partal_nb.select.budget import follow, spend
from partal_nb.select.pick import Lists, get_pick, herd, kernel_width
from partal_nb.select.k_center import k_center
from partal_nb.select.prices import Prices, least_total
from partal_nb.select.strategy import STRATEGIES, get_strategy, select
from partal_nb.tasks import semseg_task, standard_task

TASKS = semseg_task(['wall', 'floor']), standard_task('depth'), standard_task('normals')

def random_pool(rng):
    N, K = rng.integers(2, 40), rng.integers(1, 4)
    labeled = rng.random((N, K)) < .6*rng.random()
    pool = Pool(tuple(map(str, range(N))), TASKS[:K], labeled, rng.random((N, K)) < .8)
    norm = rng.integers(0, 8, (N, K))/8 if rng.random() < .5 else rng.random((N, K)) # half are full of ties
    norm[~pool.open] = np.nan
    features = rng.integers(0, 5, (N, 2)).astype(float) if rng.random() < .5 else rng.normal(size=(N, 6))
    return pool, Scores(3*norm - 1, norm, features)

@pytest.mark.parametrize('name', OLD)
def test_named_rows_pick_what_they_always_picked(name):
    for seed in range(300):
        pool, scores = random_pool(np.random.default_rng(seed))
        n = int(pool.open.sum())
        if not n: continue
        for budget in {1 + seed % n, n}:
            want = OLD[name](scores, pool, budget, np.random.default_rng(seed))
            rng = np.random.default_rng(seed)
            got = select(name, scores, pool, budget, rng)
            assert (want.index == got.index).all() and (want.score == got.score).all()
            again = np.random.default_rng(seed)
            OLD[name](scores, pool, budget, again)
            assert rng.random() == again.random() # nothing else was drawn

@pytest.mark.parametrize('name', sorted(set(OLD) - {'partal_floor'})) # which was refused
def test_named_rows_buy_what_they_always_bought(name):
    tried = 0
    for seed in range(100):
        pool, scores = random_pool(np.random.default_rng(seed))
        n = int(pool.open.sum())
        if not n: continue
        label = dict(semseg=9., depth=.5, normals=3.)
        free_with = dict(normals='depth') if seed % 2 and len(pool.tasks) == 3 else {}
        prices = Prices({t.name: label[t.name] for t in pool.tasks}, free_with, seed % 3)
        budget = 12.5 + seed % 7
        if budget > least_total(pool, prices): continue
        tried += 1
        rng = np.random.default_rng(seed)
        want = follow(OLD[name](scores, pool, n, rng), pool, prices, budget, rng)
        got = spend(name, scores, pool, prices, budget, np.random.default_rng(seed))
        assert (want.index == got.index).all()
    assert tried > 30

def test_equal_shares_and_fading_noise():
    rng = np.random.default_rng(0)
    pool = Pool(tuple(map(str, range(300))), TASKS, np.zeros((300, 3), bool), np.ones((300, 3), bool))
    norm = rng.random((300, 3)) + np.arange(3)
    scores = Scores(norm, norm, rng.normal(size=(300, 4)))
    for name, f in STRATEGIES.items():
        if f.choices.shares != 'equal': continue
        picks = select(name, scores, pool, 60, rng)
        assert np.bincount(picks.index[:, 1]).tolist() == [20, 20, 20]
    mean = {p: norm[tuple(select('power_equal', scores, pool, 60, rng, Context(p)).index.T)].mean() for p in (0, .5, 1)}
    assert 1.5 < mean[0] < mean[.5] < mean[1]

def test_picks_spread_over_scenes():
    "A pool of walks through 120 scenes, a few of them seen often; a scene is covered where a task has a label in it"
    rng = np.random.default_rng(0)
    scene = rng.choice(120, 400, p=np.arange(1, 121)**-1.1/(np.arange(1, 121)**-1.1).sum())
    features = rng.normal(size=(120, 16))[scene] + .2*rng.normal(size=(400, 16))
    labeled = np.zeros((400, 3), bool)
    labeled[rng.permutation(400)[:20]] = True
    pool = Pool(tuple(map(str, range(400))), TASKS, labeled, np.ones((400, 3), bool))
    norm = rng.random((400, 3))
    seen = {}
    for name in ('random_equal', 'power_equal', 'herd_equal', 'cover_equal', 'coreset'):
        now = labeled.copy()
        now[tuple(select(name, Scores(norm, norm, features), pool, 120, rng).index.T)] = True
        seen[name] = np.mean([len(set(scene[column])) for column in now.T])
    assert min(seen['herd_equal'], seen['cover_equal']) > 1.25*max(seen['random_equal'], seen['power_equal']), seen
    assert abs(seen['cover_equal'] - seen['coreset']) < 2

@pytest.fixture
def points():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 8))*rng.uniform(.5, 3, 8)
    labeled = np.sort(rng.permutation(400)[:25])
    return x, labeled, np.setdiff1d(np.arange(400), labeled)

def labels(x, labeled):
    y = np.full(len(x), np.nan)
    y[labeled] = 0
    return y

def test_cover_against_scikit_activeml(points):
    active = pytest.importorskip('skactiveml.pool', reason='scikit-activeml is not installed')
    x, labeled, _ = points
    want = active.CoreSet(random_state=0).query(x, labels(x, labeled), batch_size=60)
    mask = np.zeros((400, 1), bool)
    mask[labeled] = True
    value = get_pick('cover')(Lists(~mask, mask, features=x, limit=np.array([60])), np.random.default_rng(0))[:, 0]
    assert np.argsort(-value, kind='stable')[:60].tolist() == want.tolist() == k_center(x, labeled, 60).tolist()

def test_herd_against_scikit_activeml(points):
    active = pytest.importorskip('skactiveml.pool', reason='scikit-activeml is not installed')
    x, labeled, rows = points
    rng = np.random.default_rng(0)
    width = kernel_width(x, rows, labeled)
    query = active.MaxHerding(
        normalize_samples=False, metric='rbf', metric_dict=dict(gamma=.5/width**2), random_state=0)
    want = query.query(x, labels(x, labeled), batch_size=60)
    assert herd(x, labeled, rows, 60, rng, width=width)[0].tolist() == want.tolist()

@pytest.mark.slow
@pytest.mark.parametrize('name', ['power_equal', 'cover_equal', 'herd_equal', 'coreset'])
def test_a_hundred_thousand_images(name):
    N, K = 100_000, 5
    rng = np.random.default_rng(0)
    tasks = TASKS + (standard_task('edges'), standard_task('parts'))
    labeled = np.zeros((N, K), bool)
    labeled[rng.permutation(N)[:1000]] = True
    pool = Pool(tuple(map(str, range(N))), tasks, labeled, np.ones((N, K), bool))
    scene = rng.normal(size=(2000, 270)).astype(np.float32)[rng.integers(0, 2000, N)]
    features = scene + rng.normal(scale=.3, size=(N, 270)).astype(np.float32)
    norm = rng.random((N, K))
    began = time.process_time()
    picks = select(get_strategy(name), Scores(norm, norm, features), pool, 1500, rng)
    seconds = time.process_time() - began
    assert len(picks) == 1500 and seconds < 2*60 # a minute of two cores

LEARNS = replace(
    TINY, prices=(), open_price=0., step_money=0., pool_images=24, start_images=3, step_pairs=18, rounds=3,
    normalizer='calibrated', score='disagreement', shares='return', pick='herd', start_by='typical')

def test_a_run_learns_from_its_purchases_and_resumes(tmp_path, monkeypatch):
    "Start by features, scale and shares by the errors of what was bought: an interruption changes nothing"
    def keep(folder):
        left_out = 'seconds', 'peak_memory_mb'
        return [{k: v for k, v in line.items() if k not in left_out} for line in read_journal(folder)]
    whole = keep(run(LEARNS, tmp_path/'a', progress=False))
    def again(): run(LEARNS, tmp_path/'b', progress=False)
    for n in count(1):
        if not interrupted(again, n, monkeypatch): break
    assert n > 4 and keep(tmp_path/'b') == whole
    assert [line['images'] for line in whole][0] == 3 and [len(line['pair_errors']) for line in whole[:-1]] == [18]*3
    assert all(text and 'rank correlation' in text for text in whole[2]['calibration'].values())
    assert list(whole[0]['shares'].values()) == [.3333]*3 # nothing is known yet

def test_starts_differ_and_are_whole_images(tmp_path):
    starts = {}
    for by in ('random', 'k_center', 'typical', 'herding'):
        folder = run(replace(LEARNS, start_by=by, rounds=0), tmp_path/by, progress=False)
        pairs = read_labeled(RunFolder(folder).ledger_file)
        starts[by] = frozenset(p.image for p in pairs)
        assert len(pairs) == 9 and len(starts[by]) == 3
    assert len(set(starts.values())) > 2
