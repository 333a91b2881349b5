"Rows on real pictures, the saved processor in plain transformers, and our batches in TRL's trainer."
import json, shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_ft.data import DataError, check_rows, count_tokens, encode, image_size, open_image, pictures_of, render, supervision
from vlm_ft.messages import to_messages
from vlm_ft.models.family import family_for
from vlm_ft.models.tiny import FAMILIES, drawn, tiny, tiny_folder
from vlm_ft.readers import load_rows
from vlm_ft.packing import pack_batch
from vlm_ft.setup import VisionDataCollator, pad_batch
from vlm_ft.writers import as_dataset

DATA = Path(__file__).parents[2]/'shared'/'data'
SETS = 'receipts','ocr_lines_fraktur','latex_ocr','chart_vqa','captions','smoke'
SIZES = [(28,28),(29,300),(300,29),(64,64),(100,60),(60,100),(101,59),(128,128),(129,127),(200,200),
         (255,17),(17,255),(333,77),(77,333),(500,500),(640,480),(480,640),(1000,700),(1600,90),(55,57)]

def real(name, split):
    "The file of a real set's split; the test is skipped where it is absent."
    path = DATA/name/f'{split}.jsonl'
    if not path.exists(): pytest.skip(f'the real image-text sets are not beside this checkout ({name}/{split}.jsonl)')
    return path

def tools(name):
    model,processor = tiny(name)
    return processor,family_for(model)

def about(size): return {'image':drawn(size=size), 'question':'q', 'answer':'a'}

# --- real rows

@pytest.mark.parametrize('name', SETS)
@pytest.mark.parametrize('split', ['train','test'])
def test_a_real_set_is_read(name, split):
    path = real(name, split)
    rows,lines = load_rows(path),[json.loads(s) for s in path.read_text().splitlines()]
    assert len(rows)==len(lines)
    for row,line in zip(rows, lines):
        assert row['task']==line['task'] and row['answers']==(line['answer'] if isinstance(line['answer'], list) else [line['answer']])
        assert [m['role'] for m in row['messages']]==['user','assistant'] and row['messages'][1]['content']==row['answers'][0]
        assert row['messages'][0]['content']==[{'type':'image','image':str(path.parent/line['image'])}, {'type':'text','text':line['question']}]

@pytest.mark.parametrize('name', FAMILIES)
def test_real_rows_are_counted_as_they_are_encoded(name):
    rows,(processor,family) = load_rows(real('smoke','train')),tools(name)
    ours = [encode(row, processor, family) for row in rows]
    assert [count_tokens(row, processor, family)['total'] for row in rows]==[len(o['input_ids']) for o in ours]
    summary = {r['per row']:r for r in check_rows(rows, processor, family)}
    assert summary['tokens, text and image']['sum']==sum(len(o['input_ids']) for o in ours)
    assert summary['tokens that carry loss']['sum']==sum((o['labels']!=-100).sum() for o in ours)
    for row,o in zip(rows, ours):
        learned = processor.tokenizer.decode(o['labels'][o['labels']!=-100])
        assert learned==row['answers'][0]+family.turn_end and f'[[{learned}]]' in str(supervision(row, processor, family))

def test_real_pictures_are_opened_as_transformers_does():
    from transformers.image_utils import load_image
    for row in load_rows(real('smoke','train'))+load_rows(real('smoke','test')):
        for path in pictures_of(row['messages']):
            ours = open_image(path)
            assert image_size(path)==ours.size
            assert ours.tobytes()==load_image(path).tobytes() or 'transparency' in Image.open(path).info

def test_damage_in_a_real_set_is_found_in_one_pass(tmp_path):
    source = real('smoke','train')
    shutil.copytree(source.parent, tmp_path/'set')
    lines = [json.loads(s) for s in source.read_text().splitlines()]
    jpeg = next(i for i,line in enumerate(lines) if line['image'].endswith('.jpg'))
    damaged = tmp_path/'set'/lines[jpeg]['image']
    damaged.chmod(0o644); data = damaged.read_bytes(); damaged.write_bytes(data[:len(data)//2])
    hit = {i for i,line in enumerate(lines) if line['image']==lines[jpeg]['image']}
    gone,control = [i for i in range(len(lines)) if i not in hit][:2]
    lines[gone]['image'] = 'images/nowhere.png'
    lines[control]['question'] += ' <|im_end|>'
    path = tmp_path/'set'/'rows.jsonl'; path.write_text('\n'.join(map(json.dumps, lines)))
    with pytest.raises(DataError) as e: check_rows(load_rows(path), *tools('qwen2_vl'))
    said = dict(e.value.problems)
    assert set(said)==hit|{gone,control} and len(e.value.problems)==len(said)
    assert 'nowhere.png' in said[gone] and '<|im_end|>' in said[control] and all('cannot be read' in said[i] for i in hit)

# --- the saved processor in plain transformers

def saved(name, folder, budget):
    "A checkpoint whose processor has a pixel budget, saved."
    tiny_folder(name, folder)
    processor,family = tools(name)
    family.set_resolution(processor, max_pixels=budget)
    processor.save_pretrained(folder)
    return processor,family

BUDGET = {'qwen2_vl':28*28*40, 'pixtral':96*96, 'mllama':4*56*56}

@pytest.mark.parametrize('name', FAMILIES)
def test_saved_image_processor_counts_the_same(name, tmp_path):
    "Transformers' own image processor class, which needs no torchvision, on the saved folder."
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    processor,family = saved(name, tmp_path, BUDGET[name])
    plain = {'qwen2_vl':Qwen2VLImageProcessorPil, 'mllama':MllamaImageProcessorPil, 'pixtral':PixtralImageProcessorPil}[name].from_pretrained(tmp_path)
    for size in SIZES:
        picture = drawn(size=size); made = plain([picture], return_tensors='pt')
        if name=='qwen2_vl':  tokens = (int(made['image_grid_thw'].prod())//plain.merge_size**2, 0)
        elif name=='mllama':  tokens = (1, int(made['aspect_ratio_mask'].sum())*(plain.size['height']//14)**2 + int(made['aspect_ratio_mask'].sum()))
        else: tokens = (lambda h,w: (h*(w+1), 0))(*(int(s)//16 for s in made['image_sizes'][0]))
        assert tuple(family.n_image_tokens(processor, size))==tokens, size
        ours = family.pixels(encode(about(size), processor, family))['pixel_values']
        assert torch.equal(ours, made['pixel_values'][0] if name=='mllama' else made['pixel_values']), size

@pytest.mark.parametrize('name', FAMILIES)
def test_bytes_become_the_processor_s_numbers(name):
    "To the last bit, of pictures of every mode, several to a row, in a padded batch and in a packed one."
    processor,family = tools(name)
    noise = np.random.default_rng(0)
    for a,b in zip(SIZES, SIZES[1:]+SIZES[:1]):
        pictures = [Image.fromarray(noise.integers(0, 256, (h,w,3), dtype=np.uint8)) for w,h in (a,b)]
        pictures[1] = pictures[1].convert(('L','LA','P','1','RGBA','CMYK')[SIZES.index(a)%6])
        if pictures[1].mode=='RGBA': pictures[1].putalpha(pictures[0].resize(b).convert('L'))
        row = to_messages([{'role':'user','content':[{'type':'image','image':p} for p in pictures]}, {'role':'assistant','content':'a'}])
        theirs = processor(images=[open_image(p) for p in pictures], text=[render(row['messages'], processor, family)], add_special_tokens=False, return_tensors='pt')['pixel_values']
        row = encode(row, processor, family)
        assert row['pixel_values'].dtype==torch.uint8 and row['pixel_values'].nbytes*4*(2 if name=='qwen2_vl' else 1)==theirs.nbytes
        packed = pack_batch([encode(about((40,50)), processor, family), row], family)
        for got in (pad_batch([row], family, 0), family.pixels(packed)):
            mine = {k: got[k] for k in family.picture_keys}
            mine['pixel_values'] = mine['pixel_values'][:,-2:] if name=='mllama' else mine['pixel_values'][-2:] if name=='pixtral' else mine['pixel_values'][-len(theirs):]
            if name=='pixtral':                                                              # what fills up the smaller picture is cut off in the tower
                assert all(torch.equal(x[:,:h,:w], y[:,:h,:w]) for x,y,(h,w) in zip(mine['pixel_values'], theirs, got['image_sizes'][-2:].tolist())), (a, b)
            else: assert torch.equal(mine['pixel_values'], theirs), (a, b)
    if name=='mllama': assert not pad_batch([encode(about((40,50)), processor, family), row], family, 0)['pixel_values'][0,1].any()      # a picture that is not there

def test_another_image_processor_keeps_its_numbers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    processor,family = tools('qwen2_vl')
    ours = encode(about((60,90)), processor, family)
    processor.image_processor = Qwen2VLImageProcessorPil(**{k: getattr(processor.image_processor, k) for k in ('size','patch_size','merge_size','temporal_patch_size')})
    theirs = encode(about((60,90)), processor, family)
    assert 'byte_values' not in theirs and torch.equal(theirs['pixel_values'], family.pixels(ours)['pixel_values'])
    assert family.pixels(theirs) is theirs

def test_a_bound_on_tiles_is_kept_here_alone(tmp_path):
    "What 02_data says of Llama 3.2 Vision: transformers' class reads the folder and cuts into as many tiles as the model knows; the text stays as long."
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    processor,family = saved('mllama', tmp_path, 2*56*56)
    again = family.processor(tmp_path)
    plain = MllamaImageProcessorPil.from_pretrained(tmp_path)
    tiles = lambda p: [int(p([drawn(size=s)], return_tensors='pt')['aspect_ratio_mask'].sum()) for s in SIZES]
    assert max(tiles(processor.image_processor))==2 and tiles(again.image_processor)==tiles(processor.image_processor)
    assert max(tiles(plain))==4
    assert {family.n_image_tokens(processor, s).text for s in SIZES}=={1}

@pytest.mark.skipif(not find_spec('torchvision'), reason="AutoProcessor needs torchvision, which is not installed")
@pytest.mark.parametrize('name', FAMILIES)
def test_saved_processor_counts_the_same_through_auto_processor(name, tmp_path):
    from transformers import AutoProcessor
    processor,family = saved(name, tmp_path, BUDGET[name])
    plain = AutoProcessor.from_pretrained(tmp_path)
    assert type(plain).__module__.startswith('transformers.') and type(plain).__name__==family.processor_class
    for size in SIZES:
        row = about(size)
        text = plain.apply_chat_template([{'role':'user','content':[{'type':'image'},{'type':'text','text':'q'}]}, {'role':'assistant','content':'a'}], tokenize=False)
        made = plain(images=[row['image']], text=[text], add_special_tokens=False, return_tensors='pt')
        assert torch.equal(made['input_ids'][0], encode(row, processor, family)['input_ids']), size
        assert made['input_ids'].shape[1]==count_tokens(row, processor, family)['total'], size

# --- other people's trainer

@pytest.mark.skipif(not find_spec('trl'), reason="TRL is not installed (the extra vlm_ft[trl])")
@pytest.mark.parametrize('name', FAMILIES)
def test_trl_trains_on_our_dataset_and_collator(name, tmp_path):
    from trl import SFTConfig, SFTTrainer
    rows = [about((60,40)), {'messages':[{'role':'user','content':'q'}, {'role':'assistant','content':'an answer'}]},
            {'images':[drawn('x', (57,99)), drawn('y', (30,30))], 'question':'both?', 'answer':['yes','y']}]
    model,processor = tiny(name)
    collate = VisionDataCollator(model, processor)
    batch = collate(rows)
    with torch.no_grad(): want = model(**batch).loss.item()
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=3, use_cpu=True, bf16=False, report_to='none', save_strategy='no', disable_tqdm=True,
                     logging_steps=1, gradient_checkpointing=False, remove_unused_columns=False, dataset_text_field='', dataset_kwargs={'skip_prepare_dataset':True}, max_length=2048)
    trainer = SFTTrainer(model=model, args=args, train_dataset=as_dataset(rows), data_collator=collate, processing_class=processor)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log['loss']==pytest.approx(want, rel=1e-4)                     # answers only, as many of them as the batch has
    assert log['num_tokens']==batch['attention_mask'].sum()
