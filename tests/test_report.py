"A comparison from two folders to a page that a browser sorts and searches, and what cannot be compared."
import json,re,shutil,subprocess
from pathlib import Path

import pytest
import torch

from vlm_ft.evaluation.compare import Comparison, compare
from vlm_ft.lora import get_peft_model
from vlm_ft.models.tiny import drawn, tiny, tiny_folder

torch.set_num_threads(1)
ROWS = [dict(image=drawn(w, (60,40)), question='Read.', answer=w, task='ocr', page=k//2) for k,w in enumerate(('ab','cd','ef','gh','ij','kl'))]
BEFORE,AFTER = ['ab','cx','ex','gh','xx',''],['ab','cd','ef','gx','ij','kl']
DATA = Path(__file__).parents[2]/'shared'/'data'/'receipts'

def adapter_of(base, folder):
    "An adapter in a folder that says other things than its base."
    from vlm_ft.merging import FastVisionModel
    model,processor = FastVisionModel.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, r=4)
    with torch.no_grad():
        for n,p in model.named_parameters():
            if 'lora_B' in n: p.normal_(std=.5)
    model.save_pretrained(folder); processor.save_pretrained(folder)
    return str(folder)

def test_two_folders_one_after_the_other(tmp_path, monkeypatch):
    "Each model is gone before the next is loaded, and answers as it does alone."
    import gc,weakref
    from vlm_ft.evaluation.generation import predict
    from vlm_ft.merging import FastVisionModel
    base = tiny_folder('qwen2_vl', tmp_path/'base')
    tuned,alive,load = adapter_of(base, tmp_path/'adapter'),[],FastVisionModel.from_pretrained
    def watched(*args, **kwargs):
        gc.collect(); assert not any(m() for m in alive)
        model,processor = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model,processor
    monkeypatch.setattr(FastVisionModel, 'from_pretrained', watched)
    found = compare([base, tuned], ROWS, max_new_tokens=4, progress=False, dtype=torch.float32)
    assert len(alive)==2 and found.names==['base','adapter'] and found.predictions['base']!=found.predictions['adapter']
    model,processor = load(tuned, dtype=torch.float32)
    assert found.predictions['adapter']==predict(model, processor, found.rows, max_new_tokens=4, progress=False)

def test_models_of_one_name_are_told_apart(tmp_path):
    for run in ('one','two'): tiny_folder('qwen2_vl', tmp_path/run/'adapter')
    found = compare([tmp_path/'one'/'adapter', tmp_path/'two'/'adapter'], ROWS[:2], max_new_tokens=2, progress=False)
    assert found.names==['one/adapter','two/adapter']
    with pytest.raises(ValueError, match='compared with itself'): compare([tmp_path/'one'/'adapter']*2, ROWS)

def test_pictures_that_are_gone_are_said(tmp_path):
    rows = []
    for r in ROWS: r['image'].save(tmp_path/f"{r['answer']}.png"); rows.append({**r, 'image':str(tmp_path/f"{r['answer']}.png")})
    (tmp_path/'ab.png').unlink(); (tmp_path/'cd.png').write_bytes((tmp_path/'cd.png').read_bytes()[:70])
    page = Comparison(rows, dict(before=BEFORE, after=AFTER)).save(tmp_path/'page.html').read_text()
    assert 'Pictures that cannot be read any more: 2, of row 0, 1.' in page and page.count('<img')==4 and page.count('class="lost"')==2
    with pytest.raises(ValueError, match='Row 0'): compare({'a':tiny('qwen2_vl')}, rows, progress=False)          # a model needs them

@pytest.mark.parametrize('path', ['page.html','table.md','rows.png'])
def test_a_full_disk_leaves_the_old_file(path, tmp_path, monkeypatch):
    compared = Comparison(ROWS, dict(before=BEFORE, after=AFTER))
    old = compared.save(tmp_path/path).read_bytes()
    def full(self, content): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='Nothing was written'): compared.save(tmp_path/path)
    assert (tmp_path/path).read_bytes()==old and [p.name for p in tmp_path.iterdir()]==[path]

@pytest.mark.skipif(not shutil.which('chromium'), reason='no chromium')
@pytest.mark.parametrize('ask,ids,said', [('', [0,1,2,3,4,5], '6 rows'), ('order=most harmed by after', [3,0], '6 rows'), ('order=most improved by after', [4,5,1], '6 rows'),
                                          ('became=harmed', [3], '1 of 6 rows'), ('q=ij', [4], '1 of 6 rows'), ('q=nowhere', [], 'no row fits')])
def test_a_browser_sorts_filters_and_searches(ask, ids, said, tmp_path):
    "The page's script is let run by the page's own policy, and does what its tools say."
    page = Comparison(ROWS, dict(before=BEFORE, after=AFTER)).save(tmp_path/'page.html')
    dom = subprocess.run(['chromium','--headless','--no-sandbox','--disable-gpu','--dump-dom',f'file://{page}#{ask}'], capture_output=True, text=True, timeout=120).stdout
    shown = [int(i) for i,attributes in re.findall(r'<article id="row-(\d+)"([^>]*)>', dom) if 'hidden' not in attributes]
    assert shown[:len(ids)]==ids and (len(shown)==len(ids) or '6 rows'==said) and re.search(f'<output[^>]*>{said}', dom)
    assert '<div class="tools" role="search" aria-label="Rows">' in dom                     # a script shows the tools

@pytest.mark.skipif(not DATA.is_dir(), reason='needs ../shared/data')
def test_receipts_are_drawn_by_picture(tmp_path):
    "170 rows of 57 receipts: the interval is over receipts, and the page stays within its bound."
    rows = [json.loads(l) for l in (DATA/'test.jsonl').read_text().splitlines()]
    texts = [r['answer'] if isinstance(r['answer'], str) else r['answer'][0] for r in rows]
    compared = Comparison(DATA/'test.jsonl', dict(nothing=['']*len(rows), truth=texts))
    assert len(rows)==170 and '57 groups of rows of one picture (170 rows)' in compared.notes()[0]
    page = compared.save(tmp_path/'page.html', max_mb=2)
    assert page.stat().st_size < 4*2**20 and 'pictures are left out: the page holds 2 MB' in page.read_text()
