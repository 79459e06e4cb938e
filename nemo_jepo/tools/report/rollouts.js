// Choose run, step and sample; the sample's tokens, shaded by how unlikely they were, each with its numbers.

const PARTS = { prompt: "prompt", chain: "chain of thought", marker: "marker", answer: "reference answer" };
const DARKEST = 6; // nats at which the shade is full
const SHADES = {
  policy: ["log-prob by the trainer", (token) => token.policy],
  generation: ["log-prob by the sampler", (token) => token.generation],
  difference: ["trainer less sampler", (token) => token.difference],
};
const HIDDEN = /[\p{Cc}\p{Cf}\p{Co}\p{Zl}\p{Zp}]/gu; // control, format (such as right-to-left), private use

/** The text with what could not be seen, or could turn its surroundings around, spelled out. */
function visible(text) {
  const spelled = text.replace(HIDDEN, (character) => {
    if (character === "\n" || character === "\t") return character;
    return `<U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`;
  });
  return spelled === "" ? "\u25ab" : spelled.replaceAll("\n", "\u21b5\n");
}

/** What a part of a sample is called. */
function nameOf(part, sample) {
  return part === "answer" && sample.own_answer ? "own answer" : PARTS[part];
}

/** Every token of a sample: text, id, part and log-probs (null where it has none). */
function tokensOf(sample) {
  const start = sample.prompt_length;
  const end = start + sample.chain_length;
  const [first, last] = sample.marker ?? [Infinity, Infinity];
  return sample.tokens.map((text, index) => {
    const policy = index < start ? null : sample.policy_logprobs[index - start];
    const generation = index < start ? null : (sample.generation_logprobs[index - start] ?? null);
    const difference = policy === null || generation === null ? null : policy - generation;
    let part = index < start ? "prompt" : index < end ? "chain" : "answer";
    if (index >= first && index < last) part = "marker";
    return { text, id: sample.token_ids[index], index, part, policy, generation, difference };
  });
}

class Browser {
  constructor(place) {
    this.runs = DATA.runs.filter((run) => run.rollouts.length);
    const names = this.runs.map((run, index) => [index, run.name]);
    const shades = Object.entries(SHADES).map(([name, [label]]) => [name, label]);
    const [runLabel, runSelect] = chooser("Run", names, () => this.chooseRun());
    const [stepLabel, stepSelect] = chooser("Step", [], () => this.chooseStep());
    const [shadeLabel, shadeSelect] = chooser("Shade", shades, () => this.shade());
    [runSelect.id, stepSelect.id, shadeSelect.id] = ["run", "step", "shade"];
    Object.assign(this, { runSelect, stepSelect, shadeSelect });
    const before = element("button", { type: "button", "aria-label": "Earlier step" }, "\u2190");
    const after = element("button", { type: "button", "aria-label": "Later step" }, "\u2192");
    before.addEventListener("click", () => this.moveStep(-1));
    after.addEventListener("click", () => this.moveStep(1));
    this.list = element("tbody");
    this.detail = element("article", { id: "sample" });
    this.card = element("div", { id: "card", role: "tooltip", hidden: true });
    const steps = element("div", { class: "steps" }, before, stepLabel, after);
    place.append(element("div", { class: "controls" }, runLabel, steps, shadeLabel), this.table(), this.detail, this.card);
    this.chooseRun();
  }

  table() {
    const columns = ["prompt", "sample", "status", "answer log-prob", "advantage", "answer weight", "chain tokens"];
    const head = element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)));
    const table = element("table", { id: "samples" }, element("thead", {}, head), this.list);
    const region = { class: "scroll", tabindex: 0, role: "region", "aria-label": "Samples of this step" };
    return element("div", region, table);
  }

  // Choosing.

  chooseRun() {
    this.steps = this.runs[Number(this.runSelect.value)].rollouts;
    setOptions(this.stepSelect, this.steps.map(({ phase, step }, index) => [index, `${phase} ${step}`]));
    this.stepSelect.value = this.steps.findLastIndex(({ phase }) => phase === this.steps[0].phase);
    this.chooseStep();
  }

  moveStep(by) {
    const index = Number(this.stepSelect.value) + by;
    if (index < 0 || index >= this.steps.length) return;
    this.stepSelect.value = index;
    this.chooseStep();
  }

  chooseStep() {
    this.samples = this.steps[Number(this.stepSelect.value)].samples;
    this.list.replaceChildren(...this.samples.map((sample, index) => this.row(sample, index)));
    this.chooseSample(0);
  }

  row(sample, index) {
    const name = visible(sample.prompt).replace(/\s+/g, " ");
    const short = name.length > 60 ? `${name.slice(0, 60)}\u2026` : name;
    const button = element("button", { type: "button", "aria-label": `Sample ${sample.sample} of prompt ${name}` }, short);
    const values = [sample.answer_logprob, sample.advantage, sample.answer_weight];
    const row = element("tr", {}, element("th", { scope: "row" }, button), element("td", {}, String(sample.sample)));
    row.append(element("td", { class: sample.valid ? "good" : "bad" }, sample.status));
    row.append(...values.map((value) => element("td", { class: "number" }, number(value))));
    row.append(element("td", { class: "number" }, String(sample.chain_length)));
    row.addEventListener("click", () => this.chooseSample(index));
    return row;
  }

  chooseSample(index) {
    [...this.list.rows].forEach((row, other) => {
      row.classList.toggle("chosen", other === index);
      row.querySelector("button").setAttribute("aria-pressed", other === index);
    });
    this.card.hidden = true;
    this.sample = this.samples[index];
    if (!this.sample) this.detail.replaceChildren(element("p", { class: "note" }, "No rollout was written."));
    else this.showSample();
  }

  // Showing.

  showSample() {
    const { sample } = this;
    const fact = (name, value) => element("div", {}, element("dt", {}, name), element("dd", {}, value));
    const facts = element("dl", { class: "facts" }, fact("status", sample.status));
    facts.append(fact("reference answer", visible(sample.reference_answer)));
    facts.append(fact("answer log-prob, nats", number(sample.answer_logprob)));
    if (sample.chain_gain !== null) facts.append(fact("chain gain, nats", number(sample.chain_gain)));
    facts.append(fact("advantage", number(sample.advantage)), fact("weight of a chain token", number(sample.policy_weight)));
    facts.append(fact("weight of an answer token", number(sample.answer_weight)));
    this.tokens = tokensOf(sample);
    this.spans = this.tokens.map((token) => this.span(token));
    const tokens = element("div", { id: "tokens", role: "group", "aria-label": "Tokens; arrow keys move" }, ...this.spans);
    tokens.addEventListener("keydown", (event) => this.press(event));
    tokens.addEventListener("pointerleave", () => this.hideCard());
    const own = sample.text === null ? null : this.ownText(sample.text);
    this.detail.replaceChildren(...[facts, this.legend(), tokens, own].filter(Boolean));
    this.spans[0]?.setAttribute("tabindex", 0);
    this.shade();
  }

  ownText(text) {
    const title = element("summary", {}, "As the model wrote it, with its own answer");
    return element("details", { class: "own" }, title, element("p", {}, visible(text)));
  }

  legend() {
    const used = Object.keys(PARTS).filter((part) => this.tokens.some((token) => token.part === part));
    const parts = used.map((part) => element("span", { class: `token ${part}` }, nameOf(part, this.sample)));
    const scale = [0, 1, 2, 4, DARKEST].map((nats) => {
      const box = element("span", { class: "token" }, nats === DARKEST ? `${nats}+` : String(nats));
      box.style.setProperty("--shade", nats / DARKEST);
      return box;
    });
    const shades = element("span", { class: "scale" }, "nats of surprise ", ...scale);
    return element("div", { class: "legend" }, element("span", {}, ...parts), shades);
  }

  span(token) {
    const span = element("span", { class: `token ${token.part}`, tabindex: -1 }, visible(token.text));
    span.addEventListener("pointerenter", () => this.showCard(token.index));
    span.addEventListener("focus", () => this.showCard(token.index));
    span.addEventListener("blur", () => this.hideCard());
    return span;
  }

  /** Shade every token by the chosen number: 0 is none, DARKEST nats and more are full. */
  shade() {
    const read = SHADES[this.shadeSelect.value][1];
    this.tokens?.forEach((token, index) => {
      const value = read(token);
      const shade = value === null ? 0 : Math.min(Math.abs(value) / DARKEST, 1);
      this.spans[index].style.setProperty("--shade", shade.toFixed(3));
    });
  }

  press(event) {
    if (event.key === "Escape") return this.hideCard();
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const now = this.spans.indexOf(event.target);
    const next = this.spans[Math.min(Math.max(now + moves[event.key], 0), this.spans.length - 1)];
    event.target.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  }

  // The card.

  /** A token's numbers: what it is, how likely it was, and what the update multiplies its gradient by. */
  numbers(token) {
    const { sample } = this;
    const rows = [["part", nameOf(token.part, sample)], ["token", `${token.index}, id ${token.id}`]];
    if (token.part === "prompt") return rows;
    const likelihood = token.policy === null ? "" : ` (p ${number(Math.exp(token.policy), 3)})`;
    rows.push(["trainer's log-prob", number(token.policy) + likelihood]);
    rows.push(["sampler's log-prob", token.generation === null ? "not sampled" : number(token.generation)]);
    if (token.difference !== null) rows.push(["trainer less sampler", number(token.difference, 2)]);
    const sampled = token.part !== "answer" || sample.own_answer;
    rows.push(["advantage", number(sample.advantage)]);
    rows.push(["weight", number(sampled ? sample.policy_weight : sample.answer_weight)]);
    rows.push(["sample", sample.status]);
    return rows;
  }

  showCard(index) {
    const [token, span] = [this.tokens[index], this.spans[index]];
    const rows = this.numbers(token).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
    this.card.replaceChildren(element("code", {}, visible(token.text)), element("dl", {}, ...rows));
    this.card.hidden = false;
    this.spans.forEach((other) => other.removeAttribute("aria-describedby"));
    span.setAttribute("aria-describedby", "card");
    const box = span.getClientRects()[0];
    const [width, height] = [this.card.offsetWidth, this.card.offsetHeight];
    const left = Math.min(Math.max(box.left, 8), document.documentElement.clientWidth - width - 8);
    const below = box.bottom + 6 + height < window.innerHeight || box.top < height + 6;
    this.card.style.left = `${left + window.scrollX}px`;
    this.card.style.top = `${(below ? box.bottom + 6 : box.top - height - 6) + window.scrollY}px`;
  }

  hideCard() {
    this.card.hidden = true;
  }
}

const browserPlace = document.getElementById("browser");
if (browserPlace) new Browser(browserPlace);
