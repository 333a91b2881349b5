"The contract of every family: what holds for one architecture holds for all, on tiny models of the real ones."
import copy, re
import pytest, torch
from vlm_ft.data import encode
from vlm_ft.lora import get_peft_model
from vlm_ft.models.family import base_of, family_for
from vlm_ft.models.tiny import FAMILIES, drawn, tiny
from vlm_ft.setup import VisionDataCollator, pad_batch

pytestmark = pytest.mark.parametrize('name', FAMILIES)

def part(x): return {'type':'text','text':x} if isinstance(x, str) else {'type':'image','image':x}
def row(answer, *user, system=None, more=()):
    turns = [{'role':'system','content':system}]*(system is not None) + [{'role':'user','content':[part(u) for u in user]}, {'role':'assistant','content':answer}]
    for q,a in more: turns += [{'role':'user','content':[part(u) for u in q]}, {'role':'assistant','content':a}]
    return {'messages':turns}

def mixed_rows():
    "Text only, one and two pictures, text before a picture, several turns, a system message; odd sizes."
    return [row('seven', drawn('7', (57,41)), 'Which digit?'),
            row('two pictures, a longer answer than the others have', drawn('a', (100,31)), 'and', drawn('b', (30,120)), 'differ?'),
            row('no picture here', 'What colour is the sky?'),
            row('after', 'Text before a picture:', drawn('c', (64,64)), system='Be brief.', more=[(('And now?',), 'still'), ((drawn('d', (29,29)), 'this?'), 'ok')])]

@pytest.fixture
def adapted(name):
    "A tiny model with LoRA on every part whose B is not zero, and its processor and family."
    model,processor = tiny(name)
    model = get_peft_model(model, r=4, lora_alpha=8)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n,p in model.named_parameters():
            if 'lora_B' in n: p.copy_(torch.randn(p.shape, generator=g)*0.2)
    return model,processor,family_for(model)

def loss_and_grads(model, batches, n_tokens):
    "Summed cross entropy over `n_tokens`, and its gradients, accumulated over batches."
    model.zero_grad(set_to_none=True)
    total = 0.
    for b in batches:
        loss = model(**b, num_items_in_batch=torch.tensor(n_tokens)).loss
        loss.backward(); total += loss.item()
    return total, {n:p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}

def plainly(model, processor, r, labels):
    "One row as plain transformers takes it: its own processor call, no padding, no hooks of ours."
    pictures = [c['image'] for m in r['messages'] if isinstance(m['content'], list) for c in m['content'] if c['type']=='image']
    out = processor(images=pictures or None, text=[r['text']], add_special_tokens=False, return_tensors='pt')
    return {**out, 'labels':labels[None]}

def close(a, b, tol=1e-5): return (a-b).abs().max() <= tol*max(1e-8, b.abs().max())

def test_a_batch_equals_its_rows_alone(name, adapted):
    model,processor,family = adapted
    rows = mixed_rows()
    encoded = [encode(r, processor, family) for r in rows]
    n = sum((e['labels']!=-100).sum().item() for e in encoded)
    for side in ('right','left'):
        batch = pad_batch(encoded, family, processor.tokenizer.pad_token_id, side)
        ours,grads = loss_and_grads(model, [batch], n)
        alone = copy.deepcopy(model)
        for m in alone.modules(): m._forward_pre_hooks.clear(); m._forward_pre_hooks_with_kwargs.clear()   # plain transformers
        for r,e in zip(rows, encoded): r['text'] = processor.tokenizer.decode(collapse(e['input_ids'], processor, family))
        singles = [plainly(alone, processor, r, e['labels']) for r,e in zip(rows, encoded)]
        for s,e in zip(singles, encoded): assert s['input_ids'][0].tolist()==e['input_ids'].tolist()
        want,reference = loss_and_grads(alone, singles, n)
        assert abs(ours-want) <= 1e-5*abs(want), f"{side}: {ours} {want}"
        assert set(grads)==set(reference) and len(grads) > 20
        bad = {k:(grads[k]-reference[k]).abs().max().item() for k in grads if not close(grads[k], reference[k])}
        assert not bad, f"{side}: {bad}"

def collapse(ids, processor, family):
    "Token ids with each picture back to the one placeholder a template writes."
    t = processor.tokenizer
    text = t.decode(ids)
    if name_of(family)=='llava': text = re.sub(r'(?:\[IMG\]|\[IMG_BREAK\])+\[IMG_END\]', '[IMG]', text)
    else: text = re.sub(f'(?:{re.escape(family.image_token)})+', family.image_token, text) if family.pad_values else text
    return t(text, add_special_tokens=False)['input_ids']

def name_of(family): return family.config.model_type

def test_swapping_two_pictures_changes_both_losses(name, adapted):
    model,processor,family = adapted
    a,b = drawn('7', (60,40)),drawn('x', (60,40), 'red', 'yellow')
    def losses(p, q):
        out = []
        for picture in (p,q):
            batch = pad_batch([encode(row('seven', picture, 'Which?'), processor, family)], family, processor.tokenizer.pad_token_id)
            with torch.no_grad(): out.append(model(**batch).loss.item())
        return out
    before,after = losses(a,b),losses(b,a)
    assert all(abs(x-y) > 1e-5 for x,y in zip(before, after)), f"{before} {after}"

def test_vision_lora_gets_gradients(name, adapted):
    model,processor,family = adapted
    batch = pad_batch([encode(r, processor, family) for r in mixed_rows()], family, processor.tokenizer.pad_token_id)
    model(**batch).loss.backward()
    dead = [n for n,p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert not dead and any(family.vision in n for n,p in model.named_parameters() if p.requires_grad), dead

def test_only_answers_and_their_closing_token_are_supervised(name, adapted):
    _,processor,family = adapted
    r = mixed_rows()[3]
    e = encode(r, processor, family)
    kept = processor.tokenizer.decode(e['labels'][e['labels']!=-100])
    assert kept == ''.join(a+family.turn_end for a in ('after','still','ok')), kept
    image_ids = processor.tokenizer.convert_tokens_to_ids(list(family.image_tokens))
    assert not torch.isin(e['labels'], torch.tensor(image_ids)).any()

def test_exactly_one_bos_and_where_the_system_message_goes(name, adapted):
    _,processor,family = adapted
    r,t = mixed_rows()[3],processor.tokenizer
    ids = encode(r, processor, family)['input_ids'].tolist()
    if t.bos_token_id is not None: assert ids.count(t.bos_token_id)==1 and ids[0]==t.bos_token_id
    text = t.decode(ids)
    assert text.count('Be brief.')==1
    assert text.index('Be brief.') < text.index('Text before')

def test_every_linear_of_a_part_is_reached_and_nothing_else(name):
    model,_ = tiny(name)
    family = family_for(model)
    linears = {n for n,m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    reached = {n for n in linears if re.fullmatch(family.targets(), n)}
    assert linears-reached == {'lm_head'}
    for flags in ({'vision':False}, {'language':False}):
        root = family.language if 'vision' in flags else None
        got = {n for n in linears if re.fullmatch(family.targets(**flags), n)}
        assert got and (all(n.startswith(family.language) for n in got) if root else not any(n.startswith(family.language) for n in got))
    last = {n for n in linears if re.fullmatch(family.targets(vision=False, last_n=1), n)}
    assert last and last < {n for n in linears if re.fullmatch(family.targets(vision=False), n)}
