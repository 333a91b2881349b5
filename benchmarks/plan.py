"""Planned beside measured: the peak memory of training steps on a GPU, for architectures with random weights.

    python benchmarks/plan.py                                        # Qwen2-VL-2B and 7B, three settings each; under 8 minutes
    python benchmarks/plan.py --model FOLDER --out mine.jsonl        # a folder with config.json and processor files, such as a published one's
    python benchmarks/plan.py --tiny                                 # a small model, on any machine: the logic alone

Each case is a process of its own, so that the GPU is empty before it. It plans (a dry run, in seconds), makes the weights on the GPU, trains three optimizer steps of two passes with VisionTrainer,
and compares the plan with torch's `max_memory_allocated`; `max_memory_reserved`, which fragmentation adds to, is shown beside. Results are added to --out, a line a case; a case that is there is not run
again, so that a run that was cut off goes on. The table is printed in the end, from the file.
"""
import argparse, json, subprocess, tempfile, time
from pathlib import Path

from common import lines_of, processor_of, result_of

SETTINGS = {  # rows a pass, and what is unlike the defaults
    'checkpointing':       dict(rows=8),
    'all kept':            dict(rows=1, checkpointing=False),
    '4 bit, no vision':    dict(rows=8, bits=4, vision=False),
}

def config_and_processor(arch):
    "An architecture's config and a processor with the published resolution; `arch` may be a folder."
    import six_steps
    if arch=='tiny': return six_steps.config_and_processor('qwen2vl-2b', True)
    if Path(arch).is_dir(): return processor_of(arch)[:2]
    return six_steps.config_and_processor(arch, False)

def random_model(config, bits, dtype, device):
    "The model of a config with random weights, made where they stay; in 4 bit quantised layer by layer."
    import torch, transformers
    from vlm_ft.models.family import family_for
    family = family_for(config)
    torch.manual_seed(0); torch.set_default_dtype(dtype)
    try:
        with torch.device('meta'): model = getattr(transformers, family.architecture)(config)
    finally: torch.set_default_dtype(torch.float32)
    if bits==4:
        import bitsandbytes as bnb
        keep = ('lm_head', family.vision, family.projector)
        for name,m in list(model.named_modules()):
            if type(m) is not torch.nn.Linear or any(name==k or name.startswith(k+'.') for k in keep): continue
            new = bnb.nn.Linear4bit(m.in_features, m.out_features, bias=m.bias is not None, compute_dtype=dtype, quant_type='nf4', compress_statistics=True)
            new.weight = bnb.nn.Params4bit(torch.empty(m.out_features, m.in_features, dtype=dtype).normal_(std=.02), requires_grad=False, quant_type='nf4', compress_statistics=True)
            if m.bias is not None: new.bias = torch.nn.Parameter(torch.zeros(m.out_features, dtype=dtype), requires_grad=False)
            parent,_,leaf = name.rpartition('.')
            setattr(model.get_submodule(parent), leaf, new.to(device))
    tied,made = {},[]
    for m in model.modules():
        for key,p in list(m._parameters.items()):
            if p is None or not p.is_meta: continue
            if id(p) not in tied:
                new = torch.empty(p.shape, dtype=dtype, device=device)
                torch.nn.init.ones_(new) if p.ndim==1 and key=='weight' else torch.nn.init.zeros_(new) if p.ndim==1 else torch.nn.init.normal_(new, std=.02)
                tied[id(p)] = torch.nn.Parameter(new, requires_grad=False); made.append(p)   # kept, or its id would be another's
            m._parameters[key] = tied[id(p)]
    buffers(model, config, device)
    model.requires_grad_(False)
    family.prepare(model)
    model.max_seq_length,model.name_or_path = 8192,'random'
    return model.eval()

def buffers(model, config, device):
    "Rotary frequencies and the like as transformers makes them: by making their modules again."
    import torch
    from vlm_ft.models.family import family_for
    for m in model.modules():
        for key,b in list(m._buffers.items()):
            if b is None or not b.is_meta: continue
            if key in ('inv_freq','original_inv_freq'):
                head = b.shape[0]*2
                theta = getattr(m, 'theta', None) or (getattr(getattr(m, 'config', None), 'rope_parameters', None) or {}).get('rope_theta', 10000.)
                m._buffers[key] = 1/theta**(torch.arange(0, head, 2, device=device, dtype=torch.float32)/head)
                if key=='original_inv_freq' or isinstance(getattr(m, 'original_inv_freq', None), torch.Tensor) and m.original_inv_freq.is_meta: m.original_inv_freq = m._buffers[key]
            else: m._buffers[key] = torch.zeros(b.shape, dtype=b.dtype, device=device)

def pages(n, side):
    "Rows of pages, all alike in size, so that each pass is the one that is planned."
    from vlm_ft.models.tiny import drawn
    return [{'image':drawn(f'Invoice {i:03}, total {37*i+11:05}.20', (side, side*4//3)), 'question':'What is the total?', 'answer':'the total is '*6+f'{i:03}'} for i in range(n)]

def case(a):
    "One case: planned and measured, as a dict."
    import torch
    import vlm_ft
    from vlm_ft import FastVisionModel, VisionTrainer, VisionTrainingArguments
    from vlm_ft.data import encode
    from vlm_ft.models.family import family_for
    from vlm_ft.packing import pack_batch
    from vlm_ft.planning import dry_step, hollow, standing
    from vlm_ft.recompute import RunAgain
    how,gpu = {'checkpointing':True, 'bits':16, 'vision':True, **SETTINGS[a.setting]},torch.cuda.is_available()
    if not gpu: how['bits'] = 16                                                # the logic alone
    config,processor = config_and_processor(a.arch)
    family,dtype,device = family_for(config),torch.bfloat16 if gpu else torch.float32,'cuda' if gpu else 'cpu'
    rows = pages(how['rows']*2, 112 if a.arch=='tiny' else 840)
    adapt = lambda m: FastVisionModel.get_peft_model(m, r=16, finetune_vision_layers=how['vision'])
    start = time.perf_counter()
    net,mode = hollow(config, how['bits'], ('lm_head', family.vision, family.projector), adapt, dtype)
    step = dry_step(net, mode, pack_batch([encode(r, processor, family) for r in rows[:how['rows']]], family), how['checkpointing'], gpu=gpu)
    means = standing(net)
    found = dict(arch=a.arch, setting=a.setting, rows=how['rows'], seconds_plan=round(time.perf_counter()-start, 1), planned={k: v/2**30 for k,v in {**means, **step}.items()},
                 planned_gib=(sum(means.values())+step['batch']+step['activations']+max(step['loss'], step['working']))/2**30)
    del net
    model = adapt(random_model(config, how['bits'], dtype, device))
    found['weights_gib'] = torch.cuda.memory_allocated()/2**30 if gpu else sum(p.nbytes for p in model.parameters())/2**30
    args = VisionTrainingArguments(output_dir=tempfile.mkdtemp(), max_steps=3, per_device_train_batch_size=how['rows'], gradient_accumulation_steps=2, gradient_checkpointing=how['checkpointing'], save_strategy='no',
                                   logging_steps=1, dataloader_num_workers=0, dataloader_pin_memory=False, seed=0, feature_cache_gib=0, activation_gib=0, compile_blocks=False, use_cpu=not gpu)
    model.gradient_checkpointing_wanted = how['checkpointing']
    FastVisionModel.for_training(model)
    trainer = VisionTrainer(model, args, train_dataset=rows, processing_class=processor, progress=False)
    if trainer.recompute: trainer.aside,trainer.again = False,RunAgain(model)  # every block is run again, and its input and the optimizer's state stay where they are, as planned
    if gpu: torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train()
    found['seconds_train'] = round(time.perf_counter()-start, 1)
    if gpu: found |= dict(allocated_gib=torch.cuda.max_memory_allocated()/2**30, reserved_gib=torch.cuda.max_memory_reserved()/2**30, gpu=torch.cuda.get_device_name())
    return found

def show(path):
    from vlm_ft.models.family import table
    lines = lines_of(path)
    percent = lambda l, k: f"{100*(l['planned_gib']/l[k]-1):+.1f} %" if l.get(k) else None
    print(table([{'model':Path(l['arch']).name, 'setting':l['setting'], 'rows':l['rows'], 'planned GiB':l.get('planned_gib'), 'allocated GiB':l.get('allocated_gib'), 'error':percent(l, 'allocated_gib'),
                  'reserved GiB':l.get('reserved_gib'), 'of it':percent(l, 'reserved_gib'), 'failed':(l.get('error') or '')[-60:].replace('\n', ' ')} for l in lines]))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--arch', nargs='+', default=['qwen2vl-2b','qwen2vl-7b']); ap.add_argument('--model', nargs='+', help='folders with config.json and processor files, instead')
    ap.add_argument('--setting', nargs='+', default=list(SETTINGS), choices=list(SETTINGS)); ap.add_argument('--tiny', action='store_true'); ap.add_argument('--out', type=Path, default=Path('plan.jsonl'))
    ap.add_argument('--minutes', type=float, default=7.5, help='no case is begun after'); ap.add_argument('--case', nargs=2, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.case:
        a.arch,a.setting = a.case
        return print('RESULT '+json.dumps(case(a)))
    start = time.monotonic()
    done = {(l['arch'],l['setting']) for l in lines_of(a.out) if 'error' not in l}
    for arch in ['tiny'] if a.tiny else a.model or a.arch:
        for setting in a.setting:
            left = 60*a.minutes-(time.monotonic()-start)
            if (arch,setting) in done: continue
            if left<20: print(f"{arch}, {setting}: no time is left; run the same command again."); continue
            try: got,out = result_of(__file__, '--case', arch, setting, timeout=left)
            except subprocess.TimeoutExpired: print(f"{arch}, {setting}: not done in time; run the same command again."); continue
            got = got or dict(arch=arch, setting=setting, rows=SETTINGS[setting]['rows'], error=out.stderr[-2000:])
            with open(a.out, 'a') as f: f.write(json.dumps(got)+'\n')
            print(f"{arch}, {setting}: " + (f"failed\n{got['error']}" if 'error' in got else f"planned {got['planned_gib']:.2f} GiB in {got['seconds_plan']} s" + (f", measured {got['allocated_gib']:.2f}" if 'allocated_gib' in got else '')), flush=True)
    show(a.out)

if __name__=='__main__': main()
