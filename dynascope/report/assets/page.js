"use strict";
// Charts are drawn when they come near the window: a page of fifty opens at once.
(async () => {
  const text = document.getElementById("data").textContent.trim();
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const { charts, themes } = await new Response(inflated).json();
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const views = new Map();
  const isDark = matchMedia("(prefers-color-scheme: dark)");

  async function draw(figure) {
    const number = Number(figure.dataset.chart);
    const { spec, data } = charts[number];
    // The expression interpreter makes no code from text, so the page's policy can forbid that.
    const plot = figure.querySelector(".plot");
    const isNarrow = figure.clientWidth < 440;
    const columns = spec.concat && isNarrow ? { columns: 1 } : {};
    const options = { actions: false, renderer: "canvas", ast: true, logLevel: 1, config: themes[isDark.matches ? "dark" : "light"] };
    const { view } = await vegaEmbed(plot, { ...spec, ...columns, datasets: data }, options);
    // The plot takes the room that its labels leave, so that letters keep their size on a phone.
    const room = Math.min(figure.clientWidth, 640) - plot.querySelector("canvas").width / devicePixelRatio;
    const isSingle = !["concat", "hconcat", "vconcat", "facet"].some((key) => key in spec) && !["row", "column", "facet"].some((key) => key in (spec.encoding ?? {}));
    if (isSingle) await view.width(Math.max(120, view.width() + Math.floor(room))).runAsync();
    views.set(number, view);
    figure.dataset.drawn = "";
  }

  const drawOnce = (figure) => views.has(Number(figure.dataset.chart)) || (views.set(Number(figure.dataset.chart), null), draw(figure));
  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => drawOnce(entry.target)),
    { rootMargin: "600px" },
  );
  figures.forEach((figure) => near.observe(figure));
  addEventListener("beforeprint", () => figures.forEach(drawOnce));
  isDark.addEventListener("change", () => figures.filter((figure) => "drawn" in figure.dataset).forEach(draw));

  addEventListener("click", async (event) => {
    if (!event.target.matches("button.copy")) return;
    await navigator.clipboard.writeText(event.target.parentElement.querySelector("pre").textContent);
    event.target.textContent = "copied";
  });

  const { stream } = document.body.dataset;
  if (!stream) return;
  const source = new EventSource(stream);
  source.addEventListener("rows", (event) => {
    for (const [number, sets] of Object.entries(JSON.parse(event.data))) {
      const view = views.get(Number(number));
      for (const [name, rows] of Object.entries(sets)) {
        charts[number].data[name].push(...rows);
        if (view) view.resize().insert(name, rows).runAsync();  // new labels may be wider
      }
    }
  });
  source.addEventListener("findings", (event) => {
    // The server escaped every text in it.
    document.getElementById("findings").innerHTML = JSON.parse(event.data);
  });
  source.addEventListener("flags", (event) => {
    for (const [number, rows] of Object.entries(JSON.parse(event.data))) {
      charts[number].data.findings = rows;
      views.get(Number(number))?.data("findings", rows).runAsync();
    }
  });
  source.addEventListener("state", (event) => {
    document.getElementById("state").textContent = JSON.parse(event.data);
  });
  // New series, or more rows than a chart wants: the server draws the page anew, thinned.
  source.addEventListener("reload", () => location.reload());
  source.addEventListener("end", () => source.close());
})();
