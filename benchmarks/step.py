"""Where a training step's time goes: kernels by kind, how many are launched, how often the processor waits for the GPU; plain, and with each lever.

    python benchmarks/step.py                                           # on a CPU, with the embedded base
    python benchmarks/step.py --arch qwen2vl-2b --plot step.png         # on a GPU, random weights; five minutes
    python benchmarks/step.py --arch qwen2vl-2b --setting compiled "compiled, all kept" --list 20

A step is one packed pass of --rows drawn pages that lie on the device, backward, and AdamW; LoRA r=16, bfloat16 on a GPU. Each setting is a process of its own: --warm passes, of different lengths, then the median of --steps
timed ones, then one of the middle length under torch's profiler. "waits" are calls that hold the processor until the GPU is done. Results are added to --out, a line a case; a case that is there is not run again.
"""
import argparse, json, re, statistics, tempfile, time, warnings
from contextlib import nullcontext
from pathlib import Path

from common import BASE, checkpoint, lines_of, result_of

SETTINGS = {  # what is unlike: every block run again, the plain blocks, torch's attention, all parts trained
    'plain':                                      {},
    'compiled':                                   dict(compiled=True),
    'compiled, all kept':                         dict(compiled=True, kept=True),
    'compiled, all kept, flash-attn-4':           dict(compiled=True, kept=True, newest=True),
    'tower frozen, compiled, all kept':           dict(compiled=True, frozen=True, kept=True),
    'tower frozen, compiled, all kept, flash-attn-4': dict(compiled=True, frozen=True, kept=True, newest=True),
}
KINDS = {     # of kernels, by their names: the first that matches
    'attention':   r'flash|attention|fmha',
    'products':    r'gemm|nvjet|cutlass|cublas|splitk|addmm|::mm|::bmm|_LoraLinear|linear',
    'copies':      r'^memcpy|^memset|copy_kernel|CatArray|aten::(copy_|cat|fill_|clone)',
    'elementwise': '',
}

def kind_of(kernel:str)->str: return next(kind for kind,pattern in KINDS.items() if re.search(pattern, kernel, re.I))

def batches(processor, family, n:int, rows:int, small:bool)->list:
    "`n` packed batches of drawn pages."
    from speed import drawn_pages, rows_of
    from vlm_ft.data import encode
    from vlm_ft.packing import pack_batch
    with tempfile.TemporaryDirectory() as tmp:
        drawn_pages(Path(tmp), n*rows, *(((40,112), 16) if small else ()))
        features = [encode(r, processor, family) for r in rows_of(tmp, n*rows)]
    return [pack_batch(features[i*rows:(i+1)*rows], family) for i in range(n)]

def measure(case:dict)->dict:
    "One case."
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vlm_ft import FastVisionModel
    from vlm_ft.kernels.attention import has_flash_attention_4
    from vlm_ft.kernels.compiled import BlockGraphs
    from vlm_ft.kernels.lora import AdaptersAtHand
    from vlm_ft.loading import for_training
    from vlm_ft.models.family import family_for
    from vlm_ft.packing import packed, packed_loss
    from vlm_ft.recompute import RunAgain, kinds_of_blocks
    how,gpu,small = SETTINGS[case['setting']],torch.cuda.is_available(),case['model']==str(BASE)
    if how.get('newest') and not has_flash_attention_4(): return dict(error='flash-attn-4 is not installed, or has no kernels for this machine')
    wait = torch.cuda.synchronize if gpu else lambda: None
    model,processor = FastVisionModel.from_pretrained(case['model'], dtype=torch.bfloat16 if gpu else torch.float32, max_pixels=28672 if small else None, max_seq_length=4096)
    model = for_training(FastVisionModel.get_peft_model(model, r=16, finetune_vision_layers=not how.get('frozen', False)))
    family,graphs = family_for(model),BlockGraphs(model) if how.get('compiled') else nullcontext()
    again,at_hand = RunAgain(model),AdaptersAtHand(model, torch.bfloat16 if gpu else None)
    for blocks in kinds_of_blocks(model).values():
        for b in blocks: b.gradient_checkpointing = not how.get('kept', False)
    given = [{k: v.to(model.device) if torch.is_tensor(v) else v for k,v in b.items()} for b in batches(processor, family, 5, case['rows'], small)]
    typical = sorted(given, key=lambda b: b['input_ids'].numel())[2]                # of five
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=gpu)
    def step(batch):
        with packed(model, family, how.get('newest', False)), graphs, again, at_hand:
            with torch.autocast('cuda', torch.bfloat16, enabled=gpu): loss = packed_loss(model, batch)
            loss.backward()
        optimizer.step(); optimizer.zero_grad(set_to_none=True)
    start = time.perf_counter()
    for i in range(case['warm']): step(given[i%5])
    wait()
    found,seconds = dict(warm_seconds=time.perf_counter()-start),[]
    if gpu: torch.cuda.reset_peak_memory_stats()
    for i in range(case['steps']):
        wait(); start = time.perf_counter(); step(given[i%5]); wait()
        seconds.append(time.perf_counter()-start)
    found |= dict(seconds=statistics.median(seconds), least=min(seconds), most=max(seconds), tokens=typical['input_ids'].numel())
    if gpu: found |= dict(allocated_gib=torch.cuda.max_memory_allocated()/2**30, reserved_gib=torch.cuda.max_memory_reserved()/2**30, device=torch.cuda.get_device_name())
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU] if gpu else [ProfilerActivity.CPU]) as seen: step(typical); wait()
    took = lambda e: e.self_device_time_total if gpu else e.self_cpu_time_total
    events = [(took(e)/1e3, e.count, e.key) for e in seen.key_averages() if took(e)>0 and (not gpu or e.device_type.name=='CUDA')]
    found['kinds'] = {kind: sum(ms for ms,_,key in events if kind_of(key)==kind) for kind in KINDS}
    found |= dict(kernels_ms=sum(e[0] for e in events), launches=sum(e[1] for e in events), longest=sorted(events, reverse=True)[:40])
    if gpu:
        torch.cuda.set_sync_debug_mode('warn')
        with warnings.catch_warnings(record=True) as said: warnings.simplefilter('always'); step(typical)
        torch.cuda.set_sync_debug_mode('default')
        places = [f'{Path(w.filename).name}:{w.lineno}' for w in said if 'synchroniz' in str(w.message)]
        found['waits'] = {p: places.count(p) for p in dict.fromkeys(places)}
    return found

def table_of(lines:list)->list[dict]:
    return [{'setting':l['setting'], 'rows/s':l['rows']/l['seconds'], 'step, s':l['seconds'], 'kernels, s':l['kernels_ms']/1e3, 'launches':l['launches'], 'waits':sum(l['waits'].values()) if 'waits' in l else None,
             **{k: f"{l['kinds'][k]/l['kernels_ms']:.0%}" for k in KINDS}, 'reserved GiB':l.get('reserved_gib'), 'first passes, s':l['warm_seconds']} for l in lines if 'seconds' in l]

def plot(lines:list):
    "A figure: a bar a setting: seconds in kernels by kind, and what of the step is none."
    from matplotlib.figure import Figure
    lines = [l for l in lines if 'seconds' in l][::-1]
    fig = Figure((8, .5*len(lines)+1.3), dpi=120, layout='constrained'); ax = fig.subplots()
    left = [0.]*len(lines)
    for kind,colour in zip((*KINDS, 'no kernel runs'), ('#d62728','#1f77b4','#7f7f7f','#2ca02c','#eeeeee')):
        width = [max(0., l['seconds']-l['kernels_ms']/1e3) if kind not in KINDS else l['kinds'][kind]/1e3*min(1., 1e3*l['seconds']/l['kernels_ms']) for l in lines]
        ax.barh([l['setting'] for l in lines], width, left=left, color=colour, label=kind)
        left = [a+b for a,b in zip(left, width)]
    for i,l in enumerate(lines): ax.annotate(f" {l['rows']/l['seconds']:.1f} rows/s", (left[i], i), va='center', fontsize=8)
    ax.set_xlabel(f"seconds of a step of {lines[0]['rows']} rows, {lines[0]['tokens']:,} tokens ({lines[0].get('device', 'CPU')})"); ax.margins(x=.14); ax.spines[['top','right']].set_visible(False)
    ax.legend(frameon=False, fontsize=8, ncols=5, loc='lower center', bbox_to_anchor=(.5, 1.))
    return fig

def main():
    from vlm_ft.models.family import table
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--arch', help='of six_steps.py: a random checkpoint is written to --folder'); ap.add_argument('--folder', type=Path, default=Path('checkpoints')); ap.add_argument('--model', default=str(BASE))
    ap.add_argument('--setting', nargs='+', default=list(SETTINGS), choices=list(SETTINGS)); ap.add_argument('--rows', type=int, default=16); ap.add_argument('--steps', type=int, default=10); ap.add_argument('--warm', type=int, default=6)
    ap.add_argument('--minutes', type=float, help='no case is begun after'); ap.add_argument('--out', type=Path, default=Path('step.jsonl')); ap.add_argument('--plot', type=Path); ap.add_argument('--list', type=int, default=0, help='the longest kernels of each')
    ap.add_argument('--case', type=json.loads, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.case: return print('RESULT '+json.dumps(measure(a.case)))
    start,model = time.monotonic(),checkpoint(a.arch, a.folder) if a.arch else a.model
    cases = [dict(arch=a.arch, model=model, setting=s, rows=a.rows, steps=a.steps, warm=a.warm) for s in a.setting]
    is_done = lambda case: any(all(l.get(k)==v for k,v in case.items()) and 'error' not in l for l in lines_of(a.out))
    for case in cases:
        if is_done(case): continue
        if a.minutes is not None and time.monotonic()-start>60*a.minutes: print('No time is left; run the same command again.'); break
        found,done = result_of(__file__, '--case', json.dumps(case))
        found = found or dict(error=done.stderr[-1500:])
        with open(a.out, 'a') as f: f.write(json.dumps({**case, **found})+'\n')
        print(f"{case['setting']}: " + (f"failed: …{found['error'][-600:]}" if 'error' in found else f"{found['seconds']:.3f} s a step, {found['kernels_ms']/1e3:.3f} s of it in kernels"), flush=True)
    lines = [l for l in lines_of(a.out) if 'error' not in l]
    print('\n'+table(table_of(lines)))
    for l in lines[:len(lines) if a.list else 0]:
        print(f"\n{l['setting']}; waits at {l.get('waits')}")
        for ms,n,key in l['longest'][:a.list]: print(f"{ms:9.2f} ms {n:6}  {key[:110]}")
    if a.plot and lines: plot(lines).savefig(a.plot)

if __name__=='__main__': main()
