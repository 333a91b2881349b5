"What the four flags promise, on every family: the chosen modules train, and not one bit of anything else moves."
import itertools

import pytest
import torch
from torch import nn

from vlm_ft.loading import FastVisionModel, base_of, for_training, quantized_modules, uneven_linears
from vlm_ft.lora import get_peft_model, trainable_report
from vlm_ft.models.family import family_for
from vlm_ft.models.tiny import FAMILIES, drawn, tiny, tiny_folder

FLAGS = 'finetune_vision_layers','finetune_language_layers','finetune_attention_modules','finetune_mlp_modules'
COMBINATIONS = list(itertools.product((True,False), repeat=4))
BITS = {16:{}, 8:{'load_in_8bit':True}, 4:{'load_in_4bit':True}}

def row(processor, device='cpu'):
    ask = [{'role':'user','content':[{'type':'image'},{'type':'text','text':'What?'}]}, {'role':'assistant','content':'A cat.'}]
    b = processor(images=[drawn('abc', (56,56))], text=[processor.apply_chat_template(ask)], add_special_tokens=False, return_tensors='pt')
    return {**b, 'labels':b['input_ids'].clone()}

def linears(model, vision, language, attention, mlp):
    "Names of the linears that flags should choose, found from the model itself and not by the family's own names."
    family = family_for(model)
    for name,m in model.named_modules():
        if not isinstance(m, nn.Linear) or name=='lm_head': continue
        part = vision if name.startswith((family.vision, family.projector)) else language
        kind = attention if '.merger.' not in name and 'attn' in name or '.attention.' in name else mlp
        if part and kind: yield name

def stir(model):
    "Make the zero half of an adapter something, so that both halves have gradients."
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n,p in model.named_parameters():
            if 'lora_B' in n: p.copy_(torch.randn(p.shape, generator=g)*.1)

def steps(model, batch, n=3):
    "Steps of AdamW over all parameters, frozen ones too; weight decay would move those that have a gradient, even one of 0."
    for_training(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=.1)
    for _ in range(n):
        optimizer.zero_grad(); loss = model(**batch).loss; loss.backward(); optimizer.step()
    return loss.item()

def frozen(model, moves):
    "A copy of every tensor, buffers too, but those that may move."
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n:t.detach().clone() for n,t in state.items() if not moves(n)}

def unmoved(model, before):
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert [n for n,t in before.items() if not torch.equal(now[n].detach(), t)]==[]

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    return {n: tiny_folder(n, tmp_path_factory.mktemp(n)) for n in FAMILIES}

@pytest.mark.parametrize('flags', COMBINATIONS, ids=lambda f: ''.join('vlam'[i] if on else '-' for i,on in enumerate(f)))
@pytest.mark.parametrize('name', FAMILIES)
def test_flags_choose_adapters(name, flags):
    model,processor = tiny(name)
    wanted = set(linears(model, *flags))
    assert bool(wanted)==((flags[0] or flags[1]) and (flags[2] or flags[3]))
    kw = dict(zip(FLAGS, flags), r=4)
    if not wanted:
        with pytest.raises(ValueError, match='Nothing is chosen'): get_peft_model(model, **kw)
        return
    model = get_peft_model(model, **kw); stir(model)
    trained = {n.split('.lora_')[0] for n,p in base_of(model).named_parameters() if p.requires_grad}
    assert trained==wanted
    before = frozen(model, lambda n: '.lora_' in n)
    adapter = {n:p.detach().clone() for n,p in model.named_parameters() if '.lora_' in n}
    steps(model, row(processor))
    unmoved(model, before)
    for n,p in model.named_parameters():
        if '.lora_' in n: assert p.grad.abs().sum()>0 and not torch.equal(p, adapter[n]), n
        else: assert p.grad is None, n
    assert trainable_report(model)[-1]['modules']==len(wanted)

@pytest.mark.parametrize('flags', COMBINATIONS, ids=lambda f: ''.join('vlam'[i] if on else '-' for i,on in enumerate(f)))
@pytest.mark.parametrize('name', FAMILIES)
def test_flags_choose_whole_weights(name, flags):
    model,processor = tiny(name); model.full_finetuning = True
    wanted,kw = set(linears(model, *flags)),dict(zip(FLAGS, flags))
    if not wanted:
        with pytest.raises(ValueError, match='Nothing is chosen'): get_peft_model(model, **kw)
        return
    vision,language,attention,mlp = flags
    family = family_for(model)
    of_vision = lambda n: n.startswith((family.vision, family.projector))
    moves = lambda n: n.rpartition('.')[0] in wanted or (attention and mlp and (vision if of_vision(n) else language))
    assert get_peft_model(model, **kw) is model
    assert {n for n,p in model.named_parameters() if p.requires_grad}=={n for n,_ in model.named_parameters() if moves(n)}
    before,was = frozen(model, moves),{n:model.get_submodule(n).weight.detach().clone() for n in wanted}
    steps(model, row(processor))
    unmoved(model, before)
    assert all(not torch.equal(was[n], model.get_submodule(n).weight) for n in wanted)

@pytest.mark.parametrize('quantize_vision', (False,True), ids=('language','everything'))
@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('name', FAMILIES)
def test_lora_on_16_8_and_4_bit(folders, name, bits, quantize_vision):
    model,processor = FastVisionModel.from_pretrained(folders[name], quantize_vision=quantize_vision, **BITS[bits])
    batch = {k:v.to(model.device) for k,v in row(processor).items()}
    model = FastVisionModel.get_peft_model(model, r=4); stir(model)
    assert set(quantized_modules(model).values())==({bits} if bits<16 else set())
    assert {p.dtype for p in model.parameters() if p.requires_grad}=={torch.float32}
    first = for_training(model)(**batch).loss.item()
    before = frozen(model, lambda n: '.lora_' in n)
    last = steps(model, batch, 8)
    unmoved(model, before)
    assert last < first*.95
    # evaluating between steps must leave the weights as they are (bitsandbytes repacks 4-bit ones on some CPUs)
    with torch.no_grad(): FastVisionModel.for_inference(model)(**batch)
    unmoved(model, before)

def test_full_finetuning_from_a_folder(folders):
    model,processor = FastVisionModel.from_pretrained(folders['qwen2_vl'], dtype='float32', full_finetuning=True, device='cpu')
    model = FastVisionModel.get_peft_model(model, finetune_vision_layers=False)
    first,last = for_training(model)(**row(processor)).loss.item(),steps(model, row(processor), 5)
    assert last < first and not hasattr(model, 'peft_config')

@pytest.mark.parametrize('checkpointing', (True,False))
@pytest.mark.parametrize('name', FAMILIES)
def test_no_graph_under_a_frozen_tower(name, checkpointing):
    "Whoever asks for input gradients, as PEFT, TRL and transformers do once checkpointing is on."
    model,processor = tiny(name)
    model.gradient_checkpointing_enable(); model.enable_input_require_grads()
    model = get_peft_model(model, r=4, finetune_vision_layers=False, use_gradient_checkpointing=checkpointing)
    for_training(model); model.enable_input_require_grads()
    if checkpointing: base_of(model).gradient_checkpointing_enable()
    family,seen = family_for(model),[]
    def look(module, args, out): seen.extend(o.requires_grad for o in (out.values() if isinstance(out, dict) else [out]) if torch.is_tensor(o))
    for part in (family.vision, family.projector): base_of(model).get_submodule(part).register_forward_hook(look)
    model(**row(processor)).loss.backward()
    assert len(seen)>=2 and not any(seen)

@pytest.mark.parametrize('name', FAMILIES)
def test_checkpointing_changes_no_gradient(name):
    def run(on):
        model,processor = tiny(name)
        model = get_peft_model(model, r=4, use_gradient_checkpointing=on); stir(model)
        calls = []
        for n,m in base_of(model).named_modules():
            if isinstance(m, nn.Linear) and n.endswith('q_proj.base_layer'): m.register_forward_hook(lambda *a: calls.append(1))
        for_training(model)(**row(processor)).loss.backward()
        return {n:p.grad for n,p in model.named_parameters() if p.requires_grad},len(calls)
    (plain,once),(saved,twice) = run(False),run('unsloth')
    assert twice==2*once                                                    # it was on: every block ran again
    for n,g in plain.items(): assert (g-saved[n]).norm() <= 1e-6*g.norm(), n

def test_four_bits_are_near_what_they_stand_for():
    "Of a trained base whose rows are not all of whole blocks, on a CPU: what is quantised comes back within a tenth, and the rest is as it was."
    from bitsandbytes.functional import dequantize_4bit
    from vlm_ft.demo import BASE
    four,plain = (FastVisionModel.from_pretrained(str(BASE), device='cpu', **how)[0] for how in (dict(load_in_4bit=True, quantize_vision=True), dict(dtype='float32')))
    left,uneven = 0,set(uneven_linears(plain))
    for name,m in four.named_modules():
        if not isinstance(m, torch.nn.Linear): continue
        own = plain.get_submodule(name).weight.data
        if type(m).__name__=='Linear4bit': assert (dequantize_4bit(m.weight.data, m.weight.quant_state).float()-own).norm()<.12*own.norm(), name
        else: left += 1; assert name in uneven or name=='lm_head', name
    assert left==len(uneven)+1
