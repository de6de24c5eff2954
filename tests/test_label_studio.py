"A batch through the real Label Studio: imported, annotated and exported over its API, and compared pixel by pixel"
import json

import numpy as np
import pytest

from partal_nb.annotate.query import Query, legend
from partal_nb.annotate.label_studio import brush_mask, brush_rle
from partal_nb.annotate.formats import FORMATS
from partal_nb.data.prepare import open_source

pytestmark = pytest.mark.slow

def ask(shared, sample, name, n=4):
    source, found = open_source(shared/sample), []
    for i in source.ids(name):
        rgb, label = source.rgb(i), source.label(i, name)
        if (label == 255).all(): continue
        entropy = np.hypot(*np.gradient(rgb.mean(2)))
        found.append(Query(i, source.tasks[name], rgb, label, entropy))
        if len(found) == n: return found

def regions(label, task, like): # as the interface sends them when somebody paints `label`
    def region(p): return dict(format='rle', rle=brush_rle(label[..., 0] == p.value), brushlabels=[p.name])
    there = [p for p in legend(task)[1:] if (label == p.value).any()]
    return [dict(like, id=f'drawn{p.value}', value=region(p)) for p in there]

@pytest.mark.parametrize('sample,name', [('nyuv2_192x144', 'semseg'), ('pascal_part18', 'parts')])
def test_a_batch_through_label_studio(shared, studio, tmp_path, sample, name):
    asked = ask(shared, sample, name)
    task, sizes = asked[0].task, {q.image: q.rgb.shape[:2] for q in asked}
    FORMATS['label-studio'].write(tmp_path, task, asked)
    project, ids = studio.project(name, tmp_path)
    assert len(ids) == len(asked)

    truth, sent = {q.image: q.guess for q in asked}, {}
    for k, id in enumerate(ids):
        t = studio.call('GET', f'/api/tasks/{id}')
        image, (guess,) = t['data']['image_id'], t['predictions']
        names = {p.name: p.value for p in legend(task)}
        for r in guess['result']:
            mask = brush_mask(r['value']['rle'], sizes[image])
            assert np.array_equal(mask, truth[image][..., 0] == names[r['value']['brushlabels'][0]])
        assert len(guess['result']) == sum((truth[image] == p.value).any() for p in legend(task)[1:])
        result, body = guess['result'], dict(lead_time=30*(k + 1))
        if k == 1: # corrected: everything mirrored
            sent[image] = truth[image][:, ::-1]
            result = regions(sent[image], task, {k: v for k, v in result[0].items() if k not in ('id', 'value')})
        elif k == 2:
            why = dict(type='textarea', value=dict(text=['too blurred']))
            result = [*result, dict(why, id='why', from_name='rejected', to_name='image')]
        elif k == 3: body |= dict(was_cancelled=True)
        else: sent[image] = truth[image]
        studio.call('POST', f'/api/tasks/{id}/annotations/', json=dict(body, result=result))

    (tmp_path/'export.json').write_text(json.dumps(studio.export(project)))
    answers = {a.image: a for a in FORMATS['label-studio'].read(tmp_path/'export.json', task, sizes)}
    assert [answers[q.image].problem for q in asked] == [None]*4
    assert [answers[q.image].rejected for q in asked] == [None, None, 'too blurred', 'skipped in Label Studio']
    assert [answers[q.image].minutes for q in asked] == [.5, 1, 1.5, 2]
    assert len({a.who for a in answers.values()}) == 1 and answers[asked[0].image].who
    assert len(sent) == 2
    for image, label in sent.items(): assert np.array_equal(answers[image].label, label), image
