// An answer's Markdown as elements. The model's own HTML is text, pictures and other sources are left out.

import MarkdownIt from "./vendor/markdown-it.mjs";
import DOMPurify from "./vendor/purify.mjs";

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: true }).disable("image");

DOMPurify.addHook("afterSanitizeAttributes", node => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
  if (/^(P|LI|H[1-6]|BLOCKQUOTE|TD|TH)$/.test(node.tagName)) node.setAttribute("dir", "auto");
});

export const render = text => DOMPurify.sanitize(markdown.render(text), {
  RETURN_DOM_FRAGMENT: true, FORBID_TAGS: ["img", "style", "form", "input", "video", "audio", "iframe"], ADD_ATTR: ["target"],
});

// Puts each word of an element into a span of its own; gives those spans with where the word stands in the source.
export function words(element, source) {
  const found = [], walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT), nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  let place = 0;
  for (const node of nodes) {
    const pieces = node.data.split(/(\s+)/u).filter(piece => piece);
    const parts = pieces.map(piece => {
      const at = piece.trim() ? source.indexOf(piece, place) : -1;
      if (at < 0) return document.createTextNode(piece);
      place = at + piece.length;
      const span = document.createElement("span");
      span.className = "word";
      span.textContent = piece;
      found.push({ span, start: at, end: place });
      return span;
    });
    node.replaceWith(...parts);
  }
  return found;
}
