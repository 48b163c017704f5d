// Numbers and times as people read them.

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "unknown";
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

export function number(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) >= 0.0001 && Math.abs(value) < 100000 ? String(+value.toPrecision(4)) : value.toExponential(2);
}

export const px = (width, height) => `${width.toLocaleString("en")} × ${height.toLocaleString("en")} px`;

export function clock(iso) {
  const time = new Date(iso);
  return Number.isNaN(time.getTime()) ? "" : time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

// Quotes a word for a POSIX shell.
export const shell = (word) => (/^[A-Za-z0-9_./:=,@%+-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

// Copies the text of an element, and says so on the button.
export async function copyText(element, button) {
  const before = button.dataset.label ??= button.textContent;
  try {
    await navigator.clipboard.writeText(element.textContent);
    button.textContent = "Copied";
  } catch { // without https the browser may not give the clipboard: the text is selected instead
    getSelection().selectAllChildren(element);
    button.textContent = "Selected: Ctrl-C";
  }
  setTimeout(() => { button.textContent = before; }, 2000);
}
