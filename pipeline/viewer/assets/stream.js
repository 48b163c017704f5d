// The state of the run: server-sent events, or polling where a proxy holds them back. Reports when the viewer is gone.

const SILENT_MS = 13000; // the server says at least every five seconds that it is alive
const POLL_MS = 3000;

// `known`: the text of a state that the page has already.
export function follow(known, onState, onLost) {
  let last = performance.now();
  let polling = false;
  let source;

  function receive(text) {
    last = performance.now();
    if (text === known) return;
    known = null;
    onState(JSON.parse(text));
  }

  function lost(status) {
    known = null; // the same state is news again
    onLost(status);
  }

  function open() {
    source = new EventSource("events");
    source.onmessage = (event) => { polling = false; receive(event.data); };
    source.onerror = () => { lost(); if (source.readyState === EventSource.CLOSED) polling = true; };
  }

  async function poll() {
    try {
      const answer = await fetch("state", { cache: "no-store" });
      if (!answer.ok) { lost(answer.status); return; }
      receive(await answer.text());
      if (source.readyState === EventSource.CLOSED) open();
    } catch {
      lost();
    }
  }

  open();
  setInterval(() => {
    // comments keep the connection open without a message: so a quiet stream is asked, not given up
    if (polling || performance.now() - last > SILENT_MS) poll();
  }, POLL_MS);
}
