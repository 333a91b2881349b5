"""Speed and memory of a training step: vlm_ft and its peers in turns, in one run, on the same rows, labels and resolution.

    python benchmarks/speed.py                                                   # on a CPU, with the embedded base: ours beside transformers and PEFT
    python benchmarks/speed.py --data DATA/ocr_lines_fraktur --max-pixels 28672
    python benchmarks/speed.py --arch qwen2vl-2b --who ours unsloth transformers --rows 4 --accumulate 4 --checkpointing     # on a GPU, random weights
    python benchmarks/speed.py --arch qwen2vl-2b --rows 1 2 4 8 16 32 --step-rows 16 --checkpointing --minutes 7 --plot speed.png   # rows/s against memory; run again until all are there

Every trainer is a process of its own that loads once and then waits for its turn: windows alternate, and each is `--steps` steps after one that is not counted. Pictures are
opened, resized and collated within the time. LoRA r=16, AdamW, answers alone carry loss. "transformers" is its Trainer over PEFT's layers, with the same batches, padded.
Results are added to --out, a line a case; a case that is there already is not run again. DATA holds train.jsonl with image, question, answer.
TFLOP/s are those of the matrix products that a row needs (common.py: what is computed again or on padding does not count, and the tower does, whether --cached or not), alike for every trainer; the peak is measured in the same run.
"""
import argparse, json, math, os, random, statistics, subprocess, sys, tempfile, time
from pathlib import Path

from common import BASE, HERE, WORDS, apart, checkpoint, lines_of, page, row_work

MARKS = {'qwen2_vl':('<|im_start|>user\n', '<|im_start|>assistant\n'), 'llava':('[INST]', '[/INST]'),   # what Unsloth is told of the template: where questions and answers begin
         'mllama':('<|start_header_id|>user<|end_header_id|>\n\n', '<|start_header_id|>assistant<|end_header_id|>\n\n')}

def drawn_pages(folder, n, tokens=(100,1200), side=28, seed=0):
    "Pages of words of `tokens` squares of `side` pixels, log-uniform, 1:4 to 4:1; answers of 2 to 400 characters."
    rng,lines = random.Random(seed),[]
    for i in range(n):
        area,aspect = tokens[0]*(tokens[1]/tokens[0])**rng.random(),4**rng.uniform(-1, 1)
        w,h = (max(2*side, round((area*r)**.5*side)) for r in (aspect, 1/aspect))
        page((w,h), rng).save(folder/f'{i}.jpg', quality=90)
        answer = ' '.join(rng.choice(WORDS) for _ in range(max(2, int(rng.lognormvariate(2.8, .8)))))[:400].strip()
        lines.append(json.dumps(dict(image=f'{i}.jpg', question=f'Read the text in the image. Field {i}?', answer=answer)))
    (folder/'train.jsonl').write_text('\n'.join(lines))

def rows_of(data, n):
    "The first rows of a folder, with the places of their pictures."
    return [{**r, 'image':str(Path(data)/r['image'])} for r in map(json.loads, open(Path(data)/'train.jsonl'))][:n]

def load(a):
    "Model, processor and arguments of one trainer's process."
    import torch
    gpu,many = torch.cuda.is_available(),json.loads(a.spec)
    bits4,freeze = many['bits']==4,many['vision_frozen']
    args = dict(output_dir=tempfile.mkdtemp(), max_steps=10**6, per_device_train_batch_size=many['rows'], gradient_accumulation_steps=many['accumulate'], learning_rate=2e-4, lr_scheduler_type='constant', save_strategy='no',
                logging_steps=10**6, logging_first_step=False, gradient_checkpointing=many['checkpointing'], seed=0, dataloader_num_workers=4 if gpu else 0, dataloader_pin_memory=gpu, disable_tqdm=True, bf16=gpu,
                optim='adamw_torch_fused' if gpu else 'adamw_torch')
    rows = rows_of(many['data'], many['n'])
    dtype = torch.bfloat16 if gpu else torch.float32
    if a.worker=='unsloth':
        from trl import SFTConfig, SFTTrainer
        from unsloth import FastVisionModel
        from unsloth.trainer import UnslothVisionDataCollator
        from PIL import Image
        model,processor = FastVisionModel.from_pretrained(many['model'], load_in_4bit=bits4, load_in_16bit=not bits4, max_seq_length=4096, use_gradient_checkpointing='unsloth' if many['checkpointing'] else False, use_exact_model_name=True, dtype=dtype)
        model = FastVisionModel.get_peft_model(model, finetune_vision_layers=not freeze, finetune_language_layers=True, finetune_attention_modules=True, finetune_mlp_modules=True, r=16, lora_alpha=16, lora_dropout=0, bias='none')
        FastVisionModel.for_training(model)
        class Rows(list):
            def __getitem__(self, i):
                r = super().__getitem__(i)
                text = lambda t: [{'type':'text','text':t}]
                return {'messages':[{'role':'user','content':[{'type':'image','image':Image.open(r['image']).convert('RGB')}, *text(r['question'])]}, {'role':'assistant','content':text(r['answer'])}]}
        collator = UnslothVisionDataCollator(model, processor, train_on_responses_only=True, **dict(zip(('instruction_part','response_part'), MARKS[model.config.model_type])))
        args.pop('gradient_checkpointing')
        return SFTTrainer(model=model, args=SFTConfig(**args, report_to='none', remove_unused_columns=False, dataset_text_field='', dataset_kwargs={'skip_prepare_dataset':True}, max_length=4096), train_dataset=Rows(rows),
                          data_collator=collator, processing_class=processor.tokenizer)
    import transformers
    from vlm_ft import FastVisionModel, VisionDataCollator, VisionTrainer, VisionTrainingArguments
    from vlm_ft.models.family import family_for
    if a.worker=='ours':
        model,processor = FastVisionModel.from_pretrained(many['model'], dtype=None if bits4 else dtype, load_in_4bit=bits4, max_pixels=many['max_pixels'], max_seq_length=4096, use_gradient_checkpointing=many['checkpointing'])
        model = FastVisionModel.get_peft_model(model, r=16, finetune_vision_layers=not freeze)
        return VisionTrainer(model, VisionTrainingArguments(**{**args, 'feature_cache_gib':None if many['cached'] else 0, **many['switches']}), train_dataset=rows, processing_class=processor, progress=False)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    _,processor = FastVisionModel.from_pretrained(many['model'], max_pixels=many['max_pixels'], max_seq_length=4096)
    config = transformers.AutoConfig.from_pretrained(many['model'])
    family = family_for(config)
    how = dict(quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True, llm_int8_skip_modules=['lm_head', family.vision, family.projector])) if bits4 else {}
    model = getattr(transformers, family.architecture).from_pretrained(many['model'], dtype=dtype, device_map={'':0 if gpu else 'cpu'}, **how)
    if bits4: model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=many['checkpointing'], gradient_checkpointing_kwargs={'use_reentrant':False})
    elif many['checkpointing']: model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=family.targets(vision=not freeze)))
    return transformers.Trainer(model, transformers.TrainingArguments(**args, report_to='none', remove_unused_columns=False, use_cpu=not gpu, gradient_checkpointing_kwargs={'use_reentrant':False}), train_dataset=rows,
                                data_collator=VisionDataCollator(model, processor, max_seq_length=4096))

def settled(seconds:list, least:int, look=8)->bool:
    "Whether nothing is compiled any more: none of the last steps took twice as long as the fastest of them."
    last = seconds[-look:]
    return len(seconds)>=max(least, look) and max(last)<2*min(last)

def work(a):
    "A trainer's process: a window of steps each time a line comes in, a line of figures out."
    for name in ('HF_HUB_DISABLE_PROGRESS_BARS','UNSLOTH_DISABLE_STATISTICS','HF_HUB_OFFLINE'): os.environ[name] = '1'
    if a.worker=='unsloth': import unsloth  # noqa: F401  it wants to come first
    many,start,say = json.loads(a.spec),time.perf_counter(),os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)                                                             # whatever others print goes to stderr
    import torch
    from transformers import TrainerCallback
    gpu = torch.cuda.is_available()
    now = lambda: (torch.cuda.synchronize() if gpu else None, time.perf_counter())[1]
    def peak():
        if gpu: return dict(peak_gib=torch.cuda.max_memory_reserved()/2**30, allocated_gib=torch.cuda.max_memory_allocated()/2**30, emptied=torch.cuda.memory_stats().get('num_alloc_retries'))   # emptied: how often memory was given back to find room
        from vlm_ft.evaluation.precision import peak_gib
        return dict(peak_gib=peak_gib())
    def compiled():
        if not trainer.compiling.on: return {}
        from torch._dynamo.utils import counters
        return dict(compile_s=trainer.compiling.seconds, graphs=counters['stats']['unique_graphs'])
    class Turns(TrainerCallback):
        until,seen,steps = math.inf,0,[]                                      # until: the step that ends a window; steps: seconds of each before the first one
        def on_train_begin(self, *args, **kwargs): self.begun = self.last = now(); self.loaded = self.begun-start
        def on_step_end(self, args, state, control, **kwargs):
            self.seen += 1
            if self.until==math.inf:
                at = now(); self.steps.append(at-self.last); self.last = at
                if not (settled(self.steps, many['warm']) or self.seen==many['warm_most']): return
                figures = dict(load=self.loaded, warm=now()-self.begun, warm_steps=self.seen, settled=settled(self.steps, many['warm']))
            elif self.seen<self.until:
                if self.seen==self.until-many['steps']: self.at = now()
                return
            else: figures = dict(rows_per_second=many['rows']*many['accumulate']*many['steps']/(now()-self.at))
            say.write(json.dumps({**figures, **peak(), **({'kept':trainer.kept} | compiled() if a.worker=='ours' else {})})+'\n'); say.flush()   # kept: blocks that are not run again
            if sys.stdin.readline().strip()!='go': control.should_training_stop = True; return
            self.until = self.seen+1+many['steps']
    trainer = load(a)                                                         # sets how the GPU's memory is taken; a limit before it would have begun to take some
    if many['gib']: torch.cuda.set_per_process_memory_fraction(min(1., many['gib']*2**30/torch.cuda.get_device_properties(0).total_memory))
    trainer.add_callback(Turns())
    trainer.train()

class Peer:
    "A trainer in its own process."
    def __init__(self, who, spec):
        self.who,self.log = who,tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen([spec['python'].get(who, sys.executable), __file__, '--worker', who, '--spec', json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=HERE.parent)

    def hear(self)->dict:
        line = next((l for l in self.process.stdout if l.startswith('{')), None)   # what is printed as a trainer is imported is none of ours
        if line: return json.loads(line)
        self.log.seek(0)
        return {'error':self.log.read()[-1500:]}

    def say(self, word):
        try: self.process.stdin.write(word+'\n'); self.process.stdin.flush()
        except BrokenPipeError: pass

def compare(spec, who, windows, together=False)->dict:
    "Windows in turns: figures of each."
    found,peers = {},[]
    if together: peers = [Peer(w, spec) for w in who]
    for i,w in enumerate(who):                                                # one after the other; none compiles while another is measured
        if not together: peers.append(Peer(w, spec))
        found[w] = dict(peers[i].hear(), windows=[])
        print(f"{w:12} " + (f"failed: …{found[w]['error'][-600:]}" if 'error' in found[w] else f"loaded in {found[w]['load']:.0f} s, first {found[w]['warm_steps']} steps {found[w]['warm']:.0f} s" + ('' if found[w]['settled'] else ', and not settled yet')), flush=True)
    for i in range(windows):
        for p in peers:
            if 'error' in found[p.who]: continue
            p.say('go'); got = p.hear()
            if 'error' in got: found[p.who]['error'] = got['error']; continue
            found[p.who]['windows'].append(got.pop('rows_per_second')); found[p.who] |= got
            print(f"window {i+1} {p.who:12} {found[p.who]['windows'][-1]:.2f} rows/s, {got['peak_gib']:.2f} GiB", flush=True)
    for p in peers: p.say('stop'); p.process.wait(60)
    return found

def table_of(line:dict)->list[dict]:
    "What a case found, a dict a trainer, for `table`."
    work,chip = line.get('work') or {},line.get('chip') or {}                 # lines of an earlier version have neither
    out = []
    for who,f in line['found'].items():
        if not f['windows']: continue
        middle = statistics.median(f['windows'])
        tflops = middle*work['tflop'] if work else None
        out.append({'trainer':who, 'rows a pass':line['case']['rows'], 'rows/s, least':min(f['windows']), 'median':middle, 'most':max(f['windows']), 'supervised tokens/s':middle*work['supervised'] if work else None,
                    'TFLOP/s':tflops, 'of the peak':f"{100*tflops/chip['tflops']:.1f} %" if chip and work else None, **({'allocated GiB':f['allocated_gib'], 'reserved GiB':f['peak_gib']} if 'allocated_gib' in f else {'peak GiB':f['peak_gib']}),
                    'first steps':f.get('warm_steps'), 'they took, s':f['warm'], 'compiling, s':f.get('compile_s'), 'graphs':f.get('graphs')})
    return out

def best(lines:list)->list[str]:
    "Ours beside each peer over several numbers of rows a pass: both at their best, and within the least memory that the peer takes."
    points = {}
    for line in lines:
        for who,f in line['found'].items():
            if f['windows']: points.setdefault(who, []).append((statistics.median(f['windows']), f['peak_gib'], line['case']['rows']))
    ours,out = points.pop('ours', []),[]
    for who,p in points.items() if ours else ():
        (speed,_,rows),(peer,_,peer_rows),low = max(ours),max(p),min(p, key=lambda x: x[1])
        within = max((o for o in ours if o[1]<=low[1]), default=None)
        out.append(f"At their best, ours / {who}: {speed:.2f} ({rows} rows a pass) / {peer:.2f} ({peer_rows}) = {speed/peer:.2f}. In {who}'s least memory, {low[1]:.2f} GiB: "
                   + (f"{within[0]:.2f} ({within[2]}) / {low[0]:.2f} ({low[2]}) = {within[0]/low[0]:.2f}." if within else "none of ours fits."))
    return out

def plot(lines:list, path:Path):
    "Rows a second against peak memory, a line for each trainer and setting, a point for each number of rows a pass; bars from the slowest window to the fastest."
    from matplotlib.figure import Figure
    settings = [{k:v for k,v in l['case'].items() if k not in ('who','rows','accumulate')} for l in lines]
    unlike = [k for k in settings[0] if len({json.dumps(s.get(k)) for s in settings})>1]
    curves = {}
    for line,how in zip(lines, settings):
        for who,f in line['found'].items():
            if f['windows']: curves.setdefault(', '.join([who, *(f'{k}={how.get(k)}' for k in unlike)]), []).append((line['case']['rows'], f['peak_gib'], f['windows'], 'allocated_gib' in f))
    fig = Figure((7, 4.2), dpi=120, layout='constrained'); ax = fig.subplots()
    for name,points in sorted(curves.items()):
        points.sort(key=lambda p: p[0])
        y = [statistics.median(w) for *_,w,_ in points]
        ax.errorbar([p[1] for p in points], y, yerr=[[m-min(p[2]) for m,p in zip(y, points)], [max(p[2])-m for m,p in zip(y, points)]], marker='o', ms=4, capsize=3, label=name)
        for p,m in zip(points, y): ax.annotate(f' {p[0]}', (p[1], m), xytext=(3, 4), textcoords='offset points', fontsize=8)
    ax.set_xlabel('peak reserved GiB' if any(p[3] for c in curves.values() for p in c) else 'peak GiB of the process'); ax.set_ylabel('rows/s'); ax.set_ylim(0); ax.margins(x=.12)
    ax.set_title('Numbers beside points are rows a pass', loc='left', fontsize=10); ax.legend(frameon=False, fontsize=8); ax.grid(alpha=.25); ax.spines[['top','right']].set_visible(False)
    fig.savefig(path)

def run(case:dict, a, tmp:Path)->dict:
    "One case: its line of --out."
    model = checkpoint(a.arch, a.folder) if a.arch else a.model
    small = model==str(BASE)
    if not a.data and not (tmp/'train.jsonl').exists(): drawn_pages(tmp, a.n, *(((40,112), 16) if small else ()))
    spec = {**case, 'python':dict(p.split('=', 1) for p in a.python), 'model':model, 'data':str(Path(a.data or tmp).resolve()), 'steps':a.steps, 'warm':a.warm, 'warm_most':a.warm_most, 'max_pixels':a.max_pixels or (28672 if small else None)}
    print(f"{case['rows']} rows a pass, {case['accumulate']} passes a step", flush=True)
    found = compare(spec, a.who, a.windows, a.together)
    return dict(case=case, found=found, chip=json.loads(apart('common.py')[-1]), work=row_work(model, rows_of(spec['data'], a.n), spec['max_pixels'], not a.vision_frozen))

def show(lines:list):
    from vlm_ft.models.family import table
    print('\n'+table([row for line in lines for row in table_of(line)]))
    for line in lines:
        middle = {w:statistics.median(f['windows']) for w,f in line['found'].items() if f['windows']}
        if 'ours' in middle and len(middle)>1: print(f"{line['case']['rows']} rows a pass:", '  '.join(f"ours / {w}: {middle['ours']/v:.2f}" for w,v in middle.items() if w!='ours'))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--who', nargs='+', default=['ours','transformers'], choices=('ours','transformers','unsloth')); ap.add_argument('--arch', help='of six_steps.py: a random checkpoint is written to --folder')
    ap.add_argument('--folder', type=Path, default=Path('checkpoints')); ap.add_argument('--model', default=str(BASE)); ap.add_argument('--data', help='folder of rows; without it pages are drawn')
    ap.add_argument('--rows', type=int, nargs='+', default=[16], help='a pass; each number is a case'); ap.add_argument('--accumulate', type=int, default=1, help='passes a step')
    ap.add_argument('--step-rows', type=int, help='rows a step, which settle --accumulate'); ap.add_argument('--minutes', type=float, help='no case is begun after'); ap.add_argument('--plot', type=Path, help='file for rows/s against memory, of all cases in --out')
    ap.add_argument('--switches', type=json.loads, default={}, metavar='JSON', help='arguments of VisionTrainingArguments for ours, such as {"compile_blocks": false}'); ap.add_argument('--python', nargs='+', default=[], metavar='WHO=FILE', help='a Python of its own for a trainer, such as unsloth=VENV/bin/python')
    ap.add_argument('--bits', type=int, default=16, choices=(16,4)); ap.add_argument('--gib', type=float, help='of GPU memory that a trainer may take')
    ap.add_argument('--together', action='store_true', help='load all trainers at a time: sooner ready, but what their first steps took says little then')
    ap.add_argument('--max-pixels', type=int, help='of a picture; the embedded base takes 28672 unless told'); ap.add_argument('--checkpointing', action='store_true'); ap.add_argument('--vision-frozen', action='store_true')
    ap.add_argument('--cached', action='store_true', help='with --vision-frozen: features are kept over epochs'); ap.add_argument('--n', type=int, default=400, help='different rows')
    ap.add_argument('--steps', type=int, default=10, help='of a window'); ap.add_argument('--windows', type=int, default=3); ap.add_argument('--warm', type=int, default=8, help='steps before the first window, at least: it begins when none of the last 8 took twice as long as the fastest')
    ap.add_argument('--warm-most', type=int, default=60, help='steps after which it begins anyway')
    ap.add_argument('--out', type=Path, default=Path('speed.jsonl')); ap.add_argument('--worker', help=argparse.SUPPRESS); ap.add_argument('--spec', help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.worker: return work(a)
    start,settings = time.monotonic(),('who','arch','model','data','bits','gib','max_pixels','checkpointing','vision_frozen','cached','switches','n')
    cases = [{**{k:getattr(a, k) for k in settings}, 'rows':rows, 'accumulate':max(1, a.step_rows//rows) if a.step_rows else a.accumulate} for rows in a.rows]
    with tempfile.TemporaryDirectory() as tmp:
        for case in cases:
            if any(l['case']==case for l in lines_of(a.out)): print(f"{a.out} has the case of {case['rows']} rows already"); continue
            if a.minutes is not None and time.monotonic()-start>60*a.minutes: print('No time is left; run the same command again.'); break
            line = run(case, a, Path(tmp))
            with open(a.out, 'a') as f: f.write(json.dumps(line)+'\n')
            show([line])
    if len(cases)>1: show(done := [l for l in lines_of(a.out) if l['case'] in cases]); print('\n'.join(best(done)))
    if a.plot and (lines := lines_of(a.out)): plot(lines, a.plot)

if __name__=='__main__': main()
