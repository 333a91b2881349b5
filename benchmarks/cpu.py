"""Rows a second and memory of training on a CPU, with the embedded base: vlm_ft beside transformers and PEFT alone, in turns.

    python benchmarks/cpu.py                                          # lines that are drawn here
    python benchmarks/cpu.py --data DATA/ocr_lines_fraktur --max-pixels 28672

Both train LoRA r=16 on all parts (or, with --vision-frozen, on the language part), 16 rows a step, float32, the same rows in the same order at the same resolution,
pictures opened and prepared within the time. Each window is a process of its own; the first steps of each are not counted. DATA holds train.jsonl with image, question, answer.
"""
import argparse, itertools, json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path

BASE = Path(__file__).resolve().parent.parent/'vlm_ft'/'base'
WARM = 3  # steps that are not counted

def drawn_lines(folder, n=480):
    "Lines of text, drawn into a folder as a user would have them."
    import random
    from vlm_ft.base.drawing import tiny_fonts
    from vlm_ft.base.tasks import sample
    fonts,out = tiny_fonts(folder/'fonts'),[]
    for i in range(n):
        row = sample(random.Random(i).getrandbits(32), fonts, task='ocr/lines')
        row['parts'][0].convert('RGB').save(folder/f'{i}.png')
        out.append(json.dumps(dict(image=f'{i}.png', question=row['parts'][1], answer=row['answer'])))
    (folder/'train.jsonl').write_text('\n'.join(out))

def clock(steps):
    "A callback that knows how long the counted steps took."
    from transformers import TrainerCallback
    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==WARM: self.start = time.perf_counter()
            if state.global_step==WARM+steps: self.seconds = time.perf_counter()-self.start
    return Clock()

def ours(a, rows, args):
    import torch
    from vlm_ft import FastVisionModel, VisionTrainer, VisionTrainingArguments
    model,processor = FastVisionModel.from_pretrained(str(BASE), dtype=torch.float32, max_pixels=a.max_pixels, device='cpu', max_seq_length=4096)
    model = FastVisionModel.get_peft_model(model, r=16, finetune_vision_layers=not a.vision_frozen)
    trainer = VisionTrainer(model, VisionTrainingArguments(**args, feature_cache_gib=None if a.cached else 0), train_dataset=rows, processing_class=processor, progress=False)
    return trainer

def theirs(a, rows, args):
    from plain_peft import Reader
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration, Trainer, TrainingArguments
    import torch
    model = Qwen2VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    names = '(qkv|attn.proj|fc1|fc2|merger.mlp.[02]|[qkvo]_proj|gate_proj|up_proj|down_proj)'
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=(r'.*language_model.*\.' if a.vision_frozen else r'.*\.')+names))
    reader = Reader(BASE, a.max_pixels)
    return Trainer(model, TrainingArguments(**args, remove_unused_columns=False, report_to='none', use_cpu=True), train_dataset=rows, data_collator=reader)

def window(a):
    "One process: train, and say rows a second and the most memory held."
    os.environ['HF_HUB_DISABLE_PROGRESS_BARS'] = '1'
    rows = [{**r, 'image':str(a.data/r['image'])} for r in map(json.loads, open(a.data/'train.jsonl'))]
    rows = list(itertools.islice(itertools.cycle(rows[:a.rows]) if a.rows else itertools.cycle(rows), 16*(WARM+a.steps)))
    with tempfile.TemporaryDirectory() as out:
        args = dict(output_dir=out, max_steps=WARM+a.steps, per_device_train_batch_size=16, gradient_accumulation_steps=1, learning_rate=1e-3, save_strategy='no', logging_steps=1000,
                    gradient_checkpointing=False, seed=0, dataloader_num_workers=0, dataloader_pin_memory=False, disable_tqdm=True, max_grad_norm=1.)
        trainer,seen = (ours if a.window=='ours' else theirs)(a, rows, args),clock(a.steps)
        trainer.add_callback(seen)
        trainer.train()
    print(json.dumps(dict(rows_per_second=16*a.steps/seen.seconds, peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, loss=trainer.state.log_history[-1]['train_loss'])))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data', type=Path, help='folder of rows; without it lines are drawn'); ap.add_argument('--max-pixels', type=int, default=28672, help='of a picture'); ap.add_argument('--steps', type=int, default=12, help='counted, of each window')
    ap.add_argument('--windows', type=int, default=3, help='of each'); ap.add_argument('--vision-frozen', action='store_true'); ap.add_argument('--cached', action='store_true', help='with --vision-frozen: features are kept over epochs')
    ap.add_argument('--rows', type=int, help='different rows; fewer mean epochs'); ap.add_argument('--window', choices=('ours','theirs'), help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.window: return window(a)
    with tempfile.TemporaryDirectory() as tmp:
        if not a.data: drawn_lines(Path(tmp)); a.data = Path(tmp)
        found = {'ours':[], 'theirs':[]}
        for i,who in itertools.product(range(a.windows), found):
            command = [sys.executable, __file__, '--window', who, '--data', a.data, '--max-pixels', a.max_pixels, '--steps', a.steps, *(['--vision-frozen']*a.vision_frozen), *(['--cached']*a.cached), *(['--rows', a.rows] if a.rows else [])]
            out = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            if out.returncode: sys.exit(f'{who} failed:\n{out.stderr[-3000:]}')
            found[who].append(json.loads(out.stdout.strip().splitlines()[-1]))
            print(f"window {i+1}, {who:6}: {found[who][-1]['rows_per_second']:.2f} rows/s, {found[who][-1]['peak_gib']:.2f} GiB, mean loss {found[who][-1]['loss']:.4f}", flush=True)
    speed = {who: sorted(w['rows_per_second'] for w in ws) for who,ws in found.items()}
    middle = {who: s[len(s)//2] for who,s in speed.items()}
    for who,s in speed.items(): print(f"{who:6}  rows/s {s[0]:.2f} / {middle[who]:.2f} / {s[-1]:.2f} (least, median, most)  peak {max(w['peak_gib'] for w in found[who]):.2f} GiB")
    print(f"ours / theirs: {middle['ours']/middle['theirs']:.2f}")

if __name__=='__main__': main()
