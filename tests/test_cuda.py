"What only a GPU can show: packed rows in float64 and 16 bit beside the rows alone, the kernels, and a trainer that runs there. `pytest --cuda tests/test_cuda.py`"
import copy, os, subprocess, sys
from contextlib import nullcontext
import pytest, torch, torch.nn.functional as F
from transformers.models.mllama.modeling_mllama import _prepare_aspect_ratio_attention_mask
from vlm_ft.data import encode
from vlm_ft.evaluation.decoding import Writer, at_work
from vlm_ft.kernels.attention import bounds, has_flash_attention_4
from vlm_ft.kernels.compiled import BlockGraphs
from vlm_ft.loading import for_training
from vlm_ft.lora import get_peft_model
from vlm_ft.models.family import base_of, family_for
from vlm_ft.models.mllama import text_groups, tower_groups
from vlm_ft.models.tiny import FAMILIES, drawn, tiny
from vlm_ft.packing import pack_batch, packed, packed_attention, packed_loss
from vlm_ft.recompute import RunAgain, kinds_of_blocks
from vlm_ft.setup import VisionTrainingArguments, pad_batch
from vlm_ft.training import VisionTrainer

pytestmark = pytest.mark.cuda

def rows(n=6):
    out = [{'image':drawn(str(i), (40+30*i, 28+9*(i%3))), 'question':'Read.', 'answer':str(i)*(1+7*i)} for i in range(n)]
    out[2] = {'messages':[{'role':'user','content':'No picture?'}, {'role':'assistant','content':'None.'}]}
    return out

def adapted(name):
    model,processor = tiny(name)
    model = get_peft_model(model, r=4)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n,p in model.named_parameters():
            if 'lora_B' in n: p.copy_(torch.randn(p.shape, generator=g)*.2)
    return model,processor,family_for(model)

def step(model, family, batch, dtype=None):
    "Loss and gradients of a packed batch on the model's device."
    batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k,v in batch.items()}
    model.zero_grad(set_to_none=True)
    with packed(model, family):                                               # in the backward pass too: a checkpointed block runs again as it ran
        with torch.autocast('cuda', dtype, enabled=dtype is not None): loss = packed_loss(model, batch)
        loss.backward()
    return loss.item(),{n:p.grad.detach().float().cpu() for n,p in model.named_parameters() if p.grad is not None}

def plain(model, family, features):
    "The same of the rows one at a time, on the CPU, without any hook of ours."
    model = copy.deepcopy(model)
    for m in model.modules(): m._forward_pre_hooks.clear(); m._forward_pre_hooks_with_kwargs.clear()
    n,total = sum((f['labels']!=-100).sum().item() for f in features),0.
    for f in features:
        loss = model(**pad_batch([f], family, 0), num_items_in_batch=torch.tensor(n)).loss
        loss.backward(); total += loss.item()
    return total,{k:p.grad for k,p in model.named_parameters() if p.grad is not None}

@pytest.mark.parametrize('name', FAMILIES)
def test_float64_is_exact(name):
    """Over weights in float64, so that what differs is not rounding. Norms and rotary angles are float32 in transformers' own models, and a GPU rounds them in other places:
    noise of 6e-8 in them alone, on the CPU, moves some gradients of Llama 3.2 Vision by 1e-5 of the largest."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False   # a convolution cuts pictures into patches
    model,processor,family = adapted(name)
    features,model = [encode(r, processor, family) for r in rows()],model.double()
    want,grads = plain(model, family, features)
    loss,ours = step(model.cuda(), family, pack_batch(features, family))
    assert abs(loss-want)<1e-5*want and grads.keys()==ours.keys()
    for n in grads: assert (grads[n]-ours[n]).abs().max() <= 4e-5*grads[n].abs().max()+1e-9, n

@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('weights', (torch.float32, torch.bfloat16))
def test_bfloat16_is_near(name, weights):
    "Under autocast, over weights in either dtype and adapters in float32; and it is not padding or another row that it sees."
    model,processor,family = adapted(name)
    features = [encode(r, processor, family) for r in rows()]
    want,grads = plain(model, family, features)
    for n,p in model.named_parameters():
        if 'lora' not in n: p.data = p.data.to(weights)
    loss,ours = step(model.cuda(), family, pack_batch(features, family), torch.bfloat16)
    assert abs(loss-want)<2e-2*want
    a,b = (torch.cat([g[n].flatten() for n in sorted(grads)]) for g in (grads, ours))
    assert F.cosine_similarity(a, b, 0)>.98

@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('lever', ('compiled', 'run again', 'inputs aside'))
def test_a_lever_changes_no_gradient(name, lever):
    "In bfloat16, every block run again in the backward pass; beside the same without the lever."
    model,processor,family = adapted(name)
    model = for_training(model.cuda())
    for blocks in kinds_of_blocks(model).values():
        for b in blocks: b.gradient_checkpointing = True
    batch = pack_batch([encode(r, processor, family) for r in rows()], family)
    with RunAgain(model) if lever=='inputs aside' else nullcontext(): want,grads = step(model, family, batch, torch.bfloat16)
    with BlockGraphs(model) if lever=='compiled' else RunAgain(model, aside=lever=='inputs aside', least=1): loss,ours = step(model, family, batch, torch.bfloat16)
    exact = (name,lever)!=('mllama','run again')                                               # Llama 3.2 Vision's tower is looked at by many blocks: another order of summing
    if lever!='compiled': assert loss==want and all(torch.equal(grads[n], ours[n]) if exact else (grads[n]-ours[n]).abs().max()<=1e-2*grads[n].abs().max() for n in grads)
    a,b = (torch.cat([g[n].flatten() for n in sorted(grads)]) for g in (grads, ours))
    assert abs(loss-want)<1e-2*want and F.cosine_similarity(a, b, 0)>.995

def test_inputs_aside_take_less_memory():
    model,processor,family = adapted('qwen2_vl')
    model = for_training(model.cuda())
    for blocks in kinds_of_blocks(model).values():
        for b in blocks: b.gradient_checkpointing = True
    batch = pack_batch([encode({**r, 'image':drawn(str(i), (900, 700))}, processor, family) for i,r in enumerate(rows()[:2])], family)
    def kept(within):
        "Bytes between forward and backward."
        moved = {k: v.cuda() if torch.is_tensor(v) else v for k,v in batch.items()}
        before = torch.cuda.memory_allocated()
        with packed(model, family), within, torch.autocast('cuda', torch.bfloat16):
            loss = packed_loss(model, moved)
            torch.cuda.synchronize(); n = torch.cuda.memory_allocated()-before
            loss.backward()
        return n
    step(model, family, batch, torch.bfloat16)
    assert kept(RunAgain(model, aside=True, least=2**12))<.8*kept(nullcontext())

@pytest.mark.parametrize('name', FAMILIES)
def test_recorded_steps_answer_as_steps_that_are_launched(name):
    "In float32, rows that come and go; text rows beside rows with pictures."
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model,processor = tiny(name)
    model,family,answers = model.cuda(),family_for(model),[]
    features = [encode(r, processor, family, prompt_only=True) for r in [{'messages':[{'role':'user','content':'No picture yet.'}]}, *rows(8)]]
    for whole in (False, True):
        writer = Writer(model, family, 4, max(len(f['input_ids']) for f in features)+140, set(range(0, 300, 37)), 140, whole=whole)
        with at_work(model, family): answers.append(dict(writer.run(enumerate(features), refill=.5)))
    assert answers[0]==answers[1] and len({len(ids) for ids in answers[0].values()})>1
    assert writer.recorded.fails is None and writer.recorded.takes

@pytest.mark.parametrize('heads,size', (((16,16),80), ((12,2),128), ((16,16),64)))
@pytest.mark.parametrize('causal', (True, False))
@pytest.mark.parametrize('newest', (True, False))
def test_attention_in_one_kernel(heads, size, causal, newest):
    "The variable-length kernels, flash-attn-4's and torch's, against float64, row by row; outputs and gradients."
    if newest and not has_flash_attention_4(): pytest.skip('flash-attn-4 is not installed, or has no kernels for this GPU')
    lengths,module = [5,130,1,77],torch.nn.Module()
    module.is_causal,module.num_key_value_groups = causal,heads[0]//heads[1]
    g = torch.Generator().manual_seed(0)
    wide = [torch.randn(1, h, sum(lengths), size, generator=g).bfloat16() for h in (heads[0], heads[1], heads[1])]
    up = torch.randn(1, sum(lengths), heads[0], size, generator=g).bfloat16()
    found = []
    for device,dtype in (('cuda',torch.bfloat16), ('cpu',torch.float64)):
        qkv = [t.to(device, dtype).requires_grad_() for t in wide]
        out,_ = packed_attention(module, *qkv, None, row_bounds=bounds(lengths).to(device), longest_row=max(lengths), newest=newest)
        found.append([t.detach().cpu().double() for t in (out, *torch.autograd.grad(out, qkv, up.to(device, dtype)))])
    for a,b in zip(*found): assert (a-b).norm()<.02*b.norm()

@pytest.mark.parametrize('name', FAMILIES)
def test_trains(name, tmp_path):
    model,processor = tiny(name)
    model = get_peft_model(model.to(torch.bfloat16).cuda(), r=4)
    args = VisionTrainingArguments(str(tmp_path), max_steps=30, logging_steps=5, per_device_train_batch_size=6, gradient_accumulation_steps=1, learning_rate=5e-3, save_strategy='no', dataloader_num_workers=2)
    trainer = VisionTrainer(model, args, train_dataset=rows(), processing_class=processor)
    trainer.train()
    losses = [l['loss'] for l in trainer.state.log_history if 'loss' in l]
    assert args.bf16 and losses[-1]<.85*losses[0] and trainer.kept and {p.dtype for p in model.parameters() if p.requires_grad}=={torch.float32}

def test_a_step_that_does_not_fit_says_what_would(tmp_path):
    model,processor = tiny('qwen2_vl')
    model = get_peft_model(model.cuda(), r=4)
    pages = [{**r, 'image':drawn(str(i), (1200, 900))} for i,r in enumerate(rows()[:2])]
    trainer = VisionTrainer(model, VisionTrainingArguments(str(tmp_path), max_steps=1, save_strategy='no'), train_dataset=pages, processing_class=processor, progress=False)
    torch.cuda.empty_cache()                                                  # what earlier tests left would do
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved()+2**20)/torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError, match='(?s)GiB were asked for.*per_device_train_batch_size=1'): trainer.train()
    finally: torch.cuda.set_per_process_memory_fraction(1.)
    assert base_of(model).dtype==torch.float32

def of_a_tower():
    "Patches of pictures see all four tiles, the rest sees the patches: q, k, v, groups, transformers' mask."
    tiles,patches,filled,size,g = [2,4,1],145,152,80,torch.Generator().manual_seed(0)
    mask = _prepare_aspect_ratio_attention_mask((torch.arange(4)<torch.tensor(tiles)[:,None]).long(), patches, filled, torch.float64)
    return *(torch.randn(len(tiles), 4, 4*filled, size, generator=g) for _ in range(3)),lambda device: tower_groups(tiles, 4, patches, filled, device),mask

def of_a_text():
    "Three rows: one with text before and after two pictures, one without a picture, one of one tile; fewer heads of keys."
    runs,tile_keys,size,g = [[(3,[0,1,2,3,4,5,6,7],0), (20,[0,1],1), (60,[0,1,4,5,6],1)], [(30,[],0)], [(40,[8],1)]],145,128,torch.Generator().manual_seed(0)
    mask,at = torch.full((1, 1, 153, 12*tile_keys), -torch.inf, dtype=torch.float64),0
    for row in runs:
        for n,tiles,_ in row:
            for t in tiles: mask[...,at:at+n,t*tile_keys:(t+1)*tile_keys] = 0
            at += n
    return *(torch.randn(1, h, n, size, generator=g) for h,n in ((12,153), (2,12*tile_keys), (2,12*tile_keys))),lambda device: text_groups(runs, tile_keys, device),mask

@pytest.mark.parametrize('newest', (True, False))
@pytest.mark.parametrize('case', (of_a_tower, of_a_text))
def test_attention_in_groups(case, newest):
    "Llama 3.2 Vision's two cases without a mask, against the mask in float64, outputs and gradients; who sees nothing gets zeros."
    if newest and not has_flash_attention_4(): pytest.skip('flash-attn-4 is not installed, or has no kernels for this GPU')
    *wide,groups,mask = case()
    blind = (mask!=0).all(-1, keepdim=True)                                        # (batch, 1, tokens, 1)
    up,found = torch.randn(wide[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16().transpose(1, 2),[]
    for device,dtype in (('cuda',torch.bfloat16), ('cpu',torch.float64)):
        qkv = [t.bfloat16().to(device, dtype).requires_grad_() for t in wide]
        if device=='cuda': out = packed_attention(torch.nn.Module(), *qkv, groups(device), newest=newest)[0]
        else: out = F.scaled_dot_product_attention(*qkv, mask.masked_fill(blind, 0), enable_gqa=True).masked_fill(blind, 0).transpose(1, 2)
        found.append([out.detach().cpu().double(), *(t.cpu().double() for t in torch.autograd.grad(out, qkv, up.to(device, dtype)))])
    for a,b in zip(*found): assert (a-b).norm()<.02*b.norm()

def test_segments_grow_after_an_import_that_asked_the_gpu():
    "Where torch read its settings before the model came, an hour of training would end in memory that lies in pieces."
    lines = ("import torch; torch.cuda.get_device_properties(0)", "from vlm_ft import FastVisionModel, VisionTrainer", "from vlm_ft.demo import BASE", "model,_ = FastVisionModel.from_pretrained(BASE)",
             "segments = torch.cuda.memory._snapshot()['segments']", "assert segments and all(s['is_expandable'] for s in segments), segments")
    env = {k:v for k,v in os.environ.items() if k not in ('PYTORCH_ALLOC_CONF','PYTORCH_CUDA_ALLOC_CONF')}
    done = subprocess.run([sys.executable, '-c', '\n'.join(lines)], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]

def test_state_aside_changes_no_step(tmp_path):
    "AdamW's moments wait in the processor's memory; the weights are those of a run in which they do not."
    weights = []
    for aside in (True, False):
        model,processor,_ = adapted('qwen2_vl')
        args = VisionTrainingArguments(output_dir=str(tmp_path/str(aside)), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=1, save_strategy='no', dataloader_num_workers=0, activation_gib=0)
        trainer = VisionTrainer(model.cuda(), args, train_dataset=rows(), processing_class=processor, progress=False)
        trainer.aside = aside
        trainer.train()
        held = {t.device.type for s in trainer.optimizer.state.values() for t in s.values() if t.numel()>=2**8}
        assert held=={'cpu' if aside else 'cuda'}, held
        weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    for a,b in zip(*weights): assert torch.equal(a, b)
