"What is planned is what a step takes: tokens to one, bytes to one, on every family; and the benchmark that measures it on a GPU runs."
import json, subprocess, sys
from pathlib import Path

import pytest
import torch

from vlm_ft.data import encode
from vlm_ft.lora import get_peft_model
from vlm_ft.loading import for_training, from_pretrained
from vlm_ft.models.family import base_of, family_for
from vlm_ft.models.tiny import FAMILIES, drawn, tiny
from vlm_ft.packing import pack_batch, packed, packed_loss
from vlm_ft.planning import Bytes, dry_head, dry_step, grown, hollow, plan, standing
from vlm_ft.setup import VisionTrainingArguments, pad_batch
from vlm_ft.training import VisionTrainer

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
ROWS = [{'image':drawn('a'*i, (90*i+60, 60)), 'question':'q', 'answer':'x'*20*i} for i in (1,2,3)]
HOW = {'all':{}, 'no vision':dict(finetune_vision_layers=False), 'attention':dict(finetune_mlp_modules=False), 'last':dict(finetune_last_n_layers=1)}

def most_and_kept(real, batch):
    "(bytes that live at the end of the body, the most beside it) of a step with data."
    base,marks = base_of(real),[]
    params = list(real.parameters())
    for p in params: p.grad = torch.zeros_like(p) if p.requires_grad else None
    count = Bytes([*params, *real.buffers(), *(p.grad for p in params if p.grad is not None), *filter(torch.is_tensor, batch.values())])
    hook = base.model.register_forward_hook(lambda *_: marks.append(count.mark()))
    with packed(real, family_for(real)), count:
        loss = packed_loss(real, batch); marks.append(count.mark())
        loss.backward(); marks.append(count.mark())
    hook.remove()
    kept = marks[0][0]
    return dict(activations=kept, loss=marks[1][1]-kept, working=max(marks[0][1], marks[2][1])-kept)

def saved(real, batch):
    "Bytes that torch's own hooks see saved for the backward pass of the model's body."
    base,found,done = base_of(real),{},[]
    known = {t.untyped_storage().data_ptr() for t in [*real.parameters(), *real.buffers(), *filter(torch.is_tensor, batch.values())]}
    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in known and not done: found[s.data_ptr()] = s
        return t
    hook = base.model.register_forward_hook(lambda *_: done.append(1))
    with packed(real, family_for(real)), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): packed_loss(real, batch)
    hook.remove()
    return sum(s.nbytes() for s in found.values())

@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('how', HOW)
def test_bytes_of_a_step(name, how):
    real,processor = tiny(name)
    adapt = lambda m: get_peft_model(m, r=4, **HOW[how])
    real = for_training(adapt(real)); family = family_for(real)
    net,mode = hollow(base_of(real).config, adapt=adapt, dtype=torch.float32)
    means = standing(net)
    assert means['weights']+means['adapters']==sum(p.nbytes for p in real.parameters()) and means['gradients']==sum(p.nbytes for p in real.parameters() if p.requires_grad)
    batch = pack_batch([encode(r, processor, family) for r in ROWS], family)
    numbers = family.pixels(batch); assert batch['pixel_values'].dtype==torch.uint8
    for checkpointing in (True,False):
        if not checkpointing: base_of(real).gradient_checkpointing_disable()
        got,want = dry_step(net, mode, batch, checkpointing, gpu=False),most_and_kept(real, numbers)
        if how=='all' and not checkpointing: assert saved(real, numbers)<=got['activations']<=1.05*saved(real, numbers)
        assert got['batch']==sum(t.nbytes for t in batch.values() if torch.is_tensor(t))+numbers['pixel_values'].nbytes
        for k,n in want.items(): assert abs(got[k]-n)<=1024+.002*n, (k, checkpointing, got, want)

def test_frozen_vision_keeps_nothing():
    _,processor = tiny('qwen2_vl')
    config = tiny('qwen2_vl')[0].config
    kept = []
    for vision in (True,False):
        net,mode = hollow(config, adapt=lambda m, v=vision: get_peft_model(m, r=4, finetune_vision_layers=v))
        kept.append(dry_step(net, mode, pack_batch([encode(ROWS[2], processor, family_for(net))], family_for(net)), checkpointing=False)['activations'])
    assert kept[1]<.8*kept[0]

def test_optimizer_and_whole_weights(tmp_path):
    "Adam's state after a step is what was planned, for adapters and for whole weights."
    for whole in (False,True):
        model,processor = tiny('pixtral')
        model.full_finetuning = whole
        model = get_peft_model(model, r=4)
        def adapt(m, whole=whole): m.full_finetuning = whole; return get_peft_model(m, r=4)
        means = standing(hollow(base_of(model).config, adapt=adapt, dtype=torch.float32)[0])
        args = VisionTrainingArguments(tmp_path, max_steps=1, use_cpu=True, save_strategy='no', gradient_accumulation_steps=1)
        trainer = VisionTrainer(model, args, train_dataset=ROWS, processing_class=processor, progress=False)
        trainer.train()
        state = [t for s in trainer.optimizer.optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.numel()>1] if hasattr(trainer.optimizer, 'optimizer') else []
        assert means['optimizer']==sum(t.nbytes for t in state), whole

@pytest.mark.parametrize('name', FAMILIES)
def test_growth(name):
    "Polynomials through small passes say what larger ones take."
    real,processor = tiny(name)
    net,mode = hollow(real.config, adapt=lambda m: get_peft_model(m, r=4)); family = family_for(net)
    feature = encode(ROWS[2], processor, family)
    for (how,saving),g in grown(net, mode, feature).items():
        got = dry_step(net, mode, pack_batch([feature]*9, family) if how else pad_batch([feature]*9, family, 0), saving)
        whole = got['batch']+got['activations']+max(got['loss'], got['working'])
        assert abs(g.total(9)/whole-1)<(.08 if family.masks_pictures else .05), (how, saving, g.total(9), whole)

def test_logits_come_in_parts():
    "Packed, logits stop growing at 128 MiB; padded, they do not."
    real,_ = tiny('qwen2_vl')
    net,mode = hollow(real.config, adapt=lambda m: get_peft_model(m, r=4))
    width,vocab = net.get_base_model().lm_head.weight.shape[::-1]
    part = 2**25//vocab                                                                        # tokens
    two,eight = dry_head(net, mode, 2*part),dry_head(net, mode, 8*part)
    assert eight-two<=6*6*part*width*2                                                         # gradients of the hidden states, no logits
    assert dry_head(net, mode, 8*part, packing=False)>3.5*dry_head(net, mode, 2*part, packing=False)>3*2*part*vocab*4

def test_embedded_base():
    "Of a loaded model: tokens as encode makes them; weights to a byte; nothing of the measurement is left."
    model,processor = from_pretrained(str(ROOT/'vlm_ft'/'base'), dtype='float32', device='cpu')
    model = get_peft_model(model, r=4); family = family_for(model)
    before,mode = [p.clone() for p in model.parameters()],model.training
    got = plan(model, ROWS, gpu_gib=2, processor=processor)
    assert [l['max'] for l in got.tokens][-1]==max(len(encode(r, processor, family)['input_ids']) for r in ROWS)
    assert sum(p['GiB'] for p in got.parts[:2])*2**30==pytest.approx(sum(p.nbytes for p in model.parameters()), abs=1)
    assert got.fits[True,True]==3 and got.needed<=2 and set(got.seconds)=={'step','pictures'}   # all there are
    assert mode==model.training and all(torch.equal(a, b) for a,b in zip(before, model.parameters())) and not any(p.grad is not None for p in model.parameters())

def test_what_does_not_fit():
    _,processor = tiny('qwen2_vl')
    model = get_peft_model(tiny('qwen2_vl')[0], r=4)
    big = [{'image':drawn('x', (220,220)), 'question':'q', 'answer':'x'*400}]
    none = plan(model, big*3, gpu_gib=.701, processor=processor)
    assert none.fits[True,True]==0 and none.sentence.startswith('Not one row fits')
    base_of(model).max_seq_length = 100
    assert '3 of 3 rows are longer than max_seq_length=100' in plan(model, big*3, gpu_gib=2, processor=processor).sentence

def test_the_benchmark(tmp_path):
    "Its logic, on a small model without a GPU: a case, once."
    run = lambda: subprocess.run([sys.executable, ROOT/'benchmarks'/'plan.py', '--tiny', '--setting', '4 bit, no vision', '--out', tmp_path/'out.jsonl'], capture_output=True, text=True).stdout
    first = run()
    lines = [json.loads(l) for l in (tmp_path/'out.jsonl').read_text().splitlines()]
    assert len(lines)==1 and not any('error' in l for l in lines), first
    for l in lines: assert l['weights_gib']==pytest.approx(l['planned']['weights']+l['planned']['adapters'], rel=1e-6)
    run(); assert len((tmp_path/'out.jsonl').read_text().splitlines())==1                      # nothing is done twice
