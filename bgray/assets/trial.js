// One trial's details, as /api/trial gives them.
(function () {
  "use strict";
  const bgray = (window.bgrayPage = window.bgrayPage || {});

  function facts(title, pairs) {
    const { element } = bgray;
    const list = element("dl", { class: "facts" }, pairs.flatMap(([name, text]) => [
      element("dt", { text: name }),
      element("dd", { text }),
    ]));
    return element("div", {}, [element("h3", { text: title }), list]);
  }

  function table(title, heads, rows) {
    const { element } = bgray;
    const cell = (tag, text) => element(tag, { text, scope: tag === "th" ? "col" : null });
    const line = (tag, cells) => element("tr", {}, cells.map((text) => cell(tag, text)));
    const made = element("table", { class: "plain" }, [
      element("thead", {}, [line("th", heads)]),
      element("tbody", {}, rows.map((row) => line("td", row))),
    ]);
    return element("div", {}, [element("h3", { text: title }), made]);
  }

  bgray.drawTrial = function (root, trial) {
    const { element } = bgray;
    if (trial.error) {
      root.replaceChildren(element("p", { class: "faint", text: trial.error }));
      return;
    }
    const shown = JSON.stringify(trial);
    if (root.shown === shown) return;
    root.shown = shown;
    const reason = trial.reason ? `: ${trial.reason}` : "";
    const badly = ["failed", "diverged", "out_of_memory"].includes(trial.state);
    const parts = [
      element("p", { class: "all" }, [
        element("b", { text: `${trial.label}, seed ${trial.seed} ` }),
        element("span", { class: `chip ${trial.state}`, text: bgray.marked(trial.state) }),
        element("span", { class: badly ? "verdict worse" : null, text: reason }),
      ]),
    ];
    if (trial.warnings.length) {
      const items = trial.warnings.map((text) => element("li", { text }));
      const list = element("ul", { class: "warnings" }, items);
      parts.push(element("div", { class: "all" }, [element("h3", { text: "Warnings" }), list]));
    }
    parts.push(facts("Trial", trial.facts));
    const { changes, attempts } = trial;
    const settings = ["setting", "baseline", "here"];
    if (changes.length) parts.push(table("Differs from the baseline in", settings, changes));
    if (attempts.length) parts.push(table("Attempts", ["from step", "begun", "ended", "host"], attempts));
    if (trial.machine.length) parts.push(facts("Ran on", trial.machine));
    for (const [name, text] of trial.files) {
      const pre = element("pre", { tabindex: "0", "aria-label": name, text });
      parts.push(element("div", { class: "all" }, [element("h3", { text: name }), pre]));
    }
    root.replaceChildren(...parts);
    // What was logged last is at the end.
    for (const pre of root.querySelectorAll("pre")) pre.scrollTop = pre.scrollHeight;
  };
})();
