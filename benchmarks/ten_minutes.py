"""Ten CPU minutes of LoRA on a real set, with vlm_ft: before, after, the tuned model on other rows' pictures, and the commonest answer.

    python benchmarks/ten_minutes.py ocr_lines_fraktur --data DATA --max-pixels 28672
    python benchmarks/ten_minutes.py receipts --data DATA --max-pixels 196608 --batch 4

DATA is a folder with a folder for each set: train.jsonl, test.jsonl and the pictures they name.
Reading is not counted as training. All test rows are read unless --limit says otherwise.
"""
import argparse, json, time
from collections import Counter
from pathlib import Path

import torch

from vlm_ft.base.recipe import MAIN
from vlm_ft.demo import BASE, figures, room_for_answers, shuffled, tune
from vlm_ft.evaluation.precision import peak_gib
from vlm_ft.evaluation.generation import predict
from vlm_ft.evaluation.metrics import accepted_answers, score
from vlm_ft.merging import FastVisionModel
from vlm_ft.readers import load_rows

TASKS = {'ocr_lines_fraktur':'ocr', 'latex_ocr':'latex', 'receipts':'extract', 'captions':'vqa'}  # the rows of a set that are asked
METRIC = MAIN | dict(extract='f1')

def read_set(folder:Path, task:str, limit=None)->tuple:
    "Training and test rows of one task."
    train,test = ([r for r in load_rows(folder/f'{split}.jsonl') if r.get('task')==task] for split in ('train','test'))
    return train, test[:limit]

def majority(train:list, test:list)->list:
    "The commonest training answer, for every test row."
    return [Counter(a for r in train for a in accepted_answers(r)[:1]).most_common(1)[0][0]]*len(test)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('set', choices=TASKS)
    ap.add_argument('--data', type=Path, required=True, help='the folder of the sets'); ap.add_argument('--out', type=Path, default=Path('ten_minutes'), help='folder for adapters and results.jsonl')
    ap.add_argument('--model', default=str(BASE)); ap.add_argument('--minutes', type=float, default=10, help='of training'); ap.add_argument('--limit', type=int, help='test rows')
    ap.add_argument('--max-pixels', type=int); ap.add_argument('--max-new-tokens', type=int, help='the default is half as long again as the longest training answer')
    ap.add_argument('--r', type=int, default=16); ap.add_argument('--learning-rate', type=float, default=1e-3); ap.add_argument('--batch', type=int, default=16); ap.add_argument('--seed', type=int, default=0)
    a = ap.parse_args()
    task = TASKS[a.set]
    train,test = read_set(a.data/a.set, task, a.limit)
    model,processor = FastVisionModel.from_pretrained(a.model, max_seq_length=4096, dtype=torch.float32, max_pixels=a.max_pixels, device='cpu')
    n = a.max_new_tokens or room_for_answers(train, processor)
    read = lambda rows: score(test, predict(model, processor, rows, batch_size=32, max_new_tokens=n))
    print(f'{a.set}: {len(train)} rows to train on, {len(test)} to test on, answers of up to {n} tokens', flush=True)
    scores = {'before':read(test)}
    start = time.perf_counter()
    model,done = tune(model, processor, train, a.out/a.set, a.minutes, a.learning_rate, a.batch, a.seed, a.r)
    seconds = time.perf_counter()-start
    scores |= {'after':read(test), 'shuffled':read(shuffled(test)), 'majority':score(test, majority(train, test))}
    print(figures(scores))
    value = {k: next(s for s in table if s['metric']==METRIC[task]) for k,table in scores.items()}
    line = dict(trainer='vlm_ft', set=a.set, metric=METRIC[task], rows=len(test), train_rows=len(train), minutes=a.minutes, seconds=round(seconds, 1), steps=done.global_step, batch=a.batch, r=a.r,
                learning_rate=a.learning_rate, max_pixels=a.max_pixels, seed=a.seed, peak_gib=peak_gib(), **{k: [v['value'], v['low'], v['high']] for k,v in value.items()})
    a.out.mkdir(parents=True, exist_ok=True)
    with open(a.out/'results.jsonl', 'a') as f: f.write(json.dumps(line)+'\n')
    print(json.dumps(line))

if __name__=='__main__': main()
