"Fine-tune vision-language models on your own images and text."

__version__ = "0.1.0"

# bitsandbytes, which transformers and PEFT import, warns that an optional CPU kernel is absent, and at each product of each 8-bit layer
# that it casts to float16: hundreds of lines a step. Both are known.
import logging as _logging
for _name in ('autograd._functions','backends.cpu.ops'): _logging.getLogger(f'bitsandbytes.{_name}').setLevel(_logging.ERROR)

# Where each public name lives. A room is imported when one of its names is first used (PEP 562), so that
# `import vlm_ft` costs milliseconds and loads neither torch nor the libraries that a step may never need.
_home = {
    'FastVisionModel':         'merging',  # the last room that gives it a method: it imports all the others
    'describe':                'loading',
    'trainable_report':        'lora',
    'DataError':               'messages',
    'load_rows':               'readers',
    'split_rows':              'splits',
    'to_openai':               'writers',
    'check_rows':              'data',
    'check_data':              'doctor_page',  # which gives a checkup its page
    'mend':                    'mending',
    'show_supervised':         'data',
    'count_tokens':            'data',
    'as_dataset':              'writers',
    'plan':                    'planning',
    'show_resolutions':        'resolution',
    'DocumentAugmentation':    'augmentation',
    'VisionDataCollator':      'setup',
    'VisionTrainingArguments': 'setup',
    'VisionTrainer':           'training',
    'verify_merge':            'verify',
    'MergeError':              'weights',
    'predict':                 'evaluation.generation',
    'predict_endpoint':        'evaluation.endpoint',
    'cer':                     'evaluation.metrics',
    'wer':                     'evaluation.metrics',
    'accuracy':                'evaluation.metrics',
    'score':                   'evaluation.metrics',
    'compare':                 'evaluation.compare',
    'differences':             'evaluation.metrics',
    'compare_precisions':      'evaluation.precision',
    'UnsupportedModel':        'models.family',
    'family_for':              'models.family',
}
__all__ = list(_home)

def __getattr__(name):
    if name in _home:
        from importlib import import_module
        globals()[name] = value = getattr(import_module(f'{__name__}.{_home[name]}'), name)
        return value
    from difflib import get_close_matches
    near = get_close_matches(name, _home, n=1)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}." +
                         (f" Did you mean {near[0]!r}?" if near else f" It offers: {', '.join(sorted(_home))}."))

def __dir__(): return sorted([*globals(), *_home])
