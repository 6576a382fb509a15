"""The frame of a report: style, script and a policy that lets the page load nothing."""

from __future__ import annotations

import base64
import hashlib
import html

_STYLE = """
:root { color-scheme: light dark; --bg:#fbfbfa; --card:#fff; --text:#1d2129; --dim:#667080;
  --line:#e3e5e9;
  --c0:#2563c9; --c1:#d9702b; --c2:#23946a; --c3:#a9459a; --c4:#c23b4e; --c5:#0f8fa6; --c6:#8a6a2f;
  --c7:#6b7280;
  --prompt:#eceef2; --policy:#dbe8fd; --tool:#fdebd3; --bad:#b3261e; --good:#1a7f4e;
  --neg:198,60,50; --pos:37,110,200; --heat:217,112,43; }
@media (prefers-color-scheme: dark) { :root { --bg:#14161a; --card:#1c1f25; --text:#e4e6ea;
  --dim:#98a1b0;
  --line:#31353d; --c0:#6ea3f5; --c1:#f0995c; --c2:#53c496; --c3:#d484c8; --c4:#ee7b8b;
  --c5:#4cc3d9;
  --c6:#c9a765; --c7:#9ca3af; --prompt:#2a2e36; --policy:#1f3a63; --tool:#54391a; --bad:#ff8a80;
  --good:#6fd6a2;
  --neg:235,95,80; --pos:80,150,245; --heat:240,153,92; } }
* { box-sizing: border-box; }
body { margin:0 auto; max-width:1280px; padding:28px 24px 80px; background:var(--bg);
  color:var(--text);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
h1 { font-size:26px; margin:0; letter-spacing:-.01em; } h2 { font-size:19px; margin:44px 0 4px; }
h3 { font-size:15px; margin:26px 0 8px; } .sub { color:var(--dim); margin:2px 0 0; }
code,.mono { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
  font-size:13px; }
.cards { display:flex; flex-wrap:wrap; gap:12px; margin:22px 0; }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:12px
  16px; min-width:128px; }
.card b { display:block; font-size:24px; line-height:1.2; font-variant-numeric:tabular-nums; }
.card span { color:var(--dim); font-size:13px; } .card small { display:block; color:var(--dim);
  font-size:12px; }
.grid2 { display:grid; grid-template-columns:repeat(auto-fill,minmax(340px,1fr)); gap:14px;
  margin-top:12px;
  align-items:start; }
figure { margin:0; background:var(--card); border:1px solid var(--line); border-radius:10px;
  padding:10px 12px 8px; }
figcaption { font-weight:600; font-size:13.5px; margin-bottom:2px; }
svg.chart { display:block; width:100%; height:auto; touch-action:pan-y; }
svg.spans { display:block; width:100%; min-width:640px; height:auto; } .span { fill:var(--k); }
.wide { margin-top:14px; overflow-x:auto; } .share { display:flex; height:22px; border-radius:5px;
  overflow:hidden; margin:10px 4px 8px; } .share i { background:var(--k); }
.list .legend { display:block; line-height:1.75; } .list span { display:block; }
svg text { font-size:10.5px; fill:var(--dim); font-variant-numeric:tabular-nums; }
.grid { stroke:var(--line); stroke-width:1; } .curve { fill:none; stroke:var(--k); stroke-width:1.9;
  stroke-linejoin:round; } .raw { opacity:.28; stroke-width:1.2; } .dot { fill:var(--k); }
.area { fill:var(--k); opacity:.78; } .cross { stroke:var(--dim); stroke-width:1;
  visibility:hidden; }
.mark { stroke:var(--text); stroke-width:1.6; } .markdot { fill:var(--card); stroke:var(--text);
  stroke-width:2; }
.legend { display:flex; flex-wrap:wrap; gap:2px 14px; font-size:12.5px; color:var(--dim);
  padding:2px 0 2px 4px; }
.legend i { display:inline-block; width:10px; height:10px; border-radius:3px; background:var(--k);
  margin-right:5px; }
.legend .markkey i { background:none; border:2px solid var(--text); border-radius:50%; }
.bars { display:grid; grid-template-columns:max-content 1fr; gap:6px 12px; padding:8px 4px;
  font-size:13px; }
.barname { color:var(--dim); align-self:center; } .bar { display:flex; align-items:center; gap:6px;
  height:14px; }
.bar i { display:block; height:9px; border-radius:3px; width:calc(var(--w)*.82); min-width:2px;
  background:var(--k); }
.bar b { font-weight:500; font-size:11.5px; color:var(--dim); }
#tip { position:fixed; pointer-events:none; display:none; background:var(--card); border:1px solid
  var(--line);
  border-radius:8px; padding:6px 10px; font-size:12.5px; white-space:pre; box-shadow:0 4px 16px
  rgba(0,0,0,.18);
  font-variant-numeric:tabular-nums; z-index:9; }
table { border-collapse:collapse; font-size:13.5px; } td,th { padding:3px 18px 3px 0;
  text-align:left;
  border-bottom:1px solid var(--line); vertical-align:top; } td.n,th.n { text-align:right;
  font-variant-numeric:tabular-nums; } .scroll { overflow-x:auto; }
details { margin:12px 0; } summary { cursor:pointer; color:var(--dim); }
.columns { columns:3 300px; } .columns table { width:100%; }
.note { border-left:3px solid var(--bad); padding:4px 12px; margin:12px 0; }
.modes { position:sticky; top:0; z-index:3; background:var(--bg); padding:10px 0; display:flex;
  flex-wrap:wrap;
  gap:6px 14px; align-items:center; border-bottom:1px solid var(--line); }
.modes label { cursor:pointer; } .key { color:var(--dim); font-size:12.5px; display:none; }
.key span { padding:1px 7px; border-radius:4px; color:var(--text); }
.traj { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:12px
  16px; margin:12px 0; }
.traj header { display:flex; flex-wrap:wrap; gap:4px 14px; align-items:baseline; margin-bottom:8px;
  font-size:13px; }
.badge { border:1px solid currentColor; border-radius:20px; padding:0 9px; font-size:12px;
  font-weight:600; }
.good { color:var(--good); } .bad { color:var(--bad); } .dim { color:var(--dim); }
.tokens { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
  font-size:13px;
  line-height:1.75; white-space:pre-wrap; overflow-wrap:anywhere; max-height:560px;
  overflow-y:auto; }
.t { padding:2px 0; } .t:hover { outline:1.5px solid var(--text); border-radius:2px; }
.m { font-weight:700; text-decoration:underline dotted; text-underline-offset:3px; } .nl {
  opacity:.4; }
.turn { font:600 11px system-ui,sans-serif; color:var(--dim); border:1px solid var(--line);
  border-radius:20px;
  padding:0 7px; margin:0 4px; white-space:nowrap; }
.by-writer .kw,.by-advantage .ka,.by-logprob .kl,.by-entropy .ke { display:inline; }
.by-writer .p { background:var(--prompt); } .by-writer .s { background:var(--policy); }
.by-writer .o { background:var(--tool); }
"""

# Shades of the token colours: (class, CSS variable of the hue, opacity).
_SHADES = ([('by-advantage', f'a{i}', 'neg' if i < 0 else 'pos', abs(i) * 0.17)
            for i in (-4, -3, -2, -1, 1, 2, 3, 4)] +
           [('by-logprob', f'l{i}', 'heat', i * 0.18) for i in (1, 2, 3, 4)] +
           [('by-entropy', f'e{i}', 'heat', i * 0.18) for i in (1, 2, 3, 4)])

_SCRIPT = """
'use strict';
const tip = document.getElementById('tip');
function show(event, text) {
  tip.textContent = text;
  tip.style.display = 'block';
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const y = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8);
  tip.style.left = x + 'px';
  tip.style.top = y + 'px';
}
for (const svg of document.querySelectorAll('svg.chart')) {
  const data = JSON.parse(svg.dataset.chart);
  const [left, right] = data.frame, [x0, x1] = data.range;
  const cross = svg.querySelector('.cross');
  const steps = [...new Set(data.series.flatMap(s => s[1]).concat(data.marks.map(m => m[1])))];
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const wanted = x0 + (at - left) / (right - left) * (x1 - x0);
    const step = steps.reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a);
    const lines = ['step ' + step];
    for (const [label, xs, ys] of data.series) {
      const i = xs.indexOf(step);
      if (i >= 0) lines.push(label + '  ' + (ys[i] === null ? '–' : ys[i]));
    }
    for (const [label, x, y] of data.marks) if (x === step) lines.push(label + '  ' + y);
    const x = left + (step - x0) / ((x1 - x0) || 1) * (right - left);
    cross.setAttribute('x1', x);
    cross.setAttribute('x2', x);
    cross.style.visibility = 'visible';
    show(event, lines.join('\\n'));
  });
  svg.addEventListener('pointerleave', () => {
    cross.style.visibility = 'hidden';
    tip.style.display = 'none';
  });
}
const samples = document.getElementById('samples');
if (samples) {
  samples.addEventListener('change', event => {
    if (event.target.name === 'mode') samples.className = 'by-' + event.target.value;
  });
  samples.addEventListener('pointermove', event => {
    const token = event.target.closest('.t');
    if (token) show(event, token.dataset.i); else tip.style.display = 'none';
  });
  samples.addEventListener('pointerleave', () => { tip.style.display = 'none'; });
}
"""


def document(title: str, body: str) -> str:
  """Returns a whole HTML page.

  The page may run this module's script, recognised by its hash, and nothing else: should hostile
  text ever get through unescaped, the browser neither executes it nor fetches what it asks for.

  Args:
    title: Text, not yet escaped.
    body: HTML, already escaped where needed.
  """
  digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
  policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
  shades = ''.join(f'.{mode} .{name} {{ background:rgba(var(--{hue}),{opacity:.2f}); }}\n'
                   for mode, name, hue, opacity in _SHADES)
  return (
      f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
      f'<meta name="viewport" content="width=device-width,initial-scale=1">'
      f'<title>{html.escape(title)}</title><style>{_STYLE}{shades}</style></head>\n<body>\n{body}\n'
      f'<div id="tip"></div><script>{_SCRIPT}</script></body></html>\n')
