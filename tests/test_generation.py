"Answers in slots beside `generate` row by row, on a model that has learnt to read and to stop; what bfloat16 changes."
import io, json, random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest, torch
from PIL import Image
from transformers import GenerationConfig
from vlm_ft.data import encode
from vlm_ft.demo import BASE
from vlm_ft.evaluation.decoding import Slots, Writer
from vlm_ft.evaluation.generation import predict, stop_ids
from vlm_ft.evaluation.metrics import score
from vlm_ft.loading import FastVisionModel
from vlm_ft.messages import open_image
from vlm_ft.readers import load_rows
from vlm_ft.models.family import family_for
from vlm_ft.models.tiny import drawn
from vlm_ft.setup import pad_batch

DATA = Path(__file__).parents[2]/'shared'/'data'

def load(dtype, device='cpu'): return FastVisionModel.from_pretrained(str(BASE), dtype=dtype, max_pixels=28672, device=device)

def lines(n):
    rng,words = random.Random(0),'amber birch cedar delta ember frost grove heron indigo jasper'.split()
    texts = [' '.join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(n)]
    return [{'messages':[{'role':'user','content':[{'type':'image','image':drawn(t, (12*len(t)+8, 32))},{'type':'text','text':'Read the line.'}]},{'role':'assistant','content':t}], 'task':'ocr'} for t in texts]

@torch.no_grad()
def by_generate(model, processor, rows, n, batch_size):
    "What plain transformers answers."
    family,out = family_for(model),[]
    stops = stop_ids(model, processor.tokenizer, family)
    for lo in range(0, len(rows), batch_size):
        batch = {k:v.to(model.device) for k,v in pad_batch([encode(r, processor, family, prompt_only=True) for r in rows[lo:lo+batch_size]], family, 0, side='left').items() if k!='labels'}
        ids = model.generate(**batch, generation_config=GenerationConfig(do_sample=False, max_new_tokens=n, eos_token_id=stops, pad_token_id=0))[:, batch['input_ids'].shape[1]:]
        for row in ids.tolist():
            end = next((i for i,t in enumerate(row) if t in stops), len(row))
            out.append(processor.tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return out

@pytest.mark.parametrize('device', ('cpu', pytest.param('cuda', marks=pytest.mark.cuda)))
def test_as_generate_row_by_row(device):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model,processor = load(torch.float32, device)
    rows = lines(20)
    want = by_generate(model, processor, rows, 64, 1)
    for size in (1,6,32): assert predict(model, processor, rows, batch_size=size, max_new_tokens=64, progress=False)==want
    assert len(set(map(len, want)))>5 and score(rows, want).as_dict()['cer']<.2
    short = predict(model, processor, rows, max_new_tokens=8, progress=False)                      # cut: the same beginnings, and said to be cut
    assert short.cut and all(w.startswith(s) for w,s in zip(want, short)) and all(short[i]==want[i] for i in set(range(20))-set(short.cut))

def test_room_for_the_longest_true_answer(tmp_path):
    "Where nobody says how long an answer may be, none is cut that is no longer than the true ones."
    model,processor = load(torch.float32)
    def room(name, rows, **said):
        predict(model, processor, rows, progress=False, resume=tmp_path/name, **said)
        return json.loads((tmp_path/name).read_text().splitlines()[0])['made_by']['max_new_tokens']
    [row] = lines(1)
    long = {**row, 'messages':[row['messages'][0], {'role':'assistant','content':'a'*400}]}
    assert room('short', [row])==256 and room('one of two', [row, long])==608 and room('asked alone', [{**row, 'messages':row['messages'][:1]}])==256
    assert room('said', [long], max_new_tokens=9)==9

@pytest.mark.skipif(not DATA.is_dir(), reason='needs ../shared/data')
@pytest.mark.parametrize('name', ('ocr_lines_fraktur','receipts','captions'))
def test_as_generate_on_real_pictures(name):
    "Pictures of all shapes; receipts are asked about three times each, so their features are kept."
    model,processor = load(torch.float32)
    rows = load_rows(DATA/name/'test.jsonl')[:12]
    assert predict(model, processor, rows, batch_size=5, max_new_tokens=24, progress=False)==by_generate(model, processor, rows, 24, 1)

@pytest.mark.parametrize('device', ('cpu', pytest.param('cuda', marks=pytest.mark.cuda)))
def test_bfloat16_changes_few_rows_and_no_metric(device):
    "The rows that differ from `generate` in the same precision are counted: a rounding may turn one, and no metric."
    rows = lines(40)
    model,processor = load(torch.float32, device)
    full = predict(model, processor, rows, batch_size=16, max_new_tokens=64, progress=False)
    exact = score(rows, full)[0]
    model,processor = load(torch.bfloat16, device)
    ours,theirs = predict(model, processor, rows, batch_size=16, max_new_tokens=64, progress=False),by_generate(model, processor, rows, 64, 1)
    differ,rounded = (sum(a!=b for a,b in zip(ours, other)) for other in (theirs, full))
    print(f"{differ} of 40 rows differ from generate's in bfloat16, {rounded} from those in float32")
    for half in (score(rows, a)[0] for a in (ours, theirs)): assert exact['low']<=half['value']<=exact['high']
    assert differ<=8 and rounded<=8

@pytest.mark.parametrize('bits', (8, 4))
def test_quantised_rows_are_answered_together_as_alone(bits):
    "In fewer bits too what is answered does not hang on which rows are beside a row, but for roundings."
    model,processor = FastVisionModel.from_pretrained(str(BASE), max_pixels=28672, device='cpu', dtype=torch.float32, **{f'load_in_{bits}bit':True})
    rows = lines(12)
    alone,together = (predict(model, processor, rows, batch_size=n, max_new_tokens=64, progress=False) for n in (1, 12))
    assert alone==by_generate(model, processor, rows, 64, 1) and sum(a!=b for a,b in zip(alone, together))<=1
    read = score(rows, alone)[0]
    assert read['value']<.2 and read['low']<=score(rows, together)[0]['value']<=read['high']

def test_finished_rows_cost_nothing():
    "Steps of a run: about the tokens over the slots, where a padded batch takes the longest answer of each."
    model,processor = load(torch.float32)
    rows,seen = lines(24),[]
    real = Writer.step
    def counted(self): seen.append(len(self.rows)); return real(self)
    Writer.step = counted
    try: answers = predict(model, processor, rows, batch_size=6, max_new_tokens=64, progress=False)
    finally: Writer.step = real
    tokens = sum(len(processor.tokenizer(a)['input_ids']) for a in answers)
    assert abs(sum(seen)-tokens)<=2*len(rows) and len(seen)<1.6*tokens/6

def test_slots_are_bounded():
    "Memory is what the slots were made for, however many rows pass through."
    model,processor = load(torch.float32)
    sizes,real = set(),Slots.admit
    def admit(self, *args): real(self, *args); sizes.add(tuple(b.shape for l in self.layers for b in l.buffers))
    Slots.admit = admit
    try: predict(model, processor, lines(24), batch_size=4, max_new_tokens=40, progress=False)
    finally: Slots.admit = real
    assert len(sizes)==1 and next(iter(sizes))[0][0]==4

def test_a_file_that_is_no_ledger_stays_as_it_is(tmp_path):
    "Whatever resume= is pointed at by mistake, with or without an end of its last line."
    model,processor = load(torch.float32)
    path = tmp_path/'notes.jsonl'
    for text in ('a line without an end', 'one\ntwo', '{"question": "q"}\n{"question": "r"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match='no file of answers'): predict(model, processor, lines(1), max_new_tokens=4, progress=False, resume=path)
        assert path.read_text()==text

def test_lines_of_a_page_go_on(tmp_path):
    "Rows that name parts of a file are told apart, and a change of the file or of a bound is noticed."
    model,processor = load(torch.float32)
    drawn('amber\nbirch', (80,64)).save(tmp_path/'page.png')
    rows = [dict(image=f"{tmp_path/'page.png'}#xywh=0,{y},80,32", question='Read the line.') for y in (0,32)]
    def answers(rows): return predict(model, processor, rows, max_new_tokens=8, progress=False, resume=tmp_path/'kept.jsonl')
    first = answers(rows)
    assert answers(rows)==first and len((tmp_path/'kept.jsonl').read_text().splitlines())==3
    for other in (rows[::-1], [{**r, 'max_pixels':14336} for r in rows]):
        with pytest.raises(ValueError, match='row 0: another prompt, picture or bound'): answers(other)
    drawn('cedar', (80,64)).save(tmp_path/'page.png')
    with pytest.raises(ValueError, match='row 0: another prompt'): answers(rows)

def test_one_picture_for_many_threads():
    "Rows may share a picture that was opened and not yet read."
    out = io.BytesIO(); drawn('shared', (900,700)).save(out, 'PNG')
    want = open_image(out.getvalue()).tobytes()
    for _ in range(5):
        shared = Image.open(io.BytesIO(out.getvalue()))
        with ThreadPoolExecutor(4) as pool: assert {im.tobytes() for im in pool.map(open_image, [shared]*8)}=={want}
