"""Run the cells of one notebook as nbdev_test does, and show the cell that failed.

    python tools/run_notebook.py nbs/02_data.ipynb [FLAG ...]    FLAG: slow, cuda"""
import os,sys
from pathlib import Path
from textwrap import indent

os.environ['IN_TEST'] = '1'  # what nbdev tells a notebook under test
from execnb.shell import CaptureShell
from fastcore.ansi import strip_ansi
from nbdev.config import get_config
from nbdev.process import NBProcessor

def left_out(cell, skip_flags):
    "Whether a test run leaves `cell` out: text, `#| eval: false`, a flag."
    if cell.cell_type!='code': return True
    directives = getattr(cell, 'directives_', None) or {}
    return directives.get('eval:', [''])[0].lower()=='false' or bool(skip_flags & directives.keys())

def run(path, flags=()):
    "Run the cells in order; True if none fails."
    skip_flags = set(get_config().tst_flags.split()) - set(flags)
    nb = NBProcessor(path).nb
    os.chdir(path.parent)
    shell = CaptureShell(path)
    for i,cell in enumerate(nb.cells):
        if left_out(cell, skip_flags) or not cell.source.strip(): continue
        print(f"cell {i}: {cell.source.splitlines()[0]}", file=sys.stderr, flush=True)  # the last one said is where a process that hung or crashed was
        out = shell.run(cell.source)
        if not shell.exc: continue
        said = ''.join(''.join(o['text']) for o in out if o['output_type']=='stream')  # ends with the traceback
        print(f'{path.name}, cell {i}:\n', indent(cell.source, '    '), '', strip_ansi(said[-8000:]), sep='\n')
        return False
    return True

if __name__=='__main__':
    path,*flags = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(not run(Path(path).resolve(), flags))
