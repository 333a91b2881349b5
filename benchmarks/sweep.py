"""How time and memory of training grow with image tokens, with rows a pass, and with rows in the file.

    python benchmarks/sweep.py --plot sweep.png                                                # on a CPU, with the embedded base
    python benchmarks/sweep.py --arch qwen2vl-2b --checkpointing --minutes 7 --plot sweep.png    # on a GPU, random weights; run again until all cases are there
    python benchmarks/sweep.py --axis tokens --tokens 64 1024 4096

tokens: rows with one picture of so many tokens, --hold rows a pass.   batch: so many rows a pass, one picture of 256 tokens in each.
rows: a file of so many rows is opened (`open_rows`), checked whole by the trainer, and trained on for a few steps; the rows share eight pictures of the fewest --tokens. What they may add is bounded: the
tokenizer remembers 10,000 pieces of text (some 30 MiB with the embedded base), the check and the order of an epoch take about 100 bytes a row.

Each case is a process of its own, so that its peak is its own. LoRA r=16 on all parts, AdamW, feature cache off, everything kept for the backward pass unless --checkpointing computes each block again. A step's time
is the median of --steps after the first ones, pictures opened and collated within it; "grows as" is the exponent between a case and the one before it, 1 being in proportion. Results are added to --out, a line a case;
a case that is there is not run again, but for those that failed otherwise than for want of memory. The table is printed in the end, from the file. TFLOP/s: see common.py.
"""
import argparse, json, math, random, shutil, statistics, tempfile, time
from pathlib import Path

from common import BASE, WORDS, apart, checkpoint, lines_of, page, processor_of, result_of, row_work

AXES = ('tokens','batch','rows')
TEXT = 512      # tokens of a row beside its picture, at most
SHARED = 8      # pictures that the rows of a file share

def picture_size(n:int, processor, family)->tuple:
    "(width, height) of the picture whose cost is nearest to `n` tokens: a square, or one twice as wide."
    side = family.seen(processor, (64,64)).side
    free,sizes = family.bounded(processor, (side*128)**2),[(side*2**-(-k//2), side*2**(k//2)) for k in range(14)]
    return min(sizes, key=lambda s: abs(math.log(sum(family.n_image_tokens(free, s))/n)))

def write_rows(folder:Path, n:int, size:tuple)->Path:
    "A file of `n` rows, and the pictures they share."
    rng = random.Random(0)
    for i in range(min(n, SHARED)): page(size, rng).save(folder/f'{i}.jpg', quality=90)
    with open(folder/'rows.jsonl', 'w') as f:
        for i in range(n): f.write(json.dumps(dict(image=f'{i%SHARED}.jpg', question=f'Read field {i%1000}.', answer=' '.join(rng.choice(WORDS) for _ in range(16))))+'\n')
    return folder/'rows.jsonl'

def roomy(model:str, n:int, folder:Path)->str:
    "The model; with fewer than `n` positions, a copy that claims them: a picture of 64x64 tokens takes 64 positions on each axis."
    config,_,_ = processor_of(model)
    if (text := config.get_text_config()).max_position_embeddings>=n: return model
    shutil.copytree(model, folder/'model')
    text.max_position_embeddings = n
    config.save_pretrained(folder/'model')
    return str(folder/'model')

def measure(case:dict)->dict:
    "One case, in this process."
    import torch
    from transformers import TrainerCallback
    from vlm_ft import FastVisionModel, VisionTrainer, VisionTrainingArguments
    from vlm_ft.evaluation.precision import peak_gib
    from vlm_ft.readers import open_rows
    gpu = torch.cuda.is_available()
    now = lambda: (torch.cuda.synchronize() if gpu else None, time.perf_counter())[1]
    class Clock(TrainerCallback):
        ends,warm = [],2 if gpu else 1
        def on_step_end(self, args, state, control, **kwargs):
            self.ends = [*self.ends, now()]
            counted = len(self.ends)-self.warm
            control.should_training_stop |= counted>=case['steps'] or counted>=2 and self.ends[-1]-self.ends[self.warm-1]>case['seconds']
    with tempfile.TemporaryDirectory() as tmp:
        tmp,clock = Path(tmp),Clock()
        _,processor,family = processor_of(case['model'])
        size = picture_size(case['tokens'], processor, family)
        path = write_rows(tmp, case['rows'] or (clock.warm+case['steps'])*case['batch'], size)
        model,processor = FastVisionModel.from_pretrained(roomy(case['model'], case['tokens']+TEXT, tmp), max_seq_length=case['tokens']+TEXT, max_pixels=max(size)**2, dtype=torch.bfloat16 if gpu else torch.float32)
        model = FastVisionModel.get_peft_model(model, r=16)
        loaded,held,start = peak_gib(),torch.cuda.memory_allocated()/2**30 if gpu else None,time.perf_counter()
        rows = open_rows(path)
        opened = time.perf_counter()
        args = VisionTrainingArguments(output_dir=tmp/'run', per_device_train_batch_size=case['batch'], gradient_accumulation_steps=1, max_steps=10**6, learning_rate=2e-4, lr_scheduler_type='constant', save_strategy='no', seed=0,
                                       logging_steps=10**6, logging_first_step=False, disable_tqdm=True, feature_cache_gib=0, gradient_checkpointing=case['checkpointing'], activation_gib=0)
        trainer = VisionTrainer(model, args, train_dataset=rows, processing_class=processor, callbacks=[clock], progress=False)
        checked = time.perf_counter()
        trainer.train()
        found = dict(peak_gib=peak_gib(), **(dict(held_gib=held, allocated_gib=torch.cuda.max_memory_allocated()/2**30, reserved_gib=torch.cuda.max_memory_reserved()/2**30) if gpu else {}))
        steps = [b-a for a,b in zip(clock.ends[clock.warm-1:], clock.ends[clock.warm:])]
        work = row_work(case['model'], [rows[i] for i in range(min(len(rows), SHARED))], max(size)**2)
    return dict(size=size, loaded_gib=loaded, **found, open_s=opened-start, check_s=checked-opened, first_s=clock.ends[0]-start, steps=steps, step_s=statistics.median(steps), **work)

def growth(x:list, y:list)->list:
    "Exponents between neighbours: 1 where y grows as x; None for the first and where x does not grow."
    return [None]+[math.log(y1/y0)/math.log(x1/x0) if x1>x0 and y0>0 and y1>0 else None for x0,x1,y0,y1 in zip(x, x[1:], y, y[1:])]

def of_axis(lines:list, axis:str)->list[dict]:
    "An axis' lines that have figures, from the smallest."
    return sorted((l for l in lines if l['case']['axis']==axis and 'error' not in l), key=lambda l: l['case'][axis])

def memory(line:dict)->tuple:
    "(GiB at most, GiB of them that were there before training): a GPU's, else the process's; of the axis of rows, the process's."
    return (line['allocated_gib'], line['held_gib']) if 'allocated_gib' in line and line['case']['axis']!='rows' else (line['peak_gib'], line['loaded_gib'])

def table_of(lines:list, axis:str)->list[dict]:
    "One dict a case, for `table`."
    lines = of_axis(lines, axis)
    if axis=='rows': return [{'rows':l['case']['rows'], 'opened in s':l['open_s'], 'checked in s':l['check_s'], 'first step after s':l['first_s'], 'a step, s':l['step_s'], 'loaded GiB':l['loaded_gib'], 'peak GiB':l['peak_gib'],
                              'MiB more than with fewest':round(1024*(l['peak_gib']-lines[0]['peak_gib']), 1), **({'reserved GiB':l['reserved_gib']} if 'reserved_gib' in l else {})} for l in lines]
    x = [l['image_tokens']*l['case']['batch'] for l in lines]
    grows = {k: growth(x, [v(l) for l in lines]) for k,v in dict(time=lambda l: l['step_s'], work=lambda l: l['tflop']*l['case']['batch'], memory=lambda l: memory(l)[0]-memory(l)[1]).items()}
    out = []
    for i,l in enumerate(lines):
        speed = l['case']['batch']/l['step_s']
        out.append({'image tokens':round(l['image_tokens']), 'rows a pass':l['case']['batch'], 'a step, s':l['step_s'], 'grows as':grows['time'][i], 'its products':grows['work'][i], 'rows/s':speed, 'supervised tokens/s':speed*l['supervised'],
                    'TFLOP/s':speed*l['tflop'], 'of the peak':f"{100*speed*l['tflop']/l['chip']['tflops']:.1f} %", **({'loaded GiB':l['held_gib'], 'allocated GiB':l['allocated_gib'], 'reserved GiB':l['reserved_gib']} if 'allocated_gib' in l else {'loaded GiB':l['loaded_gib'], 'peak GiB':l['peak_gib']}),
                    'beyond it grows as':grows['memory'][i]})
    return out

def reason(error:str)->str:
    "The line of an error that names it."
    lines = error.strip().splitlines()
    return next((l for l in reversed(lines) if 'Error' in l), lines[-1])[:200]

def groups(lines:list)->dict:
    "Lines by what was trained, and where."
    out = {}
    for l in lines: out.setdefault(f"{Path(l['case']['model']).name} on {l['chip']['device']}{', checkpointing' if l['case']['checkpointing'] else ''}", []).append(l)
    return out

def show(lines:list):
    from vlm_ft.models.family import table
    for name,own in groups(lines).items():
        for axis in AXES:
            if found := table_of(own, axis): print(f"\n{name}: {axis}\n{table(found)}")
            for l in own:
                if l['case']['axis']==axis and 'error' in l: print(f"{axis} {l['case'][axis]:,}: failed, {reason(l['error'])}")

def plot(lines:list, path:Path):
    "A panel for each axis: time above, peak memory below."
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter
    drawn = [axis for axis in AXES if of_axis(lines, axis)]
    fig = Figure((1+3.7*len(drawn), 5.6), dpi=120, layout='constrained'); axes = fig.subplots(2, len(drawn), sharex='col', squeeze=False)
    for (time_ax,memory_ax),axis in zip(axes.T, drawn):
        ticks = set()
        for k,(name,own) in enumerate(groups(lines).items()):
            own,style = of_axis(own, axis),dict(marker='o', ms=4, color=f'C{k}')
            x = [round(l['image_tokens']) if axis=='tokens' else l['case'][axis] for l in own]
            ticks |= set(x)
            time_ax.plot(x, y := [l['step_s'] for l in own], **style, label=name)
            if own and axis!='rows': time_ax.plot(x, [y[0]*v/x[0] for v in x], color=f'C{k}', lw=.8, ls=':')
            if own and axis=='tokens':                                        # as much time for each product, the middle case's
                products = [l['tflop'] for l in own]
                time_ax.plot(x, [v*statistics.median(t/p for t,p in zip(y, products)) for v in products], color=f'C{k}', lw=.8, ls='--')
            if axis=='rows': time_ax.plot(x, [l['first_s'] for l in own], **{**style, 'marker':'s'}, ls='--')
            memory_ax.plot(x, [memory(l)[0] for l in own], **style)
        time_ax.set(xscale='log', yscale='log', ylabel='seconds')
        time_ax.set_title({'tokens':'a step; dotted: in proportion, dashed: as its products', 'batch':'a step; dotted: in proportion', 'rows':'a step; dashed: until the first one is done'}[axis], loc='left', fontsize=9)
        memory_ax.set(ylabel='peak GiB' + (' of the process' if axis=='rows' else ''), xlabel={'tokens':'image tokens a row', 'batch':'rows a pass', 'rows':'rows in the file'}[axis])
        memory_ax.set_ylim(0, 1.15*memory_ax.get_ylim()[1]); memory_ax.set_xticks(sorted(ticks), [f'{t:,}' for t in sorted(ticks)], rotation=30); memory_ax.minorticks_off()
        for ax in (time_ax, memory_ax): ax.grid(alpha=.25); ax.spines[['top','right']].set_visible(False); ax.yaxis.set_major_formatter(FuncFormatter(lambda v,_: f'{v:g}'))
    fig.legend(*axes[0,0].get_legend_handles_labels(), loc='outside upper left', frameon=False, fontsize=9)
    fig.savefig(path)

def cases(a, model:str)->list[dict]:
    "All that is to be measured."
    how = dict(model=model, checkpointing=a.checkpointing, steps=a.steps, seconds=a.seconds, rows=0)
    one = {'tokens':lambda n: dict(tokens=n, batch=a.hold), 'batch':lambda n: dict(tokens=256, batch=n), 'rows':lambda n: dict(tokens=min(a.tokens), batch=a.hold, rows=n)}
    return [{'axis':axis, **how, **one[axis](n)} for axis in a.axis for n in getattr(a, axis)]

def run(case:dict, chip:dict)->dict:
    "One case in a process of its own: its line of --out."
    got,out = result_of(__file__, '--case', json.dumps(case))
    return dict(case=case, chip=chip, **(got or dict(error=out.stderr[-2000:] or f'ended with {out.returncode}', final='OutOfMemoryError' in out.stderr or out.returncode==-9)))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--axis', nargs='+', default=list(AXES), choices=AXES); ap.add_argument('--tokens', type=int, nargs='+', default=[64,128,256,512,1024,2048,4096]); ap.add_argument('--batch', type=int, nargs='+', default=[1,2,4,8,16,32])
    ap.add_argument('--rows', type=int, nargs='+', default=[100,1000,10_000,100_000]); ap.add_argument('--hold', type=int, help='rows a pass on the other axes; 4 on a GPU, 1 on a CPU unless told')
    ap.add_argument('--arch', help='of six_steps.py: a random checkpoint is written to --folder'); ap.add_argument('--folder', type=Path, default=Path('checkpoints')); ap.add_argument('--model', default=str(BASE))
    ap.add_argument('--checkpointing', action='store_true', help='each block is computed again in the backward pass'); ap.add_argument('--steps', type=int, default=5, help='that are timed'); ap.add_argument('--seconds', type=float, default=30, help='after which two will do')
    ap.add_argument('--minutes', type=float, help='no case is begun after'); ap.add_argument('--out', type=Path, default=Path('sweep.jsonl')); ap.add_argument('--plot', type=Path, help='a picture of all in --out'); ap.add_argument('--case', type=json.loads, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.case: return print('RESULT '+json.dumps(measure(a.case)))
    if a.hold is None:
        import torch
        a.hold = 4 if torch.cuda.is_available() else 1
    start,model,chip = time.monotonic(),checkpoint(a.arch, a.folder) if a.arch else a.model,None
    settled = lambda l: 'error' not in l or l.get('final')
    todo = [c for c in cases(a, model) if not any(l['case']==c and settled(l) for l in lines_of(a.out))]
    print(f"{len(todo)} cases to run", flush=True)
    for i,case in enumerate(todo):
        if a.minutes is not None and time.monotonic()-start>60*a.minutes: print(f'No time is left for {len(todo)-i} cases; run the same command again.'); break
        chip = chip or json.loads(apart('common.py')[-1])
        line = run(case, chip)
        with open(a.out, 'a') as f: f.write(json.dumps(line)+'\n')
        took,n = time.monotonic()-start,len(todo)-i-1
        print(f"{case['axis']} {case[case['axis']]:,}: " + (f"failed: …{line['error'][-600:]}" if 'error' in line else f"{line['step_s']:.3g} s a step, peak {memory(line)[0]:.2f} GiB, first step after {line['first_s']:.3g} s") + f"  ({took:.0f} s, {n} left)", flush=True)
    last = {json.dumps(l['case'], sort_keys=True):l for l in lines_of(a.out)}.values()
    show(list(last))
    if a.plot: plot(list(last), a.plot)

if __name__=='__main__': main()
