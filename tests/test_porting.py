"The ported notebook of nbs/compat.ipynb, cell by cell, on the families that it does not show."
import json
from pathlib import Path
import pytest

NOTEBOOK = Path(__file__).parents[1]/'nbs'/'compat.ipynb'

def cells():
    "Its code cells from the imports on, without directives' cells that export or name the module."
    code = [''.join(c['source']) for c in json.loads(NOTEBOOK.read_text())['cells'] if c['cell_type']=='code']
    return [c for c in code if 'default_exp' not in c]

@pytest.mark.parametrize('name', ['mllama','pixtral'])
def test_a_ported_notebook_runs_on_the_other_families(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source,space = cells(),{'__name__':'ported'}
    assert sum("tiny_folder('qwen2_vl'" in c for c in source)==1
    for c in source: exec(compile(c.replace("tiny_folder('qwen2_vl'", f"tiny_folder('{name}'"), str(NOTEBOOK), 'exec'), space)
    assert type(space['tokenizer']).__name__.lower().startswith(name) and space['trainer'].state.global_step==3
    assert not (tmp_path/'ported').exists()
