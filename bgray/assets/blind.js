// Blind tests in a dialog: ABX and ranking. The server draws, keeps and judges; this page is told
// no more than what can be heard.
(function () {
  "use strict";
  const bgray = (window.bgrayListening = window.bgrayListening || {});
  const TRIALS = 16;
  const FEWEST = 5;

  class Test {
    constructor(kind, { api, sweep, data }) {
      Object.assign(this, { kind, api, sweep, data, question: null, names: [], played: new Set() });
      this.player = new bgray.Player(() => this.update());
      this.body = bgray.element("div", { class: "bl-test" });
      const title = kind === "abx" ? "ABX: can you tell them apart?" : "Blind ranking";
      this.dialog = bgray.element("dialog", { class: "bl-dialog", "aria-label": title }, [
        bgray.element("h2", { text: title }),
        this.body,
      ]);
      this.dialog.addEventListener("cancel", (event) => {
        event.preventDefault();
        this.leave();
      });
      // Esc may close a dialog whatever `cancel` says: browsers heed that only now and then.
      this.escape = (event) => {
        if (event.key !== "Escape") return;
        event.preventDefault();
        this.leave();
      };
      document.addEventListener("keydown", this.escape, true);
      this.dialog.addEventListener("close", () => {
        if (this.ended) return;
        if (!this.question) return this.end();
        this.dialog.showModal();
        this.leave();
      });
      this.dialog.addEventListener("keydown", (event) => this.key(event));
      document.body.append(this.dialog);
      this.setup();
      this.dialog.showModal();
    }
    end() {
      if (this.ended) return;
      this.ended = true;
      document.removeEventListener("keydown", this.escape, true);
      this.player.close();
      this.dialog.close();
      this.dialog.remove();
    }
    // Esc and Close: at once before the first question and after the last one, else after asking.
    leave() {
      if (!this.question) return this.end();
      this.player.halt();
      const { element } = bgray;
      if (this.body.querySelector(".bl-leave")) return undefined;
      const asking = element("div", { class: "bl-leave", role: "alertdialog", "aria-label": "Break off?" }, [
        element("p", { text: this.kind === "abx"
          ? "Break off? What you have answered is kept in the file, but only a test that went to its end counts."
          : "Break off? The clips that you have ranked are kept, and count." }),
        this.button("Break off", () => this.end()),
        this.button("Go on", () => asking.remove()),
      ]);
      this.body.append(asking);
      asking.querySelector("button:last-child").focus();
      return undefined;
    }
    button(text, onclick, has = {}) {
      return bgray.element("button", { type: "button", text, onclick, ...has });
    }
    // again: what a button beside it does
    say(text, again = null) {
      let line = this.body.querySelector(".bl-error");
      if (!line) this.body.append((line = bgray.element("p", { class: "bl-error", role: "alert" })));
      line.replaceChildren(text, ...(again ? [" ", this.button("Try again", again)] : []));
    }

    // --- before

    setup() {
      const { element } = bgray;
      const { data } = this;
      const clip = (n) => String(n).padStart(3, "0");
      const who = element("input", { type: "text", maxlength: 80, autocomplete: "name", placeholder: "optional" });
      const field = (text, control) => element("label", { class: "bl-field" }, [element("span", { text }), control]);
      const close = this.button("Close", () => this.leave());
      const lanes = data.lanes.filter(({ error, silent }) => !error && !silent);
      const runs = lanes.filter(({ kind }) => kind === "lane");
      const about = { sweep: this.sweep, kind: this.kind, source: data.source, step: data.step };
      if (this.kind === "abx" ? lanes.length < 2 || !runs.length : runs.length < 2) {
        this.body.replaceChildren(element("p", { text: "For this, choose at least two variants that can be heard." }), close);
        return;
      }
      if (this.kind === "abx") {
        const pick = (chosen) => element("select", {}, lanes.map((lane) =>
          element("option", { value: lane.run, text: lane.label, selected: lane === chosen })));
        const a = pick(runs[0]);
        const b = pick(runs[1] || lanes.find((lane) => lane !== runs[0]));
        const trials = element("input", { type: "number", min: FEWEST, max: 100, value: TRIALS });
        this.body.replaceChildren(
          element("p", { text: `Clip ${clip(data.item)} at step ${data.step}. In each trial X is A or B, drawn by the server. Listen as long as you like, then say which. How you did is told at the end only, and the number of trials is fixed now: who stops when it goes well has proved nothing.` }),
          element("div", { class: "bl-row" }, [field("A", a), field("B", b), field("Trials", trials), field("Your name", who)]),
          element("div", { class: "bl-row" }, [
            this.button("Begin", () => {
              if (a.value === b.value) return this.say("A and B are the same lane.");
              return this.begin({ ...about, lanes: [a.value, b.value], item: data.item, trials: Number(trials.value), who: who.value || null });
            }, { class: "bl-go" }),
            close,
          ])
        );
      } else {
        const boxes = data.items.map((item) => element("input", { type: "checkbox", value: item, checked: true }));
        const most = runs.slice(0, 9);
        this.body.replaceChildren(
          element("p", { text: `${most.length} variants at step ${data.step}, in another order for every clip and without names. 1 is the best place; several may share one.${runs.length > 9 ? " Only the first nine take part." : ""}` }),
          element("fieldset", { class: "bl-row" }, [
            element("legend", { text: "Clips" }),
            ...boxes.map((box) => element("label", {}, [box, ` ${clip(box.value)}`])),
          ]),
          element("div", { class: "bl-row" }, [field("Your name", who)]),
          element("div", { class: "bl-row" }, [
            this.button("Begin", () => {
              const items = boxes.filter((box) => box.checked).map((box) => Number(box.value));
              if (!items.length) return this.say("Choose at least one clip.");
              return this.begin({ ...about, lanes: most.map(({ run }) => run), items, who: who.value || null });
            }, { class: "bl-go" }),
            close,
          ])
        );
      }
    }
    begin(asked) {
      return this.send(`${this.api}/blind`, asked);
    }
    // What did not get through is sent again as it was, for the server may have kept it; and a
    // question that came stays, also when its sounds do not.
    async send(url, body) {
      if (this.waiting) return;
      this.waiting = true;
      const again = () => this.send();
      try {
        if (!this.unsent) this.unsent = [url, body];
        if (!this.pending) this.pending = await bgray.ask(...this.unsent);
        await (this.pending.done ? this.finish(this.pending) : this.ask(this.pending));
        this.pending = this.unsent = null;
      } catch (error) {
        if (this.pending) this.say(`The sounds cannot be had: ${error.message}. All answers so far are kept.`, again);
        else if (error.status < 500) {
          this.unsent = null;
          this.say(`${error.message}.`);
        } else this.say(`That did not get through: ${error.message}.${this.question ? " Your answer is not lost." : ""}`, again);
      } finally {
        this.waiting = false;
      }
    }

    // --- a question

    async ask(question) {
      const { element } = bgray;
      this.player.halt();
      const address = (token) => `${this.api}/blind/${question.session}/${token}`;
      const names = Object.keys(question.sounds).sort();
      const buffers = await Promise.all(names.map((name) => bgray.load(address(question.sounds[name]))));
      if (this.ended) return;
      Object.assign(this, { question, names, ranks: {}, played: new Set() });
      this.player.loop = [0, Math.min(...buffers.map((b) => b.duration))];
      this.player.resting = 0;
      this.player.set(buffers, buffers.map(() => 1), names.includes("x") ? names.indexOf("x") : 0);
      const what = this.kind === "abx" ? "Trial" : "Clip";
      const head = element("p", { class: "bl-progress" }, [
        element("strong", { text: `${what} ${question.number} of ${question.of}` }),
        element("progress", { max: question.of, value: question.number - 1, "aria-label": "Progress" }),
      ]);
      this.play = this.button("▶ Play", () => this.player.toggle(), { "aria-keyshortcuts": "Space" });
      this.listens = names.map((name) => this.button("", () => this.listen(name), {
        class: "bl-hear",
        "aria-pressed": "false",
        "aria-keyshortcuts": name[0],
      }));
      const rows = this.kind === "abx" ? this.abx() : this.ranking();
      this.body.replaceChildren(head, ...rows);
      this.update();
      this.listens[this.player.heard].focus();
    }
    abx() {
      const { element } = bgray;
      this.answers = ["a", "b"].map((name, i) =>
        this.button(`X is ${name.toUpperCase()} (${i + 1})`, () => this.decide(name), { "aria-keyshortcuts": String(i + 1) }));
      return [
        element("div", { class: "bl-row" }, [this.play, ...this.listens]),
        element("div", { class: "bl-row" }, [...this.answers, this.button("Break off", () => this.leave(), { class: "bl-away" })]),
        element("p", { class: "bl-note", text: "a, b, x: listen · space: play or stop · 1: X is A · 2: X is B. An answer counts once you have heard X." }),
      ];
    }
    ranking() {
      const { element } = bgray;
      const places = this.names.filter((name) => name !== "reference");
      this.answers = [this.button(this.question.number < this.question.of ? "Save, next clip (Enter)" : "Save, the last one (Enter)",
        () => this.decide(places.map((name) => this.ranks[name])), { "aria-keyshortcuts": "Enter" })];
      this.marks = {};
      const rows = this.names.map((name, i) => {
        if (name === "reference") return element("div", { class: "bl-row bl-ref" }, [this.listens[i], element("span", { text: "the target, for comparison" })]);
        this.marks[name] = places.map((_, place) =>
          this.button(String(place + 1), () => this.rank(name, place + 1), { "aria-pressed": "false", "aria-label": `${name.toUpperCase()} comes ${place + 1}` }));
        return element("div", { class: "bl-row", role: "group", "aria-label": name.toUpperCase() }, [this.listens[i], ...this.marks[name]]);
      });
      const last = places.length;
      return [
        element("div", { class: "bl-row" }, [this.play]),
        ...(this.names.includes("reference") ? [rows.pop()] : []),
        ...rows,
        element("div", { class: "bl-row" }, [...this.answers, this.button("Break off", () => this.leave(), { class: "bl-away" })]),
        element("p", { class: "bl-note", text: `a to ${places[last - 1]}: listen · r: target · 1 to ${last}: place of what you hear, 1 is best · space: play or stop. It is saved once you have heard and placed each.` }),
      ];
    }
    listen(name) {
      const i = this.names.indexOf(name);
      if (i < 0) return;
      this.player.hear(i);
      if (!this.player.playing) this.player.play(this.player.resting);
    }
    rank(name, place) {
      if (name === "reference") return;
      this.ranks[name] = place;
      this.update();
    }
    ready() {
      if (!this.question) return false;
      if (this.kind === "abx") return this.played.has("x");
      return this.names.every((name) => name === "reference" || (this.ranks[name] && this.played.has(name)));
    }
    decide(answer) {
      if (!this.ready()) return undefined;
      const { session, number } = this.question;
      return this.send(`${this.api}/blind/${session}`, { number, answer });
    }
    update() {
      if (!this.question) return;
      const heard = this.names[this.player.heard];
      if (this.player.playing) this.played.add(heard);
      this.play.textContent = this.player.playing ? "■ Stop" : "▶ Play";
      this.names.forEach((name, i) => {
        const on = name === heard;
        const text = name === "reference" ? "Target" : name.toUpperCase();
        this.listens[i].textContent = on && this.player.playing ? `♪ ${text}` : text;
        this.listens[i].setAttribute("aria-pressed", String(on));
      });
      for (const [name, marks] of Object.entries(this.marks || {})) {
        marks.forEach((mark, i) => mark.setAttribute("aria-pressed", String(this.ranks[name] === i + 1)));
      }
      for (const answer of this.answers) answer.disabled = !this.ready();
    }
    key(event) {
      const { target, key } = event;
      if (!this.question || event.ctrlKey || event.metaKey || event.altKey || bgray.typing(target)) return;
      if (this.body.querySelector(".bl-leave")) return;
      const button = target.closest("button");
      const name = key === "r" && this.kind === "ranking" ? "reference" : key.toLowerCase();
      const heard = this.names[this.player.heard];
      const place = /^[1-9]$/.test(key) ? Number(key) : 0;
      const does =
        this.names.includes(name) ? () => this.listen(name)
        : key === " " && (!button || this.listens.includes(button) || button === this.play) ? () => this.player.toggle()
        : this.kind === "abx" && (place === 1 || place === 2) ? () => this.decide("ab"[place - 1])
        : this.kind === "ranking" && place && this.marks[heard] && place <= this.marks[heard].length ? () => this.rank(heard, place)
        : this.kind === "ranking" && key === "Enter" && (!button || this.listens.includes(button)) ? () => this.answers[0].click()
        : null;
      if (!does) return;
      event.preventDefault();
      if (!event.repeat) does();
    }

    // --- after

    finish(result) {
      const { element } = bgray;
      this.player.halt();
      this.question = null;
      const file = element("p", { class: "bl-note", text: `Saved as listening/${result.file} in the sweep's folder.` });
      const close = this.button("Close", () => this.end(), { class: "bl-go" });
      if (this.kind === "abx") {
        this.body.replaceChildren(element("p", { class: "bl-result", text: `${result.right} of ${result.trials}` }), element("p", { role: "status", text: result.text }), file, close);
      } else {
        const head = element("tr", {}, ["", "mean place", "0 best – 1 worst"].map((text) => element("th", { scope: "col", text })));
        const rows = result.rows.map((row) => element("tr", {}, [
          element("th", { scope: "row", text: row.label }),
          element("td", { text: row.mean_rank.toFixed(2) }),
          element("td", { text: row.place.toFixed(2) }),
        ]));
        this.body.replaceChildren(
          element("p", { role: "status", text: "This is how you ranked them. One listener and few clips are an anecdote; all sessions together stand beside the scores." }),
          element("table", { class: "bl-table" }, [element("thead", {}, [head]), element("tbody", {}, rows)]), file, close);
      }
      close.focus();
      document.dispatchEvent(new CustomEvent("bgray-heard", { detail: { sweep: this.sweep } }));
    }
  }

  bgray.blindTest = (kind, about) => (bgray.test = new Test(kind, about));
})();
