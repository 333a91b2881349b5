"The doctor on real sets, on damage that is planted in them, and its memory."
import io, json, os, resource, shutil, subprocess, sys, threading, time
from pathlib import Path

import pytest
from PIL import Image

import vlm_ft
from vlm_ft import duplicates, symptoms
from vlm_ft.data import pictures_of
from vlm_ft.doctor_page import check_data
from vlm_ft.mending import mend
from vlm_ft.messages import open_image
from vlm_ft.readers import load_rows
from vlm_ft.splits import split_rows
from vlm_ft.models.family import family_for
from vlm_ft.models.tiny import FAMILIES, drawn, tiny_config, tiny_processor

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

def tools(name):
    "A family and its processor, as `check_data` takes them."
    p = tiny_processor(name)
    return family_for(tiny_config(name, len(p.tokenizer), p.tokenizer)), p

@pytest.mark.parametrize('name', FAMILIES)
def test_what_shrinks_in_silence_is_named(name):
    "By a family's own rule, by the processor's bound, the row's and the task's."
    family,processor = tools(name)
    small = family.bounded(processor, 4*56*56)
    family.bound(small, max_pixels={'ocr':56*56})
    row = lambda size, **more: {'image':drawn('ab', size), 'question':'Read.', 'answer':'ab', **more}
    rows = [row((56,56)), row((400,30)), row((400,400)), row((200,110), max_pixels=56*56), row((200,110), task='ocr')]
    c = check_data(rows, family, small, progress=False)
    share = {}
    for i,r in enumerate(rows):
        w,h = family.seen(family.reader(small, r), r['image'].size).size
        share[i] = w*h/(r['image'].width*r['image'].height)
    f = c.findings['shrunk']
    assert not c.refused() and {i for _,i in f.rows}=={i for i,s in share.items() if s<.8} and {2,3,4}<={i for _,i in f.rows}
    (_,worst),*_ = f.rows
    assert share[worst]==min(share.values())
    w,h = family.seen(family.reader(small, rows[worst]), rows[worst]['image'].size).size
    assert f"{rows[worst]['image'].width}x{rows[worst]['image'].height} is shown at {w}x{h}" in str(c)

PAGE = ('<PcGts xmlns="http://schema.primaresearch.org/PAGE/gts/pagecontent/2013-07-15"><Page imageFilename="a.png" imageWidth="64" imageHeight="64"><TextRegion id="r"><Coords points="0,0 64,0 64,64"/>'
        '<TextLine id="l"><Coords points="2,3 42,3 42,33 2,33"/><TextEquiv><Unicode>a cat</Unicode></TextEquiv></TextLine></TextRegion></Page></PcGts>')

def test_parts_of_files_are_mended_into_pictures(tmp_path):
    drawn('a cat', (64,64)).save(tmp_path/'a.png'); (tmp_path/'a.xml').write_text(PAGE)
    drawn('one', (200,80)).save(tmp_path/'a.pdf', save_all=True, append_images=[drawn('two', (200,80))])
    (tmp_path/'pdf.jsonl').write_text('\n'.join(json.dumps({'image':f'a.pdf#page={n}', 'question':'Read.', 'answer':str(n)}) for n in (1,2)))
    for name,size in {'a.xml':(40,30), 'pdf.jsonl':open_image(f"{tmp_path/'a.pdf'}#page=1").size}.items():
        rows = load_rows(tmp_path/name)
        assert mend(check_data(rows, *tools('qwen2_vl'), progress=False), tmp_path/f'{name}.clean', rows)=={'train':len(rows)}
        again = load_rows(tmp_path/f'{name}.clean'/'train.jsonl')
        pictures = [open_image(src) for r in again for src in pictures_of(r['messages'])]
        assert {im.size for im in pictures}=={size}
        assert [im.tobytes() for im in pictures]==[open_image(src).tobytes() for r in rows for src in pictures_of(r['messages'])]
        changes = [json.loads(x) for x in (tmp_path/f'{name}.clean'/'changes.jsonl').read_text().splitlines()]
        assert ['#' in x['did'] for x in changes]==[True]*len(rows)                             # each is said to be saved

@pytest.mark.parametrize('form', ['rows','llava','table'])
def test_a_mended_copy_keeps_the_columns_of_its_rows(form, tmp_path):
    for i in range(8): drawn(f'word {i}', (112,56)).save(tmp_path/f'{i}.png')
    own = lambda i: {'id':f'n{i}', 'writer':f'w{i//2}'}
    talk = lambda i: [{'from':'human','value':'<image>Read.'}, {'from':'gpt','value':f'word {i}'}]
    recs = [{'image':f'{i}.png', **({'conversations':talk(i)} if form=='llava' else {'question':'Read.', 'answer':f'word {i}'}), **own(i)} for i in range(8)]
    path = tmp_path/('x.csv' if form=='table' else 'x.jsonl')
    if form=='table': path.write_text('\n'.join(','.join(map(str, line)) for line in (recs[0], *(r.values() for r in recs))))
    else: path.write_text('\n'.join(map(json.dumps, recs)))
    rows = load_rows(path)
    mend(check_data(rows, *tools('qwen2_vl'), progress=False), tmp_path/'clean', rows)
    again = load_rows(tmp_path/'clean'/'train.jsonl')
    assert [{k:again.record(i).get(k) for k in own(i)} for i in range(8)]==[own(i) for i in range(8)] and 'conversations' not in again.record(0)
    train,test = split_rows(again, .25, by='writer')
    assert len(test)==2 and (tmp_path/'clean'/'changes.jsonl').read_text()==''

def test_each_row_is_told_its_own_reason(tmp_path):
    drawn('ab').save(tmp_path/'a.png'); (tmp_path/'cut.png').write_bytes((tmp_path/'a.png').read_bytes()[:200]); (tmp_path/'text.png').write_text('no picture')
    names = ['gone1.png','cut.png','gone2.png','text.png','a.png']
    rows = [{'image':str(tmp_path/n), 'question':'Read.', 'answer':n} for n in names]
    c = check_data(rows, *tools('qwen2_vl'), progress=False)
    unread = {f.what.split('(')[1].rstrip(')'):[i for _,i in f.rows] for f in c.sorted() if 'cannot be read' in f.what}
    assert unread=={'FileNotFoundError':[0,2], 'OSError':[1], 'UnidentifiedImageError':[3]} and len([x for x in str(c).splitlines() if 'cannot be read' in x])==3
    mend(c, tmp_path/'clean', rows)
    why = {x['row']:x['why'][0] for x in map(json.loads, (tmp_path/'clean'/'changes.jsonl').read_text().splitlines())}
    assert why.keys()=={0,1,2,3} and all(names[i] in text for i,text in why.items()) and 'truncated' in why[1]

def form(n):
    "One of many forms that differ in a number."
    im = drawn('RECEIPT', (200,120)); im.paste(drawn(f'Sum {n}.00 EUR', (100,20)), (90,90))
    return im

def test_forms_that_differ_in_a_number_cost_a_few_comparisons_each(monkeypatch):
    prints,compared,differ = [duplicates.fingerprint(form(n)) for n in range(400)],[],duplicates._differ
    monkeypatch.setattr(duplicates, '_differ', lambda words, i, j: (compared.append(len(i)), differ(words, i, j))[1])
    for n in (100,400):
        compared.clear()
        assert duplicates.near_groups(prints[:n])==[list(range(n))] and sum(compared)<3*n, sum(compared)   # all with all: 79,800

def test_a_copy_among_many_forms_leaks_and_the_forms_do_not():
    row = lambda n, im=None: {'image':im or form(n), 'question':'Sum?', 'answer':f'{n}.00'}
    train,test = [row(n) for n in range(150)],[row(n) for n in range(150, 170)]+[row(77, form(77).resize((150,90)))]
    c = check_data(train, *tools('qwen2_vl'), test=test, progress=False)
    assert {k:f.rows for k,f in c.findings.items()}=={'near leak':[('train',77)]} and c.findings['near leak'].like=={('train',77):('test',20)}

def test_threads_share_the_room_for_large_pictures(monkeypatch):
    held,worst,lock,fingerprint = [0],[0],threading.Lock(),symptoms.fingerprint
    def slow(im):
        with lock: held[0] += im.width*im.height; worst[0] = max(worst[0], held[0])
        time.sleep(.01)
        with lock: held[0] -= im.width*im.height
        return fingerprint(im)
    monkeypatch.setattr(symptoms, 'fingerprint', slow); monkeypatch.setattr(symptoms, 'PIXELS', symptoms.Room(10_000))
    rows = [{'image':drawn(str(i), (112,56)), 'question':'q', 'answer':str(i)} for i in range(12)]     # 6,272 pixels each
    check_data(rows, *tools('qwen2_vl'), workers=8, progress=False)
    assert worst[0]==112*56 and held[0]==0
