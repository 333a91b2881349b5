"""The six steps on a real architecture with random weights: load, LoRA, data, setup, train, merge; one JSON line of seconds and memory.

usage: python benchmarks/six_steps.py ARCH [--bits 16|8|4] [--steps 30] [--folder DIR] [--tiny]
ARCH: qwen2vl-2b, qwen2vl-7b, llama32-11b, pixtral-12b. `--tiny` takes two layers, to try the script on a CPU. Speed and memory do not depend on the weights' values.
"""
import argparse, json, math, shutil, tempfile, time
from pathlib import Path
import torch, transformers
from transformers.image_utils import SizeDict
from vlm_ft import FastVisionModel, VisionDataCollator, VisionTrainer, VisionTrainingArguments
from vlm_ft.models.family import family_for
from vlm_ft.models.tiny import drawn, tiny_config, tiny_processor

SIZES = {  # family, text width/layers/heads/kv/mlp/vocab, vision settings: those of the published checkpoints
    'qwen2vl-2b':  ('qwen2_vl', dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960, vocab_size=151936,
                                     rope_parameters=dict(rope_type='default', rope_theta=1e6, mrope_section=[16,24,24]), max_position_embeddings=32768, tie_word_embeddings=True),
                    dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16)),
    'llama32-11b': ('mllama', dict(hidden_size=4096, num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256,
                                   cross_attention_layers=[3,8,13,18,23,28,33,38], rope_parameters=dict(rope_type='default', rope_theta=5e5), max_position_embeddings=131072),
                    dict(hidden_size=1280, num_hidden_layers=32, num_global_layers=8, attention_heads=16, intermediate_size=5120, vision_output_dim=7680,
                         image_size=560, patch_size=14, intermediate_layers_indices=[3,7,15,23,30])),
    'pixtral-12b': ('pixtral', dict(hidden_size=5120, num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=14336, vocab_size=131072,
                                    rope_parameters=dict(rope_type='default', rope_theta=1e9), max_position_embeddings=131072),
                    dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=1024, patch_size=16)),
}
_,TEXT,VISION = SIZES['qwen2vl-2b']
SIZES['qwen2vl-7b'] = ('qwen2_vl', {**TEXT, **dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False)}, {**VISION, 'hidden_size':3584})

def config_and_processor(arch, few):
    "The architecture's config, two layers deep if `few`, and a processor with the published resolution."
    name,text,vision = SIZES[arch]
    processor = tiny_processor(name)
    small = tiny_config(name, len(processor.tokenizer), processor.tokenizer)
    if few: return small, processor
    top = {k:v for k,v in small.to_dict().items() if k not in ('text_config','vision_config','model_type','dtype','transformers_version')}
    ids = {k:getattr(small.text_config, k) for k in ('bos_token_id','eos_token_id','pad_token_id')}
    kinds = [dict(model_type=c.model_type) for c in (small.text_config, small.vision_config)] if name=='pixtral' else [{},{}]
    if 'tie_word_embeddings' in text: top['tie_word_embeddings'] = text['tie_word_embeddings']
    config = type(small)(**{**top, 'text_config':{**kinds[0], **ids, **text}, 'vision_config':{**kinds[1], **vision}})
    processor.image_processor.size = SizeDict(**{'qwen2_vl':{'shortest_edge':56*56,'longest_edge':28*28*1280}, 'mllama':{'height':560,'width':560}, 'pixtral':{'longest_edge':1024}}[name])
    return config, processor

def write_checkpoint(arch, folder, few):
    "A random checkpoint on disk, in bfloat16; gates open, so that pictures count."
    config,processor = config_and_processor(arch, few)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0); torch.set_default_dtype(torch.bfloat16)
    with torch.device(device): model = getattr(transformers, family_for(config).architecture)(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for n,p in model.named_parameters():
            if n.endswith(('gate','gate_attn','gate_ffn')): p.fill_(0.5)
    model.save_pretrained(folder, max_shard_size='5GB'); processor.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())

def rows():
    "Three rows: two pages of drawn lines, and one without a picture."
    ask = lambda pictures, q, a: {'messages':[{'role':'user','content':[*({'type':'image','image':p} for p in pictures), {'type':'text','text':q}]}, {'role':'assistant','content':a}]}
    return [ask([drawn(f'Invoice {i}: total {37*i+11}.20', (560,420))], 'What is the total?', f'{37*i+11}.20') for i in range(2)] + [ask([], 'What is a total?', 'A sum.')]

class Losses(transformers.TrainerCallback):
    def __init__(self): self.values = []
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and 'loss' in logs: self.values.append(logs['loss'])

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('arch', choices=SIZES); ap.add_argument('--bits', type=int, default=16, choices=(16,8,4)); ap.add_argument('--steps', type=int, default=30)
    ap.add_argument('--folder', help='where checkpoints go; a base that lies there is used again'); ap.add_argument('--tiny', action='store_true')
    a = ap.parse_args()
    root = Path(a.folder or tempfile.mkdtemp())
    base,out = root/f'{a.arch}{"-tiny" if a.tiny else ""}',root/'merged'
    took,start = {},[time.perf_counter()]
    def done(step): took[step] = round(time.perf_counter()-start[0], 1); start[0] = time.perf_counter()
    cuda = torch.cuda.is_available()
    if not (base/'config.json').exists(): write_checkpoint(a.arch, base, a.tiny)
    if cuda: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    done('write')
    model,processor = FastVisionModel.from_pretrained(str(base), load_in_4bit=a.bits==4, load_in_8bit=a.bits==8, max_seq_length=4096)
    done('load')
    model = FastVisionModel.get_peft_model(model, r=16)
    FastVisionModel.for_training(model)
    losses = Losses()
    args = VisionTrainingArguments(output_dir=str(root/'run'), per_device_train_batch_size=3, gradient_accumulation_steps=1, max_steps=a.steps, warmup_steps=0, lr_scheduler_type='constant',
                                   learning_rate=2e-4, logging_steps=1, save_strategy='no', disable_tqdm=True)
    trainer = VisionTrainer(model=model, processing_class=processor, args=args, train_dataset=rows(), data_collator=VisionDataCollator(model, processor), callbacks=[losses])
    trainer.train()
    done('train')
    peak = torch.cuda.max_memory_allocated()/2**30 if cuda else None
    FastVisionModel.for_inference(model)
    check = model.save_pretrained_merged(str(out), processor, overwrite=True)
    done('merge and verify')
    print('RESULT '+json.dumps(dict(arch=a.arch, bits=a.bits, device=torch.cuda.get_device_name() if cuda else 'cpu', first_loss=losses.values[0], last_loss=losses.values[-1],
        peak_train_gib=peak and round(peak, 2), seconds=took, check=check), default=str), flush=True)
    assert losses.values[-1] < losses.values[0] and all(map(math.isfinite, losses.values)), losses.values
    shutil.rmtree(out)

if __name__=='__main__': main()
