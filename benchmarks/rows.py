"""Memory and speed of rows: 1,000 beside 100,000 in each kind of file, and rows a second up to the batch beside plain transformers.

    python benchmarks/rows.py --out rows.md

Memory is the peak of a process of its own that checks all rows and then reads each once in random order and opens its picture; the libraries alone take what the
first line says. Pictures are drawn: ten files of 60x40 pixels for memory, twenty JPEG files of 640x480 for speed. No model is downloaded; the processor is
a real one with a small vocabulary.
"""
import argparse, base64, csv, io, json, os, random, subprocess, sys, tempfile, time
from pathlib import Path

KINDS = ('jsonl','jsonl, pictures inside','csv','parquet','a list in memory')

def peak_mib():
    "The most that this process has held so far."
    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])/1024

def write(kind, n, folder):
    "A file of `n` rows, written row by row."
    from vlm_ft.models.tiny import drawn
    for k in range(10): drawn('ab', (60,40)).save(folder/f'{k}.png')
    noise = random.Random(0)
    uri = lambda: 'data:image/png;base64,'+base64.b64encode((folder/'0.png').read_bytes()+noise.randbytes(6000)).decode()      # bytes after a PNG's end are not read
    row = lambda i: dict(image=uri() if 'inside' in kind else f'{i%10}.png', question='What is written here?', answer=f'word {i}', task='ocr', writer=f'w{i//100}')
    path = folder/f'rows.{dict(csv="csv", parquet="parquet").get(kind, "jsonl")}'
    if kind=='parquet':
        import pyarrow as pa, pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist([row(i) for i in range(n)]), path)
        return path
    with open(path, 'w', newline='') as f:
        table = csv.DictWriter(f, row(0)) if kind=='csv' else None
        if table: table.writeheader()
        for i in range(n): table.writerow(row(i)) if table else f.write(json.dumps(row(i))+'\n')
    return path

def memory(kind, path, n):
    "One measurement, in this process: libraries, then all rows."
    from vlm_ft.messages import open_image
    from vlm_ft.readers import load_rows
    if kind=='parquet': import datasets
    before,start = peak_mib(),time.perf_counter()
    rows = load_rows([json.loads(line) for line in open(path)], root=str(Path(path).parent)) if kind=='a list in memory' else load_rows(path)
    loaded,order = time.perf_counter(),list(range(n))
    random.Random(0).shuffle(order)
    for i in order: open_image(rows[i]['messages'][0]['content'][0]['image'])
    done = time.perf_counter()
    return dict(before=before, peak=peak_mib(), check=n/(loaded-start), read=n/(done-loaded))

def apart(kind, n):
    "`memory` in a process of its own, on a file that another has written."
    with tempfile.TemporaryDirectory() as d:
        env = {**os.environ, 'HF_DATASETS_CACHE':f'{d}/cache', 'HF_HUB_OFFLINE':'1', 'HF_DATASETS_DISABLE_PROGRESS_BARS':'1'}
        run = lambda *words: subprocess.run([sys.executable, __file__, *words], env=env, capture_output=True, text=True, check=True).stdout
        path = run('--write', kind, str(n), d).strip().splitlines()[-1]
        found = json.loads(run('--memory', kind, path, str(n)).strip().splitlines()[-1])
        return {**found, 'file':os.path.getsize(path)/2**20}

def speed(n, batch):
    "Rows a second from file to batch: plain transformers in a loop, and ours with 0, 1 and 2 workers."
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader
    from vlm_ft.models.tiny import drawn, tiny
    from vlm_ft.readers import load_rows
    from vlm_ft.setup import VisionDataCollator
    torch.set_num_threads(1)
    model,processor = tiny('qwen2_vl')
    with tempfile.TemporaryDirectory() as d:
        for k in range(20): drawn('ab', (640,480)).save(f'{d}/{k}.jpg')
        lines = [dict(image=f'{k%20}.jpg', question='What is written here?', answer=f'word {k}') for k in range(n)]
        Path(d, 'rows.jsonl').write_text('\n'.join(map(json.dumps, lines)))
        def plain():
            for i in range(0, n, batch):
                part = lines[i:i+batch]
                talks = [[{'role':'user','content':[{'type':'image'},{'type':'text','text':r['question']}]}, {'role':'assistant','content':[{'type':'text','text':r['answer']}]}] for r in part]
                yield processor(text=[processor.apply_chat_template(t, tokenize=False) for t in talks], images=[Image.open(f"{d}/{r['image']}").convert('RGB') for r in part], padding=True, return_tensors='pt')
        collate = VisionDataCollator(model, processor, max_seq_length=4096)
        rows = load_rows(f'{d}/rows.jsonl')
        ways = {'transformers, `processor(…)` in a loop':plain} | {f'`load_rows`, our collator, {w} worker{"s"*(w!=1)}':lambda w=w: DataLoader(rows, batch, collate_fn=collate, num_workers=w) for w in (0,1,2)}
        out = {name:[] for name in ways}
        for _ in range(2):                                                 # in turns
            for name,way in ways.items():
                start,cpu = time.perf_counter(),sum(os.times()[:4])            # of this process and of workers that have ended
                tokens = sum(int(b['attention_mask'].sum()) for b in way())
                out[name].append((n/(time.perf_counter()-start), n/(sum(os.times()[:4])-cpu), tokens))
        assert len({t for runs in out.values() for *_,t in runs})==1, out     # the same tokens, whoever makes them
        return {name:[max(x) for x in zip(*runs)][:2] for name,runs in out.items()}   # the better of two turns

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, nargs=2, default=(1000,100_000)); p.add_argument('--speed-rows', type=int, default=400); p.add_argument('--batch', type=int, default=4)
    p.add_argument('--only', choices=('memory','speed')); p.add_argument('--out', help='a file for the tables'); p.add_argument('--write', nargs=3, help=argparse.SUPPRESS); p.add_argument('--memory', nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.write: return print(write(a.write[0], int(a.write[1]), Path(a.write[2])))
    if a.memory: return print(json.dumps(memory(a.memory[0], a.memory[1], int(a.memory[2]))))
    few,many = a.rows
    print(f'load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')
    lines = [f'| file | MiB at {many:,} rows | peak MiB at {few:,} rows | peak MiB at {many:,} rows | more | rows/s checked | rows/s read, pictures opened |', '|---|---|---|---|---|---|---|']
    for kind in KINDS if a.only!='speed' else ():
        s,m = (apart(kind, n) for n in (few, many))
        lines.append(f"| {kind} | {m['file']:,.0f} | {s['peak']:,.0f} (libraries {s['before']:,.0f}) | {m['peak']:,.0f} | {m['peak']-s['peak']:+,.0f} | {m['check']:,.0f} | {m['read']:,.0f} |")
        print(lines[-1], flush=True)
    if a.only!='memory':
        lines += ['', f'| from file to batch, {a.batch} rows a batch | rows/s | rows a second of CPU time, workers counted |', '|---|---|---|']
        lines += [f"| {name} | {r:,.1f} | {c:,.1f} |" for name,(r,c) in speed(a.speed_rows, a.batch).items()]
    print('\n'.join(lines))
    if a.out: Path(a.out).write_text('\n'.join(lines)+'\n')

if __name__=='__main__': main()
