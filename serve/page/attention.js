// Where the model looked: an answer's words, and over its pictures the attention of the word that is pointed at.

import { attention } from "./client.js";
import { words } from "./text.js";

const STOPS = [[22, 14, 60], [122, 28, 109], [221, 81, 58], [252, 172, 44], [255, 255, 190]];

function colour(value) {
  const at = value * (STOPS.length - 1), low = Math.min(Math.floor(at), STOPS.length - 2), part = at - low;
  return STOPS[low].map((from, channel) => from + (STOPS[low + 1][channel] - from) * part);
}

const load = url => new Promise((resolve, reject) => {
  const image = new Image();
  image.onload = () => resolve(image);
  image.onerror = () => reject(new Error("a picture cannot be shown"));
  image.src = url;
});

const bytes = text => Uint8Array.from(atob(text), char => char.charCodeAt(0));

export class Look {
  // `text`: the element of the answer; `place`: where the pictures go; `say`: tells a line to everybody.
  constructor(text, source, place, say) {
    Object.assign(this, { text, source, place, say, kept: null });
  }

  async open(body) {
    const found = await attention(body);
    let length = 0;
    this.tokens = found.tokens.map(token => ({ share: token.share, start: length, end: length += token.text.length }));
    const whole = found.tokens.map(token => token.text).join(""), shift = Math.max(whole.indexOf(this.source.trim()), 0);
    const skipped = this.source.length - this.source.trimStart().length;
    this.words = words(this.text, this.source).map(word => ({
      ...word,
      tokens: this.tokens.map((_, number) => number).filter(number =>
        this.tokens[number].start < word.end - skipped + shift && this.tokens[number].end > word.start - skipped + shift),
    })).filter(word => word.tokens.length);
    this.pictures = await Promise.all(found.images.map(async image => ({ ...image, heats: image.heats.map(bytes), picture: await load(image.picture) })));
    const list = document.createElement("ul");
    for (const [number, one] of this.pictures.entries()) {
      one.canvas = document.createElement("canvas");
      one.canvas.width = one.picture.naturalWidth;
      one.canvas.height = one.picture.naturalHeight;
      one.canvas.setAttribute("role", "img");
      one.canvas.setAttribute("aria-label", `Attention over picture ${number + 1}`);
      const item = document.createElement("li");
      item.append(one.canvas);
      list.append(item);
    }
    this.note = document.createElement("p");
    this.note.className = "note";
    this.note.setAttribute("role", "status");
    this.place.replaceChildren(list, this.note);
    this.listen();
    this.show(null);
    this.place.scrollIntoView({ block: "nearest" });
  }

  listen() {
    for (const [number, { span }] of this.words.entries()) {
      span.tabIndex = number ? -1 : 0;
      span.addEventListener("pointerenter", () => this.show(number));
      span.addEventListener("pointerleave", () => this.show(this.kept));
      span.addEventListener("focus", () => this.show(number));
      span.addEventListener("click", () => { this.kept = this.kept === number ? null : number; this.show(this.kept); });
      span.addEventListener("keydown", event => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        const next = step && this.words[number + step]?.span;
        if (!next) return;
        event.preventDefault();
        span.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    }
  }

  // Shows the attention of a word, or of all where it is null.
  show(number) {
    for (const [each, { span }] of this.words.entries()) span.classList.toggle("now", each === number);
    const tokens = number === null ? this.tokens.map((_, each) => each) : this.words[number].tokens;
    const share = Math.round(100 * tokens.reduce((sum, token) => sum + this.tokens[token].share, 0) / Math.max(tokens.length, 1));
    const what = number === null ? "the whole answer" : `“${this.words[number].span.textContent}”`;
    this.note.textContent = `${what}: ${share} % of the attention is on the pictures. Point at a word, or move with the arrow keys.`;
    for (const one of this.pictures) this.draw(one, tokens);
  }

  draw({ canvas, picture, rows, columns, heats }, tokens) {
    const heat = new Float64Array(rows * columns);
    for (const token of tokens) for (let cell = 0; cell < heat.length; cell++) heat[cell] += heats[token][cell];
    const most = Math.max(...heat, 1e-9), small = new OffscreenCanvas(columns, rows), over = small.getContext("2d");
    const data = over.createImageData(columns, rows);
    heat.forEach((value, cell) => {
      const at = value / most;
      data.data.set([...colour(at), 255 * (0.45 + 0.4 * Math.sqrt(at))], 4 * cell);
    });
    over.putImageData(data, 0, 0);
    const context = canvas.getContext("2d");
    context.filter = "grayscale(1)";
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    context.filter = "none";
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    canvas.dataset.tokens = tokens.join(" ");
  }
}
