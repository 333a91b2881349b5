"The switch: training with rows packed is training with rows padded, step by step, for every family."
from functools import partial
import pytest, torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import AttentionInterface, TrainingArguments
from vlm_ft import packing
from vlm_ft.kernels.lora import FusedLora, multiplies_bf16
from vlm_ft.lora import get_peft_model
from vlm_ft.data import encode
from vlm_ft.features import FeatureCache, image_keys, with_features
from vlm_ft.messages import to_messages
from vlm_ft.models.family import base_of, family_for
from vlm_ft.models.tiny import FAMILIES, drawn, tiny
from vlm_ft.packing import pack_batch, packed, packed_loss
from vlm_ft.planning import PLANNED, hollow, sixteen_bit
from vlm_ft.setup import VisionDataCollator, VisionTrainingArguments
from vlm_ft.training import VisionTrainer

def rows():
    "Text alone, one and two pictures, answers of 1 to 60 characters."
    out = [{'image':drawn(str(i), (30+9*i, 28+5*(i%3))), 'question':'Read.', 'answer':str(i)*(1+5*i)} for i in range(8)]
    out[2] = [{'role':'user','content':'No picture?'}, {'role':'assistant','content':'None.'}]
    out[5] = [{'role':'user','content':[{'type':'image','image':drawn('a', (40,90))}, {'type':'text','text':'and'}, {'type':'image','image':drawn('b')}]}, {'role':'assistant','content':'two'}]
    return out

def run(name, folder, steps=20, parts=None, times=1, **kwargs):
    "Losses of a run, and the weights it ends with."
    model,processor = tiny(name)
    torch.manual_seed(0)
    model = get_peft_model(model, r=4, **parts or {})
    args = VisionTrainingArguments(output_dir=str(folder), max_steps=steps, logging_steps=1, per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=1e-3, save_strategy='no', **{'half_products':False, **kwargs})
    trainer = VisionTrainer(model, args, train_dataset=rows()*times, processing_class=processor, progress=False)
    trainer.train()
    return [l['loss'] for l in trainer.state.log_history if 'loss' in l], {n:p.detach().clone() for n,p in model.named_parameters() if p.requires_grad}, trainer

@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('checkpointing', (True, False))
def test_twenty_steps_both_ways(name, checkpointing, tmp_path):
    packed,weights,_ = run(name, tmp_path, packing=True, gradient_checkpointing=checkpointing)
    padded,plain,_ = run(name, tmp_path, packing=False, gradient_checkpointing=checkpointing)
    assert packed[-1] < packed[0]
    assert max(abs(a-b)/b for a,b in zip(packed, padded)) < 2e-4                       # Adam doubles what float32 rounds, step after step
    assert abs(packed[0]-padded[0]) < 1e-5*padded[0]
    gap = max(((weights[n]-plain[n]).norm()/plain[n].norm()).item() for n in plain if 'lora_A' in n)
    assert gap < 1e-3, gap

@pytest.mark.parametrize('name', FAMILIES)
def test_twenty_steps_with_every_lever_and_with_none(name, tmp_path):
    "Packed passes, blocks run again where memory asks for it, kept features, adapters in one pass; beside transformers' padded step with PEFT's own layers. (Compiled blocks: test_cuda; half products: below.)"
    language = {'finetune_vision_layers':False}                                        # a frozen tower, whose features can be kept
    fast,ours,trainer = run(name, tmp_path/'fast', parts=language, activation_gib=1e-5, feature_cache_gib=1)
    assert trainer.packs and trainer.features.hits and all(l['keep all']<l['of'] for l in trainer.kept if l['MiB each']) and any(type(m) is FusedLora for m in trainer.model.modules())
    plain,theirs,trainer = run(name, tmp_path/'plain', parts={**language, 'fused':False}, packing=False, gradient_checkpointing=False, feature_cache_gib=0, flash_attention_4=False)
    assert not (trainer.packs or trainer.recompute or trainer.features or any(type(m) is FusedLora for m in trainer.model.modules()))
    assert max(abs(a-b)/b for a,b in zip(fast, plain)) < 2e-4 and abs(fast[0]-plain[0]) < 1e-5*plain[0]
    gap = max(((ours[n]-theirs[n]).norm()/theirs[n].norm()).item() for n in theirs if 'lora_A' in n)
    assert gap < 1e-3, gap

@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('part', ('finetune_vision_layers','finetune_language_layers'))
def test_parts(name, part, tmp_path):
    packed,padded = (run(name, tmp_path, 4, {part:False}, packing=p)[0] for p in (True, False))
    assert max(abs(a-b)/b for a,b in zip(packed, padded)) < 2e-5

@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_bytes_and_numbers_are_the_same_pass(name, dtype):
    "Loss, every gradient, and what reaches the patch embedding: those of the processor's own numbers, to the last bit; kept features too."
    model,processor = tiny(name, dtype)
    model,family = get_peft_model(model, r=4),family_for(model)
    base,seen,found = base_of(model),[],[]
    for n,p in model.named_parameters():
        if 'lora_B' in n: p.data.normal_(0, .2, generator=torch.Generator().manual_seed(len(n)))
    conv = next(m for m in base.get_submodule(family.vision).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d)))
    conv.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    small = pack_batch([encode(to_messages(r), processor, family) for r in rows()], family)
    large = {k:v for k,v in small.items() if k!='byte_values'} | {'pixel_values':family.numbers(small, small['byte_values'])}
    assert small['pixel_values'].dtype==torch.uint8 and large['pixel_values'].dtype==torch.float32
    for batch in (small, large):
        model.zero_grad(set_to_none=True)
        with packed(model, family): loss = packed_loss(model, batch)
        loss.backward()
        found.append((loss, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert torch.equal(*seen) and seen[0].dtype==dtype and all(map(torch.equal, *found)) and len(found[0])>20
    with torch.no_grad():
        a,b = (with_features(model, {**batch, 'image_keys':image_keys(batch, family)}, family, FeatureCache(1)) for batch in (small, large))
    key = 'cross_attention_states' if name=='mllama' else 'inputs_embeds'
    assert torch.equal(a[key], b[key]) and set(a)==set(b) and not {'byte_values','pixel_values'}&set(a)

def test_what_crosses_to_the_device_is_bytes(tmp_path):
    _,_,trainer = run('qwen2_vl', tmp_path, 1)
    batch = next(b for b in trainer.get_train_dataloader() if 'pixel_values' in b)
    assert batch['pixel_values'].dtype==torch.uint8 and batch['byte_values'].shape==(3,256)

def test_attention_is_as_before_after_training(tmp_path):
    losses,_,trainer = run('qwen2_vl', tmp_path, 2)
    family = family_for(trainer.model)
    assert {base_of(trainer.model).get_submodule(p).config._attn_implementation for p in family.packs} == {'sdpa'}
    assert 'row_bounds' in next(iter(trainer.get_train_dataloader())) and not trainer.data_collator.packing

def test_when_rows_are_padded(tmp_path):
    model,processor = tiny('qwen2_vl')
    model = get_peft_model(model, r=4)
    make = lambda args, **kwargs: VisionTrainer(model, args, train_dataset=rows(), processing_class=processor, progress=False, **kwargs)
    plain = dict(output_dir=str(tmp_path), remove_unused_columns=False, report_to='none', save_strategy='no')
    assert make(TrainingArguments(**plain)).packs                                       # transformers' arguments have no such switch
    assert not make(VisionTrainingArguments(output_dir=str(tmp_path), packing=False)).packs
    assert not make(VisionTrainingArguments(output_dir=str(tmp_path)), compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()).packs
    collator = VisionDataCollator(model, processor)
    assert not make(VisionTrainingArguments(output_dir=str(tmp_path)), data_collator=lambda examples: collator(examples)).packs

def test_full_finetuning(tmp_path):
    "The last layer's own gradient, too."
    losses = []
    for is_packed in (True, False):
        model,processor = tiny('pixtral')
        args = VisionTrainingArguments(output_dir=str(tmp_path), max_steps=3, logging_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_strategy='no', packing=is_packed, optim='sgd', learning_rate=.1)
        model.requires_grad_(True)
        trainer = VisionTrainer(model, args, train_dataset=rows(), processing_class=processor, progress=False)
        trainer.train()
        losses.append([l['loss'] for l in trainer.state.log_history if 'loss' in l])
    assert max(abs(a-b)/b for a,b in zip(*losses)) < 1e-5

@pytest.mark.parametrize('name', FAMILIES)
def test_twenty_steps_with_peft_s_own_layers(name, tmp_path):
    (ours,weights,_),(theirs,plain,_) = (run(name, tmp_path, parts={'fused':f}) for f in (True, False))
    assert max(abs(a-b)/b for a,b in zip(ours, theirs)) < 2e-4 and abs(ours[0]-theirs[0]) < 1e-5*theirs[0]
    assert max(((weights[n]-plain[n]).norm()/plain[n].norm()).item() for n in plain if 'lora_A' in n) < 1e-3

@pytest.mark.parametrize('name', FAMILIES)
def test_features_are_kept_over_epochs(name, tmp_path):
    parts = {'finetune_vision_layers':False}
    kept,weights,trainer = run(name, tmp_path, parts=parts, feature_cache_gib=1)
    new,plain,other = run(name, tmp_path, parts=parts, feature_cache_gib=0)
    assert trainer.features.misses==8 and trainer.features.hits>20 and other.features is None      # eight pictures, several epochs
    assert max(abs(a-b)/b for a,b in zip(kept, new)) < 2e-4 and abs(kept[0]-new[0]) < 1e-5*new[0]
    assert max(((weights[n]-plain[n]).norm()/plain[n].norm()).item() for n in plain if 'lora_A' in n) < 1e-3
    written,same,trainer = run(name, tmp_path, parts=parts, feature_cache_gib=0, feature_cache_disk_gib=1)
    assert written==kept and len(trainer.features.written)==8 and not trainer.features.kept and all(map(torch.equal, same.values(), weights.values()))
    assert run(name, tmp_path, 1, feature_cache_gib=1)[2].features is None                         # a tower that trains looks each time

@pytest.mark.parametrize('name', FAMILIES)
def test_twenty_steps_with_factors_in_bfloat16(name, tmp_path):
    rows_a_pass = dict(tokens_per_pass=1000, times=3)                                                        # more tokens than fit one product of them
    half,exact = (run(name, tmp_path, half_products=h, **rows_a_pass)[0] for h in (True, False))
    assert max(abs(a-b)/b for a,b in zip(half, exact)) < 1e-3 and abs(half[0]-exact[0]) < 2e-4*exact[0]
    assert half!=exact or not multiplies_bf16()

@pytest.mark.parametrize('newest', (True, False))
def test_which_kernel_rows_attend_by(newest, tmp_path, monkeypatch):
    "The argument reaches both parts as the name of an attention function, and the function as what it may use."
    asked,real = [],packing.packed_attention
    def attend(*args, newest=True, **kwargs): asked.append((newest, kwargs.get('cu_seq_lens_q') is not None)); return real(*args, newest=newest, **kwargs)
    known = AttentionInterface()
    assert known[packing.PACKED] is real and known[packing.PACKED_TORCH].func is real
    for name in (packing.PACKED, packing.PACKED_TORCH):
        own = known[name]
        monkeypatch.setitem(AttentionInterface._global_mapping, name, partial(attend, **getattr(own, 'keywords', {})))
    run('pixtral', tmp_path, steps=1, flash_attention_4=newest)
    assert set(asked)=={(newest, True), (newest, False)}                     # the tower and the language model

def without_values(name, batch, known=None):
    "The batch's loss over tensors that have shapes and no values, backward too; with `known` features in place of pictures."
    net,mode = hollow(tiny(name)[0].config, adapt=lambda m: get_peft_model(m, r=4, finetune_vision_layers=known is None), dtype=torch.float32)
    family = family_for(net)
    for path in family.packs: net.get_submodule('base_model.model.'+path).config._attn_implementation = PLANNED
    with mode, sixteen_bit(base_of(net)):
        batch = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k,v in batch.items()}
        if known: batch = with_features(net, batch, family, known)
        packed_loss(net, batch, 7).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)

def batch_of(name):
    model,processor = tiny(name)
    family = family_for(model)
    return model,family,family.pixels(pack_batch([encode(to_messages(r), processor, family) for r in rows()], family))

@pytest.mark.parametrize('name', ('qwen2_vl','mllama'))
def test_a_pass_waits_for_no_number(name, monkeypatch):
    "Where tensors have no values, to ask for one, and so to wait for a GPU's answer, is an error: Qwen2-VL and Llama 3.2 Vision ask for none, forwards and backwards; Qwen2-VL would, did transformers' model see the pictures by itself."
    _,family,batch = batch_of(name)
    without_values(name, batch)
    if name=='mllama': return
    monkeypatch.setattr(type(family), 'see', lambda self, model, batch: batch)
    with pytest.raises(DataDependentOutputException): without_values(name, batch)

@pytest.mark.parametrize('name', ('qwen2_vl','mllama'))
def test_nor_for_where_a_known_picture_ends(name):
    model,family,batch = batch_of(name)
    cache,batch = FeatureCache(1),{**batch, 'image_keys':image_keys(batch, family)}
    with_features(model, dict(batch), family, cache)
    without_values(name, dict(batch), cache)
    cache.kept.popitem()
    with pytest.raises(DataDependentOutputException): without_values(name, dict(batch), cache)     # one that is not known is looked for, and that asks
