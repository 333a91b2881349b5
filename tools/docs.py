"""Render the site into _site/ and check it: each notebook is in the sidebar and has its page, and each internal link resolves.

    python tools/docs.py              with smalldocs, which needs only Python
    python tools/docs.py --quarto     with Quarto, where it is installed
    python tools/docs.py --check      check what is in _site/

_nbs/ gets a copy of nbs/ made ready, nbdev documents it into _proc/, and the renderer makes pages of that."""
import ast,json,re,shutil,subprocess,sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote,urlsplit

import yaml

ROOT = Path(__file__).parents[1]
NBS,SITE = ROOT/'nbs',ROOT/'_site'
READY = ROOT/'_nbs'

def notebooks(nbs): return sorted(p for p in nbs.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(nbs).parts))

def stripped(name):
    "The name nbdev gives a page: models/01_x.ipynb -> models/x.ipynb."
    return re.sub(r'(^|/)\d+[a-zA-Z0-9]*_', r'\1', name)

def page(name): return str(Path(stripped(name)).with_suffix('.html'))

def renamed(o):
    "A part of _quarto.yml with its notebooks under their pages' names."
    if isinstance(o, dict): return {k:renamed(v) for k,v in o.items()}
    if isinstance(o, list): return [renamed(v) for v in o]
    return stripped(o) if isinstance(o, str) and o.endswith('.ipynb') else o

def sidebar(contents):
    "The notebooks that a sidebar's `contents` name, in order."
    for o in contents:
        if isinstance(o, str): yield o
        elif 'contents' in o: yield from sidebar(o['contents'])
        else: yield o['href']

def for_docs(source):
    "A code cell as nbdev should document it: what is exported is shown too, and a test that also imports is not run again."
    try: nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError: return source  # a magic, which nbdev leaves alone
    imports = any(isinstance(o, (ast.Import,ast.ImportFrom)) for o in nodes)
    more = any(isinstance(o, (ast.Expr,ast.Assign,ast.FunctionDef,ast.ClassDef)) for o in nodes)
    if not more: return source
    if re.match(r'#\|\s*export\b', source): return re.sub('export', 'exports', source, count=1)
    return f'#| eval: false\n{source}' if imports and not re.match(r'#\|\s*export', source) else source

def make_ready(nbs, dest, config):
    "Copy `nbs` to `dest` under the pages' names, which links and sidebar follow."
    shutil.rmtree(dest, ignore_errors=True)
    for src in (p for p in nbs.rglob('*') if p.is_file() and not any(o[0] in '._' for o in p.relative_to(nbs).parts)):
        to = dest/stripped(src.relative_to(nbs).as_posix())
        to.parent.mkdir(parents=True, exist_ok=True)
        if src.suffix!='.ipynb':
            shutil.copy2(src, to)
            continue
        nb = json.loads(src.read_text())
        for cell in nb['cells']:
            text = ''.join(cell['source'])
            if cell['cell_type']=='code': cell['source'] = for_docs(text)
            else: cell['source'] = re.sub(r'(?<=[(/])\d+[a-zA-Z0-9]*_(\w+\.ipynb)', r'\1', text)
        nb['cells'].append(dict(cell_type='markdown', id='end', metadata={}, source='<!-- end -->'))  # nbdev looks past an `exports` cell
        to.write_text(json.dumps(nb))
    (dest/'_quarto.yml').write_text(yaml.safe_dump(renamed(config), sort_keys=False))

def render(config, quarto=False):
    "Make the pages in _site/."
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs
    make_ready(NBS, READY, config)
    proc = proc_nbs(path=READY, force=True, n_workers=2)
    if not get_config().git_url:  # then nbdev's links to the source lead nowhere
        for path in proc.rglob('*.ipynb'): path.write_text(re.sub(r'\[source\]\(/blob/[^)]*\)\{[^}]*\}', '', path.read_text()))
    shutil.rmtree(SITE, ignore_errors=True)
    if quarto: subprocess.run(['quarto','render',proc,'--no-execute'], check=True)
    else:
        from smalldocs.site import build
        build(proc, quiet=True)

class Links(HTMLParser):
    "What one page links to, and the ids it has."
    def __init__(self, text):
        super().__init__()
        self.links,self.ids = [],set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id','name') if attrs.get(k)}
        self.links += [attrs[k] for k in ('href','src') if attrs.get(k)]

def broken_links(site):
    "Each link of the pages in `site` that leads to no file or no id there, as 'page: link'."
    site = site.resolve()
    pages = {p:Links(p.read_text()) for p in sorted(site.rglob('*.html'))}
    bad = []
    for src,found in pages.items():
        for link in found.links:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            path = unquote(url.path)
            dest = src if not path else (site/path.lstrip('/') if path.startswith('/') else src.parent/path).resolve()
            if dest.is_dir(): dest = dest/'index.html'
            lost = not dest.is_file() or not dest.is_relative_to(site)
            if not lost and url.fragment and dest in pages: lost = unquote(url.fragment) not in pages[dest].ids
            if lost: bad.append(f'{src.relative_to(site)}: {link}')
    return bad

def problems(config, nbs, site):
    "All that is wrong with a rendered site, a line each."
    listed = list(sidebar(config['website']['sidebar']['contents']))
    there = [p.relative_to(nbs).as_posix() for p in notebooks(nbs)]
    return ([f'_quarto.yml: the sidebar names {o}, which is not in nbs/' for o in listed if o not in there]
        + [f'_quarto.yml: nbs/{o} is not in the sidebar' for o in there if o not in listed]
        + [f'{o}: no page {page(o)} was made of it' for o in there if not (site/page(o)).is_file()]
        + [f'broken link in {o}' for o in broken_links(site)])

if __name__=='__main__':
    config = yaml.safe_load((ROOT/'_quarto.yml').read_text())
    if '--check' not in sys.argv: render(config, '--quarto' in sys.argv)
    if found := problems(config, NBS, SITE): sys.exit('\n'.join(found))
    print(f'{len(list(SITE.rglob("*.html")))} pages in {SITE.name}/, every internal link resolves.')
