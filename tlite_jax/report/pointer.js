"use strict";
// Shows the values of every line at the pointer's place.
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.dataset.lines), svg = figure.querySelector("svg");
  const [xRange, xPlace] = data.x, line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const tip = document.createElement("div");
  line.setAttribute("class", "pointer"); line.setAttribute("y1", data.y[1][1]); line.setAttribute("y2", data.y[1][0]);
  tip.className = "tip"; tip.hidden = true; line.style.display = "none"; svg.append(line); figure.append(tip);
  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (points[middle][0] < x) low = middle; else high = middle; }
    return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
  };
  const show = event => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = xRange[0] + (place - xPlace[0]) / (xPlace[1] - xPlace[0]) * (xRange[1] - xRange[0]);
    const found = data.lines.filter(one => one.points.length).map(one => [one, nearest(one.points, x)]);
    if (!found.length || place < xPlace[0] || place > xPlace[1]) return hide();
    const at = found.reduce((best, [, p]) => Math.abs(p[0] - x) < Math.abs(best - x) ? p[0] : best, found[0][1][0]);
    const to = xPlace[0] + (at - xRange[0]) / (xRange[1] - xRange[0] || 1) * (xPlace[1] - xPlace[0]);
    line.setAttribute("x1", to); line.setAttribute("x2", to); line.style.display = ""; tip.hidden = false;
    tip.replaceChildren(document.createTextNode(`${data.label} ${at.toLocaleString("en")}`));
    for (const [one, point] of found) {
      const row = document.createElement("div"), colour = document.createElement("i");
      colour.className = `c${one.colour}`; colour.style.cssText = "display:inline-block;width:.7em;height:.7em;margin-right:.4em";
      row.append(colour, `${one.name} ${point[1]}`); tip.append(row);
    }
    const left = to / svg.viewBox.baseVal.width * box.width;
    tip.style.left = left > box.width / 2 ? "" : `${left + 12}px`;
    tip.style.right = left > box.width / 2 ? `${box.width - left + 12}px` : "";
    tip.style.top = "2rem";
  };
  const hide = () => { line.style.display = "none"; tip.hidden = true; };
  svg.addEventListener("pointermove", show); svg.addEventListener("pointerdown", show); svg.addEventListener("pointerleave", hide);
}
