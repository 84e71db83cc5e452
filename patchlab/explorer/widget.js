// The view in a notebook: questions go to the kernel.
async function render({ model, el }) {
  const waiting = new Map();
  let last = 0;
  const own = Math.random().toString(36).slice(2); // other views of the same widget hear the same answers
  const heard = (content, buffers) => {
    const one = waiting.get(content.id);
    if (!one) return;
    one.heard = true;
    if ("progress" in content) one.progress(content.progress);
    else if ("part" in content) one.part(...content.part);
    else {
      waiting.delete(content.id);
      if ("error" in content) one.refuse(new Error(content.error));
      else if (content.stopped) one.refuse(new Error("stopped; what was finished is kept"));
      else one.done(buffers && buffers.length ? buffers[0] : content.answer);
    }
  };
  model.on("msg:custom", heard);
  const ask = (question, { progress = () => {}, part = () => {}, started = () => {}, patience = 0 } = {}) =>
    new Promise((done, refuse) => {
      const id = `${own}.${++last}`;
      const one = { done, refuse, progress, part, heard: false };
      waiting.set(id, one);
      started(() => model.send({ stop: id }));
      if (patience) setTimeout(() => one.heard || refuse(new Error("the kernel does not answer: run the cell again")), patience);
      model.send({ id, ask: question });
    });
  el.textContent = "…";
  let stop = () => {};
  try {
    const state = await ask(["state"], { patience: 60000 });
    const code = new TextDecoder().decode(await ask(["plotly"]));
    const module = { exports: {} };
    new Function("module", "exports", "define", code)(module, module.exports, undefined);
    el.textContent = "";
    stop = mount(el, { Plotly: module.exports, state, live: true, ask });
  } catch (error) {
    el.textContent = error.message;
  }
  return () => {
    model.off("msg:custom", heard);
    stop();
  };
}
export default { render };
