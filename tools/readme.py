"""Write README.md from nbs/index.ipynb, or with --check say whether it is in sync.

    python tools/readme.py [--check]

Links that are relative to nbs/ become relative to the repository, hidden cells and directives are left out, and pictures among the
outputs go to README_files/."""
import re,sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]

def from_root(text):
    "Markdown written for nbs/, with its relative links made relative to the repository's root."
    link = r'(\]\(|\b(?:src|href)=")(?![a-z]+:|#|/|README_files/)(?:\./)?([^)"\s]+)'
    return re.sub(link, lambda m: m[1] + (m[2][3:] if m[2].startswith('../') else f'nbs/{m[2]}'), text)

def joined(outputs):
    "Outputs with what one stream wrote in pieces put together."
    out = []
    for o in outputs:
        if out and o.output_type=='stream' and out[-1].output_type=='stream' and out[-1].name==o.name: out[-1].text += o.text
        else: out.append(o)
    return out

def readme(path):
    "What the notebook at `path` makes: a dict of file name to bytes, README.md and its pictures."
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'\s*#\|\s*(hide|default_exp|include:\s*false)\b', c.source)]
    nb.metadata['language_info'] = {'name':'python'}  # the fences' language
    for cell in nb.cells:
        if cell.cell_type=='code': cell.outputs,cell.source = joined(cell.outputs),re.sub(r'\A(#\|.*\n)+', '', cell.source)
        else: cell.source = from_root(cell.source)
    text,found = MarkdownExporter().from_notebook_node(nb, resources=dict(output_files_dir='README_files', unique_key='out'))
    text = re.sub(r'\n{3,}', '\n\n', '\n'.join(line.rstrip() for line in text.splitlines())).strip() + '\n'
    head = '<!-- Written by tools/readme.py from nbs/index.ipynb: edit that. -->\n\n'
    return {'README.md': (head+text).encode(), **found['outputs']}

def main(check):
    files = readme(ROOT/'nbs'/'index.ipynb')
    old = {p.relative_to(ROOT).as_posix() for p in (ROOT/'README_files').glob('*')} - set(files)  # pictures of outputs that are gone
    stale = [name for name,data in files.items() if not (ROOT/name).is_file() or (ROOT/name).read_bytes()!=data] + sorted(old)
    if check: return f'Not what nbs/index.ipynb makes: {", ".join(stale)}. Run: python tools/readme.py' if stale else 0
    for name in old: (ROOT/name).unlink()
    for name,data in files.items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(data)

if __name__=='__main__': sys.exit(main('--check' in sys.argv[1:]))
