"Runs in money: older runs keep their hash, every strategy spends as much, a killed one goes on to the same purchases"
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from partal_nb import loop
from partal_nb.core import RunConfig, config_from_dict, config_hash, preset
from partal_nb.journal import read_journal
from partal_nb.select.strategy import STRATEGIES

ROOT = Path(__file__).parents[1]
TINY = preset('demo', pool_images=10, test_images=4, height=48, width=64, features=8, encoder='test_efficientnet', pretrained=False, start_images=3,
              rounds=2, train_by='steps', train_for=4, passes=3, device='cpu', prices=('semseg=9', 'depth=0.5', 'normals=depth'), open_price=1,
              step_money=11, price_unit='min')

@pytest.mark.parametrize('path', sorted((ROOT/'nbs/runs/results').rglob('config.json')), ids=lambda p: '-'.join(p.parts[-3:-1]))
def test_a_field_that_came_later_leaves_the_hash_of_older_runs(path):
    about = json.loads(path.read_text())
    config = config_from_dict(about['config'])
    assert config_hash(config) == about['hash']
    assert config_hash(replace(config, open_price=1.)) != about['hash']
    assert set(about['config']) <= set(asdict(RunConfig()))

@pytest.mark.parametrize('per_price', [False, True])
@pytest.mark.parametrize('name', sorted(set(STRATEGIES) - {'partal_floor'})) # has no ranking, is refused
def test_every_strategy_spends_the_budget(name, per_price, tmp_path):
    lines = read_journal(loop.run(replace(TINY, strategy=name, per_price=per_price), tmp_path/'a', progress=False))
    assert lines[0]['cost'] == 3*(1 + 9 + .5)
    for j in lines[1:]: assert 0 <= 11*j['round'] - (j['cost'] - lines[0]['cost']) < 1 + 9 # less than the dearest label

def test_killed_and_gone_on_in_money(tmp_path, monkeypatch):
    def keep(folder): return [{k: v for k, v in j.items() if k not in ('seconds', 'peak_memory_mb')} for j in read_journal(folder)]
    def stop(*a, **kw): raise KeyboardInterrupt
    whole = keep(loop.run(TINY, tmp_path/'a', progress=False))
    for step in ('_select', 'spend', 'price_of', 'append_journal'):
        with monkeypatch.context() as m:
            m.setattr(loop, step, stop)
            with pytest.raises(KeyboardInterrupt): loop.run(TINY, tmp_path/'b', progress=False)
    assert keep(loop.run(TINY, tmp_path/'b', progress=False)) == whole
