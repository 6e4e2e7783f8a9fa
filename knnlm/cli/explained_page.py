"""An explained text as one HTML page that fetches nothing and runs nothing: each token leads to its passages."""

import html
import math

from knnlm.clients.explained import Explained, ExplainedComponent, ExplainedPassage, ExplainedToken

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is loaded, nothing runs
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 1.1rem; line-height: 1.8; }
.text a { color: inherit; text-decoration: none; border-radius: .2rem; }
.text a:hover, .text a:focus { outline: 2px solid currentColor; } .context { opacity: .6; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
section { display: none; } section:target { display: block; }
blockquote { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 1rem 1rem; }
"""


def explained_page(answer: Explained) -> str:
    """A whole HTML document. The fuller a token's ground, the more of its probability was retrieved."""
    title = html.escape(" ".join([answer.model, *(f"{d.domain} {d.version}" for d in answer.domains)]))
    links = "".join(_link(i, token) for i, token in enumerate(answer.tokens))
    documents = "".join(
        f'<tr><td class="n">{d.share:.1%}</td><td class="n">{d.tokens}</td><td>{html.escape(d.document)}</td>'
        f"<td>{html.escape(d.domain)}</td></tr>"
        for d in answer.documents
    )
    head = '<tr><th class="n">of retrieval</th><th class="n">tokens</th><th>document</th><th>domain</th></tr>'
    degraded = "" if answer.degraded is None else f"<p>Nothing was retrieved: {html.escape(answer.degraded)}</p>"
    perplexity = "infinite" if answer.perplexity is None else f"{answer.perplexity:.4f}"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1>
<p>{len(answer.tokens)} tokens, perplexity {perplexity}; of the language model alone {answer.perplexity_lm:.4f}.
The fuller a token's ground, the more of its probability was retrieved. A token leads to its passages.</p>{degraded}
<p class="text"><span class="context">{html.escape(answer.context)}</span>{links}</p>
{"".join(_details(i, token) for i, token in enumerate(answer.tokens))}
<h2>Documents</h2>
<table>{head}{documents}</table>
</html>
"""


def _link(i: int, token: ExplainedToken) -> str:
    part = token.retrieved
    title = f"p {_probability(token.log_p)}, LM {_probability(token.log_p_lm)}, {part:.0%} retrieved"
    ground = f"background:rgba(245,150,20,{0.85 * part:.3f})"
    return f'<a href="#t{i}" style="{ground}" title="{title}">{html.escape(token.token)}</a>'


def _details(i: int, token: ExplainedToken) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(c.name)} ({html.escape(c.kind)})</td><td class="n">{c.weight:.4f}</td>'
        f'<td class="n">{_probability(c.log_p)}</td></tr>'
        for c in token.components
    )
    passages = "".join(_passage(passage, token, c) for c in token.components for passage in c.passages)
    return f"""<section id="t{i}"><h2>{html.escape(repr(token.token))}, p {_probability(token.log_p)}</h2>
<table><tr><th>component</th><th class="n">weight</th><th class="n">p</th></tr>{rows}</table>
{passages or "<p>No entry that was found stores this token.</p>"}</section>
"""


def _passage(passage: ExplainedPassage, token: ExplainedToken, component: ExplainedComponent) -> str:
    after = html.escape(passage.after)
    if token.token and passage.after.startswith(token.token):
        after = f"<mark>{html.escape(token.token)}</mark>{html.escape(passage.after.removeprefix(token.token))}"
    where = html.escape(f"{passage.document} ({passage.domain}), token {passage.position}")
    share = f"{passage.share:.1%} of {html.escape(component.name)}, distance {passage.distance:.4g}"
    return f"<div>{where}: {share}<blockquote>{html.escape(passage.before)}{after}</blockquote></div>"


def _probability(log_p: float | None) -> str:
    return "0" if log_p is None else f"{math.exp(log_p):.5f}"
