"The doctor on real sets, on damage that is planted in them, and its memory."
import io, json, os, resource, shutil, subprocess, sys
from pathlib import Path

import pytest
from PIL import Image

import vlm_ft
from vlm_ft.data import pictures_of
from vlm_ft.doctor_page import check_data
from vlm_ft.mending import mend
from vlm_ft.messages import open_image
from vlm_ft.readers import load_rows
from vlm_ft.models.tiny import drawn

BASE = Path(vlm_ft.__path__[0])/'base'
DATA = Path(__file__).parents[2]/'shared'/'data'
GRAVE = ('repeated','leaked','shared','near leak','contradicted','heard','frames','turned')

def real(name):
    "The files of a real set; the test is skipped where they are absent."
    if not (DATA/name).exists(): pytest.skip(f'the real image-text sets are not beside this checkout ({name})')
    return DATA/name/'train.jsonl', DATA/name/'test.jsonl'

@pytest.mark.parametrize('name', ['smoke','receipts','captions'])
def test_a_real_set_is_well(name):
    train,test = real(name)
    c = check_data(train, BASE, test=test, progress=False)
    assert not c.refused() and not [k for k in GRAVE if k in c.findings]            # the sets say of themselves that no picture is in both splits
    assert c.n_rows=={'train':sum(1 for _ in open(train)), 'test':sum(1 for _ in open(test))}
    assert 'vlm-doctor' in c._repr_html_()

def test_what_is_planted_in_a_real_set_is_found_and_mended(tmp_path):
    train,test = real('smoke')
    shutil.copytree(train.parent, tmp_path/'set', copy_function=shutil.copyfile)
    home = tmp_path/'set'
    for folder in (home, home/'images'): folder.chmod(0o755)
    rows,held = ([json.loads(s) for s in f.read_text().splitlines()] for f in (train, test))
    def plant(name, make, like=rows[0], **more):
        (home/'images'/name).write_bytes(make); rows.append({**like, 'image':f'images/{name}', **more}); return len(rows)-1
    def saved(im, format='PNG', **kw):
        out = io.BytesIO(); im.save(out, format, **kw); return out.getvalue()
    note = Image.Exif(); note[0x0112] = 8
    whole = open_image(home/rows[0]['image'])
    at = {'copy':plant('copy.jpg', saved(open_image(home/held[5]['image']).resize((400,int(400*open_image(home/held[5]['image']).height/open_image(home/held[5]['image']).width))), 'JPEG', quality=70), held[5]),
          'cut':plant('cut.jpg', saved(whole, 'JPEG')[:2000]), 'turned':plant('turned.jpg', saved(drawn('turned', (300,200)), 'JPEG', exif=note), answer='turned'),
          'pages':plant('pages.tif', saved(drawn('first', (300,200)), 'TIFF', save_all=True, append_images=[drawn('second', (300,200))]), answer='first')}
    rows.append(held[2]); at['row'] = len(rows)-1
    rows.append({**held[3], 'image':'../../outside.png'}); at['outside'] = len(rows)-1
    rows.append({**held[4], 'image':str(home/held[4]['image']), 'question':'What else?'}); at['picture'] = len(rows)-1          # a whole path is taken as it stands
    (home/'train.jsonl').unlink(); (home/'train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    c = check_data(home/'train.jsonl', BASE, test=home/'test.jsonl', progress=False)
    found = {k:[i for _,i in f.rows] for k,f in c.findings.items()}
    assert {i for _,i in c.refused()}=={at['cut'],at['outside']}
    assert at['copy'] in found['near leak'] and found['turned']==[at['turned']] and found['frames']==[at['pages']] and found['leaked']==[at['row']] and at['picture'] in found['shared']
    assert c.findings['near leak'].like['train',at['copy']]==('test',5)
    n = mend(c, tmp_path/'clean', home/'train.jsonl', home/'test.jsonl')
    again = check_data(tmp_path/'clean'/'train.jsonl', BASE, test=tmp_path/'clean'/'test.jsonl', progress=False)
    assert n['test']==len(held) and not again.refused() and not [k for k in ('leaked','shared','turned','frames') if k in again.findings]
    assert [open_image(p).tobytes() for r in load_rows(tmp_path/'clean'/'test.jsonl') for p in pictures_of(r['messages'])]==[open_image(home/r['image']).tobytes() for r in held]

def peak_mib(code, *args):
    "The peak memory of a process of its own."
    code += "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10)"
    out = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1'}, timeout=300)
    assert out.returncode==0, out.stderr[-2000:]
    return float(out.stdout.split()[-1])

def test_memory_does_not_grow_with_the_pictures(tmp_path):
    for i in range(150): drawn(f'page {i}', (1400,1000)).save(tmp_path/f'{i}.png', compress_level=1)               # 4 MiB each, decoded
    for n in (30, 150): (tmp_path/f'{n}.jsonl').write_text('\n'.join(json.dumps({'image':f'{i}.png', 'question':'q', 'answer':str(i)}) for i in range(n)))
    code = f"import sys; from vlm_ft.doctor import check_data; check_data(sys.argv[1], {str(BASE)!r}, workers=2, progress=False)"
    few,many = peak_mib(code, tmp_path/'30.jsonl'),peak_mib(code, tmp_path/'150.jsonl')
    assert many-few<60, (few, many)                                                                                    # 120 pictures more would take 480 MiB

def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    "9,400x9,400 RGB within Pillow's bound takes 250 MiB; just beyond it nothing is decoded."
    Image.new('1', (9470,9470)).save(tmp_path/'bomb.png')
    code = """import sys
from vlm_ft.messages import DataError, open_image
try: open_image(sys.argv[1])
except DataError as e: assert 'too large' in str(e)
else: assert sys.argv[1].endswith('small.png')"""
    drawn().save(tmp_path/'small.png')
    assert (tmp_path/'bomb.png').stat().st_size<20_000
    assert peak_mib(code, tmp_path/'bomb.png')-peak_mib(code, tmp_path/'small.png')<30
