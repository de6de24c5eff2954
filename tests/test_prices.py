"Runs in money: older runs keep their hash, every strategy spends as much, an interrupted one makes the same purchases"
import json
import os
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from partal_nb.annotate.plan import WholePurchase, project_config
from partal_nb.config import RunConfig, config_from_dict, config_hash, preset
from partal_nb.data.rooms import ROOM_TASKS
from partal_nb.pool import Pool, Scores
from partal_nb.runs.journal import read_journal
from partal_nb.runs.loop import run
from partal_nb.select.prices import Prices, least_total
from partal_nb.select.strategy import STRATEGIES

ROOT = Path(__file__).parents[1]
TINY = preset('demo', pool_images=10, test_images=4, height=48, width=64, features=8, encoder='test_efficientnet',
              pretrained=False, start_images=3, rounds=2, train_by='steps', train_for=4, passes=3, device='cpu',
              prices=('semseg=9', 'depth=0.5', 'normals=depth'), open_price=1, step_money=11, price_unit='min')
OLD_RUNS = sorted((ROOT/'nbs/runs/results').rglob('config.json'))

@pytest.mark.parametrize('path', OLD_RUNS, ids=lambda p: '-'.join(p.parts[-3:-1]))
def test_a_field_that_came_later_leaves_the_hash_of_older_runs(path):
    about = json.loads(path.read_text())
    config = config_from_dict(about['config'])
    assert config_hash(config) == about['hash']
    assert config_hash(replace(config, open_price=1.)) != about['hash']
    assert config_from_dict(asdict(config)) == config

@pytest.mark.parametrize('per_price', [False, True])
@pytest.mark.parametrize('name', sorted(STRATEGIES))
def test_every_strategy_spends_the_budget(name, per_price, tmp_path):
    if per_price and STRATEGIES[name].choices.shares == 'equal': pytest.skip('refused: shares and rates at once')
    lines = read_journal(run(replace(TINY, strategy=name, per_price=per_price), tmp_path/'a', progress=False))
    assert lines[0]['cost'] == 3*(1 + 9 + .5)
    for line in lines[1:]:
        left = 11*line['round'] - (line['cost'] - lines[0]['cost'])
        assert 0 <= left < 1 + 9 # less than the most expensive label

def interrupted(work, n, monkeypatch): # is it stopped, right before the n-th file gets its name?
    left, rename = count(1 - n), os.replace
    def stop(*args):
        if next(left) == 0: raise KeyboardInterrupt
        return rename(*args)
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', stop)
        try: work()
        except KeyboardInterrupt: return True
    return False

def test_interrupted_and_resumed_in_money(tmp_path, monkeypatch):
    def keep(folder):
        left_out = ('seconds', 'peak_memory_mb')
        return [{k: v for k, v in line.items() if k not in left_out} for line in read_journal(folder)]
    whole = keep(run(TINY, tmp_path/'a', progress=False))
    def again(): run(TINY, tmp_path/'b', progress=False)
    for n in count(1):
        if not interrupted(again, n, monkeypatch): break
    assert n > 4 and keep(tmp_path/'b') == whole

TASKS = tuple(ROOM_TASKS[name] for name in ('semseg', 'depth', 'normals'))
NAMES = tuple(t.name for t in TASKS)

def one_purchase(seed): # some labels of each task, some prices; None: such a request is refused
    rng = np.random.default_rng(seed)
    has = rng.random((rng.integers(8, 16), 3)) < rng.choice([0, .1, .5, .9], 3)
    pool = Pool(tuple(map(str, range(len(has)))), TASKS, has, np.ones_like(has))
    free = [{}, dict(normals='depth'), dict(normals='depth', depth='semseg')][rng.integers(3)]
    prices = Prices({name: float(rng.choice([.5, 1, 3, 9])) for name in NAMES}, free, float(rng.choice([0, 2])))
    requests = ('money', float(rng.choice([12, 20, 40]))), ('budget', int(rng.choice([3, 6, 10])))
    kind, amount = requests[rng.integers(2)]
    p = SimpleNamespace(config=project_config(dict(strategy='random_pairs'), TASKS), names=NAMES, per_price=True,
                        files=SimpleNamespace(trained=lambda: [1]))
    bought = WholePurchase(p, pool, prices, {kind: amount}, 1)
    trained = has.sum(0) > 1
    rest = replace(pool, available=has | trained)
    if not rest.open.any() or amount > least_total(rest, bought.tariff): return
    for k in np.flatnonzero(~trained): bought.start(k)
    rest = replace(bought.pool, available=bought.pool.available & (bought.pool.labeled | trained))
    bought.scored(rest, Scores(*[rng.random(has.shape)]*2), lambda n, k: 'a score')
    return bought, amount

def test_a_batch_with_tasks_that_start():
    "Whatever is labeled, priced and free: something is asked, no pair twice, and never for more money than there is"
    made = list(filter(None, map(one_purchase, range(300))))
    assert len(made) > 50 and any('start of normals' in q['why'] for b, _ in made for q in b.queries)
    for bought, amount in made:
        pairs = [(q['image'], q['task']) for q in bought.queries]
        assert pairs and len(set(pairs)) == len(pairs) and -1e-9 <= bought.left < amount
        if bought.kind == 'money': assert sum(q['price'] for q in bought.queries) <= amount + 1e-9
