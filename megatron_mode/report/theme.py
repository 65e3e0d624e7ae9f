"""Style the report page: one sheet for light and dark, for a desk and for a phone."""

from __future__ import annotations

from megatron_mode.report.heatmap import LEVELS, TEXT_COLOUR, Theme, rgb

# Tableau-like hues, distinct to most colour-blind readers; the dark row is lighter.
_LIGHT = ("#2f6fb7", "#d9730d", "#5c6470", "#2a8f6d", "#b5407f", "#8a6d1f")
_DARK = ("#6fa8e6", "#f0a050", "#a5adb8", "#5cc7a1", "#e386b8", "#d0b25a")

_BASE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1280px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:22px;margin:0}h2{font-size:17px;margin:32px 0 10px}h3{font-size:15px;margin:16px 0 8px}
p{margin:4px 0 12px}.quiet,figcaption,.note{color:var(--quiet);font-size:13px}
code{font:12px ui-monospace,"DejaVu Sans Mono",monospace}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,370px),1fr))}
.tiles{display:grid;gap:10px;grid-template-columns:repeat(auto-fit,minmax(min(46%,190px),1fr));
  margin:18px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:0;padding:12px;
  min-width:0}
.card h3{margin:0 0 2px}.ck{--c:var(--quiet)}
figure.card{display:flex;flex-direction:column}figure>svg{margin-top:auto}
.tile b{display:block;font-size:22px;font-weight:600;line-height:1.3;
  font-variant-numeric:tabular-nums}
.tile span{display:block;font-size:13px}.tile small{color:var(--quiet);font-size:12px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;width:100%}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600;color:var(--quiet)}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--quiet);font-size:11px}svg .axis{fill:var(--ink)}
path.grid{stroke:var(--line);fill:none}path.tick{stroke:var(--quiet);fill:none}
.curve{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.dashed{stroke-dasharray:5 4}.dotted{stroke-dasharray:1.5 3.5}.band{fill:var(--c);opacity:.14}
circle{fill:var(--c);stroke:var(--card)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;list-style:none;margin:0 0 6px;padding:0;
  font-size:12px;color:var(--quiet)}
.legend svg{display:inline-block;width:22px;height:8px;margin-right:5px}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.75 Georgia,"DejaVu Serif",serif;
  margin:8px 0 0}
.text span{padding:2px 0;color:var(--on)}
.text .k{font:11px ui-monospace,"DejaVu Sans Mono",monospace;padding:1px 3px;margin:0 2px;
  border-radius:4px;outline:1px solid var(--quiet);outline-offset:-1px}
.text .n::before{content:"\\21b5";opacity:.6}
.scale{display:flex;align-items:center;gap:8px;font-size:12px;color:var(--quiet);white-space:nowrap}
.scale div{display:flex;flex:0 1 240px;border-radius:3px;overflow:hidden}
.scale i{flex:1;height:14px}
"""


def style_sheet() -> str:
    """Return the page's CSS, with the series colours and the heat map's levels of both themes."""
    light = {"page": "#f6f7f9", "card": "#fff", "ink": "#1d2127", "quiet": "#5b636e"}
    dark = {"page": "#131519", "card": "#1b1e23", "ink": "#e7e9ec", "quiet": "#9aa3ae"}
    return (
        ":root{color-scheme:light dark}"
        + _theme("light", {**light, "line": "#dfe3e8"}, _LIGHT)
        + _BASE
        + "@media (prefers-color-scheme:dark){"
        + _theme("dark", {**dark, "line": "#30353c"}, _DARK)
        + "}"
    )


def _theme(theme: Theme, variables: dict[str, str], series: tuple[str, ...]) -> str:
    variables = {**variables, "on": _hex(TEXT_COLOUR[theme])}
    rules = [":root{" + "".join(f"--{name}:{value};" for name, value in variables.items()) + "}"]
    rules += [f".c{index}{{--c:{colour}}}" for index, colour in enumerate(series)]
    for level in range(LEVELS):
        rules.append(f".p{level}{{background:{_hex(rgb(level / (LEVELS - 1), theme))}}}")
    return "".join(rules)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in colour)
