"The benchmarks' logic on tiny models: what they count, what they run, what they do not run twice, and what they show."
import json,random,sys
from pathlib import Path

import pytest

from vlm_ft.models.tiny import FAMILIES, drawn, tiny_folder

sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
import common, gpu, speed, step, sweep  # noqa: E402

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tiny_folder('qwen2_vl', tmp_path_factory.mktemp('model'))

def rows_of(size, n=1): return [{'image':drawn('ab', size), 'question':'What?', 'answer':'it is this '*3}]*n

def test_the_products_of_a_row(folder):
    "As counted by hand, with a tower that is frozen: two operations for a weight and a token, and as many again where a gradient goes on."
    config,processor,family = common.processor_of(folder)
    rows = rows_of((112,112))
    found = common.row_flops(config, processor, family, rows, vision=False)
    assert common.row_flops(config, processor, family, rows*3, vision=False)==pytest.approx(found)       # packed rows do not see each other
    counted = common.row_work(folder, rows)
    n,patches,text,vision = int(counted['tokens']),4*int(counted['image_tokens']),config.text_config,config.vision_config
    D,F,head = text.hidden_size,text.intermediate_size,text.hidden_size//text.num_attention_heads
    shapes = [(D,D), (D,head*text.num_key_value_heads), (D,head*text.num_key_value_heads), (D,D), (D,F), (D,F), (F,D)]
    E,M = vision.embed_dim,4*vision.embed_dim
    tower = vision.depth*(2*patches*(4*E*E+2*E*int(E*vision.mlp_ratio)) + 4*patches**2*E) + 2*patches*vision.in_channels*vision.temporal_patch_size*vision.patch_size**2*E + 2*(patches//4)*(M*M+M*vision.hidden_size)
    base = sum(2*n*a*b for a,b in shapes)*text.num_hidden_layers
    adapter = sum(2*n*16*(a+b) for a,b in shapes)*text.num_hidden_layers
    attention = 2*n*n*D*text.num_hidden_layers                                                            # causal: half of four
    head = 4*int(counted['supervised'])*D*text.vocab_size
    most = tower+2*base+3*adapter+3*attention+head                                                        # the first layer's inputs need no gradient: a little less than twice
    first = sum(2*n*a*b+2*n*16*a for a,b in shapes[:3])
    assert found==pytest.approx(most-first, rel=.01)
    assert common.row_flops(config, processor, family, rows, vision=True)>found+tower*.9                  # a tower that trains: its inputs' gradients too

@pytest.mark.parametrize('name', FAMILIES)
def test_pictures_of_so_many_tokens(name, tmp_path):
    "The nearest size of each family, and no row longer than was said."
    _,processor,family = common.processor_of(tiny_folder(name, tmp_path))
    for n in (16,64):
        size = sweep.picture_size(n, processor, family)
        own = family.bounded(processor, max(size)**2)                                                     # as the case bounds it: the picture is not made smaller
        assert n/2<sum(family.n_image_tokens(own, size))<2*n

def case(folder, **kwargs): return dict(dict(axis='tokens', model=folder, checkpointing=False, steps=2, seconds=9, rows=0, tokens=16, batch=1), **kwargs)

def test_a_case(folder):
    found = sweep.measure(case(folder, batch=2))
    assert found['image_tokens']==16 and len(found['steps'])==2 and found['step_s']>0 and found['peak_gib']>=found['loaded_gib']>0
    assert found['first_s']>found['check_s']>0 and found['tflop']>0 and found['supervised']>0
    many = sweep.measure(case(folder, axis='rows', rows=50, checkpointing=True))
    assert many['image_tokens']==16 and many['first_s']>many['check_s']

def test_more_positions(folder, tmp_path):
    assert sweep.roomy(folder, 10, tmp_path)==folder
    most = common.processor_of(folder)[0].text_config.max_position_embeddings
    assert common.processor_of(sweep.roomy(folder, most+1, tmp_path))[0].text_config.max_position_embeddings==most+1

def line(axis, x, seconds, gib):
    c = dict(axis=axis, model='m', checkpointing=False, tokens=64, batch=1, rows=0) | {axis:x}
    return dict(case=c, chip=dict(device='CPU', tflops=2.), loaded_gib=1., peak_gib=gib, open_s=.1, check_s=1., first_s=2., step_s=seconds, image_tokens=c['tokens'], supervised=10., tflop=.5*c['tokens']/64)

def test_the_driver_resumes(monkeypatch, tmp_path, capsys):
    "A case that is there is not run again; one that failed is, but for want of memory; none is begun after its minutes."
    ran,out = [],tmp_path/'out.jsonl'
    def run(case, chip):
        ran.append(case['tokens'])
        return dict(case=case, chip=chip, **({'error':'x', 'final':True} if case['tokens']==4096 else {'error':'y'} if case['tokens']==1024 and ran.count(1024)<2 else {k:v for k,v in line('tokens', case['tokens'], case['tokens']/64, 2.).items() if k not in ('case','chip')}))
    monkeypatch.setattr(sweep, 'run', run); monkeypatch.setattr(sweep, 'apart', lambda *_: ['{"device":"CPU","tflops":2}'])
    def main(*words): monkeypatch.setattr(sys, 'argv', ['sweep.py', '--axis', 'tokens', '--hold', '1', '--out', str(out), *words]); sweep.main()
    main('--tokens', '64', '1024', '4096'); assert ran==[64,1024,4096]
    main('--tokens', '64', '1024', '4096'); assert ran==[64,1024,4096,1024]
    main('--tokens', '64', '128', '--minutes', '0'); assert len(ran)==4 and 'No time is left for 1 cases' in capsys.readouterr().out
    main('--tokens', '64', '128', '--plot', str(tmp_path/'p.svg')); assert ran[-1]==128 and len(ran)==5
    assert 'tokens 4,096: failed, x' in capsys.readouterr().out and '<svg' in (tmp_path/'p.svg').read_text()

def test_what_is_shown():
    lines = [line('tokens', 256, 4., 5.), line('tokens', 64, 1., 2.), line('tokens', 1024, 32., 17.), line('rows', 1000, 1., 3.5), line('rows', 100, 1., 3.)]
    found = sweep.table_of(lines, 'tokens')
    assert [r['image tokens'] for r in found]==[64,256,1024] and [r['grows as'] for r in found]==[None,1.,1.5] and [r['its products'] for r in found]==[None,1.,1.]
    assert found[0]['beyond it grows as'] is None and found[1]['beyond it grows as']==1. and found[0]['of the peak']=='25.0 %' and found[0]['supervised tokens/s']==10
    gpu = [l | dict(held_gib=1., allocated_gib=g, reserved_gib=g+1) for l,g in zip(lines, (5.,2.,17.))]
    assert [r['beyond it grows as'] for r in sweep.table_of(gpu, 'tokens')]==[None,1.,1.] and [r['reserved GiB'] for r in sweep.table_of(gpu, 'tokens')]==[3.,6.,18.]
    assert sweep.reason("Traceback\n  x\ntorch.OutOfMemoryError: A step does not fit.\nFound: 4 rows.\n")=='torch.OutOfMemoryError: A step does not fit.'
    assert [r['MiB more than with fewest'] for r in sweep.table_of(lines, 'rows')]==[0.,512.]

def test_speed_of_several_rows(tmp_path):
    "Best points, the least memory of a peer, and a plot; lines without the work of a row are shown as they are."
    told = lambda rows, ours, peer: dict(case=dict(who=['ours','unsloth'], rows=rows, accumulate=1), chip=dict(device='d', tflops=10.), work=dict(supervised=100., tflop=.5),
        found={w:dict(windows=[s-1, s, s+1], peak_gib=g, allocated_gib=g-.5, warm=3.) for w,(s,g) in dict(ours=ours, unsloth=peer).items()})
    lines = [told(1, (6.,4.), (3.,5.)), told(4, (12.,9.), (5.,8.))]
    words, = speed.best(lines)
    assert '12.00 (4 rows a pass) / 5.00 (4) = 2.40' in words and '5.00 GiB: 6.00 (1) / 3.00 (1) = 2.00' in words
    shown = speed.table_of(lines[0])[0]
    assert shown['TFLOP/s']==3. and shown['of the peak']=='30.0 %' and shown['supervised tokens/s']==600. and shown['reserved GiB']==4.
    assert speed.table_of({k:v for k,v in lines[0].items() if k not in ('chip','work')})[0]['TFLOP/s'] is None
    speed.plot(lines, tmp_path/'p.svg'); assert 'peak reserved GiB' in (tmp_path/'p.svg').read_text()

def test_a_window_begins_when_nothing_is_compiled_any_more():
    assert not speed.settled([9.,9.]+[1.]*5, 4) and not speed.settled([1.]*5+[3.]+[1.]*4, 4) and speed.settled([9.]+[1.,1.5]*4, 4) and not speed.settled([1.]*9, 10)

def test_where_a_step_goes(tmp_path):
    "Kernels by kind; the table and the picture of what was measured, and a step of the embedded base."
    names = {'attention':'void pytorch_flash::flash_bwd_kernel<96>', 'products':'nvjet_sm90_tst_192x208', 'copies':'Memcpy DtoD (Device -> Device)', 'elementwise':'triton_red_fused__to_copy_add_native_layer_norm_4'}
    assert {step.kind_of(n):k for k,n in names.items()}=={k:k for k in names}
    line = dict(setting='plain', rows=16, tokens=1000, seconds=2., kernels_ms=1000., launches=9, warm_seconds=3., kinds=dict(attention=500., products=250., copies=0., elementwise=250.), waits={'a.py:1':2})
    shown, = step.table_of([line])
    assert shown['rows/s']==8. and shown['attention']=='50%' and shown['waits']==2
    step.plot([line]).savefig(tmp_path/'p.svg'); assert '8.0 rows/s' in (tmp_path/'p.svg').read_text()
    found = step.measure(dict(model=str(common.BASE), setting='plain', rows=1, steps=1, warm=1))
    assert found['seconds']>0 and all(found['kinds'][k]>0 for k in ('attention','products','elementwise')) and abs(sum(found['kinds'].values())-found['kernels_ms'])<1e-6*found['kernels_ms']

def test_runs_go_on_where_they_stopped(monkeypatch, tmp_path, capsys):
    "What has ended is not run again; what failed is, and leaves what it said."
    monkeypatch.setattr(gpu, 'RUNS', {'good':'step.py --help', 'bad':'step.py --nonsense {out}'})
    for expected in (['good','bad'], ['bad']):
        monkeypatch.setattr(sys, 'argv', ['gpu.py', '--out', str(tmp_path), '--minutes', '2', '--devices', '0']); gpu.main()
        said = capsys.readouterr().out
        assert [n for n in ('good','bad') if f': {n} ' in said]==expected and '1 of 2 have ended' in said
    assert '--nonsense' in (tmp_path/'bad.log').read_text() and json.loads((tmp_path/'done.json').read_text())==['good']
    words = gpu.words_of('speed.py --who ours unsloth --rows 4', type('A', (), dict(out=tmp_path, folder=tmp_path, python=[])))
    assert 'unsloth' not in words and 'ours' in words
    monkeypatch.setattr(gpu, 'RUNS', {'pair':'step.py --help unsloth'})
    for python,ended in ([], '0 of 1'), (['--python', 'unsloth=python'], '1 of 1'):                 # what ran without the peer is run again with it
        monkeypatch.setattr(sys, 'argv', ['gpu.py', '--out', str(tmp_path/'pair'), '--minutes', '2', '--devices', '0', *python]); gpu.main()
        assert ended in capsys.readouterr().out

def test_every_run_is_a_command():
    "Each line of gpu.py names a benchmark and options that it has."
    for name,command in gpu.RUNS.items():
        file,*words = command.split()
        text = (common.HERE/file).read_text()
        assert all(f"'{w}'" in text for w in words if w.startswith('--')), name

def test_drawn_pages(tmp_path):
    "As many as are asked for, in different sizes, the same each time."
    for name in 'ab': (tmp_path/name).mkdir(); speed.drawn_pages(tmp_path/name, 3, (40,112), 16)
    assert [p.read_bytes() for p in sorted((tmp_path/'a').iterdir())]==[p.read_bytes() for p in sorted((tmp_path/'b').iterdir())]
    assert len(speed.rows_of(tmp_path/'a', 2))==2 and common.page((64,32), random.Random(0)).size==(64,32)
    assert json.loads((tmp_path/'a'/'train.jsonl').read_text().splitlines()[0])['image']=='0.jpg'
