"""A page on which pointing at a word of the answer shows where the model looked: one file, nothing from elsewhere."""

import base64
import io
from html import escape

from PIL import Image

from .attended import MADE_BY, AnswerAttention, name_numbers
from .heat import colour, heat_of, mean_token, open_pictures

_MOST, _LEAST, _CELLS = 640, 320, 160  # pixels along a picture, and cells along the heat over it at most
# No source but the page itself is allowed, so that it cannot ask anybody for anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_STYLE = """
body { font: 17px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  background: #fff; color: #1b1d23; }
figure { display: inline-block; position: relative; margin: 0 .6rem .6rem 0; }
figure img { display: block; width: 100%; }
figure .under { filter: grayscale(1); }
figure .heat { position: absolute; inset: 0; height: 100%; image-rendering: pixelated; visibility: hidden; }
.shown { visibility: visible !important; }
figure.plain .heat { visibility: hidden !important; }
figure.plain .under { filter: none; }
.prompt { color: #5b6170; white-space: pre-wrap; }
.answer { font-size: 1.35rem; white-space: pre-wrap; }
.answer span { border-radius: .2rem; cursor: pointer; padding: .1rem 0; }
.answer .special { color: #9aa0ad; font-size: .8em; }
.answer .now { background: #ffd58a; }
.note { color: #5b6170; font-size: .9rem; min-height: 1.6em; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1d23; color: #d7dae0; } .prompt, .note { color: #9aa0ad; }
  .answer .now { background: #7a5410; } }
"""
_SCRIPT = """
const words = [...document.querySelectorAll('.answer span')], note = document.querySelector('.note');
let kept = 'all';
function show(token) {
  for (const heat of document.querySelectorAll('.heat')) heat.classList.toggle('shown', heat.dataset.token === token);
  for (const word of words) word.classList.toggle('now', word.dataset.token === token);
  const word = words.find(word => word.dataset.token === token);
  note.textContent = word ? word.title : note.dataset.all;
}
for (const word of words) {
  word.addEventListener('mouseenter', () => show(word.dataset.token));
  word.addEventListener('focus', () => show(word.dataset.token));
  word.addEventListener('mouseleave', () => show(kept));
  word.addEventListener('blur', () => show(kept));
  const keep = () => { kept = kept === word.dataset.token ? 'all' : word.dataset.token; show(kept); };
  word.addEventListener('click', keep);
  word.addEventListener('keydown', event => { if (event.key === 'Enter') keep(); });
}
for (const figure of document.querySelectorAll('figure')) {
  figure.addEventListener('mouseenter', () => figure.classList.add('plain'));
  figure.addEventListener('mouseleave', () => figure.classList.remove('plain'));
}
show(kept);
"""


def attention_page(found: AnswerAttention) -> str:
    """HTML with the answer and its pictures; a word under the pointer shows its heat map over them, a click keeps it.

    Words are the answer's tokens. Before one is pointed at, the mean of all shows; a picture under the pointer shows
    itself. Colours are those of `draw_attention`. The page holds all that it needs, and may load nothing.

    Raises:
        ImageError: a picture is not there any more, or is another one.
    """
    found = found.mean()
    pictures = open_pictures(found, _MOST, _LEAST)
    grids: list[tuple[int, int]] = []
    figures: list[str] = []
    for picture in pictures:
        scale = min(1.0, _CELLS / max(picture.size))
        figures.append(f'<img class="under" alt="image {len(figures) + 1}" src="{_data(picture, "JPEG")}">')
        grids.append((max(1, round(picture.height * scale)), max(1, round(picture.width * scale))))
    shown = [("all", mean_token(found), 0), *((str(t), found, t) for t in range(len(found.tokens)))]
    for name, of, token in shown:
        for i, heat in enumerate(heat_of(of, token, grids)):
            overlay = _data(Image.fromarray(colour(heat)), "PNG")
            figures[i] += f'\n<img class="heat" data-token="{name}" alt="" src="{overlay}">'
    body = "\n".join(
        f'<figure style="width:{picture.width}px;max-width:100%">{figure}</figure>'
        for picture, figure in zip(pictures, figures, strict=True)
    )
    words = "".join(_word(found, token) for token in range(len(found.tokens)))
    how = f"{found.reduce} of layers {name_numbers(found.layers)} and heads {name_numbers(found.heads)}"
    everything = found.caption
    prompt = "" if found.drawn else f'<p class="prompt">{escape(found.prompt)}</p>\n'
    title = "Where the picture's attention to each word came from" if found.drawn else "Where the model looked"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="generator" content="{MADE_BY}">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
{prompt}<p class="answer">{words}</p>
<p class="note" data-all="{escape(everything)}">{escape(everything)}</p>
{body}
<p class="note">Point at a word, click to keep it; point at a picture to see it bare. Attention: {escape(how)}.</p>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _word(found: AnswerAttention, token: int) -> str:
    text = found.texts[token]
    special = "" if text.strip() else ' class="special"'
    title = found.describe(token)
    shown = escape(text) if text.strip() else escape(text) + escape(found.label(token))
    return f'<span tabindex="0" data-token="{token}"{special} title="{escape(title)}">{shown}</span>'


def _data(image: Image.Image, kind: str) -> str:
    out = io.BytesIO()
    image.save(out, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
