"The suite's own machinery: a notebook that fails must fail, and a broken link must be seen."
import shutil,subprocess,sys
from pathlib import Path

import nbformat,pytest
from nbformat.v4 import new_code_cell,new_markdown_cell,new_notebook

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import docs,readme

@pytest.fixture
def project(tmp_path):
    "A project with our settings and no notebooks."
    for name in 'conftest.py','settings.ini','tools/run_notebook.py':
        (tmp_path/name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/name, tmp_path/name)
    return tmp_path

def notebook(path, *cells):
    path.parent.mkdir(exist_ok=True, parents=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell('# Title\n> One line'), *map(new_code_cell, cells)]), path)

def run_pytest(project, *args):
    return subprocess.run([sys.executable,'-m','pytest','-p','no:cacheprovider',*args], cwd=project, capture_output=True, text=True).stdout

def test_notebook_items(project):
    notebook(project/'nbs'/'good.ipynb', 'x = 1', '#| eval: false\n1/0', '#| slow\n1/0', '#| cuda\n1/0', 'assert x==1')
    notebook(project/'nbs'/'deep'/'bad.ipynb', 'def half(x):\n    assert x%2==0, f"odd: {x}"\n    return x//2', 'print("before")', 'half(3)')
    notebook(project/'nbs'/'dead.ipynb', 'import os', 'os.abort()')
    out = run_pytest(project, 'nbs')
    assert '2 failed, 1 passed' in out, out
    assert 'bad.ipynb, cell 3' in out and 'AssertionError: odd: 3' in out, out
    assert 'dead.ipynb ended with status' in out and 'cell 2: os.abort()' in out, out
    assert '1 failed' in run_pytest(project, 'nbs/good.ipynb', '--slow')

def test_notebook_time_limit(project):
    conftest = project/'conftest.py'
    conftest.write_text(conftest.read_text().replace('LIMIT_S,LIMIT_SLOW_S = 600', 'LIMIT_S,LIMIT_SLOW_S = 5'))
    notebook(project/'nbs'/'long.ipynb', 'import time', 'time.sleep(300)')
    out = run_pytest(project, 'nbs')
    assert 'long.ipynb took longer than 5 s' in out and 'cell 2: time.sleep(300)' in out, out

def test_readme_links(tmp_path):
    notebook(tmp_path/'index.ipynb', '#| hide\nsecret = 1', '#| eval: false\nshown = 2')
    nb = nbformat.read(tmp_path/'index.ipynb', 4)
    nb.cells.append(new_markdown_cell('[step](00_loading.ipynb#part) [law](../LICENSE) [site](https://a.org) ![p](images/p.png) [here](#part)'))
    nbformat.write(nb, tmp_path/'index.ipynb')
    text = readme.readme(tmp_path/'index.ipynb')['README.md'].decode()
    assert '[step](nbs/00_loading.ipynb#part) [law](LICENSE) [site](https://a.org) ![p](nbs/images/p.png) [here](#part)' in text
    assert 'shown = 2' in text and 'secret' not in text and '#|' not in text

def test_site_problems(tmp_path):
    nbs,site = tmp_path/'nbs',tmp_path/'site'
    for name in 'index','00_a','models/b': notebook(nbs/f'{name}.ipynb')
    (site/'models').mkdir(parents=True)
    (site/'index.html').write_text('<a href="a.html#one"></a> <a href="models/b.html"></a> <a href="https://a.org/x"></a>')
    (site/'a.html').write_text('<h2 id="one"></h2><a href="#one"></a><img src="none.png">')
    config = {'website': {'sidebar': {'contents': ['index.ipynb', {'section':'Steps', 'contents':['00_a.ipynb','01_c.ipynb']}]}}}
    assert docs.problems(config, nbs, site)==[
        '_quarto.yml: the sidebar names 01_c.ipynb, which is not in nbs/', '_quarto.yml: nbs/models/b.ipynb is not in the sidebar',
        'models/b.ipynb: no page models/b.html was made of it', 'broken link in a.html: none.png', 'broken link in index.html: models/b.html']

def test_ready_for_docs(tmp_path):
    assert docs.for_docs('#| export\ndef f(): return 1')=='#| exports\ndef f(): return 1'    # shown, since the notebooks are the code
    assert docs.for_docs('import os\nos.remove("x")')=='#| eval: false\nimport os\nos.remove("x")'
    for same in ('#| export\nimport os', 'import os', 'x = 1', '%time x', '#| exporti\nimport os\nx = 1'): assert docs.for_docs(same)==same
    notebook(tmp_path/'nbs'/'a'/'01_b.ipynb')
    nb = nbformat.read(tmp_path/'nbs'/'a'/'01_b.ipynb', 4)
    nb.cells.append(new_markdown_cell('[c](../02_c.ipynb#d), [e](03_e.ipynb)'))
    nbformat.write(nb, tmp_path/'nbs'/'a'/'01_b.ipynb')
    docs.make_ready(tmp_path/'nbs', tmp_path/'ready', {'contents': ['a/01_b.ipynb']})
    assert '[c](../c.ipynb#d), [e](e.ipynb)' in (tmp_path/'ready'/'a'/'b.ipynb').read_text()
    assert 'a/b.ipynb' in (tmp_path/'ready'/'_quarto.yml').read_text()
