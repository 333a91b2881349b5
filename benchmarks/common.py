"""What the benchmarks share: pages to read, checkpoints of random weights, the products that a row needs, and the most that the chip does.

    python benchmarks/common.py        # the peak of this machine at matrix products, measured: one JSON line
"""
import json, os, random, shutil, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = HERE.parent/'vlm_ft'/'base'
WORDS = 'invoice total amount due date tax customer number street city product price quantity order paid balance'.split()

def page(
    size:tuple, # (width, height) in pixels
    rng:random.Random,
):
    "A page of words, on paper of some light colour."
    from PIL import Image, ImageDraw
    (w,h),paper = size,tuple(rng.randrange(200, 256) for _ in range(3))
    im = Image.new('RGB', size, paper)
    draw = ImageDraw.Draw(im)
    for y in range(4, h-10, 14): draw.text((4, y), ' '.join(f'{rng.choice(WORDS)} {rng.randrange(999)}' for _ in range(max(1, w//70))), fill='black')
    return im

def apart(*words)->list[str]:
    "What a command of ours prints, line by line; a process of its own, so that it leaves nothing in memory."
    done = subprocess.run([sys.executable, *map(str, words)], env={**os.environ, 'PYTHONPATH':os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get('PYTHONPATH'))))}, capture_output=True, text=True, cwd=HERE)
    if done.returncode: raise RuntimeError(done.stderr[-3000:])
    return done.stdout.splitlines()

def result_of(*words, timeout=None)->tuple: # (what its line of RESULT says, or None; the process)
    "A command of ours in a process of its own, so that its peak is its own."
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=timeout)
    return next((json.loads(l.removeprefix('RESULT ')) for l in done.stdout.splitlines() if l.startswith('RESULT ')), None),done

def checkpoint(arch:str, folder:Path)->str:
    "The folder of a checkpoint with random weights, written if it is not there; `arch` is one of six_steps.SIZES."
    path = Path(folder).resolve()/arch
    if not (path/'config.json').exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=path.parent))
        try:
            apart('-c', f'import six_steps; six_steps.write_checkpoint({arch!r}, {str(part)!r}, False)')
            part.rename(path)
        except OSError:                                                       # another process was faster
            if not (path/'config.json').exists(): raise
        finally: shutil.rmtree(part, ignore_errors=True)
    return str(path)

def lines_of(path:Path)->list[dict]:
    "The results of earlier runs."
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []

def processor_of(model:str, max_pixels=None)->tuple:
    "(config, processor, family) of a folder or hub id; no weights are read."
    from transformers import AutoConfig
    from vlm_ft.checkpoint import find
    from vlm_ft.loading import load_processor
    from vlm_ft.models.family import family_for
    config = AutoConfig.from_pretrained(model)
    family = family_for(config)
    processor = load_processor(family, find(model).processor)
    family.bound(processor, max_pixels=max_pixels)
    return config,processor,family

def attention_flops(q, k, v, dropout=0., causal=False, *args, **kwargs)->int:
    "Two products for each head, of the shapes of queries, keys and values; half of them where nothing ahead is seen."
    b,h,n,d = q
    return 2*b*h*n*k[2]*(d+v[3])//(1+causal)

def row_flops(
    config, processor, family,
    rows:list,    # as the package takes them
    vision=True,  # the tower trains too
    r:int=16,     # of the adapter
)->float:
    """Operations of matrix products that training on one of these rows needs, two for each pair of numbers multiplied, added up over the shapes of a dry run of the config alone.

    Forward; the gradient of what goes in, where something before it trains; no gradient of frozen weights; adapters; attention within rows, half of it where it is causal, its backward pass twice its
    forward; the vocabulary where an answer is. What checkpointing computes again is not needed, and not counted.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from vlm_ft import FastVisionModel
    from vlm_ft.data import encode
    from vlm_ft.packing import pack_batch
    from vlm_ft.planning import dry_step, hollow
    aten = torch.ops.aten
    own = {aten.addmm_:lambda c, a, b, *args, out_shape=None, **kw: 2*a[0]*a[1]*b[1],              # what torch's counter leaves out
           aten._scaled_dot_product_flash_attention_for_cpu:lambda *a, out_shape=None, **kw: attention_flops(*a, **kw),
           aten._scaled_dot_product_flash_attention_for_cpu_backward:lambda grad, q, k, v, out, sums, dropout, causal, out_shape=None, **kw: 2*attention_flops(q, k, v, dropout, causal)}
    net,mode = hollow(config, adapt=lambda m: FastVisionModel.get_peft_model(m, r=r, finetune_vision_layers=vision), dtype=torch.float32)
    with FlopCounterMode(display=False, custom_mapping=own) as count:
        dry_step(net, mode, pack_batch([encode(row, processor, family) for row in rows], family), checkpointing=False, gpu=False)
    return count.get_total_flops()/len(rows)

def row_work(
    model:str, rows:list, max_pixels=None, vision=True,
    sample=16, # rows of a dry run, from the shortest to the longest
)->dict:       # means of a row: tokens, supervised, tflop
    "What there is to do in a row, on average."
    from vlm_ft.data import check_row
    config,processor,family = processor_of(model, max_pixels)
    counts = [check_row(row, processor, family, decode=False) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: counts[i]['total']+counts[i]['cross'])
    n = min(sample, len(rows))
    some = [rows[order[(2*i+1)*len(rows)//(2*n)]] for i in range(n)]
    mean = lambda key: sum(c[key] for c in counts)/len(rows)
    return dict(tokens=mean('total'), image_tokens=mean('image')+mean('cross'), supervised=mean('supervised'), tflop=row_flops(config, processor, family, some, vision)/1e12)

def peak()->dict: # device, tflops
    "The most operations a second of matrix products that this machine shows: 8192 numbers wide in bfloat16 on a GPU; on a CPU 2048, in float32 or bfloat16, whichever is faster."
    import torch
    gpu,threads = torch.cuda.is_available(),torch.get_num_threads()
    n,best = 8192 if gpu else 2048,0.
    wait = torch.cuda.synchronize if gpu else lambda: None
    for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
        a,b = (torch.randn(n, n, device='cuda' if gpu else 'cpu').to(dtype) for _ in range(2))
        for i in range(5 if gpu else 3):                                      # the first is a warm-up
            times = 20 if gpu else 1
            wait(); start = time.perf_counter()
            for _ in range(times): a@b
            wait()
            if i: best = max(best, 2*n**3*times/(time.perf_counter()-start))
    return dict(device=torch.cuda.get_device_name() if gpu else f'CPU, {threads} thread{"s"*(threads>1)}', tflops=best/1e12)

if __name__=='__main__': print(json.dumps(peak()))
