// The page: a conversation with pictures, and those that were kept.

import { Look } from "./attention.js";
import * as client from "./client.js";
import * as store from "./store.js";
import { render } from "./text.js";

const $ = id => document.getElementById(id);
const OPTIONS = ["temperature", "max_tokens", "seed"];
let kept = [], current = fresh(), waiting = [], running = null;

function fresh() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, messages: [], updated: Date.now() };
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const button = (text, act, label) => {
  const made = element("button", { type: "button", textContent: text, onclick: act });
  if (label) made.setAttribute("aria-label", label);
  return made;
};

const say = text => { $("status").textContent = text; };

// Pictures

const TYPES = { heic: "image/heic", heif: "image/heif", avif: "image/avif", pdf: "application/pdf" };

async function take(files) {
  for (const file of files) {
    const type = file.type || TYPES[file.name.split(".").pop().toLowerCase()] || "";
    if (!type.startsWith("image/") && type !== "application/pdf") {
      say(`${file.name} is no picture and no PDF`);
      continue;
    }
    const url = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
    waiting.push({ name: file.name || "picture", type, url: `data:${type};base64,${url.split(",")[1]}` });
  }
  showWaiting();
  $("said").focus();
}

// What a browser cannot show, a HEIC say, has its name instead.
function thumbnail(picture) {
  const named = () => element("span", { className: "file", textContent: picture.name });
  if (picture.type === "application/pdf") return named();
  const image = element("img", { alt: picture.name, src: picture.url });
  image.onerror = () => image.replaceWith(named());
  return image;
}

function showWaiting() {
  $("waiting").replaceChildren(...waiting.map((picture, number) => element("li", {}, thumbnail(picture),
    button("×", () => { waiting.splice(number, 1); showWaiting(); }, `Remove ${picture.name}`))));
}

// Messages

const part = picture => picture.type === "application/pdf"
  ? { type: "file", file: { filename: picture.name, file_data: picture.url } }
  : { type: "image_url", image_url: { url: picture.url } };

function asMessages(messages) {
  const system = store.settings().system?.trim();
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...messages.filter(message => !message.error || message.text).map(message => ({
      role: message.role,
      content: message.pictures?.length ? [...message.pictures.map(part), { type: "text", text: message.text }] : message.text,
    })),
  ];
}

function noteOf(message) {
  const { usage, timings } = message;
  if (!usage) return message.stopped ? "stopped" : "";
  const rate = timings?.tokens_per_second ? `, ${timings.tokens_per_second.toFixed(1)} tokens/s` : "";
  const cached = usage.prompt_tokens_details?.cached_tokens;
  return `${usage.completion_tokens} tokens${rate}, first after ${timings.first_token_s.toFixed(2)} s, `
    + `${usage.prompt_tokens} before it${cached ? ` (${cached} kept)` : ""}${message.reason === "length" ? ", cut at the limit" : ""}`;
}

function item(message, number) {
  const text = element("div", { className: "text", dir: "auto" });
  const made = element("li", { className: message.role }, element("span", { className: "hidden", textContent: message.role === "user" ? "You:" : "Answer:" }));
  if (message.pictures?.length) made.append(element("div", { className: "pictures" }, ...message.pictures.map(thumbnail)));
  if (message.thoughts) made.append(element("details", {}, element("summary", { textContent: "Thoughts" }), element("div", { className: "thoughts", dir: "auto", textContent: message.thoughts })));
  made.append(text);
  if (message.role === "user") text.textContent = message.text;
  else text.replaceChildren(render(message.text));
  if (message.error) made.append(element("p", { className: "error", textContent: message.error }));
  const tools = element("div", { className: "tools" }), last = number === current.messages.length - 1;
  if (message.role === "user") tools.append(button("Edit", () => edit(number)));
  if (message.role === "assistant" && message !== running?.message) {
    const note = noteOf(message);
    if (message.text) tools.append(button("Copy", async () => { await navigator.clipboard.writeText(message.text); say("copied"); }));
    if (last) tools.append(button("Retry", () => retry()));
    if (message.text && current.messages.slice(0, number).some(before => before.pictures?.length)) addLook(made, text, message, number, tools);
    if (note) made.append(element("p", { className: "note", textContent: note }));
  }
  made.append(tools);
  return made;
}

// Pointing at an answer asks where the model looked; so does the button.
function addLook(made, text, message, number, tools) {
  const place = element("section", { className: "look" });
  place.setAttribute("aria-label", "Where the model looked");
  let begun = false, soon;
  const begin = async () => {
    if (begun || running) return;
    begun = true;
    open.disabled = true;
    made.append(place);
    place.textContent = "looking …";
    try {
      const body = { model: message.model, messages: asMessages(current.messages.slice(0, number + 1)) };
      await new Look(text, message.text, place, say).open(body);
    } catch (error) {
      begun = open.disabled = false;
      place.replaceChildren(element("p", { className: "error", textContent: error.message }));
    }
  };
  const open = button("Where did it look?", begin);
  text.addEventListener("pointerenter", event => { if (event.pointerType === "mouse") soon = setTimeout(begin, 250); });
  text.addEventListener("pointerleave", () => clearTimeout(soon));
  tools.append(open);
}

function show() {
  $("log").replaceChildren(...current.messages.map(item));
  $("empty").hidden = current.messages.length > 0;
  $("log").scrollTop = $("log").scrollHeight;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
}

// Conversations

const titleOf = conversation => conversation.messages.find(message => message.role === "user")?.text.slice(0, 60) || "Picture";

async function list() {
  try {
    kept = await store.all();
  } catch {
    say("this browser keeps no conversations");
  }
  $("conversations").replaceChildren(...kept.map(conversation => {
    const open = button(titleOf(conversation), () => choose(conversation));
    open.dir = "auto";
    open.setAttribute("aria-current", conversation.id === current.id);
    return element("li", {}, open, button("×", () => forget(conversation), `Delete ${titleOf(conversation)}`));
  }));
}

function choose(conversation) {
  running?.abort.abort();
  running = null;
  current = conversation;
  location.hash = conversation.messages.length ? conversation.id : "";
  closeDrawer();
  show();
  list();
}

async function forget(conversation) {
  if (!confirm(`Delete “${titleOf(conversation)}”?`)) return;
  await store.remove(conversation.id);
  if (conversation.id === current.id) choose(fresh());
  else await list();
}

async function keep() {
  try {
    await store.put(current);
    location.hash = current.id;
  } catch (error) {
    say(`the conversation is not kept: ${error?.message ?? "the browser has no room"}`);
  }
  await list();
}

function closeDrawer() {
  $("side").classList.remove("open");
  $("drawer").setAttribute("aria-expanded", "false");
}

// Answers

function send(text, pictures) {
  current.messages.push({ role: "user", text, pictures });
  answer();
}

function retry() {
  if (running) return;
  current.messages.pop();
  answer(true);
}

function edit(number) {
  if (running) return;
  const message = current.messages[number];
  current.messages.length = number;
  waiting = message.pictures ?? [];
  $("said").value = message.text;
  showWaiting();
  show();
  grow();
  $("said").focus();
}

async function answer(again = false) {
  const own = current, asked = own.messages.slice(), values = store.settings();
  const message = { role: "assistant", text: "", model: $("model").value };
  const body = { model: message.model, messages: asMessages(asked) };
  for (const name of OPTIONS) if (values[name] !== undefined && values[name] !== "") body[name] = Number(values[name]);
  if (again && !body.temperature) Object.assign(body, { temperature: 0.7, seed: Math.floor(Math.random() * 2 ** 31) });
  own.messages.push(message);
  const mine = running = { abort: new AbortController(), message };
  show();
  say("reading …");
  let due = false;
  const draw = () => {
    due = false;
    const made = $("log").lastElementChild, log = $("log"), follow = log.scrollHeight - log.scrollTop - log.clientHeight < 120;
    if (running !== mine || !made) return;
    if (message.thoughts && !message.text) say("thinking …");
    made.querySelector(".text").replaceChildren(render(message.text));
    if (follow) log.scrollTop = log.scrollHeight;
  };
  try {
    await client.stream(body, mine.abort.signal, event => {
      const choice = event.choices[0];
      if (choice) {
        message.text += choice.delta.content ?? "";
        if (choice.delta.reasoning_content) message.thoughts = (message.thoughts ?? "") + choice.delta.reasoning_content;
        message.reason = choice.finish_reason ?? message.reason;
      }
      if (event.usage) Object.assign(message, { usage: event.usage, timings: event.timings });
      if (!due) {
        due = true;
        requestAnimationFrame(draw);
      }
    });
    say("");
  } catch (error) {
    if (mine.abort.signal.aborted) message.stopped = true;
    else message.error = error.message;
    say(message.stopped ? "stopped" : "");
  }
  if (running === mine) running = null;
  if (own === current) {
    show();
    await keep();
  } else {
    await store.put(own).catch(() => {});
  }
}

// The form

function grow() {
  const area = $("said");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

$("composer").addEventListener("submit", event => {
  event.preventDefault();
  const text = $("said").value.trim();
  if (running || (!text && !waiting.length)) return;
  const pictures = waiting;
  waiting = [];
  $("said").value = "";
  showWaiting();
  grow();
  send(text, pictures);
});
$("said").addEventListener("keydown", event => {
  // 229: some input methods end their composition by the very key
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("said").addEventListener("input", grow);
$("stop").addEventListener("click", () => running?.abort.abort());
$("attach").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", async () => { await take($("files").files); $("files").value = ""; });
$("new").addEventListener("click", () => { choose(fresh()); $("said").focus(); });
$("drawer").addEventListener("click", () => {
  const open = $("side").classList.toggle("open");
  $("drawer").setAttribute("aria-expanded", open);
});
document.addEventListener("keydown", event => { if (event.key === "Escape") closeDrawer(); });
document.addEventListener("paste", event => { if (event.clipboardData.files.length) { event.preventDefault(); take(event.clipboardData.files); } });
document.addEventListener("dragover", event => { event.preventDefault(); $("composer").classList.add("over"); });
document.addEventListener("dragleave", event => { if (!event.relatedTarget) $("composer").classList.remove("over"); });
document.addEventListener("drop", event => { event.preventDefault(); $("composer").classList.remove("over"); take(event.dataTransfer.files); });

// Settings

$("tune").addEventListener("click", () => $("settings").showModal());
for (const name of ["system", ...OPTIONS]) {
  $(name).value = store.settings()[name] ?? "";
  $(name).addEventListener("change", () => store.keepSettings({ ...store.settings(), [name]: $(name).value }));
}
$("model").addEventListener("change", () => store.keepSettings({ ...store.settings(), model: $("model").value }));

async function begin() {
  await list();
  const asked = kept.find(conversation => conversation.id === location.hash.slice(1));
  if (asked) choose(asked);
  else show();
  try {
    const models = await client.models(), chosen = store.settings().model;
    $("model").replaceChildren(...models.map(model => element("option", { value: model.id, textContent: model.id })));
    if (models.some(model => model.id === chosen)) $("model").value = chosen;
  } catch (error) {
    say(`the models cannot be listed: ${error.message}`);
  }
}

begin();
