"What the package promises before any of its rooms is used: a light import, every public name, a helpful error."
import configparser,json,subprocess,sys
from importlib.metadata import entry_points,version
from pathlib import Path

import pytest
import vlm_ft

HEAVY = 'torch','transformers','trl','peft','accelerate','bitsandbytes','datasets','triton','matplotlib','numpy','PIL'

def in_new_process(code):
    "What `code` prints as JSON in a new interpreter."
    return json.loads(subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, check=True).stdout)

def test_import_is_light():
    "`import vlm_ft` loads no library at all: each waits for the first name that needs it."
    loaded = in_new_process(f"import json,sys,vlm_ft; print(json.dumps([o for o in {HEAVY} if o in sys.modules]))")
    assert loaded==[], f"import vlm_ft also loads {', '.join(loaded)}"

def test_a_name_brings_its_room_only():
    loaded = in_new_process("import json,sys,vlm_ft; vlm_ft.DataError; print(json.dumps([o for o in sys.modules if o.startswith('vlm_ft.')]))")
    assert 'vlm_ft.messages' in loaded
    assert not {'vlm_ft.data','vlm_ft.loading','vlm_ft.training','vlm_ft.merging'} & set(loaded)

def test_model_class_is_whole():
    "`vlm_ft.FastVisionModel` has the methods of every step, whichever name was used first."
    known = in_new_process("import json,vlm_ft; print(json.dumps(dir(vlm_ft.FastVisionModel)))")
    assert {'from_pretrained','get_peft_model','for_training','for_inference'} <= set(known)

@pytest.mark.parametrize('name', vlm_ft.__all__)
def test_public_name(name):
    value = getattr(vlm_ft, name)
    assert value.__name__==name
    assert getattr(vlm_ft, name) is value and name in dir(vlm_ft)

@pytest.mark.parametrize('name,says', [('FastVisonModel', "Did you mean 'FastVisionModel'"), ('zzz', 'It offers: .*VisionTrainer')])
def test_unknown_name(name, says):
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'. {says}"): getattr(vlm_ft, name)

def test_one_version():
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[1]/'settings.ini')
    assert settings['DEFAULT']['version']==vlm_ft.__version__==version('vlm_ft')

def test_console_script():
    "The command that the README names is the one that is installed."
    script, = entry_points(group='console_scripts', name='vlm-ft')
    assert callable(script.load())
