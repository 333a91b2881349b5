"Pictures between a file and the model: another scan in training alone, a damaged file in the middle of an epoch, one size everywhere."
import itertools, json, logging

import numpy as np
import pytest
import torch

from vlm_ft.augmentation import DocumentAugmentation
from vlm_ft.data import check_rows, count_tokens, encode
from vlm_ft.evaluation.generation import prompt_lengths
from vlm_ft.lora import get_peft_model
from vlm_ft.messages import DataError
from vlm_ft.readers import load_rows
from vlm_ft.writers import as_dataset, embedded
from vlm_ft.models.family import family_for
from vlm_ft.models.tiny import FAMILIES, drawn, tiny, tiny_folder
from vlm_ft.setup import VisionDataCollator, VisionTrainingArguments
from vlm_ft.training import VisionTrainer

torch.set_num_threads(1)

def row(text, size=(90, 56), **more): return {'image':drawn(text, size), 'question':'What?', 'answer':text, **more}

def trainer_of(name, folder, rows, collator=None, **kwargs):
    model,processor = tiny(name)
    model = get_peft_model(model, r=4)
    own = {k: kwargs.pop(k) for k in ('augment','eval_dataset') if k in kwargs}
    args = VisionTrainingArguments(folder, **{**dict(use_cpu=True, save_strategy='no', per_device_train_batch_size=2, gradient_accumulation_steps=1, logging_steps=1, seed=3), **kwargs})
    return VisionTrainer(model, args, train_dataset=rows, processing_class=processor, progress=False, data_collator=collator and collator(model, processor), **own)

@pytest.fixture
def log():
    "What is said on the package's log."
    told,handler = [],logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger('vlm_ft')
    level = logger.level
    logger.addHandler(handler); logger.setLevel(logging.WARNING)              # a notebook that ran in this process may have quieted it
    yield told
    logger.removeHandler(handler); logger.setLevel(level)

def seen_in(trainer, epochs=2, loader=None):
    "The pictures of each epoch, in a fixed order."
    loader,out = loader or trainer.get_train_dataloader(),[]
    for epoch in range(epochs):
        trainer.state.epoch = epoch
        trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
        loader.set_epoch(epoch)
        out.append(sorted(f"{family_for(trainer.model).pixels(batch)['pixel_values'].double().sum():.6f}" for batch in loader))
    return out

@pytest.mark.parametrize('packing', (True, False))
def test_only_what_is_trained_on(packing, tmp_path):
    rows = [row(f'line {i}') for i in range(4)]
    made = lambda **kwargs: trainer_of('qwen2_vl', tmp_path, rows, eval_dataset=rows, packing=packing, per_device_train_batch_size=1, per_device_eval_batch_size=1, **kwargs)
    plain,other = made(),made(augment=DocumentAugmentation(p=1))
    first,second = seen_in(plain)
    assert first==second
    got = seen_in(other)
    assert not set(got[0])&set(first) and not set(got[0])&set(got[1])                          # each picture is another, in each epoch
    look = lambda t: sorted(f"{b['pixel_values'].double().sum():.6f}" for b in t.get_eval_dataloader())
    assert look(other)==look(plain)==first                                                     # evaluation sees them as they are
    assert other.evaluate()['eval_loss']==pytest.approx(plain.evaluate()['eval_loss'], abs=1e-6)

def test_workers_change_nothing(tmp_path):
    rows = [row(f'line {i}') for i in range(4)]
    seen = [seen_in(trainer_of('pixtral', tmp_path, rows, augment=DocumentAugmentation(), **kwargs)) for kwargs in
            ({}, dict(dataloader_num_workers=2), dict(dataloader_num_workers=1, dataloader_persistent_workers=True, dataloader_multiprocessing_context='fork'))]
    assert seen[0]==seen[1]==seen[2] and seen[0][0]!=seen[0][1]

def test_tokens_stay(tmp_path):
    for name in FAMILIES:
        _,processor = tiny(name); family = family_for(tiny(name)[0])
        for size in ((30,30),(300,40),(41,333),(500,400),(1000,700)):
            r = row('x', size)
            a,b = (encode(r, processor, family, augment=f) for f in (None, DocumentAugmentation(p=1)))
            assert a['input_ids'].tolist()==b['input_ids'].tolist() and a['pixel_values'].shape==b['pixel_values'].shape, (name, size)

def test_needs_our_collator(tmp_path):
    with pytest.raises(TypeError, match='collator that opens'): trainer_of('pixtral', tmp_path, [row('a')], collator=lambda m, p: (lambda rows: rows), augment=DocumentAugmentation())

def damaged(tmp_path, n=6, bad=(1,)):
    "Rows of files, and a function that damages some of them, as a disk does after the check."
    rows = [{'image':str(tmp_path/f'{i}.png'), 'question':'What?', 'answer':f'line {i}'} for i in range(n)]
    for i in range(n): drawn(f'line {i}', (90, 56)).save(tmp_path/f'{i}.png')
    def damage():
        for i in bad: (tmp_path/f'{i}.png').write_bytes((tmp_path/f'{i}.png').read_bytes()[:200])
    return rows,damage

@pytest.mark.parametrize('workers', (0, 1))
def test_error_names_the_row(workers, tmp_path):
    rows,damage = damaged(tmp_path, bad=(4,))
    trainer = trainer_of('qwen2_vl', tmp_path/'out', rows, dataloader_num_workers=workers)
    damage()
    with pytest.raises(Exception, match=r'Row 4: a picture cannot be read(.|\n)*4\.png'): trainer.train()

@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('packing', (True, False))
def test_skip_is_counted_and_listed(name, packing, tmp_path, log):
    rows,damage = damaged(tmp_path, bad=(1,4))
    skip = lambda m, p: VisionDataCollator(m, p, on_bad_picture='skip')
    trainer = trainer_of(name, tmp_path/'out', rows, skip, packing=packing, num_train_epochs=2, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    damage()
    trainer.train()                                                                            # batches of one row: some have none left
    assert trainer.state.global_step==6 and sorted(trainer.left_out)==[1,4]
    assert log[-1].startswith('2 rows were left out') and '4.png' in log[-1] and 'row 1:' in log[-1]
    assert sum(t.startswith('Left out, row 1:') for t in log)==1                               # told once, not in each epoch
    assert [h['rows_left_out'] for h in trainer.state.log_history if 'rows_left_out' in h][-1]==2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())

def test_skip_trains_what_is_left(tmp_path):
    "A step beside a damaged row is the step without it; one of damaged rows alone changes nothing."
    rows,damage = damaged(tmp_path, n=4, bad=(2,3))
    skip = lambda m, p: VisionDataCollator(m, p, on_bad_picture='skip')
    def after(rows, before=lambda: None, **kwargs):
        trainer = trainer_of('qwen2_vl', tmp_path/'out', rows, skip, max_steps=1, per_device_train_batch_size=4, learning_rate=.1, warmup_steps=0, optim='sgd', **kwargs)   # Adam would make a step of what is rounding
        start = [p.clone() for p in trainer.model.parameters() if p.requires_grad]
        before(); trainer.train()
        return [p-s for p,s in zip((p for p in trainer.model.parameters() if p.requires_grad), start)]
    whole = after(rows[:2])
    for a,b in zip(whole, after(rows, damage)): assert (a-b).abs().max()<=1e-4*max(d.abs().max() for d in whole)
    assert any(d.abs().max()>0 for d in whole)
    damaged(tmp_path, n=4)
    assert not any(d.any() for d in after(rows[2:], damage))
    trainer = trainer_of('qwen2_vl', tmp_path/'out', rows[:2], skip)
    nothing = {**trainer.data_collator.batch([]), 'left_out':[(2,'a picture cannot be read.')]}
    assert trainer.training_step(trainer.model, nothing, torch.tensor(0))==0 and not any(p.grad is not None for p in trainer.model.parameters())

def test_evaluation_skips_nothing(tmp_path):
    rows,damage = damaged(tmp_path, n=2)
    trainer = trainer_of('qwen2_vl', tmp_path/'out', rows, lambda m, p: VisionDataCollator(m, p, on_bad_picture='skip'), eval_dataset=rows, per_device_eval_batch_size=1)
    damage()
    with pytest.raises(DataError, match='1.png'): trainer.evaluate()

BUDGETS = {'qwen2_vl':(28*28*4, 28*28*12), 'mllama':(56*56, 2*56*56), 'pixtral':(16*16*4, 16*16*36)}

@pytest.mark.parametrize('name', FAMILIES)
def test_one_size_everywhere(name, tmp_path):
    "Training, evaluation, prediction and the saved processor see the same pixels, by task and by row."
    from vlm_ft.loading import from_pretrained
    few,some = BUDGETS[name]
    folder = tiny_folder(name, tmp_path/'base')
    model,processor = from_pretrained(folder, dtype='float32', max_pixels={'caption':few, 'ocr':some}, device='cpu')
    family = family_for(model)
    kinds = [row('a', (400,300), task='ocr'), row('a', (400,300), task='caption'), row('a', (400,300)), row('a', (400,300), task='ocr', max_pixels=few)]
    n = [sum(count_tokens(r, processor, family)[k] for k in ('image','cross')) for r in kinds]
    assert n[1]==n[3]<n[0] and n[0]!=n[2]
    processor.save_pretrained(tmp_path/'saved')
    again = family.processor(tmp_path/'saved')
    assert again.image_processor.task_max_pixels=={'caption':few, 'ocr':some}
    collate = VisionDataCollator(model, processor)
    for r,stored in zip(kinds, as_dataset(kinds)):
        trained = collate.encode(r)
        assert len(trained['input_ids'])==count_tokens(r, processor, family)['total']==check_rows([r], processor, family)[4]['max']
        asked = encode(r, processor, family, prompt_only=True)
        assert len(asked['input_ids'])-prompt_lengths([r], again, family)[0] in range(0, 40)
        for other in (asked, encode(r, again, family), encode({k:v for k,v in stored.items() if v}, processor, family)): assert torch.equal(trained['pixel_values'], other['pixel_values'])
    # a general bound is what plain transformers reads from the saved folder
    family.bound(processor, max_pixels=some); processor.save_pretrained(tmp_path/'one')
    plain = {'qwen2_vl':'Qwen2VLImageProcessorPil', 'mllama':'MllamaImageProcessorPil', 'pixtral':'PixtralImageProcessorPil'}[name]
    if name!='mllama':                                                                        # its bound on tiles is ours: transformers knows none
        from importlib import import_module
        theirs = getattr(import_module(f'transformers.models.{name}.image_processing_pil_{name}'), plain).from_pretrained(tmp_path/'one')
        got = theirs(kinds[2]['image'], return_tensors='pt')['pixel_values']
        assert np.allclose(got.squeeze(0) if name=='pixtral' else got, family.pixels(encode(kinds[2], processor, family))['pixel_values'].squeeze(0), atol=1e-6)

def test_bounds_that_cannot_be_kept(tmp_path):
    _,processor = tiny('qwen2_vl'); family = family_for(tiny('qwen2_vl')[0])
    with pytest.raises(DataError, match='Row 1: max_pixels cannot be kept'): check_rows([row('a'), row('a', max_pixels=5)], processor, family)
    with pytest.raises(DataError, match='Row 0: min_pixels and max_pixels cannot be kept'): check_rows([row('a', min_pixels=99999, max_pixels=56*56)], processor, family)
    for bad,bound in itertools.product((0, -1, 1.5, '9.5', 'nine', True), ('min_pixels','max_pixels')):
        with pytest.raises(DataError, match=f'{bound} is no number'): check_rows([row('a', **{bound:bad})], processor, family)
    for name in ('mllama','pixtral'):                                                         # neither ever enlarges a picture
        _,other = tiny(name)
        with pytest.raises(DataError, match='(?s)Row 1: min_pixels cannot be kept.*has no min_pixels'): check_rows([row('a'), row('a', min_pixels=10**6)], other, family_for(tiny(name)[0]))

def test_a_row_whose_picture_is_enlarged(tmp_path):
    "It is seen as by a processor with that bound, where rows are encoded, collated, counted, checked, stored and read again."
    model,processor = tiny('qwen2_vl'); family = family_for(model)
    small,large = row('a', (60,40)), row('a', (60,40), min_pixels=200*200)
    want = encode(small, family.bounded(processor, min_pixels=200*200), family)
    assert want['image_grid_thw'].prod()>=200*200/processor.image_processor.patch_size**2>encode(small, processor, family)['image_grid_thw'].prod()
    (tmp_path/'rows.jsonl').write_text(json.dumps({**large, 'image':embedded(large['image'])})+'\n')
    [read],stored = load_rows(tmp_path/'rows.jsonl'),as_dataset([large])[0]
    collate = VisionDataCollator(model, processor)
    for r in (large, read, {k:v for k,v in stored.items() if v}):
        assert count_tokens(r, processor, family)['total']==check_rows([r], processor, family)[4]['max']==len(want['input_ids'])
        for got in (encode(r, processor, family), collate.encode(r)): assert torch.equal(want['pixel_values'], got['pixel_values'])
    assert torch.equal(encode(small, processor, family)['image_grid_thw'], encode(row('a', (60,40)), processor, family)['image_grid_thw'])   # the processor itself is as it was
