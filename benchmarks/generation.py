"""Answers a second: vlm_ft beside transformers' `generate`, one row at a time and at its best batch size, on the same rows and machine.

    python benchmarks/generation.py                                   # the embedded base on lines drawn for it
    python benchmarks/generation.py --model MODEL --data test.jsonl --max-pixels 262144 --max-new-tokens 256
    python benchmarks/generation.py --architecture Qwen2-VL-2B --stop-spread 16 200   # random weights of that size: speed and memory, on a GPU

Every way gets the same encoded prompts, greedy, and the median of --repeats runs in turns. `generate` gets its rows sorted by length and padded on the left; what is written one row at a time may be
a part of them (--alone), since its rows/s do not depend on how many there are.
Random weights do not stop by themselves: with --stop-spread each answer ends at a length drawn evenly from that range, for all ways alike.
"""
import argparse, gc, json, random, statistics, time
from pathlib import Path

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from vlm_ft.data import encode
from vlm_ft.demo import BASE
from vlm_ft.evaluation.decoding import Writer, at_work, to_device
from vlm_ft.evaluation.generation import stop_ids
from vlm_ft.merging import FastVisionModel
from vlm_ft.readers import load_rows
from vlm_ft.models.family import base_of, family_for, table
from vlm_ft.models.tiny import drawn, tiny_processor
from vlm_ft.setup import pad_batch

TEXT = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32768)
VISION = dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4)

def drawn_lines(n:int)->list:
    "Lines of 1 to 9 words, which answers of as unlike length read."
    rng,words = random.Random(0),'amber birch cedar delta ember frost grove heron indigo jasper kettle lemon maple north ochre pearl quartz river'.split()
    texts = [' '.join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(n)]
    return [{'messages':[{'role':'user', 'content':[{'type':'image', 'image':drawn(t, (12*len(t)+8, 32))}, {'type':'text', 'text':'Read the line.'}]}, {'role':'assistant', 'content':t}], 'task':'ocr'} for t in texts]

def of_size_2b(device):
    "A model of Qwen2-VL-2B's shape with random weights in bfloat16, and a processor for it."
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    processor = tiny_processor('qwen2_vl')
    token = processor.tokenizer.convert_tokens_to_ids
    rope = dict(rope_type='default', rope_theta=1e6, mrope_section=[16,24,24])
    config = Qwen2VLConfig(text_config=dict(TEXT, vocab_size=151936, rope_parameters=rope), vision_config=VISION, image_token_id=token('<|image_pad|>'), video_token_id=token('<|video_pad|>'),
                           vision_start_token_id=token('<|vision_start|>'), vision_end_token_id=token('<|vision_end|>'), tie_word_embeddings=True)
    torch.manual_seed(0); torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device): model = Qwen2VLForConditionalGeneration(config).eval()
    finally: torch.set_default_dtype(torch.float32)
    family_for(model).prepare(model)
    return model, processor

class EndsAt(StoppingCriteria):
    "Each row of a batch ends at a length of its own."
    def __init__(self, lengths, start): self.lengths,self.start = torch.tensor(lengths),start
    def __call__(self, input_ids, scores, **kwargs): return (input_ids.shape[1]-self.start>=self.lengths.to(input_ids.device))

class WriterToLength(Writer):
    "A writer whose rows end at lengths of their own."
    lengths = None
    def _take(self, logits, rows):
        most,self.stops = self.most,set()
        for r,t in zip(rows, self.sampling(logits, [None]*len(rows)).tolist()): r.ids.append(t)
        ended = [i for i,r in enumerate(self.rows) if len(r.ids)>=min(most, self.lengths[r.number])]
        out = [self.rows[i] for i in ended]
        if ended: self.rows = [self.rows[i] for i in self.slots.leave(ended)]
        return out

def generated(model, family, features, stops, n, batch_size, lengths):
    "ids of each row by `generate`."
    out = []
    for lo in range(0, len(features), batch_size):
        batch = to_device({k:v for k,v in pad_batch(features[lo:lo+batch_size], family, 0, side='left').items() if k!='labels'}, model)
        start = batch['input_ids'].shape[1]
        ends = {} if lengths is None else dict(stopping_criteria=StoppingCriteriaList([EndsAt(lengths[lo:lo+batch_size], start)]))
        with torch.no_grad(): ids = model.generate(**batch, **ends, generation_config=GenerationConfig(do_sample=False, max_new_tokens=n, eos_token_id=sorted(stops) if lengths is None else [10**6], pad_token_id=0))
        for k,row in enumerate(ids[:, start:].tolist()):
            at = next((i for i,t in enumerate(row) if t in stops), n-1) if lengths is None else lengths[lo+k]-1
            out.append(row[:at+1])
    return out

def written(model, family, features, stops, n, batch_size, lengths):
    "ids of each row by vlm_ft."
    kind = Writer if lengths is None else WriterToLength
    writer = kind(model, family, batch_size, max(len(f['input_ids']) for f in features)+n, stops, n)
    writer.lengths = lengths
    with at_work(model, family): done = dict(writer.run(enumerate(features)))
    return [done[i] for i in range(len(features))]

def timed(f, device)->tuple:  # (result, seconds, peak GiB of the GPU)
    gc.collect()                                                              # recordings of the one before
    if device.type=='cuda': torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter(); out = f()
    if device.type=='cuda': torch.cuda.synchronize()
    return out, time.perf_counter()-start, torch.cuda.max_memory_allocated()/2**30 if device.type=='cuda' else None

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--model', default=str(BASE), help='folder or hub id'); ap.add_argument('--architecture', choices=('Qwen2-VL-2B',), help='random weights of this shape, instead of --model')
    ap.add_argument('--data', help='a .jsonl file; the default is lines drawn here'); ap.add_argument('--limit', type=int, default=96, help='rows, drawn evenly')
    ap.add_argument('--max-pixels', type=int); ap.add_argument('--max-new-tokens', type=int, default=128); ap.add_argument('--batches', type=int, nargs='+', default=[8,16,32,64], help='rows at a time that are tried')
    ap.add_argument('--alone', type=int, help='rows that are written one at a time, spread evenly; all unless told')
    ap.add_argument('--repeats', type=int, default=3); ap.add_argument('--dtype', default='float32' if not torch.cuda.is_available() else 'bfloat16'); ap.add_argument('--out', type=Path, help='append the figures to this .jsonl file')
    ap.add_argument('--stop-spread', type=int, nargs=2, metavar=('LEAST','MOST'), help='answers end at lengths drawn from this range')
    a = ap.parse_args()
    if a.architecture: model,processor = of_size_2b('cuda' if torch.cuda.is_available() else 'cpu')
    else: model,processor = FastVisionModel.from_pretrained(a.model, max_seq_length=4096, dtype=a.dtype, max_pixels=a.max_pixels)
    base,family,device = base_of(model),family_for(model),base_of(model).device
    rows = load_rows(a.data) if a.data else drawn_lines(a.limit)
    rows = random.Random(0).sample(rows, min(a.limit, len(rows)))
    features = sorted((encode(r, processor, family, prompt_only=True) for r in rows), key=lambda f: -len(f['input_ids']))
    stops,rng = set(stop_ids(base, processor.tokenizer, family)),random.Random(1)
    lengths = [rng.randint(*a.stop_spread) for _ in rows] if a.stop_spread else None
    if lengths: a.max_new_tokens = a.stop_spread[1]
    n_alone = min(a.alone or len(rows), len(rows))
    some = [i*len(rows)//n_alone for i in range(n_alone)]
    ways = {('generate',1):generated, **{('generate',b):generated for b in a.batches}, **{('vlm_ft',b):written for b in a.batches}}
    runs,answers,peak = {w:[] for w in ways},{},{}
    few = features[:2]
    for w,f in ways.items(): f(base, family, few, stops, 4, w[1], [4]*2 if lengths else None)             # warm up
    for _ in range(a.repeats):
        for w,f in ways.items():
            which = some if w[1]==1 else range(len(rows))
            mine,ends = [features[i] for i in which],lengths and [lengths[i] for i in which]
            ids,seconds,peak[w] = timed(lambda f=f, w=w, mine=mine, ends=ends: f(base, family, mine, stops, a.max_new_tokens, w[1], ends), device)
            answers[w] = dict(zip(which, ids)); runs[w].append(len(mine)/seconds)
            print(f"{w[0]} {w[1]}: {runs[w][-1]:.2f} rows/s", flush=True)
    speed = {w:statistics.median(r) for w,r in runs.items()}
    best = {who:max((w for w in speed if w[0]==who), key=speed.get) for who in ('generate','vlm_ft')}
    one = speed['generate',1]
    lines = [dict(who=w[0], rows_at_a_time=w[1], rows_per_s=speed[w], times_one_by_one=speed[w]/one, same_answers=f"{sum(answers[w][i]==ids for i,ids in answers['generate',1].items())} of {len(some)}", **({'peak_gib':peak[w]} if peak[w] else {})) for w in ways]
    ids = answers['generate',a.batches[0]].values()
    print(f"\n{len(rows)} rows, prompts of {len(features[-1]['input_ids'])} to {len(features[0]['input_ids'])} tokens, answers of {min(map(len, ids))} to {max(map(len, ids))} (mean {statistics.mean(map(len, ids)):.0f}); "
          f"{torch.cuda.get_device_name() if device.type=='cuda' else f'CPU, {torch.get_num_threads()} threads'}, {str(base.dtype).removeprefix('torch.')}")
    print(table(lines))
    print(f"vlm_ft at its best: {speed[best['vlm_ft']]/one:.1f} x one by one, {speed[best['vlm_ft']]/speed[best['generate']]:.1f} x generate at its best batch size ({best['generate'][1]}).")
    if a.out:
        with open(a.out, 'a') as f: f.write(json.dumps(dict(vars(a), out=None, lines=lines), default=str)+'\n')

if __name__=='__main__': main()
