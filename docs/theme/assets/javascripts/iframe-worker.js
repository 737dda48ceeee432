// A page that was opened from a folder may not start a worker from a file. The search's worker then runs in a hidden frame instead.
// The theme looks for this name.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(address) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.title = "search"
      document.body.appendChild(this.frame)
      const inside = this.frame.contentWindow
      this.ready = new Promise(done => this.frame.addEventListener("load", done, { once: true }))
      inside.document.open()
      inside.document.write('<!doctype html><html lang="en"><title>search</title><body>')
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.deliver = data => inside.dispatchEvent(new MessageEvent("message", { data }))
      const script = inside.document.createElement("script")
      script.src = address
      this.loaded = new Promise(done => script.addEventListener("load", done))
      inside.document.body.appendChild(script)
      inside.document.close()
    }
    postMessage(data) {
      this.loaded.then(() => this.deliver(data))
    }
    terminate() {
      this.frame.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
