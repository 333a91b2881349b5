"""The same base, rows and minutes as ten_minutes.py on lines of text, with transformers and PEFT alone: nothing of vlm_ft is imported.

    python benchmarks/plain_peft.py --data DATA/ocr_lines_fraktur --model vlm_ft/base --max-pixels 28672
"""
import argparse, json, resource, time
from pathlib import Path

import jiwer, numpy as np, torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

class Reader:
    "Rows into model inputs: the chat template, one placeholder for 2x2 patches, labels on the answer."
    def __init__(self, model, max_pixels=None):
        self.tokenizer,self.pictures = AutoTokenizer.from_pretrained(model),Qwen2VLImageProcessorPil.from_pretrained(model)
        if max_pixels: self.pictures.size = dict(shortest_edge=self.pictures.size['shortest_edge'], longest_edge=max_pixels)
        self.image_id = self.tokenizer.convert_tokens_to_ids('<|image_pad|>')

    def prompt(self, row):
        image = self.pictures([Image.open(row['image']).convert('RGB')], return_tensors='pt')
        n = int(image['image_grid_thw'].prod())//self.pictures.merge_size**2
        ask = [{'role':'user','content':[{'type':'image'},{'type':'text','text':row['question']}]}]
        text = self.tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True).replace('<|image_pad|>', '<|image_pad|>'*n)
        return self.tokenizer(text, add_special_tokens=False)['input_ids'], image

    def pad(self, rows, fill, left=False):
        length = max(map(len, rows))
        return torch.tensor([[fill]*(length-len(r))+r if left else r+[fill]*(length-len(r)) for r in rows])

    def batch(self, ids, images, left=False):
        out = {'input_ids':self.pad(ids, self.tokenizer.pad_token_id, left), 'attention_mask':self.pad([[1]*len(i) for i in ids], 0, left)}
        return {**out, 'mm_token_type_ids':(out['input_ids']==self.image_id).long(), **{k: torch.cat([i[k] for i in images]) for k in ('pixel_values','image_grid_thw')}}

    def __call__(self, rows):
        prompts,images = zip(*map(self.prompt, rows))
        answers = [self.tokenizer(r['answer']+'<|im_end|>', add_special_tokens=False)['input_ids'] for r in rows]
        return {**self.batch([p+a for p,a in zip(prompts, answers)], images), 'labels':self.pad([[-100]*len(p)+a for p,a in zip(prompts, answers)], -100)}

    @torch.no_grad()
    def read(self, model, rows, max_new_tokens, size=32):
        texts = []
        for i in range(0, len(rows), size):
            ids,images = zip(*map(self.prompt, rows[i:i+size]))
            out = model.generate(**self.batch(ids, images, left=True), max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=self.tokenizer.convert_tokens_to_ids('<|im_end|>'))
            texts += self.tokenizer.batch_decode(out[:, max(map(len, ids)):], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return texts

class Minutes(TrainerCallback):
    "Stops after some minutes."
    def __init__(self, minutes): self.seconds = 60*minutes
    def on_train_begin(self, *args, **kwargs): self.start = time.monotonic()
    def on_step_end(self, args, state, control, **kwargs): control.should_training_stop |= time.monotonic()-self.start>self.seconds

def cer(rows, texts, resamples=2000):
    "Character error rate with its 95 % bootstrap interval over rows."
    clean = lambda s: s.strip()
    counts = np.array([(w.substitutions+w.deletions+w.insertions, w.hits+w.substitutions+w.deletions) for w in (jiwer.process_characters(clean(r['answer']), clean(t)) for r,t in zip(rows, texts))])
    rng = np.random.default_rng(0)
    rates = [np.divide(*counts[rng.integers(len(counts), size=len(counts))].sum(0)) for _ in range(resamples)]
    return [float(np.divide(*counts.sum(0))), *map(float, np.quantile(rates, (.025,.975)))]

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data', type=Path, required=True); ap.add_argument('--model', required=True); ap.add_argument('--out', type=Path, default=Path('ten_minutes'))
    ap.add_argument('--minutes', type=float, default=10); ap.add_argument('--limit', type=int); ap.add_argument('--max-pixels', type=int); ap.add_argument('--steps', type=int, default=100_000, help='if known: the learning rate falls over them')
    ap.add_argument('--r', type=int, default=16); ap.add_argument('--learning-rate', type=float, default=1e-3); ap.add_argument('--batch', type=int, default=16); ap.add_argument('--seed', type=int, default=0)
    a = ap.parse_args()
    rows = lambda name: [{**r, 'image':a.data/r['image']} for r in map(json.loads, open(a.data/f'{name}.jsonl'))]
    train,test,reader = rows('train'),rows('test')[:a.limit],Reader(a.model, a.max_pixels)
    n = 8+max(len(reader.tokenizer(r['answer'])['input_ids']) for r in train)*3//2
    torch.manual_seed(a.seed)
    model = Qwen2VLForConditionalGeneration.from_pretrained(a.model, dtype=torch.float32).eval()
    before = cer(test, reader.read(model, test, n))
    targets = ['qkv','proj','fc1','fc2','mlp.0','mlp.2','q_proj','k_proj','v_proj','o_proj','gate_proj','up_proj','down_proj']
    model = get_peft_model(model, LoraConfig(r=a.r, lora_alpha=a.r, target_modules=targets))
    args = TrainingArguments(str(a.out/'plain'), per_device_train_batch_size=a.batch, max_steps=a.steps, learning_rate=a.learning_rate, warmup_steps=5, remove_unused_columns=False,
                             save_strategy='no', report_to='none', use_cpu=True, disable_tqdm=True, logging_steps=10, seed=a.seed)
    start = time.perf_counter()
    done = Trainer(model, args, train_dataset=train, data_collator=reader, callbacks=[Minutes(a.minutes)]).train()
    seconds = time.perf_counter()-start
    after = cer(test, reader.read(model.eval(), test, n))
    line = dict(trainer='transformers+peft', set=a.data.name, metric='cer', rows=len(test), train_rows=len(train), minutes=a.minutes, seconds=round(seconds, 1), steps=done.global_step, batch=a.batch, r=a.r,
                learning_rate=a.learning_rate, max_pixels=a.max_pixels, seed=a.seed, peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, before=before, after=after, shuffled=None, majority=None)
    a.out.mkdir(parents=True, exist_ok=True)
    with open(a.out/'results.jsonl', 'a') as f: f.write(json.dumps(line)+'\n')
    print(json.dumps(line))

if __name__=='__main__': main()
