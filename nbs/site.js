// Search by words: guides before reference, and two of three words suffice. It stands in for the renderer's fuzzy search.
(function () {
  const STOP = new Set("a an and are as at be by can do does for from get how i if in is it my of on or the to what when where which with".split(" "));
  const words = (s) => (s.toLowerCase().match(/[\p{L}\p{N}_±]+/gu) || []);
  const SAME = new Map(Object.entries({ custom: "own", matlab: "mat", method: "strategy", continue: "resum", restart: "resum", interruption: "interrupt" }));
  const stem = (w) => { const one = w.replace(/ies$/, "y"); return SAME.get(one) || (one.length > 4 ? one.replace(/(ing|ed|es|s|e)$/, "") : one); };
  const WEIGHTS = [[/^index\.html/, 2.2], [/^(tutorials|explain)\//, 2], [/^(glossary|errors|results)\.html/, 1.8], [/^commands\.html/, 1.5]];
  const weight = (href) => (WEIGHTS.find(([page]) => page.test(href.replace(/^\.\//, ""))) || [0, 1])[1];
  class WordSearch {
    constructor(entries) {
      this.entries = entries.map((item) => {
        const body = words(item.text).map(stem);
        const count = new Map();
        body.forEach((w) => count.set(w, (count.get(w) || 0) + 1));
        const section = new Set(words(item.section || "").map(stem).filter((w) => !STOP.has(w)));
        return { item, count, section, head: new Set(words(item.title + " " + (item.section || "")).map(stem)),
                 text: item.text.toLowerCase(), size: body.length };
      });
      this.seen = new Map(); // word -> entries that have it
      for (const e of this.entries) for (const w of new Set([...e.count.keys(), ...e.head])) this.seen.set(w, (this.seen.get(w) || 0) + 1);
    }
    rarity(w) { return Math.log(1 + this.entries.length / (1 + (this.seen.get(w) || 0))); }
    score(e, query, last) {
      let score = 0, found = 0;
      query.forEach((w, i) => {
        let hit = e.head.has(w) ? 6 : 0;
        const n = e.count.get(w) || 0;
        if (n) hit += 1 + Math.log(n) / 2;
        if (!hit && i === query.length - 1 && w === last) { // still being typed
          if ([...e.head].some((h) => h.startsWith(w))) hit = 4;
          else if ([...e.count.keys()].some((h) => h.startsWith(w))) hit = 0.7;
        }
        if (hit) { found += 1; score += hit * this.rarity(w); }
      });
      if (found < Math.ceil((2 * query.length) / 3)) return 0;
      return score * (found / query.length) ** 2;
    }
    search(q, options) {
      const all = words(q);
      let query = [...new Set(all.filter((w) => (w.length > 1 || w === "±") && !STOP.has(w)).map(stem))];
      if (!query.length) query = all.map(stem);
      const last = query[query.length - 1], phrase = q.toLowerCase().trim();
      const found = [];
      for (const e of this.entries) {
        let score = this.score(e, query, last);
        if (!score) continue;
        if (phrase.length > 6 && e.text.includes(phrase)) score *= 2;
        const page = weight(e.item.href);
        if (page > 1 && query.length === e.section.size && query.every((w) => e.section.has(w))) score *= 2; // its heading, word by word
        if (e.item.href.includes("#term-")) score *= 1.1; // rather than the section that it is in
        score *= page;
        found.push({ item: e.item, score });
      }
      found.sort((a, b) => b.score - a.score);
      return found.slice(0, (options && options.limit) || 20);
    }
  }
  window.Fuse = WordSearch;
  // What scrolls sideways can be reached and scrolled with the keyboard, and shows that it scrolls.
  const isWide = (e) => { // a live figure still has its old width when a window is resized
    const figure = e.querySelector(".plotly-figure");
    return (figure ? parseFloat(figure.style.minWidth) : e.scrollWidth) > e.clientWidth + 1;
  };
  const mark = () => document.querySelectorAll("main pre, main .cell-output, main .cell-output-display, main .sd-table, main .formula").forEach((e) => {
    const scrolls = isWide(e) && ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
    e.classList.toggle("scrolls", scrolls);
    if (scrolls) { e.tabIndex = 0; e.setAttribute("role", "group"); e.setAttribute("aria-label", "scrolls sideways"); }
  });
  addEventListener("load", mark);
  addEventListener("resize", mark);
})();
