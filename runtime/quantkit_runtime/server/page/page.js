"use strict";
// One page for what the server makes. Every model of the chosen kind gets the same request with the same seed.

const $ = id => document.getElementById(id);
const LABELS = {
  width: "Width", height: "Height", num_frames: "Frames", fps: "Frames per second", num_inference_steps: "Steps",
  guidance_scale: "Guidance", guidance_scale_2: "Guidance 2", true_cfg_scale: "True guidance",
  max_tokens: "Tokens at most", temperature: "Temperature", top_p: "Top p", seed: "Seed",
};
const FIELDS = {
  image: ["width", "height", "num_inference_steps", "guidance_scale", "true_cfg_scale", "seed"],
  video: ["width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "guidance_scale_2", "seed"],
  chat: ["max_tokens", "temperature", "top_p", "seed"],
};
const ALWAYS = new Set(["width", "height", "seed", "fps", "max_tokens"]);
const HINTS = {
  image: "Write a prompt and generate: the picture appears here, step by step.",
  video: "Write a prompt and generate: the video appears here.",
  chat: "Say something: the answer appears here, word by word.",
};
let models = [], kind = null, running = null, talks = new Map();

// Talking to the server

function headers(more = {}) {
  const key = $("key").value;
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function call(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers(options.headers), signal: options.signal });
  if (answer.ok) return answer;
  if (answer.status === 401) document.querySelector(".key").hidden = false;
  const body = await answer.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered ${answer.status}`);
}

const post = (path, body, signal) => call(path, {
  method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal,
});

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find(line => line.startsWith("data: "))?.slice(6);
      if (!data || data === "[DONE]") continue;
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

// Building the page

function make(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

const served = () => models.filter(model => model.kinds.includes(kind));
const takes = name => ALWAYS.has(name) || served().some(model => model.parameters.includes(name));
const standard = name => served().map(model => model.defaults[name]).find(value => value !== undefined);

async function refresh() {
  try {
    ({ models } = await (await call("page/state")).json());
    $("error").dataset.of === "state" && fail(null);
  } catch (error) {
    fail(error, "state");
  }
  $("models").replaceChildren(...models.map(model => make(
    "li", { className: model.ready ? "ready" : "", title: `${model.id} ${model.description}` },
    model.ready ? short(model.id) : `${short(model.id)}: ${model.reason}`,
  )));
  const kinds = ["image", "video", "chat"].filter(one => models.some(model => model.kinds.includes(one)));
  $("tabs").replaceChildren(...kinds.map(one => {
    const tab = make("button", { type: "button", role: "tab", textContent: one[0].toUpperCase() + one.slice(1) });
    tab.setAttribute("aria-selected", String(one === kind));
    tab.onclick = () => show(one);
    return tab;
  }));
  if (kind === null && kinds.length) show(kinds[0]);
  setTimeout(refresh, models.every(model => model.ready) && models.length ? 5000 : 1000);
}

function show(wanted) {
  if (running) return;
  kind = wanted;
  for (const tab of $("tabs").children) tab.setAttribute("aria-selected", String(tab.textContent.toLowerCase() === kind));
  const old = new Map([...$("fields").querySelectorAll("input")].map(input => [input.id, input.value]));
  $("fields").replaceChildren(...FIELDS[kind].filter(takes).map(name => {
    const value = old.get(name) ?? standard(name) ?? "";
    const input = make("input", { id: name, type: "number", value, min: 0, step: "any", placeholder: name === "seed" ? "random" : "default" });
    if (name === "width" || name === "height") input.step = served()[0].size_multiple;
    return make("label", {}, LABELS[name], input);
  }));
  const inputs = new Set(served().flatMap(model => kind === "chat" ? model.inputs : model.draws_from_image ? ["image"] : []));
  const speaks = served().some(model => model.outputs.includes("audio"));
  const shown = { negative_prompt: takes("negative_prompt") && kind !== "chat", upload: inputs.size > 0, speak: kind === "chat" && speaks };
  for (const [name, on] of Object.entries(shown)) document.querySelector(`[data-field="${name}"]`).hidden = !on;
  $("upload").accept = [inputs.has("image") && "image/*", inputs.has("audio") && "audio/*"].filter(Boolean).join(",");
  $("upload").value = "";
  $("upload-name").textContent = inputs.has("audio") ? "Picture or sound" : kind === "chat" ? "Picture" : "Picture to start from";
  $("prompt-name").textContent = kind === "chat" ? "Message" : "Prompt";
  $("go").textContent = kind === "chat" ? "Send" : "Generate";
  $("clear").hidden = kind !== "chat";
  clear();
}

function clear() {
  talks = new Map();
  $("results").replaceChildren();
  $("results").className = "empty";
  $("results").dataset.hint = HINTS[kind];
  fail(null);
}

function fail(error, of = "request") {
  $("error").textContent = error ? error.message : "";
  $("error").dataset.of = of;
}

const short = name => name.split("/").filter(Boolean).at(-1) ?? name;

function panel(name, role = "") {
  const bar = make("progress", { max: 1, value: 0 }), note = make("small"), stage = make("div", { className: "stage" });
  const title = make("div", { title: name }, make("b", { textContent: short(name) }), make("i", { textContent: role }));
  const figure = make("figure", {}, make("figcaption", {}, title, note), bar, stage);
  const begin = performance.now();
  $("results").className = "";
  $("results").append(figure);
  return {
    figure, stage, note, bar,
    step(step, steps) { bar.max = steps; bar.value = step; note.textContent = `step ${step} of ${steps}`; },
    done(node, text = "") {
      bar.hidden = true;
      note.textContent = [`${((performance.now() - begin) / 1000).toFixed(1)} s`, text].filter(Boolean).join(" · ");
      if (node) stage.replaceChildren(node);
    },
    fail(error) {
      const stopped = error.name === "AbortError";
      bar.hidden = true;
      note.textContent = stopped ? "stopped" : "failed";
      stage.append(make("p", { className: stopped ? "note" : "note bad", textContent: stopped ? "" : error.message }));
    },
  };
}

// What the form says

function given() {
  const body = {};
  for (const input of $("fields").querySelectorAll("input")) if (input.value !== "") body[input.id] = Number(input.value);
  body.seed ??= Math.floor(Math.random() * 2 ** 31);
  return body;
}

const only = (body, model) => Object.fromEntries(
  Object.entries(body).filter(([name]) => ALWAYS.has(name) || name === "prompt" || model.parameters.includes(name)));

function drawing(model) {
  const body = { ...given(), prompt: $("prompt").value };
  if ($("negative_prompt").value) body.negative_prompt = $("negative_prompt").value;
  return { ...only(body, model), model: model.id };
}

function form(body, name, file) {
  const data = new FormData();
  for (const [key, value] of Object.entries(body)) data.append(key, value);
  if (file) data.append(name, file);
  return data;
}

// Pictures and videos

async function drawImage(model, body, view, signal) {
  const file = $("upload").files[0];
  let answer;
  if (file) {
    view.bar.removeAttribute("value");
    const edited = await call("v1/images/edits", { method: "POST", body: form(body, "image", file), signal });
    answer = (await edited.json()).data[0];
  } else {
    for await (const event of events(await post("v1/images/generations", { ...body, stream: true }, signal))) {
      if (event.type === "image_generation.progress") view.step(event.step, event.steps);
      else answer = event;
    }
  }
  const picture = make("img", { alt: body.prompt, src: `data:image/png;base64,${answer.b64_json}` });
  await picture.decode();
  if (picture.naturalWidth < 256) picture.className = "small";
  view.done(picture, `seed ${answer.seed}`);
  return picture;
}

async function drawVideo(model, body, view, signal) {
  const file = $("upload").files[0];
  let job = await (await call("v1/videos", { method: "POST", body: form(body, "input_reference", file), signal })).json();
  const forget = () => call(`v1/videos/${job.id}`, { method: "DELETE" }).catch(() => {});
  signal.addEventListener("abort", forget);
  while (job.status === "queued" || job.status === "in_progress") {
    if (job.status === "queued") view.note.textContent = "queued";
    else view.step(job.progress, 100), view.note.textContent = `${job.progress} %`;
    await new Promise(next => setTimeout(next, 250));
    job = await (await call(`v1/videos/${job.id}`, { signal })).json();
  }
  if (job.status === "failed") throw new Error(job.error.message);
  const data = await (await call(`v1/videos/${job.id}/content`, { signal })).blob();
  signal.removeEventListener("abort", forget);
  forget();
  const video = make("video", { src: URL.createObjectURL(data), controls: true, loop: true, autoplay: true, muted: true });
  view.done(video, `seed ${job.seed}`);
}

function pixels(picture) {
  const canvas = make("canvas", { width: picture.naturalWidth, height: picture.naturalHeight });
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  return { canvas, context, data: context.getImageData(0, 0, canvas.width, canvas.height) };
}

function compare(first, second) {
  const ours = pixels(first), theirs = pixels(second);
  if (ours.data.data.length !== theirs.data.data.length) return;
  let squares = 0;
  const a = ours.data.data, b = theirs.data.data;
  for (let at = 0; at < a.length; at++) {
    if (at % 4 === 3) continue;
    const difference = Math.abs(a[at] - b[at]);
    squares += difference ** 2;
    a[at] = Math.min(255, 8 * difference);
  }
  ours.context.putImageData(ours.data, 0, 0);
  ours.canvas.className = first.className;
  const mean = squares / (a.length * 3 / 4);
  const view = panel("Difference", "8 times");
  view.done(ours.canvas);
  view.note.textContent = mean ? `PSNR ${(10 * Math.log10(255 ** 2 / mean)).toFixed(1)} dB` : "identical";
}

async function draw(signal) {
  const one = kind === "image" ? drawImage : drawVideo;
  const seed = given().seed;  // drawn once for all models
  $("results").replaceChildren();
  // The same seed, prompt and values for every model; they run at the same time.
  const made = await Promise.all(served().map(async model => {
    const view = panel(model.id, model.role);
    try {
      return await one(model, { ...drawing(model), seed }, view, signal);
    } catch (error) {
      view.fail(error);
    }
  }));
  if (kind === "image" && made.length === 2 && made[0] && made[1]) compare(made[1], made[0]);
}

// Conversations

const dataUrl = file => new Promise((done, failed) => {
  const reader = Object.assign(new FileReader(), { onload: () => done(reader.result), onerror: () => failed(reader.error) });
  reader.readAsDataURL(file);
});

async function message() {
  const content = [], shown = [], file = $("upload").files[0];
  if (file) {
    const url = await dataUrl(file), isImage = file.type.startsWith("image/");
    content.push(isImage ? { type: "image_url", image_url: { url } }
      : { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format: "wav" } });
    shown.push(() => isImage ? make("img", { src: url, alt: file.name }) : make("audio", { src: url, controls: true }));
  }
  content.push({ type: "text", text: $("prompt").value });
  shown.push(() => document.createTextNode($("prompt").value));
  return { content, nodes: () => shown.map(one => one()) };
}

async function talk(signal) {
  const said = await message(), values = given(), speak = $("speak").checked;
  const turns = served().map(model => {
    let one = talks.get(model.id);
    if (!one) {
      const view = panel(model.id, model.role);
      view.bar.hidden = true;
      view.stage.replaceWith(view.stage = make("div", { className: "talk" }));
      talks.set(model.id, one = { model, view, messages: [] });
    }
    one.messages.push({ role: "user", content: said.content });
    one.view.stage.append(make("div", { className: "turn user" }, ...said.nodes()));
    return one;
  });
  $("prompt").value = "";
  $("upload").value = "";
  await Promise.all(turns.map(one => answer(one, values, speak && one.model.outputs.includes("audio"), signal)));
}

async function answer({ model, view, messages }, values, speak, signal) {
  const text = document.createTextNode("");
  const turn = make("div", { className: "turn busy" }, text);
  view.stage.append(turn);
  const begin = performance.now();
  const body = {
    model: model.id, messages, ...only(values, model), stream: true, stream_options: { include_usage: true },
    ...(speak && { modalities: ["text", "audio"], audio: { format: "pcm16" } }),
  };
  try {
    let first = null, sound = "";
    for await (const event of events(await post("v1/chat/completions", body, signal))) {
      const delta = event.choices[0]?.delta ?? {};
      if (delta.content) { first ??= performance.now(); text.data += delta.content; }
      if (delta.audio) sound += delta.audio.data;
      if (event.usage) {
        const seconds = (performance.now() - begin) / 1000;
        view.note.textContent = `${event.usage.completion_tokens} tokens · ${(event.usage.completion_tokens / seconds).toFixed(1)}/s`
          + (first ? ` · first after ${(first - begin).toFixed(0)} ms` : "") + ` · seed ${values.seed}`;
      }
      view.stage.scrollTop = view.stage.scrollHeight;
    }
    if (sound) turn.prepend(make("audio", { controls: true, src: URL.createObjectURL(wav(sound)) }));
    messages.push({ role: "assistant", content: text.data });
  } catch (error) {
    messages.pop();  // what got no answer is not part of the conversation
    view.note.textContent = error.name === "AbortError" ? "stopped" : "failed";
    if (error.name !== "AbortError") turn.append(make("span", { className: "note bad", textContent: error.message }));
  } finally {
    turn.classList.remove("busy");
  }
}

function wav(base64) {
  const samples = Uint8Array.from(atob(base64), letter => letter.charCodeAt(0));
  const head = new DataView(new ArrayBuffer(44)), rate = 24000;
  const put = (at, word) => [...word].forEach((letter, index) => head.setUint8(at + index, letter.charCodeAt(0)));
  put(0, "RIFF"); head.setUint32(4, 36 + samples.length, true); put(8, "WAVEfmt "); head.setUint32(16, 16, true);
  head.setUint16(20, 1, true); head.setUint16(22, 1, true); head.setUint32(24, rate, true);
  head.setUint32(28, 2 * rate, true); head.setUint16(32, 2, true); head.setUint16(34, 16, true);
  put(36, "data"); head.setUint32(40, samples.length, true);
  return new Blob([head, samples], { type: "audio/wav" });
}

// What the buttons do

$("form").onsubmit = async event => {
  event.preventDefault();
  if (running || !served().length) return;
  running = new AbortController();
  $("go").disabled = !($("stop").disabled = false);
  fail(null);
  try {
    await (kind === "chat" ? talk : draw)(running.signal);
  } catch (error) {
    fail(error);
  } finally {
    running = null;
    $("go").disabled = !($("stop").disabled = true);
  }
};
$("stop").onclick = () => running?.abort();
$("clear").onclick = () => running || clear();
$("prompt").onkeydown = event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (kind === "chat" && !event.shiftKey))) {
    event.preventDefault();
    $("form").requestSubmit();
  }
};
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").onchange = () => { sessionStorage.setItem("key", $("key").value); refresh(); };
refresh();
