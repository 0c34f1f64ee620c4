"""The look of ``run_report``'s page: one column, quiet tables, a light and a dark set of colours."""

STYLE = """
:root{--page:#fff;--soft:#f5f6f8;--line:#e1e4e8;--ink:#1f2328;--muted:#636c76;--train:#2f6fb7;--val:#c8501e;
--good:#1a7f4b;--bad:#b42318;--wait:#8a6d00}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--soft:#1d2125;--line:#32383f;--ink:#e6e8eb;--muted:#99a3ad;
--train:#6ea8e6;--val:#f08a5d;--good:#4cc38a;--bad:#ff8a80;--wait:#e3c04f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1060px;margin:0 auto;padding:32px 24px 48px}
h1{font-size:27px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:19px;margin:0 0 10px;display:flex;gap:10px;align-items:baseline;flex-wrap:wrap}
h3{font-size:15px;margin:22px 0 8px}h3 small{font-weight:400;color:var(--muted);margin-left:6px}
section{border-top:1px solid var(--line);padding:24px 0 14px}
p{margin:0 0 10px}.verdict{font-size:17px;margin:0 0 20px}.verdict span{color:var(--muted)}
.verdict.good{color:var(--good)}.verdict.bad,.reason{color:var(--bad)}
.cards{list-style:none;display:grid;grid-template-columns:repeat(auto-fit,minmax(104px,1fr));gap:8px;padding:0;
margin:0 0 26px}
.cards li{background:var(--soft);border-top:3px solid var(--line);border-radius:3px;padding:8px 10px;min-width:0}
.cards b{display:block;font-weight:600;overflow-wrap:anywhere}.cards small{color:var(--muted);font-size:12px}
.cards i{font-style:normal;margin-right:6px}.cards a{color:inherit;text-decoration:none}
.cards a:hover{text-decoration:underline}
.cards .promoted{border-color:var(--good)}.cards .promoted i{color:var(--good)}
.cards .refused,.cards .failed{border-color:var(--bad)}.cards .refused i,.cards .failed i{color:var(--bad)}
.cards .running,.cards .interrupted{border-color:var(--wait)}.cards .waiting b{color:var(--muted)}
em{font-style:normal;font-size:12.5px;font-weight:600;color:var(--muted);white-space:nowrap}
em.promoted{color:var(--good)}em.refused,em.failed{color:var(--bad)}em.running,em.interrupted{color:var(--wait)}
.scroll{overflow-x:auto;margin:0 0 12px}table{border-collapse:collapse;width:100%;font-size:13.5px}
th{text-align:left;font-weight:500;color:var(--muted);white-space:nowrap}
td,th{padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:14px 18px;margin:0 0 12px}
figure{margin:0;min-width:0}figure.wide{max-width:none}
figcaption{font-size:13px;display:flex;gap:12px;flex-wrap:wrap;align-items:baseline;margin:0 0 2px}
.key{color:var(--muted);font-size:12px;white-space:nowrap}
.key::before{content:"";display:inline-block;width:12px;height:3px;border-radius:2px;margin-right:5px;
vertical-align:middle}
.key.train::before{background:var(--train)}.key.val::before{background:var(--val)}
svg.chart{display:block;width:100%;height:auto}
svg .grid{stroke:var(--line);stroke-width:1}svg .axis{stroke:var(--muted);stroke-width:1}
svg .tick{font-size:10.5px;fill:var(--muted)}svg .name{font-size:11px;fill:var(--muted);font-weight:600}
svg .band{fill:var(--soft)}svg .level{stroke:var(--muted);stroke-width:1;stroke-dasharray:5 3}
svg polyline{fill:none;stroke-width:1.7;stroke-linejoin:round}svg polyline.train{stroke:var(--train)}
svg polyline.val{stroke:var(--val);stroke-width:1.3}svg polyline.faint{stroke-width:.8;opacity:.35}
svg circle.train{fill:var(--train)}svg circle.val{fill:var(--val);stroke:var(--page);stroke-width:.8}
code,pre{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}code{overflow-wrap:anywhere}
pre{background:var(--soft);border-radius:3px;padding:10px 12px;margin:0 0 10px;white-space:pre-wrap;
overflow-wrap:anywhere;max-height:340px;overflow:auto}
pre.prompt{background:none;border-left:3px solid var(--line);border-radius:0;padding:2px 12px;color:var(--muted);
margin-bottom:4px}
dl{display:flex;flex-wrap:wrap;gap:8px 26px;margin:0 0 12px}dt{font-size:12px;color:var(--muted)}
dd{margin:0;font-variant-numeric:tabular-nums}
details{margin:0 0 10px;font-size:13.5px}summary{cursor:pointer;color:var(--muted)}details table{margin-top:6px}
footer{color:var(--muted);font-size:13px;padding-top:14px}
@media (max-width:560px){main{padding:20px 14px 36px}h1{font-size:23px}}
""".strip()
