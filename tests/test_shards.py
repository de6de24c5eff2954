"A large pool: scored in shards, interrupted, shared with another process, and only some of its images"
from dataclasses import replace
from functools import partial

import pytest

from partal_nb.commands.sweeps import score_beside
from partal_nb.config import config_hash, preset
from partal_nb.runs import loop
from partal_nb.runs import shards as run_shards
from partal_nb.runs.folder import RunFolder
from partal_nb.uncertainty import maps, shards
from partal_nb.uncertainty.acquisition import SCORES

TINY = preset('demo', pool_images=40, test_images=4, height=32, width=32, features=8, encoder='test_efficientnet',
              pretrained=False, start_images=3, step_pairs=6, rounds=1, train_by='steps', train_for=4, passes=2,
              device='cpu')

def journal(folder):
    "Without what is measured in seconds and bytes"
    return [{k: v for k, v in line.items() if k not in ('seconds', 'peak_memory_mb')} for line in folder.journal()]

def test_interrupted_and_shared(tmp_path, monkeypatch):
    "One shard before the interruption, the others by somebody else: the run scores nothing, and is the same run"
    plain = RunFolder(loop.run(TINY, tmp_path/'plain', progress=False))
    monkeypatch.setattr(run_shards, 'in_shards', partial(shards.in_shards, size=16))
    write = shards.write_shard
    def write_one(path, *args):
        if path.name == 'part-00001.parquet': raise KeyboardInterrupt
        write(path, *args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(shards, 'write_shard', write_one)
        loop.run(TINY, tmp_path/'cut', progress=False)
    cut = RunFolder(tmp_path/'cut')
    assert [p.name for p in cut.shards(0).iterdir()] == ['part-00000.parquet']
    assert score_beside(cut, .5) == 'scores' and len(list(cut.shards(0).iterdir())) == 3
    with monkeypatch.context() as m:
        m.setitem(SCORES, 'entropy', lambda *_: pytest.fail('all shards are there'))
        SCORES['entropy'].by_image = True
        loop.run(TINY, cut.path, progress=False)
    assert journal(cut) == journal(plain) and not cut.shards(0).exists()
    assert cut.read_scores(0).equals(plain.read_scores(0))

@pytest.mark.parametrize('strategy', ['coreset', 'herd_equal'])
def test_features_interrupted_and_shared(tmp_path, monkeypatch, strategy):
    "Likewise with the features of all images, whether pairs have scores beside them or not"
    config = replace(TINY, strategy=strategy)
    plain = RunFolder(loop.run(config, tmp_path/'plain', progress=False))
    monkeypatch.setattr(run_shards, 'FeatureShards', partial(shards.FeatureShards, size=16))
    pool_features = maps.pool_features
    def first_shard(*args, rows=None, **more):
        if rows is not None and rows[0]: raise KeyboardInterrupt
        return pool_features(*args, rows=rows, **more)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(maps, 'pool_features', first_shard)
        loop.run(config, tmp_path/'cut', progress=False)
    cut = RunFolder(tmp_path/'cut')
    assert [p.name for p in cut.shards(0).iterdir()] == ['features-00000.safetensors']
    assert score_beside(cut, .5) == 'features' and len(list(cut.shards(0).iterdir())) == 3
    with monkeypatch.context() as m:
        m.setattr(maps, 'pool_features', lambda *_, **__: pytest.fail('all shards are there'))
        loop.run(config, cut.path, progress=False)
    assert journal(cut) == journal(plain) and not cut.shards(0).exists()

def test_some_images(tmp_path):
    "What is bought comes from the sample, and each round has a sample of its own"
    config = preset('demo', **{f: getattr(TINY, f) for f in TINY.__dataclass_fields__ if f != 'preset'}
                    | dict(score_images=8, rounds=2))
    assert config_hash(preset('demo', score_images=0)) == config_hash(preset('demo'))
    folder = RunFolder(loop.run(config, tmp_path/'few', progress=False))
    seen = [set(folder.read_scores(r).image) for r in (0, 1)]
    assert [len(images) for images in seen] == [8, 8] and seen[0] != seen[1]
    with loop.open_run(config, folder, progress=False) as opened: events = opened.ledger.events()
    for r in (0, 1): assert set(events[events['round'] == r + 1].image) <= seen[r]

def test_too_few_images():
    with pytest.raises(ValueError, match='config score_images: expected 0, or at least step_pairs=36, got 8'):
        preset('demo', score_images=8)
