"""Every figure that needs a GPU, those that tell most first; on several GPUs side by side. Run it again until nothing is missing.

    python benchmarks/gpu.py --minutes 9 --out results --python unsloth=VENV/bin/python
    python benchmarks/gpu.py --list

Each line of RUNS is a command of this folder that leaves its results in --out and goes on where it stopped. A GPU takes the next line when it is free, with its share of the processor's cores. What has ended is noted in
--out/done.json; a line that is cut off or fails comes again. Without a Python for Unsloth it is left out, and a line that names it has not ended.
"""
import argparse, json, os, subprocess, sys, threading, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
def speed(arch, name): return f'speed.py --arch {arch} --checkpointing --step-rows 16 --gib 78 --together --warm 40 --folder {{checkpoints}} --out {{out}}/speed-{name}.jsonl --plot {{out}}/speed-{name}.png --who '
RUNS = {
    'step 2b':              'step.py --arch qwen2vl-2b --folder {checkpoints} --out {out}/step.jsonl --plot {out}/step.png',
    'step of 4 rows 2b':    'step.py --arch qwen2vl-2b --rows 4 --setting plain compiled --folder {checkpoints} --out {out}/step-4.jsonl',
    'all parts 2b':         speed('qwen2vl-2b', '2b')+'ours unsloth --rows 16 4',
    'tower frozen 2b':      speed('qwen2vl-2b', '2b')+'ours unsloth --rows 16 --vision-frozen',
    'least memory 2b':      speed('qwen2vl-2b', '2b')+'''ours unsloth --rows 4 16 --switches {{"activation_gib":0}}''',
    'plan':                 'plan.py --minutes 60 --out {out}/plan.jsonl',   # it is this file that ends it
    'all parts 7b':         speed('qwen2vl-7b', '7b')+'ours unsloth --rows 8',
    '4 bit 7b':             speed('qwen2vl-7b', '7b')+'ours unsloth --rows 8 --bits 4',
    'transformers 2b':      speed('qwen2vl-2b', '2b')+'transformers --rows 4',
    'more rows 2b':         speed('qwen2vl-2b', '2b')+'ours unsloth --rows 1 2 8 32',
    'cached 2b':            speed('qwen2vl-2b', '2b')+'ours --rows 16 --vision-frozen --cached --n 64',
    'llama 11b':            speed('llama32-11b', '11b')+'ours unsloth --rows 8',
    'pixtral 12b':          speed('pixtral-12b', '12b')+'ours unsloth --rows 8',
    'generation 2b':        'generation.py --architecture Qwen2-VL-2B --stop-spread 8 64 --limit 192 --alone 16 --batches 64 128 --out {out}/generation.json',
    'precisions 2b':        'precisions.py --arch qwen2vl-2b --folder {checkpoints} --out {out} --precisions 16 8 nf4 nf4+vision',
    'sweep 2b':             'sweep.py --arch qwen2vl-2b --folder {checkpoints} --checkpointing --out {out}/sweep.jsonl --plot {out}/sweep.png',
}

def alone(command:str, a)->bool:
    "Whether the line names Unsloth, and there is no Python for it."
    return 'unsloth' in command.split() and not any(p.startswith('unsloth=') for p in a.python)

def words_of(command:str, a)->list[str]:
    "The words of a line of RUNS."
    words = command.format(out=a.out.resolve(), checkpoints=a.folder.resolve()).split()
    if words[0]=='speed.py':
        if alone(command, a): words.remove('unsloth')
        if a.python: words += ['--python', *a.python]
    return words

def run(name:str, device:int, place:int, n_devices:int, left:float, a)->bool:
    "One line on one GPU; whether it ended."
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[place*len(cores)//n_devices:(place+1)*len(cores)//n_devices]
    with open(a.out/f"{name.replace(' ', '-')}.log", 'a') as log:
        process = subprocess.Popen([sys.executable, *words_of(RUNS[name], a)], cwd=HERE, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, 'CUDA_VISIBLE_DEVICES':str(device)},
                                   preexec_fn=lambda: os.sched_setaffinity(0, mine), start_new_session=True)   # what is cut off ends with all that it started
        try: return process.wait(left)==0
        except subprocess.TimeoutExpired: os.killpg(process.pid, 9); return False

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--out', type=Path, default=Path('results')); ap.add_argument('--folder', type=Path, default=Path('checkpoints'), help='of checkpoints with random weights'); ap.add_argument('--minutes', type=float, default=9)
    ap.add_argument('--only', nargs='+', choices=list(RUNS)); ap.add_argument('--devices', type=int, nargs='+', help='numbers of the GPUs; all unless told')
    ap.add_argument('--python', nargs='+', default=[], metavar='WHO=FILE', help='of speed.py'); ap.add_argument('--list', action='store_true', help='the lines, and which have ended')
    a = ap.parse_args()
    done = a.out/'done.json'
    ended = json.loads(done.read_text()) if done.exists() else []
    waiting = [name for name in a.only or RUNS if name not in ended]
    if a.list: return print('\n'.join(f"{'ended  ' if name in ended else 'waiting'}  {name:18} {command}" for name,command in RUNS.items()))
    import torch
    devices,end,lock = a.devices or list(range(max(1, torch.cuda.device_count()))),time.monotonic()+60*a.minutes,threading.Lock()
    a.out.mkdir(parents=True, exist_ok=True)
    def work(place, device):
        while True:
            with lock:
                if not waiting or (left := end-time.monotonic())<30: return
                name = waiting.pop(0)
            start,good = time.monotonic(),run(name, device, place, len(devices), left, a)
            with lock:
                good = good and not alone(RUNS[name], a)
                if good: ended.append(name); done.write_text(json.dumps(ended))
                print(f"GPU {device}: {name} {'ended' if good else 'did not end'} after {time.monotonic()-start:.0f} s", flush=True)
    workers = [threading.Thread(target=work, args=pair) for pair in enumerate(devices)]
    for w in workers: w.start()
    for w in workers: w.join()
    print(f"{len(ended)} of {len(RUNS)} have ended.")

if __name__=='__main__': main()
