"Saving and merging across rooms: every family and precision, faults that must be found, folders that must not be left behind, and the hub."
import base64,json,os,shutil,subprocess,sys,tempfile,threading
from http.server import BaseHTTPRequestHandler,ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from vlm_ft import weights
from vlm_ft.loading import quantized_modules
from vlm_ft.merging import FastVisionModel,verify_merge
from vlm_ft.models.family import base_of,family_for
from vlm_ft.models.tiny import FAMILIES,tiny_folder
from vlm_ft.verify import apart,logits_of,probe
from vlm_ft.weights import Checkpoint,Merge,MergeError,place

def lively(model):
    "Everything that trains moved, `lora_B` too, which starts at zero."
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(0.03*torch.randn_like(p))
    return model.eval()

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('bases')
    return {name: tiny_folder(name, root/name, dtype=torch.bfloat16) for name in FAMILIES}

def adapted(folder, r=8, **load):
    model,processor = FastVisionModel.from_pretrained(folder, **load)
    return lively(FastVisionModel.get_peft_model(model, r=r)), processor

@pytest.mark.parametrize('how', [{}, {'load_in_8bit':True}, {'load_in_4bit':True}, {'load_in_4bit':True, 'quantize_vision':True}], ids=['16','8','4','4-vision'])
@pytest.mark.parametrize('name', FAMILIES)
def test_adapter_saved_loaded_merged_loaded(name, how, folders, tmp_path):
    model,processor = adapted(folders[name], **how)
    held = {n: p.detach().clone() for n,p in model.named_parameters()}
    model.save_adapter(tmp_path/'adapter')
    again,again_processor = FastVisionModel.from_pretrained(str(tmp_path/'adapter'), **how)
    batches = probe(model, processor)
    assert apart(logits_of(again, probe(again, again_processor)), logits_of(model, batches)) == 0
    done = again.save_pretrained_merged(tmp_path/'merged')
    plain,_ = FastVisionModel.from_pretrained(str(tmp_path/'merged'))
    assert not quantized_modules(plain) and 0 < done['logit_difference'] <= done['allowed']   # 0 would be a model compared with itself
    assert done['adapted'] == sum(hasattr(m, 'lora_A') for m in model.modules())
    gap = apart(logits_of(plain, batches), logits_of(model, batches))
    assert abs(gap-done.get('gap_to_quantized', done['difference_16bit'])) < 1e-6
    assert all(torch.equal(p, held[n]) for n,p in model.named_parameters())

@pytest.mark.parametrize('name', FAMILIES)
def test_a_quantised_checkpoint_is_merged_onto_its_own_weights(name, folders, tmp_path):
    model,_ = adapted(folders[name])
    model.save_pretrained_merged(tmp_path/'4bit', save_method='merged_4bit')
    four,processor = FastVisionModel.from_pretrained(str(tmp_path/'4bit'))
    assert set(quantized_modules(four).values()) == {4}
    batches = probe(four, processor); before = logits_of(four, batches)
    four = lively(FastVisionModel.get_peft_model(four, r=4))
    done = four.save_pretrained_merged(tmp_path/'merged')
    assert 'dequantised' in done['merged_onto'] and 'itself quantised' in done['merged_onto'] and done['logit_difference'] <= done['allowed']
    assert done['gap_to_quantized'] < 0.1*apart(logits_of(four, batches), before)         # against what the adapter does, packing is rounding
    with pytest.raises(ValueError, match="onto='dequantized'"): four.save_pretrained_merged(tmp_path/'x', onto='original')

@pytest.mark.parametrize('part', ['vision','projector','language'])
@pytest.mark.parametrize('name', FAMILIES)
def test_one_module_left_unmerged_is_found(name, part, folders, tmp_path, monkeypatch):
    model,processor = adapted(folders[name], load_in_4bit=part=='language')
    root = getattr(family_for(model), part)
    left = next(n for n in Merge(model).names.values() if n.startswith(root+'.') and n.endswith('.weight') and place(model, n)[1] is not None)
    real,lora = weights.merged,place(model, left)[1]
    monkeypatch.setattr(weights, 'merged', lambda W, l, active, dtype: W.to(dtype) if l is lora else real(W, l, active, dtype))
    with pytest.raises(MergeError, match=left.replace('.', r'\.')): model.save_pretrained_merged(tmp_path/'out')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('fault', ['scale','transposed','rounded_twice','other_weights'])
def test_wrong_arithmetic_is_found(fault, folders, tmp_path, monkeypatch):
    model,processor = adapted(folders['pixtral'])
    real = weights.merged
    def faulty(W, lora, active, dtype):
        if fault=='scale': return (W.double() + lora.lora_B['default'].weight.double() @ lora.lora_A['default'].weight.double()).to(dtype)  # alpha over r forgotten
        if fault=='transposed' and W.shape[0]==W.shape[1]: return W.to(dtype) + lora.get_delta_weight('default').T.to(dtype)
        if fault=='rounded_twice': return W + lora.get_delta_weight('default').to(dtype)
        return real(W*1.01 if fault=='other_weights' else W, lora, active, dtype)
    monkeypatch.setattr(weights, 'merged', faulty)
    with pytest.raises(MergeError): model.save_pretrained_merged(tmp_path/'out')
    assert not list(tmp_path.iterdir())

def test_a_base_that_changed_on_disk_is_refused(folders, tmp_path):
    base = tmp_path/'base'; tiny_folder('qwen2_vl', base, dtype=torch.bfloat16)
    model,_ = adapted(str(base), load_in_4bit=True)
    tiny_folder('qwen2_vl', base, dtype=torch.bfloat16, seed=1)
    with pytest.raises(MergeError, match='does not hold the weights that were quantised'): model.save_pretrained_merged(tmp_path/'out')
    assert not (tmp_path/'out').exists()
    assert model.save_pretrained_merged(tmp_path/'out', onto='dequantized')['logit_difference'] > 0

def test_shards_load_in_plain_transformers(folders, tmp_path):
    import transformers
    model,_ = adapted(folders['mllama'])
    model.save_pretrained_merged(tmp_path/'one')
    model.save_pretrained_merged(tmp_path/'many', max_shard_size='100KB')
    assert len(list((tmp_path/'many').glob('*.safetensors'))) > 3
    plain = transformers.MllamaForConditionalGeneration.from_pretrained(tmp_path/'many', dtype='auto')
    for name,p in plain.state_dict().items(): assert torch.equal(p, Merge(model).tensor(name)), name
    verify_merge(model, tmp_path/'many')

CAPPED = '''
import resource, signal, sys, torch
torch.set_num_threads(1)
from vlm_ft import FastVisionModel
model,processor = FastVisionModel.from_pretrained(sys.argv[1])
model = FastVisionModel.get_peft_model(model, r=8)
model.save_pretrained_merged(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))           # from here on no file may grow further: a disk that is full halfway
for kw in (dict(), dict(save_method='merged_4bit'), dict(save_method='lora')):
    for target in sys.argv[2:]:
        try: model.save_pretrained_merged(target, **kw)
        except OSError as e: print('nothing of it is left' in str(e))
'''
@pytest.mark.skipif(sys.platform!='linux', reason='limits file sizes as Linux does')
def test_a_disk_that_fills_up_leaves_nothing(folders, tmp_path):
    kept,new = tmp_path/'kept',tmp_path/'new'
    done = subprocess.run([sys.executable, '-c', CAPPED, folders['qwen2_vl'], kept, new], capture_output=True, text=True)
    assert done.returncode==0 and done.stdout.count('True')==6 and 'False' not in done.stdout, done.stdout+done.stderr[-2000:]
    assert [p.name for p in tmp_path.iterdir()] == ['kept']                # the earlier good folder is still there, whole
    FastVisionModel.from_pretrained(str(kept))

SHM = Path('/dev/shm')
@pytest.mark.skipif(not os.access(SHM, os.W_OK) or SHM.stat().st_dev==Path(tempfile.gettempdir()).stat().st_dev, reason='needs two file systems: /dev/shm beside the temporary folder')
def test_an_adapter_is_saved_through_a_link_to_another_disk(folders, tmp_path, monkeypatch):
    model,_ = adapted(folders['qwen2_vl'])
    with tempfile.TemporaryDirectory(dir=SHM) as other:
        out = Path(other)/'out'; out.mkdir(); (out/'mine.txt').write_text('notes'); (tmp_path/'link').symlink_to(out)
        model.add_adapter('second', model.peft_config['default'])                                         # PEFT gives it a folder of its own
        for _ in range(2): model.save_pretrained(tmp_path/'link')
        made = {'mine.txt','adapter_model.safetensors','second/adapter_model.safetensors'}
        assert made <= {p.relative_to(out).as_posix() for p in out.rglob('*')} and (tmp_path/'link').is_symlink()
        assert 'lora' in model.save_pretrained_merged(tmp_path/'link', save_method='lora', overwrite=True)['save_method'] and (tmp_path/'link').is_symlink()
        before = sorted(out.rglob('*'))
        def half(self, d, **kwargs): (Path(d)/'half').write_text(''); raise OSError('No space left on device')
        monkeypatch.setattr(type(model), 'save_pretrained', half)
        with pytest.raises(OSError, match='No space'): model.save_pretrained(tmp_path/'link')
        assert sorted(out.rglob('*'))==before and os.listdir(other)==['out'] and os.listdir(tmp_path)==['link']

def test_saving_leaves_the_mode_of_a_folder_as_mkdir_or_its_owner_set_it(folders, tmp_path):
    model,_ = adapted(folders['qwen2_vl'])
    mode = lambda name: (tmp_path/name).stat().st_mode&0o7777
    for name in ('plain','peft','adapter'): (tmp_path/name).mkdir()
    for name in ('peft','adapter'): (tmp_path/name).chmod(0o2775)
    for name in ('peft','new-peft'): model.save_pretrained(tmp_path/name)
    for name in ('adapter','new-adapter'): model.save_adapter(tmp_path/name)
    assert [oct(mode(n)) for n in ('peft','adapter')]==['0o2775']*2 and mode('new-peft')==mode('new-adapter')==mode('plain')

MOUNTED = '''
import os, shutil, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from vlm_ft import FastVisionModel
from vlm_ft.merging import whole_folder
model,processor = FastVisionModel.from_pretrained(sys.argv[1])
model = FastVisionModel.get_peft_model(model, r=8)
for out in map(Path, sys.argv[2:]):
    model.save_pretrained(out)
    for p in out.iterdir(): p.unlink()
    for kw in (dict(), dict(save_method='lora')): model.save_pretrained_merged(out, **kw)     # the second replaces the first
    before = sorted(out.rglob('*'))
    try:
        with whole_folder(out, 10) as made: (made/'half').write_text(''); raise OSError('No space left')
    except OSError as e: print('nothing of it is left' in str(e))
    try: whole_folder(out, 2**33).__enter__()
    except OSError as e: print('no room' in str(e))
    print(sorted(out.rglob('*'))==before and (out/'adapter_model.safetensors').exists() and not (out/'model.safetensors').exists())
    print(oct(out.stat().st_mode&0o7777)=='0o2775' and os.listdir(out.parent)==[out.name])
'''
MOUNT = '''
set -e; cd "$1"; shift
mkdir -p a/disk b/same c/locked; mount -t tmpfs -o size=64m,mode=2775 x a/disk
mkdir y; mount -t tmpfs -o size=64m x y; mkdir -p y/from y/b/same; chmod 2775 y/from; mount --bind y/b b; mount --bind y/from b/same   # two mounts of one disk
mount --bind c c; mount -t tmpfs -o size=64m,mode=2775 x c/locked; mount -o remount,bind,ro c
exec "$@" a/disk b/same c/locked
'''
APART = ['unshare', '--mount', *(() if os.geteuid()==0 else ('--map-root-user',))]
@pytest.mark.skipif(sys.platform!='linux' or not shutil.which('unshare') or subprocess.run([*APART, 'mount', '-t', 'tmpfs', 'x', '/mnt'], capture_output=True).returncode!=0, reason='needs to mount')
def test_a_mount_point_is_written_to_from_inside(folders, tmp_path):
    done = subprocess.run([*APART, 'sh', '-c', MOUNT, 'sh', tmp_path, sys.executable, '-c', MOUNTED, folders['qwen2_vl']], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH':os.getcwd()})
    assert done.returncode==0 and done.stdout.count('True')==12 and 'False' not in done.stdout, done.stdout+done.stderr[-2000:]

class StandIn(BaseHTTPRequestHandler):
    "The part of the hub that an upload uses, on this machine."
    def log_message(self, *args): pass

    def reply(self, body, status=200):
        out = json.dumps(body).encode()
        self.send_response(status); self.send_header('Content-Type', 'application/json'); self.send_header('Content-Length', str(len(out))); self.end_headers()
        self.wfile.write(out)

    def do_GET(self): self.reply({'error':'not here'}, 404)

    def do_POST(self):
        length,chunked = int(self.headers.get('Content-Length') or 0),self.headers.get('Transfer-Encoding')=='chunked'
        body = self.chunks() if chunked else self.rfile.read(length)
        hub = self.server.seen
        hub['tokens'].add(self.headers.get('Authorization'))
        if self.headers.get('Authorization')!='Bearer hf_good': return self.reply({'error':'Invalid username or password.'}, 401)
        if self.path.endswith('/repos/create'):
            asked = json.loads(body); hub['made'].append((f"{asked.get('organization')}/{asked['name']}", asked.get('visibility')))
            return self.reply({'url':f"http://{self.headers['Host']}/{asked.get('organization')}/{asked['name']}"})
        if '/preupload/' in self.path: return self.reply({'files':[{'path':f['path'], 'uploadMode':'regular', 'shouldIgnore':False} for f in json.loads(body)['files']]})
        if '/commit/' in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            hub['commits'].append({v['value']['path']: base64.b64decode(v['value']['content']) for v in lines if v['key']=='file'})
            return self.reply({'success':True, 'commitOid':'0'*40, 'commitUrl':f"http://{self.headers['Host']}/me/mine/commit/{'0'*40}", 'hookOutput':''})
        if self.path.endswith('/validate-yaml'): return self.reply({'errors':[], 'warnings':[]})
        self.reply({'error':self.path}, 404)

    def chunks(self):
        out = b''
        while n := int(self.rfile.readline(), 16): out += self.rfile.read(n); self.rfile.readline()
        return out

PUSH = '''
import sys, torch
torch.set_num_threads(1)
from vlm_ft import FastVisionModel
model,tokenizer = FastVisionModel.from_pretrained(sys.argv[1])
model = FastVisionModel.get_peft_model(model, r=8)
model.push_to_hub("me/adapter", token="hf_good")
tokenizer.push_to_hub("me/adapter", token="hf_good")
model.push_to_hub_merged("me/mine", tokenizer, save_method="merged_16bit", token="hf_good", private=True)
try: model.push_to_hub_merged("me/mine", tokenizer, token="hf_bad")
except RuntimeError as e: print("nothing was merged" in str(e))
'''
def test_push_to_a_stand_in_of_the_hub(folders, tmp_path):
    server = ThreadingHTTPServer(('127.0.0.1', 0), StandIn)
    server.seen = dict(tokens=set(), made=[], commits=[])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, 'HF_ENDPOINT':f'http://127.0.0.1:{server.server_port}', 'HF_HUB_OFFLINE':'0', 'HF_HOME':str(tmp_path/'home'), 'HF_HUB_DISABLE_XET':'1'}
    done = subprocess.run([sys.executable, '-c', PUSH, folders['qwen2_vl']], env=env, capture_output=True, text=True, timeout=300)
    server.shutdown()
    assert done.returncode==0 and done.stdout.strip().endswith('True'), done.stdout+done.stderr[-3000:]
    assert ('me/mine', 'private') in server.seen['made'] and any(n=='me/adapter' for n,_ in server.seen['made'])
    adapter,merged = ({k:v for c in server.seen['commits'] for k,v in c.items() if mine in c} for mine in ('adapter_model.safetensors','model.safetensors'))
    assert 'adapter_config.json' in adapter and any('tokenizer.json' in c for c in server.seen['commits'])
    for name,content in merged.items(): (tmp_path/'down').mkdir(exist_ok=True); (tmp_path/'down'/name).write_bytes(content)
    model,processor = FastVisionModel.from_pretrained(str(tmp_path/'down'))     # what arrived is a whole checkpoint
    assert set(Checkpoint(tmp_path/'down').files) == set(Checkpoint(folders['qwen2_vl']).files) and base_of(model).config.model_type=='qwen2_vl'
