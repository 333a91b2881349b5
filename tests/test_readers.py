"Each format from a small file written as its specification says, its way to OpenAI's form and back, rows in a trainer and its workers, and bytes that mean nothing."
import json, pickle, subprocess, sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from vlm_ft.data import check_rows, pictures_of
from vlm_ft.formats import FORMATS
from vlm_ft.messages import DataError, image_size, open_image, to_messages
from vlm_ft.models.tiny import drawn, tiny
from vlm_ft.readers import load_rows
from vlm_ft.rows import Rows, Table
from vlm_ft.setup import VisionDataCollator, VisionTrainingArguments
from vlm_ft.training import VisionTrainer
from vlm_ft.writers import to_openai

DATA = Path(__file__).parents[2]/'shared'/'data'

# --- a source of each format: {name: (folder -> source, what its first row is asked and answers, rows)}

def lines(path, *recs): path.write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in recs)); return path
def whole(path, content): path.write_text(json.dumps(content, ensure_ascii=False)); return path
def talk(ask, say, role='from', text='value', names=('human','gpt')): return [{role:names[0], text:ask}, {role:names[1], text:say}]
def parts(*content): return [{'role':'user','content':list(content)}, {'role':'assistant','content':'a cat'}]
ASK = {'type':'text','text':'What?'}

def of_vqa(d):
    (d/'val2014').mkdir(); drawn().save(d/'val2014/COCO_val2014_000000000042.jpg')
    whole(d/'v2_mscoco_val2014_annotations.json', {'data_subtype':'val2014', 'annotations':[{'question_id':1, 'image_id':42, 'question_type':'what', 'answer_type':'other', 'multiple_choice_answer':'a cat',
        'answers':[{'answer':a, 'answer_confidence':'yes', 'answer_id':i} for i,a in enumerate(('cat','a cat','a cat'))]}]})
    return whole(d/'v2_OpenEnded_mscoco_val2014_questions.json', {'info':{}, 'task_type':'Open-Ended', 'data_type':'mscoco', 'data_subtype':'val2014', 'license':{}, 'questions':[{'image_id':42, 'question':'What?', 'question_id':1}]})

def of_textvqa(d):
    (d/'train_images').mkdir(); drawn().save(d/'train_images/0a1.jpg')
    return whole(d/'x.json', {'dataset_type':'val','dataset_name':'textvqa','data':[{'question_id':1,'question':'What?','image_id':'0a1','image_classes':['Cat'],'answers':['a cat']*10}]})
def of_imagefolder(d): (d/'metadata.csv').write_text('file_name,text\na.png,a cat\n'); return d
def of_classes(d):
    for c in ('a cat','a dog'): (d/c).mkdir(); drawn().save(d/c/'1.png')
    (d/'a.png').unlink()
    return d
def of_gt(d): (d/'a.gt.txt').write_text('a cat\n'); return d
def of_page(d):
    (d/'a.xml').write_text('<PcGts xmlns="http://schema.primaresearch.org/PAGE/gts/pagecontent/2013-07-15"><Page imageFilename="a.png" imageWidth="64" imageHeight="64"><TextRegion id="r"><Coords points="0,0 64,0 64,64"/>'
                           '<TextLine id="l"><Coords points="2,3 22,3 22,13 2,13"/><TextEquiv><Unicode>a cat</Unicode></TextEquiv></TextLine></TextRegion></Page></PcGts>')
    return d/'a.xml'
def of_alto(d):
    (d/'a.xml').write_text('<alto xmlns="http://www.loc.gov/standards/alto/ns-v3#"><Description><MeasurementUnit>pixel</MeasurementUnit><sourceImageInformation><fileName>a.png</fileName></sourceImageInformation></Description><Layout>'
                           '<Page ID="p" PHYSICAL_IMG_NR="1" WIDTH="64" HEIGHT="64"><PrintSpace><TextBlock ID="b"><TextLine HPOS="2" VPOS="3" WIDTH="20" HEIGHT="10"><String CONTENT="a"/><SP/><String CONTENT="cat"/></TextLine></TextBlock></PrintSpace></Page></Layout></alto>')
    return d
def of_hocr(d):
    (d/'a.hocr').write_text("<html><head><meta name='ocr-system' content='tesseract'/></head><body><div class='ocr_page' title='image \"a.png\"; bbox 0 0 64 64'><span class='ocr_line' title='bbox 2 3 22 13'><span class='ocrx_word' title='bbox 2 3 8 13'>a</span> cat</span></div></body></html>")
    return d/'a.hocr'
def of_pdf(d): drawn().save(d/'a.pdf', save_all=True, append_images=[drawn()]); return d/'a.pdf'

SOURCES = {
'rows':              lambda d: lines(d/'x.jsonl', {'image':'a.png','question':'What?','answer':['a cat','cat'],'task':'vqa'}),
'openai':            lambda d: lines(d/'x.jsonl', {'messages':parts({'type':'image_url','image_url':{'url':'a.png','detail':'high'}}, ASK)}),
'llava':             lambda d: whole(d/'x.json', [{'id':'1','image':'a.png','conversations':talk('<image>\nWhat?', 'a cat')}]),
'sharegpt':          lambda d: whole(d/'x.json', [{'images':['a.png'],'conversations':talk('<image>What?', 'a cat')}]),
'qwen-vl':           lambda d: whole(d/'x.json', [{'id':'1','conversations':talk('<img>a.png</img>\nWhat?', 'a cat', names=('user','assistant'))}]),
'llama-factory':     lambda d: whole(d/'x.json', [{'messages':talk('<image>What?', 'a cat', 'role', 'content', ('user','assistant')), 'images':['a.png']}]),
'alpaca':            lambda d: whole(d/'x.json', [{'instruction':'<image>What?','input':'','output':'a cat','images':['a.png']}]),
'prompt-completion': lambda d: lines(d/'x.jsonl', {'prompt':parts({'type':'image'}, ASK)[:1], 'completion':parts()[1:], 'images':['a.png']}),
'vqa-rows':          lambda d: lines(d/'x.jsonl', {'image':'a.png','question':'What?','multiple_choice_answer':'a cat','answers':[{'answer':'a cat','answer_id':1}]}),
'vqa':               of_vqa,
'textvqa':           of_textvqa,
'docvqa':            lambda d: whole(d/'x.json', {'dataset_name':'docvqa','dataset_split':'val','data':[{'questionId':1,'question':'What?','image':'a.png','docId':9,'answers':['a cat','cat']}]}),
'coco':              lambda d: whole(d/'x.json', {'images':[{'id':1,'file_name':'a.png'}],'annotations':[{'image_id':1,'id':1,'caption':'a cat'},{'image_id':1,'id':2,'caption':'cat'}]}),
'imagefolder':of_imagefolder, 'classes':of_classes, 'gt.txt':of_gt, 'page':of_page, 'alto':of_alto, 'hocr':of_hocr, 'pdf':of_pdf}

@pytest.fixture
def made(tmp_path):
    "Makes a source beside a picture."
    def make(name):
        drawn().save(tmp_path/'a.png')
        return SOURCES[name](tmp_path)
    return make

def test_every_format_is_tested(): assert SOURCES.keys()==FORMATS.keys()

@pytest.mark.parametrize('name', SOURCES)
def test_a_format_is_recognised_said_and_read(name, made, capsys):
    rows,said = load_rows(made(name)),capsys.readouterr().out
    assert f"read as {name} (" in said and f"{len(rows)} row" in said
    row,asked = rows[0],FORMATS[name].question or 'What?'
    assert [m['role'] for m in row['messages']]==['user','assistant'][:1 if name=='pdf' else 2]
    picture,text = row['messages'][0]['content']
    assert text=={'type':'text','text':asked} and repr(asked) in said+repr('What?')
    assert name=='pdf' or row['messages'][1]['content']=='a cat'
    assert image_size(picture['image'])==open_image(picture['image']).size                 # the picture is there
    if name in ('page','alto','hocr'): assert image_size(picture['image'])==(20,10) and row['group']=='a' and row['task']=='ocr'

@pytest.mark.parametrize('name', SOURCES)
def test_a_format_goes_to_openai_and_comes_back(name, made, tmp_path):
    rows = load_rows(made(name))
    to_openai(rows, tmp_path/'paths.jsonl'); to_openai(rows, tmp_path/'embedded.jsonl', embed=True)
    again,embedded = load_rows(tmp_path/'paths.jsonl'),load_rows(tmp_path/'embedded.jsonl')
    assert list(again)==list(rows)
    for was,now in zip(rows, embedded):
        bare = lambda row: {**row, 'messages':[{**m, 'content':[p for p in m['content'] if p['type']=='text']} if m['role']=='user' else m for m in row['messages']]}
        assert bare(was)==bare(now)
        assert [open_image(p).tobytes() for p in pictures_of(was['messages'])]==[open_image(p).tobytes() for p in pictures_of(now['messages'])]

@pytest.mark.parametrize('name', SOURCES)
def test_a_format_can_be_named_and_its_rows_pickle(name, made):
    rows = load_rows(made(name), format=name)
    assert list(pickle.loads(pickle.dumps(rows)))==list(rows) and list(rows[:1])==[rows[0]]

def test_a_file_in_the_working_folder(made, tmp_path, monkeypatch):
    made('rows'); monkeypatch.chdir(tmp_path)
    assert image_size(pictures_of(load_rows('x.jsonl')[0]['messages'])[0])
    lines(Path('y.jsonl'), {'image':'../a.png','question':'q','answer':'a'})
    with pytest.raises(DataError, match='outside'): load_rows('y.jsonl')

@pytest.mark.parametrize('suffix', ['.csv','.tsv','.parquet','.json','.jsonl'])
def test_a_table_with_columns_of_its_own(suffix, tmp_path):
    drawn().save(tmp_path/'a.png')
    recs,path = [{'scan':'a.png','text':f'Zeile {n}, "ß"\nzwei','writer':f'w{n//2}'} for n in range(6)],tmp_path/f'x{suffix}'
    import pandas as pd
    frame = pd.DataFrame(recs)
    {'.csv':lambda: frame.to_csv(path, index=False), '.tsv':lambda: frame.to_csv(path, index=False, sep='\t'), '.parquet':lambda: frame.to_parquet(path),
     '.json':lambda: frame.to_json(path, orient='records'), '.jsonl':lambda: frame.to_json(path, orient='records', lines=True)}[suffix]()
    rows = load_rows(path, columns='image=scan, answer=text, group=writer, question="Read.", system="Be exact."')
    assert len(rows)==6 and rows[5]==to_messages({'image':str(tmp_path/'a.png'),'question':'Read.','system':'Be exact.','answer':recs[5]['text'],'group':'w2'})
    with pytest.raises(ValueError, match="columns='image=scan, question=.*answer=text'"): load_rows(path)

def test_answers_that_are_not_there_are_named_by_row(tmp_path):
    import pandas as pd
    frame = pd.DataFrame({'image':['a.png']*4, 'question':['q']*4, 'answer':['a',float('nan'),'b',None]})
    for name,write in (('x.csv', lambda p: frame.to_csv(p, index=False)), ('x.parquet', frame.to_parquet)):
        write(tmp_path/name)
        with pytest.raises(DataError) as e: load_rows(tmp_path/name)
        assert [row for row,_ in e.value.problems]==[1,3]
    with pytest.raises(DataError) as e: load_rows(frame.to_dict('records'))
    assert [row for row,_ in e.value.problems]==[1,3]

# --- what looks like something else

def put(folder, *names):
    "Drawn pictures in a folder and in folders below it."
    for name in names: (folder/name).parent.mkdir(parents=True, exist_ok=True); drawn().save(folder/name)
    return folder
def answers(rows): return [row['messages'][1]['content'] for row in rows]

def test_lines_in_a_folder_for_each_book(tmp_path, capsys):
    put(tmp_path, 'book1/1.png', 'book1/2.png', 'book2/1.png', 'pages/1.png')
    for name in ('book1/1','book1/2','book2/1'): (tmp_path/f'{name}.gt.txt').write_text(f'text of {name}\n')
    rows = load_rows(tmp_path)
    said = capsys.readouterr().out
    assert 'read as gt.txt' in said and '1 folder of pictures without texts left out, such as pages' in said
    assert [(a, r['group'], Path(pictures_of(r['messages'])[0]).relative_to(tmp_path).as_posix()) for a,r in zip(answers(rows), rows)]==[(f'text of {n}', n[:5], f'{n}.png') for n in ('book1/1','book1/2','book2/1')]

@pytest.mark.parametrize('inside', ['metadata.csv','metadata.jsonl','metadata.parquet','gt.txt','classes'])
def test_folders_of_splits_are_read_one_at_a_time(tmp_path, inside):
    import pandas as pd
    for split in ('train','test'):
        if inside=='classes': put(tmp_path/split, f'{split} cat/a.png', f'{split} dog/a.png'); continue
        folder,frame = put(tmp_path/split, 'a.png'),pd.DataFrame([{'file_name':'a.png','text':f'{split} cat'}])
        if inside=='gt.txt': (folder/'a.gt.txt').write_text(f'{split} cat')
        elif inside=='metadata.csv': frame.to_csv(folder/inside, index=False)
        elif inside=='metadata.jsonl': frame.to_json(folder/inside, orient='records', lines=True)
        else: frame.to_parquet(folder/inside)
    with pytest.raises(ValueError) as e: load_rows(tmp_path)
    assert f"Found: folders train, test.\nTry: load_rows('{tmp_path}:train')." in str(e.value)
    assert answers(load_rows(f'{tmp_path}:test'))[0]==answers(load_rows(tmp_path/'test'))[0]=='test cat'

def test_classes_may_be_named_as_a_split_if_one_says_so(tmp_path):
    put(tmp_path, 'car/a.png', 'train/b.png')
    with pytest.raises(ValueError, match="or format='classes'"): load_rows(tmp_path)
    assert answers(load_rows(tmp_path, format='classes'))==['car','train']
    (tmp_path/'car/metadata.csv').write_text('file_name,text\na.png,a red car\n'); (tmp_path/'train').rename(tmp_path/'bus')
    with pytest.raises(ValueError, match='one of the folders in it'): load_rows(tmp_path)

@pytest.mark.parametrize('suffix', ['.tsv','.csv'])
def test_no_row_of_a_table_is_lost_to_a_quote(tmp_path, suffix):
    path,sep = tmp_path/f'x{suffix}','\t' if suffix=='.tsv' else ','
    path.write_text('\n'.join(f'q{sep}{cell}' for cell in ('answer','"Hello','"World','fine','"Yes" he said','5" pipe','"He said ""Yes""."','"never closed')).replace('q', 'question', 1))
    with pytest.raises(DataError) as e: load_rows(path)
    assert [row for row,_ in e.value.problems]==[0,2,5]
    for (_,text),where in zip(e.value.problems, ('lines 2 to 3','line 5','line 8')): assert f'the row on {where} of x{suffix}' in text and 'a quote in it twice' in text, text
    path.write_text('\n'.join(line for n,line in enumerate(path.read_text().split('\n')) if n not in (1,2,4,7)))
    assert answers(load_rows(path))==['fine','5" pipe','He said "Yes".']

@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text('",\n\r ab', max_size=40))
def test_every_byte_of_a_table_stands_in_a_row(tmp_path, text):
    path = tmp_path/'x.csv'
    path.write_bytes(b'a,b\n'+text.encode())
    rows,left = Table(path),path.read_bytes()
    for start,end,_ in rows.places[::-1].tolist(): left = left[:start]+left[end:]
    assert left.rstrip(b'\r\n')==b'a,b', left
    for i in range(len(rows)): only_said(partial(rows.__getitem__, i))

def test_a_dataset_as_it_was_downloaded(tmp_path, capsys):
    from datasets import Dataset
    (tmp_path/'data').mkdir(); (tmp_path/'README.md').write_text('---\nlicense: mit\n---\n')
    for name,words in (('train-00001-of-00002',('c','d')), ('train-00000-of-00002',('a','b')), ('test-00000-of-00001',('e',))):
        Dataset.from_list([{'image':drawn(),'question':'q','answer':w} for w in words]).to_parquet(tmp_path/f'data/{name}.parquet')
    for folder in (tmp_path, tmp_path/'data'):
        rows = load_rows(f'{folder}:train')
        assert answers(rows)==['a','b','c','d'] and open_image(pictures_of(rows[3]['messages'])[0]).tobytes()==open_image(drawn()).tobytes()
        assert answers(load_rows(f'{folder}:test'))==['e'] and answers(load_rows(f'{folder}:train[:50%]'))==['a','b']
        with pytest.raises(ValueError, match='several splits.\nFound: test, train'): load_rows(folder)
    assert 'data: 4 rows, read as rows' in capsys.readouterr().out
    (tmp_path/'data/test-00000-of-00001.parquet').unlink()
    assert answers(load_rows(tmp_path))==['a','b','c','d']
    Dataset.from_list([{'question':'q','answer':'f'}]).to_parquet(tmp_path/'data/dev-00001-of-00003.parquet')                # a split that is broken keeps no other from being read
    assert answers(load_rows(f'{tmp_path}:train'))==['a','b','c','d']
    (tmp_path/'data/dev-00001-of-00003.parquet').rename(tmp_path/'data/train-00000-of-00001.parquet')
    with pytest.raises(ValueError, match='3 files where 1 make the split'): load_rows(tmp_path)
    for name in ('train-00000-of-00001','train-00001-of-00002'): (tmp_path/f'data/{name}.parquet').unlink()
    with pytest.raises(ValueError, match='1 of 2 files; train-00001-of-00002.parquet is not there'): load_rows(tmp_path)

def test_a_file_of_several_pages(tmp_path):
    put(tmp_path, 'a.png', 'b.png')
    of_hocr(tmp_path); of_alto(tmp_path)
    hocr,alto = tmp_path/'a.hocr',tmp_path/'a.xml'
    page = hocr.read_text().split('<body>')[1].split('</body>')[0]
    hocr.write_text(hocr.read_text().replace('</body>', page.replace('a.png', 'b.png').replace("'ocr_line'", "'ocrx_line'").replace(' cat', ' dog')+'</body>'))
    layout = alto.read_text().split('<Layout>')[1].split('</Layout>')[0]
    alto.write_text(alto.read_text().replace('</Layout>', layout.replace('"cat"', '"dog"')+'</Layout>').replace('</fileName>', '</fileName><fileName>b.png</fileName>'))
    for path in (hocr, alto):
        rows = load_rows(path)
        assert [(a, Path(pictures_of(r['messages'])[0]).name, r['group']) for a,r in zip(answers(rows), rows)]==[('a cat','a.png#xywh=2,3,20,10','a page 1'), ('a dog','b.png#xywh=2,3,20,10','a page 2')]
        path.write_text(path.read_text().replace('b.png', 'a.png'))
        with pytest.raises(DataError, match='each of its pages a picture of its own'): load_rows(path)
    alto.write_text(alto.read_text().replace('<fileName>a.png</fileName>', '', 1))
    with pytest.raises(DataError, match='2 Page and 1 fileName'): load_rows(alto)

def test_names_and_weights_of_turns(tmp_path, capsys):
    user,said = {'role':'user','content':'q','name':'ann'},{'role':'assistant','content':'a'}
    path = lines(tmp_path/'x.jsonl', *({'messages':[user, {**said,'weight':w}]} for w in (1,0,None,1.0)))
    with pytest.raises(DataError, match='Found: weight 0') as e: load_rows(path)
    assert [row for row,_ in e.value.problems]==[1] and 'name and weight of turns passed over' in capsys.readouterr().out
    assert load_rows([[user, {**said,'weight':1}]])==load_rows([[{'role':'user','content':'q'}, said]])
    assert capsys.readouterr().out.count('passed over')==1                                  # said once, where there is something to say

# --- sources that are not on this machine

def test_a_dataset_of_the_hub(monkeypatch, capsys):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, 'get_dataset_config_names', lambda name: ['default'])
    monkeypatch.setattr(datasets, 'get_dataset_split_names', lambda name, config: ['train','test'])
    monkeypatch.setattr(datasets, 'load_dataset', lambda name, config, split: asked.append((name, split)) or datasets.Dataset.from_list([{'image':drawn(),'question':'q','answer':'a'}]))
    assert len(load_rows('owner/name:train'))==1 and len(load_rows('hf://datasets/owner/name:test[:10%]'))==1
    assert asked==[('owner/name','train'),('owner/name','test[:10%]')] and 'name: 1 row, read as rows' in capsys.readouterr().out
    with pytest.raises(ValueError, match='Found: train, test'): load_rows('owner/name')
    with pytest.raises(ValueError, match="Did you mean 'test'"): load_rows('owner/name:tset')
    with pytest.raises(FileNotFoundError): load_rows('owner/rows.jsonl')                    # a path, not a dataset

def test_pictures_are_fetched_only_when_asked_and_once(tmp_path, monkeypatch):
    import http.server, threading
    folder = tmp_path/'web'; folder.mkdir(); drawn('ab').save(folder/'a.png')
    handler = type('Quiet', (http.server.SimpleHTTPRequestHandler,), {'log_message':lambda *a: None, '__init__':lambda self, *a, **k: http.server.SimpleHTTPRequestHandler.__init__(self, *a, directory=str(folder), **k)})
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f'http://127.0.0.1:{server.server_port}'
    path = lines(tmp_path/'x.jsonl', {'image':f'{at}/a.png','question':'q','answer':'a'}, {'messages':parts({'type':'image_url','image_url':{'url':f'{at}/a.png'}}, ASK)})
    with pytest.raises(DataError, match='fetch=True') as e: load_rows(path)
    assert [row for row,_ in e.value.problems]==[0,1]
    assert [open_image(p).tobytes() for row in load_rows(path, fetch=True) for p in pictures_of(row['messages'])]==[open_image(drawn('ab')).tobytes()]*2
    bad = lines(tmp_path/'y.jsonl', {'image':f'{at}/a.png','question':'q','answer':'a'}, {'image':f'{at}/b.png','question':'q','answer':'a'})
    with pytest.raises(DataError, match='404') as e: load_rows(bad, fetch=True)
    assert [row for row,_ in e.value.problems]==[1]
    server.shutdown(); server.server_close()
    assert len(load_rows(path, fetch=True))==2                                              # no server is asked again

def test_pdf_files_say_what_they_need(made, monkeypatch):
    path = made('pdf')
    monkeypatch.setitem(sys.modules, 'pypdfium2', None)
    with pytest.raises(ImportError, match='pip install pypdfium2'): load_rows(path)

# --- scale

def test_rows_stay_in_their_file_all_the_way_through_a_training(tmp_path, monkeypatch):
    for w in ('ab','cd'): drawn(w, (60,40)).save(tmp_path/f'{w}.png')
    path = lines(tmp_path/'x.jsonl', *({'image':f'{w}.png','question':'Read.','answer':w} for w in ('ab','cd')*4))
    model,processor = tiny('qwen2_vl')
    reads,read = [],Rows.__getitem__
    monkeypatch.setattr(Rows, '__getitem__', lambda self, i: (reads.append(i), read(self, i))[1])
    args = VisionTrainingArguments(output_dir=str(tmp_path/'out'), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, save_strategy='no', use_cpu=True)
    trainer = VisionTrainer(model, args, train_dataset=str(path), processing_class=processor)
    assert type(trainer.train_dataset) is Rows and len(reads)==16                           # once when it is opened, once when the trainer checks
    trainer.train()
    assert type(trainer.train_dataset) is Rows and 4<=len(reads)-16<=8                      # and then what is trained on, and not more
    summary = {r['per row']:r for r in check_rows(trainer.train_dataset, processor, model)}
    assert summary['rows']['sum']==8

def test_workers_give_the_same_batches(tmp_path):
    for w in ('ab','cd'): drawn(w, (60,40)).save(tmp_path/f'{w}.png')
    path = lines(tmp_path/'x.jsonl', *({'image':f'{w}.png','question':'Read.','answer':f'{w} {n}'} for n,w in enumerate(('ab','cd')*4)))
    model,processor = tiny('qwen2_vl')
    batches = lambda workers: [b['input_ids'].tolist() for b in torch.utils.data.DataLoader(load_rows(path), 2, collate_fn=VisionDataCollator(model, processor), num_workers=workers)]
    assert batches(0)==batches(2)

PEAK = '''
import json, sys
from vlm_ft.readers import load_rows
from vlm_ft.messages import open_image
import pathlib
peak = lambda: int(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])/1024
before = peak()
rows = load_rows(sys.argv[1])
for row in rows: open_image(row['messages'][0]['content'][0]['image'])
print(len(rows), peak()-before)
'''
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc')
def test_memory_does_not_grow_with_the_pictures_in_a_file(tmp_path):
    import base64, io
    out = io.BytesIO(); drawn('ab', (60,40)).save(out, 'PNG')
    uri = 'data:image/png;base64,'+base64.b64encode(out.getvalue()+b'\0'*30_000).decode()
    path = lines(tmp_path/'x.jsonl', *({'image':uri,'question':'Read.','answer':'ab'} for _ in range(2000)))
    assert path.stat().st_size>75*2**20
    n,grown = subprocess.run([sys.executable, '-c', PEAK, path], capture_output=True, text=True, check=True).stdout.split()[-2:]
    assert int(n)==2000 and float(grown)<15, grown

def test_a_check_keeps_no_row(tmp_path):
    import base64, io, tracemalloc
    out = io.BytesIO(); drawn('ab', (60,40)).save(out, 'PNG')
    uri = 'data:image/png;base64,'+base64.b64encode(out.getvalue()+bytes(300_000)).decode()
    rows = load_rows(lines(tmp_path/'x.jsonl', *({'image':uri,'question':'Read.','answer':'ab'} for _ in range(40))))      # 16 MB
    model,processor = tiny('qwen2_vl')
    check_rows(rows[:2], processor, model)
    tracemalloc.start()
    try: check_rows(rows, processor, model); peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak<8*2**20, peak

# --- bytes and values that mean nothing

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

def only_said(f):
    "Run it; what it raises must be said to the user: a row-numbered DataError, or an error about the source as a whole."
    try: return f()
    except DataError as e: assert e.problems and all(text and '\nTry: ' in text for _,text in e.problems)
    except (ValueError, FileNotFoundError, TypeError) as e: assert '\nTry: ' in str(e) or 'holds no rows' in str(e), repr(e)

VALUES = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8) | st.sampled_from(['<image>','a.png','<img>a</img>','user','assistant','gpt','human','[1','../x','http://x/y']),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(['type','text','image','image_url','url','role','content','from','value','answer','path','bytes']), v, max_size=3), max_leaves=8)
RECORDS = st.dictionaries(st.sampled_from(['messages','conversations','image','images','question','answer','answers','task','system','group','instruction','input','output','history','prompt','completion','file_name','text','id']), VALUES, max_size=5)

@SETTINGS
@given(st.lists(RECORDS | VALUES, min_size=1, max_size=3))
def test_any_records(recs): only_said(lambda: load_rows(recs))

@SETTINGS
@given(st.sampled_from([n for n in FORMATS if FORMATS[n].read is None]), RECORDS)
def test_any_record_in_any_form(name, rec): only_said(lambda: load_rows([rec], format=name))

@SETTINGS
@given(st.sampled_from(['.jsonl','.json','.csv','.tsv','.xml','.hocr','.gt.txt','.pdf']), st.binary(max_size=80) | st.text(max_size=60).map(str.encode) | RECORDS.map(lambda r: json.dumps(r).encode()))
def test_any_bytes_in_a_file(tmp_path, suffix, content):
    path = tmp_path/f'x{suffix}'
    path.write_bytes(content)
    only_said(lambda: load_rows(path))

@SETTINGS
@given(st.sampled_from([of_page, of_alto, of_hocr]), st.integers(0, 600), st.integers(0, 30), st.text('<>/"=0123456789.,- abMCPcxT&;\n', max_size=12))
def test_any_damage_to_a_page(tmp_path, of, at, n, text):
    drawn().save(tmp_path/'a.png')
    of(tmp_path)
    path = next(p for p in tmp_path.iterdir() if p.suffix in ('.xml','.hocr'))
    was = path.read_text()
    path.write_text(was[:at]+text+was[at+n:])
    try: only_said(lambda: load_rows(path))
    finally: path.unlink()

@SETTINGS
@given(st.sampled_from(['questions','annotations','data','images']), st.lists(RECORDS | VALUES, max_size=2), st.lists(RECORDS | st.fixed_dictionaries({'image_id':VALUES,'caption':VALUES,'question_id':VALUES,'question':VALUES,'image':VALUES,'id':VALUES}), max_size=2))
def test_any_json_object(tmp_path, key, values, annotations):
    (tmp_path/'x.json').write_text(json.dumps({key:values, 'annotations':annotations, 'data':annotations if key=='images' else values}))
    only_said(lambda: load_rows(tmp_path/'x.json'))
