"use strict";

// Of each chart: the values of its curves, and its marks, by step. Where the pointer is, those that
// are nearest are said, and the step is shown in all charts.
const { charts, steps } = JSON.parse(document.getElementById("data").textContent);
const plots = [...document.querySelectorAll(".plot")];
const [low, high] = steps;

function nearest(points, step) {
  let [from, to] = [0, points.length - 1];
  while (from < to) {
    const middle = (from + to) >> 1;
    if (points[middle][0] < step) from = middle + 1;
    else to = middle;
  }
  const before = Math.max(0, from - 1);
  return step - points[before][0] < points[from][0] - step ? points[before] : points[from];
}

function show(plot, chart, step, width) {
  const reach = ((high - low) * 8) / width; // of eight pixels to each side
  const found = chart.curves.map((curve) => [curve, nearest(curve.points, step)]);
  if (!found.length) return;
  const distance = (point) => Math.abs(point[0] - step);
  const at = found.map(([, point]) => point).reduce((a, b) => (distance(b) < distance(a) ? b : a))[0];
  const lines = [`step ${at.toLocaleString("en")}`];
  for (const [curve, point] of found) {
    if (point[0] === at) lines.push(`${curve.name} ${point[1]}`);
    else if (Math.abs(point[0] - at) <= reach) lines.push(`${curve.name} ${point[1]} (step ${point[0].toLocaleString("en")})`);
  }
  const close = chart.marks.filter((mark) => distance(mark) <= reach);
  for (const [of, text] of close.slice(0, 3)) lines.push(`step ${of.toLocaleString("en")}: ${text}`);
  const tip = plot.querySelector(".tip");
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const share = (at - low) / (high - low);
  const room = width - tip.offsetWidth;
  tip.style.left = `${Math.max(-40, Math.min(room, share * width + (share > 0.5 ? -tip.offsetWidth - 10 : 10)))}px`;
  for (const hair of document.querySelectorAll(".hair")) {
    hair.setAttribute("x1", `${100 * share}%`);
    hair.setAttribute("x2", `${100 * share}%`);
    hair.setAttribute("visibility", "visible");
  }
}

plots.forEach((plot, i) => {
  const move = (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
    show(plot, charts[i], low + share * (high - low), box.width);
  };
  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerdown", move);
  plot.addEventListener("pointerleave", () => {
    plot.querySelector(".tip").hidden = true;
    for (const hair of document.querySelectorAll(".hair")) hair.setAttribute("visibility", "hidden");
  });
});
