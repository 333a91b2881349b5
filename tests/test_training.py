"One optimizer step is one step, however its rows are cut and whoever takes it; whole weights resume on every family."
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from vlm_ft.data import count_tokens
from vlm_ft.writers import as_dataset
from vlm_ft.lora import get_peft_model
from vlm_ft.models.family import family_for
from vlm_ft.models.tiny import FAMILIES, drawn, tiny
from vlm_ft.setup import VisionDataCollator, VisionTrainingArguments
from vlm_ft.training import VisionTrainer

torch.set_num_threads(1)

def row(answer, *pictures):
    "One question about some pictures, the text before them."
    ask = [{'type':'text','text':'Read this.'}, *({'type':'image','image':drawn(p, (56,56))} for p in pictures)]
    return {'messages':[{'role':'user','content':ask}, {'role':'assistant','content':answer}]}

ROWS = [row('no', 'a'), row('x'*400, 'b'), row('yes'), row('a b c', 'c', 'd'), row('ok', 'e'), row('y '*30+'y', 'f'), row('1'), row('hm, hm', 'g')]

def adapted(name, **kwargs):
    "A tiny model with an adapter whose B is not zero, so that every gradient counts."
    model,processor = tiny(name)
    model = get_peft_model(model, r=4, **kwargs)
    torch.manual_seed(0)
    with torch.no_grad():
        for n,p in model.named_parameters():
            if 'lora_B' in n: p.normal_(std=0.02)
    return model,processor

class Gradients(TrainerCallback):
    "Keeps the gradients of the first step."
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads = {n:p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}

ONE_STEP = dict(max_steps=1, logging_steps=1, max_grad_norm=0, use_cpu=True, save_strategy='no', report_to='none', seed=1)
EXACT = dict(ONE_STEP, half_products=False)   # float32 on every machine

def our_step(model, processor, batch, accumulate, folder, data=ROWS):
    "Loss and gradients of one step of VisionTrainer over all rows."
    seen = Gradients()
    args = VisionTrainingArguments(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, **EXACT)
    out = VisionTrainer(model, args, train_dataset=data, processing_class=processor, callbacks=[seen], progress=False).train()
    return out.training_loss,seen.grads

def gap(a, b):
    "Largest relative difference, of the losses or of any weight's gradients."
    assert a[1].keys()==b[1].keys()
    return max(abs(a[0]-b[0])/abs(a[0]), *(((a[1][n]-b[1][n]).abs().max()/a[1][n].abs().max()).item() for n in a[1]))

@pytest.mark.parametrize('name', FAMILIES)
def test_rows_times_accumulation(name, tmp_path):
    model,processor = adapted(name)
    whole = our_step(model, processor, 8, 1, tmp_path)
    assert len(whole[1])>10 and all(g.abs().max()>0 for g in whole[1].values())
    for batch,accumulate in ((2,4),(1,8)): assert gap(whole, our_step(model, processor, batch, accumulate, tmp_path))<=1e-5

def test_a_dataset_or_a_file_trains_as_its_list_does(tmp_path):
    model,processor = adapted('qwen2_vl')
    ours = our_step(model, processor, 8, 1, tmp_path)
    assert gap(ours, our_step(model, processor, 8, 1, tmp_path, as_dataset(ROWS)))<=1e-5
    lines = [json.loads(json.dumps(r, default=lambda im: 'pic.png')) for r in ROWS]          # pictures by reference
    for i,(r,line) in enumerate(zip(ROWS, lines)):
        for part,written in zip(r['messages'][0]['content'], line['messages'][0]['content']):
            if part['type']=='image': part['image'].save(tmp_path/f"{i}_{id(part)}.png"); written['image'] = f"{i}_{id(part)}.png"
    (tmp_path/'rows.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    assert gap(ours, our_step(model, processor, 8, 1, tmp_path, tmp_path/'rows.jsonl'))<=1e-5

@pytest.mark.parametrize('name', FAMILIES)
def test_plain_transformers_and_torch_take_the_same_step(name, tmp_path):
    model,processor = adapted(name)
    ours = our_step(model, processor, 2, 4, tmp_path)
    collator = VisionDataCollator(model, processor)
    batches = [collator([r]) for r in ROWS]                                    # every row alone, the sum over all answer tokens
    model.zero_grad()
    n = sum((b['labels'][:,1:]!=-100).sum() for b in batches)
    total = 0.
    for b in batches:
        logits = model(**{k:v for k,v in b.items() if k!='labels'}).logits
        loss = torch.nn.functional.cross_entropy(logits[0,:-1], b['labels'][0,1:], reduction='sum')/n
        loss.backward(); total += loss.item()
    assert gap(ours, (total, {n:p.grad for n,p in model.named_parameters() if p.grad is not None}))<=1e-5

@pytest.mark.parametrize('name', FAMILIES)
def test_trl_takes_the_same_step(name, tmp_path):
    from trl import SFTConfig, SFTTrainer
    model,processor = adapted(name)
    ours,seen = our_step(model, processor, 2, 4, tmp_path),Gradients()
    args = SFTConfig(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, bf16=False, remove_unused_columns=False, dataset_text_field='',
                     dataset_kwargs={'skip_prepare_dataset':True}, max_length=None, gradient_checkpointing_kwargs={'use_reentrant':False}, **ONE_STEP)
    trainer = SFTTrainer(model, args, train_dataset=as_dataset(ROWS), processing_class=processor, data_collator=VisionDataCollator(model, processor), callbacks=[seen])
    out = trainer.train()
    assert gap(ours, (out.training_loss, seen.grads))<=1e-5
    collator = VisionDataCollator(model, processor)
    told = [l['num_tokens'] for l in trainer.state.log_history if 'num_tokens' in l][-1]
    assert told==sum(len(collator.encode(r)['input_ids']) for r in ROWS)          # padding is not counted

def whole_weights(name, folder, seed=0, resume=None, **kwargs):
    "Four steps of all weights, a checkpoint after two."
    model,processor = tiny(name, seed=seed)
    model.full_finetuning = True
    model = get_peft_model(model)
    args = VisionTrainingArguments(folder, use_cpu=True, report_to='none', **{'max_steps':4, 'logging_steps':1, 'save_steps':2, 'per_device_train_batch_size':2, 'gradient_accumulation_steps':1,
                                   'learning_rate':1e-3, 'save_strategy':'steps', **kwargs})
    trainer = VisionTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:2] if 'eval_strategy' in kwargs else None, processing_class=processor, progress=False)
    trainer.train(resume_from_checkpoint=resume)
    return SimpleNamespace(model=model, trainer=trainer, losses=[l['loss'] for l in trainer.state.log_history if 'loss' in l])

@pytest.mark.parametrize('name', FAMILIES)
def test_whole_weights_resume(name, tmp_path):
    once = whole_weights(name, tmp_path)
    again = whole_weights(name, tmp_path, seed=1, resume=tmp_path/'checkpoint-2')  # other weights in memory: all must come from the checkpoint
    assert once.losses==again.losses
    for (n,a),b in zip(once.model.named_parameters(), again.model.parameters()): assert torch.equal(a, b), n

def test_the_best_whole_weights_come_back(tmp_path):
    best = whole_weights('qwen2_vl', tmp_path, max_steps=3, save_steps=1, eval_steps=1, eval_strategy='steps', learning_rate=0.5, lr_scheduler_type='constant', warmup_steps=0,
                         load_best_model_at_end=True, metric_for_best_model='eval_loss', greater_is_better=False)
    losses = [l['eval_loss'] for l in best.trainer.state.log_history if 'eval_loss' in l]
    assert losses[-1]!=min(losses)                                              # the last weights are not the best, or nothing is tested
    assert best.trainer.evaluate()['eval_loss']==min(losses)

@pytest.mark.parametrize('name', FAMILIES)
def test_frozen_vision_costs_nothing_under_plain_peft(name, tmp_path):
    "PEFT and transformers would make the inputs of every part require gradients once checkpointing is on."
    from peft import LoraConfig
    from peft import get_peft_model as wrap
    model,processor = tiny(name)
    family = family_for(model)
    found,first = [],lambda out: out if torch.is_tensor(out) else out[0]
    model.get_submodule(family.vision).register_forward_hook(lambda m,i,out: found.append(first(out).requires_grad))
    model = wrap(model, LoraConfig(r=4, target_modules=family.targets(vision=False)))
    our_step(model, processor, 8, 1, tmp_path)
    assert found==[False]

@pytest.mark.parametrize('make', ['transformers','trl'])
def test_other_libraries_arguments_train(make, tmp_path):
    from transformers import TrainingArguments
    from trl import SFTConfig
    settings = dict(ONE_STEP, output_dir=str(tmp_path), per_device_train_batch_size=8, remove_unused_columns=False, bf16=False)
    if make=='trl': settings |= dict(dataset_text_field='', dataset_kwargs={'skip_prepare_dataset':True}, max_length=None)
    model,processor = adapted('qwen2_vl')
    args = (TrainingArguments if make=='transformers' else SFTConfig)(**settings)
    assert VisionTrainer(model, args, train_dataset=ROWS, processing_class=processor).train().global_step==1

def test_the_arguments_length_holds_for_a_collator_too(tmp_path):
    model,processor = adapted('qwen2_vl')
    args = VisionTrainingArguments(str(tmp_path), max_length=60, **EXACT)
    with pytest.raises(ValueError, match='Row 1'): VisionTrainer(model, args, train_dataset=ROWS, data_collator=VisionDataCollator(model, processor))
    given = VisionDataCollator(model, processor, max_seq_length=50)
    with pytest.raises(ValueError, match='50'): VisionTrainer(model, args, train_dataset=ROWS, data_collator=given)

def test_a_finished_run_is_not_resumed(tmp_path):
    model,processor = adapted('qwen2_vl')
    run = lambda steps: VisionTrainer(model, VisionTrainingArguments(str(tmp_path), **{**EXACT, 'max_steps':steps, 'save_strategy':'steps', 'save_steps':2}),
                                      train_dataset=ROWS, processing_class=processor, progress=False)
    run(2).train()
    with pytest.raises(ValueError, match='already at its last step'): run(2).train(resume_from_checkpoint=True)
    assert run(3).train(resume_from_checkpoint=True).global_step==3

def test_grouped_rows_take_the_same_step(tmp_path):
    "Grouping by length changes who is padded beside whom, and nothing else."
    model,processor = adapted('qwen2_vl')
    steps = []
    for strategy in ('random','group_by_length'):
        seen = Gradients()
        args = VisionTrainingArguments(str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, train_sampling_strategy=strategy, **EXACT)
        out = VisionTrainer(model, args, train_dataset=ROWS, processing_class=processor, callbacks=[seen], progress=False).train()
        steps.append((out.training_loss, seen.grads))
    assert gap(*steps)<=1e-5

def looked_at(name, folder, **kwargs):
    "Two epochs with dropout and rows in random order: losses and final weights."
    model,processor = adapted(name, lora_dropout=.3)
    args = VisionTrainingArguments(str(folder), use_cpu=True, report_to='none', save_strategy='no', num_train_epochs=2, logging_steps=1, per_device_train_batch_size=3, gradient_accumulation_steps=2,
                                   learning_rate=1e-3, seed=4, data_seed=9, **{k:v for k,v in kwargs.items() if k.startswith('eval_s') or k.startswith('per_device_eval')})
    trainer = VisionTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:3] if 'eval_strategy' in kwargs else None, processing_class=processor, progress=False, eval_generation=kwargs.get('eval_generation'))
    if most := kwargs.get('room'):
        def room(module, args, inputs):
            if not module.training and inputs['input_ids'].shape[0]>most: raise torch.OutOfMemoryError
        model.get_base_model().register_forward_pre_hook(room, with_kwargs=True)
    trainer.train()
    return [l['loss'] for l in trainer.state.log_history if 'loss' in l],{n:p.detach() for n,p in model.named_parameters() if p.requires_grad},trainer

@pytest.mark.parametrize('name', FAMILIES)
def test_a_run_that_is_looked_at_is_the_same_run(name, tmp_path, capsys, monkeypatch):
    "Evaluation by loss and by generation, out of memory on the way, changes no loss and no weight."
    from vlm_ft.evaluation.decoding import Writer
    from vlm_ft.progress import EvalByGeneration
    ask = dict(eval_strategy='steps', eval_steps=1, per_device_eval_batch_size=2)
    plain,admit = looked_at(name, tmp_path),Writer.admit
    def room(self, numbers, features):
        if self.slots.capacity>2: raise torch.OutOfMemoryError
        return admit(self, numbers, features)
    monkeypatch.setattr(Writer, 'admit', room)
    for looked in (looked_at(name, tmp_path, **ask, eval_generation=EvalByGeneration(max_new_tokens=4)), looked_at(name, tmp_path, **ask, eval_generation=EvalByGeneration(max_new_tokens=4, batch_size=3), room=1)):
        assert looked[0]==plain[0] and all(torch.equal(w, looked[1][n]) for n,w in plain[1].items())
        assert len(looked[2].history())==len(plain[0])>2
    said = capsys.readouterr().out
    assert 'Out of memory in an evaluation: going on with 1' in said and 'Out of memory with 3 rows at a time' in said

@pytest.mark.parametrize('packing', (True, False))
def test_half_precision_reaches_the_model(packing, tmp_path, monkeypatch):
    "With bf16 a 16-bit model's adapters, which are float32, run in one operation with their layers: products in 16 bit, packed or not."
    from vlm_ft.kernels.lora import FusedLora
    model,processor = tiny('qwen2_vl', torch.bfloat16)
    model,plain,found = get_peft_model(model, r=4),FusedLora.parts,[]
    monkeypatch.setattr(FusedLora, 'parts', lambda layer: found.append(plain(layer)) or found[-1])
    args = VisionTrainingArguments(tmp_path, packing=packing, bf16=True, **ONE_STEP)
    VisionTrainer(model, args, train_dataset=ROWS[:2], processing_class=processor, progress=False).train()
    assert found and all(found)

def small(name, folder, model=None, rows=ROWS, progress=False, **kwargs):
    "A trainer of a tiny model; what is no training argument goes to the trainer."
    model,processor = (model, tiny(name)[1]) if model is not None else adapted(name)
    own = {k:kwargs.pop(k) for k in ('eval_dataset','data_collator','optimizers','formatting_func','callbacks') if k in kwargs}
    if 'data_collator' in own: own['data_collator'] = own['data_collator'](model, processor)
    args = VisionTrainingArguments(folder, **{**dict(use_cpu=True, save_strategy='no', max_steps=2, logging_steps=1, seed=1, gradient_accumulation_steps=1), **kwargs})
    return VisionTrainer(model, args, train_dataset=rows, processing_class=processor, progress=progress, **own)

def test_evaluated_before_it_trains(tmp_path, capsys):
    trainer = small('qwen2_vl', tmp_path, progress=True)
    loss = trainer.evaluate(ROWS[:2])['eval_loss']
    assert f'{loss:.4g}'[:4] in capsys.readouterr().out
    trainer._paused = 1e6                                                                     # an evaluation of days
    trainer.train()
    assert [l['tokens_per_second']<1e7 for l in trainer.state.log_history if 'loss' in l]==[True, True]

def test_another_set_after_the_first(tmp_path):
    "Loaders that live on are not another set's."
    persistent = small('qwen2_vl', tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    plain = small('qwen2_vl', tmp_path, model=persistent.model)
    for rows in (ROWS[:2], ROWS[2:4]): assert persistent.evaluate(rows)['eval_loss']==pytest.approx(plain.evaluate(rows)['eval_loss'], rel=1e-5)

@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('how', (dict(target_modules=['q_proj','lm_head']), dict(modules_to_save=['lm_head'])))
def test_an_adapted_head_learns(name, how, tmp_path):
    "Packed or not: an adapter over the last layer, or a copy beside it, has the same gradients."
    grads = {}
    for packing in (True, False):
        seen = Gradients()
        model = get_peft_model(tiny(name)[0], r=4, random_state=0, **how)
        torch.manual_seed(0)
        with torch.no_grad():
            for n,p in model.named_parameters():
                if 'lora_B' in n: p.normal_(std=0.02)
        small(name, tmp_path, model=model, packing=packing, callbacks=[seen], max_steps=1, max_grad_norm=0, half_products=False, per_device_train_batch_size=8).train()
        grads[packing] = seen.grads
    head = [n for n in grads[True] if 'lm_head' in n]
    assert head and grads[True].keys()==grads[False].keys()
    for n,g in grads[False].items(): assert (g-grads[True][n]).abs().max()<=2e-5*g.abs().max(), n

@pytest.mark.parametrize('how', (dict(eval_strategy='steps', eval_steps=1, per_device_eval_batch_size=1), dict(train_sampling_strategy='group_by_length'), dict(tokens_per_pass=600)))
def test_skipped_pictures_everywhere(how, tmp_path):
    "A row that is left out is left out of evaluations and lengths as well."
    rows = [*ROWS[:3], {'image':b'no picture', 'question':'Read.', 'answer':'x'}]
    held = dict(eval_dataset=rows) if 'eval_steps' in how else {}
    trainer = small('qwen2_vl', tmp_path, rows=rows, data_collator=lambda m, p: VisionDataCollator(m, p, on_bad_picture='skip'), **held, **how)
    trainer.train()
    losses = [l['eval_loss'] for l in trainer.state.log_history if 'eval_loss' in l]
    assert len(losses)==2*bool(held) and all(l==l for l in losses)
    if held: assert losses[-1]==pytest.approx(trainer.evaluate(ROWS[:3])['eval_loss'], rel=1e-5)

def test_a_time_budget_is_the_run_s_own(tmp_path):
    trainer = small('qwen2_vl', tmp_path, max_minutes=.01, max_steps=-1)
    short = trainer.train().metrics['train_runtime']
    trainer.args.max_minutes = .06
    assert short<3<trainer.train().metrics['train_runtime']
    model,_ = adapted('qwen2_vl')
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match='falls by the clock'): small('qwen2_vl', tmp_path, model=model, max_minutes=1, optimizers=(adam, torch.optim.lr_scheduler.ConstantLR(adam)))

def test_warm_up_by_the_clock(tmp_path):
    trainer = small('qwen2_vl', tmp_path, max_minutes=.05, max_steps=-1, warmup_ratio=.5)
    trainer.train()
    rates = [l['learning_rate'] for l in trainer.state.log_history if 'loss' in l]
    top = rates.index(max(rates))
    assert .2*len(rates)<top<.8*len(rates) and rates[0]<.2*max(rates) and rates[-1]<.3*max(rates)

def test_what_the_collator_has_already(tmp_path):
    "An argument beside a collator that would not be heard is refused, whatever else is set."
    for more in ({}, dict(max_seq_length=500)):
        with pytest.raises(TypeError, match='belong to the collator'): small('qwen2_vl', tmp_path, data_collator=VisionDataCollator, formatting_func=lambda r: r, **more)

def test_a_pass_that_is_broken_off(tmp_path):
    "Ctrl-C in the pass that is watched leaves neither hooks nor what would watch every later tensor."
    trainer = small('qwen2_vl', tmp_path, gradient_checkpointing=True)
    block = next(m for m in trainer.model.modules() if type(m).__name__=='Qwen2VLDecoderLayer')
    before = len(block._forward_hooks),len(block._forward_pre_hooks)
    def stop(*_): raise KeyboardInterrupt
    hook = block.mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt): trainer.train()
    hook.remove()
    assert (len(block._forward_hooks),len(block._forward_pre_hooks))==before
    t = torch.ones(3, requires_grad=True); out = t*t; noted = [len(k.seen) for k in trainer.recompute.kept.values()]
    assert [len(k.seen) for k in trainer.recompute.kept.values()]==noted and out.grad_fn._saved_self is not None
    assert all(not k.inside for k in trainer.recompute.kept.values())

def test_room_for_weights_alone(tmp_path, monkeypatch):
    "Saving a model that has been trained needs no room for the optimizer's state."
    import shutil
    model,processor = tiny('qwen2_vl')
    for p in model.parameters(): p.requires_grad_(True)
    trainer = VisionTrainer(model, VisionTrainingArguments(tmp_path/'run', use_cpu=True, save_strategy='no', max_steps=1), train_dataset=ROWS, processing_class=processor, progress=False)
    weights = sum(p.numel()*p.element_size() for p in model.parameters())+20*2**20
    monkeypatch.setattr(shutil, 'disk_usage', lambda f: SimpleNamespace(free=weights))
    trainer.save_model(tmp_path/'saved')
    assert (tmp_path/'saved'/'model.safetensors').exists()
    monkeypatch.setattr(shutil, 'disk_usage', lambda f: SimpleNamespace(free=weights-1))
    with pytest.raises(OSError, match='too full'): trainer.save_model(tmp_path/'more')

def test_one_held_out_set_does_not_speak_for_another(tmp_path):
    trainer = small('qwen2_vl', tmp_path, eval_dataset={'a':ROWS[:2], 'b':ROWS[2:4]}, metric_for_best_model='a_loss')
    assert trainer._unmeasured(MemoryError(), 'eval_a')=={'eval_a_loss':float('inf')} and trainer._unmeasured(MemoryError(), 'eval_b')=={}
    assert small('qwen2_vl', tmp_path)._unmeasured(MemoryError(), 'eval')=={}

def test_a_pass_counts_what_llama_looks_at(tmp_path):
    "Its pictures are one token each, and a thousand keys of cross-attention."
    model,processor = adapted('mllama')
    counts = [count_tokens(r, processor, family_for(model)) for r in ROWS]
    sizes = [c['total']+c['cross'] for c in counts]
    assert max(c['cross'] for c in counts)>2*max(c['image'] for c in counts)
    args = VisionTrainingArguments(tmp_path, tokens_per_pass=max(sizes), **ONE_STEP)
    passes = list(VisionTrainer(model, args, train_dataset=ROWS, processing_class=processor, progress=False).passes)
    assert sorted(i for p in passes for i in p)==list(range(len(ROWS))) and len(passes)>1 and all(sum(sizes[i] for i in p)<=max(sizes) for p in passes)
