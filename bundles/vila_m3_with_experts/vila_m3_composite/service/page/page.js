// The chat page: everything goes through the API; nothing is kept when the page is closed.

const $ = (id) => document.getElementById(id);

const WINDOWS = {
  CT: { "as the model sees it": null, "soft tissue": [50, 400], lung: [-600, 1500], bone: [400, 1800], liver: [60, 160], brain: [40, 80] },
  MRI: { "as the model sees it": null, "full range": "range", "brighter": "bright" },
};
const EXAMPLES = {
  CT: ["Are there any liver masses?", "Which organs are visible?", "Segment the liver"],
  MRI: ["Is there a brain tumor?", "Segment any tumors in the image"],
  CXR: ["Is there a pleural effusion?", "What are the findings?"],
};
// Letters at the left and upper edge of a slice: sagittal, coronal, axial.
const MARKS = [["A", "S"], ["R", "S"], ["R", "A"]];
const COLUMNS = [
  ["name", "structure"], ["volume_ml", "mL"], ["component_count", "parts"], ["longest_diameter_mm", "longest mm"],
  ["perpendicular_diameter_mm", "perp. mm"], ["mean_hu", "mean HU"], ["side", "side"], ["largest_slice", "largest in"],
  ["probability", "probability"], ["threshold", "threshold"],
];
// Digits that are shown behind the point; the results to download have all.
const DIGITS = {
  volume_ml: 2, longest_diameter_mm: 1, perpendicular_diameter_mm: 1, mean_hu: 0, probability: 2, threshold: 2,
};

const state = { study: null, axis: 2, index: 0, overlay: null, messages: [], asked: null, notes: new Set(), conversation: null, abort: null, model: "" };
const pictures = new Map(); // address -> promise of an object URL
const MAX_PICTURES = 160;

function headers(more = {}) {
  const key = $("key").value.trim();
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers) });
  if (response.status === 401) $("key-field").hidden = false;
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try { message = (await response.json()).error.message; } catch { /* no JSON: the status must do */ }
  throw new Error(message);
}

function picture(path) {
  if (!pictures.has(path)) {
    const loading = call(path).then((response) => response.blob()).then((blob) => URL.createObjectURL(blob));
    loading.catch(() => pictures.delete(path));
    pictures.set(path, loading);
    if (pictures.size > MAX_PICTURES) {
      const [oldest, url] = pictures.entries().next().value;
      pictures.delete(oldest);
      url.then((address) => URL.revokeObjectURL(address), () => {});
    }
  }
  return pictures.get(path);
}

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Notes are written for the command line and the page alike; here the options are controls.
function forPage(note) {
  return note.replace("(--modality overrules)", "(choose the modality above to overrule)");
}

function say(text, className) {
  $("hint").hidden = true;
  const made = element("div", text, `message ${className}`);
  $("messages").append(made);
  scrollDown();
  return made;
}

function scrollDown() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function fill(select, names) {
  select.replaceChildren(...names.map((name, place) => {
    const option = element("option", String(name));
    option.value = String(place);
    return option;
  }));
}

// ---- images

async function openFiles(files) {
  if (!files.length) return;
  $("study").textContent = "uploading…";
  try {
    const ids = [];
    for (const file of files) {
      const form = new FormData();
      form.append("purpose", "user_data");
      form.append("file", file);
      ids.push((await (await call("/v1/files", { method: "POST", body: form })).json()).id);
      $("study").textContent = `uploaded ${ids.length} of ${files.length}`;
    }
    await openStudy(ids);
  } catch (error) {
    $("study").textContent = "could not be opened";
    say(error.message, "error");
  }
  $("files").value = "";
}

async function openStudy(ids) {
  state.abort?.abort();
  const body = JSON.stringify({ files: ids, modality: $("modality").value || null });
  const response = await call("/v1/studies", { method: "POST", body, headers: { "Content-Type": "application/json" } });
  const study = await response.json();
  state.study = null;
  startConversation();
  state.study = study;
  const size = study.is_planar ? `${study.shape[0]} × ${study.shape[1]} pixels` : `${study.shape.join(" × ")} voxels`;
  $("study").textContent = `${study.modality} (known from: ${study.source}), ${size}`;
  for (const note of study.notes) say(forPage(note), "note");
  $("empty").hidden = true;
  $("controls").hidden = study.is_planar;
  fill($("window"), Object.keys(WINDOWS[study.modality] ?? WINDOWS.MRI));
  fill($("sequence"), study.sequences.map((name) => name.toUpperCase()));
  $("sequence-field").hidden = !study.sequences.length;
  $("plane").value = "2";
  setAxis(2);
  const examples = (EXAMPLES[study.modality] ?? []).map((text) => {
    const button = element("button", text);
    button.type = "button";
    button.onclick = () => { $("question").value = text; $("question").focus(); };
    return button;
  });
  $("examples").replaceChildren(...examples);
}

function setAxis(axis) {
  const { study } = state;
  state.axis = axis;
  const count = study.is_planar ? 1 : study.shape[axis];
  $("index").max = String(count - 1);
  setIndex(Math.floor(count / 2));
}

function setIndex(index) {
  state.index = Math.max(0, Math.min(Number($("index").max), index));
  $("index").value = String(state.index);
  draw();
}

function windowQuery() {
  const names = WINDOWS[state.study.modality] ?? WINDOWS.MRI;
  let chosen = Object.values(names)[Number($("window").value) || 0];
  const [low, high] = state.study.range;
  if (chosen === "range") chosen = [(low + high) / 2, Math.max(high - low, 1e-3)];
  if (chosen === "bright") chosen = [low + (high - low) * 0.3, Math.max((high - low) * 0.6, 1e-3)];
  const query = new URLSearchParams(chosen ? { centre: chosen[0], width: chosen[1] } : {});
  if (state.study.sequences.length) query.set("sequence", $("sequence").value || "0");
  return query.toString();
}

async function draw() {
  const { study, axis, index, overlay } = state;
  if (!study) return;
  const place = study.is_planar ? "2/0" : `${axis}/${index}`;
  const hasLabels = overlay !== null && $("show-labels").checked && !study.is_planar;
  const wanted = [picture(`/v1/studies/${study.id}/slices/${place}?${windowQuery()}`)];
  if (hasLabels) wanted.push(picture(`/v1/files/${overlay.label_map}/labels/${place}`));
  let urls;
  try { urls = await Promise.all(wanted); } catch (error) { say(error.message, "error"); return; }
  if (state.study !== study || state.axis !== axis || state.index !== index) return;
  await show($("slice"), urls[0]);
  if (urls[1]) await show($("labels"), urls[1]);
  $("labels").hidden = !hasLabels;
  $("labels").style.opacity = String(Number($("opacity").value) / 100);
  for (const [id, text] of [["left-mark", MARKS[axis][0]], ["top-mark", MARKS[axis][1]]]) {
    $(id).hidden = study.is_planar;
    $(id).textContent = text;
  }
  $("place").hidden = study.is_planar;
  $("place").textContent = `${["sagittal", "coronal", "axial"][axis]} ${index} of ${study.shape[axis] - 1}`;
  fit();
}

async function show(image, url) {
  image.src = url;
  image.hidden = false;
  await image.decode().catch(() => {});
}

// Slices keep the patient's proportions, whatever their pixels measure.
function fit() {
  const { study, axis } = state;
  if (!study || $("slice").hidden) return;
  const across = axis === 0 ? 1 : 0;
  const up = study.is_planar || axis === 2 ? 1 : 2;
  const width = study.shape[across] * study.spacing[across];
  const height = study.shape[up] * study.spacing[up];
  const scale = Math.min($("stage").clientWidth / width, $("stage").clientHeight / height);
  for (const image of [$("slice"), $("labels")]) {
    image.style.width = `${width * scale}px`;
    image.style.height = `${height * scale}px`;
  }
}

function clearOverlay() {
  state.overlay = null;
  $("overlay").hidden = true;
  $("labels").hidden = true;
}

function setOverlay(expert) {
  state.overlay = expert;
  $("overlay").hidden = false;
  $("legend").replaceChildren(...expert.labels.map((label) => {
    const row = expert.measurements.find((measured) => measured.label === label.label);
    const button = element("button");
    const swatch = element("span", "", "swatch");
    swatch.style.background = label.rgb;
    button.append(swatch, label.name);
    button.type = "button";
    button.title = "show the slice where it is largest";
    button.onclick = () => goTo(row);
    const item = element("li");
    item.append(button);
    return item;
  }));
  draw();
}

function goTo(row) {
  if (!row || row.largest_slice === undefined) return;
  const axis = Math.max(0, ["sagittal", "coronal", "axial"].indexOf(row.slice_axis));
  if (axis !== state.axis) { $("plane").value = String(axis); setAxis(axis); }
  setIndex(row.largest_slice);
}

// ---- conversation

function startConversation() {
  state.abort?.abort();
  state.messages = [];
  state.asked = null;
  state.notes = new Set();
  state.conversation = null;
  $("messages").replaceChildren($("hint"));
  $("hint").hidden = false;
  $("download").disabled = true;
  $("about").textContent = "";
  clearOverlay();
  draw();
}

function firstContent(text) {
  const files = state.study ? state.study.files.map((id) => ({ type: "file", file: { file_id: id } })) : [];
  return [{ type: "text", text }, ...files];
}

async function ask(text) {
  const { study } = state;
  if (!state.asked) {
    state.asked = { axis: state.axis };
    if (study && !study.is_planar) state.asked.slice_index = state.index;
    if (study && $("modality").value) state.asked.modality = $("modality").value;
    if (study && !study.is_planar) {
      $("about").textContent = `about ${["sagittal", "coronal", "axial"][state.axis]} slice ${state.index}`;
    }
  }
  say(text, "user");
  const content = state.messages.length ? text : firstContent(text);
  const messages = [...state.messages, { role: "user", content }];
  const turn = new Turn();
  setBusy(true);
  state.abort = new AbortController();
  try {
    const body = JSON.stringify({ model: state.model, messages, stream: true, study: state.asked });
    const options = { method: "POST", body, headers: { "Content-Type": "application/json" }, signal: state.abort.signal };
    for await (const chunk of chunks(await call("/v1/chat/completions", options))) {
      if (chunk.error) throw new Error(chunk.error.message);
      turn.take(chunk);
    }
    state.messages = [...messages, { role: "assistant", content: turn.content }];
  } catch (error) {
    turn.end();
    say(error.name === "AbortError" ? "stopped" : error.message, error.name === "AbortError" ? "note" : "error");
    if (!state.messages.length) state.asked = null;
  }
  state.abort = null;
  setBusy(false);
}

function setBusy(isBusy) {
  $("ask").disabled = isBusy;
  $("stop").hidden = !isBusy;
  document.body.dataset.busy = String(isBusy);
}

async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// What one question shows: turns of the assistant, cards of experts, notes.
class Turn {
  constructor() {
    this.content = "";
    this.bubbles = new Map();
    this.card = null;
    this.waiting = [];
  }

  take(chunk) {
    this.content += chunk.choices[0]?.delta.content ?? "";
    const event = chunk.vila_m3;
    if (event) this[`on_${event.type}`]?.(event);
  }

  on_piece(event) {
    if (!this.bubbles.has(event.turn)) this.bubbles.set(event.turn, say("", "assistant"));
    this.bubbles.get(event.turn).textContent += event.text;
    scrollDown();
  }

  on_assistant(event) {
    const bubble = this.bubbles.get(event.turn) ?? say("", "assistant");
    bubble.textContent = event.text || "(no text)";
    if (event.triggers.length) bubble.classList.add("trigger");
    this.waiting = [...event.triggers];
    if (this.waiting.length) this.begin();
  }

  begin() {
    this.card = element("div", "", "expert");
    this.card.append(element("h2", `Expert ${this.waiting[0].slice(1, -1)}`));
    this.progress = element("progress");
    this.state = element("span", "starting", "quiet");
    this.card.append(this.progress, this.state);
    $("messages").append(this.card);
    scrollDown();
  }

  on_expert_waiting(event) {
    if (this.state) this.state.textContent = `waiting for other requests, ${event.seconds.toFixed(0)} s`;
  }

  on_expert_running(event) {
    if (!this.state) return;
    if (event.usual_seconds) {
      this.progress.max = 1;
      this.progress.value = 1 - Math.exp(-1.5 * event.seconds / event.usual_seconds);
    }
    const usual = event.usual_seconds ? ` (usually ${event.usual_seconds.toFixed(0)} s)` : "";
    this.state.textContent = `running, ${event.seconds.toFixed(0)} s${usual}`;
  }

  on_expert(event) {
    if (!this.card) this.begin();
    this.progress.remove();
    this.state.textContent = event.is_error ? "not run" : event.is_reused ? "earlier result" : `${event.seconds.toFixed(1)} s`;
    describeExpert(this.card, event);
    this.card = null;
    this.waiting.shift();
    if (event.label_map && event.labels.length) setOverlay(event);
    if (this.waiting.length) this.begin();
    scrollDown();
  }

  on_study(event) {
    for (const note of event.notes) {
      if (state.notes.has(note) || state.study?.notes.includes(note)) continue;
      state.notes.add(note);
      if (this.content) say(forPage(note), "note");
      else this.early = [...(this.early ?? []), note];
    }
  }

  on_finished(event) {
    for (const note of this.early ?? []) say(forPage(note), "note");
    state.conversation = event.conversation;
    $("download").disabled = false;
  }

  end() {
    this.progress?.remove();
    if (this.card) this.state.textContent = "not finished";
  }
}

function describeExpert(card, event) {
  const told = element("details");
  told.append(element("summary", "what it told the model"), element("div", event.text, "message"));
  if (event.overlay && !event.label_map) {
    const image = element("img");
    image.alt = "scores";
    picture(`/v1/files/${event.overlay}/content`).then((url) => { image.src = url; }, () => image.remove());
    image.onload = scrollDown;
    card.append(image);
  }
  if (event.measurements.length) card.append(table(event.measurements));
  else if (Object.keys(event.scores).length) card.append(scores(event.scores));
  card.append(told);
}

function table(rows) {
  const columns = COLUMNS.filter(([key]) => rows.some((row) => row[key] !== undefined));
  const made = element("table");
  const head = element("tr");
  const isFindings = rows.some((row) => row.threshold !== undefined);
  const isNumber = (value) => typeof value === "number";
  head.append(...columns.map(([key, title]) => {
    const kind = rows.some((row) => isNumber(row[key])) ? "number" : "";
    return element("th", key === "name" && isFindings ? "finding" : title, kind);
  }));
  made.append(head);
  for (const row of rows) {
    const line = element("tr", "", row.probability > row.threshold ? "present" : "");
    for (const [key] of columns) {
      const value = row[key];
      const cell = element("td", "", isNumber(value) ? "number" : "");
      if (key === "largest_slice" && value !== undefined) {
        const button = element("button", String(value));
        button.type = "button";
        button.onclick = () => goTo(row);
        cell.append(button);
      } else if (value !== undefined && value !== null) {
        cell.textContent = key in DIGITS ? value.toFixed(DIGITS[key]) : String(value);
      }
      line.append(cell);
    }
    made.append(line);
  }
  const scroll = element("div", "", "scroll");
  scroll.append(made);
  return scroll;
}

function scores(found) {
  const rows = Object.entries(found).sort((one, other) => other[1] - one[1]);
  return table(rows.map(([name, score]) => ({ name: name.toLowerCase().replaceAll("_", " "), probability: score, threshold: 0.5 })));
}

async function download() {
  try {
    const response = await call(`/v1/conversations/${state.conversation}/results`);
    const link = element("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = "vila_m3_results.zip";
    link.click();
  } catch (error) {
    say(error.message, "error");
  }
}

// ---- controls

$("files").onchange = (event) => openFiles([...event.target.files]);
$("modality").onchange = async () => {
  if (!state.study) return;
  try { await openStudy(state.study.files); } catch (error) { say(error.message, "error"); }
};
$("index").oninput = () => setIndex(Number($("index").value));
$("plane").onchange = () => setAxis(Number($("plane").value));
$("window").onchange = draw;
$("sequence").onchange = draw;
$("show-labels").onchange = draw;
$("opacity").oninput = () => { $("labels").style.opacity = String(Number($("opacity").value) / 100); };
$("stage").addEventListener("wheel", (event) => {
  if (!state.study || state.study.is_planar) return;
  event.preventDefault();
  setIndex(state.index + Math.sign(event.deltaY));
}, { passive: false });
$("stage").onkeydown = (event) => {
  const step = { ArrowUp: 1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
  if (step && state.study && !state.study.is_planar) { event.preventDefault(); setIndex(state.index + step); }
};
$("stage").ondragover = (event) => { event.preventDefault(); $("stage").classList.add("dragged"); };
$("stage").ondragleave = () => $("stage").classList.remove("dragged");
$("stage").ondrop = (event) => {
  event.preventDefault();
  $("stage").classList.remove("dragged");
  openFiles([...event.dataTransfer.files]);
};
$("form").onsubmit = (event) => {
  event.preventDefault();
  const text = $("question").value.trim();
  if (!text || $("ask").disabled) return;
  $("question").value = "";
  ask(text);
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("form").requestSubmit(); }
};
$("stop").onclick = () => state.abort?.abort();
$("fresh").onclick = startConversation;
$("download").onclick = download;
$("key").onchange = loadModel;
new ResizeObserver(fit).observe($("stage"));

async function loadModel() {
  try {
    const { data } = await (await call("/v1/models")).json();
    state.model = data[0].id;
    $("model").textContent = `${data[0].id}, experts: ${data[0].experts.map((expert) => expert.name).join(", ")}`;
  } catch (error) {
    $("model").textContent = error.message;
  }
}

loadModel();
