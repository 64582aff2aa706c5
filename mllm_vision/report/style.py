"""The page's style sheet."""

CSS = """
:root{--paper:#fbfaf8;--card:#fff;--ink:#1d2126;--soft:#626a73;--line:#e4e1da;--grid:#ecebe6;--model:#2357b8;
--untrained:#8b93a0;--blind:#c07a1e;--majority:#b9a24c;--chance:#c6cad1;--other:#7a4fb5;--right:#1f7a4d;
--wrong:#c0392b;
--shade:#f3f1ec;--good-bg:#e6f3ec;--bad-bg:#fbe9e7;
--font:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Noto Sans",sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1c2026;--ink:#e7e9ec;--soft:#9aa3ad;
--line:#30363e;
--grid:#282d34;--model:#7aa7ff;--untrained:#8b93a0;--blind:#e0a452;--majority:#cdb868;--chance:#565e69;
--other:#b594e8;
--right:#5fc796;--wrong:#f08a7d;--shade:#22272e;--good-bg:#1b3328;--bad-bg:#3a2320}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 var(--font);
font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:40px 28px 72px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;margin:0 0 6px;text-wrap:balance}
h2{font-size:25px;letter-spacing:-.015em;margin:0 0 4px}
h2 small{font-size:17px;font-weight:400;color:var(--soft);letter-spacing:0;margin-left:8px}
.times{max-width:320px;margin-bottom:14px}
h3{font-size:18px;margin:34px 0 10px;letter-spacing:-.005em}
h4{font-size:15px;margin:18px 0 8px}
h5{font-size:14px;margin:0 0 4px;font-weight:600}
p{margin:6px 0}
.lead{color:var(--soft);margin:0 0 26px}
.muted{color:var(--soft);font-weight:400}
.note{color:var(--soft);font-size:13.5px;max-width:74ch}
.right{color:var(--right)}.wrong{color:var(--wrong)}
code,.hash,pre{font-family:var(--mono);font-size:.86em}
section{border-top:1px solid var(--line);margin-top:46px;padding-top:30px}
.about{max-width:72ch}
.facts{color:var(--soft);font-size:14.5px}.facts i{font-style:normal;opacity:.6;margin:0 3px}
.headlines{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:16px;margin:22px 0 8px}
.headline{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px 14px}
.headline h5{color:var(--soft);font-weight:500;margin:0}
.headline .big{font-size:38px;line-height:1.15;font-weight:650;letter-spacing:-.03em;margin:2px 0 10px}
.bar{display:grid;grid-template-columns:minmax(0,126px) 1fr 56px;gap:8px;align-items:center;font-size:13px;
margin:4px 0}
.bar-name{color:var(--soft);white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.bar-track{background:var(--shade);height:12px;border-radius:4px;overflow:hidden}
.bar-fill{display:block;height:100%;border-radius:4px;min-width:2px}
.bar-value{text-align:right;white-space:nowrap}
.types .bar{grid-template-columns:1fr 56px}.types .bar-name{display:none}
.bar.thin{margin:2px 0;color:var(--soft);font-size:12px}.bar.thin .bar-track{height:6px}
.types{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:16px 34px}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;color:var(--soft);margin:4px 0 10px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.legend b{color:var(--ink);font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,390px),1fr));gap:22px 28px;
margin:18px 0;align-items:start}
figure{margin:0}
figcaption{font-weight:600;font-size:14.5px;margin-bottom:4px}
.chart{max-width:640px}
svg{display:block;width:100%;height:auto}
svg text{font:12px var(--font);fill:var(--soft);font-variant-numeric:tabular-nums}
svg text.small{font-size:11px}
.grid{stroke:var(--grid)}.axis{stroke:var(--line)}
.rule{stroke:var(--soft);stroke-dasharray:2 4}
.curve{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.curve.faint{stroke-width:1;
opacity:.28}
.cell{fill:var(--model)}
.mark,.rule-text{paint-order:stroke;stroke:var(--paper);stroke-width:4px}
svg text.figure{fill:var(--ink)}
.matrix{margin:22px 0}
.matrix text{fill:var(--ink)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;width:100%;margin:4px 0}
th{font-weight:500;color:var(--soft);text-align:left;border-bottom:1px solid var(--line);padding:5px 12px 5px 0;
white-space:nowrap}
td{border-bottom:1px solid var(--grid);padding:5px 12px 5px 0;vertical-align:top}
.num{text-align:right;padding-right:0;padding-left:14px;white-space:nowrap}
.evaluation.wide{grid-column:1/-1}
.evaluations{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:4px 36px;
align-items:start}
.verdict{list-style:none;padding:0;margin:12px 0;display:flex;flex-wrap:wrap;gap:6px}
.verdict li{font-size:13px;padding:3px 10px;border-radius:99px;background:var(--shade)}
.verdict .good{background:var(--good-bg);color:var(--right)}.verdict .bad{background:var(--bad-bg);
color:var(--wrong)}
.lineage svg{margin:0 auto}.lineage.tall{display:none}
.box rect:first-child{fill:var(--card);stroke:var(--line)}
.edge{fill:var(--model)}.edge.language_model{fill:var(--other)}.edge.stage_one{fill:var(--blind)}
.edge.stage_two{fill:var(--right)}
.box-title{font-size:15px!important;font-weight:650;fill:var(--ink)!important}
.box-what{fill:var(--ink)!important}.hash{fill:var(--model)}
.arrow{fill:none;stroke:var(--soft);stroke-width:1.4}.arrow-head{fill:var(--soft)}.role{
font-size:11.5px!important}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,470px),1fr));gap:24px 34px;margin-top:14px}
.map-row{display:grid;grid-auto-flow:column;grid-auto-columns:1fr;gap:10px;align-items:start}
.map-row img{display:block;width:100%;border-radius:8px}
.map-row figcaption{font-weight:400;font-size:13px;line-height:1.4;margin-top:6px}
.pixels{image-rendering:pixelated}
.veiled{position:relative}.veiled .veil{position:absolute;inset:0;height:100%}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(238px,1fr));gap:12px}
.card{display:flex;gap:12px;background:var(--card);border:1px solid var(--line);
border-left:3px solid var(--right);border-radius:10px;padding:10px}
.card.is-wrong{border-left-color:var(--wrong)}.card.is-open{border-left-color:var(--model)}
.card img{width:84px;height:84px;object-fit:cover;border-radius:6px;flex:none}
.cards.small{grid-template-columns:repeat(auto-fill,minmax(112px,1fr))}
.small .card{flex-direction:column;gap:6px;padding:8px}.small .card img{width:100%;height:auto;aspect-ratio:1}
.words{font-size:13.5px;line-height:1.4;min-width:0;overflow-wrap:anywhere}
.question{margin-bottom:3px}
.tag{display:inline-block;font-size:11px;color:var(--soft);background:var(--shade);border-radius:4px;
padding:0 6px;margin-top:5px}
details{border-top:1px solid var(--grid);padding:8px 0}
details[open]{padding-bottom:14px}
summary{cursor:pointer;color:var(--soft);font-size:14px}
.folds{margin-top:26px}
pre{background:var(--shade);border-radius:8px;padding:10px 14px;white-space:pre-wrap;overflow-wrap:anywhere}
.flags{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:0 26px;margin:8px 0;
font-size:13px}
.flags div{display:flex;justify-content:space-between;gap:12px;border-bottom:1px solid var(--grid);
padding:2px 0;min-width:0}
.flags dt{color:var(--soft);white-space:nowrap}.flags dd{margin:0;text-align:right;overflow-wrap:anywhere;
min-width:0}
footer{border-top:1px solid var(--line);margin-top:50px;padding-top:18px;color:var(--soft);font-size:13.5px}
@media(max-width:760px){main{padding:24px 16px 48px}h1{font-size:27px}.lineage.wide{display:none}.lineage.tall{
display:block}
.headline .big{font-size:32px}}
@media print{body{background:#fff}details{display:none}section{break-inside:auto}.card,.chart{
break-inside:avoid}}
"""
