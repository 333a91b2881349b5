"Every metric beside an implementation of its definition that shares no code with it, on hundreds of generated cases."
import json, random, re
from functools import lru_cache
import jiwer, numpy as np, pytest, sacrebleu
from pycocoevalcap.cider.cider import Cider
from vlm_ft.evaluation.captions import bleu, chrf, cider
from vlm_ft.evaluation.certainty import difference, interval, rate
from vlm_ft.evaluation.documents import fields, tree_accuracy
from vlm_ft.evaluation.metrics import METRICS, TASK_METRICS, differences, score
from vlm_ft.evaluation.questions import anls, relaxed, vqa
from vlm_ft.evaluation.text import cer, edits, wer

def distance(a, b):
    "Levenshtein's, by the textbook's table."
    row = list(range(len(b)+1))
    for i,x in enumerate(a, 1):
        left,row[0] = row[0],i
        for j,y in enumerate(b, 1): left,row[j] = row[j],min(row[j]+1, row[j-1]+1, left+(x!=y))
    return row[-1]

def texts(seed, n=300, alphabet='aabcü ſ.\n', most=14):
    rng = random.Random(seed)
    return [''.join(rng.choices(alphabet, k=rng.randint(0, most))).strip() for _ in range(n)]

def test_error_rates():
    truths,said = texts(0),texts(1)
    assert edits(truths, said).tolist() == [[distance(t, p), len(t)] for t,p in zip(truths, said)]
    assert edits(truths, said, 'words').tolist() == [[distance(t.split(), p.split()), len(t.split())] for t,p in zip(truths, said)]
    assert cer(truths, said)==jiwer.cer(truths, said)
    spaced = [' '.join(t.split()) for t in truths]
    assert wer(spaced, said)==pytest.approx(jiwer.wer(spaced, [' '.join(p.split()) for p in said]))

def test_anls():
    truths,said = list(zip(texts(2, alphabet='abA '), texts(3, alphabet='abA '))),texts(4, alphabet='abA ')
    def plain(answers, p):
        form = lambda s: ' '.join(s.lower().split())
        near = [distance(form(a), form(p))/max(len(form(a)), len(form(p)), 1) for a in answers]
        return 1-min(near) if min(near)<.5 else 0
    want = [plain(t, p) for t,p in zip(truths, said)]
    assert anls([list(t) for t in truths], said)[:,0].tolist()==pytest.approx(want) and 0<np.mean(want)<1

def published_vqa(people, said):
    "VQAv2's rule as its evaluation states it: for each person, min(1, matches among the others / 3)."
    articles,numbers = {'a','an','the'},dict(none='0', zero='0', one='1', two='2', three='3', four='4', five='5', six='6', seven='7', eight='8', nine='9', ten='10')
    apart = {'dont':"don't", 'isnt':"isn't", 'cant':"can't", 'thats':"that's", 'youre':"you're", 'wont':"won't"}
    def form(text):
        text = text.replace('\n', ' ').replace('\t', ' ').strip()
        out = text
        for p in [';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',', '?', '!']:
            if p+' ' in text or ' '+p in text or re.search(r'(\d)(\,)(\d)', text): out = out.replace(p, '')
            else: out = out.replace(p, ' ')
        out = re.sub(r'(?!<=\d)(\.)(?!\d)', '', out)
        words = [numbers.get(w, w) for w in out.lower().split()]
        return ' '.join(apart.get(w, w) for w in words if w not in articles)
    answers = [dict(id=i, answer=form(a)) for i,a in enumerate(people)]
    return sum(min(1, len([o for o in answers if o!=mine and o['answer']==form(said)])/3) for mine in answers)/len(answers)

def test_vqa():
    rng = random.Random(5)
    words = ['two','2','The dog','dog','a dog.','dont know',"don't know",'red/white','red, white','1,000','3.5','yes','Yes!','none','(left)','that is','thats']
    people = [rng.choices(rng.sample(words, 4), k=10) for _ in range(400)]
    said = [rng.choice(p+words) for p in people]
    want = [published_vqa(p, s) for p,s in zip(people, said)]
    assert vqa(people, said)[:,0].tolist()==pytest.approx(want) and len(set(np.round(want, 3)))>=5
    for n,share in ((1,.3),(2,.6),(3,.9),(4,1)): assert vqa([['x']*n+['y']*(10-n)], ['x'])[0,0]==pytest.approx(share)    # the values the benchmark's page lists

def test_relaxed():
    rng = random.Random(6)
    numbers = [f'{x:.2f}' for x in (rng.uniform(-50, 50) for _ in range(300))]
    said = [f'{float(t)*rng.uniform(.9, 1.1):.3f}' for t in numbers]
    assert relaxed(numbers, said)[:,0].tolist()==[int(abs(float(p)-float(t))<=.05*abs(float(t))) for t,p in zip(numbers, said)]

def captions(seed, n):
    rng,words = random.Random(seed),'a the two black dog circle box tower runs holds by on near'.split()
    say = lambda: ' '.join(rng.choices(words, k=rng.randint(1, 9)))
    truths = [[say() for _ in range(rng.randint(1, 5))] for _ in range(n)]
    return truths, [rng.choice((say(), rng.choice(t), rng.choice(t)+' dog dog', '')) for t in truths]

def test_cider():
    "The published program, row by row: captions of one to five people, empty predictions, rows of one word."
    truths,said = captions(7, 300)
    _,rows = Cider().compute_score(dict(enumerate(truths)), {i:[p] for i,p in enumerate(said)})
    assert cider(truths, said)[:,0]==pytest.approx(rows, abs=1e-9) and rows.std()>1

@pytest.mark.parametrize('name', ('bleu','chrf'))
def test_sacrebleu(name):
    truths,said = captions(8, 300)
    streams = [[t[i] if i<len(t) else None for t in truths] for i in range(5)]
    ours,theirs = dict(bleu=bleu, chrf=chrf)[name](truths, said),getattr(sacrebleu, f'corpus_{name}')
    assert rate(ours)==pytest.approx(theirs(said, streams).score/100, abs=1e-12)
    rows = np.random.default_rng(0).integers(300, size=300)                                 # what the bootstrap draws is a corpus like any other
    drawn = theirs([said[i] for i in rows], [[s[i] for i in rows] for s in streams]).score/100
    assert rate(ours[rows])==pytest.approx(drawn, abs=1e-12)

def tree_of(text):
    "(label, leaf, children), as Donut's metric builds it from normalised JSON."
    def node(v, label):
        if isinstance(v, dict): return (label, False, tuple(k for k in (node(v[key], key) for key in sorted(v, key=lambda s: (len(s), s))) if k[2]))
        if all(isinstance(x, dict) for x in v): return (label, False, tuple(k for k in (node(x, '<subtree>') for x in v) if k[2]))
        return (label, False, tuple((str(x), True, ()) for x in v if str(x).strip()))
    wrap = lambda v: {k:wrap(x) for k,x in v.items()} if isinstance(v, dict) else [wrap(x) for x in v] if isinstance(v, list) and all(isinstance(x, dict) for x in v) else v if isinstance(v, list) else [v]
    return node(wrap(json.loads(text)), '<root>')

@lru_cache(maxsize=None)
def forest_distance(a, b):
    "The recursive definition: delete a root, insert a root, or match the two."
    price = lambda t: len(t[0]) if t[1] else 1
    if not a and not b: return 0
    if not b: return forest_distance(a[:-1]+a[-1][2], b)+price(a[-1])
    if not a: return forest_distance(a, b[:-1]+b[-1][2])+price(b[-1])
    x,y = a[-1],b[-1]
    change = distance(x[0], y[0]) if x[1] and y[1] else int(x[0]!=y[0]) if not x[1] and not y[1] else 1+price(x if x[1] else y)
    return min(forest_distance(a[:-1]+x[2], b)+price(x), forest_distance(a, b[:-1]+y[2])+price(y), forest_distance(a[:-1], b[:-1])+forest_distance(x[2], y[2])+change)

def test_tree_accuracy():
    rng = random.Random(9)
    def made():
        item = lambda: {k:rng.choice(['tea','bun','9.30','x']) for k in rng.sample(['nm','cnt','price'], rng.randint(1, 2))}
        return json.dumps({'menu':[item() for _ in range(rng.randint(1, 2))], 'total':rng.choice(['9.30','9.80','12'])})
    pairs = [(made(), made()) for _ in range(200)]
    want = [max(0, 1-forest_distance((tree_of(p),), (tree_of(t),))/forest_distance((('<root>', False, ()),), (tree_of(t),))) for t,p in pairs]
    assert tree_accuracy(*map(list, zip(*pairs)))[:,0].tolist()==pytest.approx(want) and len(set(want))>20

def test_fields():
    rng = random.Random(10)
    objects = lambda: [{k:rng.choice('xy') for k in rng.sample('abcd', rng.randint(1, 4))} for _ in range(300)]
    truths,said = objects(),objects()
    hit = sum(t[k]==p.get(k) for t,p in zip(truths, said) for k in t)
    asked,given = (sum(map(len, x)) for x in (truths, said))
    count = lambda over: rate(fields([json.dumps(t) for t in truths], [json.dumps(p) for p in said], over))
    assert (count('asked'), count('given'), count('both'))==pytest.approx((hit/asked, hit/given, 2*hit/(asked+given)))

def test_f1_of_nested_answers_is_donuts():
    "Donut's rule, as its paper's evaluation words it: keys joined by points, lists without places, each pair used up once, nothing for what is empty."
    rng = random.Random(11)
    def some(depth=2):
        if depth==0: return rng.choice(['x','y','z','',None])
        return [some(depth-1) for _ in range(rng.randint(0, 3))] if rng.random()<.4 else {k:some(depth-1) for k in rng.sample('ab', rng.randint(1, 2))}
    def flat(v, key=''):
        if isinstance(v, dict): return [pair for k,x in v.items() for pair in flat(x, f'{key}.{k}' if key else k)]
        if isinstance(v, list): return [pair for x in v for pair in flat(x, key)]
        return [(key,v)] if v else []
    right = wrong = 0
    pairs = [(some(),some()) for _ in range(1500)]
    for truth,said in pairs:
        left = flat(truth)
        for pair in flat(said):
            if pair in left: left.remove(pair); right += 1
            else: wrong += 1
        wrong += len(left)
    assert right>100 and rate(fields([json.dumps(t) for t,_ in pairs], [json.dumps(p) for _,p in pairs], 'both'))==pytest.approx(right/(right+wrong/2))

def test_every_task_is_scored_and_compared():
    "Each metric of each task, from a perfect model to a silent one; a corpus in which all tasks are mixed."
    right = dict(ocr='a line', vqa='yes', vqav2='dog', docvqa='18/11', chart='12.5', extract='{"total": "9.30"}', latex=r'\frac{a}{b}', caption='a dog runs', other='text')
    rows = [dict(task=t, answers=[a]*(10 if t=='vqav2' else 1)) for t,a in right.items() for _ in range(2)]
    rows += [dict(task='caption', answers=['two black boxes']), dict(task='caption', answers=['the tower of four blocks'])]
    perfect,silent = [r['answers'][0] for r in rows],['']*len(rows)
    best,worst = score(rows, perfect),score(rows, silent)
    assert {s['metric'] for s in best}==set(METRICS) and {s['task'] for s in best}=={*TASK_METRICS,'other'}
    for b,w in zip(best, worst): assert b['value']>w['value'] if b['metric'] not in ('cer','wer') else b['value']<w['value'], b
    found = differences(rows, silent, perfect, ('silent','perfect'))
    assert [(d['task'],d['metric']) for d in found]==[(s['task'],s['metric']) for s in best] and all(d['p']>.05 for d in found)   # two rows a task: no proof

def test_group_intervals_hold_the_truth():
    "Rows in groups that go wrong together: intervals by group hold the truth, those by row do not."
    rng,held = np.random.default_rng(0),{True:[],False:[]}
    for i in range(300):
        easy = rng.beta(2, 2, 40)                                                         # 40 documents of 6 rows
        right = (rng.random((40, 6))<easy[:,None]).astype(float).ravel()
        counts = np.stack([right, np.ones(240)], 1)
        for grouped in (True, False):
            low,high = interval(counts, 600, i, groups=np.arange(240)//6 if grouped else None)
            held[grouped].append(low<=.5<=high)
    assert .92<=np.mean(held[True])<=.98 and np.mean(held[False])<.85, {k:np.mean(v) for k,v in held.items()}

def test_no_difference_is_seldom_called_one():
    "Two models that are alike: a verdict in about 5 of 100 comparisons."
    rng,called = np.random.default_rng(1),0
    for i in range(300):
        length = rng.integers(5, 40, 50)
        hard = rng.beta(.5, 4.5, 50)
        a,b = (np.stack([rng.binomial(length, hard), length], 1).astype(float) for _ in range(2))
        called += difference(a, b, resamples=400, seed=i)['better'] is not None
    assert called/300<.08, called
