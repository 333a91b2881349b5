"""What 8 and 4 bit cost a tuned model: a short LoRA on a real set, then the base, the adapter on its quantised base, and the merged model quantised whole, in every precision.

    python benchmarks/precisions.py ocr_lines_fraktur receipts --data DATA --minutes 3
    python benchmarks/precisions.py --arch qwen2vl-2b --precisions 16 8 nf4 nf4+vision      # random weights of that size: what a GPU holds and how fast it answers, on drawn pages

DATA is a folder with a folder for each set: train.jsonl, test.jsonl and the pictures they name. Each set leaves a table (.json) and a plot (.png) in --out; an adapter that is there already is used again.
"""
import argparse, json, tempfile, time
from pathlib import Path

import torch

from common import checkpoint
from speed import drawn_pages
from ten_minutes import TASKS, read_set
from vlm_ft.demo import BASE, tune
from vlm_ft.evaluation.generation import room_for_answers
from vlm_ft.evaluation.precision import PRECISIONS, compare_precisions
from vlm_ft.merging import FastVisionModel
from vlm_ft.models.family import table
from vlm_ft.readers import load_rows

PIXELS,BATCH = {'ocr_lines_fraktur':28672, 'receipts':196608},{'receipts':4}  # of a picture; rows a step

COSTS = 'precision','disk_gib','memory_gib','load_s','rows_per_s','kl'    # what random weights can show

def costs(a)->list:
    "What a model of a published size weighs and how fast it answers, in each precision."
    with tempfile.TemporaryDirectory() as tmp:
        drawn_pages(Path(tmp), a.limit or 32)
        found = compare_precisions(checkpoint(a.arch, a.folder), load_rows(f'{tmp}/train.jsonl'), bits=a.precisions, batch_size=32, max_new_tokens=64, say=lambda line: print(line, flush=True))
    return [{k:line[k] for k in COSTS} for line in found]

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('sets', nargs='*', help=f"of {', '.join(TASKS)}"); ap.add_argument('--data', type=Path, help='the folder of the sets'); ap.add_argument('--out', type=Path, default=Path('precisions'))
    ap.add_argument('--model', default=str(BASE)); ap.add_argument('--minutes', type=float, default=3, help='of training'); ap.add_argument('--limit', type=int, help='test rows'); ap.add_argument('--learning-rate', type=float, default=1e-3)
    ap.add_argument('--precisions', nargs='+', default=list(PRECISIONS), choices=PRECISIONS); ap.add_argument('--memory', type=float, nargs='*', default=[], help='GiB: say what to ship under these limits')
    ap.add_argument('--arch', help='of six_steps.py, instead of sets: a random checkpoint is written to --folder'); ap.add_argument('--folder', type=Path, default=Path('checkpoints'))
    a = ap.parse_args()
    if unknown := [name for name in a.sets if name not in TASKS]: ap.error(f"there is no set {unknown[0]!r}; known: {', '.join(TASKS)}")
    if bool(a.sets)==bool(a.arch) or a.sets and not a.data: ap.error('name sets and their --data, or an --arch')
    if a.arch:
        a.out.mkdir(parents=True, exist_ok=True)
        lines = costs(a)
        (a.out/f'{a.arch}.json').write_text(json.dumps(lines, indent=1))
        return print(table(lines))
    for name in a.sets:
        folder,pixels = a.out/name,PIXELS.get(name)
        train,test = read_set(a.data/name, TASKS[name], a.limit)
        if not (folder/'merged'/'config.json').exists():
            model,processor = FastVisionModel.from_pretrained(a.model, max_seq_length=4096, dtype=None if torch.cuda.is_available() else torch.float32, max_pixels=pixels)
            start = time.perf_counter()
            model,done = tune(model, processor, train, folder, a.minutes, a.learning_rate, BATCH.get(name, 16))
            print(f"{name}: {done.global_step} steps in {time.perf_counter()-start:.0f} s", flush=True)
            model.save_pretrained_merged(folder/'merged', processor, overwrite=True)
            n = room_for_answers(train, processor)
            (folder/'room.json').write_text(json.dumps(n))
            del model
        found = compare_precisions({'base':a.model, 'adapter':folder/'adapter', 'merged':folder/'merged'}, test, bits=a.precisions, batch_size=32, max_new_tokens=json.loads((folder/'room.json').read_text()), max_pixels=pixels,
                                   say=lambda line: print(line, flush=True))
        print(f"\n{name}, {len(test)} test rows\n{found}\n")
        print(*found.advice(a.memory), sep='\n')
        (folder/'table.json').write_text(json.dumps(found, indent=1)); found.save(folder/'plot.png')

if __name__=='__main__': main()
