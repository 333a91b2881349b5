"Pytest finds the notebooks of nbs/ beside tests/: each is an item of its own, run in a process of its own as nbdev-test would."
import os,signal,subprocess,sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
LIMIT_S,LIMIT_SLOW_S = 600,3600  # the time one notebook may take; with --slow
# Before torch is imported, here and in the notebooks' processes: one thread is the fastest for tiny models, and no test downloads.
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run cells and tests flagged slow, such as the worked examples')
    parser.addoption('--cuda', action='store_true', help='also run cells and tests flagged cuda')

def asked(config):
    "The flags, of those that skip a cell or a test, which the command line turns on."
    return [flag for flag in ('slow','cuda') if config.getoption(flag)]

def pytest_collect_file(file_path, parent):
    if file_path.suffix=='.ipynb' and not file_path.name.startswith('_'): return NotebookFile.from_parent(parent, path=file_path)

def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda o: (not isinstance(o, Notebook), 'examples' not in o.path.parts))  # the long ones first, so that neither process idles at the end
    for item in items:
        for flag in {'slow','cuda'} - set(asked(config)):
            if item.get_closest_marker(flag): item.add_marker(pytest.mark.skip(reason=f'runs with --{flag}'))

class NotebookFile(pytest.File):
    def collect(self): yield Notebook.from_parent(self, name='cells')

class NotebookFailed(Exception): pass

class Notebook(pytest.Item):
    "All cells of one notebook, but those that `#| eval: false` or a flag leaves out."
    def runtest(self):
        flags = asked(self.config)
        limit = LIMIT_SLOW_S if 'slow' in flags else LIMIT_S
        # A session of its own, so that what the notebook started ends with it
        proc = subprocess.Popen([sys.executable, ROOT/'tools'/'run_notebook.py', self.path, *flags], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try: out,err = proc.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(proc.pid, signal.SIGKILL)
            out,err = proc.communicate()
            raise NotebookFailed(f'{self.path.name} took longer than {limit} s and was ended. It was in:\n{err[-2000:]}') from None
        if proc.returncode==1 and out: raise NotebookFailed(out)  # a cell failed, and is shown
        if proc.returncode: raise NotebookFailed(f'{self.path.name} ended with status {proc.returncode}. Its last words:\n{err[-4000:]}')

    def repr_failure(self, excinfo):
        if isinstance(excinfo.value, NotebookFailed): return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self): return self.path,None,str(self.path.relative_to(ROOT))
