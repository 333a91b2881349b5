"""Rows and pictures made at random: whatever is wrong with them is a `DataError` that names the row, and nothing else.

A few hundred inputs of each kind run by default, the same each time. `VLM_FT_FUZZ=100000 pytest -n 0 -s tests/test_fuzz.py` runs so many new ones of each."""
import io, json, os, resource, time, warnings
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from vlm_ft.data import check_rows, encode
from vlm_ft.doctor import check_data
from vlm_ft.messages import DataError, image_size, open_image, to_messages
from vlm_ft.readers import load_rows
from vlm_ft.rows import Rows
from vlm_ft.models.family import family_for
from vlm_ft.models.tiny import FAMILIES, drawn, tiny_config, tiny_processor
from vlm_ft.symptoms import look
from transformers.utils import logging

logging.set_verbosity_error()                                                       # it finds a picture of three pixels' width ambiguous

N = int(os.environ.get('VLM_FT_FUZZ', 0))
fuzzed = settings(max_examples=N or 300, derandomize=not N, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False)
SLOWEST_S,MIB = 5,1600                                                              # of one input, and of this process, above what it held before
seen,slowest = Counter(),Counter()

@pytest.fixture(autouse=True, scope='module')
def told():
    "Inputs, how they ended, and the slowest; memory stays bounded."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/2**10
    print(f"\n{seen.total():,} inputs: " + ', '.join(f'{n:,} {how}' for how,n in seen.most_common()) + f"; slowest {', '.join(f'{k} {v/1000:.2f} s' for k,v in slowest.items())}; {grown:.0f} MiB more at the peak")
    assert grown<MIB

def tried(kind, f, *args):
    "(result, None) or (None, its DataError); anything else fails the test, as does what takes too long."
    start = time.process_time()                                                     # of this process: other work on the machine does not count
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: out = f(*args), None
        except DataError as e: out = None, e
    spent = time.process_time()-start
    slowest[kind] = max(slowest[kind], round(spent*1000))
    seen[f"{kind} {'fine' if out[1] is None else 'refused'}"] += 1
    assert spent<SLOWEST_S, f"{kind} took {spent:.1f} s"
    return out

def tools(name):
    p = tiny_processor(name)
    return p, family_for(tiny_config(name, len(p.tokenizer), p.tokenizer))
TOOLS = {name:tools(name) for name in FAMILIES}

# --- pictures

def files()->list[bytes]:
    "A sound file of every common format and mode."
    page,out = drawn('fuzz', (37,23)),[]
    note = Image.Exif(); note[0x0112] = 6; note[0x010e] = 'words'
    modes = {'PNG':('RGB','L','1','P','RGBA','LA','I;16'), 'JPEG':('RGB','L','CMYK'), 'GIF':('P','L'), 'TIFF':('RGB','L','1','P','CMYK','RGBA','I;16','F','LAB'), 'WEBP':('RGB','RGBA'), 'BMP':('RGB','L','P'),
             'JPEG2000':('RGB','L'), 'ICO':('RGBA',), 'PPM':('RGB','L'), 'TGA':('RGB','RGBA'), 'DDS':('RGBA',), 'PCX':('P','RGB'), 'SGI':('RGB',), 'ICNS':('RGBA',), 'MPO':('RGB',), 'AVIF':('RGB',), 'EPS':('RGB',)}
    for format,each in modes.items():
        for mode in each:
            im = page.convert('L').convert(mode) if mode in ('I;16','F','LAB') and mode!='LAB' else Image.new('LAB', page.size) if mode=='LAB' else page.convert(mode)
            for more in ({}, {'exif':note}, {'save_all':True, 'append_images':[im]}):
                f = io.BytesIO()
                try: im.save(f, format, **more)
                except (OSError,ValueError,KeyError): continue                      # a format without this mode, or not built into this Pillow
                out.append(f.getvalue())
    for compression in ('tiff_lzw','tiff_adobe_deflate','group4','jpeg','packbits'):
        f = io.BytesIO(); page.convert('1' if compression=='group4' else 'RGB').save(f, 'TIFF', compression=compression); out.append(f.getvalue())
    f = io.BytesIO(); page.save(f, 'JPEG', progressive=True); out.append(f.getvalue())
    return list(dict.fromkeys(out))
FILES = files()

@st.composite
def damaged(draw)->bytes:
    "A picture file after a few changes: bytes flipped, numbers made large, parts cut out, doubled or exchanged."
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(1, 3))):
        if not data: break
        near = min(len(data), 64) if draw(st.integers(0, 2))==0 else len(data)             # headers are short, and most is decided there
        at = draw(st.integers(0, near-1))
        what = draw(st.sampled_from(['flip','byte','huge','drop','double','zeros'] if near<len(data) else ['flip','byte','huge','cut','drop','double','other','zeros']))
        if what=='flip': data[at] ^= 1 << draw(st.integers(0, 7))
        elif what=='byte': data[at] = draw(st.integers(0, 255))
        elif what=='huge': data[at:at+4] = draw(st.sampled_from([b'\xff\xff\xff\xff', b'\x7f\xff\xff\xff', b'\xff\xff\xff\x7f', b'\0\0\xff\xff', b'\0\0\x40\0', b'\x40\0\0\0', b'\0\0\0\0', b'\0\x01\0\0']))
        elif what=='cut': del data[at:]
        elif what=='drop': del data[at:at+draw(st.integers(1, 40))]
        elif what=='double': data[at:at] = data[at:at+draw(st.integers(1, 40))]
        elif what=='zeros': data[at:at+8] = bytes(8)
        else: data[at:] = draw(st.sampled_from(FILES))[at:]
    return bytes(data)

def test_the_files_are_sound():
    fine = [tried('sound', open_image, f) for f in FILES]
    assert len(FILES)>40 and sum(e is None for _,e in fine)>=len(FILES)-8
    assert all('floats' in str(e) or 'would be run' in str(e) or 'LAB' in str(e) for _,e in fine if e), [str(e) for _,e in fine if e]

@fuzzed
@given(damaged())
def test_damaged_pictures_are_opened_or_refused(data):
    opened,_ = tried('picture', open_image, data)
    size,_ = tried('header', image_size, data)
    if opened: assert opened.mode=='RGB' and opened.size==size, (opened.size, size)
    seen_by_doctor,error = tried('doctor', look, data)
    assert error is None and bool(seen_by_doctor.problems)==(opened is None)

@fuzzed
@given(st.binary(max_size=200))
def test_noise_is_refused(data):
    opened,error = tried('noise', open_image, data)
    assert (opened is None)==(error is not None)

@fuzzed
@given(st.tuples(st.integers(1, 30000), st.integers(1, 30000)) | st.tuples(st.integers(1, 40), st.integers(1, 30000)), st.sampled_from(FAMILIES))
def test_shapes_are_counted_or_refused(size, name):
    "What a picture of any shape costs, from its header alone: as `encode` makes it where it is small enough to try."
    from vlm_ft.data import costs
    processor,family = TOOLS[name]
    each,error = tried('shape', costs, [size], processor, family)
    if size[0]*size[1]>40_000: return
    encoded,wrong = tried('encode', encode, {'image':Image.new('RGB', size), 'question':'q', 'answer':'a'}, processor, family)
    assert (error is None)==(wrong is None)
    if encoded: assert (encoded['input_ids']==processor.tokenizer.convert_tokens_to_ids(family.image_token)).sum()<=each[0].text

# --- rows

anything = st.characters() | st.characters(categories=['Cs','Cc','Cf'])             # half of a surrogate pair, too: JSON can hold one
text = st.text(anything, max_size=12) | st.sampled_from(['', ' ', '\n', '<|im_end|>', '<image>', '<|image|>', '[IMG]', '</s>', '{{ 1 }}', 'data:image/png;base64,AA==', 'http://x/a.png', 'file://[', 'a\0.png', '../a.png', '/dev/zero', 'a'*5000, 'half a \ud800'])
plain = st.sampled_from(['What?','a word','Zoë','12.50'])
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text | st.binary(max_size=8)
keys = st.sampled_from(['messages','images','image','question','answer','answers','task','role','content','type','text','image_url','url','bytes','path','system','group','id','from','value']) | text | st.integers(0, 3)
value = st.recursive(scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5) | st.tuples(inner), max_leaves=12)
picture = st.just(drawn(size=(30,20))) | st.sampled_from(FILES) | damaged() | value
part = st.fixed_dictionaries({'type':st.sampled_from(['text','image','image_url']) | value}, optional={'text':text | value, 'image':picture, 'image_url':st.fixed_dictionaries({'url':text}) | value})
turn = st.fixed_dictionaries({'role':st.sampled_from(['user','assistant','system']) | value, 'content':plain | text | st.lists(part | value, max_size=3) | value})
talk = st.tuples(st.lists(part, min_size=1, max_size=3), plain | text).map(lambda t: [{'role':'user','content':t[0]}, {'role':'assistant','content':t[1]}])
row = (st.fixed_dictionaries({'question':plain | text | value, 'answer':plain | text | st.lists(plain | text, max_size=2) | value}, optional={'image':picture, 'images':st.lists(picture, max_size=2) | value, 'task':text | value, 'answers':value})
       | talk | st.fixed_dictionaries({'messages':talk | st.lists(turn, max_size=4) | value}, optional={'images':st.lists(picture, max_size=2) | value, 'answers':value}) | st.lists(turn, max_size=3) | value)

@fuzzed
@given(st.lists(row, min_size=1, max_size=3), st.sampled_from(FAMILIES))
def test_rows_are_taken_or_refused_by_number(rows, name):
    processor,family = TOOLS[name]
    summary,error = tried('rows', check_rows, rows, processor, family, 400)
    assert error is None or error.problems and all(type(i) is int and 0<=i<len(rows) and text for i,text in error.problems), error.problems
    for i,each in enumerate(rows):                                                  # training refuses what the check does
        encoded,wrong = tried('row', encode, each, processor, family, 400)
        assert (wrong is not None)==(error is not None and i in {n for n,_ in error.problems}), (i, wrong, error)
    checkup,raised = tried('checkup', lambda: check_data(Rows(rows, to_messages), family, processor, max_seq_length=400, workers=1, progress=False))
    assert raised is None and {i for _,i in checkup.refused()}==({i for i,_ in error.problems} if error else set())
    str(checkup)

@fuzzed
@given(st.lists(value.map(lambda v: json.dumps(v, default=str)) | text | st.sampled_from(['{"question":"q","answer":NaN}', '{"question":"\\ud800","answer":"a"}', '['*100_000, '{"a":'*50_000, '1'*5000, '{"question":"q","answer":"a"}']), min_size=1, max_size=3))
def test_lines_of_a_file_are_taken_or_refused_by_number(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp()/'rows.jsonl'
    path.write_bytes('\n'.join(lines).encode('utf-8', 'surrogatepass'))
    try: rows,error = tried('lines', load_rows, path)
    except ValueError as e: assert 'rows.jsonl' in str(e); return                    # not UTF-8, or no rows at all
    assert error is None or all(type(i) is int and text for i,text in error.problems)
